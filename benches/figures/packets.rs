//! Nanoseconds per packet in the program alone, by `bpf_prog_test_run`.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags};

use crate::common::{Bpffs, Namespace, outcome, udplb};
use crate::floors::{self, FloorsSkel, Packet};
use crate::{Report, least};

/// So few runs take less time than a scheduler's slice: some rounds are disturbed by nobody.
const RUNS: i32 = 10_000;
const ROUNDS: usize = 200;

const FORWARD: u16 = 2001;
const CLONE: u16 = 2002;
const RULES: &str = "
version: 1
interfaces: [in0]
defaults: { source: vip }
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: block }
    upstream: [{ address: 10.0.2.2, port: 9000 }]
  - key: { address: 10.0.1.1, port: 2002 }
    options: { tc_action: pass }
    upstream: [{ address: 10.0.2.2, port: 9000 }]
";

/// In the order of the map `measured`.
const AT_ONCE: u32 = 0;
const LOOK_UP: u32 = 1;
const CLONE_ALONE: u32 = 2;
const UDPLB: u32 = 3;

pub fn measure(report: &mut Report) {
    let (relay, upstream) = (Namespace::new(), Namespace::new());
    for (here, there, address) in [("in0", "in1", "10.0.1.1/24"), ("out0", "out1", "10.0.2.1/24")] {
        relay.link(here, &upstream, there, true);
        relay.ip(&format!("address add {address} dev {here}"));
    }
    relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");
    relay.sysctl("net.ipv4.ip_forward", "1");
    let bpffs = Bpffs::new();
    let file = bpffs.path.with_extension("yaml");
    fs::write(&file, RULES).expect("a file for the rules");
    let mut apply = udplb(&relay, &bpffs);
    assert!(apply.args(["apply", "-q"]).arg(&file).status().expect("udplb").success());
    fs::remove_file(&file).expect("the file was there");

    let floors = floors::load();
    floors::sink(&floors, &upstream, "out1");
    fill(&floors, &bpffs);
    let out = relay.index("out0");
    let forward = Packet::udp(&relay, FORWARD);
    let clone = Packet::udp(&relay, CLONE);
    let tcp = Packet::tcp(&relay, FORWARD);
    let start = floors.progs.start.as_fd();
    let alone = floors.progs.at_once.as_fd();
    let cases = [
        Case { program: alone, measured: AT_ONCE, packet: &forward, verdict: UNSPEC },
        Case { program: start, measured: AT_ONCE, packet: &forward, verdict: UNSPEC },
        Case { program: start, measured: LOOK_UP, packet: &forward, verdict: REDIRECT },
        Case { program: start, measured: UDPLB, packet: &forward, verdict: REDIRECT },
        Case { program: start, measured: CLONE_ALONE, packet: &clone, verdict: UNSPEC },
        Case { program: start, measured: UDPLB, packet: &clone, verdict: UNSPEC },
        Case { program: start, measured: AT_ONCE, packet: &tcp, verdict: UNSPEC },
        Case { program: start, measured: UDPLB, packet: &tcp, verdict: UNSPEC },
    ];
    let run = |case: &Case<'_>| {
        case.packet.choose(&floors);
        relay.enter(|| case.run(out))
    };
    let [at_once, restored, look_up, forward, clone_alone, clone, tcp_at_once, tcp] =
        least(ROUNDS, |index| run(&cases[index]));
    let mut arpd = udplb(&relay, &bpffs).args(["arpd", "-q"]).spawn().expect("udplb arpd");
    thread::sleep(Duration::from_secs(2));
    let [leased, leased_clone] = least(ROUNDS, |index| run(&cases[[3, 5][index]]));
    arpd.kill().and_then(|()| arpd.wait()).expect("arpd runs");
    everything_was_forwarded(&relay, &bpffs);

    // the loop of the test run stays in all figures, putting the packet right in none
    let restoring = restored - at_once;
    let tcp_more = tcp - tcp_at_once;
    let net = |figure: f64| figure - restoring;
    let [look_up, forward, leased, clone_alone, clone, leased_clone, tcp] =
        [look_up, forward, leased, clone_alone, clone, leased_clone, tcp].map(net);
    let ns = |figure: f64| format!("{figure:.1} ns");
    let note = |figure, floor| format!("{}{:>11}", ns(figure), format!("{:.2} x", figure / floor));
    report.title("A packet in the program alone (bpf_prog_test_run), as a multiple of its floor");
    report.floor("floor: parse, a hash look-up, bpf_redirect", look_up);
    report.at_most("udplb block", &ns(forward), forward / look_up, " x", 3.0);
    report.note("udplb block, while arpd runs", &note(leased, look_up));
    report.floor("floor: bpf_clone_redirect", clone_alone);
    report.at_most("udplb pass", &ns(clone), clone / clone_alone, " x", 1.3);
    report.note("udplb pass, while arpd runs", &note(leased_clone, clone_alone));
    report.floor("floor: return at once", at_once);
    report.at_most("udplb, TCP: more than that", &ns(tcp), tcp_more, " ns", 3.0);
}

/// One program and the packet that it gets.
struct Case<'a> {
    program: BorrowedFd<'a>,
    measured: u32,
    packet: &'a Packet,
    verdict: i32,
}

/// Of include/uapi/linux/pkt_cls.h.
const UNSPEC: i32 = -1;
const REDIRECT: i32 = 7;

impl Case<'_> {
    /// Nanoseconds per packet.
    fn run(&self, out: u32) -> f64 {
        floors::stay_on_one_cpu();
        let started = Instant::now();
        let verdict = floors::run_tc(self.program, self.packet, [self.measured, out], RUNS);
        let took = started.elapsed();
        assert_eq!(verdict, self.verdict, "of {}", self.measured);
        took.as_nanos() as f64 / f64::from(RUNS)
    }
}

/// The floors, and the program that `apply` loaded.
fn fill(floors: &FloorsSkel<'_>, bpffs: &Bpffs) {
    let path = bpffs.pins().join("generations/1/program");
    let udplb = udplb::bpf::open_program(&path).expect("the program is pinned");
    let programs = [
        (AT_ONCE, floors.progs.at_once.as_fd()),
        (LOOK_UP, floors.progs.look_up.as_fd()),
        (CLONE_ALONE, floors.progs.clone.as_fd()),
        (UDPLB, udplb.as_fd()),
    ];
    for (index, program) in programs {
        let (key, value) = (index.to_ne_bytes(), program.as_raw_fd().to_ne_bytes());
        floors.maps.measured.update(&key, &value, MapFlags::ANY).expect("measured");
    }
    for port in [FORWARD, CLONE] {
        let mut key = [10, 0, 1, 1, 0, 0, 0, 0];
        key[4..6].copy_from_slice(&port.to_be_bytes());
        floors.maps.keys.update(&key, &[0; 24], MapFlags::ANY).expect("keys");
    }
}

/// A figure for packets that were dropped would be none.
fn everything_was_forwarded(relay: &Namespace, bpffs: &Bpffs) {
    let (code, text, _) = outcome(udplb(relay, bpffs).args(["-o", "json", "status"]));
    assert_eq!(code, Some(0));
    let status: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for rule in status["rules"].as_array().expect("rules") {
        let counters = &rule["counters"];
        assert_eq!(counters["forwarded"], counters["matched"], "{rule}");
    }
}
