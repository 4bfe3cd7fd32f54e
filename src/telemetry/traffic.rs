//! Traffic of rules and upstreams: the one place that sums counters.

use std::collections::BTreeMap;
use std::time::Instant;

use schemars::JsonSchema;
use serde::Serialize;

use crate::datapath::counters::{Count, Counts};
use crate::datapath::description::Generation;
use crate::datapath::pins::ReadGuard;
use crate::datapath::state_maps::StateMaps;
use crate::datapath::{lines, retired};

/// All counters at one moment, or how much they grew between two.
#[derive(Clone, Debug)]
pub struct Traffic {
    by_id: Vec<Counts>,
    /// By the rule's id, in order.
    rules: Vec<(u32, Counts)>,
    taken: Instant,
    /// Seconds; `None`: since the counters began.
    over: Option<f64>,
}

/// Packets and bits per second.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Rate {
    pub packets_per_second: f64,
    /// Including Ethernet headers.
    pub bits_per_second: f64,
}

impl Traffic {
    /// Reads the counters of all rules and upstreams. `generations` must be all that exist: each has counted what
    /// it sent, and a rule keeps the packets of upstreams that it has lost.
    pub fn read(
        guard: &ReadGuard,
        maps: &StateMaps,
        generations: &BTreeMap<u32, Generation>,
    ) -> anyhow::Result<Traffic> {
        let max = generations.values().flat_map(Generation::ids).max().unwrap_or(0);
        let mut by_id = maps.counters.read(max)?;
        for generation in generations.values() {
            for (id, count) in lines::read(guard, generation)? {
                by_id[id as usize].add_sent(count);
            }
        }
        let mut counting = Vec::new();
        for (rule, upstreams) in generations.values().flat_map(Generation::counting) {
            counting.push((rule, rule));
            counting.extend(upstreams.iter().map(|id| (rule, *id)));
        }
        // merge sort: the list consists of sorted runs
        counting.sort();
        // generations share ids
        counting.dedup();
        let retired = retired::read(guard)?;
        for (id, sum) in retired.sums() {
            let is_rule = counting.binary_search(&(id, id)).is_ok();
            if let Some(counts) = by_id.get_mut(id as usize).filter(|_| !is_rule) {
                *counts += sum;
            }
        }
        let mut rules: Vec<(u32, Counts)> = Vec::new();
        for (rule, id) in counting {
            if rules.last().is_none_or(|(last, _)| *last != rule) {
                rules.push((rule, retired.of(rule)));
            }
            if let Some((_, counts)) = rules.last_mut() {
                *counts += by_id[id as usize];
            }
        }
        Ok(Traffic { by_id, rules, taken: Instant::now(), over: None })
    }

    /// Returns the growth since an earlier reading. Rules and upstreams keep their ids over an apply.
    pub fn since(&self, earlier: &Traffic) -> Traffic {
        let none = Counts::default();
        let earlier_counts = earlier.by_id.iter().chain(std::iter::repeat(&none));
        let by_id = self.by_id.iter().zip(earlier_counts).map(|(now, then)| *now - *then).collect();
        // from the totals: after an apply a rule may have other upstreams
        let rules = self.rules.iter();
        let rules = rules.map(|(id, now)| (*id, *now - earlier.of_rule(*id))).collect();
        let over = self.taken.duration_since(earlier.taken).as_secs_f64();
        Traffic { by_id, rules, taken: self.taken, over: Some(over.max(1e-3)) }
    }

    /// Returns the counters of one id: an upstream, a mirror, or 0 for packets of no rule.
    pub fn of(&self, id: u32) -> Counts {
        self.by_id.get(id as usize).copied().unwrap_or_default()
    }

    /// Returns the counters of a rule by its id: each packet once, also those of upstreams that it has lost.
    pub fn of_rule(&self, rule: u32) -> Counts {
        let found = self.rules.binary_search_by_key(&rule, |(id, _)| *id);
        found.map_or_else(|_| Counts::default(), |place| self.rules[place].1)
    }

    /// Returns the rate of a count; `None` if this is a total.
    pub fn rate(&self, count: Count) -> Option<Rate> {
        let seconds = self.over?;
        Some(Rate {
            packets_per_second: count.packets as f64 / seconds,
            bits_per_second: count.bytes as f64 * 8.0 / seconds,
        })
    }
}
