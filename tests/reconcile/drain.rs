//! `drain` and `enable`: overrides of upstreams at run time, under traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use udplb::config::State;
use udplb::datapath::{pins, state_maps};

use crate::common::Namespace;
use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, expect_silence, expect_silence_of, receive, receive_any};

fn upstream(name: &str, index: usize, port: u16) -> Value {
    json!({ "name": name, "address": UPSTREAMS[index], "port": port })
}

fn block(upstreams: &[Value]) -> Value {
    config(&[rule("only", 5000, json!({ "tc_action": "block" }), upstreams)])
}

/// Returns an upstream or mirror from `status -o json`.
fn shown(lab: &Lab, list: &str, label: &str) -> Value {
    let status = lab.status();
    let hosts = status["rules"][0][list].as_array().expect("a list").iter();
    hosts.clone().find(|host| host["upstream"] == label).expect("a host").clone()
}

#[track_caller]
fn expect_state(lab: &Lab, label: &str, state: &str, by_hand: Option<&str>) {
    let host = shown(lab, "upstreams", label);
    assert_eq!((&host["state"], &host["override"]), (&json!(state), &json!(by_hand)), "{label}");
}

/// Returns all overrides by id.
fn overrides(lab: &Lab) -> BTreeMap<u32, State> {
    let guard = pins::read(&lab.bpffs.pins(), Duration::ZERO).ok().flatten().expect("pins");
    let maps = state_maps::open(&guard).expect("maps").expect("all maps");
    maps.overrides.read(u32::MAX).expect("overrides")
}

/// Sends a datagram from the first client to the rule.
fn send(lab: &Lab) {
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    sender.send_to(b"where", (RELAY, 5000)).expect("sent");
}

#[test]
fn backup_serves_while_all_others_are_drained() {
    let lab = Lab::new();
    let backup = json!({ "name": "c", "address": UPSTREAMS[1], "port": 7003, "priority": 2 });
    lab.apply(&block(&[upstream("a", 0, 7001), upstream("b", 0, 7002), backup]));
    let receivers: Vec<UdpSocket> = [(0, 7001), (0, 7002), (1, 7003)]
        .map(|(host, port)| bind(&lab.upstream, UPSTREAMS[host], port))
        .into();
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    let receiver_of_one = || {
        sender.send_to(b"where", (RELAY, 5000)).expect("sent");
        let (index, datagram) = receive_any(&receivers);
        assert_eq!(datagram.payload, b"where");
        index
    };
    assert_ne!(receiver_of_one(), 2);
    lab.run("drain only/a").expect(0);
    assert_eq!(receiver_of_one(), 1);
    lab.run("drain only/b").expect(0);
    assert_eq!(receiver_of_one(), 2);
    lab.run("enable only/b").expect(0);
    assert_eq!(receiver_of_one(), 1);
    expect_silence_of(&receivers);
}

const FLOWS: u32 = 300;

/// Receiver of each datagram, by flow and round.
type Seen = BTreeMap<(u32, u32), usize>;

