//! Log lines about services.

use std::collections::BTreeMap;

use super::Subject;
use super::record::returns;
use crate::bpf::types;
use crate::datapath::probes::evidence;

use types::{probe_outcome as Outcome, probe_state as ProbeState};

/// A change of a service's state.
pub struct Change {
    service: String,
    is_warning: bool,
    /// `is down: DNS probe not answered 3 of 3`
    what: String,
}

impl Change {
    /// `None` if it is not worth a line: the first answer, and the first one after probes could not be sent.
    pub fn new(subject: &Subject, before: ProbeState, record: &types::probe) -> Option<Change> {
        let probe = &subject.probe;
        let why = || evidence(&probe.check, probe.fall, record).unwrap_or_default();
        let (is_warning, what) = match (before, record.state) {
            (_, ProbeState::PROBE_DOWN) => {
                let hold = returns(record, probe).saturating_sub(record.went_down);
                let held = match hold {
                    0 => String::new(),
                    _ => format!("; went down {} times, out for {hold} s at least", record.downs),
                };
                (true, format!("down: {}{held}", why()))
            }
            (ProbeState::PROBE_DOWN, ProbeState::PROBE_UP) => {
                (false, format!("up again: {} probe answered", probe.check.name()))
            }
            (_, ProbeState::PROBE_UNKNOWN) if record.failure == Outcome::PROBE_UNSENT => {
                (true, format!("unknown: {} probe cannot be sent", probe.check.name()))
            }
            _ => return None,
        };
        Some(Change { service: subject.name(), is_warning, what })
    }
}

/// Returns lines for the log, one for changes that are alike.
pub fn lines(changes: Vec<Change>) -> Vec<(bool, String)> {
    let mut alike: BTreeMap<(bool, String), Vec<Change>> = BTreeMap::new();
    for change in changes {
        alike.entry((change.is_warning, change.what.clone())).or_default().push(change);
    }
    let line = |((is_warning, what), changes): ((bool, String), Vec<Change>)| {
        let first = changes.iter().map(|change| &change.service).min().expect("not empty");
        let text = match changes.len() - 1 {
            0 => format!("{first} is {what}"),
            others => format!("{first} and {others} more are {what}"),
        };
        (is_warning, text)
    };
    alike.into_iter().map(line).collect()
}
