//! Distribution of packets: receivers, mirrors, samples, and the choice of upstream and rule; from socket
//! to socket.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use serde_json::{Value, json};

use crate::common::Namespace;
use crate::common::lab::{CLIENTS, Lab, Net, RELAY, UPSTREAMS, V4, V6, config, rule, upstream};
use crate::common::net::{
    TTL, UDP_SEGMENT, bind, expect, expect_silence, expect_silence_of, own, payload, receive,
    receive_any, set, try_receive,
};
use crate::common::wire::stay_on_this_cpu;
use crate::ends::cuts_up_without_offload;

/// The `source` of a rule's receivers, in turn.
const SOURCES: [&str; 3] = ["vip", "preserve", "egress"];
const ACTIONS: [(u16, &str); 2] = [(5000, "pass"), (5001, "block")];

fn receiver(name: &str, address: impl Into<IpAddr>, port: u16, source: &str) -> Value {
    json!({ "name": name, "address": address.into(), "port": port, "source": source })
}

/// Returns a replicating rule for each of [`ACTIONS`].
fn replicate(net: &Net, receivers: &[Value]) -> Vec<Value> {
    let family = if net.is_ipv6() { 6 } else { 4 };
    let rule = |(port, action): (u16, &str)| {
        let options = json!({ "tc_action": action, "mode": "replicate", "source": "vip" });
        net.rule(&format!("{action}-{family}"), port, options, receivers)
    };
    ACTIONS.map(rule).to_vec()
}

/// Returns a configuration with the strategies and hash of `version: 1`.
fn modern(rules: &[Value]) -> Value {
    let mut config = config(rules);
    config["defaults"] = json!({ "tc_action": "block" });
    config
}

/// Sends a payload, with GSO in segments of so many bytes (0: without); returns the datagrams that arrive.
fn send_segmented(
    sender: &UdpSocket,
    to: (IpAddr, u16),
    length: usize,
    segment: i32,
) -> Vec<Vec<u8>> {
    set(sender, libc::SOL_UDP, UDP_SEGMENT, segment);
    let payload = payload(length);
    sender.send_to(&payload, to).expect("sent");
    match segment {
        0 => vec![payload],
        _ => payload.chunks(segment as usize).map(<[u8]>::to_vec).collect(),
    }
}

#[test]
fn receivers_get_the_senders_they_name() {
    let lab = Lab::new();
    let [first, second] = CLIENTS.map(|client| bind(&lab.client, client, 0));
    let receivers = [7001, 7002, 7003].map(|port| bind(&lab.upstream, UPSTREAMS[0], port));
    let to = |name: &str, port: u16, field: &str, network: String| json!({ "name": name, "address": UPSTREAMS[0], "port": port, field: network });
    let upstreams = [
        to("all", 7001, "not-from", "203.0.113.0/24".into()),
        to("first", 7002, "from", CLIENTS[0].to_string()),
        to("others", 7003, "not-from", CLIENTS[0].to_string()),
    ];
    for action in ["block", "pass"] {
        let options = json!({ "tc_action": action, "mode": "replicate", "source": "preserve" });
        lab.apply(&config(&[rule("flows", 7100, options, &upstreams)]));
        for (sender, gets) in [(&first, [0, 1]), (&second, [0, 2])] {
            sender.send_to(b"flows", (RELAY, 7100)).expect("a packet");
            for receiver in gets {
                expect(&receivers[receiver], b"flows", own(sender), 63);
            }
        }
        expect_silence_of(&receivers);
    }
    let answer = lab.run(&format!("get {} {RELAY}:7100", CLIENTS[0])).expect(0).stdout;
    let left_out = format!("left out  others: it gets no packets from {}\n", CLIENTS[0]);
    assert!(answer.contains(&left_out), "{answer}");
    let few = config(&[rule("flows", 7100, json!({ "mode": "replicate" }), &upstreams[1..2])]);
    lab.apply(&few);
    let answer = lab.run(&format!("get {} {RELAY}:7100", CLIENTS[1])).expect(3).stdout;
    assert!(answer.contains("rule flows has no upstream that gets packets of"), "{answer}");
    assert_eq!(lab.packets("flows", "first", "forwarded"), 2);
}

