//! Senders that rules count: `senders`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use udplb::config::{Action, Key, Mode, Network, Ports, Source};
use udplb::datapath::senders::Record;
use udplb::desired::{Desired, Rule, Upstream};

use crate::answers::{CLIENTS, VIPS, ip6, kinds, run};
use crate::forge::{Forged, Ip, fragments};
use crate::program::{Context, Counted, Run};
use crate::testbed::{
    NEAR, NEAR_MAC, OUT_MAC, REDIRECT, RELAY_MAC, Testbed, UNSPEC, XDP_PASS, XDP_REDIRECT,
};

const UPSTREAM: [IpAddr; 2] = [IpAddr::V4(NEAR), ip6([0xfd00, 2, 0, 0, 0, 0, 0, 2])];

/// A sender whose networks are not those of the clients.
const STRANGERS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9)), ip6([0x2001, 0xdb8, 9, 0, 0, 0, 0, 9])];

/// Room for senders, in four buckets.
const SENDERS: u32 = 16;
const PLACES: usize = 32;

/// Returns a rule for port 53 of a family that counts its senders.
fn rule(family: usize) -> Rule {
    let key = Key::new(VIPS[family], vec![Ports { first: 53, last: 53 }]);
    let upstreams = vec![Upstream::new(UPSTREAM[family], Some(5353))];
    let rule = Rule::new(format!("dns{family}"), key, upstreams);
    Rule { action: Action::Block, source: Source::Preserve, senders: Some(SENDERS), ..rule }
}

fn configure(testbed: &Testbed<'_>, rules: Vec<Rule>) {
    let hosts = rules.iter().flat_map(Rule::destinations);
    let hop = |host| testbed.hop_to(host, 1500, Some(NEAR_MAC));
    let ways: BTreeMap<_, _> = hosts.map(|it| (it.address.clone(), hop(it.address.ip))).collect();
    testbed.program.configure_all(&Desired { rules, ..Desired::default() }, &ways, 0);
    testbed.program.lease(true);
}

fn both() -> Vec<Rule> {
    vec![rule(0), rule(1)]
}

/// Returns a packet of a sender to the key of its family.
fn from(sender: IpAddr) -> Forged {
    let family = usize::from(sender.is_ipv6());
    Forged::between(RELAY_MAC, sender, VIPS[family], 53)
}

/// Returns address, packets and bytes of the senders of a family that are refused, or of the others.
fn counted(testbed: &Testbed<'_>, family: usize, refused: bool) -> Vec<(IpAddr, u64, u64)> {
    let senders = testbed.program.senders(family, family == 1).into_iter();
    let senders = senders.filter(|it| it.refused == refused);
    senders.map(|Record { address, packets, bytes, .. }| (address, packets, bytes)).collect()
}

fn addresses(testbed: &Testbed<'_>, family: usize) -> Vec<IpAddr> {
    counted(testbed, family, false).into_iter().map(|(address, ..)| address).collect()
}

