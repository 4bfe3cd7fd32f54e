//! Datagrams from socket to socket, through udplb on a relay between them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};

use serde_json::json;

use crate::common::Namespace;
use crate::common::kinds::{KINDS, all_kinds, options, rules};
use crate::common::lab::{
    CLIENTS, Lab, Net, Outcome, RELAY, UPSTREAMS, V4, V6, config, rule, upstream,
};
use crate::common::net::{
    TTL, UDP_GRO, UDP_SEGMENT, bind, expect, expect_silence, local, own, payload, receive, set,
};
use crate::common::service::until;
use crate::ends::{Ends, cuts_up_without_offload};

/// Returns a configuration in the format of udplb's first version.
fn seed(strategy: &str) -> String {
    let upstreams: String =
        UPSTREAMS.iter().map(|it| format!("    - {{ address: {it}, port: 2222 }}\n")).collect();
    format!(
        "- key: {{ address: {RELAY}, port: 1111 }}\n  options:\n    tc_action: pass\n    \
         strategy: {strategy}\n  upstream:\n{upstreams}"
    )
}

/// Sends from these sockets and checks that the first reaches the first upstream and the second the
/// second.
fn check_seed(strategy: &str, senders: [(Ipv4Addr, u16); 2]) {
    let lab = Lab::new();
    let upstreams = UPSTREAMS.map(|address| bind(&lab.upstream, address, 2222));
    let here = bind(&lab.relay, RELAY, 1111);
    Outcome::with_input(&mut lab.udplb("apply - -i eth0"), &seed(strategy)).expect(0);
    for (index, (address, port)) in senders.into_iter().enumerate() {
        let sender = bind(&lab.client, address, port);
        for round in 0..3 {
            let payload = payload(100 + round);
            sender.send_to(&payload, (RELAY, 1111)).expect("sent");
            let from = SocketAddrV4::new(RELAY, port);
            expect(&upstreams[index], &payload, from, TTL - 1);
            expect(&here, &payload, SocketAddrV4::new(address, port), TTL);
        }
        expect_silence(&upstreams[1 - index]);
    }
    expect_silence(&here);
}

#[test]
fn source_port_selects_the_upstream() {
    check_seed("src-port", [(CLIENTS[0], 5666), (CLIENTS[0], 60256)]);
}

#[test]
fn source_address_selects_the_upstream() {
    check_seed("src-ip", [(CLIENTS[0], 40000), (CLIENTS[1], 40000)]);
}

/// Checks every kind of rule, size and checksum. Where the last device computes no checksums, the
/// receiver verifies the program's.
fn check_checksums(client_offload: bool, upstream_offload: bool) {
    let lab = Lab::dual(client_offload, upstream_offload);
    lab.apply(&all_kinds());
    let cuts_up = client_offload || cuts_up_without_offload(&lab);
    for ends in Ends::both(&lab) {
        // IPv6 requires a checksum
        let without: &[i32] = if ends.net.is_ipv6() { &[0] } else { &[0, 1] };
        for without_checksum in without {
            set(&ends.sender, libc::SOL_SOCKET, libc::SO_NO_CHECK, *without_checksum);
            let header = if ends.net.is_ipv6() { 48 } else { 28 };
            for size in [0, 1, 2, 17, 333, 1499 - header, 1500 - header] {
                ends.check_length(size);
            }
            // computed zero checksums are sent as 0xffff: some of these 65,536 / 64 payloads produce
            // one
            for word in (0..=u16::MAX).step_by(1 << 11) {
                ends.check(&word.to_be_bytes(), &[&word.to_be_bytes()]);
            }
        }
        set(&ends.sender, libc::SOL_SOCKET, libc::SO_NO_CHECK, 0);
        let segments = if cuts_up { 10 } else { 0 };
        if cuts_up {
            ends.check_segments();
        }
        ends.check_silence();
        ends.check_count(&lab, "forwarded", without.len() as u64 * (7 + 32) + segments);
    }
}

#[test]
fn checksums_are_right_with_offload() {
    check_checksums(true, true);
}

#[test]
fn checksums_are_right_with_sender_offload_only() {
    check_checksums(true, false);
}

#[test]
fn checksums_are_right_with_upstream_offload_only() {
    check_checksums(false, true);
}

#[test]
fn checksums_are_right_without_offload() {
    check_checksums(false, false);
}