#[test]
fn all_64_receivers_get_a_copy() {
    let lab = Lab::dual(true, false);
    let source = |number: u16| SOURCES[usize::from(number) % SOURCES.len()];
    let address = |net: &Net, number: u16| net.upstreams[usize::from(number) % 2];
    let rules = [V4, V6].map(|net| {
        let receivers: Vec<Value> = (0..64)
            .map(|number| {
                let (address, source) = (address(&net, number), source(number));
                receiver(&format!("r{number}"), address, 7000 + number, source)
            })
            .collect();
        replicate(&net, &receivers)
    });
    lab.apply(&config(&rules.concat()));
    for net in [V4, V6] {
        let sender = bind(&lab.client, net.clients[0], 0);
        let receivers: Vec<UdpSocket> = (0..64)
            .map(|number| bind(&lab.upstream, address(&net, number), 7000 + number))
            .collect();
        for (port, action) in ACTIONS {
            let here = bind(&lab.relay, net.key, port);
            // the last one comes in seven fragments
            for (length, segment) in [(0, 0), (1, 0), (1452, 0), (4500, 1000), (9000, 0)] {
                for datagram in &send_segmented(&sender, (net.key, port), length, segment) {
                    for (number, receiver) in receivers.iter().enumerate() {
                        let from = net.seen(source(number as u16), own(&sender));
                        expect(receiver, datagram, from, TTL - 1);
                    }
                    if action == "pass" {
                        expect(&here, datagram, own(&sender), TTL);
                    }
                }
            }
            expect_silence_of(receivers.iter().chain([&here]));
        }
    }
}

/// Receives numbered datagrams and checks that no socket misses one.
#[track_caller]
fn check_numbers(sender: &UdpSocket, to: (IpAddr, u16), receivers: &[&UdpSocket]) {
    for number in 0..40_u32 {
        sender.send_to(&number.to_be_bytes(), to).expect("sent");
    }
    for receiver in receivers {
        for number in 0..40_u32 {
            assert_eq!(receive(receiver).payload, number.to_be_bytes(), "{:?}", own(receiver));
        }
    }
}

#[test]
fn dead_receivers_cost_the_others_nothing() {
    let lab = Lab::dual(true, false);
    let dark = Namespace::new();
    lab.relay.link("dark0", &dark, "eth0", false);
    for (namespace, interface, host) in [(&lab.relay, "dark0", 1), (&dark, "eth0", 20)] {
        namespace.ip(&format!("addr add 10.3.0.{host}/24 dev {interface}"));
        namespace.ip(&format!("addr add 2001:db8:3::{host}/64 dev {interface} nodad"));
    }
    let nets = [(V4, "10.2.0.99", "10.3.0.20"), (V6, "2001:db8:2::99", "2001:db8:3::20")]
        .map(|(net, nobody, dark)| (net, nobody.parse::<IpAddr>(), dark.parse::<IpAddr>()))
        .map(|(net, nobody, dark)| (net, nobody.expect("an address"), dark.expect("one")));
    let rules = nets.map(|(net, nobody, dark)| {
        let receivers = [
            receiver("nobody", nobody, 7000, "vip"),
            receiver("first", net.upstreams[0], 7000, "egress"),
            receiver("dark", dark, 7000, "preserve"),
            receiver("last", net.upstreams[1], 7000, "preserve"),
            receiver("nobody-either", nobody, 7001, "egress"),
        ];
        replicate(&net, &receivers)
    });
    lab.apply(&config(&rules.concat()));
    let states: [(&str, &dyn Fn()); 4] = [
        ("all is well", &|| ()),
        ("no carrier", &|| _ = dark.ip("link set eth0 down")),
        ("down", &|| _ = lab.relay.ip("link set dark0 down")),
        ("no interface", &|| _ = lab.relay.ip("link del dark0")),
    ];
    for (state, change) in states {
        change();
        for (net, ..) in nets {
            let sender = bind(&lab.client, net.clients[0], 0);
            let first = bind(&lab.upstream, net.upstreams[0], 7000);
            let last = bind(&lab.upstream, net.upstreams[1], 7000);
            for (port, action) in ACTIONS {
                let here = bind(&lab.relay, net.key, port);
                match action {
                    "pass" => check_numbers(&sender, (net.key, port), &[&first, &last, &here]),
                    _ => check_numbers(&sender, (net.key, port), &[&first, &last]),
                }
                println!("{state}: {action}");
            }
            expect_silence_of([&first, &last]);
        }
    }
    for rule in ["pass-4", "block-4", "pass-6", "block-6"] {
        for name in ["first", "last"] {
            assert_eq!(lab.packets(rule, name, "forwarded"), 160, "{rule} {name}");
        }
        for name in ["nobody", "nobody-either", "dark"] {
            assert_eq!(lab.packets(rule, name, "matched"), 160, "{rule} {name}");
        }
        assert_eq!(lab.packets(rule, "nobody", "unresolved"), 160, "{rule}");
    }
}

