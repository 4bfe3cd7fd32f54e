//! Senders that keep their upstream: `sticky`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};
use udplb::config::{Action, Hash, Key, Ports, Reply, Source, Strategy};
use udplb::desired::{Desired, Rule, RuleIds, Upstream};

use crate::answers::{CLIENTS, REFUSED, VIPS, datagram, destination, icmp_error, ip6, run};
use crate::common::lab::{Lab, V4, V6};
use crate::common::net::{bind, receive_any};
use crate::forge::{Checksum, Forged, fragments};
use crate::program::{Context, FLOWS};
use crate::testbed::{NEAR, NEAR_MAC, REDIRECT, RELAY_MAC, Testbed};

/// Upstreams of each family; the first one has a neighbour's MAC address of its own.
const UPSTREAMS: [[IpAddr; 3]; 2] = [
    [
        IpAddr::V4(NEAR),
        IpAddr::V4(Ipv4Addr::new(10, 0, 2, 254)),
        IpAddr::V4(Ipv4Addr::new(10, 0, 3, 9)),
    ],
    [
        ip6([0xfd00, 2, 0, 0, 0, 0, 0, 2]),
        ip6([0xfd00, 2, 0, 0, 0, 0, 0, 0xfe]),
        ip6([0xfd00, 3, 0, 0, 0, 0, 0, 9]),
    ],
];

/// Returns a rule for port 53 of each family, with some of its upstreams.
fn rules(places: &[usize]) -> Vec<Rule> {
    let of = |family: usize| {
        let key = Key::new(VIPS[family], vec![Ports { first: 53, last: 53 }]);
        let upstreams = places.iter().map(|place| Upstream::new(UPSTREAMS[family][*place], None));
        Rule {
            action: Action::Block,
            source: Source::Preserve,
            sticky: true,
            ..Rule::new(format!("sticky{family}"), key, upstreams.collect())
        }
    };
    vec![of(0), of(1)]
}

fn configure(testbed: &Testbed<'_>, rules: Vec<Rule>) -> Vec<RuleIds> {
    testbed.program.reconfigure(&Desired { rules, ..Desired::default() }, &BTreeMap::new())
}

fn packet(family: usize, from: u16) -> Forged {
    let mut packet = Forged::between(RELAY_MAC, CLIENTS[family], VIPS[family], 53);
    packet.udp.source = from;
    packet
}

/// Sends a packet of each of some senders; returns the upstreams that they reach, by their places.
fn sent_to(testbed: &Testbed<'_>, family: usize, senders: std::ops::Range<u16>) -> Vec<usize> {
    let place = |from| {
        let (gone, counted) = run(testbed, &packet(family, from));
        assert_eq!(gone.action, REDIRECT, "{counted:?}");
        let upstream = destination(&gone.frame);
        UPSTREAMS[family].iter().position(|it| *it == upstream).expect("one of them")
    };
    senders.map(place).collect()
}

#[test]
fn senders_stay_when_the_list_changes() {
    Testbed::with(|testbed| {
        for family in 0..2 {
            testbed.program.clear_flows();
            configure(testbed, rules(&[0]));
            assert_eq!(sent_to(testbed, family, 1000..1020), [0; 20]);
            let ids = configure(testbed, rules(&[2, 0, 1]));
            assert_eq!(sent_to(testbed, family, 1000..1020), [0; 20], "others were added");
            let new: BTreeSet<usize> = sent_to(testbed, family, 1020..1060).into_iter().collect();
            assert_eq!(new, [0, 1, 2].into(), "new senders go to all");
            let mut weighted = rules(&[2, 0, 1]);
            weighted[family].upstreams[0].weight = 3;
            configure(testbed, weighted);
            assert_eq!(sent_to(testbed, family, 1000..1020), [0; 20], "another weight");
            testbed.program.override_state(ids[family].upstreams[1], true);
            assert_eq!(sent_to(testbed, family, 1000..1020), [0; 20], "drained");
            assert!(!sent_to(testbed, family, 1060..1100).contains(&0), "new ones go elsewhere");
            configure(testbed, rules(&[2, 1]));
            let moved = sent_to(testbed, family, 1000..1020);
            assert!(!moved.contains(&0), "removed");
            configure(testbed, rules(&[0, 1, 2]));
            assert_eq!(sent_to(testbed, family, 1000..1020), moved, "it came back");
        }
    });
}

