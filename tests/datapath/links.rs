//! Interfaces and frames of every kind: tags, devices without Ethernet, link-local addresses, groups.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use serde_json::json;
use udplb::datapath::kernel;

use crate::common::Namespace;
use crate::common::kinds::{KINDS, all_kinds, rules, rules_to};
use crate::common::lab::{Lab, Net, V4, V6, config, upstream};
use crate::common::net::{
    TTL, bind, bind_to, expect, expect_silence_of, own, payload, send_frame, set, set_bytes,
};
use crate::common::service::Arpd;
use crate::common::tun::Tun;
use crate::common::wire::{Tag, Wire};
use crate::ends::Ends;
use crate::forge::{Checksum, Forged, Ip, fragments};
use crate::reference::Answer;

const ETHERNET: usize = 14;

/// Returns the next frame between two hosts, with its tags.
fn next(wire: &Wire, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    loop {
        let frame = wire.next();
        if frame.starts_with(&[to, from].concat()) {
            return frame;
        }
    }
}

#[test]
fn rules_match_inside_vlans() {
    let lab = Lab::dual(true, false);
    // a bridge on eth0 receives exactly the frames that are delivered locally
    lab.relay.ip("link add br0 type bridge");
    lab.relay.ip("link set eth0 master br0");
    lab.relay.ip("link set br0 up");
    let up = Wire::new((&lab.client, "eth0"), (&lab.relay, "br0"));
    let back = Wire::new((&lab.relay, "eth0"), (&lab.client, "eth0"));
    lab.apply(&all_kinds());
    let customer = |control| Tag { protocol: 0x8100, control };
    let service = |control| Tag { protocol: 0x88a8, control };
    let stacks = [
        vec![customer(5)],
        vec![customer(0xe000)],
        vec![service(0x6007)],
        vec![service(7), customer(0xa005)],
        vec![customer(7), customer(5)],
        vec![customer(0xe000), customer(0x2000)],
        vec![service(9), service(7), customer(5)],
    ];
    let mac = lab.relay.mac("eth0");
    for ends in Ends::both(&lab) {
        for tags in &stacks {
            for (index, (port, action, source)) in KINDS.into_iter().enumerate() {
                let net = ends.net;
                let frame = |port, ttl| {
                    let mut frame = Forged::between(mac, net.clients[0], net.key, port);
                    frame.tags.clone_from(tags);
                    match &mut frame.ip {
                        Ip::V4(ip) => ip.ttl = ttl,
                        Ip::V6(ip) => ip.hop_limit = ttl,
                    }
                    frame
                };
                let tagged = frame(port, TTL as u8);
                up.send(&tagged.frame());
                let from = net.seen(source, (net.clients[0], 5666).into());
                expect(&ends.upstreams[index], &tagged.payload(), from, TTL - 1);
                // a frame that matches no rule: it arrives next if nothing else was delivered
                let other = frame(9, TTL as u8).frame();
                up.send(&other);
                if action == "pass" {
                    assert_eq!(next(&up, mac, tagged.from), tagged.frame(), "{tags:x?}");
                }
                // a tag with priority only does not select a VLAN
                if action == "pass" && tags.iter().all(|tag| tag.control & 0xfff == 0) {
                    expect(&ends.here[index], &tagged.payload(), (net.clients[0], 5666), TTL);
                }
                assert_eq!(next(&up, mac, tagged.from), other, "{tags:x?}");
                if action == "block" {
                    let old = frame(port, 1).frame();
                    send_frame(&lab.client, "eth0", &old);
                    let answer = next(&back, tagged.from, mac);
                    let link = ETHERNET + 4 * tags.len();
                    let wanted = Answer {
                        from: net.key,
                        to: net.clients[0],
                        mtu: None,
                        link: [&tagged.from[..], &mac, &old[12..link]].concat(),
                        about: old[link..].to_vec(),
                        least: 28,
                    };
                    assert!(wanted.is(&answer), "{wanted:x?}: {answer:x?}");
                }
            }
        }
        ends.check_silence();
    }
}

