//! `udplb arpd` with real neighbours: changes of links, gateways and addresses, and their packets.

use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, count, expect_silence, receive, receive_any, send_until};
use crate::common::service::{Arpd, until};
use crate::common::{lock_any_memory, udplb};
use crate::syscalls::Faults;

/// Port and action of each rule; each has one upstream.
const PORTS: [(u16, &str); 2] = [(5000, "pass"), (5001, "block")];

fn upstream(address: impl ToString) -> Value {
    json!({ "name": address.to_string(), "address": address.to_string() })
}

fn both_actions(address: &str) -> Value {
    let rules: Vec<Value> = PORTS
        .iter()
        .map(|(port, action)| {
            rule(action, *port, json!({ "tc_action": action }), &[upstream(address)])
        })
        .collect();
    config(&rules)
}

/// Returns a lab with both actions for the first upstream, and a running arpd.
fn lab() -> (Lab, Arpd) {
    let lab = Lab::new();
    lab.apply(&both_actions("10.2.0.20"));
    let arpd = Arpd::start(&lab, "");
    lab.await_health("10.2.0.20", "up");
    (lab, arpd)
}

/// Checks that datagrams to both rules arrive.
#[track_caller]
fn expect_delivery(lab: &Lab, address: Ipv4Addr) {
    let sender = bind(&lab.client, CLIENTS[0], 0);
    for (port, _) in PORTS {
        let receiver = bind(&lab.upstream, address, port);
        sender.send_to(b"here", (RELAY, port)).expect("sent");
        assert_eq!(receive(&receiver).payload, b"here");
    }
}

#[test]
fn neighbours_are_managed_until_arpd_ends() {
    let (lab, arpd) = lab();
    let entry = lab.neighbour("10.2.0.20");
    assert!(entry.contains("managed") && entry.contains("proto 117"), "{entry}");
    assert_eq!(lab.status()["arpd"], true);
    expect_delivery(&lab, UPSTREAMS[0]);
    assert_eq!(lab.packets("pass", "10.2.0.20", "forwarded"), 1);
    assert!(arpd.end(libc::SIGTERM).success());
    let entry = lab.neighbour("10.2.0.20");
    assert!(!entry.contains("managed") && entry.contains("STALE"), "{entry}");
    until("the lease runs out", || lab.status()["arpd"] == false);
    expect_delivery(&lab, UPSTREAMS[0]);
}

#[test]
fn foreign_neighbour_entries_stay() {
    let lab = Lab::new();
    let mac = lab.upstream.mac_text("eth0");
    lab.relay.ip(&format!("neigh add 10.2.0.20 lladdr {mac} nud permanent dev up0"));
    lab.relay.ip("neigh add 10.2.0.99 managed dev up0");
    lab.apply(&both_actions("10.2.0.20"));
    let arpd = Arpd::start(&lab, "");
    lab.await_health("10.2.0.20", "up");
    arpd.end(libc::SIGTERM);
    assert!(lab.neighbour("10.2.0.20").contains("PERMANENT"));
    assert!(lab.neighbour("10.2.0.99").contains("managed"));
}

#[test]
fn entries_of_a_killed_arpd_are_taken_over() {
    let (lab, arpd) = lab();
    arpd.end(libc::SIGKILL);
    assert!(lab.neighbour("10.2.0.20").contains("managed"));
    lab.apply(&both_actions("10.2.0.21"));
    let _arpd = Arpd::start(&lab, "");
    until("the old one is let go", || !lab.neighbour("10.2.0.20").contains("managed"));
    until("the new one is kept", || lab.neighbour("10.2.0.21").contains("managed"));
}

#[test]
fn second_arpd_is_refused() {
    let (lab, arpd) = lab();
    lab.run("arpd").expect(75).says(&["another arpd"]);
    lab.run("arpd --once").expect(75);
    arpd.end(libc::SIGKILL);
    let _next = Arpd::start(&lab, "");
}