fn check_merged(kind: &str) {
    let lab = Lab::dual(true, false);
    let ethtool = |words: &str| {
        let mut ethtool = lab.relay.command("ethtool");
        Outcome::of(ethtool.args(words.split_whitespace())).expect(0).stdout
    };
    ethtool("-K eth0 gro on");
    // before kernel 5.12, GRO merges only for sockets that ask for it
    if ethtool("-k eth0").contains(kind) {
        ethtool(&format!("-K eth0 {kind} on"));
    }
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        ends.check_segments();
        for _ in 0..20 {
            ends.check(b"one by one", &[b"one by one"]);
        }
        ends.check_silence();
    }
}

#[test]
fn gro_packets_arrive_as_datagrams() {
    check_merged("rx-udp-gro-forwarding");
}

#[test]
fn fraglist_gro_packets_arrive_as_datagrams() {
    check_merged("rx-gro-list");
}

/// A GSO packet stays one packet up to a receiver with UDP_GRO.
#[test]
fn segments_stay_together_for_gro_sockets() {
    let lab = Lab::dual(true, true);
    let features = Outcome::of(lab.client.command("ethtool").args(["-k", "eth0"])).expect(0).stdout;
    // before kernel 5.12, a veth segments them itself
    if features.contains("tx-udp-segmentation: off [fixed]") {
        return;
    }
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        set(&ends.sender, libc::SOL_UDP, UDP_SEGMENT, 1000);
        let payload = payload(9_500);
        for (index, (port, action, source)) in KINDS.into_iter().enumerate() {
            let mut receivers = vec![(&ends.upstreams[index], source)];
            if action == "pass" {
                receivers.push((&ends.here[index], "preserve"));
            }
            for (receiver, _) in &receivers {
                set(receiver, libc::SOL_UDP, UDP_GRO, 1);
            }
            ends.sender.send_to(&payload, (ends.net.key, port)).expect("sent");
            for (receiver, source) in receivers {
                let received = receive(receiver);
                assert_eq!(received.from, ends.net.seen(source, own(&ends.sender)));
                assert!(received.payload == payload, "{port}");
                assert_eq!(received.segment, Some(1000), "{port}");
            }
        }
        ends.check_silence();
    }
}

#[test]
fn tunnelled_frame_with_complete_checksum_is_right() {
    let lab = Lab::dual(false, false);
    // the outer checksum is verified in software, which leaves CHECKSUM_COMPLETE to the inner
    let vxlan = "type vxlan id 7 dstport 4789 udpcsum local";
    lab.client.ip(&format!("link add vx0 {vxlan} {} remote {RELAY}", CLIENTS[0]));
    lab.relay.ip(&format!("link add vx0 {vxlan} {RELAY} remote {}", CLIENTS[0]));
    let client = ["10.5.0.20", "2001:db8:5::20"].map(|it| it.parse::<IpAddr>().expect("one"));
    let relay = ["10.5.0.1", "2001:db8:5::1"].map(|it| it.parse::<IpAddr>().expect("one"));
    for (namespace, addresses, link) in
        [(&lab.client, client, "fe80::5:20"), (&lab.relay, relay, "fe80::5:1")]
    {
        namespace.ip(&format!("addr add {}/24 dev vx0", addresses[0]));
        namespace.ip(&format!("addr add {}/64 dev vx0 nodad", addresses[1]));
        namespace.ip(&format!("addr add {link}/64 dev vx0 nodad"));
        namespace.ip("link set vx0 up");
    }
    let nets = [V4, V6].map(|net| {
        let index = usize::from(net.is_ipv6());
        Net { key: relay[index], clients: [client[index]; 2], ..net }
    });
    let mut config = config(&nets.map(|net| rules(&net)).concat());
    config["interfaces"] = json!(["vx0"]);
    lab.apply(&config);
    for net in nets {
        let ends = Ends::new(&lab, net);
        let family = if net.is_ipv6() { "6" } else { "4" };
        for (forwarding, cold) in [("1", false), ("1", true), ("0", false)] {
            lab.relay.set_forwarding(forwarding);
            for size in [0, 1, 17, 1300] {
                if cold {
                    lab.relay.ip(&format!("-{family} neigh flush dev up0"));
                    ends.check_blocked(&payload(size));
                } else {
                    ends.check_length(size);
                }
            }
            ends.check_segments();
        }
        ends.check_silence();
    }
}

