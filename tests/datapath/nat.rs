//! Flows: `reply: nat`.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};
use udplb::config::{Action, Key, Ports, Reply, Source};
use udplb::desired::{Desired, Rule, RuleIds, Upstream};

use crate::answers::{
    CLIENTS, IcmpKind, REFUSED, VIPS, ask, ask_for_many, check_error, check_kinds, datagram,
    icmp_error, icmp_error_with, ip6, replying, run,
};
use crate::common::Namespace;
use crate::common::lab::{Lab, V4, V6, packets};
use crate::common::net::{PATIENCE, SILENCE, bind, get, own, payload, receive, set};
use crate::ends::cuts_up_without_offload;
use crate::forge::{Checksum, Forged, Ip, fragments};
use crate::program::{Context, FLOWS, PORTS, Program};
use crate::testbed::{
    GATEWAY_MAC, NEAR, NEAR_MAC, OWN, OWN6, REDIRECT, RELAY_MAC, SHOT, Testbed, UNSPEC, VIP,
};

pub const UPSTREAM: [IpAddr; 2] = [IpAddr::V4(NEAR), ip6([0xfd00, 2, 0, 0, 0, 0, 0, 2])];
const EGRESS: [IpAddr; 2] = [IpAddr::V4(OWN), IpAddr::V6(OWN6)];

/// Port of the upstreams, and of the first client.
const SERVER: u16 = 5353;
pub const FROM: u16 = 40_000;

/// Returns a rule for port 53 with upstreams of a family.
pub fn rule(family: usize, upstreams: &[IpAddr]) -> Rule {
    let key = Key::new(VIPS[family], vec![Ports { first: 53, last: 53 }]);
    let upstreams = upstreams.iter().map(|address| Upstream::new(*address, Some(SERVER)));
    Rule {
        action: Action::Block,
        source: Source::Egress,
        reply: Reply::Nat,
        ..Rule::new(format!("dns{family}"), key, upstreams.collect())
    }
}

/// Applies the rules; the next hops have egress addresses, and the kernel is asked for the way.
pub fn configure(testbed: &Testbed<'_>, rules: Vec<Rule>) -> Vec<RuleIds> {
    let hosts = rules.iter().flat_map(|rule| &rule.upstreams);
    let ways = hosts.map(|it| (it.address.clone(), testbed.hop_to(it.address.ip, 1500, None)));
    let ways: BTreeMap<_, _> = ways.collect();
    testbed.program.configure_all(&Desired { rules, ..Desired::default() }, &ways, 0)
}

pub fn both() -> Vec<Rule> {
    vec![rule(0, &UPSTREAM[..1]), rule(1, &UPSTREAM[1..])]
}

/// Returns a frame between two endpoints.
pub fn between((source, from): (IpAddr, u16), (destination, to): (IpAddr, u16)) -> Forged {
    let mut packet = Forged::between(RELAY_MAC, source, destination, to);
    packet.udp.source = from;
    packet
}

/// Returns client, VIP, egress and server of a flow of a family whose port is this one.
fn ends_of(family: usize, port: u16) -> [(IpAddr, u16); 4] {
    [
        (CLIENTS[family], FROM),
        (VIPS[family], 53),
        (EGRESS[family], port),
        (UPSTREAM[family], SERVER),
    ]
}

pub fn question(family: usize) -> Forged {
    between((CLIENTS[family], FROM), (VIPS[family], 53))
}

/// Returns the answer of a family's upstream to a port of this host.
pub fn answer(family: usize, port: u16) -> Forged {
    between((UPSTREAM[family], SERVER), (EGRESS[family], port))
}

/// Returns source and destination of a frame without tags.
pub fn ends(frame: &[u8]) -> [(IpAddr, u16); 2] {
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&frame[at..at + 4]).expect("four"));
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).expect("sixteen"));
    let ([source, destination], udp) = match frame[14] >> 4 {
        4 => ([v4(26), v4(30)], 14 + usize::from(frame[14] & 15) * 4),
        _ => ([v6(22), v6(38)], 54),
    };
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    [(source, port(udp)), (destination, port(udp + 2))]
}

/// Sends a packet that is forwarded; returns source and destination.
#[track_caller]
pub fn send(testbed: &Testbed<'_>, packet: &Forged) -> [(IpAddr, u16); 2] {
    let (run, counted) = run(testbed, packet);
    assert_eq!(run.action, REDIRECT, "{counted:?}");
    ends(&run.frame)
}

/// Sends the first question of a family's client; returns the port of its flow.
#[track_caller]
pub fn open(testbed: &Testbed<'_>, family: usize) -> u16 {
    send(testbed, &question(family))[0].1
}

