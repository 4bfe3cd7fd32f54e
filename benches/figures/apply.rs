//! Duration of `udplb apply`, and of the commands that read as much.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::Report;
use crate::common::{Bpffs, Namespace, outcome, udplb};

const ROUNDS: usize = 10;
const RULES: u16 = 10_000;

pub fn measure(report: &mut Report) {
    let (relay, upstream) = (Namespace::new(), Namespace::new());
    relay.link("in0", &upstream, "in1", true);
    relay.link("out0", &upstream, "out1", true);
    relay.ip("address add 10.0.1.1/24 dev in0");
    relay.ip("address add 10.0.2.1/24 dev out0");
    relay.ip("route add 10.1.0.0/16 via 10.0.2.2");
    relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");

    report.title("udplb apply and what reads as much, from start to end; of that, CPU time");
    let lab = Lab { relay, bpffs: Bpffs::new() };
    let [all, unchanged] = lab.time(1);
    let status = lab.time_of("status");
    report.record("apply_10k_ms", all.wall);
    report.record("apply_10k_unchanged_ms", unchanged.wall);
    report.record("status_10k_ms", status.wall);
    let mut compare = |what, time: Time, limit| {
        report.at_most(what, &format!("{:.0} ms", time.cpu), time.wall, " ms", limit);
    };
    compare("10,000 rules and upstreams, all changed", all, 160.0);
    compare("10,000 rules and upstreams, unchanged", unchanged, 40.0);
    compare("status of 10,000 rules", status, 60.0);
    compare("metrics of 10,000 upstreams", lab.time_of("metrics"), 300.0);
    let [all, _] = lab.time(10);
    compare("100,000 ports in 10,000 rules, all changed", all, 1500.0);
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
    /// Measures replacing all rules, and applying them unchanged.
    fn time(&self, ports: u16) -> [Time; 2] {
        let files = [8000, 9000].map(|port| {
            let file = self.bpffs.path.with_extension(format!("{port}.yaml"));
            fs::write(&file, configuration(ports, port)).expect("a file");
            file
        });
        let rounds = (0..ROUNDS).map(|round| {
            let file = &files[round % 2];
            [self.apply(file, true), self.apply(file, false)]
        });
        let times = rounds.reduce(|one, other| [0, 1].map(|nth| one[nth].least(other[nth])));
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

/// Returns a configuration whose rules each have one upstream at `port`, all behind one gateway.
fn configuration(ports: u16, port: u16) -> String {
    let mut text = String::from("version: 1\ninterfaces: [in0]\nrules:\n");
    for rule in 0..RULES {
        let (address, nth) = (rule / 5000 + 1, rule % 5000);
        let first = 10_000 + nth * ports;
        let last = first + ports - 1;
        let [high, low] = rule.to_be_bytes();
        let _ = writeln!(
            text,
            "  - name: rule-{rule}\n    key: {{ address: 10.0.1.{address}, port: {first}-{last} }}\n    \
             options: {{ tc_action: block }}\n    upstream: [{{ address: 10.1.{high}.{low}, port: {port} }}]"
        );
    }
    text
}