/// A kind of rule, by a change of [`rule`].
type Change = (&'static str, fn(&mut Rule));

const RULES: [Change; 7] = [
    ("block", |_| {}),
    ("pass", |rule| rule.action = Action::Pass),
    ("two upstreams", |rule| rule.upstreams.push(second(rule))),
    ("replicate", |rule| {
        rule.mode = Mode::Replicate;
        rule.upstreams.push(second(rule));
    }),
    ("replicate and pass", |rule| {
        (rule.mode, rule.action) = (Mode::Replicate, Action::Pass);
        rule.upstreams.push(second(rule));
    }),
    ("mirror", |rule| rule.mirrors.push(second(rule))),
    ("by sender", |rule| {
        rule.key.from = vec![Network::new(CLIENTS[usize::from(is_ipv6(rule))], 16)];
    }),
];

fn is_ipv6(rule: &Rule) -> bool {
    rule.upstreams[0].address.ip.is_ipv6()
}

fn second(rule: &Rule) -> Upstream {
    Upstream::new(rule.upstreams[0].address.clone(), Some(5354))
}

/// Each packet of a rule is counted once, on every path, and nothing else about it differs.
#[test]
fn packets_are_counted_by_sender() {
    Testbed::with(|testbed| {
        for (name, change) in RULES {
            let rules = || {
                both().into_iter().map(|mut rule| {
                    change(&mut rule);
                    rule
                })
            };
            let uncounted = rules().map(|rule| Rule { senders: None, ..rule });
            configure(testbed, uncounted.collect());
            let expected = [0, 1].map(|family| run_kinds(testbed, family));
            configure(testbed, rules().collect());
            for (family, expected) in expected.into_iter().enumerate() {
                let outcomes = run_kinds(testbed, family);
                for ((kind, outcome, _), (_, expected, _)) in outcomes.iter().zip(&expected) {
                    assert_eq!(outcome, expected, "{name}: {kind}");
                }
                let bytes = outcomes.iter().map(|(.., bytes)| bytes).sum();
                assert_eq!(
                    counted(testbed, family, false),
                    [(CLIENTS[family], outcomes.len() as u64, bytes)],
                    "{name}"
                );
            }
        }
    });
}

/// Runs all kinds of packets of a client, each twice: the first fills the line for the next.
fn run_kinds(testbed: &Testbed<'_>, family: usize) -> Vec<(&'static str, (Run, Counted), u64)> {
    let kinds = kinds(&from(CLIENTS[family]));
    let twice = kinds.iter().flat_map(|kind| [kind; 2]);
    twice
        .map(|(name, packet)| {
            let length = packet.frame().len() - 4 * packet.tags.len();
            (*name, run(testbed, packet), length as u64)
        })
        .collect()
}

#[test]
fn fragments_and_segments_are_packets() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for (family, client) in CLIENTS.into_iter().enumerate() {
            let mut long = from(client);
            long.udp.payload = 3000;
            let pieces = fragments(&long.frame(), 1400, 77);
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            for piece in &pieces {
                assert_eq!(testbed.program.run(piece, context).action, REDIRECT);
            }
            let bytes: usize = pieces.iter().map(Vec::len).sum();
            let pieces = pieces.len() as u64;
            assert_eq!(counted(testbed, family, false), [(client, pieces, bytes as u64)]);
            // three datagrams of 1000 bytes
            let mut merged = from(client);
            (merged.udp.payload, merged.gso) = (3000, (1000, 3));
            let (came, _) = run(testbed, &merged);
            assert_eq!(came.action, REDIRECT);
            let headers = if family == 0 { 42 } else { 62 };
            let whole = bytes as u64 + 3 * (1000 + headers);
            assert_eq!(counted(testbed, family, false), [(client, pieces + 3, whole)]);
        }
    });
}

#[test]
fn packets_of_no_sender_are_not_counted() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let client = CLIENTS[family];
            let mut to_another = from(client);
            to_another.to = [2, 0, 0, 0, 9, 9];
            let mut other_port = from(client);
            other_port.udp.destination = 54;
            let mut broken = from(client);
            match &mut broken.ip {
                Ip::V4(ip) => ip.checksum_error = 1,
                Ip::V6(_) => broken.udp.checksum = crate::forge::Checksum::Is(0),
            }
            let martian =
                from([IpAddr::from([127, 0, 0, 1]), ip6([0, 0, 0, 0, 0, 0, 0, 1])][family]);
            let mut answer = from(UPSTREAM[family]);
            answer.udp.source = 5353;
            for (name, packet) in [
                ("the frame is for another host", to_another),
                ("another port", other_port),
                ("broken", broken),
                ("martian", martian),
                ("an upstream's answer", answer),
            ] {
                assert_ne!(run(testbed, &packet).0.action, REDIRECT, "{name}");
                assert!(testbed.program.senders(family, family == 1).is_empty(), "{name}");
            }
        }
    });
}