/// With `random` each sender stays where its first packet went.
#[test]
fn senders_stay_where_chance_sent_them() {
    Testbed::with(|testbed| {
        let random = |rule: Rule| Rule { strategy: Strategy::Random, hash: Hash::Maglev, ..rule };
        configure(testbed, rules(&[0, 1, 2]).into_iter().map(random).collect());
        let first = sent_to(testbed, 0, 1000..1030);
        assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 3);
        assert_eq!(sent_to(testbed, 0, 1000..1030), first);
    });
}

/// A sender that speaks again after two seconds is kept for 120 seconds, another one for 30.
#[test]
fn sticky_flows_expire() {
    Testbed::with(|testbed| {
        configure(testbed, rules(&[0]));
        sent_to(testbed, 0, 1000..1020);
        testbed.program.age_flows(3);
        sent_to(testbed, 0, 1000..1010);
        configure(testbed, rules(&[1]));
        configure(testbed, rules(&[0, 1]));
        testbed.program.age_flows(29);
        assert_eq!(testbed.program.flow_states().iter().filter(|it| **it == 3).count(), 10);
        assert_eq!(sent_to(testbed, 0, 1000..1010), [0; 10]);
        assert!(sent_to(testbed, 0, 1010..1020).contains(&1), "these have expired");
        testbed.program.age_flows(119);
        assert_eq!(sent_to(testbed, 0, 1000..1010), [0; 10]);
        testbed.program.age_flows(123);
        assert!(sent_to(testbed, 0, 1000..1010).contains(&1));
    });
}

/// Packets for which the table has no room are sent all the same.
#[test]
fn senders_without_room_go_by_the_hash() {
    Testbed::with(|testbed| {
        configure(testbed, rules(&[0, 1]));
        const BATCH: u16 = 64;
        for first in (1000..1000 + 2 * FLOWS as u16).step_by(BATCH.into()) {
            let senders = first..first + BATCH;
            let upstreams = sent_to(testbed, 0, senders.clone());
            testbed.program.age_flows(3);
            assert_eq!(sent_to(testbed, 0, senders), upstreams);
        }
        let assured = testbed.program.flow_states().iter().filter(|state| **state == 3).count();
        assert!(assured > FLOWS as usize * 7 / 8, "{assured}");
        testbed.program.clear_flows();
    });
}

/// Later fragments follow the first one to the upstream that the sender keeps.
#[test]
fn fragments_of_sticky_senders_follow() {
    Testbed::with(|testbed| {
        for (family, [kept, ..]) in UPSTREAMS.iter().enumerate() {
            testbed.program.clear_flows();
            configure(testbed, rules(&[0]));
            sent_to(testbed, family, 1000..1010);
            configure(testbed, rules(&[2, 1, 0]));
            for from in 1000..1010 {
                let mut whole = packet(family, from);
                whole.udp.payload = 3000;
                for piece in fragments(&whole.frame(), 1400, from.into()) {
                    let context = Context { ifindex: testbed.routing, ..Context::default() };
                    let run = testbed.program.run(&piece, context);
                    assert_eq!(run.action, REDIRECT);
                    assert_eq!(destination(&run.frame), *kept);
                }
            }
        }
    });
}

/// A client's error about an answer goes to the upstream that the client keeps.
#[test]
fn errors_of_sticky_clients_go_to_their_upstream() {
    Testbed::with(|testbed| {
        let route = |rule: Rule| Rule { reply: Reply::Route, ..rule };
        for family in 0..2 {
            testbed.program.clear_flows();
            configure(testbed, rules(&[0]).into_iter().map(route).collect());
            sent_to(testbed, family, 1000..1010);
            configure(testbed, rules(&[2, 1, 0]).into_iter().map(route).collect());
            for from in 1000..1010 {
                let client = (CLIENTS[family], from);
                let answer = datagram((VIPS[family], 53), client, Checksum::Right).frame();
                let ends = (client.0, VIPS[family]);
                let error = icmp_error(REFUSED[family], ends, &answer, 500, 64);
                let context = Context { ifindex: testbed.routing, ..Context::default() };
                let run = testbed.program.run(&error, context);
                assert_eq!((run.action, &run.frame[..6]), (REDIRECT, &NEAR_MAC[..]));
                assert_eq!(destination(&run.frame), UPSTREAMS[family][0]);
            }
        }
    });
}

