//! CPU nanoseconds per packet that comes through a wire, a veth with NAPI as a driver has it: by XDP, and by tc.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libbpf_rs::{TC_EGRESS, TC_INGRESS};
use udplb::bpf::xdp;

use crate::Report;
use crate::common::{Bpffs, Namespace, run};
use crate::floors::{self, FloorsSkel, Packet};
use crate::host::{PACKETS, PORT, generate};
use crate::relay::{apply, grant_lease, networks};
use crate::turns::Turns;

const ROUNDS: usize = 200;

const RULES: &str = "
version: 1
interfaces: [{ name: in0, xdp: native }]
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: block, source: preserve }
    upstream: [{ address: 10.0.2.2 }]
";

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let wire = || Wire::new(&floors);
    let wires = [
        wire().arrival(),
        wire().sink_frames().floor(),
        wire().sink_frames().udplb(),
        wire().tc_floor(),
    ];
    let mut turns = Turns::default();
    let indices = wires.each_ref().map(|wire| turns.add(|| wire.generate()));
    let costs = turns.take(ROUNDS);
    let [_, floor, udplb, tc_floor] = indices.map(|turn| costs[turn] - costs[indices[0]]);
    report.title("A packet that comes through a wire, and leaves as a frame, net");
    report.floor("arrival at XDP, which is subtracted", costs[indices[0]]);
    report.floor("floor at XDP: parse, a hash look-up, redirect", floor);
    report.times("block by XDP, under the lease", udplb, floor, 0.9);
    report.record("xdp", (udplb / floor).least);
    report.floor("floor on cls_bpf, to the egress hook", tc_floor);
    report.cheaper("block by XDP: cheaper than that", udplb, tc_floor, 4.0);
    report.record("xdp_vs_tc_floor", (tc_floor / udplb).least);
}

/// A relay between two wires.
struct Wire<'a> {
    relay: Namespace,
    outside: Namespace,
    bpffs: Bpffs,
    floors: &'a FloorsSkel<'static>,
    packet: Packet,
    links: Vec<OwnedFd>,
}

impl<'a> Wire<'a> {
    fn new(floors: &'a FloorsSkel<'static>) -> Wire<'a> {
        let [relay, outside] = networks();
        // has a veth receive by NAPI
        relay.enter(|| run("ethtool", ["-K", "in0", "gro", "on"]));
        let packet = Packet { interface: outside.index("in1"), ..Packet::udp(&relay, PORT) };
        Wire { relay, outside, bpffs: Bpffs::new(), floors, packet, links: Vec::new() }
    }

    fn arrival(mut self) -> Wire<'a> {
        let link = attach(&self.relay, "in0", self.floors.progs.xdp_sink.as_fd());
        self.links.push(link);
        self
    }

    /// Takes frames at the far end of the second wire.
    fn sink_frames(mut self) -> Wire<'a> {
        let link = attach(&self.outside, "out1", self.floors.progs.xdp_sink.as_fd());
        self.links.push(link);
        self
    }

    fn floor(mut self) -> Wire<'a> {
        let floors = floors::load_for(self.relay.index("out0"));
        floors::add_key(&floors.maps.keys, [10, 0, 1, 1], PORT);
        self.links.push(attach(&self.relay, "in0", floors.progs.xdp_look_up.as_fd()));
        self
    }

    fn udplb(self) -> Wire<'a> {
        apply(&self.relay, &self.bpffs, RULES);
        grant_lease(&self.bpffs);
        self
    }

    fn tc_floor(self) -> Wire<'a> {
        let floors = floors::load_for(self.relay.index("out0"));
        floors::add_key(&floors.maps.keys, [10, 0, 1, 1], PORT);
        floors::attach_filter(&self.relay, "in0", TC_INGRESS, floors.progs.look_up.as_fd());
        floors::attach_filter(&self.relay, "out0", TC_EGRESS, self.floors.progs.sink.as_fd());
        self
    }

    fn generate(&self) -> f64 {
        let program = self.floors.progs.generate_out.as_fd();
        generate(self.floors, program, (&self.outside, &self.packet), [PACKETS, 0])
    }
}

fn attach(namespace: &Namespace, interface: &str, program: BorrowedFd<'_>) -> OwnedFd {
    let index = namespace.index(interface);
    namespace.enter(|| xdp::attach(program, index, false)).expect("XDP of a veth")
}
