//! Packets and bytes by verdict, under the ids of rules and upstreams: all but what was forwarded to upstreams,
//! which is in the [lines](crate::datapath::lines) of each generation.

use std::collections::BTreeMap;
use std::ops::{AddAssign, Sub};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use schemars::JsonSchema;
use serde::Serialize;

use crate::bpf::{
    NOTES, OpenUdplbSkel, VERDICTS, bytes_of, from_bytes, is_forwarded, read_entry, read_mapped,
    types, zero_mapped,
};
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

/// Counters of one id, or their sum over several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(into = "Tally")]
pub struct Counts {
    /// By place in the kernel's array, sorted, without those that are zero: of 24 most ids have none or one.
    counts: Vec<(u8, Count)>,
    forwarded: Moment,
    lost: Moment,
}

/// Counters of an id that has counted nothing.
pub static NONE: Counts = {
    let never = Moment { time: 0, verdict: 0 };
    Counts { counts: Vec::new(), forwarded: never, lost: never }
};

/// Time and verdict of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, JsonSchema)]
struct Moment {
    /// Nanoseconds of CLOCK_MONOTONIC; 0: never.
    time: u64,
    verdict: u32,
}

impl From<types::moment> for Moment {
    fn from(moment: types::moment) -> Moment {
        Moment { time: moment.time, verdict: moment.verdict.0 }
    }
}

impl Counts {
    /// Each verdict's name and count.
    pub fn by_verdict(&self) -> impl Iterator<Item = (&'static str, Count)> {
        VERDICTS.iter().map(|(verdict, name)| (*name, self.at(*verdict)))
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
        let drops = VERDICTS.iter().filter(|(verdict, _)| !is_forwarded(*verdict));
        let drops = drops.map(|(verdict, name)| (*name, self.at(*verdict)));
        drops.filter(|(_, count)| count.packets > 0)
    }

    /// Returns the counters of [`NOTES`] that are not zero.
    pub fn notes(&self) -> impl Iterator<Item = (&'static str, Count)> {
        let notes = NOTES.iter().map(|(note, name)| (*name, self.at(*note)));
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

    fn at(&self, verdict: types::verdict) -> Count {
        let found = self.counts.iter().find(|(place, _)| u32::from(*place) == verdict.0);
        found.map_or_else(Count::default, |(_, count)| *count)
    }

    fn add(&mut self, place: u8, count: Count) {
        if count == Count::default() {
            return;
        }
        match self.counts.binary_search_by_key(&place, |(place, _)| *place) {
            Ok(index) => self.counts[index].1 += count,
            Err(index) => self.counts.insert(index, (place, count)),
        }
    }

    fn sum(&self, wanted: impl Fn(types::verdict) -> bool) -> Count {
        let mut sum = Count::default();
        for (place, count) in &self.counts {
            let is_note = usize::from(*place) >= VERDICTS.len();
            if !is_note && wanted(types::verdict(u32::from(*place))) {
                sum += *count;
            }
        }
        sum
    }
}

/// The places of the counts in the kernel's array.
fn places() -> impl Iterator<Item = u8> {
    VERDICTS.into_iter().chain(NOTES).map(|(what, _)| what.0 as u8)
}

impl AddAssign<&types::counters> for Counts {
    fn add_assign(&mut self, counters: &types::counters) {
        for place in places() {
            let types::counter { packets, bytes } = counters.of[usize::from(place)];
            self.add(place, Count { packets, bytes });
        }
        self.forwarded = self.forwarded.max(counters.forwarded.into());
        self.lost = self.lost.max(counters.lost.into());
    }
}

/// Retired counters: a value that is not zero, and its place.
pub type Part = (u32, [u64; 2]);

const FORWARDED: u32 = types::retired_place::RETIRED_FORWARDED.0;
const LOST: u32 = types::retired_place::RETIRED_LOST.0;

impl Counts {
    /// Returns packets that were forwarded to an upstream.
    pub fn sent(count: Count) -> Counts {
        let mut counts = Counts::default();
        counts.add_sent(count);
        counts
    }

    /// Adds packets that were forwarded to an upstream.
    pub fn add_sent(&mut self, count: Count) {
        self.add_part((types::verdict::VERDICT_FORWARDED.0, [count.packets, count.bytes]));
    }

