//! Difficult cases and past failures: a rule, packets and the fate of each.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use udplb::config::{Action, Admission, Fragments, KeyAddress, Mode, Ports, Source};
use udplb::desired::{Rule, Upstream};

use super::{NEAR6, UNICAST, UNICAST6, rule_for};
use crate::common::wire::Tag;
use crate::forge::{Checksum, Extension, Forged, Fragment, Ip, Kind, Length, Udp, V4, V6};
use crate::program::VLAN_MAC;
use crate::random::Target;
use crate::testbed::{FAR_COLD, NARROW, NARROW_COLD, NEAR, NO_ROUTE, OWN};

pub struct Case {
    pub name: &'static str,
    pub rule: Rule,
    pub packets: Vec<Forged>,
    /// Expected results by packet: its fate, the number of copies, and the counters, with a `@0` for id 0.
    pub fates: &'static str,
}

/// Returns a case with one packet and a matching rule.
pub fn case(name: &'static str, packet: Forged, fate: &'static str) -> Case {
    cases(name, vec![packet], fate)
}

/// Returns a case with several packets and a matching rule.
fn cases(name: &'static str, packets: Vec<Forged>, fates: &'static str) -> Case {
    let upstream = match packets[0].ip {
        Ip::V4(_) => Upstream::new(NEAR, Some(9995)),
        Ip::V6(_) => Upstream::new(NEAR6, Some(9995)),
    };
    let target = if upstream.address.ip.is_ipv4() { UNICAST } else { UNICAST6 };
    let rule = Rule { action: Action::Block, ..rule_for(target, vec![upstream]) };
    Case { name, rule, packets, fates }
}

impl Case {
    fn under(self, change: impl FnOnce(&mut Rule)) -> Case {
        let mut case = self;
        change(&mut case.rule);
        case
    }

    pub fn by(self, upstream: impl Into<IpAddr>) -> Case {
        self.under(|rule| rule.upstreams = vec![Upstream::new(upstream.into(), None)])
    }
}

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// Returns a packet from a client to [`UNICAST`].
pub fn v4(change: impl FnOnce(&mut V4, &mut Udp)) -> Forged {
    let Target { mac, address: IpAddr::V4(address), port } = UNICAST else { unreachable!() };
    let mut ip = V4::new(CLIENT, address);
    let mut forged = Forged::new(mac, Ip::V4(ip.clone()), port);
    change(&mut ip, &mut forged.udp);
    Forged { ip: Ip::V4(ip), ..forged }
}

/// Returns a packet from a client to [`UNICAST6`].
pub fn v6(change: impl FnOnce(&mut V6, &mut Udp)) -> Forged {
    let Target { mac, address: IpAddr::V6(address), port } = UNICAST6 else { unreachable!() };
    let mut ip = V6::new(CLIENT6, address);
    let mut forged = Forged::new(mac, Ip::V6(ip.clone()), port);
    change(&mut ip, &mut forged.udp);
    Forged { ip: Ip::V6(ip), ..forged }
}

/// Returns a fragment; `offset` is in units of eight bytes.
fn part4(offset: u16, more: bool, change: impl FnOnce(&mut V4, &mut Udp)) -> Forged {
    v4(|ip, udp| {
        (ip.fragment_offset, ip.flags, ip.identification) = (offset, more.into(), 77);
        change(ip, udp);
    })
}

fn first4() -> Forged {
    part4(0, true, |_, _| {})
}

fn of_another(offset: u16, more: bool) -> Forged {
    part4(offset, more, |ip, _| ip.source = Ipv4Addr::new(198, 51, 100, 8))
}

fn later4() -> Forged {
    part4(3, false, |_, _| {})
}

fn fragment(offset: u16, more: bool) -> Extension {
    let fragment = Fragment { offset, more, reserved: 0, identification: 77 };
    Extension::new(Kind::Fragment(fragment))
}

/// Returns a packet with these extension headers.
fn chain(extensions: &[Extension]) -> Forged {
    v6(|ip, _| ip.extensions = extensions.to_vec())
}

fn first6() -> Forged {
    chain(&[fragment(0, true)])
}

fn later6() -> Forged {
    chain(&[fragment(3, false)])
}

fn martians(rule: &mut Rule) {
    rule.martians = Admission::Allow;
}

pub fn all() -> Vec<Case> {
    [ipv4(), ipv4_fragments(), ipv6(), ipv6_fragments(), tags(), answers(), copies(), sources()]
        .into_iter()
        .flatten()
        .collect()
}

/// Sets two payload bytes so that the computed checksum is zero, sent as all ones.
fn without_sum(datagram: Forged) -> Forged {
    let udp = Udp { payload: 2, first: 0, checksum: Checksum::Right, ..datagram.udp };
    let mut zeroes = Forged { udp, ..datagram };
    let checksum = zeroes.udp_checksum();
    zeroes.udp.first = checksum;
    assert_eq!(zeroes.udp_checksum(), u16::MAX);
    zeroes
}

