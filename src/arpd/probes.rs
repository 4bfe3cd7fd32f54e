//! The probe tracker: a pure state machine for the services of all upstreams. Upstreams, outcomes and the time go
//! in; questions that are due, records and changes of health come out.
//!
//! `record` holds the transitions of one upstream.

mod messages;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use messages::Change;
use record::step;

use super::neighbours::Now;
use crate::bpf::types;
use crate::config::{Address, Probe, with_port};
use crate::datapath::probes::{count, count_answer};

use types::{probe_outcome as Outcome, probe_state as ProbeState};

/// Maximum probes a second, of all upstreams together. Where there are more, each is probed less often.
const MAX_PROBES: u32 = 500;
/// Maximum probes that are under way, so that descriptors last.
const MAX_RUNNING: usize = 512;
/// Pause after probes were started, so that many that are due share the cost of waking up.
const BATCH_PAUSE: Duration = Duration::from_millis(20);
/// Delay that is made up for by probes in a row.
const BURST: Duration = Duration::from_millis(50);
/// Part of the interval by which probes come early, at random, so that many do not stay in step.
const JITTER: f32 = 0.1;
/// Wait for further changes that are alike, for one line of the log.
const LOG_DELAY: Duration = Duration::from_secs(1);

/// A service that is probed, once for all upstreams that share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject {
    pub address: Address,
    /// 0 where the probe has none.
    pub port: u16,
    /// Source address of relayed packets; `None`: this host's on the path.
    pub source: Option<IpAddr>,
    pub probe: Probe,
    /// The service's datagrams go to the port that is probed, so that an answer speaks for it.
    pub is_service: bool,
}

impl Subject {
    /// `10.0.9.11:53`, or without the port where the probe has none.
    pub fn name(&self) -> String {
        match self.port {
            0 => self.address.to_string(),
            port => with_port(&self.address, port),
        }
    }
}

/// Result of one probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    After(Duration),
    Failed(Outcome),
}

/// Services of all upstreams.
pub struct ProbeTracker {
    subjects: BTreeMap<Arc<Subject>, Probed>,
    queue: BTreeSet<(Instant, Arc<Subject>)>,
    running: usize,
    /// Earliest start of the next probe.
    not_before: Instant,
    /// See [`ProbeTracker::pause`].
    paused_until: Instant,
    /// State of a generator of random numbers.
    random: u32,
    changes: Vec<Change>,
    log_due: Option<Instant>,
    health: Vec<(u32, Option<u32>)>,
}

struct Probed {
    ids: Vec<u32>,
    record: types::probe,
    /// Place in the queue; `None` while a probe is under way.
    due: Option<Instant>,
    /// Start of the last probe or of the time when it was due.
    started: Instant,
    /// Last time that a quoted packet counted.
    quoted: Option<Instant>,
    /// The record differs from the kernel's.
    is_dirty: bool,
    /// `downs` as the kernel has it.
    downs: u32,
}

impl ProbeTracker {
    pub fn new(now: Instant) -> ProbeTracker {
        ProbeTracker {
            subjects: BTreeMap::new(),
            queue: BTreeSet::new(),
            running: 0,
            not_before: now,
            paused_until: now,
            random: 1,
            changes: Vec::new(),
            log_due: None,
            health: Vec::new(),
        }
    }

