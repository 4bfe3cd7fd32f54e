//! Decides where announced addresses stand, and what has to be done for it. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::datapath::announcements::Place;

/// The state of an announced address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// On the interface that is announced.
    Well,
    /// On the interface of the last resort.
    Sick,
    /// On neither.
    Withdrawn,
}

/// Capability of the host to serve an address now, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fitness {
    Fit,
    Unfit(String),
    /// It must not be announced: by command, or nothing is attached.
    Withdrawn(String),
}

#[derive(Debug)]
struct Entry {
    state: State,
    /// Start of the present fitness of a sick host.
    fit_since: Option<Instant>,
}

/// Remembers the state of each address.
#[derive(Debug, Default)]
pub struct Announcer {
    entries: BTreeMap<IpAddr, Entry>,
}

/// Interfaces of the announcement by index; `None`: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    pub well: Option<u32>,
    pub last_resort: Option<u32>,
}

/// A step towards the desired places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Put(Place),
    /// Removes an address that udplb has put there, and its record.
    Take(Place),
}

impl Announcer {
    /// Follows the fitness of the addresses; returns the changes in words. `placed` are the places of an
    /// earlier arpd, from which the state of an unknown address follows: one that is nowhere needs no
    /// hold-down, since nobody has moved to it yet.
    pub fn follow(
        &mut self,
        fitness: &BTreeMap<IpAddr, Fitness>,
        interfaces: Interfaces,
        placed: &BTreeSet<Place>,
        (hold_down, now): (Duration, Instant),
    ) -> Vec<String> {
        self.entries.retain(|address, _| fitness.contains_key(address));
        let mut changes = Vec::new();
        for (address, fitness) in fitness {
            let is_on = |ifindex: Option<u32>| {
                ifindex.is_some_and(|ifindex| placed.contains(&(*address, ifindex)))
            };
            let entry = self.entries.entry(*address).or_insert_with(|| {
                let state = match () {
                    () if is_on(interfaces.well) => State::Well,
                    () if is_on(interfaces.last_resort) => State::Sick,
                    () => State::Withdrawn,
                };
                Entry { state, fit_since: None }
            });
            let before = entry.state;
            entry.follow(fitness, hold_down, now);
            if entry.state != before {
                changes.push(in_words(*address, entry.state, interfaces, fitness));
            }
        }
        changes
    }

    /// Returns the steps from the present places to the desired ones. `there` are all addresses on the
    /// interfaces, `placed` those that udplb has put on any. An address is taken from its old interface first,
    /// at once before it is put on the new one: zebra of FRR 8.4 does not notice the end of the old one where
    /// both have it.
    pub fn steps(
        &self,
        interfaces: Interfaces,
        there: &BTreeSet<Place>,
        placed: &BTreeSet<Place>,
    ) -> Vec<Step> {
        let wanted: BTreeSet<Place> = self
            .entries
            .iter()
            .filter_map(|(address, entry)| {
                let ifindex = match entry.state {
                    State::Well => interfaces.well,
                    State::Sick => interfaces.last_resort,
                    State::Withdrawn => None,
                };
                Some((*address, ifindex?))
            })
            .collect();
        let put = wanted.difference(there).map(|place| Step::Put(*place));
        let take = placed.difference(&wanted).map(|place| Step::Take(*place));
        take.chain(put).collect()
    }
}

impl Entry {
    fn follow(&mut self, fitness: &Fitness, hold_down: Duration, now: Instant) {
        self.state = match (fitness, self.state) {
            (Fitness::Withdrawn(_), _) => State::Withdrawn,
            (Fitness::Unfit(_), _) => State::Sick,
            (Fitness::Fit, State::Sick) => {
                let since = *self.fit_since.get_or_insert(now);
                if now.duration_since(since) < hold_down {
                    return;
                }
                State::Well
            }
            (Fitness::Fit, State::Well | State::Withdrawn) => State::Well,
        };
        self.fit_since = None;
    }
}

