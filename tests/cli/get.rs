//! `udplb get`: its answers compared with the fate of real packets.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use serde_json::{Value, json};
use udplb::commands::get::{Asker, Question};
use udplb::datapath::{generation, pins};

use crate::common::Namespace;
use crate::common::lab::{Lab, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, expect_silence, is_mac};
use crate::common::service::until;
use crate::common::tun::Tun;
use crate::common::wire::Wire;

/// Returns rules of all kinds; the first rule has the first version's strategy and hash.
fn rules() -> Value {
    let two = UPSTREAMS.map(|address| json!({ "address": address, "port": 7000 }));
    let mut mirrored = rule("mirrored", 5001, json!({ "source": "preserve" }), &two[..1]);
    mirrored["mirror"] =
        json!([{ "name": "spy", "address": UPSTREAMS[1], "port": 7001, "sample": 9 }]);
    let drained = [
        json!({ "name": "old", "address": UPSTREAMS[0], "port": 7000, "state": "drained" }),
        json!({ "name": "new", "address": UPSTREAMS[1], "port": 7000 }),
    ];
    let by_parts = json!({ "tc_action": "block", "strategy": ["dst-port", "src-ip"] });
    let mut listed = rule("listed", 5004, by_parts, &two);
    listed["key"]["port"] = json!("5004-5005");
    config(&[
        rule("flows", 5000, json!({ "tc_action": "block" }), &two),
        mirrored,
        rule("drained", 5002, json!({ "tc_action": "block" }), &drained),
        rule("lost", 5003, json!({}), &[json!({ "name": "nowhere", "address": "192.0.2.1" })]),
        listed,
    ])
}