/// Returns a packet whose checksum becomes zero by the rewrite: the payload is computed for the
/// outgoing addresses.
fn leaves_without_sum(ip: Ip, sent: impl FnOnce(&mut Ip)) -> Forged {
    let mut gone = Forged::new(UNICAST.mac, ip.clone(), 9995);
    sent(&mut gone.ip);
    let first = without_sum(gone).udp.first;
    let came = Forged::new(UNICAST.mac, ip, UNICAST.port);
    Forged { udp: Udp { payload: 2, first, ..came.udp }, ..came }
}

fn without_sums() -> [Case; 4] {
    let (Ip::V4(ip4), Ip::V6(ip6)) = (v4(|_, _| {}).ip, v6(|_, _| {}).ip) else { unreachable!() };
    let sent4 = V4 { source: ip4.destination, destination: NEAR, ..ip4.clone() };
    let sent6 = V6 { source: ip6.destination, destination: NEAR6, ..ip6.clone() };
    let goes4 = leaves_without_sum(Ip::V4(ip4), |ip| *ip = Ip::V4(sent4));
    let goes6 = leaves_without_sum(Ip::V6(ip6), |ip| *ip = Ip::V6(sent6));
    [
        case("checksum comes as ones", without_sum(v4(|_, _| {})), "away forwarded"),
        case("checksum leaves as ones", goes4, "away forwarded"),
        case("IPv6 checksum comes as ones", without_sum(v6(|_, _| {})), "away forwarded"),
        case("IPv6 checksum leaves as ones", goes6, "away forwarded"),
    ]
}

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 1, 2, 3);

fn to_group() -> Forged {
    Forged { to: [1, 0, 0x5e, 1, 2, 3], ..v4(|ip, _| ip.destination = GROUP) }
}

fn of_group(rule: &mut Rule) {
    (rule.key.address, rule.source) = (KeyAddress::Is(GROUP.into()), Source::Preserve);
}

#[rustfmt::skip]
fn ipv4() -> Vec<Case> {
    let mut cases = vec![
        case("plain", v4(|_, _| {}), "away forwarded"),
        case("no checksum", v4(|_, udp| udp.checksum = Checksum::Is(0)), "away forwarded"),
        case("a wrong checksum", v4(|_, udp| udp.checksum = Checksum::Off(1)), "away forwarded"),
        case("a wrong checksum of ones", v4(|_, udp| udp.checksum = Checksum::Is(0xffff)), "away forwarded"),
        case("a wrong header checksum", v4(|ip, _| ip.checksum_error = 1), "drop malformed"),
        case("a wrong header checksum, with options", v4(|ip, _| (ip.checksum_error, ip.options) = (1, 10)), "drop malformed"),
        case("an odd length", v4(|_, udp| udp.payload = 3), "away forwarded"),
        case("no payload", v4(|_, udp| udp.payload = 0), "away forwarded"),
        case("all options", v4(|ip, _| ip.options = 10), "away forwarded"),
        case("the reserved flag", v4(|ip, _| ip.flags = 4), "away forwarded"),
        case("bytes behind the datagram", v4(|_, udp| udp.trailer = 5), "away forwarded"),
        case("bytes behind the packet", Forged { padding: 7, ..v4(|_, _| {}) }, "away forwarded"),
        case("too many bytes behind the packet, copied", Forged { padding: 5, ..v4(|_, udp| udp.payload = 1472) }, "up clone-failed")
            .under(|rule| rule.action = Action::Pass),
        case("length of a header", v4(|ip, _| ip.total_length = Length::Is(20)), "drop malformed"),
        case("a byte too short", v4(|ip, _| ip.total_length = Length::Off(-1)), "drop malformed"),
        case("a byte too long", v4(|ip, _| ip.total_length = Length::Off(1)), "drop malformed"),
        case("a byte too long, and padded", Forged { padding: 1, ..v4(|ip, _| ip.total_length = Length::Off(1)) }, "away forwarded"),
        case("UDP length too long", v4(|_, udp| udp.length = Length::Off(1)), "drop malformed"),
        case("UDP length 7", v4(|_, udp| udp.length = Length::Is(7)), "drop malformed"),
        case("UDP length 0", v4(|_, udp| udp.length = Length::Is(0)), "drop malformed"),
        case("options cut off", v4(|ip, udp| { ip.words = Some(15); udp.payload = 0; }), "up"),
        case("a header of four words", v4(|ip, _| ip.words = Some(4)), "up"),
        case("version 6", v4(|ip, _| ip.version = 6), "up"),
        case("AH", v4(|ip, _| ip.protocol = 51), "up"),
        case("another port", v4(|_, udp| udp.destination = 53), "up"),
        case("another address", v4(|ip, _| ip.destination = OWN), "up"),
        case("another host's", Forged { to: [2, 0, 0, 0, 9, 9], ..v4(|_, _| {}) }, "up not-for-us"),
        case("for everybody", Forged { to: [0xff; 6], ..v4(|_, _| {}) }, "away forwarded"),
        case("for everybody, of TTL 1", Forged { to: [0xff; 6], ..v4(|ip, _| ip.ttl = 1) }, "drop ttl"),
        case("a group's", to_group(), "away forwarded").under(of_group),
        case("a group's, to a neighbour unknown", to_group(), "away unresolved").by(FAR_COLD).under(of_group),
        case("a group's, of TTL 1", v4(|ip, _| (ip.destination, ip.ttl) = (GROUP, 1)), "drop ttl").under(of_group),
        case("a group's, in a frame to one", v4(|ip, _| ip.destination = GROUP), "away forwarded").under(of_group),
        case("malformed, another host's",
            Forged { to: [2, 0, 0, 0, 9, 9], ..v4(|_, udp| udp.length = Length::Is(0)) }, "up not-for-us"),
        case("to a neighbour unknown", v4(|_, _| {}), "away unresolved").by(FAR_COLD),
        case("to nowhere", v4(|_, _| {}), "drop no-route").by(NO_ROUTE),
    ];
    cases.extend(without_sums());
    cases
}