#[test]
fn packets_are_translated_both_ways() {
    Testbed::with(|testbed| {
        let ids = configure(testbed, both());
        for (family, ids) in ids.iter().enumerate() {
            let port = open(testbed, family);
            assert!((PORTS.first..=PORTS.last).contains(&port), "{port}");
            let [client, vip, egress, server] = ends_of(family, port);
            for (id, came, from, to, mac) in [
                (ids.upstreams[0], question(family), egress, server, NEAR_MAC),
                (ids.answers[0], answer(family, port), vip, client, GATEWAY_MAC),
            ] {
                check_kinds(testbed, &came, (from, to, mac), id);
            }
        }
    });
}

#[test]
fn answers_of_strangers_go_up_the_stack() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let port = open(testbed, family);
            let stranger = match UPSTREAM[family] {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(10, 0, 2, 9)),
                IpAddr::V6(_) => ip6([0xfd00, 2, 0, 0, 0, 0, 0, 9]),
            };
            for (name, packet) in [
                ("another port", answer(family, port ^ 1)),
                ("another host", between((stranger, SERVER), (EGRESS[family], port))),
                ("from another port", between((UPSTREAM[family], 53), (EGRESS[family], port))),
                ("another frame", Forged { to: [2, 0, 0, 0, 9, 9], ..answer(family, port) }),
            ] {
                let frame = packet.frame();
                let (run, counted) = run(testbed, &packet);
                assert_eq!((run.action, run.frame), (UNSPEC, frame), "{name}");
                assert!(counted.is_empty(), "{name}: {counted:?}");
            }
        }
    });
}

#[test]
fn a_flow_keeps_its_port_until_it_expires() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for (family, client) in CLIENTS.iter().enumerate() {
            let port = open(testbed, family);
            for _ in 0..3 {
                testbed.program.age_flows(20);
                send(testbed, &answer(family, port));
                assert_eq!(open(testbed, family), port);
            }
            // neither side speaks
            testbed.program.age_flows(119);
            assert_eq!(send(testbed, &answer(family, port))[1], (*client, FROM));
            testbed.program.age_flows(123);
            assert_eq!(run(testbed, &answer(family, port)).0.action, UNSPEC);
            assert_eq!(open(testbed, family), port, "the same client gets the same port");
        }
    });
}

#[test]
fn flows_are_assured_by_both_sides() {
    const STATES: [u8; 3] = [1, 2, 3];
    let [new, answered, assured] = STATES;
    Testbed::with(|testbed| {
        configure(testbed, both());
        let states = || testbed.program.flow_states();
        let port = open(testbed, 0);
        testbed.program.age_flows(3);
        open(testbed, 0);
        assert_eq!(states(), [new], "nobody has answered");
        send(testbed, &answer(0, port));
        testbed.program.age_flows(3);
        send(testbed, &answer(0, port));
        assert_eq!(states(), [answered], "an upstream that answers assures nothing");
        open(testbed, 0);
        assert_eq!(states(), [assured]);
    });
}

/// An upstream that does not answer, or is gone or down, loses the flow; a drained one keeps it.
#[test]
fn flows_move_from_upstreams_that_are_out() {
    let others = [NEAR, Ipv4Addr::new(10, 0, 2, 254)].map(IpAddr::V4);
    Testbed::with(|testbed| {
        let two = || rule(0, &others);
        let ids = configure(testbed, vec![two()]).remove(0);
        let [from, server] = send(testbed, &question(0));
        let place = others.iter().position(|it| *it == server.0).expect("one of them");
        testbed.program.override_state(ids.upstreams[place], true);
        assert_eq!(send(testbed, &question(0)), [from, server], "drained: the flow stays");
        send(testbed, &between(server, from));
        for _ in 0..2 {
            testbed.program.age_flows(14);
            assert_eq!(send(testbed, &question(0))[1], server, "it may still answer");
        }
        testbed.program.age_flows(4);
        let moved = send(testbed, &question(0));
        assert_ne!(moved[1], server, "it does not answer");
        assert_eq!(run(testbed, &between(server, from)).0.action, UNSPEC, "the old flow has ended");
        assert_eq!(send(testbed, &between(moved[1], moved[0]))[1], (CLIENTS[0], FROM));
        configure(testbed, vec![rule(0, &[server.0])]);
        assert_eq!(send(testbed, &question(0))[1], server, "the other is gone");
    });
}