#[test]
fn once_resolves_and_ends() {
    let lab = Lab::new();
    lab.apply(&both_actions("10.2.0.20"));
    lab.relay.ip("neigh flush dev up0");
    let outcome = lab.run("arpd --once").expect(0);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    assert!(lab.neighbour("10.2.0.20").contains("managed"));
    assert_eq!(lab.next_hop("10.2.0.20")["mac"], lab.upstream.mac_text("eth0"));
    // no process renews a lease
    assert_eq!(lab.status()["arpd"], Value::Null);

    lab.upstream.ip("link set eth0 down");
    lab.relay.ip("neigh flush dev up0");
    lab.run("arpd --once").expect(1).says(&["error: 10.2.0.20 cannot be reached"]);
    lab.upstream.ip("link set eth0 up");

    let mut elsewhere = udplb(&lab.client, &lab.bpffs);
    let outcome = Outcome::of(elsewhere.args(["arpd", "--once"])).expect(1);
    outcome.says(&["the pins belong to another network namespace"]);
}

#[test]
fn arpd_follows_the_first_and_later_applies() {
    let lab = Lab::new();
    let arpd = Arpd::start(&lab, "");
    lab.apply(&both_actions("10.2.0.20"));
    lab.await_health("10.2.0.20", "up");
    lab.apply(&both_actions("10.2.0.21"));
    lab.await_health("10.2.0.21", "up");
    until("the old one is let go", || !lab.neighbour("10.2.0.20").contains("managed"));
    lab.run("rollback").expect(0);
    until("it is kept again", || lab.neighbour("10.2.0.20").contains("managed"));
    expect_delivery(&lab, UPSTREAMS[0]);
    // even if the pin directory is removed
    lab.run("detach --purge").expect(0);
    lab.apply(&both_actions("10.2.0.21"));
    lab.await_health("10.2.0.21", "up");
    lab.run("arpd").expect(75);
    assert!(arpd.end(libc::SIGTERM).success());
}

#[test]
fn silent_mac_change_is_found() {
    let (lab, arpd) = lab();
    lab.upstream.ip("link set eth0 address 02:00:00:00:00:aa");
    lab.await_hop("10.2.0.20", "mac", "02:00:00:00:00:aa");
    expect_delivery(&lab, UPSTREAMS[0]);
    assert!(arpd.log().contains("now at 02:00:00:00:00:aa"), "{}", arpd.log());
    assert!(!arpd.log().contains("down"), "{}", arpd.log());
}

#[test]
fn announced_mac_change_is_followed() {
    let (lab, arpd) = lab();
    lab.upstream.sysctl("net.ipv4.conf.eth0.arp_notify", "1");
    lab.upstream.ip("link set eth0 address 02:00:00:00:00:ab");
    lab.await_hop("10.2.0.20", "mac", "02:00:00:00:00:ab");
    expect_delivery(&lab, UPSTREAMS[0]);
    assert!(!arpd.log().contains("down"), "{}", arpd.log());
}

#[test]
fn own_mac_change_is_followed() {
    let (lab, _arpd) = lab();
    lab.relay.ip("link set up0 address 02:00:00:00:00:ac");
    until("the entry is kept again", || lab.neighbour("10.2.0.20").contains("managed"));
    lab.await_health("10.2.0.20", "up");
    expect_delivery(&lab, UPSTREAMS[0]);
}

#[test]
fn flushed_neighbours_are_resolved_again() {
    let (lab, _arpd) = lab();
    lab.relay.ip("neigh flush all");
    until("the entry is kept again", || lab.neighbour("10.2.0.20").contains("managed"));
    lab.await_hop("10.2.0.20", "state", "REACHABLE");
}

