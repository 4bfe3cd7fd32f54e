//! Lifecycle of udplb's kernel objects: generations, filters, pins and counters through applies,
//! rollbacks, detaches, crashes and foreign filters.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use udplb::datapath::pins::STATE;

use crate::common::Namespace;
use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule, to_port};
use crate::common::net::{bind, count, expect_silence, receive, send_until};
use crate::common::service::{Arpd, until};
use crate::common::tun::Tun;
use crate::expect_way;

/// Replaces the interfaces of a configuration.
pub fn on(interfaces: &[&str], mut config: Value) -> Value {
    config["interfaces"] = json!(interfaces);
    config
}

/// Checks that `status` succeeds and that this generation is active.
#[track_caller]
fn expect_generation(lab: &Lab, number: u32) {
    let status = lab.run("status -o json").expect(0).json();
    assert_eq!(status["generation"], number);
}

/// Returns each path below the pin directory with its inode; a changed pin has another inode.
fn pins(lab: &Lab) -> Vec<(PathBuf, u64)> {
    use std::os::unix::fs::MetadataExt;
    let mut found = Vec::new();
    let mut directories = vec![lab.bpffs.pins()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).expect("a directory of pins") {
            let path = entry.expect("a pin").path();
            let metadata = path.symlink_metadata().expect("a pin");
            found.push((path.clone(), metadata.ino()));
            if metadata.is_dir() {
                directories.push(path);
            }
        }
    }
    found.sort();
    found
}

