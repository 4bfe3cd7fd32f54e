//! Retired counters: sums, by rule, of the counters of ids that no generation holds any more. When an
//! upstream goes, its packets still count for the rule.

use std::collections::{BTreeSet, HashMap, HashSet};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, from_bytes, types};
use crate::datapath::counters::{Counters, Counts};
use crate::datapath::description::Generation;
use crate::datapath::pins::WriteGuard;

/// The table of retired counters, by rule id. Only the holder of the write guard writes to it.
pub struct Retired(Option<MapHandle>);

/// Content of the table; it holds few rules.
pub struct Sums(HashMap<u32, types::retired>);

impl Retired {
    /// `None` for the map of an earlier udplb: nothing is kept until the next generation is built.
    pub fn new(map: Option<MapHandle>) -> Retired {
        Retired(map)
    }

    pub fn read(&self) -> anyhow::Result<Sums> {
        let mut sums = HashMap::new();
        for key in self.0.iter().flat_map(MapCore::keys) {
            let rule =
                u32::from_ne_bytes(key[..].try_into().context("state/retired has other keys")?);
            sums.insert(rule, self.get(rule)?);
        }
        Ok(Sums(sums))
    }

    fn get(&self, rule: u32) -> anyhow::Result<types::retired> {
        let Some(map) = &self.0 else { return Ok(types::retired::default()) };
        match map.lookup(&rule.to_ne_bytes(), MapFlags::ANY)? {
            Some(bytes) => from_bytes(&bytes).context("state/retired has other values"),
            None => Ok(types::retired::default()),
        }
    }

    /// Adds the counters of ids that only this generation holds to the rules that the `others` have too.
    /// Called before the generation is removed.
    ///
    /// Adding and removing are two steps, and adding twice would falsify all later totals. So the sum is
    /// written first, together with the generation whose ids it includes. If a crash leaves that
    /// generation behind, [`Sums::has`] detects it, and its ids are neither counted nor added again.
    pub fn keep(
        &self,
        _: &WriteGuard,
        counters: &Counters,
        generation: &Generation,
        others: &[&Generation],
    ) -> anyhow::Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        let held: HashSet<u32> = others.iter().flat_map(|other| other.ids()).collect();
        let program = generation.description.program.id;
        for (rule, upstreams) in generation.counting().filter(|(rule, _)| held.contains(rule)) {
            let gone = upstreams.iter().copied().filter(|id| !held.contains(id));
            let mut counts = Counts::default();
            // an id may be listed twice
            for id in gone.collect::<BTreeSet<u32>>() {
                counts += counters.of(id)?;
            }
            if counts == Counts::default() {
                continue;
            }
            let sum = self.get(rule)?;
            if sum.program == program {
                continue;
            }
            counts += &sum.counters;
            let sum = types::retired { counters: counts.into(), program, unused: 0 };
            map.update(&rule.to_ne_bytes(), bytes_of(&sum), MapFlags::ANY)
                .with_context(|| format!("state/retired: rule {rule}"))?;
        }
        Ok(())
    }

    /// Removes the sums of ids that are not `held`: such an id may be assigned to another rule.
    pub fn retain(&self, _: &WriteGuard, held: &HashSet<u32>) -> anyhow::Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        let mut gone = self.read()?.0.into_keys().filter(|rule| !held.contains(rule));
        Ok(gone.try_for_each(|rule| map.delete(&rule.to_ne_bytes()))?)
    }
}

impl Sums {
    /// Returns the sum of a rule.
    pub fn of(&self, rule: u32) -> Counts {
        let mut counts = Counts::default();
        if let Some(sum) = self.0.get(&rule) {
            counts += &sum.counters;
        }
        counts
    }

    /// Returns true if the sum of a rule already includes the ids that only this generation holds.
    pub fn has(&self, generation: &Generation, rule: u32) -> bool {
        let program = generation.description.program.id;
        self.0.get(&rule).is_some_and(|sum| sum.program == program)
    }

    /// Returns the ids of a generation that are in no sum.
    pub fn left(&self, generation: &Generation) -> impl Iterator<Item = u32> {
        let ids = &generation.description.ids;
        ids.iter().flat_map(|ids| {
            let upstreams = match self.has(generation, ids.rule) {
                true => &[][..],
                false => &ids.upstreams,
            };
            let rest = ids.mirrors.iter().chain(upstreams);
            std::iter::once(ids.rule).chain(rest.copied())
        })
    }
}
