//! Random packets: most fields are valid and match a rule, some are not.

use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof};

use crate::common::wire::Tag;
use crate::forge::{Checksum, Extension, Forged, Fragment, Ip, Kind, Length, Udp, V4, V6};
use crate::packet::Mac;

/// Destination of most packets.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub mac: Mac,
    pub address: IpAddr,
    /// First of four ports.
    pub port: u16,
}

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 4);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 4);

/// Other destinations: this host, a subnet's broadcast address, a group, the limited broadcast address.
const OTHERS: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 0, 2, 1),
    Ipv4Addr::new(10, 0, 1, 255),
    Ipv4Addr::new(224, 0, 0, 1),
    Ipv4Addr::BROADCAST,
];
const OTHERS6: [Ipv6Addr; 3] =
    [CLIENT6, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), Ipv6Addr::LOCALHOST];
/// Looping and invalid sources: upstreams, this host, its networks.
const SOURCES: [Ipv4Addr; 8] = [
    Ipv4Addr::new(10, 0, 2, 2),
    Ipv4Addr::new(10, 0, 3, 2),
    Ipv4Addr::new(10, 0, 1, 1),
    Ipv4Addr::new(10, 0, 2, 1),
    Ipv4Addr::new(10, 0, 1, 255),
    Ipv4Addr::new(169, 254, 1, 1),
    Ipv4Addr::LOCALHOST,
    Ipv4Addr::UNSPECIFIED,
];
const SOURCES6: [Ipv6Addr; 8] = [
    Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2),
    Ipv6Addr::new(0xfd00, 3, 0, 0, 0, 0, 0, 2),
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 7),
    Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0xa00, 7),
    Ipv6Addr::LOCALHOST,
    Ipv6Addr::UNSPECIFIED,
];
const OTHER_MACS: [Mac; 4] =
    [[0xff; 6], [1, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1], [2, 0, 0, 0, 2, 2]];

/// Usually generates this value, sometimes another: most fields must be valid.
pub fn usually<T: Clone + Debug + 'static>(
    usual: T,
    other: impl Strategy<Value = T> + 'static,
) -> BoxedStrategy<T> {
    prop_oneof![15 => Just(usual), 1 => other].boxed()
}

pub fn one_of<T: Clone + Debug + 'static, const COUNT: usize>(
    values: [T; COUNT],
) -> impl Strategy<Value = T> {
    proptest::sample::select(values.to_vec())
}

pub fn any_packet(target: Target) -> impl Strategy<Value = Forged> {
    let v4 = |address| any_ipv4(address).prop_map(Ip::V4).boxed();
    let v6 = |address| any_ipv6(address).prop_map(Ip::V6).boxed();
    let (own, other) = match target.address {
        IpAddr::V4(address) => (v4(address), v6(OTHERS6[0])),
        IpAddr::V6(address) => (v6(address), v4(OTHERS[0])),
    };
    let frame = (
        usually(target.mac, one_of(OTHER_MACS)),
        usually(None, any_tag().prop_map(Some)),
        usually(Vec::new(), vec(any_tag(), 1..=3)),
        usually(None, any_ethertype().prop_map(Some)),
        prop_oneof![15 => own, 1 => other],
        any_udp(target.port),
        usually(0, 1..50_usize),
        usually(None, (14..120_usize).prop_map(Some)),
        usually((0, 0), (1..1500_u32, 0..5_u32)),
    );
    let packet = frame.prop_map(|(to, tag, tags, ethertype, ip, udp, padding, cut, gso)| Forged {
        to,
        from: [2, 0, 0, 0, 1, 2],
        tag,
        tags,
        ethertype,
        ip,
        udp,
        padding,
        cut,
        gso,
    });
    (packet, prop_oneof![2 => Just(false), 1 => Just(true)])
        .prop_map(move |(packet, is_plain)| if is_plain { plain(packet, target) } else { packet })
}

/// Makes a packet one that the fast path takes, but for its source and its length.
fn plain(packet: Forged, target: Target) -> Forged {
    let Forged { from, ip, udp, .. } = packet;
    let ip = match (ip, target.address) {
        (Ip::V4(ip), IpAddr::V4(destination)) => Ip::V4(V4 {
            version: 4,
            words: None,
            total_length: Length::Right,
            flags: ip.flags & 2,
            fragment_offset: 0,
            ttl: 64,
            protocol: 17,
            checksum_error: 0,
            destination,
            options: 0,
            source_route: None,
            ..ip
        }),
        (Ip::V6(ip), IpAddr::V6(destination)) => Ip::V6(V6 {
            version: 6,
            payload_length: Length::Right,
            hop_limit: 64,
            destination,
            extensions: Vec::new(),
            protocol: 17,
            ..ip
        }),
        (other, _) => other,
    };
    let udp =
        Udp { length: Length::Right, checksum: Checksum::Right, trailer: 0, cut: None, ..udp };
    Forged {
        to: target.mac,
        from,
        tag: None,
        tags: Vec::new(),
        ethertype: None,
        ip,
        udp,
        padding: 0,
        cut: None,
        gso: (0, 0),
    }
}