#[test]
fn relay_works_without_ip_forwarding() {
    let lab = Lab::dual(true, true);
    lab.apply(&all_kinds());
    for forwarding in ["0", "1"] {
        lab.relay.set_forwarding(forwarding);
        for ends in Ends::both(&lab) {
            ends.check(b"forwarded", &[b"forwarded"]);
            ends.check_silence();
        }
    }
}

#[test]
fn upstream_behind_a_gateway_is_reached() {
    let lab = Lab::dual(true, false);
    let far = Namespace::new();
    lab.upstream.link("far0", &far, "eth0", false);
    lab.upstream.ip("addr add 10.9.0.1/24 dev far0");
    lab.upstream.ip("addr add 2001:db8:9::1/64 dev far0 nodad");
    lab.upstream.ip("addr add fe80::1/64 dev far0 nodad");
    lab.upstream.sysctl("net.ipv4.ip_forward", "1");
    lab.upstream.sysctl("net.ipv6.conf.all.forwarding", "1");
    far.ip("addr add 10.9.0.2/24 dev eth0");
    far.ip("addr add 2001:db8:9::2/64 dev eth0 nodad");
    far.ip("addr add fe80::2/64 dev eth0 nodad");
    far.ip("route add default via 10.9.0.1");
    far.ip("-6 route add default via 2001:db8:9::1");
    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.21");
    lab.relay.ip("-6 route add 2001:db8:9::/64 via fe80::20 dev up0");
    let nets = [(V4, "10.9.0.2"), (V6, "2001:db8:9::2")]
        .map(|(net, address)| Net { upstreams: [address.parse().expect("one"); 2], ..net });
    lab.apply(&config(&nets.map(|net| rules(&net)).concat()));
    for forwarding in ["1", "0"] {
        lab.relay.set_forwarding(forwarding);
        for net in nets {
            let mut ends = Ends::with(&lab, net, &far);
            ends.hops = 2;
            ends.check(b"over there", &[b"over there"]);
        }
    }
}

#[test]
fn cold_neighbour_loses_nothing() {
    let lab = Lab::dual(true, true);
    let block = |net: &Net, name| {
        let upstream = upstream(net.upstreams[0], 7000);
        net.rule(name, 5000, options("block", "vip"), &[upstream])
    };
    lab.apply(&config(&[block(&V4, "4"), block(&V6, "6")]));
    for (net, family) in [(V4, "4"), (V6, "6")] {
        let receiver = bind(&lab.upstream, net.upstreams[0], 7000);
        let sender = bind(&lab.client, net.clients[0], 0);
        for forwarding in ["1", "0"] {
            lab.relay.set_forwarding(forwarding);
            // the upstream may resolve the relay at any time, which refreshes the relay's neighbour
            // entry
            until("the neighbour is cold", || {
                lab.relay.ip(&format!("-{family} neigh flush dev up0"));
                !lab.relay.ip(&format!("-{family} neigh show dev up0")).contains("lladdr")
            });
            for number in 0..50_u8 {
                sender.send_to(&[number], (net.key, 5000)).expect("sent");
            }
            for number in 0..50_u8 {
                assert_eq!(receive(&receiver).payload, [number]);
            }
        }
        let count = lab.packets(family, &net.upstreams[0].to_string(), "matched");
        assert_eq!(count, 100);
    }
}

#[test]
fn failed_neighbour_is_resolved_again() {
    let lab = Lab::new();
    lab.upstream.ip("link set eth0 down");
    let pass = |port| {
        let upstreams = [upstream(UPSTREAMS[0], port)];
        config(&[rule("only", 5000, options("pass", "vip"), &upstreams)])
    };
    lab.apply(&pass(7000));
    lab.relay.ip(&format!("neigh replace {} dev up0 nud failed", UPSTREAMS[0]));
    lab.upstream.ip("link set eth0 up");
    lab.upstream.ip("route add default via 10.2.0.1");
    lab.apply(&pass(7000));
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 7000);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(b"there again", (RELAY, 5000)).expect("sent");
    assert_eq!(receive(&receiver).payload, b"there again");
}

