//! Packets with their answers, and sockets that ask, for the tests of `reply`.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};

use etherparse::PacketBuilder;
use serde_json::{Value, json};

use crate::common::lab::{Net, V4, V6};
use crate::common::net::{TTL, UDP_SEGMENT, expect, payload, receive, set};
use crate::common::wire::Tag;
use crate::forge::{Checksum, Forged, Ip};
use crate::packet::Mac;
use crate::program::{Context, Counted, Run};
use crate::testbed::{FAR, OUT_MAC, REDIRECT, RELAY_MAC, Testbed, VIP};

/// Clients behind a gateway, and the addresses of keys, of each family.
pub const CLIENTS: [IpAddr; 2] = [IpAddr::V4(FAR), ip6([0xfd00, 3, 0, 0, 0, 0, 0, 2])];
pub const VIPS: [IpAddr; 2] = [IpAddr::V4(VIP), ip6([0xfd00, 1, 0, 0, 0, 0, 0, 1])];

pub const fn ip6([a, b, c, d, e, f, g, h]: [u16; 8]) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h))
}

/// Runs the program on a packet; returns what it has counted too.
pub fn run(testbed: &Testbed<'_>, packet: &Forged) -> (Run, Counted) {
    let (gso_size, gso_segs) = packet.gso;
    let (tag, length) = (packet.tag, packet.cut);
    let context = Context { ifindex: testbed.routing, gso_size, gso_segs, tag, length };
    (testbed.program.run(&packet.frame(), context), testbed.program.take_counted())
}

/// Returns the packet as it leaves between two endpoints, to a MAC address.
pub fn departed(came: &Forged, from: (IpAddr, u16), to: (IpAddr, u16), mac: Mac) -> Forged {
    let mut gone = Forged { to: mac, from: OUT_MAC, tag: None, tags: Vec::new(), ..came.clone() };
    match (&mut gone.ip, from.0, to.0) {
        (Ip::V4(ip), IpAddr::V4(source), IpAddr::V4(destination)) => {
            (ip.source, ip.destination, ip.ttl) = (source, destination, ip.ttl - 1);
        }
        (Ip::V6(ip), IpAddr::V6(source), IpAddr::V6(destination)) => {
            (ip.source, ip.destination, ip.hop_limit) = (source, destination, ip.hop_limit - 1);
        }
        _ => unreachable!("all are of the family"),
    }
    (gone.udp.source, gone.udp.destination) = (from.1, to.1);
    gone
}

/// Checks that variants of a packet are sent between two endpoints, to a MAC address, and counted under an id.
pub fn check_kinds(
    testbed: &Testbed<'_>,
    packet: &Forged,
    (from, to, mac): ((IpAddr, u16), (IpAddr, u16), Mac),
    id: u32,
) {
    for (name, came) in kinds(packet) {
        let gone = departed(&came, from, to, mac).frame();
        let bytes = gone.len() as u64;
        let wanted = Run { action: REDIRECT, frame: gone, tag: None };
        testbed.program.advance();
        for path in ["slow", "as remembered"] {
            let (run, counted) = run(testbed, &came);
            assert_eq!(run, wanted, "{name} {path} {from:?}: {counted:?}");
            assert_eq!(counted, [((id, "forwarded"), (1, bytes))].into(), "{name} {path}");
        }
    }
}

/// Returns variants of a packet.
pub fn kinds(packet: &Forged) -> Vec<(&'static str, Forged)> {
    let mut kinds = vec![("plain", packet.clone())];
    let mut change = |name, change: &dyn Fn(&mut Forged)| {
        let mut changed = packet.clone();
        change(&mut changed);
        kinds.push((name, changed));
    };
    change("empty", &|it| it.udp.payload = 0);
    change("odd", &|it| it.udp.payload = 333);
    change("wrong checksum", &|it| it.udp.checksum = Checksum::Off(7));
    change("tag in the skb", &|it| it.tag = Some(Tag { protocol: 0x8100, control: 7 }));
    change("tag in the frame", &|it| it.tags = vec![Tag { protocol: 0x8100, control: 7 }]);
    if let Ip::V4(_) = packet.ip {
        change("no checksum", &|it| it.udp.checksum = Checksum::Is(0));
        change("options", &|it| {
            if let Ip::V4(ip) = &mut it.ip {
                ip.options = 2;
            }
        });
    }
    kinds
}

/// Returns a datagram of 600 bytes between two endpoints.
pub fn datagram(from: (IpAddr, u16), to: (IpAddr, u16), checksum: Checksum) -> Forged {
    let mut datagram = Forged::between([0; 6], from.0, to.0, to.1);
    datagram.udp.source = from.1;
    datagram.udp.payload = 600;
    datagram.udp.checksum = checksum;
    datagram
}

