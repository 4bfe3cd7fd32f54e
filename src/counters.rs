//! Packets and bytes by verdict, under the ids of rules and upstreams.

use std::ops::AddAssign;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapInfo};
use serde::Serialize;

use crate::bpf::{OpenUdplbSkel, VERDICTS, bytes_of, from_bytes, is_forwarded, types};
use crate::state;

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

/// The table of counters: an array of chunks, each a per-CPU array that is made on demand.
pub struct Counters {
    outer: MapHandle,
    chunks: Vec<MapHandle>,
    state: PathBuf,
}

impl Counters {
    /// `state` is the directory where the chunks are pinned, as `counters-0` and so on: reading
    /// them out of `outer` would take CAP_SYS_ADMIN.
    pub fn open(outer: MapHandle, state: &Path) -> anyhow::Result<Counters> {
        let mut counters = Counters { outer, chunks: Vec::new(), state: state.into() };
        while counters.pin(counters.chunks.len()).try_exists()? {
            let path = counters.pin(counters.chunks.len());
            let chunk = MapHandle::from_pinned_path(&path);
            counters.chunks.push(chunk.with_context(|| path.display().to_string())?);
        }
        Ok(counters)
    }

    fn pin(&self, chunk: usize) -> PathBuf {
        self.state.join(format!("counters-{chunk}"))
    }

    /// Every chunk that the program counts into is pinned. One that is pinned only was made by
    /// an apply that went no further.
    pub fn is_whole(&self) -> anyhow::Result<bool> {
        for index in 0..=self.chunks.len() {
            let key = u32::try_from(index)?.to_ne_bytes();
            let Some(used) = self.outer.lookup(&key, MapFlags::ANY)? else { continue };
            match self.chunks.get(index) {
                Some(chunk) if used == map_id(chunk)?.to_ne_bytes() => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The map that the program looks into.
    pub fn outer(&self) -> &MapHandle {
        &self.outer
    }

    /// Ids below this have counters.
    fn room(&self) -> u32 {
        self.chunks.iter().map(MapCore::max_entries).sum()
    }

    /// Makes room for `ids`, and sets to zero those of them that are `new`: whoever had them
    /// before is gone.
    pub fn prepare(
        &mut self,
        skeleton: &OpenUdplbSkel<'_>,
        ids: impl Iterator<Item = u32>,
        new: impl Iterator<Item = u32>,
    ) -> anyhow::Result<()> {
        let used = self.room();
        let most = ids.max().unwrap_or(0);
        while self.room() <= most {
            let mut chunk = state::create(&skeleton.maps.counters_chunk, None)?;
            let index = self.chunks.len();
            let path = self.pin(index);
            chunk.pin(&path).with_context(|| path.display().to_string())?;
            self.chunks.push(chunk);
        }
        for (index, chunk) in self.chunks.iter().enumerate() {
            self.link(index as u32, chunk).with_context(|| format!("counters[{index}]"))?;
        }
        let zeroes =
            vec![bytes_of(&types::counters::default()).to_vec(); libbpf_rs::num_possible_cpus()?];
        for id in new.filter(|id| *id < used) {
            let (chunk, key) = self.place(id).context("an id without counters")?;
            chunk.update_percpu(&key.to_ne_bytes(), &zeroes, MapFlags::ANY)?;
        }
        Ok(())
    }

    /// Puts a chunk in its place, unless it is there: the kernel lets an RCU grace period pass
    /// after each write to a map of maps.
    fn link(&self, index: u32, chunk: &MapHandle) -> anyhow::Result<()> {
        let key = index.to_ne_bytes();
        if self.outer.lookup(&key, MapFlags::ANY)? != Some(map_id(chunk)?.to_ne_bytes().to_vec()) {
            let fd = chunk.as_fd().as_raw_fd();
            self.outer.update(&key, &fd.to_ne_bytes(), MapFlags::ANY)?;
        }
        Ok(())
    }

    fn place(&self, id: u32) -> Option<(&MapHandle, u32)> {
        let width = self.chunks.first()?.max_entries();
        Some((self.chunks.get((id / width) as usize)?, id % width))
    }

    /// What was counted under an id, over all CPUs. An id without counters has counted nothing.
    pub fn read(&self, id: u32) -> anyhow::Result<Counts> {
        let mut counts = Counts::default();
        let Some((chunk, key)) = self.place(id) else { return Ok(counts) };
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

fn map_id(map: &MapHandle) -> anyhow::Result<u32> {
    Ok(MapInfo::new(map.as_fd())?.info.id)
}