#[test]
fn senders_that_no_rule_takes_are_refused() {
    Testbed::with(|testbed| {
        let by_sender = |family: usize, name: &str, client: IpAddr, senders| {
            let mut rule = Rule { name: name.into(), senders, ..rule(family) };
            rule.key.from = vec![Network::new(client, if family == 0 { 32 } else { 128 })];
            rule
        };
        // the first rule of a key that counts its senders has the refused ones
        let rules = |family: usize| {
            [
                by_sender(family, "a", UPSTREAM[family], None),
                by_sender(family, "b", CLIENTS[family], Some(SENDERS)),
            ]
        };
        configure(testbed, [rules(0), rules(1)].concat());
        for family in 0..2 {
            let kinds = kinds(&from(STRANGERS[family]));
            let mut bytes = 0;
            for (name, packet) in &kinds {
                let (came, verdicts) = run(testbed, packet);
                assert_eq!((came.action, verdicts), (UNSPEC, Counted::new()), "{name}");
                bytes += (packet.frame().len() - 4 * packet.tags.len()) as u64;
            }
            let mut to_another = from(STRANGERS[family]);
            to_another.to = [2, 0, 0, 0, 9, 9];
            let mut other_port = from(STRANGERS[family]);
            other_port.udp.destination = 54;
            for packet in [to_another, other_port] {
                assert_eq!(run(testbed, &packet).0.action, UNSPEC);
            }
            let refused = (STRANGERS[family], kinds.len() as u64, bytes);
            assert_eq!(counted(testbed, family, true), [refused]);
            assert!(counted(testbed, family, false).is_empty());
            // the same address is taken at another key
            assert_eq!(run(testbed, &from(CLIENTS[family])).0.action, REDIRECT);
            assert_eq!(addresses(testbed, family), [CLIENTS[family]]);
        }
    });
}

/// Makes senders known: twelve packets each in a minute and more.
fn make_known(testbed: &Testbed<'_>, senders: &[IpAddr]) {
    for _ in 0..12 {
        for sender in senders {
            assert_eq!(run(testbed, &from(*sender)).0.action, REDIRECT);
        }
        for family in 0..2 {
            testbed.program.age_senders(family, 6);
        }
    }
}

/// Returns senders of a family whose first is this one.
fn network(family: usize, number: u32) -> IpAddr {
    match family {
        0 => IpAddr::from((0x0b00_0000 + number).to_be_bytes()),
        _ => ip6([0x2001, 0xdb8, 7, 0, 0, 0, (number >> 16) as u16, number as u16]),
    }
}

/// Forged sources replace one another, however many there are.
#[test]
fn floods_replace_strangers_only() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let known: Vec<IpAddr> = (1..=SENDERS).map(|number| network(family, number)).collect();
            make_known(testbed, &known);
            let before = counted(testbed, family, false);
            assert_eq!(before.len(), SENDERS as usize, "all have room");
            for number in 0..5_000 {
                assert_eq!(run(testbed, &from(network(family, 1000 + number))).0.action, REDIRECT);
            }
            let after = counted(testbed, family, false);
            assert!(before.iter().all(|it| after.contains(it)), "{before:?} {after:?}");
            assert!(after.len() <= PLACES, "{}", after.len());
            // senders of the same time replace each other in any order; the last one is there
            let strangers = after.iter().filter(|it| !before.contains(it));
            assert!(strangers.clone().count() > 4, "{after:?}");
            assert!(strangers.clone().all(|it| it.1 == 1), "{after:?}");
            let last = network(family, 5_999);
            assert!(strangers.clone().any(|it| it.0 == last), "{after:?}");
        }
    });
}

/// Packets alone make no sender known, nor does time.
#[test]
fn strangers_are_those_of_few_packets_or_little_time() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let [often, long, first] = [1, 2, 3].map(|number| network(family, number));
            for _ in 0..50 {
                run(testbed, &from(often));
            }
            testbed.program.age_senders(family, 100);
            for _ in 0..4 {
                run(testbed, &from(long));
                testbed.program.age_senders(family, 30);
            }
            run(testbed, &from(first));
            assert_eq!(addresses(testbed, family), [often, long, first]);
            for number in 0..500 {
                run(testbed, &from(network(family, 1000 + number)));
            }
            let left = addresses(testbed, family);
            assert!(!left.iter().any(|it| [often, long, first].contains(it)), "{left:?}");
        }
    });
}

