//! Times in output.

use std::time::{Duration, UNIX_EPOCH};

use jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};

/// Returns the current time in seconds since 1970.
pub fn now() -> u64 {
    u64::try_from(Timestamp::now().as_second()).unwrap_or(0)
}

/// Returns the time since boot, including suspend (`CLOCK_BOOTTIME`); clock adjustments do not affect it.
pub fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Returns the current time since 1970.
pub fn since_1970() -> Duration {
    UNIX_EPOCH.elapsed().unwrap_or_default()
}

/// Formats a time since 1970 as `2026-11-22T14:07:20.123456Z`.
pub fn exact(time: Duration) -> String {
    timestamp(time).map_or_else(String::new, |time| format!("{time:.6}"))
}

/// Formats a time since 1970 as the time of day in UTC: `14:07:20.123456`.
pub fn time_of_day(time: Duration) -> String {
    timestamp(time).map_or_else(String::new, |time| time.strftime("%H:%M:%S%.6f").to_string())
}

fn timestamp(time: Duration) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::try_from(time.as_nanos()).ok()?).ok()
}

/// Formats seconds since 1970 as `2026-11-22T14:07:20Z`.
pub fn utc(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .map_or_else(|| format!("second {seconds}"), |time| time.to_string())
}

/// Serializes seconds since 1970 as RFC 3339.
pub fn rfc3339<T: Copy + Into<u64>, S: Serializer>(
    time: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    time.map(|time| utc(time.into())).serialize(serializer)
}

/// Formats a duration with its two largest units: `3d4h`, `12m5s`.
pub fn age(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let first = units.iter().position(|(unit, _)| seconds >= *unit).unwrap_or(3);
    let mut left = seconds;
    let mut text = String::new();
    for (unit, name) in units.iter().skip(first).take(2) {
        if left / unit > 0 || text.is_empty() {
            text += &format!("{}{name}", left / unit);
        }
        left %= unit;
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{age, exact, time_of_day, utc};

    #[test]
    fn times_in_words() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(u64::MAX), "second 18446744073709551615");
        let time = Duration::new(951_782_400, 1_234_567);
        assert_eq!(exact(time), "2000-02-29T00:00:00.001234Z");
        assert_eq!(time_of_day(time), "00:00:00.001234");
    }

    #[test]
    fn ages() {
        assert_eq!(age(0), "0s");
        assert_eq!(age(725), "12m5s");
        assert_eq!(age(3_600), "1h");
        assert_eq!(age(273_600), "3d4h");
    }
}
