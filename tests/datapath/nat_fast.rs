//! The fast path of flows: what it sends is what the slow path sends, and it sees every change.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use udplb::bpf::types;
use udplb::config::{Action, Health, Key, Ports};
use udplb::desired::{Rule, Upstream};

use crate::answers::{CLIENTS, VIPS, run};
use crate::common::run as run_command;
use crate::common::wire::Tag;
use crate::forge::{Checksum, Forged, Ip, Length};
use crate::nat::{self, FROM, UPSTREAM, answer, between, both, configure, open, question, send};
use crate::packet::Mac;
use crate::program::{Context, PORTS, SECONDS};
use crate::testbed::{GATEWAY_MAC, NEAR, REDIRECT, Testbed, UNSPEC, VIP};

/// Sends a packet by the slow path, and again by what it has remembered; returns true if it was sent alike then, by
/// the fast path.
#[track_caller]
pub fn is_fast(testbed: &Testbed<'_>, packet: &Forged) -> bool {
    let (gso_size, gso_segs) = packet.gso;
    let (tag, length) = (packet.tag, packet.cut);
    let context = Context { ifindex: testbed.routing, gso_size, gso_segs, tag, length };
    let send = || {
        let run = testbed.program.run(&packet.frame(), context);
        let slow = testbed.program.took_slow_path();
        (run, testbed.program.take_counted(), slow)
    };
    testbed.program.advance();
    let (first, counted, slow) = send();
    assert!(slow || first.action != REDIRECT, "after a step of the epoch");
    let action = first.action;
    let (second, again, slow) = send();
    assert_eq!((second, again), (first, counted), "both paths");
    !slow && action == REDIRECT
}

/// Returns a packet with a change.
fn changed(packet: &Forged, change: impl Fn(&mut Forged)) -> Forged {
    let mut packet = packet.clone();
    change(&mut packet);
    packet
}

pub fn set_ttl(packet: &mut Forged, ttl: u8) {
    match &mut packet.ip {
        Ip::V4(ip) => ip.ttl = ttl,
        Ip::V6(ip) => ip.hop_limit = ttl,
    }
}

/// Plain packets of known flows stay on the fast path, both ways; what is rare or ends something does not.
#[test]
fn known_flows_take_the_fast_path() {
    const TAG: Tag = Tag { protocol: 0x8100, control: 7 };
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let port = open(testbed, family);
            testbed.program.take_counted();
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            for _ in 0..2 {
                testbed.program.run(&answer(family, port).frame(), context);
            }
            testbed.program.take_counted();
            for packet in [question(family), answer(family, port)] {
                let longest = if family == 0 { 1500 - 28 } else { 1500 - 48 };
                for (name, packet) in [
                    ("plain", packet.clone()),
                    ("empty", changed(&packet, |it| it.udp.payload = 0)),
                    ("odd", changed(&packet, |it| it.udp.payload = 333)),
                    ("wrong checksum", changed(&packet, |it| it.udp.checksum = Checksum::Off(7))),
                    ("tag in the skb", changed(&packet, |it| it.tag = Some(TAG))),
                    ("last but one hop", changed(&packet, |it| set_ttl(it, 2))),
                    ("as long as the MTU", changed(&packet, |it| it.udp.payload = longest)),
                ] {
                    assert!(is_fast(testbed, &packet), "{name}: {packet:?}");
                }
                for (name, packet) in [
                    ("tag in the frame", changed(&packet, |it| it.tags = vec![TAG])),
                    ("last hop", changed(&packet, |it| set_ttl(it, 1))),
                    ("longer than the MTU", changed(&packet, |it| it.udp.payload = longest + 1)),
                    ("GSO", changed(&packet, |it| (it.udp.payload, it.gso) = (900, (300, 3)))),
                    ("malformed", changed(&packet, |it| it.udp.length = Length::Is(7))),
                    ("another host's", Forged { to: [2, 0, 0, 0, 9, 9], ..packet.clone() }),
                ] {
                    assert!(!is_fast(testbed, &packet), "{name}: {packet:?}");
                }
            }
        }
        // a plain rule whose port flows have too
        let key = Key::new(VIP, vec![Ports { first: PORTS.first, last: PORTS.first }]);
        let plain = Rule::new("plain", key, vec![Upstream::new(NEAR, None)]);
        let plain = Rule { action: Action::Block, ..plain };
        configure(testbed, vec![plain, nat::rule(0, &UPSTREAM[..1])]);
        let packet = between((CLIENTS[0], FROM), (VIPS[0], PORTS.first));
        assert!(is_fast(testbed, &packet), "of no flow");
    });
}