fn numbers(lab: &Lab) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(lab.bpffs.pins().join("generations"))
        .expect("generations")
        .map(|entry| entry.expect("a generation").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn unchanged_file_writes_nothing() {
    for lab in Lab::for_each_attachment() {
        let first = lab.apply(&to_port(7001));
        assert_eq!((&first["changed"], &first["generation"]), (&json!(true), &json!(1)));
        let (before, filters) = (pins(&lab), lab.filters("eth0"));
        for options in ["", "--force", "-i eth0"] {
            let again = lab.try_apply(&to_port(7001), options).expect(0).json();
            assert_eq!((&again["changed"], &again["generation"]), (&json!(false), &json!(1)));
        }
        assert_eq!(pins(&lab), before);
        assert_eq!(lab.filters("eth0"), filters);
    }
}

#[test]
fn previous_generation_alone_is_kept() {
    let lab = Lab::new();
    for (index, port) in (7001..7006).enumerate() {
        let applied = lab.apply(&to_port(port));
        assert_eq!(applied["generation"], index + 1);
        expect_way(&lab, port);
    }
    assert_eq!(numbers(&lab), ["4", "5"]);
    let current = fs::read_link(lab.bpffs.pins().join("current")).expect("a symlink");
    assert_eq!(current, Path::new("generations/5"));
}

#[test]
fn rollback_holds_the_rolled_back_file() {
    let lab = Lab::new();
    lab.run("rollback").expect(3).says(&["nothing is applied"]);
    lab.apply(&to_port(7001));
    lab.run("rollback").expect(1).says(&["no earlier generation"]);
    lab.apply(&to_port(7002));
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    expect_generation(&lab, 1);
    assert_eq!(lab.status()["held"], 2);
    // the cron job applies the unchanged file
    for _ in 0..2 {
        lab.try_apply(&to_port(7002), "").expect(1).says(&["held since 20", "--force"]);
        expect_way(&lab, 7001);
    }
    assert_eq!(lab.run(&format!("plan {}", lab.write(&to_port(7002)).display())).code, Some(0));
    // applying the old file changes nothing
    assert_eq!(lab.apply(&to_port(7001))["changed"], false);
    lab.run("rollback").expect(0);
    expect_way(&lab, 7002);
    expect_generation(&lab, 2);
    lab.try_apply(&to_port(7001), "").expect(1).says(&["held since"]);
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    lab.try_apply(&to_port(7002), "--force").expect(0);
    expect_way(&lab, 7002);
    assert_eq!(lab.status()["held"], Value::Null);
    assert_eq!(lab.apply(&to_port(7002))["changed"], false);
    // a changed file ends the hold too
    lab.run("rollback").expect(0);
    lab.apply(&to_port(7003));
    expect_way(&lab, 7003);
    assert_eq!(lab.status()["held"], Value::Null);
    lab.apply(&to_port(7002));
    expect_way(&lab, 7002);
}

/// Returns a rule `only` for port 5000 with these upstreams: name, address and port.
fn upstreams(list: &[(&str, usize, u16)]) -> Value {
    let upstreams: Vec<Value> = list
        .iter()
        .map(|(name, index, port)| {
            json!({ "name": name, "address": UPSTREAMS[*index], "port": port })
        })
        .collect();
    config(&[rule("only", 5000, json!({ "tc_action": "block" }), &upstreams)])
}

#[test]
fn counters_stay_with_their_upstream() {
    let lab = Lab::new();
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    let receivers = [7001, 7002].map(|port| bind(&lab.upstream, UPSTREAMS[0], port));
    let other = bind(&lab.upstream, UPSTREAMS[1], 7001);
    let send = |receiver| {
        sender.send_to(b"count", (RELAY, 5000)).expect("sent");
        receive(receiver);
    };
    let forwarded = |name| lab.packets("only", name, "forwarded");

    lab.apply(&upstreams(&[("a", 0, 7001), ("b", 0, 7002)]));
    (0..3).for_each(|_| send(&receivers[0]));
    // the order, the other upstreams and the action do not matter
    lab.apply(&upstreams(&[("b", 0, 7002), ("a", 0, 7001), ("c", 1, 7001)]));
    assert_eq!((forwarded("a"), forwarded("b"), forwarded("c")), (3, 0, 0));
    lab.apply(&upstreams(&[("b", 0, 7002), ("a", 0, 7001)]));
    (0..2).for_each(|_| send(&receivers[1]));
    assert_eq!((forwarded("a"), forwarded("b")), (3, 2));
    // also in a rollback to the previous `c`
    lab.run("rollback").expect(0);
    assert_eq!((forwarded("a"), forwarded("b"), forwarded("c")), (3, 2, 0));
    lab.run("rollback").expect(0);

    // `b` is removed and added again when no generation contains it any more
    lab.apply(&upstreams(&[("a", 0, 7001)]));
    lab.apply(&upstreams(&[("c", 1, 7001)]));
    send(&other);
    lab.apply(&upstreams(&[("c", 1, 7001), ("b", 0, 7002)]));
    assert_eq!((forwarded("b"), forwarded("c")), (0, 1));
}

#[test]
fn rollback_keeps_next_hops_of_upstreams_apart() {
    let lab = Lab::new();
    // without forwarding the program uses the next hop stored under the upstream's id
    lab.relay.sysctl("net.ipv4.ip_forward", "0");
    let second = Namespace::new();
    lab.relay.link("up1", &second, "eth0", true);
    lab.relay.ip("addr add 10.3.0.1/24 dev up1");
    second.ip("addr add 10.3.0.20/24 dev eth0");
    let here = bind(&lab.upstream, UPSTREAMS[0], 7000);
    let there = bind(&second, [10, 3, 0, 20], 7000);
    let to = |address: &str| {
        let upstream = json!({ "name": "it", "address": address, "port": 7000 });
        config(&[rule("only", 5000, json!({ "tc_action": "block" }), &[upstream])])
    };
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let check = |receiver| {
        for _ in 0..3 {
            sender.send_to(b"where", (RELAY, 5000)).expect("sent");
            receive(receiver);
        }
    };
    for _ in 0..3 {
        lab.try_apply(&to("10.2.0.20"), "--force").expect(0);
        check(&here);
        lab.try_apply(&to("10.3.0.20"), "--force").expect(0);
        check(&there);
        lab.run("rollback").expect(0);
        check(&here);
        lab.run("rollback").expect(0);
        check(&there);
    }
    expect_silence(&here);
    expect_silence(&there);
}

/// Foreign filters: the arguments of `tc filter add dev eth0`.
const FOREIGN: [&str; 8] = [
    "ingress pref 50 protocol ip flower ip_proto tcp action pass",
    "ingress pref 60 protocol ip u32 match ip dport 53 0xffff classid 1:1",
    "ingress pref 150 matchall action continue",
    "ingress pref 40 bpf da bytecode 1,6 0 0 4294967295",
    "ingress pref 100 handle 0x1 bpf da bytecode 1,6 0 0 4294967295",
    "ingress pref 100 chain 7 protocol ip u32 match ip dport 53 0xffff classid 1:1",
    "egress pref 100 matchall action pass",
    "egress pref 100 handle 0x7564 bpf da bytecode 1,6 0 0 4294967295",
];

/// Adds a filter; returns false if this kernel has no such filters.
pub fn add_filter(lab: &Lab, interface: &str, filter: &str) -> bool {
    // the bytecode of a filter is one argument with spaces
    let (words, bytecode) = match filter.split_once("bytecode ") {
        Some((words, bytecode)) => (words, vec!["bytecode", bytecode]),
        None => (filter, Vec::new()),
    };
    let mut tc = lab.relay.command("tc");
    tc.args(["filter", "add", "dev", interface]).args(words.split_whitespace()).args(bytecode);
    let added = Outcome::of(&mut tc);
    if added.stderr.contains("classifier not found") || added.stderr.contains("action module") {
        eprintln!("skipped, for this kernel has none: {filter}");
        return false;
    }
    added.expect(0);
    true
}

/// Returns the filters shown by `tc`, without udplb's.
fn foreign_filters(lab: &Lab) -> String {
    let filters = ["ingress", "egress"]
        .map(|hook| lab.relay.tc(&format!("filter show dev eth0 {hook}")))
        .concat();
    let head = "filter protocol all pref 100 bpf chain 0";
    let foreign = |line: &&str| !line.contains("udplb") && line.trim_end() != head;
    filters.lines().filter(foreign).collect::<Vec<_>>().join("\n")
}

#[test]
fn foreign_filters_survive_every_command() {
    let labs =
        FOREIGN.into_iter().flat_map(|it| Lab::for_each_attachment().map(move |lab| (it, lab)));
    for (foreign, lab) in labs {
        lab.relay.tc("qdisc add dev eth0 clsact");
        if !add_filter(&lab, "eth0", foreign) {
            continue;
        }
        let before = foreign_filters(&lab);
        assert!(!before.is_empty());
        lab.apply(&to_port(7001));
        assert_eq!(foreign_filters(&lab), before);
        expect_way(&lab, 7001);
        lab.apply(&to_port(7002));
        lab.run("rollback").expect(0);
        expect_way(&lab, 7001);
        assert_eq!(foreign_filters(&lab), before);
        lab.run("detach").expect(0);
        assert!(!lab.filters("eth0").contains("udplb"));
        assert_eq!(foreign_filters(&lab), before);
        lab.run("detach --purge").expect(0);
        assert_eq!(foreign_filters(&lab), before);
    }
}

pub fn has_clsact(lab: &Lab, interface: &str) -> bool {
    lab.relay.tc(&format!("qdisc show dev {interface}")).contains("clsact")
}

#[test]
fn detach_removes_its_own_clsact_only() {
    let mut lab = Lab::new();
    lab.hide_tcx(true);
    // a clsact of udplb without foreign filters: `detach` keeps it, and `--purge` still recognizes it
    for again in ["", "detach", "rollback"] {
        lab.apply(&to_port(7001));
        lab.run("detach").expect(0);
        assert!(has_clsact(&lab, "eth0"));
        if !again.is_empty() {
            lab.apply(&to_port(7002));
            lab.run(again).expect(0);
        }
        lab.run("detach --purge").expect(0);
        assert!(!has_clsact(&lab, "eth0"), "after {again}");
    }
    // a clsact of udplb with a foreign filter on either hook
    for foreign in FOREIGN {
        lab.apply(&to_port(7001));
        let shared = add_filter(&lab, "eth0", foreign);
        lab.run("detach --purge").expect(0);
        assert_eq!(has_clsact(&lab, "eth0"), shared);
        if shared {
            lab.relay.tc("qdisc del dev eth0 clsact");
        }
    }
    // a foreign, empty clsact, although udplb created an earlier one
    lab.relay.tc("qdisc add dev eth0 clsact");
    lab.apply(&to_port(7001));
    lab.run("detach").expect(0);
    lab.apply(&to_port(7002));
    lab.run("rollback").expect(0);
    lab.run("detach --purge").expect(0);
    assert!(has_clsact(&lab, "eth0"));
}

#[test]
fn foreign_filter_in_our_place_is_refused() {
    let taken = [
        ("pref 100 handle 0x7564 bpf da bytecode 1,6 0 0 0", "bpf pref 100 handle 0x7564"),
        ("pref 100 matchall action pass", "matchall pref 100"),
        ("pref 100 protocol ip flower ip_proto tcp action pass", "flower pref 100"),
        ("pref 100 protocol ip u32 match ip dport 53 0xffff classid 1:1", "u32 pref 100"),
        ("pref 100 protocol ip bpf da bytecode 1,6 0 0 0", "bpf pref 100"),
    ];
    for (foreign, name) in taken {
        let mut lab = Lab::new();
        lab.hide_tcx(true);
        lab.relay.tc("qdisc add dev eth0 clsact");
        if !add_filter(&lab, "eth0", &format!("ingress {foreign}")) {
            continue;
        }
        let before = lab.filters("eth0");
        for options in ["", "--force"] {
            lab.try_apply(&to_port(7001), options).expect(1).says(&["eth0", name, "not udplb's"]);
        }
        assert_eq!(lab.filters("eth0"), before);
        assert!(numbers(&lab).is_empty());
    }
}

#[test]
fn ingress_qdisc_is_used_if_present() {
    let mut lab = Lab::new();
    lab.hide_tcx(true);
    lab.relay.tc("qdisc add dev eth0 ingress");
    lab.apply(&to_port(7001));
    expect_way(&lab, 7001);
    lab.apply(&to_port(7002));
    expect_way(&lab, 7002);
    assert_eq!(lab.apply(&to_port(7002))["changed"], false);
    lab.run("detach").expect(0);
    assert!(lab.relay.tc("qdisc show dev eth0").contains("ingress"));
    assert_eq!(lab.filters("eth0"), "");
}

#[test]
fn orphaned_filter_is_taken_over_with_force_only() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&to_port(7001));
        fs::remove_dir_all(lab.bpffs.pins().join("generations/1")).expect("pins");
        lab.run("status").expect(3);
        expect_way(&lab, 7001);
        let before = lab.filters("eth0");
        let refused = lab.try_apply(&to_port(7002), "").expect(1);
        refused.says(&[
            "eth0",
            "not in this pin directory",
            "or gone",
            "/proc/*/mountinfo",
            "--force",
        ]);
        assert_eq!(lab.filters("eth0"), before);
        expect_way(&lab, 7001);
        lab.try_apply(&to_port(7002), "--force").expect(0);
        expect_way(&lab, 7002);
        lab.run("status").expect(0);
        assert_eq!(lab.apply(&to_port(7002))["changed"], false);
    }
}

