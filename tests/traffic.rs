//! Datagrams from socket to socket, through udplb on a relay between them.

mod common;

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::Namespace;
use common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule, to_port};
use common::net::{Datagram, TTL, UDP_SEGMENT, bind, expect_silence, local, payload, receive, set};
use serde_json::{Value, json};

fn options(action: &str, source: &str) -> Value {
    json!({ "tc_action": action, "source": source })
}

fn upstream(address: Ipv4Addr, port: u16) -> Value {
    json!({ "name": address, "address": address, "port": port })
}

#[track_caller]
fn expect(socket: &UdpSocket, payload: &[u8], from: SocketAddrV4, ttl: i32) {
    assert_eq!(receive(socket), Datagram { payload: payload.into(), from, ttl });
}

/// The configuration of udplb's first version.
fn seed(strategy: &str) -> String {
    let upstreams: String =
        UPSTREAMS.iter().map(|it| format!("    - {{ address: {it}, port: 2222 }}\n")).collect();
    format!(
        "- key: {{ address: {RELAY}, port: 1111 }}\n  options:\n    tc_action: pass\n    \
         strategy: {strategy}\n  upstream:\n{upstreams}"
    )
}

/// Sends from these sockets; the first is for the first upstream and the second for the second.
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
fn the_source_port_selects_the_upstream() {
    check_seed("src-port", [(CLIENTS[0], 5666), (CLIENTS[0], 60256)]);
}

#[test]
fn the_source_address_selects_the_upstream() {
    check_seed("src-ip", [(CLIENTS[0], 40000), (CLIENTS[1], 40000)]);
}

/// A rule of each kind: port, `tc_action`, `source`. Each has an upstream port of its own.
const KINDS: [(u16, &str, &str); 4] = [
    (5000, "pass", "vip"),
    (5001, "pass", "preserve"),
    (5002, "block", "vip"),
    (5003, "block", "preserve"),
];

fn all_kinds() -> Value {
    let rules: Vec<Value> = KINDS
        .iter()
        .map(|(port, action, source)| {
            let upstreams = [upstream(UPSTREAMS[0], port + 2000)];
            rule(&format!("{action}-{source}"), *port, options(action, source), &upstreams)
        })
        .collect();
    config(&rules)
}

/// Sockets at both ends of every kind of rule.
struct Ends {
    sender: UdpSocket,
    upstreams: Vec<UdpSocket>,
    here: Vec<UdpSocket>,
    key: Ipv4Addr,
}

impl Ends {
    fn new(lab: &Lab) -> Ends {
        Ends {
            sender: bind(&lab.client, CLIENTS[0], 0),
            upstreams: KINDS
                .iter()
                .map(|(port, ..)| bind(&lab.upstream, UPSTREAMS[0], port + 2000))
                .collect(),
            here: KINDS.iter().map(|(port, ..)| bind(&lab.relay, RELAY, *port)).collect(),
            key: RELAY,
        }
    }

    /// Sends by every kind of rule; one call gives these datagrams.
    #[track_caller]
    fn check(&self, payload: &[u8], datagrams: &[&[u8]]) {
        let sender = local(&self.sender);
        for (index, (port, action, source)) in KINDS.iter().enumerate() {
            self.sender.send_to(payload, (self.key, *port)).expect("sent");
            let from = match *source {
                "vip" => SocketAddrV4::new(self.key, sender.port()),
                _ => sender,
            };
            for datagram in datagrams {
                expect(&self.upstreams[index], datagram, from, TTL - 1);
                if *action == "pass" {
                    expect(&self.here[index], datagram, sender, TTL);
                }
            }
        }
    }

    /// Nothing but what was received so far.
    #[track_caller]
    fn check_silence(&self) {
        for socket in self.upstreams.iter().chain(&self.here) {
            expect_silence(socket);
        }
    }
}