fn in_words(address: IpAddr, state: State, interfaces: Interfaces, fitness: &Fitness) -> String {
    let why = match fitness {
        Fitness::Fit => return format!("{address} is announced"),
        Fitness::Unfit(why) | Fitness::Withdrawn(why) => why,
    };
    match state {
        State::Sick if interfaces.last_resort.is_some() => {
            format!("{address} is announced as the last resort: {why}")
        }
        _ => format!("{address} is withdrawn: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::net::IpAddr;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::{Announcer, Fitness, Interfaces, Step};
    use crate::datapath::announcements::Place;

    const HOLD_DOWN: Duration = Duration::from_secs(10);
    const WELL: u32 = 7;
    const LAST_RESORT: u32 = 8;
    const NOWHERE: [u32; 0] = [];
    const BOTH: Interfaces = Interfaces { well: Some(WELL), last_resort: Some(LAST_RESORT) };

    fn address(last: u8) -> IpAddr {
        [10, 99, 0, last].into()
    }

    /// The announcer with a kernel that does what it is told.
    struct World {
        announcer: Announcer,
        interfaces: Interfaces,
        there: BTreeSet<Place>,
        placed: BTreeSet<Place>,
        started: Instant,
    }

    impl World {
        fn new(interfaces: Interfaces) -> World {
            let (announcer, there, placed) = Default::default();
            World { announcer, interfaces, there, placed, started: Instant::now() }
        }

        /// Follows the fitness of address 1 at a second; returns the interfaces that it is on afterwards.
        fn at(&mut self, second: u64, fitness: Fitness) -> Vec<u32> {
            self.follow(second, &[(address(1), fitness)].into());
            self.there.iter().map(|(_, ifindex)| *ifindex).collect()
        }

        fn follow(&mut self, second: u64, fitness: &BTreeMap<IpAddr, Fitness>) -> Vec<String> {
            let clock = (HOLD_DOWN, self.started + Duration::from_secs(second));
            let changes = self.announcer.follow(fitness, self.interfaces, &self.placed, clock);
            for step in self.announcer.steps(self.interfaces, &self.there, &self.placed) {
                match step {
                    Step::Put(place) => {
                        assert!(self.there.insert(place), "{place:?} was there");
                        self.placed.insert(place);
                    }
                    Step::Take(place) => {
                        assert!(self.placed.remove(&place), "{place:?} is not ours");
                        self.there.remove(&place);
                    }
                }
            }
            changes
        }
    }

    fn unfit() -> Fitness {
        Fitness::Unfit("rule dns: no upstream is up".into())
    }

    fn withdrawn() -> Fitness {
        Fitness::Withdrawn("by command".into())
    }

    #[test]
    fn a_sick_host_waits_before_it_is_well_again() {
        let mut world = World::new(BOTH);
        assert_eq!(world.at(0, Fitness::Fit), [WELL]);
        assert_eq!(world.at(1, unfit()), [LAST_RESORT]);
        assert_eq!(world.at(2, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(11, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(12, Fitness::Fit), [WELL]);
    }

    #[test]
    fn each_relapse_begins_the_hold_down_anew() {
        let mut world = World::new(BOTH);
        assert_eq!(world.at(0, unfit()), [LAST_RESORT]);
        assert_eq!(world.at(1, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(10, unfit()), [LAST_RESORT]);
        assert_eq!(world.at(11, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(20, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(21, Fitness::Fit), [WELL]);
    }

    #[test]
    fn a_withdrawn_address_is_nowhere_and_returns_at_once() {
        let mut world = World::new(BOTH);
        assert_eq!(world.at(0, Fitness::Fit), [WELL]);
        assert_eq!(world.at(1, withdrawn()), NOWHERE);
        assert_eq!(world.at(2, Fitness::Fit), [WELL]);
        assert_eq!(world.at(3, unfit()), [LAST_RESORT]);
        assert_eq!(world.at(4, withdrawn()), NOWHERE);
        assert_eq!(world.at(5, unfit()), [LAST_RESORT]);
    }

    #[test]
    fn without_last_resort_a_sick_host_withdraws() {
        let mut world = World::new(Interfaces { last_resort: None, ..BOTH });
        assert_eq!(world.at(0, Fitness::Fit), [WELL]);
        assert_eq!(world.at(1, unfit()), NOWHERE);
        assert_eq!(world.at(2, Fitness::Fit), NOWHERE);
        assert_eq!(world.at(12, Fitness::Fit), [WELL]);
    }

    #[test]
    fn a_new_arpd_goes_on_from_the_places() {
        let mut world = World::new(BOTH);
        assert_eq!(world.at(0, Fitness::Fit), [WELL]);
        world.announcer = Announcer::default();
        assert_eq!(world.at(1, Fitness::Fit), [WELL]);
        assert_eq!(world.at(2, unfit()), [LAST_RESORT]);
        world.announcer = Announcer::default();
        assert_eq!(world.at(3, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(12, Fitness::Fit), [LAST_RESORT]);
        assert_eq!(world.at(13, Fitness::Fit), [WELL]);
    }

    #[test]
    fn an_address_that_was_removed_is_put_back() {
        let mut world = World::new(BOTH);
        assert_eq!(world.at(0, Fitness::Fit), [WELL]);
        world.there.clear();
        assert_eq!(world.at(1, Fitness::Fit), [WELL]);
    }

    #[test]
    fn an_interface_that_appears_gets_the_address() {
        let mut world = World::new(Interfaces { well: None, ..BOTH });
        assert_eq!(world.at(0, Fitness::Fit), NOWHERE);
        world.interfaces = BOTH;
        assert_eq!(world.at(1, Fitness::Fit), [WELL]);
        // it is made anew, under another index
        world.there.clear();
        world.interfaces.well = Some(9);
        assert_eq!(world.at(2, Fitness::Fit), [9]);
        assert_eq!(world.placed, [(address(1), 9)].into());
    }

    #[test]
    fn an_address_that_leaves_the_file_is_taken() {
        let mut world = World::new(BOTH);
        assert_eq!(world.at(0, Fitness::Fit), [WELL]);
        assert_eq!(
            world.follow(1, &[(address(2), Fitness::Fit)].into()),
            ["10.99.0.2 is announced"]
        );
        assert_eq!(world.there, [(address(2), WELL)].into());
    }

    #[test]
    fn changes_are_told_with_their_reasons() {
        let mut world = World::new(BOTH);
        let mut follow =
            |second, fitness| world.follow(second, &[(address(1), fitness)].into()).join("");
        assert_eq!(follow(0, Fitness::Fit), "10.99.0.1 is announced");
        let sick = "10.99.0.1 is announced as the last resort: rule dns: no upstream is up";
        assert_eq!(follow(1, unfit()), sick);
        assert_eq!(follow(2, unfit()), "");
        assert_eq!(follow(3, withdrawn()), "10.99.0.1 is withdrawn: by command");
    }

    /// An event: a second passes, and address `.0` becomes fit, unfit or withdrawn; or another program puts
    /// it on an interface or removes it.
    fn event() -> impl Strategy<Value = (u8, u8, u32)> {
        (0..3_u8, 0..5_u8, prop::sample::select(vec![WELL, LAST_RESORT]))
    }

    proptest! {
        #[test]
        fn addresses_of_others_stay_where_they_are(
            events in prop::collection::vec(event(), 1..60),
        ) {
            let mut world = World::new(BOTH);
            let mut fitness: BTreeMap<IpAddr, Fitness> = BTreeMap::new();
            let mut others: BTreeSet<Place> = BTreeSet::new();
            for (second, (last, what, ifindex)) in (0_u64..).zip(events) {
                let place = (address(last), ifindex);
                match what {
                    0 => _ = fitness.insert(place.0, Fitness::Fit),
                    1 => _ = fitness.insert(place.0, unfit()),
                    2 => _ = fitness.insert(place.0, withdrawn()),
                    3 => if world.there.insert(place) {
                        world.placed.remove(&place);
                        others.insert(place);
                    },
                    _ => if others.remove(&place) {
                        world.there.remove(&place);
                    },
                }
                world.follow(second, &fitness);
                prop_assert!(others.is_subset(&world.there));
                prop_assert!(others.is_disjoint(&world.placed));
                // each address is on one interface at most, besides what others have put there
                for (address, fitness) in &fitness {
                    let ours = world.placed.iter().filter(|(it, _)| it == address).count();
                    prop_assert!(ours <= usize::from(!matches!(fitness, Fitness::Withdrawn(_))));
                }
            }
        }
    }
}