#[test]
fn lost_pin_is_noticed_and_healed() {
    let lab = Lab::new();
    let growing = ["counters", "counters-0", "nexthops", "nexthops-0"];
    let fixed = [
        "heartbeat",
        "gate",
        "held",
        "overrides",
        "own",
        "vlans",
        "fragments",
        "fragment_ring",
        "sequences",
    ];
    let telling = ["tracing", "events"];
    let state = growing.iter().chain(&fixed).chain(&telling);
    let state: Vec<String> = state.map(|name| format!("{STATE}/{name}")).collect();
    let keys = ["rules", "table", "table6", "senders", "addresses", "answers"];
    let rest = ["program", "slots", "upstreams", "spares", "lines", "config"];
    let generation: Vec<String> = keys.iter().chain(&rest).map(ToString::to_string).collect();
    let mut port = 7001;
    lab.apply(&to_port(port));
    for lost in generation.iter().chain(&state).map(String::as_str).chain(["current"]) {
        let current = lab.bpffs.pins().join("current");
        let generation = fs::read_link(&current).expect("current");
        let path = match lost.starts_with(STATE) || lost == "current" {
            true => lab.bpffs.pins().join(lost),
            false => lab.bpffs.pins().join(generation).join(lost),
        };
        fs::remove_file(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // without `current` the filters identify the active generation
        let status = lab.run("status").expect(if lost == "current" { 0 } else { 3 });
        assert_eq!(status.stdout.contains("description of"), lost == "config", "{status:?}");
        expect_way(&lab, port);
        // the same file, then another one: both are applied
        lab.apply(&to_port(port));
        lab.run("status").expect(0);
        expect_way(&lab, port);
        assert_eq!(lab.apply(&to_port(port))["changed"], false, "after {lost}");
        fs::remove_file(lab.bpffs.pins().join("current")).expect("current");
        port += 1;
        lab.apply(&to_port(port));
        expect_way(&lab, port);
        lab.run("status").expect(0);
    }
}

#[test]
fn loss_of_all_pins_is_healed() {
    let mut lab = Lab::new();
    // a link goes with its pin
    lab.hide_tcx(true);
    lab.apply(&to_port(7001));
    fs::remove_dir_all(lab.bpffs.pins()).expect("pins");
    lab.run("status").expect(3);
    lab.run("list").expect(3);
    lab.try_apply(&to_port(7001), "").expect(1).says(&["--force"]);
    // first with the directory that udplb created, then without
    for _ in 0..2 {
        let by_hand = "tc filter del dev eth0 ingress pref 100";
        lab.run("detach").expect(1).says(&["eth0", "not in this pin directory", by_hand]);
        lab.run("detach -i up0").expect(0);
        let _ = fs::remove_dir_all(lab.bpffs.pins());
    }
    lab.try_apply(&to_port(7001), "--force").expect(0);
    expect_way(&lab, 7001);
    expect_generation(&lab, 1);
    fs::remove_dir_all(lab.bpffs.pins()).expect("pins");
    lab.relay.tc("filter del dev eth0 ingress pref 100");
    lab.run("detach").expect(0);
    lab.apply(&to_port(7001));
    expect_way(&lab, 7001);
}

#[test]
fn several_interfaces_are_attached_and_detached() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        let sender = bind(&lab.upstream, UPSTREAMS[1], 0);
        let receiver = bind(&lab.upstream, UPSTREAMS[0], 7001);
        lab.upstream.ip("route replace 10.1.0.1/32 via 10.2.0.1");
        sender.send_to(b"other side", (RELAY, 5000)).expect("sent");
        assert_eq!(receive(&receiver).payload, b"other side");
        drop(receiver);
        expect_way(&lab, 7001);

        // an interface that the file no longer names is detached, and the plan shows it
        let file = lab.write(&to_port(7001));
        let plan = lab.run(&format!("plan {}", file.display())).expect(0);
        assert!(plan.stdout.contains("- interface up0: detached"), "{plan:?}");
        lab.apply(&to_port(7001));
        assert_eq!(lab.filters("up0"), "");
        expect_way(&lab, 7001);
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        lab.run("detach -i eth0").expect(0);
        assert_eq!(lab.filters("eth0"), "");
        lab.run("status").expect(3);
        lab.run("detach -i nosuch0").expect(1).says(&["nosuch0"]);
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        lab.run("status").expect(0);
    }
}

