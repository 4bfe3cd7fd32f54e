//! Counters of rules under traffic and crashes: they never go backwards, and are exact in the end.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::lab::{Lab, Net, Outcome, V4, V6, config};
use crate::common::net::{UDP_SEGMENT, bind, set};
use crate::common::service::until;

/// Payload of a datagram, and of a segment.
const PAYLOAD: usize = 100;
const SEGMENTS: usize = 4;
const RULES: [(&str, Net, u64); 2] = [("four", V4, 142), ("six", V6, 162)];

/// Returns a rule for each family, balanced over these hosts.
fn balance(hosts: &[u16]) -> Value {
    let upstream = |net: &Net, host: u16| {
        let address = net.upstreams[usize::from(host % 2)];
        json!({ "name": format!("u{host}"), "address": address, "port": 7000 + host })
    };
    let rule = |(name, net, _): &(&str, Net, u64)| {
        let upstreams: Vec<Value> = hosts.iter().map(|host| upstream(net, *host)).collect();
        net.rule(name, 5000, json!({ "tc_action": "block" }), &upstreams)
    };
    config(&RULES.iter().map(rule).collect::<Vec<_>>())
}

/// Packets and bytes of each rule by `status`, and the packets to its first upstream.
type Reading = [[u64; 3]; 2];

fn reading(lab: &Lab) -> Reading {
    let status = lab.status();
    [0, 1].map(|index| {
        let rule = &status["rules"][index];
        let [all, first] =
            [&rule["counters"]["matched"], &rule["upstreams"][0]["counters"]["matched"]];
        [&all["packets"], &all["bytes"], &first["packets"]].map(|it| it.as_u64().unwrap_or(0))
    })
}

#[track_caller]
fn expect_growth(before: &Reading, after: &Reading) {
    for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
        assert!(before <= after, "{before:?} -> {after:?}");
    }
}

/// Keeps this thread, and so the packets that it sends, on one CPU.
fn stay_on(cpu: usize) {
    // SAFETY: all zeroes are an empty set, the index is far below its size, and the kernel reads the set.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Sends until `stop` is set, from one CPU; with `gso` several datagrams at once. Returns the number of
/// datagrams.
fn send(stop: &AtomicBool, socket: &UdpSocket, to: IpAddr, gso: bool, cpu: usize) -> u64 {
    stay_on(cpu);
    if gso {
        set(socket, libc::SOL_UDP, UDP_SEGMENT, PAYLOAD as i32);
    }
    let segments = if gso { SEGMENTS } else { 1 };
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        if socket.send_to(&vec![0; PAYLOAD * segments], (to, 5000)).is_ok() {
            sent += segments as u64;
        }
        thread::sleep(Duration::from_micros(100));
    }
    sent
}

/// Runs `change` while each rule has a sender on each of two CPUs, one of them of GSO packets, and reads the
/// counters all the time. Returns the number of datagrams to each rule.
fn under_traffic(lab: &Lab, change: impl FnOnce()) -> [u64; 2] {
    let senders = RULES.map(|(_, net, _)| {
        [false, true].map(|gso| (net.key, gso, bind(&lab.client, net.clients[usize::from(gso)], 0)))
    });
    let stop = AtomicBool::new(false);
    let stop = &stop;
    thread::scope(|scope| {
        let sending = senders.each_ref().map(|pair| {
            pair.each_ref().map(|(to, gso, socket)| {
                scope.spawn(move || send(stop, socket, *to, *gso, usize::from(*gso)))
            })
        });
        let watch = scope.spawn(move || {
            let mut last = Reading::default();
            while !stop.load(Ordering::Relaxed) {
                let now = reading(lab);
                expect_growth(&last, &now);
                last = now;
            }
        });
        // also if a check fails, otherwise the senders would continue
        let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
        stop.store(true, Ordering::Relaxed);
        watch.join().expect("counters that never go backwards");
        let sum = |threads: [thread::ScopedJoinHandle<'_, u64>; 2]| {
            threads.map(|thread| thread.join().expect("a sender")).iter().sum()
        };
        let sent = sending.map(sum);
        changed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        sent
    })
}

#[track_caller]
fn expect_exact(lab: &Lab, sent: [u64; 2]) {
    let is_so = || {
        let totals = reading(lab).map(|[packets, bytes, _]| (packets, bytes));
        let wanted = [0, 1].map(|index| (sent[index], sent[index] * RULES[index].2));
        if totals == wanted {
            true
        } else {
            eprintln!("{totals:?}, not {wanted:?}");
            false
        }
    };
    until("every packet is counted once", is_so);
    let metrics = lab.run("metrics").expect(0).stdout;
    for ((rule, ..), sent) in RULES.iter().zip(sent) {
        let line = format!("udplb_rule_packets_total{{rule=\"{rule}\"}} {sent}");
        assert!(metrics.lines().any(|it| it == line), "no {line}: {metrics}");
    }
}

