//! Connections that follow their server: `strategy: quic-cid`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use etherparse::PacketBuilder;
use serde_json::{Value, json};
use udplb::bpf::types;
use udplb::config::{Action, Health, Key, Ports, Reply, ServerId, ServerIdPlace, Source, Strategy};
use udplb::desired::quic::server_id;
use udplb::desired::{Desired, Rule, RuleIds, Upstream};

use crate::answers::{CLIENTS, VIPS, destination, ip6};
use crate::common::lab::{Lab, Net, V4, V6};
use crate::common::net::{TTL, bind, expect, receive, receive_any};
use crate::program::Context;
use crate::testbed::{NEAR, REDIRECT, RELAY_MAC, Testbed};

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

/// Returns the id of the upstream at a place.
fn id(place: usize, length: u8) -> Vec<u8> {
    let mut id = vec![0x0a; length.into()];
    id[usize::from(length) - 1] = place as u8 + 1;
    id
}

/// Returns a rule for port 443 of a family, whose servers have ids of this length.
fn rule(family: usize, place: ServerIdPlace) -> Rule {
    let key = Key::new(VIPS[family], vec![Ports { first: 443, last: 443 }]);
    let upstream = |(nth, address): (usize, &IpAddr)| Upstream {
        server_id: Some(ServerId::from(&id(nth, place.length)[..])),
        ..Upstream::new(*address, None)
    };
    Rule {
        action: Action::Block,
        source: Source::Preserve,
        strategy: Strategy::QuicCid,
        server_id: Some(place),
        ..Rule::new(
            format!("quic{family}"),
            key,
            UPSTREAMS[family].iter().enumerate().map(upstream).collect(),
        )
    }
}

const PLACE: ServerIdPlace = ServerIdPlace { offset: 1, length: 2 };

fn configure(testbed: &Testbed<'_>, rules: Vec<Rule>) -> Vec<RuleIds> {
    let hosts = rules.iter().flat_map(|rule| &rule.upstreams);
    let hops = hosts.map(|it| (it.address.clone(), testbed.hop_to(it.address.ip, 1500, None)));
    let hops: BTreeMap<_, _> = hops.collect();
    testbed.program.reconfigure(&Desired { rules, ..Desired::default() }, &hops)
}

/// Returns a packet with a short header (RFC 9000, section 17.3) and a connection id.
fn short(connection_id: &[u8]) -> Vec<u8> {
    [&[0x40][..], connection_id, &[0x55; 24]].concat()
}

/// Returns a packet with a long header (RFC 9000, section 17.2) and a connection id.
fn long(connection_id: &[u8]) -> Vec<u8> {
    let length = connection_id.len() as u8;
    [&[0xc0, 0, 0, 0, 1, length][..], connection_id, &[0x55; 24]].concat()
}

/// Returns a connection id with a server's id at a place.
fn naming(id: &[u8], place: ServerIdPlace) -> Vec<u8> {
    [&vec![0x17; place.offset.into()][..], id, &[0x33; 4]].concat()
}

/// Sends a datagram of a family's client; returns the place of the upstream that it reaches.
#[track_caller]
fn sent_to(testbed: &Testbed<'_>, family: usize, from: u16, payload: &[u8]) -> usize {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 1, 2], RELAY_MAC);
    let ip = match (CLIENTS[family], VIPS[family]) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ethernet.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => ethernet.ipv6(from.octets(), to.octets(), 64),
        _ => unreachable!("both are of the family"),
    };
    let mut frame = Vec::new();
    ip.udp(from, 443).write(&mut frame, payload).expect("a frame");
    let context = Context { ifindex: testbed.routing, ..Context::default() };
    let run = testbed.program.run(&frame, context);
    assert_eq!(run.action, REDIRECT, "{:?}", testbed.program.take_counted());
    let upstream = destination(&run.frame);
    UPSTREAMS[family].iter().position(|it| *it == upstream).expect("one of them")
}

