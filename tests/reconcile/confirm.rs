//! Changes that are rolled back unless confirmed, even if processes are killed meanwhile.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use udplb::datapath::pins;
use udplb::datapath::state_maps::{self, Pending};

use crate::common::lab::{Lab, to_port};
use crate::common::service::{Arpd, until};
use crate::expect_way;

/// Returns the processes that wait for a deadline of this lab.
fn waiters(lab: &Lab) -> Vec<i32> {
    let pins = lab.bpffs.pins().display().to_string();
    let pids = fs::read_dir("/proc").expect("proc").filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        (words.contains(&pins) && words.contains("--waiter")).then_some(pid)
    });
    pids.collect()
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: takes plain numbers.
    let sent = unsafe { libc::kill(pid, signal) };
    assert_eq!(sent, 0, "kill: {}", std::io::Error::last_os_error());
}

fn kill_waiters(lab: &Lab) {
    for pid in waiters(lab) {
        kill(pid, libc::SIGKILL);
    }
    until("the waiters are gone", || waiters(lab).is_empty());
}

/// Kills the waiter and lets the deadline of the pending change pass.
fn pass_deadline(lab: &Lab) {
    kill_waiters(lab);
    let guard = pins::write(&lab.bpffs.pins(), Duration::from_secs(60));
    let guard = guard.map_err(|failure| failure.to_string()).expect("the lock");
    let maps = state_maps::open(&guard).expect("readable").expect("whole");
    let pending = maps.pending().expect("readable").expect("a pending change");
    let deadline = Duration::from_nanos(1);
    maps.set_pending(Some(Pending { deadline, ..pending })).expect("written");
}

fn apply(lab: &Lab, port: u16, options: &str) -> Value {
    lab.try_apply(&to_port(port), options).expect(0).json()
}

#[track_caller]
fn until_serves(lab: &Lab, generation: impl Into<Value>) {
    let generation = generation.into();
    until(&format!("generation {generation} serves"), || {
        let status = lab.status();
        status["generation"] == generation && status["pending"].is_null()
    });
}

/// Applies the file of the last apply again, as a cron job does.
fn cron(lab: &Lab) -> crate::common::lab::Outcome {
    lab.run(&format!("apply -q {}", lab.directory.path().join("udplb.yaml").display()))
}

#[test]
fn confirm_in_time_keeps_the_change() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let applied = apply(&lab, 7002, "--confirm 3000");
    assert_eq!(applied["pending"]["generation"], 2);
    assert_eq!(applied["pending"]["previous"], 1);
    assert!(applied["pending"]["seconds_left"].as_u64().expect("a number") > 2000);
    expect_way(&lab, 7002);
    let status = lab.run("status").expect(0);
    assert!(status.stdout.contains("generation 2 waits for `udplb confirm`: in "), "{status:?}");
    assert_eq!(waiters(&lab).len(), 1);
    // a repeated apply does not confirm the change
    cron(&lab).expect(0);
    assert_eq!(lab.status()["pending"]["generation"], 2);

    let confirmed = lab.run("confirm -o json").expect(0).json();
    assert_eq!(confirmed, json!({ "format_version": 1, "changed": true, "generation": 2 }));
    assert_eq!(lab.status()["pending"], Value::Null);
    until("the waiter has ended", || waiters(&lab).is_empty());
    lab.run("confirm").expect(1).says(&["nothing waits for confirmation"]);
    expect_way(&lab, 7002);
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
}

#[test]
fn unchanged_file_waits_for_nothing() {
    let lab = Lab::new();
    lab.run("confirm").expect(1).says(&["nothing waits for confirmation"]);
    assert!(!lab.bpffs.pins().exists());
    lab.apply(&to_port(7001));
    let again = apply(&lab, 7001, "--confirm 1");
    assert_eq!((&again["changed"], &again["pending"]), (&json!(false), &Value::Null));
    assert!(waiters(&lab).is_empty());
    lab.run("confirm").expect(1).says(&["nothing waits for confirmation"]);
    for bad in ["--confirm 0", "--confirm x", "--confirm 5 --dry-run"] {
        lab.try_apply(&to_port(7002), bad).expect(64);
    }
}

#[test]
fn unconfirmed_change_is_rolled_back_and_held() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    apply(&lab, 7002, "--confirm 1");
    until_serves(&lab, 1);
    expect_way(&lab, 7001);
    assert_eq!(lab.status()["held"], 2);
    cron(&lab).expect(1).says(&["held since"]);
    lab.run("confirm").expect(1).says(&["nothing waits", "generation 2 was rolled back at 20"]);
    until("the waiter has ended", || waiters(&lab).is_empty());
    expect_way(&lab, 7001);
}

/// The shell and its children are killed, as when a connection breaks; the waiter gets SIGHUP too.
#[test]
fn killed_session_does_not_stop_the_rollback() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let file = lab.write(&to_port(7002));
    let mut shell = lab.relay.command("sh");
    let script = "\"$0\" --pin-dir \"$1\" apply --confirm 15 \"$2\" && echo done && sleep 1000";
    shell.args(["-c", script, env!("CARGO_BIN_EXE_udplb")]).arg(lab.bpffs.pins()).arg(file);
    shell.stdout(Stdio::piped()).process_group(0);
    let mut shell = shell.spawn().expect("a shell");
    until("it is applied", || lab.status()["pending"]["generation"] == 2);
    until("the waiter waits", || !waiters(&lab).is_empty());
    kill(-(shell.id() as i32), libc::SIGKILL);
    shell.wait().expect("the shell");
    waiters(&lab).into_iter().for_each(|pid| kill(pid, libc::SIGHUP));
    until_serves(&lab, 1);
    expect_way(&lab, 7001);
}