#[test]
fn mirrors_get_copies_beside_upstream_and_host() {
    let lab = Lab::dual(true, false);
    let rules = [V4, V6].map(|net| {
        let balanced = net.upstreams.map(|address| upstream(address, 7000));
        ACTIONS.map(|(port, action)| {
            let options = json!({ "tc_action": action, "source": "vip" });
            let name = format!("{action}-{}", if net.is_ipv6() { 6 } else { 4 });
            let mut rule = net.rule(&name, port, options, &balanced);
            let mut sampled = receiver("sampled", net.upstreams[1], 7002, "vip");
            sampled["sample"] = json!(5);
            rule["mirror"] = json!([
                receiver("all", net.upstreams[0], 7001, "preserve"),
                sampled,
                receiver("egress", net.upstreams[1], 7003, "egress"),
            ]);
            rule
        })
    });
    lab.apply(&config(&rules.concat()));
    for net in [V4, V6] {
        // with the first version's mapping each sender selects a different upstream
        let senders = [5666, 60256].map(|port| bind(&lab.client, net.clients[0], port));
        let balanced = net.upstreams.map(|address| bind(&lab.upstream, address, 7000));
        let all = bind(&lab.upstream, net.upstreams[0], 7001);
        let sampled = bind(&lab.upstream, net.upstreams[1], 7002);
        let egress = bind(&lab.upstream, net.upstreams[1], 7003);
        for (port, action) in ACTIONS {
            let here = bind(&lab.relay, net.key, port);
            let mut turn = Vec::new();
            for number in 0..30_usize {
                // a sample counts datagrams, and not their fragments
                let length = if number % 3 == 0 { 4000 } else { 100 + number };
                let (sender, payload) = (&senders[number % 2], payload(length));
                let from = own(sender);
                sender.send_to(&payload, (net.key, port)).expect("sent");
                expect(&balanced[number % 2], &payload, net.seen("vip", from), TTL - 1);
                expect(&all, &payload, from, TTL - 1);
                expect(&egress, &payload, net.seen("egress", from), TTL - 1);
                turn.push((payload.clone(), net.seen("vip", from)));
                if turn.len() == 5 {
                    let got = receive(&sampled);
                    assert!(turn.contains(&(got.payload, got.from)));
                    turn.clear();
                }
                if action == "pass" {
                    expect(&here, &payload, from, TTL);
                }
            }
            expect_silence_of([&balanced[0], &balanced[1], &all, &sampled, &egress, &here]);
        }
    }
}

/// The address is another one than the way's, and belongs to this host. Two receivers on one host tell the copies
/// apart by their ports; arpd leaves the source alone.
#[test]
fn named_sources_are_seen() {
    // on two CPUs a fragment may overtake its first one, and is not sent
    stay_on_this_cpu();
    let lab = Lab::dual(false, false);
    let named = [(V4, "10.9.0.9", 32), (V6, "2001:db8:9::9", 128)];
    for (_, address, prefix) in named {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        lab.relay.ip(&format!("addr add {address}/{prefix} dev up0 {nodad}"));
        let family = if address.contains(':') { "-6" } else { "-4" };
        lab.upstream.ip(&format!("{family} route add {address} dev eth0"));
    }
    let rules = named.map(|(net, address, _)| {
        let address: IpAddr = address.parse().expect("an address");
        let with_port = SocketAddr::new(address, 9995).to_string();
        replicate(
            &net,
            &[
                receiver("address", net.upstreams[0], 7000, &address.to_string()),
                receiver("port", net.upstreams[0], 7001, &with_port),
                receiver("last", net.upstreams[1], 7000, &with_port),
            ],
        )
    });
    lab.apply(&config(&rules.concat()));
    let check = |lengths: [usize; 2]| {
        for (net, address, _) in named {
            let sender = bind(&lab.client, net.clients[0], 0);
            let receivers = [(0, 7000), (0, 7001), (1, 7000)]
                .map(|(host, port)| bind(&lab.upstream, net.upstreams[host], port));
            let address: IpAddr = address.parse().expect("an address");
            let ports = [own(&sender).port(), 9995, 9995];
            for (port, action) in ACTIONS {
                let here = bind(&lab.relay, net.key, port);
                // the longer one comes in fragments; the second packet takes the fast path
                for length in lengths.into_iter().chain(lengths) {
                    let payload = payload(length);
                    sender.send_to(&payload, (net.key, port)).expect("sent");
                    for (receiver, port) in receivers.iter().zip(ports) {
                        expect(receiver, &payload, SocketAddr::new(address, port), TTL - 1);
                    }
                    if action == "pass" {
                        expect(&here, &payload, own(&sender), TTL);
                    }
                }
            }
            expect_silence_of(&receivers);
        }
    };
    check([100, 4000]);
    lab.run("arpd --once").expect(0);
    check([101, 4001]);
    let answer = lab.run(&format!("get {}:5666 {RELAY}:5001", CLIENTS[0])).expect(0).stdout;
    assert!(answer.contains("10.9.0.9:9995"), "{answer}");
}