/// A rule that becomes sticky, or gets answers, has flows of its new kind.
#[test]
fn flows_of_another_kind_are_replaced() {
    Testbed::with(|testbed| {
        let nat = || {
            let nat = |rule: Rule| Rule {
                source: Source::Egress,
                reply: Reply::Nat,
                sticky: false,
                ..rule
            };
            let rules: Vec<Rule> = rules(&[0]).into_iter().map(nat).collect();
            let hosts = rules.iter().flat_map(|rule| &rule.upstreams);
            let hops =
                hosts.map(|it| (it.address.clone(), testbed.hop_to(it.address.ip, 1500, None)));
            let hops: BTreeMap<_, _> = hops.collect();
            testbed.program.reconfigure(&Desired { rules, ..Desired::default() }, &hops);
        };
        let source_port = |family: usize| {
            let (gone, counted) = run(testbed, &packet(family, 1000));
            assert_eq!(gone.action, REDIRECT, "{counted:?}");
            let udp = [34, 54][family];
            u16::from_be_bytes([gone.frame[udp], gone.frame[udp + 1]])
        };
        for family in 0..2 {
            testbed.program.clear_flows();
            configure(testbed, rules(&[0]));
            assert_eq!(source_port(family), 1000);
            nat();
            let port = source_port(family);
            assert!(port >= 10_000, "{port}");
            configure(testbed, rules(&[0]));
            assert_eq!(source_port(family), 1000);
            assert_eq!(testbed.program.flow_states().len(), 1, "the one before has ended");
        }
    });
}

/// Senders stay over an apply that adds an upstream, until they are forgotten.
#[test]
fn senders_stay_until_they_are_forgotten() {
    let lab = Lab::dual(true, true);
    let config = |upstreams: usize| {
        let rule = |net: crate::common::lab::Net| {
            let hosts: Vec<Value> = net.upstreams[..upstreams]
                .iter()
                .map(|address| json!({ "address": address, "port": 5353 }))
                .collect();
            let options = json!({ "tc_action": "block", "source": "preserve", "sticky": true });
            net.rule(if net.is_ipv6() { "sticky6" } else { "sticky" }, 53, options, &hosts)
        };
        json!({ "version": 1, "interfaces": ["eth0"], "rules": [rule(V4), rule(V6)] })
    };
    for net in [V4, V6] {
        lab.apply(&config(1));
        let rule = if net.is_ipv6() { "sticky6" } else { "sticky" };
        let servers = net.upstreams.map(|address| bind(&lab.upstream, address, 5353));
        let clients: Vec<_> = (0..16).map(|_| bind(&lab.client, net.clients[0], 0)).collect();
        let ask = || {
            let place = |client: &std::net::UdpSocket| {
                client.send_to(b"a question", (net.key, 53)).expect("sent");
                receive_any(&servers).0
            };
            clients.iter().map(place).collect::<Vec<usize>>()
        };
        assert_eq!(ask(), [0; 16]);
        lab.apply(&config(2));
        assert_eq!(ask(), [0; 16]);
        let flows = lab.run(&format!("flows {rule} -o json")).expect(0).json();
        assert_eq!(flows["count"], 16);
        assert_eq!(
            (&flows["flows"][0]["egress"], &flows["flows"][0]["packets"]),
            (&Value::Null, &json!(2))
        );
        let from = clients[0].local_addr().expect("bound");
        let key = std::net::SocketAddr::new(net.key, 53);
        let text = lab.run(&format!("get {from} {key}")).expect(0).stdout;
        assert!(text.contains(", idle for ") && !text.contains("slot"), "{text}");
        assert_eq!(lab.run(&format!("forget {rule}")).expect(0).stdout, "16 flows ended\n");
        assert!(ask().contains(&1));
        let status = lab.status();
        let row = &status["rules"][usize::from(net.is_ipv6())]["flows"];
        assert_eq!(row["new"], 16, "{status:#}");
    }
}