/// Adds addresses of both families to a device of the relay.
fn add_addresses(lab: &Lab, name: &str, number: u8) {
    lab.relay.ip(&format!("addr add 10.{number}.0.1/24 dev {name}"));
    lab.relay.ip(&format!("addr add 2001:db8:{number}::1/64 dev {name} nodad"));
}

/// Adds a tun device with addresses to the relay.
fn add_tun(lab: &Lab, name: &str, number: u8) -> Tun {
    let tun = Tun::new(&lab.relay, name);
    add_addresses(lab, name, number);
    tun
}

/// Adds a guest behind a tap device with addresses to the relay.
fn add_guest(lab: &Lab, name: &str, number: u8) -> Tun {
    let tap = Tun::tap(&lab.relay, name);
    add_addresses(lab, name, number);
    tap
}

/// Applies rules of all kinds on such a device; returns their addresses per family.
fn apply_on(lab: &Lab, name: &str, number: u8) -> [Net; 2] {
    let nets = [V4, V6].map(|net| Net { key: beyond(&net, number, 1), ..net });
    let mut config = config(&nets.map(|net| rules(&net)).concat());
    config["interfaces"] = json!([name]);
    lab.apply(&config);
    nets
}

/// Returns the address of a host behind the device, in the family of `net`.
fn beyond(net: &Net, number: u8, host: u8) -> IpAddr {
    match net.is_ipv6() {
        false => Ipv4Addr::new(10, number, 0, host).into(),
        true => {
            let [number, host] = [number, host].map(u16::from);
            Ipv6Addr::new(0x2001, 0xdb8, number, 0, 0, 0, 0, host).into()
        }
    }
}

#[test]
fn tun_ingress_is_relayed() {
    let lab = Lab::dual(true, false);
    let tun = add_tun(&lab, "tun0", 4);
    lab.relay.ip("link set up0 mtu 1280");
    let nets = apply_on(&lab, "tun0", 4);
    for with_arpd in [false, true] {
        let _arpd = with_arpd.then(|| Arpd::start(&lab, ""));
        for net in nets {
            let ends = Ends::new(&lab, net);
            let client = beyond(&net, 4, 20);
            for (index, (port, action, _)) in KINDS.into_iter().enumerate() {
                let datagram = |length| {
                    let mut datagram = Forged::between([0; 6], client, net.key, port);
                    datagram.udp.payload = length;
                    datagram
                };
                let arrives = |length| {
                    let payload = datagram(length).payload();
                    let sender: SocketAddr = (client, 5666).into();
                    ends.expect(index, &payload, sender);
                };
                for length in [0, 1, 1000] {
                    tun.send(&datagram(length).frame()[ETHERNET..]);
                    arrives(length);
                }
                for fragment in fragments(&datagram(4000).frame(), 1200, 99) {
                    tun.send(&fragment[ETHERNET..]);
                }
                arrives(4000);
                if action == "block" {
                    let mut large = datagram(1300);
                    if let Ip::V4(ip) = &mut large.ip {
                        ip.flags = 2;
                    }
                    let mut old = datagram(100);
                    match &mut old.ip {
                        Ip::V4(ip) => ip.ttl = 1,
                        Ip::V6(ip) => ip.hop_limit = 1,
                    }
                    for (datagram, mtu) in [(large, Some(1280)), (old, None)] {
                        let packet = datagram.frame()[ETHERNET..].to_vec();
                        tun.send(&packet);
                        let answer = tun.receive(client);
                        let (from, to) = (net.key, client);
                        let (link, about) = (Vec::new(), packet);
                        let wanted = Answer { from, to, mtu, link, about, least: 28 };
                        assert!(wanted.is(&answer), "{wanted:x?}: {answer:x?}");
                    }
                }
            }
            ends.check_silence();
        }
    }
}

