//! Slot tables that keep flows in place when upstreams come, go and change weight. Pure.
//!
//! They are made after Maglev (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load
//! Balancer", NSDI 2016, section 3.4): every member walks the slots in an order of its own, that
//! follows from its identity alone, and takes those that it finds free. Three things differ:
//!
//! - Weights: a member walks as fast as its weight, and stops when it has its quota, its exact share
//!   rounded up or down. Shares are as exact as the slots allow.
//! - A step on a taken slot is a step, where Maglev's members take turns and go on until they find
//!   a free slot. Who comes first to a slot is then independent of how the others fare, until the
//!   first quota is full: with 100 members, a removed one moves 0.8 % of the others' flows, not 1.6 %.
//! - The order is pseudo-random, where Maglev's is an offset and a skip. Two members whose skips
//!   have a small ratio go side by side, and what happens to one moves much of the other: with three
//!   members, up to 10 % of the others' flows.
//!
//! A change of anything here sends most flows elsewhere when udplb is upgraded.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::hash::Hash;
use std::hint::select_unpredictable;

/// A member of a set that a table is made for.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Input of the hash that its slots follow from. Members with the same identity are merged: the
    /// first one represents them, with the sum of their weights.
    pub identity: &'a [u8],
    /// Share of the flows, relative to the sum of all weights, which is below 2^32. A weight of 0 gets no
    /// slots.
    pub weight: u32,
}

/// The sizes of tables, each with the maximum ratio of all weights to the smallest one. The smallest share
/// is then 100 slots, which rounding changes by less than 1 %. There are few sizes, since a change of size
/// moves nearly all flows; they are primes, so that no pattern in the flows' hashes repeats in the slots.
const SIZES: [(u64, u32); 3] = [(100, 10_007), (1_000, 100_003), (10_000, 1_000_003)];

/// Size of the largest tables.
pub const LARGEST: u32 = SIZES[SIZES.len() - 1].1;

/// Error for a weight that is too small a part of all weights for any table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the weights, {sum} in all, are {} times the smallest, {min}; {} times is the maximum",
    .sum.div_ceil(u64::from(*.min)), SIZES[SIZES.len() - 1].0
)]
pub struct TooUneven {
    /// Sum of all weights.
    pub sum: u64,
    /// The smallest weight.
    pub min: u32,
}

/// Returns the number of slots for members with these weights.
///
/// # Errors
/// The sum of all weights is more than 10,000 times the smallest that is not 0.
pub fn size(weights: &[u32]) -> Result<u32, TooUneven> {
    let sum = weights.iter().map(|weight| u64::from(*weight)).sum();
    let min = weights.iter().copied().filter(|weight| *weight > 0).min().unwrap_or(1);
    SIZES
        .iter()
        .find(|(max, _)| sum <= max * u64::from(min))
        .map(|(_, size)| *size)
        .ok_or(TooUneven { sum, min })
}

/// Value of a slot without a member.
const FREE: u16 = u16::MAX;

/// Duration of a step of the smallest weight.
const LONGEST_STEP: u64 = 1 << 32;

/// Returns the index in `members` for each of `size` slots; empty if nobody has a weight. There may
/// be at most 65,535 members. Their order changes indices only, not the member of a slot.
pub fn table(members: &[Member<'_>], size: u32) -> Vec<u16> {
    let mut walkers = walkers(members, size);
    let Some(min) = walkers.iter().map(|walker| walker.weight).min() else { return Vec::new() };
    for walker in &mut walkers {
        walker.step = LONGEST_STEP * min / walker.weight;
    }
    let mut table = vec![FREE; size as usize];
    let mut now = 0;
    while walkers.len() > 1 {
        // On average each member takes one step per round.
        let sum: u64 = walkers.iter().map(|walker| walker.weight).sum();
        let round = (LONGEST_STEP * min).div_ceil(sum) * walkers.len() as u64;
        let mut all_walk = true;
        while all_walk {
            now += round;
            for walker in &mut walkers {
                walker.walk(now, &mut table);
                all_walk &= walker.quota > 0;
            }
        }
        walkers.retain(|walker| walker.quota > 0);
    }
    // The last member gets all remaining slots.
    for walker in walkers {
        table.iter_mut().filter(|slot| **slot == FREE).for_each(|slot| *slot = walker.index);
    }
    table
}

/// A member that walks the slots.
struct Walker<'a> {
    identity: &'a [u8],
    index: u16,
    weight: u64,
    /// Number of slots still to take.
    quota: u32,
    /// Duration of a step, and time of the last one.
    step: u64,
    last: u64,
    /// State of the generator; the upper half determines the slot.
    random: u64,
}

