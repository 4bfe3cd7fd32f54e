//! The contents of a generation's maps, and what they say of where a flow goes. Pure.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use crate::bpf::types;
use crate::config::{Action, Health, Source, Strategy};
use crate::plan::{Desired, Rule, RuleIds, Upstream};

/// What is written to `rules`, `slots` and `upstreams`.
#[derive(Default)]
pub struct Tables {
    pub rules: Vec<(types::rule_key, types::rule)>,
    pub slots: Vec<types::slot_line>,
    pub upstreams: Vec<types::upstream>,
}

impl Tables {
    /// `ids` are those of `desired`. Port and address bytes are laid out as they are on the wire.
    pub fn new(desired: &Desired, ids: &[RuleIds]) -> Tables {
        let mut tables = Tables::default();
        let mut slots = Slots::default();
        let mut indices = HashMap::new();
        for (rule, ids) in desired.rules.iter().zip(ids) {
            let upstreams: Vec<u16> = rule
                .upstreams
                .iter()
                .zip(&ids.upstreams)
                .map(|(upstream, id)| {
                    *indices.entry(*id).or_insert_with(|| {
                        tables.upstreams.push(upstream_entry(upstream, *id));
                        (tables.upstreams.len() - 1) as u16
                    })
                })
                .collect();
            let value = types::rule {
                id: ids.rule,
                slots: upstreams.len() as u32,
                first_slot: slots.place(upstreams),
                action: action(rule.action),
                strategy: strategy(rule.strategy),
                source: source(rule.source),
                skip_down: (rule.health == Health::Neighbour).into(),
            };
            for port in rule.key.ports.iter().flat_map(|ports| ports.first..=ports.last) {
                let key = types::rule_key {
                    address: wire(rule.key.address),
                    port: port.to_be(),
                    unused: 0,
                };
                tables.rules.push((key, value));
            }
        }
        tables.slots = slots.lines();
        tables
    }
}

/// Slot tables one behind the other; rules with the same upstreams share one.
#[derive(Default)]
struct Slots {
    all: Vec<u16>,
    first_of: HashMap<Vec<u16>, u32>,
}

impl Slots {
    fn place(&mut self, table: Vec<u16>) -> u32 {
        if let Some(first) = self.first_of.get(&table) {
            return *first;
        }
        let first = self.all.len() as u32;
        self.all.extend_from_slice(&table);
        self.first_of.insert(table, first);
        first
    }

    fn lines(&self) -> Vec<types::slot_line> {
        let mut line = types::slot_line::default();
        let width = line.upstream.len();
        self.all
            .chunks(width)
            .map(|chunk| {
                line.upstream = Default::default();
                line.upstream[..chunk.len()].copy_from_slice(chunk);
                line
            })
            .collect()
    }
}

/// An address as the kernel's `__be32` has it.
pub fn wire(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

fn upstream_entry(upstream: &Upstream, id: u32) -> types::upstream {
    types::upstream {
        id,
        address: wire(upstream.address),
        port: upstream.port.unwrap_or(0).to_be(),
        unused: 0,
    }
}

fn action(action: Action) -> types::action {
    match action {
        Action::Pass => types::action::ACTION_PASS,
        Action::Block => types::action::ACTION_BLOCK,
    }
}

fn strategy(strategy: Strategy) -> types::strategy {
    match strategy {
        Strategy::SrcPort => types::strategy::STRATEGY_SRC_PORT,
        Strategy::SrcIp => types::strategy::STRATEGY_SRC_IP,
        Strategy::SrcIpPort => types::strategy::STRATEGY_SRC_IP_PORT,
    }
}

fn source(source: Source) -> types::source {
    match source {
        Source::Vip => types::source::SOURCE_VIP,
        Source::Preserve => types::source::SOURCE_PRESERVE,
    }
}

/// Keys that are looked at for one rule.
const MOST_KEYS: usize = 1 << 22;

/// The share of a rule's flows, 0 to 1, that `new` sends elsewhere than `old` did.
///
/// Exact up to [`MOST_KEYS`]: keys that far apart as the two lengths' least common multiple pick
/// the same slots of both tables.
pub fn moved_share(old: &Rule, new: &Rule) -> f64 {
    if old.strategy != new.strategy && old.upstreams.len().max(new.upstreams.len()) > 1 {
        return moved_by_strategy(old, new);
    }
    let (before, after) = (old.upstreams.len(), new.upstreams.len());
    let keys = (before / gcd(before, after) * after).min(MOST_KEYS);
    let moved = (0..keys)
        .filter(|key| !same_endpoint(&old.upstreams[key % before], &new.upstreams[key % after]))
        .count();
    moved as f64 / keys as f64
}

/// The two keys have nothing to do with each other, so each slot of one meets each of the other.
fn moved_by_strategy(old: &Rule, new: &Rule) -> f64 {
    let mut shares: HashMap<(Ipv4Addr, Option<u16>), (usize, usize)> = HashMap::new();
    for upstream in &old.upstreams {
        shares.entry((upstream.address, upstream.port)).or_default().0 += 1;
    }
    for upstream in &new.upstreams {
        shares.entry((upstream.address, upstream.port)).or_default().1 += 1;
    }
    let stay: usize = shares.values().map(|(before, after)| before * after).sum();
    1.0 - stay as f64 / (old.upstreams.len() * new.upstreams.len()) as f64
}

fn same_endpoint(one: &Upstream, other: &Upstream) -> bool {
    (one.address, one.port) == (other.address, other.port)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
