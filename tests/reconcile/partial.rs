//! `apply --partial` with a missing interface or an unresolvable name in the file.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, count, receive, send_until};
use crate::common::service::{Arpd, until};
use crate::common::{Bpffs, Namespace, outcome, udplb};

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

    fn status(&self) -> (Option<i32>, Value) {
        let mut status = udplb(&self.relay, &self.bpffs);
        let (code, json, _) = outcome(status.args(["status", "-o", "json"]));
        (code, serde_json::from_str(&json).expect("JSON"))
    }

    /// Returns the active rules.
    fn rules(&self) -> Vec<String> {
        let (_, status) = self.status();
        let rules = status["rules"].as_array().into_iter().flatten();
        rules.filter_map(|rule| rule["rule"].as_str()).map(String::from).collect()
    }

    /// Returns the interfaces that have the filter.
    fn attached(&self) -> Vec<String> {
        let (_, status) = self.status();
        let interfaces = status["interfaces"].as_array().into_iter().flatten();
        let attached = interfaces.filter(|it| it["generation"].is_number());
        attached.filter_map(|it| it["interface"].as_str()).map(String::from).collect()
    }
}

impl Place {
    fn metrics(&self) -> String {
        outcome(udplb(&self.relay, &self.bpffs).arg("metrics")).1
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
fn late_interface_is_attached() {
    let place = Place::new(TWO_INTERFACES);
    let (code, _, _) = outcome(&mut place.apply(&[]));
    assert_eq!((code, place.attached().len()), (Some(1), 0), "all or nothing");

    for changed in [true, false] {
        let (code, json, said) = outcome(&mut place.apply(&["--partial", "-q"]));
        assert_eq!(code, Some(4));
        assert!(said.contains("there is no interface late0"), "{said}");
        let report: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(report["changed"], changed, "{report}");
        assert_eq!(report["missing"].as_array().map(Vec::len), Some(1), "{report}");
        let missing = &report["missing"][0];
        assert_eq!((&missing["line"], &missing["column"]), (&json!(3), &json!(20)), "{report}");
        assert_eq!(missing["message"], "there is no interface late0");
        assert_eq!(place.attached(), ["eth0"]);
    }

    let (code, status) = place.status();
    assert_eq!((code, &status["incomplete"]["interfaces"]), (Some(3), &json!(["late0"])));
    assert!(place.metrics().contains("udplb_config_incomplete 1\n"));

    place.relay.link("late0", &place.other, "late0", true);
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(place.attached(), ["eth0", "late0"]);
    assert!(place.metrics().contains("udplb_config_incomplete 0\n"));
}

#[test]
fn missing_interface_of_the_command_line_is_named() {
    let place = Place::new(TWO_INTERFACES);
    let mut apply = place.apply(&["--partial", "-i", "eth0", "-i", "other0"]);
    let (code, json, said) = outcome(&mut apply);
    assert_eq!(code, Some(4), "{said}");
    assert!(said.starts_with("error: there is no interface other0"), "{said}");
    let report: Value = serde_json::from_str(&json).expect("JSON");
    assert!(report["missing"][0]["line"].is_null(), "{report}");
}

#[test]
fn vanished_interface_is_left_out() {
    let place = Place::new(TWO_INTERFACES);
    place.relay.link("late0", &place.other, "late0", true);
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(0), "{said}");
    // as when the service is stopped and started again
    let (code, _, said) = outcome(udplb(&place.relay, &place.bpffs).arg("detach"));
    assert_eq!(code, Some(0), "{said}");
    place.relay.ip("link del late0");
    for changed in [true, false] {
        let (code, json, said) = outcome(&mut place.apply(&["--partial"]));
        assert_eq!(code, Some(4));
        assert!(said.contains("there is no interface late0"), "{said}");
        let report: Value = serde_json::from_str(&json).expect("the rest serves");
        assert_eq!(report["changed"], changed, "{report}");
        assert_eq!(place.attached(), ["eth0"]);
    }
}

#[test]
fn no_interface_at_all_serves_nothing() {
    let place = Place::new(&TWO_INTERFACES.replace("eth0, ", ""));
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("late0"), "{said}");
    assert!(place.attached().is_empty());
    let (code, status) = place.status();
    assert_eq!((code, &status["incomplete"]["interfaces"]), (Some(3), &json!(["late0"])));