#[test]
fn carrier_and_interface_changes_are_followed() {
    let (lab, arpd) = lab();
    lab.upstream.ip("link set eth0 down");
    lab.await_health("10.2.0.20", "down");
    lab.run("status").expect(3);
    lab.upstream.ip("link set eth0 up");
    lab.await_health("10.2.0.20", "up");
    lab.run("status").expect(0);
    expect_delivery(&lab, UPSTREAMS[0]);
    assert!(arpd.log().contains("its interface is down"), "{}", arpd.log());
    assert!(arpd.log().contains("is up again"), "{}", arpd.log());

    lab.relay.ip("link set up0 down");
    lab.await_health("10.2.0.20", "down");
    lab.run("status").expect(3);
    lab.relay.ip("link set up0 up");
    lab.await_health("10.2.0.20", "up");
    expect_delivery(&lab, UPSTREAMS[0]);
}

#[test]
fn upstream_goes_down_and_up_again() {
    let (lab, arpd) = lab();
    lab.upstream.ip("addr del 10.2.0.20/24 dev eth0");
    lab.await_health("10.2.0.20", "down");
    let outcome = lab.run("status").expect(3);
    assert!(outcome.stdout.contains("pass: 10.2.0.20 is down since"), "{outcome:?}");
    lab.upstream.ip("addr add 10.2.0.20/24 dev eth0");
    lab.await_health("10.2.0.20", "up");
    let lines: Vec<String> = arpd.log().lines().map(String::from).collect();
    // one line each for the start, the failure and the recovery
    assert_eq!(lines.len(), 3, "{lines:#?}");
}

#[test]
fn gateway_change_is_followed() {
    let lab = Lab::new();
    let far = Ipv4Addr::new(10, 9, 0, 1);
    lab.upstream.ip("addr add 10.9.0.1/32 dev lo");
    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.20");
    lab.apply(&both_actions("10.9.0.1"));
    let arpd = Arpd::start(&lab, "");
    lab.await_health("10.9.0.1", "up");
    assert_eq!(lab.next_hop("10.9.0.1")["gateway"], "10.2.0.20");
    assert!(lab.neighbour("10.2.0.20").contains("managed"));
    expect_delivery(&lab, far);

    lab.relay.ip("route replace 10.9.0.0/24 via 10.2.0.21");
    lab.await_hop("10.9.0.1", "gateway", "10.2.0.21");
    lab.await_health("10.9.0.1", "up");
    expect_delivery(&lab, far);
    until("the old one is let go", || !lab.neighbour("10.2.0.20").contains("managed"));
    assert!(arpd.log().contains("via 10.2.0.21 dev up0, was via 10.2.0.20"), "{}", arpd.log());

    lab.relay.ip("route del 10.9.0.0/24");
    until("there is no route", || lab.next_hop("10.9.0.1") == Value::Null);
    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.20");
    lab.await_health("10.9.0.1", "up");
}

/// The path with a reachable gateway is used.
#[test]
fn live_gateway_of_two_is_used() {
    let lab = Lab::new();
    lab.upstream.ip("addr add 10.9.0.1/32 dev lo");
    lab.relay.ip("route add 10.9.0.0/24 nexthop via 10.2.0.20 nexthop via 10.2.0.21");
    lab.apply(&both_actions("10.9.0.1"));
    let _arpd = Arpd::start(&lab, "");
    lab.await_health("10.9.0.1", "up");
    let first = lab.next_hop("10.9.0.1")["gateway"].as_str().expect("a gateway").to_string();
    let second = if first == "10.2.0.20" { "10.2.0.21" } else { "10.2.0.20" };
    lab.upstream.ip(&format!("addr del {first}/24 dev eth0"));
    // removing the primary address removes the secondary ones of its subnet
    lab.upstream.ip(&format!("addr replace {second}/24 dev eth0"));
    lab.await_hop("10.9.0.1", "gateway", second);
    lab.await_health("10.9.0.1", "up");
    expect_delivery(&lab, Ipv4Addr::new(10, 9, 0, 1));
}