/// Every kind of rule, size and checksum; where the last device computes no checksums, the
/// receiver verifies what the program left.
fn check_checksums(client_offload: bool, upstream_offload: bool) {
    let lab = Lab::with_offload(client_offload, upstream_offload);
    let ends = Ends::new(&lab);
    lab.apply(&all_kinds());
    for without_checksum in [0, 1] {
        set(&ends.sender, libc::SOL_SOCKET, libc::SO_NO_CHECK, without_checksum);
        for size in [0, 1, 2, 17, 333, 1471, 1472] {
            let payload = payload(size);
            ends.check(&payload, &[&payload]);
        }
        // sums that come out as zero are sent as 0xffff: some of these 65,536 / 64 do
        for word in (0..=u16::MAX).step_by(1 << 11) {
            ends.check(&word.to_be_bytes(), &[&word.to_be_bytes()]);
        }
    }
    set(&ends.sender, libc::SOL_SOCKET, libc::SO_NO_CHECK, 0);
    let segments = if client_offload || cuts_up_without_offload(&lab) { 10 } else { 0 };
    if segments > 0 {
        check_segments(&ends);
    }
    ends.check_silence();
    for (_, action, source) in KINDS {
        let name = format!("{action}-{source}");
        let count = lab.packets(&name, &UPSTREAMS[0].to_string(), "forwarded");
        assert_eq!(count, 2 * (7 + 32) + segments, "{name}");
    }
}

/// Whether the client's kernel takes UDP_SEGMENT where it has to compute the checksums, which it
/// does from 6.11 on.
fn cuts_up_without_offload(lab: &Lab) -> bool {
    let sender = bind(&lab.client, CLIENTS[0], 0);
    set(&sender, libc::SOL_UDP, UDP_SEGMENT, 1000);
    match sender.send_to(&payload(2000), (RELAY, 5999)) {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::EIO) => false,
        Err(error) => panic!("{error}"),
    }
}

/// One packet for the sender's stack, ten for everybody else, the counters included.
fn check_segments(ends: &Ends) {
    set(&ends.sender, libc::SOL_UDP, UDP_SEGMENT, 1000);
    let payload = payload(9_500);
    ends.check(&payload, &payload.chunks(1000).collect::<Vec<_>>());
    set(&ends.sender, libc::SOL_UDP, UDP_SEGMENT, 0);
}

#[test]
fn checksums_are_right_with_offload() {
    check_checksums(true, true);
}

#[test]
fn checksums_are_right_where_the_sender_leaves_them_to_the_device() {
    check_checksums(true, false);
}

#[test]
fn checksums_are_right_where_the_sender_computes_them() {
    check_checksums(false, true);
}

#[test]
fn checksums_are_right_without_offload() {
    check_checksums(false, false);
}

#[test]
fn what_the_receiving_device_merges_arrives_in_parts() {
    let lab = Lab::new();
    let ends = Ends::new(&lab);
    let ethtool = |words: &str| {
        let mut ethtool = lab.relay.command("ethtool");
        Outcome::of(ethtool.args(words.split_whitespace())).expect(0).stdout
    };
    ethtool("-K eth0 gro on");
    // before 5.12 it merges only what a socket asks for
    if ethtool("-k eth0").contains("rx-udp-gro-forwarding") {
        ethtool("-K eth0 rx-udp-gro-forwarding on");
    }
    lab.apply(&all_kinds());
    check_segments(&ends);
    for _ in 0..20 {
        ends.check(b"one by one", &[b"one by one"]);
    }
    ends.check_silence();
}

#[test]
fn a_tunnelled_frame_with_a_sum_over_all_of_it() {
    let lab = Lab::with_offload(false, false);
    // the outer checksum is verified in software, which leaves CHECKSUM_COMPLETE to the inner
    let vxlan = "type vxlan id 7 dstport 4789 udpcsum local";
    lab.client.ip(&format!("link add vx0 {vxlan} {} remote {RELAY}", CLIENTS[0]));
    lab.relay.ip(&format!("link add vx0 {vxlan} {RELAY} remote {}", CLIENTS[0]));
    for (namespace, address) in [(&lab.client, "10.5.0.20/24"), (&lab.relay, "10.5.0.1/24")] {
        namespace.ip(&format!("addr add {address} dev vx0"));
        namespace.ip("link set vx0 up");
    }
    let key = Ipv4Addr::new(10, 5, 0, 1);
    let mut ends = Ends::new(&lab);
    ends.key = key;
    ends.sender = bind(&lab.client, Ipv4Addr::new(10, 5, 0, 20), 0);
    ends.here = KINDS.iter().map(|(port, ..)| bind(&lab.relay, key, *port)).collect();
    let mut config = all_kinds();
    config["interfaces"] = json!(["vx0"]);
    for rule in config["rules"].as_array_mut().expect("rules") {
        rule["key"]["address"] = json!(key);
    }
    lab.apply(&config);
    for size in [0, 1, 17, 1400] {
        let payload = payload(size);
        ends.check(&payload, &[&payload]);
    }
    check_segments(&ends);
    ends.check_silence();
}