/// A known sender keeps its place while it was heard for longer than it has been silent, or nobody needs it.
#[test]
fn known_senders_leave_for_others_when_all_are_known() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let many: Vec<IpAddr> = (0..200).map(|number| network(family, number)).collect();
            // strangers replace each other until some are heard often enough in one table
            for chunk in many.chunks(8) {
                make_known(testbed, chunk);
            }
            let full = addresses(testbed, family);
            assert_eq!(full.len(), PLACES, "{full:?}");
            let newcomer = network(family, 5_000);
            let is_in = || addresses(testbed, family).contains(&newcomer);
            let mut known = full.clone();
            make_known(testbed, &full);
            assert_eq!(addresses(testbed, family), full, "all are known and have just been heard");
            run(testbed, &from(newcomer));
            assert!(!is_in(), "no place is free");
            testbed.program.age_senders(family, 3600);
            run(testbed, &from(newcomer));
            assert!(is_in(), "silent for longer than heard");
            known.retain(|it| addresses(testbed, family).contains(it));
            assert_eq!(known.len(), PLACES - 1, "one has left");
        }
    });
}

#[test]
fn senders_are_forgotten_after_a_day() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for family in 0..2 {
            let known: Vec<IpAddr> = (0..6).map(|number| network(family, number)).collect();
            // heard for more than a day
            for _ in 0..10 {
                for sender in &known {
                    run(testbed, &from(*sender));
                }
                testbed.program.age_senders(family, 10_000);
            }
            let flood = |base: u32| {
                for number in 0..500 {
                    run(testbed, &from(network(family, base + number)));
                }
                let left = addresses(testbed, family);
                known.iter().filter(|it| left.contains(it)).count()
            };
            testbed.program.age_senders(family, 70_000);
            assert_eq!(flood(1000), 6, "not yet");
            testbed.program.age_senders(family, 10_000);
            assert_eq!(flood(3000), 0);
        }
    });
}

/// First and last packet of a sender.
#[test]
fn times_are_of_the_first_and_the_last_packet() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for (family, client) in CLIENTS.into_iter().enumerate() {
            let beats = |seconds: u32| {
                let second = udplb::desired::flows::settings(
                    &udplb::config::Flows::default(),
                    testbed.program.second,
                    0,
                );
                (seconds * testbed.program.second) >> second.beat_shift
            };
            for pause in [10, 20] {
                run(testbed, &from(client));
                testbed.program.age_senders(family, pause);
            }
            let [before] = testbed.program.senders(family, family == 1)[..] else {
                panic!("one sender");
            };
            let heard = before.last.wrapping_sub(before.first);
            assert!((beats(10)..beats(10) + beats(2)).contains(&heard), "{heard}");
            run(testbed, &from(client));
            let [after] = testbed.program.senders(family, family == 1)[..] else {
                panic!("one sender");
            };
            assert_eq!((after.first, after.packets), (before.first, 3));
            let heard = after.last.wrapping_sub(before.last);
            assert!((beats(20)..beats(20) + beats(2)).contains(&heard), "{heard}");
        }
    });
}

/// XDP counts what it sends, and the program at tc what passes on.
#[test]
fn packets_of_xdp_are_counted_once() {
    Testbed::with(|testbed| {
        configure(testbed, both());
        for (family, client) in CLIENTS.into_iter().enumerate() {
            let packet = from(client);
            let frame = packet.frame();
            assert_eq!(testbed.program.run_xdp(&frame).action, XDP_PASS, "no line");
            assert!(testbed.program.senders(family, family == 1).is_empty());
            assert_eq!(run(testbed, &packet).0.action, REDIRECT);
            let sent = testbed.program.run_xdp(&frame);
            assert_eq!(sent.action, XDP_REDIRECT);
            assert_eq!(&sent.frame[6..12], OUT_MAC);
            let expected = (client, 2, 2 * frame.len() as u64);
            assert_eq!(counted(testbed, family, false), [expected]);
        }
    });
}