#[rustfmt::skip]
fn ipv4_fragments() -> Vec<Case> {
    let follows = "away forwarded, away forwarded";
    let alone = "away forwarded, up fragment-early@0";
    let malformed = |change: fn(&mut V4, &mut Udp)| vec![part4(0, true, change), later4()];
    vec![
        cases("in order", vec![first4(), part4(3, true, |_, _| {}), part4(6, false, |_, _| {})],
            "away forwarded, away forwarded, away forwarded"),
        cases("the last one first", vec![later4(), first4(), later4()],
            "up fragment-early@0, away forwarded, away forwarded"),
        cases("overlapping", vec![first4(), part4(1, false, |_, _| {})], follows),
        cases("options in the first alone", vec![part4(0, true, |ip, _| ip.options = 3), later4()], follows),
        cases("options in all", vec![part4(0, true, |ip, _| ip.options = 3), part4(3, false, |ip, _| ip.options = 10)], follows),
        cases("the later one has the bytes of another port", vec![first4(), part4(3, false, |_, udp| udp.destination = 53)], follows),
        cases("a later one of one byte", vec![first4(), part4(3, false, |_, udp| udp.cut = Some(1))], follows),
        cases("another sender's", vec![first4(), of_another(3, false)], alone),
        cases("two senders with one identification", vec![first4(), of_another(0, true), later4(), of_another(3, false)],
            "away forwarded, away forwarded, away forwarded, away forwarded"),
        cases("another identification", vec![first4(), part4(3, false, |ip, _| ip.identification = 78)], alone),
        cases("another protocol", vec![first4(), part4(3, false, |ip, _| ip.protocol = 1)], "away forwarded, up"),
        cases("early, and to nobody", vec![part4(3, false, |ip, _| ip.destination = OWN)], "up"),
        cases("all of the UDP header", vec![part4(0, true, |_, udp| { udp.cut = Some(8); udp.length = Length::Is(1000); }), later4()], follows),
        cases("not all of the UDP header", malformed(|_, udp| udp.cut = Some(7)), "up, up fragment-early@0"),
        cases("a malformed first", malformed(|_, udp| udp.length = Length::Is(7)), "drop malformed, up fragment-early@0"),
        cases("a malformed later", vec![first4(), part4(3, false, |ip, _| ip.total_length = Length::Off(1))], "away forwarded, drop malformed"),
        cases("an old later", vec![first4(), part4(3, false, |ip, _| ip.ttl = 1)], "away forwarded, drop ttl"),
        cases("an old first", malformed(|ip, _| ip.ttl = 1), "answer ttl, away forwarded"),
        cases("an identification again, to no rule",
            vec![first4(), part4(0, true, |_, udp| udp.destination = 53), later4()],
            "away forwarded, up, up"),
        cases("passed", vec![first4(), later4()], "up fragment, up fragment").under(|rule| rule.fragments = Fragments::Pass),
        cases("dropped", vec![first4(), later4()], "drop fragment, drop fragment").under(|rule| rule.fragments = Fragments::Drop),
        cases("dropped here too", vec![first4(), later4()], "drop fragment, drop fragment")
            .under(|rule| (rule.fragments, rule.action) = (Fragments::Drop, Action::Pass)),
        cases("copied", vec![first4(), later4()], "up +1 forwarded, up +1 forwarded").under(|rule| rule.action = Action::Pass),
        cases("with the sender's identification", vec![first4(), later4()], follows).under(|rule| rule.source = Source::Preserve),
        cases("another host's later", vec![first4(), Forged { to: [2, 0, 0, 0, 9, 9], ..later4() }], "away forwarded, up not-for-us"),
    ]
}

