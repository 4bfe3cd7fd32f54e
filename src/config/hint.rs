//! Likely causes of an error that its message cannot name: slips of the pen, characters that look like
//! others, and templates that nobody has filled in.

/// Name of a character that looks like another one or like nothing, and its plain substitute.
fn lookalike(c: char) -> Option<(&'static str, &'static str)> {
    Some(match c {
        '\u{a0}' | '\u{202f}' => ("no-break space", "a blank"),
        '\u{2000}'..='\u{200a}' | '\u{205f}' | '\u{3000}' => ("a wide or narrow space", "a blank"),
        '\u{200b}' => ("zero-width space", "nothing"),
        '\u{200c}' | '\u{200d}' | '\u{2060}' => ("zero-width joiner", "nothing"),
        '\u{feff}' => ("byte order mark", "nothing"),
        '\u{ad}' => ("soft hyphen", "nothing"),
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            ("a control character for text direction", "nothing")
        }
        '\u{2018}'..='\u{201f}' | '\u{ab}' | '\u{bb}' => ("a typographic quotation mark", "`\"`"),
        '\u{2010}'..='\u{2015}' | '\u{2212}' => ("a typographic dash", "`-`"),
        '\u{ff0c}' => ("a wide comma", "`,`"),
        '\u{ff1a}' => ("a wide colon", "`:`"),
        '\u{ff0e}' => ("a wide full stop", "`.`"),
        '\u{ff10}'..='\u{ff19}' => ("a wide digit", "a plain one"),
        _ => return None,
    })
}

/// True for a character that a reader cannot see, or that hides or reorders others.
pub(super) fn is_invisible(c: char) -> bool {
    lookalike(c).is_some_and(|(_, instead)| instead == "nothing" || instead == "a blank")
}

/// Returns advice for a line with an error, in YAML or TOML; its comment does not count.
pub(super) fn advice(line: &str) -> Option<String> {
    let line = line.split(" #").next().unwrap_or_default();
    let found = line.chars().enumerate().find_map(|(nth, c)| Some((nth, c, lookalike(c)?)));
    if let Some((nth, c, (name, instead))) = found {
        let (column, code) = (nth + 1, u32::from(c));
        return Some(format!("column {column} has U+{code:04X} ({name}): write {instead} instead"));
    }
    let placeholders = [("{{", "}}"), ("{%", "%}"), ("${", "}"), ("<%", "%>")];
    let (open, close) = placeholders.iter().find(|(open, close)| {
        line.split_once(open).is_some_and(|(_, behind)| behind.contains(close))
    })?;
    Some(format!(
        "`{open} … {close}` belongs to a template: fill it in before udplb reads the file"
    ))
}

/// Returns the known word that `word` is probably a slip of.
pub fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    /// Longer words are no slips, and cost time.
    const LONGEST: usize = 32;
    let folded = |word: &str| word.to_lowercase().replace('_', "-");
    let word = folded(word);
    let length = word.chars().count();
    if length > LONGEST {
        return None;
    }
    let slips = known.iter().map(|known| (strsim::osa_distance(&word, &folded(known)), *known));
    let (slips, near) = slips.min()?;
    (slips <= (length / 3).max(1) && slips < length).then_some(near)
}

#[cfg(test)]
mod tests {
    use super::{advice, is_invisible, nearest};

    #[test]
    fn the_nearest_word_is_suggested_for_a_slip_only() {
        let known = ["tc_action", "strategy", "source", "port"];
        for (slip, word) in [
            ("tc-action", Some("tc_action")),
            ("Strategy", Some("strategy")),
            ("stratgey", Some("strategy")),
            ("sources", Some("source")),
            ("prot", Some("port")),
            ("", None),
            ("x", None),
            ("weight", None),
        ] {
            assert_eq!(nearest(slip, &known), word, "{slip}");
        }
    }

    #[test]
    fn lookalikes_and_templates_are_named() {
        for (line, wanted) in [
            ("address:\u{a0}10.0.0.1", "column 9 has U+00A0 (no-break space): write a blank"),
            ("a: 10.0.0.1\u{200b}", "column 12 has U+200B (zero-width space): write nothing"),
            ("port: \u{201c}1-2\u{201d}", "column 7 has U+201C (a typographic quotation mark)"),
            ("port: 1\u{2013}2", "column 8 has U+2013 (a typographic dash): write `-`"),
            ("port: \u{ff12}055", "column 7 has U+FF12 (a wide digit): write a plain one"),
            ("address: {{ vip }}", "`{{ … }}` belongs to a template"),
            ("address: ${VIP}", "`${ … }` belongs to a template"),
        ] {
            assert!(advice(line).is_some_and(|advice| advice.starts_with(wanted)), "{line}");
        }
        for line in ["a: { b: 1 }", "name: übung", "a: 1 # \u{2013} {{ x }}", ""] {
            assert_eq!(advice(line), None);
        }
    }

    #[test]
    fn visible_characters_stay() {
        assert!(is_invisible('\u{202e}') && is_invisible('\u{a0}'));
        assert!(!is_invisible('é') && !is_invisible('\u{2013}') && !is_invisible(' '));
    }
}
