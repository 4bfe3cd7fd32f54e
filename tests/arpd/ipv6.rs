//! `udplb arpd` with IPv6, links without MAC addresses, and egress addresses.

use serde_json::{Value, json};

use crate::common::lab::{Lab, config, rule};
use crate::common::service::{Arpd, until};
use crate::common::tun::Tun;

const KEY: &str = "2001:db8:1::1";

fn upstream(address: &str) -> Value {
    json!({ "name": address, "address": address })
}

/// Returns a configuration with a rule for each key and one upstream.
fn to(keys: &[&str], address: &str) -> Value {
    let rule = |key: &&str| {
        let mut rule = rule(
            key,
            5000,
            json!({ "tc_action": "block", "source": "egress" }),
            &[upstream(address)],
        );
        rule["key"]["address"] = json!(key);
        rule
    };
    config(&keys.iter().map(rule).collect::<Vec<_>>())
}

/// Returns the active generation.
fn generation(lab: &Lab) -> u64 {
    lab.status()["generation"].as_u64().expect("a generation")
}

#[test]
fn silent_neighbour_goes_down() {
    let lab = Lab::dual(true, true);
    lab.apply(&to(&[KEY], "2001:db8:2::20"));
    let arpd = Arpd::start(&lab, "");
    lab.await_health("2001:db8:2::20", "up");
    let entry = lab.neighbour("2001:db8:2::20");
    assert!(entry.contains("managed") && entry.contains("proto 117"), "{entry}");
    assert_eq!(lab.next_hop("2001:db8:2::20")["mac"], lab.upstream.mac_text("eth0"));

    lab.relay.ip("-6 neigh flush all");
    until("the entry is kept again", || lab.neighbour("2001:db8:2::20").contains("managed"));
    lab.await_health("2001:db8:2::20", "up");

    lab.upstream.ip("link set eth0 address 02:00:00:00:00:aa");
    lab.await_hop("2001:db8:2::20", "mac", "02:00:00:00:00:aa");
    assert!(!arpd.log().contains("down"), "{}", arpd.log());

    lab.upstream.ip("addr del 2001:db8:2::20/64 dev eth0");
    lab.await_health("2001:db8:2::20", "down");
    lab.upstream.ip("addr add 2001:db8:2::20/64 dev eth0 nodad");
    lab.await_health("2001:db8:2::20", "up");
    assert!(arpd.end(libc::SIGTERM).success());
    assert!(!lab.neighbour("2001:db8:2::20").contains("managed"));
}

#[test]
fn gateway_serves_several_upstreams() {
    let lab = Lab::dual(true, true);
    let far = "2001:db8:9::1";
    lab.relay.ip("-6 route add 2001:db8:9::/64 via 2001:db8:2::20");
    lab.apply(&to(&[KEY], far));
    let arpd = Arpd::start(&lab, "");
    lab.await_health(far, "up");
    assert_eq!(lab.next_hop(far)["gateway"], "2001:db8:2::20");
    lab.relay.ip("-6 route replace 2001:db8:9::/64 via fe80::20 dev up0");
    lab.await_hop(far, "gateway", "fe80::20");
    lab.await_health(far, "up");
    until("the old one is let go", || !lab.neighbour("2001:db8:2::20").contains("managed"));
    assert!(arpd.log().contains("via fe80::20 dev up0, was via 2001:db8:2::20"), "{}", arpd.log());
    lab.relay.ip("-6 rule add pref 100 to 2001:db8:9::/64 blackhole");
    until("there is no route", || lab.next_hop(far) == Value::Null);
    lab.relay.ip("-6 rule del pref 100");
    lab.await_health(far, "up");
}

