//! The state machine of one neighbour.
//!
//! ```text
//!             | LinkDown | Fixed | Answered        | Silent             | Failed
//! ------------+----------+-------+-----------------+--------------------+------------------
//! Unknown     | LinkDown | Up    | Up              | Unknown            | Down
//! Up          | LinkDown | Up    | Up              | Up                 | Failing
//! Waiting     | LinkDown | Up    | Up              | Waiting, 1.5 s: Stale | Failing
//! Stale       | LinkDown | Up    | Up              | Stale              | Failing
//! Failing     | LinkDown | Up    | Up              | Failing, 250 ms: Down | as Silent
//! Down        | LinkDown | Up    | Recovering      | Down               | Down
//! LinkDown    | LinkDown | Up    | Recovering      | LinkDown           | Down
//! Recovering  | LinkDown | Up    | Recovering, probed again: Up | Recovering | Down
//! ```
//!
//! Besides, a request turns `Up` into `Waiting` ([`State::requested`]).

use std::time::{Duration, Instant};

use crate::bpf::types::health as Health;
use crate::net::link::{Layer, Link};
use crate::net::neighbour::NudState;

/// An answer is overdue after this time. The kernel repeats its requests every second.
const OVERDUE: Duration = Duration::from_millis(1500);
/// A neighbour that was down is up again after two answers that are about this far apart.
pub const UP_HOLD_TIME: Duration = Duration::from_secs(1);
/// The kernel probes the cached MAC by unicast. After a MAC change only a broadcast probe reaches
/// the host; its answer is waited for this long.
const BROADCAST_PROBE_DELAY: Duration = Duration::from_millis(250);

/// Reachability of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No answer and no failure yet.
    Unknown,
    Up,
    /// Up, with a request unanswered since then.
    Waiting {
        since: Instant,
    },
    /// Up so far, with an overdue answer.
    Stale,
    /// The kernel has given up since then; a broadcast probe is under way.
    Failing {
        since: Instant,
    },
    /// No answer, not even to the broadcast probe.
    Down,
    /// Nothing is known since the interface was down.
    LinkDown,
    /// Still down, with the first answer at that time.
    Recovering {
        since: Instant,
    },
}

/// State of the kernel's entry and of the link, as far as reachability depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observation {
    LinkDown,
    /// No answer is needed: a static entry, or a link without MAC addresses.
    Fixed,
    Answered,
    /// No entry, or one whose last request is still unanswered.
    Silent,
    /// The kernel has given up after three requests.
    Failed,
}

impl Observation {
    pub fn new(link: LinkState, entry: NudState) -> Observation {
        match (link, entry) {
            (LinkState::Down, _) => Observation::LinkDown,
            (LinkState::WithoutMacs, _) => Observation::Fixed,
            (LinkState::Ethernet, NudState::Noarp | NudState::Permanent) => Observation::Fixed,
            (LinkState::Ethernet, NudState::Reachable) => Observation::Answered,
            (LinkState::Ethernet, NudState::Failed) => Observation::Failed,
            (LinkState::Ethernet, _) => Observation::Silent,
        }
    }
}

/// Kind of link, as far as neighbour resolution depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    Down,
    /// There is nothing to resolve.
    WithoutMacs,
    Ethernet,
}

impl LinkState {
    pub fn new(link: Option<&Link>) -> LinkState {
        match link {
            Some(link) if !link.up || !link.carrier => LinkState::Down,
            Some(link) if link.layer != Some(Layer::Ethernet) => LinkState::WithoutMacs,
            Some(_) => LinkState::Ethernet,
            None => LinkState::Down,
        }
    }
}

impl State {
    /// Returns the state that stands for what an earlier arpd has written.
    pub fn from_health(health: Health) -> State {
        match health {
            Health::HEALTH_UP | Health::HEALTH_FAILED => State::Up,
            Health::HEALTH_STALE => State::Stale,
            Health::HEALTH_DOWN => State::Down,
            _ => State::Unknown,
        }
    }

    pub fn health(self) -> Health {
        match self {
            State::Unknown => Health::HEALTH_UNKNOWN,
            State::Up | State::Waiting { .. } => Health::HEALTH_UP,
            State::Stale | State::Failing { .. } => Health::HEALTH_STALE,
            State::Down | State::LinkDown | State::Recovering { .. } => Health::HEALTH_DOWN,
        }
    }

