//! Cost of each further copy, compared with the minimal program that makes one.

use std::fmt::Write;
use std::os::fd::AsFd;

use libbpf_rs::{MapCore, MapFlags};

use crate::floors::{self, FloorsSkel, Packet};
use crate::host::{self, Hook, Host};
use crate::relay::{Case, Programs, Relay, UNSPEC};
use crate::replicator::Replicator;
use crate::turns::{Cost, Turn, Turns};
use crate::{Report, e2e};

const RECEIVERS: [u32; 5] = [1, 2, 4, 8, 16];
/// Port of the rule with one receiver; each further receiver has the next port.
const PORT: u16 = 2001;

const ROUNDS: usize = 400;
const HOST_ROUNDS: usize = 60;
/// Packets per run; few enough to fit into a queue, so that all arrive.
const COPIES: i32 = 800;

/// Measures copies in the program alone: part of `packets`.
pub fn measure_alone(report: &mut Report) {
    let floors = floors::load();
    let relay = Relay::new(&floors, &rules("in0", PORT, &RECEIVERS, "pass")).leased();
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let copies = programs.add(floors.progs.copies.as_fd());
    let udplb = programs.add(relay.program());
    let out = relay.namespace.index("out0");
    fill(&floors, relay.namespace.mac("out0"));

    let mut turns = Turns::default();
    let mut on = |program, nth: usize, copies| {
        let packet = Packet::udp(&relay.namespace, PORT + nth as u16);
        let runs = COPIES / copies as i32;
        let case = Case { out, copies, runs, ..Case::new(UNSPEC) };
        let (programs, relay) = (&programs, &relay);
        turns.add(move || programs.run(relay, program, &packet, case))
    };
    let harness = on(at_once, 0, 1);
    let pairs: Vec<[Turn; 2]> = RECEIVERS
        .into_iter()
        .enumerate()
        .map(|(nth, receivers)| [copies, udplb].map(|program| on(program, nth, receivers)))
        .collect();
    let costs = turns.take(ROUNDS);
    relay.forwarded_everything();

    report.title("Copies in the program alone (bpf_prog_test_run), under the lease");
    let first = pairs[0].map(|turn| costs[turn]);
    let [floor, udplb] = first.map(|cost| cost - costs[harness]);
    report.floor("floor: change, bpf_clone_redirect, change back", floor);
    report.times("udplb to 1 receiver", udplb, floor, 1.1);
    for (receivers, pair) in RECEIVERS.into_iter().zip(&pairs).skip(1) {
        let further =
            |side: usize| -> Cost { (costs[pair[side]] - first[side]) / f64::from(receivers - 1) };
        let [floor, udplb] = [0, 1].map(further);
        let what = format!("each further one of {receivers} (floor {:.0} ns)", floor.least);
        report.times(&what, udplb, floor, 1.05);
        report.record("copy", (udplb / floor).least);
    }
}

/// Measures the CPU time of the whole way through a host.
pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let arrival = Host::new(&floors).arrival();
    let hosts = RECEIVERS.map(|receivers| {
        let host = || Host::new(&floors).copying(receivers.into());
        let socket = host();
        let replicator = Replicator::start(&socket.relay, receivers as u8);
        let rules = rules("spare", host::PORT, &[receivers], "block");
        let udplb = host().udplb(Hook::Link, &rules).leased();
        (udplb, host().nftables(&e2e::dup(receivers, "drop")), socket, replicator)
    });
    let mut turns = Turns::default();
    let arrival = turns.add(|| arrival.generate());
    let triples = hosts.each_ref().map(|(udplb, nftables, socket, _)| {
        [udplb, nftables, socket].map(|host| turns.add(|| host.generate()))
    });
    let costs = turns.take(HOST_ROUNDS);
    report
        .title("A packet that is copied, on its way through a host: udplb on tcx, under the lease");
    for (receivers, triple) in RECEIVERS.iter().zip(triples) {
        let [udplb, nftables, socket] = triple.map(|turn| costs[turn] - costs[arrival]);
        let what = format!("to {receivers}, cheaper than nftables' dup");
        report.cheaper(&what, udplb, nftables, 1.0);
        let what = format!("to {receivers}, than recvmmsg and sendmmsg");
        report.cheaper(&what, udplb, socket, 1.0);
    }
}

/// Returns a rule for each of these numbers of receivers.
fn rules(interface: &str, first: u16, rules: &[u32], action: &str) -> String {
    let mut text = format!("version: 1\ninterfaces: [{interface}]\nrules:\n");
    for (port, receivers) in (first..).zip(rules) {
        let hosts = 2..2 + *receivers;
        let list: Vec<String> =
            hosts.map(|host| format!("{{ address: 10.0.2.{host}, port: 9000 }}")).collect();
        let _ = writeln!(
            text,
            "  - key: {{ address: 10.0.1.1, port: {port} }}\n    \
             options: {{ tc_action: {action}, mode: replicate, source: vip }}\n    \
             upstream: [{}]",
            list.join(", ")
        );
    }
    text
}

/// Writes the floor's map with the same hosts: `struct receiver`.
fn fill(floors: &FloorsSkel<'_>, source: [u8; 6]) {
    for index in 0..RECEIVERS[4] {
        let host = index as u8 + 2;
        let macs = [&[2, 0, 0, 0, 0, host], &source[..]].concat();
        let value = [&macs[..], &[10, 0, 2, host], &9000_u16.to_be_bytes(), &[0; 6]].concat();
        let key = index.to_ne_bytes();
        floors.maps.receivers.update(&key, &value, MapFlags::ANY).expect("receivers");
    }
}
