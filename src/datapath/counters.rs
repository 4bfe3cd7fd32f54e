//! Packets and bytes by verdict, under the ids of rules and upstreams.

use std::collections::BTreeMap;
use std::ops::{AddAssign, Sub};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::ptr;
use std::time::Duration;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use schemars::JsonSchema;
use serde::Serialize;

use crate::bpf::{NOTES, OpenUdplbSkel, VERDICTS, bytes_of, from_bytes, is_forwarded, types};
use crate::datapath::chunked_map::Chunks;

/// Packets and bytes; a GSO packet is its segments, bytes are with the Ethernet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
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

/// Difference of two readings; zero if the counter was reset between them.
impl Sub for Count {
    type Output = Count;

    fn sub(self, earlier: Count) -> Count {
        Count {
            packets: self.packets.saturating_sub(earlier.packets),
            bytes: self.bytes.saturating_sub(earlier.bytes),
        }
    }
}

/// Counters of one id, or their sum over several, in the order of [`VERDICTS`] and [`NOTES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(into = "Tally")]
pub struct Counts {
    verdicts: [Count; VERDICTS.len()],
    notes: [Count; NOTES.len()],
    forwarded: Moment,
    lost: Moment,
}

/// Time and verdict of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
struct Moment {
    /// Nanoseconds of CLOCK_MONOTONIC; 0: never.
    time: u64,
    verdict: u32,
}

impl From<Moment> for types::moment {
    fn from(Moment { time, verdict }: Moment) -> types::moment {
        types::moment { time, tick: 0, verdict: types::verdict(verdict) }
    }
}

impl From<types::moment> for Moment {
    fn from(moment: types::moment) -> Moment {
        Moment { time: moment.time, verdict: moment.verdict.0 }
    }
}

impl Counts {
    /// Each verdict's name and count.
    pub fn by_verdict(&self) -> impl Iterator<Item = (&'static str, Count)> {
        VERDICTS.iter().zip(self.verdicts).map(|((_, name), count)| (*name, count))
    }

    /// All packets that matched.
    pub fn matched(&self) -> Count {
        self.sum(|_| true)
    }

    /// Returns the packets that were sent to the upstream.
    pub fn forwarded(&self) -> Count {
        self.sum(is_forwarded)
    }

    /// Returns the packets that were dropped, by reason, without reasons that are zero.
    pub fn drops(&self) -> impl Iterator<Item = (&'static str, Count)> {
        let drops =
            VERDICTS.iter().zip(self.verdicts).filter(|((verdict, _), _)| !is_forwarded(*verdict));
        drops.map(|((_, name), count)| (*name, count)).filter(|(_, count)| count.packets > 0)
    }

    /// Returns the counters of [`NOTES`] that are not zero.
    pub fn notes(&self) -> impl Iterator<Item = (&'static str, Count)> {
        let notes = NOTES.iter().zip(self.notes).map(|((_, name), count)| (*name, count));
        notes.filter(|(_, count)| count.packets > 0)
    }

    #[cfg(test)]
    pub fn forwarded_at(time: Duration) -> Counts {
        let time = time.as_nanos() as u64;
        Counts { forwarded: Moment { time, verdict: 0 }, ..Counts::default() }
    }

    /// Time of the last packet that was to be sent, by CLOCK_MONOTONIC.
    pub fn last(&self) -> Option<Duration> {
        let last = self.forwarded.time.max(self.lost.time);
        (last != 0).then(|| Duration::from_nanos(last))
    }

    /// Time of the last packet that was to be sent and was not, and its verdict.
    pub fn last_lost(&self) -> Option<(Duration, &'static str)> {
        let name = VERDICTS.iter().find(|(verdict, _)| verdict.0 == self.lost.verdict)?.1;
        (self.lost.time != 0).then(|| (Duration::from_nanos(self.lost.time), name))
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Count> {
        self.verdicts.iter_mut().chain(&mut self.notes)
    }

    fn sum(&self, wanted: impl Fn(types::verdict) -> bool) -> Count {
        let mut sum = Count::default();
        for ((verdict, _), count) in VERDICTS.iter().zip(self.verdicts) {
            if wanted(*verdict) {
                sum += count;
            }
        }
        sum
    }
}

/// The places of the counts in the kernel's array.
fn places() -> impl Iterator<Item = usize> {
    VERDICTS.into_iter().chain(NOTES).map(|(what, _)| what.0 as usize)
}

impl AddAssign<&types::counters> for Counts {
    fn add_assign(&mut self, counters: &types::counters) {
        for (count, place) in self.all_mut().zip(places()) {
            let types::counter { packets, bytes } = counters.of[place];
            *count += Count { packets, bytes };
        }
        self.forwarded = self.forwarded.max(counters.forwarded.into());
        self.lost = self.lost.max(counters.lost.into());
    }
}

impl From<Counts> for types::counters {
    fn from(mut counts: Counts) -> types::counters {
        let mut counters = types::counters {
            forwarded: counts.forwarded.into(),
            lost: counts.lost.into(),
            ..Default::default()
        };
        for (count, place) in counts.all_mut().zip(places()) {
            let Count { packets, bytes } = *count;
            counters.of[place] = types::counter { packets, bytes };
        }
        counters
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        let others = other.verdicts.into_iter().chain(other.notes);
        for (mine, others) in self.all_mut().zip(others) {
            *mine += others;
        }
        self.forwarded = self.forwarded.max(other.forwarded);
        self.lost = self.lost.max(other.lost);
    }
}

/// Difference of two readings.
impl Sub for Counts {
    type Output = Counts;

