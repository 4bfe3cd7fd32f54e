//! Rules whose upstreams answer: round trips of flows, new flows, their memory, and direct return.

use std::fmt::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::Report;
use crate::common::Bpffs;
use crate::floors::{self, FloorsSkel, Flows, Packet};
use crate::host::{Hook, Host};
use crate::packets::SENDER;
use crate::relay::{Case, Programs, REDIRECT, Relay, UNSPEC, apply, networks, open_map};
use crate::tables::bytes;
use crate::trip::{ASKED, SERVER, Trip};
use crate::turns::{Cost, Turns};

const ROUNDS: usize = 100;

/// Rounds of round trips, and their questions: so many that what is remembered for a tenth of a second counts as it
/// does where packets never stop.
const TRIPS: usize = 15;
const PACKETS: u64 = 60_000;

/// Questions of a round beside programs in user space.
const QUESTIONS: u64 = 5_000;

const FEW: Flows = Flows { number: 256, clients: 256 };
const MANY: Flows = Flows { number: 30_000, clients: 256 };
/// So many clients that none speaks twice while the way back to it is remembered.
const CLIENTS: Flows = Flows { number: 30_000, clients: 30_000 };

/// Number of upstreams of a round trip.
const UPSTREAMS: u16 = 8;

pub fn measure(report: &mut Report) {
    for (flows, name, key, limit) in [
        (FEW, "256 flows", "flow_256", Some(150.0)),
        (MANY, "30,000 flows", "flow_30k", Some(320.0)),
        (CLIENTS, "30,000 clients", "flow_clients", None),
    ] {
        measure_trips(report, flows, name, key, limit);
    }
    measure_new(report);
    measure_memory(report);
    measure_direct(report);
    measure_dns(report);
}

/// Returns upstreams of 10.0.2.0/24 in YAML.
fn upstreams(number: u16) -> String {
    let hosts = 2..2 + number;
    let list = hosts.map(|host| format!("{{ address: 10.0.2.{host}, port: {SERVER} }}"));
    list.collect::<Vec<_>>().join(", ")
}

fn rules(interfaces: &str, port: u16, upstreams: &str) -> String {
    format!(
        "version: 1\ninterfaces: [{interfaces}]\nrules:\n  \
         - key: {{ address: 10.0.1.1, port: {port} }}\n    \
         options: {{ tc_action: block, reply: nat }}\n    upstream: [{upstreams}]\n"
    )
}

/// Returns the rules for a round trip.
fn both_ways() -> String {
    rules("in0, out0", ASKED, &upstreams(UPSTREAMS))
}

/// Returns rules for nftables that do the same.
fn masquerade() -> String {
    let mut map = String::new();
    for place in 0..UPSTREAMS {
        let _ = write!(map, "{place} : 10.0.2.{} . {SERVER}, ", 2 + place);
    }
    format!(
        "table ip relay {{
            chain before {{
                type nat hook prerouting priority dstnat
                ip daddr 10.0.1.1 udp dport {ASKED} \\
                    dnat ip to jhash ip saddr . udp sport mod {UPSTREAMS} seed 1 map {{ {map} }}
            }}
            chain after {{
                type nat hook postrouting priority srcnat
                oifname out0 masquerade
            }}
        }}\n"
    )
}

fn measure_trips(report: &mut Report, flows: Flows, name: &str, key: &str, limit: Option<f64>) {
    let floors = floors::load();
    let trip = || Trip::new(&floors, flows, PACKETS);
    let trips = [
        trip().arrival(),
        trip().floor(),
        trip().udplb(&both_ways()).warm(),
        trip().udplb(&both_ways()).leased().warm(),
        trip().nftables(&masquerade()).warm(),
    ];
    let mut turns = Turns::default();
    let indices = trips.each_ref().map(|trip| turns.add(|| trip.generate()));
    let costs = turns.take(TRIPS);
    trips[2].forwarded_everything();
    trips[3].forwarded_everything();
    let arrival = costs[indices[0]];
    let [_, floor, none, lease, nft] = indices.map(|turn| costs[turn] - arrival);
    report.title(&format!("A round trip to an upstream and back, {name}, net of the arrival"));
    report.floor("arrival, which is subtracted", arrival);
    report.floor("floor: a redirect each way", floor);
    for (what, cost, key) in [
        ("without arpd", none, format!("{key}_none_ns")),
        ("under the lease", lease, format!("{key}_ns")),
    ] {
        let what = format!("reply: nat, {what}: more than that");
        match limit {
            Some(limit) => report.nanoseconds(&what, cost - floor, limit),
            None => report.floor(&what, cost - floor),
        }
        report.record(&key, (cost - floor).least);
    }
    report.floor("nftables: dnat and masquerade", nft);
    report.cheaper("reply: nat, under the lease: cheaper", lease, nft, 2.2);
    report.record(&format!("{key}_vs_nft"), (nft / lease).least);
    measure_ipvs(report, &floors, flows);
}