#[rustfmt::skip]
fn ipv6() -> Vec<Case> {
    let [hop, options] = [Kind::HopByHop, Kind::Destination].map(Extension::new);
    let routing = |segments_left| Extension::new(Kind::Routing { segments_left });
    let of = |source: &str| v6(|ip, _| ip.source = source.parse().expect("an address"));
    let preserve = |rule: &mut Rule| rule.source = Source::Preserve;
    let long = |units| Extension { units, ..options.clone() };
    let lying = |lie| Extension { lie: Some(lie), ..options.clone() };
    vec![
        case("IPv6", v6(|_, _| {}), "away forwarded"),
        case("an odd length in IPv6", v6(|_, udp| udp.payload = 3), "away forwarded"),
        case("IPv6 without a checksum", v6(|_, udp| udp.checksum = Checksum::Is(0)), "drop no-checksum"),
        case("IPv6 without a checksum, as it may", v6(|_, udp| udp.checksum = Checksum::Is(0)), "away forwarded")
            .under(|rule| rule.zero_checksum = Admission::Allow),
        case("a sender of this link alone", of("fe80::7"), "drop martian").under(preserve),
        case("a sender of this link, to another", of("fe80::7"), "away forwarded"),
        case("a group as sender", of("ff05::7"), "drop martian").under(preserve),
        case("nobody as sender", of("::"), "drop martian").under(preserve),
        case("oneself as sender", of("::1"), "drop martian").under(preserve),
        case("class and flow", v6(|ip, _| (ip.traffic_class, ip.flow_label) = (0xff, 0xf_ffff)), "away forwarded"),
        case("hop limit 2", v6(|ip, _| ip.hop_limit = 2), "away forwarded"),
        case("version 4 in IPv6", v6(|ip, _| ip.version = 4), "up"),
        case("a jumbogram", v6(|ip, _| (ip.payload_length, ip.extensions) = (Length::Is(0), vec![hop.clone()])), "drop malformed"),
        case("payload length 0", v6(|ip, _| ip.payload_length = Length::Is(0)), "drop malformed"),
        case("payload a byte too short", v6(|ip, _| ip.payload_length = Length::Off(-1)), "drop malformed"),
        case("payload a byte too long", v6(|ip, _| ip.payload_length = Length::Off(1)), "drop malformed"),
        case("UDP length 0 in IPv6", v6(|_, udp| udp.length = Length::Is(0)), "drop malformed"),
        case("bytes behind the IPv6 datagram", v6(|_, udp| udp.trailer = 5), "away forwarded"),
        case("bytes behind the IPv6 packet", Forged { padding: 7, ..v6(|_, _| {}) }, "away forwarded"),
        case("hop-by-hop options", chain(std::slice::from_ref(&hop)), "away forwarded"),
        case("all that there is", chain(&[hop.clone(), options.clone(), routing(0), options.clone()]), "away forwarded"),
        case("long options", chain(&[long(3)]), "away forwarded"),
        case("hop-by-hop options after others", chain(&[options.clone(), hop.clone()]), "up"),
        case("a route that goes on", chain(&[routing(1)]), "up"),
        case("eight headers", chain(&vec![options.clone(); 8]), "away forwarded"),
        case("nine headers", chain(&vec![options.clone(); 9]), "up malformed@0"),
        case("nine headers to nobody", v6(|ip, _| (ip.destination, ip.extensions) = (NEAR6, vec![options.clone(); 9])), "up"),
        case("options longer than the frame", chain(&[lying(255)]), "up malformed@0"),
        case("options over the UDP header", chain(&[lying(1)]), "up"),
        case("headers of 512 bytes", chain(&[long(58)]), "away forwarded"),
        case("headers of 520 bytes", chain(&[long(59)]), "up malformed@0"),
        case("options cut off in IPv6", Forged { cut: Some(14 + 40 + 7), ..chain(std::slice::from_ref(&options)) }, "up malformed@0"),
        case("a UDP header cut off", Forged { cut: Some(14 + 40 + 7), ..v6(|_, _| {}) }, "up"),
        case("a UDP header cut off behind options", Forged { cut: Some(14 + 48 + 7), ..chain(&[options]) }, "up"),
        case("AH in IPv6", chain(&[Extension::new(Kind::Authentication)]), "up"),
        case("ESP in IPv6", v6(|ip, _| ip.protocol = 50), "up"),
        case("no next header", v6(|ip, _| ip.protocol = 59), "up"),
    ]
}