    // interfaces that serve are not detached for it
    let (code, _, said) = outcome(&mut place.apply(&["-i", "eth0"]));
    assert_eq!(code, Some(0), "{said}");
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(1));
    assert!(said.contains("none of the interfaces is here: late0"), "{said}");
    assert_eq!(place.attached(), ["eth0"]);
}

const NAMES: &str = "
version: 1
interfaces: [eth0]
rules:
  - name: copies
    key: { address: 10.0.0.1, port: 1 }
    options: { mode: replicate, source: preserve }
    upstream: [{ address: 10.0.0.2 }, { address: up.invalid, port: 9 }]
  - name: alone
    key: { address: 10.0.0.1, port: 2 }
    upstream: [{ address: up.invalid }]
";

/// Returns the active upstreams of a rule.
fn upstreams(status: &Value, rule: &str) -> Vec<String> {
    let mut rules = status["rules"].as_array().into_iter().flatten();
    let rule = rules.find(|it| it["rule"] == rule).expect("the rule");
    let upstreams = rule["upstreams"].as_array().into_iter().flatten();
    upstreams.filter_map(|it| it["address"].as_str()).map(String::from).collect()
}

#[test]
fn unresolved_name_is_left_out() {
    let place = Place::new(NAMES);
    let (code, json, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(4));
    assert!(said.contains("up.invalid") && said.contains("left out"), "{said}");
    let report: Value = serde_json::from_str(&json).expect("JSON");
    let missing = &report["missing"];
    assert_eq!((&missing[0]["line"], &missing[1]["line"]), (&json!(8), &json!(11)), "{report}");
    assert!(missing[0]["message"].as_str().is_some_and(|it| it.contains("serves without it")));
    assert_eq!(place.rules(), ["copies"]);
    let (code, status) = place.status();
    assert_eq!((code, upstreams(&status, "copies")), (Some(3), vec!["10.0.0.2".to_string()]));
    let host = &status["incomplete"]["hosts"][0];
    assert_eq!(host["upstream"], "up.invalid:9", "{status}");
    assert_eq!((&host["effect"], &host["line"]), (&json!("left-out"), &json!(8)), "{status}");
    assert!(place.metrics().contains("udplb_config_incomplete 2\n"));

    // The name resolves at first, later no more.
    let hosts = place.directory.join("hosts");
    fs::write(&hosts, "10.0.0.3 up.invalid\n").expect("the hosts file");
    let apply = place.apply(&["--partial"]);
    let mut resolving = Command::new("unshare");
    resolving.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
    resolving.arg(&hosts).arg(apply.get_program()).args(apply.get_args());
    let (code, _, said) = outcome(&mut resolving);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(place.rules(), ["copies", "alone"]);

    for changed in [true, false] {
        let (code, json, said) = outcome(&mut place.apply(&["--partial"]));
        assert_eq!(code, Some(4));
        assert!(said.contains("10.0.0.3") && said.contains("is kept"), "{said}");
        let report: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(report["changed"], changed, "{report}");
        assert_eq!(place.rules(), ["copies", "alone"]);
        assert_eq!(upstreams(&place.status().1, "copies"), ["10.0.0.2", "10.0.0.3"]);
    }
}

/// A typo in an upstream's name must not remove an active rule.
#[test]
fn serving_rule_is_not_lost_to_a_typo() {
    let place = Place::new(&NAMES.replace("up.invalid", "10.0.0.3"));
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(0), "{said}");
    fs::write(place.directory.join("udplb.yaml"), NAMES).expect("the file");
    let (code, _, said) = outcome(&mut place.apply(&["--partial"]));
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("the rule keeps the upstreams that it had"), "{said}");
    let (_, status) = place.status();
    assert_eq!(upstreams(&status, "alone"), ["10.0.0.3"]);
    assert_eq!(upstreams(&status, "copies"), ["10.0.0.2"]);
    // `list` prints the complete file
    let (_, list, _) = outcome(udplb(&place.relay, &place.bpffs).arg("list"));
    assert_eq!(list.matches("up.invalid").count(), 2, "{list}");
    // without --partial nothing is applied
    let (code, _, _) = outcome(&mut place.apply(&[]));
    assert_eq!((code, place.rules().len()), (Some(75), 2));
}