#[test]
fn flows_survive_other_generations() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        let ports = [0, 1].map(|family| open(testbed, family));
        // the same upstream has another id and another place
        let decoy = Rule {
            key: Key::new(VIP, vec![Ports { first: 54, last: 54 }]),
            ..rule(0, &UPSTREAM[..1])
        };
        let decoy = Rule { name: "decoy".into(), ..decoy };
        let rules = [vec![decoy], both()].concat();
        configure(testbed, rules);
        for family in 0..2 {
            let answer = answer(family, ports[family]);
            assert_eq!(send(testbed, &answer)[1], (CLIENTS[family], FROM));
            assert_eq!(open(testbed, family), ports[family]);
        }
        // answers of rules that are gone still reach their clients
        configure(testbed, vec![rule(1, &UPSTREAM[1..])]);
        assert_eq!(send(testbed, &answer(0, ports[0]))[1], (CLIENTS[0], FROM));
    });
}

#[test]
fn a_flow_ends_with_its_last_answer() {
    Testbed::with(|testbed| {
        configure(testbed, vec![Rule { answers: Some(2), ..rule(0, &UPSTREAM[..1]) }]);
        let port = open(testbed, 0);
        for action in [REDIRECT, REDIRECT, UNSPEC] {
            assert_eq!(run(testbed, &answer(0, port)).0.action, action);
        }
        assert_ne!(open(testbed, 0), port, "the port rests");
    });
}

/// An answer in fragments is one answer: all of them reach the client, and the flow has ended with the first.
#[test]
fn a_flow_ends_with_a_fragmented_answer() {
    Testbed::with(|testbed| {
        let all = both().into_iter().map(|rule| Rule { answers: Some(1), ..rule });
        configure(testbed, all.collect());
        for family in 0..2 {
            let port = open(testbed, family);
            let mut whole = answer(family, port);
            whole.udp.payload = 3000;
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            for piece in fragments(&whole.frame(), 1400, 77) {
                assert_eq!(testbed.program.run(&piece, context).action, REDIRECT);
                // nobody else finds the flow between the fragments
                assert_eq!(run(testbed, &answer(family, port)).0.action, UNSPEC);
            }
            assert_ne!(open(testbed, family), port, "its port is not free yet");
        }
    });
}

/// Fragments follow the first one in both directions, with identifications of this host.
#[test]
fn fragments_follow_their_flow() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let port = open(testbed, family);
            for (packet, from, to) in [
                (question(family), (EGRESS[family], port), (UPSTREAM[family], SERVER)),
                (answer(family, port), (VIPS[family], 53), (CLIENTS[family], FROM)),
            ] {
                let mut whole = packet;
                whole.udp.payload = 3000;
                let pieces = fragments(&whole.frame(), 1400, 77);
                assert!(pieces.len() > 2);
                let context = Context { ifindex: testbed.routing, ..Context::default() };
                let mut sent = pieces.iter().map(|piece| {
                    let run = testbed.program.run(piece, context);
                    assert_eq!(run.action, REDIRECT, "{:?}", testbed.program.take_counted());
                    run.frame
                });
                let first = sent.next().expect("a first one");
                let addresses = |frame: &[u8]| match family {
                    0 => (frame[26..34].to_vec(), frame[18..20].to_vec()),
                    _ => (frame[22..54].to_vec(), frame[58..62].to_vec()),
                };
                let udp = if family == 0 { 34 } else { 62 };
                let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
                assert_eq!(first[udp..udp + 4], ports);
                let first = addresses(&first);
                let octets = |address| match address {
                    IpAddr::V4(address) => address.octets().to_vec(),
                    IpAddr::V6(address) => address.octets().to_vec(),
                };
                assert_eq!(first.0, [octets(from.0), octets(to.0)].concat());
                assert!(sent.all(|piece| addresses(&piece) == first));
            }
        }
    });
}

/// Returns what an error of each kind says, by family.
fn errors(family: usize) -> &'static [IcmpKind] {
    const MTU: [u8; 4] = [0, 0, 5, 0x78];
    match family {
        0 => &[REFUSED[0], (3, 4, MTU), (11, 0, [0; 4]), (12, 0, [20, 0, 0, 0])],
        _ => &[REFUSED[1], (2, 0, MTU), (3, 0, [0; 4]), (4, 1, [0, 0, 0, 6])],
    }
}

/// Returns the headers' lengths and variants of a datagram between two endpoints.
fn variants(family: usize, from: (IpAddr, u16), to: (IpAddr, u16)) -> Vec<(usize, Forged)> {
    let plain = datagram(from, to, Checksum::Right);
    let mut optional = plain.clone();
    match &mut optional.ip {
        Ip::V4(ip) => ip.options = 2,
        Ip::V6(_) => return vec![(48, plain)],
    }
    let unchecked = datagram(from, to, Checksum::Is(0));
    assert_eq!(family, 0);
    vec![(28, plain), (28, unchecked), (36, optional)]
}

