//! Tables of text, cut to the width of a terminal.

use std::borrow::Cow;

/// Separator of columns; scripts can split at it.
const GAP: &str = "  ";

/// A column of a table.
#[derive(Clone, Copy)]
pub struct Column {
    pub title: &'static str,
    /// Aligned to the right, for numbers.
    pub right: bool,
    /// Minimum width in characters when the table is too wide; `None`: never cut.
    pub min: Option<usize>,
}

impl Column {
    pub const fn text(title: &'static str, min: usize) -> Column {
        Column { title, right: false, min: Some(min) }
    }

    pub const fn number(title: &'static str) -> Column {
        Column { title, right: true, min: None }
    }
}

/// Returns the lines of a table, the header first. With `width`, in characters, lines are cut to it. Columns
/// without content are left out.
pub fn lines(
    columns: &[Column],
    rows: &[Vec<impl AsRef<str>>],
    width: Option<usize>,
) -> Vec<String> {
    let length = |cell: &str| cell.chars().count();
    let mut widths = vec![0; columns.len()];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = length(cell.as_ref()).max(*width);
        }
    }
    for (column, width) in columns.iter().zip(&mut widths) {
        if *width > 0 {
            *width = length(column.title).max(*width);
        }
    }
    if let Some(max) = width {
        shrink(columns, &mut widths, max);
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::with_capacity(widths.iter().sum::<usize>() + 2 * widths.len());
        let cells = columns.iter().zip(cells).zip(&widths);
        for ((column, cell), width) in cells.filter(|(_, width)| **width > 0) {
            let cell = cut(cell, *width);
            let blanks = width - length(&cell);
            if column.right {
                line.extend(std::iter::repeat_n(' ', blanks));
            }
            line += &cell;
            if !column.right {
                line.extend(std::iter::repeat_n(' ', blanks));
            }
            line += GAP;
        }
        line.truncate(line.trim_end().len());
        match width {
            Some(width) => cut(&line, width).into_owned(),
            None => line,
        }
    };
    let mut lines = Vec::with_capacity(rows.len() + 1);
    lines.push(line(&mut columns.iter().map(|column| column.title)));
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(AsRef::as_ref))));
    lines
}

/// Narrows the widest column that can be cut, by one character at a time, until the table fits.
fn shrink(columns: &[Column], widths: &mut [usize], max: usize) {
    let shown = widths.iter().filter(|width| **width > 0).count();
    let gaps = GAP.len() * shown.saturating_sub(1);
    let mut over = (widths.iter().sum::<usize>() + gaps).saturating_sub(max);
    while over > 0 {
        let elastic = columns.iter().zip(&mut *widths).filter(|(column, width)| {
            column.min.is_some_and(|min| **width > min.max(column.title.len()))
        });
        let Some((_, widest)) = elastic.max_by_key(|(_, width)| **width) else { return };
        *widest -= 1;
        over -= 1;
    }
}

/// Wraps text at blanks to lines of at max `width` characters; a longer word stays whole. Lines after the
/// first are indented.
pub fn wrapped(text: &str, width: usize, indent: &str) -> Vec<String> {
    let start = text.len() - text.trim_start().len();
    let mut lines = vec![text[..start].to_string()];
    let mut is_empty = true;
    for word in text.split_whitespace() {
        let Some(line) = lines.last_mut() else { break };
        let blank = usize::from(!is_empty);
        if is_empty || line.chars().count() + blank + word.chars().count() <= width {
            *line += if is_empty { "" } else { " " };
            *line += word;
        } else {
            lines.push(format!("{indent}{word}"));
        }
        is_empty = false;
    }
    lines
}

/// Cuts text to a width, with an ellipsis at the end.
pub fn cut(text: &str, width: usize) -> Cow<'_, str> {
    // a character is a byte at least
    if text.len() <= width || text.chars().count() <= width {
        return text.into();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).take(width).collect()
}

#[cfg(test)]
mod tests {
    use super::{Column, cut, lines, wrapped};

    #[test]
    fn text_breaks_at_blanks() {
        assert_eq!(wrapped("! one two three", 9, "  "), ["! one two", "  three"]);
        assert_eq!(wrapped("  fix: a", 80, "    "), ["  fix: a"]);
        assert_eq!(wrapped("averylongword b", 5, " "), ["averylongword", " b"]);
        assert_eq!(wrapped("", 5, " "), [""]);
    }

    const COLUMNS: [Column; 3] =
        [Column::text("RULE", 4), Column::text("NEXT HOP", 9), Column::number("PPS")];

    fn table(width: Option<usize>) -> Vec<String> {
        let row = |cells: [&str; 3]| cells.map(String::from).to_vec();
        let rows = [row(["flows", "10.2.0.20 dev up0", "9"]), row(["-", "-", "12345"])];
        lines(&COLUMNS, &rows, width)
    }

    #[test]
    fn columns_stand_below_their_titles() {
        let wanted = [
            "RULE   NEXT HOP             PPS",
            "flows  10.2.0.20 dev up0      9",
            "-      -                  12345",
        ];
        assert_eq!(table(None), wanted);
        assert_eq!(table(Some(31)), wanted);
    }

    #[test]
    fn what_is_too_wide_gives_way() {
        let wanted =
            ["RULE   NEXT HOP     PPS", "flows  10.2.0.2…      9", "-      -          12345"];
        assert_eq!(table(Some(23)), wanted);
        assert_eq!(table(Some(10)), ["RULE  NEX…", "flo…  10.…", "-     -  …"]);
        assert_eq!(cut("abc", 0), "");
        let rows = [vec!["a".into(), String::new(), "1".into()]];
        assert_eq!(lines(&COLUMNS, &rows, Some(80)), ["RULE  PPS", "a       1"]);
    }
}
