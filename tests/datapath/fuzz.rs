//! Compares the packet path with its specification in `reference.rs` on sequences of packets of every
//! kind, since earlier packets decide about fragments; between them leases come and go, upstreams are drained, and
//! lines become invalid. The number of packets is UDPLB_FUZZ_PACKETS, by
//! default 20,000.
//!
//! Differences are printed minimized; add them to the table of cases.

mod cases;
mod receiver;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cases::Case;
use proptest::collection::vec;
use proptest::prelude::{Just, Strategy, prop_oneof};
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use udplb::config::{
    self, Action, Admission, Family, Fragments, Hash, Key, KeyAddress, Mode, Ports, Reply,
    ServerId, ServerIdPlace, Source, StrategyPart, Templates, Via,
};
use udplb::datapath::kernel;
use udplb::desired::tables::Tables;
use udplb::desired::{Desired, Rule, RuleIds, Upstream, assign_ids};

use crate::common::wire::Tag;
use crate::decap::{self, BALANCERS, HERE, Outer, STRANGERS};
use crate::flow;
use crate::forge::{Forged, V4};
use crate::packet::Mac;
use crate::program::{Context, Counted, Run, VLAN_MAC};
use crate::random::{Target, any_packet, one_of, usually};
use crate::reference::{Arrival, End, Hashing, Host, NextHop, Outcome, Table, Verdict};
use crate::testbed::{
    FAR, FAR_COLD, GATEWAY_MAC, NARROW, NARROW_COLD, NEAR, NEAR_COLD, NEAR_MAC, NO_ROUTE, OUT_MAC,
    OWN, OWN6, PORTS, REDIRECT, RELAY_MAC, SHOT, Testbed, UNSPEC, VIP, VLANS, XDP_PASS,
    XDP_REDIRECT,
};

const PACKETS: u32 = 20_000;

/// Maximum number of packets in a sequence; the minimum is one.
const SEQUENCE: u32 = 40;

const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 255);

const UNICAST: Target = target(RELAY_MAC, IpAddr::V4(VIP));
const UNICAST6: Target = target(RELAY_MAC, IpAddr::V6(VIP6));
const TARGETS: [Target; 5] = [
    UNICAST,
    UNICAST6,
    target([1, 0, 0x5e, 1, 2, 3], IpAddr::V4(Ipv4Addr::new(239, 1, 2, 3))),
    target([0x33, 0x33, 0, 1, 2, 3], IpAddr::V6(Ipv6Addr::new(0xff05, 0, 0, 0, 0, 0, 1, 0x203))),
    target([0xff; 6], IpAddr::V4(BROADCAST)),
];

const fn target(mac: Mac, address: IpAddr) -> Target {
    Target { mac, address, port: PORTS.first }
}

/// Upstreams with the kernel's MTU and MAC address of the next hop.
const WAYS: [(IpAddr, usize, Option<Mac>); 6] = [
    (IpAddr::V4(NEAR), 1500, Some(NEAR_MAC)),
    (IpAddr::V4(NEAR_COLD), 1500, None),
    (IpAddr::V4(FAR), 1500, Some(GATEWAY_MAC)),
    (IpAddr::V4(FAR_COLD), 1500, None),
    (IpAddr::V4(NARROW), 1000, Some(GATEWAY_MAC)),
    (IpAddr::V4(NARROW_COLD), 1000, None),
];
const WAYS6: [(IpAddr, usize, Option<Mac>); 6] = [
    (IpAddr::V6(NEAR6), 1500, Some(NEAR_MAC)),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 3)), 1500, None),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 3, 0, 0, 0, 0, 0, 2)), 1500, Some(GATEWAY_MAC)),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 4, 0, 0, 0, 0, 0, 2)), 1500, None),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 6, 0, 0, 0, 0, 0, 2)), 1300, Some(GATEWAY_MAC)),
    (IpAddr::V6(Ipv6Addr::new(0xfd00, 6, 0, 0, 0, 0, 0, 3)), 1300, None),
];
const NEAR6: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 2);
const NO_ROUTE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 2));

/// MAC address in user space's next hop where the kernel's neighbour entry differs.
const HELD_MAC: Mac = [2, 0, 0, 0, 9, 9];

/// Maximum length of a frame: MTU, Ethernet header and room for one tag, with or without a tag.
const LONGEST: usize = 1500 + 14 + 4;