/// Errors about packets of a flow go to the other end, whoever reports them, and come from this host's address.
#[test]
fn errors_about_flows_go_to_the_other_end() {
    let routers = [IpAddr::V4(Ipv4Addr::new(10, 0, 9, 9)), ip6([0xfd00, 9, 0, 0, 0, 0, 0, 9])];
    Testbed::with(|testbed| {
        for (family, to_client) in [(0, true), (0, false), (1, true), (1, false)] {
            configure(testbed, both());
            let port = open(testbed, family);
            let states = testbed.program.flow_states();
            let [client, vip, egress, server] = ends_of(family, port);
            // the quoted packet's ends as it came and as its sender knows them
            let (from, to, new_from, new_to, mac) = match to_client {
                true => (egress, server, client, vip, GATEWAY_MAC),
                false => (vip, client, server, egress, NEAR_MAC),
            };
            let quoted = variants(family, from, to).into_iter();
            let quoted = quoted.zip(variants(family, new_from, new_to));
            for ((headers, came), (_, gone)) in quoted {
                let (came, gone) = (came.frame(), gone.frame());
                for (kind, reporter) in errors(family).iter().zip([to.0, routers[family]].repeat(2))
                {
                    for length in [headers, 500] {
                        let error = icmp_error(*kind, (reporter, from.0), &came, length, 64);
                        let wanted = icmp_error(*kind, (new_to.0, new_from.0), &gone, length, 63);
                        check_error(testbed, &error, &wanted, mac);
                    }
                }
            }
            assert_eq!(testbed.program.flow_states(), states, "an error is no answer");
        }
    });
}

/// An IPv4 error may have options, and an IPv6 one may quote a first fragment.
#[test]
fn errors_are_read_behind_other_headers() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let port = open(testbed, family);
            let [client, vip, egress, server] = ends_of(family, port);
            let came = datagram(egress, server, Checksum::Right).frame();
            let gone = datagram(client, vip, Checksum::Right).frame();
            let first = |frame: &[u8]| fragments(frame, 400, 77).remove(0);
            let words = [2, 0][family];
            let error = |ends, about: &[u8], ttl| {
                icmp_error_with(REFUSED[family], ends, about, 500, ttl, words)
            };
            for (came, gone) in [(came.clone(), gone.clone()), (first(&came), first(&gone))] {
                let error =
                    (error((server.0, egress.0), &came, 64), error((vip.0, client.0), &gone, 63));
                check_error(testbed, &error.0, &error.1, GATEWAY_MAC);
            }
        }
    });
}

/// The stack gets errors about later fragments, about packets of no flow, and what is no error, as they came.
#[test]
fn errors_about_no_flow_go_up_the_stack() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let port = open(testbed, family);
            let [client, vip, egress, server] = ends_of(family, port);
            let quoted = |from, to| datagram(from, to, Checksum::Right).frame();
            let sent = quoted(egress, server);
            let later = fragments(&sent, 400, 77).remove(1);
            let other = |(address, port): (IpAddr, u16)| (address, port ^ 1);
            let error =
                |kind, about: &[u8], from: IpAddr, to| icmp_error(kind, (from, to), about, 500, 64);
            let refused = REFUSED[family];
            let expired = icmp_error(refused, (server.0, egress.0), &sent, 500, 1);
            for (name, came) in [
                ("later fragment", error(refused, &later, server.0, egress.0)),
                ("other port", error(refused, &quoted(other(egress), server), server.0, egress.0)),
                (
                    "other server",
                    error(refused, &quoted(egress, other(server)), server.0, egress.0),
                ),
                ("other client", error(refused, &quoted(vip, other(client)), client.0, vip.0)),
                ("other key", error(refused, &quoted(other(vip), client), client.0, vip.0)),
                ("to another host", error(refused, &sent, server.0, client.0)),
                (
                    "no error",
                    error([(8, 0, [0; 4]), (128, 0, [0; 4])][family], &sent, server.0, egress.0),
                ),
                (
                    "redirect",
                    error([(5, 0, [0; 4]), (137, 0, [0; 4])][family], &sent, server.0, egress.0),
                ),
                ("too old", expired),
            ] {
                let context = Context { ifindex: testbed.routing, ..Context::default() };
                let run = testbed.program.run(&came, context);
                assert_eq!((run.action, run.frame), (UNSPEC, came), "{name} {family}");
            }
            testbed.program.age_flows(40);
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let came = error(refused, &sent, server.0, egress.0);
            assert_eq!(testbed.program.run(&came, context).action, UNSPEC, "the flow has ended");
        }
    });
}

