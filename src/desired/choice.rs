//! Digests of what decides which upstream a packet goes to, to compare hosts that share a configuration. Pure.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use crate::config::{Mode, Templates};
use crate::desired::tables::SlotTable;
use crate::desired::{Rule, Upstream, diff};

/// A digest of 48 bits: a number that JSON and Prometheus keep exactly.
pub type ChoiceHash = u64;

/// Returns the digest of each rule: of the way of selecting, of the slots, and of the upstreams with their
/// resolved addresses and states. Hosts with equal digests choose alike.
pub fn digests(rules: &[Rule]) -> Vec<ChoiceHash> {
    let mut tables: HashMap<SlotTable, Vec<u8>> = HashMap::new();
    rules.iter().map(|rule| digest(rule, &mut tables)).collect()
}

/// `tables` are the bytes of the slots so far.
fn digest(rule: &Rule, tables: &mut HashMap<SlotTable, Vec<u8>>) -> ChoiceHash {
    let mut digest = Sha256::new();
    digest.update(format!(
        "{:?} {:?} {:?} {:?}\n",
        rule.mode, rule.strategy, rule.payload, rule.hash
    ));
    if let Some(place) = rule.server_id {
        digest.update(format!("{place:?}\n"));
    }
    if rule.templates == Templates::All {
        digest.update("templates\n");
    }
    for upstream in rule.destinations() {
        let (address, port) = (&upstream.address, upstream.port);
        let Upstream { state, sample, priority, from, not_from, .. } = upstream;
        digest.update(format!("{address} {port:?} {state:?} {sample} {priority} "));
        digest.update(format!("{from:?} {not_from:?}\n"));
        if let Some(id) = &upstream.server_id {
            digest.update(format!("{id}\n"));
        }
    }
    if rule.mode == Mode::Balance {
        let bytes =
            |table: &SlotTable| table.slots().into_iter().flat_map(u16::to_le_bytes).collect();
        let slots = tables.entry(SlotTable::of(rule));
        digest.update(slots.or_insert_with_key(bytes));
    }
    short(digest)
}

/// Returns the digest of a whole configuration, from those of its rules.
pub fn total(rules: &[Rule], digests: &[ChoiceHash]) -> ChoiceHash {
    let mut total = Sha256::new();
    for (rule, digest) in rules.iter().zip(digests) {
        total.update(format!("{} {} {digest}\n", rule.name, diff::key(rule)));
    }
    short(total)
}

fn short(digest: Sha256) -> ChoiceHash {
    digest.finalize().iter().take(6).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::{digests, total};
    use crate::config::{Hash, Key, Ports, State, Templates};
    use crate::desired::{Rule, Upstream};

    fn rule() -> Rule {
        let key = Key::new([10, 99, 0, 1], vec![Ports { first: 53, last: 53 }]);
        let upstreams = [11, 12, 13].map(|last| Upstream::new([10, 2, 0, last], Some(53)));
        Rule::new("dns", key, upstreams.to_vec())
    }

    #[test]
    fn a_digest_is_stable_and_exact_in_a_float() {
        let all = digests(&[rule(), rule()]);
        assert_eq!(all[0], all[1]);
        assert_eq!(all[0] as f64 as u64, all[0]);
    }

    #[test]
    fn what_moves_flows_changes_the_digest() {
        let mut changed = vec![rule(); 7];
        changed[1].upstreams[2].state = State::Drained;
        changed[2].upstreams[2].weight = 2;
        changed[3].upstreams.pop();
        changed[4].hash = Hash::Modulo;
        changed[5].upstreams[0] = Upstream::new([10, 2, 0, 14], Some(53));
        changed[6].templates = Templates::All;
        let all = digests(&changed);
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), changed.len(), "{all:x?}");
    }

    #[test]
    fn names_and_keys_change_the_total_alone() {
        let mut renamed = rule();
        renamed.name = "other".into();
        let rules = [rule(), renamed];
        let all = digests(&rules);
        assert_eq!(all[0], all[1]);
        assert_ne!(total(&rules[..1], &all[..1]), total(&rules[1..], &all[1..]));
    }
}