/// Minimum length of a frame that the kernel accepts as IPv6.
const SHORTEST: usize = 14 + 40;

fn rule_for(target: Target, upstreams: Vec<Upstream>) -> Rule {
    let key = Key::new(target.address, vec![PORTS]);
    Rule { hash: Hash::Modulo, ..Rule::new("rule", key, upstreams) }
}

#[derive(Clone, Debug)]
struct Scenario {
    rule: Rule,
    /// True if a lease holds at the beginning, so that user space's next hops are used.
    held: bool,
}

/// A packet, and what happens before it.
#[derive(Clone, Debug)]
struct Step {
    before: Option<Event>,
    /// Outer headers around the packet.
    outer: Option<Outer>,
    packet: Forged,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    /// All lines become invalid.
    Epoch,
    /// arpd's lease is granted, or ends.
    Lease(bool),
    /// One of the rule's upstreams and mirrors is drained, and the others no longer.
    Drain(usize),
    /// None of them is drained any longer.
    Enable,
}

impl From<Forged> for Step {
    fn from(packet: Forged) -> Step {
        Step { before: None, outer: None, packet }
    }
}

/// Returns the paths of the host's upstreams while the lease holds or not.
fn ways(held: bool) -> BTreeMap<IpAddr, NextHop> {
    let ways = WAYS.iter().chain(&WAYS6).map(|(address, mtu, mac)| {
        let mac = if held { Some(HELD_MAC) } else { *mac };
        let macs = mac.map(|mac| (OUT_MAC, mac));
        let egress = if address.is_ipv4() { OWN.into() } else { OWN6.into() };
        (*address, NextHop { mtu: *mtu, macs, verdict: "forwarded", egress: Some(egress) })
    });
    ways.collect()
}

impl Event {
    /// Has it happen to the program and to the host of the specification.
    fn happen(self, testbed: &Testbed<'_>, host: &mut Host) {
        let (_, ids) = &host.rules[0];
        match self {
            Event::Epoch => testbed.program.advance(),
            Event::Lease(holds) => {
                testbed.program.lease(holds);
                host.ways = ways(holds);
            }
            Event::Drain(number) => {
                let all: Vec<u32> = ids.upstreams.iter().chain(&ids.mirrors).copied().collect();
                let id = all[number % all.len()];
                testbed.program.override_state(id, true);
                host.drained = [id].into();
            }
            Event::Enable => {
                testbed.program.override_state(ids.upstreams[0], false);
                host.drained.clear();
            }
        }
    }
}

impl Scenario {
    fn host(&self, ids: RuleIds) -> Host {
        Host {
            mac: RELAY_MAC,
            rules: vec![(self.rule.clone(), ids)],
            addresses: vec![VIP.into(), OWN.into(), VIP6.into(), OWN6.into()],
            broadcasts: vec![BROADCAST.into(), Ipv4Addr::new(10, 0, 2, 255).into()],
            vlans: VLANS.iter().map(|path| path.to_vec()).collect(),
            vlan_mac: VLAN_MAC,
            longest: LONGEST,
            longest_again: usize::MAX,
            ways: ways(self.held),
            decap: decap::from_balancers().from,
            drained: HashSet::new(),
            hashing: Hashing {
                key: flow::header_key,
                select: |key, active| flow::select(key, active.len(), |index| active[*index]),
                outer: flow::outer_hash,
            },
        }
    }
}

/// Returns the ids of a program with this one rule.
fn ids(rule: &Rule) -> RuleIds {
    let desired = Desired { rules: vec![rule.clone()], ..Desired::default() };
    assign_ids(&desired, &[], 100).expect("ids suffice").remove(0)
}

/// Formats an outcome as in `Case::fates`.
fn fate(outcome: &Outcome) -> String {
    let mut fate = String::from(match outcome.end {
        End::Up => "up",
        End::Dropped => "drop",
        End::Here(_) => "here",
        End::Taken(_) => "taken",
        End::Away(_) => "away",
        End::Answered(_) => "answer",
    });
    if !outcome.copies.is_empty() {
        let _ = write!(fate, " +{}", outcome.copies.len());
    }
    for (id, verdict) in outcome.counted.keys() {
        let _ = write!(fate, " {verdict}{}", if *id == 0 { "@0" } else { "" });
    }
    fate
}