/// The next packet sees what changes a flow, or its way; after a tenth of a second where only the kernel knows
/// of it.
#[test]
fn fast_path_sees_changes_of_flows_and_ways() {
    const OTHER_MAC: Mac = [2, 0, 0, 0, 7, 7];
    let set_mac = |mac: &str| {
        let words = format!("neighbour replace 10.0.2.254 lladdr {mac} dev out0");
        run_command("ip", words.split(' '));
    };
    let others = [NEAR, Ipv4Addr::new(10, 0, 2, 254)].map(IpAddr::V4);
    Testbed::with(|testbed| {
        let program = &testbed.program;
        let rule = Rule { health: Health::Neighbour, ..nat::rule(0, &others) };
        let ids = configure(testbed, vec![rule]).remove(0);
        let [from, server] = send(testbed, &question(0));
        let place = others.iter().position(|it| *it == server.0).expect("one of them");
        let back = between(server, from);
        for _ in 0..2 {
            send(testbed, &back);
        }
        assert!(is_fast(testbed, &question(0)) && is_fast(testbed, &back));

        let goes_to = |mac| assert_eq!(run(testbed, &back).0.frame[..6], mac);
        set_mac("02:00:00:00:07:07");
        goes_to(GATEWAY_MAC);
        std::thread::sleep(Duration::from_millis(100) * SECONDS);
        goes_to(OTHER_MAC);
        set_mac("02:00:00:00:02:fe");
        goes_to(OTHER_MAC);
        program.advance();
        goes_to(GATEWAY_MAC);
        // paths by ports are asked for each packet
        for (policy, fast) in [("1", false), ("0", true)] {
            fs::write("/proc/sys/net/ipv4/fib_multipath_hash_policy", policy).expect("a sysctl");
            assert_eq!(is_fast(testbed, &back), fast, "policy {policy}");
        }

        // the first answer, and the question that assures a flow, change its state
        program.age_flows(3);
        assert_eq!(program.flow_states(), [2]);
        send(testbed, &question(0));
        assert_eq!(program.flow_states(), [3]);
        // while a trace runs, the slow path sees all
        program.trace();
        assert!(!is_fast(testbed, &question(0)) && !is_fast(testbed, &back));
        program.end_trace();
        assert!(is_fast(testbed, &question(0)) && is_fast(testbed, &back));

        program.lease(true);
        send(testbed, &question(0));
        assert_eq!(send(testbed, &question(0)), [from, server]);
        program.change_nexthop(ids.upstreams[place], |hop| {
            hop.address = udplb::bpf::wire(server.0);
            hop.health = types::health::HEALTH_DOWN;
        });
        let moved = send(testbed, &question(0));
        assert_ne!(moved[1], server, "down");
        assert_eq!(run(testbed, &back).0.action, UNSPEC, "the old flow has ended");
        let back = between(moved[1], moved[0]);
        for _ in 0..2 {
            send(testbed, &back);
        }
        assert!(is_fast(testbed, &back));
        program.clear_flows();
        assert_eq!(run(testbed, &back).0.action, UNSPEC, "forgotten");
        let [_, server] = send(testbed, &question(0));
        let other = others.into_iter().find(|it| *it != server.0).expect("two of them");
        configure(testbed, vec![nat::rule(0, &[other])]);
        assert_eq!(send(testbed, &question(0))[1].0, other, "the upstream was removed");
    });
}

/// Many clients do not take the lines of their answers from each other, packet by packet.
#[test]
fn many_clients_keep_their_return_lines() {
    const COUNT: u16 = 700;
    const NETWORKS: [IpAddr; 2] = [
        IpAddr::V4(Ipv4Addr::new(10, 0, 32, 0)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 3, 0, 0, 0, 0, 0, 0)),
    ];
    Testbed::with(|testbed| {
        run_command("ip", "route replace 10.0.32.0/22 via 10.0.2.254".split(' '));
        for family in 0..2 {
            configure(testbed, both());
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let clients = (1..=COUNT).map(|number| match NETWORKS[family] {
                IpAddr::V4(net) => IpAddr::from((u32::from(net) + u32::from(number)).to_be_bytes()),
                IpAddr::V6(net) => {
                    IpAddr::from((u128::from(net) + u128::from(number)).to_be_bytes())
                }
            });
            let answers: Vec<_> = clients
                .map(|client| {
                    let [from, server] =
                        send(testbed, &between((client, FROM), (VIPS[family], 53)));
                    between(server, from).frame()
                })
                .collect();
            // a line is remembered for a tenth of a second: a busy machine may take longer for a round
            let all_fast = (0..100).any(|_| {
                testbed.program.take_counted();
                for answer in &answers {
                    testbed.program.run(answer, context);
                }
                !testbed.program.took_slow_path()
            });
            assert!(all_fast, "{family}");
        }
    });
}
