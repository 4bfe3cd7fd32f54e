//! Spares: the selectable upstreams of the lowest priority, by weight, for flows of upstreams that cannot be
//! selected.
//!
//! The program first tries a few other slots of the flow, which needs no table and moves no other flow. The
//! table serves rules with few selectable upstreams.

use std::collections::{BTreeMap, HashSet};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, types};
use crate::config::{AllDown, Health, Mode, State};
use crate::datapath::gate::Gate;
use crate::datapath::lease;
use crate::datapath::nexthops;
use crate::datapath::pins::ReadGuard;
use crate::datapath::state_maps::StateMaps;
use crate::desired::tables::first_upstreams;
use crate::desired::{Desired, Rule, RuleIds};

/// Overrides and failures that keep upstreams from being selected, by id.
#[derive(Clone, Debug, Default)]
pub struct Situation {
    pub overrides: BTreeMap<u32, State>,
    pub down: HashSet<u32>,
}

impl Situation {
    /// Reads it for ids up to `most`. Without a lease no upstream counts as down.
    pub fn read(maps: &StateMaps, most: u32) -> anyhow::Result<Situation> {
        match lease::remaining(&maps.heartbeat)?.is_some_and(|left| !left.is_zero()) {
            true => Situation::leased(maps, most),
            false => Ok(Situation { overrides: maps.overrides.read(most)?, down: HashSet::new() }),
        }
    }

    /// Like the above for arpd, whose lease holds or is about to.
    pub fn leased(maps: &StateMaps, most: u32) -> anyhow::Result<Situation> {
        let overrides = maps.overrides.read(most)?;
        let nexthops = (0..).zip(maps.nexthops.read_all(most)?);
        let down = nexthops.filter(|(_, nexthop)| nexthops::is_down(nexthop));
        Ok(Situation { overrides, down: down.map(|(id, _)| id).collect() })
    }
}

/// Writes the tables of the rules that have one of the `changed` upstreams, or with `None` of all, to a
/// generation, if it has such. An upstream is in them if it can be selected in each of the situations: with those before
/// and after a change nobody is sent to an upstream that goes.
pub fn write(
    guard: &ReadGuard,
    number: u32,
    (desired, ids): (&Desired, &[RuleIds]),
    situations: &[&Situation],
    changed: Option<&HashSet<u32>>,
    gate: &Gate,
) -> anyhow::Result<()> {
    let path = guard.generation(number).join(PIN);
    // built by an earlier udplb
    if !path.try_exists()? {
        return Ok(());
    }
    let map = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for ((rule, ids), first) in desired.rules.iter().zip(ids).zip(first_upstreams(desired)) {
        let concerns = |changed: &HashSet<u32>| ids.upstreams.iter().any(|id| changed.contains(id));
        if rule.mode == Mode::Balance && changed.is_none_or(concerns) {
            let table = table(first, rule, ids, situations);
            keys.extend((first..).take(table.len()).flat_map(u32::to_ne_bytes));
            values.extend(table.iter().flat_map(bytes_of));
        }
    }
    let count = (keys.len() / size_of::<u32>()) as u32;
    if count > 0 {
        map.update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY)?;
    }
    gate.advance();
    Ok(())
}

/// Name of the map's pin in a generation's directory.
pub const PIN: &str = "spares";

/// As many entries as the rule has upstreams, the first of which has the index `first`.
pub fn table(
    first: u32,
    rule: &Rule,
    ids: &RuleIds,
    situations: &[&Situation],
) -> Vec<types::spare> {
    let is_active = |index: &usize| {
        let (id, in_file) = (ids.upstreams[*index], rule.upstreams[*index].state);
        let state = |it: &&Situation| *it.overrides.get(&id).unwrap_or(&in_file);
        situations.iter().all(|situation| state(situation) == State::Active)
    };
    let is_up = |index: &usize| {
        let id = ids.upstreams[*index];
        rule.health == Health::Off || !situations.iter().any(|it| it.down.contains(&id))
    };
    let active: Vec<usize> = (0..rule.upstreams.len()).filter(is_active).collect();
    let up: Vec<usize> = active.iter().copied().filter(is_up).collect();
    // if all are down, treat all as up
    let mut usable = if up.is_empty() && rule.all_down == AllDown::Open { active } else { up };
    let priority = |index: &usize| rule.upstreams[*index].priority;
    let lowest = usable.iter().map(priority).min();
    usable.retain(|index| Some(priority(index)) == lowest);
    let shares: Vec<(u32, u32)> =
        usable.iter().map(|index| (*index as u32, rule.upstreams[*index].weight)).collect();
    entries(first, &shares, rule.upstreams.len())
}

