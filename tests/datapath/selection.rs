//! Selection of upstreams and copies, tested with tables and random flows.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::prelude::{Just, Strategy as _, any, prop_oneof};
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use udplb::config::{
    Action, Hash, Key, KeyAddress, Mode, Payload, Ports, Source, State, Strategy, StrategyPart,
};
use udplb::desired::tables::Tables;
use udplb::desired::{Desired, Rule, RuleIds, Upstream};

use crate::flow;
use crate::forge::{Forged, Ip, Udp, V4, V6};
use crate::program::{Context, Counted, Run};
use crate::testbed::{
    FAR_COLD, NEAR, NEAR_COLD, NO_ROUTE, PORTS, REDIRECT, RELAY_MAC, SHOT, Testbed, UNSPEC, VIP,
};

const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
const NEAR6: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2);

/// Number of flows for each strategy.
const FLOWS: usize = 1000;

/// Port of a rule's first upstream; the others have the following ports.
const FIRST_PORT: u16 = 10_000;

/// Returns the offset of the UDP header; no packet here has options.
fn udp_of(frame: &[u8]) -> usize {
    if frame[14] >> 4 == 4 { 14 + 20 } else { 14 + 40 }
}

/// Returns the index of a frame's upstream.
fn upstream_of(frame: &[u8]) -> usize {
    let port = udp_of(frame) + 2;
    usize::from(u16::from_be_bytes([frame[port], frame[port + 1]]) - FIRST_PORT)
}

/// A sender's address, port and payload.
pub type Flow = (IpAddr, u16, Vec<u8>);

fn frame_to((source, port, payload): &Flow, to: IpAddr, to_port: u16) -> Vec<u8> {
    let ip = match (source, to) {
        (IpAddr::V4(source), IpAddr::V4(to)) => Ip::V4(V4::new(*source, to)),
        (IpAddr::V6(source), IpAddr::V6(to)) => Ip::V6(V6::new(*source, to)),
        mixed => panic!("two families: {mixed:?}"),
    };
    let forged = Forged::new(RELAY_MAC, ip, to_port);
    let udp = Udp { source: *port, payload: payload.len(), ..forged.udp };
    let mut frame = Forged { udp, ..forged }.frame();
    let length = frame.len();
    frame[length - payload.len()..].copy_from_slice(payload);
    frame
}

/// Returns the port that a flow is sent to.
fn to_port(flow: &Flow) -> u16 {
    PORTS.first + flow.1 / 3 % PORTS.count() as u16
}

/// Returns a flow's frame to the rules' address.
pub fn frame(flow: &Flow) -> Vec<u8> {
    let to = if flow.0.is_ipv4() { VIP.into() } else { VIP6.into() };
    frame_to(flow, to, to_port(flow))
}

/// Returns this many upstreams at one address, distinguished by port.
fn upstreams(address: impl Into<IpAddr>, count: usize) -> Vec<Upstream> {
    let address = address.into();
    let ports = FIRST_PORT..FIRST_PORT + count as u16;
    ports.map(|port| Upstream::new(address, Some(port))).collect()
}

fn rule(key: impl Into<IpAddr>, upstreams: Vec<Upstream>) -> Rule {
    let key = Key::new(key.into(), vec![PORTS]);
    Rule { action: Action::Block, ..Rule::new("rule", key, upstreams) }
}

/// Returns a rule for each family.
pub fn rules(count: usize) -> [Rule; 2] {
    [rule(VIP, upstreams(NEAR, count)), rule(VIP6, upstreams(NEAR6, count))]
}

pub struct Relay<'test> {
    testbed: &'test Testbed<'test>,
    pub ids: Vec<RuleIds>,
    tables: Tables,
}

impl Relay<'_> {
    pub fn with<'test>(testbed: &'test Testbed<'test>, rules: &[Rule]) -> Relay<'test> {
        let rules = rules.to_vec();
        let addresses = vec![VIP.into(), Ipv4Addr::new(10, 0, 2, 1).into()];
        let desired = Desired { rules, addresses, ..Desired::default() };
        let ids = testbed.program.configure_all(&desired, &BTreeMap::new(), 0);
        let tables = Tables::new(&desired, &ids);
        testbed.program.take_counted();
        Relay { testbed, ids, tables }
    }

    pub fn run(&self, frame: &[u8]) -> Run {
        let context = Context { ifindex: self.testbed.routing, ..Context::default() };
        self.testbed.program.run(frame, context)
    }

    /// Returns the upstream that the program selects for a packet.
    pub fn choice(&self, frame: &[u8]) -> usize {
        let run = self.run(frame);
        assert_eq!(run.action, REDIRECT);
        upstream_of(&run.frame)
    }

    fn choices(&self, flows: &[Flow]) -> Vec<usize> {
        flows.iter().map(|flow| self.choice(&frame(flow))).collect()
    }

    pub fn counted(&self) -> Counted {
        self.testbed.program.take_counted()
    }
}