    /// Replaces the upstreams; each comes with its record as the kernel has it.
    pub fn set_upstreams(
        &mut self,
        upstreams: Vec<(u32, Subject, Option<types::probe>)>,
        now: Instant,
    ) {
        let mut known = std::mem::take(&mut self.subjects);
        let mut fresh = Vec::new();
        for (id, subject, record) in upstreams {
            if let Some(probed) = self.subjects.get_mut(&subject) {
                probed.ids.push(id);
                continue;
            }
            let subject = Arc::new(subject);
            let mut probed = known.remove(&subject).unwrap_or_else(|| {
                fresh.push(Arc::clone(&subject));
                Probed::new(record.unwrap_or_default(), now)
            });
            probed.ids = vec![id];
            probed.is_dirty = true;
            self.subjects.insert(subject, probed);
        }
        self.queue.retain(|(_, subject)| self.subjects.contains_key(subject));
        let count = fresh.len() as f32;
        for (nth, subject) in fresh.into_iter().enumerate() {
            // spread over the interval
            let interval = Duration::from(subject.probe.interval);
            self.enqueue(&subject, now + interval.mul_f32(nth as f32 / count));
        }
        self.health.clear();
        for probed in self.subjects.values() {
            self.health.extend(probed.health());
        }
    }

    /// Returns the number of probed services.
    pub fn count(&self) -> usize {
        self.subjects.len()
    }

    /// Returns the ids of the upstreams that share a service.
    pub fn ids(&self, subject: &Subject) -> &[u32] {
        self.subjects.get(subject).map_or(&[], |probed| &probed.ids)
    }

    /// Returns all services.
    pub fn subjects(&self) -> impl Iterator<Item = &Arc<Subject>> {
        self.subjects.keys()
    }

    /// Returns when [`ProbeTracker::start`] has something to start.
    pub fn next_start(&self) -> Option<Instant> {
        let (due, _) = self.queue.first().filter(|_| self.running < MAX_RUNNING)?;
        Some((*due).max(self.not_before).max(self.paused_until))
    }

    /// Makes the next probes wait a little, to be started together.
    pub fn pause(&mut self, now: Instant) {
        self.paused_until = now + BATCH_PAUSE;
    }

    /// Returns the service to probe now. [`ProbeTracker::finish`] must follow.
    pub fn start(&mut self, now: Instant) -> Option<Arc<Subject>> {
        if self.next_start()? > now {
            return None;
        }
        let (due, subject) = self.queue.pop_first()?;
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.not_before = self.not_before.max(earliest) + Duration::from_secs(1) / MAX_PROBES;
        self.running += 1;
        if let Some(probed) = self.subjects.get_mut(&subject) {
            // a late probe does not move the following ones, unless it is very late
            let interval = Duration::from(subject.probe.interval);
            let is_late = now.duration_since(due) > interval / 2;
            (probed.due, probed.started) = (None, if is_late { now } else { due });
        }
        Some(subject)
    }

    /// Takes the result of a probe; `None` if it was not sent because its next hop is down, which says
    /// nothing about the service.
    pub fn finish(&mut self, subject: &Arc<Subject>, answer: Option<Answer>, now: Now) {
        self.running = self.running.saturating_sub(1);
        let random = self.random();
        let Some(probed) = self.subjects.get_mut(subject) else { return };
        let interval = Duration::from(subject.probe.interval);
        let due = (probed.started + interval.mul_f32(1.0 - JITTER * random)).max(now.instant);
        if let Some(answer) = answer {
            match answer {
                Answer::After(latency) => count_answer(&mut probed.record, latency),
                Answer::Failed(outcome) => count(&mut probed.record, outcome),
            }
            self.step(subject, answer, now);
        }
        self.enqueue(subject, due);
    }

    /// Takes an ICMP error that quotes a relayed packet: no listener at this address and port. It counts at most
    /// once in each interval and only where a probe of the same port can bring the upstream back, and that
    /// probe follows at once.
    pub fn take_quote(&mut self, address: IpAddr, port: u16, now: Now) {
        let quoted: Vec<Arc<Subject>> = self
            .subjects
            .keys()
            .filter(|it| it.is_service && it.address.ip == address && it.port == port)
            .cloned()
            .collect();
        for subject in quoted {
            let interval = Duration::from(subject.probe.interval);
            let Some(probed) = self.subjects.get_mut(&subject) else { continue };
            let again = |last: Instant| now.instant.duration_since(last) < interval;
            if probed.quoted.is_some_and(again) {
                continue;
            }
            probed.quoted = Some(now.instant);
            count(&mut probed.record, Outcome::PROBE_QUOTED);
            let waits = probed.due.take();
            self.step(&subject, Answer::Failed(Outcome::PROBE_QUOTED), now);
            if let Some(due) = waits {
                self.queue.remove(&(due, Arc::clone(&subject)));
                self.enqueue(&subject, now.instant);
            }
        }
    }