#[test]
fn it_forwards_where_the_kernel_does_not() {
    let lab = Lab::new();
    let ends = Ends::new(&lab);
    lab.relay.sysctl("net.ipv4.ip_forward", "0");
    lab.apply(&all_kinds());
    ends.check(b"forwarding off", &[b"forwarding off"]);
    lab.relay.sysctl("net.ipv4.ip_forward", "1");
    ends.check(b"forwarding on", &[b"forwarding on"]);
    ends.check_silence();
}

#[test]
fn an_upstream_behind_a_gateway() {
    let lab = Lab::with_offload(true, false);
    let far = Namespace::new();
    let address = Ipv4Addr::new(10, 9, 0, 2);
    lab.upstream.link("far0", &far, "eth0", false);
    lab.upstream.ip("addr add 10.9.0.1/24 dev far0");
    lab.upstream.sysctl("net.ipv4.ip_forward", "1");
    far.ip(&format!("addr add {address}/24 dev eth0"));
    far.ip("route add default via 10.9.0.1");
    lab.relay.ip(&format!("route add 10.9.0.0/24 via {}", UPSTREAMS[1]));
    let rules = KINDS.map(|(port, action, source)| {
        rule(action, port, options(action, source), &[upstream(address, port)])
    });
    for forwarding in ["1", "0"] {
        lab.relay.sysctl("net.ipv4.ip_forward", forwarding);
        for (rule, (port, _, source)) in rules.iter().zip(KINDS) {
            lab.apply(&config(std::slice::from_ref(rule)));
            let receiver = bind(&far, address, port);
            let sender = bind(&lab.client, CLIENTS[1], 0);
            sender.send_to(b"over there", (RELAY, port)).expect("sent");
            let from = match source {
                "vip" => SocketAddrV4::new(RELAY, local(&sender).port()),
                _ => local(&sender),
            };
            expect(&receiver, b"over there", from, TTL - 2);
        }
    }
}

#[test]
fn a_cold_neighbour_loses_nothing() {
    let lab = Lab::new();
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 7000);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    lab.apply(&to_port(7000));
    for forwarding in ["1", "0"] {
        lab.relay.sysctl("net.ipv4.ip_forward", forwarding);
        lab.relay.ip("neigh flush dev up0");
        assert!(!lab.relay.ip("neigh show dev up0").contains("lladdr"));
        for number in 0..50_u8 {
            sender.send_to(&[number], (RELAY, 5000)).expect("sent");
        }
        for number in 0..50_u8 {
            assert_eq!(receive(&receiver).payload, [number]);
        }
    }
    assert_eq!(lab.packets("only", "one", "matched"), 100);
}

#[test]
fn a_neighbour_that_was_given_up_is_asked_again() {
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
    let ends = Ends::new(&lab);
    for interface in ["all", "eth0", "up0"] {
        lab.relay.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "1");
    }
    lab.apply(&all_kinds());
    ends.check(b"from where it should", &[b"from where it should"]);
    // an address that the relay would reach through the upstreams' network
    lab.client.ip("addr add 10.2.0.99/32 dev eth0");
    let stranger = bind(&lab.client, Ipv4Addr::new(10, 2, 0, 99), 0);
    for (index, (port, _, source)) in KINDS.iter().enumerate() {
        stranger.send_to(b"from elsewhere", (RELAY, *port)).expect("sent");
        let from = match *source {
            "vip" => SocketAddrV4::new(RELAY, local(&stranger).port()),
            _ => local(&stranger),
        };
        expect(&ends.upstreams[index], b"from elsewhere", from, TTL - 1);
    }
    ends.check_silence();
}

