//! The packet path against its specification in `common/reference.rs`: packets of every kind, in
//! sequences, as those before decide about fragments. 20,000 of them, or UDPLB_FUZZ_PACKETS.
//!
//! What differs is printed in its smallest form, and belongs into the table of this file then.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use common::forge::{Checksum, Extension, Forged, Fragment, Ip, Kind, Length, Udp, V4, V6};
use common::packet::Mac;
use common::prelude::Tag;
use common::program::{Context, Counted, Run};
use common::reference::{
    Arrival, End, Fragments, Handling, Host, Mode, Outcome, Receiver, Rule, Source, Strategy as By,
    Supports, Verdict, Way,
};
use common::testbed::{
    CLIENT, FAR, FAR_COLD, GATEWAY_MAC, NARROW, NARROW_COLD, NEAR, NEAR_COLD, NEAR_MAC, NO_ROUTE,
    OUT_MAC, OWN, PORTS, REDIRECT, RELAY_MAC, SHOT, Testbed, UNSPEC, VIP, rule, to,
};
use proptest::collection::vec;
use proptest::prelude::{BoxedStrategy, Just, Strategy, any, prop_oneof};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use udplb::config::{self, Action};
use udplb::plan::{self, RuleIds};

const SUPPORTS: Supports = Supports { ipv6: false, vlan: false, fragments: false, errors: false };

const PACKETS: u32 = 20_000;

/// At most, and at least one.
const SEQUENCE: u32 = 40;

const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// What user space knows where the kernel knows something else.
const HELD_MAC: Mac = [2, 0, 0, 0, 9, 9];

/// What the kernel takes for a frame with an IPv6 header.
const SHORTEST: usize = 14 + 40;

/// A rule for [`VIP`] and [`PORTS`].
#[derive(Clone, Debug)]
struct Scenario {
    action: Action,
    source: config::Source,
    strategy: config::Strategy,
    upstreams: Vec<(Ipv4Addr, Option<u16>)>,
    /// User space vouches for what it knows of the ways.
    held: bool,
}

impl Scenario {
    fn plan(&self) -> plan::Rule {
        plan::Rule {
            strategy: self.strategy,
            upstreams: self.upstreams.iter().map(|(address, port)| to(*address, *port)).collect(),
            ..rule(self.action, self.source, NEAR)
        }
    }

    fn host(&self, ids: &RuleIds) -> Host {
        let source = match self.source {
            config::Source::Vip => Source::Vip,
            config::Source::Preserve => Source::Preserve,
        };
        let strategy = match self.strategy {
            config::Strategy::SrcPort => By::SrcPort,
            config::Strategy::SrcIp => By::SrcIp,
            config::Strategy::SrcIpPort => By::Hash(|_, _, _| 0),
        };
        let receiver = |((address, port), id): (&(Ipv4Addr, Option<u16>), &u32)| Receiver {
            id: *id,
            address: (*address).into(),
            port: *port,
            source,
        };
        let rule = Rule {
            id: ids.rule,
            address: Some(VIP.into()),
            ports: Some(PORTS.first..=PORTS.last),
            from: Vec::new(),
            action: self.action,
            mode: Mode::Balance,
            strategy,
            fragments: Handling::Follow,
            upstreams: self.upstreams.iter().zip(&ids.upstreams).map(receiver).collect(),
            mirrors: Vec::new(),
        };
        Host {
            mac: RELAY_MAC,
            rules: vec![rule],
            addresses: vec![VIP.into(), OWN.into()],
            broadcasts: vec![Ipv4Addr::new(10, 0, 1, 255).into()],
            ways: self.ways(),
            supports: SUPPORTS,
        }
    }

    /// As the testbed has them.
    fn ways(&self) -> BTreeMap<IpAddr, Way> {
        let kernels = [
            (NEAR, 1500, Some(NEAR_MAC)),
            (NEAR_COLD, 1500, None),
            (FAR, 1500, Some(GATEWAY_MAC)),
            (FAR_COLD, 1500, None),
            (NARROW, 1000, Some(GATEWAY_MAC)),
            (NARROW_COLD, 1000, None),
        ];
        let held = UPSTREAMS.map(|address| (address, held_mtu(address), Some(HELD_MAC)));
        let ways = if self.held { held.to_vec() } else { kernels.to_vec() };
        let way = |(address, mtu, mac): (Ipv4Addr, usize, Option<Mac>)| {
            let macs = mac.map(|mac| (OUT_MAC, mac));
            (address.into(), Way { mtu, macs, verdict: "forwarded", egress: Some(OWN.into()) })
        };
        ways.into_iter().map(way).collect()
    }
}