/// A guest leaves checksums and segmentation to its host.
#[test]
fn packets_of_a_guest_are_relayed() {
    let lab = Lab::dual(true, false);
    let tap = add_guest(&lab, "tap0", 4);
    let nets = apply_on(&lab, "tap0", 4);
    // before 6.2 a guest cannot leave segmentation to its host
    let (lengths, segments) = match kernel::version() < (6, 2) {
        true => (&[0, 1, 999, 1000][..], 0),
        false => (&[0, 1, 999, 1000, 9500][..], 10),
    };
    for net in nets {
        let ends = Ends::new(&lab, net);
        let client = beyond(&net, 4, 20);
        let headers = if net.is_ipv6() { 40 } else { 20 };
        for length in lengths {
            for (index, (port, ..)) in KINDS.into_iter().enumerate() {
                let mac = lab.relay.mac("tap0");
                let mut datagram = Forged::between(mac, client, net.key, port);
                datagram.udp.payload = *length;
                datagram.udp.checksum = Checksum::Unfinished;
                tap.send_unfinished(&datagram.frame(), ETHERNET as u16 + headers, 1000);
                let (payload, sender) = (datagram.payload(), SocketAddr::from((client, 5666)));
                let segments = match length {
                    0 => vec![&payload[..]],
                    _ => payload.chunks(1000).collect(),
                };
                for segment in segments {
                    ends.expect(index, segment, sender);
                }
            }
        }
        ends.check_silence();
        ends.check_count(&lab, "forwarded", 4 + segments);
    }
}

/// A guest's datagram exceeds the MTU; its host must fragment it.
#[test]
fn large_datagrams_of_a_guest_are_relayed() {
    let lab = Lab::dual(true, false);
    let tap = add_guest(&lab, "tap0", 4);
    let nets = apply_on(&lab, "tap0", 4);
    for net in nets {
        let ends = Ends::new(&lab, net);
        let client = beyond(&net, 4, 20);
        // 1500 with all headers, including an IPv6 Fragment header
        let (headers, fragment) = if net.is_ipv6() { (40, 1448) } else { (20, 1480) };
        for (index, (port, ..)) in KINDS.into_iter().enumerate() {
            let mut datagram = Forged::between(lab.relay.mac("tap0"), client, net.key, port);
            datagram.udp.payload = 9500;
            datagram.udp.checksum = Checksum::Unfinished;
            tap.send_unfragmented(&datagram.frame(), ETHERNET as u16 + headers, fragment);
            let (payload, sender) = (datagram.payload(), SocketAddr::from((client, 5666)));
            ends.expect(index, &payload, sender);
        }
        ends.check_silence();
        ends.check_count(&lab, "forwarded", 7);
    }
}

/// Sends frames to the ingress and compares the device's output byte by byte.
fn check_to_tun(lab: &Lab, out: &Tun, number: u8, send: &dyn Fn(&[u8]), net: &Net, client: IpAddr) {
    let here: Vec<UdpSocket> =
        KINDS.iter().map(|(port, ..)| bind(&lab.relay, net.key, *port)).collect();
    let host = beyond(net, number, 9);
    let net = Net { egress: beyond(net, number, 1), ..*net };
    for (index, (port, action, source)) in KINDS.into_iter().enumerate() {
        let datagram = |length, checksum| {
            let mut datagram = Forged::between(lab.relay.mac("eth0"), client, net.key, port);
            datagram.udp.payload = length;
            datagram.udp.checksum = checksum;
            match &mut datagram.ip {
                Ip::V4(ip) => (ip.tos, ip.identification, ip.options) = (0xb8, 4711, 2),
                Ip::V6(ip) => (ip.traffic_class, ip.flow_label) = (0xb8, 0x12345),
            }
            datagram
        };
        let sent_on = |mut datagram: Forged| {
            datagram.udp.destination = port + 2000;
            let from = net.seen(source, (client, 5666).into()).ip();
            match (&mut datagram.ip, from, host) {
                (Ip::V4(ip), IpAddr::V4(from), IpAddr::V4(host)) => {
                    (ip.source, ip.destination, ip.ttl) = (from, host, ip.ttl - 1);
                }
                (Ip::V6(ip), IpAddr::V6(from), IpAddr::V6(host)) => {
                    (ip.source, ip.destination, ip.hop_limit) = (from, host, ip.hop_limit - 1);
                }
                other => panic!("{other:?}"),
            }
            datagram
        };
        let zero = if net.is_ipv6() { Checksum::Right } else { Checksum::Is(0) };
        for (length, checksum) in [
            (0, Checksum::Right),
            (1, Checksum::Right),
            (1000, Checksum::Right),
            (333, zero),
            (333, Checksum::Off(0x1234)),
        ] {
            let datagram = datagram(length, checksum);
            send(&datagram.frame());
            let wanted = sent_on(datagram.clone()).frame();
            assert_eq!(out.receive(host), wanted[ETHERNET..], "{port} {length} {checksum:?}");
            if action == "pass" && !matches!(checksum, Checksum::Off(_)) {
                expect(&here[index], &datagram.payload(), (client, 5666), TTL);
            }
        }
        let mut large = datagram(4000, Checksum::Right);
        if let Ip::V4(ip) = &mut large.ip {
            ip.options = 0;
        }
        for fragment in fragments(&large.frame(), 1200, 99) {
            send(&fragment);
        }
        let parts: Vec<Vec<u8>> = (0..4).map(|_| out.receive(host)).collect();
        let identification = match net.is_ipv6() {
            false => u16::from_be_bytes([parts[0][4], parts[0][5]]).into(),
            true => u32::from_be_bytes([44, 45, 46, 47].map(|at| parts[0][at])),
        };
        assert_eq!(identification == 99, source == "preserve");
        let wanted = fragments(&sent_on(large.clone()).frame(), 1200, identification);
        for (part, wanted) in parts.iter().zip(wanted) {
            assert_eq!(*part, wanted[ETHERNET..]);
        }
        if action == "pass" {
            expect(&here[index], &large.payload(), (client, 5666), TTL);
        }
    }
}

