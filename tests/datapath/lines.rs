//! The fast path: what a CPU remembers of an upstream is used while it is valid, and not any longer.

use std::net::Ipv4Addr;

use udplb::config::{Action, Mode, Source};
use udplb::desired::Rule;

use crate::common::wire::{Tag, run_on_cpu};
use crate::packet::{Datagram, Mac};
use crate::testbed::{
    Case, FAR, Fate, GATEWAY_MAC, NEAR, NEAR_MAC, REDIRECT, SHOT, Testbed, datagram, rule, to,
};

const OTHER_MAC: Mac = [2, 0, 0, 0, 7, 7];

fn block(upstream: Ipv4Addr) -> Case {
    let rule = rule(Action::Block, Source::Vip, upstream);
    Case::new("block", rule, datagram(), Fate::Sent("forwarded", GATEWAY_MAC))
}

/// Returns the destination MAC address with which the packet of a case leaves; `None` if it does not.
fn leaves(testbed: &Testbed<'_>, case: &Case) -> Option<Mac> {
    let run = testbed.send(case).run;
    (run.action == REDIRECT).then(|| run.frame[..6].try_into().expect("six bytes"))
}

/// A change is not seen before the epoch moves on: so the fast path is really taken. Then it is seen at once.
#[test]
fn line_is_used_until_the_epoch_moves_on() {
    Testbed::with(|testbed| {
        let case = Case { known: Some(testbed.hop(1500, Some(OTHER_MAC))), ..block(FAR) };
        let (ids, _) = testbed.run(&case);
        let id = ids.upstreams[0];
        testbed.program.lease(true);
        assert_eq!(leaves(testbed, &case), Some(OTHER_MAC));
        testbed.program.change_nexthop_quietly(id, |hop| hop.destination = GATEWAY_MAC);
        assert_eq!(leaves(testbed, &case), Some(OTHER_MAC), "by the line");
        testbed.program.advance();
        assert_eq!(leaves(testbed, &case), Some(GATEWAY_MAC), "by the slow path");
        assert_eq!(leaves(testbed, &case), Some(GATEWAY_MAC), "by the new line");
    });
}

/// Each CPU fills lines of its own, whatever another one remembers.
#[test]
fn each_cpu_fills_its_own_lines() {
    Testbed::with(|testbed| {
        let case = Case { known: Some(testbed.hop(1500, Some(OTHER_MAC))), ..block(FAR) };
        let (ids, _) = testbed.run(&case);
        testbed.program.lease(true);
        for cpu in [0, 1] {
            run_on_cpu(cpu);
            assert_eq!(leaves(testbed, &case), Some(OTHER_MAC));
        }
        testbed
            .program
            .change_nexthop_quietly(ids.upstreams[0], |hop| hop.destination = GATEWAY_MAC);
        for cpu in [0, 1] {
            run_on_cpu(cpu);
            assert_eq!(leaves(testbed, &case), Some(OTHER_MAC), "by the line of CPU {cpu}");
        }
    });
}

/// Each writer moves the epoch on: a drained upstream gets nothing from the next packet on.
#[test]
fn drained_upstream_gets_nothing_more() {
    Testbed::with(|testbed| {
        let case =
            Case { known: Some(testbed.hop_by(NEAR.into(), 1500, Some(NEAR_MAC))), ..block(NEAR) };
        let (ids, _) = testbed.run(&case);
        assert_eq!(leaves(testbed, &case), Some(NEAR_MAC));
        testbed.program.override_state(ids.upstreams[0], true);
        assert_eq!(testbed.send(&case).run.action, SHOT);
        testbed.program.override_state(ids.upstreams[0], false);
        assert_eq!(leaves(testbed, &case), Some(NEAR_MAC));
    });
}

