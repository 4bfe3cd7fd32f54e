//! Probes of services: which there are, by which path they go, and what follows from their answers.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::{Service, now};
use crate::arpd::prober::ProbePath;
use crate::arpd::probes::{Answer, Subject};
use crate::bpf::types;
use crate::config::{KeyAddress, Probe, Source};
use crate::datapath::nexthops;
use crate::datapath::probes::failure;
use crate::desired::{Rule, Upstream};
use crate::net::routing;

/// Probes under way at once with `--once`.
const ONCE_RUNNING: usize = 100;

impl Service {
    /// Hands the services of the active generation to the probe tracker.
    pub(super) fn track_services(&mut self) -> anyhow::Result<()> {
        let mut services = Vec::new();
        if let Some(serving) = self.serving.as_ref().filter(|serving| serving.is_attached()) {
            let description = serving.description()?;
            let mut records = serving.maps.probes.read()?;
            let mut seen = HashSet::new();
            for (rule, ids) in description.desired.rules.iter().zip(&description.ids) {
                let Some(probe) = rule.health.probe() else { continue };
                for (upstream, id) in rule.upstreams.iter().zip(&ids.upstreams) {
                    if !upstream.is_local() && seen.insert(*id) {
                        services.push((*id, subject(rule, upstream, probe), records.remove(id)));
                    }
                }
            }
            serving.maps.probes.retain(&seen)?;
        }
        let is_quoted = services.iter().any(|(_, subject, _)| subject.is_service);
        if let Err(error) = self.quotes.listen(is_quoted) {
            log::info!("ICMP errors for relayed packets need CAP_NET_RAW, and count not: {error}");
        }
        self.probes.set_upstreams(services, Instant::now());
        self.take_health();
        Ok(())
    }

    /// Starts the probes that are due.
    pub fn start_probes(&mut self) {
        let now = now();
        while let Some(subject) = self.probes.start(now.instant) {
            match self.probe_path(&subject) {
                Some(path) => self.prober.start(subject, path),
                None => self.probes.finish(&subject, None, now),
            }
        }
        self.probes.pause(now.instant);
    }

    /// Takes the answer to a probe.
    pub fn take_probe(&mut self, (subject, answer): (Arc<Subject>, Answer)) {
        self.probes.finish(&subject, Some(answer), now());
        if self.take_health() {
            self.write_probes();
        }
    }

    /// Takes ICMP errors about relayed packets; those about probes reach their own sockets.
    pub fn take_quotes(&mut self) {
        for quote in self.quotes.take() {
            if !self.prober.has_sent_from(quote.source_port) {
                self.probes.take_quote(quote.address, quote.port, now());
            }
        }
        if self.take_health() {
            self.write_probes();
        }
    }

    /// Tells the neighbour tracker, which writes an upstream's health. Returns true if any has changed.
    fn take_health(&mut self) -> bool {
        let changed = self.probes.take_health();
        for (id, since) in &changed {
            self.tracker.set_failed(*id, *since);
        }
        !changed.is_empty()
    }

    /// Writes the records of probes and logs the changes of services.
    pub(super) fn write_probes(&mut self) {
        for (is_warning, line) in self.probes.take_log(Instant::now()) {
            let level = if is_warning { log::Level::Warn } else { log::Level::Info };
            log::log!(level, "{line}");
        }
        let Some(serving) = &self.serving else { return };
        let map = &serving.maps.probes;
        let result = self.probes.write(|id, record| match record {
            None => map.get(id),
            Some(record) => map.set(id, record).map(|()| None),
        });
        self.report("results of probes", result);
    }

    /// Returns the path of an upstream's packets; `None` while its next hop is down.
    fn probe_path(&self, subject: &Subject) -> Option<ProbePath> {
        let id = self.probes.ids(subject).first()?;
        let entry = self.tracker.written(*id)?;
        if entry.ifindex == 0 || entry.health == types::health::HEALTH_DOWN {
            return None;
        }
        let links = self.tracker.links();
        let link = links.get(&entry.ifindex)?;
        Some(ProbePath {
            interface: entry.ifindex,
            vrf: routing::vrf(link, links).map(|vrf| vrf.name.clone()),
            egress: nexthops::egress(entry),
        })
    }

    /// Probes each service once. Returns those that did not answer, and why.
    pub async fn probe_once(&mut self) -> Vec<String> {
        let subjects: Vec<Arc<Subject>> = self.probes.subjects().cloned().collect();
        let mut failed = Vec::new();
        for subjects in subjects.chunks(ONCE_RUNNING) {
            let mut running = 0;
            for subject in subjects {
                // an upstream without next hop is reported by itself
                let Some(path) = self.probe_path(subject) else { continue };
                self.prober.start(Arc::clone(subject), path);
                running += 1;
            }
            for _ in 0..running {
                if let (subject, Answer::Failed(outcome)) = self.prober.answer().await {
                    let why = failure(&subject.probe.check, outcome);
                    failed.push(format!("{}: {why}", subject.name()));
                }
            }
        }
        failed.sort_unstable();
        failed
    }
}

fn subject(rule: &Rule, upstream: &Upstream, probe: &Probe) -> Subject {
    let own = upstream.port.or(rule.key.only_port());
    let check = &probe.check;
    let port = check.port().or(own).filter(|_| check.has_port());
    Subject {
        address: upstream.address.clone(),
        port: port.unwrap_or(0),
        source: match (rule.source_of(upstream), rule.key.address) {
            (Source::Vip, KeyAddress::Is(address)) | (Source::Fixed { address, .. }, _) => {
                Some(address)
            }
            _ => None,
        },
        probe: probe.clone(),
        is_service: check.is_udp() && port == own,
    }
}
