//! Retired counters: what removed generations have counted, as far as others have the rule.
//!
//! Before a generation is removed, its [lines] are added to the sums of their upstreams,
//! and everything of upstreams that no other generation has to the sums of their rules: a rule's total keeps the
//! packets of upstreams that it has lost.
//!
//! The sums are one map that is never changed. Another one takes its place, with one rename, which also says of
//! which generation it includes the lines. After a crash such a generation is left behind: it is neither
//! counted, nor added again, nor attached, but removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use crate::bpf::{bytes_of, from_bytes, read_array, types};
use crate::datapath::counters::{Count, Counters, Counts, NONE, Part};
use crate::datapath::description::Generation;
use crate::datapath::lines;
use crate::datapath::pins::{ReadGuard, WriteGuard};
use crate::desired::id_set::IdSet;

/// Name of the map's pin, and of the next map's before it takes that place.
pub const PIN: &str = "retired";
const NEXT: &str = "retired-next";

const PROGRAM: types::retired_place = types::retired_place::RETIRED_PROGRAM;

/// The sums of removed generations, by id of a rule or an upstream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retired {
    sums: BTreeMap<u32, Counts>,
    /// Program ids of generations whose lines are in the sums.
    programs: BTreeSet<u32>,
}

/// Reads the sums; there are none if no generation was ever removed.
pub fn read(guard: &ReadGuard) -> anyhow::Result<Retired> {
    let path = guard.state().join(PIN);
    if !path.try_exists()? {
        return Ok(Retired::default());
    }
    let map = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    let (mut retired, mut whole) = (Retired::default(), true);
    read_array(&map, map.max_entries(), |value| match from_bytes(value) {
        Some(part) => retired.add(part),
        None => whole = false,
    })?;
    whole.then_some(retired).with_context(|| format!("{}: another layout", path.display()))
}

/// Adds the counters of a generation that is about to be removed. `others` are those that remain.
pub fn keep(
    guard: &WriteGuard,
    counters: &Counters,
    gone: &Generation,
    others: &[&Generation],
) -> anyhow::Result<()> {
    let mut retired = read(guard)?;
    if retired.has(gone) {
        return Ok(());
    }
    let before = retired.clone();
    retired.add_generation(&lines::read(guard, gone)?, counters, gone, others)?;
    if retired == before {
        return Ok(());
    }
    // other generations are in the sums as long as a crash may have left them behind
    if guard.numbers()?.len() == others.len() + 1 {
        retired.programs.clear();
    }
    retired.programs.insert(gone.description.program.id);
    retired.write(guard)
}

/// Removes the sums of ids that are not `held`: such an id may be assigned to another rule or upstream.
pub fn retain(guard: &WriteGuard, held: &IdSet) -> anyhow::Result<()> {
    let mut retired = read(guard)?;
    let before = retired.sums.len();
    retired.sums.retain(|id, _| held.contains(*id));
    if retired.sums.len() == before { Ok(()) } else { retired.write(guard) }
}

impl Retired {
    /// Returns the sums by id.
    pub fn sums(&self) -> impl Iterator<Item = (u32, &Counts)> {
        self.sums.iter().map(|(id, counts)| (*id, counts))
    }

    /// Returns the sum of an id.
    pub fn of(&self, id: u32) -> &Counts {
        self.sums.get(&id).unwrap_or(&NONE)
    }

    /// Returns true if the lines of a generation are in the sums.
    pub fn has(&self, generation: &Generation) -> bool {
        self.programs.contains(&generation.description.program.id)
    }

    fn add(&mut self, part: types::retired) {
        match part.place {
            PROGRAM => drop(self.programs.insert(part.id)),
            place => self.sums.entry(part.id).or_default().add_part((place.0, part.values)),
        }
    }

    fn add_generation(
        &mut self,
        lines: &[(u32, Count)],
        counters: &Counters,
        gone: &Generation,
        others: &[&Generation],
    ) -> anyhow::Result<()> {
        for (id, count) in lines.iter().filter(|(_, count)| count.packets > 0) {
            self.sums.entry(*id).or_default().add_sent(*count);
        }
        let held: IdSet = others.iter().flat_map(|other| other.ids()).collect();
        for (rule, upstreams) in gone.counting().filter(|(rule, _)| held.contains(*rule)) {
            let lost = upstreams.iter().copied().filter(|id| !held.contains(*id));
            // an id may be listed twice
            for id in lost.collect::<BTreeSet<u32>>() {
                let mut counts = counters.of(id)?;
                counts += self.of(id);
                if counts != Counts::default() {
                    *self.sums.entry(rule).or_default() += &counts;
                }
            }
        }
        self.sums.retain(|id, _| held.contains(*id));
        Ok(())
    }

    fn parts(&self) -> Vec<types::retired> {
        let part = |id: u32| {
            move |(place, values): Part| {
                let place = types::retired_place(place);
                types::retired { id, place, values }
            }
        };
        let programs = self.programs.iter().map(|id| part(*id)((PROGRAM.0, [0, 0])));
        let sums =
            self.sums.iter().flat_map(|(id, counts)| counts.parts().into_iter().map(part(*id)));
        programs.chain(sums).collect()
    }

    /// Replaces the map.
    fn write(&self, guard: &WriteGuard) -> anyhow::Result<()> {
        let (path, next) = (guard.state().join(PIN), guard.state().join(NEXT));
        let parts = self.parts();
        let count = parts.len() as u32;
        let options = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
            ..Default::default()
        };
        let width = size_of::<types::retired>() as u32;
        let mut map =
            MapHandle::create(MapType::Array, Some(PIN), 4, width, count.max(1), &options)?;
        if count > 0 {
            let keys: Vec<u8> = (0..count).flat_map(u32::to_ne_bytes).collect();
            let values: Vec<u8> = parts.iter().flat_map(bytes_of).copied().collect();
            map.update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY)?;
        }
        if next.try_exists()? {
            fs::remove_file(&next)?;
        }
        map.pin(&next).with_context(|| next.display().to_string())?;
        fs::rename(&next, &path).with_context(|| path.display().to_string())
    }
}