/// Returns random senders and payloads; half of the senders differ only slightly.
fn flows(ipv6: bool, payloads: impl proptest::strategy::Strategy<Value = Vec<u8>>) -> Vec<Flow> {
    let near = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0).to_bits();
    let address = prop_oneof![any::<u128>(), (0..256_u128).prop_map(move |host| near + host)];
    // kernels do not route packets from other source addresses
    let address = address.prop_map(move |bits| match ipv6 {
        true => Ipv6Addr::from_bits(bits & (u128::MAX >> 3) | 1 << 125).into(),
        false => IpAddr::from(Ipv4Addr::from_bits(0x1000_0000 | bits as u32 >> 2)),
    });
    let port = prop_oneof![any::<u16>(), 30_000..30_100_u16];
    let flows = vec((address, port, payloads), FLOWS);
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::default() });
    flows.new_tree(&mut runner).expect("flows").current()
}

fn bytes() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..100)
}

/// Generates lines of StatsD clients and similar invalid ones.
fn metrics() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    let name = prop_oneof![
        8 => "[a-z]{1,3}(\\.[a-z_]{1,12}){1,4}",
        1 => "[a-z.]{250,260}",
        1 => "",
    ];
    let value =
        prop_oneof![8 => ":[0-9]{1,5}\\|(c|ms|g|s)(\\|#[a-z]+:[a-z]+)?", 1 => "", 1 => "=1"];
    let line = (name, value).prop_map(|(name, value)| name + &value);
    let lines = prop_oneof![4 => vec(line.clone(), 1), 2 => vec(line, 0..4)];
    (lines, prop_oneof![Just(""), Just("\n")])
        .prop_map(|(lines, end)| (lines.join("\n") + end).into_bytes())
}

/// Returns the key computed by user space, and true if the sender's key was used instead of the
/// payload's.
fn key_of(rule: &Rule, flow @ (source, port, payload): &Flow) -> (u32, bool) {
    let headers = (*source, *port, to_port(flow));
    let found = match rule.payload {
        None => return (flow::header_key(rule, headers), false),
        Some(key) => match key.bytes() {
            Some((offset, length)) => flow::payload_key(payload, offset.into(), length.into()),
            None => flow::metric_key(payload),
        },
    };
    (flow::key_with_payload(rule, headers, found), found.is_none())
}

/// Returns true if a second metric follows.
fn has_several(payload: &[u8]) -> bool {
    let lines = payload.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    flow::metric_key(payload).is_some() && lines.count() > 1
}

