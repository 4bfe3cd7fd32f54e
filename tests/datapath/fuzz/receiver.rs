//! Checks the specification's outgoing frames with an independent receiver: etherparse.

use std::net::IpAddr;

use etherparse::defrag::IpDefragPool;
use etherparse::{Ipv4Header, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::any;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use proptest::{prop_assert, prop_assert_eq};
use udplb::config::Source;
use udplb::desired::Rule;

use super::cases::{Case, all, case, v4, v6};
use super::{Scenario, UNICAST, UNICAST6, any_scenario, ids};
use crate::forge::{Extension, Forged, Ip, Kind, Udp};
use crate::random::any_packet;
use crate::reference::{Answer, Arrival, End, Gone, Host, Outcome, Table};
use crate::testbed::NARROW;

const HEADERS: usize = 14 + 40;

/// Returns whether the IP and the UDP checksum are correct; a missing UDP checksum counts as correct.
/// `None` if a receiver does not accept the frame as UDP.
fn checksums(frame: &[u8]) -> Option<(bool, bool)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(TransportSlice::Udp(udp)) = packet.transport else { return None };
    let (header, payload) = (udp.to_header(), udp.payload());
    match packet.net? {
        NetSlice::Ipv4(ip) => {
            let ip = ip.header();
            let right = ip.to_header().calc_header_checksum() % u16::MAX;
            let (source, destination) = (ip.source(), ip.destination());
            let sum = header.calc_checksum_ipv4_raw(source, destination, payload).ok()?;
            let fine = header.checksum == 0 || header.checksum == sum;
            Some((ip.header_checksum() % u16::MAX == right, fine))
        }
        NetSlice::Ipv6(ip) => {
            let (source, destination) = (ip.header().source(), ip.header().destination());
            let sum = header.calc_checksum_ipv6_raw(source, destination, payload).ok()?;
            Some((true, header.checksum == sum))
        }
        NetSlice::Arp(_) => None,
    }
}

fn judge(host: &Host, table: &mut Table, frame: &[u8]) -> Outcome {
    host.judge(table, Arrival { frame, tag: None, gso_size: 0, gso_segs: 0 })
}

/// Returns all outgoing frames.
fn gone(outcome: Outcome) -> Vec<Gone> {
    let away = match outcome.end {
        End::Away(gone) => Some(gone),
        _ => None,
    };
    outcome.copies.into_iter().chain(away).collect()
}

/// Valid checksums stay valid, and invalid ones invalid.
#[test]
fn checksums_stay_valid_or_invalid() {
    for target in [UNICAST, UNICAST6] {
        let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
        let packets = (any_scenario(target), any_packet(target));
        let result = TestRunner::new(config).run(&packets, |(scenario, packet)| {
            let packet = Forged { tags: Vec::new(), ..packet };
            let frame = packet.frame();
            let host = scenario.host(ids(&scenario.rule));
            let gone = gone(judge(&host, &mut Table::default(), &frame));
            // only the first fragment has a UDP header
            for gone in gone.iter().filter(|gone| !gone.is_piece) {
                let outer = gone.frame.len().saturating_sub(frame.len());
                let inner = [&gone.frame[..14], &gone.frame[14 + outer..]].concat();
                prop_assert_eq!(checksums(&frame), checksums(&inner));
            }
            Ok(())
        });
        result.unwrap_or_else(|failure| panic!("{failure}"));
    }
}

/// A computed checksum of zero is sent as all ones; a received checksum of all ones is updated like any
/// other.
#[test]
fn computed_zero_checksum_is_ones() {
    for Case { name, rule, packets, .. } in all() {
        let (at, way) = match packets[0].ip {
            Ip::V4(_) => (14 + 20 + 6, name),
            Ip::V6(_) => (14 + 40 + 6, name.trim_start_matches("IPv6 ")),
        };
        let came = match way {
            "checksum comes as ones" => true,
            "checksum leaves as ones" => false,
            _ => continue,
        };
        let host = Scenario { rule: rule.clone(), held: false }.host(ids(&rule));
        let frame = packets[0].frame();
        let sent = gone(judge(&host, &mut Table::default(), &frame)).remove(0).frame;
        let ones = if came { &frame } else { &sent };
        assert_eq!(ones[at..at + 2], [0xff; 2], "{name}");
        assert_eq!(checksums(&sent), Some((true, true)), "{name}");
    }
}

