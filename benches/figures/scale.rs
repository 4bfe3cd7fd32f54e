//! Simulation of many boxes behind one router: flows that move at each event, against the least possible.
//! Pure: the tables are those that `apply` writes, the hash is that of `sender_key` in bpf/lb.h.

use udplb::config::{Key, Ports};
use udplb::desired::tables::Tables;
use udplb::desired::{Desired, Rule, RuleIds, Upstream, assign_ids};

use crate::Report;

const BOXES: u64 = 64;
const UPSTREAMS: u16 = 1000;
const FLOWS: u32 = 10_000_000;

pub fn measure(report: &mut Report) {
    report.title("64 boxes, 1,000 upstreams, 10,000,000 flows: share that moves");
    let all: Vec<u16> = (0..UPSTREAMS).collect();
    // each builds its tables, and has other ids
    let boxes: Vec<Choice> = (0..BOXES).map(|number| Choice::new(&all, number as u32)).collect();
    for (what, gone) in [("the last box goes", BOXES - 1), ("the first box goes", 0)] {
        leave(report, what, &boxes, gone);
    }
    let mut judge = |what: &str, [before, after]: [&[u16]; 2], least: f64, limit: f64| {
        let [before, after] = [before, after].map(|upstreams| Choice::new(upstreams, 0));
        let moved = share(|flow| before.upstream(flow) != after.upstream(flow));
        let figure = format!("{:.3} %", moved * 100.0);
        report.at_most(what, &figure, moved / least, " x", limit);
    };
    let count = all.len() as f64;
    judge("an upstream goes", [&all, &without(&all, 1)], 1.0 / count, 5.0);
    judge("10 upstreams go", [&all, &without(&all, 10)], 10.0 / count, 2.0);
    judge("half of the upstreams go", [&all, &without(&all, 500)], 0.5, 1.1);
    judge("an upstream comes", [&all[..999], &all], 1.0 / count, 5.0);
    judge("10 upstreams come", [&all[..990], &all], 10.0 / count, 2.0);
    let mut replaced = without(&all, 1);
    replaced.push(UPSTREAMS);
    judge("an upstream is replaced by another", [&all, &replaced], 1.0 / count, 6.0);
    // the table of 1,000 is the largest of its size, and another size moves nearly all
    let next: Vec<u16> = (0..=UPSTREAMS).collect();
    judge("the 1,001st comes, and a larger table", [&all, &next], 1.0, 1.0);
}

/// Reports the flows that another box and another upstream get when a box goes. The router divides the range
/// of its hash into equal parts, as multipath routes of Linux do.
fn leave(report: &mut Report, what: &str, boxes: &[Choice], gone: u64) {
    let ends = |flow: Flow| {
        let before = (flow.of_router() * BOXES) >> 32;
        let after = (flow.of_router() * (BOXES - 1)) >> 32;
        [before, after + u64::from(after >= gone)].map(|number| &boxes[number as usize])
    };
    let moved = share(|flow| {
        let [before, after] = ends(flow);
        !std::ptr::eq(before, after)
    });
    let changed = share(|flow| {
        let [before, after] = ends(flow);
        before.upstream(flow) != after.upstream(flow)
    });
    report.note(&format!("{what}: another box"), &format!("{:.1} %", moved * 100.0));
    report.at_most(&format!("{what}: another upstream"), "", changed, "", 0.0);
}

/// Returns a list without `gone` of its elements, spread over it.
fn without(all: &[u16], gone: usize) -> Vec<u16> {
    let step = all.len() / gone;
    all.iter()
        .enumerate()
        .filter(|(place, _)| place % step != step / 2)
        .map(|(_, it)| *it)
        .collect()
}

/// Returns the share of flows, 0 to 1, for which a condition holds.
fn share(holds: impl Fn(Flow) -> bool) -> f64 {
    let flows = (0..FLOWS).filter(|number| holds(Flow(*number)));
    flows.count() as f64 / f64::from(FLOWS)
}

/// The slots of a rule with these upstreams, and their members.
struct Choice {
    slots: Vec<u16>,
    upstreams: Vec<u16>,
}

impl Choice {
    /// Builds the tables of a box whose earlier generations took `used` ids.
    fn new(upstreams: &[u16], used: u32) -> Choice {
        let host = |number: &u16| {
            let [high, low] = number.to_be_bytes();
            Upstream::new([10, 2, high, low], Some(4739))
        };
        let key = Key::new([10, 99, 0, 1], vec![Ports { first: 4739, last: 4739 }]);
        let rule = Rule::new("service", key, upstreams.iter().map(host).collect());
        let desired = Desired { rules: vec![rule], ..Desired::default() };
        let ids = assign_ids(&desired, &[], 1 << 20).expect("ids enough");
        let shifted = |ids: &RuleIds| RuleIds {
            rule: ids.rule + used,
            upstreams: ids.upstreams.iter().map(|id| id + used).collect(),
            ..ids.clone()
        };
        let ids: Vec<RuleIds> = ids.iter().map(shifted).collect();
        let tables = Tables::new(&desired, &ids);
        let rule = &tables.rules[0];
        let slots = tables.slots.iter().flat_map(|line| line.upstream);
        let slots = slots.skip(rule.first_slot as usize).take(rule.slots as usize).collect();
        Choice { slots, upstreams: upstreams.to_vec() }
    }

    fn upstream(&self, flow: Flow) -> u16 {
        let slot = self.slots[flow.key() as usize % self.slots.len()];
        self.upstreams[usize::from(slot)]
    }
}

/// A flow by its number: 16 ports of each of the clients from 100.64.0.0 on.
#[derive(Clone, Copy)]
struct Flow(u32);

impl Flow {
    /// The selection key of `strategy: src-ip-port`.
    fn key(self) -> u32 {
        let (client, port) = (0x6440_0000 + (self.0 >> 4), 49_152 + (self.0 & 15));
        mix(u64::from(client) << 16 ^ u64::from(port)) as u32
    }

    /// The router's hash, which is another one: 32 bits.
    fn of_router(self) -> u64 {
        mix(u64::from(self.0) ^ 0x5bd1_e995_0000_0000) >> 32
    }
}

/// `mix` of bpf/lb.h.
fn mix(mut hash: u64) -> u64 {
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}