/// Type, code and the four bytes behind the checksum of an ICMP error.
pub type IcmpKind = (u8, u8, [u8; 4]);

/// Port unreachable, by family.
pub const REFUSED: [IcmpKind; 2] = [(3, 3, [0; 4]), (1, 4, [0; 4])];

/// Returns an ICMP error between two addresses, with the first bytes of the packet that it is about.
pub fn icmp_error(
    kind: IcmpKind,
    (from, to): (IpAddr, IpAddr),
    about: &[u8],
    quoted: usize,
    ttl: u8,
) -> Vec<u8> {
    icmp_error_with(kind, (from, to), about, quoted, ttl, 0)
}

/// Returns an ICMP error like [`icmp_error`], with words of options in its IPv4 header.
pub fn icmp_error_with(
    (kind, code, rest): IcmpKind,
    ends: (IpAddr, IpAddr),
    about: &[u8],
    quoted: usize,
    ttl: u8,
    options: usize,
) -> Vec<u8> {
    const NO_OPERATION: u8 = 1;
    let quotation = &about[14..][..quoted.min(about.len() - 14)];
    let mut packet = Vec::new();
    let ethertype = match ends {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let (protocol, length) = (etherparse::IpNumber::ICMP, 8 + quotation.len() as u16);
            let ip = etherparse::Ipv4Header::new(length, ttl, protocol, from.octets(), to.octets());
            let mut ip = ip.expect("it fits");
            ip.options = [NO_OPERATION; 8][..options * 4].try_into().expect("options");
            let ip = etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default());
            let builder = PacketBuilder::ip(ip).icmpv4_raw(kind, code, rest);
            builder.write(&mut packet, quotation).expect("a packet");
            0x0800_u16
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let builder = PacketBuilder::ipv6(from.octets(), to.octets(), ttl);
            let builder = builder.icmpv6_raw(kind, code, rest);
            builder.write(&mut packet, quotation).expect("a packet");
            0x86dd
        }
        _ => unreachable!("both are of one family"),
    };
    [&RELAY_MAC[..], &[2, 0, 0, 0, 1, 2], &ethertype.to_be_bytes(), &packet].concat()
}

/// Returns the destination of a sent frame.
pub fn destination(frame: &[u8]) -> IpAddr {
    match frame[14] >> 4 {
        4 => <[u8; 4]>::try_from(&frame[30..34]).expect("four").into(),
        _ => <[u8; 16]>::try_from(&frame[38..54]).expect("sixteen").into(),
    }
}

/// Runs an error and expects another one, to a MAC address.
#[track_caller]
pub fn check_error(testbed: &Testbed<'_>, came: &[u8], gone: &[u8], to: Mac) {
    let context = Context { ifindex: testbed.routing, ..Context::default() };
    let run = testbed.program.run(came, context);
    let frame = [&to[..], &OUT_MAC, &gone[12..]].concat();
    assert_eq!((run.action, run.frame), (REDIRECT, frame));
}

/// Expects a connected socket to hear that nobody is there.
#[track_caller]
pub fn expect_refused(socket: &UdpSocket) {
    let error = socket.recv(&mut [0; 16]).expect_err("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Returns a configuration whose upstreams answer clients by way of the relay.
pub fn replying(reply: &str) -> Value {
    let rule = |net: &Net| {
        let upstream = json!({ "name": "u1", "address": net.upstreams[0], "port": 5353 });
        let options = json!({ "tc_action": "block", "reply": reply });
        net.rule(if net.is_ipv6() { "dns6" } else { "dns" }, 53, options, &[upstream])
    };
    json!({ "version": 1, "interfaces": ["eth0", "up0"], "rules": [rule(&V4), rule(&V6)] })
}

/// Asks from a connected socket, which takes answers from the key alone, and answers; returns the sender that
/// the upstream sees.
pub fn ask(client: &UdpSocket, server: &UdpSocket, question: &[u8], answer: &[u8]) -> SocketAddr {
    client.send(question).expect("sent");
    let asked = receive(server);
    assert_eq!(asked.payload, question);
    server.send_to(answer, asked.from).expect("sent");
    expect(client, answer, client.peer_addr().expect("connected"), TTL - 1);
    asked.from
}

/// Has a question answered by ten datagrams in one GSO packet.
pub fn ask_for_many(client: &UdpSocket, server: &UdpSocket) {
    set(server, libc::SOL_UDP, UDP_SEGMENT, 1000);
    client.send(b"many").expect("sent");
    let asked = receive(server);
    let long = payload(9_500);
    server.send_to(&long, asked.from).expect("sent");
    for part in long.chunks(1000) {
        expect(client, part, client.peer_addr().expect("connected"), TTL - 1);
    }
    set(server, libc::SOL_UDP, UDP_SEGMENT, 0);
}