#[test]
fn link_local_upstream_goes_up() {
    let lab = Lab::dual(true, true);
    lab.apply(&to(&[KEY], "fe80::20%up0"));
    let _arpd = Arpd::start(&lab, "");
    lab.await_health("fe80::20%up0", "up");
    let hop = lab.next_hop("fe80::20%up0");
    assert_eq!((&hop["interface"], &hop["gateway"]), (&json!("up0"), &json!("fe80::20")));
    assert_eq!(hop["egress"], "fe80::1");
    // the interface is removed and created again with another index
    lab.relay.ip("link del up0");
    lab.await_health("fe80::20%up0", "down");
    lab.relay.link("up0", &lab.upstream, "eth0", true);
    lab.relay.ip("addr add fe80::1/64 dev up0 nodad");
    lab.upstream.ip("addr add fe80::20/64 dev eth0 nodad");
    lab.await_health("fe80::20%up0", "up");
}

/// Tests both families.
#[test]
fn egress_address_change_is_followed() {
    let lab = Lab::dual(true, true);
    lab.relay.sysctl("net.ipv4.conf.up0.promote_secondaries", "1");
    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.20");
    for (key, address, old, new) in [
        ("10.1.0.1", "10.9.0.1", "10.2.0.1/24", "10.2.0.7/24"),
        (KEY, "2001:db8:2::20", "2001:db8:2::1/64", "2001:db8:2::7/64"),
    ] {
        let ip = |text: &str| text.split('/').next().expect("an address").to_string();
        lab.apply(&to(&[key], address));
        let _arpd = Arpd::start(&lab, "");
        lab.await_health(address, "up");
        assert_eq!(lab.next_hop(address)["egress"], ip(old));
        lab.relay.ip(&format!("addr add {new} dev up0"));
        lab.relay.ip(&format!("addr del {old} dev up0"));
        lab.await_hop(address, "egress", &ip(new));
        lab.await_health(address, "up");
    }
}