#[rustfmt::skip]
fn ipv6_fragments() -> Vec<Case> {
    let [hop, options] = [Kind::HopByHop, Kind::Destination].map(Extension::new);
    let follows = "away forwarded, away forwarded";
    let atomic = || chain(&[fragment(0, false)]);
    let reserved = Extension {
        lie: Some(0xff), // its second byte is reserved too
        ..Extension::new(Kind::Fragment(Fragment { offset: 0, more: true, reserved: 3, identification: 77 }))
    };
    vec![
        cases("IPv6 in order", vec![first6(), chain(&[fragment(3, true)]), later6()],
            "away forwarded, away forwarded, away forwarded"),
        cases("IPv6, the last one first", vec![later6(), first6(), later6()],
            "up fragment-early@0, away forwarded, away forwarded"),
        cases("first and last at once", vec![atomic(), later6()], "away forwarded, up fragment-early@0"),
        cases("first and last at once, in between", vec![first6(), atomic(), later6()],
            "away forwarded, away forwarded, away forwarded"),
        cases("options behind", vec![chain(&[fragment(0, true), options.clone()]), v6(|ip, _| {
            (ip.extensions, ip.protocol) = (vec![fragment(3, false)], 60);
        })], follows),
        cases("options before", vec![chain(&[hop.clone(), fragment(0, true)]), chain(&[hop.clone(), fragment(3, false)])], follows),
        cases("another next header in the later", vec![first6(), v6(|ip, _| {
            (ip.extensions, ip.protocol) = (vec![fragment(3, false)], 6);
        })], follows),
        cases("a later one of TCP", vec![v6(|ip, _| {
            (ip.extensions, ip.protocol) = (vec![fragment(3, false)], 6);
        })], "up"),
        cases("bits that say nothing", vec![chain(&[reserved]), later6()], follows),
        cases("two fragment headers", vec![chain(&[fragment(0, false), fragment(0, false)])], "up malformed@0"),
        cases("no UDP header in the first", vec![Forged {
            udp: Udp { cut: Some(0), ..first6().udp }, ..chain(&[fragment(0, true), options.clone()])
        }, later6()], "up, up fragment-early@0"),
        cases("half of the options in the first", vec![Forged {
            cut: Some(14 + 40 + 8 + 4), ..chain(&[fragment(0, true), options])
        }, later6()], "up malformed@0, up fragment-early@0"),
        cases("IPv6, an old later", vec![first6(), v6(|ip, _| {
            (ip.extensions, ip.hop_limit) = (vec![fragment(3, false)], 1);
        })], "away forwarded, drop ttl"),
    ]
}

#[rustfmt::skip]
fn tags() -> Vec<Case> {
    let tag = |protocol, control| Tag { protocol, control };
    let (inner, outer) = (tag(0x8100, 7), tag(0x88a8, 0x2064));
    let tagged = |tag, tags: &[Tag]| Forged { tag, tags: tags.to_vec(), ..v4(|_, _| {}) };
    let copy = |rule: &mut Rule| rule.action = Action::Pass;
    vec![
        case("a tag beside", tagged(Some(inner), &[]), "away forwarded"),
        case("a tag within", tagged(None, &[inner]), "away forwarded"),
        case("two tags within", tagged(None, &[outer, inner]), "away forwarded"),
        case("three tags", tagged(Some(outer), &[outer, inner]), "away forwarded"),
        case("three tags, copied", tagged(Some(outer), &[outer, inner]), "up +1 forwarded").under(copy),
        case("three tags within", tagged(None, &[outer, inner, inner]), "up"),
        case("a VLAN of others", tagged(None, &[tag(0x8100, 8)]), "up not-for-us"),
        case("a VLAN of others, beside", tagged(Some(tag(0x8100, 8)), &[]), "up not-for-us"),
        case("a VLAN of others, within", tagged(None, &[outer, tag(0x8100, 8)]), "up not-for-us"),
        case("a VLAN of the other kind", tagged(None, &[tag(0x88a8, 7)]), "up not-for-us"),
        case("a VLAN and a priority", tagged(None, &[inner, tag(0x8100, 0)]), "away forwarded"),
        case("a VLAN of others, copied", tagged(None, &[tag(0x8100, 8)]), "up not-for-us").under(copy),
        case("a VLAN, to its own address", Forged { to: VLAN_MAC, ..tagged(None, &[inner]) }, "away forwarded"),
        case("a VLAN's address without a tag", Forged { to: VLAN_MAC, ..v4(|_, _| {}) }, "up not-for-us"),
        case("priority alone", tagged(None, &[tag(0x8100, 0xe000)]), "away forwarded"),
        case("another kind of tag", tagged(None, &[tag(0x9100, 7)]), "up"),
        case("cut within a tag", Forged { cut: Some(17), ..tagged(None, &[inner]) }, "up"),
        case("old, with tags", Forged { tags: vec![outer, inner], ..v4(|ip, _| ip.ttl = 1) }, "answer ttl"),
        case("a tag and IPv6", Forged { tags: vec![inner], ..chain(&[Extension::new(Kind::Destination)]) }, "away forwarded"),
        cases("fragments with tags", vec![
            Forged { tags: vec![inner], ..first4() }, Forged { tag: Some(inner), ..later4() },
        ], "away forwarded, away forwarded"),
    ]
}