#[test]
fn tun_egress_is_relayed() {
    let lab = Lab::dual(true, false);
    let (near, far) = (add_tun(&lab, "tun0", 4), add_tun(&lab, "tun1", 5));
    for with_arpd in [false, true] {
        // ingress on Ethernet, then on another tun device
        for (interface, number) in [("eth0", 1), ("tun0", 4)] {
            let nets = [V4, V6].map(|net| Net { key: beyond(&net, number, 1), ..net });
            let rules = nets.map(|net| rules_to(&net, &beyond(&net, 5, 9).to_string()));
            let mut config = config(&rules.concat());
            config["interfaces"] = json!([interface]);
            lab.apply(&config);
            let _arpd = with_arpd.then(|| Arpd::start(&lab, ""));
            for net in nets {
                let send: &dyn Fn(&[u8]) = match interface {
                    "eth0" => &|frame| send_frame(&lab.client, "eth0", frame),
                    _ => &|frame| near.send(&frame[ETHERNET..]),
                };
                check_to_tun(&lab, &far, 5, send, &net, beyond(&net, number, 0x20));
            }
        }
    }
}

#[test]
fn link_local_upstream_is_reached() {
    let lab = Lab::dual(true, false);
    lab.apply(&config(&rules_to(&V6, "fe80::20%up0")));
    let address: Ipv6Addr = "fe80::20".parse().expect("an address");
    // this host's own address on the link
    let net = Net { egress: "fe80::1".parse().expect("an address"), ..V6 };
    let index = lab.upstream.index("eth0");
    let upstream =
        |port| bind_to(&lab.upstream, SocketAddrV6::new(address, port + 2000, 0, index).into());
    let ends = Ends {
        upstreams: KINDS.iter().map(|(port, ..)| upstream(*port)).collect(),
        ..Ends::new(&lab, net)
    };
    for with_arpd in [false, true] {
        let _arpd = with_arpd.then(|| Arpd::start(&lab, ""));
        for length in [0, 1, 1400, 9000] {
            ends.check_length(length);
        }
        ends.check_segments();
        ends.check_silence();
    }
}

/// Port, `tc_action` and `source` of rules for groups.
const GROUP_KINDS: [(u16, &str, &str); 4] = [
    (5000, "pass", "preserve"),
    (5001, "pass", "egress"),
    (5002, "block", "preserve"),
    (5003, "block", "egress"),
];

/// TTL of datagrams to a group.
const HOPS: i32 = 9;

