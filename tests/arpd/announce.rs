//! Addresses that arpd keeps on the interfaces of `announce`.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, UPSTREAMS, config, rule, upstream};
use crate::common::net::{bind, receive};
use crate::common::service::{Arpd, until};

const VIP: &str = "10.99.0.1";
const VIP6: &str = "2001:db8:99::1";

/// Returns a lab with the interfaces of `announce`, and an address of somebody else on one of them.
fn lab() -> Lab {
    let lab = Lab::new();
    lab.add_ipv6();
    for interface in ["anycast0", "anycast1"] {
        add_interface(&lab, interface);
    }
    lab.relay.ip("addr add 10.99.0.99/32 dev anycast0");
    lab
}

/// Adds an interface in place of a dummy, which not every kernel has.
fn add_interface(lab: &Lab, name: &str) {
    lab.relay.ip(&format!("link add {name} type veth peer name peer-{name}"));
    for name in [name, &format!("peer-{name}")] {
        lab.relay.ip(&format!("link set {name} up"));
    }
}

/// Returns a configuration that announces an address of each family; `announce` adds to its fields.
fn announced(announce: &Value) -> Value {
    let of = |name: &str, address: &str, upstream: Value| {
        let mut rule = rule(name, 5000, json!({ "tc_action": "block" }), &[upstream]);
        rule["key"]["address"] = json!(address);
        rule
    };
    let ipv6 = json!({ "name": "two", "address": "2001:db8:2::20", "port": 6000 });
    let mut config = config(&[of("one", VIP, upstream(UPSTREAMS[0], 6000)), of("six", VIP6, ipv6)]);
    config["announce"] = json!({
        "interface": "anycast0", "last_resort": "anycast1", "hold_down": "2s", "settle": "100ms",
    });
    for (field, value) in announce.as_object().expect("fields") {
        config["announce"][field] = value.clone();
    }
    config
}

/// Returns the interfaces of `announce` that have an address.
fn places(lab: &Lab, address: &str) -> Vec<&'static str> {
    let has = |interface: &&str| {
        let shown = lab.relay.ip(&format!("-o addr show dev {interface}"));
        shown.contains(&format!(" {address}/"))
    };
    ["anycast0", "anycast1"].into_iter().filter(has).collect()
}

#[track_caller]
fn await_place(lab: &Lab, address: &str, wanted: &[&str]) {
    until(&format!("{address} is on {wanted:?}"), || places(lab, address) == wanted);
}

/// Returns state and reason of an address, as `announce` shows them.
fn shown(lab: &Lab, address: &str) -> (String, String) {
    let output = lab.run("announce -o json").expect(0).json();
    let all = output["announced"].as_array().expect("addresses").clone();
    let one = all.iter().find(|it| it["address"] == address).expect(address);
    let text = |field: &str| one[field].as_str().unwrap_or_default().to_string();
    (text("state"), text("reason"))
}

#[test]
fn a_sick_host_is_the_last_resort_until_it_has_been_well_for_a_while() {
    let lab = lab();
    lab.apply(&announced(&json!({})));
    assert_eq!(shown(&lab, VIP), ("withdrawn".into(), "arpd does not run".into()));
    lab.run("ready").expect(0);
    let arpd = Arpd::start(&lab, "");
    for address in [VIP, VIP6] {
        await_place(&lab, address, &["anycast0"]);
        assert_eq!(shown(&lab, address), ("well".into(), String::new()));
    }
    assert_eq!(places(&lab, "10.99.0.99"), ["anycast0"]);
    lab.run("drain one/10.2.0.20").expect(0);
    await_place(&lab, VIP, &["anycast1"]);
    assert_eq!(shown(&lab, VIP), ("sick".into(), "rule one: no upstream is up".into()));
    assert_eq!(places(&lab, VIP6), ["anycast0"], "its rule has an upstream");
    let outcome = lab.run("ready").expect(3);
    assert_eq!(outcome.stdout, "not ready: rule one: no upstream is up\n");
    lab.run("ready six").expect(0);
    lab.run("enable one/10.2.0.20").expect(0);
    let enabled = Instant::now();
    until("it is about to be well", || shown(&lab, VIP).1.starts_with("it has been well for"));
    await_place(&lab, VIP, &["anycast0"]);
    assert!(enabled.elapsed() >= Duration::from_secs(2), "{:?}", enabled.elapsed());
    let log = arpd.log();
    assert!(log.contains("10.99.0.1 is announced as the last resort: rule one: no"), "{log}");
    assert_eq!(places(&lab, "10.99.0.99"), ["anycast0"]);
}