#[test]
fn gateway_of_the_other_family_is_resolved() {
    let lab = Lab::new();
    lab.upstream.ip("addr add 10.9.0.1/32 dev lo");
    lab.upstream.ip("addr add fe80::fe/64 dev eth0 nodad");
    lab.relay.ip("route add 10.9.0.0/24 via inet6 fe80::fe dev up0");
    lab.apply(&both_actions("10.9.0.1"));
    let _arpd = Arpd::start(&lab, "");
    lab.await_health("10.9.0.1", "up");
    assert_eq!(lab.next_hop("10.9.0.1")["gateway"], "fe80::fe");
    assert!(lab.neighbour("fe80::fe").contains("managed"));
    expect_delivery(&lab, Ipv4Addr::new(10, 9, 0, 1));
}

#[test]
fn recreated_interface_is_attached_again() {
    let (lab, arpd) = lab();
    lab.relay.ip("link del eth0");
    until("status says so", || lab.run("status").code == Some(3));
    lab.client.link("eth0", &lab.relay, "eth0", true);
    lab.relay.ip("addr add 10.1.0.1/24 dev eth0");
    for address in CLIENTS {
        lab.client.ip(&format!("addr add {address}/24 dev eth0"));
    }
    until("it is attached", || lab.filters("eth0").contains("udplb"));
    expect_delivery(&lab, UPSTREAMS[0]);
    lab.run("status").expect(0);
    assert!(arpd.log().contains("attaching generation 1 to eth0"), "{}", arpd.log());
}

/// Returns the number of times that arpd reattached the filter of an interface.
fn reattached(lab: &Lab, interface: &str) -> u64 {
    let interfaces = lab.status()["interfaces"].clone();
    let found =
        interfaces.as_array().expect("interfaces").iter().find(|it| it["interface"] == interface);
    found.expect("the interface")["reattached"].as_u64().expect("a number")
}

#[test]
fn removed_filter_is_put_back() {
    let mut lab = Lab::new();
    lab.hide_tcx(true);
    lab.apply(&both_actions("10.2.0.20"));
    let arpd = Arpd::start(&lab, "");
    lab.await_health("10.2.0.20", "up");
    // reattached on events, long before the next periodic check
    for (count, words) in [
        (1, "qdisc del dev eth0 clsact"),
        (2, "filter del dev eth0 ingress pref 100"),
        (3, "filter del dev eth0 ingress"),
    ] {
        lab.relay.tc(words);
        until("it is put back", || lab.filters("eth0").contains("udplb"));
        until("it is counted", || reattached(&lab, "eth0") == count);
        expect_delivery(&lab, UPSTREAMS[0]);
        lab.run("status").expect(0);
    }
    assert!(arpd.log().contains("eth0: udplb's filter was gone, and no detach took it"));
    let metrics = lab.run("metrics").expect(0).stdout;
    assert!(metrics.contains("udplb_reattached_total{interface=\"eth0\"} 3"), "{metrics}");
    // the count continues after a rollback; after a detach the filter is not reattached
    lab.run("detach").expect(0);
    arpd.signal(libc::SIGHUP);
    until("its neighbours are let go", || !lab.neighbour("10.2.0.20").contains("managed"));
    assert!(!lab.filters("eth0").contains("udplb"));
    lab.run("rollback").expect(0);
    lab.relay.tc("qdisc del dev eth0 clsact");
    until("it is put back", || lab.filters("eth0").contains("udplb"));
    until("it is counted", || reattached(&lab, "eth0") == 4);
}

/// Next hops of a detached interface are not tracked either.
#[test]
fn detached_interface_stays_detached() {
    let (lab, arpd) = lab();
    lab.run("detach -i eth0").expect(0);
    arpd.signal(libc::SIGHUP);
    until("its neighbours are let go", || !lab.neighbour("10.2.0.20").contains("managed"));
    assert!(!lab.filters("eth0").contains("udplb"));
}

