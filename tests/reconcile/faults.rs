//! System calls that fail one at a time, injected by strace: a command's report is true, and a command
//! that reports failure has changed nothing.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, to_port};
use crate::common::net::{bind, try_receive};

const BOTH: [&str; 2] = ["eth0", "up0"];

fn on_both(mut config: Value) -> Value {
    config["interfaces"] = json!(BOTH);
    config
}

/// Runs udplb on the relay with the `nth` call of one kind failing; returns false if there was no such
/// call.
fn with_failure(lab: &Lab, call: &str, error: &str, nth: usize, words: &str) -> (Outcome, bool) {
    let log: PathBuf = lab.directory.path().join("strace");
    let mut command = lab.seeing(lab.relay.command("strace"));
    command.args(["-f", "-qq", "-o"]).arg(&log).args(["-e", &format!("trace={call}"), "-e"]);
    command.arg(format!("inject={call}:error={error}:when={nth}"));
    command.args([env!("CARGO_BIN_EXE_udplb"), "--pin-dir"]).arg(lab.bpffs.pins());
    let outcome = Outcome::of(command.args(words.split_whitespace()));
    let injected = fs::read_to_string(&log).expect("what strace saw").contains("(INJECTED)");
    (outcome, injected)
}

/// Returns the programs attached to both interfaces.
fn programs(lab: &Lab) -> Vec<String> {
    let id = |interface: &&str| {
        let filters = lab.filters(interface);
        let id = filters.split_once(" id ").map(|(_, rest)| rest.split(' ').next());
        id.flatten().unwrap_or("none").to_string()
    };
    BOTH.iter().map(id).collect()
}

/// Returns the names of unfinished pins that a failure left.
pub fn unfinished(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(lab.bpffs.pins()).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("building") || name == "current-next").collect()
}

/// Returns true if a datagram to the rule's key arrives at this port of the first upstream.
fn is_way(lab: &Lab, port: u16) -> bool {
    let receiver = bind(&lab.upstream, UPSTREAMS[0], port);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(b"which way", (RELAY, 5000)).expect("sent");
    try_receive(&receiver).is_ok_and(|received| received.payload == b"which way")
}

/// Applies the first of two configurations, and writes the second as `b.yaml`.
fn serve_first(lab: &Lab) {
    lab.directory.write("b.yaml", &on_both(to_port(7002)).to_string());
    lab.try_apply(&on_both(to_port(7001)), "--force").expect(0);
}

fn apply_second(lab: &Lab) -> String {
    format!("apply {}", lab.directory.path().join("b.yaml").display())
}

/// Runs a command repeatedly, losing each of its netlink messages in turn. Filters are swapped by netlink.
fn lose_netlink(prepare: fn(&Lab), words: fn(&Lab) -> String) {
    let mut lab = Lab::new();
    lab.hide_tcx(true);
    let failed = fail_each(&lab, ("sendto", "ENOBUFS", 1), prepare, words);
    assert!(failed > 3, "only {failed} failed");
}

/// Runs a command repeatedly with every `step`th of its calls of one kind failing in turn; returns the number of
/// failures that the command reported.
fn fail_each(
    lab: &Lab,
    (call, error, step): (&str, &str, usize),
    prepare: fn(&Lab),
    words: fn(&Lab) -> String,
) -> usize {
    let mut failed = 0;
    for nth in (1..).step_by(step) {
        prepare(lab);
        let before = programs(lab);
        let (outcome, injected) = with_failure(lab, call, error, nth, &words(lab));
        let after = programs(lab);
        if outcome.code == Some(0) {
            assert!(
                after.iter().zip(&before).all(|(after, before)| after != before),
                "{outcome:?}"
            );
        } else {
            assert_eq!(outcome.code, Some(1), "{call} {nth}: {outcome:?}");
            assert_eq!(after, before, "{call} {nth}: {outcome:?}");
            failed += 1;
        }
        assert!(unfinished(lab).is_empty(), "{call} {nth}: {:?}", unfinished(lab));
        if !injected {
            break;
        }
    }
    failed
}