#[test]
fn a_next_hop_that_is_silent_makes_the_host_sick() {
    let lab = lab();
    lab.apply(&announced(&json!({ "hold_down": "0s" })));
    let _arpd = Arpd::start(&lab, "--probe-interval 0.2");
    await_place(&lab, VIP, &["anycast0"]);
    lab.await_health("10.2.0.20", "up");
    lab.upstream.ip("addr del 10.2.0.20/24 dev eth0");
    lab.await_health("10.2.0.20", "down");
    await_place(&lab, VIP, &["anycast1"]);
    lab.upstream.ip("addr add 10.2.0.20/24 dev eth0");
    await_place(&lab, VIP, &["anycast0"]);
}

/// Fail static: packets are forwarded without arpd, so nothing is withdrawn.
#[test]
fn an_announcement_outlives_arpd() {
    let lab = lab();
    lab.apply(&announced(&json!({})));
    let arpd = Arpd::start(&lab, "");
    await_place(&lab, VIP, &["anycast0"]);
    arpd.end(libc::SIGTERM);
    let arpd = Arpd::start(&lab, "");
    lab.apply(&announced(&json!({ "hold_down": "3s" })));
    drop(arpd);
    assert_eq!(places(&lab, VIP), ["anycast0"]);
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 6000);
    lab.client.ip("route add 10.99.0.0/24 via 10.1.0.1");
    let sender = bind(&lab.client, CLIENTS[0], 7000);
    sender.send_to(b"without arpd", (VIP, 5000)).expect("sent");
    let datagram = receive(&receiver);
    assert_eq!(
        (&datagram.payload[..], datagram.from),
        (&b"without arpd"[..], "10.99.0.1:7000".parse().expect("an address"))
    );
}

/// Fail closed.
#[test]
fn with_expire_addresses_disappear_after_arpd() {
    let lab = lab();
    lab.apply(&announced(&json!({ "expire": true })));
    let arpd = Arpd::start(&lab, "--lease 4");
    await_place(&lab, VIP, &["anycast0"]);
    // longer than its lifetime
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(places(&lab, VIP), ["anycast0"]);
    arpd.end(libc::SIGKILL);
    for address in [VIP, VIP6] {
        await_place(&lab, address, &[]);
    }
    assert_eq!(places(&lab, "10.99.0.99"), ["anycast0"]);
    let _arpd = Arpd::start(&lab, "--lease 4");
    await_place(&lab, VIP, &["anycast0"]);
    lab.apply(&announced(&json!({})));
    until("it stays for ever", || {
        lab.relay.ip("-o addr show dev anycast0 to 10.99.0.1").contains("valid_lft forever")
    });
}

#[test]
fn withdrawn_addresses_stay_away_until_they_are_announced() {
    let lab = lab();
    lab.apply(&announced(&json!({})));
    let arpd = Arpd::start(&lab, "");
    await_place(&lab, VIP, &["anycast0"]);
    await_place(&lab, VIP6, &["anycast0"]);
    lab.run(&format!("withdraw {VIP}")).expect(0);
    assert_eq!(places(&lab, VIP), [""; 0]);
    assert_eq!(shown(&lab, VIP), ("withdrawn".into(), "by command".into()));
    let outcome = lab.run("ready one").expect(3);
    assert_eq!(outcome.stdout, "not ready: 10.99.0.1 is withdrawn by command\n");
    // neither a new generation nor a new arpd puts it back
    lab.apply(&announced(&json!({ "hold_down": "3s" })));
    drop(arpd);
    let arpd = Arpd::start(&lab, "");
    await_place(&lab, VIP6, &["anycast0"]);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(places(&lab, VIP), [""; 0]);
    lab.run(&format!("announce {VIP}")).expect(0);
    await_place(&lab, VIP, &["anycast0"]);
    // all, also without arpd
    drop(arpd);
    lab.run("withdraw --wait").expect(0);
    assert_eq!([places(&lab, VIP), places(&lab, VIP6)], [[""; 0]; 2]);
    assert_eq!(places(&lab, "10.99.0.99"), ["anycast0"]);
    let outcome = lab.run(&format!("announce {VIP}")).expect(1);
    outcome.says(&["all addresses are withdrawn; give them back with: udplb announce --all"]);
    lab.run("announce --all").expect(0);
    assert_eq!(lab.run("announce --all").expect(0).stdout, "unchanged\n");
    let _arpd = Arpd::start(&lab, "");
    await_place(&lab, VIP, &["anycast0"]);
    let outcome = lab.run("withdraw 10.99.0.99").expect(1);
    outcome.says(&["10.99.0.99 is not announced; announced are 10.99.0.1, 2001:db8:99::1"]);
}