/// The hosts of the rules, one after the other; all have u0.
const STEPS: [&[u16]; 4] = [&[0, 1], &[0, 2, 3], &[0], &[0, 3, 1]];

#[test]
fn totals_are_exact_over_changes_and_crashes() {
    let lab = Lab::new();
    lab.add_ipv6();
    lab.apply(&balance(STEPS[0]));
    let sent = under_traffic(&lab, || {
        for round in 1..12 {
            let file = lab.write(&balance(STEPS[round % STEPS.len()]));
            let words = format!("apply --force {}", file.display());
            let mut child = lab.udplb(&words).spawn().expect("the program runs");
            thread::sleep(Duration::from_millis(30 * round as u64));
            let _ = child.kill();
            child.wait().expect("it ends");
            lab.run(&words).expect(0);
            if round % 2 == 0 {
                lab.run("rollback").expect(0);
            }
        }
    });
    assert!(sent.iter().all(|sent| *sent > 1000), "hardly any load: {sent:?}");
    expect_exact(&lab, sent);
    for words in ["detach", "rollback", "rollback"] {
        lab.run(words).expect(0);
        expect_exact(&lab, sent);
    }
    lab.apply(&balance(&[0, 2]));
    lab.apply(&balance(&[0]));
    expect_exact(&lab, sent);
}

/// Runs udplb under strace, which kills it at the `nth` call of a kind; returns the calls.
fn killed(lab: &Lab, kill: Option<(&str, usize)>, words: &str) -> (Outcome, Vec<String>) {
    let log = lab.directory.path().join("strace");
    let mut command = lab.relay.command("strace");
    command.args(["-f", "-qq", "-o"]).arg(&log).args(["-e", "trace=bpf,/^rename,/^unlink,/^rmdir"]);
    if let Some((call, nth)) = kill {
        command.args(["-e", &format!("inject={call}:signal=KILL:when={nth}")]);
    }
    command.args([env!("CARGO_BIN_EXE_udplb"), "--pin-dir"]).arg(lab.bpffs.pins());
    let outcome = Outcome::of(command.args(words.split_whitespace()));
    let log = fs::read_to_string(&log).expect("what strace saw");
    (outcome, log.lines().map(Into::into).collect())
}

/// Returns the calls by which `apply` removes a generation: the kind of each, and its number among these.
fn removal(calls: &[String]) -> Vec<(String, usize)> {
    let name = |line: &String| {
        let call = line.split_once(' ').map_or("", |(_, call)| call.trim_start());
        call.split('(').next().unwrap_or_default().to_string()
    };
    let names: Vec<String> = calls.iter().map(name).collect();
    let commit = calls.iter().rposition(|line| line.contains("current-next")).expect("a commit");
    let nth = |index: usize| names[..=index].iter().filter(|it| **it == names[index]).count();
    (commit + 1..calls.len()).map(|index| (names[index].clone(), nth(index))).collect()
}

/// The generation that goes holds packets of an upstream that stays, and of one that goes with it.
#[test]
fn killed_removal_counts_each_packet_once() {
    let lab = Lab::new();
    lab.add_ipv6();
    let (mut round, mut sent) = (0, [0, 0]);
    let mut apply = |kill: Option<(&str, usize)>| {
        let file = lab.write(&balance(&[0, 1 + round % 3]));
        round += 1;
        killed(&lab, kill, &format!("apply {}", file.display()))
    };
    let mut send_some = || {
        let more = under_traffic(&lab, || thread::sleep(Duration::from_millis(50)));
        sent = [sent[0] + more[0], sent[1] + more[1]];
        sent
    };
    for _ in 0..2 {
        apply(None).0.expect(0);
        send_some();
    }
    let points = removal(&apply(None).1);
    let by = |kind: &str| points.iter().filter(|(call, _)| call.starts_with(kind)).count();
    assert!(by("bpf") > 3 && by("rename") == 1 && by("unlink") > 5, "{points:?}");
    for (call, nth) in &points {
        let (outcome, _) = apply(Some((call, *nth)));
        assert_ne!(outcome.code, Some(1), "{outcome:?}");
        let expected = send_some();
        expect_exact(&lab, expected);
    }
    apply(None).0.expect(0);
    expect_exact(&lab, sent);
}