#[test]
fn connections_follow_their_server() {
    const PLACES: [ServerIdPlace; 4] = [
        PLACE,
        ServerIdPlace { offset: 0, length: 1 },
        ServerIdPlace { offset: 1, length: 8 },
        ServerIdPlace { offset: 16, length: 4 },
    ];
    Testbed::with(|testbed| {
        for place in PLACES {
            configure(testbed, vec![rule(0, place), rule(1, place)]);
            for (family, upstream) in [0, 1].into_iter().flat_map(|it| [(it, 0), (it, 1), (it, 2)])
            {
                let connection_id = naming(&id(upstream, place.length), place);
                for from in 2000..2008 {
                    for packet in [short(&connection_id), long(&connection_id)] {
                        assert_eq!(sent_to(testbed, family, from, &packet), upstream, "{place:?}");
                    }
                }
            }
        }
    });
}

/// Packets that name no server go where the sender's address and port select.
#[test]
fn other_packets_go_by_their_sender() {
    let unknown = naming(&[0x0a, 0x77], PLACE);
    let known = naming(&id(0, 2), PLACE);
    let packets = [
        ("unknown id", short(&unknown)),
        ("a client's first", long(&[0x91; 8])),
        ("id beyond the connection id", long(&known[..2])),
        ("too short", short(&known)[..9].to_vec()),
        ("long header too short", long(&known)[..13].to_vec()),
        ("empty", Vec::new()),
        ("no QUIC", b"a datagram of something else".to_vec()),
    ];
    Testbed::with(|testbed| {
        for family in 0..2 {
            let by_sender =
                Rule { strategy: Strategy::SrcIpPort, server_id: None, ..rule(family, PLACE) };
            configure(testbed, vec![by_sender]);
            let selected = |from| sent_to(testbed, family, from, b"");
            let selected: Vec<usize> = (2000..2016).map(selected).collect();
            configure(testbed, vec![rule(family, PLACE)]);
            for (name, packet) in &packets {
                let sent = (2000..2016).map(|from| sent_to(testbed, family, from, packet));
                assert_eq!(sent.collect::<Vec<_>>(), selected, "{name}");
            }
        }
    });
}

/// Random datagrams go where user space reads the id too, or by their sender.
#[test]
fn random_datagrams_are_read_alike() {
    let mut random = 88_172_645_463_325_252_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    Testbed::with(|testbed| {
        let place = ServerIdPlace { offset: 2, length: 1 };
        let by_sender = Rule { strategy: Strategy::SrcIpPort, server_id: None, ..rule(0, place) };
        configure(testbed, vec![by_sender]);
        let by_sender = sent_to(testbed, 0, 2000, b"");
        configure(testbed, vec![rule(0, place)]);
        let mut named = 0;
        for _ in 0..3000 {
            // small bytes are ids, and lengths of connection ids
            let length = next() % 24;
            let mut payload: Vec<u8> = (0..length).map(|_| (next() % 6) as u8).collect();
            if let (Some(first), 0) = (payload.first_mut(), next() % 2) {
                *first |= 0x80;
            }
            let read = server_id(&payload, place).map(|id| id.number());
            let upstream = read.filter(|id| (1..=3).contains(id)).map(|id| id as usize - 1);
            named += usize::from(upstream.is_some());
            let sent = sent_to(testbed, 0, 2000, &payload);
            assert_eq!(sent, upstream.unwrap_or(by_sender), "{payload:x?}");
        }
        assert!(named > 300, "{named}");
    });
}

/// A server that is down loses its connections, and a drained one keeps them.
#[test]
fn connections_leave_servers_that_are_down() {
    Testbed::with(|testbed| {
        for (family, [_, named, _]) in UPSTREAMS.iter().enumerate() {
            let skipping = Rule { health: Health::Neighbour, ..rule(family, PLACE) };
            let ids = configure(testbed, vec![skipping]).remove(0);
            let packet = short(&naming(&id(1, 2), PLACE));
            testbed.program.override_state(ids.upstreams[1], true);
            for from in 2000..2016 {
                assert_eq!(sent_to(testbed, family, from, &packet), 1, "drained");
            }
            testbed.program.override_state(ids.upstreams[1], false);
            testbed.program.change_nexthop(ids.upstreams[1], |hop| {
                hop.address = udplb::bpf::wire(*named);
                hop.health = types::health::HEALTH_DOWN;
            });
            testbed.program.lease(true);
            for from in 2000..2016 {
                assert_ne!(sent_to(testbed, family, from, &packet), 1, "down");
            }
        }
    });
}

