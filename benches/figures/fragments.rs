//! Cost of fragments, and of a flood of fragments for other packets.

use std::os::fd::AsFd;

use crate::floors::{self, Packet, Part};
use crate::relay::{Case, Programs, REDIRECT, Relay, UNSPEC};
use crate::{Report, least};

const RULES: &str = "
version: 1
interfaces: [in0]
rules:
  - name: ipv4
    key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: block }
    upstream: [{ address: 10.0.2.2 }]
  - name: ipv6
    key: { address: 'fd00:1::1', port: 2001 }
    options: { tc_action: block }
    upstream: [{ address: 'fd00:2::2' }]
";
const PORT: u16 = 2001;
const NOBODYS: u16 = 2002;

/// Offset of the sender's address.
const SENDER: u32 = 14 + 12;

const ROUNDS: usize = 200;
/// Few runs, so that the cache misses after a flood count.
const RUNS: i32 = 1_000;
/// Packets per flood. The map has room for those of six, until they are a second old.
const FLOOD: i32 = 20_000;

/// Name of a case; true for IPv6; true if arpd runs.
const WAYS: [(&str, bool, bool); 4] = [
    ("IPv4", false, false),
    ("IPv4, while arpd runs", false, true),
    ("IPv6", true, false),
    ("IPv6, while arpd runs", true, true),
];

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let relays = [Relay::new(&floors, RULES), Relay::new(&floors, RULES).leased()];
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let udplb = relays.each_ref().map(|relay| programs.add(relay.program()));
    let packets = relays.each_ref().map(|relay| {
        [false, true].map(|ipv6| {
            [Part::Whole, Part::First, Part::Later]
                .map(|part| Packet::part(&relay.namespace, ipv6, part, PORT))
        })
    });
    let [relay, leased] = &relays;
    let nobodys = Packet::udp(&leased.namespace, NOBODYS);
    let up = Case { runs: RUNS, ..Case::new(UNSPEC) };
    let away = Case { runs: RUNS, ..Case::new(REDIRECT) };
    let ns = |figure: f64| format!("{figure:.1} ns");

    let figures: [f64; 10] = least(ROUNDS, |index| match index {
        0 => programs.run_alone(leased, floors.progs.at_once.as_fd(), &nobodys),
        1 => programs.run(leased, at_once, &nobodys, up),
        _ => {
            let (_, ipv6, leased) = WAYS[index / 2 - 1];
            let nth = usize::from(leased);
            let [whole, first, later] = &packets[nth][usize::from(ipv6)];
            // The first fragment's entry must exist and be recent.
            programs.run(&relays[nth], udplb[nth], first, Case { runs: 1, ..away });
            let packet = if index % 2 == 0 { whole } else { later };
            programs.run(&relays[nth], udplb[nth], packet, away)
        }
    });
    relay.forwarded_everything();
    leased.forwarded_everything();
    let restoring = figures[1] - figures[0];
    report.title("Later fragments, to whole packets (bpf_prog_test_run)");
    for ((what, ..), pair) in WAYS.iter().zip(figures[2..].chunks(2)) {
        let [whole, later] = [pair[0] - restoring, pair[1] - restoring];
        report.at_most(what, &ns(later), later / whole, " x", 2.0);
    }

    let ([whole, first, _], udplb) = (&packets[1][0], udplb[1]);
    let flood = Case { random: SENDER, runs: FLOOD, verdict: None, ..Case::new(UNSPEC) };
    // Each packet without and with a flood.
    let figures: [f64; 5] = least(ROUNDS, |index| {
        let (program, packet, case) = match index {
            0 => (at_once, &nobodys, up),
            1 | 2 => (udplb, &nobodys, up),
            _ => (udplb, whole, away),
        };
        if index % 2 == 0 && index > 0 {
            programs.run(leased, udplb, first, flood);
        } else {
            programs.run(leased, program, packet, case);
        }
        programs.run(leased, program, packet, case)
    });
    let [_, nobodys, flooded_nobodys, whole, flooded_whole] =
        figures.map(|figure| figure - restoring);
    let status = leased.status();
    let counters = &status["rules"][0]["counters"];
    let full = &counters["not_forwarded"]["fragment-full"]["packets"];
    assert!(full.as_u64() > Some(0), "there was room for all: {full}");
    report.title(
        "In a flood of forged first fragments, for which there is no room (bpf_prog_test_run)",
    );
    let ratio = flooded_nobodys / nobodys;
    report.at_most("UDP of nobody's", &ns(flooded_nobodys), ratio, " x", 1.05);
    let ratio = flooded_whole / whole;
    report.at_most("udplb block, while arpd runs", &ns(flooded_whole), ratio, " x", 1.05);
}
