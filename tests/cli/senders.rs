//! `udplb senders`, its metrics, and the tables over apply and rollback.

use std::net::{IpAddr, UdpSocket};

use serde_json::{Value, json};

use crate::common::lab::{Lab, Net, V4, V6, config, to_port};
use crate::common::net::{bind, receive};
use crate::common::service::until;

/// Ports of the rules: for all, and for the first client only.
const OPEN: u16 = 53;
const CLOSED: u16 = 54;

fn name(net: &Net, port: u16) -> String {
    let family = if net.is_ipv6() { 6 } else { 4 };
    format!("{}{family}", if port == OPEN { "open" } else { "closed" })
}

/// Returns the rules of both families; those for all have room for a number of senders.
fn rules(senders: u32) -> Vec<Value> {
    let rule = |net: &Net, port, senders| {
        let upstream = json!({ "address": net.upstreams[0] });
        let options = json!({ "tc_action": "block", "source": "preserve", "senders": senders });
        net.rule(&name(net, port), port, options, &[upstream])
    };
    let closed = |net: &Net| {
        let mut rule = rule(net, CLOSED, 16);
        rule["key"]["from"] = json!([net.clients[0]]);
        rule
    };
    [V4, V6].iter().flat_map(|net| [rule(net, OPEN, senders), closed(net)]).collect()
}

/// Returns state and packets of a sender, if it is listed.
fn listed(lab: &Lab, rule: &str, sender: IpAddr) -> Option<(Value, Value)> {
    let output = lab.run(&format!("senders {rule} -o json")).expect(0).json();
    let senders = output["senders"].as_array().expect("senders").clone();
    assert_eq!(output["count"], senders.len());
    let mut senders = senders.into_iter().filter(|it| it["sender"] == json!(sender));
    senders.next().map(|it| (it["state"].clone(), it["packets"].clone()))
}

fn expect_listed(lab: &Lab, net: &Net, port: u16, client: usize, expected: (&str, u64)) {
    let (state, packets) = expected;
    let expected = Some((json!(state), json!(packets)));
    let (rule, sender) = (name(net, port), net.clients[client]);
    until(&format!("{sender} of {rule}"), || listed(lab, &rule, sender) == expected);
}

/// Sends packets that the upstream gets.
fn send(lab: &Lab, net: &Net, (client, port): (usize, u16), server: &UdpSocket, packets: u64) {
    let socket = bind(&lab.client, net.clients[client], 0);
    for _ in 0..packets {
        socket.send_to(b"a message", (net.key, port)).expect("sent");
        assert_eq!(receive(server).payload, b"a message");
    }
}

#[test]
fn senders_are_listed_and_outlive_generations() {
    let lab = Lab::dual(true, true);
    let apply = |rules: &[Value]| {
        lab.apply(&json!({ "version": 1, "interfaces": ["eth0"], "rules": rules }))
    };
    apply(&rules(64));
    let servers =
        [V4, V6].map(|net| [OPEN, CLOSED].map(|port| bind(&lab.upstream, net.upstreams[0], port)));
    for (net, [open, closed]) in [V4, V6].iter().zip(&servers) {
        send(&lab, net, (0, OPEN), open, 3);
        send(&lab, net, (1, OPEN), open, 1);
        send(&lab, net, (0, CLOSED), closed, 2);
        let stranger = bind(&lab.client, net.clients[1], 0);
        stranger.send_to(b"nobody takes it", (net.key, CLOSED)).expect("sent");
        expect_listed(&lab, net, OPEN, 0, ("new", 3));
        expect_listed(&lab, net, OPEN, 1, ("new", 1));
        expect_listed(&lab, net, CLOSED, 0, ("new", 2));
        expect_listed(&lab, net, CLOSED, 1, ("refused", 1));
    }
    // another rule before them, and back
    let upstream = json!({ "address": V4.upstreams[0] });
    let other = V4.rule("a", 7000, json!({ "tc_action": "block", "senders": 16 }), &[upstream]);
    apply(&[vec![other], rules(64)].concat());
    for (net, [open, _]) in [V4, V6].iter().zip(&servers) {
        expect_listed(&lab, net, OPEN, 0, ("new", 3));
        send(&lab, net, (0, OPEN), open, 1);
    }
    lab.run("rollback").expect(0);
    for (net, [open, _]) in [V4, V6].iter().zip(&servers) {
        expect_listed(&lab, net, OPEN, 0, ("new", 4));
        expect_listed(&lab, net, CLOSED, 1, ("refused", 1));
        send(&lab, net, (0, OPEN), open, 1);
        expect_listed(&lab, net, OPEN, 0, ("new", 5));
    }
    // a table of another size begins anew, the others stay
    apply(&rules(100));
    for net in [V4, V6] {
        assert_eq!(listed(&lab, &name(&net, OPEN), net.clients[0]), None);
        expect_listed(&lab, &net, CLOSED, 0, ("new", 2));
    }
    let metrics = lab.run("metrics").expect(0).stdout;
    for line in [
        "udplb_senders{rule=\"closed4\",state=\"new\"} 1",
        "udplb_senders{rule=\"closed6\",state=\"refused\"} 1",
        "udplb_senders{rule=\"closed6\",state=\"silent\"} 0",
        "udplb_senders{rule=\"open4\",state=\"active\"} 0",
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line}: {metrics}");
    }
    assert!(!metrics.contains("udplb_sender_silence_seconds{"), "nobody is known: {metrics}");
    let table = lab.run("senders closed4 --sort packets").expect(0).stdout;
    let words: Vec<Vec<&str>> = table.lines().map(|it| it.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["RULE", "SENDER", "STATE", "PACKETS", "BYTES", "FIRST", "LAST"]);
    assert_eq!(words[1][..5], ["closed4", "10.1.0.20", "new", "2", "102"]);
    assert_eq!(words[2][..4], ["closed4", "10.1.0.21", "refused", "1"]);
    // nobody was heard for long
    assert_eq!(lab.run("senders --silent 1s -o json").expect(0).json()["count"], 0);
}

#[test]
fn rules_that_count_no_senders_are_named() {
    let lab = Lab::new();
    lab.run("senders").expect(3);
    let mut counting = rules(64).swap_remove(0);
    counting["name"] = json!("counting");
    lab.apply(&config(&[counting, to_port(7009)["rules"][0].clone()]));
    let other = to_port(7009)["rules"][0]["name"].as_str().expect("a name").to_string();
    lab.run("senders").expect(0);
    let none = "does not count its senders; set `options.senders` to their number and apply";
    lab.run(&format!("senders {other}")).expect(1).says(&[none]);
    lab.run("senders nowhere").expect(1).says(&["there is no rule `nowhere`"]);
    lab.run("senders --silent 5").expect(64).says(&["`5` is not a duration"]);
    lab.run("senders --sort name").expect(64);
    lab.apply(&to_port(7009));
    lab.run("senders").expect(1).says(&["no rule counts its senders"]);
}