/// Receivers on this host get packets as they came but for the port, beside upstreams elsewhere, whole and in
/// fragments; none matches again.
#[test]
fn local_receivers_get_packets_as_they_came() {
    for offload in [true, false] {
        let lab = Lab::dual(offload, offload);
        let rules = [V4, V6].map(|net| local_rules(&net));
        lab.apply(&config(&rules.concat()));
        check_local(&lab, 0);
        lab.run("arpd --once").expect(0);
        check_local(&lab, 1);
        for family in [4, 6] {
            for (rule, upstream) in
                [("block", "here-6000"), ("both", "here-6002"), ("copies", "here-6005")]
            {
                let rule = format!("{rule}-{family}");
                // two datagrams, one of three fragments, and one of five segments, twice
                assert_eq!(lab.packets(&rule, upstream, "forwarded"), 20, "{rule}");
                assert_eq!(lab.packets(&rule, upstream, "matched"), 20, "{rule}");
            }
        }
        let status = lab.run("status").expect(0).stdout;
        assert!(status.contains("here-6000 local:6000"), "{status}");
        let answer = lab.run(&format!("get {}:5666 {RELAY}:5000", CLIENTS[0])).expect(0).stdout;
        let here = format!("here      {}:5666 > {RELAY}:6000\n", CLIENTS[0]);
        assert!(answer.contains("upstream  here-6000 local:6000"), "{answer}");
        assert!(answer.contains(&here) && !answer.contains("as it came"), "{answer}");
        lab.run("drain both-4/here-6002").expect(0);
        let sender = bind(&lab.client, V4.clients[0], 0);
        let [drained, other] = [6002, 6012].map(|port| bind(&lab.relay, V4.key, port));
        sender.send_to(b"drained", (V4.key, 5002)).expect("sent");
        expect(&other, b"drained", own(&sender), TTL);
        expect_silence(&drained);
    }
}

/// Returns a rule for each way to a receiver on this host.
fn local_rules(net: &Net) -> Vec<Value> {
    let local = |port| json!({ "name": format!("here-{port}"), "address": "local", "port": port });
    let far = receiver("far", net.upstreams[0], 7000, "preserve");
    let rule = |name: &str, port, (action, mode), upstreams: &[Value]| {
        let family = if net.is_ipv6() { 6 } else { 4 };
        let options = json!({ "tc_action": action, "mode": mode, "source": "vip" });
        net.rule(&format!("{name}-{family}"), port, options, upstreams)
    };
    let mut mirrored = rule("mirrored", 5003, ("pass", "balance"), std::slice::from_ref(&far));
    mirrored["mirror"] = json!([local(6003)]);
    vec![
        rule("block", 5000, ("block", "balance"), &[local(6000)]),
        rule("same", 5001, ("block", "balance"), &[json!({ "address": "local" })]),
        rule("both", 5002, ("block", "replicate"), &[local(6002), far.clone(), local(6012)]),
        mirrored,
        rule("pass", 5004, ("pass", "balance"), &[local(6004)]),
        rule("copies", 5005, ("pass", "replicate"), &[local(6005), far]),
    ]
}

