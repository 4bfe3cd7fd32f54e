//! Results of arpd's probes, by upstream id. The program does not read them: what follows from them is in the
//! health of its next hops.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, from_bytes, types};
use crate::config::Check;

use types::{probe_outcome as Outcome, probe_state as ProbeState};

/// Upper bounds of the buckets of latencies, in microseconds; the last bucket has none.
pub const LATENCIES: [u32; 11] =
    [500, 1000, 2500, 5000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

/// Failures, and their names in metrics.
pub const FAILURES: [(Outcome, &str); 6] = [
    (Outcome::PROBE_NO_ANSWER, "no-answer"),
    (Outcome::PROBE_REFUSED, "refused"),
    (Outcome::PROBE_UNREACHABLE, "unreachable"),
    (Outcome::PROBE_WRONG_ANSWER, "wrong-answer"),
    (Outcome::PROBE_QUOTED, "icmp"),
    (Outcome::PROBE_UNSENT, "unsent"),
];

/// The records; `None` in a directory of an older udplb.
pub struct Probes(Option<MapHandle>);

impl Probes {
    pub fn new(map: Option<MapHandle>) -> Probes {
        Probes(map)
    }

    /// Returns the records of all upstreams.
    pub fn read(&self) -> anyhow::Result<BTreeMap<u32, types::probe>> {
        let keys = self.0.iter().flat_map(MapCore::keys);
        let records = keys.map(|key| {
            let id = u32::from_ne_bytes(key.as_slice().try_into()?);
            Ok((id, self.get(id)?.unwrap_or_default()))
        });
        records.collect()
    }

    /// Returns the record of an upstream.
    pub fn get(&self, id: u32) -> anyhow::Result<Option<types::probe>> {
        let Some(map) = &self.0 else { return Ok(None) };
        let bytes = map.lookup(&id.to_ne_bytes(), MapFlags::ANY)?;
        bytes.map(|bytes| from_bytes(&bytes).context("state/probes has another layout")).transpose()
    }

    /// Writes the record of an upstream.
    pub fn set(&self, id: u32, record: &types::probe) -> anyhow::Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        map.update(&id.to_ne_bytes(), bytes_of(record), MapFlags::ANY).context("state/probes")
    }

    /// Removes the records of other upstreams.
    pub fn retain(&self, ids: &HashSet<u32>) -> anyhow::Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        for id in self.read()?.into_keys().filter(|id| !ids.contains(id)) {
            map.delete(&id.to_ne_bytes())?;
        }
        Ok(())
    }

    /// Forgets how often an upstream was down, so that it comes back without delay.
    pub fn forgive(&self, id: u32) -> anyhow::Result<()> {
        match self.get(id)? {
            Some(record) if record.downs != 0 => self.set(id, &types::probe { downs: 0, ..record }),
            _ => Ok(()),
        }
    }
}

/// Counts an answer and its latency.
pub fn count_answer(record: &mut types::probe, latency: Duration) {
    let latency = latency.as_micros();
    let place = LATENCIES.iter().position(|bound| latency <= u128::from(*bound));
    record.latencies[place.unwrap_or(LATENCIES.len())] += 1;
    record.latency += u64::try_from(latency).unwrap_or(u64::MAX);
    count(record, Outcome::PROBE_ANSWERED);
}

/// Counts an outcome.
pub fn count(record: &mut types::probe, outcome: Outcome) {
    record.outcomes[outcome.0 as usize] += 1;
}

/// Describes the last evidence: `DNS probe not answered 3 of 3`. `None`: there is none.
pub fn evidence(check: &Check, fall: u32, record: &types::probe) -> Option<String> {
    if record.answers > 0 {
        let in_a_row = match record.state {
            ProbeState::PROBE_DOWN => format!(" {} in a row", record.answers),
            _ => String::new(),
        };
        return Some(format!("{} probe answered{in_a_row}", check.name()));
    }
    match record.failure {
        Outcome::PROBE_ANSWERED => None,
        Outcome::PROBE_QUOTED | Outcome::PROBE_UNSENT => Some(failure(check, record.failure)),
        outcome => {
            Some(format!("{} {} of {fall}", failure(check, outcome), record.failures.min(fall)))
        }
    }
}

/// Describes the failure of one probe: `DNS probe not answered`.
pub fn failure(check: &Check, outcome: Outcome) -> String {
    let what = match outcome {
        Outcome::PROBE_QUOTED => return "port unreachable (ICMP) for relayed packets".into(),
        Outcome::PROBE_REFUSED => "refused",
        Outcome::PROBE_UNREACHABLE => "unreachable (ICMP)",
        Outcome::PROBE_WRONG_ANSWER => "answered wrongly",
        Outcome::PROBE_UNSENT => "cannot be sent",
        _ => "not answered",
    };
    format!("{} probe {what}", check.name())
}
