//! Selects the upstream of a flow while some are drained, as bpf/lb.h does. Pure.

use std::collections::HashMap;

use crate::config::{Address, Hash, State, Strategy};
use crate::desired::{Rule, Upstream};

/// Number of other slots to try if a flow's own upstream is drained.
const REHASHED: u32 = 8;

/// Number of sampled flows: the standard deviation of a share is a third of a percent.
const FLOWS: u32 = 1 << 15;

/// The destination of a flow; `None` if its upstream is drained.
pub type End<'a> = Option<(&'a Address, Option<u16>)>;

/// A rule's table and the upstreams behind it.
struct Chooser<'a> {
    rule: &'a Rule,
    slots: &'a [u16],
    /// The active upstreams of the lowest priority that has such.
    spares: Vec<&'a Upstream>,
    /// Sum of the weights of the spares.
    weights: u64,
}

impl<'a> Chooser<'a> {
    fn new(rule: &'a Rule, slots: &'a [u16]) -> Chooser<'a> {
        let mut spares: Vec<_> = rule.upstreams.iter().filter(|it| is_active(it)).collect();
        let lowest = spares.iter().map(|upstream| upstream.priority).min();
        spares.retain(|upstream| Some(upstream.priority) == lowest);
        let weights = spares.iter().map(|upstream| u64::from(upstream.weight)).sum();
        Chooser { rule, slots, spares, weights }
    }

    /// Returns the destination of a key; `None` if all are drained.
    fn end(&self, key: u32) -> End<'a> {
        let at = |key: u32| {
            &self.rule.upstreams[usize::from(self.slots[key as usize % self.slots.len()])]
        };
        let mut other = key;
        let mut found = Some(at(key)).filter(|upstream| is_active(upstream));
        for choice in 0..REHASHED {
            if found.is_some() {
                break;
            }
            other = (other ^ other >> 15).wrapping_mul(0x9e37_79b1).wrapping_add(choice);
            found = Some(at(other)).filter(|upstream| is_active(upstream));
        }
        let upstream = found.or_else(|| self.by_weight(key))?;
        Some((&upstream.address, upstream.port))
    }

    fn by_weight(&self, key: u32) -> Option<&'a Upstream> {
        let mut place = (u64::from(scrambled(key)) * self.weights) >> 32;
        self.spares.iter().copied().find(|upstream| {
            let here = place < u64::from(upstream.weight);
            place = place.saturating_sub(upstream.weight.into());
            here
        })
    }

    /// Returns the selection key of a flow.
    fn key(&self, flow: u32) -> u32 {
        match (self.rule.hash, self.rule.strategy) {
            // A port; there are more ports than sampled flows.
            (Hash::Modulo, Strategy::SrcPort) => flow * 2 + (scrambled(flow) & 1),
            _ => scrambled(flow),
        }
    }
}

fn is_active(upstream: &Upstream) -> bool {
    upstream.state == State::Active
}

/// The finalizer of MurmurHash3 for 32 bits.
fn scrambled(mut number: u32) -> u32 {
    number ^= number >> 16;
    number = number.wrapping_mul(0x85eb_ca6b);
    number ^= number >> 13;
    number = number.wrapping_mul(0xc2b2_ae35);
    number ^ number >> 16
}

/// Returns the share of flows, 0 to 1, that move. Each rule comes with its table; `same_key` is true if both
/// have the same selection key.
pub fn moved(
    (old, old_slots): (&Rule, &[u16]),
    (new, new_slots): (&Rule, &[u16]),
    same_key: bool,
) -> f64 {
    let (old, new) = (Chooser::new(old, old_slots), Chooser::new(new, new_slots));
    if same_key {
        let moves = |flow: &u32| old.end(old.key(*flow)) != new.end(new.key(*flow));
        return (0..FLOWS).filter(moves).count() as f64 / f64::from(FLOWS);
    }
    let mut ends: HashMap<End<'_>, (f64, f64)> = HashMap::new();
    for flow in 0..FLOWS {
        ends.entry(old.end(old.key(flow))).or_default().0 += 1.0;
        ends.entry(new.end(new.key(flow))).or_default().1 += 1.0;
    }
    let stay: f64 = ends.values().map(|(before, after)| before * after).sum();
    1.0 - stay / f64::from(FLOWS).powi(2)
}
