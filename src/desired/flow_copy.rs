//! Places flows in tables of another size, where bpf/flow.h looks for them. Pure.

use crate::bpf::types;
use crate::desired::flows::{FlowClock, HINTS, WAYS};
use crate::maglev::mix;

/// Indices of `addresses` and `ports` of a flow, see `enum flow_end`.
const CLIENT: usize = 0;
const VIP: usize = 1;
const SERVER: usize = 2;
const EGRESS: usize = 3;

/// State of flows that are never evicted, see `enum flow_state`.
const ASSURED: u8 = 3;

/// Number of buckets that are looked at to make room for one flow.
const MAX_STEPS: usize = 100;

/// Sizes of the tables, and what their hash depends on.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub buckets: u32,
    pub port_lines: u32,
    pub secret: u64,
    pub ipv6: bool,
}

impl Sizes {
    /// Repeats `hash_ends()`.
    fn hash(&self, flow: &types::flow6, one: usize, other: usize) -> u64 {
        let words = if self.ipv6 { 4 } else { 1 };
        let ends = flow.addresses[one].iter().zip(&flow.addresses[other]).take(words);
        let hash = ends.fold(self.secret, |hash, (one, other)| {
            mix(hash ^ (u64::from(*one) << 32 | u64::from(*other)))
        });
        let [one, other] = [one, other].map(|end| u64::from(flow.flow.ports[end]));
        mix(hash ^ (one << 16 | other))
    }

    /// Returns the number of places in `ports`.
    fn places(&self) -> u32 {
        self.port_lines * HINTS
    }

    /// Repeats `place_of_flow()`; `None` for a flow without a port, of a sticky sender.
    fn port_place(&self, flow: &types::flow6) -> Option<usize> {
        let place = || scale(self.hash(flow, SERVER, EGRESS) as u32, self.places()) as usize;
        (flow.flow.ports[EGRESS] != 0).then(place)
    }

    /// Repeats `first_bucket()` and `second_bucket()`.
    fn buckets(&self, hash: u64) -> [u32; 2] {
        [(hash >> 32) as u32, mix(hash) as u32].map(|hash| scale(hash, self.buckets))
    }
}

/// Repeats `way_of_hash()`.
fn way_of(hash: u64) -> usize {
    (hash % u64::from(WAYS)) as usize
}

/// Maps 32 bits of a hash to a number below `count`.
fn scale(hash: u32, count: u32) -> u32 {
    ((u64::from(hash) * u64::from(count)) >> 32) as u32
}

/// Flows and hints of one table. Addresses of IPv4 are in the first word.
pub struct Old {
    pub flows: Vec<types::flow6>,
    pub hints: Vec<u32>,
}

/// Flow in a bucket: its index in [`Old::flows`], and the part of its hash that the bucket has too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    pub flow: u32,
    pub tag: u16,
}

pub type Bucket = [Option<Placed>; WAYS as usize];

/// Contents of new tables.
pub struct New {
    pub buckets: Vec<Bucket>,
    pub hints: Vec<u32>,
    /// Number of flows that were alive and found no place.
    pub lost: usize,
}