/// The program and user space compute the same keys and upstreams.
#[test]
fn hashes_are_those_of_user_space() {
    use StrategyPart::{DstPort, SrcIp, SrcPort};
    let bytes_at = |offset, length| Some(Payload::Bytes { offset, length });
    let parts = |parts: &[StrategyPart]| Strategy::Parts(parts.to_vec().into());
    let payload = StrategyPart::Payload;
    let ways = [
        (Strategy::SrcPort, Hash::Modulo, None),
        (Strategy::SrcPort, Hash::Maglev, None),
        (Strategy::SrcIp, Hash::Modulo, None),
        (Strategy::SrcIp, Hash::Maglev, None),
        (Strategy::SrcIpPort, Hash::Modulo, None),
        (Strategy::SrcIpPort, Hash::Maglev, None),
        (Strategy::Payload, Hash::Maglev, bytes_at(0, 1)),
        (Strategy::Payload, Hash::Maglev, bytes_at(7, 64)),
        (Strategy::Payload, Hash::Modulo, bytes_at(20, 8)),
        (Strategy::Payload, Hash::Maglev, bytes_at(u16::MAX, 64)),
        (Strategy::Payload, Hash::Maglev, Some(Payload::Statsd)),
        (Strategy::Payload, Hash::Maglev, Some(Payload::Netflow9Source)),
        (Strategy::Payload, Hash::Maglev, Some(Payload::RadiusId)),
        (Strategy::DstPort, Hash::Modulo, None),
        (Strategy::DstPort, Hash::Maglev, None),
        (parts(&[SrcIp, DstPort]), Hash::Maglev, None),
        (parts(&[DstPort, SrcPort]), Hash::Modulo, None),
        (parts(&[SrcIp, SrcPort, DstPort]), Hash::Modulo, None),
        (parts(&[SrcIp, payload]), Hash::Maglev, Some(Payload::IpfixDomain)),
        (parts(&[DstPort, payload]), Hash::Modulo, bytes_at(3, 8)),
        (parts(&[payload, SrcIp]), Hash::Maglev, Some(Payload::Statsd)),
        (parts(&[SrcIp, SrcPort, DstPort, payload]), Hash::Maglev, bytes_at(0, 4)),
    ];
    Testbed::with(|testbed| {
        for (strategy, hash, payload) in ways {
            let [mut v4, mut v6] = rules(7).map(|rule| Rule { strategy, hash, payload, ..rule });
            v6.name = "IPv6".into();
            for rule in [&mut v4, &mut v6] {
                // unequal weights
                rule.upstreams[2].weight = if hash == Hash::Maglev { 3 } else { 1 };
            }
            let rules = [v4, v6];
            let relay = Relay::with(testbed, &rules);
            for (rule, ids) in rules.iter().zip(&relay.ids) {
                let ipv6 = rule.name == "IPv6";
                let flows = match payload {
                    Some(Payload::Statsd) => flows(ipv6, metrics()),
                    _ => flows(ipv6, bytes()),
                };
                check_hashes(&relay, rule, ids, &flows);
            }
        }
    });
}

fn check_hashes(relay: &Relay<'_>, rule: &Rule, ids: &RuleIds, flows: &[Flow]) {
    let (mut short, mut several) = (0, 0);
    for flow in flows {
        let (key, is_short) = key_of(rule, flow);
        let wanted = flow::upstream(&relay.tables, ids.rule, key);
        let got = relay.choice(&frame(flow));
        assert_eq!(
            got, wanted,
            "{:?}, {:?}, {:?}: {flow:?}",
            rule.strategy, rule.hash, rule.payload
        );
        short += u64::from(is_short);
        several += u64::from(rule.payload == Some(Payload::Statsd) && has_several(&flow.2));
    }
    let counted = relay.counted();
    let noted = |note| counted.get(&(ids.rule, note)).map_or(0, |(packets, _)| *packets);
    let what = format!("{:?} {:?}", rule.strategy, rule.payload);
    assert_eq!((noted("short-payload"), noted("several-metrics")), (short, several), "{what}");
    let mut used: Vec<_> = counted.keys().filter(|(id, _)| *id != ids.rule).collect();
    used.dedup();
    let ports = if rule.strategy == Strategy::DstPort { PORTS.count() } else { usize::MAX };
    assert!(used.len() >= rule.upstreams.len().min(ports / 2), "{what}");
}