/// Splits a packet into fragments of `units` times eight bytes; the bytes before `data` are repeated in
/// each.
fn fragments(frame: &[u8], data: usize, units: usize) -> Vec<Vec<u8>> {
    let pieces: Vec<&[u8]> = frame[data..].chunks(units * 8).collect();
    let last = pieces.len() - 1;
    let fragment = |(number, piece): (usize, &&[u8])| {
        let mut fragment = frame[..data].to_vec();
        let offset = (number * units) as u16;
        let more = number != last;
        if frame[14] >> 4 == 4 {
            let flags = offset | u16::from(more) << 13;
            let length = (data - 14 + piece.len()) as u16;
            fragment[14 + 2..14 + 4].copy_from_slice(&length.to_be_bytes());
            fragment[14 + 6..14 + 8].copy_from_slice(&flags.to_be_bytes());
            let (header, _) = Ipv4Header::from_slice(&fragment[14..]).expect("a header");
            let checksum = header.calc_header_checksum();
            fragment[14 + 10..14 + 12].copy_from_slice(&checksum.to_be_bytes());
        } else {
            let field = if data > HEADERS { HEADERS } else { 14 + 6 };
            let next = std::mem::replace(&mut fragment[field], 44);
            let flags = offset << 3 | u16::from(more);
            let length = (data - HEADERS + 8 + piece.len()) as u16;
            fragment[14 + 4..14 + 6].copy_from_slice(&length.to_be_bytes());
            fragment.extend([next, 0]);
            fragment.extend(flags.to_be_bytes());
            fragment.extend(77_u32.to_be_bytes());
        }
        fragment.extend(*piece);
        fragment
    };
    pieces.iter().enumerate().map(fragment).collect()
}

/// A datagram sent in fragments and reassembled equals the one sent whole.
#[test]
fn fragments_reassemble_to_the_datagram() {
    let config = Config { cases: 500, failure_persistence: None, ..Config::default() };
    let datagrams = (0..400_usize, 1..8_usize, 0..2_u8, any::<bool>(), any::<bool>());
    let result = TestRunner::new(config).run(&datagrams, |(payload, units, more, six, keep)| {
        // the receiver does not parse headers behind the Fragment header
        let hop = Extension::new(Kind::HopByHop);
        let (packet, data) = match six {
            false => (v4(|ip, _| ip.options = more), 14 + 20 + usize::from(more) * 4),
            true => {
                let chain = vec![hop; more.into()];
                let data = HEADERS + if more > 0 { 8 } else { 0 };
                (v6(|ip, _| ip.extensions = chain), data)
            }
        };
        // more than one fragment
        let udp = Udp { payload: units * 8 + payload, ..packet.udp.clone() };
        let source = if keep { Source::Preserve } else { Source::Vip };
        let Case { rule, .. } = case("", packet.clone(), "");
        let host = Scenario { rule: Rule { source, ..rule }, held: false };
        let host = host.host(ids(&host.rule));
        check_fragments(&host, &Forged { udp, ..packet }.frame(), data, units, !keep)
    });
    match result {
        Err(TestError::Fail(reason, input)) => panic!("{reason}\n{input:?}"),
        result => result.expect("no other failure"),
    }
}

fn check_fragments(
    host: &Host,
    frame: &[u8],
    data: usize,
    units: usize,
    fresh: bool,
) -> Result<(), TestCaseError> {
    let mut table = Table::default();
    let whole = gone(judge(host, &mut table, frame)).remove(0).frame;
    prop_assert_eq!(checksums(&whole), Some((true, true)));
    let mut pool = IpDefragPool::<(), ()>::new();
    let mut datagram = None;
    for fragment in fragments(frame, data, units) {
        prop_assert!(datagram.is_none());
        let sent = gone(judge(host, &mut table, &fragment)).remove(0);
        prop_assert_eq!(sent.fresh.is_some(), fresh);
        prop_assert_eq!(addresses(&sent.frame), addresses(&whole));
        let packet = SlicedPacket::from_ethernet(&sent.frame).expect("a packet");
        datagram = pool.process_sliced_packet(&packet, (), ()).expect("a fragment");
    }
    prop_assert_eq!(datagram.map(|datagram| datagram.payload), Some(whole[data..].to_vec()));
    Ok(())
}

