//! One neighbour: the kernel's entry, its state and the pace of requests.

use std::time::{Duration, Instant};

use super::state::{LinkState, Observation, State, UP_HOLD_TIME};
use super::{Now, is_others};
use crate::bpf::types::health as Health;
use crate::net::neighbour::{Neighbour, NeighbourRequest, NudState, OUR_PROTOCOL};

/// Minimum time between two requests to keep the same neighbour.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// A next hop of some upstream.
pub struct Tracked {
    pub entry: Option<Neighbour>,
    pub state: State,
    /// Last change of health, in seconds since 1970.
    pub since: u32,
    pub pacing: Pacing,
    /// Last known MAC address.
    pub mac: Option<[u8; 6]>,
    /// Indexes of the upstreams behind this neighbour.
    pub upstreams: Vec<usize>,
}

/// Times of the last requests, and the phase of probes.
#[derive(Default)]
pub struct Pacing {
    pub kept: Option<Instant>,
    probed: Option<Instant>,
    /// Fraction of the interval, 0 to 1, so that neighbours are not probed all at once.
    phase: f32,
}

/// Result of a look at one neighbour.
#[derive(Default, PartialEq, Eq)]
pub struct Step {
    pub request: Option<NeighbourRequest>,
    /// Health before it changed.
    pub before: Option<Health>,
}

impl Pacing {
    pub fn new(phase: f32) -> Pacing {
        Pacing { phase, ..Pacing::default() }
    }
}

impl Tracked {
    pub fn health(&self) -> Health {
        self.state.health()
    }

    /// Returns the reason why the neighbour is down.
    pub fn reason(&self) -> &'static str {
        if self.state == State::LinkDown { "its interface is down" } else { "no answer" }
    }

    /// Moves to the next state and returns the request that is due.
    pub fn step(&mut self, link: LinkState, interval: Duration, now: Now) -> Step {
        let seen = Observation::new(link, self.entry.map_or(NudState::None, |entry| entry.state));
        let before = self.state;
        self.state = before.next(seen, now.instant, self.pacing.probed);
        if self.state.has_failed() && !before.has_failed() {
            // only this request goes to the broadcast address
            self.pacing.kept = None;
        }
        let changed = before.health() != self.health();
        if changed {
            self.since = now.seconds;
        }
        let request = match link {
            LinkState::Ethernet => self.request(interval, now.instant),
            LinkState::Down | LinkState::WithoutMacs => None,
        };
        Step { request, before: changed.then(|| before.health()) }
    }

    fn request(&mut self, interval: Duration, now: Instant) -> Option<NeighbourRequest> {
        let pacing = &mut self.pacing;
        match &mut self.entry {
            Some(entry) if is_others(entry) => None,
            Some(entry) if entry.state.is_valid() && entry.protocol == OUR_PROTOCOL => {
                let first = || now.checked_sub(interval.mul_f32(pacing.phase)).unwrap_or(now);
                let probed = pacing.probed.get_or_insert_with(first);
                let wait = match self.state {
                    State::Recovering { .. } => UP_HOLD_TIME.min(interval),
                    _ => interval,
                };
                let is_busy = matches!(entry.state, NudState::Probe | NudState::Delay);
                if is_busy || now.duration_since(*probed) < wait {
                    return None;
                }
                *probed = now;
                entry.state = NudState::Probe;
                self.state = self.state.requested(now);
                Some(NeighbourRequest::Probe)
            }
            _ => {
                if pacing.kept.is_some_and(|kept| now.duration_since(kept) < RETRY_INTERVAL) {
                    return None;
                }
                pacing.kept = Some(now);
                self.state = self.state.requested(now);
                Some(NeighbourRequest::Keep)
            }
        }
    }
}