fn any_tag() -> impl Strategy<Value = Tag> {
    let tags = [(0x8100, 7), (0x8100, 0), (0x8100, 0xffff), (0x88a8, 0x2064)];
    one_of(tags.map(|(protocol, control)| Tag { protocol, control }))
}

/// Generates EtherTypes: IPv4, IPv6, VLAN tags, ARP, MPLS, lengths.
fn any_ethertype() -> impl Strategy<Value = u16> {
    let known = [0x0800, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x0806, 0x8847, 0x002e, 0];
    prop_oneof![4 => one_of(known), 1 => any::<u16>()]
}

fn any_length() -> BoxedStrategy<Length> {
    let others = prop_oneof![
        (-12..=12_i16).prop_map(Length::Off),
        (0..64_u16).prop_map(Length::Is),
        any::<u16>().prop_map(Length::Is),
    ];
    usually(Length::Right, others)
}

/// Generates IP protocols: ICMP, IGMP, TCP, ESP, AH, UDP-Lite and others.
fn any_protocol() -> BoxedStrategy<u8> {
    let known = [0, 1, 2, 6, 41, 43, 44, 50, 51, 58, 59, 60, 135, 136];
    usually(17, prop_oneof![4 => one_of(known), 1 => any::<u8>()])
}

fn any_ttl() -> BoxedStrategy<u8> {
    usually(64, prop_oneof![3 => 0..=2_u8, 1 => any::<u8>()])
}

fn any_ipv4(address: Ipv4Addr) -> impl Strategy<Value = V4> {
    let source = prop_oneof![
        16 => (0..3_u32).prop_map(|host| Ipv4Addr::from_bits(CLIENT.to_bits() + host)),
        8 => any::<u32>().prop_map(Ipv4Addr::from_bits),
        3 => one_of(SOURCES),
    ];
    let fragment = prop_oneof![
        // unfragmented
        12 => (prop_oneof![Just(0_u8), Just(2)], Just(0_u16)),
        // the reserved bit has no meaning
        1 => (prop_oneof![Just(4_u8), Just(6)], Just(0_u16)),
        2 => (prop_oneof![Just(1_u8), Just(3)], Just(0_u16)),
        2 => (prop_oneof![Just(0_u8), Just(1)], prop_oneof![1..4_u16, Just(185), Just(0x1fff)]),
        1 => (0..8_u8, 0..=0x1fff_u16),
    ];
    let header = (usually(4, 0..16_u8), usually(None, (0..16_u8).prop_map(Some)), any_length());
    let ids = prop_oneof![4 => 0..3_u16, 1 => any::<u16>()];
    let rest = (usually(0, any::<u8>()), any_ttl(), any_protocol(), usually(0, any::<u16>()));
    let addresses = (source, usually(address, one_of(OTHERS)));
    let options = usually((0, None), (1..=10_u8, usually(None, (0..16_u8).prop_map(Some))));
    (header, fragment, ids, rest, addresses, options).prop_map(
        |(header, fragment, identification, rest, addresses, (options, source_route))| V4 {
            version: header.0,
            words: header.1,
            tos: rest.0,
            total_length: header.2,
            identification,
            flags: fragment.0,
            fragment_offset: fragment.1,
            ttl: rest.1,
            protocol: rest.2,
            checksum_error: rest.3,
            source: addresses.0,
            destination: addresses.1,
            options,
            source_route,
        },
    )
}

fn any_ipv6(address: Ipv6Addr) -> impl Strategy<Value = V6> {
    let source = prop_oneof![
        16 => (0..3_u128).prop_map(|host| Ipv6Addr::from_bits(CLIENT6.to_bits() + host)),
        8 => any::<u128>().prop_map(Ipv6Addr::from_bits),
        3 => one_of(SOURCES6),
    ];
    let chain = prop_oneof![4 => vec(any_extension(), 0..=3), 1 => vec(any_extension(), 7..=9)];
    let header = (usually(6, 0..16_u8), any::<u8>(), any::<u32>(), any_length(), any_ttl());
    let addresses = (source, usually(address, one_of(OTHERS6)));
    (header, chain, addresses, any_protocol()).prop_map(|(header, extensions, addresses, last)| {
        V6 {
            version: header.0,
            traffic_class: header.1,
            flow_label: header.2,
            payload_length: header.3,
            hop_limit: header.4,
            source: addresses.0,
            destination: addresses.1,
            extensions,
            protocol: last,
        }
    })
}