#[test]
fn crash_between_swaps_leaves_both_serving() {
    for lab in Lab::for_each_attachment() {
        let both = |port| on(&["eth0", "up0"], to_port(port));
        for healed_by in [7002, 7001, 7003] {
            lab.apply(&both(7001));
            let generation = lab.apply(&both(7002))["generation"].clone();
            let current = fs::read_link(lab.bpffs.pins().join("current")).expect("current");
            // the state before the last swap: the old program on one interface, `current` on the old
            // generation
            lab.run("rollback").expect(0);
            let program = lab.bpffs.pins().join(current).join("program");
            lab.replace_program("eth0", &program);
            let status = lab.run("status").expect(3);
            let text = format!("generation {generation}");
            assert!(status.stdout.contains(&text));
            expect_way(&lab, 7002);
            lab.try_apply(&both(healed_by), "--force").expect(0);
            lab.run("status").expect(0);
            expect_way(&lab, healed_by);
            assert_eq!(lab.apply(&both(healed_by))["changed"], false);
            lab.run("detach --purge").expect(0);
        }
    }
}

/// Interfaces without MAC addresses have their own program, loaded only where needed.
#[test]
fn interfaces_without_mac_addresses_are_attached() {
    for lab in Lab::for_each_attachment() {
        let program_of = |interface: &str| {
            let filters = lab.filters(interface);
            let id = filters.split_once(" id ").expect("a filter").1.split(' ').next();
            id.expect("an id").parse::<u32>().expect("a number")
        };
        let l3_pin = |number: u32| {
            lab.bpffs.pins().join(format!("generations/{number}/program-l3")).exists()
        };
        lab.apply(&to_port(7001));
        assert!(!l3_pin(1));
        let _tun = Tun::new(&lab.relay, "tun0");
        lab.apply(&on(&["eth0", "tun0"], to_port(7001)));
        assert!(l3_pin(2));
        assert_ne!(program_of("eth0"), program_of("tun0"));
        lab.run("status").expect(0);
        expect_way(&lab, 7001);
        assert_eq!(lab.apply(&on(&["eth0", "tun0"], to_port(7001)))["changed"], false);
        lab.run("rollback").expect(0);
        assert_eq!(lab.filters("tun0"), "");
        lab.run("rollback").expect(0);
        assert_ne!(program_of("eth0"), program_of("tun0"));
        // the program's pin is lost, then the generation
        fs::remove_file(lab.bpffs.pins().join("generations/2/program-l3")).expect("a pin");
        lab.run("status").expect(3);
        lab.apply(&on(&["eth0", "tun0"], to_port(7001)));
        lab.run("status").expect(0);
        lab.run("detach --purge").expect(0);
        assert_eq!(lab.filters("tun0"), "");
    }
}

