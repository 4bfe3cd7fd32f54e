//! Metrics for Prometheus. Labels are names of the configuration, interfaces and fixed words, so that the
//! configuration bounds the number of series.

use std::fmt;

use anyhow::Context;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeGaugeValue, MetricEncoder, NoLabelSet, prometheus_text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::config::{KEY_ENTRIES, UPSTREAMS};
use crate::datapath::counters::Counts;
use crate::datapath::description::{self, Description, Generation};
use crate::datapath::pins::Store;
use crate::datapath::probes::{FAILURES, LATENCIES};
use crate::desired::choice::{self, ChoiceHash};
use crate::error::Result;
use crate::net::Netlink;
use crate::reconcile::drain::{Overrides, effective_rules};
use crate::reconcile::drift;
use crate::reconcile::observe::Observed;
use crate::telemetry::announcement::State;
use crate::telemetry::flows::FlowState;
use crate::telemetry::senders::SenderState;
use crate::telemetry::status::{self, Status, UpstreamStatus};

/// Prefix of all names.
const PREFIX: &str = "udplb";

/// Gathers metrics, and caches the drift.
pub struct Gatherer {
    store: Store,
    /// Digest of the file, number of the generation, and their drift.
    cached_drift: Option<(String, u32, bool)>,
    choices: Choices,
    /// Length of the last text in bytes.
    length: usize,
}

impl Gatherer {
    pub fn new(store: Store) -> Gatherer {
        Gatherer { store, cached_drift: None, choices: Choices::default(), length: 0 }
    }

    /// Returns all metrics as text.
    pub async fn gather(&mut self, netlink: &Netlink) -> Result<String> {
        let mut reading = status::read(&self.store, netlink, None, None).await?;
        reading.status.traffic = None;
        let serving =
            reading.status.generation.and_then(|it| reading.observed.generations.get(&it));
        let metrics = Metrics {
            drift: serving.and_then(|it| self.drift(it, &reading.observed)),
            fill: serving
                .map(|it| fill(&it.description, reading.status.max_ids))
                .unwrap_or_default(),
            choices: self.choices.of(serving, &reading.observed.overrides),
            status: reading.status,
        };
        drop(reading.observed);
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(metrics));
        let mut text = String::with_capacity(self.length + self.length / 16);
        prometheus_text::encode(&mut text, &registry).context("metrics")?;
        self.length = text.len();
        Ok(text)
    }

    /// Compares the file with the active generation; `None` if it cannot be read.
    fn drift(&mut self, serving: &Generation, observed: &Observed) -> Option<bool> {
        let Generation { number, description, .. } = serving;
        let (text, target) = drift::source(description)?;
        let digest = text.digest(&target);
        match &self.cached_drift {
            Some((known, of, differs)) if (known, of) == (&digest, number) => Some(*differs),
            _ => {
                // an invalid file differs
                let differs = drift::differs(&text, &target, description, observed).unwrap_or(true);
                self.cached_drift = Some((digest, *number, differs));
                Some(differs)
            }
        }
    }
}

/// The digests of the rules' choices. Large tables of slots take a while, so they are cached.
#[derive(Default)]
struct Choices {
    /// Number of the generation, and the overrides.
    known: Option<(u32, Overrides)>,
    digests: Vec<ChoiceHash>,
}

impl Choices {
    /// Returns the digests in the order of the rules.
    fn of(&mut self, serving: Option<&Generation>, overrides: &Overrides) -> Vec<ChoiceHash> {
        let Some(serving) = serving else { return Vec::new() };
        let known = (serving.number, overrides.clone());
        if self.known.as_ref() != Some(&known) {
            let (desired, ids) = serving.hosts();
            self.digests = choice::digests(&effective_rules(desired, ids, overrides));
            self.known = Some(known);
        }
        self.digests.clone()
    }
}

/// Used shares of limits, 0 to 1.
type Fill = Vec<(&'static str, f64)>;

fn fill(description: &Description, max_ids: u32) -> Fill {
    let desired = &description.desired;
    let ids = description::all(&description.ids).max().unwrap_or(0);
    let share = |used: usize, max: usize| used as f64 / max as f64;
    vec![
        ("rules", share(desired.key_entries(), KEY_ENTRIES)),
        ("upstreams", share(desired.upstreams().count(), UPSTREAMS)),
        ("counters", share(ids as usize, max_ids as usize)),
    ]
}

/// All metrics of one reading.
#[derive(Debug)]
struct Metrics {
    status: Status,
    drift: Option<bool>,
    fill: Fill,
    choices: Vec<ChoiceHash>,
}

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_configuration(&mut encoder)?;
        self.encode_traffic(&mut encoder)?;
        self.encode_senders(&mut encoder)?;
        self.encode_upstreams(&mut encoder)
    }
}