#[test]
fn flows_without_room_or_port_are_refused() {
    let client = |host: u32| IpAddr::V4(Ipv4Addr::from(0x0a00_0300 + host));
    Testbed::with(|testbed| {
        let ids = configure(testbed, both());
        // assured flows are never evicted
        let mut kept = Vec::new();
        for number in 0..2 * FLOWS {
            let from = (client(2), 1024 + number as u16);
            let (gone, counted) = run(testbed, &between(from, (VIPS[0], 53)));
            if gone.action == SHOT {
                assert_eq!(counted.keys().next(), Some(&(ids[0].rule, "no-flow")));
                continue;
            }
            kept.push((from, ends(&gone.frame)[0]));
            send(testbed, &between((UPSTREAM[0], SERVER), ends(&gone.frame)[0]));
            if number % 64 == 63 {
                testbed.program.age_flows(3);
                for (from, _) in &kept[kept.len().saturating_sub(64)..] {
                    run(testbed, &between(*from, (VIPS[0], 53)));
                }
            }
        }
        let assured = testbed.program.flow_states().iter().filter(|state| **state == 3).count();
        assert!(assured > FLOWS as usize * 7 / 8, "{assured}");
        testbed.program.clear_flows();
    });
}

/// A flow of the reference.
#[derive(Clone, Debug)]
struct Known {
    server: (IpAddr, u16),
    egress: (IpAddr, u16),
    /// Seconds since the last packet, and since the first one.
    idle: u32,
    age: u32,
    answered: bool,
    assured: bool,
}

/// Random clients, answers, pauses and changes against a map of tuples: whatever is sent back reaches the client
/// whose packet left through that port last, and assured flows keep port and upstream.
#[test]
fn no_packet_reaches_a_wrong_party() {
    check_parties(|_| {});
}

#[test]
fn no_packet_reaches_a_wrong_party_by_the_slow_path() {
    check_parties(|program| program.advance());
}

/// Checks them; `before` runs before each packet.
fn check_parties(before: fn(&Program<'_>)) {
    const PORTS_OF_CLIENTS: u16 = 3000;
    let servers = [NEAR, Ipv4Addr::new(10, 0, 2, 254)].map(IpAddr::V4);
    let mut random = 88_172_645_463_325_252_u64;
    let mut below = |limit: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % limit
    };
    Testbed::with(|testbed| {
        configure(testbed, vec![rule(0, &servers)]);
        let run = |packet: &Forged| {
            before(&testbed.program);
            run(testbed, packet)
        };
        let mut known: HashMap<u16, Known> = HashMap::new();
        let mut users: HashMap<[(IpAddr, u16); 2], (u16, u32)> = HashMap::new();
        let (mut clock, mut delivered, mut moved) = (0, 0, 0);
        for _ in 0..10_000 {
            let client = FROM.wrapping_add(below(PORTS_OF_CLIENTS.into()) as u16);
            match below(100) {
                0 => {
                    let pause = [1, 3, 40][below(3) as usize];
                    testbed.program.age_flows(pause);
                    clock += pause;
                    known
                        .values_mut()
                        .for_each(|it| (it.idle, it.age) = (it.idle + pause, it.age + pause));
                }
                1..60 => {
                    let (gone, _) = run(&between((CLIENTS[0], client), (VIPS[0], 53)));
                    if gone.action == SHOT {
                        continue;
                    }
                    let [egress, server] = ends(&gone.frame);
                    let before = known.get(&client).cloned();
                    let same =
                        before.as_ref().filter(|it| (it.egress, it.server) == (egress, server));
                    if let Some(it) = before.as_ref().filter(|it| it.assured && it.idle < 118) {
                        assert!(same.is_some(), "{it:?} became {egress:?} {server:?}");
                    }
                    if let Some((user, since)) = users.insert([server, egress], (client, clock)) {
                        assert!(user == client || clock > since, "the port of {user} did not rest");
                    }
                    moved += u32::from(before.is_some() && same.is_none());
                    let fresh =
                        Known { server, egress, idle: 0, age: 0, answered: false, assured: false };
                    let mut it = same.cloned().filter(|it| it.idle < 28).unwrap_or(fresh);
                    it.assured |= it.answered && it.age > 2;
                    it.idle = 0;
                    known.insert(client, it);
                }
                _ => {
                    let Some(it) = known.get_mut(&client) else { continue };
                    let (back, _) = run(&between(it.server, it.egress));
                    if back.action != REDIRECT {
                        assert!(!it.assured || it.idle > 118, "{it:?} has ended");
                        continue;
                    }
                    delivered += 1;
                    let [from, to] = ends(&back.frame);
                    let (user, _) = users[&[it.server, it.egress]];
                    assert_eq!((from, to), ((VIPS[0], 53), (CLIENTS[0], user)));
                    if user == client {
                        it.answered = true;
                        it.idle = 0;
                    }
                }
            }
        }
        assert!(delivered > 150 && moved > 50, "{delivered} {moved}");
    });
}