#[test]
fn missing_or_recreated_interface_is_handled() {
    for lab in Lab::for_each_attachment() {
        lab.try_apply(&on(&["eth7"], to_port(7001)), "").expect(1).says(&["no interface eth7"]);
        lab.try_apply(&on(&["lo"], to_port(7001)), "").expect(1).says(&["lo carries neither"]);
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        lab.relay.ip("link del up0");
        let status = lab.run("status").expect(3);
        assert!(status.stdout.contains("up0: there is no such interface"), "{status:?}");
        lab.try_apply(&on(&["eth0", "up0"], to_port(7001)), "")
            .expect(1)
            .says(&["no interface up0"]);
        lab.relay.link("up0", &lab.upstream, "eth1", true);
        lab.relay.ip("addr add 10.2.0.1/24 dev up0");
        lab.upstream.ip("addr add 10.2.0.20/24 dev eth1");
        let status = lab.run("status").expect(3);
        assert!(status.stdout.contains("up0: udplb is not attached"), "{status:?}");
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        lab.run("status").expect(0);
        lab.relay.ip("link set up0 down");
        lab.relay.ip("link set up0 name up1");
        lab.run("status").expect(3);
        lab.apply(&on(&["eth0", "up1"], to_port(7001)));
        let status = lab.run("status").expect(3);
        assert!(status.stdout.contains("up1: it is down"), "{status:?}");
        lab.relay.ip("link set up1 up");
        lab.run("status").expect(0);
    }
}

#[test]
fn pins_of_another_network_namespace_are_refused() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let before = pins(&lab);
    let elsewhere = |words: &str| {
        let mut command = crate::common::udplb(&lab.client, &lab.bpffs);
        Outcome::of(command.args(words.split_whitespace()))
    };
    let file = lab.write(&to_port(7001));
    for words in [&format!("apply {} --force", file.display()), "rollback", "detach"] {
        elsewhere(words).expect(1).says(&["another network namespace", "--pin-dir"]);
    }
    let status = elsewhere("status").expect(3);
    assert!(status.stdout.contains("another network namespace"), "{status:?}");
    assert_eq!(pins(&lab), before);
    expect_way(&lab, 7001);
}

#[test]
fn readers_share_the_lock_and_writers_do_not() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let directory = File::open(lab.bpffs.pins()).expect("the pin directory");
    let apply = format!("apply {} --lock-timeout 0", lab.write(&to_port(7001)).display());
    let plan = apply.replace("apply", "plan");

    directory.lock_shared().expect("a lock");
    for reader in ["status --lock-timeout 0", "list --lock-timeout 0", &plan] {
        lab.run(reader).expect(0);
    }
    let writers = [&apply, "rollback --lock-timeout 0", "detach --lock-timeout 0"];
    for writer in writers {
        let here = format!("(pid {})", std::process::id());
        lab.run(writer).expect(75).says(&["still locked after 0 s by", &here]);
    }
    directory.lock().expect("a lock");
    for command in [&plan, "status --lock-timeout 0"].into_iter().chain(writers) {
        lab.run(command).expect(75).says(&["still locked"]);
    }
    // a waiting writer gets the lock
    let waiting = spawn(&lab, &apply.replace("timeout 0", "timeout 20"));
    directory.unlock().expect("unlocked");
    assert_eq!(waiting.wait_with_output().expect("it ends").status.code(), Some(0));
    expect_way(&lab, 7001);
}

/// Continuously overlapping readers do not starve writers.
#[test]
fn writer_gets_its_turn_among_readers() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // real readers release the lock after reading; these also hold it for a while
                    let guard =
                        udplb::datapath::pins::read(&lab.bpffs.pins(), Duration::from_secs(60));
                    std::thread::sleep(Duration::from_millis(300));
                    drop(guard.map_err(|failure| failure.to_string()).expect("a lock"));
                }
            });
        }
        for port in [7002, 7003] {
            let outcome = lab.try_apply(&to_port(port), "--lock-timeout 60");
            stop.store(port == 7003 || outcome.code != Some(0), Ordering::Relaxed);
            outcome.expect(0);
        }
    });
    expect_way(&lab, 7003);
}