/// Checks that no datagram of both rules is lost while arpd is killed and its lease expires.
fn check_killed(forwarding: bool) {
    let lab = Lab::new();
    let on = if forwarding { "1" } else { "0" };
    lab.relay.sysctl("net.ipv4.ip_forward", on);
    lab.apply(&both_actions("10.2.0.20"));
    let arpd = Arpd::start(&lab, "--lease 1");
    lab.await_health("10.2.0.20", "up");
    // otherwise the client gets an ICMP port unreachable
    let _here = bind(&lab.relay, RELAY, 5000);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let flows: Vec<_> = PORTS
            .iter()
            .map(|(port, _)| {
                let counted = count(bind(&lab.upstream, UPSTREAMS[0], *port));
                let sender = bind(&lab.client, CLIENTS[0], 0);
                let sent = scope.spawn(|| {
                    let sender = sender;
                    send_until(&stop, &sender, (RELAY, *port))
                });
                (sent, counted)
            })
            .collect();
        arpd.end(libc::SIGKILL);
        until("the lease runs out", || lab.status()["arpd"] == false);
        sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        for (sent, counted) in flows {
            assert_eq!(sent.join().expect("sent"), counted.join().expect("counted"));
        }
    });
    // the kernel has the neighbour, so every packet counts as forwarded
    let sent = lab.packets("pass", "10.2.0.20", "forwarded");
    assert_eq!(sent, lab.packets("pass", "10.2.0.20", "matched"), "{:#}", lab.status());
}

#[test]
fn killed_arpd_loses_nothing_with_forwarding() {
    check_killed(true);
}

#[test]
fn killed_arpd_loses_nothing_without_forwarding() {
    check_killed(false);
}

/// Returns a rule with two upstreams, selected by the source port: an even wire value selects the
/// first.
fn balanced(health: &str) -> Value {
    let options = json!({ "tc_action": "block", "health": health });
    config(&[rule("only", 5000, options, &UPSTREAMS.map(upstream))])
}

#[test]
fn dead_upstream_is_skipped_with_health_neighbour() {
    let lab = Lab::new();
    lab.apply(&balanced("neighbour"));
    let _arpd = Arpd::start(&lab, "");
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 5000));
    for label in ["10.2.0.20", "10.2.0.21"] {
        lab.await_health(label, "up");
    }
    // source port 60256 selects the second upstream
    let sender = bind(&lab.client, CLIENTS[0], 60256);
    let send = || assert_eq!(sender.send_to(b"flow", (RELAY, 5000)).expect("sent"), 4);
    send();
    receive(&receivers[1]);
    lab.upstream.ip("addr del 10.2.0.21/24 dev eth0");
    lab.await_health("10.2.0.21", "down");
    send();
    receive(&receivers[0]);
    expect_silence(&receivers[1]);
    // with all upstreams down, selection works as if all were up
    lab.upstream.ip("link set eth0 down");
    lab.await_health("10.2.0.20", "down");
    let before = lab.packets("only", "10.2.0.21", "matched");
    send();
    until("it is counted", || lab.packets("only", "10.2.0.21", "matched") > before);
    assert_eq!(lab.packets("only", "10.2.0.21", "matched"), before + 1);
}

