//! How long `udplb apply` takes, from its start to its end.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Instant;

use crate::common::{Bpffs, Namespace, outcome, udplb};
use crate::{Report, least};

const ROUNDS: usize = 5;
const RULES: u16 = 10_000;

pub fn measure(report: &mut Report) {
    let (relay, upstream) = (Namespace::new(), Namespace::new());
    relay.link("in0", &upstream, "in1", true);
    relay.link("out0", &upstream, "out1", true);
    relay.ip("address add 10.0.1.1/24 dev in0");
    relay.ip("address add 10.0.2.1/24 dev out0");
    relay.ip("route add 10.1.0.0/16 via 10.0.2.2");
    relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");

    report.title("udplb apply, from start to end");
    let lab = Lab { relay, bpffs: Bpffs::new() };
    let [all, unchanged] = lab.time(1);
    report.at_most("10,000 rules, all changed", "", all, " ms", 200.0);
    report.at_most("10,000 rules, unchanged", "", unchanged, " ms", 50.0);
    let [all, _] = lab.time(10);
    report.at_most("10,000 rules of 10 ports each, all changed", "", all, " ms", 1500.0);
}

struct Lab {
    relay: Namespace,
    bpffs: Bpffs,
}

impl Lab {
    /// Milliseconds to replace all rules, and to find them unchanged.
    fn time(&self, ports: u16) -> [f64; 2] {
        let files = [8000, 9000].map(|port| {
            let file = self.bpffs.path.with_extension(format!("{port}.yaml"));
            fs::write(&file, configuration(ports, port)).expect("a file");
            file
        });
        let mut turn = 0;
        let times = least(ROUNDS, |index| {
            turn += usize::from(index == 0);
            self.apply(&files[turn % 2], index == 0)
        });
        files.iter().for_each(|file| fs::remove_file(file).expect("the file was there"));
        times
    }

    fn apply(&self, file: &Path, changes: bool) -> f64 {
        let mut command = udplb(&self.relay, &self.bpffs);
        command.args(["apply", "-q", "-o", "json"]).arg(file);
        let started = Instant::now();
        let (code, text, errors) = outcome(&mut command);
        let took = started.elapsed();
        assert_eq!(code, Some(0), "{errors}");
        assert!(text.contains(&format!("\"changed\": {changes}")), "{text}");
        took.as_secs_f64() * 1000.0
    }
}

/// Each rule has an upstream of its own, behind one gateway, at `port`.
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