    /// Returns everything that is not zero.
    pub fn parts(&self) -> Vec<Part> {
        let counts = self.counts.iter();
        let mut parts: Vec<Part> = counts
            .map(|(place, count)| (u32::from(*place), [count.packets, count.bytes]))
            .collect();
        for (place, moment) in [(FORWARDED, self.forwarded), (LOST, self.lost)] {
            parts.push((place, [moment.time, moment.verdict.into()]));
        }
        parts.retain(|(_, values)| values[0] != 0);
        parts
    }

    /// Adds one of [`Counts::parts`]; ignores places of no counter.
    pub fn add_part(&mut self, (place, [first, second]): Part) {
        let moment = Moment { time: first, verdict: second as u32 };
        match place {
            FORWARDED => self.forwarded = self.forwarded.max(moment),
            LOST => self.lost = self.lost.max(moment),
            _ => {
                if let Some(place) = places().find(|it| u32::from(*it) == place) {
                    self.add(place, Count { packets: first, bytes: second });
                }
            }
        }
    }
}

impl AddAssign<&Counts> for Counts {
    fn add_assign(&mut self, other: &Counts) {
        for (place, count) in &other.counts {
            self.add(*place, *count);
        }
        self.forwarded = self.forwarded.max(other.forwarded);
        self.lost = self.lost.max(other.lost);
    }
}

/// Difference of two readings.
impl Sub for &Counts {
    type Output = Counts;

    fn sub(self, earlier: &Counts) -> Counts {
        let mut grown = Counts { counts: Vec::new(), ..*self };
        for (place, count) in &self.counts {
            grown.add(*place, *count - earlier.at(types::verdict(u32::from(*place))));
        }
        grown
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
        let parts = VERDICTS.iter().filter(|(verdict, _)| {
            is_forwarded(*verdict) && *verdict != types::verdict::VERDICT_FORWARDED
        });
        let parts = parts.map(|(verdict, name)| (*name, counts.at(*verdict)));
        Tally {
            matched: counts.matched(),
            forwarded: counts.forwarded(),
            parts: parts.filter(|(_, count)| count.packets > 0).collect(),
            not_forwarded: counts.drops().collect(),
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

    /// Returns the maximum number of ids.
    pub fn max_ids(&self) -> u32 {
        let width = self.0.iter().next().map_or(0, |(_, chunk)| chunk.max_entries());
        self.0.outer().max_entries() * width
    }

    /// Returns the number of ids that have counters.
    pub fn room(&self) -> u32 {
        self.0.room()
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
        // by the first id of their chunk
        let mut places: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for id in new.filter(|id| *id < used) {
            let (_, place) = self.0.place(id).context("an id without counters")?;
            places.entry(id - place).or_default().push(place as usize);
        }
        for (first, chunk) in self.0.iter() {
            let Some(places) = places.get(&first) else { continue };
            zero_mapped::<types::counters>(chunk.as_fd(), chunk.max_entries() as usize, places)
                .with_context(|| format!("counters from id {first}"))?;
        }
        Ok(())
    }

    /// Returns the counters of the ids up to `most` that are not zero.
    pub fn read(&self, most: u32) -> anyhow::Result<BTreeMap<u32, Counts>> {
        let mut all = Vec::new();
        for (first, chunk) in self.0.iter().take_while(|(first, _)| *first <= most) {
            let ids = (most - first + 1).min(chunk.max_entries());
            let mut id = first;
            read_mapped(chunk.as_fd(), ids as usize, |value: &types::counters| {
                if bytes_of(value).chunks_exact(8).any(|word| word != [0; 8]) {
                    let mut counts = Counts::default();
                    counts += value;
                    all.push((id, counts));
                }
                id += 1;
            })
            .with_context(|| format!("counters from id {first}"))?;
        }
        Ok(all.into_iter().collect())
    }

    /// Returns the counters of one id.
    pub fn of(&self, id: u32) -> anyhow::Result<Counts> {
        let Some((chunk, key)) = self.0.place(id) else { return Ok(Counts::default()) };
        counts(&read_entry(chunk, key, MapFlags::ANY)?).context(OTHER)
    }

    /// See [`Chunks::settle`].
    pub fn settle(&self) -> anyhow::Result<()> {
        self.0.settle()
    }
}

const OTHER: &str = "counters of another layout";

/// Returns the counts in an entry of a chunk; `None` if it has another layout.
fn counts(value: &[u8]) -> Option<Counts> {
    let mut counts = Counts::default();
    counts += &from_bytes::<types::counters>(value)?;
    Some(counts)
}