    /// Returns true if the kernel has given up and has not been answered since.
    pub fn has_failed(self) -> bool {
        matches!(self, State::Failing { .. } | State::Down)
    }

    /// Returns the state after a request to the neighbour.
    pub fn requested(self, now: Instant) -> State {
        if self == State::Up { State::Waiting { since: now } } else { self }
    }

    /// Returns the next state, by the table above. `probed` is the time of the last probe.
    pub fn next(self, seen: Observation, now: Instant, probed: Option<Instant>) -> State {
        use State::{Down, Failing, LinkDown, Recovering, Stale, Unknown, Up, Waiting};
        let passed = |since, time| now.duration_since(since) >= time;
        let probed_again = |since| probed.is_some_and(|probed| probed >= since + UP_HOLD_TIME / 2);
        match (self, seen) {
            (_, Observation::LinkDown) => LinkDown,
            (_, Observation::Fixed) => Up,

            (Down | LinkDown, Observation::Answered) => Recovering { since: now },
            (Recovering { since }, Observation::Answered) if !probed_again(since) => self,
            (_, Observation::Answered) => Up,

            (Up | Waiting { .. } | Stale, Observation::Failed) => Failing { since: now },
            (Unknown | Down | LinkDown | Recovering { .. }, Observation::Failed) => Down,

            (Waiting { since }, Observation::Silent) if passed(since, OVERDUE) => Stale,
            (Failing { since }, _) if passed(since, BROADCAST_PROBE_DELAY) => Down,
            (_, Observation::Silent) | (Failing { .. }, _) => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every state and every observation, at once and after all delays.
    #[test]
    fn table_of_states_and_observations() {
        use State::{Down, LinkDown, Stale, Unknown, Up};
        let since = Instant::now();
        let (waiting, failing) = (State::Waiting { since }, State::Failing { since });
        let recovering = State::Recovering { since };
        let observations = [
            Observation::LinkDown,
            Observation::Fixed,
            Observation::Answered,
            Observation::Silent,
            Observation::Failed,
        ];
        let at_once = [
            (Unknown, [LinkDown, Up, Up, Unknown, Down]),
            (Up, [LinkDown, Up, Up, Up, failing]),
            (waiting, [LinkDown, Up, Up, waiting, failing]),
            (Stale, [LinkDown, Up, Up, Stale, failing]),
            (failing, [LinkDown, Up, Up, failing, failing]),
            (Down, [LinkDown, Up, recovering, Down, Down]),
            (LinkDown, [LinkDown, Up, recovering, LinkDown, Down]),
            (recovering, [LinkDown, Up, recovering, recovering, Down]),
        ];
        for (state, row) in at_once {
            assert_eq!(observations.map(|it| state.next(it, since, Some(since))), row, "{state:?}");
        }
        let later = since + OVERDUE;
        let delayed = [
            (waiting, [LinkDown, Up, Up, Stale, State::Failing { since: later }]),
            (failing, [LinkDown, Up, Up, Down, Down]),
            (recovering, [LinkDown, Up, Up, recovering, Down]),
        ];
        for (state, row) in delayed {
            assert_eq!(observations.map(|it| state.next(it, later, Some(later))), row, "{state:?}");
        }
        for (state, _) in at_once {
            let requested = if state == Up { waiting } else { state };
            assert_eq!(state.requested(since), requested);
        }
    }

    #[test]
    fn observations_of_entries_and_links() {
        for (link, entry, observation) in [
            (LinkState::Down, NudState::Reachable, Observation::LinkDown),
            (LinkState::WithoutMacs, NudState::None, Observation::Fixed),
            (LinkState::Ethernet, NudState::Permanent, Observation::Fixed),
            (LinkState::Ethernet, NudState::Reachable, Observation::Answered),
            (LinkState::Ethernet, NudState::Stale, Observation::Silent),
            (LinkState::Ethernet, NudState::Failed, Observation::Failed),
        ] {
            assert_eq!(Observation::new(link, entry), observation);
        }
    }
}
