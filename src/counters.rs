//! Packets and bytes by verdict, under the ids of rules and upstreams.

use std::ops::AddAssign;
use std::path::Path;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use serde::Serialize;

use crate::bpf::{OpenUdplbSkel, VERDICTS, bytes_of, from_bytes, is_forwarded, types};
use crate::chunks::Chunks;

/// Packets and bytes; a GSO packet is its segments, bytes are with the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// What was counted under one id, or the sum over several, by verdict in the order of [`VERDICTS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([Count; VERDICTS.len()]);

impl Counts {
    /// Each verdict's name and count.
    pub fn by_verdict(&self) -> impl Iterator<Item = (&'static str, Count)> {
        VERDICTS.iter().zip(self.0).map(|((_, name), count)| (*name, count))
    }

    /// All packets that matched.
    pub fn matched(&self) -> Count {
        self.sum(|_| true)
    }

    /// Those that went to the upstream.
    pub fn forwarded(&self) -> Count {
        self.sum(is_forwarded)
    }

    fn sum(&self, wanted: impl Fn(types::verdict) -> bool) -> Count {
        let mut sum = Count::default();
        for ((verdict, _), count) in VERDICTS.iter().zip(self.0) {
            if wanted(*verdict) {
                sum += count;
            }
        }
        sum
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        for (mine, others) in self.0.iter_mut().zip(other.0) {
            *mine += others;
        }
    }
}

/// The table of counters.
pub struct Counters(Chunks);

impl Counters {
    /// See [`Chunks::open`].
    pub fn open(outer: MapHandle, state: &Path) -> anyhow::Result<Counters> {
        Ok(Counters(Chunks::open(outer, state, "counters")?))
    }

    /// See [`Chunks::is_whole`].
    pub fn is_whole(&self) -> anyhow::Result<bool> {
        self.0.is_whole()
    }

    /// The map that the program looks into.
    pub fn outer(&self) -> &MapHandle {
        self.0.outer()
    }

    /// Makes room for `ids`, and sets to zero those of them that are `new`: whoever had them
    /// before is gone.
    pub fn prepare(
        &mut self,
        skeleton: &OpenUdplbSkel<'_>,
        ids: impl Iterator<Item = u32>,
        new: impl Iterator<Item = u32>,
    ) -> anyhow::Result<()> {
        let used = self.0.room();
        self.0.grow(&skeleton.maps.counters_chunk, ids.max().unwrap_or(0))?;
        let zeroes =
            vec![bytes_of(&types::counters::default()).to_vec(); libbpf_rs::num_possible_cpus()?];
        for id in new.filter(|id| *id < used) {
            let (chunk, key) = self.0.place(id).context("an id without counters")?;
            chunk.update_percpu(&key.to_ne_bytes(), &zeroes, MapFlags::ANY)?;
        }
        Ok(())
    }

    /// What was counted under an id, over all CPUs. An id without counters has counted nothing.
    pub fn read(&self, id: u32) -> anyhow::Result<Counts> {
        let mut counts = Counts::default();
        let Some((chunk, key)) = self.0.place(id) else { return Ok(counts) };
        let values = chunk.lookup_percpu(&key.to_ne_bytes(), MapFlags::ANY)?.unwrap_or_default();
        for value in values {
            let value: types::counters =
                from_bytes(&value).context("counters of another layout")?;
            for (count, (verdict, _)) in counts.0.iter_mut().zip(VERDICTS) {
                let counter = value.of[verdict.0 as usize];
                *count += Count { packets: counter.packets, bytes: counter.bytes };
            }
        }
        Ok(counts)
    }
}