/// Table of datagrams: the metric name that selects, and the notes counted.
#[test]
fn statsd_metrics_are_selected_by_name() {
    let long = |length| "x".repeat(length) + ":1|c";
    #[rustfmt::skip]
    let table = [
        // payload                    as           short several
        ("a.b:1|c".into(),            Some("a.b"), 0, 0),
        ("a.b:1|c\n".into(),          Some("a.b"), 0, 0),
        ("a.b:17|ms|@0.1|#x:y".into(), Some("a.b"), 0, 0),
        ("a.b:1|c\nc.d:1|c".into(),   Some("a.b"), 0, 1),
        ("a.b:1|c\n\n".into(),        Some("a.b"), 0, 0),
        ("a.b:1|c\r\n\r\n".into(),    Some("a.b"), 0, 0),
        ("a.b:1|c\n\r\nc.d:1|c".into(), Some("a.b"), 0, 1),
        ("\na.b:1|c".into(),          Some("a.b"), 0, 0),
        ("\r\na.b:1|c\r\n".into(),    Some("a.b"), 0, 0),
        ("\n\n\n\na.b:1|c\nc.d:1".into(), Some("a.b"), 0, 1),
        ("\n\n".into(),               None,        1, 0),
        ("\n".repeat(1400) + "a:1",   None,        1, 0),
        ("a.b:".into(),               Some("a.b"), 0, 0),
        (format!("a.b:{}\n1", "1".repeat(1000)), Some("a.b"), 0, 1),
        ("".into(),                   None,        1, 0),
        (":1|c".into(),               None,        1, 0),
        ("a.b".into(),                None,        1, 0),
        ("a.b\n".into(),              None,        1, 0),
        ("a.b\nc.d:1|c".into(),       None,        1, 0),
        (long(255),                   Some(&*"x".repeat(255)), 0, 0),
        (long(256),                   Some(&*"x".repeat(256)), 0, 0),
        (long(257),                   None,        1, 0),
    ]
    .map(|(payload, name, short, several): (String, Option<&str>, u64, u64)| {
        (payload, name.map(str::to_string), short, several)
    });
    Testbed::with(|testbed| {
        let statsd =
            |rule| Rule { strategy: Strategy::Payload, payload: Some(Payload::Statsd), ..rule };
        let rules = [statsd(rule(VIP, upstreams(NEAR, 40)))];
        let relay = Relay::with(testbed, &rules);
        let sender = (IpAddr::from([198, 51, 100, 7]), 5666);
        for (payload, name, short, several) in &table {
            let flow = (sender.0, sender.1, payload.clone().into_bytes());
            let key = match name {
                Some(name) => flow::payload_key(name.as_bytes(), 0, name.len()).expect("bytes"),
                None => flow::by_address_and_port(sender.0, sender.1),
            };
            let id = relay.ids[0].rule;
            assert_eq!(
                relay.choice(&frame(&flow)),
                flow::upstream(&relay.tables, id, key),
                "{payload:?}"
            );
            let counted = relay.counted();
            let noted = |note| counted.get(&(id, note)).map_or(0, |(packets, _)| *packets);
            let notes = (noted("short-payload"), noted("several-metrics"));
            assert_eq!(notes, (*short, *several), "{payload:?}");
        }
    });
}

/// A GSO packet goes to the upstream of its first datagram and is counted by that datagram.
#[test]
fn gso_packet_is_selected_by_its_first_datagram() {
    let bytes_at = |offset, length| Some(Payload::Bytes { offset, length });
    #[rustfmt::skip]
    let table: [(_, &[u8], &[u8]); 5] = [
        // strategy              first datagram  all that follow
        (bytes_at(0, 8),         b"12345678",    b"abcdefgh"),
        (bytes_at(8, 8),         b"1234567890",  b"abcdefghij"),
        (Some(Payload::Statsd),  b"a.b:1|c\n",   b"c.d:2|c\n"),
        (Some(Payload::Statsd),  b"a.b:1|c",     b"c:2|c\nd"),
        (Some(Payload::Statsd),  b"a.bb",        b"c:22"),
    ];
    Testbed::with(|testbed| {
        for (payload, first, later) in table {
            for number in 0..16_u8 {
                let strategy = Strategy::Payload;
                let rule = rule(VIP, upstreams(NEAR, 40));
                let relay = Relay::with(testbed, &[Rule { strategy, payload, ..rule }]);
                let sender = IpAddr::from([198, 51, 100, number]);
                let noted = || -> Vec<_> {
                    let notes = ["short-payload", "several-metrics"];
                    let counted = relay.counted().into_keys().map(|(_, name)| name);
                    counted.filter(|name| notes.contains(name)).collect()
                };
                let alone = relay.choice(&frame(&(sender, 5666, first.to_vec())));
                let noted_alone = noted();
                let frame = frame(&(sender, 5666, [first, later, later].concat()));
                let context = Context {
                    ifindex: testbed.routing,
                    gso_size: first.len() as u32,
                    gso_segs: 3,
                    ..Context::default()
                };
                let run = testbed.program.run(&frame, context);
                assert_eq!(run.action, REDIRECT);
                assert_eq!((upstream_of(&run.frame), noted()), (alone, noted_alone), "{first:?}");
            }
        }
    });
}

