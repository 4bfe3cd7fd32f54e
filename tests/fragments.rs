//! What is remembered of first fragments: for how long, how many, and what if there is no room.

mod common;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use common::packet::{Datagram, endpoint};
use common::program::{Context, Counted};
use common::testbed::{NEAR, PORTS, REDIRECT, SHOT, Testbed, UNSPEC, VIP, datagram, rule};
use udplb::config::{Action, Fragments, Source};
use udplb::plan::{Rule, RuleIds};

/// The first fragment of a sender's datagram.
fn first(sender: u32) -> Datagram {
    let source = endpoint(Ipv4Addr::from_bits(0xc633_6400 + sender), 5666);
    Datagram { source, more_fragments: true, ..datagram() }
}

/// What follows it; where it has its ports is payload.
fn later(sender: u32) -> Datagram {
    Datagram { fragment_offset: 3, more_fragments: false, ..first(sender) }
}

struct Relay<'test> {
    testbed: &'test Testbed<'test>,
    ids: RuleIds,
}

/// What the program returned, and what it counted.
type Fate = (i32, Vec<(u32, &'static str)>);

impl Relay<'_> {
    fn with<'test>(testbed: &'test Testbed<'test>, rule: &Rule) -> Relay<'test> {
        Relay { testbed, ids: testbed.program.configure(rule, &BTreeMap::new(), 0) }
    }

    fn run(&self, packet: &Datagram) -> Fate {
        let context = Context { ifindex: self.testbed.routing, ..Context::default() };
        let frame = packet.frame();
        let run = self.testbed.program.run(&frame, context);
        if run.action != REDIRECT {
            assert_eq!(run.frame, frame, "changed");
        }
        let counted: Counted = self.testbed.program.take_counted();
        (run.action, counted.into_keys().collect())
    }

    fn sent(&self) -> Fate {
        (REDIRECT, vec![(self.ids.upstreams[0], "forwarded")])
    }

    /// Not sent, and counted at the rule.
    fn left(&self, action: i32, verdict: &'static str) -> Fate {
        (action, vec![(self.ids.rule, verdict)])
    }

    fn early(&self) -> Fate {
        (UNSPEC, vec![(0, "fragment-early")])
    }

    /// The time so many seconds ago.
    fn ago(&self, seconds: f64) -> u32 {
        let program = &self.testbed.program;
        program.jiffies().wrapping_sub((f64::from(program.second) * seconds) as u32)
    }
}

fn balancing(action: Action) -> Rule {
    rule(action, Source::Vip, NEAR)
}

#[test]
fn no_room() {
    Testbed::with(|testbed| {
        for (action, end) in [(Action::Block, SHOT), (Action::Pass, UNSPEC)] {
            let relay = Relay::with(testbed, &balancing(action));
            testbed.program.fill_fragments(relay.ago(0.0));
            assert_eq!(relay.run(&first(1)), relay.left(end, "fragment-full"));
            assert_eq!(relay.run(&later(1)), relay.early());
            // no fragments, no need for room
            let (_, counted) = relay.run(&Datagram { more_fragments: false, ..first(1) });
            assert_eq!(counted, relay.sent().1);
            // nor is there where nobody follows
            for (fragments, end) in [(Fragments::Drop, SHOT), (Fragments::Pass, UNSPEC)] {
                let relay = Relay::with(testbed, &Rule { fragments, ..balancing(action) });
                assert_eq!(relay.run(&first(1)), relay.left(end, "fragment"));
                assert_eq!(relay.run(&later(1)), relay.early());
            }
            assert_eq!(testbed.program.fragments(), 0);
        }
        testbed.wire.drain();
    });
}

/// What is in the table stays there for a second at least, whatever else comes.
#[test]
fn who_is_there_already_stays() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        assert_eq!(relay.run(&first(1)), relay.sent());
        testbed.program.fill_fragments(relay.ago(0.5));
        assert_eq!(relay.run(&first(2)), relay.left(SHOT, "fragment-full"));
        // once more, and that which follows
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&later(1)), relay.sent());
        assert_eq!(relay.run(&later(2)), relay.early());
    });
}

#[test]
fn the_oldest_makes_room() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        for sender in 1..=3 {
            assert_eq!(relay.run(&first(sender)), relay.sent());
        }
        testbed.program.turn_fragments(relay.ago(1.1));
        assert_eq!(relay.run(&first(4)), relay.sent());
        // the second is young
        assert_eq!(relay.run(&first(5)), relay.left(SHOT, "fragment-full"));
        let fates: Vec<Fate> = (1..=5).map(|sender| relay.run(&later(sender))).collect();
        let (early, sent) = (relay.early(), relay.sent());
        assert_eq!(fates, [early.clone(), sent.clone(), sent.clone(), sent, early]);
        assert_eq!(testbed.program.fragments(), 3);
    });
}

/// Who sends much has the same identification again while the datagram before is remembered still.
#[test]
fn an_identification_that_comes_again_is_another_datagrams() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        assert_eq!(relay.run(&first(1)), relay.sent());
        testbed.program.age_fragments(relay.ago(20.0));
        testbed.program.turn_fragments(relay.ago(20.0));
        // it is as new as any other
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&first(2)), relay.sent());
        assert_eq!(relay.run(&later(1)), relay.sent());
        assert_eq!(relay.run(&later(2)), relay.sent());
        assert_eq!(testbed.program.fragments(), 2);
    });
}

/// As long as a receiver waits for them.
#[test]
fn half_a_minute() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        assert_eq!(relay.run(&first(1)), relay.sent());
        testbed.program.age_fragments(relay.ago(29.0));
        assert_eq!(relay.run(&later(1)), relay.sent());
        testbed.program.age_fragments(relay.ago(31.0));
        assert_eq!(relay.run(&later(1)), relay.early());
        // it is another datagram now
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&later(1)), relay.sent());
        assert_eq!(testbed.program.fragments(), 1);
    });
}

/// That a first fragment is no rule's is remembered too: what follows is not early.
#[test]
fn of_no_rule() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        let nobodys = |packet| Datagram { destination: endpoint(VIP, PORTS.last + 1), ..packet };
        assert_eq!(relay.run(&nobodys(first(1))), (UNSPEC, Vec::new()));
        assert_eq!(relay.run(&later(1)), (UNSPEC, Vec::new()));
        // to an address that no rule is for, nothing is
        let elsewhere = |packet| Datagram { destination: endpoint(NEAR, 53), ..packet };
        assert_eq!(relay.run(&elsewhere(first(2))), (UNSPEC, Vec::new()));
        assert_eq!(relay.run(&elsewhere(later(2))), (UNSPEC, Vec::new()));
        assert_eq!(testbed.program.fragments(), 1);
    });
}
