use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::record::returns;
use super::*;
use crate::config::Check;

const REFUSED: Answer = Answer::Failed(Outcome::PROBE_REFUSED);
const UNSENT: Answer = Answer::Failed(Outcome::PROBE_UNSENT);
const ANSWERED: Answer = Answer::After(Duration::from_millis(1));

fn subject(host: u8) -> Subject {
    Subject {
        address: std::net::IpAddr::from([10, 0, 9, host]).into(),
        port: 53,
        source: None,
        probe: Probe::new(Check::Dns { port: None, name: None }),
        is_service: true,
    }
}

/// A tracker, the present time, and the health that it has reported.
struct World {
    tracker: ProbeTracker,
    now: Now,
    down: BTreeSet<u32>,
}

impl World {
    fn new(upstreams: Vec<(u32, Subject)>) -> World {
        let instant = Instant::now();
        let mut tracker = ProbeTracker::new(instant);
        let upstreams = upstreams.into_iter().map(|(id, subject)| (id, subject, None));
        tracker.set_upstreams(upstreams.collect(), instant);
        World { tracker, now: Now { instant, seconds: 1_000_000 }, down: BTreeSet::new() }
    }

    fn pass(&mut self, seconds: u32) {
        self.now.instant += Duration::from_secs(seconds.into());
        self.now.seconds += seconds;
    }

    fn take_health(&mut self) {
        for (id, since) in self.tracker.take_health() {
            if since.is_some() {
                self.down.insert(id)
            } else {
                self.down.remove(&id)
            };
        }
    }

    /// Lets an interval pass, in which each service is probed once with this result.
    fn probe(&mut self, answer: Answer) -> usize {
        self.pass(2);
        let mut count = 0;
        // the limit of probes a second is another test's
        while let Some(start) = self.tracker.next_start().filter(|it| *it <= self.now.instant) {
            let subject = self.tracker.start(start.max(self.now.instant)).expect("it is due");
            self.tracker.finish(&subject, Some(answer), self.now);
            count += 1;
        }
        self.take_health();
        count
    }

    fn record(&self) -> types::probe {
        self.tracker.subjects.values().next().expect("a service").record
    }

    fn log(&mut self) -> Vec<String> {
        self.pass(1);
        let lines = self.tracker.take_log(self.now.instant);
        lines.into_iter().map(|(_, line)| line).collect()
    }
}

#[test]
fn upstream_falls_after_three_and_rises_after_two() {
    let mut world = World::new(vec![(7, subject(1))]);
    world.probe(ANSWERED);
    for down in [false, false, true] {
        world.probe(REFUSED);
        assert_eq!(world.down.contains(&7), down);
    }
    assert_eq!(world.log(), ["10.0.9.1:53 is down: DNS probe refused 3 of 3"]);
    world.probe(ANSWERED);
    world.probe(REFUSED);
    world.probe(ANSWERED);
    assert!(world.down.contains(&7), "two answers in a row are needed");
    world.probe(ANSWERED);
    assert!(world.down.is_empty());
    assert_eq!(world.log(), ["10.0.9.1:53 is up again: DNS probe answered"]);
}

#[test]
fn unknown_upstream_is_up_with_its_first_answer() {
    let mut world = World::new(vec![(7, subject(1))]);
    assert_eq!(world.record().state, ProbeState::PROBE_UNKNOWN);
    world.probe(ANSWERED);
    assert_eq!(world.record().state, ProbeState::PROBE_UP);
}

#[test]
fn unsent_probe_is_unknown_and_never_down() {
    let mut world = World::new(vec![(7, subject(1))]);
    world.probe(ANSWERED);
    for _ in 0..10 {
        world.probe(UNSENT);
        assert_eq!(world.record().state, ProbeState::PROBE_UNKNOWN);
    }
    assert!(world.down.is_empty());
    assert_eq!(world.log(), ["10.0.9.1:53 is unknown: DNS probe cannot be sent"]);
    // nor does it revive
    (0..3).for_each(|_| _ = world.probe(REFUSED));
    (0..9).for_each(|_| _ = world.probe(UNSENT));
    assert!(world.down.contains(&7));
}

#[test]
fn probe_that_was_not_started_says_nothing() {
    let mut world = World::new(vec![(7, subject(1))]);
    for _ in 0..10 {
        world.pass(2);
        let subject = world.tracker.start(world.now.instant).expect("due");
        world.tracker.finish(&subject, None, world.now);
    }
    assert_eq!(world.record().outcomes, [0; 7]);
}

#[test]
fn flapping_upstream_stays_out_longer_each_time() {
    let mut world = World::new(vec![(7, subject(1))]);
    let mut holds = Vec::new();
    for _ in 0..12 {
        while !world.down.contains(&7) {
            world.probe(REFUSED);
        }
        let record = world.record();
        holds.push(returns(&record, &Probe::new(Check::Icmp {})) - record.went_down);
        let mut last = 0;
        while world.down.contains(&7) {
            last = world.now.seconds;
            world.probe(ANSWERED);
        }
        assert!(world.now.seconds >= record.went_down + holds.last().unwrap(), "{holds:?}");
        assert!(last <= record.went_down + holds.last().unwrap().max(&4), "{holds:?}");
    }
    assert_eq!(holds[..5], [0, 8, 16, 32, 64]);
    assert_eq!(holds[8..], [600; 4]);
    // an hour later it is as good as new
    world.pass(3600);
    (0..3).for_each(|_| _ = world.probe(REFUSED));
    assert_eq!(world.record().downs, 1);
}