/// `random` selects for each packet independently.
#[test]
fn random_strategy_spreads_evenly() {
    Testbed::with(|testbed| {
        let [v4, _] = rules(4).map(|rule| Rule { strategy: Strategy::Random, ..rule });
        let relay = Relay::with(testbed, &[v4]);
        let flow = (IpAddr::from([198, 51, 100, 7]), 5666, Vec::new());
        let mut shares = [0; 4];
        for choice in relay.choices(&vec![flow; FLOWS]) {
            shares[choice] += 1;
        }
        assert!(shares.iter().all(|share| (180..=320).contains(share)), "{shares:?}");
    });
}

/// Upstreams drained by configuration or `drain` get no packets; flows of other upstreams stay.
#[test]
fn drained_upstreams_are_left_out() {
    Testbed::with(|testbed| {
        for hash in [Hash::Modulo, Hash::Maglev] {
            for (rule, ipv6) in rules(5).into_iter().zip([false, true]) {
                let rule = Rule { hash, ..rule };
                let flows = flows(ipv6, Just(Vec::new()));
                let before = Relay::with(testbed, std::slice::from_ref(&rule)).choices(&flows);
                let mut drained = rule.clone();
                drained.upstreams[1].state = State::Drained;
                let relay = Relay::with(testbed, std::slice::from_ref(&drained));
                let after = relay.choices(&flows);
                check_drained(&before, &after);
                testbed.program.override_state(relay.ids[0].upstreams[1], false);
                assert_eq!(relay.choices(&flows), before, "enabled at run time");

                let relay = Relay::with(testbed, std::slice::from_ref(&rule));
                testbed.program.override_state(relay.ids[0].upstreams[1], true);
                assert_eq!(relay.choices(&flows), after, "drained at run time");
            }
        }
    });
}

/// Checks the flows before and after the second of five upstreams is drained.
fn check_drained(before: &[usize], after: &[usize]) {
    let mut taken_over = [0; 5];
    for (before, after) in before.iter().zip(after) {
        if *before == 1 {
            taken_over[*after] += 1;
        } else {
            assert_eq!(before, after);
        }
    }
    // about 200 flows are distributed to four upstreams
    let [a, none, b, c, d] = taken_over;
    assert!([a, b, c, d].iter().all(|share| (20..=90).contains(share)), "{taken_over:?}");
    assert_eq!(none, 0);
}

/// The active upstreams get all flows by weight, however small their share was, and keep their own.
#[test]
fn last_active_upstream_gets_everything() {
    const COUNT: usize = 70;
    #[rustfmt::skip]
    let table: [(_, &[u32], &[usize]); 5] = [
        // weights, and the indices of the active upstreams
        (Hash::Maglev, &[999, 1], &[1]),
        (Hash::Maglev, &[990, 1, 3], &[1, 2]),
        (Hash::Maglev, &[1; COUNT], &[17]),
        (Hash::Maglev, &[1; COUNT], &[0, 17, COUNT - 1]),
        (Hash::Modulo, &[1; COUNT], &[5, 6]),
    ];
    Testbed::with(|testbed| {
        for (hash, weights, left) in table {
            for (rule, ipv6) in rules(weights.len()).into_iter().zip([false, true]) {
                let flows = flows(ipv6, Just(Vec::new()));
                let mut rule = Rule { hash, ..rule };
                for (upstream, weight) in rule.upstreams.iter_mut().zip(weights) {
                    upstream.weight = *weight;
                }
                let before = Relay::with(testbed, std::slice::from_ref(&rule)).choices(&flows);
                for (index, upstream) in rule.upstreams.iter_mut().enumerate() {
                    let stays = left.contains(&index);
                    upstream.state = if stays { State::Active } else { State::Drained };
                }
                let after = Relay::with(testbed, std::slice::from_ref(&rule)).choices(&flows);
                let all: u32 = left.iter().map(|index| weights[*index]).sum();
                for index in left {
                    let got = after.iter().filter(|choice| *choice == index).count() as f64;
                    let share = f64::from(weights[*index]) / f64::from(all);
                    let (mean, most) = (share * FLOWS as f64, 5.0 * (FLOWS as f64).sqrt() / 2.0);
                    assert!((got - mean).abs() <= most, "{hash:?} {left:?}: {got}, not {mean}");
                }
                let stay = before.iter().zip(&after).filter(|(before, _)| left.contains(before));
                assert!(stay.clone().all(|(before, after)| before == after), "{left:?}");
            }
        }
    });
}