/// Returns a configuration with two interfaces and two receivers; one of each is missing.
fn late_config() -> Value {
    let upstreams = [
        json!({ "address": UPSTREAMS[0] }),
        json!({ "name": "late", "address": "late.test", "port": 5001 }),
    ];
    let options = json!({ "tc_action": "block", "mode": "replicate", "source": "preserve" });
    let mut config = config(&[rule("copies", 5000, options, &upstreams)]);
    config["interfaces"] = json!(["eth0", "late0"]);
    config
}

#[test]
fn arpd_completes_under_traffic() {
    let lab = Lab::new();
    let hosts = |text: &str| lab.directory.write("hosts", text);
    hosts("127.0.0.1 localhost\n");
    let file = lab.write(&late_config());
    let outcome = Outcome::of(&mut lab.with_hosts(&format!("apply --partial {}", file.display())));
    outcome.expect(4).says(&["there is no interface late0", "late.test"]);
    let arpd = Arpd::spawn(&lab, lab.with_hosts("arpd --resolve-interval 1"));
    lab.await_health("10.2.0.20", "up");

    let receiver = count(bind(&lab.upstream, UPSTREAMS[0], 5000));
    let late = count(bind(&lab.upstream, UPSTREAMS[1], 5001));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let other = Namespace::new();
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sent = scope.spawn(|| send_until(&stop, &sender, (RELAY, 5000)));
        hosts("10.2.0.21 late.test\n");
        until("the name resolves", || arpd.log().contains("late.test is now 10.2.0.21"));
        lab.relay.link("late0", &other, "eth0", true);
        lab.relay.ip("addr add 10.9.0.1/24 dev late0");
        until("the interface is attached", || arpd.log().contains("attached to late0"));
        until("nothing is missing", || lab.run("status -q").code == Some(0));
        stop.store(true, Ordering::Relaxed);
        sent.join().expect("sent")
    });
    assert_eq!(receiver.join().expect("counted"), sent);
    assert!(late.join().expect("counted") > 0);
    // the late interface is attached too
    other.ip("addr add 10.9.0.2/24 dev eth0");
    other.ip("route add default via 10.9.0.1");
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 5000);
    bind(&other, [10, 9, 0, 2], 0).send_to(b"late", (RELAY, 5000)).expect("sent");
    assert_eq!(receive(&receiver).payload, b"late");
    // the result equals a single apply: udplb removes the qdisc of the late interface
    lab.with_hosts(&format!("apply {}", file.display())).output().expect("applied");
    lab.run("detach --purge").expect(0);
    assert!(!lab.relay.tc("qdisc show dev late0").contains("clsact"));
}

/// The only interface appears late, and the service is stopped before that.
#[test]
fn missing_interface_stays_detached_until_apply() {
    let lab = Lab::new();
    let mut config = late_config();
    config["rules"][0]["upstream"][1]["address"] = json!(UPSTREAMS[1]);
    config["interfaces"] = json!(["late0"]);
    lab.try_apply(&config, "--partial").expect(4);
    let arpd = Arpd::start(&lab, "");
    let changed = |words: &str| lab.run(words).expect(0).json()["changed"].clone();
    assert_eq!([changed("detach -o json"), changed("detach -o json")], [true, false]);
    let other = Namespace::new();
    lab.relay.link("late0", &other, "eth0", true);
    arpd.signal(libc::SIGHUP);
    std::thread::sleep(Duration::from_millis(500));
    assert!(!lab.filters("late0").contains("udplb"), "{}", arpd.log());

    lab.relay.ip("link del late0");
    lab.try_apply(&config, "--partial").expect(4);
    lab.relay.link("late0", &other, "eth0", true);
    until("it is attached", || lab.filters("late0").contains("udplb"));
    lab.run("status -q").expect(0);
}

/// A detached configuration stays detached, even if an interface was missing.
#[test]
fn late_interface_after_detach_is_not_attached() {
    let lab = Lab::new();
    let mut config = late_config();
    config["rules"][0]["upstream"][1]["address"] = json!(UPSTREAMS[1]);
    lab.try_apply(&config, "--partial").expect(4);
    let arpd = Arpd::start(&lab, "");
    lab.run("detach").expect(0);
    let other = Namespace::new();
    lab.relay.link("late0", &other, "eth0", true);
    arpd.signal(libc::SIGHUP);
    until("arpd sees it", || lab.run("status").stdout.contains("late0"));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!lab.filters("late0").contains("udplb"), "{}", arpd.log());
}
