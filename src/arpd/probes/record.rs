//! The state machine of one service.
//!
//! ```text
//!         | answered                           | failed            | not sent
//! --------+------------------------------------+-------------------+---------
//! Unknown | Up                                 | `fall` times: Down | Unknown
//! Up      | Up                                 | `fall` times: Down | Unknown
//! Down    | `rise` times, and held back no more: Up | Down          | Down
//! ```

use std::time::Duration;

use super::Answer;
use crate::bpf::types;
use crate::config::Probe;

use types::{probe_outcome as Outcome, probe_state as ProbeState};

/// A service that went down this long ago is held back no longer than any other.
const FORGET_DOWNS: u32 = 3600;
/// Longest time that a service is held back.
const MAX_HOLD: Duration = Duration::from_secs(600);

/// Moves a record on. `now` is in seconds since 1970.
pub fn step(record: &mut types::probe, probe: &Probe, answer: Answer, now: u32) {
    let before = record.state;
    match answer {
        Answer::After(_) => {
            record.failures = 0;
            record.answers = record.answers.saturating_add(1);
            record.answered = now;
            let is_back = record.answers >= probe.rise && now >= returns(record, probe);
            if record.state != ProbeState::PROBE_DOWN || is_back {
                record.state = ProbeState::PROBE_UP;
            }
        }
        Answer::Failed(Outcome::PROBE_UNSENT) => {
            record.answers = 0;
            record.failure = Outcome::PROBE_UNSENT;
            if record.state == ProbeState::PROBE_UP {
                record.state = ProbeState::PROBE_UNKNOWN;
            }
        }
        Answer::Failed(outcome) => {
            record.answers = 0;
            record.failure = outcome;
            record.failures = record.failures.saturating_add(1);
            if record.state != ProbeState::PROBE_DOWN && record.failures >= probe.fall {
                record.state = ProbeState::PROBE_DOWN;
                let is_flapping = now.saturating_sub(record.went_down) < FORGET_DOWNS;
                record.downs = if is_flapping { record.downs.saturating_add(1) } else { 1 };
                record.went_down = now;
            }
        }
    }
    if record.state != before {
        record.since = now;
    }
}

/// Returns when a service that is down can be up again. Each time that it goes down within an hour doubles the
/// time, so that a flapping one does not move flows back and forth.
pub fn returns(record: &types::probe, probe: &Probe) -> u32 {
    let again = record.downs.saturating_sub(1);
    if again == 0 {
        return record.went_down;
    }
    let usual = Duration::from(probe.interval) * probe.rise;
    let hold = (usual * (1 << again.min(20))).min(MAX_HOLD);
    record.went_down.saturating_add(hold.as_secs() as u32)
}