#[test]
fn next_priority_serves_while_the_one_before_is_drained() {
    const PRIORITIES: [u32; 5] = [2, 1, 2, 3, 1];
    // the drained upstreams, and those that share the packets
    let table: [(&[usize], &[usize]); 6] = [
        (&[], &[1, 4]),
        (&[4], &[1]),
        (&[1, 4], &[0, 2]),
        (&[0, 1, 4], &[2]),
        (&[0, 1, 2, 4], &[3]),
        (&[0, 2, 3], &[1, 4]),
    ];
    Testbed::with(|testbed| {
        for hash in [Hash::Maglev, Hash::Modulo] {
            for (rule, ipv6) in rules(PRIORITIES.len()).into_iter().zip([false, true]) {
                let flows = flows(ipv6, Just(Vec::new()));
                for (drained, left) in table {
                    let mut rule = Rule { hash, ..rule.clone() };
                    for (index, upstream) in rule.upstreams.iter_mut().enumerate() {
                        upstream.priority = PRIORITIES[index];
                        let is_drained = drained.contains(&index);
                        upstream.state = if is_drained { State::Drained } else { State::Active };
                    }
                    let choices = Relay::with(testbed, &[rule]).choices(&flows);
                    let got = |index: &usize| choices.iter().filter(|it| *it == index).count();
                    let all: usize = left.iter().map(got).sum();
                    assert_eq!(all, FLOWS, "{hash:?} {drained:?}: {choices:?}");
                    let fair = FLOWS / left.len();
                    let spread = 5 * (FLOWS as f64).sqrt() as usize / 2;
                    assert!(left.iter().all(|it| got(it).abs_diff(fair) <= spread), "{drained:?}");
                }
            }
        }
    });
}

#[test]
fn fully_drained_rule_is_counted() {
    let drained = |upstream| Upstream { state: State::Drained, ..upstream };
    let all = || upstreams(NEAR, 3).into_iter().map(drained).collect();
    Testbed::with(|testbed| {
        for (action, end) in [(Action::Block, SHOT), (Action::Pass, UNSPEC)] {
            for mode in [Mode::Balance, Mode::Replicate] {
                for hash in [Hash::Modulo, Hash::Maglev] {
                    let rule = Rule { action, mode, hash, ..rule(VIP, all()) };
                    let relay = Relay::with(testbed, &[rule]);
                    let came = frame(&(IpAddr::from([198, 51, 100, 7]), 5666, vec![0; 20]));
                    let run = relay.run(&came);
                    assert_eq!((run.action, &run.frame), (end, &came), "{action:?} {mode:?}");
                    let counted = [((relay.ids[0].rule, "no-upstream"), (1, came.len() as u64))];
                    assert_eq!(relay.counted(), counted.into(), "{action:?} {mode:?} {hash:?}");
                    assert_eq!(testbed.wire.drain(), [[0_u8; 0]; 0]);
                }
            }
        }
    });
}

/// Returns a rule for an address, ports and senders with its own upstream port.
fn shared(number: u16, address: KeyAddress, ports: &[Ports], from: &[&str]) -> Rule {
    let from = from.iter().map(|network| network.parse().expect("a network")).collect();
    let key = Key { from, ..Key::new(address, ports.to_vec()) };
    let near = match address {
        KeyAddress::Is(IpAddr::V6(_)) => NEAR6.into(),
        _ => IpAddr::from(NEAR),
    };
    let upstreams = vec![Upstream::new(near, Some(FIRST_PORT + number))];
    Rule { action: Action::Block, ..Rule::new(format!("{number}"), key, upstreams) }
}