impl Metrics {
    fn encode_configuration(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.status;
        let mut info = gauge(encoder, "build_info", "1, with the version of this udplb")?;
        info.set(&[("version", env!("CARGO_PKG_VERSION"))], 1)?;
        let mut generation =
            gauge(encoder, "config_generation", "Number of the generation that serves; 0: none")?;
        generation.set(&[], i64::from(status.generation.unwrap_or(0)))?;
        if let Some(built) = status.built {
            let mut applied = gauge(
                encoder,
                "config_last_apply_timestamp_seconds",
                "When it was applied, in seconds since 1970",
            )?;
            applied.set(&[], built)?;
        }
        if let Some(drift) = self.drift {
            let help = "Whether its file says something else than what serves";
            gauge(encoder, "config_drift", help)?.set(&[], u32::from(drift))?;
        }
        let missing = &status.incomplete;
        let help = "Interfaces and host names of the file that are missing";
        gauge(encoder, "config_incomplete", help)?
            .set(&[], (missing.interfaces.len() + missing.hosts.len()) as u64)?;
        let help = "Whether packets that come in there meet the rules";
        let mut attached = gauge(encoder, "interface_attached", help)?;
        for interface in &status.interfaces {
            let is_attached = interface.generation.is_some();
            attached.set(&[("interface", &interface.name)], u32::from(is_attached))?;
        }
        let help = "How often arpd put back a filter that somebody else had removed";
        let mut reattached = counter(encoder, "reattached", help)?;
        for interface in &status.interfaces {
            reattached.set(&[("interface", &interface.name)], interface.reattached)?;
        }
        if let Some(xdp) = status.xdp {
            let help = "Forwarded packets that XDP has sent since the generation was built";
            counter(encoder, "xdp_packets", help)?.set(&[], xdp.packets)?;
        }
        let help = "Whether arpd vouches for the next hops";
        gauge(encoder, "arpd_up", help)?.set(&[], u32::from(status.arpd == Some(true)))?;
        let help = "1 for the state of an announced address, 0 for the others";
        let mut announced = gauge(encoder, "announced", help)?;
        for one in &status.announced {
            let address = one.address.to_string();
            for state in State::ALL {
                let labels = [("address", address.as_str()), ("state", state.word())];
                announced.set(&labels, u32::from(one.state == state))?;
            }
        }
        let help =
            "Digest of what decides which upstream a packet goes to; equal on hosts that agree";
        let mut choice = gauge(encoder, "choice_hash", help)?;
        for (rule, hash) in status.rules.iter().zip(&self.choices) {
            choice.set(&[("rule", &rule.name)], *hash)?;
        }
        let help = "How full a table is, of the most that there may be in it";
        let mut fill = gauge(encoder, "map_fill_ratio", help)?;
        for (map, ratio) in &self.fill {
            fill.set(&[("map", map)], *ratio)?;
        }
        Ok(())
    }

    fn encode_traffic(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let rules = &self.status.rules;
        let mut packets = counter(encoder, "rule_packets", "Packets that matched the rule")?;
        for rule in rules {
            packets.set(&[("rule", &rule.name)], rule.counters.matched().packets)?;
        }
        let help = "Bytes of the packets that matched the rule, with Ethernet headers";
        let mut bytes = counter(encoder, "rule_bytes", help)?;
        for rule in rules {
            bytes.set(&[("rule", &rule.name)], rule.counters.matched().bytes)?;
        }
        let help = "Packets and copies that were sent to the upstream";
        let mut packets = counter(encoder, "upstream_packets", help)?;
        for (labels, upstream) in self.upstreams() {
            packets.set(&labels, upstream.counters.forwarded().packets)?;
        }
        let help = "Bytes of what was sent to the upstream, with Ethernet headers";
        let mut bytes = counter(encoder, "upstream_bytes", help)?;
        for (labels, upstream) in self.upstreams() {
            bytes.set(&labels, upstream.counters.forwarded().bytes)?;
        }
        let help = "Answers of the upstream that were sent on to their clients";
        let mut packets = counter(encoder, "answers_packets", help)?;
        for (labels, upstream) in self.upstreams() {
            if let Some(answers) = &upstream.answers {
                packets.set(&labels, answers.forwarded().packets)?;
            }
        }
        if let Some(decap) = &self.status.decap {
            let help = "Packets to this host whose outer headers were taken off";
            counter(encoder, "decapsulated_packets", help)?.set(&[], decap.count.packets)?;
            let help = "Bytes of these packets, without the outer headers";
            counter(encoder, "decapsulated_bytes", help)?.set(&[], decap.count.bytes)?;
        }
        let mut flows = gauge(encoder, "flows", "Flows of the rule's upstreams")?;
        for rule in rules {
            for (state, counts) in
                FlowState::ALL.into_iter().filter_map(|state| Some((state, rule.flows?)))
            {
                let labels = [("rule", rule.name.as_str()), ("state", state.word())];
                flows.set(&labels, counts.of(state))?;
            }
        }
        let help =
            "Packets and copies that were not sent on; without upstream: packets that went to none";
        let mut drops = counter(encoder, "drops", help)?;
        let mut add = |rule: &str, upstream: &str, counts: &Counts| {
            counts.drops().try_for_each(|(reason, count)| {
                let labels = [("rule", rule), ("upstream", upstream), ("reason", reason)];
                drops.set(&labels, count.packets)
            })
        };
        add("", "", &self.status.unmatched)?;
        for rule in rules {
            add(&rule.name, "", &rule.own)?;
            for (upstream, _) in rule.destinations() {
                add(&rule.name, &upstream.label, &upstream.counters)?;
            }
        }
        let help = "Packets that were not selected by what was asked for, and copies of templates, by note";
        let mut notes = counter(encoder, "rule_notes", help)?;
        for rule in rules {
            for (note, count) in &rule.notes {
                notes.set(&[("rule", &rule.name), ("note", note)], count.packets)?;
            }
        }
        Ok(())
    }

