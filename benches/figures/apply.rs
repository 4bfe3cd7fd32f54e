//! Duration of `udplb apply`, and of the commands that read as much.

use std::fmt::Write;
use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use udplb::desired::key_table::{Key6, KeyTable};

use crate::common::service::until;
use crate::common::{Bpffs, Namespace, outcome, udplb};
use crate::{Report, least, probing};

const ROUNDS: usize = 10;
const RULES: u32 = 10_000;

pub fn measure(report: &mut Report) {
    let (relay, upstream) = (Namespace::new(), Namespace::new());
    relay.link("in0", &upstream, "in1", true);
    relay.link("out0", &upstream, "out1", true);
    relay.ip("address add 10.0.1.1/24 dev in0");
    relay.ip("address add 10.0.2.1/24 dev out0");
    relay.ip("route add 10.4.0.0/14 via 10.0.2.2");
    relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");

    report.title(
        "udplb apply and what reads as much: CPU time; from start to end, and as a multiple of `udplb check`",
    );
    let lab = Lab { relay, bpffs: Bpffs::new() };
    let [all, unchanged, check] = lab.time(RULES, 1, "yaml");
    let [json, _, _] = lab.time(RULES, 1, "json");
    let status = lab.time_of("status");
    report.record("apply_10k_ms", all.cpu);
    report.record("apply_10k_unchanged_ms", unchanged.cpu);
    report.record("apply_10k_json_ms", json.cpu);
    report.record("status_10k_ms", status.cpu);
    let mut compare = |what, time: Time, limit| {
        let figure = format!("{:.0} ms, {:.1} x", time.wall, time.cpu / check.cpu);
        report.at_most(what, &figure, time.cpu, " ms", limit);
    };
    compare("10,000 rules and upstreams, all changed", all, 160.0);
    compare("the same from JSON", json, 120.0);
    compare("10,000 rules and upstreams, unchanged", unchanged, 40.0);
    compare("status of 10,000 rules", status, 60.0);
    compare("metrics of 10,000 upstreams", lab.time_of("metrics"), 300.0);
    let memory = lab.memory_of_arpd();
    report.record("arpd_10k_mb", memory);
    report.at_most("memory of arpd with 10,000 upstreams", "", memory, " MB", 20.0);
    let mut compare = |key, what, [all, _, check]: [Time; 3], limit| {
        report.record(key, all.cpu);
        let figure = format!("{:.0} ms, {:.1} x", all.wall, all.cpu / check.cpu);
        report.at_most(what, &figure, all.cpu, " ms", limit);
    };
    let ports = lab.time(RULES, 10, "yaml");
    compare("apply_100k_ports_ms", "100,000 ports in 10,000 rules, all changed", ports, 1500.0);
    let rules = lab.time(10 * RULES, 1, "json");
    compare("apply_100k_ms", "100,000 rules and upstreams, all changed", rules, 1000.0);
    let [keys] = least(ROUNDS, |_| time_of_keys(100_000));
    report.record("keys6_100k_ms", keys);
    report.at_most("the table of 100,000 IPv6 keys alone", "", keys, " ms", 20.0);
}

/// Times in milliseconds.
#[derive(Clone, Copy)]
struct Time {
    wall: f64,
    cpu: f64,
}

impl Time {
    fn least(self, other: Time) -> Time {
        Time { wall: self.wall.min(other.wall), cpu: self.cpu.min(other.cpu) }
    }
}

struct Lab {
    relay: Namespace,
    bpffs: Bpffs,
}

impl Lab {
    /// Measures replacing all rules, applying them unchanged, and reading the file alone.
    fn time(&self, rules: u32, ports: u16, format: &str) -> [Time; 3] {
        let files = [8000, 9000].map(|port| {
            let file = self.bpffs.path.with_extension(format!("{port}.{format}"));
            let text = match format {
                "json" => json(rules, ports, port),
                _ => yaml(rules, ports, port),
            };
            fs::write(&file, text).expect("a file");
            file
        });
        let rounds = (0..ROUNDS).map(|round| {
            let file = &files[round % 2];
            let (check, _) = run(udplb(&self.relay, &self.bpffs).args(["check", "-q"]).arg(file));
            [self.apply(file, true), self.apply(file, false), check]
        });
        let times = rounds.reduce(|one, other| [0, 1, 2].map(|nth| one[nth].least(other[nth])));
        files.iter().for_each(|file| fs::remove_file(file).expect("the file was there"));
        times.expect("there are rounds")
    }