/// An exact address takes precedence over `any`, then an exact port, then the longest sender prefix.
#[test]
fn nearest_key_decides() {
    let exact = KeyAddress::Is(VIP.into());
    let exact6 = KeyAddress::Is(VIP6.into());
    let port = |port| Ports { first: port, last: port };
    let rules = [
        shared(0, KeyAddress::Any, &[], &[]),
        shared(1, KeyAddress::Any, &[], &["198.51.100.7"]),
        shared(2, KeyAddress::Any, &[PORTS], &[]),
        shared(3, exact, &[], &[]),
        shared(4, exact, &[PORTS], &["198.51.0.0/16"]),
        shared(5, exact, &[PORTS], &["198.51.100.0/24", "192.0.2.0/24"]),
        shared(6, exact, &[PORTS], &["198.51.100.8/31", "198.51.100.200"]),
        shared(7, exact, &[port(53)], &["198.51.100.0/25"]),
        shared(8, exact6, &[PORTS], &["2001:db8::/32"]),
        shared(9, exact6, &[PORTS], &["2001:db8:0:1::/64", "2001:db8::7/128"]),
        shared(10, exact6, &[], &["2000::/3"]),
        shared(11, exact6, &[port(53)], &[]),
    ];
    #[rustfmt::skip]
    let table = [
        // to          port  from                   rule
        ("10.0.1.1",   2055, "198.51.100.7",        Some(5)),
        ("10.0.1.1",   2058, "198.51.100.255",      Some(5)),
        ("10.0.1.1",   2055, "192.0.2.1",           Some(5)),
        ("10.0.1.1",   2055, "198.51.100.8",        Some(6)),
        ("10.0.1.1",   2055, "198.51.100.9",        Some(6)),
        ("10.0.1.1",   2055, "198.51.100.10",       Some(5)),
        ("10.0.1.1",   2055, "198.51.100.200",      Some(6)),
        ("10.0.1.1",   2055, "198.51.101.0",        Some(4)),
        ("10.0.1.1",   2055, "198.52.0.0",          Some(3)),
        ("10.0.1.1",   2055, "1.0.0.1",             Some(3)),
        ("10.0.1.1",   2059, "198.51.100.7",        Some(3)),
        ("10.0.1.1",   53,   "198.51.100.127",      Some(7)),
        ("10.0.1.1",   53,   "198.51.100.128",      Some(3)),
        ("10.0.1.1",   0,    "198.51.100.7",        Some(3)),
        ("10.0.2.1",   2055, "198.51.100.7",        Some(2)),
        ("10.0.2.1",   53,   "198.51.100.7",        Some(1)),
        ("10.0.2.1",   53,   "198.51.100.6",        Some(0)),
        ("10.0.2.1",   0,    "198.51.100.6",        Some(0)),
        ("10.0.2.2",   2055, "198.51.100.7",        None),
        ("fd00:1::1",  2055, "2001:db8::7",         Some(9)),
        ("fd00:1::1",  2055, "2001:db8::8",         Some(8)),
        ("fd00:1::1",  2055, "2001:db8:0:1::8",     Some(9)),
        ("fd00:1::1",  2055, "2001:db8:0:2::8",     Some(8)),
        ("fd00:1::1",  2055, "2001:db9::7",         Some(10)),
        ("fd00:1::1",  2055, "3fff::1",             Some(10)),
        ("fd00:1::1",  2055, "fd00::1",             None),
        ("fd00:1::1",  53,   "fd00::1",             Some(11)),
        ("fd00:1::1",  53,   "2001:db8::7",         Some(11)),
        ("fd00:1::1",  1,    "2001:db8::7",         Some(10)),
        ("fd00:2::1",  2055, "2001:db8::7",         None),
    ];
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &rules);
        for (to, port, from, rule) in table {
            let [to, from] = [to, from].map(|address| address.parse().expect("an address"));
            let came = frame_to(&(from, 5666, vec![0; 8]), to, port);
            let run = relay.run(&came);
            let got = (run.action == REDIRECT).then(|| upstream_of(&run.frame));
            assert_eq!(got, rule, "{from} to {to}, port {port}");
            let ids = rule.map(|rule| relay.ids[rule].upstreams[0]);
            let counted: Vec<u32> = relay.counted().into_keys().map(|(id, _)| id).collect();
            assert_eq!(counted, ids.as_slice(), "{from} to {to}, port {port}");
        }
    });
}