/// Adds a network behind a namespace, with a host in it, and this MTU on the way there.
fn add_behind(
    lab: &Lab,
    router: &Namespace,
    (v4, v6): (&str, &str),
    net: u16,
    mtu: u16,
) -> Namespace {
    let host = Namespace::new();
    router.link("behind", &host, "eth0", false);
    router.set_forwarding("1");
    for (namespace, interface, at) in [(router, "behind", 1), (&host, "eth0", 20)] {
        namespace.ip(&format!("addr add 10.{net}.0.{at}/24 dev {interface}"));
        namespace.ip(&format!("addr add 2001:db8:{net}::{at}/64 dev {interface} nodad"));
        namespace.ip(&format!("link set {interface} mtu {mtu}"));
    }
    host.ip(&format!("route add default via 10.{net}.0.1"));
    host.ip(&format!("-6 route add default via 2001:db8:{net}::1"));
    lab.relay.ip(&format!("route add 10.{net}.0.0/24 via {v4}"));
    lab.relay.ip(&format!("-6 route add 2001:db8:{net}::/64 via {v6}"));
    host
}

/// Sends datagrams of this IP length to the other end until the socket knows a smaller path MTU; returns that.
fn learned_mtu(socket: &UdpSocket, length: usize) -> i32 {
    let is_ipv6 = own(socket).is_ipv6();
    let (level, option, discover, headers) = match is_ipv6 {
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU, libc::IPV6_MTU_DISCOVER, 48),
        false => (libc::IPPROTO_IP, libc::IP_MTU, libc::IP_MTU_DISCOVER, 28),
    };
    set(socket, level, discover, libc::IP_PMTUDISC_DO);
    let end = Instant::now() + PATIENCE;
    loop {
        let sent = socket.send(&payload(length - headers));
        let mtu = get(socket, level, option);
        if mtu < length as i32 || Instant::now() > end {
            socket.take_error().expect("the error that came with it");
            return mtu;
        }
        sent.expect("sent");
        thread::sleep(SILENCE / 10);
    }
}

/// The sockets of both ends learn the MTU of a way behind the other end's router.
#[test]
fn path_mtus_are_learned_both_ways() {
    let lab = Lab::dual(false, false);
    let far = add_behind(&lab, &lab.upstream, ("10.2.0.20", "2001:db8:2::20"), 3, 1400);
    let guest = add_behind(&lab, &lab.client, ("10.1.0.20", "2001:db8:1::20"), 4, 1300);
    let mut config = replying("nat");
    let addresses: [[IpAddr; 2]; 2] =
        [["10.3.0.20", "10.4.0.20"], ["2001:db8:3::20", "2001:db8:4::20"]]
            .map(|both| both.map(|address| address.parse().expect("an address")));
    for (rule, net) in [V4, V6].into_iter().enumerate() {
        let mut to_far = config["rules"][rule].clone();
        (to_far["name"], to_far["key"]["port"]) = (json!(format!("far{rule}")), json!(54));
        to_far["upstream"] = json!([{ "address": addresses[rule][0], "port": 5353 }]);
        config["rules"].as_array_mut().expect("rules").push(to_far);
        assert_eq!(config["rules"][rule]["key"]["address"], json!(net.key));
    }
    lab.apply(&config);
    for (net, [far_address, guest_address]) in [V4, V6].into_iter().zip(addresses) {
        let client = bind(&lab.client, net.clients[0], 0);
        client.connect((net.key, 54)).expect("connected");
        assert_eq!(learned_mtu(&client, 1500), 1400);
        let server = bind(&far, far_address, 5353);
        client.send(&payload(1300)).expect("sent");
        assert_eq!(receive(&server).payload, payload(1300));
        let client = bind(&guest, guest_address, 0);
        client.connect((net.key, 53)).expect("connected");
        let server = bind(&lab.upstream, net.upstreams[0], 5353);
        client.send(b"a question").expect("sent");
        server.connect(receive(&server).from).expect("connected");
        assert_eq!(learned_mtu(&server, 1500), 1300);
    }
}

fn check_answers(client_offload: bool, upstream_offload: bool) {
    let lab = Lab::dual(client_offload, upstream_offload);
    lab.apply(&replying("nat"));
    for net in [V4, V6] {
        let client = bind(&lab.client, net.clients[0], 0);
        client.connect((net.key, 53)).expect("connected");
        let server = bind(&lab.upstream, net.upstreams[0], 5353);
        let header = if net.is_ipv6() { 48 } else { 28 };
        let seen = ask(&client, &server, b"first", b"answer");
        assert_eq!(seen, net.seen("egress", seen), "the relay's address");
        for size in [0, 1, 39, 1000, 1500 - header, 4000] {
            assert_eq!(ask(&client, &server, &payload(size), &payload(size)), seen);
        }
        if upstream_offload || cuts_up_without_offload(&lab) {
            ask_for_many(&client, &server);
        }
        let status = lab.status();
        let rule = usize::from(net.is_ipv6());
        let upstream = &status["rules"][rule]["upstreams"][0];
        assert!(packets(&upstream["answers"], "forwarded") >= 7, "{upstream:#}");
    }
}

