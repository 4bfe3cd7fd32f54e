//! Text of a file inside messages.

use super::hint::is_invisible;

/// The longest piece of the file's text that is repeated inside a message, in characters.
const QUOTED: usize = 60;

/// Replaces what would reach the operator's terminal as a control sequence, or not be seen there.
pub(super) fn printable(c: char) -> char {
    let plain = !c.is_control() && !is_invisible(c) || c == '\t';
    if plain { c } else { char::REPLACEMENT_CHARACTER }
}

/// Text from the file, fit to stand inside a message.
pub(super) fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTED).map(printable).collect();
    if short.len() < text.len() && text.chars().nth(QUOTED).is_some() {
        short.push('…');
    }
    short
}