fn spawn(lab: &Lab, words: &str) -> Child {
    let mut command = lab.udplb(words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs")
}

#[test]
fn concurrent_applies_both_succeed() {
    let lab = Lab::new();
    let files = [7001, 7002].map(|port| {
        let path = lab.directory.write(&format!("{port}.yaml"), &to_port(port).to_string());
        (port, format!("apply {} -o json", path.display()))
    });
    for _ in 0..10 {
        let children = files.each_ref().map(|(_, words)| spawn(&lab, words));
        let done = children.map(|child| child.wait_with_output().expect("it ends"));
        for output in &done {
            assert_eq!(output.status.code(), Some(0), "{output:?}");
        }
        lab.run("status").expect(0);
        // one of the two configurations is active, not a mixture: a plan for it has no actions
        let same: Vec<u16> = files
            .iter()
            .filter(|(_, words)| {
                lab.run(&words.replace("apply", "plan")).json()["changed"] == false
            })
            .map(|(port, _)| *port)
            .collect();
        assert_eq!(same.len(), 1);
        expect_way(&lab, same[0]);
    }
    // the same file twice: one apply has nothing to do
    lab.run("detach --purge").expect(0);
    let children = [0, 1].map(|_| spawn(&lab, &files[0].1));
    let changed = children.map(|child| {
        let output = child.wait_with_output().expect("it ends");
        let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        json["changed"].as_bool().expect("a boolean")
    });
    assert_ne!(changed[0], changed[1]);
}

/// Returns a `block` rule and a `pass` rule, both to this port of the first upstream.
pub fn under_load(port: u16) -> Value {
    let upstream = |port| json!({ "name": "one", "address": UPSTREAMS[0], "port": port });
    config(&[
        rule("block", 5000, json!({ "tc_action": "block" }), &[upstream(port)]),
        rule("pass", 5001, json!({ "tc_action": "pass" }), &[upstream(port + 100)]),
    ])
}

/// Runs `change` while datagrams pass both rules, each to one of two ports, and checks that none is
/// lost. Returns the number of datagrams through each rule.
pub fn lose_nothing(lab: &Lab, change: impl FnOnce()) -> [u64; 2] {
    let at_upstream =
        [7001, 7002, 7101, 7102].map(|port| count(bind(&lab.upstream, UPSTREAMS[0], port)));
    let here = count(bind(&lab.relay, RELAY, 5001));
    let senders = [5000, 5001].map(|port| (bind(&lab.client, CLIENTS[0], 0), port));
    let stop = AtomicBool::new(false);
    let [blocked, passed] = std::thread::scope(|scope| {
        let sending = senders
            .each_ref()
            .map(|(socket, port)| scope.spawn(|| send_until(&stop, socket, (RELAY, *port))));
        // also if a check fails, otherwise the senders would continue
        let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
        stop.store(true, Ordering::Relaxed);
        let sent = sending.map(|thread| thread.join().expect("a sender"));
        changed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        sent
    });
    // a final datagram to each port: the rules lead to only two of the four
    for port in [7001, 7002, 7101, 7102] {
        let socket = bind(&lab.upstream, UPSTREAMS[1], 0);
        crate::common::net::send_last(&socket, (UPSTREAMS[0], port));
    }
    let [a, b, c, d] = at_upstream.map(|counter| counter.join().expect("a counter"));
    assert_eq!((a + b, c + d), (blocked, passed));
    assert_eq!(here.join().expect("a counter"), passed);
    assert!(blocked > 100 && passed > 100, "hardly any load: {blocked}, {passed}");
    [blocked, passed]
}

#[test]
fn two_hundred_applies_lose_no_packet() {
    let lab = Lab::new();
    lab.apply(&under_load(7001));
    let sent = lose_nothing(&lab, || {
        for round in 0..200 {
            let port = 7002 - round % 2;
            assert_eq!(lab.apply(&under_load(port))["changed"], true);
        }
    });
    expect_generation(&lab, 201);
    assert_eq!(numbers(&lab), ["200", "201"]);
    // every datagram was counted once, for one upstream
    let counted = || ["block", "pass"].map(|rule| lab.packets(rule, "one", "forwarded"));
    let [block, pass] = counted();
    lab.run("rollback").expect(0);
    let [other_block, other_pass] = counted();
    assert!(block > 0 && other_block > 0);
    // the last datagram of each sender is the final marker
    assert_eq!([block + other_block, pass + other_pass], sent.map(|sent| sent + 1));
}

#[test]
fn rollbacks_and_other_interfaces_lose_no_packet() {
    for lab in Lab::for_each_attachment() {
        // while a clsact is added or removed the kernel drops outgoing packets
        lab.relay.tc("qdisc add dev up0 clsact");
        lab.apply(&under_load(7001));
        lab.apply(&under_load(7002));
        lose_nothing(&lab, || {
            for _ in 0..20 {
                lab.run("rollback").expect(0);
                lab.try_apply(&on(&["eth0", "up0"], under_load(7001)), "--force").expect(0);
                lab.try_apply(&under_load(7002), "--force").expect(0);
            }
        });
    }
}

#[test]
fn killed_apply_leaves_something_serving() {
    let lab = Lab::new();
    let timed = |config: &Value| {
        let started = Instant::now();
        (lab.apply(config), started.elapsed())
    };
    let changes = [7001, 7002, 7001, 7002];
    let times = changes.map(|port| timed(&on(&["eth0", "up0"], under_load(port))).1);
    let mut whole = times.into_iter().min().expect("some");
    let mut killed = 0;
    lose_nothing(&lab, || {
        const POINTS: u32 = 40;
        for point in 0..POINTS {
            let config = on(&["eth0", "up0"], under_load(7002 - point as u16 % 2));
            let file = lab.write(&config);
            let mut child = spawn(&lab, &format!("apply {}", file.display()));
            std::thread::sleep(whole * point / POINTS);
            let _ = child.kill();
            killed += usize::from(child.wait().expect("it ends").code().is_none());
            let (healed, time) = timed(&config);
            if healed["changed"] == true {
                // the machine may be less busy now, so that every apply would finish before the kill
                whole = whole.min(time);
            }
            lab.run("status").expect(0);
            assert!(numbers(&lab).len() <= 2, "{healed}");
            assert_eq!(lab.apply(&config)["changed"], false);
        }
    });
    assert!(killed > 10, "only {killed} were killed");
    let names = fs::read_dir(lab.bpffs.pins()).expect("pins");
    let names: Vec<String> =
        names.map(|it| it.expect("a pin").file_name().to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|name| name.starts_with("building-")), "{names:?}");
}

#[test]
fn purge_leaves_nothing() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        lab.apply(&on(&["eth0", "up0"], to_port(7002)));
        assert_eq!(lab.run("detach --purge -o json").expect(0).json()["changed"], true);
        assert!(!lab.bpffs.pins().exists());
        for interface in ["eth0", "up0"] {
            assert!(!has_clsact(&lab, interface));
        }
        lab.run("status").expect(3);
        for nothing_left in ["detach --purge -o json", "detach -o json"] {
            let again = lab.run(nothing_left).expect(0).json();
            assert_eq!(again, json!({ "format_version": 1, "changed": false, "detached": [] }));
        }
        assert!(!lab.bpffs.pins().exists());
        // also if the directory exists and no generation was ever built
        lab.try_apply(&on(&["eth7"], to_port(7001)), "").expect(1);
        assert_eq!(lab.run("detach --purge -o json").expect(0).json()["changed"], false);
        lab.apply(&to_port(7001));
        expect_generation(&lab, 1);
    }
}

#[test]
fn purge_removes_the_neighbours_of_a_killed_arpd() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let arpd = Arpd::start(&lab, "");
    until("arpd keeps the neighbour", || lab.neighbour("10.2.0.20").contains("proto 117"));
    arpd.end(libc::SIGKILL);
    lab.run("detach").expect(0);
    assert!(lab.neighbour("10.2.0.20").contains("proto 117"));
    assert_eq!(lab.run("detach --purge -o json").expect(0).json()["changed"], true);
    assert_eq!(lab.neighbour("10.2.0.20"), "");
    assert_eq!(lab.run("detach --purge -o json").expect(0).json()["changed"], false);
}