fn any_extension() -> impl Strategy<Value = Extension> {
    let fragment = prop_oneof![
        1 => (Just(0_u16), Just(false)),
        2 => (Just(0_u16), Just(true)),
        2 => (prop_oneof![1..4_u16, Just(185), Just(0x1fff)], any::<bool>()),
    ];
    let reserved = usually(0, 0..4_u8);
    let fragment = (fragment, reserved, 0..3_u32).prop_map(|((offset, more), reserved, id)| {
        Kind::Fragment(Fragment { offset, more, reserved, identification: id })
    });
    let kind = prop_oneof![
        2 => Just(Kind::HopByHop),
        6 => Just(Kind::Destination),
        4 => usually(0, 1..4_u8).prop_map(|segments_left| Kind::Routing { segments_left }),
        4 => fragment,
        1 => Just(Kind::Authentication),
    ];
    (kind, usually(0, 1..4_u8), usually(None, any::<u8>().prop_map(Some)))
        .prop_map(|(kind, units, lie)| Extension { kind, units, lie })
}

fn any_udp(first_port: u16) -> impl Strategy<Value = Udp> {
    let port = prop_oneof![8 => first_port..first_port + 4, 1 => any::<u16>()];
    let payload = prop_oneof![
        8 => 0..64_usize,
        // around the MTU, also with options and extension headers
        1 => 900..1000_usize,
        1 => 1400..1500_usize,
        1 => 0..3000_usize,
    ];
    let checksum = prop_oneof![
        4 => Just(Checksum::Right),
        1 => Just(Checksum::Is(0)),
        1 => prop_oneof![Just(1), Just(0xfffe), Just(0xffff)].prop_map(Checksum::Is),
        1 => any::<u16>().prop_map(Checksum::Off),
    ];
    let trailer = usually(0, 1..16_usize);
    let cut = usually(None, (0..40_usize).prop_map(Some));
    let source = prop_oneof![3 => any::<u16>(), 1 => first_port..first_port + 4];
    let payload = prop_oneof![
        2 => (payload, any::<u16>()).prop_map(|(payload, first)| (payload, first, Vec::new())),
        // whole, or cut off
        1 => (any_export(), usually(usize::MAX, 0..100_usize))
            .prop_map(|(message, most)| (message.len().min(most), 0, message)),
        1 => any_quic().prop_map(|message| (message.len(), 0, message)),
    ];
    (source, port, any_length(), checksum, payload, trailer, cut).prop_map(
        |(source, destination, length, checksum, (payload, first, message), trailer, cut)| Udp {
            source,
            destination,
            length,
            checksum,
            payload,
            first,
            message,
            trailer,
            cut,
        },
    )
}

/// Generates beginnings of QUIC packets with long and short headers; the bytes of a connection id are all the same.
fn any_quic() -> impl Strategy<Value = Vec<u8>> {
    let first = one_of([0x40, 0xc0, 0xff, 0]);
    (first, 0..22_usize, 0..5_u8, 0..20_usize).prop_map(|(first, length, byte, rest)| {
        let long = [0, 0, 0, 1, length as u8];
        let version: &[u8] = if first & 0x80 == 0 { &[] } else { &long };
        [&[first], version, &vec![byte; length], &vec![0x33; rest]].concat()
    })
}

/// Generates messages of NetFlow 9 and IPFIX, and some of other versions; they end in up to three bytes of
/// padding.
pub fn any_export() -> impl Strategy<Value = Vec<u8>> {
    let id = prop_oneof![4 => 256..300_u16, 1 => 0..4_u16];
    let length = |real: usize| {
        let wrong = prop_oneof![Just(0), 1..4_u16, Just(real as u16 + 4), any::<u16>()];
        usually(real as u16, wrong)
    };
    let set = (id, 0..40_usize).prop_flat_map(move |(id, body)| {
        length(4 + body).prop_map(move |length| {
            [&id.to_be_bytes()[..], &length.to_be_bytes(), &vec![0x11; body]].concat()
        })
    });
    let sets = (vec(set, 0..=10), 0..4_usize);
    let sets = sets.prop_map(|(sets, padding)| [sets.concat(), vec![0; padding]].concat());
    let version = usually(9, one_of([5, 10, 10, 10, 0x0900]));
    (version, usually(0, 1..9_u16), sets).prop_map(|(version, error, sets)| {
        let rest = if version == 10 { 12 } else { 16 };
        let length = (4 + rest + sets.len()) as u16;
        let length = if version == 10 { length.wrapping_add(error) } else { 3 };
        let start: [[u8; 2]; 2] = [u16::to_be_bytes(version), length.to_be_bytes()];
        [start.concat(), vec![0x22; rest], sets].concat()
    })
}