#[test]
fn enable_forgets_how_often_an_upstream_was_down() {
    let mut world = World::new(vec![(7, subject(1))]);
    let mut kernel = None;
    for _ in 0..3 {
        (0..3).for_each(|_| _ = world.probe(REFUSED));
        let mut write = |_, record: Option<&types::probe>| {
            kernel = record.copied().or(kernel);
            Ok::<_, ()>(kernel)
        };
        world.tracker.write(&mut write).unwrap();
        while world.down.contains(&7) {
            world.probe(ANSWERED);
        }
    }
    assert_eq!((world.record().downs, kernel.unwrap().downs), (3, 3));
    kernel.as_mut().unwrap().downs = 0;
    let exchange = |_, record: Option<&types::probe>| {
        kernel = record.copied().or(kernel);
        Ok::<_, ()>(kernel)
    };
    world.tracker.write(exchange).unwrap();
    assert_eq!((world.record().downs, kernel.unwrap().downs), (0, 0));
}

#[test]
fn shared_service_is_probed_once() {
    let mut world = World::new(vec![(7, subject(1)), (8, subject(1)), (9, subject(2))]);
    assert_eq!(world.probe(REFUSED), 2);
    (0..2).for_each(|_| _ = world.probe(REFUSED));
    assert_eq!(Vec::from_iter(world.down.clone()), [7, 8, 9]);
    assert_eq!(world.log(), ["10.0.9.1:53 and 1 more are down: DNS probe refused 3 of 3"]);
}

#[test]
fn another_configuration_keeps_what_is_known() {
    let mut world = World::new(vec![(7, subject(1)), (8, subject(2))]);
    (0..3).for_each(|_| _ = world.probe(REFUSED));
    world.down.clear();
    world.tracker.set_upstreams(vec![(9, subject(1), None)], world.now.instant);
    world.take_health();
    assert_eq!(Vec::from_iter(world.down.clone()), [9]);
    assert_eq!(world.probe(ANSWERED), 1);
}

#[test]
fn record_of_an_earlier_arpd_is_kept() {
    let mut world = World::new(Vec::new());
    let record = types::probe { state: ProbeState::PROBE_DOWN, since: 5, ..Default::default() };
    world.tracker.set_upstreams(vec![(7, subject(1), Some(record))], world.now.instant);
    assert_eq!(world.tracker.take_health(), [(7, Some(5))]);
}

#[test]
fn quoted_packet_counts_once_and_has_the_service_probed() {
    let mut world = World::new(vec![(7, subject(1))]);
    world.probe(ANSWERED);
    assert!(world.tracker.next_start().unwrap() > world.now.instant);
    for port in [53, 53, 54] {
        world.tracker.take_quote([10, 0, 9, 1].into(), port, world.now);
    }
    assert_eq!((world.record().failures, world.record().outcomes[5]), (1, 1));
    world.pass(1);
    let subject = world.tracker.start(world.now.instant).expect("it is probed at once");
    world.tracker.finish(&subject, Some(ANSWERED), world.now);
    assert_eq!(world.record().failures, 0);
}

#[test]
fn quote_is_no_evidence_where_another_port_is_probed() {
    let mut world = World::new(vec![(7, Subject { is_service: false, ..subject(1) })]);
    world.tracker.take_quote([10, 0, 9, 1].into(), 53, world.now);
    assert_eq!(world.record().failures, 0);
}

#[test]
fn probes_are_spread_and_limited() {
    let upstreams = (0..5000_u32).map(|id| {
        let address = std::net::IpAddr::from((10 << 24 | id).to_be_bytes()).into();
        (id, Subject { address, ..subject(1) })
    });
    let mut world = World::new(upstreams.collect());
    let start = world.now.instant;
    let mut count = 0;
    for millisecond in 0..2000 {
        world.now.instant = start + Duration::from_millis(millisecond);
        let before = count;
        while let Some(subject) = world.tracker.start(world.now.instant) {
            count += 1;
            world.tracker.finish(&subject, Some(ANSWERED), world.now);
        }
        if count > before {
            world.tracker.pause(world.now.instant);
        }
    }
    assert!((950..=1030).contains(&count), "{count} probes in two seconds");
}

proptest! {
    /// Checks random answers: an upstream goes down with the third failure in a row, and comes up with the second
    /// answer in a row at the earliest.
    #[test]
    fn hysteresis_holds(answers in prop::collection::vec(0..3_u8, 0..200)) {
        let mut world = World::new(vec![(7, subject(1))]);
        let (mut failures, mut good) = (0, 0);
        for answer in answers {
            let before = world.down.contains(&7);
            match answer {
                0 => { world.probe(ANSWERED); (failures, good) = (0, good + 1); }
                1 => { world.probe(REFUSED); (failures, good) = (failures + 1, 0); }
                _ => { world.probe(UNSENT); good = 0; }
            }
            match (before, world.down.contains(&7)) {
                (false, true) => prop_assert!(failures >= 3 && answer == 1),
                (true, false) => prop_assert!(good >= 2 && answer == 0),
                (false, false) => prop_assert!(failures < 3),
                (true, true) => {}
            }
        }
    }
}
