//! `apply --partial`, where an interface or a name of the file is not there.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use common::{Bpffs, Namespace, outcome, udplb};
use serde_json::Value;

/// A namespace with one interface, its pins, and a file.
struct Place {
    relay: Namespace,
    other: Namespace,
    bpffs: Bpffs,
    directory: PathBuf,
}

impl Place {
    fn new(file: &str) -> Place {
        let relay = Namespace::new();
        let directory = std::env::temp_dir().join(&relay.name);
        fs::create_dir(&directory).expect("a directory");
        let place = Place { relay, other: Namespace::new(), bpffs: Bpffs::new(), directory };
        place.relay.link("eth0", &place.other, "eth0", true);
        place.relay.ip("address add 10.0.0.1/24 dev eth0");
        fs::write(place.directory.join("udplb.yaml"), file).expect("the file");
        place
    }

    fn apply(&self, options: &[&str]) -> Command {
        let mut command = udplb(&self.relay, &self.bpffs);
        command.args(["apply", "-o", "json"]).args(options);
        command.arg(self.directory.join("udplb.yaml"));
        command
    }

    /// The rules that serve, and the interfaces.
    fn serving(&self) -> (Vec<String>, Vec<String>) {
        let (_, json, _) = outcome(udplb(&self.relay, &self.bpffs).args(["status", "-o", "json"]));
        let status: Value = serde_json::from_str(&json).expect("JSON");
        let names = |list: &str| {
            let items = status[list].as_array().into_iter().flatten();
            items.filter_map(|item| item["name"].as_str()).map(String::from).collect()
        };
        (names("rules"), names("interfaces"))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

const TWO_INTERFACES: &str = "
version: 1
interfaces: [eth0, late0]
rules:
  - { name: a, key: { address: 10.0.0.1, port: 1 }, upstream: [{ address: 10.0.0.2 }] }
";

#[test]
fn an_interface_that_is_late() {
    let place = Place::new(TWO_INTERFACES);
    let (code, _, _) = outcome(&mut place.apply(&[]));
    assert_eq!((code, place.serving().1.len()), (Some(1), 0), "all or nothing");

    for changed in [true, false] {
        let (code, json, said) = outcome(&mut place.apply(&["--partial", "-q"]));
        assert_eq!(code, Some(1));
        assert!(said.contains("there is no interface late0"), "{said}");
        let report: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(report["changed"], changed, "{report}");
        assert_eq!(report["missing"].as_array().map(Vec::len), Some(1), "{report}");
        assert_eq!(place.serving().1, ["eth0"]);
    }

    place.relay.link("late0", &place.other, "late0", true);
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(place.serving().1, ["eth0", "late0"]);
}

#[test]
fn an_interface_that_has_gone() {
    let place = Place::new(TWO_INTERFACES);
    place.relay.link("late0", &place.other, "late0", true);
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(0), "{said}");
    // as when the service is stopped and started
    let (code, _, said) = outcome(udplb(&place.relay, &place.bpffs).arg("detach"));
    assert_eq!(code, Some(0), "{said}");
    place.relay.ip("link del late0");
    for changed in [true, false] {
        let (code, json, said) = outcome(&mut place.apply(&["--partial"]));
        assert_eq!(code, Some(1));
        assert!(said.contains("there is no interface late0"), "{said}");
        let report: Value = serde_json::from_str(&json).expect("the rest serves");
        assert_eq!(report["changed"], changed, "{report}");
        assert_eq!(place.serving().1, ["eth0"]);
    }
}

#[test]
fn no_interface_at_all() {
    let place = Place::new(&TWO_INTERFACES.replace("eth0, ", ""));
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(1));
    assert!(said.contains("late0"), "{said}");
    assert!(place.serving().1.is_empty());
}

#[test]
fn a_name_that_does_not_resolve() {
    let place = Place::new(
        "
version: 1
interfaces: [eth0]
rules:
  - { name: a, key: { address: 10.0.0.1, port: 1 }, upstream: [{ address: 10.0.0.2 }] }
  - { name: b, key: { address: 10.0.0.1, port: 2 }, upstream: [{ address: up.invalid }] }
",
    );
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(1));
    assert!(said.contains("up.invalid") && said.contains("left out"), "{said}");
    assert_eq!(place.serving().0, ["a"]);

    // The name resolves, and then no more.
    let hosts = place.directory.join("hosts");
    fs::write(&hosts, "10.0.0.3 up.invalid\n").expect("the hosts file");
    let apply = place.apply(&["--partial"]);
    let mut resolving = Command::new("unshare");
    resolving.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
    resolving.arg(&hosts).arg(apply.get_program()).args(apply.get_args());
    let (code, _, said) = outcome(&mut resolving);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(place.serving().0, ["a", "b"]);

    let (code, json, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(1));
    assert!(said.contains("10.0.0.3") && said.contains("is kept"), "{said}");
    let report: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(report["changed"], false, "{report}");
    assert_eq!(place.serving().0, ["a", "b"]);
}
