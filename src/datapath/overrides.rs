//! Override states of upstreams, set by `drain` and `enable`: two bits by id. They take precedence over
//! the configuration.

use std::collections::BTreeMap;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::read_array;
use crate::config::State;
use crate::datapath::gate::Gate;
use crate::datapath::pins::WriteGuard;
use crate::desired::id_set::IdSet;

/// `enum override` of udplb.h. No map or function has that type, so that the skeleton lacks it.
const DRAINED: u64 = 1;
const ACTIVE: u64 = 2;
const BITS: u32 = 2;
const MASK: u64 = (1 << BITS) - 1;
const PER_WORD: u32 = u64::BITS / BITS;

/// The table of overrides. Only the holder of the write guard writes to it.
pub struct Overrides(MapHandle, Gate);

impl Overrides {
    pub fn new(map: MapHandle, gate: Gate) -> Overrides {
        Overrides(map, gate)
    }

    /// Returns the map that the program looks up.
    pub fn map(&self) -> &MapHandle {
        &self.0
    }

    /// Returns the overrides of ids up to `most`.
    pub fn read(&self, most: u32) -> anyhow::Result<BTreeMap<u32, State>> {
        let words = (most / PER_WORD).saturating_add(1).min(self.0.max_entries());
        let mut read = Vec::with_capacity(words as usize);
        read_array(&self.0, words, |word| read.push(number(word)))?;
        let mut all = BTreeMap::new();
        for (index, word) in (0..).zip(read) {
            let word = word?;
            // most words are zero
            if word == 0 {
                continue;
            }
            let ids = (0..PER_WORD).filter_map(|place| Some((place, get(word, place)?)));
            all.extend(ids.map(|(place, state)| (index * PER_WORD + place, state)));
        }
        all.retain(|id, _| *id <= most);
        Ok(all)
    }

    /// Sets the override of an upstream; `None` removes it.
    pub fn set(&self, _: &WriteGuard, id: u32, state: Option<State>) -> anyhow::Result<()> {
        let key = (id / PER_WORD).to_ne_bytes();
        let word = self.0.lookup(&key, MapFlags::ANY)?.context("an id beyond all upstreams")?;
        let word = put(number(&word)?, id % PER_WORD, state);
        self.0.update(&key, &word.to_ne_bytes(), MapFlags::ANY)?;
        self.1.advance();
        Ok(())
    }

    /// Removes the overrides of ids up to `most` that are not `held`: such an id may be assigned to another
    /// upstream.
    pub fn retain(&self, guard: &WriteGuard, held: &IdSet, most: u32) -> anyhow::Result<()> {
        let mut all = self.read(most)?.into_keys();
        all.try_for_each(|id| if held.contains(id) { Ok(()) } else { self.set(guard, id, None) })
    }
}

fn number(word: &[u8]) -> anyhow::Result<u64> {
    Ok(u64::from_ne_bytes(word.try_into().context("state/overrides has other values")?))
}

/// Returns the override at a place in a word.
fn get(word: u64, place: u32) -> Option<State> {
    match word >> (place * BITS) & MASK {
        0 => None,
        DRAINED => Some(State::Drained),
        _ => Some(State::Active),
    }
}

fn put(word: u64, place: u32, state: Option<State>) -> u64 {
    let bits = match state {
        None => 0,
        Some(State::Drained) => DRAINED,
        Some(State::Active) => ACTIVE,
    };
    let shift = place * BITS;
    word & !(MASK << shift) | bits << shift
}

/// Returns the state of an upstream for output: the override, else the configured state. `None` for an
/// active upstream without an override.
pub fn word(in_file: State, said: Option<State>) -> Option<&'static str> {
    match (in_file, said) {
        (State::Active, None) => None,
        (State::Drained, None) => Some("drained"),
        (_, Some(State::Drained)) => Some("drained (override)"),
        (_, Some(State::Active)) => Some("active (override)"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{PER_WORD, get, put, word};
    use crate::config::State;

    const STATES: [Option<State>; 3] = [None, Some(State::Active), Some(State::Drained)];

    #[test]
    fn as_the_program_reads_them() {
        assert_eq!(put(0, 0, Some(State::Drained)), 1);
        assert_eq!(put(0, 0, Some(State::Active)), 2);
        assert_eq!(put(0, 31, Some(State::Drained)), 1 << 62);
        assert_eq!(put(u64::MAX, 31, Some(State::Active)), u64::MAX >> 1 & !(1 << 62) | 1 << 63);
        assert_eq!(put(u64::MAX, 1, None), !0b1100);
        // neither none nor drained
        assert_eq!(get(3, 0), Some(State::Active));
    }

    proptest! {
        #[test]
        fn one_changes_and_the_others_stay(
            old: u64,
            place in 0..PER_WORD,
            state in prop::sample::select(STATES.to_vec()),
        ) {
            let new = put(old, place, state);
            for other in 0..PER_WORD {
                let before = get(old, other);
                prop_assert_eq!(get(new, other), if other == place { state } else { before });
            }
            prop_assert_eq!(put(new, place, state), new);
        }
    }

    #[test]
    fn in_words() {
        let words = STATES.map(|said| [State::Active, State::Drained].map(|it| word(it, said)));
        let (active, drained) = (Some("active (override)"), Some("drained (override)"));
        assert_eq!(words, [[None, Some("drained")], [active, active], [drained, drained]]);
    }
}