/// By index and weight; what there is beyond them is never found.
fn entries(first: u32, shares: &[(u32, u32)], count: usize) -> Vec<types::spare> {
    let all: u64 = shares.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let mut sum = 0;
    let mut entries: Vec<types::spare> = shares
        .iter()
        .map(|(index, weight)| {
            sum += u64::from(*weight);
            // weights are below 2^14, and there are fewer than 2^16
            let last = ((sum << 32) / all - 1) as u32;
            types::spare { last, index: first + index + 1 }
        })
        .collect();
    let index = entries.last().map_or(0, |last| last.index);
    entries.resize(count, types::spare { last: u32::MAX, index });
    entries
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::{Situation, entries, table};
    use crate::config::{Health, Key, State};
    use crate::desired::{Rule, RuleIds, Upstream};

    /// Returns the number of the 2^32 hashes that select each index.
    fn shares(entries: &[crate::bpf::types::spare]) -> HashMap<u32, u64> {
        let (mut shares, mut before) = (HashMap::new(), 0);
        for entry in entries {
            let end = u64::from(entry.last) + 1;
            *shares.entry(entry.index).or_default() += end - before;
            before = end;
        }
        shares
    }

    proptest! {
        #[test]
        fn shares_are_the_weights(weights in vec(1..=10_000_u32, 1..300), rest in 0..300_usize) {
            let shares_of: Vec<(u32, u32)> = (0..).zip(weights.iter().copied()).collect();
            let all: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            let shares = shares(&entries(7, &shares_of, weights.len() + rest));
            for (index, weight) in shares_of {
                let exact = (u64::from(weight) << 32) as f64 / all as f64;
                let got = shares[&(7 + index + 1)] as f64;
                prop_assert!((got - exact).abs() <= 1.0, "{got} is not {exact}");
            }
        }
    }

    #[test]
    fn the_largest_rule_fits() {
        let shares_of: Vec<(u32, u32)> = (0..65_535).map(|index| (index, 10_000)).collect();
        let shares = shares(&entries(0, &shares_of, 65_535));
        assert_eq!(shares.len(), 65_535);
        assert!(shares.values().all(|share| (65_536..=65_538).contains(share)));
    }

    #[test]
    fn who_is_left() {
        let upstreams = [(1, State::Active), (2, State::Drained), (3, State::Active)];
        let upstream = |(host, state)| Upstream { state, ..Upstream::new([10, 0, 9, host], None) };
        let key = Key::new([10, 0, 0, 5], Vec::new());
        let rule = Rule::new("rule", key, upstreams.map(upstream).to_vec());
        let rule = Rule { health: Health::Neighbour, ..rule };
        let ids = RuleIds { rule: 1, upstreams: vec![11, 12, 13], ..RuleIds::default() };
        let left = |rule: &Rule, situations: &[&Situation]| {
            let mut left: Vec<u32> =
                table(5, rule, &ids, situations).iter().map(|entry| entry.index).collect();
            left.dedup();
            left
        };
        let in_file = Situation::default();
        let with = |overrides: &[(u32, State)], down: &[u32]| Situation {
            overrides: overrides.iter().copied().collect(),
            down: down.iter().copied().collect(),
        };
        let (first, second, third) = (6, 7, 8);
        assert_eq!(left(&rule, &[&in_file]), [first, third]);
        let swapped = with(&[(11, State::Drained), (12, State::Active)], &[]);
        assert_eq!(left(&rule, &[&swapped]), [second, third]);
        assert_eq!(left(&rule, &[&in_file, &swapped]), [third]);
        assert_eq!(left(&rule, &[&with(&[], &[11])]), [third]);
        // all that may be selected are down
        assert_eq!(left(&rule, &[&with(&[], &[11, 13])]), [first, third]);
        let mut ranked = rule.clone();
        (ranked.upstreams[1].state, ranked.upstreams[2].priority) = (State::Active, 2);
        assert_eq!(left(&ranked, &[&in_file]), [first, second]);
        assert_eq!(left(&ranked, &[&with(&[], &[11, 12])]), [third]);
        assert_eq!(left(&ranked, &[&with(&[], &[11, 12, 13])]), [first, second]);
        let off = Rule { health: Health::Off, ..rule.clone() };
        assert_eq!(left(&off, &[&with(&[], &[11])]), [first, third]);
        let none = with(&[(11, State::Drained), (13, State::Drained)], &[]);
        assert_eq!(left(&rule, &[&none]), [0]);
    }
}
