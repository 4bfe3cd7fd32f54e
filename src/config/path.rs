//! Places of values in a configuration.

use std::borrow::Cow;
use std::fmt;

use super::quote::shorten;

/// A place in the file, printed like `rules[2].upstream[0].address`, or `[2].key.port` in a bare list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path(pub(super) Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Index(usize),
    Field(Cow<'static, str>),
}

impl Path {
    /// Returns the field `name` of the map at this place.
    pub fn field(&self, name: impl Into<Cow<'static, str>>) -> Path {
        self.with(Step::Field(name.into()))
    }

    /// Returns the element `index` of the list at this place, counted from 0.
    pub fn index(&self, index: usize) -> Path {
        self.with(Step::Index(index))
    }

    fn with(&self, step: Step) -> Path {
        let mut steps = self.0.clone();
        steps.push(step);
        Path(steps)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Field(name) => {
                    let dot = if nth == 0 { "" } else { "." };
                    write!(f, "{dot}{}", shorten(name))?;
                }
            }
        }
        Ok(())
    }
}

/// A [`Path`] under construction, on the stack: decoding makes one of these for every
/// value, and a `Path` for few.
#[derive(Clone, Copy)]
pub(super) struct Trail<'a> {
    parent: Option<&'a Trail<'a>>,
    step: Turn,
}

#[derive(Clone, Copy)]
enum Turn {
    Root,
    Index(usize),
    Field(&'static str),
}

impl Trail<'_> {
    pub const ROOT: Trail<'static> = Trail { parent: None, step: Turn::Root };

    pub fn field<'a>(&'a self, name: &'static str) -> Trail<'a> {
        Trail { parent: Some(self), step: Turn::Field(name) }
    }

    pub fn index<'a>(&'a self, index: usize) -> Trail<'a> {
        Trail { parent: Some(self), step: Turn::Index(index) }
    }

    pub fn path(&self) -> Path {
        let mut steps = Vec::new();
        let mut here = Some(self);
        while let Some(trail) = here {
            match trail.step {
                Turn::Root => {}
                Turn::Index(index) => steps.push(Step::Index(index)),
                Turn::Field(name) => steps.push(Step::Field(Cow::Borrowed(name))),
            }
            here = trail.parent;
        }
        steps.reverse();
        Path(steps)
    }
}
