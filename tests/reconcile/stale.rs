//! Decisions that a CPU remembers, under traffic: none is used for a packet that was sent after a change has
//! ended, or, where nobody tells the program of it, after the documented time.

use std::thread;

use serde_json::{Value, json};

use crate::common::lab::{Lab, UPSTREAMS, config, rule};
use crate::common::net::bind;
use crate::common::numbered::{self, AGED, Flow, PORT};

/// Runs `check` while datagrams are sent to the relay, and received at the upstreams.
fn under_traffic(lab: &Lab, check: impl FnOnce(&Flow)) {
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7001));
    numbered::under_traffic(lab, receivers, check);
}

fn to(places: &[usize]) -> Value {
    let upstream = |place: &usize| {
        let name = format!("u{place}");
        json!({ "name": name, "address": UPSTREAMS[*place], "port": 7001 })
    };
    let upstreams: Vec<Value> = places.iter().map(upstream).collect();
    let options = json!({ "tc_action": "block", "strategy": "random" });
    config(&[rule("only", PORT, options, &upstreams)])
}

#[test]
fn new_file_and_rollback_are_followed() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&to(&[0]));
        under_traffic(&lab, |flow| {
            flow.expect_only([true, false]);
            lab.apply(&to(&[1]));
            flow.expect_only([false, true]);
            lab.run("rollback").expect(0);
            flow.expect_only([true, false]);
        });
    }
}

#[test]
fn drained_and_enabled_upstreams_are_followed() {
    let lab = Lab::new();
    lab.apply(&to(&[0, 1]));
    under_traffic(&lab, |flow| {
        flow.expect_only([true, true]);
        lab.run("drain only/u0").expect(0);
        flow.expect_only([false, true]);
        lab.run("enable only/u0").expect(0);
        flow.expect_only([true, true]);
        lab.run("drain only/u1").expect(0);
        flow.expect_only([true, false]);
    });
}

/// Nobody tells the program: without arpd, next hops are asked for again ten times a second.
#[test]
fn routes_and_neighbours_are_followed_without_arpd() {
    let lab = Lab::new();
    lab.apply(&to(&[0]));
    under_traffic(&lab, |flow| {
        flow.expect_only([true, false]);
        lab.relay.ip(&format!("route add blackhole {}/32", UPSTREAMS[0]));
        thread::sleep(AGED);
        flow.expect_only([false, false]);
        lab.relay.ip(&format!("route del blackhole {}/32", UPSTREAMS[0]));
        flow.expect_only([true, false]);
        let elsewhere = "lladdr 02:00:00:00:00:77 dev up0 nud permanent";
        lab.relay.ip(&format!("neigh replace {} {elsewhere}", UPSTREAMS[0]));
        thread::sleep(AGED);
        flow.expect_only([false, false]);
    });
}

/// A trace sees each packet, those of rules and those of nobody.
#[test]
fn trace_sees_packets_that_were_on_the_fast_path() {
    let lab = Lab::new();
    lab.apply(&to(&[0]));
    under_traffic(&lab, |flow| {
        flow.expect_only([true, false]);
        let seen = lab.run("trace -c 200").expect(0).stdout;
        assert_eq!(seen.matches("forwarded").count(), 200, "{seen}");
        flow.expect_only([true, false]);
    });
}