#[test]
fn rollback_after_detach_attaches_again() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&on(&["eth0", "up0"], to_port(7001)));
        lab.apply(&on(&["eth0", "up0"], to_port(7002)));
        for detach in ["detach", "detach -i eth0"] {
            lab.run(detach).expect(0);
            let dry = lab.run("rollback --dry-run").expect(0);
            assert!(dry.stdout.contains("rollback leads to generation 2"), "{dry:?}");
            assert_eq!(lab.filters("eth0"), "");
            lab.run("rollback").expect(0);
            expect_way(&lab, 7002);
            expect_generation(&lab, 2);
            assert_eq!(lab.status()["held"], Value::Null);
        }
        lab.run("rollback").expect(0);
        expect_way(&lab, 7001);
        // interfaces detached by an apply are part of its change and are restored with it
        lab.try_apply(&to_port(7003), "").expect(0);
        lab.run("rollback").expect(0);
        expect_way(&lab, 7001);
        expect_generation(&lab, 1);
    }
}

#[test]
fn rollback_dry_run_changes_nothing() {
    let lab = Lab::new();
    lab.run("rollback --dry-run").expect(1).says(&["no earlier generation"]);
    lab.apply(&to_port(7001));
    lab.apply(&to_port(7002));
    let (before, filters) = (pins(&lab), lab.filters("eth0"));
    let dry = lab.run("rollback --dry-run -o json").expect(0).json();
    assert_eq!((&dry["changed"], &dry["generation"]), (&json!(true), &json!(1)));
    let text = lab.run("rollback --dry-run").expect(0).stdout;
    assert!(text.contains("generation 1") && text.contains("7001"), "{text}");
    assert_eq!((pins(&lab), lab.filters("eth0")), (before, filters));
    expect_way(&lab, 7002);
}

#[test]
fn warnings_are_printed_once_a_generation() {
    let lab = Lab::new();
    let mut config = to_port(7001);
    config["rules"][0]["key"]["port"] = json!(2055);
    let first = lab.try_apply(&config, "").expect(0);
    assert!(first.stderr.contains("warning"), "{first:?}");
    assert_ne!(first.json()["warnings"], json!([]));
    // also if the text is checked again
    for options in ["", "--force", "--partial"] {
        let again = lab.try_apply(&config, options).expect(0);
        assert!(!again.stderr.contains("warning"), "{again:?}");
        assert_eq!(again.json()["warnings"], json!([]));
    }
}

/// A text that means the same may warrant other warnings: here, a default that is not written any more.
#[test]
fn changed_text_of_a_generation_is_warned_of() {
    let lab = Lab::new();
    let mut config = to_port(7001);
    config["rules"][0]["key"]["port"] = json!(2055);
    config["rules"][0]["options"]["source"] = json!("vip");
    assert_eq!(lab.try_apply(&config, "").expect(0).stderr, "");
    config["rules"][0]["options"].as_object_mut().expect("options").remove("source");
    let unwritten = lab.try_apply(&config, "").expect(0);
    assert_eq!(unwritten.json()["changed"], false);
    assert!(unwritten.stderr.contains("port 2055"), "{unwritten:?}");
    assert_eq!(lab.try_apply(&config, "").expect(0).stderr, "");
}

/// Two udplb instances with separate pin directories share one interface.
#[test]
fn filter_of_another_pin_directory_is_refused() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&to_port(7001));
        let other = |words: &str| {
            let mut command = lab.seeing(lab.relay.command(env!("CARGO_BIN_EXE_udplb")));
            command.arg("--pin-dir").arg(lab.bpffs.path.join("other"));
            Outcome::of(command.args(words.split_whitespace()))
        };
        let home = lab.bpffs.pins().display().to_string();
        let take_away = format!("udplb --pin-dir {home} detach -i eth0");
        let apply = format!("apply {}", lab.write(&to_port(7002)).display());
        for words in [apply.clone(), format!("{apply} --force")] {
            other(&words).expect(1).says(&["eth0", &home, &take_away]);
            expect_way(&lab, 7001);
        }
        let doctor = other("doctor").expect(3);
        assert!(
            doctor.stdout.contains(&take_away) && !doctor.stdout.contains("--force"),
            "{doctor:?}"
        );
        // the other instance cannot detach the filter
        other("detach --purge").expect(0);
        expect_way(&lab, 7001);
        lab.run("detach").expect(0);
        other(&apply).expect(0);
        expect_way(&lab, 7002);
        other("detach --purge").expect(0);
    }
}

/// The other instance is in another mount namespace, such as a container.
#[test]
fn filter_of_another_mount_namespace_is_refused() {
    for lab in Lab::for_each_attachment() {
        let file = lab.write(&to_port(7001));
        let mut command = lab.seeing(lab.relay.command("unshare"));
        let script = "mount -t bpf bpf /mnt && \"$0\" --pin-dir /mnt/udplb apply \"$1\" >&2 && \
                      echo applied && exec sleep 1000";
        command.args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_udplb")]).arg(&file);
        let mut inside = command.stdout(Stdio::piped()).spawn().expect("unshare");
        let mut line = String::new();
        let output = inside.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("a line");
        assert_eq!(line, "applied\n");
        let refused = lab.try_apply(&to_port(7002), "--force");
        let namespace = format!("/mnt/udplb in the mount namespace of process {}", inside.id());
        inside.kill().expect("the process");
        inside.wait().expect("the process");
        refused.expect(1).says(&["eth0", &namespace, "nsenter --mount"]);
        // no process has the mount any more, with which a link goes too
        if !lab.has_links() {
            expect_way(&lab, 7001);
            lab.try_apply(&to_port(7002), "").expect(1).says(&["or gone", "--force"]);
        }
        lab.try_apply(&to_port(7002), "--force").expect(0);
        expect_way(&lab, 7002);
    }
}