const UPSTREAMS: [Ipv4Addr; 7] = [NEAR, NEAR_COLD, FAR, FAR_COLD, NARROW, NARROW_COLD, NO_ROUTE];

fn held_mtu(address: Ipv4Addr) -> usize {
    if [NARROW, NARROW_COLD].contains(&address) { 1000 } else { 1500 }
}

/// Puts the packets to the program and to its specification.
fn check(
    testbed: &Testbed<'_>,
    scenario: &Scenario,
    packets: &[Forged],
    tally: &mut BTreeMap<Verdict, u64>,
) -> Result<(), String> {
    let known = scenario
        .upstreams
        .iter()
        .filter(|_| scenario.held)
        .map(|(address, _)| (*address, testbed.hop(held_mtu(*address) as u32, Some(HELD_MAC))));
    let ids = testbed.program.configure(&scenario.plan(), &known.collect(), 0);
    testbed.program.lease(scenario.held);
    let host = scenario.host(&ids);
    let mut fragments = Fragments::default();
    let mut counted = Counted::new();
    for (number, packet) in packets.iter().enumerate() {
        let mut frame = packet.frame();
        let came = packet.cut.unwrap_or(frame.len()).min(frame.len());
        // or the kernel would not run the program
        frame.resize(frame.len().max(SHORTEST), 0);
        let length = (came < frame.len()).then_some(came);
        // the kernel neither shortens nor copies such packets when a test makes them
        let plain = length.is_some() || scenario.action == Action::Pass;
        let (gso_size, gso_segs) = if plain { (0, 0) } else { packet.gso };
        let arrival = Arrival {
            frame: &frame[..came],
            tag: packet.tag,
            gso_size: gso_size as usize,
            gso_segs: gso_segs as usize,
        };
        let wanted = host.judge(&mut fragments, arrival);
        let context =
            Context { ifindex: testbed.routing, gso_size, gso_segs, tag: packet.tag, length };
        let run = testbed.program.run(&frame, context);
        let copies = testbed.wire.drain();
        if !is_as(&mut fragments, &wanted, arrival, &run, &copies) {
            let mut text = format!("packet {number}\n came {}\n", hex(arrival.frame));
            describe(&mut text, &wanted, &run, &copies);
            return Err(text);
        }
        for (counter, (packets, bytes)) in wanted.counted {
            let sum = counted.entry(counter).or_default();
            *sum = (sum.0 + packets, sum.1 + bytes);
        }
    }
    let got = testbed.program.take_counted();
    for ((_, verdict), (packets, _)) in &got {
        *tally.entry(verdict).or_default() += packets;
    }
    match got == counted {
        true => Ok(()),
        false => Err(format!("counted\n wanted {counted:?}\n got    {got:?}")),
    }
}

/// Whether the program did what was wanted.
fn is_as(
    fragments: &mut Fragments,
    wanted: &Outcome,
    came: Arrival<'_>,
    run: &Run,
    copies: &[Vec<u8>],
) -> bool {
    let stayed = run.frame == came.frame && run.tag == came.tag;
    let right = match &wanted.end {
        End::Up => run.action == UNSPEC && stayed,
        End::Dropped => run.action == SHOT && stayed,
        End::Away(gone) => {
            run.action == REDIRECT && run.tag.is_none() && fragments.admit(gone, &run.frame)
        }
        // their rate is limited
        End::Answered(answer) => match run.action {
            SHOT => stayed,
            action => action == REDIRECT && answer.is(&run.frame) && run.tag == came.tag,
        },
    };
    let copied = wanted.copies.len() == copies.len()
        && wanted.copies.iter().zip(copies).all(|(gone, copy)| fragments.admit(gone, copy));
    right && copied
}