/// A datagram fragmented for a small MTU and reassembled equals the one for a large MTU.
#[test]
fn segments_reassemble_to_the_datagram() {
    for options in 0..=10_u8 {
        for payload in [974, 1500, 2921, 4000] {
            let packet = v4(|ip, udp| (ip.options, udp.payload) = (options, payload));
            let Case { rule, .. } = case("", packet.clone(), "").by(NARROW);
            let scenario = Scenario { rule, held: false };
            let narrow = scenario.host(ids(&scenario.rule));
            let mut wide = narrow.clone();
            wide.ways.get_mut(&NARROW.into()).expect("the way").mtu = 9000;
            let (mut table, frame) = (Table::default(), packet.frame());
            let whole = gone(judge(&wide, &mut table, &frame)).remove(0).frame;
            assert_eq!(checksums(&whole), Some((true, true)));
            let pieces = gone(judge(&narrow, &mut table, &frame));
            assert!(pieces.len() > 1, "{payload} bytes");
            let mut pool = IpDefragPool::<(), ()>::new();
            let mut datagram = None;
            for piece in pieces {
                assert!(datagram.is_none() && piece.is_piece && piece.frame.len() <= 14 + 1000);
                assert_eq!(addresses(&piece.frame), addresses(&whole));
                let (header, _) = Ipv4Header::from_slice(&piece.frame[14..]).expect("a header");
                assert_eq!(header.calc_header_checksum(), header.header_checksum);
                let packet = SlicedPacket::from_ethernet(&piece.frame).expect("a packet");
                datagram = pool.process_sliced_packet(&packet, (), ()).expect("a fragment");
            }
            let data = 14 + 20 + usize::from(options) * 4;
            assert_eq!(datagram.map(|datagram| datagram.payload), Some(whole[data..].to_vec()));
        }
    }
}

/// Returns the addresses of the Ethernet and of the IP header.
fn addresses(frame: &[u8]) -> Vec<u8> {
    let ip = if frame[14] >> 4 == 4 { 14 + 12..14 + 20 } else { 14 + 8..14 + 40 };
    [&frame[..12], &frame[ip]].concat()
}

/// Returns the ICMP error as another stack builds it, with the longest quotation.
fn answered(answer: &Answer) -> Vec<u8> {
    let (kind, field) = (answer.kind(), answer.mtu.unwrap_or_default() as u32);
    let (about, mut packet) = (&answer.about, Vec::new());
    let written = match (answer.from, answer.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64);
            let builder = builder.icmpv4_raw(kind[0], kind[1], field.to_be_bytes());
            builder.write(&mut packet, &about[..about.len().min(548)])
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let builder = PacketBuilder::ipv6(from.octets(), to.octets(), 64);
            let builder = builder.icmpv6_raw(kind[0], kind[1], field.to_be_bytes());
            builder.write(&mut packet, &about[..about.len().min(1232)])
        }
        mixed => panic!("two families: {mixed:?}"),
    };
    written.expect("room");
    [&answer.link[..], &packet].concat()
}

/// An error with a changed byte or a quotation that is too short is rejected.
#[test]
fn damaged_answers_are_recognised() {
    let mut answers = 0;
    for Case { name, rule, packets, fates } in all() {
        if fates != "answer mtu" && fates != "answer ttl" {
            continue;
        }
        let host = Scenario { rule: rule.clone(), held: false }.host(ids(&rule));
        let outcome = judge(&host, &mut Table::default(), &packets[0].frame());
        let End::Answered(answer) = outcome.end else { continue };
        let frame = answered(&answer);
        assert!(answer.is(&frame), "{name}");
        let ip = answer.link.len();
        // checksums cover everything except traffic class, flow label and hop limit of IPv6
        let free = [1, 2, 3, 7].map(|byte| ip + byte);
        for at in (0..frame.len()).filter(|at| answer.from.is_ipv4() || !free.contains(at)) {
            let mut other = frame.clone();
            other[at] ^= 0x40;
            assert!(!answer.is(&other), "{name}, byte {at}");
        }
        assert!(!answer.is(&frame[..ip + 60.min(answer.least)]), "{name}, cut");
        answers += 1;
    }
    assert!(answers > 8, "{answers} answers");
}