/// A later fragment still goes where the first one went, and leads no other packet there.
#[test]
fn fragment_to_a_drained_upstream_fills_no_line() {
    Testbed::with(|testbed| {
        let known = Some(testbed.hop_by(NEAR.into(), 1500, Some(NEAR_MAC)));
        let case = Case { known, ..block(NEAR) };
        let fragment = |fragment_offset, more_fragments| {
            let datagram = Datagram { fragment_offset, more_fragments, ..datagram() };
            Case { packet: datagram.into(), ..case.clone() }
        };
        let (ids, _) = testbed.run(&fragment(0, true));
        testbed.program.override_state(ids.upstreams[0], true);
        assert_eq!(leaves(testbed, &fragment(1, false)), Some(NEAR_MAC));
        assert!(!testbed.program.remembers());
        assert_eq!(testbed.send(&case).run.action, SHOT);
    });
}

/// A later fragment of a datagram that no receiver got is not forwarded, though receivers are active again.
#[test]
fn fragment_without_receivers_is_not_forwarded() {
    Testbed::with(|testbed| {
        let replicating = Rule { mode: Mode::Replicate, ..block(NEAR).rule };
        let case = Case { rule: replicating, ..block(NEAR) };
        let (ids, _) = testbed.run(&case);
        let unsent = |fragment_offset, more_fragments| {
            let datagram = Datagram { fragment_offset, more_fragments, ..datagram() };
            let outcome = testbed.send(&Case { packet: datagram.into(), ..case.clone() });
            assert_eq!(outcome.run.action, SHOT);
            assert_eq!(outcome.counted.keys().collect::<Vec<_>>(), [&(ids.rule, "no-upstream")]);
        };
        testbed.program.override_state(ids.upstreams[0], true);
        unsent(0, true);
        testbed.program.override_state(ids.upstreams[0], false);
        unsent(1, false);
    });
}

/// Nothing is remembered while the kernel selects the next hop of each packet, nor for an unknown next hop.
#[test]
fn line_needs_one_next_hop_for_all() {
    Testbed::with(|testbed| {
        let case = Case { known: Some(testbed.hop(1500, Some(OTHER_MAC))), ..block(FAR) };
        let (ids, _) = testbed.run(&case);
        let id = ids.upstreams[0];
        assert!(testbed.program.remembers(), "the kernel's route");
        testbed.program.change_nexthop(id, |hop| hop.by_packet = 1);
        assert_eq!(leaves(testbed, &case), Some(GATEWAY_MAC));
        assert!(!testbed.program.remembers(), "several next hops");
        testbed.program.change_nexthop(id, |hop| (hop.by_packet, hop.ifindex) = (0, 0));
        assert_eq!(leaves(testbed, &case), Some(GATEWAY_MAC));
        assert!(!testbed.program.remembers(), "no route when it was applied");
    });
}

/// The last receiver gets the packet itself, on both paths, with a tag or without.
#[test]
fn last_receiver_gets_the_packet_itself() {
    Testbed::with(|testbed| {
        let rule = rule(Action::Block, Source::Vip, NEAR);
        let upstreams = vec![to(NEAR, Some(9995)), to(NEAR, Some(9996))];
        let rule = Rule { mode: Mode::Replicate, upstreams, ..rule };
        for tag in [None, Some(Tag { protocol: 0x8100, control: 7 })] {
            let known = Some(testbed.hop_by(NEAR.into(), 1500, Some(NEAR_MAC)));
            let case = Case { rule: rule.clone(), known, tag, ..block(NEAR) };
            let (_, first) = testbed.run(&case);
            for (path, outcome) in [("slow", first), ("fast", testbed.send(&case))] {
                let name = format!("{path} {tag:?}");
                assert_eq!(outcome.run.action, REDIRECT, "{name}");
                assert_eq!(outcome.run.frame[36..38], 9996_u16.to_be_bytes(), "{name}");
                assert_eq!(outcome.copies.len(), 1, "{name}");
                assert_eq!(outcome.copies[0][36..38], 9995_u16.to_be_bytes(), "{name}");
                assert_eq!(outcome.run.tag, None, "{name}");
                let forwarded: u64 = outcome.counted.values().map(|(packets, _)| packets).sum();
                assert_eq!(forwarded, 3, "two receivers and the rule: {name}");
            }
        }
    });
}