#[test]
fn clients_of_flows_get_answers() {
    check_answers(true, true);
}

#[test]
fn clients_of_flows_get_answers_without_offload() {
    check_answers(false, false);
}

/// A flow keeps its port over applies, a rollback, and generations without its rule's neighbours.
#[test]
fn flows_survive_apply_and_rollback() {
    let lab = Lab::dual(true, true);
    lab.apply(&replying("nat"));
    let sockets = [V4, V6].map(|net| {
        let client = bind(&lab.client, net.clients[0], 0);
        client.connect((net.key, 53)).expect("connected");
        (client, bind(&lab.upstream, net.upstreams[0], 5353))
    });
    let ports = || sockets.each_ref().map(|(client, server)| ask(client, server, b"a", b"b"));
    let seen = ports();
    let mut other = replying("nat");
    for name in ["before", "more"] {
        let rule = V4.rule(
            name,
            60 + name.len() as u16,
            json!({}),
            &[json!({ "address": V4.upstreams[1] })],
        );
        other["rules"].as_array_mut().expect("rules").insert(0, rule);
        lab.apply(&other);
        assert_eq!(ports(), seen);
    }
    lab.run("rollback").expect(0);
    assert_eq!(ports(), seen);
    lab.run("drain dns/u1").expect(0);
    assert_eq!(ports(), seen, "drained: flows stay");
}

/// `get` shows the port that a flow would get, and then the flow itself, and changes nothing.
#[test]
fn a_dry_run_shows_the_flow() {
    let lab = Lab::dual(true, true);
    lab.apply(&replying("nat"));
    for net in [V4, V6] {
        let client = SocketAddr::new(net.clients[0], 40_000);
        let get = |options: &str| {
            let key = SocketAddr::new(net.key, 53);
            lab.run(&format!("get {client} {key} -i eth0 {options}")).expect(0)
        };
        let outcome = || get("-o json").json()["outcomes"][0].clone();
        let before = outcome();
        let port: SocketAddr = before["source"].as_str().expect("a source").parse().expect("one");
        assert_eq!(port.ip(), net.egress);
        assert!((1024..=32_767).contains(&port.port()), "{port}");
        assert_eq!(before["flow"], json!({ "state": null, "idle_seconds": null }));
        assert!(get("").stdout.contains("flow      new, with the port that it would get now\n"));
        assert_eq!(outcome(), before);
        assert!(listed(&lab, &format!("--client {client}")).is_empty());

        let socket = bind(&lab.client, client.ip(), client.port());
        socket.connect((net.key, 53)).expect("connected");
        let server = bind(&lab.upstream, net.upstreams[0], 5353);
        assert_eq!(ask(&socket, &server, b"a", b"b"), port);
        let after = outcome();
        assert_eq!((&after["source"], &after["flow"]["state"]), (&json!(port), &json!("answered")));
        assert!(get("").stdout.contains("flow      answered, idle for "));
        let flow = &listed(&lab, &format!("--client {client}"))[0];
        assert_eq!((&flow["packets"], &flow["answers"]), (&json!(1), &json!(1)));
    }
}

/// Returns the flows that `udplb flows` lists.
#[track_caller]
fn listed(lab: &Lab, words: &str) -> Vec<Value> {
    let flows = lab.run(&format!("flows {words} -o json")).expect(0).json();
    let list = flows["flows"].as_array().expect("a list").clone();
    assert_eq!(flows["count"], list.len());
    let count = lab.run(&format!("flows {words} --count")).expect(0).stdout;
    assert_eq!(count, format!("{}\n", list.len()));
    list
}