/// A sample gets exactly one of N packets, for each receiver independently.
#[test]
fn samples_are_exact() {
    const PACKETS: u64 = 10_000;
    let samples = [1, 2, 7, 1000, 9999, 10_001];
    let mut receivers = upstreams(NEAR, samples.len());
    for (receiver, sample) in receivers.iter_mut().zip(samples) {
        receiver.sample = sample;
    }
    Testbed::with(|testbed| {
        let replicating = Rule { mode: Mode::Replicate, ..rule(VIP, receivers.clone()) };
        // mirrors, and an upstream with the last port
        let upstream = Upstream::new(NEAR, Some(FIRST_PORT + samples.len() as u16));
        let mirrored = Rule { mirrors: receivers, ..rule(VIP, vec![upstream]) };
        for rule in [replicating, mirrored] {
            let mirrors = !rule.mirrors.is_empty();
            let relay = Relay::with(testbed, &[rule]);
            let came = frame(&(IpAddr::from([198, 51, 100, 7]), 5666, vec![0; 8]));
            let mut copies = vec![0; samples.len()];
            for _ in 0..PACKETS / 100 {
                for _ in 0..100 {
                    let run = relay.run(&came);
                    // the last receiver of all gets the packet itself
                    if run.action == REDIRECT && !mirrors {
                        copies[upstream_of(&run.frame)] += 1;
                    }
                }
                for copy in testbed.wire.drain() {
                    copies[upstream_of(&copy)] += 1;
                }
            }
            for (got, sample) in copies.iter().zip(samples.map(u64::from)) {
                let turns = PACKETS / sample;
                // the last turn may be incomplete
                let most = turns + u64::from(!PACKETS.is_multiple_of(sample));
                assert!((turns..=most).contains(got), "{got} of one in {sample}");
            }
            let ids = &relay.ids[0];
            let (receivers, whole) = match mirrors {
                true => (&ids.mirrors, ids.upstreams[0]),
                false => (&ids.upstreams, ids.rule),
            };
            let all = receivers.iter().copied().zip(copies).chain([(whole, PACKETS)]);
            let length = came.len() as u64;
            let all = all.filter(|(_, count)| *count > 0);
            let counted = all.map(|(id, count)| ((id, "forwarded"), (count, count * length)));
            assert_eq!(relay.counted(), counted.collect());
        }
    });
}

/// Returns true if a frame is the copy of a packet for a receiver with this source.
fn is_copy(copy: &[u8], came: &[u8], source: IpAddr, payload: &[u8]) -> bool {
    let addresses = if came[14] >> 4 == 4 { 14 + 12..14 + 16 } else { 14 + 8..14 + 24 };
    let source = match source {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    copy.len() == came.len() && copy[addresses] == source && copy.ends_with(payload)
}

/// An unreachable receiver does not affect the others.
#[test]
fn dead_receiver_costs_the_others_nothing() {
    let payload = b"as it came";
    let sender = IpAddr::from([198, 51, 100, 7]);
    let came = frame(&(sender, 5666, payload.to_vec()));
    Testbed::with(|testbed| {
        for (dead, verdict) in
            [(NEAR_COLD, "unresolved"), (FAR_COLD, "unresolved"), (NO_ROUTE, "no-route")]
        {
            for place in 0..4 {
                for (action, end) in [(Action::Block, SHOT), (Action::Pass, UNSPEC)] {
                    let mut receivers = upstreams(NEAR, 4);
                    receivers[place] = Upstream::new(dead, receivers[place].port);
                    let source = Source::Preserve;
                    let rule =
                        Rule { action, source, mode: Mode::Replicate, ..rule(VIP, receivers) };
                    let relay = Relay::with(testbed, &[rule]);
                    let run = relay.run(&came);
                    let mut copies = testbed.wire.drain();
                    // the last receiver gets the packet itself; the kernel may yet resolve a dead one
                    if action == Action::Pass || (place == 3 && verdict == "no-route") {
                        assert_eq!((run.action, &run.frame), (end, &came), "{dead} at {place}");
                    } else {
                        assert_eq!(run.action, REDIRECT, "{dead} at {place}");
                        copies.extend((place != 3).then_some(run.frame));
                    }
                    let got: Vec<usize> = copies.iter().map(|copy| upstream_of(copy)).collect();
                    let others: Vec<usize> = (0..4).filter(|other| *other != place).collect();
                    assert_eq!(got, others, "{dead} at {place}");
                    assert!(copies.iter().all(|copy| is_copy(copy, &came, sender, payload)));
                    let ids = &relay.ids[0];
                    let one = (1, came.len() as u64);
                    let each = ids.upstreams.iter().enumerate().map(|(at, id)| {
                        ((*id, if at == place { verdict } else { "forwarded" }), one)
                    });
                    let counted: Counted = each.chain([((ids.rule, "forwarded"), one)]).collect();
                    assert_eq!(relay.counted(), counted, "{dead} at {place}");
                }
            }
        }
    });
}
