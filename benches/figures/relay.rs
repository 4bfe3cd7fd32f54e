//! A relay whose program runs many times on one packet with `bpf_prog_test_run`.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use udplb::bpf::{bytes_of, types};

use crate::common::{Bpffs, Namespace, outcome, udplb};
use crate::floors::{self, FloorsSkel, Packet, Run};

/// `TC_ACT_UNSPEC` of include/uapi/linux/pkt_cls.h.
pub const UNSPEC: i32 = -1;
pub const REDIRECT: i32 = 7;

/// Number of upstreams with a next hop.
pub const UPSTREAMS: u8 = 16;

pub struct Relay {
    pub namespace: Namespace,
    _upstream: Namespace,
    pub bpffs: Bpffs,
    program: OwnedFd,
}

impl Relay {
    /// Creates a relay with these rules. Its upstreams, from 10.0.2.2 and fd00:2::2 on, accept all packets.
    pub fn new(floors: &FloorsSkel<'_>, rules: &str) -> Relay {
        let [namespace, upstream] = networks();
        floors::sink(floors, &upstream, "out1");
        let bpffs = Bpffs::new();
        apply(&namespace, &bpffs, rules);
        let program = open_program(&bpffs);
        Relay { namespace, _upstream: upstream, bpffs, program }
    }

    /// Grants a lease, as held by a running arpd.
    pub fn leased(self) -> Relay {
        grant_lease(&self.bpffs);
        self
    }

    pub fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    pub fn status(&self) -> serde_json::Value {
        status(&self.namespace, &self.bpffs)
    }

    /// Asserts that no packet was dropped: figures of dropped packets are meaningless.
    pub fn forwarded_everything(&self) {
        for rule in self.status()["rules"].as_array().expect("rules") {
            let counters = &rule["counters"];
            assert_eq!(counters["forwarded"], counters["matched"], "{rule}");
        }
    }
}

pub fn status(namespace: &Namespace, bpffs: &Bpffs) -> serde_json::Value {
    let command = &mut udplb(namespace, bpffs);
    let (_, text, errors) = outcome(command.args(["-o", "json", "status"]));
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("no JSON: {text}{errors}"))
}

/// Creates a relay's namespace, and that of a network before it and one behind it.
pub fn networks() -> [Namespace; 2] {
    let (relay, outside) = (Namespace::new(), Namespace::new());
    for (here, there, net) in [("in0", "in1", 1), ("out0", "out1", 2)] {
        relay.link(here, &outside, there, true);
        relay.ip(&format!("address add 10.0.{net}.1/24 dev {here}"));
        relay.ip(&format!("address add fd00:{net}::1/64 dev {here} nodad"));
    }
    for host in 2..2 + UPSTREAMS {
        for address in [format!("10.0.2.{host}"), format!("fd00:2::{host:x}")] {
            let mac = format!("02:00:00:00:00:{host:02x}");
            relay.ip(&format!("neighbour add {address} lladdr {mac} dev out0 nud permanent"));
        }
    }
    relay.ip("route add 172.16.0.0/12 via 10.0.2.2");
    relay.set_forwarding("1");
    [relay, outside]
}

/// Opens the program of the first generation.
pub fn open_program(bpffs: &Bpffs) -> OwnedFd {
    libbpf_rs::Program::fd_from_pinned_path(bpffs.pins().join("generations/1/program"))
        .expect("a program")
}

/// Grants a lease, as held by a running arpd.
pub fn grant_lease(bpffs: &Bpffs) {
    let beat = types::heartbeat { until: u64::MAX / 2, until_ktime: 0 };
    let (heartbeat, key) = (open_state(bpffs, "heartbeat"), 0_u32.to_ne_bytes());
    heartbeat.update(&key, bytes_of(&beat), MapFlags::ANY).expect("the heartbeat");
}

/// Loads rules of nftables.
pub fn load_nftables(namespace: &Namespace, bpffs: &Bpffs, rules: &str) {
    let file = bpffs.path.with_extension("nft");
    fs::write(&file, rules).expect("a file in the temporary directory");
    let status = namespace.command("nft").arg("-f").arg(&file).status();
    fs::remove_file(&file).expect("the file was there");
    assert!(status.expect("nft").success(), "{rules}");
}

