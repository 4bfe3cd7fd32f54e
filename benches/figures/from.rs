//! Nanoseconds per packet of rules that look at senders: `from` of a key and of upstreams.

use crate::Report;
use crate::floors::{self, Packet};
use crate::relay::{Case, Programs, REDIRECT, Relay};
use crate::turns::Turns;

const ROUNDS: usize = 200;

const BESIDE: u16 = 2001;
const KEY: u16 = 2002;
const UPSTREAMS: u16 = 2003;

/// Returns three rules by which the sender has one receiver; two of them look at it, if any does.
fn rules(look: bool) -> String {
    let rule = |port: u16| {
        let (key, upstreams) = match port {
            KEY if look => (", from: [10.0.0.0/8]", "{ address: 10.0.2.2 }"),
            UPSTREAMS if look => (
                "",
                "{ address: 10.0.2.2, from: [10.0.0.0/8] }, { address: 10.0.2.3, from: [172.16.0.0/12] }",
            ),
            _ => ("", "{ address: 10.0.2.2 }"),
        };
        format!(
            "  - key: {{ address: 10.0.1.1, port: {port}{key} }}\n    \
             options: {{ mode: replicate, tc_action: block, source: vip }}\n    \
             upstream: [{upstreams}]\n"
        )
    };
    format!(
        "version: 1\ninterfaces: [in0]\nrules:\n{}",
        [BESIDE, KEY, UPSTREAMS].map(rule).concat()
    )
}

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let relays = [false, true].map(|look| Relay::new(&floors, &rules(look)).leased());
    let mut programs = Programs::new(&floors);
    let loaded = relays.each_ref().map(|relay| programs.add(relay.program()));
    let programs = &programs;
    let mut turns = Turns::default();
    let mut add = |look: bool, port: u16| {
        let (relay, program) = (&relays[usize::from(look)], loaded[usize::from(look)]);
        let packet = Packet::udp(&relay.namespace, port);
        let out = relay.namespace.index("out0");
        let case = Case { out, ..Case::new(REDIRECT) };
        turns.add(move || programs.run(relay, program, &packet, case))
    };
    let beside = [false, true].map(|look| add(look, BESIDE));
    let without = add(false, KEY);
    let [key, upstreams] = [KEY, UPSTREAMS].map(|port| add(true, port));
    let costs = turns.take(ROUNDS);
    relays.iter().for_each(Relay::forwarded_everything);
    report.title("A rule that looks at senders (bpf_prog_test_run)");
    report.floor("`from` of the key, more than without", costs[key] - costs[without]);
    report.nanoseconds(
        "`from` of an upstream: more than that",
        costs[upstreams] - costs[key],
        10.0,
    );
    report.nanoseconds(
        "a rule beside them that does not",
        costs[beside[1]] - costs[beside[0]],
        1.0,
    );
    report.record("upstream_from_ns", (costs[upstreams] - costs[key]).least);
}