    fn apply(&self, file: &Path, changes: bool) -> Time {
        let mut command = udplb(&self.relay, &self.bpffs);
        command.args(["apply", "-q", "-o", "json"]).arg(file);
        let (time, text) = run(&mut command);
        assert!(text.contains(&format!("\"changed\": {changes}")), "{text}");
        time
    }

    /// Measures a command that only reads.
    fn time_of(&self, command: &str) -> Time {
        let times = (0..ROUNDS).map(|_| run(udplb(&self.relay, &self.bpffs).arg(command)).0);
        times.reduce(Time::least).expect("there are rounds")
    }

    /// Returns the memory of arpd in megabytes, once it has looked at everything and serves metrics.
    fn memory_of_arpd(&self) -> f64 {
        let mut command = udplb(&self.relay, &self.bpffs);
        let mut arpd = command.arg("arpd").stderr(Stdio::null()).spawn().expect("arpd starts");
        let runs = || run(udplb(&self.relay, &self.bpffs).args(["status", "-o", "json"])).1;
        until("arpd keeps the next hops", || runs().contains("\"arpd\": true"));
        std::thread::sleep(Duration::from_secs(5));
        let memory = probing::memory(arpd.id());
        arpd.kill().expect("arpd runs");
        arpd.wait().expect("arpd has ended");
        memory
    }
}

/// Returns the milliseconds to build the table of this many IPv6 keys.
fn time_of_keys(keys: u32) -> f64 {
    let address = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).to_bits();
    let keys: Vec<(Key6, u32)> = (0..keys)
        .map(|number| {
            let address = Ipv6Addr::from_bits(address + u128::from(number / 5000));
            (Key6 { address, port: (10_000 + number % 5000) as u16 }, number + 1)
        })
        .collect();
    let start = Instant::now();
    assert!(KeyTable::new(&keys, 1).is_some());
    start.elapsed().as_secs_f64() * 1000.0
}

/// Runs a command; returns its time and its output.
fn run(command: &mut Command) -> (Time, String) {
    let (started, cpu) = (Instant::now(), cpu_of_children());
    let (code, text, errors) = outcome(command);
    let (took, cpu) = (started.elapsed(), cpu_of_children() - cpu);
    assert_eq!(code, Some(0), "{errors}");
    (Time { wall: took.as_secs_f64() * 1000.0, cpu }, text)
}

/// Returns the CPU time of ended children in milliseconds, in user space and in the kernel.
fn cpu_of_children() -> f64 {
    // SAFETY: all zeroes are a usage, and it outlives the call.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage), 0);
        usage
    };
    let milliseconds =
        |time: libc::timeval| time.tv_sec as f64 * 1000.0 + time.tv_usec as f64 / 1000.0;
    milliseconds(usage.ru_utime) + milliseconds(usage.ru_stime)
}

/// A rule's name, address of its key, first and last port, and address of its upstream.
type Row = (String, String, u16, u16, String);

/// Returns rules that each have one upstream, all behind one gateway.
fn rows(rules: u32, ports: u16) -> impl Iterator<Item = Row> {
    (0..rules).map(move |rule| {
        let (address, nth) = (rule / 5000 + 1, (rule % 5000) as u16);
        let first = 10_000 + nth * ports;
        let [_, net, high, low] = rule.to_be_bytes();
        let upstream = format!("10.{}.{high}.{low}", 4 + net);
        (format!("rule-{rule}"), format!("10.0.1.{address}"), first, first + ports - 1, upstream)
    })
}

fn yaml(rules: u32, ports: u16, port: u16) -> String {
    let mut text = String::from("version: 1\ninterfaces: [in0]\nrules:\n");
    for (name, address, first, last, upstream) in rows(rules, ports) {
        let _ = writeln!(
            text,
            "  - name: {name}\n    key: {{ address: {address}, port: {first}-{last} }}\n    \
             options: {{ tc_action: block }}\n    upstream: [{{ address: {upstream}, port: {port} }}]"
        );
    }
    text
}

fn json(rules: u32, ports: u16, port: u16) -> String {
    let rules = rows(rules, ports).map(|(name, address, first, last, upstream)| {
        json!({
            "name": name,
            "key": { "address": address, "port": format!("{first}-{last}") },
            "options": { "tc_action": "block" },
            "upstream": [{ "address": upstream, "port": port }],
        })
    });
    json!({ "version": 1, "interfaces": ["in0"], "rules": Vec::from_iter(rules) }).to_string()
}
