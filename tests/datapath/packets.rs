//! Tables of the packet path: a rule and a packet in; the verdict, the packet out, the copies on the
//! wire and the one changed counter.
//!
//! Packets run through BPF_PROG_TEST_RUN, which supports neither partial checksums nor short linear
//! parts: tests with sockets cover those.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use etherparse::{Icmpv6Header, Icmpv6Type, IpNumber, Ipv6Header};
use proptest::prelude::{Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use udplb::bpf::{types, wire};
use udplb::config::{Action, Key, Source, Strategy as Selection};
use udplb::datapath::kernel;
use udplb::desired::{Rule, Upstream};
use udplb::net::nexthop::NextHop;

use Fate::{Answered, Cut, Dropped, Queued, Sent, Unmatched, Untouched};

use crate::common::verifier::walked;
use crate::common::wire::Tag;
use crate::forge::{Forged, Ip, Udp, V6};
use crate::packet::{
    Checksum, Datagram, ETHERNET, PROTOCOL, TOTAL_LENGTH, UDP_LENGTH, VERSION, endpoint, payload,
    summed, with,
};
use crate::program::{Context, Run, SECONDS};
use crate::testbed::{
    BLACKHOLE, BY_IPV6_GATEWAY, BY_IPV6_GATEWAY_COLD, CLIENT, Case, FAR, FAR_COLD, Fate,
    GATEWAY_MAC, Ingress, NARROW, NARROW_COLD, NEAR, NEAR_COLD, NEAR_MAC, NO_ROUTE, OWN, PORTS,
    Packet, REDIRECT, RELAY_MAC, SHOT, Tamper, Testbed, UNREACHABLE, UNSPEC, Under, VIP, VLANS,
    datagram, rule, to,
};

/// MAC address in user space's next hop where the kernel's neighbour entry differs.
const OLD_MAC: [u8; 6] = [2, 0, 0, 0, 9, 9];

/// Number of random cases per property.
const CASES: u32 = 256;

const ACTIONS: [Action; 2] = [Action::Pass, Action::Block];

/// Returns a packet with an IP packet of this length.
fn of_length(length: usize) -> Datagram {
    Datagram { payload: payload(length - 28), ..datagram() }
}

/// Returns a case for each action.
fn both(name: &str, packet: impl Into<Packet>, fate: Fate) -> [Case; 2] {
    let packet = packet.into();
    ACTIONS.map(|action| Case::new(name, rule(action, Source::Vip, NEAR), packet.clone(), fate))
}

/// Returns the fate of a packet above the MTU. Before 5.12 the kernel does not report the MTU.
fn cut_at(mac: [u8; 6], mtu: usize) -> Fate {
    match routes_tell_mtu() {
        true => Cut("forwarded", mac, mtu),
        false => Dropped("mtu", Under::Upstream),
    }
}

#[test]
fn kernel_route_is_used() {
    let no_route = Dropped("no-route", Under::Upstream);
    // the copy waits in the kernel for the neighbour
    let cold = Dropped("unresolved", Under::Upstream);
    let queued = Queued("unresolved");
    let sent = |mac| Sent("forwarded", mac);
    let [link, route] = [cut_at(NEAR_MAC, 1500), cut_at(GATEWAY_MAC, 1000)];
    let cut_cold = if routes_tell_mtu() { cold } else { Dropped("mtu", Under::Upstream) };
    #[rustfmt::skip]
    let table = [
        // the upstream               address         length  pass               block
        ("on the link",               NEAR,            44, sent(NEAR_MAC),    sent(NEAR_MAC)),
        ("on the link, a full frame", NEAR,          1500, sent(NEAR_MAC),    sent(NEAR_MAC)),
        ("too long for the link",     NEAR,          1501, link,              link),
        ("behind a gateway",          FAR,             44, sent(GATEWAY_MAC), sent(GATEWAY_MAC)),
        ("behind an IPv6 gateway",    BY_IPV6_GATEWAY, 44, sent(GATEWAY_MAC), sent(GATEWAY_MAC)),
        ("neighbour unknown",         NEAR_COLD,       44, cold,              queued),
        ("gateway unknown",           FAR_COLD,        44, cold,              queued),
        ("IPv6 gateway unknown",      BY_IPV6_GATEWAY_COLD, 44, cold,         queued),
        ("fits the route",            NARROW,        1000, sent(GATEWAY_MAC), sent(GATEWAY_MAC)),
        ("too long for the route",    NARROW,        1001, route,             route),
        ("three pieces",              NARROW,        2500, route,             route),
        ("too long, and cold",        NARROW_COLD,   1001, cut_cold,          cut_cold),
        ("no route",                  NO_ROUTE,        44, no_route,          no_route),
        ("unreachable by the table",  UNREACHABLE,     44, no_route,          no_route),
        ("a black hole",              BLACKHOLE,       44, no_route,          no_route),
        ("this host itself",          OWN,             44, no_route,          no_route),
    ];
    let cases = table.into_iter().flat_map(|(name, upstream, length, pass, block)| {
        [(Action::Pass, pass), (Action::Block, block)].map(|(action, fate)| {
            Case::new(name, rule(action, Source::Vip, upstream), of_length(length), fate)
        })
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// The source is an address of the configuration, with the sender's port or one of its own.
#[test]
fn named_source_replaces_the_sender() {
    let sent = |mac| Sent("forwarded", mac);
    let named = |port| Source::Fixed { address: OWN.into(), port };
    let zero = Datagram { checksum: Checksum::Zero, ..datagram() };
    let own = Source::Fixed { address: NEAR.into(), port: Some(5) };
    #[rustfmt::skip]
    let table = [
        // the source              upstream   packet           fate
        ("an address",             named(None),      NEAR,      datagram(),      sent(NEAR_MAC)),
        ("address and port",       named(Some(162)), NEAR,      datagram(),      sent(NEAR_MAC)),
        ("behind a gateway",       named(Some(162)), FAR,       datagram(),      sent(GATEWAY_MAC)),
        ("without checksum",       named(Some(162)), NEAR,      zero,            sent(NEAR_MAC)),
        ("in pieces",              named(Some(162)), NEAR,      of_length(1501), cut_at(NEAR_MAC, 1500)),
        ("the upstream's own",     own,              NEAR,      datagram(),      Dropped("martian", Under::Upstream)),
    ];
    let cases = table.into_iter().flat_map(|(name, source, upstream, packet, fate)| {
        ACTIONS.map(|action| Case::new(name, rule(action, source, upstream), packet.clone(), fate))
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// A receiver on this host gets the packet as it came, but for its port; with `pass` it gets a copy, which the
/// program does not count or send again.
#[test]
fn local_upstream_is_this_host() {
    let zero = Datagram { checksum: Checksum::Zero, ..datagram() };
    let wrong = Datagram { checksum: Checksum::Wrong(1), ..datagram() };
    let options = Datagram { options: vec![1; 8], ..datagram() };
    let first = Datagram { more_fragments: true, payload: payload(24), ..datagram() };
    let old = Datagram { ttl: 1, ..datagram() };
    #[rustfmt::skip]
    let table = [
        ("plain",            datagram(),      Fate::Here),
        ("without checksum", zero,            Fate::Here),
        ("a wrong checksum", wrong,           Fate::Here),
        ("with options",     options,         Fate::Here),
        ("a first fragment", first,           Fate::Here),
        ("of TTL 1",         old,             Fate::Here),
        ("a long one",       of_length(1501), Fate::Here),
    ];
    let local = |port| vec![Upstream::local(IpAddr::V4(VIP), port)];
    let mut cases = Vec::new();
    for (name, packet, fate) in table {
        for tags in [&[][..], VLANS[0], VLANS[2]] {
            let tags = tags
                .iter()
                .map(|(protocol, control)| Tag { protocol: *protocol, control: *control });
            let tags: Vec<Tag> = tags.collect();
            for (action, port) in
                [(Action::Pass, Some(1162)), (Action::Block, Some(1162)), (Action::Block, None)]
            {
                let rule = Rule { upstreams: local(port), ..rule(action, Source::Vip, NEAR) };
                let case = Case::new(name, rule, packet.clone(), fate);
                // before 5.11 a copy with a tag inside is too long to arrive again
                if name != "a long one" || tags.len() < 2 || kernel::version() >= (5, 11) {
                    cases.push(Case { tags: tags.clone(), ..case });
                }
            }
        }
    }
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// Forwarding is off on the ingress interface: user space's next hop is used, and the MAC address comes
/// from the kernel's neighbour table, which has the gateway but not the silent one.
#[test]
fn stored_next_hop_is_used() {
    let no_route = Dropped("no-route", Under::Upstream);
    let cold = Dropped("unresolved", Under::Upstream);
    let queued = Queued("forwarded");
    let sent = Sent("forwarded", GATEWAY_MAC);
    let cut = Cut("forwarded", GATEWAY_MAC, 1000);
    Testbed::with(|testbed| {
        // differs from the kernel's current entry
        let mac = Some(OLD_MAC);
        let hop = |mtu, mac| Some(testbed.hop(mtu, mac));
        let silent = |mac| Some(testbed.hop_by(Ipv4Addr::new(10, 0, 2, 253).into(), 1500, mac));
        #[rustfmt::skip]
        let table = [
            // the upstream            known                            length pass      block
            ("never asked for",        None,                                44, no_route, no_route),
            ("without a route",        Some(NextHop::None("none".into())),      44, no_route, no_route),
            ("this host itself",       Some(NextHop::Local),                    44, no_route, no_route),
            ("with MAC addresses",     hop(1500, mac),                      44, sent,     queued),
            ("without MAC addresses",  hop(1500, None),                     44, sent,     queued),
            ("never in the kernel",    silent(None),                        44, cold,     Queued("unresolved")),
            ("not in it any more",     silent(mac),                         44, cold,     Queued("unresolved")),
            ("fits the route",         hop(1000, mac),                    1000, sent,     queued),
            ("too long for the route", hop(1000, mac),                    1001, cut,      cut),
            ("too long, and late",     hop(1000, None),                   1001, cut,      cut),
            ("MTU unknown",            hop(0, mac),                       1500, sent,     queued),
        ];
        let cases = table.into_iter().flat_map(|(name, known, length, pass, block)| {
            [(Action::Pass, pass), (Action::Block, block)].map(|(action, fate)| {
                let rule = rule(action, Source::Vip, FAR);
                let case = Case::new(name, rule, of_length(length), fate);
                Case { ingress: Ingress::Closed, known: known.clone(), ..case }
            })
        });
        testbed.check_all(cases);
    });
}

/// Forwarding is on, and user space has resolved a next hop through the gateway for all upstreams. User
/// space's next hop is used while the lease holds, otherwise the kernel's tables.
#[test]
fn stored_next_hop_and_kernel_route_are_ranked() {
    let (held, sent) = (Sent("forwarded", OLD_MAC), Sent("forwarded", GATEWAY_MAC));
    let queued = Queued("unresolved");
    let [cold, none] = ["unresolved", "no-route"].map(|verdict| Dropped(verdict, Under::Upstream));
    let cut = Cut("forwarded", OLD_MAC, 1500);
    let gateway = Ipv4Addr::new(10, 0, 2, 254).into();
    let silent = Ipv4Addr::new(10, 0, 2, 253).into();
    let [other_ipv6, silent_ipv6] =
        [0xfe, 0xfd].map(|last| Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last).into());
    #[rustfmt::skip]
    let table: [(&str, Ipv4Addr, IpAddr, bool, usize, Fate, Fate); 11] = [
        // user space's gateway      upstream              gateway     lease  length pass  block
        ("held, the same",           FAR,                  gateway,     true,    44, held, held),
        ("held, no route",           NO_ROUTE,             gateway,     true,    44, held, held),
        ("held, unknown",            FAR_COLD,             silent,      true,    44, held, held),
        ("held, too long",           FAR,                  gateway,     true,  1501, cut,  cut),
        ("expired, the same",        FAR,                  gateway,     false,   44, sent, sent),
        ("expired, no route",        NO_ROUTE,             gateway,     false,   44, none, none),
        ("expired, unknown",         FAR_COLD,             silent,      false,   44, cold, queued),
        ("expired, another unknown", FAR_COLD,             gateway,     false,   44, cold, queued),
        ("expired, another on link", NEAR_COLD,            gateway,     false,   44, cold, queued),
        ("expired, IPv6 unknown",    BY_IPV6_GATEWAY_COLD, silent_ipv6, false,   44, cold, queued),
        ("expired, another IPv6",    BY_IPV6_GATEWAY_COLD, other_ipv6,  false,   44, cold, queued),
    ];
    Testbed::with(|testbed| {
        testbed.check_all(table.into_iter().flat_map(
            |(name, upstream, gateway, lease, length, pass, block)| {
                [(Action::Pass, pass), (Action::Block, block)].map(|(action, fate)| {
                    let rule = rule(action, Source::Vip, upstream);
                    let known = Some(testbed.hop_by(gateway, 1500, Some(OLD_MAC)));
                    let hold: Tamper = |program, _| program.lease(true);
                    let case = Case::new(name, rule, of_length(length), fate);
                    Case { known, tamper: lease.then_some(hold), ..case }
                })
            },
        ));
    });
}

/// No packet is sent to a next hop that arpd marks as failed.
#[test]
fn next_hop_that_is_down_gets_nothing() {
    let down: Tamper = |program, ids| {
        program.lease(true);
        program.change_nexthop(ids.upstreams[0], |hop| {
            (hop.health, hop.macs) = (types::health::HEALTH_DOWN, types::macs::MACS_KNOWN);
        });
    };
    let expired: Tamper = |program, ids| {
        program.change_nexthop(ids.upstreams[0], |hop| hop.health = types::health::HEALTH_DOWN);
    };
    let fate = Dropped("no-neighbour", Under::Upstream);
    Testbed::with(|testbed| {
        let known = Some(testbed.hop(1500, Some(GATEWAY_MAC)));
        let cases = [Ingress::Routing, Ingress::Closed].into_iter().flat_map(|ingress| {
            both("down", datagram(), fate).map(|case| Case { ingress, ..case })
        });
        let cases = cases.map(|case| Case { tamper: Some(down), known: known.clone(), ..case });
        testbed.check_all(cases);
        // without a lease the mark is ignored
        let cases = both("expired", datagram(), Sent("forwarded", NEAR_MAC));
        testbed.check_all(cases.map(|case| Case {
            tamper: Some(expired),
            known: known.clone(),
            ..case
        }));
    });
}

/// Returns a case with a next hop on an interface that no longer exists.
fn no_such_interface(action: Action, fate: Fate) -> Case {
    let case = Case::new("no such interface", rule(action, Source::Vip, FAR), datagram(), fate);
    let tamper: Tamper = |program, ids| {
        program.change_nexthop(ids.upstreams[0], |hop| hop.ifindex = i32::MAX as u32);
    };
    Case { ingress: Ingress::Closed, tamper: Some(tamper), ..case }
}

/// Returns a case with a next hop that belongs to the previous upstream with this id.
fn another_upstreams(action: Action) -> Case {
    let tamper: Tamper = |program, ids| {
        program.change_nexthop(ids.upstreams[0], |hop| hop.address = wire(NEAR.into()));
    };
    let fate = Dropped("no-route", Under::Upstream);
    let name = "for another upstream";
    Case { name: name.into(), tamper: Some(tamper), ..no_such_interface(action, fate) }
}

#[test]
fn invalid_stored_next_hop_is_ignored() {
    let cases = [
        another_upstreams(Action::Pass),
        another_upstreams(Action::Block),
        // the kernel drops the copy later
        no_such_interface(Action::Pass, Dropped("stale-neighbour", Under::Upstream)),
        no_such_interface(Action::Block, Queued("stale-neighbour")),
    ];
    Testbed::with(|testbed| {
        let known = Some(testbed.hop(1500, Some(GATEWAY_MAC)));
        testbed.check_all(cases.map(|case| Case { known: known.clone(), ..case }));
    });
}

/// Returns cases for both actions, both sources, with and without an upstream port.
fn every_way(name: &str, packet: impl Into<Packet>, fate: Fate) -> Vec<Case> {
    let packet = packet.into();
    let mut cases = Vec::new();
    for action in ACTIONS {
        for source in [Source::Vip, Source::Preserve] {
            for port in [Some(9995), None] {
                let mut rule = rule(action, source, NEAR);
                rule.upstreams = vec![to(NEAR, port)];
                cases.push(Case::new(name, rule, packet.clone(), fate));
            }
        }
    }
    cases
}

#[test]
fn only_addresses_and_ttl_are_rewritten() {
    #[rustfmt::skip]
    let mut table = vec![
        ("plain".to_string(),         datagram()),
        ("TTL 2".into(),              Datagram { ttl: 2, ..datagram() }),
        ("TTL 255".into(),            Datagram { ttl: 255, ..datagram() }),
        ("DSCP and ECN".into(),       Datagram { tos: 0xff, ..datagram() }),
        ("do not fragment".into(),    Datagram { dont_fragment: true, ..datagram() }),
        ("IP id 0".into(),            Datagram { identification: 0, ..datagram() }),
        ("IP id 65535".into(),        Datagram { identification: 65535, ..datagram() }),
        ("source port 0".into(),      Datagram { source: endpoint(CLIENT, 0), ..datagram() }),
        ("no UDP checksum".into(),    Datagram { checksum: Checksum::Zero, ..datagram() }),
        ("UDP length short".into(),   Datagram { trailer: payload(5), ..datagram() }),
        ("padded to 60 bytes".into(), Datagram { payload: payload(5), padding: 13, ..datagram() }),
    ];
    for length in [0, 1, 2, 3, 15, 17, 18, 19, 255, 1471, 1472] {
        let name = format!("{length} bytes of payload");
        table.push((name, Datagram { payload: payload(length), ..datagram() }));
    }
    for words in 1..=10 {
        let name = format!("{words} words of IP options");
        table.push((name, Datagram { options: vec![1; words * 4], ..datagram() }));
    }
    for error in [1, 2, 0x100, 0x8000, 0xfffd, 0xfffe] {
        let udp = Checksum::Wrong(error);
        table.push((format!("UDP checksum + {error}"), Datagram { checksum: udp, ..datagram() }));
    }
    let fate = Sent("forwarded", NEAR_MAC);
    let cases = table.into_iter().flat_map(|(name, packet)| every_way(&name, packet, fate));
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// Returns the datagram with a payload whose computed checksum is 0, sent as 65535.
fn without_sum(datagram: Datagram) -> Datagram {
    let zeroes = Datagram { payload: vec![0, 0], ..datagram };
    let balanced = Datagram { payload: zeroes.udp_checksum().to_be_bytes().into(), ..zeroes };
    assert_eq!(balanced.udp_checksum(), u16::MAX);
    balanced
}

#[test]
fn computed_zero_checksum_is_sent_as_ones() {
    let fate = Sent("forwarded", NEAR_MAC);
    let cases = ACTIONS.into_iter().flat_map(|action| {
        let came = without_sum(datagram());
        let sent = Datagram {
            source: endpoint(VIP, 5666),
            destination: endpoint(NEAR, 9995),
            ..datagram()
        };
        let goes = Datagram { payload: without_sum(sent).payload, ..datagram() };
        [
            Case::new("came as ones", rule(action, Source::Vip, NEAR), came, fate),
            Case::new("goes as ones", rule(action, Source::Vip, NEAR), goes, fate),
        ]
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// With two CPUs, the one that read the clock first may be the last to take from the error budget.
#[test]
fn clock_that_goes_back_makes_no_errors() {
    let packet = Datagram { ttl: 1, ..datagram() };
    let fate = Dropped("ttl", Under::Upstream);
    let case = Case::new("none left", rule(Action::Block, Source::Vip, NEAR), packet, fate);
    let tamper: Tamper = |program, _| program.spend_errors();
    Testbed::with(|testbed| testbed.check_all([Case { tamper: Some(tamper), ..case }]));
}

#[test]
fn drops_are_counted_by_reason() {
    let plain = || datagram().frame();
    let length = |at, length: u16| summed(with(plain(), at, length.to_be_bytes()));
    let ttl = Answered("ttl", None);
    let malformed = Dropped("malformed", Under::Rule);
    let elsewhere = Untouched("not-for-us", Under::Rule);
    #[rustfmt::skip]
    let table: Vec<(&str, Packet, Fate)> = vec![
        ("TTL 0",                 Datagram { ttl: 0, ..datagram() }.into(), ttl),
        ("TTL 1",                 Datagram { ttl: 1, ..datagram() }.into(), ttl),
        ("total length 0",        length(TOTAL_LENGTH, 0).into(), malformed),
        ("without UDP header",    length(TOTAL_LENGTH, 20).into(), malformed),
        ("half a UDP header",     length(TOTAL_LENGTH, 27).into(), malformed),
        ("total length - 1",      length(TOTAL_LENGTH, 43).into(), malformed),
        ("total length + 1",      length(TOTAL_LENGTH, 45).into(), malformed),
        ("total length 65535",    length(TOTAL_LENGTH, 65535).into(), malformed),
        ("UDP length 0",          length(UDP_LENGTH, 0).into(), malformed),
        ("UDP length 7",          length(UDP_LENGTH, 7).into(), malformed),
        ("UDP length + 1",        length(UDP_LENGTH, 25).into(), malformed),
        ("UDP length 65535",      length(UDP_LENGTH, 65535).into(), malformed),
        ("another host's frame",  Datagram { to: NEAR_MAC, ..datagram() }.into(), elsewhere),
        ("IP checksum + 1",       Datagram { header_error: 1, ..datagram() }.into(), malformed),
        ("another's, TTL 1",      Datagram { to: NEAR_MAC, ttl: 1, ..datagram() }.into(), elsewhere),
        ("another's fragment",
            Datagram { to: NEAR_MAC, more_fragments: true, ..datagram() }.into(), elsewhere),
    ];
    let cases = table.into_iter().flat_map(|(name, packet, fate)| both(name, packet, fate));
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// Returns true if the kernel reports the MTU of routes: from 5.12 on. Before, only user space's next
/// hops have it.
fn routes_tell_mtu() -> bool {
    kernel::version() >= (5, 12)
}

/// Checks the fate of packets above the MTU known to user space or the kernel, comparing errors byte by
/// byte.
#[test]
fn senders_get_icmp_errors() {
    let whole = |length| Datagram { dont_fragment: true, ..of_length(length) };
    let old = |length| Datagram { ttl: 1, ..of_length(length) };
    let options = |datagram| Datagram { options: vec![1; 40], ..datagram };
    let narrow = Answered("mtu", Some(1000));
    #[rustfmt::skip]
    let table = [
        // the packet                      to      known        fate
        ("fits",                 whole(1500), NEAR,   None,       Sent("forwarded", NEAR_MAC)),
        ("a byte too long",      whole(1501), NEAR,   None,       Answered("mtu", Some(1500))),
        ("far too long",         whole(3000), NEAR,   None,       Answered("mtu", Some(1500))),
        ("too long, DF not set", of_length(1001), NARROW, None,   cut_at(GATEWAY_MAC, 1000)),
        ("for the route",        whole(1001), NARROW, None,       narrow),
        ("with options",         options(whole(961)), NARROW, None, narrow),
        ("known to user space",  whole(1301), FAR,    Some(1300), Answered("mtu", Some(1300))),
        ("fits user space's",    whole(1300), FAR,    Some(1300), Sent("forwarded", OLD_MAC)),
        ("old, 28 bytes",        old(28),     NEAR,   None,       Answered("ttl", None)),
        ("old, 31 bytes",        old(31),     NEAR,   None,       Answered("ttl", None)),
        ("old, 547 bytes",       old(547),    NEAR,   None,       Answered("ttl", None)),
        ("old, 548 bytes",       old(548),    NEAR,   None,       Answered("ttl", None)),
        ("old, 549 bytes",       old(549),    NEAR,   None,       Answered("ttl", None)),
        ("old, with options",    options(old(28)), NEAR, None,    Answered("ttl", None)),
        ("old and corrupt",      Datagram { checksum: Checksum::Wrong(1), ..old(44) }, NEAR, None,
            Answered("ttl", None)),
        ("old, a first fragment", Datagram { more_fragments: true, ..old(44) }, NEAR, None,
            Answered("ttl", None)),
    ];
    Testbed::with(|testbed| {
        testbed.check_all(table.into_iter().flat_map(|(name, packet, upstream, known, fate)| {
            ACTIONS.map(|action| {
                let known = known.map(|mtu| testbed.hop(mtu, Some(OLD_MAC)));
                let hold: Tamper = |program, _| program.lease(true);
                let tamper = known.is_some().then_some(hold);
                let fate = match fate {
                    Answered("mtu", _) if known.is_none() && !routes_tell_mtu() => {
                        Dropped("mtu", Under::Upstream)
                    }
                    fate => fate,
                };
                let rule = rule(action, Source::Vip, upstream);
                Case { known, tamper, ..Case::new(name, rule, packet.clone(), fate) }
            })
        }));
    });
}

/// Returns an ICMPv6 error about a packet from a client to [`VIP6`], without its Ethernet header.
fn error6(kind: [u8; 2], mtu: u32, quotation: &[u8]) -> Vec<u8> {
    error6_to(kind, mtu, quotation, VIP6, CLIENT6)
}

/// Returns an ICMPv6 error between any two addresses.
fn error6_to(
    kind: [u8; 2],
    mtu: u32,
    quotation: &[u8],
    source: Ipv6Addr,
    destination: Ipv6Addr,
) -> Vec<u8> {
    let icmp =
        Icmpv6Type::Unknown { type_u8: kind[0], code_u8: kind[1], bytes5to8: mtu.to_be_bytes() };
    let ip = Ipv6Header {
        payload_length: (8 + quotation.len()) as u16,
        next_header: IpNumber::IPV6_ICMP,
        hop_limit: 64,
        source: source.octets(),
        destination: destination.octets(),
        ..Ipv6Header::default()
    };
    let icmp = Icmpv6Header::with_checksum(icmp, ip.source, ip.destination, quotation);
    let icmp = icmp.expect("a length").to_bytes();
    [&ip.to_bytes()[..], &icmp, quotation].concat()
}

const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// Returns an outgoing packet that exceeds a later MTU; the ICMP error is sent to the relay.
fn gone() -> Datagram {
    let (source, destination) = (endpoint(VIP, 5666), endpoint(NEAR, 9995));
    let from =
        Datagram { to: GATEWAY_MAC, from: RELAY_MAC, dont_fragment: true, ..of_length(1400) };
    Datagram { source, destination, ..from }
}

/// Checks which ICMP errors are accepted and the path MTU that is recorded.
#[test]
fn path_mtu_is_learned_from_icmp_errors() {
    let error = |packet: Datagram| packet.error(Some(1300));
    let at = |at: usize, bytes: [u8; 2]| with(error(gone()), at, bytes);
    let learned = |mtu: u16| Some(mtu);
    #[rustfmt::skip]
    let table: Vec<(&str, Vec<u8>, Option<u16>)> = vec![
        ("as it should be",      error(gone()), learned(1300)),
        ("without an MTU",       gone().error(Some(0)), learned(552)),
        ("lower than any path",  gone().error(Some(68)), learned(552)),
        ("as large as it was",   gone().error(Some(1400)), None),
        ("for TTL",              gone().error(None), None),
        ("it could be cut",      error(Datagram { dont_fragment: false, ..gone() }), None),
        ("a later fragment",     error(Datagram { fragment_offset: 8, ..gone() }), None),
        ("to another port",      error(Datagram { destination: endpoint(NEAR, 9996), ..gone() }), None),
        ("to another upstream",  error(Datagram { destination: endpoint(FAR, 9995), ..gone() }), None),
        ("from another address", error(Datagram { source: endpoint(OWN, 5666), ..gone() }), None),
        ("for another host",     error(Datagram { from: NEAR_MAC, ..gone() }), None),
        ("with options",         error(Datagram { options: vec![1; 40], ..gone() }), learned(1300)),
        ("a wrong checksum",     at(ETHERNET + 22, [0x12, 0x34]), None),
        ("another code",         at(ETHERNET + 20, [3, 1]), None),
        ("to another receiver",  at(ETHERNET + 18, [9, 9]), None),
    ];
    Testbed::with(|testbed| {
        for (name, frame, mtu) in table {
            testbed.program.configure(&rule(Action::Block, Source::Vip, NEAR), &BTreeMap::new(), 0);
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let run = testbed.program.run(&frame, context);
            assert_eq!((run.action, &run.frame), (UNSPEC, &frame), "{name}");
            let noted: Vec<u32> = testbed.program.path_mtus().into_values().collect();
            assert_eq!(noted, mtu.map(u32::from).into_iter().collect::<Vec<_>>(), "{name}");
            assert!(testbed.program.take_counted().is_empty());
        }
    });
}

/// Errors are matched by the upstream's port or the original destination port, and by this host's
/// egress address.
#[test]
fn path_mtu_is_learned_for_each_kind_of_upstream() {
    Testbed::with(|testbed| {
        let context = Context { ifindex: testbed.routing, ..Context::default() };
        let own = |packet| Datagram { source: endpoint(OWN, 5666), ..packet };
        let named = |address: Ipv4Addr| Source::Fixed { address: address.into(), port: None };
        let gone_from = |address| Datagram { source: endpoint(address, 5666), ..gone() };
        let key_port = |port| Datagram { destination: endpoint(NEAR, port), ..gone() };
        #[rustfmt::skip]
        let table = [
            // source          port        packet                       learned
            (Source::Vip,      None,       key_port(PORTS.first),       true),
            (Source::Vip,      None,       key_port(PORTS.last + 1),    false),
            (Source::Egress,   Some(9995), own(gone()),                 true),
            (Source::Egress,   Some(9995), gone(),                      false),
            (Source::Egress,   None,       own(key_port(PORTS.first)),  true),
            (Source::Preserve, Some(9995), gone(),                      false),
            (named(OWN),       Some(9995), own(gone()),                 true),
            (named(OWN),       Some(9995), gone_from(FAR),              false),
        ];
        for (source, port, packet, learned) in table {
            let mut rule = rule(Action::Block, source, NEAR);
            rule.upstreams = vec![to(NEAR, port)];
            let ways = [(NEAR.into(), testbed.hop_to(NEAR.into(), 1500, None))].into();
            testbed.program.configure(&rule, &ways, 0);
            testbed.program.run(&packet.error(Some(1300)), context);
            assert_eq!(!testbed.program.path_mtus().is_empty(), learned, "{source:?} {packet:?}");
        }
    });
}

/// A recorded path MTU is reported to the sender of the next packet for ten minutes; fragmentable
/// packets are fragmented.
#[test]
fn learned_path_mtu_is_enforced() {
    let whole = |length| Datagram { dont_fragment: true, ..of_length(length) };
    let sent = Sent("forwarded", NEAR_MAC);
    let told = Answered("mtu", Some(1300));
    let (long, longer) = (540, 700);
    #[rustfmt::skip]
    let table = [
        // the packet                  seconds ago  fate
        ("fits",         whole(1300),  0,           sent),
        ("is too large", whole(1301),  0,           told),
        ("may be cut",   of_length(1301), 0,        Cut("forwarded", NEAR_MAC, 1300)),
        ("is still so",  whole(1301),  long,        told),
        ("is over",      whole(1301),  longer,      sent),
    ];
    Testbed::with(|testbed| {
        for (name, packet, ago, fate) in table {
            let case = Case::new(name, rule(Action::Block, Source::Vip, NEAR), packet, fate);
            testbed.check_after(&case, |program| {
                let context = Context { ifindex: testbed.routing, ..Context::default() };
                program.run(&gone().error(Some(1300)), context);
                program.age_path_mtus(ago * program.second);
            });
        }
    });
}

/// A lower path MTU replaces a higher one, and the rate of accepted errors is limited.
#[test]
fn path_mtu_only_falls_and_at_a_limited_rate() {
    Testbed::with(|testbed| {
        let upstreams = (0..70).map(|host| to(Ipv4Addr::new(10, 0, 3, host), Some(9995)));
        let rule =
            Rule { upstreams: upstreams.collect(), ..rule(Action::Block, Source::Vip, NEAR) };
        testbed.program.configure(&rule, &BTreeMap::new(), 0);
        let context = Context { ifindex: testbed.routing, ..Context::default() };
        let to = |host| Datagram {
            destination: endpoint(Ipv4Addr::new(10, 0, 3, host), 9995),
            ..gone()
        };
        for mtu in [1300, 1350, 1250] {
            testbed.program.run(&to(0).error(Some(mtu)), context);
        }
        assert_eq!(testbed.program.path_mtus().into_values().collect::<Vec<_>>(), [1250]);
        for host in 1..70 {
            testbed.program.run(&to(host).error(Some(1300)), context);
        }
        let noted = testbed.program.path_mtus().len();
        assert!((48..=60).contains(&noted), "{noted}");
    });
}

#[test]
fn ipv6_path_mtu_is_learned_from_icmp_errors() {
    let near = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2);
    let ip = V6::new(VIP6, near);
    let forged = Forged::new(NEAR_MAC, Ip::V6(ip), PORTS.first);
    let frame = Forged { udp: Udp { payload: 1400, ..forged.udp.clone() }, ..forged }.frame();
    let ethernet = [&RELAY_MAC[..], &GATEWAY_MAC, &frame[12..ETHERNET]].concat();
    let about = |frame: &[u8], kind, mtu| {
        let error = error6_to(kind, mtu, &frame[ETHERNET..ETHERNET + 1232], near, VIP6);
        [&ethernet[..], &error].concat()
    };
    let other = with(frame.clone(), ETHERNET + 40 + 2, [0, 53]);
    let corrupt = with(about(&frame, [2, 0], 1300), ETHERNET + 42, [0x12, 0x34]);
    #[rustfmt::skip]
    let table = [
        ("as it should be",     about(&frame, [2, 0], 1300), Some(1300)),
        ("lower than any path", about(&frame, [2, 0], 1000), Some(1280)),
        ("another type",        about(&frame, [3, 0], 1300), None),
        ("as large as it was",  about(&frame, [2, 0], 1448), None),
        ("to another port",     about(&other, [2, 0], 1300), None),
        ("a wrong checksum",    corrupt,                     None),
    ];
    Testbed::with(|testbed| {
        for (name, frame, mtu) in table {
            let upstreams = vec![Upstream::new(near, None)];
            let key = Key::new(IpAddr::V6(VIP6), vec![PORTS]);
            let rule = Rule { action: Action::Block, ..Rule::new("rule", key, upstreams) };
            testbed.program.configure(&rule, &BTreeMap::new(), 0);
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let run = testbed.program.run(&frame, context);
            assert_eq!((run.action, &run.frame), (UNSPEC, &frame), "{name}");
            let noted: Vec<u32> = testbed.program.path_mtus().into_values().collect();
            assert_eq!(noted, mtu.into_iter().collect::<Vec<_>>(), "{name}");
        }
    });
}

#[test]
fn ipv6_senders_get_icmp_errors() {
    let upstream = |last| Ipv6Addr::new(0xfd00, last, 0, 0, 0, 0, 0, 2);
    #[rustfmt::skip]
    let table = [
        // to      payload, hop limit  answer
        (upstream(2), 1452, 64, None),
        (upstream(2), 1453, 64, Some(([2, 0], 1500))),
        (upstream(6), 1252, 64, None),
        (upstream(6), 1253, 64, Some(([2, 0], 1300))),
        (upstream(6), 3000, 64, Some(([2, 0], 1300))),
        (upstream(2), 0,    1,  Some(([3, 0], 0))),
        (upstream(2), 3,    0,  Some(([3, 0], 0))),
        (upstream(2), 1184, 1,  Some(([3, 0], 0))),
        (upstream(2), 1185, 1,  Some(([3, 0], 0))),
    ];
    Testbed::with(|testbed| {
        for (upstream, payload, hop_limit, answer) in table {
            let upstreams = vec![Upstream::new(upstream, None)];
            let rule = Rule {
                action: Action::Block,
                ..Rule::new("rule", Key::new(IpAddr::V6(VIP6), vec![PORTS]), upstreams)
            };
            testbed.program.configure(&rule, &BTreeMap::new(), 0);
            let ip = V6 { hop_limit, ..V6::new(CLIENT6, VIP6) };
            let forged = Forged::new(RELAY_MAC, Ip::V6(ip), PORTS.first);
            let udp = Udp { payload, ..forged.udp };
            let came = Forged { udp, ..forged }.frame();
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let run = testbed.program.run(&came, context);
            let dropped = matches!(answer, Some(([2, 0], _))) && !routes_tell_mtu();
            assert_eq!(run.action, if dropped { SHOT } else { REDIRECT });
            let Some((kind, mtu)) = answer.filter(|_| !dropped) else {
                assert_eq!(run.frame.len(), came.len());
                continue;
            };
            // quoted up to the minimum MTU, RFC 4443 section 2.4
            let quoted = (came.len() - ETHERNET).min(1280 - 40 - 8) / 4 * 4;
            let error = error6(kind, mtu, &came[ETHERNET..ETHERNET + quoted]);
            let wanted = [&came[6..12], &came[..6], &came[12..ETHERNET], &error].concat();
            assert_eq!(run.frame, wanted, "{payload} bytes to {upstream}");
        }
    });
}

/// Runs this many packets, each from the next of `senders`; returns the number of ICMP errors.
fn answers(testbed: &Testbed<'_>, packet: &Datagram, senders: u32, packets: u32) -> u64 {
    let context = Context { ifindex: testbed.routing, ..Context::default() };
    let answered = (0..packets).filter(|number| {
        let address = Ipv4Addr::from_bits(CLIENT.to_bits() + number % senders);
        let frame = Datagram { source: endpoint(address, 5666), ..packet.clone() }.frame();
        match testbed.program.run(&frame, context) {
            Run { action: REDIRECT, .. } => true,
            Run { action, frame: left, .. } => {
                assert_eq!((action, left), (SHOT, frame));
                false
            }
        }
    });
    answered.count() as u64
}

/// Errors are limited in total and per sender: a burst, then a rate per second.
#[test]
fn icmp_errors_are_rate_limited() {
    let old = Datagram { ttl: 1, ..datagram() };
    Testbed::with(|testbed| {
        let rule = rule(Action::Block, Source::Vip, NEAR);
        for (senders, at_once, per_second) in [(400, 50, 1000), (1, 20, 100)] {
            testbed.program.configure(&rule, &BTreeMap::new(), 0);
            let per_second = per_second / u64::from(SECONDS);
            let answers = || answers(testbed, &old, senders, 400);
            let within = |elapsed: Duration| elapsed.as_millis() as u64 * per_second / 1000 + 2;
            let start = Instant::now();
            let got = answers();
            assert!((at_once..=at_once + within(start.elapsed())).contains(&got), "{got}");
            // the budget refills one by one
            let start = Instant::now();
            std::thread::sleep(Duration::from_millis(400));
            let least = within(start.elapsed()).min(at_once).saturating_sub(4);
            let got = answers();
            assert!((least..=within(start.elapsed())).contains(&got), "{got}, {least} at least");
            // the budget does not exceed the burst after a pause
            std::thread::sleep(Duration::from_millis(2000));
            let start = Instant::now();
            let got = answers();
            assert!((at_once..=at_once + within(start.elapsed())).contains(&got), "{got}");
            // all packets are counted
            let counted = testbed.program.take_counted();
            assert_eq!(counted.into_values().map(|(packets, _)| packets).sum::<u64>(), 1200);
        }
    });
}

/// Forged packets with an expired TTL, from one sender or many, do not keep an honest sender from
/// learning that its packets are too large.
#[test]
fn forged_packets_do_not_silence_icmp_errors() {
    let old = Datagram { ttl: 1, ..datagram() };
    let large = Datagram { dont_fragment: true, ..of_length(1501) };
    if !routes_tell_mtu() {
        return;
    }
    Testbed::with(|testbed| {
        let rule = rule(Action::Block, Source::Vip, NEAR);
        for (forged, senders) in [(&old, 1), (&old, 5000), (&large, 1)] {
            testbed.program.configure(&rule, &BTreeMap::new(), 0);
            answers(testbed, forged, senders, 5000);
            let honest = Ipv4Addr::new(192, 0, 2, 77);
            let packet = Datagram { source: endpoint(honest, 5666), ..large.clone() };
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let run = testbed.program.run(&packet.frame(), context);
            assert_eq!(run.action, REDIRECT, "{senders} senders");
        }
    });
}

#[test]
fn dangling_slot_is_counted() {
    let fate = Dropped("no-upstream", Under::Rule);
    let cases = both("no upstream", datagram(), fate)
        .map(|case| Case { tamper: Some(|program, _| program.lose_upstreams()), ..case });
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// In a later fragment the bytes at the UDP header's offset are payload.
#[test]
fn later_fragments_without_a_first_pass() {
    let fate = Untouched("fragment-early", Under::Zero);
    let later = Datagram { fragment_offset: 185, ..datagram() };
    let middle = Datagram { more_fragments: true, ..later.clone() };
    let other = Datagram { destination: endpoint(NEAR, 53), ..later.clone() };
    let options = Datagram { options: vec![1; 40], ..later.clone() };
    let mut cases = [
        both("the last", later.clone(), fate),
        both("one in the middle", middle, fate),
        both("to another address", other, Unmatched),
        both("with options", options, fate),
    ]
    .concat();
    // the frames of virtual interfaces are not padded
    for length in 1..8_u8 {
        let frame = with(later.frame(), TOTAL_LENGTH, [0, 20 + length]);
        let frame = frame[..ETHERNET + 20 + usize::from(length)].to_vec();
        cases.extend(both(&format!("{length} bytes"), frame, fate));
    }
    Testbed::with(|testbed| testbed.check_all(cases));
}

#[test]
fn unmatched_packets_pass() {
    let plain = || datagram().frame();
    let protocol = |number| with(plain(), PROTOCOL, [number]);
    let ethertype = |number: u16| with(plain(), ETHERNET - 2, number.to_be_bytes());
    let tagged = |ethertype: u16| {
        let mut frame = plain();
        let [high, low] = ethertype.to_be_bytes();
        frame.splice(ETHERNET - 2..ETHERNET - 2, [high, low, 0x20, 0x07]);
        frame
    };
    #[rustfmt::skip]
    let table: Vec<(&str, Packet)> = vec![
        ("another port",        Datagram { destination: endpoint(VIP, PORTS.last + 1), ..datagram() }.into()),
        ("another address",     Datagram { destination: endpoint(OWN, PORTS.first), ..datagram() }.into()),
        ("its first fragment",
            Datagram { destination: endpoint(OWN, 53), more_fragments: true, ..datagram() }.into()),
        ("ICMP",                protocol(1).into()),
        ("TCP",                 protocol(6).into()),
        ("UDP-Lite",            protocol(136).into()),
        ("ARP",                 ethertype(0x0806).into()),
        ("IPv6",                ethertype(0x86dd).into()),
        ("a tag of another kind", tagged(0x9100).into()),
        ("IP version 6",        with(plain(), VERSION, [0x65]).into()),
        ("IP header of 16",     with(plain(), VERSION, [0x44]).into()),
        ("IP header of 0",      with(plain(), VERSION, [0x40]).into()),
    ];
    let cases = table.into_iter().flat_map(|(name, packet)| both(name, packet, Unmatched));
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// Truncates a frame at every byte, with the original and with a matching IP length.
#[test]
fn truncated_packets_are_unmatched_or_malformed() {
    let whole = Datagram { options: vec![1; 4], payload: payload(5), ..datagram() };
    let frame = whole.frame();
    let headers = ETHERNET + 24 + 8;
    let cases = (ETHERNET..frame.len()).flat_map(|length| {
        let fate = if length < headers { Unmatched } else { Dropped("malformed", Under::Rule) };
        let fits = ((length - ETHERNET) as u16).to_be_bytes();
        let shorter = summed(with(frame.clone(), TOTAL_LENGTH, fits));
        let name = format!("{length} bytes");
        [both(&name, frame.clone(), fate), both(&format!("{name}, IP length fits"), shorter, fate)]
            .concat()
            .into_iter()
            .map(move |case| Case { length: Some(length), ..case })
    });
    let cases = cases.chain(both("whole", whole.clone(), Sent("forwarded", NEAR_MAC)));
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// Checks tags in the metadata and in the frame: packets to the upstream lose them, the original keeps
/// its tags unchanged.
#[test]
fn tagged_packets_match() {
    let tag = |protocol, control| Tag { protocol, control };
    let tags = [tag(0x8100, 7), tag(0x8100, 0), tag(0x8100, 0xe007), tag(0x88a8, 0x2064)];
    let elsewhere = Datagram { destination: endpoint(VIP, 53), ..datagram() };
    let fragment = Datagram { fragment_offset: 1, ..datagram() };
    let rows = [
        every_way("sent", datagram(), Sent("forwarded", NEAR_MAC)),
        every_way("TTL 1", Datagram { ttl: 1, ..datagram() }, Answered("ttl", None)),
        every_way("a later fragment", fragment, Untouched("fragment-early", Under::Zero)),
        every_way("another port", elsewhere, Unmatched),
    ]
    .concat();
    Testbed::with(|testbed| {
        let uncloned = Case {
            known: Some(testbed.hop(1500, Some(GATEWAY_MAC))),
            ..no_such_interface(Action::Pass, Dropped("stale-neighbour", Under::Upstream))
        };
        let rows = [rows, vec![uncloned]].concat();
        let tagged = |tag| rows.iter().cloned().map(move |case| Case { tag: Some(tag), ..case });
        testbed.check_all(tags.into_iter().flat_map(tagged));
        // and tags in the frame
        let within = [vec![tags[0]], vec![tags[3]], vec![tags[3], tags[0]], vec![tags[0], tags[0]]];
        let both = within.into_iter().flat_map(|tags| {
            [(None, tags.clone()), (Some(Tag { protocol: 0x88a8, control: 9 }), tags)]
        });
        testbed.check_all(both.flat_map(|(tag, tags)| {
            rows.iter().cloned().map(move |case| Case { tag, tags: tags.clone(), ..case })
        }));
    });
}

/// Checks the testbed: a tagged copy differs from an untagged one.
#[test]
fn wire_shows_tags() {
    let mut frame = datagram().frame();
    frame.splice(ETHERNET - 2..ETHERNET - 2, [0x81, 0, 0x20, 0x07]);
    Testbed::with(|testbed| {
        testbed.wire.send(&frame);
        assert_eq!(testbed.wire.drain(), [frame]);
    });
}

#[test]
fn destination_port_is_kept_or_replaced() {
    let cases = (PORTS.first - 1..=PORTS.last + 1).flat_map(|port| {
        let packet = Datagram { destination: endpoint(VIP, port), ..datagram() };
        let fate = if PORTS.contains(port) { Sent("forwarded", NEAR_MAC) } else { Unmatched };
        every_way(&format!("port {port}"), packet, fate)
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// Returns a rule with up to four upstreams on the link.
fn balanced(action: Action, strategy: Selection, upstreams: usize) -> Rule {
    let addresses = [NEAR, FAR, BY_IPV6_GATEWAY, NARROW];
    let upstreams = addresses[..upstreams].iter().map(|address| to(*address, Some(9995)));
    Rule { strategy, upstreams: upstreams.collect(), ..rule(action, Source::Vip, NEAR) }
}

const WAYS_OUT: [[u8; 6]; 4] = [NEAR_MAC, GATEWAY_MAC, GATEWAY_MAC, GATEWAY_MAC];

/// Returns a case in which this sender must select this upstream.
fn choice(
    strategy: Selection,
    upstreams: usize,
    sender: (Ipv4Addr, u16),
    chosen: usize,
) -> [Case; 2] {
    ACTIONS.map(|action| {
        let packet = Datagram { source: endpoint(sender.0, sender.1), ..datagram() };
        let fate = Sent("forwarded", WAYS_OUT[chosen]);
        let name = format!("{sender:?} of {upstreams} by {strategy:?}");
        Case { chosen, ..Case::new(name, balanced(action, strategy, upstreams), packet, fate) }
    })
}

#[test]
fn source_port_modulo_is_as_in_version_1() {
    let first_versions = [(5666, 0), (60256, 1)];
    let known = first_versions.map(|(port, chosen)| (2, port, chosen)).into_iter();
    let computed = (1..=4).flat_map(|upstreams| {
        [0, 1, 2, 255, 256, 257, 1024, 40000, 65534, 65535].map(|port: u16| {
            let number = u16::from_le_bytes(port.to_be_bytes());
            (upstreams, port, usize::from(number) % upstreams)
        })
    });
    let cases = known.chain(computed).flat_map(|(upstreams, port, chosen)| {
        choice(Selection::SrcPort, upstreams, (CLIENT, port), chosen)
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

#[test]
fn source_address_is_used_as_a_number() {
    let addresses =
        [[10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 1, 0], [192, 0, 2, 255], [223, 255, 255, 254]];
    let cases = (1..=4).flat_map(|upstreams| {
        addresses.into_iter().flat_map(move |octets| {
            let chosen = u32::from_be_bytes(octets) as usize % upstreams;
            choice(Selection::SrcIp, upstreams, (octets.into(), 5666), chosen)
        })
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

/// More upstreams than one line of the slots map holds.
#[test]
fn many_upstreams_are_selected() {
    let mut rule = Rule { strategy: Selection::SrcIp, ..rule(Action::Block, Source::Vip, NEAR) };
    rule.upstreams = (1000..1048).map(|port| to(NEAR, Some(port))).collect();
    let cases = (0..rule.upstreams.len()).map(|chosen| {
        let address = Ipv4Addr::from_bits(0x0a00_0000 / 48 * 48 + chosen as u32);
        let packet = Datagram { source: endpoint(address, 5666), ..datagram() };
        let fate = Sent("forwarded", NEAR_MAC);
        Case { chosen, ..Case::new(format!("upstream {chosen}"), rule.clone(), packet, fate) }
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

#[test]
fn counters_of_the_second_chunk_are_used() {
    let sent = both("sent", datagram(), Sent("forwarded", NEAR_MAC));
    let malformed = with(datagram().frame(), UDP_LENGTH, [0, 7]);
    let dropped = both("malformed", malformed, Dropped("malformed", Under::Rule));
    let cases = sent.into_iter().chain(dropped).flat_map(|case| {
        // the rule's id is the fifth
        [1019, 1020, 1040].map(|first_id| Case { first_id, ..case.clone() })
    });
    Testbed::with(|testbed| testbed.check_all(cases));
}

#[test]
fn source_ip_port_hash_is_even_and_stable() {
    const FLOWS: usize = 200;
    Testbed::with(|testbed| {
        let choose = |action, number: usize| {
            let source = endpoint([10, 20, 0, (number / 200) as u8].into(), 30000 + number as u16);
            let rule = balanced(action, Selection::SrcIpPort, 4);
            let case = Case::new("", rule, Datagram { source, ..datagram() }, Unmatched);
            let (ids, outcome) = testbed.run(&case);
            let ((id, verdict), _) = outcome.counted.into_iter().next().expect("a verdict");
            assert_eq!(verdict, "forwarded");
            ids.upstreams.iter().position(|upstream| *upstream == id).expect("an upstream")
        };
        let mut shares = [0; 4];
        for number in 0..FLOWS {
            let chosen = choose(Action::Block, number);
            assert_eq!(chosen, choose(Action::Pass, number));
            shares[chosen] += 1;
        }
        assert!(shares.iter().all(|share| (30..=70).contains(share)), "{shares:?}");
    });
}

/// Tests `block` only: the kernel does not clone the GSO packets that BPF_PROG_TEST_RUN makes.
#[test]
fn gso_packet_counts_as_its_segments() {
    let sent = |mac| Sent("forwarded", mac);
    let too_long = Dropped("mtu", Under::Upstream);
    #[rustfmt::skip]
    let table = [
        // a packet                          to    options payload  gso   packets fate
        ("even segments",                    NEAR,    0, 3000, (1000, 3), 3, sent(NEAR_MAC)),
        ("a short last segment",             NEAR,    0, 3001, (1000, 4), 4, sent(NEAR_MAC)),
        ("one segment",                      NEAR,    0, 1000, (1000, 1), 1, sent(NEAR_MAC)),
        ("options in each",                  NEAR,   40, 3000, (1000, 3), 3, sent(NEAR_MAC)),
        ("segments not counted yet",         NEAR,    0, 3000, (1000, 0), 3, sent(NEAR_MAC)),
        ("not counted yet, short last",      NEAR,    0, 3001, (1000, 0), 4, sent(NEAR_MAC)),
        ("not counted yet, options",         NEAR,   40, 3000, (1000, 0), 3, sent(NEAR_MAC)),
        ("segments fill the link",           NEAR,    0, 2944, (1472, 2), 2, sent(NEAR_MAC)),
        ("segments too long for the link",   NEAR,    0, 2946, (1473, 2), 2, too_long),
        ("segments fill the route",          NARROW,  0, 1944, (972, 2),  2, sent(GATEWAY_MAC)),
        ("segments too long for the route",  NARROW,  0, 1946, (973, 2),  2, too_long),
        ("options make segments too long",   NARROW,  4, 1944, (972, 2),  2, too_long),
    ];
    let cases = table.map(|(name, upstream, options, length, gso, packets, fate)| {
        let (options, payload) = (vec![1; options], payload(length));
        let rule = rule(Action::Block, Source::Vip, upstream);
        let headers = ETHERNET + 28 + options.len();
        // each segment counts its own headers
        let bytes = (packets * headers + length) as u64;
        let packet = Datagram { options, payload, ..datagram() };
        Case { gso, count: Some((packets as u64, bytes)), ..Case::new(name, rule, packet, fate) }
    });
    Testbed::with(|testbed| {
        testbed.check_all(cases.clone());
        // the same with the MTU from user space
        let known = |mtu| Some(testbed.hop(mtu, Some(GATEWAY_MAC)));
        testbed.check_all(cases.map(|case| {
            let narrow = case.rule.upstreams[0].address == NARROW.into();
            let fate = match case.fate {
                Sent(verdict, _) => Queued(verdict),
                fate => fate,
            };
            let known = known(if narrow { 1000 } else { 1500 });
            Case { ingress: Ingress::Closed, known, fate, ..case }
        }));
    });
}

/// Generates random datagrams: the fields that stay unchanged and those that are rewritten.
fn any_datagram() -> impl Strategy<Value = Datagram> {
    let checksum = prop_oneof![
        4 => Just(Checksum::Valid),
        1 => Just(Checksum::Zero),
        1 => (1..u16::MAX).prop_map(Checksum::Wrong),
    ];
    let lengths = (0..=10_usize, 0..8_usize, 0..20_usize);
    let ip = (any::<u8>(), any::<u16>(), any::<bool>(), 2..=u8::MAX);
    // unicast sources only; tests/fuzz/cases.rs has others
    let source = (0x0b00_0000..0x7f00_0000_u32, any::<u16>());
    let bytes = proptest::collection::vec(any::<u8>(), 0..1400);
    (source, PORTS.first..=PORTS.last, ip, checksum, lengths, bytes).prop_map(
        |(source, port, ip, checksum, (words, trailer, padding), bytes)| Datagram {
            source: endpoint(source.0.into(), source.1),
            destination: endpoint(VIP, port),
            tos: ip.0,
            identification: ip.1,
            dont_fragment: ip.2,
            ttl: ip.3,
            checksum,
            options: vec![1; words * 4],
            trailer: payload(trailer),
            payload: bytes,
            padding,
            ..datagram()
        },
    )
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let action = prop_oneof![Just(Action::Pass), Just(Action::Block)];
    let source = prop_oneof![Just(Source::Vip), Just(Source::Preserve)];
    let port = proptest::option::of(1..=u16::MAX);
    (action, source, port).prop_map(|(action, source, port)| Rule {
        upstreams: vec![to(NEAR, port)],
        ..rule(action, source, NEAR)
    })
}

#[test]
fn any_packet_is_rewritten_for_its_upstream() {
    Testbed::with(|testbed| {
        let mut runner = TestRunner::new(Config::with_cases(CASES));
        let result = runner.run(&(any_rule(), any_datagram()), |(rule, packet)| {
            let case = Case::new("at random", rule, packet, Sent("forwarded", NEAR_MAC));
            testbed.check(&case).map_err(TestCaseError::fail)
        });
        result.unwrap_or_else(|failure| panic!("{failure}"));
    });
}

/// `pass` never changes a packet, and each packet is counted at most once.
#[test]
fn any_bytes_are_handled() {
    let damage = proptest::collection::vec((0..60_usize, any::<u8>()), 0..6);
    let packets = (any_rule(), any_datagram(), damage, ETHERNET..200_usize);
    Testbed::with(|testbed| {
        let mut runner = TestRunner::new(Config::with_cases(CASES));
        let result = runner.run(&packets, |(rule, packet, damage, length)| {
            let mut frame = packet.frame();
            // the addresses stay intact, otherwise almost no packet would match
            for (at, byte) in damage {
                if let Some(damaged) = frame.get_mut(ETHERNET - 2 + at) {
                    *damaged = byte;
                }
            }
            let length = length.min(frame.len());
            check_unexpected(testbed, rule, frame, length)
        });
        result.unwrap_or_else(|failure| panic!("{failure}"));
    });
}

fn check_unexpected(
    testbed: &Testbed<'_>,
    rule: Rule,
    frame: Vec<u8>,
    length: usize,
) -> Result<(), TestCaseError> {
    let pass = rule.action == Action::Pass;
    let case = Case::new("", rule, frame.clone(), Unmatched);
    let (_, outcome) = testbed.run(&Case { length: Some(length), ..case });
    let sent = outcome.counted.keys().any(|(_, verdict)| *verdict == "forwarded");
    let packets: u64 = outcome.counted.values().map(|count| count.0).sum();
    let copies = usize::from(sent && pass);
    let same = outcome.run.frame == frame[..length];
    let fine = match outcome.run.action {
        UNSPEC => same && packets <= 1 && outcome.copies.len() == copies,
        SHOT => !pass && !sent && packets == 1 && outcome.copies.is_empty(),
        REDIRECT => !pass && sent && packets == 1 && outcome.copies.is_empty(),
        _ => false,
    };
    if fine { Ok(()) } else { Err(TestCaseError::fail(outcome.to_string())) }
}

/// The verifier prunes code of disabled features, so each combination is loaded. Kernels process at most a
/// million instructions. Before 6.8 they verify functions that nothing calls, too, and need several times as
/// many as newer ones, for which the limits are.
#[test]
fn program_loads_with_any_features() {
    use libbpf_rs::skel::{OpenSkel, SkelBuilder};
    use udplb::bpf::types::features;
    use udplb::datapath::kernel;
    const SWITCHES: [fn(&mut features) -> &mut u8; 21] = [
        |it| &mut it.ipv6,
        |it| &mut it.fragments,
        |it| &mut it.receivers,
        |it| &mut it.copies,
        |it| &mut it.errors,
        |it| &mut it.sockets,
        |it| &mut it.dry_run,
        |it| &mut it.extras.any_port,
        |it| &mut it.extras.senders,
        |it| &mut it.extras.payload,
        |it| &mut it.extras.origins,
        |it| &mut it.extras.flows,
        |it| &mut it.extras.direct,
        |it| &mut it.extras.tunnels,
        |it| &mut it.extras.parts,
        |it| &mut it.extras.sources,
        |it| &mut it.extras.decap,
        |it| &mut it.extras.sender_tables,
        |it| &mut it.extras.here,
        |it| &mut it.extras.quic,
        |it| &mut it.extras.templates,
    ];
    /// Number of those that both objects have.
    const COMMON: usize = 7;
    let load = |name: &str, limit, on: &dyn Fn(usize) -> bool| {
        let mut features = features { ticks_per_second: 250, lines: 1, ..features::default() };
        for (index, switch) in SWITCHES.iter().enumerate() {
            *switch(&mut features) = on(index).into();
        }
        let mut object = std::mem::MaybeUninit::uninit();
        let mut open = vec![udplb::bpf::UdplbSkelBuilder::default().open(&mut object)];
        let mut object = std::mem::MaybeUninit::uninit();
        if !features.extras.any() {
            open.push(udplb::datapath::generation::open_for(&features, &mut object));
        }
        for skeleton in open {
            let mut skeleton = skeleton.expect("the object opens");
            let constants = skeleton.maps.rodata_data.as_deref_mut().expect("constants");
            constants.features = features;
            let loaded = skeleton.load().unwrap_or_else(|error| panic!("{name}: {error}"));
            let walked = walked(loaded.progs.udplb.as_fd());
            assert!(walked < limit || kernel::version() < (6, 8), "{name}: {walked}");
        }
    };
    load("none", 70_000, &|_| false);
    load("all", 320_000, &|_| true);
    for index in 0..SWITCHES.len() {
        load(&format!("only {index}"), 320_000, &|other| other == index);
        load(&format!("all but {index}"), 320_000, &|other| other != index);
    }
    load("no extras", 320_000, &|index| index < COMMON);
}

/// The skeleton is that of the full object, so the small one must have the same maps and constants.
#[test]
fn objects_have_the_same_maps() {
    use libbpf_rs::skel::{OpenSkel, SkelBuilder};
    let mut objects = [const { std::mem::MaybeUninit::uninit() }; 2];
    let [full, small] = &mut objects;
    let full = udplb::bpf::UdplbSkelBuilder::default().open(full).expect("the full object");
    let small = udplb::datapath::generation::open_for(&types::features::default(), small)
        .expect("the small object");
    let maps = |skeleton: &udplb::bpf::OpenUdplbSkel<'_>| {
        let maps = skeleton.open_object().maps().map(|map| {
            let name = map.name().to_string_lossy().into_owned();
            // behind the constants are the compiler's own
            let is_constants = name.ends_with(".rodata");
            let size =
                if is_constants { size_of::<types::rodata>() } else { map.value_size() as usize };
            let value = map.initial_value().map(|value| value[..size].to_vec());
            (name, (map.map_type(), map.key_size(), size, map.max_entries(), value))
        });
        std::collections::BTreeMap::from_iter(maps)
    };
    assert_eq!(maps(&full), maps(&small));
    let counters = full.maps.counters.max_entries() * full.maps.counters_chunk.max_entries();
    assert_eq!(counters, udplb::bpf::ID_LIMIT);
}

/// Under lockdown (confidentiality) programs may not read kernel memory by helpers; from 6.2 on the
/// program does not need these helpers.
#[test]
fn program_reads_no_kernel_memory_by_helper() {
    use libbpf_rs::AsRawLibbpf;
    use libbpf_rs::skel::{OpenSkel, SkelBuilder};
    if kernel::version() < (6, 2) {
        return;
    }
    let mut object = std::mem::MaybeUninit::uninit();
    let mut skeleton =
        udplb::bpf::UdplbSkelBuilder::default().open(&mut object).expect("the object opens");
    // the other features read no kernel memory and would lengthen the log
    let constants = skeleton.maps.rodata_data.as_deref_mut().expect("constants");
    constants.features = types::features { ticks_per_second: 250, ..types::features::default() };
    let mut log = vec![0_u8; 128 << 20];
    let program = skeleton.progs.udplb.as_libbpf_object().as_ptr();
    // SAFETY: the program is open, and the log outlives its loading.
    unsafe {
        libbpf_sys::bpf_program__set_log_level(program, 2);
        libbpf_sys::bpf_program__set_log_buf(program, log.as_mut_ptr().cast(), log.len() as u64);
    }
    let loaded = skeleton.load().expect("the program loads");
    drop(loaded);
    let end = log.iter().position(|byte| *byte == 0).expect("an end");
    let log = String::from_utf8_lossy(&log[..end]);
    // calls that the verifier processed; the log lists all others too
    let calls = |helper: &str| log.contains(&format!(": (85) call {helper}"));
    assert!(calls("bpf_redirect#"), "what it calls is seen");
    assert!(!calls("bpf_probe_read"), "it calls bpf_probe_read");
}