/// The dead upstream has nearly all slots: its flows go to the remaining upstreams by weight, and none
/// is lost.
#[test]
fn flows_of_a_heavy_dead_upstream_are_spread() {
    const FLOWS: u16 = 400;
    let lab = Lab::new();
    lab.upstream.ip("addr add 10.2.0.22/24 dev eth0");
    let weighted =
        [("10.2.0.20", 1), ("10.2.0.21", 3), ("10.2.0.22", 1000)].map(|(address, weight)| {
            json!({ "name": address, "address": address, "port": 5000, "weight": weight })
        });
    let options = json!({ "tc_action": "block", "health": "neighbour", "hash": "maglev" });
    lab.apply(&config(&[rule("only", 5000, options, &weighted)]));
    let _arpd = Arpd::start(&lab, "");
    let addresses = [20, 21, 22].map(|host| Ipv4Addr::new(10, 2, 0, host));
    addresses.iter().for_each(|address| lab.await_health(&address.to_string(), "up"));
    let [light, heavier, dead] = addresses.map(|address| bind(&lab.upstream, address, 5000));
    lab.upstream.ip("addr del 10.2.0.22/24 dev eth0");
    lab.await_health("10.2.0.22", "down");
    let mut received = [0, 0];
    let left = [light, heavier];
    for port in 20_000..20_000 + FLOWS {
        bind(&lab.client, CLIENTS[0], port).send_to(b"flow", (RELAY, 5000)).expect("sent");
        received[receive_any(&left).0] += 1;
    }
    expect_silence(&dead);
    // a quarter, within five standard deviations of 8.7
    assert!((56..144).contains(&received[0]), "{received:?}");
}

#[test]
fn dead_upstream_is_not_skipped_by_default() {
    let lab = Lab::new();
    lab.apply(&balanced("off"));
    let _arpd = Arpd::start(&lab, "");
    lab.upstream.ip("addr del 10.2.0.21/24 dev eth0");
    lab.await_health("10.2.0.21", "down");
    let sender = bind(&lab.client, CLIENTS[0], 60256);
    sender.send_to(b"flow", (RELAY, 5000)).expect("sent");
    until("it is counted", || lab.packets("only", "10.2.0.21", "matched") > 0);
    assert_eq!(lab.packets("only", "10.2.0.21", "matched"), 1);
}

#[test]
fn changed_address_of_a_name_loses_no_packet() {
    let lab = Lab::new();
    lab.directory.write("hosts", "10.2.0.20 collector.test\n");
    let file = lab.write(&both_actions("collector.test"));
    let outcome = lab.with_hosts(&format!("apply {}", file.display())).output().expect("runs");
    assert!(outcome.status.success(), "{outcome:?}");
    let arpd = Arpd::spawn(&lab, lab.with_hosts("arpd --resolve-interval 1"));
    let old = count(bind(&lab.upstream, UPSTREAMS[0], 5001));
    let new = count(bind(&lab.upstream, UPSTREAMS[1], 5001));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let last = sender.try_clone().expect("a socket");
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sent = scope.spawn(|| send_until(&stop, &sender, (RELAY, 5001)));
        lab.directory.write("hosts", "10.2.0.21 collector.test\n");
        until("the new address serves", || arpd.log().contains("generation 1 -> 2"));
        sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        sent.join().expect("sent")
    });
    // the counter at the old address needs the final marker too
    let direct = bind(&lab.relay, Ipv4Addr::new(10, 2, 0, 1), 0);
    direct.send_to(b"that is all", (UPSTREAMS[0], 5001)).expect("sent");
    drop(last);
    let (old, new) = (old.join().expect("counted"), new.join().expect("counted"));
    assert_eq!(old + new, sent, "{old} to the old address, {new} to the new");
    assert!(old > 0 && new > 0, "{old} to the old address, {new} to the new");
    lab.await_health("collector.test", "up");

    lab.directory.write("hosts", "10.2.0.21 another.test\n");
    until("a failing answer is told", || arpd.log().contains("collector.test does not resolve"));
    expect_delivery(&lab, UPSTREAMS[1]);
    assert_eq!(lab.status()["generation"], 2);
}

#[test]
fn once_follows_names() {
    let lab = Lab::new();
    lab.directory.write("hosts", "10.2.0.20 collector.test\n");
    let file = lab.write(&both_actions("collector.test"));
    let run = |words: &str| Outcome::of(&mut lab.with_hosts(words));
    run(&format!("apply {}", file.display())).expect(0);
    run("arpd --once").expect(0);
    assert_eq!(lab.status()["generation"], 1);
    lab.directory.write("hosts", "10.2.0.21 collector.test\n");
    run("arpd --once").expect(0).says(&["collector.test is now 10.2.0.21: generation 1 -> 2"]);
    expect_delivery(&lab, UPSTREAMS[1]);
    lab.directory.write("hosts", "10.2.0.21 another.test\n");
    run("arpd --once").expect(1).says(&["collector.test does not resolve"]);
    expect_delivery(&lab, UPSTREAMS[1]);
}