#[test]
fn apply_does_not_keep_its_output_open() {
    let lab = Lab::new();
    let started = std::time::Instant::now();
    // returns once all processes have closed the pipe
    apply(&lab, 7001, "--confirm 3000");
    assert!(started.elapsed().as_secs() < 2000);
    lab.run("confirm").expect(0);
}

#[test]
fn overdue_rollback_is_done_by_the_next_command() {
    let lab = Lab::new();
    for command in ["confirm", "apply", "drain only/one", "rollback", "detach"] {
        lab.apply(&to_port(7001));
        apply(&lab, 7002, "--confirm 3000");
        pass_deadline(&lab);
        assert_eq!(lab.status()["pending"]["seconds_left"], 0);
        let status = lab.run("status").expect(3);
        assert!(status.stdout.contains("its rollback is overdue"), "{status:?}");
        expect_way(&lab, 7002);
        match command {
            "confirm" => drop(lab.run(command).expect(1).says(&["too late", "rolled back to"])),
            "apply" => drop(cron(&lab).expect(1).says(&["rolled back to", "held since"])),
            "drain only/one" => {
                lab.run(command).expect(0).says(&["was not confirmed in time"]);
                lab.run("enable --all").expect(0);
            }
            _ => drop(lab.run(command).expect(0)),
        }
        assert_eq!(lab.status()["pending"], Value::Null);
        if command != "detach" {
            expect_way(&lab, 7001);
            lab.run("status").expect(0);
        }
        lab.run("detach --purge").expect(0);
    }
}

#[test]
fn overdue_rollback_is_done_by_arpd() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let arpd = Arpd::start(&lab, "");
    let generation = apply(&lab, 7002, "--confirm 3000")["generation"].clone();
    pass_deadline(&lab);
    until_serves(&lab, 1);
    expect_way(&lab, 7001);
    assert_eq!(lab.status()["held"], generation);
    until("arpd says so", || arpd.log().contains("was not confirmed in time: rolled back to 1"));
}

#[test]
fn second_apply_while_pending_is_refused() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    apply(&lab, 7002, "--confirm 3000");
    lab.try_apply(&to_port(7003), "").expect(1).says(&["generation 2 waits", "udplb confirm"]);
    expect_way(&lab, 7002);
    // a second pending change is rolled back to the last confirmed configuration
    assert_eq!(apply(&lab, 7003, "--confirm 3000")["pending"]["previous"], 1);
    expect_way(&lab, 7003);
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    assert_eq!((&lab.status()["pending"], &lab.status()["held"]), (&Value::Null, &json!(3)));

    apply(&lab, 7004, "--confirm 3000");
    apply(&lab, 7005, "--confirm 1");
    until_serves(&lab, 1);
    expect_way(&lab, 7001);

    // applying the old file ends the pending change
    apply(&lab, 7006, "--confirm 3000");
    assert_eq!(apply(&lab, 7001, "")["generation"], 1);
    assert_eq!(lab.status()["pending"], Value::Null);
    expect_way(&lab, 7001);
    // `--force` ends it too
    apply(&lab, 7007, "--confirm 3000");
    apply(&lab, 7008, "--force");
    assert_eq!(lab.status()["pending"], Value::Null);
    until("the waiters have ended", || waiters(&lab).is_empty());
    expect_way(&lab, 7008);
    // the same file again starts a new deadline
    apply(&lab, 7009, "--confirm 3000");
    apply(&lab, 7009, "--confirm 1");
    until("it is rolled back", || lab.status()["pending"].is_null());
    expect_way(&lab, 7008);
}

#[test]
fn first_apply_that_is_not_confirmed_is_detached() {
    let lab = Lab::new();
    assert_eq!(apply(&lab, 7001, "--confirm 1")["pending"]["previous"], Value::Null);
    until_serves(&lab, Value::Null);
    assert!(!lab.filters("eth0").contains("udplb"));
    lab.run("status").expect(3);
    cron(&lab).expect(1).says(&["held since"]);
    // a rollback undoes the pending change
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    assert_eq!(lab.status()["held"], Value::Null);
    lab.run("detach --purge").expect(0);

    apply(&lab, 7001, "--confirm 3000");
    let undone = lab.run("rollback").expect(0);
    assert!(undone.stdout.contains("detached"), "{undone:?}");
    assert!(!lab.filters("eth0").contains("udplb"));
    apply(&lab, 7001, "--confirm 3000 --force");
    lab.run("confirm").expect(0);
    expect_way(&lab, 7001);
}

#[test]
fn detach_ends_the_wait() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    apply(&lab, 7002, "--confirm 3000");
    lab.run("detach").expect(0);
    until("the waiter has ended", || waiters(&lab).is_empty());
    assert_eq!(lab.status()["pending"], Value::Null);
    assert!(!lab.filters("eth0").contains("udplb"));
    lab.apply(&to_port(7002));
    apply(&lab, 7003, "--confirm 3000");
    lab.run("detach --purge").expect(0);
    until("the waiter has ended", || waiters(&lab).is_empty());
    let left: Vec<PathBuf> = fs::read_dir(lab.bpffs.pins())
        .map(|entries| entries.map(|entry| entry.expect("a pin").path()).collect())
        .unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
}
