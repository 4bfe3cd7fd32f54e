//! The tables that the program looks up keys in: cache lines of four IPv4 or two IPv6 places, each key in one of
//! two lines, and where possible in the place that its hash names. Built once, never changed. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::bpf::types::{entry, table_place, table_place6, tuning};
use crate::bpf::{Pod, wire};

/// Most keys per place on average: more would lengthen look-ups.
const MAX_LOAD: f64 = 0.5;

/// Number of seeds that are tried before the table is made larger.
const TRIES: u32 = 8;

/// Number of times that the table is doubled.
const DOUBLINGS: u32 = 6;

/// Number of keys that are moved to make room for one, at most.
const MOVES: usize = 256;

/// A key of a table: an address and a port; port 0 is any port.
pub trait Key: Copy {
    type Place: Pod;
    /// Seeds of [`Key::hash`].
    type Seeds: Copy;
    /// Number of places in a line.
    const PER_LINE: usize;

    /// Returns seeds made of random numbers.
    fn seeds(random: impl FnMut() -> u64) -> Self::Seeds;

    /// Returns a hash whose upper bits name the key's own place.
    fn hash(self, seeds: &Self::Seeds) -> u64;

    /// Writes the key and its value, an entry of the program, into a place.
    fn write(self, place: &mut Self::Place, value: u32);

    /// Marks the own place of a key that stands elsewhere.
    fn mark(place: &mut Self::Place);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key4 {
    pub address: Ipv4Addr,
    pub port: u16,
}

impl Key4 {
    /// Returns the key as the program compares it.
    fn word(self) -> u64 {
        u64::from(self.port.to_be()) << 32 | u64::from(u32::from(self.address).to_be())
    }
}

impl Key for Key4 {
    type Place = table_place;
    type Seeds = u64;
    const PER_LINE: usize = 4;

    fn seeds(mut random: impl FnMut() -> u64) -> u64 {
        random() | 1
    }

    fn hash(self, seed: &u64) -> u64 {
        self.word().wrapping_mul(*seed)
    }

    fn write(self, place: &mut table_place, value: u32) {
        place.key = self.word();
        place.entry = entry(value);
    }