#[rustfmt::skip]
fn answers() -> Vec<Case> {
    let old = |source: [u8; 4]| v4(|ip, _| (ip.ttl, ip.source) = (1, source.into()));
    let long = |flags| v4(|ip, udp| (ip.flags, udp.payload) = (flags, 973));
    vec![
        case("TTL 1", v4(|ip, _| ip.ttl = 1), "answer ttl"),
        case("TTL 0", v4(|ip, _| ip.ttl = 0), "answer ttl"),
        case("TTL 1, with options", v4(|ip, _| (ip.ttl, ip.options) = (1, 10)), "answer ttl"),
        case("TTL 1 and nowhere to go", v4(|ip, _| ip.ttl = 1), "answer ttl").by(NO_ROUTE),
        case("TTL 1, copied", v4(|ip, _| ip.ttl = 1), "up ttl").under(|rule| rule.action = Action::Pass),
        case("TTL 1, replicated", v4(|ip, _| ip.ttl = 1), "drop ttl ttl").under(|rule| rule.mode = Mode::Replicate),
        case("TTL 1, of nobody", old([0; 4]), "drop ttl").under(martians),
        case("TTL 1, of everybody", old([255; 4]), "drop ttl").under(martians),
        case("TTL 1, of a group", old([224, 0, 0, 1]), "drop ttl").under(martians),
        case("TTL 1, of oneself", old([127, 0, 0, 1]), "drop ttl").under(martians),
        case("TTL 1, of class E", old([240, 0, 0, 1]), "drop ttl"),
        case("hop limit 1", v6(|ip, _| ip.hop_limit = 1), "answer ttl"),
        case("hop limit 0", v6(|ip, _| ip.hop_limit = 0), "answer ttl"),
        case("hop limit 1, of nobody", v6(|ip, _| (ip.hop_limit, ip.source) = (1, Ipv6Addr::UNSPECIFIED)), "drop ttl").under(martians),
        case("too long", long(2), "answer mtu").by(NARROW),
        case("too long, and may be cut", long(0), "drop +2 forwarded").by(NARROW),
        case("too long, and may be cut, copied", long(0), "up +2 forwarded").by(NARROW).under(|rule| rule.action = Action::Pass),
        case("too long, and may be cut, of the sender", long(0), "drop +2 forwarded").by(NARROW)
            .under(|rule| rule.source = Source::Preserve),
        case("cut into many, with options", v4(|ip, udp| (ip.options, udp.payload) = (10, 2950)), "drop +4 forwarded").by(NARROW),
        case("cut, and odd", v4(|_, udp| udp.payload = 977), "drop +2 forwarded").by(NARROW),
        case("cut, and padded", Forged { padding: 9, ..long(0) }, "drop +2 forwarded").by(NARROW),
        case("cut, without a checksum", v4(|_, udp| (udp.payload, udp.checksum) = (1100, Checksum::Is(0))), "drop +2 forwarded").by(NARROW),
        case("cut, to a neighbour unknown", long(0), "drop unresolved").by(NARROW_COLD),
        cases("fragments that are cut", vec![
            part4(0, true, |_, udp| (udp.payload, udp.length) = (1192, Length::Is(2408))),
            part4(150, false, |_, udp| udp.payload = 1193),
        ], "drop +2 forwarded, drop +2 forwarded").by(NARROW),
        case("long segments that may be cut", Forged { gso: (973, 2), ..v4(|_, udp| udp.payload = 1946) }, "drop mtu").by(NARROW),
        case("too long, copied", long(2), "up mtu").by(NARROW).under(|rule| rule.action = Action::Pass),
        case("too long by its options", v4(|ip, udp| (ip.flags, ip.options, udp.payload) = (2, 1, 969)), "answer mtu").by(NARROW),
        case("too long IPv6", v6(|_, udp| udp.payload = 1453), "answer mtu"),
        case("long segments", Forged { gso: (973, 2), ..v4(|ip, udp| (ip.flags, udp.payload) = (2, 1946)) }, "answer mtu").by(NARROW),
    ]
}