/// A changed address of a name does not undo a rollback; a second rollback does.
#[test]
fn changed_name_after_rollback_stays_rolled_back() {
    let lab = Lab::new();
    lab.directory.write("hosts", "10.2.0.20 collector.test\n");
    let apply = |config: &Value| {
        let file = lab.write(config);
        let words = format!("apply {}", file.display());
        lab.with_hosts(&words).output().expect("the program runs").status.code()
    };
    assert_eq!(apply(&both_actions("collector.test")), Some(0));
    let left = balanced("off");
    assert_eq!(apply(&left), Some(0));
    lab.run("rollback").expect(0);
    let arpd = Arpd::spawn(&lab, lab.with_hosts("arpd --resolve-interval 1"));
    lab.directory.write("hosts", "10.2.0.21 collector.test\n");
    until("the new address serves", || arpd.log().contains("generation 1 -> 3"));
    assert_eq!(lab.status()["held"], 2);
    assert_eq!(apply(&left), Some(1));
    lab.run("rollback").expect(0);
    assert_eq!(lab.status()["generation"], 2);
}

/// All upstreams go up, or the log names the sysctl that prevents it.
#[test]
fn thousand_upstreams_on_one_link_go_up() {
    let lab = Lab::new();
    lab.upstream.ip("route add local 10.3.0.0/16 dev lo");
    lab.relay.ip("route add 10.3.0.0/16 dev up0");
    let addresses =
        (0..1000).map(|host| Ipv4Addr::new(10, 3, (host / 250) as u8, (host % 250 + 1) as u8));
    let upstreams: Vec<Value> = addresses.map(upstream).collect();
    lab.apply(&config(&[rule("all", 5000, json!({ "tc_action": "block" }), &upstreams)]));
    let arpd = Arpd::start(&lab, "");
    let limit = |name: &str| -> usize {
        let path = format!("/proc/sys/net/ipv4/neigh/default/{name}");
        let text = std::fs::read_to_string(path).expect("a sysctl of the first namespace");
        text.trim().parse().expect("a number")
    };
    if limit("gc_thresh2") < 1000 {
        until("the limit is told", || arpd.log().contains("net.ipv4.neigh.default.gc_thresh"));
    }
    // other tests use the same neighbour table
    if limit("gc_thresh3") > 2000 {
        until("all are up", || {
            let status = lab.status();
            let upstreams = status["rules"][0]["upstreams"].as_array().expect("upstreams").clone();
            upstreams.iter().all(|upstream| upstream["health"] == "up")
        });
    }
}

/// Returns a lab without forwarding, and an arpd that checks everything each second and whose netlink
/// requests can be made to fail.
fn faulty_lab(notify: Option<&std::path::Path>) -> (Lab, Arpd, Faults) {
    let lab = Lab::new();
    lab.relay.sysctl("net.ipv4.ip_forward", "0");
    lab.apply(&both_actions("10.2.0.20"));
    let mut command = lab.udplb("arpd --interval 1 --lease 2");
    if let Some(path) = notify {
        command.env("NOTIFY_SOCKET", path).env("WATCHDOG_USEC", "1000000");
    }
    let faults = Faults::new(&mut command);
    let arpd = Arpd::spawn(&lab, command);
    lab.await_health("10.2.0.20", "up");
    (lab, arpd, faults)
}