#[test]
fn reverse_path_filters_see_the_local_copy_only() {
    let lab = Lab::new();
    let ends = Ends::new(&lab, V4);
    for interface in ["all", "eth0", "up0"] {
        lab.relay.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "1");
    }
    lab.apply(&config(&rules(&V4)));
    ends.check(b"from where it should", &[b"from where it should"]);
    // an address that the relay routes to the upstreams' network
    lab.client.ip("addr add 10.2.0.99/32 dev eth0");
    let stranger = bind(&lab.client, Ipv4Addr::new(10, 2, 0, 99), 0);
    for (index, (port, _, source)) in KINDS.iter().enumerate() {
        stranger.send_to(b"from elsewhere", (RELAY, *port)).expect("sent");
        let from = V4.seen(source, own(&stranger));
        expect(&ends.upstreams[index], b"from elsewhere", from, TTL - 1);
    }
    ends.check_silence();
}

#[test]
fn unmatched_traffic_is_untouched() {
    let lab = Lab::new();
    let ends = Ends::new(&lab, V4);
    lab.relay.ip("addr add 10.1.0.2/24 dev eth0");
    let others = [
        bind(&lab.relay, RELAY, 5999),
        bind(&lab.relay, Ipv4Addr::new(10, 1, 0, 2), 5000),
        // routed by the kernel
        bind(&lab.upstream, UPSTREAMS[0], 5000),
    ];
    lab.client.ip("route add default via 10.1.0.1");
    lab.apply(&config(&rules(&V4)));
    for other in &others {
        ends.sender.send_to(b"untouched", local(other)).expect("sent");
        let routed = local(other).ip() == &UPSTREAMS[0];
        expect(other, b"untouched", local(&ends.sender), if routed { TTL - 1 } else { TTL });
    }
    ends.check_silence();
    assert_eq!(lab.status()["unmatched"]["matched"]["packets"], 0);
}

#[test]
fn port_range_keeps_the_ports() {
    let lab = Lab::new();
    let mut ranged = rule("range", 0, options("pass", "preserve"), &[]);
    ranged["key"]["port"] = json!(["6000-6099", 6500]);
    ranged["upstream"] = json!([{ "address": UPSTREAMS[1] }]);
    lab.apply(&config(&[ranged]));
    let sender = bind(&lab.client, CLIENTS[1], 0);
    for port in [6000, 6001, 6050, 6099, 6500] {
        let receiver = bind(&lab.upstream, UPSTREAMS[1], port);
        let here = bind(&lab.relay, RELAY, port);
        sender.send_to(&port.to_be_bytes(), (RELAY, port)).expect("sent");
        expect(&receiver, &port.to_be_bytes(), local(&sender), TTL - 1);
        expect(&here, &port.to_be_bytes(), local(&sender), TTL);
    }
    for port in [5999, 6100, 6499, 6501] {
        let receiver = bind(&lab.upstream, UPSTREAMS[1], port);
        sender.send_to(&port.to_be_bytes(), (RELAY, port)).ok();
        expect_silence(&receiver);
    }
}

#[test]
fn local_copy_is_unchanged() {
    let lab = Lab::dual(true, true);
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        for ttl in [2, 3, 255] {
            ends.set_ttl(ttl);
            ends.sender.send_to(b"ttl", (ends.net.key, 5000)).expect("sent");
            assert_eq!(receive(&ends.here[0]).ttl, ttl);
            assert_eq!(receive(&ends.upstreams[0]).ttl, ttl - 1);
        }
        // TTL too low to be forwarded, but enough for local delivery
        ends.set_ttl(1);
        for (index, (port, action, _)) in KINDS.into_iter().enumerate() {
            if action == "pass" {
                ends.sender.send_to(b"ttl", (ends.net.key, port)).expect("sent");
                expect(&ends.here[index], b"ttl", own(&ends.sender), 1);
            }
        }
        ends.check_silence();
    }
}

#[test]
fn pass_without_listener_is_answered_by_the_host() {
    let lab = Lab::dual(true, true);
    lab.apply(&all_kinds());
    for net in [V4, V6] {
        let [passed, blocked] = [5000, 5003].map(|port| {
            let sender = bind(&lab.client, net.clients[0], 0);
            sender.connect((net.key, port)).expect("connected");
            sender
        });
        let receivers = [7000, 7003].map(|port| bind(&lab.upstream, net.upstreams[0], port));
        for (sender, receiver) in [&passed, &blocked].into_iter().zip(&receivers) {
            sender.send(b"anybody there?").expect("sent");
            assert_eq!(receive(receiver).payload, b"anybody there?");
        }
        let refused = passed.recv(&mut [0]).expect_err("nobody listens");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        expect_silence(&blocked);
    }
}