#[test]
fn what_no_rule_matches_is_let_alone() {
    let lab = Lab::new();
    let ends = Ends::new(&lab);
    lab.relay.ip("addr add 10.1.0.2/24 dev eth0");
    let others = [
        bind(&lab.relay, RELAY, 5999),
        bind(&lab.relay, Ipv4Addr::new(10, 1, 0, 2), 5000),
        // routed by the kernel
        bind(&lab.upstream, UPSTREAMS[0], 5000),
    ];
    lab.client.ip("route add default via 10.1.0.1");
    lab.apply(&all_kinds());
    for other in &others {
        ends.sender.send_to(b"untouched", local(other)).expect("sent");
        let routed = local(other).ip() == &UPSTREAMS[0];
        expect(other, b"untouched", local(&ends.sender), if routed { TTL - 1 } else { TTL });
    }
    ends.check_silence();
    assert_eq!(lab.status()["unmatched"]["matched"]["packets"], 0);
}

#[test]
fn a_range_of_ports_keeps_them() {
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
fn the_local_copy_is_as_it_was_sent() {
    let lab = Lab::new();
    let ends = Ends::new(&lab);
    lab.apply(&all_kinds());
    for ttl in [2, 3, 255] {
        set(&ends.sender, libc::IPPROTO_IP, libc::IP_TTL, ttl);
        ends.sender.send_to(b"ttl", (RELAY, 5000)).expect("sent");
        assert_eq!(receive(&ends.here[0]).ttl, ttl);
        assert_eq!(receive(&ends.upstreams[0]).ttl, ttl - 1);
    }
    // too old to be sent on, but at home here
    set(&ends.sender, libc::IPPROTO_IP, libc::IP_TTL, 1);
    for (port, ..) in KINDS {
        ends.sender.send_to(b"ttl", (RELAY, port)).expect("sent");
    }
    for here in &ends.here[..2] {
        expect(here, b"ttl", local(&ends.sender), 1);
    }
    ends.check_silence();
}

/// Sends a whole frame out of an interface.
fn send_frame(namespace: &Namespace, interface: &str, frame: &[u8]) {
    let index = namespace.index(interface);
    // SAFETY: plain numbers in, a descriptor that nobody else owns out; the address is a
    // sockaddr_ll of which all zeroes are a value, and it and the frame outlive the call.
    let sent = namespace.enter(|| unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as i32;
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    });
    assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
}

#[test]
fn a_tag_held_in_the_packet_stays_here() {
    let lab = Lab::new();
    let ends = Ends::new(&lab);
    lab.apply(&all_kinds());
    // VLAN 0 is no network of its own: the frame goes up like one without a tag
    for (vlan, goes_up) in [(0, true), (5, false)] {
        for (index, (port, action, source)) in KINDS.iter().enumerate() {
            let tag = etherparse::VlanId::try_new(vlan).expect("a VLAN");
            let builder =
                etherparse::PacketBuilder::ethernet2(lab.client.mac("eth0"), lab.relay.mac("eth0"))
                    .single_vlan(tag)
                    .ipv4(CLIENTS[0].octets(), RELAY.octets(), TTL as u8)
                    .udp(1234, *port);
            let mut frame = Vec::new();
            builder.write(&mut frame, b"tagged").expect("a frame");
            send_frame(&lab.client, "eth0", &frame);
            let sender = SocketAddrV4::new(CLIENTS[0], 1234);
            let from = if *source == "vip" { SocketAddrV4::new(RELAY, 1234) } else { sender };
            expect(&ends.upstreams[index], b"tagged", from, TTL - 1);
            if *action == "pass" && goes_up {
                expect(&ends.here[index], b"tagged", sender, TTL);
            }
        }
    }
    ends.check_silence();
}

#[test]
fn where_nobody_listens_pass_is_answered_as_ever() {
    let lab = Lab::new();
    lab.apply(&all_kinds());
    let [passed, blocked] = [5000, 5002].map(|port| {
        let sender = bind(&lab.client, CLIENTS[0], 0);
        sender.connect((RELAY, port)).expect("connected");
        sender
    });
    let receivers = [7000, 7002].map(|port| bind(&lab.upstream, UPSTREAMS[0], port));
    for (sender, receiver) in [&passed, &blocked].into_iter().zip(&receivers) {
        sender.send(b"anybody there?").expect("sent");
        assert_eq!(receive(receiver).payload, b"anybody there?");
    }
    let refused = passed.recv(&mut [0]).expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    expect_silence(&blocked);
}