/// A failed netlink request, whichever it is, changes no next hop.
#[test]
fn one_failed_request_costs_no_packet() {
    let (lab, arpd, faults) = faulty_lab(None);
    for spared in 0..16 {
        faults.fail(spared, 1);
        until("a request fails", || faults.failed() == 1);
        for _ in 0..4 {
            expect_delivery(&lab, UPSTREAMS[0]);
            sleep(Duration::from_millis(50));
        }
        assert_eq!(lab.upstream_status("10.2.0.20")["health"], "up", "after {spared}");
    }
    until("the lease holds", || lab.status()["arpd"] == true);
    assert!(arpd.log().contains("connection ended"), "{}", arpd.log());
    assert!(!arpd.log().contains("no route"), "{}", arpd.log());
}

/// Without answers from the kernel arpd renews no lease and sends no watchdog notification.
#[test]
fn blind_arpd_lets_its_lease_run_out() {
    let directory = crate::common::lab::Directory::new();
    let path = directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_nonblocking(true).expect("a socket");
    let (lab, arpd, faults) = faulty_lab(Some(&path));
    let notes = || {
        let mut buffer = [0; 256];
        let mut notes = Vec::new();
        while let Ok(length) = socket.recv(&mut buffer) {
            notes.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        notes
    };
    faults.fail(0, i64::MAX);
    until("the lease runs out", || lab.status()["arpd"] == false);
    let told = notes();
    assert!(told.iter().any(|note| note.contains("no lease until these succeed")), "{told:?}");
    sleep(Duration::from_secs(1));
    assert!(!notes().iter().any(|note| note.contains("WATCHDOG")));
    expect_delivery(&lab, UPSTREAMS[0]);
    faults.fail(0, 0);
    until("the lease holds again", || lab.status()["arpd"] == true);
    until("it shows signs of life", || notes().iter().any(|note| note.contains("WATCHDOG")));
    lab.await_health("10.2.0.20", "up");
    assert!(!arpd.log().contains("no route"), "{}", arpd.log());
}

/// Notifications as a service manager receives them.
#[test]
fn arpd_notifies_the_service_manager() {
    let lab = Lab::new();
    lab.apply(&both_actions("10.2.0.20"));
    let path = lab.directory.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let mut command = lab.udplb("arpd");
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "1000000");
    let arpd = Arpd::spawn(&lab, command);
    let expect = |wanted: &str| {
        let mut buffer = [0; 256];
        for _ in 0..1000 {
            let length = match socket.recv(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                received => received.unwrap_or_else(|error| panic!("{wanted}: {error}")),
            };
            if String::from_utf8_lossy(&buffer[..length]).contains(wanted) {
                return;
            }
        }
        panic!("no {wanted} among a thousand");
    };
    expect("READY=1");
    expect("WATCHDOG=1");
    expect("WATCHDOG=1");
    lab.upstream.ip("link set eth0 down");
    expect("2 upstreams down");
    assert!(arpd.end(libc::SIGTERM).success());
    expect("STOPPING=1");
}

/// Runs arpd with the capabilities that the systemd units grant.
#[test]
fn three_capabilities_suffice_for_arpd() {
    let lab = Lab::new();
    lab.apply(&both_actions("10.2.0.20"));
    let mut command = lab.relay.command("setpriv");
    lock_any_memory(&mut command);
    let three = "-all,+bpf,+net_admin,+perfmon";
    command.args(["--bounding-set", three, "--inh-caps", three, "--securebits=+noroot"]);
    command.args(["--ambient-caps", three, "--", env!("CARGO_BIN_EXE_udplb"), "--pin-dir"]);
    command.arg(lab.bpffs.pins()).arg("arpd");
    let arpd = Arpd::spawn(&lab, command);
    lab.await_health("10.2.0.20", "up");
    assert_eq!(lab.status()["arpd"], true);
    lab.relay.ip("link del eth0");
    lab.client.link("eth0", &lab.relay, "eth0", true);
    until("it is attached again", || lab.filters("eth0").contains("udplb"));
    assert!(!arpd.log().contains("WARN"), "{}", arpd.log());
}