/// Checks the specification against the table of cases.
#[test]
fn specification_passes_the_cases() {
    let mut wrong = Vec::new();
    for Case { name, rule, packets, fates } in cases::all() {
        let (ids, mut table) = (ids(&rule), Table::default());
        let host = Scenario { rule, held: false }.host(ids);
        let got = packets.iter().map(|packet| {
            let frame = packet.frame();
            let came = packet.cut.unwrap_or(frame.len());
            let (gso_size, gso_segs) = (packet.gso.0 as usize, packet.gso.1 as usize);
            let arrival = Arrival { frame: &frame[..came], tag: packet.tag, gso_size, gso_segs };
            fate(&host.judge(&mut table, arrival))
        });
        let got: Vec<_> = got.collect();
        if got.join(", ") != fates {
            wrong.push(format!("{name}: {got:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Checks which of several rules the specification selects.
#[test]
fn specification_takes_the_nearest_key() {
    let rule = |name: &str, address: KeyAddress, ports: &[Ports], from: &[&str]| {
        let key = Key::new(address, ports.to_vec());
        let from = from.iter().map(|network| network.parse().expect("a network")).collect();
        let upstreams = vec![Upstream::new(NEAR, None)];
        Rule { action: Action::Block, ..Rule::new(name, Key { from, ..key }, upstreams) }
    };
    let exact = KeyAddress::Is(VIP.into());
    let rules = [
        rule("any", KeyAddress::Any, &[], &[]),
        rule("any, sender", KeyAddress::Any, &[], &["198.51.100.7"]),
        rule("any, port", KeyAddress::Any, &[PORTS], &[]),
        rule("exact", exact, &[], &[]),
        rule("exact, port", exact, &[PORTS], &["198.51.0.0/16"]),
        rule("exact, port, sender", exact, &[PORTS], &["198.51.100.0/24", "192.0.2.0/24"]),
    ];
    let desired = Desired { rules: rules.to_vec(), ..Desired::default() };
    let ids = assign_ids(&desired, &[], 100).expect("ids suffice");
    let scenario = Scenario { rule: rules[0].clone(), held: false };
    let host = Host {
        rules: rules.iter().cloned().zip(ids.iter().cloned()).collect(),
        ..scenario.host(ids[0].clone())
    };
    #[rustfmt::skip]
    let table = [
        // to                port  from                rule
        ([10, 0, 1, 1],      2055, [198, 51, 100, 7],  Some(5)),
        ([10, 0, 1, 1],      2055, [192, 0, 2, 1],     Some(5)),
        ([10, 0, 1, 1],      2055, [198, 51, 7, 7],    Some(4)),
        ([10, 0, 1, 1],      2055, [10, 9, 9, 9],      Some(3)),
        ([10, 0, 1, 1],      53,   [198, 51, 100, 7],  Some(3)),
        ([10, 0, 2, 1],      2055, [198, 51, 100, 7],  Some(2)),
        ([10, 0, 2, 1],      53,   [198, 51, 100, 7],  Some(1)),
        ([10, 0, 2, 1],      53,   [198, 51, 100, 8],  Some(0)),
        ([10, 0, 2, 2],      2055, [198, 51, 100, 7],  None),
    ];
    for (to, port, from, rule) in table {
        let packet = cases::v4(|ip, udp| {
            (ip.source, ip.destination, udp.destination) = (from.into(), to.into(), port);
        });
        let frame = packet.frame();
        let arrival = Arrival { frame: &frame, tag: None, gso_size: 0, gso_segs: 0 };
        let counted = host.judge(&mut Table::default(), arrival).counted;
        let wanted = rule.map(|rule: usize| (ids[rule].upstreams[0], "forwarded"));
        assert_eq!(counted.into_keys().next(), wanted, "{packet:?}");
    }
}

#[test]
fn program_passes_the_cases() {
    Testbed::with(|testbed| {
        check_cases(testbed, cases::all());
    });
}

#[test]
fn small_object_passes_the_cases() {
    Testbed::with_small_object(|testbed| {
        let mut cases = cases::all();
        cases.retain(|case| !needs_extras(&case.rule));
        assert!(cases.len() > 20, "{} cases need none", cases.len());
        check_cases(testbed, cases);
    });
}

#[track_caller]
fn check_cases(testbed: &Testbed<'_>, cases: Vec<Case>) {
    let results = cases.into_iter().filter_map(|Case { name, rule, packets, .. }| {
        let scenario = Scenario { rule, held: false };
        let steps: Vec<Step> = packets.into_iter().map(Step::from).collect();
        let result = check(testbed, &scenario, &steps, &mut BTreeMap::new());
        Some(format!("{name}: {}", result.err()?))
    });
    let wrong: Vec<_> = results.collect();
    assert!(wrong.is_empty(), "{} cases went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Returns true if the small object has no code for a rule.
fn needs_extras(rule: &Rule) -> bool {
    let desired = Desired { rules: vec![rule.clone()], ..Desired::default() };
    Tables::new(&desired, &[ids(rule)]).features.extras.any()
}

/// Checks the maximum number of receivers, each with its own source and some unreachable; with
/// fragments, so that each receiver gets new identifications.
#[test]
fn program_sends_to_64_receivers() {
    let fragment = |ip: &mut V4, offset, flags| {
        (ip.identification, ip.fragment_offset, ip.flags) = (77, offset, flags);
    };
    let packets4 = [
        cases::v4(|_, _| {}),
        cases::v4(|ip, _| fragment(ip, 0, 1)),
        cases::v4(|ip, _| fragment(ip, 3, 0)),
        cases::v4(|ip, udp| (ip.options, udp.payload) = (10, 1432)),
        Forged { tag: Some(Tag { protocol: 0x8100, control: 7 }), ..cases::v4(|_, _| {}) },
    ];
    let packets6 = [cases::v6(|_, _| {}), cases::v6(|_, udp| udp.payload = 1452)];
    Testbed::with(|testbed| {
        for (target, packets) in [(UNICAST, &packets4[..]), (UNICAST6, &packets6)] {
            let addresses: Vec<IpAddr> = match target.address {
                IpAddr::V4(_) => WAYS.iter().map(|way| way.0).chain([NO_ROUTE.into()]).collect(),
                IpAddr::V6(_) => WAYS6.iter().map(|way| way.0).chain([NO_ROUTE6]).collect(),
            };
            let sources = [Source::Vip, Source::Preserve, Source::Egress, named(target, 5)];
            let receivers: Vec<Upstream> = (0..64)
                .map(|number: u16| {
                    let at = usize::from(number);
                    let address = addresses[at % addresses.len()];
                    let port = (!number.is_multiple_of(5)).then_some(10_000 + number);
                    let source = Some(sources[at % sources.len()]);
                    Upstream { source, ..Upstream::new(address, port) }
                })
                .collect();
            let replicating = Rule { mode: Mode::Replicate, ..rule_for(target, receivers.clone()) };
            let upstreams = vec![Upstream::new(addresses[0], Some(1))];
            let mirrored = Rule { mirrors: receivers, ..rule_for(target, upstreams) };
            for rule in [replicating, mirrored] {
                for action in [Action::Block, Action::Pass] {
                    for held in [false, true] {
                        let rule = Rule { action, ..rule.clone() };
                        let scenario = Scenario { rule, held };
                        let steps: Vec<Step> = packets.iter().cloned().map(Step::from).collect();
                        let result = check(testbed, &scenario, &steps, &mut BTreeMap::new());
                        result.unwrap_or_else(|wrong| panic!("{action:?}: {wrong}"));
                    }
                }
            }
        }
    });
}

/// Runs the packets through the program and its specification and compares the results.
fn check(
    testbed: &Testbed<'_>,
    scenario: &Scenario,
    steps: &[Step],
    tally: &mut BTreeMap<Verdict, u64>,
) -> Result<(), String> {
    let ways = WAYS.iter().chain(&WAYS6).map(|(address, mtu, _)| {
        ((*address).into(), testbed.hop_to(*address, *mtu as u32, Some(HELD_MAC)))
    });
    let broadcasts = vec![BROADCAST.into()];
    let (rules, decap) = (vec![scenario.rule.clone()], Some(decap::from_balancers()));
    let desired = Desired { rules, broadcasts, decap, ..Desired::default() };
    let ids = testbed.program.configure_all(&desired, &ways.collect(), 0).remove(0);
    testbed.program.lease(scenario.held);
    let mut host = scenario.host(ids);
    if kernel::version() < (5, 11) {
        host.longest_again = LONGEST;
    }
    let wanted = check_each(testbed, host, steps);
    // also after a failure, to reset the counters for the next sequence
    let got = testbed.program.take_counted();
    let (wanted, by_xdp) = wanted?;
    *tally.entry("by XDP").or_default() += by_xdp;
    for ((_, verdict), (packets, _)) in &got {
        *tally.entry(verdict).or_default() += packets;
    }
    match got == wanted {
        true => Ok(()),
        false => Err(format!("counted\n wanted {wanted:?}\n got    {got:?}")),
    }
}

/// Compares everything but the program's counters; returns the expected counters, and the number of packets
/// that XDP has sent.
fn check_each(
    testbed: &Testbed<'_>,
    mut host: Host,
    steps: &[Step],
) -> Result<(Counted, u64), String> {
    let rule = host.rules[0].0.clone();
    let copied = rule.action == Action::Pass
        || rule.mode == Mode::Replicate
        || rule.templates == Templates::All
        || !rule.mirrors.is_empty();
    let has_local = rule.destinations().any(Upstream::is_local);
    let mut table = Table::default();
    let (mut counted, mut by_xdp) = (Counted::new(), 0);
    for (number, Step { before, outer, packet }) in steps.iter().enumerate() {
        if let Some(event) = before {
            event.happen(testbed, &mut host);
        }
        let mut frame = packet.frame();
        if let Some(outer) = outer {
            frame = outer.around(&frame);
        }
        let came = packet.cut.unwrap_or(frame.len()).min(frame.len());
        // the kernel runs no program on shorter frames
        frame.resize(frame.len().max(SHORTEST), 0);
        let length = (came < frame.len()).then_some(came);
        // the kernel neither truncates nor clones GSO packets of a test run
        // they have no GSO type either, without which it puts no second tag back
        let retagged = has_local && packet.tags.len() + usize::from(packet.tag.is_some()) > 1;
        let tunnelled = outer.is_some() || rule.reply == Reply::Direct;
        let plain = length.is_some() || copied || retagged || tunnelled;
        let (gso_size, gso_segs) = if plain { (0, 0) } else { packet.gso };
        let arrival = Arrival {
            frame: &frame[..came],
            tag: packet.tag,
            gso_size: gso_size as usize,
            gso_segs: gso_segs as usize,
        };
        let wanted = host.judge(&mut table, arrival);
        let context =
            Context { ifindex: testbed.routing, gso_size, gso_segs, tag: packet.tag, length };
        let run = testbed.program.run(&frame, context);
        let copies = testbed.wire.drain_at_least(wanted.copies.len());
        if !is_as(&mut table, &wanted, arrival, &run, &copies) {
            let text = format!("packet {number} came as {}\n", hex(arrival.frame));
            return Err(text + &difference(&wanted, &run, &copies));
        }
        // XDP has neither tags nor segments to come, and tc's run has filled the lines
        let plain = packet.tag.is_none() && length.is_none() && gso_size == 0;
        let again = u64::from(plain && is_sent_by_xdp(testbed, &frame, &run)?);
        by_xdp += again;
        for (counter, (packets, bytes)) in wanted.counted {
            let sum = counted.entry(counter).or_default();
            *sum = (sum.0 + (1 + again) * packets, sum.1 + (1 + again) * bytes);
        }
    }
    Ok((counted, by_xdp))
}

/// Runs the frame through XDP, which has to do as tc did or to leave it alone; returns true if it sent it.
fn is_sent_by_xdp(testbed: &Testbed<'_>, frame: &[u8], by_tc: &Run) -> Result<bool, String> {
    let run = testbed.program.run_xdp(frame);
    match run.action {
        XDP_PASS if run.frame == frame => Ok(false),
        XDP_REDIRECT if by_tc.action == REDIRECT && run.frame == by_tc.frame => Ok(true),
        action => Err(format!("XDP {action} {}\n tc {}", hex(&run.frame), hex(&by_tc.frame))),
    }
}

/// Checks a run against the expected outcome.
fn is_as(
    table: &mut Table,
    wanted: &Outcome,
    came: Arrival<'_>,
    run: &Run,
    copies: &[Vec<u8>],
) -> bool {
    let stayed = run.frame == came.frame && run.tag == came.tag;
    let right = match &wanted.end {
        End::Up => run.action == UNSPEC && stayed,
        End::Dropped => run.action == SHOT,
        End::Here(bytes) => {
            let tags = 12..12 + came.frame.len() - bytes.len();
            let frame = [&bytes[..12], &came.frame[tags], &bytes[12..]].concat();
            run.action == UNSPEC && run.tag == came.tag && run.frame == frame
        }
        End::Taken(frame) => run.action == UNSPEC && run.tag == came.tag && run.frame == *frame,
        End::Away(gone) => {
            run.action == REDIRECT && run.tag.is_none() && table.admit(gone, &run.frame)
        }
        End::Answered(answer) => {
            run.action == REDIRECT && run.tag == came.tag && answer.is(&run.frame)
        }
    };
    let (pieces, whole): (Vec<_>, Vec<_>) = wanted.copies.iter().partition(|gone| gone.is_piece);
    // the pieces follow the others, or before 5.18 are made between them
    let mut left = [whole, pieces].map(|gone| gone.into_iter().peekable());
    let admitted = copies.iter().all(|copy| {
        left.iter_mut().any(|gone| gone.next_if(|gone| table.admit(gone, copy)).is_some())
    });
    right && admitted && left.iter_mut().all(|gone| gone.peek().is_none())
}

fn difference(wanted: &Outcome, run: &Run, copies: &[Vec<u8>]) -> String {
    let end = match &wanted.end {
        End::Up => "up the stack".into(),
        End::Dropped => "dropped".into(),
        End::Here(bytes) => format!("here as {}", hex(bytes)),
        End::Taken(frame) => format!("up the stack as {}", hex(frame)),
        End::Away(gone) => format!("away as {}", hex(&gone.frame)),
        End::Answered(answer) => format!("dropped or answered: {answer:?}"),
    };
    let mut text = format!(" wanted {end}, counted {:?}\n", wanted.counted);
    for gone in &wanted.copies {
        let _ = writeln!(text, "   copy {}", hex(&gone.frame));
    }
    let _ = writeln!(text, " got {} {:x?} {}", run.action, run.tag, hex(&run.frame));
    for copy in copies {
        let _ = writeln!(text, "   copy {}", hex(copy));
    }
    text
}

/// Formats the headers of a frame and its length.
fn hex(frame: &[u8]) -> String {
    const SHOWN: usize = 160;
    let shown = &frame[..frame.len().min(SHOWN)];
    let bytes: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{bytes} of {} bytes", frame.len())
}

#[test]
fn program_follows_the_specification() {
    Testbed::with(|testbed| {
        let tally = RefCell::new(BTreeMap::new());
        for target in TARGETS {
            let outer = usually(None, any_outer(target).prop_map(Some));
            fuzz(testbed, target, any_scenario(target), outer, &tally);
        }
        let tally = tally.into_inner();
        println!("{tally:?}");
        let seen = tally.into_iter().filter(|(_, packets)| *packets > 0);
        let seen: BTreeSet<_> = seen.map(|(verdict, _)| verdict).collect();
        let missing: Vec<_> = VERDICTS.iter().filter(|verdict| !seen.contains(*verdict)).collect();
        assert!(missing.is_empty(), "never seen: {missing:?}");
    });
}

/// Checks the object without extras with rules that need none.
#[test]
fn small_object_follows_the_specification() {
    Testbed::with_small_object(|testbed| {
        for target in TARGETS {
            let rules = any_scenario(target)
                .prop_filter("it has no extras", |scenario| !needs_extras(&scenario.rule));
            fuzz(testbed, target, rules, Just(None), &RefCell::default());
        }
    });
}

/// Verdicts that must occur among this many packets, and the way that some must take.
const VERDICTS: &[Verdict] = &[
    "by XDP",
    "decapsulated",
    "forwarded",
    "fragment",
    "fragment-early",
    "loop",
    "malformed",
    "martian",
    "mtu",
    "no-checksum",
    "no-route",
    "no-upstream",
    "not-for-us",
    "templates",
    "ttl",
    "unresolved",
];

fn fuzz(
    testbed: &Testbed<'_>,
    target: Target,
    scenarios: impl Strategy<Value = Scenario>,
    outer: impl Strategy<Value = Option<Outer>>,
    tally: &RefCell<BTreeMap<Verdict, u64>>,
) {
    let packets = match std::env::var("UDPLB_FUZZ_PACKETS") {
        Ok(number) => number.parse().expect("UDPLB_FUZZ_PACKETS is a number"),
        Err(_) => PACKETS,
    };
    // the mean length of a sequence is half the maximum
    let cases = packets.div_ceil(TARGETS.len() as u32 * SEQUENCE / 2);
    // a sequence that misses a copy waits for it
    let max_shrink_time = 120_000;
    let config = Config { cases, max_shrink_time, failure_persistence: None, ..Config::default() };
    let event = usually(None, any_event().prop_map(Some));
    let step = (event, outer, any_packet(target)).prop_map(|(before, outer, packet)| Step {
        before,
        outer,
        packet,
    });
    let sequences = (scenarios, vec(step, 1..=SEQUENCE as usize));
    let result = TestRunner::new(config).run(&sequences, |(scenario, steps)| {
        let result = check(testbed, &scenario, &steps, &mut tally.borrow_mut());
        result.map_err(TestCaseError::fail)
    });
    match result {
        Err(TestError::Fail(reason, (scenario, steps))) => {
            let steps: Vec<_> = steps.iter().map(|step| format!("{step:?}")).collect();
            panic!("{reason}\n{scenario:?}\n{}", steps.join("\n"))
        }
        Err(TestError::Abort(reason)) => panic!("{reason}"),
        Ok(()) => {}
    }
}

/// Generates outer headers of the target's family, most of which are right.
fn any_outer(target: Target) -> impl Strategy<Value = Outer> {
    let family = usize::from(target.address.is_ipv6());
    let ends = (
        usually(BALANCERS[family], Just(STRANGERS[family])),
        usually(HERE[family], one_of([target.address, BALANCERS[family]])),
    );
    let lengths = (usually(0, -9..=9_i16), usually(0, -9..=9_i16));
    let gue = (usually(6080, Just(2055)), one_of([0, 0x1234]));
    let ipv4 = (usually(0x4000, one_of([0, 0x2000, 1, 0x8000])), usually(0, one_of([1, 0xffff])));
    (one_of([Via::Ipip, Via::Gue]), ends, 0..4_u8, lengths, gue, ipv4).prop_map(
        move |(via, (from, to), ecn, (udp_length, length), (port, udp_checksum), ipv4)| {
            let (fragment, checksum_error) = ipv4;
            let outer = Outer { from, to, ecn, port, udp_checksum, ..Outer::new(family, via) };
            Outer { udp_length, length, fragment, checksum_error, ..outer }
        },
    )
}

fn any_event() -> impl Strategy<Value = Event> {
    let drain = (0..6_usize).prop_map(Event::Drain);
    let lease = one_of([true, false]).prop_map(Event::Lease);
    prop_oneof![Just(Event::Epoch), lease, drain, Just(Event::Enable)]
}

/// Returns rules for the target with every option of such a rule.
fn any_scenario(target: Target) -> impl Strategy<Value = Scenario> {
    let action = one_of([Action::Block, Action::Pass]);
    // a group address is never a source
    let group = target.address.is_multicast() || target.address == BROADCAST;
    let source = one_of([
        if group { Source::Preserve } else { Source::Vip },
        Source::Preserve,
        Source::Egress,
        named(target, None),
        named(target, 9995),
    ]);
    let mode = one_of([Mode::Balance, Mode::Replicate]);
    let fragments = usually(Fragments::Follow, one_of([Fragments::Pass, Fragments::Drop]));
    let list = vec![StrategyPart::SrcIp, StrategyPart::DstPort];
    let strategy = one_of([
        config::Strategy::SrcPort,
        config::Strategy::SrcIp,
        config::Strategy::DstPort,
        config::Strategy::Parts(list.into()),
    ]);
    let admissions = usually(Admission::Deny, Just(Admission::Allow));
    let admissions = (admissions.clone(), admissions);
    let mode = (mode, one_of([Templates::One, Templates::All]));
    let upstreams = vec(any_upstream(target), 1..=4);
    let mirrors = vec(any_upstream(target), 0..=2);
    let rule = (action, source, mode, fragments, admissions, strategy, upstreams, mirrors)
        .prop_map(
            move |(action, source, mode, fragments, admissions, strategy, upstreams, mirrors)| {
                let (zero_checksum, martians) = admissions;
                let (mode, templates) = match mode {
                    (Mode::Replicate, _) => (Mode::Replicate, Templates::One),
                    balance => balance,
                };
                let mirrors = if mode == Mode::Balance { mirrors } else { Vec::new() };
                let rule = rule_for(target, upstreams);
                let rule = Rule { action, source, mode, fragments, strategy, mirrors, ..rule };
                Rule { zero_checksum, martians, templates, ..rule }
            },
        );
    let shape = prop_oneof![
        4 => Just(Shape::Any),
        1 => Just(Shape::Simple),
        2 => one_of([Via::Link, Via::Ipip, Via::Gue]).prop_map(Shape::Direct),
    ];
    let rule = (rule, shape).prop_map(move |(rule, shape)| match shape {
        Shape::Simple if !group => simple(rule),
        Shape::Direct(via) if !group => direct(simple(rule), via),
        _ => rule,
    });
    let place = (0..12_u8, 1..=8_u8).prop_map(|(offset, length)| ServerIdPlace { offset, length });
    let rule = (rule, usually(None, place.prop_map(Some)))
        .prop_map(|(rule, place)| place.map_or(rule.clone(), |place| by_server(rule, place)));
    (rule, usually(false, Just(true))).prop_map(|(rule, held)| Scenario { rule, held })
}

/// Changes of a rule, so that more packets take the fast path.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Any,
    Simple,
    Direct(Via),
}

/// Makes connections of QUIC follow the server whose id they have at a place.
fn by_server(mut rule: Rule, place: ServerIdPlace) -> Rule {
    if rule.mode == Mode::Balance {
        (rule.strategy, rule.server_id) = (config::Strategy::QuicCid, Some(place));
        for (id, upstream) in (1..).zip(&mut rule.upstreams) {
            upstream.server_id = Some(ServerId::from(&vec![id; place.length.into()][..]));
        }
    }
    rule
}

/// Makes a rule send each packet itself to one upstream.
fn simple(rule: Rule) -> Rule {
    Rule { action: Action::Block, mode: Mode::Balance, mirrors: Vec::new(), ..rule }
}

/// Makes the packets of a simple rule keep their destination: the upstreams have it, too, and answer themselves.
fn direct(rule: Rule, via: Via) -> Rule {
    let elsewhere = |upstream: &Upstream| !upstream.is_local();
    let mut upstreams: Vec<Upstream> =
        rule.upstreams.iter().filter(|it| elsewhere(it)).cloned().collect();
    if upstreams.is_empty() {
        let address = if rule.family() == Family::V6 { WAYS6[0].0 } else { WAYS[0].0 };
        upstreams.push(Upstream::new(address, None));
    }
    let own = [None, Some(Via::Gue), Some(Via::Link), Some(Via::Ipip)];
    for (upstream, via) in upstreams.iter_mut().zip(own) {
        (upstream.port, upstream.via) = (None, via);
    }
    let (reply, via, templates) = (Reply::Direct, Some(via), Templates::One);
    Rule { reply, via, templates, source: Source::Preserve, upstreams, ..rule }
}

/// Returns a source that the configuration names, with or without a port.
fn named(target: Target, port: impl Into<Option<u16>>) -> Source {
    let address = match target.address {
        IpAddr::V4(_) => [10, 0, 2, 9].into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 9).into(),
    };
    Source::Fixed { address, port: port.into() }
}

fn any_upstream(target: Target) -> impl Strategy<Value = Upstream> {
    let (ways, nowhere) = match target.address {
        IpAddr::V4(_) => (WAYS, NO_ROUTE.into()),
        IpAddr::V6(_) => (WAYS6, NO_ROUTE6),
    };
    let address = prop_oneof![6 => one_of(ways.map(|(address, ..)| address)), 1 => Just(nowhere)];
    let port = prop_oneof![Just(None), (1..=u16::MAX).prop_map(Some)];
    let elsewhere = (address, port).prop_map(|(address, port)| Upstream::new(address, port));
    // no port of a target
    let here = Just(Upstream::local(target.address, Some(1162)));
    prop_oneof![6 => elsewhere, 1 => here]
}