fn describe(text: &mut String, wanted: &Outcome, run: &Run, copies: &[Vec<u8>]) {
    let end = match &wanted.end {
        End::Up => "up the stack".into(),
        End::Dropped => "dropped".into(),
        End::Away(gone) => format!("away, {}", hex(&gone.frame)),
        End::Answered(answer) => format!("dropped or answered: {answer:?}"),
    };
    let _ = writeln!(text, " wanted {end}, counted {:?}", wanted.counted);
    for gone in &wanted.copies {
        let _ = writeln!(text, "   copy {}", hex(&gone.frame));
    }
    let _ = writeln!(text, " got {} {:x?}, {}", run.action, run.tag, hex(&run.frame));
    for copy in copies {
        let _ = writeln!(text, "   copy {}", hex(copy));
    }
}

/// The headers, and how much more there is.
fn hex(frame: &[u8]) -> String {
    const SHOWN: usize = 160;
    let shown = &frame[..frame.len().min(SHOWN)];
    let bytes: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{bytes} of {} bytes", frame.len())
}

#[test]
fn the_program_does_what_the_specification_says() {
    let packets = match std::env::var("UDPLB_FUZZ_PACKETS") {
        Ok(number) => number.parse().expect("UDPLB_FUZZ_PACKETS is a number"),
        Err(_) => PACKETS,
    };
    Testbed::with(|testbed| {
        let mut tally = BTreeMap::new();
        // half of the longest is the mean
        let config = Config {
            cases: packets.div_ceil(SEQUENCE / 2),
            failure_persistence: None,
            ..Config::default()
        };
        let sequences = (any_scenario(), vec(any_packet(), 1..=SEQUENCE as usize));
        let tally_of = std::cell::RefCell::new(&mut tally);
        let result = TestRunner::new(config).run(&sequences, |(scenario, packets)| {
            check(testbed, &scenario, &packets, *tally_of.borrow_mut()).map_err(TestCaseError::fail)
        });
        match result {
            Err(TestError::Fail(reason, (scenario, packets))) => {
                let packets: Vec<_> = packets.iter().map(|packet| format!("{packet:?}")).collect();
                panic!("{reason}\n{scenario:?}\n{}", packets.join("\n"))
            }
            Err(TestError::Abort(reason)) => panic!("{reason}"),
            Ok(()) => {}
        }
        eprintln!("{tally:?}");
        let seen: BTreeSet<_> = tally.into_keys().collect();
        let missing: Vec<_> = VERDICTS.iter().filter(|verdict| !seen.contains(*verdict)).collect();
        assert!(missing.is_empty(), "never seen: {missing:?}");
    });
}

/// What must occur among so many packets.
const VERDICTS: &[Verdict] =
    &["forwarded", "fragment", "malformed", "mtu", "no-neighbour", "no-route", "not-for-us", "ttl"];

fn any_scenario() -> impl Strategy<Value = Scenario> {
    let action = prop_oneof![Just(Action::Block), Just(Action::Pass)];
    let source = prop_oneof![Just(config::Source::Vip), Just(config::Source::Preserve)];
    let strategy = prop_oneof![Just(config::Strategy::SrcPort), Just(config::Strategy::SrcIp)];
    let address = one_of(UPSTREAMS);
    let port = prop_oneof![Just(None), any::<u16>().prop_map(|port| Some(port.max(1)))];
    let upstreams = vec((address, port), 1..=4);
    (action, source, strategy, upstreams, usually(false, Just(true))).prop_map(
        |(action, source, strategy, upstreams, held)| Scenario {
            action,
            source,
            strategy,
            upstreams,
            held,
        },
    )
}

/// One value, and now and then another: most of a packet is to be right.
fn usually<T: Clone + std::fmt::Debug + 'static>(
    usual: T,
    other: impl Strategy<Value = T> + 'static,
) -> BoxedStrategy<T> {
    prop_oneof![15 => Just(usual), 1 => other].boxed()
}

fn one_of<T: Clone + std::fmt::Debug + 'static, const COUNT: usize>(
    values: [T; COUNT],
) -> impl Strategy<Value = T> {
    proptest::sample::select(values.to_vec())
}

fn any_packet() -> impl Strategy<Value = Forged> {
    let mac = prop_oneof![
        Just([0xff; 6]),
        Just([1, 0, 0x5e, 0, 0, 1]),
        Just([0x33, 0x33, 0, 0, 0, 1]),
        Just(NEAR_MAC)
    ];
    let frame = (
        usually(RELAY_MAC, mac),
        usually(None, any_tag().prop_map(Some)),
        usually(Vec::new(), vec(any_tag(), 1..=3)),
        usually(None, any_ethertype().prop_map(Some)),
        prop_oneof![4 => any_ipv4().prop_map(Ip::V4), 1 => any_ipv6().prop_map(Ip::V6)],
        any_udp(),
        usually(0, 1..50_usize),
        usually(None, (14..120_usize).prop_map(Some)),
        usually((0, 0), (1..1500_u32, 0..5_u32)),
    );
    frame.prop_map(|(to, tag, tags, ethertype, ip, udp, padding, cut, gso)| Forged {
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
    })
}

