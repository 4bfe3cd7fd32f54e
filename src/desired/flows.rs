//! Sizes and times of the table of flows. Pure.

use std::time::Duration;

use crate::bpf::types::flow_settings;
use crate::config::{Family, Flows, Period, Reply};
use crate::desired::Desired;

/// Flows in a bucket, and hints in a line, of bpf/udplb.h.
pub const WAYS: u32 = 8;
const HINTS: u32 = 15;

/// Beats in a second, at least.
const BEATS: u32 = 4;

impl Desired {
    /// Returns true if rules of a family have flows.
    pub fn has_flows(&self, family: Family) -> bool {
        self.rules.iter().any(|rule| rule.reply == Reply::Nat && rule.family() == family)
    }
}

/// Returns the number of buckets for so many flows.
pub fn buckets(flows: &Flows) -> u32 {
    flows.entries.div_ceil(WAYS)
}

/// Returns the number of lines of hints: two places for each flow.
pub fn port_lines(flows: &Flows) -> u32 {
    (2 * flows.entries).div_ceil(HINTS)
}

/// Returns the settings for a clock of `ticks` jiffies per second; `orphans` is the entry of answers whose
/// upstream is gone.
pub fn settings(flows: &Flows, ticks: u32, orphans: u32) -> flow_settings {
    let beat_shift = (ticks / BEATS).max(1).ilog2();
    let beats = |period: Period| {
        let jiffies = Duration::from(period).as_millis() as u64 * u64::from(ticks) / 1000;
        (jiffies >> beat_shift).max(1) as u32
    };
    let (unanswered, assured) = (beats(flows.unanswered), beats(flows.assured));
    flow_settings {
        buckets: buckets(flows),
        port_lines: port_lines(flows),
        first_port: flows.ports.first.into(),
        ports: u32::from(flows.ports.last - flows.ports.first) + 1,
        timeouts: [0, unanswered, unanswered, assured],
        beat_shift,
        second: ticks.div_ceil(1 << beat_shift),
        orphans,
    }
}

#[cfg(test)]
mod tests {
    use super::settings;
    use crate::config::Flows;

    #[test]
    fn timeouts_are_in_beats_of_any_clock() {
        for (ticks, shift, second, timeouts) in [
            (100, 4, 7, [0, 187, 187, 750]),
            (250, 5, 8, [0, 234, 234, 937]),
            (1000, 7, 8, [0, 234, 234, 937]),
        ] {
            let settings = settings(&Flows::default(), ticks, 9);
            assert_eq!(settings.beat_shift, shift, "{ticks}");
            assert_eq!(settings.second, second, "{ticks}");
            assert_eq!(settings.timeouts, timeouts, "{ticks}");
            assert_eq!((settings.first_port, settings.ports), (1024, 31_744));
        }
    }
}