/// Places the flows that are alive in tables of these sizes: assured ones first, then those that were used last.
/// Ports that rest, also of flows that find no place, rest in the new table.
pub fn place(sizes: &Sizes, clock: &FlowClock, old: &Old) -> New {
    let is_alive = |it: &types::flow, grace| clock.is_alive(it.state, it.touched, grace);
    let mut alive: Vec<u32> = (0..)
        .zip(&old.flows)
        .filter(|(_, it)| is_alive(&it.flow, false))
        .map(|(index, _)| index)
        .collect();
    alive.sort_by_key(|index| {
        let flow = &old.flows[*index as usize].flow;
        (flow.state != ASSURED, clock.since(flow.touched))
    });
    let mut table = Table {
        sizes,
        hashes: old.flows.iter().map(|flow| sizes.hash(flow, CLIENT, VIP)).collect(),
        buckets: vec![Bucket::default(); sizes.buckets as usize],
    };
    let mut hints = vec![0; sizes.places() as usize];
    let mut lost = 0;
    for index in alive {
        let place = sizes.port_place(&old.flows[index as usize]);
        let is_free = place.is_none_or(|place| hints[place] == 0);
        if !is_free || !table.insert(index) {
            lost += 1;
        } else if let Some(place) = place {
            // a mark, until its number is known
            hints[place] = u32::MAX;
        }
    }
    let numbered = (1..).zip(table.buckets.as_flattened());
    for (number, placed) in numbered.filter_map(|(number, it)| Some((number, (*it)?))) {
        let flow = &old.flows[placed.flow as usize];
        if let Some(place) = sizes.port_place(flow) {
            hints[place] = clock.hint(number, flow.flow.created);
        }
    }
    let unplaced = old.flows.iter().filter(|it| is_alive(&it.flow, true));
    let resting = unplaced.filter_map(|flow| sizes.port_place(flow));
    for place in resting.chain(resting_places(sizes, clock, &old.hints)) {
        if hints[place] == 0 {
            hints[place] = clock.hint(0, clock.now());
        }
    }
    New { buckets: table.buckets, hints, lost }
}

/// Returns the places of ports that nobody has and that rest. Of their hash, the old place is known: several new
/// ones may be theirs.
fn resting_places(sizes: &Sizes, clock: &FlowClock, old: &[u32]) -> Vec<usize> {
    let scaled = |place: usize| place as u64 * u64::from(sizes.places()) / old.len() as u64;
    let resting = (0..).zip(old).filter(|(_, hint)| clock.is_resting(**hint));
    let places = resting.flat_map(|(place, _)| scaled(place)..=scaled(place + 1));
    places.filter(|place| *place < sizes.places().into()).map(|place| place as usize).collect()
}

struct Table<'a> {
    sizes: &'a Sizes,
    /// By index of the flow.
    hashes: Vec<u64>,
    buckets: Vec<Bucket>,
}

impl Table<'_> {
    /// Puts a flow into one of its buckets, rather into the emptier one. Returns false if there is no room.
    fn insert(&mut self, flow: u32) -> bool {
        let hash = self.hashes[flow as usize];
        let free = |bucket: u32| self.buckets[bucket as usize].iter().filter(|it| it.is_none());
        let mut buckets = self.sizes.buckets(hash);
        if free(buckets[1]).count() > free(buckets[0]).count() {
            buckets.reverse();
        }
        let Some((bucket, way)) = self.free_way(buckets, hash) else { return false };
        self.buckets[bucket as usize][way] = Some(Placed { flow, tag: (hash >> 16) as u16 });
        true
    }

    /// Returns a free way of two buckets for a hash, after moving flows to their other buckets where both are full:
    /// along the shortest of the paths that lead to a free way.
    fn free_way(&mut self, buckets: [u32; 2], hash: u64) -> Option<(u32, usize)> {
        let mut reached: Vec<Step> =
            buckets.map(|bucket| Step { bucket, from: None }).into_iter().collect();
        let mut at = 0;
        while let Some(Step { bucket, .. }) = reached.get(at).copied() {
            let ways = &self.buckets[bucket as usize];
            let free = || ways.iter().position(Option::is_none);
            // repeats `free_way()`; flows that move find any way
            let own = Some(way_of(hash)).filter(|way| at < 2 && ways[*way].is_none());
            if let Some(way) = own.or_else(free) {
                return Some(self.shift(&reached, at, way));
            }
            for (way, placed) in ways.iter().flatten().enumerate() {
                let [first, second] = self.sizes.buckets(self.hashes[placed.flow as usize]);
                let other = if first == bucket { second } else { first };
                if reached.len() < MAX_STEPS && reached.iter().all(|it| it.bucket != other) {
                    reached.push(Step { bucket: other, from: Some((at, way)) });
                }
            }
            at += 1;
        }
        None
    }

    /// Moves each flow of a path that ends at a free way; returns the way that is free then, at its beginning.
    fn shift(&mut self, path: &[Step], mut at: usize, mut free: usize) -> (u32, usize) {
        while let Step { bucket, from: Some((before, way)) } = path[at] {
            let moved = self.buckets[path[before].bucket as usize][way].take();
            self.buckets[bucket as usize][free] = moved;
            (at, free) = (before, way);
        }
        (path[at].bucket, free)
    }
}