fn any_tag() -> impl Strategy<Value = Tag> {
    let tags = [(0x8100, 7), (0x8100, 0), (0x8100, 0xffff), (0x88a8, 0x2064)];
    one_of(tags.map(|(protocol, control)| Tag { protocol, control }))
}

/// IPv4, IPv6, VLAN and its kin, ARP, MPLS, lengths.
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

/// ICMP, IGMP, TCP, ESP, AH, UDP-Lite, and what else there may be.
fn any_protocol() -> BoxedStrategy<u8> {
    let known = [0, 1, 2, 6, 41, 43, 44, 50, 51, 58, 59, 60, 135, 136];
    usually(17, prop_oneof![4 => one_of(known), 1 => any::<u8>()])
}

fn any_ttl() -> BoxedStrategy<u8> {
    usually(64, prop_oneof![3 => 0..=2_u8, 1 => any::<u8>()])
}

fn any_ipv4() -> impl Strategy<Value = V4> {
    let source = prop_oneof![
        2 => (0..4_u32).prop_map(|host| Ipv4Addr::from_bits(CLIENT.to_bits() + host)),
        1 => any::<u32>().prop_map(Ipv4Addr::from_bits),
    ];
    let destinations = [OWN, NEAR, Ipv4Addr::new(10, 0, 1, 255), Ipv4Addr::new(224, 0, 0, 1)];
    let fragment = prop_oneof![
        // whole
        12 => (prop_oneof![Just(0_u8), Just(2)], Just(0_u16)),
        // the reserved bit says nothing
        1 => (prop_oneof![Just(4_u8), Just(6)], Just(0_u16)),
        2 => (prop_oneof![Just(1_u8), Just(3)], Just(0_u16)),
        2 => (prop_oneof![Just(0_u8), Just(1)], prop_oneof![1..4_u16, Just(185), Just(0x1fff)]),
        1 => (0..8_u8, 0..=0x1fff_u16),
    ];
    let header = (usually(4, 0..16_u8), usually(None, (0..16_u8).prop_map(Some)), any_length());
    let ids = prop_oneof![4 => 0..3_u16, 1 => any::<u16>()];
    let rest = (usually(0, any::<u8>()), any_ttl(), any_protocol(), usually(0, any::<u16>()));
    let addresses = (source, usually(VIP, one_of(destinations)));
    (header, fragment, ids, rest, addresses, usually(0, 1..=10_u8)).prop_map(
        |(header, fragment, identification, rest, addresses, options)| V4 {
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
        },
    )
}

fn any_ipv6() -> impl Strategy<Value = V6> {
    let source = prop_oneof![
        2 => (0..4_u128).prop_map(|host| Ipv6Addr::from_bits(CLIENT6.to_bits() + host)),
        1 => any::<u128>().prop_map(Ipv6Addr::from_bits),
    ];
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let destinations = [CLIENT6, all_nodes, Ipv6Addr::LOCALHOST];
    let chain = prop_oneof![4 => vec(any_extension(), 0..=3), 1 => vec(any_extension(), 7..=9)];
    let header = (usually(6, 0..16_u8), any::<u8>(), any::<u32>(), any_length(), any_ttl());
    let addresses = (source, usually(VIP6, one_of(destinations)));
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

fn any_udp() -> impl Strategy<Value = Udp> {
    let port = prop_oneof![8 => PORTS.first..=PORTS.last, 1 => any::<u16>()];
    let payload = prop_oneof![
        8 => 0..64_usize,
        // about the MTU, also behind options and extension headers
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
    (any::<u16>(), port, any_length(), checksum, (payload, any::<u16>()), trailer, cut).prop_map(
        |(source, destination, length, checksum, (payload, first), trailer, cut)| Udp {
            source,
            destination,
            length,
            checksum,
            payload,
            first,
            trailer,
            cut,
        },
    )
}
