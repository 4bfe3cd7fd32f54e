//! The file of a configuration, in the fixes of problems.

/// The file of a configuration, for fixes. `-` is standard input, which cannot be applied again.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a>(pub &'a str);

impl Source<'_> {
    fn is_stdin(self) -> bool {
        self.0 == "-"
    }

    /// Returns the command that applies the file again.
    pub fn apply(self) -> String {
        match self.is_stdin() {
            true => "apply the configuration again (it came from standard input)".into(),
            false => format!("udplb apply {}", self.0),
        }
    }

    /// Returns the same command with `--force`.
    pub fn force(self) -> String {
        match self.is_stdin() {
            true => format!("{}, with --force", self.apply()),
            false => format!("{} --force", self.apply()),
        }
    }

    /// Returns the commands that show its changes and apply it.
    pub fn plan(self) -> String {
        match self.is_stdin() {
            true => self.apply(),
            false => format!("udplb plan {}; {}", self.0, self.apply()),
        }
    }

    pub fn edit(self) -> String {
        match self.is_stdin() {
            true => "change what was applied from standard input, and apply it again".into(),
            false => format!("edit {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_input_is_no_file() {
        let source = Source("-");
        for advice in [source.apply(), source.edit(), source.plan(), source.force()] {
            assert!(!advice.contains("apply -") && !advice.contains("edit -"), "{advice}");
        }
    }
}