/// A bucket, and the flow that may move there: the index of the step of its bucket, and its way.
#[derive(Clone, Copy)]
struct Step {
    bucket: u32,
    from: Option<(usize, usize)>,
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{New, Old, Sizes, place, scale};
    use crate::bpf::types;
    use crate::config::Flows;
    use crate::desired::flows::{FlowClock, buckets, port_lines, settings};

    const NOW: u32 = 1000;

    fn sizes(entries: u32) -> Sizes {
        let flows = Flows { entries, ..Flows::default() };
        Sizes {
            buckets: buckets(&flows),
            port_lines: port_lines(&flows),
            secret: 0x1234_5678_9abc_def0,
            ipv6: false,
        }
    }

    fn clock() -> FlowClock {
        FlowClock::new(settings(&Flows::default(), 1000, 9), 1000, NOW)
    }

    /// Returns the flow of a client's port; one in four is assured.
    fn flow(client: u16) -> types::flow6 {
        let flow = types::flow {
            state: if client.is_multiple_of(4) { 3 } else { 2 },
            touched: NOW - u32::from(client % 64),
            created: NOW - 100,
            ports: [client, 53, 53, 1024 + client].map(u16::to_be),
            ..Default::default()
        };
        types::flow6 { flow, addresses: [7, 8, 9, 10].map(|host| [host, 0, 0, 0]) }
    }

    /// Returns as many flows as find a place in a table where nothing is moved, and an empty table of hints.
    fn full(entries: u32) -> Old {
        let sizes = sizes(entries);
        let (mut used, mut places) = (vec![0; sizes.buckets as usize], HashSet::new());
        let flows = (1..20_000).map(flow).filter(|flow| {
            let [first, second] = sizes.buckets(sizes.hash(flow, super::CLIENT, super::VIP));
            let least = if used[second as usize] < used[first as usize] { second } else { first };
            let fits = used[least as usize] < 8 && places.insert(sizes.port_place(flow));
            used[least as usize] += u32::from(fits);
            fits
        });
        Old { flows: flows.collect(), hints: vec![0; sizes.places() as usize] }
    }

    /// Checks that each flow that was placed is where the program looks for it; returns their places in `old`.
    fn check(sizes: &Sizes, old: &Old, new: &New) -> Vec<u32> {
        let mut found = Vec::new();
        for (number, placed) in (1_u32..).zip(new.buckets.as_flattened()) {
            let Some(placed) = placed else { continue };
            let flow = &old.flows[placed.flow as usize];
            let hash = sizes.hash(flow, super::CLIENT, super::VIP);
            assert!(sizes.buckets(hash).contains(&((number - 1) / 8)));
            assert_eq!(placed.tag, (hash >> 16) as u16);
            let hint = new.hints[sizes.port_place(flow).expect("a port")];
            assert_eq!((hint & 0x3f_ffff, hint >> 22), (number, NOW - 100), "of its creation");
            found.push(placed.flow);
        }
        found.sort_unstable();
        let hinted = new.hints.iter().filter(|hint| **hint & 0x3f_ffff != 0).count();
        assert_eq!(hinted, found.len());
        found
    }

    #[test]
    fn larger_tables_have_room_for_all_flows() {
        let old = full(4096);
        assert!(old.flows.len() > 3500, "{}", old.flows.len());
        for entries in [4200, 5000, 8192, 65_536] {
            let sizes = sizes(entries);
            let new = place(&sizes, &clock(), &old);
            assert_eq!(new.lost, 0, "{entries}");
            assert_eq!(check(&sizes, &old, &new).len(), old.flows.len());
            // in a table that is nearly empty, most flows are where a CPU guesses them to be
            let own = ways(&new).filter(|(way, flow)| {
                let hash = sizes.hash(&old.flows[*flow], super::CLIENT, super::VIP);
                super::way_of(hash) == *way
            });
            let guessed = own.count() * 100 / old.flows.len();
            assert!(guessed > if entries == 65_536 { 95 } else { 20 }, "{entries}: {guessed} %");
        }
    }