#[rustfmt::skip]
fn copies() -> Vec<Case> {
    let to = |address: Ipv4Addr| Upstream::new(address, None);
    let three = move |rule: &mut Rule| {
        rule.mode = Mode::Replicate;
        rule.upstreams = vec![to(NEAR), to(FAR_COLD), Upstream { source: Some(Source::Preserve), ..to(NARROW) }];
    };
    let dead = move |rule: &mut Rule| (rule.mode, rule.upstreams) = (Mode::Replicate, vec![to(FAR_COLD), to(NO_ROUTE)]);
    let mirrored = move |rule: &mut Rule| rule.mirrors = vec![to(NARROW), to(NO_ROUTE)];
    let networks = |network: &str| vec![network.parse().expect("a network")];
    let sender = |source: [u8; 4]| v4(|ip, _| ip.source = source.into());
    let strangers = move || Upstream { not_from: networks("198.51.100.7"), ..to(NEAR) };
    let some = move || Upstream { from: networks("198.51.0.0/16"), not_from: networks("198.51.7.0/24"), ..to(NARROW) };
    let shared = move |rule: &mut Rule| (rule.mode, rule.upstreams) = (Mode::Replicate, vec![strangers(), some()]);
    let local = || Upstream::local(UNICAST.address, Some(1162));
    let here = move |rule: &mut Rule| rule.upstreams = vec![local()];
    let both = move |rule: &mut Rule| (rule.mode, rule.upstreams) = (Mode::Replicate, vec![local(), to(NEAR)]);
    let few = move |rule: &mut Rule| (rule.mode, rule.upstreams) = (Mode::Replicate, vec![some()]);
    // the first one fills the line for packets of this size
    let padded4 = || vec![v4(|_, udp| udp.payload = 1400), Forged { padding: 5, ..v4(|_, udp| udp.payload = 1472) }];
    let padded6 = || vec![v6(|_, udp| udp.payload = 1400), Forged { padding: 5, ..v6(|_, udp| udp.payload = 1452) }];
    let passed = move |addresses: &[IpAddr]| {
        let upstreams = addresses.iter().zip(1..).map(|(address, port)| Upstream::new(*address, Some(port))).collect();
        move |rule: &mut Rule| (rule.action, rule.mode, rule.upstreams) = (Action::Pass, Mode::Replicate, upstreams)
    };
    let mirrored_some = move |rule: &mut Rule| rule.mirrors = vec![some()];
    let refusing = move |rule: &mut Rule| rule.key.not_from = networks("198.51.0.0/16");
    vec![
        cases("receivers of some senders", vec![v4(|_, _| {}), sender([198, 51, 1, 1]), sender([198, 51, 7, 7]), sender([192, 0, 2, 9])],
            "away forwarded forwarded, away +1 forwarded forwarded forwarded, away forwarded forwarded, away forwarded forwarded").under(shared),
        cases("a receiver of some senders", vec![v4(|_, _| {}), sender([198, 51, 7, 7]), sender([192, 0, 2, 9])],
            "away forwarded forwarded, up, up").under(few),
        cases("a mirror of some senders", vec![v4(|_, _| {}), sender([198, 51, 7, 7]), sender([192, 0, 2, 9])],
            "away +1 forwarded forwarded, away forwarded, away forwarded").under(mirrored_some),
        cases("a rule of some senders", vec![v4(|_, _| {}), sender([192, 0, 2, 9])], "up, away forwarded").under(refusing),
        // the rule's id is the lowest
        case("one of three is dead", v4(|_, _| {}), "away +1 forwarded forwarded unresolved forwarded").under(three),
        case("all are dead", v4(|_, _| {}), "drop no-route unresolved no-route").under(dead),
        case("mirrored", v4(|_, _| {}), "away +1 forwarded forwarded no-route").under(mirrored),
        case("mirrored alone", v4(|_, _| {}), "drop +1 no-route forwarded no-route").by(NO_ROUTE).under(mirrored),
        cases("fragments to three", vec![first4(), later4()],
            "away +1 forwarded forwarded unresolved forwarded, away +1 forwarded forwarded unresolved forwarded").under(three),
        // a device refuses frames with too many bytes behind the packet
        cases("padded too long, to one", padded4(), "up +1 forwarded forwarded, up clone-failed clone-failed")
            .under(passed(&[NEAR.into()])),
        cases("padded too long, to two", padded4(), "up +2 forwarded forwarded forwarded, up clone-failed clone-failed clone-failed")
            .under(passed(&[NEAR.into(), NEAR.into()])),
        cases("IPv6, padded too long, to one", padded6(), "up +1 forwarded forwarded, up clone-failed clone-failed")
            .under(passed(&[NEAR6.into()])),
        cases("padded too long, to the last one itself", padded4(),
            "away +1 forwarded forwarded forwarded, away forwarded clone-failed forwarded")
            .under(passed(&[NEAR.into(), NEAR.into()])).under(|rule| rule.action = Action::Block),
        case("from this host", v4(|_, _| {}), "away forwarded").under(|rule| rule.source = Source::Egress),
        case("IPv6 from this host", v6(|_, _| {}), "away forwarded").under(|rule| rule.source = Source::Egress),
        cases("fragments to a receiver here", vec![first4(), later4()], "here forwarded, here forwarded").under(here),
        cases("fragments to one here and one elsewhere", vec![first4(), later4()],
            "here +1 forwarded forwarded forwarded, here +1 forwarded forwarded forwarded").under(both),
        case("a copy to a receiver here", v4(|_, _| {}), "up forwarded").under(here).under(|rule| rule.action = Action::Pass),
        case("no more TTL to a receiver here", v4(|ip, _| ip.ttl = 1), "here forwarded").under(here),
        cases("fragments from a named address and port", vec![first4(), later4()], "away forwarded, away forwarded")
            .under(|rule| rule.source = "10.0.2.9:5".parse().expect("a source")),
        cases("IPv6 fragments from a named address and port", vec![first6(), later6()], "away forwarded, away forwarded")
            .under(|rule| rule.source = "[fd00:2::9]:5".parse().expect("a source")),
        case("no checksum, from a named address and port", v4(|_, udp| udp.checksum = Checksum::Is(0)), "away forwarded")
            .under(|rule| rule.source = "10.0.2.9:5".parse().expect("a source")),
    ]
}