/// The connection id decides over a flow, and a packet that names nobody stays with the flow.
#[test]
fn connections_take_their_flow_along() {
    Testbed::with(|testbed| {
        let nat = |rule: Rule| Rule { source: Source::Egress, reply: Reply::Nat, ..rule };
        let sticky = |rule: Rule| Rule { sticky: true, ..rule };
        for change in [&nat as &dyn Fn(Rule) -> Rule, &sticky] {
            for family in 0..2 {
                testbed.program.clear_flows();
                configure(testbed, vec![change(rule(family, PLACE))]);
                let first = sent_to(testbed, family, 2000, &long(&[0x91; 8]));
                for upstream in [first, (first + 1) % 3, (first + 2) % 3] {
                    let packet = short(&naming(&id(upstream, 2), PLACE));
                    assert_eq!(sent_to(testbed, family, 2000, &packet), upstream);
                    assert_eq!(sent_to(testbed, family, 2000, &long(&[0x91; 8])), upstream);
                    assert_eq!(testbed.program.flow_states().len(), 1, "the flow moves");
                }
            }
        }
    });
}

fn config() -> Value {
    let rule = |net: &Net| {
        let upstream = |(nth, address): (usize, &IpAddr)| json!({ "address": address, "port": 4433, "server-id": format!("0a0{}", nth + 1) });
        let upstreams: Vec<Value> = net.upstreams.iter().enumerate().map(upstream).collect();
        let options = json!({
            "tc_action": "block",
            "reply": "nat",
            "strategy": "quic-cid",
            "server-id": { "length": 2 },
        });
        net.rule(if net.is_ipv6() { "quic6" } else { "quic" }, 443, options, &upstreams)
    };
    json!({ "version": 1, "interfaces": ["eth0", "up0"], "rules": [rule(&V4), rule(&V6)] })
}

/// A client that changes address and port stays at its server, and gets answers there.
#[test]
fn clients_migrate_with_their_connection() {
    let lab = Lab::dual(true, true);
    lab.apply(&config());
    for net in [V4, V6] {
        let servers = net.upstreams.map(|address| bind(&lab.upstream, address, 4433));
        for (place, server) in servers.iter().enumerate() {
            let packet = short(&naming(&id(place, 2), PLACE));
            for client in [net.clients[0], net.clients[1], net.clients[0], net.clients[1]] {
                let client = bind(&lab.client, client, 0);
                client.connect((net.key, 443)).expect("connected");
                client.send(&packet).expect("sent");
                let asked = receive(server);
                assert_eq!(asked.payload, packet);
                server.send_to(b"an answer", asked.from).expect("sent");
                expect(&client, b"an answer", client.peer_addr().expect("connected"), TTL - 1);
            }
            let hex: String = packet.iter().map(|byte| format!("{byte:02x}")).collect();
            let (client, key) =
                (SocketAddr::new(net.clients[0], 5000), SocketAddr::new(net.key, 443));
            let get = lab.run(&format!("get {client} {key} -i eth0 --payload 0x{hex}"));
            let text = get.expect(0).stdout;
            assert!(text.contains(&format!("server id 0a0{}\n", place + 1)), "{text}");
            assert!(text.contains(&net.upstreams[place].to_string()), "{text}");
        }
        // a client's first packet names nobody
        let client = bind(&lab.client, net.clients[0], 0);
        client.send_to(&long(&[0x91; 8]), (net.key, 443)).expect("sent");
        receive_any(&servers);
    }
}
