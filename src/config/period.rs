//! Durations.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::diagnostic::Message;
use super::quote::shorten;

/// The units, the longest first, in milliseconds.
const UNITS: [(&str, u32); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A duration in whole milliseconds. Text: a whole number with its unit, `500ms`, `10s`, `2m` or `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Period(u32);

impl Period {
    pub const fn from_secs(seconds: u32) -> Period {
        Period(seconds * 1000)
    }

    pub const fn from_millis(milliseconds: u32) -> Period {
        Period(milliseconds)
    }
}

impl From<Period> for Duration {
    fn from(period: Period) -> Duration {
        Duration::from_millis(period.0.into())
    }
}

/// Formats with the longest unit that leaves a whole number.
impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, length): &&(&str, u32)| self.0 >= *length && self.0.is_multiple_of(*length);
        match UNITS.iter().find(fits) {
            Some((unit, length)) => write!(f, "{}{unit}", self.0 / length),
            None => f.write_str("0s"),
        }
    }
}

impl From<Period> for String {
    fn from(period: Period) -> String {
        period.to_string()
    }
}

impl TryFrom<String> for Period {
    type Error = String;

    fn try_from(text: String) -> Result<Period, String> {
        text.parse()
    }
}

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Period, String> {
        period(text).map_err(|message| message.text)
    }
}

/// Parses a duration as it stands in a file.
pub(super) fn period(text: &str) -> Result<Period, Message> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let length = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, length)| *length);
    let number = number.parse::<u32>().ok();
    let milliseconds = number.zip(length).and_then(|(number, length)| number.checked_mul(length));
    milliseconds.map(Period).ok_or_else(|| {
        let help = "a duration is a whole number and its unit: `500ms`, `10s`, `2m`, `1h`";
        Message::new(format!("`{}` is not a duration", shorten(text))).help(help)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::Period;

    #[test]
    fn periods_have_units() {
        for (text, milliseconds) in [
            ("0s", 0),
            ("1ms", 1),
            ("1500ms", 1500),
            ("10s", 10_000),
            ("2m", 120_000),
            ("49h", 176_400_000),
        ] {
            let period: Period = text.parse().expect(text);
            assert_eq!(Duration::from(period), Duration::from_millis(milliseconds), "{text}");
            assert_eq!(period.to_string(), text);
        }
        assert_eq!("60s".parse::<Period>().expect("a minute").to_string(), "1m");
        for text in ["", "10", "s", "-1s", "1.5s", "10 s", "10d", "4294967296ms", "1194h", "+1s"] {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_period_is_read_as_it_is_written(milliseconds: u32) {
            let text = Period(milliseconds).to_string();
            prop_assert_eq!(text.parse(), Ok(Period(milliseconds)), "{}", text);
        }
    }
}