pub fn apply(namespace: &Namespace, bpffs: &Bpffs, rules: &str) {
    let file = bpffs.path.with_extension("yaml");
    fs::write(&file, rules).expect("a file for the rules");
    let (code, _, errors) = outcome(udplb(namespace, bpffs).args(["apply", "-q"]).arg(&file));
    fs::remove_file(&file).expect("the file was there");
    assert_eq!(code, Some(0), "{errors}");
}

/// Opens a map of the first generation.
pub fn open_map(bpffs: &Bpffs, name: &str) -> MapHandle {
    MapHandle::from_pinned_path(bpffs.pins().join("generations/1").join(name)).expect("a map")
}

/// Opens a map that outlives generations.
pub fn open_state(bpffs: &Bpffs, name: &str) -> MapHandle {
    let entries = fs::read_dir(bpffs.pins()).expect("pins");
    let mut paths = entries.map(|entry| entry.expect("a pin").path().join(name));
    let path = paths.find(|path| path.exists()).expect("the map is pinned");
    MapHandle::from_pinned_path(path).expect("the map")
}

/// The programs that a test run can measure.
pub struct Programs<'a> {
    pub floors: &'a FloorsSkel<'static>,
    next: u32,
}

/// Index of a program.
pub type Program = u32;

impl<'a> Programs<'a> {
    pub fn new(floors: &'a FloorsSkel<'static>) -> Programs<'a> {
        Programs { floors, next: 0 }
    }

    pub fn add(&mut self, program: BorrowedFd<'_>) -> Program {
        let (key, value) = (self.next.to_ne_bytes(), program.as_raw_fd().to_ne_bytes());
        self.floors.maps.measured.update(&key, &value, MapFlags::ANY).expect("measured");
        self.next += 1;
        self.next - 1
    }

    /// Measures a program that does not change the packet; returns nanoseconds per packet.
    pub fn run_alone(&self, relay: &Relay, program: BorrowedFd<'_>, packet: &Packet) -> f64 {
        let run = Run { repeat: RUNS, ..Run::default() };
        relay.namespace.enter(|| time(program, packet, run, Some(UNSPEC)))
    }

    /// Measures a program; the packet is restored before each run. Returns nanoseconds per packet.
    pub fn run(&self, relay: &Relay, program: Program, packet: &Packet, case: Case) -> f64 {
        packet.choose(self.floors);
        let start = self.floors.progs.start.as_fd();
        let run = Run {
            program,
            out: case.out,
            copies: case.copies,
            random: case.random,
            rules: case.rules,
            repeat: case.runs,
        };
        relay.namespace.enter(|| time(start, packet, run, case.verdict))
    }
}

fn time(program: BorrowedFd<'_>, packet: &Packet, run: Run, verdict: Option<i32>) -> f64 {
    floors::stay_on_one_cpu();
    let started = Instant::now();
    let returned = floors::run_tc(program, packet, run);
    let took = started.elapsed();
    assert_eq!(returned, verdict.unwrap_or(returned), "of program {}", run.program);
    took.as_nanos() as f64 / f64::from(run.repeat)
}

/// A run of a program, and its result.
#[derive(Clone, Copy)]
pub struct Case {
    /// Interface that floors send to.
    pub out: u32,
    /// Number of copies that a floor makes.
    pub copies: u32,
    /// Offset of the IPv4 sender, random in each packet; 0: it stays.
    pub random: u32,
    /// Number of rules of which each packet is for a random one; 0: it stays.
    pub rules: u32,
    pub runs: i32,
    pub verdict: Option<i32>,
}

/// Few enough runs for one scheduler slice, so that some rounds are undisturbed.
const RUNS: i32 = 10_000;

impl Case {
    pub fn new(verdict: i32) -> Case {
        Case { out: 0, copies: 0, random: 0, rules: 0, runs: RUNS, verdict: Some(verdict) }
    }
}