    fn step(&mut self, subject: &Arc<Subject>, answer: Answer, now: Now) {
        let Some(probed) = self.subjects.get_mut(subject) else { return };
        probed.is_dirty = true;
        let before = probed.record.state;
        step(&mut probed.record, &subject.probe, answer, now.seconds);
        let after = probed.record.state;
        if before == after {
            return;
        }
        if (before == ProbeState::PROBE_DOWN) != (after == ProbeState::PROBE_DOWN) {
            self.health.extend(probed.health());
        }
        let change = Change::new(subject, before, &probed.record);
        if let Some(change) = change {
            self.changes.push(change);
            self.log_due.get_or_insert(now.instant + LOG_DELAY);
        }
    }

    fn enqueue(&mut self, subject: &Arc<Subject>, due: Instant) {
        if let Some(probed) = self.subjects.get_mut(subject) {
            if let Some(due) = probed.due.replace(due) {
                self.queue.remove(&(due, Arc::clone(subject)));
            }
            self.queue.insert((due, Arc::clone(subject)));
        }
    }

    /// Returns a random number from 0 to 1 (xorshift): probes only have to leave the step of others.
    fn random(&mut self) -> f32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        self.random as f32 / u32::MAX as f32
    }

    /// Takes the upstreams whose health has changed: down since when, in seconds since 1970, or not.
    pub fn take_health(&mut self) -> Vec<(u32, Option<u32>)> {
        std::mem::take(&mut self.health)
    }

    /// Takes the lines for the log; true marks a warning.
    pub fn take_log(&mut self, now: Instant) -> Vec<(bool, String)> {
        match self.log_due {
            Some(due) if now >= due => {
                self.log_due = None;
                messages::lines(std::mem::take(&mut self.changes))
            }
            _ => Vec::new(),
        }
    }

    /// Writes the records that have changed by `exchange`, which returns the kernel's record of before. `enable` sets
    /// `downs` there to zero.
    pub fn write<E>(
        &mut self,
        mut exchange: impl FnMut(u32, Option<&types::probe>) -> Result<Option<types::probe>, E>,
    ) -> Result<(), E> {
        for probed in self.subjects.values_mut().filter(|probed| probed.is_dirty) {
            for id in &probed.ids {
                let kernel = exchange(*id, None)?.map_or(0, |record| record.downs);
                if kernel < probed.downs {
                    (probed.record.downs, probed.downs) = (0, 0);
                }
            }
            for id in &probed.ids {
                exchange(*id, Some(&probed.record))?;
            }
            (probed.downs, probed.is_dirty) = (probed.record.downs, false);
        }
        Ok(())
    }
}

impl Probed {
    fn new(record: types::probe, now: Instant) -> Probed {
        // the answers in a row are those of an arpd that has ended, and so are the failures
        let record = match record.state {
            ProbeState::PROBE_DOWN => types::probe { answers: 0, ..record },
            _ => {
                types::probe { failures: 0, answers: 0, failure: Outcome::PROBE_ANSWERED, ..record }
            }
        };
        Probed {
            ids: Vec::new(),
            record,
            due: None,
            started: now,
            quoted: None,
            is_dirty: true,
            // unknown yet which upstreams share the record
            downs: 0,
        }
    }

    fn health(&self) -> impl Iterator<Item = (u32, Option<u32>)> {
        let down = (self.record.state == ProbeState::PROBE_DOWN).then_some(self.record.since);
        self.ids.iter().map(move |id| (*id, down))
    }
}

#[cfg(test)]
mod tests;
