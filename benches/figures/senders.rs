//! Nanoseconds per packet that `senders` adds to a rule, and to the rules beside it.

use crate::Report;
use crate::floors::{self, Packet, Part};
use crate::packets::SENDER;
use crate::relay::{Case, Programs, REDIRECT, Relay};
use crate::turns::Turns;

const ROUNDS: usize = 200;

const PLAIN: u16 = 2001;
const COUNTED: u16 = 2002;

/// Returns rules of both families; those for the second port count their senders, if any does.
fn rules(counts: bool) -> String {
    let rule = |address: &str, upstream: &str, port: u16| {
        let senders = if counts && port == COUNTED { ", senders: 4096" } else { "" };
        format!(
            "  - key: {{ address: '{address}', port: {port} }}\n    \
             options: {{ tc_action: block, source: vip{senders} }}\n    \
             upstream: [{{ address: '{upstream}', port: 9000 }}]\n"
        )
    };
    let ports = [PLAIN, COUNTED].into_iter();
    let rules = ports.flat_map(|port| {
        [rule("10.0.1.1", "10.0.2.2", port), rule("fd00:1::1", "fd00:2::2", port)]
    });
    format!("version: 1\ninterfaces: [in0]\nrules:\n{}", rules.collect::<String>())
}

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let relays = [false, true].map(|counts| Relay::new(&floors, &rules(counts)).leased());
    let mut programs = Programs::new(&floors);
    let loaded = relays.each_ref().map(|relay| programs.add(relay.program()));
    let programs = &programs;
    let mut turns = Turns::default();
    let mut add = |counts: bool, ipv6: bool, port: u16, random: u32| {
        let (relay, program) = (&relays[usize::from(counts)], loaded[usize::from(counts)]);
        let packet = match ipv6 {
            false => Packet::udp(&relay.namespace, port),
            true => Packet::part(&relay.namespace, true, Part::Whole, port),
        };
        let out = relay.namespace.index("out0");
        let case = Case { out, random, ..Case::new(REDIRECT) };
        turns.add(move || programs.run(relay, program, &packet, case))
    };
    let counted = [false, true].map(|ipv6| [false, true].map(|it| add(it, ipv6, COUNTED, 0)));
    let beside = [false, true].map(|counts| add(counts, false, PLAIN, 0));
    let flood = [false, true].map(|counts| add(counts, false, COUNTED, SENDER));
    let costs = turns.take(ROUNDS);
    relays.iter().for_each(Relay::forwarded_everything);
    let more = |[without, with]: [_; 2]| costs[with] - costs[without];
    report.title("A rule that counts its senders, more than without");
    for (what, turns, key) in
        [("IPv4", counted[0], "senders_ns"), ("IPv6", counted[1], "senders6_ns")]
    {
        report.nanoseconds(what, more(turns), 40.0);
        report.record(key, more(turns).least);
    }
    report.nanoseconds("a rule beside it that does not", more(beside), 1.0);
    report.floor("a flood of sources, each new", more(flood));
}
