//! Cost of tracing packets, and of a trace program without a reader.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Instant;

use libbpf_rs::{MapCore, MapFlags, Program, RingBufferBuilder};
use udplb::bpf::{bytes_of, types};

use crate::common::{Bpffs, Namespace};
use crate::floors::{self, Packet, Run};
use crate::relay::{apply, open_state};
use crate::{Report, least};

const PORT: u16 = 2001;
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

/// Indices in the map `measured`.
const AT_ONCE: u32 = 0;
const FLAG: u32 = 1;
const UDPLB: u32 = 2;

const UNSPEC: i32 = -1;
const REDIRECT: i32 = 7;

pub fn measure(report: &mut Report) {
    let (relay, upstream) = (Namespace::new(), Namespace::new());
    for (here, there, address) in [("in0", "in1", "10.0.1.1/24"), ("out0", "out1", "10.0.2.1/24")] {
        relay.link(here, &upstream, there, true);
        relay.ip(&format!("address add {address} dev {here}"));
    }
    relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");
    relay.sysctl("net.ipv4.ip_forward", "1");
    let bpffs = Bpffs::new();
    apply(&relay, &bpffs, RULES);

    let floors = floors::load();
    let program = Program::fd_from_pinned_path(bpffs.pins().join("generations/1/program"))
        .expect("the program");
    let programs = [
        (AT_ONCE, floors.progs.at_once.as_fd()),
        (FLAG, floors.progs.flag.as_fd()),
        (UDPLB, program.as_fd()),
    ];
    for (index, program) in programs {
        let (key, value) = (index.to_ne_bytes(), program.as_raw_fd().to_ne_bytes());
        floors.maps.measured.update(&key, &value, MapFlags::ANY).expect("measured");
    }
    let packet = Packet::udp(&relay, PORT);
    packet.choose(&floors);
    let (tracing, events) = (open_state(&bpffs, "tracing"), open_state(&bpffs, "events"));
    let mut told = 0_u64;
    let mut ring = RingBufferBuilder::new();
    ring.add(&events, |_| {
        told += 1;
        0
    })
    .expect("events");
    let ring = ring.build().expect("events");

    let start = floors.progs.start.as_fd();
    let run = |measured: u32, verdict: i32, frames: Option<u32>| {
        let trace = types::trace {
            until: if frames.is_some() { u64::MAX } else { 0 },
            frames: frames.unwrap_or(0),
            ..Default::default()
        };
        tracing.update(&0_u32.to_ne_bytes(), bytes_of(&trace), MapFlags::ANY).expect("tracing");
        let took = relay.enter(|| time(start, &packet, measured, verdict));
        ring.consume().expect("events");
        took
    };
    let [at_once, flag, off, on, frames] = least(ROUNDS, |case| match case {
        0 => run(AT_ONCE, UNSPEC, None),
        1 => run(FLAG, UNSPEC, None),
        2 => run(UDPLB, REDIRECT, None),
        3 => run(UDPLB, REDIRECT, Some(0)),
        _ => run(UDPLB, REDIRECT, Some(1)),
    });
    drop(ring);
    assert_eq!(told, 2 * ROUNDS as u64 * RUNS as u64, "events");
    let ns = |figure: f64| format!("{figure:.1} ns");
    report.title("Telling of packets (bpf_prog_test_run)");
    report.at_most("nobody asks: a look at the flag", &ns(flag), flag - at_once, " ns", 1.0);
    report.floor("udplb block, with the loop around it", off);
    report.at_most("trace of everything: more than that", &ns(on), on - off, " ns", 120.0);
    report.note("trace --pcap: more than that", &ns(frames - off));
}

/// Returns nanoseconds per packet.
fn time(start: BorrowedFd<'_>, packet: &Packet, measured: u32, verdict: i32) -> f64 {
    floors::stay_on_one_cpu();
    let run = Run { program: measured, repeat: RUNS, ..Run::default() };
    let started = Instant::now();
    let result = floors::run_tc(start, packet, run);
    let took = started.elapsed();
    assert_eq!(result, verdict, "of {measured}");
    took.as_nanos() as f64 / f64::from(RUNS)
}