    /// Returns the way of each flow of a table, and its place in the old one.
    fn ways(new: &New) -> impl Iterator<Item = (usize, usize)> {
        let ways = new.buckets.iter().flat_map(|bucket| bucket.iter().enumerate());
        ways.filter_map(|(way, placed)| Some((way, placed.as_ref()?.flow as usize)))
    }

    #[test]
    fn flows_without_port_need_no_hint() {
        let mut old = full(4096);
        for flow in &mut old.flows {
            flow.flow.ports[super::EGRESS] = 0;
        }
        let new = place(&sizes(8192), &clock(), &old);
        assert_eq!(new.lost, 0);
        assert_eq!(new.buckets.as_flattened().iter().flatten().count(), old.flows.len());
        assert!(new.hints.iter().all(|hint| *hint == 0));
    }

    #[test]
    fn smaller_tables_keep_assured_flows_and_those_used_last() {
        let (old, sizes) = (full(4096), sizes(1024));
        let new = place(&sizes, &clock(), &old);
        let kept = check(&sizes, &old, &new);
        assert_eq!(new.lost + kept.len(), old.flows.len());
        assert!(kept.len() > 1000, "{}", kept.len());
        let of = |state| old.flows.iter().filter(|it| it.flow.state == state).count();
        let is_assured = |it: &&u32| old.flows[**it as usize].flow.state == 3;
        // two may have one place in `ports` now
        assert!(kept.iter().filter(is_assured).count() * 10 > of(3) * 8);
        let ages = kept.iter().filter(|it| !is_assured(it));
        let oldest = ages.map(|it| NOW - old.flows[*it as usize].flow.touched).max();
        assert!(oldest.is_some_and(|oldest| oldest < 32), "{oldest:?}");
    }

    #[test]
    fn expired_flows_are_left_and_their_ports_rest() {
        let state = |state, age| {
            let mut flow = flow(8);
            (flow.flow.state, flow.flow.touched) = (state, NOW - age);
            flow
        };
        let sizes = sizes(1024);
        // 234 beats, and 2 seconds of 8 beats more
        for (age, placed, rests) in
            [(234, 1, false), (235, 0, true), (250, 0, true), (251, 0, false)]
        {
            let old = Old { flows: vec![state(2, age)], hints: vec![0] };
            let new = place(&sizes, &clock(), &old);
            assert_eq!((check(&sizes, &old, &new).len(), new.lost), (placed, 0), "{age}");
            let hint = new.hints[sizes.port_place(&old.flows[0]).expect("a port")];
            assert_eq!(hint == clock().hint(0, NOW), rests, "{age}");
        }
        let free = Old { flows: vec![state(0, 0), state(4, 0)], hints: vec![0] };
        assert!(place(&sizes, &clock(), &free).hints.iter().all(|hint| *hint == 0));
    }

    #[test]
    fn ports_that_rest_do_so_in_the_new_table() {
        let (before, after) = (sizes(1024), sizes(4096));
        let mut old = Old { flows: Vec::new(), hints: vec![0; before.places() as usize] };
        let hash = 0xabcd_ef01;
        for (age, rests) in [(0, true), (8, true), (9, false)] {
            old.hints[scale(hash, before.places()) as usize] = clock().hint(0, NOW - age);
            let new = place(&after, &clock(), &old);
            assert_eq!(new.hints[scale(hash, after.places()) as usize] != 0, rests, "{age}");
            assert!(new.hints.iter().filter(|hint| **hint != 0).count() < 6);
        }
    }

    #[test]
    fn both_families_are_told_by_all_of_their_words() {
        let (one, mut other) = (flow(8), flow(8));
        other.addresses[super::CLIENT][3] = 1;
        let (v4, v6) = (sizes(1024), Sizes { ipv6: true, ..sizes(1024) });
        let hash = |sizes: Sizes, flow| sizes.hash(flow, super::CLIENT, super::VIP);
        assert_eq!(hash(v4, &one), hash(v4, &other));
        assert_ne!(hash(v6, &one), hash(v6, &other));
    }
}