/// Receives until `done` is set and no datagram follows; fails on duplicates.
fn collect(receivers: &[UdpSocket], done: &AtomicBool) -> Seen {
    let take = |socket: &UdpSocket| {
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let mut taken = Vec::new();
        let mut buffer = [0; 8];
        loop {
            match socket.recv(&mut buffer) {
                Ok(_) => {
                    let [flow, round] = [&buffer[..4], &buffer[4..]]
                        .map(|it| u32::from_be_bytes(it.try_into().expect("4 bytes")));
                    taken.push((flow, round));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if done.load(Ordering::SeqCst) {
                        return taken;
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    };
    std::thread::scope(|scope| {
        let takers: Vec<_> =
            receivers.iter().map(|socket| scope.spawn(move || take(socket))).collect();
        let mut seen = Seen::new();
        for (index, taker) in takers.into_iter().enumerate() {
            for datagram in taker.join().expect("a receiver") {
                assert_eq!(seen.insert(datagram, index), None, "{datagram:?} came twice");
            }
        }
        seen
    })
}

/// Sends hundreds of flows to several upstreams while the first is drained and enabled.
fn check_under_traffic(options: Value, upstreams: usize) {
    let lab = Lab::new();
    let places = [(0, 7000), (1, 7000), (0, 7001), (1, 7001)];
    let places = &places[..upstreams];
    let hosts: Vec<Value> = places
        .iter()
        .enumerate()
        .map(|(number, (index, port))| upstream(&format!("u{number}"), *index, *port))
        .collect();
    lab.apply(&config(&[rule("only", 5000, options, &hosts)]));
    let filters = lab.filters("eth0");
    let bind_one = |(index, port): &(usize, u16)| bind(&lab.upstream, UPSTREAMS[*index], *port);
    let receivers: Vec<UdpSocket> = places.iter().map(bind_one).collect();
    let senders: Vec<UdpSocket> =
        (0..FLOWS as u16).map(|flow| bind(&lab.client, CLIENTS[0], 20_000 + flow)).collect();

    let (round, stop, done) = (AtomicU32::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let send_all = || {
        while !stop.load(Ordering::SeqCst) {
            let number = round.load(Ordering::SeqCst);
            for (flow, sender) in (0_u32..).zip(&senders) {
                let payload = [flow.to_be_bytes(), number.to_be_bytes()].concat();
                sender.send_to(&payload, (RELAY, 5000)).expect("sent");
            }
            round.store(number + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(200));
        done.store(true, Ordering::SeqCst);
    };
    // wait for a minimum number of complete rounds
    let wait = || {
        let end = round.load(Ordering::SeqCst) + 6;
        while round.load(Ordering::SeqCst) < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        round.load(Ordering::SeqCst)
    };
    let (seen, marks) = std::thread::scope(|scope| {
        let seen = scope.spawn(|| collect(&receivers, &done));
        scope.spawn(send_all);
        let before = wait();
        let drained = lab.run("drain only/u0 -o json");
        let after = round.load(Ordering::SeqCst) + 1;
        let before_enabled = wait();
        let enabled = lab.run("enable only/u0 -o json");
        let after_enabled = round.load(Ordering::SeqCst) + 1;
        wait();
        stop.store(true, Ordering::SeqCst);
        let seen = seen.join().expect("the receivers");
        assert_eq!(drained.expect(0).json()["changed"], true);
        assert_eq!(enabled.expect(0).json()["changed"], true);
        (seen, [before, after, before_enabled, after_enabled])
    });

    let rounds = round.load(Ordering::SeqCst);
    assert_eq!(seen.len(), (rounds * FLOWS) as usize, "datagrams were lost");
    let at = |flow, round| seen[&(flow, round)];
    let [before, after, before_enabled, after_enabled] = marks;
    let mut heirs = BTreeSet::new();
    let mut drained = 0;
    for flow in 0..FLOWS {
        let (home, away) = (at(flow, 0), at(flow, after));
        for round in 0..rounds {
            let is = at(flow, round);
            match round {
                _ if round < before || round >= after_enabled => assert_eq!(is, home),
                _ if (after..before_enabled).contains(&round) => assert_eq!(is, away),
                _ => assert!(is == home || is == away),
            }
        }
        match home {
            0 => {
                drained += 1;
                heirs.insert(away);
            }
            _ => assert_eq!(home, away, "flow {flow} of another upstream moved"),
        }
    }
    assert!(drained > FLOWS / upstreams as u32 / 2, "{drained} flows");
    assert_eq!(heirs, (1..upstreams).collect(), "who has the drained one's flows");
    // no generation was built
    assert_eq!(lab.status()["generation"], 1);
    assert_eq!(lab.filters("eth0"), filters);
}

#[test]
fn drained_flows_move_and_return_without_loss() {
    check_under_traffic(json!({ "tc_action": "block", "hash": "maglev" }), 4);
}

#[test]
fn drained_upstream_of_two_gives_all_to_the_other() {
    check_under_traffic(json!({ "tc_action": "pass", "hash": "maglev" }), 2);
}

#[test]
fn drain_with_modulo_moves_its_flows_only() {
    let modulo = json!({ "tc_action": "block", "strategy": "src-port", "hash": "modulo" });
    check_under_traffic(modulo, 3);
}

#[test]
fn fully_drained_rule_counts_no_upstream() {
    for action in ["block", "pass"] {
        let lab = Lab::new();
        let here = bind(&lab.relay, RELAY, 5000);
        let there: Vec<UdpSocket> =
            [0, 1].map(|index| bind(&lab.upstream, UPSTREAMS[index], 7000)).into();
        let upstreams = [upstream("a", 0, 7000), upstream("b", 1, 7000)];
        lab.apply(&config(&[rule("only", 5000, json!({ "tc_action": action }), &upstreams)]));
        assert_eq!(lab.run("drain only/a").expect(0).stderr, "");
        let last = lab.run("drain only/b").expect(0).says(&[
            "warning: rule only has no active upstream: its packets are counted no-upstream",
        ]);
        assert_eq!(last.stdout, "only/b is drained by hand\n");
        let again = lab.run("drain only/b -o json").expect(0).json();
        assert_eq!(
            (&again["changed"], &again["state"], &again["override"]),
            (&json!(false), &json!("drained"), &json!("drained"))
        );
        assert!(again["warnings"][0].as_str().is_some_and(|it| it.contains("no-upstream")));
        assert_eq!(lab.run("drain only/b -q").expect(0).stderr, "");
        send(&lab);
        there.iter().for_each(expect_silence);
        match action {
            "pass" => assert_eq!(receive(&here).payload, b"where"),
            _ => expect_silence(&here),
        }
        let counters = &lab.status()["rules"][0]["counters"];
        assert_eq!(counters["not_forwarded"]["no-upstream"]["packets"], 1);
        assert_eq!(counters["matched"]["packets"], 1);
        lab.run("enable only/a").expect(0);
        send(&lab);
        assert_eq!(receive(&there[0]).payload, b"where");
    }
}

#[test]
fn drained_receivers_and_mirrors_get_no_copy() {
    let lab = Lab::new();
    let receivers = [7001, 7002].map(|port| bind(&lab.upstream, UPSTREAMS[0], port));
    let replicate = json!({ "tc_action": "block", "mode": "replicate", "source": "preserve" });
    let mut rules =
        config(&[rule("only", 5000, replicate, &[upstream("a", 0, 7001), upstream("b", 0, 7002)])]);
    // selection options have no meaning for replication
    rules["defaults"] = json!({});
    lab.apply(&rules);
    lab.run("drain only/a").expect(0);
    send(&lab);
    expect_silence(&receivers[0]);
    assert_eq!(receive(&receivers[1]).payload, b"where");
    lab.run("drain only/b").expect(0).says(&["no active upstream"]);
    send(&lab);
    receivers.iter().for_each(expect_silence);
    let counters = lab.status()["rules"][0]["counters"].clone();
    assert_eq!(
        (&counters["forwarded"]["packets"], &counters["not_forwarded"]["no-upstream"]["packets"]),
        (&json!(1), &json!(1))
    );
    lab.run("enable --all").expect(0);
    send(&lab);
    receivers.iter().for_each(|socket| assert_eq!(receive(socket).payload, b"where"));

    // the same host is both upstream and mirror
    let mut mirrored = block(&[json!({ "address": UPSTREAMS[0], "port": 7001 })]);
    mirrored["rules"][0]["mirror"] =
        json!([{ "address": UPSTREAMS[0], "port": 7001 }, upstream("copy", 0, 7002)]);
    lab.apply(&mirrored);
    lab.run("drain only/10.2.0.20:7001")
        .expect(1)
        .says(&["ambiguous", "`upstream 10.2.0.20:7001` or `mirror 10.2.0.20:7001`"]);
    let drained = Outcome::of(lab.udplb("drain").arg("only/mirror 10.2.0.20:7001")).expect(0);
    assert_eq!(drained.stderr, "");
    send(&lab);
    assert_eq!(receive(&receivers[0]).payload, b"where");
    expect_silence(&receivers[0]);
    assert_eq!(receive(&receivers[1]).payload, b"where");
    assert_eq!(shown(&lab, "mirrors", "10.2.0.20:7001'")["override"], "drained");
    assert_eq!(shown(&lab, "upstreams", "10.2.0.20:7001")["override"], Value::Null);
    lab.run("drain only/copy").expect(0);
    send(&lab);
    assert_eq!(receive(&receivers[0]).payload, b"where");
    expect_silence(&receivers[1]);
    // the exit code is 3 while the lost packet is less than a second old
    let status = lab.run("status").stdout;
    let is_drained = |line: &&str| line.contains("mirror ") && line.contains("drained (override)");
    assert_eq!(status.lines().filter(is_drained).count(), 2, "{status}");
}

#[test]
fn override_holds_while_the_upstream_is_the_same() {
    let lab = Lab::new();
    let (a, b) = (upstream("a", 0, 7001), upstream("b", 1, 7001));
    let receivers = [0, 1].map(|index| bind(&lab.upstream, UPSTREAMS[index], 7001));
    lab.apply(&block(&[a.clone(), b.clone()]));
    // the first of two upstreams is drained: the second gets the datagram
    let expect_second = || {
        send(&lab);
        assert_eq!(receive(&receivers[1]).payload, b"where");
    };
    lab.run("drain only/a").expect(0);
    expect_second();
    let plan = |config: &Value, options: &str| {
        lab.run(&format!("plan {} {options}", lab.write(config).display())).expect(0)
    };
    let same = plan(&block(&[a.clone(), b.clone()]), "--exit-code").stdout;
    assert_eq!(same, "no changes\noverride: only/a is drained by hand\n");
    assert_eq!(lab.apply(&block(&[a.clone(), b.clone()]))["changed"], false);
    expect_state(&lab, "a", "drained", Some("drained"));

    // the override survives an apply, two rollbacks and arpd
    let mut changed = block(&[a.clone(), b.clone()]);
    changed["rules"][0]["options"]["source"] = json!("preserve");
    let planned = plan(&changed, "-o json").json();
    let standing =
        json!([{ "rule": "only", "upstream": "a", "state": "drained", "override": "drained" }]);
    assert_eq!(planned["overrides"], standing);
    assert_eq!(lab.apply(&changed)["generation"], 2);
    expect_second();
    for _ in 0..2 {
        lab.run("rollback").expect(0);
        expect_second();
    }
    lab.run("arpd --once").expect(0);
    expect_second();
    // also after a detach
    lab.run("detach").expect(0);
    lab.apply(&changed);
    expect_second();
    expect_state(&lab, "a", "drained", Some("drained"));
    let status = lab.run("status").expect(0).stdout;
    let line = status.lines().find(|line| line.contains("a 10.2.0.20:7001")).expect("a row");
    assert!(line.contains("drained (override)"), "{status}");

    // ids: rule 1, a 2, b 3; the previous generation still uses a's
    assert_eq!(overrides(&lab), [(2, State::Drained)].into());
    lab.apply(&block(std::slice::from_ref(&b)));
    assert_eq!(plan(&block(std::slice::from_ref(&b)), "").stdout, "no changes\n");
    lab.run("rollback").expect(0);
    expect_second();
    lab.try_apply(&block(std::slice::from_ref(&b)), "--force").expect(0);
    let c = upstream("c", 0, 7002);
    lab.apply(&block(&[b.clone(), c.clone()]));
    // the id is free now: the next upstream gets it, without the override
    let d = upstream("d", 0, 7001);
    lab.apply(&block(&[d, b, c]));
    assert_eq!(overrides(&lab), BTreeMap::new());
    expect_state(&lab, "d", "active", None);
    let sender = bind(&lab.client, CLIENTS[0], 6);
    sender.send_to(b"first", (RELAY, 5000)).expect("sent");
    assert_eq!(receive(&receivers[0]).payload, b"first");
}

#[test]
fn drained_in_the_file_can_be_overridden() {
    let lab = Lab::new();
    let receivers = [0, 1].map(|index| bind(&lab.upstream, UPSTREAMS[index], 7001));
    let mut a = upstream("a", 0, 7001);
    a["state"] = json!("drained");
    let drained = block(&[a, upstream("b", 1, 7001)]);
    lab.apply(&drained);
    let expect_at = |index: usize| {
        send(&lab);
        assert_eq!(receive(&receivers[index]).payload, b"where");
    };
    let row = || {
        let status = lab.run("status").expect(0).stdout;
        status.lines().find(|line| line.contains("a 10.2.0.20")).expect("a row").to_string()
    };
    expect_at(1);
    expect_state(&lab, "a", "drained", None);
    assert!(row().contains(" drained ") && !row().contains("override"));
    let unchanged = lab.run("drain only/a").expect(0).stdout;
    assert_eq!(unchanged, "unchanged (only/a is drained by the file)\n");
    assert_eq!(lab.run("enable only/a").expect(0).stdout, "only/a is active by hand\n");
    expect_at(0);
    expect_state(&lab, "a", "active", Some("active"));
    assert!(row().contains("active (override)"));
    // `list` shows the applied file
    let list = lab.run("list -o json").expect(0).json();
    assert_eq!(list["rules"][0]["upstream"][0]["state"], "drained");
    assert_eq!(lab.apply(&drained)["changed"], false);
    expect_at(0);
    assert_eq!(lab.run("drain only/a").expect(0).stdout, "only/a is drained by the file\n");
    expect_at(1);
    expect_state(&lab, "a", "drained", None);
    assert_eq!(overrides(&lab), BTreeMap::new());
    lab.run("enable only/a").expect(0);
    // later the file sets the same state
    lab.apply(&block(&[upstream("a", 0, 7001), upstream("b", 1, 7001)]));
    expect_state(&lab, "a", "active", Some("active"));
    let taken = lab.run("enable only/a").expect(0).stdout;
    assert_eq!(taken, "only/a stays active by the file; the override is removed\n");
    expect_state(&lab, "a", "active", None);
}

#[test]
fn enable_all_clears_every_override() {
    let lab = Lab::new();
    let mut c = upstream("c", 0, 7002);
    c["state"] = json!("drained");
    let all = block(&[upstream("a", 0, 7001), upstream("b", 1, 7001), c]);
    lab.apply(&all);
    let nothing = lab.run("enable --all").expect(0).stdout;
    assert_eq!(nothing, "unchanged (there are no overrides)\n");
    for words in ["drain only/a", "drain only/b", "enable only/c"] {
        assert_eq!(lab.run(&format!("{words} -o json")).expect(0).json()["changed"], true);
    }
    // one upstream is only in the previous generation
    lab.apply(&block(&[upstream("b", 1, 7001), upstream("d", 0, 7003)]));
    let text = lab.run("enable --all").expect(0).stdout;
    let lines: BTreeSet<&str> = text.lines().collect();
    let expected = ["only/b is active", "only/a is active", "only/c is drained"]
        .map(|line| format!("{line} by the file"));
    assert_eq!(lines, expected.iter().map(String::as_str).collect());
    assert_eq!(overrides(&lab), BTreeMap::new());
    lab.run("drain only/b").expect(0);
    let json = lab.run("enable --all -o json").expect(0).json();
    let b = json!({ "rule": "only", "upstream": "b", "state": "active", "override": null });
    assert_eq!(json, json!({ "format_version": 1, "changed": true, "upstreams": [b] }));
    let again = lab.run("enable --all -o json").expect(0).json();
    assert_eq!(again, json!({ "format_version": 1, "changed": false, "upstreams": [] }));
}

#[test]
fn impossible_drains_are_refused() {
    let lab = Lab::new();
    for words in ["drain only/a", "enable only/a", "enable --all"] {
        lab.run(words).expect(3).says(&["nothing is applied"]);
        assert!(!lab.bpffs.pins().exists());
    }
    lab.apply(&block(&[upstream("collector", 0, 7001), upstream("b", 1, 7001)]));
    for words in ["drain", "drain only", "drain /b", "enable", "enable --all only/b", "drain --all"]
    {
        lab.run(words).expect(64);
    }
    lab.run("drain noly/b").expect(1).says(&["no rule `noly`; did you mean `only`?"]);
    lab.run("drain only/colector").expect(1).says(&["did you mean `collector`?"]);
    lab.run("enable only/x").expect(1).says(&["known: `collector`, `b`"]);
    let elsewhere = Namespace::new();
    let mut foreign = crate::common::udplb(&elsewhere, &lab.bpffs);
    Outcome::of(foreign.args(["drain", "only/b"])).expect(1).says(&["another network namespace"]);
    let lock = File::open(lab.bpffs.pins()).expect("the pin directory");
    lock.lock().expect("a lock");
    lab.run("drain only/b --lock-timeout 0").expect(75);
    lock.unlock().expect("unlocked");
    let program = lab.directory.program();
    for words in ["drain only/b", "enable only/b", "enable --all"] {
        lab.relay.enter(|| {
            let mut command = Command::new(&program);
            command.arg("--pin-dir").arg(lab.bpffs.pins()).args(words.split_whitespace());
            Outcome::of(command.uid(65_534).gid(65_534)).expect(77).says(&["CAP_NET_ADMIN"]);
        });
    }
    assert_eq!(overrides(&lab), BTreeMap::new());
    // the description of the active generation is lost
    fs::remove_file(lab.bpffs.pins().join("generations/1/config")).expect("a pin");
    lab.run("drain only/b").expect(1).says(&["generation 1 is damaged"]);
}
