//! The table of first fragments: its size, the age of its entries, and its behaviour when full.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use udplb::config::{Action, Fragments, Source};
use udplb::desired::{Rule, RuleIds};

use crate::packet::{Datagram, endpoint};
use crate::program::{Context, Counted};
use crate::testbed::{NEAR, PORTS, REDIRECT, SHOT, Testbed, UNSPEC, VIP, datagram, rule};

/// Returns the first fragment of a sender's datagram.
fn first(sender: u32) -> Datagram {
    let source = endpoint(Ipv4Addr::from_bits(0xc633_6400 + sender), 5666);
    Datagram { source, more_fragments: true, ..datagram() }
}

/// Returns the later fragment. The bytes at the offset of the ports are payload.
fn later(sender: u32) -> Datagram {
    Datagram { fragment_offset: 3, more_fragments: false, ..first(sender) }
}

struct Relay<'test> {
    testbed: &'test Testbed<'test>,
    ids: RuleIds,
}

/// Return value and counters of a run.
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

    /// Returns the fate of an unsent packet, counted at the rule.
    fn left(&self, action: i32, verdict: &'static str) -> Fate {
        (action, vec![(self.ids.rule, verdict)])
    }

    fn early(&self) -> Fate {
        (UNSPEC, vec![(0, "fragment-early")])
    }

    /// Returns the time this many seconds ago.
    fn ago(&self, seconds: f64) -> u32 {
        let program = &self.testbed.program;
        program.jiffies().wrapping_sub((f64::from(program.second) * seconds) as u32)
    }
}

fn balancing(action: Action) -> Rule {
    rule(action, Source::Vip, NEAR)
}

#[test]
fn full_table_drops_later_fragments() {
    Testbed::with(|testbed| {
        for (action, end) in [(Action::Block, SHOT), (Action::Pass, UNSPEC)] {
            let relay = Relay::with(testbed, &balancing(action));
            testbed.program.fill_fragments(relay.ago(0.0));
            assert_eq!(relay.run(&first(1)), relay.left(end, "fragment-full"));
            assert_eq!(relay.run(&later(1)), relay.early());
            // an unfragmented packet needs no room
            let (_, counted) = relay.run(&Datagram { more_fragments: false, ..first(1) });
            assert_eq!(counted, relay.sent().1);
            // first fragments need no room if the rule does not follow them
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

/// Entries stay in the table for at least a second, whatever else arrives.
#[test]
fn remembered_fragments_keep_their_place() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        assert_eq!(relay.run(&first(1)), relay.sent());
        testbed.program.fill_fragments(relay.ago(0.5));
        assert_eq!(relay.run(&first(2)), relay.left(SHOT, "fragment-full"));
        // the first fragment again, then the later one
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&later(1)), relay.sent());
        assert_eq!(relay.run(&later(2)), relay.early());
    });
}

#[test]
fn oldest_fragment_makes_room() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        for sender in 1..=3 {
            assert_eq!(relay.run(&first(sender)), relay.sent());
        }
        testbed.program.turn_fragments(relay.ago(1.1));
        assert_eq!(relay.run(&first(4)), relay.sent());
        // the second entry is too young to be replaced
        assert_eq!(relay.run(&first(5)), relay.left(SHOT, "fragment-full"));
        let fates: Vec<Fate> = (1..=5).map(|sender| relay.run(&later(sender))).collect();
        let (early, sent) = (relay.early(), relay.sent());
        assert_eq!(fates, [early.clone(), sent.clone(), sent.clone(), sent, early]);
        assert_eq!(testbed.program.fragments(), 3);
    });
}

/// A busy sender reuses an identification while the earlier datagram is still remembered.
#[test]
fn reused_identification_is_another_datagram() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        assert_eq!(relay.run(&first(1)), relay.sent());
        testbed.program.age_fragments(relay.ago(20.0));
        testbed.program.turn_fragments(relay.ago(20.0));
        // the entry is renewed
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&first(2)), relay.sent());
        assert_eq!(relay.run(&later(1)), relay.sent());
        assert_eq!(relay.run(&later(2)), relay.sent());
        assert_eq!(testbed.program.fragments(), 2);
    });
}