impl Walker<'_> {
    /// Takes the steps until `now`, and each free slot among them.
    fn walk(&mut self, now: u64, table: &mut [u16]) {
        while now - self.last >= self.step && self.quota > 0 {
            self.last += self.step;
            // Knuth's generator (MMIX). Its period of 2^64 covers all slots.
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let slot = (((self.random >> 32) * table.len() as u64) >> 32) as usize;
            let free = table[slot] == FREE;
            // Branch-free: half of the branches would be mispredicted, and dominate the time.
            table[slot] = select_unpredictable(free, self.index, table[slot]);
            self.quota -= u32::from(free);
        }
    }
}

/// Returns a walker for each identity with slots, sorted by identity, with its quota.
fn walkers<'a>(members: &[Member<'a>], size: u32) -> Vec<Walker<'a>> {
    let mut walkers: Vec<Walker<'a>> = members
        .iter()
        .enumerate()
        .map(|(index, Member { identity, weight })| Walker {
            identity,
            index: index as u16,
            weight: u64::from(*weight),
            quota: 0,
            step: 0,
            last: 0,
            random: hash(identity),
        })
        .collect();
    // Stable: the first of equal identities stays.
    walkers.sort_by_key(|walker| walker.identity);
    walkers.dedup_by(|next, first| {
        let same = next.identity == first.identity;
        first.weight += if same { next.weight } else { 0 };
        same
    });
    set_quotas(&mut walkers, u64::from(size));
    walkers.retain(|walker| walker.quota > 0);
    walkers
}