/// Removes MAC addresses and neighbour states, which vary.
fn masked(text: &str) -> Vec<String> {
    let states = ["REACHABLE", "DELAY", "PROBE", "STALE"];
    let word = |word: &str| match word.trim_end_matches(',') {
        plain if is_mac(plain) => "MAC".into(),
        plain if states.contains(&plain) => "NEIGHBOUR".into(),
        _ => word.to_string(),
    };
    text.lines().map(|line| line.split(' ').map(word).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn text_output_explains_the_verdict() {
    let lab = Lab::new();
    assert_eq!(lab.run("get 10.1.0.20 10.1.0.1:5000").code, Some(3));
    lab.apply(&rules());
    let get = |words: &str| masked(&lab.run(&format!("get {words}")).expect(0).stdout);
    assert_eq!(
        get("10.1.0.20:60256 10.1.0.1:5000"),
        [
            "packet    10.1.0.20:60256 > 10.1.0.1:5000 on eth0",
            "rule      flows: 10.1.0.1:5000 block, generation 1",
            "key       src-port 60256, as a number 24811",
            "slot      1 of 2",
            "upstream  10.2.0.21:7000, active",
            "next hop  10.2.0.21 dev up0 MAC NEIGHBOUR MTU 1500",
            "leaves as 10.1.0.1:60256 > 10.2.0.21:7000",
            "verdict   forwarded",
        ]
    );
    assert_eq!(
        get("10.1.0.20 10.1.0.1:5001 --payload text"),
        [
            "packet    10.1.0.20:1024 > 10.1.0.1:5001 on eth0",
            "rule      mirrored: 10.1.0.1:5001 pass, generation 1",
            "copy to   spy 10.2.0.21:7001, active, one packet in 9",
            "next hop  10.2.0.21 dev up0 MAC NEIGHBOUR MTU 1500",
            "leaves as 10.1.0.20:1024 > 10.2.0.21:7001",
            "verdict   forwarded",
            "upstream  10.2.0.20:7000, active",
            "next hop  10.2.0.20 dev up0 MAC NEIGHBOUR MTU 1500",
            "leaves as 10.1.0.20:1024 > 10.2.0.20:7000",
            "verdict   forwarded",
            "here      delivered as it came",
        ]
    );
    assert_eq!(
        get("10.1.0.20:5666 10.1.0.1:5002 -i eth0"),
        [
            "packet    10.1.0.20:5666 > 10.1.0.1:5002 on eth0",
            "rule      drained: 10.1.0.1:5002 block, generation 1",
            "key       src-port 5666, as a number 8726",
            "slot      0 of 2, of old 10.2.0.20:7000, which is drained",
            "upstream  new 10.2.0.21:7000, active",
            "next hop  10.2.0.21 dev up0 MAC NEIGHBOUR MTU 1500",
            "leaves as 10.1.0.1:5666 > 10.2.0.21:7000",
            "verdict   forwarded",
        ]
    );
    assert_eq!(
        get("10.1.0.20:5666 10.1.0.1:5003"),
        [
            "packet    10.1.0.20:5666 > 10.1.0.1:5003 on eth0",
            "rule      lost: 10.1.0.1:5003 pass, generation 1",
            "upstream  nowhere 192.0.2.1, active",
            "verdict   no-route",
            "here      delivered as it came",
        ]
    );
    let key = &get("10.1.0.20:5666 10.1.0.1:5005")[2];
    assert!(key.starts_with("key       [src-ip, dst-port] 10.1.0.20, 5005, as a number "), "{key}");

    lab.run("drain flows/10.2.0.21:7000").expect(0);
    let lines = get("10.1.0.20:60256 10.1.0.1:5000");
    let slot = "slot      1 of 2, of 10.2.0.21:7000, which is drained (override)";
    assert_eq!(lines[3..5], [slot, "upstream  10.2.0.20:7000, active"]);

    let outcome = lab.run("get 10.1.0.20 10.1.0.1:53").expect(3);
    let wanted = "no rule matches 10.1.0.1:53 from 10.1.0.20:1024 on eth0 (generation 1): the packet is let alone\n";
    assert!(outcome.stdout.starts_with(wanted), "{outcome:?}");
    let would = "rule flows matches 10.1.0.1 on port 5000 only\n";
    assert!(outcome.stdout.contains(would), "{outcome:?}");
    let answer = lab.run("get 10.1.0.20 10.1.0.1:53 -o json").expect(3).json();
    assert_eq!(answer["misses"][0]["differs"], "port", "{answer:#}");
    let example = answer["example"].as_str().expect("an example");
    assert_eq!(example, "10.1.0.20 10.1.0.1:5000");
    lab.run(&format!("get {example}")).expect(0);
    lab.run("get 10.1.0.20 10.1.0.1").expect(64).says(&["which port? give it as 10.1.0.1:PORT"]);
    lab.run("get 10.1.0.20 [2001:db8::1]:53")
        .expect(64)
        .says(&["both addresses must be IPv4 or both IPv6"]);
    lab.run("get here 10.1.0.1:53").expect(64);
    let up0 = lab.run("get 10.1.0.20 10.1.0.1:5000 -i up0").expect(3).stdout;
    assert!(up0.contains("rule flows matches on eth0 only\n"), "{up0}");
    lab.run("get 10.1.0.20 10.1.0.1:53 -i eth9").expect(1).says(&["no such interface"]);
}

#[test]
fn ipv6_groups_and_tun_devices_are_answered() {
    let lab = Lab::dual(false, false);
    let _tun = Tun::new(&lab.relay, "tun0");
    lab.relay.ip("address add 10.6.0.1/24 dev tun0");
    let to = |name: &str, key: &str, upstream: &str| {
        json!({
            "name": name,
            "key": { "address": key, "port": 5000 },
            "options": { "tc_action": "block", "source": "preserve" },
            "upstream": [{ "address": upstream, "port": 7000 }],
        })
    };
    let mut all = config(&[
        to("six", RELAY6, UPSTREAMS6[0]),
        to("group", "239.1.2.3", "10.2.0.20"),
        to("tunnel", "10.6.0.1", "10.2.0.20"),
    ]);
    all["interfaces"] = json!(["eth0", "tun0"]);
    lab.apply(&all);
    let check = |words: &str, told: [&str; 4]| {
        let [packet, rule, upstream, left] = told;
        let gateway = upstream.replace(['[', ']'], "");
        let gateway = gateway.trim_end_matches(":7000");
        let wanted = [
            format!("packet    {packet}"),
            format!("rule      {rule} block, generation 1"),
            format!("upstream  {upstream}, active"),
            format!("next hop  {gateway} dev up0 MAC NEIGHBOUR MTU 1500"),
            format!("leaves as {left}"),
            "verdict   forwarded".into(),
        ];
        assert_eq!(masked(&lab.run(&format!("get {words}")).expect(0).stdout), wanted);
    };
    check(
        "[2001:db8:1::20]:9 [2001:db8:1::1]:5000 -i eth0",
        [
            "[2001:db8:1::20]:9 > [2001:db8:1::1]:5000 on eth0",
            "six: [2001:db8:1::1]:5000",
            "[2001:db8:2::20]:7000",
            "[2001:db8:1::20]:9 > [2001:db8:2::20]:7000",
        ],
    );
    check(
        "10.1.0.20:9 239.1.2.3:5000 -i eth0",
        [
            "10.1.0.20:9 > 239.1.2.3:5000 on eth0",
            "group: 239.1.2.3:5000",
            "10.2.0.20:7000",
            "10.1.0.20:9 > 10.2.0.20:7000",
        ],
    );
    check(
        "10.6.0.9:9 10.6.0.1:5000 -i tun0",
        [
            "10.6.0.9:9 > 10.6.0.1:5000 on tun0",
            "tunnel: 10.6.0.1:5000",
            "10.2.0.20:7000",
            "10.6.0.9:9 > 10.2.0.20:7000",
        ],
    );
    lab.run("get 10.6.0.9 10.6.0.1:5000").expect(64).says(&["eth0", "tun0", "-i"]);
}

#[test]
fn get_sends_and_counts_nothing() {
    let lab = Lab::new();
    lab.apply(&rules());
    let here = bind(&lab.relay, RELAY, 5001);
    let cables = [("eth0", &lab.client), ("up0", &lab.upstream)]
        .map(|(name, far)| Wire::new((&lab.relay, name), (far, "eth0")));
    for port in 5000..=5003 {
        lab.run(&format!("get 10.1.0.20 {RELAY}:{port}")).expect(0);
    }
    let answer = lab.run("get 10.1.0.20 10.1.0.1:5001 -o json").expect(0).json();
    assert_eq!(answer["packet"], "delivered");
    assert_eq!(answer["outcomes"][0]["upstream"], "spy");
    assert_eq!(answer["outcomes"][0]["copy"], true);
    assert_eq!(answer["outcomes"][1]["destination"], "10.2.0.20:7000");
    expect_silence(&here);
    for cable in cables {
        assert_eq!(cable.drain(), Vec::<Vec<u8>>::new());
    }
    let status = lab.status();
    for rule in status["rules"].as_array().expect("rules") {
        assert_eq!(rule["counters"]["matched"]["packets"], 0, "{rule:#}");
    }
}

const RELAY6: &str = "2001:db8:1::1";
const UPSTREAMS6: [&str; 2] = ["2001:db8:2::20", "2001:db8:2::21"];

/// Returns rules that balance by every key from a sender's address and port.
fn balancing() -> Value {
    let weighted = |addresses: [String; 2], port: u16| {
        json!([
            { "name": "a", "address": addresses[0], "port": port, "weight": 3 },
            { "name": "b", "address": addresses[1], "port": port },
            { "name": "c", "address": addresses[0], "port": port + 1 },
            { "name": "d", "address": addresses[1], "port": port + 1, "state": "drained" },
        ])
    };
    let v4 = || UPSTREAMS.map(|address| address.to_string());
    let v6 = || UPSTREAMS6.map(String::from);
    let plain = |mut upstreams: Value| {
        upstreams[0].as_object_mut().expect("an upstream").remove("weight");
        upstreams
    };
    let rule = |name: &str, address: &str, port: u16, options: Value, upstream: Value| json!({ "name": name, "key": { "address": address, "port": port }, "options": options, "upstream": upstream });
    let relay = RELAY.to_string();
    let maglev = json!({ "tc_action": "block" });
    let modulo = json!({ "tc_action": "block", "strategy": "src-ip", "hash": "modulo" });
    let port = json!({ "tc_action": "block", "strategy": "src-port" });
    let listed =
        json!({ "tc_action": "block", "strategy": ["src-ip", "payload"], "payload": "dns-id" });
    let payload = json!({ "tc_action": "block", "strategy": "payload", "payload": "statsd" });
    json!({
        "version": 1,
        "interfaces": ["eth0"],
        "rules": [
            rule("maglev", &relay, 5000, maglev.clone(), weighted(v4(), 7000)),
            rule("modulo", &relay, 5001, modulo, plain(weighted(v4(), 7010))),
            rule("port", &relay, 5002, port.clone(), weighted(v4(), 7020)),
            rule("payload", &relay, 5003, payload.clone(), weighted(v4(), 7030)),
            rule("listed", &relay, 5004, listed, weighted(v4(), 7040)),
            rule("maglev6", RELAY6, 5000, maglev, weighted(v6(), 7050)),
            rule("port6", RELAY6, 5002, port, weighted(v6(), 7060)),
            rule("payload6", RELAY6, 5003, payload, weighted(v6(), 7070)),
        ],
    })
}

/// A deterministic pseudo-random number generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Opens a socket at any address and port in the namespace.
fn socket(namespace: &Namespace, address: SocketAddr) -> UdpSocket {
    let socket = namespace.enter(|| UdpSocket::bind(address));
    let socket = socket.unwrap_or_else(|error| panic!("{address}: {error}"));
    socket.set_nonblocking(true).expect("non-blocking");
    socket
}

#[test]
fn plan_announces_the_share_of_moved_flows() {
    const FLOWS: u64 = 2_000;
    let lab = Lab::new();
    let config = |states: [&str; 4], weight: u32| {
        let upstreams = [0, 1, 2, 3].map(|place: usize| {
            json!({
                "name": format!("u{place}"),
                "address": UPSTREAMS[place % 2],
                "port": 7000 + place,
                "state": states[place],
                "weight": if place == 0 { weight } else { 1 },
            })
        });
        let mut all = config(&[rule("flows", 5000, json!({ "tc_action": "block" }), &upstreams)]);
        all.as_object_mut().expect("a map").remove("defaults");
        all
    };
    let (index, mac) = (lab.relay.index("eth0"), lab.relay.mac("eth0"));
    let ends = || {
        let guard = pins::read(&lab.bpffs.pins(), crate::common::net::PATIENCE).expect("pins");
        let guard = guard.expect("something is applied");
        let number = lab.status()["generation"].as_u64().expect("a number") as u32;
        let generation =
            generation::read(&guard, None, number).expect("readable").expect("a generation");
        let asker = Asker::new(&guard, &generation).expect("a dry run");
        let end = |flow: u64| {
            let question = Question {
                source: SocketAddr::new([10, 1, (flow >> 8) as u8, flow as u8].into(), 5000),
                destination: SocketAddr::new(RELAY.into(), 5000),
                payload: Vec::new(),
            };
            let (events, _) =
                lab.relay.enter(|| asker.ask(index, mac, &question)).expect("an answer");
            events[0].0.upstream
        };
        (0..FLOWS).map(end).collect::<Vec<u32>>()
    };
    let (active, drained) = ("active", "drained");
    let all = config([active; 4], 1);
    lab.apply(&all);
    for (drain, next) in [
        ("", config([active, drained, active, active], 1)),
        ("drain flows/u0", config([active, drained, drained, active], 1)),
        ("", config([active; 4], 3)),
    ] {
        if !drain.is_empty() {
            lab.run(drain).expect(0);
        }
        let before = ends();
        let file = lab.write(&next);
        let plan = lab.run(&format!("plan {} -o json", file.display())).expect(0).json();
        let announced = plan["altered"][0]["moved_share"].as_f64().expect("a share") * 100.0;
        lab.apply(&next);
        let after = ends();
        let moved = before.iter().zip(&after).filter(|(one, other)| one != other).count();
        let moved = moved as f64 * 100.0 / FLOWS as f64;
        assert!((announced - moved).abs() < 4.0, "{announced} announced, {moved} moved: {plan:#}");
    }
}

#[test]
fn get_agrees_with_where_packets_go() {
    const PACKETS: u64 = 1_000;
    let lab = Lab::new();
    for (namespace, name, address) in [
        (&lab.client, "eth0", "2001:db8:1::20/64"),
        (&lab.relay, "eth0", "2001:db8:1::1/64"),
        (&lab.relay, "up0", "2001:db8:2::1/64"),
        (&lab.upstream, "eth0", "2001:db8:2::20/64"),
        (&lab.upstream, "eth0", "2001:db8:2::21/64"),
    ] {
        namespace.ip(&format!("addr add {address} dev {name} nodad"));
    }
    lab.relay.sysctl("net.ipv6.conf.all.forwarding", "1");
    // senders in whole networks
    lab.client.ip("route add local 10.9.0.0/16 dev lo");
    lab.client.ip("-6 route add local 2001:db8:9::/64 dev lo");
    lab.client.sysctl("net.ipv6.ip_nonlocal_bind", "1");
    until("the links are up", || {
        let addresses = [&lab.client, &lab.relay, &lab.upstream].map(|it| it.ip("-6 addr show"));
        addresses.iter().all(|text| !text.contains("tentative"))
    });
    lab.apply(&balancing());

    let mut receivers = BTreeMap::new();
    for port in 7000..7050 {
        for address in UPSTREAMS {
            let address = SocketAddr::new(address.into(), port);
            receivers.insert(address, socket(&lab.upstream, address));
        }
    }
    for port in 7050..7080 {
        for address in UPSTREAMS6 {
            let address = SocketAddr::new(address.parse().expect("an address"), port);
            receivers.insert(address, socket(&lab.upstream, address));
        }
    }
    let guard = pins::read(&lab.bpffs.pins(), crate::common::net::PATIENCE).expect("pins");
    let guard = guard.expect("something is applied");
    let generation = generation::read(&guard, None, 1).expect("readable").expect("a generation");
    let asker = Asker::new(&guard, &generation).expect("a dry run");
    let (index, mac) = (lab.relay.index("eth0"), lab.relay.mac("eth0"));

    let mut random = Random(7);
    let mut went: BTreeMap<SocketAddr, u64> = BTreeMap::new();
    for number in 0..PACKETS {
        let v6 = number % 2 == 1;
        let host = random.below(65_536) as u16;
        let from: IpAddr = match v6 {
            true => format!("2001:db8:9::{host:x}").parse().expect("an address"),
            false => [10, 9, (host >> 8) as u8, host as u8].into(),
        };
        let source = SocketAddr::new(from, 1024 + random.below(60_000) as u16);
        let to: IpAddr = if v6 { RELAY6.parse().expect("an address") } else { RELAY.into() };
        let port = 5000 + random.below(5) as u16;
        let port = if v6 && [5001, 5004].contains(&port) { 5000 } else { port };
        // some payloads contain no metric
        let payload = match random.below(5) {
            0 => format!("{number}"),
            _ => format!("metric{}:{number}|c", random.below(40)),
        };
        let question = Question {
            source,
            destination: SocketAddr::new(to, port),
            payload: payload.clone().into_bytes(),
        };
        let (events, _) = lab.relay.enter(|| asker.ask(index, mac, &question)).expect("an answer");
        let [event] = events[..] else { panic!("{} events of {question:?}", events.len()) };
        let ids = &generation.description.ids;
        let rules = generation.description.desired.rules.iter().zip(ids);
        let mut upstreams = rules.flat_map(|(rule, ids)| rule.upstreams.iter().zip(&ids.upstreams));
        let (upstream, _) =
            upstreams.find(|(_, id)| **id == event.0.upstream).expect("an upstream");
        let said = SocketAddr::new(upstream.address.ip, upstream.port.expect("a port"));

        let sender = socket(&lab.client, source);
        sender.send_to(payload.as_bytes(), question.destination).expect("sent");
        let mut got = None;
        until("it arrives", || {
            // the predicted receiver is checked first
            let all = receivers.get_key_value(&said).into_iter().chain(&receivers);
            for (address, receiver) in all {
                let mut buffer = [0; 64];
                match receiver.recv(&mut buffer) {
                    Ok(length) => {
                        assert_eq!(&buffer[..length], payload.as_bytes());
                        got = Some(*address);
                        break;
                    }
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            got.is_some()
        });
        assert_eq!(got, Some(said), "{question:?}: {event:?}");
        *went.entry(said).or_default() += 1;
    }
    // the test covered three upstreams of each of eight rules
    assert_eq!(went.len(), 24, "{went:?}");
}
