//! A set of ids.

use foldhash::HashMap;

/// Ids of rules and upstreams. They are dense, so a word holds many: sets of all ids are made several times in an
/// `apply`.
#[derive(Debug, Default)]
pub struct IdSet(HashMap<u32, u64>);

impl IdSet {
    pub fn contains(&self, id: u32) -> bool {
        self.0.get(&(id / u64::BITS)).is_some_and(|word| word >> (id % u64::BITS) & 1 == 1)
    }

    pub fn max(&self) -> Option<u32> {
        let (place, word) = self.0.iter().max_by_key(|(place, _)| **place)?;
        Some(place * u64::BITS + word.ilog2())
    }
}

impl FromIterator<u32> for IdSet {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> IdSet {
        let mut set = IdSet::default();
        for id in ids {
            *set.0.entry(id / u64::BITS).or_default() |= 1 << (id % u64::BITS);
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::IdSet;

    proptest! {
        #[test]
        fn ids_are_those_of_a_tree(ids in vec(prop_oneof![0..200_u32, any::<u32>()], 0..50)) {
            let (set, tree): (IdSet, BTreeSet<u32>) =
                (ids.iter().copied().collect(), ids.iter().copied().collect());
            prop_assert_eq!(set.max(), tree.last().copied());
            for id in (0..200).chain(ids) {
                prop_assert_eq!(set.contains(id), tree.contains(&id), "{}", id);
            }
        }
    }
}