/// Measures the kernel's own balancer, where it has one.
fn measure_ipvs(report: &mut Report, floors: &FloorsSkel<'static>, flows: Flows) {
    let what = "IPVS: masquerading";
    let _ = Command::new("modprobe").args(["-q", "ip_vs"]).status();
    if !Path::new("/proc/net/ip_vs").exists() {
        return report.note(what, "not in this kernel");
    }
    if !is_installed("ipvsadm") {
        return report.note(what, "ipvsadm is not installed");
    }
    let service = format!("10.0.1.1:{ASKED}");
    let mut trip =
        Trip::new(floors, flows, PACKETS).command("ipvsadm", &["-A", "-u", &service, "-s", "sh"]);
    for host in 2..2 + UPSTREAMS {
        let server = format!("10.0.2.{host}:{SERVER}");
        trip = trip.command("ipvsadm", &["-a", "-u", &service, "-r", &server, "-m"]);
    }
    let trip = trip.warm();
    let arrival = Trip::new(floors, flows, PACKETS).arrival();
    let mut turns = Turns::default();
    let indices = [&arrival, &trip].map(|trip| turns.add(|| trip.generate()));
    let costs = turns.take(TRIPS);
    report.floor(what, costs[indices[1]] - costs[indices[0]]);
}

fn is_installed(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program} >/dev/null")])
        .status()
        .is_ok_and(|it| it.success())
}

/// Measures packets of which each makes a flow, in an empty table.
fn measure_new(report: &mut Report) {
    let floors = floors::load();
    let relay = Relay::new(&floors, &rules("in0", floors::PORT, &upstreams(16))).leased();
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let udplb = programs.add(relay.program());
    let packet = Packet::udp(&relay.namespace, floors::PORT);
    let case = |verdict| Case { random: SENDER, ..Case::new(verdict) };
    let tables = ["flows", "ports"].map(|name| open_map(&relay.bpffs, name));
    let mut turns = Turns::default();
    let harness = turns.add(|| programs.run(&relay, at_once, &packet, case(UNSPEC)));
    let new = turns.add(|| {
        tables.iter().for_each(clear);
        programs.run(&relay, udplb, &packet, case(REDIRECT))
    });
    let costs = turns.take(ROUNDS);
    relay.forwarded_everything();
    report.title("A new flow in the program alone (bpf_prog_test_run), net");
    let cost = costs[new] - costs[harness];
    report.nanoseconds("reply: nat, under the lease", cost, 700.0);
    report.record("flow_new_ns", cost.least);
}

/// Zeroes an array.
fn clear(map: &MapHandle) {
    let (entries, size) = (map.max_entries(), map.value_size() as usize);
    let keys: Vec<u8> = (0..entries).flat_map(u32::to_ne_bytes).collect();
    let values = vec![0; size * entries as usize];
    map.update_batch(&keys, &values, entries, MapFlags::ANY, MapFlags::ANY).expect("zeroes");
}

fn measure_memory(report: &mut Report) {
    let [relay, _outside] = networks();
    let bpffs = Bpffs::new();
    let upstream6 = "{ address: 'fd00:2::2' }";
    let rules = rules("in0", ASKED, "{ address: 10.0.2.2 }")
        + &format!(
            "  - key: {{ address: 'fd00:1::1', port: 2001 }}\n    \
             options: {{ tc_action: block, reply: nat }}\n    upstream: [{upstream6}]\n"
        );
    apply(&relay, &bpffs, &rules);
    report.title("Memory of a flow");
    for (what, tables, limit, key) in [
        ("IPv4", ["flows", "ports"], 90.0, "flow_bytes"),
        ("IPv6", ["flows6", "ports6"], 140.0, "flow6_bytes"),
    ] {
        let [flows, ports] = tables.map(|name| open_map(&bpffs, name));
        let flow = (bytes(&flows) + bytes(&ports)) / f64::from(flows.max_entries() * 8);
        report.at_most(what, "", flow, " B", limit);
        report.record(key, flow);
    }
}