/// Distributes `size` slots by weight; the largest remainders are rounded up.
fn set_quotas(walkers: &mut [Walker<'_>], size: u64) {
    let sum = walkers.iter().map(|walker| walker.weight).sum::<u64>().max(1);
    let mut given = 0;
    for walker in &mut *walkers {
        walker.quota = (size * walker.weight / sum) as u32;
        given += u64::from(walker.quota);
    }
    let mut by_remainder: Vec<&mut Walker<'_>> =
        walkers.iter_mut().filter(|walker| walker.weight > 0).collect();
    by_remainder.sort_by_key(|walker| Reverse(size * walker.weight % sum));
    for walker in by_remainder.into_iter().take((size - given) as usize) {
        walker.quota += 1;
    }
}

/// Returns FNV-1a with the finalizer of MurmurHash3, since members' texts are similar.
fn hash(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    mix(hash)
}

/// Returns a 64-bit hash of a word: the finalizer of MurmurHash3, as in bpf/lb.h.
pub fn mix(mut hash: u64) -> u64 {
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// Returns the share of flows, 0 to 1, that a new table sends elsewhere. Each table comes with the members
/// that its indices refer to. A flow's slot is its hash modulo the table's size.
///
/// Exact for tables of any two sizes: a flow can have any pair of slots that are congruent modulo the sizes'
/// greatest common divisor, each pair with equal probability.
pub fn moved<T: Eq + Hash>(
    (old, old_members): (&[u16], &[T]),
    (new, new_members): (&[u16], &[T]),
) -> f64 {
    let before = |index: &u16| &old_members[usize::from(*index)];
    let after = |index: &u16| &new_members[usize::from(*index)];
    if old.is_empty() || new.is_empty() {
        return if old.len() == new.len() { 0.0 } else { 1.0 };
    }
    if old.len() == new.len() {
        let moved = old.iter().zip(new).filter(|(old, new)| before(old) != after(new)).count();
        return moved as f64 / old.len() as f64;
    }
    let common = gcd(old.len(), new.len());
    let mut places: HashMap<(usize, &T), u64> = HashMap::new();
    for (slot, index) in old.iter().enumerate() {
        *places.entry((slot % common, before(index))).or_default() += 1;
    }
    let stay: u64 = new
        .iter()
        .enumerate()
        .filter_map(|(slot, index)| places.get(&(slot % common, after(index))))
        .sum();
    1.0 - stay as f64 / (old.len() / common * new.len()) as f64
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::{Member, TooUneven, hash, mix, moved, size, table};

    /// Generates endpoints and weights.
    type Set = Vec<(String, u32)>;

    /// Returns a set, the same for the same seed.
    fn set(seed: u64, weights: &[u32]) -> Set {
        let endpoint = |number: u64| {
            let random = mix(seed << 32 | number);
            let [a, b, c, d, ..] = random.to_le_bytes();
            format!("10.{a}.{b}.{c}:{}", 9000 + u16::from(d))
        };
        weights.iter().zip(1..).map(|(weight, number)| (endpoint(number), *weight)).collect()
    }

    fn size_of(set: &Set) -> u32 {
        size(&set.iter().map(|(_, weight)| *weight).collect::<Vec<_>>()).expect("even enough")
    }

    fn table_of(set: &Set) -> Vec<u16> {
        let members: Vec<Member<'_>> = set
            .iter()
            .map(|(identity, weight)| Member { identity: identity.as_bytes(), weight: *weight })
            .collect();
        table(&members, size_of(set))
    }

    fn slots(set: &Set, table: &[u16]) -> Vec<usize> {
        let mut slots = vec![0; set.len()];
        for index in table {
            slots[usize::from(*index)] += 1;
        }
        slots
    }

    /// Returns the member of a slot.
    fn at<'a>((set, table): (&'a Set, &[u16]), slot: usize) -> &'a str {
        &set[usize::from(table[slot])].0
    }

    /// Returns the share of flows, 0 to 1, that move although their member stays in the set.
    fn needless(old: (&Set, &[u16]), new: (&Set, &[u16])) -> f64 {
        let after: HashMap<&str, usize> = new
            .0
            .iter()
            .zip(slots(new.0, new.1))
            .map(|((endpoint, _), slots)| (endpoint.as_str(), slots))
            .collect();
        let (mut rest, mut may_stay) = (0, 0);
        for ((endpoint, _), before) in old.0.iter().zip(slots(old.0, old.1)) {
            if let Some(after) = after.get(endpoint.as_str()) {
                rest += before;
                may_stay += before.min(*after);
            }
        }
        let stay = (0..old.1.len()).filter(|slot| at(old, *slot) == at(new, *slot)).count();
        (may_stay - stay) as f64 / rest as f64
    }

    /// Returns the mean and the maximum, in percent.
    fn mean_and_worst(shares: &[f64]) -> (f64, f64) {
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        (100.0 * mean, 100.0 * shares.iter().copied().fold(0.0, f64::max))
    }

    /// Returns the shares of needless moves when a member of sets with these weights leaves and returns.
    fn one_goes(sets: u64, weights: impl Fn(u64) -> Vec<u32>) -> [(f64, f64); 2] {
        let (mut goes, mut comes) = (Vec::new(), Vec::new());
        for seed in 0..sets {
            let old = set(seed, &weights(seed));
            let mut new = old.clone();
            new.remove(seed as usize % old.len());
            let (before, after) = (table_of(&old), table_of(&new));
            goes.push(needless((&old, &before), (&new, &after)));
            comes.push(needless((&new, &after), (&old, &before)));
        }
        [mean_and_worst(&goes), mean_and_worst(&comes)]
    }

    fn weights(seed: u64, count: u64, most: u64) -> Vec<u32> {
        (0..count).map(|number| 1 + (mix(seed << 20 | number << 8 | 5) % most) as u32).collect()
    }

    #[test]
    fn up_to_ten_move_one_percent_more_than_they_must() {
        for count in 2..=10 {
            for most in [1, 10] {
                for (mean, worst) in one_goes(30, |seed| weights(seed, count, most)) {
                    assert!(mean <= 1.0 && worst <= 2.0, "{count} to {most}: {mean} {worst}");
                }
            }
        }
    }

    #[test]
    fn more_than_ten_move_two_percent_more_than_they_must() {
        for (count, most) in [(11, 1), (20, 1), (20, 5), (50, 1), (100, 1)] {
            for (mean, _) in one_goes(10, |seed| weights(seed, count, most)) {
                assert!(mean <= 2.0, "{count} to {most}: {mean}");
            }
        }
    }

    #[test]
    fn a_changed_weight_moves_little_more_than_it_must() {
        for (from, to) in [(10, 9), (10, 11), (10, 5), (10, 20), (10, 100)] {
            let mut shares = Vec::new();
            for seed in 0..20 {
                let old = set(seed, &[from; 8]);
                let mut new = old.clone();
                new[3].1 = to;
                shares.push(needless((&old, &table_of(&old)), (&new, &table_of(&new))));
            }
            let (mean, worst) = mean_and_worst(&shares);
            assert!(mean <= 1.0 && worst <= 2.0, "{from} -> {to}: {mean} {worst}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn shares_are_exact(seed: u64, weights in vec(1..=50_u32, 1..40)) {
            let set = set(seed >> 32, &weights);
            let table = table_of(&set);
            let sum: u32 = weights.iter().sum();
            for (slots, weight) in slots(&set, &table).into_iter().zip(&weights) {
                let share = table.len() as f64 * f64::from(*weight) / f64::from(sum);
                prop_assert!((slots as f64 - share).abs() < 1.0, "{} not {}", slots, share);
                prop_assert!((slots as f64 / share - 1.0).abs() < 0.01, "{} not {}", slots, share);
            }
        }

        #[test]
        fn the_order_does_not_matter(
            (old, new) in vec(1..=9_u32, 1..20)
                .prop_map(|weights| set(7, &weights))
                .prop_flat_map(|set| (Just(set.clone()), Just(set).prop_shuffle()))
        ) {
            let endpoints = |set: &Set| -> Vec<String> {
                table_of(set).into_iter().map(|index| set[usize::from(index)].0.clone()).collect()
            };
            prop_assert_eq!(endpoints(&old), endpoints(&new));
        }

        #[test]
        fn what_moved_is_counted_exactly(
            old in vec(0..4_u16, 1..30),
            new in vec(0..4_u16, 1..30),
            new_members in select(vec![["a", "b", "c", "d"], ["b", "a", "e", "d"], ["a"; 4]]),
        ) {
            let old_members = ["a", "b", "c", "d"];
            let flows = old.len() * new.len();
            let elsewhere = (0..flows)
                .filter(|flow| {
                    let (old, new) = (old[flow % old.len()], new[flow % new.len()]);
                    old_members[usize::from(old)] != new_members[usize::from(new)]
                })
                .count();
            let share = moved((&old, &old_members), (&new, &new_members));
            prop_assert!((share - elsewhere as f64 / flows as f64).abs() < 1e-9);
        }
    }

    #[test]
    fn what_moves_when_the_size_changes() {
        let (old, new) = (set(1, &[1; 10]), set(1, &[[1; 10].as_slice(), &[200]].concat()));
        let (before, after) = (table_of(&old), table_of(&new));
        assert_eq!((before.len(), after.len()), (10_007, 100_003));
        let endpoints = |set: &Set| set.iter().map(|(endpoint, _)| endpoint.clone()).collect();
        let (names, new_names): (Vec<String>, Vec<String>) = (endpoints(&old), endpoints(&new));
        // by chance a flow stays, since the sizes have no divisor: 1/10 of what the ten still have
        let share = moved((&before, &names), (&after, &new_names));
        assert!((share - (1.0 - 10.0 / 210.0 / 10.0)).abs() < 1e-4, "{share}");
    }

    #[test]
    fn a_million_flows_are_spread_by_weight() {
        let set = set(3, &[1, 1, 1, 2, 2, 3, 4, 5, 10, 20]);
        let table = table_of(&set);
        let mut flows = vec![0_u32; set.len()];
        for number in 0..1_000_000_u64 {
            // 1,000 senders with 1,000 ports each; the key is that of the packet path
            let (address, port) = (0x0a14_0000 + number / 1000, 32_768 + number % 1000);
            let key = mix(address << 16 | port) as u32;
            flows[usize::from(table[key as usize % table.len()])] += 1;
        }
        let chi_square: f64 = flows
            .iter()
            .zip(&set)
            .map(|(flows, (_, weight))| {
                let expected = 1e6 * f64::from(*weight) / 49.0;
                (f64::from(*flows) - expected).powi(2) / expected
            })
            .sum();
        // 9 degrees of freedom: chance exceeds it once in a hundred
        assert!(chi_square < 21.67, "{chi_square}");
    }

    #[test]
    fn sizes_are_steps() {
        for (weights, slots) in [
            (&[][..], 10_007),
            (&[0], 10_007),
            (&[1], 10_007),
            (&[4_000_000_000], 10_007),
            (&[1, 99], 10_007),
            (&[1, 100], 100_003),
            (&[0, 2, 198], 10_007),
            (&[2, 199], 100_003),
            (&[1, 999], 100_003),
            (&[1, 1000], 1_000_003),
            (&[1, 9999], 1_000_003),
        ] {
            assert_eq!(size(weights), Ok(slots), "{weights:?}");
        }
        assert_eq!(size(&[1; 100]), Ok(10_007));
        assert_eq!(size(&[1; 101]), Ok(100_003));
        assert_eq!(size(&[1, 10_000]), Err(TooUneven { sum: 10_001, min: 1 }));
        assert_eq!(
            size(&[2, 19_999]).expect_err("too uneven").to_string(),
            "the weights, 20001 in all, are 10001 times the smallest, 2; 10000 times is the maximum"
        );
    }

    #[test]
    fn the_largest_table_is_exact_too() {
        let set = set(1, &[1, 9999]);
        assert_eq!(slots(&set, &table_of(&set)), [100, 999_903]);
    }

    #[test]
    fn who_is_listed_twice_is_one() {
        let members = |list: &[(&'static str, u32)]| -> Vec<Member<'static>> {
            let member = |(name, weight): &(&'static str, u32)| Member {
                identity: name.as_bytes(),
                weight: *weight,
            };
            list.iter().map(member).collect()
        };
        let once = table(&members(&[("a", 3), ("b", 1), ("c", 0)]), 10_007);
        let twice = table(&members(&[("a", 1), ("b", 1), ("a", 2)]), 10_007);
        assert_eq!(once, twice);
    }

    #[test]
    fn few() {
        assert!(table_of(&Vec::new()).is_empty());
        assert!(table_of(&set(1, &[0, 0])).is_empty());
        assert_eq!(table_of(&set(1, &[0, 1])), vec![1; 10_007]);
        // more members than slots: some have none
        let members = [b"a", b"b", b"c"].map(|identity| Member { identity, weight: 1 });
        assert_eq!(table(&members, 2).len(), 2);
        assert_eq!(moved::<&str>((&[], &[]), (&[], &[])), 0.0);
        assert_eq!(moved((&[], &[]), (&[0], &["a"])), 1.0);
    }

    /// If this fails, an upgrade would move every flow.
    #[test]
    fn tables_are_the_same_for_ever() {
        let table = table_of(&set(1, &[1, 1, 2, 3, 5]));
        let bytes: Vec<u8> = table.iter().flat_map(|index| index.to_le_bytes()).collect();
        assert_eq!(hash(&bytes), 0x2765_88f2_8a43_86f4);
    }
}