    fn encode_senders(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counting = || {
            let rules = self.status.rules.iter();
            rules.filter_map(|rule| Some((("rule", rule.name.as_str()), rule.senders?)))
        };
        let mut senders = gauge(encoder, "senders", "Senders of the rule, by state")?;
        for (rule, counts) in counting() {
            for state in SenderState::ALL {
                senders.set(&[rule, ("state", state.word())], counts.of(state))?;
            }
        }
        let help = "Since the last packet of the known sender that has been silent for longest";
        let mut silence = gauge(encoder, "sender_silence_seconds", help)?;
        for (rule, counts) in counting() {
            if let Some(seconds) = counts.silence {
                silence.set(&[rule], seconds)?;
            }
        }
        Ok(())
    }

    fn encode_upstreams(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let help = "Whether the upstream's next hop answers and, where it is probed, its service, while arpd runs";
        let mut up = gauge(encoder, "upstream_up", help)?;
        for (labels, upstream) in self.upstreams() {
            if let Some(health) = upstream.health {
                up.set(&labels, u32::from(health != "down"))?;
            }
        }
        let help = "Since the upstream's next hop last answered the kernel";
        let mut age = gauge(encoder, "neighbour_age_seconds", help)?;
        for (labels, upstream) in self.upstreams() {
            if let Some(seconds) = upstream.next_hop.as_ref().and_then(|hop| hop.age) {
                age.set(&labels, seconds)?;
            }
        }
        self.encode_probes(encoder)
    }

    fn encode_probes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let probed =
            || self.upstreams().filter_map(|(labels, it)| Some((labels, it.probe.as_deref()?)));
        let help = "Time from a probe of the upstream's service to its answer";
        let name = "upstream_probe_latency_seconds";
        let mut latency = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (labels, probe) in probed() {
            let bounds = LATENCIES.iter().map(|bound| f64::from(*bound) / 1e6);
            let buckets: Vec<(f64, u64)> = bounds.chain([f64::MAX]).zip(probe.latencies).collect();
            let count = probe.latencies.iter().sum();
            let sum = probe.latency as f64 / 1e6;
            let mut family = latency.encode_family(&labels)?;
            family.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        let help = "Probes of the upstream's service that failed, by reason";
        let mut failures = counter(encoder, "probe_failures", help)?;
        for ([rule, upstream], probe) in probed() {
            for (outcome, reason) in FAILURES {
                let labels = [rule, upstream, ("reason", reason)];
                failures.set(&labels, probe.outcomes[outcome.0 as usize])?;
            }
        }
        Ok(())
    }

    fn upstreams(&self) -> impl Iterator<Item = ([Label<'_>; 2], &UpstreamStatus)> {
        self.status.rules.iter().flat_map(|rule| {
            rule.destinations().map(|(upstream, _)| {
                ([("rule", rule.name.as_str()), ("upstream", &upstream.label)], upstream)
            })
        })
    }
}

type Label<'a> = (&'static str, &'a str);

/// Metrics of one name.
struct Gauge<'a>(MetricEncoder<'a>);
struct Counter<'a>(MetricEncoder<'a>);

fn gauge<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> std::result::Result<Gauge<'a>, fmt::Error> {
    Ok(Gauge(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?))
}

fn counter<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &str,
) -> std::result::Result<Counter<'a>, fmt::Error> {
    Ok(Counter(encoder.encode_descriptor(name, help, None, MetricType::Counter)?))
}

impl Gauge<'_> {
    fn set(&mut self, labels: &[Label<'_>], value: impl EncodeGaugeValue) -> fmt::Result {
        self.0.encode_family(&labels)?.encode_gauge(&value)
    }
}

impl Counter<'_> {
    fn set(&mut self, labels: &[Label<'_>], value: u64) -> fmt::Result {
        self.0.encode_family(&labels)?.encode_counter::<NoLabelSet, u64, f64>(&value, None)
    }
}