/// Looping packets and packets with an invalid source.
#[rustfmt::skip]
fn sources() -> Vec<Case> {
    let from = |source: [u8; 4]| v4(|ip, _| ip.source = source.into());
    let from6 = |source: &str| v6(|ip, _| ip.source = source.parse().expect("an address"));
    let answer = |port| v4(|ip, udp| (ip.source, udp.source) = (NEAR, port));
    let answer6 = |port| v6(|ip, udp| (ip.source, udp.source) = (NEAR6, port));
    let routed = |pointer| v4(|ip, _| (ip.options, ip.source_route) = (2, Some(pointer)));
    let copy = |rule: &mut Rule| rule.action = Action::Pass;
    let preserve = |rule: &mut Rule| rule.source = Source::Preserve;
    let replicate = |rule: &mut Rule| rule.mode = Mode::Replicate;
    let any_port = |rule: &mut Rule| (rule.key.ports, rule.upstreams) = (Vec::new(), vec![Upstream::new(NEAR, None)]);
    let mirrored = |rule: &mut Rule| {
        (rule.upstreams, rule.mirrors) = (vec![Upstream::new(NARROW, None)], vec![Upstream::new(NEAR, Some(9995))]);
    };
    let of_others = |rule: &mut Rule| rule.key.from = vec!["198.51.0.0/16".parse().expect("a network")];
    let of_both = |rule: &mut Rule| rule.key.from = vec!["0.0.0.0/0".parse().expect("a network")];
    let elsewhere = |rule: &mut Rule| rule.key.ports = vec![Ports { first: 2055, last: 2056 }];
    vec![
        case("an answer", answer(9995), "drop loop"),
        case("an answer, copied", answer(9995), "up loop").under(copy),
        case("an answer, replicated", answer(9995), "drop loop").under(replicate),
        case("an answer of a mirror", answer(9995), "drop loop").under(mirrored),
        case("an answer to whom senders are named for", answer(9995), "drop loop").under(of_both),
        case("not of those that are named", answer(9995), "up").under(of_others),
        case("an upstream as sender", answer(9996), "away forwarded"),
        case("an upstream as sender, which would be from itself", answer(9996), "drop martian").under(preserve),
        case("the same, as it may", answer(9996), "away forwarded").under(preserve).under(martians),
        case("an answer as it may not", answer(9995), "drop loop").under(martians),
        case("an answer by the key's port", answer(2057), "drop loop").by(NEAR),
        case("an upstream as sender, by another port", answer(2059), "away forwarded").by(NEAR),
        case("an answer of the port before", answer(2057), "away forwarded").by(NEAR).under(elsewhere),
        case("no answer, from port 0", answer(0), "away forwarded").by(NEAR),
        case("an answer by any port", answer(7), "drop loop").under(any_port),
        case("an IPv6 answer", answer6(9995), "drop loop"),
        case("an IPv6 answer, copied", answer6(9995), "up loop").under(copy),
        case("an IPv6 answer by the key's port", answer6(2058), "drop loop").by(NEAR6),
        case("an IPv6 upstream as sender", answer6(9996), "away forwarded"),
        cases("an answer in fragments", vec![part4(0, true, |ip, udp| (ip.source, udp.source) = (NEAR, 9995)),
            part4(3, false, |ip, _| ip.source = NEAR)], "drop loop, up fragment-early@0"),
        case("of this host", from(OWN.octets()), "drop loop"),
        case("of this host, copied", from(OWN.octets()), "up loop").under(copy),
        case("of this host, as it may", from(OWN.octets()), "drop loop").under(martians),
        case("IPv6 of this host", from6("fd00:2::1"), "drop loop"),
        case("of the key", v4(|ip, _| ip.source = ip.destination), "drop martian"),
        case("IPv6 of the key", v6(|ip, _| ip.source = ip.destination), "drop martian"),
        case("this network", from([0, 1, 2, 3]), "drop martian"),
        case("nobody", from([0; 4]), "drop martian"),
        case("oneself", from([127, 0, 0, 1]), "drop martian"),
        case("oneself, copied", from([127, 0, 0, 1]), "up martian").under(copy),
        case("oneself, as it may", from([127, 0, 0, 1]), "away forwarded").under(martians),
        case("a group", from([224, 0, 0, 5]), "drop martian"),
        case("everybody", from([255; 4]), "drop martian"),
        case("everybody here", from([10, 0, 1, 255]), "drop martian"),
        case("everybody here, as it may", from([10, 0, 1, 255]), "away forwarded").under(martians),
        case("class E", from([240, 1, 1, 1]), "away forwarded"),
        case("link-local", from([169, 254, 7, 7]), "drop martian"),
        case("link-local to a group", Forged { to: [1, 0, 0x5e, 1, 2, 3],
            ..v4(|ip, _| (ip.source, ip.destination) = ([169, 254, 7, 7].into(), GROUP)) }, "away forwarded").under(of_group),
        case("IPv4 in IPv6", from6("::ffff:1.2.3.4"), "drop martian"),
        case("IPv6 nobody", from6("::"), "drop martian"),
        case("IPv6 oneself", from6("::1"), "drop martian"),
        case("IPv6 a group", from6("ff02::1"), "drop martian"),
        case("a source route that goes on", routed(4), "drop martian"),
        case("a source route that goes on, as it may", routed(4), "away forwarded").under(martians),
        case("a source route that ends here", routed(8), "away forwarded"),
    ]
}
