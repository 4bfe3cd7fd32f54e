//! Text of a file inside messages.

use super::hint::is_invisible;

/// The longest piece of the file's text that is repeated inside a message, in characters.
const QUOTED: usize = 60;

/// Replaces control characters and invisible ones, which a terminal would obey or not show.
pub(super) fn printable(c: char) -> char {
    let plain = !c.is_control() && !is_invisible(c) || c == '\t';
    if plain { c } else { char::REPLACEMENT_CHARACTER }
}

/// Returns text of the file in a form that fits into a message.
pub(super) fn shorten(text: &str) -> String {
    let mut short: String = text.chars().take(QUOTED).map(printable).collect();
    if short.len() < text.len() && text.chars().nth(QUOTED).is_some() {
        short.push('…');
    }
    short
}