/// Links are swapped by the BPF system call.
#[test]
fn detach_of_links_with_failing_calls_reports_the_truth() {
    let lab = Lab::new();
    if lab.has_links() {
        let failed = fail_each(&lab, ("bpf", "ENOMEM", 9), serve_first, |_| "detach".into());
        assert!(failed > 3, "only {failed} failed");
    }
}

#[test]
fn rollback_of_links_with_failing_calls_reports_the_truth() {
    let prepare = |lab: &Lab| {
        serve_first(lab);
        lab.run(&format!("{} --force", apply_second(lab))).expect(0);
    };
    let lab = Lab::new();
    if lab.has_links() {
        let failed = fail_each(&lab, ("bpf", "ENOMEM", 19), prepare, |_| "rollback".into());
        assert!(failed > 3, "only {failed} failed");
    }
}

#[test]
fn apply_with_failing_netlink_reports_the_truth() {
    lose_netlink(serve_first, apply_second);
}

#[test]
fn first_apply_with_failing_netlink_leaves_nothing() {
    let prepare = |lab: &Lab| {
        serve_first(lab);
        lab.run("detach --purge").expect(0);
    };
    lose_netlink(prepare, apply_second);
}

#[test]
fn rollback_with_failing_netlink_reports_the_truth() {
    let prepare = |lab: &Lab| {
        serve_first(lab);
        lab.run(&format!("{} --force", apply_second(lab))).expect(0);
    };
    lose_netlink(prepare, |_| "rollback".into());
}

#[test]
fn detach_with_failing_netlink_reports_the_truth() {
    lose_netlink(serve_first, |_| "detach".into());
}

/// Fails one call to bpf after the other with ENOMEM.
#[test]
fn apply_without_memory_fails_and_heals() {
    let lab = Lab::new();
    serve_first(&lab);
    let mut failed = 0;
    // testing each call would take minutes; calls of one kind are consecutive
    for nth in (1..).step_by(13) {
        let (outcome, injected) = with_failure(&lab, "bpf", "ENOMEM", nth, &apply_second(&lab));
        assert!(!outcome.stderr.contains("panicked"), "bpf {nth}: {outcome:?}");
        assert!(matches!(outcome.code, Some(0 | 1)), "bpf {nth}: {outcome:?}");
        assert!(unfinished(&lab).is_empty(), "bpf {nth}: {:?}", unfinished(&lab));
        failed += usize::from(outcome.code == Some(1));
        let served = if outcome.code == Some(0) { 7002 } else { 7001 };
        assert!(is_way(&lab, served), "bpf {nth}: {outcome:?}");
        // without `--force`: all pins and filters are in place
        lab.run(&apply_second(&lab)).expect(0);
        lab.run("status").expect(0);
        if !injected {
            break;
        }
        lab.apply(&on_both(to_port(7001)));
    }
    assert!(failed > 10, "only {failed} failed");
}

#[test]
fn unreadable_generation_is_not_removed() {
    let lab = Lab::new();
    serve_first(&lab);
    lab.run(&apply_second(&lab)).expect(0);
    let generations = lab.bpffs.pins().join("generations");
    let mut failed = 0;
    // an unchanged file: all calls except the first ones, which are optional optimizations, read the
    // current state
    for nth in (41..).step_by(8) {
        let (outcome, injected) = with_failure(&lab, "bpf", "EMFILE", nth, &apply_second(&lab));
        if !injected {
            break;
        }
        failed += usize::from(outcome.code == Some(1));
        assert!(generations.join("1").exists() && generations.join("2").exists(), "{outcome:?}");
        assert_eq!(lab.status()["generation"], 2);
    }
    assert!(failed > 10, "only {failed} failed");
    lab.run("rollback").expect(0);
    assert!(is_way(&lab, 7001));
}
