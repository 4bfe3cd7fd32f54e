//! Sizes and times of the table of flows. Pure.

use std::time::Duration;

use crate::bpf::types::{flow_egresses, flow_settings};
use crate::bpf::wire;
use crate::config::{Family, Flows, Period, Reply};
use crate::desired::{Desired, Rule};

/// Flows in a bucket, and hints in a line, of bpf/udplb.h.
pub const WAYS: u32 = 8;
pub const HINTS: u32 = 15;

/// Bits of a hint for the number of a flow; the others are for its time.
const HINT_TIME_SHIFT: u32 = 22;

/// Time from the end of a flow until another takes its place, in seconds.
const GRACE: u32 = 2;

/// Beats in a second, at least.
const BEATS: u32 = 4;

impl Rule {
    /// Returns true if the rule's packets make flows.
    pub fn has_flows(&self) -> bool {
        self.reply == Reply::Nat || self.sticky
    }
}

impl Desired {
    /// Returns true if rules of a family have flows.
    pub fn has_flows(&self, family: Family) -> bool {
        self.rules.iter().any(|rule| rule.has_flows() && rule.family() == family)
    }
}

/// Returns the number of buckets for so many flows.
pub fn buckets(flows: &Flows) -> u32 {
    flows.entries.div_ceil(WAYS)
}

/// Returns the number of lines of hints: at least two places for each flow. A power of two: places of a smaller table
/// are then divided in a larger one, where no two flows come to the same place.
pub fn port_lines(flows: &Flows) -> u32 {
    (2 * flows.entries).div_ceil(HINTS).next_power_of_two()
}

fn beat_shift(ticks: u32) -> u32 {
    (ticks / BEATS).max(1).ilog2()
}

/// Returns a time in beats, at least one, by a clock of `ticks` jiffies per second.
pub(super) fn beats(period: Period, ticks: u32) -> u32 {
    let jiffies = Duration::from(period).as_millis() as u64 * u64::from(ticks) / 1000;
    (jiffies >> beat_shift(ticks)).max(1) as u32
}

/// Returns the addresses that flows get.
pub fn egresses(flows: &Flows) -> flow_egresses {
    let mut egresses = flow_egresses::default();
    for (family, ipv6) in [false, true].into_iter().enumerate() {
        let addresses = flows.addresses.iter().filter(|it| it.is_ipv6() == ipv6);
        for (place, address) in egresses.addresses[family].iter_mut().zip(addresses) {
            *place = wire(*address);
            egresses.count[family] += 1;
        }
    }
    egresses
}

/// Returns the settings for a clock of `ticks` jiffies per second; `orphans` is the entry of answers whose
/// upstream is gone.
pub fn settings(flows: &Flows, ticks: u32, orphans: u32) -> flow_settings {
    let beat_shift = beat_shift(ticks);
    let (unanswered, assured) = (beats(flows.unanswered, ticks), beats(flows.assured, ticks));
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

/// A moment by the clock of a generation's flows and senders, whose times are in beats.
#[derive(Clone, Copy, Debug)]
pub struct FlowClock {
    settings: flow_settings,
    /// Jiffies in a second.
    ticks: u32,
    now: u32,
}

impl FlowClock {
    pub fn new(settings: flow_settings, ticks: u32, now: u32) -> FlowClock {
        FlowClock { settings, ticks, now }
    }

    /// Returns the time since a moment; none if it is later, which another CPU may have stored.
    pub(super) fn beats_since(&self, moment: u32) -> u32 {
        u32::try_from(self.now.wrapping_sub(moment) as i32).unwrap_or(0)
    }

    fn duration(&self, beats: u32) -> Duration {
        let jiffies = u64::from(beats) << self.settings.beat_shift;
        Duration::from_millis(jiffies * 1000 / u64::from(self.ticks.max(1)))
    }

    pub fn since(&self, moment: u32) -> Duration {
        self.duration(self.beats_since(moment))
    }

    pub fn now(&self) -> u32 {
        self.now
    }

    /// Returns true until a flow has expired; with `grace`, until another may take its place.
    pub fn is_alive(&self, state: u8, touched: u32, grace: bool) -> bool {
        let timeout = self.settings.timeouts.get(usize::from(state)).filter(|_| state != 0);
        let grace = if grace { GRACE * self.settings.second } else { 0 };
        timeout.is_some_and(|timeout| self.beats_since(touched) <= timeout + grace)
    }

    /// Returns the hint for the flow of a number, 0 for none, since a moment.
    pub fn hint(&self, number: u32, since: u32) -> u32 {
        number | since << HINT_TIME_SHIFT
    }

    /// Returns true for a hint of a port that no flow has, and that rests.
    pub fn is_resting(&self, hint: u32) -> bool {
        let is_nobodys = hint & ((1 << HINT_TIME_SHIFT) - 1) == 0;
        // as the program does it: the time may be later than this clock's
        let later = self.now.wrapping_add(self.settings.second);
        let age = (later << HINT_TIME_SHIFT).wrapping_sub(hint) >> HINT_TIME_SHIFT;
        hint != 0 && is_nobodys && age <= 2 * self.settings.second
    }

    /// Returns how long a flow of a state lives that was touched last at a moment; `None`: it is no flow.
    pub fn left(&self, state: u8, touched: u32) -> Option<Duration> {
        let timeout = *self.settings.timeouts.get(usize::from(state))?;
        let left = timeout.checked_sub(self.beats_since(touched))?;
        (state != 0).then(|| self.duration(left))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{FlowClock, settings};
    use crate::config::Flows;

    #[test]
    fn flows_live_until_their_timeout() {
        // 234 beats of 128 ms, 937 assured
        let clock = FlowClock::new(settings(&Flows::default(), 1000, 9), 1000, 100);
        let left = |state, age| clock.left(state, 100_u32.wrapping_sub(age));
        let beats = |beats: u64| Some(Duration::from_millis(beats * 128));
        assert_eq!(
            [0, 1, 2, 3, 4].map(|state| left(state, 234)),
            [None, beats(0), beats(0), beats(703), None]
        );
        assert_eq!([1, 2, 3].map(|state| left(state, 235)), [None, None, beats(702)]);
        assert_eq!(left(3, 938), None);
        assert_eq!(clock.since(0), Duration::from_millis(12_800));
        assert_eq!(clock.since(101), Duration::ZERO, "another CPU's clock");
    }

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