    fn mark(place: &mut table_place) {
        place.more = 1;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key6 {
    pub address: Ipv6Addr,
    pub port: u16,
}

impl Key for Key6 {
    type Place = table_place6;
    type Seeds = [u64; 5];
    const PER_LINE: usize = 2;

    fn seeds(mut random: impl FnMut() -> u64) -> [u64; 5] {
        [(); 5].map(|()| random())
    }

    fn hash(self, [a, b, c, d, e]: &[u64; 5]) -> u64 {
        let [w, x, y, z] = wire(self.address.into()).map(u64::from);
        let pair = |a: &u64, w, b: &u64, x| a.wrapping_add(w).wrapping_mul(b.wrapping_add(x));
        let address = pair(a, w, b, x).wrapping_add(pair(c, y, d, z));
        address.wrapping_add(e.wrapping_mul(self.port.to_be().into()))
    }

    fn write(self, place: &mut table_place6, value: u32) {
        place.address = wire(self.address.into());
        place.port = self.port.to_be();
        place.entry = entry(value);
    }

    fn mark(place: &mut table_place6) {
        place.more = 1;
    }
}

/// The own place of each key, and its two lines.
#[derive(Clone, Copy)]
pub struct Hashing<K: Key> {
    pub first: K::Seeds,
    /// Odd factor of the hash for the second line.
    pub second: u64,
    /// 64 less the bits of a place's index.
    pub shift: u32,
}

impl<K: Key> Hashing<K> {
    /// Returns a hashing for this number of lines, at least 2 and a power of two.
    pub fn new(lines: usize, mut random: impl FnMut() -> u64) -> Hashing<K> {
        let first = K::seeds(&mut random);
        let shift = u64::BITS - (lines * K::PER_LINE).ilog2();
        Hashing { first, second: random() | 1, shift }
    }

    /// Returns the number of places.
    pub fn size(&self) -> usize {
        1 << (u64::BITS - self.shift)
    }

    /// Returns a key's own place, and one in its second line.
    fn named(&self, key: K) -> [usize; 2] {
        let hash = key.hash(&self.first);
        [hash, hash.wrapping_mul(self.second)].map(|hash| (hash >> self.shift) as usize)
    }

    /// Returns the first and the second line of a key.
    fn lines(&self, key: K) -> [usize; 2] {
        self.named(key).map(|place| place / K::PER_LINE)
    }

    /// Returns the places of a table with these keys, which are distinct; `None` if they do not fit.
    pub fn fill(&self, keys: &[(K, u32)]) -> Option<Vec<K::Place>> {
        let mut indices = self.places(keys)?;
        for line in 0..indices.len() / K::PER_LINE {
            self.move_to_own(keys, &mut indices, line);
        }
        let mut places = vec![K::Place::default(); self.size()];
        for (at, index) in indices.iter().enumerate().filter(|(_, index)| **index != FREE) {
            let (key, value) = keys[*index as usize];
            key.write(&mut places[at], value);
            let [own, _] = self.named(key);
            if own != at {
                K::mark(&mut places[own]);
            }
        }
        Some(places)
    }

    /// Moves keys within a line to their own places, as many as there are different ones.
    fn move_to_own(&self, keys: &[(K, u32)], indices: &mut [u32], line: usize) {
        let places = line * K::PER_LINE..(line + 1) * K::PER_LINE;
        let own = |index: u32| (index != FREE).then(|| self.named(keys[index as usize].0)[0]);
        for at in places.clone() {
            // each move takes a key to its own place
            while let Some(to) = own(indices[at])
                && places.contains(&to)
                && own(indices[to]) != Some(to)
            {
                indices.swap(at, to);
            }
        }
    }

    /// Returns the index of the key in each place, or [`FREE`].
    fn places(&self, keys: &[(K, u32)]) -> Option<Vec<u32>> {
        let mut places = vec![FREE; self.size() * K::PER_LINE];
        for index in 0..keys.len() as u32 {
            let [first, second] = self.lines(keys[index as usize].0);
            if !put::<K>(&mut places, first, index) && !put::<K>(&mut places, second, index) {
                self.make_room(keys, &mut places, second, index)?;
            }
        }
        Some(places)
    }

    /// Puts a key into a full line: another one moves to its other line, and so on (cuckoo hashing).
    fn make_room(
        &self,
        keys: &[(K, u32)],
        places: &mut [u32],
        mut line: usize,
        mut index: u32,
    ) -> Option<()> {
        for step in 0..MOVES {
            std::mem::swap(&mut places[line * K::PER_LINE + step % K::PER_LINE], &mut index);
            let [first, second] = self.lines(keys[index as usize].0);
            line ^= first ^ second;
            if put::<K>(places, line, index) {
                return Some(());
            }
        }
        None
    }
}

const FREE: u32 = u32::MAX;

/// Puts the index of a key into a free place of a line; returns false if there is none.
fn put<K: Key>(places: &mut [u32], line: usize, index: u32) -> bool {
    let places = &mut places[line * K::PER_LINE..][..K::PER_LINE];
    let free = places.iter_mut().find(|place| **place == FREE);
    free.map(|place| *place = index).is_some()
}

/// A table and its hashing.
pub struct KeyTable<K: Key> {
    pub hashing: Hashing<K>,
    pub places: Vec<K::Place>,
}

impl<K: Key> KeyTable<K> {
    /// Returns a table of these keys, which are distinct, with their entries. `seed` is random, so that nobody
    /// can choose keys that share their lines; equal seeds give equal tables. `None` if no table was found.
    pub fn new(keys: &[(K, u32)], seed: u64) -> Option<KeyTable<K>> {
        let mut state = seed;
        let least = (keys.len() as f64 / K::PER_LINE as f64 / MAX_LOAD).ceil() as usize;
        let least = least.next_power_of_two().max(2);
        let sizes = (0..=DOUBLINGS).flat_map(|doubling| [least << doubling; TRIES as usize]);
        sizes.into_iter().find_map(|size| {
            let hashing = Hashing::new(size, || split_mix(&mut state));
            let places = hashing.fill(keys)?;
            Some(KeyTable { hashing, places })
        })
    }
}

/// The tables of both families.
pub struct KeyTables {
    pub table: KeyTable<Key4>,
    pub table6: KeyTable<Key6>,
}

impl KeyTables {
    /// See [`KeyTable::new`].
    pub fn new(keys: &[(Key4, u32)], keys6: &[(Key6, u32)], seed: u64) -> Option<KeyTables> {
        let (table, table6) = (KeyTable::new(keys, seed)?, KeyTable::new(keys6, seed)?);
        Some(KeyTables { table, table6 })
    }

    /// Returns the constants of the program that reads the tables.
    pub fn tuning(&self) -> tuning {
        tuning_of(&self.table.hashing, &self.table6.hashing)
    }
}

/// Returns the constants of a program that hashes keys so.
pub fn tuning_of(table: &Hashing<Key4>, table6: &Hashing<Key6>) -> tuning {
    tuning {
        first: table.first,
        second: table.second,
        shift: table.shift,
        first6: table6.first,
        second6: table6.second,
        shift6: table6.shift,
    }
}

/// Returns the next number of a sequence (SplitMix64).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut number = *state;
    number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::collection::btree_map;
    use proptest::prelude::*;

    use super::{Hashing, Key, Key4, Key6, KeyTable};
    use crate::bpf::types::{table_place, table_place6};
    use crate::bpf::wire;

    /// Looks a key up as the program does.
    trait LookUp: Key {
        fn is_at(self, place: &Self::Place) -> bool;
        fn entry(place: &Self::Place) -> u32;
        fn more(place: &Self::Place) -> bool;

        fn find(self, table: &KeyTable<Self>) -> u32 {
            let [own, second] = table.hashing.named(self);
            if self.is_at(&table.places[own]) {
                return Self::entry(&table.places[own]);
            }
            if !Self::more(&table.places[own]) {
                return 0;
            }
            let line = |place: usize| (0..Self::PER_LINE).map(move |offset| place ^ offset);
            let mut places = line(own).chain(line(second)).map(|at| &table.places[at]);
            places.find(|place| self.is_at(place)).map_or(0, Self::entry)
        }
    }

    impl LookUp for Key4 {
        fn is_at(self, place: &table_place) -> bool {
            place.key == self.word()
        }

        fn entry(place: &table_place) -> u32 {
            place.entry.0
        }

        fn more(place: &table_place) -> bool {
            place.more != 0
        }
    }

    impl LookUp for Key6 {
        fn is_at(self, place: &table_place6) -> bool {
            (place.address, place.port) == (wire(self.address.into()), self.port.to_be())
        }

        fn entry(place: &table_place6) -> u32 {
            place.entry.0
        }

        fn more(place: &table_place6) -> bool {
            place.more != 0
        }
    }

    fn key4(number: u64) -> Key4 {
        Key4 { address: Ipv4Addr::from_bits((number >> 16) as u32), port: number as u16 }
    }

    fn key6((address, port): (u128, u16)) -> Key6 {
        Key6 { address: Ipv6Addr::from_bits(address), port }
    }

    /// Builds a table and looks up each of its keys; returns the places per key.
    fn build<K: LookUp>(keys: impl IntoIterator<Item = K>, seed: u64) -> (KeyTable<K>, f64) {
        let keys: Vec<(K, u32)> = keys.into_iter().zip(1..).collect();
        let table = KeyTable::new(&keys, seed).expect("a table");
        assert!(keys.iter().all(|(key, entry)| key.find(&table) == *entry));
        let places = table.places.len() as f64 / keys.len().max(1) as f64;
        (table, places)
    }

    /// Numbers whose bits are within a mask of a few bits, from 0 on, which is no rule's address.
    fn within(mask: u128) -> impl Iterator<Item = u128> {
        std::iter::successors(Some(0_u128), move |number| {
            Some((number | !mask).wrapping_add(1) & mask).filter(|next| *next != 0)
        })
    }

    proptest! {
        #[test]
        fn keys_are_found_and_no_others(
            keys in btree_map(0..1_u64 << 48, 1..u32::MAX, 0..500),
            others in btree_map(0..1_u64 << 48, Just(()), 0..100),
            seed: u64,
        ) {
            let pairs: Vec<_> = keys.iter().map(|(key, entry)| (key4(*key), *entry)).collect();
            let table = KeyTable::new(&pairs, seed).expect("a table");
            for key in keys.keys().chain(others.keys()) {
                prop_assert_eq!(key4(*key).find(&table), keys.get(key).copied().unwrap_or(0));
            }
        }

        #[test]
        fn keys_of_ipv6_are_found_and_no_others(
            keys in btree_map(any::<(u128, u16)>(), 1..u32::MAX, 0..500),
            others in btree_map(any::<(u128, u16)>(), Just(()), 0..100),
            seed: u64,
        ) {
            let pairs: Vec<_> = keys.iter().map(|(key, entry)| (key6(*key), *entry)).collect();
            let table = KeyTable::new(&pairs, seed).expect("a table");
            for key in keys.keys().chain(others.keys()) {
                prop_assert_eq!(key6(*key).find(&table), keys.get(key).copied().unwrap_or(0));
            }
        }

        /// Keys that differ in a few bits only, chosen by somebody who does not know the seeds.
        #[test]
        fn no_choice_of_bits_needs_a_larger_table(
            bits in proptest::collection::btree_set(0..128_u32, 12),
            seed: u64,
        ) {
            let mask = bits.iter().fold(0, |mask, bit| mask | 1_u128 << bit);
            let (_, places) = build(within(mask).map(|address| key6((address, 514))), seed);
            prop_assert!(places <= 4.0, "{mask:x}: {places} places per key");
            let bits: BTreeSet<u32> = bits.iter().map(|bit| bit % 48).collect();
            let mask = bits.iter().fold(0, |mask, bit| mask | 1_u128 << bit);
            let (_, places) = build(within(mask).skip(1).map(|key| key4(key as u64)), seed);
            prop_assert!(places <= 8.0, "{mask:x}: {places} places per key");
        }
    }

    /// Keys that would share lines if an address were hashed by products of 64-bit words: these pass upper
    /// bits on to upper bits only.
    #[test]
    fn upper_bits_of_both_halves_need_no_larger_table() {
        let halves = 0x3f << 58 | 0x3f << 122;
        for seed in 0..10 {
            let (_, places) = build(within(halves).skip(1).map(|address| key6((address, 0))), seed);
            assert!(places <= 4.0, "{places} places per key");
        }
    }

    #[test]
    fn ranges_of_addresses_and_ports_need_no_larger_table() {
        let grid = |addresses: u64, ports: u64| {
            (1..=addresses).flat_map(move |address| (0..ports).map(move |port| (address, port)))
        };
        for (addresses, ports) in [(1, 65_536), (65_536, 1), (256, 256), (16, 4096)] {
            let v4 = grid(addresses, ports).map(|(address, port)| key4(address << 16 | port));
            assert_eq!(build(v4, 7).1, 2.0, "{addresses} addresses and {ports} ports");
            let v6 = grid(addresses, ports).map(|(ip, port)| key6((ip.into(), port as u16)));
            assert_eq!(build(v6, 7).1, 2.0, "{addresses} addresses and {ports} ports");
        }
    }

    #[test]
    fn keys_that_share_both_lines_do_not_fit() {
        let keys: Vec<(Key4, u32)> = (0..5).map(|key| (key4(key), 1)).collect();
        // multiplied by 1, all are in the first of two lines
        assert!(Hashing::new(2, || 1).fill(&keys).is_none());
        assert!(Hashing::new(2, || 1).fill(&keys[..4]).is_some());
    }

    #[test]
    fn a_million_keys_fit_into_half_as_many_lines() {
        let random = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
        let (table, _) = build((0..1_000_000).map(|number| key4(random(number))), 1);
        assert_eq!(table.places.len(), 1 << 21);
        let own = |place: &&table_place| {
            place.entry.0 != 0 && {
                let address = (place.key as u32).to_ne_bytes();
                let port = u16::from_be((place.key >> 32) as u16);
                let [own, _] = table.hashing.named(Key4 { address: address.into(), port });
                std::ptr::eq(*place, &table.places[own])
            }
        };
        assert!(table.places.iter().filter(own).count() >= 750_000);
    }

    #[test]
    fn no_keys() {
        let (table, _) = build::<Key6>([], 1);
        assert_eq!(table.places.len(), 4);
        assert_eq!(key6((0, 0)).find(&table), 0);
    }
}