/// Sends datagrams by all of [`local_rules`]; `more` makes them differ from earlier ones.
fn check_local(lab: &Lab, more: usize) {
    let mut lengths = vec![(0, 0), (100 + more, 0), (4000 + more, 0)];
    match cuts_up_without_offload(lab) {
        true => lengths.push((4500 + more, 1000)),
        false => lengths.extend([(900 + more, 0); 5]),
    }
    for net in [V4, V6] {
        let sender = bind(&lab.client, net.clients[0], 0);
        let far = bind(&lab.upstream, net.upstreams[0], 7000);
        let own = own(&sender);
        for (port, here, sends) in [
            (5000, &[6000][..], false),
            (5001, &[5001], false),
            (5002, &[6002, 6012], true),
            (5003, &[6003, 5003], true),
            (5004, &[6004, 5004], false),
            (5005, &[6005, 5005], true),
        ] {
            let here: Vec<UdpSocket> =
                here.iter().map(|port| bind(&lab.relay, net.key, *port)).collect();
            // the third comes in fragments, the last one as a GSO packet
            for (length, segment) in &lengths {
                for datagram in &send_segmented(&sender, (net.key, port), *length, *segment) {
                    here.iter().for_each(|socket| expect(socket, datagram, own, TTL));
                    if sends {
                        expect(&far, datagram, own, TTL - 1);
                    }
                }
            }
            expect_silence_of(here.iter().chain([&far]));
        }
    }
}

#[test]
fn samples_are_exact() {
    let lab = Lab::new();
    let samples = [1, 2, 3, 7, 100, 4096_u32];
    let receivers: Vec<Value> = (7000..)
        .zip(samples)
        .map(|(port, sample)| {
            let mut receiver = receiver(&sample.to_string(), V4.upstreams[0], port, "preserve");
            receiver["sample"] = json!(sample);
            receiver
        })
        .collect();
    lab.apply(&config(&replicate(&V4, &receivers)));
    let sender = bind(&lab.client, V4.clients[0], 0);
    let sockets: Vec<UdpSocket> = (7000..)
        .take(samples.len())
        .map(|port| bind(&lab.upstream, V4.upstreams[0], port))
        .collect();
    let count = 10_000_u32;
    for number in 0..count {
        sender.send_to(&number.to_be_bytes(), (V4.key, 5001)).expect("sent");
        // wait for each datagram, so that no queue overflows
        assert_eq!(receive(&sockets[0]).payload, number.to_be_bytes());
    }
    for (socket, sample) in sockets.iter().zip(samples).skip(1) {
        let mut places = HashSet::new();
        for turn in 0..count / sample {
            let payload = receive(socket).payload;
            let number = u32::from_be_bytes(payload.try_into().expect("a number"));
            assert_eq!(number / sample, turn, "one of {sample}");
            places.insert(number % sample);
        }
        // the sampled positions vary, so periodic traffic cannot align with them
        assert!(places.len() as u32 > sample.min(count / sample) / 2, "{sample}: {places:?}");
        // a sample of the last, incomplete turn
        socket.set_nonblocking(true).expect("a socket");
        if let Ok(last) = try_receive(socket) {
            let number = u32::from_be_bytes(last.payload.try_into().expect("a number"));
            assert_eq!(number / sample, count / sample, "one of {sample}");
        }
        socket.set_nonblocking(false).expect("a socket");
    }
    expect_silence_of(&sockets);
}

/// Returns rules with one key each; their upstreams differ in the port.
fn keyed(net: &Net, keys: &[(&str, Value)]) -> Vec<Value> {
    let rule = |(number, (name, key)): (u16, &(&str, Value))| {
        let name = format!("{name}-{}", if net.is_ipv6() { 6 } else { 4 });
        let upstreams = [upstream(net.upstreams[0], 7000 + number)];
        let mut rule = net.rule(&name, 0, json!({ "source": "preserve" }), &upstreams);
        rule["key"] = key.clone();
        rule
    };
    (0..).zip(keys).map(rule).collect()
}

fn sockets(lab: &Lab, net: &Net, count: u16) -> Vec<UdpSocket> {
    (0..count).map(|number| bind(&lab.upstream, net.upstreams[0], 7000 + number)).collect()
}