#[test]
fn name_resolves_in_the_family_of_its_rule() {
    let lab = Lab::dual(true, true);
    let hosts = |text: &str| lab.directory.write("hosts", text);
    hosts("10.2.0.20 both.test\n2001:db8:2::20 both.test\n");
    let file = lab.write(&to(&["10.1.0.1", KEY], "both.test"));
    let outcome = lab.with_hosts(&format!("apply {}", file.display())).output().expect("runs");
    assert!(outcome.status.success(), "{outcome:?}");
    let arpd = Arpd::spawn(&lab, lab.with_hosts("arpd --resolve-interval 1"));
    let addresses = || {
        let status = lab.status();
        let rules = status["rules"].as_array().expect("rules");
        let of = |rule: &Value| rule["upstreams"][0]["address"].as_str().expect("text").to_string();
        rules.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(addresses(), ["10.2.0.20", "2001:db8:2::20"]);
    hosts("10.2.0.20 both.test\n2001:db8:2::21 both.test\n");
    until("the new address serves", || arpd.log().contains("generation 1 -> 2"));
    assert_eq!(addresses(), ["10.2.0.20", "2001:db8:2::21"]);
    hosts("10.2.0.20 both.test\n");
    until("a failing answer is told", || arpd.log().contains("both.test does not resolve"));
    assert_eq!(generation(&lab), 2);
}

/// Addresses of other interfaces, link-local addresses and failures change nothing.
#[test]
fn key_any_follows_interface_addresses() {
    let lab = Lab::dual(true, true);
    let any = to(&["any"], "2001:db8:2::20");
    lab.apply(&any);
    let arpd = Arpd::start(&lab, "");
    lab.await_health("2001:db8:2::20", "up");
    lab.relay.ip("addr add 2001:db8:7::1/64 dev up0 nodad");
    lab.relay.ip("addr add fe80::7/64 dev eth0 nodad");
    lab.relay.ip("addr add 10.1.0.7/24 dev eth0");
    lab.relay.ip("addr add 2001:db8:1::7/64 dev eth0 nodad");
    until("it is followed", || arpd.log().contains("2001:db8:1::7: generation"));
    let followed = generation(&lab);
    // nothing remains to do for apply
    assert_eq!(lab.apply(&any)["changed"], false);
    lab.relay.ip("addr del 2001:db8:1::7/64 dev eth0");
    until("it is followed back", || generation(&lab) > followed);
    assert_eq!(lab.apply(&any)["changed"], false);
    assert!(!arpd.log().contains("2001:db8:7::1"), "{}", arpd.log());
    assert!(!arpd.log().contains("fe80"), "{}", arpd.log());

    // without arpd, apply updates the addresses
    assert!(arpd.end(libc::SIGTERM).success());
    lab.relay.ip("addr add 2001:db8:1::8/64 dev eth0 nodad");
    assert_eq!(lab.apply(&any)["changed"], true);
}

/// After a rollback the held generation stays held although the addresses have changed, and detached
/// interfaces stay detached.
#[test]
fn key_any_after_rollback_or_detach_stays() {
    let lab = Lab::dual(true, true);
    lab.apply(&to(&[KEY], "2001:db8:2::20"));
    let left = to(&["any"], "2001:db8:2::20");
    lab.apply(&left);
    lab.run("rollback").expect(0);
    lab.relay.ip("addr add 2001:db8:1::7/64 dev eth0 nodad");
    lab.try_apply(&left, "").expect(1).says(&["held since"]);
    lab.try_apply(&left, "--force").expect(0);
    let arpd = Arpd::start(&lab, "");
    lab.run("detach").expect(0);
    let before = generation(&lab);
    lab.relay.ip("addr add 2001:db8:1::8/64 dev eth0 nodad");
    lab.relay.ip("addr del 2001:db8:1::7/64 dev eth0");
    arpd.signal(libc::SIGHUP);
    until("its neighbours are let go", || !lab.neighbour("2001:db8:2::20").contains("managed"));
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!((generation(&lab), lab.filters("eth0").as_str()), (before, ""));
}

/// One of two interfaces is detached: address changes of the other are followed.
#[test]
fn key_any_skips_a_detached_interface() {
    let lab = Lab::dual(true, true);
    let mut any = to(&["any"], "2001:db8:2::20");
    any["interfaces"] = json!(["eth0", "up0"]);
    lab.apply(&any);
    let arpd = Arpd::start(&lab, "");
    lab.run("detach -i up0").expect(0);
    lab.relay.ip("addr add 2001:db8:1::7/64 dev eth0 nodad");
    until("it is followed", || arpd.log().contains("2001:db8:1::7"));
    assert_eq!(lab.filters("up0"), "");
    assert!(lab.filters("eth0").contains("udplb"));
}

#[test]
fn link_without_mac_addresses_goes_up_and_down() {
    let lab = Lab::dual(true, true);
    let tun = Tun::new(&lab.relay, "tun0");
    lab.relay.ip("addr add 10.4.0.1/24 dev tun0");
    lab.apply(&to(&["10.1.0.1"], "10.4.0.9"));
    let _arpd = Arpd::start(&lab, "");
    lab.await_health("10.4.0.9", "up");
    let hop = lab.next_hop("10.4.0.9");
    assert_eq!((&hop["interface"], &hop["egress"]), (&json!("tun0"), &json!("10.4.0.1")));
    assert_eq!(hop["mac"], Value::Null);
    drop(tun);
    lab.await_health("10.4.0.9", "down");
    let _tun = Tun::new(&lab.relay, "tun0");
    lab.relay.ip("addr add 10.4.0.1/24 dev tun0");
    lab.await_health("10.4.0.9", "up");
}

/// Mirrors and drained upstreams are tracked too, although no flow selects them.
#[test]
fn mirrors_and_drained_upstreams_are_tracked() {
    let lab = Lab::dual(true, true);
    let mut config = to(&[KEY], "2001:db8:2::20");
    config["rules"][0]["upstream"][0]["state"] = json!("drained");
    config["rules"][0]["mirror"] = json!([upstream("2001:db8:2::21")]);
    lab.apply(&config);
    let _arpd = Arpd::start(&lab, "");
    for address in ["2001:db8:2::20", "2001:db8:2::21"] {
        until("it is kept", || lab.neighbour(address).contains("managed"));
        until("it answers", || lab.neighbour(address).contains("REACHABLE"));
    }
}
