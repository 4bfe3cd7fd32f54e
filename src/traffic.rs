//! What became of the packets of rules and upstreams: the one place that adds counters up.

use std::time::Instant;

use serde::Serialize;

use crate::config::Mode;
use crate::counters::{Count, Counters, Counts};
use crate::generation;
use crate::plan::{Rule, RuleIds};

/// All counters at one moment, or how much they grew between two.
#[derive(Clone, Debug)]
pub struct Traffic {
    by_id: Vec<Counts>,
    taken: Instant,
    /// Seconds; `None`: since the counters began.
    over: Option<f64>,
}

/// How much a second.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rate {
    pub packets_per_second: f64,
    /// With the Ethernet headers.
    pub bits_per_second: f64,
}

impl Traffic {
    /// Reads the counters of these rules and upstreams.
    pub fn read(counters: &Counters, ids: &[RuleIds]) -> anyhow::Result<Traffic> {
        let most = generation::all(ids).max().unwrap_or(0);
        Ok(Traffic { by_id: counters.read(most)?, taken: Instant::now(), over: None })
    }

    /// What came since. Ids stay with rules and upstreams over an apply.
    pub fn since(&self, earlier: &Traffic) -> Traffic {
        let none = Counts::default();
        let earlier_counts = earlier.by_id.iter().chain(std::iter::repeat(&none));
        let by_id = self.by_id.iter().zip(earlier_counts).map(|(now, then)| *now - *then).collect();
        let over = self.taken.duration_since(earlier.taken).as_secs_f64();
        Traffic { by_id, taken: self.taken, over: Some(over.max(1e-3)) }
    }

    /// What was counted under one id: that of an upstream or mirror, or 0 for what belongs to no rule.
    pub fn of(&self, id: u32) -> Counts {
        self.by_id.get(id as usize).copied().unwrap_or_default()
    }

    /// Each packet of a rule once, whichever upstream it went to.
    pub fn of_rule(&self, rule: &Rule, ids: &RuleIds) -> Counts {
        if rule.mode == Mode::Replicate {
            // it counts packets, its receivers their copies
            return self.of(ids.rule);
        }
        let mut upstreams = ids.upstreams.clone();
        upstreams.sort_unstable();
        // one that is listed twice is one
        upstreams.dedup();
        let mut counts = self.of(ids.rule);
        for id in upstreams {
            counts += self.of(id);
        }
        counts
    }

    /// `None` where this is no growth.
    pub fn rate(&self, count: Count) -> Option<Rate> {
        let seconds = self.over?;
        Some(Rate {
            packets_per_second: count.packets as f64 / seconds,
            bits_per_second: count.bytes as f64 * 8.0 / seconds,
        })
    }
}