/// Packets are forwarded while routers learn of the withdrawal.
#[test]
fn detach_withdraws_first_and_apply_announces_again() {
    let lab = lab();
    lab.apply(&announced(&json!({ "settle": "1s" })));
    let _arpd = Arpd::start(&lab, "--interval 3600");
    await_place(&lab, VIP, &["anycast0"]);
    await_place(&lab, VIP6, &["anycast0"]);
    let mut detach = lab.udplb("detach").spawn().expect("the program runs");
    until("it is withdrawn, and still attached", || {
        places(&lab, VIP).is_empty() && lab.filters("eth0").contains("udplb")
    });
    assert!(detach.wait().expect("it ends").success());
    assert!(!lab.filters("eth0").contains("udplb"));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!([places(&lab, VIP), places(&lab, VIP6)], [[""; 0]; 2]);
    lab.apply(&announced(&json!({ "settle": "1s" })));
    await_place(&lab, VIP, &["anycast0"]);
    await_place(&lab, VIP6, &["anycast0"]);
    lab.run("detach --purge").expect(0);
    assert_eq!([places(&lab, VIP), places(&lab, VIP6)], [[""; 0]; 2]);
    assert_eq!(places(&lab, "10.99.0.99"), ["anycast0"]);
}

#[test]
fn addresses_follow_the_file_and_the_interfaces() {
    let lab = lab();
    lab.relay.ip("link del anycast0");
    lab.relay.ip("addr add 2001:db8:99::1/128 dev up0");
    let outcome = lab.try_apply(&announced(&json!({})), "").expect(0);
    outcome.says(&["announce.interface: there is no interface anycast0"]);
    let arpd = Arpd::start(&lab, "");
    until("its absence is reported", || arpd.log().contains("anycast0 is missing: ip link add"));
    assert_eq!(shown(&lab, VIP).1, "there is no interface anycast0");
    let problems = lab.status()["problems"].clone();
    let problem =
        problems.as_array().expect("problems").iter().find(|it| it["id"] == "announce-interface");
    assert_eq!(problem.expect("a problem")["fix"], "ip link add anycast0 up type dummy");
    assert_eq!(shown(&lab, VIP6).1, "up0 has it");
    add_interface(&lab, "anycast0");
    await_place(&lab, VIP, &["anycast0"]);
    assert_eq!(places(&lab, VIP6), [""; 0], "it is this host's own");
    // put there by others, it is left alone
    lab.relay.ip("addr del 10.99.0.1/32 dev anycast0");
    until("it is put back", || places(&lab, VIP) == ["anycast0"]);
    let mut other = announced(&json!({ "interface": "anycast1" }));
    other["announce"].as_object_mut().expect("a map").remove("last_resort");
    lab.apply(&other);
    await_place(&lab, VIP, &["anycast1"]);
    let mut without = announced(&json!({}));
    without.as_object_mut().expect("a map").remove("announce");
    lab.apply(&without);
    await_place(&lab, VIP, &[]);
    lab.run("withdraw 10.99.0.1").expect(1).says(&["the configuration has no `announce`"]);
}

/// The digests of hosts with one file are equal, whatever their generations; a drain on one differs.
#[test]
fn digests_tell_hosts_that_choose_differently() {
    let labs = [lab(), lab()];
    let digest = |lab: &Lab| lab.run("list --digest").expect(0).stdout;
    let balanced = |upstreams: &[Value]| {
        let rule = rule("dns", 53, json!({ "tc_action": "block", "hash": "maglev" }), upstreams);
        config(&[rule])
    };
    let both = balanced(&UPSTREAMS.map(|address| upstream(address, 6000)));
    labs[1].apply(&balanced(&[upstream(UPSTREAMS[0], 6000)]));
    for lab in &labs {
        lab.apply(&both);
    }
    let equal = digest(&labs[0]);
    assert_eq!(equal, digest(&labs[1]));
    assert_eq!(equal.lines().count(), 2, "{equal}");
    let print = labs[0].run("drain dns/10.2.0.21 --print").expect(0).stdout;
    assert_eq!(digest(&labs[0]), equal, "it changes nothing");
    labs[0].run("drain dns/10.2.0.21").expect(0);
    assert_ne!(digest(&labs[0]), equal);
    // the printed lines in the file have the same effect
    let mut file = both.clone();
    let lines: Vec<Value> = serde_yaml::from_str(&print).expect("YAML");
    assert_eq!(file["rules"][0]["upstream"][1]["address"], lines[0]["address"]);
    file["rules"][0]["upstream"][1] = lines[0].clone();
    labs[1].apply(&file);
    assert_eq!(digest(&labs[0]), digest(&labs[1]));
}
