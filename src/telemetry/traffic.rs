//! Traffic of rules and upstreams: the one place that sums counters.

use std::collections::BTreeMap;
use std::time::Instant;

use schemars::JsonSchema;
use serde::Serialize;

use crate::datapath::counters::{self, Count, Counts};
use crate::datapath::description::Generation;
use crate::datapath::pins::ReadGuard;
use crate::datapath::state_maps::StateMaps;
use crate::datapath::{lines, retired};

/// All counters at one moment, or how much they grew between two.
#[derive(Clone, Debug)]
pub struct Traffic {
    /// By id of a rule or an upstream, without those that are zero.
    by_id: BTreeMap<u32, Counts>,
    /// By the rule's id, without those that are zero.
    rules: BTreeMap<u32, Counts>,
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
                if count.packets > 0 {
                    by_id.entry(id).or_default().add_sent(count);
                }
            }
        }
        // the rule that an id counts for; 0: none
        let mut owners = vec![0; max as usize + 1];
        for (rule, upstreams) in generations.values().flat_map(Generation::counting) {
            for id in upstreams.iter().chain([&rule]) {
                owners[*id as usize] = rule;
            }
        }
        let mut rules: BTreeMap<u32, Counts> = BTreeMap::new();
        for (id, sum) in retired::read(guard)?.sums().filter(|(id, _)| *id <= max) {
            let is_rule = owners[id as usize] == id;
            *if is_rule { &mut rules } else { &mut by_id }.entry(id).or_default() += sum;
        }
        for (id, counts) in by_id.iter().filter(|(id, _)| owners[**id as usize] != 0) {
            *rules.entry(owners[*id as usize]).or_default() += counts;
        }
        Ok(Traffic { by_id, rules, taken: Instant::now(), over: None })
    }

    /// Returns the growth since an earlier reading. Rules and upstreams keep their ids over an apply.
    pub fn since(&self, earlier: &Traffic) -> Traffic {
        let by_id = self.by_id.iter().map(|(id, now)| (*id, now - earlier.of(*id))).collect();
        // from the totals: after an apply a rule may have other upstreams
        let rules = self.rules.iter().map(|(id, now)| (*id, now - earlier.of_rule(*id))).collect();
        let over = self.taken.duration_since(earlier.taken).as_secs_f64();
        Traffic { by_id, rules, taken: self.taken, over: Some(over.max(1e-3)) }
    }

    /// Returns the counters of one id: an upstream, a mirror, or 0 for packets of no rule.
    pub fn of(&self, id: u32) -> &Counts {
        self.by_id.get(&id).unwrap_or(&counters::NONE)
    }

    /// Returns the counters of a rule by its id: each packet once, also those of upstreams that it has lost.
    pub fn of_rule(&self, rule: u32) -> &Counts {
        self.rules.get(&rule).unwrap_or(&counters::NONE)
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