/// Measures packets that keep their destination, one way.
fn measure_direct(report: &mut Report) {
    const WAYS: [(&str, f64); 3] = [("link", 60.0), ("ipip", 200.0), ("gue", 180.0)];
    let direct = |via: &str| {
        format!(
            "version: 1\ninterfaces: [spare]\nrules:\n  \
             - key: {{ address: 10.0.1.1, port: 2001 }}\n    \
             options: {{ tc_action: block, reply: direct, via: {via} }}\n    \
             upstream: [{{ address: 10.0.2.2 }}]\n"
        )
    };
    let floors = floors::load();
    let host = || Host::new(&floors);
    let floor = host().floor(Hook::Link, |floors| floors.progs.redirect.as_fd());
    let udplb = |way: usize| host().udplb(Hook::Link, &direct(WAYS[way].0)).leased();
    let hosts = [host().arrival(), floor, udplb(0), udplb(1), udplb(2)];
    let mut turns = Turns::default();
    let indices = hosts.each_ref().map(|host| turns.add(|| host.generate()));
    let costs = turns.take(ROUNDS);
    report.title("A packet that keeps its destination, to the egress hook, above a redirect");
    report.floor("floor: a redirect, net of the arrival", costs[indices[1]] - costs[indices[0]]);
    for ((via, limit), turn) in WAYS.into_iter().zip(&indices[2..]) {
        let more = costs[*turn] - costs[indices[1]];
        report.nanoseconds(&format!("reply: direct, via: {via}, under the lease"), more, limit);
        report.record(&format!("direct_{via}_ns"), more.least);
    }
}

/// Questions of DNS and their answers, beside proxies in user space on the same CPU.
fn measure_dns(report: &mut Report) {
    let floors = floors::load();
    let trip = || Trip::new(&floors, FEW, QUESTIONS);
    let arrival = trip().arrival();
    let udplb = trip().udplb(&both_ways()).leased().warm();
    let proxies = [
        ("nginx stream", "dns_vs_nginx", nginx(trip)),
        ("dnsdist", "dns_vs_dnsdist", dnsdist(trip)),
    ];
    let mut turns = Turns::default();
    let [arrival, udplb] = [&arrival, &udplb].map(|trip| turns.add(|| trip.generate()));
    let found: Vec<_> = proxies
        .iter()
        .map(|(_, _, trip)| trip.as_ref().ok().map(|trip| turns.add(|| trip.generate())))
        .collect();
    let costs = turns.take(TRIPS);
    let udplb = costs[udplb] - costs[arrival];
    report.title("A question of DNS and its answer, net of the arrival");
    report.floor("reply: nat, under the lease", udplb);
    for ((name, key, proxy), turn) in proxies.iter().zip(found) {
        let Some(turn) = turn else {
            report.note(name, proxy.as_ref().err().map_or("", String::as_str));
            continue;
        };
        let cost: Cost = costs[turn] - costs[arrival];
        report.floor(name, cost);
        report.cheaper("reply: nat: cheaper than that", udplb, cost, 12.0);
        report.record(key, (cost / udplb).least);
    }
}

/// A host with a proxy, or the reason why there is none.
type Proxied<'a> = Result<Trip<'a>, String>;

const NO_ANSWERS: &str = "it did not answer";

fn nginx<'a>(trip: impl FnOnce() -> Trip<'a>) -> Proxied<'a> {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    if !is_installed("nginx") || !Path::new(MODULE).exists() {
        return Err("not installed: libnginx-mod-stream".into());
    }
    let servers: String =
        (2..2 + UPSTREAMS).map(|host| format!("server 10.0.2.{host}:{SERVER};\n")).collect();
    let configuration = format!(
        "load_module {MODULE};
         daemon off; master_process off; pid /dev/null; error_log stderr crit;
         worker_rlimit_nofile 10000;
         events {{ worker_connections 4096; }}
         stream {{
             upstream servers {{ hash $remote_addr$remote_port consistent; {servers} }}
             server {{ listen 10.0.1.1:{ASKED} udp; proxy_pass servers; proxy_timeout 60s; }}
         }}"
    );
    let command = |file: &str| {
        let mut command = Command::new("nginx");
        command.args(["-c", file]);
        command
    };
    trip().proxy(&configuration, command).ok_or_else(|| NO_ANSWERS.into())
}

fn dnsdist<'a>(trip: impl FnOnce() -> Trip<'a>) -> Proxied<'a> {
    if !is_installed("dnsdist") {
        return Err("not installed: dnsdist".into());
    }
    let mut configuration = String::from(
        "setLocal('10.0.1.1:53')\nsetACL('0.0.0.0/0')\nsetServerPolicy(chashed)\n\
         setSecurityPollSuffix('')\n",
    );
    for host in 2..2 + UPSTREAMS {
        let _ = writeln!(
            configuration,
            "newServer{{address='10.0.2.{host}:{SERVER}', healthCheckMode='up'}}"
        );
    }
    let command = |file: &str| {
        let mut command = Command::new("dnsdist");
        command.args(["--supervised", "--disable-syslog", "-C", file]);
        command
    };
    trip().proxy(&configuration, command).ok_or_else(|| NO_ANSWERS.into())
}