#[test]
fn pin_directory_writable_by_others_is_refused() {
    let lab = Lab::new();
    let directory = lab.bpffs.pins();
    let apply = format!("apply {}", lab.write(&to_port(7001)).display());
    let refused = |text: &str| {
        for words in [&apply, "status", "detach --purge", "rollback", "confirm"] {
            lab.run(words).expect(1).says(&[&directory.display().to_string(), text]);
        }
        assert_eq!(lab.filters("eth0"), "");
    };
    for mode in [0o777, 0o1777, 0o720] {
        fs::create_dir(&directory).expect("a directory");
        fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).expect("a mode");
        refused("can be written by others");
        fs::remove_dir(&directory).expect("it is empty");
    }
    fs::create_dir(&directory).expect("a directory");
    std::os::unix::fs::chown(&directory, Some(1000), None).expect("an owner");
    refused("belongs to user 1000");
    fs::remove_dir(&directory).expect("it is empty");
    let elsewhere = lab.bpffs.path.join("elsewhere");
    fs::create_dir(&elsewhere).expect("a directory");
    std::os::unix::fs::symlink(&elsewhere, &directory).expect("a link");
    refused("is a symbolic link");
    assert_eq!(fs::read_dir(&elsewhere).expect("it").count(), 0);
    fs::remove_file(&directory).expect("the link");
    lab.run(&apply).expect(0);
    assert_eq!(fs::metadata(&directory).expect("it").permissions().mode() & 0o7777, 0o700);
}

/// Runs udplb in its own mount namespace between two scripts and returns their output.
fn in_mounts(lab: &Lab, before: &str, words: &str, after: &str) -> Outcome {
    let mut command = lab.relay.command("unshare");
    let script = format!("{before}; \"$0\" {words}; echo rc=$?; {after}");
    command.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_udplb")]);
    Outcome::of(&mut command)
}

#[test]
fn only_sys_fs_bpf_is_mounted() {
    let lab = Lab::new();
    let plain = lab.directory.path().join("plain");
    fs::create_dir(&plain).expect("a directory");
    let file = lab.write(&to_port(7001));
    let words = format!("--pin-dir {}/udplb apply {}", plain.display(), file.display());
    let refused =
        in_mounts(&lab, ":", &words, &format!("grep -c {} /proc/mounts", plain.display()));
    assert!(refused.stdout.contains("rc=1\n0\n"), "{refused:?}");
    refused.says(&["is not on a bpffs", "mount -t bpf -o mode=0700"]);
    assert_eq!(fs::read_dir(&plain).expect("it").count(), 0);

    // udplb's own bpffs mount is removed if the command fails, and is accessible only to root if the
    // command succeeds
    let bare = "umount -l /sys/fs/bpf; while umount -l /sys/fs/bpf 2>/dev/null; do :; done";
    let mounts = "grep ' /sys/fs/bpf bpf ' /proc/mounts | wc -l; stat -c %a /sys/fs/bpf";
    let missing = lab.directory.write("missing.yaml", &on(&["eth7"], to_port(7001)).to_string());
    let failed = in_mounts(&lab, bare, &format!("apply {}", missing.display()), mounts);
    assert!(failed.stdout.contains("rc=1\n0\n"), "{failed:?}");
    let apply = format!("apply {}", file.display());
    let applied = in_mounts(&lab, bare, &apply, &format!("{mounts}; \"$0\" detach --purge"));
    assert!(applied.stdout.contains("rc=0\n1\n1700\n"), "{applied:?}");
}

#[test]
fn lost_counter_chunk_is_healed() {
    let lab = Lab::new();
    let upstream = json!({ "name": "one", "address": UPSTREAMS[0], "port": 7001 });
    let many = |port| {
        let mut rules: Vec<Value> = (10_000..10_700)
            .map(|port| rule(&format!("r{port}"), port, json!({}), std::slice::from_ref(&upstream)))
            .collect();
        rules.push(to_port(port)["rules"][0].clone());
        config(&rules)
    };
    lab.apply(&many(7001));
    let chunks = ["counters-0", "counters-1"];
    for chunk in chunks {
        fs::remove_file(lab.bpffs.pins().join(STATE).join(chunk)).expect("a second chunk");
        lab.run("status").expect(3);
        lab.apply(&many(7001));
        lab.run("status").expect(0);
        assert_eq!(lab.apply(&many(7001))["changed"], false);
        expect_way(&lab, 7001);
        assert_eq!(lab.packets("only", "one", "forwarded"), 1);
        lab.run("detach --purge").expect(0);
        lab.apply(&many(7001));
    }
}

#[test]
fn a_hundred_thousand_rules_have_an_upstream_each() {
    let lab = Lab::new();
    let blocked = |key: Value, port: usize| {
        let upstream = json!({ "address": UPSTREAMS[0], "port": port });
        json!({ "key": key, "options": { "tc_action": "block" }, "upstream": [upstream] })
    };
    let mut rules: Vec<Value> = (0..100_000_usize)
        .map(|nth| {
            let (address, port) = (nth / 50_000 + 1, nth % 50_000 + 1);
            blocked(json!({ "address": format!("10.9.0.{address}"), "port": port }), port)
        })
        .collect();
    rules.push(blocked(json!({ "address": RELAY, "port": 5000 }), 7001));
    let applied = lab.apply(&config(&rules));
    assert_eq!(applied["upstream_count"], 100_001);
    expect_way(&lab, 7001);
}