/// The longest prefix wins; packets of senders in no network pass.
#[test]
fn rules_are_chosen_by_sender() {
    let lab = Lab::dual(true, false);
    for address in ["10.1.7.7/32", "10.7.7.7/32"] {
        lab.client.ip(&format!("addr add {address} dev eth0"));
        lab.relay.ip(&format!("route add {address} dev eth0"));
    }
    for address in ["2001:db8:1:7::7", "2001:db8:7::7"] {
        lab.client.ip(&format!("addr add {address}/128 dev eth0 nodad"));
        lab.relay.ip(&format!("-6 route add {address} dev eth0"));
    }
    // networks of three rules, a sender in each and one outside
    type Senders = (Net, [&'static [&'static str]; 3], [&'static str; 4]);
    let lists: [Senders; 2] = [
        (
            V4,
            [&["10.1.0.0/16", "192.0.2.0/24"], &["10.1.0.0/24"], &["10.1.0.21", "198.51.100.7"]],
            ["10.1.7.7", "10.1.0.20", "10.1.0.21", "10.7.7.7"],
        ),
        (
            V6,
            [&["2001:db8::/47"], &["2001:db8:1::/64", "fd00::/8"], &["2001:db8:1::21"]],
            ["2001:db8:1:7::7", "2001:db8:1::20", "2001:db8:1::21", "2001:db8:7::7"],
        ),
    ];
    for with_rest in [false, true] {
        let rules = lists.map(|(net, networks, _)| {
            let mut keys: Vec<(&str, Value)> = ["wide", "narrow", "host"]
                .into_iter()
                .zip(networks)
                .map(|(name, from)| {
                    (name, json!({ "address": net.key, "port": 5000, "from": from }))
                })
                .collect();
            if with_rest {
                keys.push(("rest", json!({ "address": net.key, "port": 5000 })));
            }
            keyed(&net, &keys)
        });
        lab.apply(&modern(&rules.concat()));
        for (net, _, senders) in &lists {
            let receivers = sockets(&lab, net, 4);
            let here = bind(&lab.relay, net.key, 5000);
            for (number, sender) in senders.iter().enumerate() {
                let sender = bind(&lab.client, sender.parse::<IpAddr>().expect("an address"), 0);
                sender.send_to(b"from somewhere", (net.key, 5000)).expect("sent");
                match number < 3 || with_rest {
                    true => expect(&receivers[number], b"from somewhere", own(&sender), TTL - 1),
                    false => expect(&here, b"from somewhere", own(&sender), TTL),
                }
            }
            expect_silence_of(receivers.iter().chain([&here]));
        }
    }
}

/// An exact address takes precedence over `any`, then an exact port over `any`.
#[test]
fn any_address_and_any_port_match() {
    let lab = Lab::dual(true, false);
    lab.relay.ip("addr add 10.1.0.2/24 dev eth0");
    lab.relay.ip("addr add 2001:db8:1::2/64 dev eth0 nodad");
    let nets = [(V4, "10.1.0.2", "0.0.0.0/0"), (V6, "2001:db8:1::2", "::/0")];
    let rules = nets.map(|(net, _, all)| {
        let keys = [
            ("both", json!({ "address": net.key, "port": 6000 })),
            ("address", json!({ "address": net.key, "port": "any" })),
            ("port", json!({ "address": "any", "port": 6000, "from": [all] })),
            ("neither", json!({ "address": "any", "port": "any", "from": [all] })),
        ];
        keyed(&net, &keys)
    });
    lab.apply(&modern(&rules.concat()));
    lab.client.ip("route add 10.2.0.0/24 via 10.1.0.1");
    lab.client.ip("-6 route add 2001:db8:2::/64 via 2001:db8:1::1");
    for (net, other, _) in nets {
        let other = other.parse::<IpAddr>().expect("an address");
        let receivers = sockets(&lab, &net, 4);
        let sender = bind(&lab.client, net.clients[0], 0);
        let cases = [(net.key, 6000), (net.key, 6001), (other, 6000), (other, 6001)];
        for (receiver, to) in receivers.iter().zip(cases) {
            sender.send_to(b"which one?", to).expect("sent");
            expect(receiver, b"which one?", own(&sender), TTL - 1);
        }
        // packets in transit are not addressed to the relay
        let transit = bind(&lab.upstream, net.upstreams[1], 6000);
        sender.send_to(b"transit", own(&transit)).expect("sent");
        expect(&transit, b"transit", own(&sender), TTL - 1);
        expect_silence_of(&receivers);
    }
}

/// Returns a rule with upstreams that differ in the port, which is also their name.
fn balanced(net: &Net, options: Value, ports: &[u16]) -> Value {
    let upstream =
        |port: &u16| json!({ "name": port.to_string(), "address": net.upstreams[0], "port": port });
    let upstreams: Vec<Value> = ports.iter().map(upstream).collect();
    net.rule("balanced", 5000, options, &upstreams)
}

/// Sends a datagram and returns the receiver that gets it.
#[track_caller]
fn target(sender: &UdpSocket, net: &Net, payload: &[u8], receivers: &[UdpSocket]) -> usize {
    sender.send_to(payload, (net.key, 5000)).expect("sent");
    let (index, datagram) = receive_any(receivers);
    assert_eq!((&datagram.payload[..], datagram.from), (payload, net.seen("vip", own(sender))));
    index
}

#[test]
fn statsd_is_sharded_by_the_name_of_the_metric() {
    let lab = Lab::dual(true, false);
    for net in [V4, V6] {
        let options = json!({ "strategy": "payload", "payload": "statsd" });
        lab.apply(&modern(&[balanced(&net, options, &[7000, 7001, 7002, 7003])]));
        let receivers = sockets(&lab, &net, 4);
        let senders = [bind(&lab.client, net.clients[0], 0), bind(&lab.client, net.clients[1], 0)];
        let mut used = [0; 4];
        for number in 0..32 {
            let name = match number % 4 {
                0 => format!("web{number}.nginx.requests"),
                1 => format!("stats.timers.api.v{number}.latency_ms"),
                2 => format!("queue-{number}"),
                _ => format!("g{number}"),
            };
            let shard = target(&senders[0], &net, format!("{name}:1|c").as_bytes(), &receivers);
            used[shard] += 1;
            for rest in [
                ":320|ms|@0.1",
                ":-7|g",
                ":765|s\n",
                ":1|c|#env:prod,region:eu",
                ":12:14:9|h|@0.5|#a:b",
                // the first metric selects
                ":1|c\nanother.metric:3|c\nand.another:5|g",
            ] {
                let line = format!("{name}{rest}");
                for sender in &senders {
                    let found = target(sender, &net, line.as_bytes(), &receivers);
                    assert_eq!(found, shard, "{line:?}");
                }
            }
        }
        assert!(used.iter().all(|count| *count > 0), "{used:?}");
        // without a metric the sender selects
        for sender in &senders {
            let nameless = ["", ":1|c", "no colon", "a line\nthen:1|c"];
            let targets = nameless.map(|line| target(sender, &net, line.as_bytes(), &receivers));
            assert_eq!(targets, [targets[0]; 4]);
        }
    }
}

#[test]
fn payload_bytes_select_the_upstream() {
    let lab = Lab::dual(true, false);
    for net in [V4, V6] {
        // RTP's SSRC
        let bytes = json!({ "offset": 8, "length": 4 });
        let options = json!({ "strategy": "payload", "payload": bytes });
        lab.apply(&modern(&[balanced(&net, options, &[7000, 7001, 7002, 7003])]));
        let receivers = sockets(&lab, &net, 4);
        let senders = [bind(&lab.client, net.clients[0], 0), bind(&lab.client, net.clients[1], 0)];
        let mut used = [0; 4];
        for stream in 0..24_u32 {
            let packet = |sequence: u16, length: usize| {
                let header = [&[0x80, 96][..], &sequence.to_be_bytes(), &[0; 4]].concat();
                [&header[..], &stream.to_be_bytes(), &payload(length)].concat()
            };
            let first = target(&senders[0], &net, &packet(0, 160), &receivers);
            used[first] += 1;
            for (sequence, length) in (1..).zip([0, 1, 160, 1380]) {
                let found = target(&senders[1], &net, &packet(sequence, length), &receivers);
                assert_eq!(found, first, "stream {stream}, {length} bytes");
            }
        }
        assert!(used.iter().all(|count| *count > 0), "{used:?}");
        let short = target(&senders[0], &net, &[7; 11], &receivers);
        assert_eq!(target(&senders[0], &net, &[8; 4], &receivers), short);
    }
}

#[test]
fn listed_parts_select_together() {
    let lab = Lab::dual(true, false);
    for net in [V4, V6] {
        let options = json!({ "strategy": ["src-ip", "payload"], "payload": "ipfix-domain" });
        lab.apply(&modern(&[balanced(&net, options, &[7000, 7001, 7002, 7003])]));
        let receivers = sockets(&lab, &net, 4);
        // two sockets of one sender, and another sender
        let senders = [0, 0, 1].map(|client| bind(&lab.client, net.clients[client], 0));
        let mut differ = 0;
        for domain in 0..24_u32 {
            let message = [&[0, 10, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0][..], &domain.to_be_bytes()];
            let targets = [0, 1, 2]
                .map(|sender: usize| target(&senders[sender], &net, &message.concat(), &receivers));
            assert_eq!(targets[0], targets[1], "domain {domain}");
            differ += u32::from(targets[0] != targets[2]);
        }
        assert!(differ > 0, "the sender does not matter");
    }
}

#[test]
fn random_strategy_uses_every_upstream() {
    let lab = Lab::new();
    let options = json!({ "strategy": "random" });
    lab.apply(&modern(&[balanced(&V4, options, &[7000, 7001, 7002, 7003])]));
    let receivers = sockets(&lab, &V4, 4);
    let sender = bind(&lab.client, V4.clients[0], 0);
    let mut used = [0; 4];
    for _ in 0..400 {
        used[target(&sender, &V4, b"anywhere", &receivers)] += 1;
    }
    // a count outside this range has a probability of one in millions
    assert!(used.iter().all(|count| (50..150).contains(count)), "{used:?}");
}

/// Number of flows, which differ in the source port.
const FLOWS: u16 = 400;

/// Returns the upstream port of each flow.
fn flows(lab: &Lab, net: &Net, receivers: &[UdpSocket]) -> Vec<u16> {
    let flow = |number| {
        let sender = bind(&lab.client, net.clients[0], 20_000 + number);
        own(&receivers[target(&sender, net, b"flow", receivers)]).port()
    };
    (0..FLOWS).map(flow).collect()
}

#[test]
fn maglev_spreads_flows_and_moves_few() {
    let lab = Lab::dual(true, false);
    for net in [V4, V6] {
        let receivers = sockets(&lab, &net, 4);
        let all = balanced(&net, json!({}), &[7000, 7001, 7002, 7003]);
        let weighted = |mut rule: Value| {
            for upstream in rule["upstream"].as_array_mut().expect("upstreams") {
                upstream["weight"] = json!(if upstream["port"] == 7003 { 2 } else { 1 });
            }
            rule
        };
        let apply = |rule: Value| {
            lab.apply(&modern(&[rule]));
            flows(&lab, &net, &receivers)
        };
        let before = apply(weighted(all.clone()));
        for (port, share) in [(7000, 80), (7001, 80), (7002, 80), (7003, 160)] {
            let count = before.iter().filter(|it| **it == port).count();
            // four standard deviations
            assert!(count.abs_diff(share) < 40, "{port} has {count} of {FLOWS} flows");
        }
        let reversed = balanced(&net, json!({}), &[7003, 7002, 7001, 7000]);
        assert_eq!(apply(weighted(reversed)), before, "in another order");

        let without = apply(weighted(balanced(&net, json!({}), &[7000, 7002, 7003])));
        let stays = |it: &(&u16, &u16)| *it.0 != 7001 && it.0 != it.1;
        let moved = before.iter().zip(&without).filter(stays).count();
        assert!(moved <= usize::from(FLOWS) * 2 / 100, "{moved} moved that need not");

        let mut drained = weighted(all.clone());
        drained["upstream"][1]["state"] = json!("drained");
        let drained = apply(drained);
        let mut heirs = [0; 4];
        for (before, drained) in before.iter().zip(&drained) {
            match *before {
                7001 => heirs[usize::from(drained - 7000)] += 1,
                _ => assert_eq!(before, drained),
            }
        }
        assert!(heirs[1] == 0 && [0, 2, 3].iter().all(|heir| heirs[*heir] > 0), "{heirs:?}");
        assert_eq!(apply(weighted(all)), before, "as it was");
    }
}

#[test]
fn fully_drained_rule_sends_nothing() {
    let lab = Lab::new();
    let drained = |mode: &str| {
        let mut upstream = upstream(V4.upstreams[0], 7000);
        upstream["state"] = json!("drained");
        let options = json!({ "mode": mode, "tc_action": "pass", "source": "vip" });
        V4.rule("drained", 5000, options, &[upstream])
    };
    let receiver = bind(&lab.upstream, V4.upstreams[0], 7000);
    let here = bind(&lab.relay, V4.key, 5000);
    let sender = bind(&lab.client, V4.clients[0], 0);
    for mode in ["balance", "replicate"] {
        lab.apply(&modern(&[drained(mode)]));
        sender.send_to(b"to whom?", (V4.key, 5000)).expect("sent");
        expect(&here, b"to whom?", own(&sender), TTL);
        expect_silence(&receiver);
    }
}
