//! Cost of tracing packets, while it runs and after it has ended.

use libbpf_rs::{MapCore, MapFlags, MapHandle, RingBufferBuilder};
use udplb::bpf::{bytes_of, types};

use crate::Report;
use crate::floors::{self, Packet};
use crate::relay::{Case, Programs, REDIRECT, Relay, open_state};
use crate::turns::Turns;

const RULES: &str = "
version: 1
interfaces: [in0]
defaults: { source: vip }
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: block }
    upstream: [{ address: 10.0.2.2, port: 9000 }]
";

/// Number of packets whose events fit into the ring buffer, with their frames.
const RUNS: i32 = 2_500;
const ROUNDS: usize = 400;

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let relays = [(); 3].map(|()| Relay::new(&floors, RULES));
    let mut programs = Programs::new(&floors);
    let udplb = relays.each_ref().map(|relay| programs.add(relay.program()));
    let packets = relays.each_ref().map(|relay| Packet::udp(&relay.namespace, floors::PORT));
    let case = Case { runs: RUNS, ..Case::new(REDIRECT) };
    let run = |nth: usize| programs.run(&relays[nth], udplb[nth], &packets[nth], case);

    let [_, traced, asked_before] = &relays;
    let tracing = open_state(&traced.bpffs, "tracing");
    ask(&open_state(&asked_before.bpffs, "tracing"), Some(0));
    run(2);
    ask(&open_state(&asked_before.bpffs, "tracing"), None);
    let events = open_state(&traced.bpffs, "events");
    let mut told = 0_u64;
    let mut ring = RingBufferBuilder::new();
    ring.add(&events, |_| {
        told += 1;
        0
    })
    .expect("events");
    let ring = ring.build().expect("events");
    let trace = |frames| {
        ask(&tracing, Some(frames));
        let took = run(1);
        ring.consume().expect("events");
        took
    };
    let mut turns = Turns::default();
    let never = turns.add(|| run(0));
    let after = turns.add(|| run(2));
    let [on, frames] = [0, 1].map(|frames| turns.add(move || trace(frames)));
    let costs = turns.take(ROUNDS);
    drop(ring);
    assert_eq!(told, 2 * ROUNDS as u64 * RUNS as u64, "events");

    report.title("Telling of packets (bpf_prog_test_run)");
    report.floor("block without arpd, with the harness", costs[never]);
    // whole nanoseconds, since the two relays' programs are at different addresses
    let off = (costs[after] - costs[never]).least.round();
    report.at_most("trace off: more, once it has run", "", off, " ns", 0.0);
    report.nanoseconds("trace of everything: more", costs[on] - costs[never], 120.0);
    report.floor("trace --pcap: more", costs[frames] - costs[never]);
}

/// Asks for events of packets, with the first bytes of frames or not; `None`: for no events.
fn ask(tracing: &MapHandle, frames: Option<u32>) {
    let until = if frames.is_some() { u64::MAX } else { 0 };
    let trace = types::trace { until, frames: frames.unwrap_or(0), ..Default::default() };
    tracing.update(&0_u32.to_ne_bytes(), bytes_of(&trace), MapFlags::ANY).expect("tracing");
}
