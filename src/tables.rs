//! The contents of a generation's maps, and what they say of where a flow goes. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::bpf::types;
use crate::config::{Action, Address, Health, KeyAddress, Source, Strategy};
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
            let KeyAddress::Is(address) = rule.key.address else { continue };
            for port in rule.key.ports.iter().flat_map(|ports| ports.first..=ports.last) {
                let key =
                    types::rule_key { address: wire(address)[0], port: port.to_be(), unused: 0 };
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

/// An address as the kernel's `__be32 [4]` has it: an IPv4 one is the first word, and the rest is 0.
pub fn wire(address: IpAddr) -> [u32; 4] {
    match address {
        IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
        IpAddr::V6(address) => {
            let octets = address.octets();
            [0, 4, 8, 12].map(|at| {
                u32::from_ne_bytes([octets[at], octets[at + 1], octets[at + 2], octets[at + 3]])
            })
        }
    }
}

fn upstream_entry(upstream: &Upstream, id: u32) -> types::upstream {
    types::upstream {
        id,
        address: wire(upstream.address.ip)[0],
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
        // the others are not built yet
        Strategy::SrcIpPort | Strategy::Random | Strategy::Payload => {
            types::strategy::STRATEGY_SRC_IP_PORT
        }
    }
}

fn source(source: Source) -> types::source {
    match source {
        // the latter is not built yet
        Source::Vip | Source::Egress => types::source::SOURCE_VIP,
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
    let mut shares: HashMap<(&Address, Option<u16>), (usize, usize)> = HashMap::new();
    for upstream in &old.upstreams {
        shares.entry((&upstream.address, upstream.port)).or_default().0 += 1;
    }
    for upstream in &new.upstreams {
        shares.entry((&upstream.address, upstream.port)).or_default().1 += 1;
    }
    let stay: usize = shares.values().map(|(before, after)| before * after).sum();
    1.0 - stay as f64 / (old.upstreams.len() * new.upstreams.len()) as f64
}

fn same_endpoint(one: &Upstream, other: &Upstream) -> bool {
    (&one.address, one.port) == (&other.address, other.port)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::{Tables, moved_share};
    use crate::config::{Action, Hash, Key, Ports, Strategy};
    use crate::plan::{Desired, Rule, Upstream, assign_ids};

    const KEY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);

    fn rule(name: &str, first: u16, last: u16, upstreams: &[u8]) -> Rule {
        let upstream = |host: &u8| Upstream::new([10, 0, 9, *host], None);
        Rule {
            action: Action::Block,
            strategy: Strategy::SrcIp,
            hash: Hash::Modulo,
            ..Rule::new(
                name,
                Key::new(KEY, vec![Ports { first, last }]),
                upstreams.iter().map(upstream).collect(),
            )
        }
    }

    fn tables(rules: Vec<Rule>) -> Tables {
        let desired = Desired { rules, ..Desired::default() };
        let ids = assign_ids(&desired, &[], 1 << 19).expect("ids enough");
        Tables::new(&desired, &ids)
    }

    #[test]
    fn keys_are_as_on_the_wire() {
        let mut one = rule("one", 514, 514, &[1]);
        one.upstreams[0].port = Some(0x1234);
        let tables = tables(vec![one]);
        let (key, value) = tables.rules[0];
        assert_eq!(key.address.to_ne_bytes(), KEY.octets());
        assert_eq!(key.port.to_ne_bytes(), [514_u16.to_be_bytes()[0], 2]);
        assert_eq!((value.slots, value.first_slot), (1, 0));
        let upstream = tables.upstreams[0];
        assert_eq!(upstream.address.to_ne_bytes(), [10, 0, 9, 1]);
        assert_eq!(upstream.port.to_ne_bytes(), [0x12, 0x34]);
    }

    #[test]
    fn a_range_is_an_entry_for_each_port() {
        let tables =
            tables(vec![rule("range", 1000, 1099, &[1, 2]), rule("last", 65_535, 65_535, &[1])]);
        let mut ports: Vec<u16> =
            tables.rules.iter().map(|(key, _)| u16::from_be(key.port)).collect();
        ports.dedup();
        assert_eq!(ports, (1000..1100).chain([65_535]).collect::<Vec<_>>());
        let first_slots: Vec<u32> = tables.rules.iter().map(|(_, rule)| rule.first_slot).collect();
        assert_eq!(first_slots[..100], [0; 100]);
        assert_eq!(first_slots[100], 2);
    }

    #[test]
    fn slots_lead_to_the_upstreams_in_the_files_order() {
        let hosts: Vec<u8> = (1..=50).chain([7]).collect();
        let tables = tables(vec![rule("one", 1, 1, &[9]), rule("many", 2, 2, &hosts)]);
        let (_, many) = tables.rules[1];
        assert_eq!(many.slots, 51);
        let found: Vec<u8> = (0..many.slots)
            .map(|slot| (many.first_slot + slot) as usize)
            .map(|slot| {
                let width = tables.slots[0].upstream.len();
                let index = tables.slots[slot / width].upstream[slot % width];
                tables.upstreams[usize::from(index)].address.to_ne_bytes()[3]
            })
            .collect();
        assert_eq!(found, hosts);
        // one that is listed twice is one, but none is shared between rules: it has another id
        assert_eq!(tables.upstreams.len(), 51);
    }

    #[test]
    fn no_rules() {
        let tables = tables(Vec::new());
        assert!(tables.rules.is_empty() && tables.slots.is_empty() && tables.upstreams.is_empty());
    }

    #[test]
    fn the_share_that_moves() {
        let of = |upstreams: &[u8]| rule("one", 1, 1, upstreams);
        for (old, new, moved) in [
            (&[1, 2][..], &[1, 2][..], 0.0),
            (&[1], &[2], 1.0),
            (&[1], &[1, 2], 0.5),
            (&[1, 2], &[2, 1], 1.0),
            (&[1, 2], &[1, 2, 1, 2], 0.0),
            (&[1, 2, 3], &[1, 2], 4.0 / 6.0),
        ] {
            assert_eq!(moved_share(&of(old), &of(new)), moved, "{old:?} -> {new:?}");
        }
        // by something else of the packet: only what meets by chance stays
        for (old, new, moved) in
            [(&[1][..], &[1][..], 0.0), (&[1, 2], &[1, 2], 0.5), (&[1, 2], &[3], 1.0)]
        {
            let by_port = Rule { strategy: Strategy::SrcPort, ..of(new) };
            assert_eq!(moved_share(&of(old), &by_port), moved, "{old:?} -> {new:?}");
        }
    }

    #[test]
    fn the_share_of_long_lists_is_counted_in_reasonable_time() {
        let long = |length: usize| {
            let upstreams: Vec<u8> = (0..length).map(|index| index as u8).collect();
            rule("one", 1, 1, &upstreams)
        };
        let share = moved_share(&long(4099), &long(4111));
        assert!((0.9..=1.0).contains(&share), "{share}");
    }
}