/// Entries expire after a receiver's reassembly timeout.
#[test]
fn fragments_expire_after_half_a_minute() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        assert_eq!(relay.run(&first(1)), relay.sent());
        testbed.program.age_fragments(relay.ago(29.0));
        assert_eq!(relay.run(&later(1)), relay.sent());
        testbed.program.age_fragments(relay.ago(31.0));
        assert_eq!(relay.run(&later(1)), relay.early());
        // the identification now belongs to another datagram
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&later(1)), relay.sent());
        assert_eq!(testbed.program.fragments(), 1);
    });
}

/// A first fragment that matches no rule uses no slot, and marks an entry with the same identification
/// as stale.
#[test]
fn first_fragment_of_no_rule_only_corrects() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        let nobodys = |packet| Datagram { destination: endpoint(VIP, PORTS.last + 1), ..packet };
        assert_eq!(relay.run(&nobodys(first(1))), (UNSPEC, Vec::new()));
        assert_eq!(testbed.program.fragments(), 0);
        assert_eq!(relay.run(&later(1)), relay.early());
        assert_eq!(relay.run(&first(1)), relay.sent());
        assert_eq!(relay.run(&nobodys(first(1))), (UNSPEC, Vec::new()));
        assert_eq!(relay.run(&later(1)), (UNSPEC, Vec::new()));
        // without a matching rule, nothing is recorded for the address either
        let elsewhere = |packet| Datagram { destination: endpoint(NEAR, 53), ..packet };
        assert_eq!(relay.run(&elsewhere(first(2))), (UNSPEC, Vec::new()));
        assert_eq!(relay.run(&elsewhere(later(2))), (UNSPEC, Vec::new()));
        assert_eq!(testbed.program.fragments(), 1);
    });
}

/// A first fragment of a sender outside the key's networks uses no slot.
#[test]
fn first_fragment_of_another_sender_takes_no_place() {
    Testbed::with(|testbed| {
        let from = vec!["10.0.0.0/8".parse().expect("a network")];
        let mut rule = balancing(Action::Block);
        rule.key.from = from;
        let relay = Relay::with(testbed, &rule);
        for sender in 1..=100 {
            assert_eq!(relay.run(&first(sender)), (UNSPEC, Vec::new()));
        }
        assert_eq!(testbed.program.fragments(), 0);
    });
}

/// Without the secret a sender cannot make two datagrams share a key.
#[test]
fn key_is_the_siphash_of_all_fields() {
    #[allow(deprecated)]
    use std::hash::{Hasher, SipHasher};
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        let word = |address: &Ipv4Addr| u64::from(u32::from_ne_bytes(address.octets()));
        for (identification, sender) in [(1, 1), (1, 2), (2, 1)] {
            let packet = Datagram { identification, ..first(sender) };
            let known = testbed.program.fragment_keys();
            assert_eq!(relay.run(&packet), relay.sent());
            let [one, two] = testbed.program.secret();
            #[allow(deprecated)]
            let mut hasher = SipHasher::new_with_keys(one, two);
            hasher.write_u64(word(packet.source.ip()) << 32 | word(&VIP));
            hasher.write_u64(identification.to_be().into());
            let new: Vec<u64> = testbed.program.fragment_keys();
            let new: Vec<_> = new.into_iter().filter(|key| !known.contains(key)).collect();
            assert_eq!(new, [hasher.finish()], "{packet:?}");
        }
    });
}

/// Concurrent first fragments on several CPUs each get a slot.
#[test]
fn concurrent_first_fragments_all_find_room() {
    const EACH: u32 = 20_000;
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &balancing(Action::Block));
        let (program, ifindex) = (testbed.program.program(), testbed.routing);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                scope.spawn(move || {
                    crate::common::wire::run_on_cpu(thread);
                    for sender in 0..EACH {
                        let frame = first((thread as u32) << 16 | sender).frame();
                        udplb::bpf::run_on_frame(program, ifindex, &frame).expect("a run");
                    }
                });
            }
        });
        let counted = testbed.program.take_counted();
        let packets: Vec<_> = counted.iter().map(|(key, (packets, _))| (*key, *packets)).collect();
        assert_eq!(packets, [((relay.ids.upstreams[0], "forwarded"), u64::from(2 * EACH))]);
    });
}