    fn sub(mut self, earlier: Counts) -> Counts {
        let earlier = earlier.verdicts.into_iter().chain(earlier.notes);
        for (mine, earlier) in self.all_mut().zip(earlier) {
            *mine = *mine - earlier;
        }
        self
    }
}

/// Counters in output, without those that are zero: what matched is what was forwarded and what was
/// not.
#[derive(Serialize, JsonSchema)]
struct Tally {
    matched: Count,
    /// Sent to the upstream; the verdicts beside it are parts of this.
    forwarded: Count,
    #[serde(flatten)]
    parts: BTreeMap<&'static str, Count>,
    /// By reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    not_forwarded: BTreeMap<&'static str, Count>,
}

impl From<Counts> for Tally {
    fn from(counts: Counts) -> Tally {
        let parts = VERDICTS.iter().zip(counts.verdicts).filter(|((verdict, _), count)| {
            let whole = *verdict == types::verdict::VERDICT_FORWARDED;
            is_forwarded(*verdict) && !whole && count.packets > 0
        });
        Tally {
            matched: counts.matched(),
            forwarded: counts.forwarded(),
            parts: parts.map(|((_, name), count)| (*name, count)).collect(),
            not_forwarded: counts.drops().collect(),
        }
    }
}

/// Bytes that one system call reads at most: an id's counters are 416 for each CPU.
const BATCH: usize = 1 << 20;

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

    /// Returns the maximum number of ids.
    pub fn max_ids(&self) -> u32 {
        let width = self.0.iter().next().map_or(0, |(_, chunk)| chunk.max_entries());
        self.0.outer().max_entries() * width
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

    /// Returns the counters of each id up to `most`, summed over all CPUs; zero for ids without counters.
    pub fn read(&self, most: u32) -> anyhow::Result<Vec<Counts>> {
        let ids = most as usize + 1;
        let mut all = Vec::with_capacity(ids);
        for (_, chunk) in self.0.iter() {
            let left = ids.saturating_sub(all.len()).min(chunk.max_entries() as usize);
            read_chunk(chunk, left, &mut all)?;
        }
        all.resize(ids, Counts::default());
        Ok(all)
    }

    /// Returns the counters of one id, summed over all CPUs.
    pub fn of(&self, id: u32) -> anyhow::Result<Counts> {
        self.0.place(id).map_or(Ok(Counts::default()), |(chunk, key)| read_one(chunk, key))
    }
}

fn read_one(chunk: &MapHandle, key: u32) -> anyhow::Result<Counts> {
    let value = chunk.lookup_percpu(&key.to_ne_bytes(), MapFlags::ANY)?;
    sum(value.unwrap_or_default().iter().map(Vec::as_slice))
}

/// Appends the first entries of a chunk, many with one system call where the kernel can (5.13).
fn read_chunk(chunk: &MapHandle, entries: usize, all: &mut Vec<Counts>) -> anyhow::Result<()> {
    let width = size_of::<types::counters>() * libbpf_rs::num_possible_cpus()?;
    let most = (BATCH / width).max(1);
    let mut values = vec![0; most.min(entries) * width];
    let mut keys = vec![0_u32; most.min(entries)];
    let (mut place, mut last) = (0_u32, None::<u32>);
    while (place as usize) < entries {
        let wanted = most.min(entries - place as usize) as u32;
        let (mut read, mut next) = (wanted, 0_u32);
        // SAFETY: keys and values have room for `read` entries, the other pointers are to one key
        // each, and all of them outlive the call.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                chunk.as_fd().as_raw_fd(),
                last.as_mut().map_or(ptr::null_mut(), |key| ptr::from_mut(key).cast()),
                ptr::from_mut(&mut next).cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &mut read,
                ptr::null(),
            )
        };
        if result == 0 && read == wanted {
            for value in values.chunks_exact(width).take(read as usize) {
                all.push(sum(value.chunks_exact(size_of::<types::counters>()))?);
            }
            (place, last) = (place + read, Some(next));
        } else {
            all.push(read_one(chunk, place)?);
            (place, last) = (place + 1, Some(place));
        }
    }
    Ok(())
}

/// Over all CPUs.
fn sum<'a>(values: impl Iterator<Item = &'a [u8]>) -> anyhow::Result<Counts> {
    let mut counts = Counts::default();
    for value in values {
        let value: types::counters = from_bytes(value).context("counters of another layout")?;
        counts += &value;
    }
    Ok(counts)
}