/// Flows are listed with their parties, counted in metrics and status, and end when they are forgotten.
#[test]
fn flows_are_listed_and_forgotten() {
    let lab = Lab::dual(true, true);
    lab.run("flows").expect(3);
    lab.run("forget dns").expect(3);
    lab.apply(&replying("nat"));
    assert_eq!(lab.run("flows").expect(0).stdout, "");
    let sockets = [V4, V6].map(|net| {
        let client = bind(&lab.client, net.clients[0], 0);
        client.connect((net.key, 53)).expect("connected");
        (client, bind(&lab.upstream, net.upstreams[0], 5353))
    });
    let ask = |family: usize| ask(&sockets[family].0, &sockets[family].1, b"a", b"b");
    let seen = [ask(0), ask(1)];
    ask(0);
    let clients = sockets.each_ref().map(|(client, _)| client.local_addr().expect("bound"));
    for (family, (rule, net, packets)) in [("dns", V4, 2), ("dns6", V6, 1)].into_iter().enumerate()
    {
        let client = clients[family];
        for words in [
            rule,
            &format!("{rule}/u1"),
            &format!("--client {client}"),
            &format!("{rule} --client {}", client.ip()),
        ] {
            let flows = listed(&lab, words);
            assert_eq!(flows.len(), 1, "{words}: {flows:#?}");
            let flow = &flows[0];
            for (field, wanted) in [
                ("rule", json!(rule)),
                ("upstream", json!("u1")),
                ("client", json!(client)),
                ("vip", json!(SocketAddr::new(net.key, 53))),
                ("egress", json!(seen[family])),
                ("server", json!(SocketAddr::new(net.upstreams[0], 5353))),
                ("state", json!("answered")),
                ("packets", json!(packets)),
                ("answers", json!(packets)),
            ] {
                assert_eq!(flow[field], wanted, "{field} {words}");
            }
            let seconds = |field: &str| flow[field].as_f64().expect("seconds");
            assert!(seconds("left_seconds") <= 30.0, "{flow:#}");
            assert!(seconds("idle_seconds") <= seconds("age_seconds"), "{flow:#}");
        }
        let text = lab.run(&format!("flows {rule}")).expect(0).stdout;
        let line = text.lines().nth(1).expect("a flow");
        let start = format!(
            "{client}  {}  {rule}/u1  {}  answered ",
            SocketAddr::new(net.key, 53),
            seen[family]
        );
        assert_eq!(
            line.split_whitespace().collect::<Vec<_>>()[..5],
            start.split_whitespace().collect::<Vec<_>>()[..],
            "{text}"
        );
    }
    assert_eq!(listed(&lab, "").len(), 2);
    let mut other = clients[0];
    other.set_port(clients[0].port() ^ 1);
    assert!(listed(&lab, &format!("--client {other}")).is_empty());
    assert_eq!(lab.run(&format!("forget --client {other}")).expect(0).stdout, "0 flows ended\n");
    let metrics = lab.run("metrics").expect(0).stdout;
    for (state, flows) in [("new", 0), ("answered", 1), ("assured", 0)] {
        let line = format!("udplb_flows{{rule=\"dns\",state=\"{state}\"}} {flows}\n");
        assert!(metrics.contains(&line), "{line} {metrics}");
    }

    lab.run("drain dns/u1").expect(0);
    let status = lab.status();
    assert_eq!(status["rules"][0]["flows"], json!({ "new": 0, "answered": 1, "assured": 0 }));
    assert_eq!(status["rules"][0]["upstreams"][0]["flows"]["answered"], 1);
    let text = lab.run("status").stdout;
    assert!(text.contains("drained (override), 1 flow left"), "{text}");
    lab.run("enable dns/u1").expect(0);

    assert_eq!(lab.run("forget dns/u1").expect(0).stdout, "1 flow ended\n");
    assert_eq!(lab.run("forget dns -o json").expect(0).json()["forgotten"], 0);
    assert!(listed(&lab, "dns").is_empty());
    // its port rests, and late answers reach nobody
    sockets[0].1.send_to(b"late", seen[0]).expect("sent");
    assert_ne!(ask(0), seen[0]);
    assert_eq!(ask(1), seen[1], "the flow of the other rule stays");

    let mut moved = replying("nat");
    moved["rules"][1]["upstream"][0]["address"] = json!(V6.upstreams[1]);
    lab.apply(&moved);
    let gone = listed(&lab, &format!("--client {}", clients[1]));
    assert_eq!((&gone[0]["rule"], &gone[0]["upstream"]), (&Value::Null, &Value::Null));
    assert!(lab.run("flows").expect(0).stdout.contains("  gone  "));
    assert!(listed(&lab, "dns6").is_empty(), "that of no upstream of the rule");
    assert_eq!(
        lab.run(&format!("forget --client {}", clients[1])).expect(0).stdout,
        "1 flow ended\n"
    );
}

#[test]
fn flows_of_what_is_not_there_are_refused() {
    let lab = Lab::dual(true, true);
    lab.apply(&replying("nat"));
    for command in ["flows", "forget"] {
        lab.run(&format!("{command} dsn"))
            .expect(1)
            .says(&["there is no rule `dsn`; did you mean `dns`?"]);
        lab.run(&format!("{command} dns/u2")).expect(1).says(&["rule dns has no upstream `u2`"]);
        lab.run(&format!("{command} dns/"))
            .expect(64)
            .says(&["a rule, `/` and one of its upstreams"]);
        lab.run(&format!("{command} --client host"))
            .expect(64)
            .says(&["an address, with or without a port"]);
    }
    lab.run("forget").expect(64);
}
