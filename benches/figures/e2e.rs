//! CPU nanoseconds per packet on the whole way through a host, compared with floors and with nftables doing the
//! same. The cost of packets that are dropped on arrival is subtracted.

use std::fmt::Write;
use std::os::fd::AsFd;

use crate::Report;
use crate::floors::{self, FloorsSkel};
use crate::host::{Hook, Host, PORT};
use crate::turns::{Costs, Turn, Turns};

const ROUNDS: usize = 200;

const UDPLB: &str = "
version: 1
interfaces: [spare]
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: ACTION, source: preserve }
    upstream: [{ address: 10.0.2.2 }]
";
const UDPLB6: &str = "
version: 1
interfaces: [spare]
rules:
  - key: { address: 'fd00:1::1', port: 2001 }
    options: { tc_action: block, source: preserve }
    upstream: [{ address: 'fd00:2::2' }]
";
const REPLICATE: &str = "
version: 1
interfaces: [spare]
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: block, mode: replicate, source: preserve }
    upstream: [{ address: 10.0.2.2 }, { address: 10.0.2.3 }]
";
const DNAT: &str = "
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat
        ip daddr 10.0.1.1 udp dport 2001 dnat to 10.0.2.2
    }
}
";
/// Without conntrack and routing: the addresses are replaced at the ingress of in0.
const NETDEV: &str = "
table netdev relay {
    chain ingress {
        type filter hook ingress device in0 priority 0
        ip daddr 10.0.1.1 udp dport 2001 ip daddr set 10.0.2.2 \
            ether daddr set 02:00:00:00:00:02 ether saddr set OWN fwd to out0
    }
}
";

pub fn measure(report: &mut Report) {
    measure_block(report);
    measure_ipv6(report);
    measure_pass(report);
    measure_replication(report);
}

/// Measures hosts in turns; the first is the arrival.
fn take<const N: usize>(hosts: &[Host<'_>; N]) -> (Costs, [Turn; N]) {
    let mut turns = Turns::default();
    let indices = hosts.each_ref().map(|host| turns.add(|| host.generate()));
    (turns.take(ROUNDS), indices)
}

fn look_up<'f>(floors: &'f FloorsSkel<'static>) -> std::os::fd::BorrowedFd<'f> {
    floors.progs.look_up.as_fd()
}

fn measure_block(report: &mut Report) {
    let floors = floors::load();
    let host = || Host::new(&floors);
    let block = |hook| host().udplb(hook, &UDPLB.replace("ACTION", "block"));
    let netdev = host();
    let own = netdev.relay.mac_text("out0");
    let hosts = [
        host().arrival(),
        host().floor(Hook::Filter, look_up),
        host().floor(Hook::Link, look_up),
        block(Hook::Filter),
        block(Hook::Filter).leased(),
        block(Hook::Link),
        block(Hook::Link).leased(),
        host().nftables(DNAT),
        netdev.nftables(&NETDEV.replace("OWN", &own)),
    ];
    let (costs, turns) = take(&hosts);
    let [_, floor, floor_link, none, lease, none_link, lease_link, dnat, netdev] =
        turns.map(|turn| costs[turn] - costs[turns[0]]);
    report.title(
        "A packet on its way through a host, to the egress hook, net, times the floor on cls_bpf",
    );
    report.floor("arrival, which is subtracted", costs[turns[0]]);
    report.floor("floor on cls_bpf", floor);
    report.floor("floor on tcx", floor_link);
    report.times("block on cls_bpf, without arpd", none, floor, 1.0);
    report.times("block on cls_bpf, under the lease", lease, floor, 1.0);
    report.times("block on tcx, without arpd", none_link, floor, 0.7);
    report.times("block on tcx, under the lease", lease_link, floor, 0.7);
    report.record("e2e_block_none", (none / floor).least);
    report.record("e2e_block_tcx", (lease_link / floor).least);
    report.floor("nftables: dnat, with conntrack", dnat);
    report.cheaper("block on tcx, under the lease: cheaper", lease_link, dnat, 6.0);
    report.record("e2e_vs_nft_dnat", (dnat / lease_link).least);
    report.floor("nftables: netdev, stateless, fwd", netdev);
    report.cheaper("block on tcx, under the lease: cheaper", lease_link, netdev, 4.5);
    report.record("e2e_vs_nft_netdev", (netdev / lease_link).least);
}

fn measure_ipv6(report: &mut Report) {
    let floors = floors::load();
    let host = || Host::new(&floors).ipv6();
    let floor = |hook| host().floor(hook, |floors| floors.progs.look_up6.as_fd());
    let hosts = [
        host().arrival(),
        floor(Hook::Filter),
        host().udplb(Hook::Filter, UDPLB6),
        host().udplb(Hook::Link, UDPLB6).leased(),
    ];
    let (costs, turns) = take(&hosts);
    let [_, floor, none, lease] = turns.map(|turn| costs[turn] - costs[turns[0]]);
    report.title("The same for IPv6");
    report.floor("floor on cls_bpf", floor);
    report.times("block on cls_bpf, without arpd", none, floor, 1.0);
    report.times("block on tcx, under the lease", lease, floor, 0.7);
}

fn measure_pass(report: &mut Report) {
    let floors = floors::load();
    let host = || Host::new(&floors).listening();
    let hosts = [
        host().copying(0),
        host().floor(Hook::Filter, |floors| floors.progs.clone.as_fd()),
        host().udplb(Hook::Filter, &UDPLB.replace("ACTION", "pass")).leased(),
        host().nftables(&dup(1, "")),
    ];
    let (costs, turns) = take(&hosts);
    let [local, floor, pass, dup] = turns.map(|turn| costs[turn]);
    report.title(
        "A packet that also reaches a local socket: the rest of its cost, times a bare clone",
    );
    report.floor("to the socket alone, which is subtracted", local);
    report.floor("floor: bpf_clone_redirect on cls_bpf", floor - local);
    report.times("pass on cls_bpf, under the lease", pass - local, floor - local, 1.08);
    report.record("pass_clone", ((pass - local) / (floor - local)).least);
    report.floor("nftables: dup", dup - local);
    report.cheaper("pass: cheaper than that", pass - local, dup - local, 1.5);
}

fn measure_replication(report: &mut Report) {
    let floors = floors::load();
    let host = || Host::new(&floors).copying(2);
    let hosts = [
        Host::new(&floors).arrival(),
        host().udplb(Hook::Link, REPLICATE).leased(),
        host().nftables(&dup(2, "drop")),
    ];
    let (costs, turns) = take(&hosts);
    let [_, udplb, dup] = turns.map(|turn| costs[turn] - costs[turns[0]]);
    report.title("A packet that is copied to two receivers and blocked");
    report.floor("nftables: dup to both, drop", dup);
    report.cheaper("replicate on tcx, under the lease: cheaper", udplb, dup, 3.3);
    report.record("replicate2_vs_nft_dup", (dup / udplb).least);
}

/// Returns rules that send each packet to this number of hosts, and then have a verdict.
pub fn dup(receivers: u32, verdict: &str) -> String {
    let packets = format!("ip daddr 10.0.1.1 udp dport {PORT}");
    let mut text = String::from(
        "table ip copy {\n    chain prerouting {\n        \
         type filter hook prerouting priority mangle\n",
    );
    for host in 2..2 + receivers {
        let _ = writeln!(text, "        {packets} dup to 10.0.2.{host} device out0");
    }
    if !verdict.is_empty() {
        let _ = writeln!(text, "        {packets} {verdict}");
    }
    text + "    }\n}\n"
}