/// Opens a socket that sends to groups through an interface with multicast loopback.
fn group_sender(namespace: &Namespace, address: IpAddr) -> UdpSocket {
    let sender = bind(namespace, address, 0);
    let index = namespace.index("eth0");
    match address {
        IpAddr::V4(_) => {
            // struct ip_mreqn: group, address, index
            let request = [&[0; 8], &index.to_ne_bytes()[..]].concat();
            set_bytes(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &request);
            set(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, HOPS);
            sender.set_broadcast(true).expect("a socket");
        }
        IpAddr::V6(_) => {
            set(&sender, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, index as i32);
            set(&sender, libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, HOPS);
        }
    }
    sender
}

/// Opens a socket that is a member of a group on the relay.
fn member(lab: &Lab, group: IpAddr, port: u16) -> UdpSocket {
    let socket = bind(&lab.relay, group, port);
    match group {
        IpAddr::V4(group) if group.is_multicast() => {
            socket.join_multicast_v4(&group, &crate::common::lab::RELAY).expect("a member");
        }
        IpAddr::V4(_) => {}
        IpAddr::V6(group) => {
            let index = lab.relay.index("eth0");
            socket.join_multicast_v6(&group, index).expect("a member");
        }
    }
    socket
}

#[test]
fn groups_are_relayed_to_one_host() {
    let lab = Lab::dual(true, false);
    let groups = [
        (V4, "239.1.2.3", HOPS),
        (V6, "ff05::1:3", HOPS),
        (V4, "10.1.0.255", TTL),
        (V4, "255.255.255.255", TTL),
    ];
    let rules = groups.map(|(net, group, _)| {
        let rule = |(port, action, source): (u16, &str, &str)| {
            let options = json!({ "tc_action": action, "source": source });
            let upstreams = [upstream(net.upstreams[0], port + 2000)];
            let mut rule = net.rule(&format!("{group}-{port}"), port, options, &upstreams);
            rule["key"]["address"] = json!(group);
            rule
        };
        GROUP_KINDS.map(rule).to_vec()
    });
    lab.apply(&config(&rules.concat()));
    for (net, group, hops) in groups {
        let group_address: IpAddr = group.parse().expect("an address");
        let sender = group_sender(&lab.client, net.clients[0]);
        let own_sender = group_sender(&lab.relay, net.key);
        for (port, action, source) in GROUP_KINDS {
            let receiver = bind(&lab.upstream, net.upstreams[0], port + 2000);
            let here = member(&lab, group_address, port);
            for length in [0, 100, 1000] {
                let payload = payload(length);
                sender.send_to(&payload, (group_address, port)).expect("sent");
                expect(&receiver, &payload, net.seen(source, own(&sender)), hops - 1);
                if action == "pass" {
                    expect(&here, &payload, own(&sender), hops);
                }
            }
            // packets of this host are looped back to local sockets only
            own_sender.send_to(b"own", (group_address, port)).expect("sent");
            expect(&here, b"own", own(&own_sender), hops);
            expect_silence_of([&receiver, &here]);
        }
    }
}

/// Frames for other hosts are ignored. As in the kernel, packets for this host may arrive in group
/// frames.
#[test]
fn frames_for_other_hosts_pass() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        let Ends { net, upstreams, here, .. } = &ends;
        for mac in [[2, 0, 0, 0, 0, 0x99], [0xff; 6], [1, 0, 0x5e, 1, 2, 3]] {
            let kinds = KINDS.iter().zip(upstreams).zip(here);
            for (((port, action, source), upstream), here) in kinds {
                let frame = Forged::between(mac, net.clients[0], net.key, *port);
                send_frame(&lab.client, "eth0", &frame.frame());
                if mac[0] & 1 == 1 {
                    let from = (net.clients[0], 5666).into();
                    expect(upstream, &frame.payload(), net.seen(source, from), TTL - 1);
                    if *action == "pass" {
                        expect(here, &frame.payload(), from, TTL);
                    }
                }
            }
        }
        expect_silence_of(upstreams);
        expect_silence_of(here);
    }
}
