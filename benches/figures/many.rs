//! Nanoseconds per packet with many rules, each packet for a random one.

use std::fmt::Write;
use std::os::fd::AsFd;

use crate::Report;
use crate::floors::{self, Packet, add_key};
use crate::relay::{Case, Program, Programs, REDIRECT, Relay, UNSPEC};
use crate::turns::Turns;

const SIZES: [u32; 2] = [10_000, 60_000];
const KEYS: [&str; 2] = ["rules_10k", "rules_60k"];
const LIMIT: f64 = 0.9;

const ROUNDS: usize = 20;
const RUNS: i32 = 20_000;
/// Packets for each rule before a measurement, so that nearly all next hops are remembered.
const BEFORE: u32 = 8;

pub fn measure(report: &mut Report) {
    report.title(
        "Many rules, each packet for a random one (bpf_prog_test_run), net, times its floor",
    );
    let floors = floors::load();
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let look_up = programs.add(floors.progs.look_up_many.as_fd());
    let mut known = 0;
    for (size, key) in SIZES.into_iter().zip(KEYS) {
        for rule in known..size {
            let (address, port) = key_of(rule);
            add_key(&floors.maps.many, address, port);
        }
        known = size;
        let relay = Relay::new(&floors, &configuration(size)).leased();
        let udplb = programs.add(relay.program());
        let out = relay.namespace.index("out0");
        let packet = Packet::udp(&relay.namespace, floors::PORT);
        let case = |verdict| Case { out, rules: size, runs: RUNS, ..Case::new(verdict) };
        let mut turns = Turns::default();
        let mut on = |program: Program, case: Case| {
            let (programs, relay, packet) = (&programs, &relay, &packet);
            turns.add(move || {
                if program != at_once {
                    let before = Case { runs: (size * BEFORE) as i32, ..case };
                    programs.run(relay, program, packet, before);
                }
                programs.run(relay, program, packet, case)
            })
        };
        let harness = on(at_once, case(UNSPEC));
        let [floor, udplb] = [look_up, udplb].map(|program| on(program, case(REDIRECT)));
        let costs = turns.take(ROUNDS);
        relay.forwarded_everything();
        let [floor, udplb] = [floor, udplb].map(|turn| costs[turn] - costs[harness]);
        report.floor(&format!("{size} rules, floor"), floor);
        report.times(&format!("{size} rules, block under the lease"), udplb, floor, LIMIT);
        report.record(key, (udplb / floor).least);
    }
}

/// Returns the address and port of a rule, as pick_rule() of floors.bpf.c makes them.
fn key_of(rule: u32) -> ([u8; 4], u16) {
    let [_, _, high, low] = (rule / 256).to_be_bytes();
    ([10, 100, high, low], 10_000 + (rule % 256) as u16)
}

/// Returns a configuration whose rules have an upstream each, all behind one gateway.
fn configuration(rules: u32) -> String {
    let mut text = String::from("version: 1\ninterfaces: [in0]\nrules:\n");
    for rule in 0..rules {
        let ([a, b, c, d], port) = key_of(rule);
        let [_, _, high, low] = rule.to_be_bytes();
        let _ = writeln!(
            text,
            "  - key: {{ address: {a}.{b}.{c}.{d}, port: {port} }}\n    \
             options: {{ tc_action: block }}\n    \
             upstream: [{{ address: 172.16.{high}.{low}, port: 9000 }}]"
        );
    }
    text
}
