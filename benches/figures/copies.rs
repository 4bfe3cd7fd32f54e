//! Cost of each further copy, compared with the minimal program that makes one.

use std::fmt::Write;
use std::os::fd::AsFd;

use libbpf_rs::{MapCore, MapFlags};

use crate::floors::{self, FloorsSkel, Packet};
use crate::relay::{Case, Programs, Relay, UNSPEC};
use crate::replicator::Replicator;
use crate::veth::{self, Host};
use crate::{Report, least};

const RECEIVERS: [u32; 5] = [1, 2, 4, 8, 16];
/// Port of the rule with one receiver; each further receiver has the next port.
const PORT: u16 = 2001;

const ROUNDS: usize = 400;
const HOST_ROUNDS: usize = 60;
/// Packets per run; few enough to fit into a queue, so that all arrive.
const COPIES: i32 = 800;

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let relay = Relay::new(&floors, &rules(PORT, &RECEIVERS, "pass"));
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let copies = programs.add(floors.progs.copies.as_fd());
    let udplb = programs.add(relay.program());
    let out = relay.namespace.index("out0");
    let packets = [0, 1, 2, 3, 4].map(|rule| Packet::udp(&relay.namespace, PORT + rule));
    fill(&floors, relay.namespace.mac("out0"));

    let case = |copies: u32| {
        let runs = COPIES / copies as i32;
        Case { out, copies, runs, leased: true, ..Case::new(UNSPEC) }
    };
    let figures: [f64; 11] = least(ROUNDS, |index| match index {
        0 => programs.run(&relay, at_once, &packets[0], case(1)),
        _ => {
            let rule = (index - 1) / 2;
            let program = if index % 2 == 1 { copies } else { udplb };
            programs.run(&relay, program, &packets[rule], case(RECEIVERS[rule]))
        }
    });
    relay.forwarded_everything();
    let [floor, udplb] =
        [1, 2].map(|first| [0, 2, 4, 6, 8].map(|further| figures[first + further] - figures[0]));
    let ns = |figure: f64| format!("{figure:.0} ns");
    report.title("Copies in the program alone (bpf_prog_test_run), while arpd runs");
    report.floor("floor: change, bpf_clone_redirect, change back", floor[0]);
    report.at_most("udplb to 1 receiver", &ns(udplb[0]), udplb[0] / floor[0], " x", 1.3);
    for (nth, receivers) in RECEIVERS.into_iter().enumerate().skip(1) {
        let further = |figures: [f64; 5]| (figures[nth] - figures[0]) / f64::from(receivers - 1);
        let what = format!("each further one of {receivers}");
        let [floor, udplb] = [floor, udplb].map(further);
        report.at_most(&format!("{what} ({floor:.0} ns)"), &ns(udplb), udplb / floor, " x", 1.05);
    }
    measure_hosts(report);
}

/// Measures the CPU time of the whole path through a host.
fn measure_hosts(report: &mut Report) {
    let floors = floors::load();
    let arrival = Host::new(&floors);
    floors::sink(&floors, &arrival.relay, "in0");
    let hosts = RECEIVERS.map(|receivers| {
        let host = || Host::new(&floors).copying(receivers.into());
        let socket = host();
        let replicator = Replicator::start(&socket.relay, receivers as u8);
        (
            host().udplb(&rules(veth::PORT, &[receivers], "block")),
            host().nftables(&dup(receivers)),
            socket,
            replicator,
        )
    });
    let figures: [f64; 16] = least(HOST_ROUNDS, |index| match index {
        0 => arrival.generate(&floors),
        _ => {
            let (udplb, nftables, socket, _) = &hosts[(index - 1) / 3];
            [udplb, nftables, socket][(index - 1) % 3].generate(&floors)
        }
    });
    report.title(
        "CPU time of a packet that is copied, on its way through a host: udplb, nftables, sendmmsg",
    );
    let arrival = figures[0];
    for (receivers, figures) in RECEIVERS.iter().zip(figures[1..].chunks(3)) {
        let [udplb, nftables, socket] = [0, 1, 2].map(|which| figures[which] - arrival);
        let what = format!("to {receivers}, udplb against nftables' dup");
        let ns = format!("{udplb:.0} ns");
        report.at_least(&what, &ns, nftables / udplb, " x", 1.0);
        let what = format!("to {receivers}, against recvmmsg and sendmmsg");
        report.at_least(&what, &ns, socket / udplb, " x", 1.0);
    }
}

fn dup(receivers: u32) -> String {
    let mut text = String::from(
        "table ip copy {\n    chain prerouting {\n        \
         type filter hook prerouting priority mangle\n",
    );
    for host in 2..2 + receivers {
        let _ = writeln!(
            text,
            "        ip daddr 10.0.1.1 udp dport {} dup to 10.0.2.{host} device out0",
            veth::PORT
        );
    }
    let _ = writeln!(text, "        ip daddr 10.0.1.1 udp dport {} drop\n    }}\n}}", veth::PORT);
    text
}

/// Returns a rule for each of these numbers of receivers.
fn rules(first: u16, rules: &[u32], action: &str) -> String {
    let mut text = String::from("version: 1\ninterfaces: [in0]\nrules:\n");
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
