//! The tables of the senders that rules count, a map for each rule. Each generation pins those of its rules, and a
//! new one takes over those of a generation before that have the same size. Packets are counted without locks: a
//! place whose address does not fit its tag was given to two senders at once, and is left out.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{
    self, OpenUdplbSkel, create, read_mapped, types, types::sender_tag as tags, unwire,
};
use crate::config::Family;
use crate::datapath::description::Generation;
use crate::datapath::pins::ReadGuard;
use crate::datapath::{flows, lease};
use crate::desired::sender_tables::{self, SenderClock, SenderTable};
use crate::desired::{Rule, RuleIds};

/// Creates the tables of a new generation, or takes them over, and pins them in its directory.
pub fn prepare(
    guard: &ReadGuard,
    skeleton: &mut OpenUdplbSkel<'_>,
    directory: &Path,
    tables: &[SenderTable],
    others: &[&Generation],
) -> anyhow::Result<()> {
    let maps = &mut skeleton.maps;
    let mut numbers: Vec<u32> = others.iter().map(|other| other.number).collect();
    numbers.sort_unstable_by(|one, other| other.cmp(one));
    let mut all = Vec::with_capacity(tables.len());
    for table in tables {
        maps.sender_buckets.set_max_entries(table.buckets())?;
        let same = |number: &u32| {
            let path = pin(&guard.generation(*number), table.rule);
            bpf::pinned_alike(&path, &maps.sender_buckets)
        };
        let mut map = match numbers.iter().find_map(same) {
            Some(pinned) => pinned,
            None => create(&maps.sender_buckets, None)?,
        };
        let path = pin(directory, table.rule);
        map.pin(&path).with_context(|| path.display().to_string())?;
        all.push(map);
    }
    let Some(model) = all.first() else {
        return Ok(maps.sender_tables.set_autocreate(false)?);
    };
    maps.sender_tables.set_max_entries(u32::try_from(all.len())?)?;
    let outer = create(&maps.sender_tables, Some(model.as_fd()))?;
    for (index, map) in (0_u32..).zip(&all) {
        let value = map.as_fd().as_raw_fd().to_ne_bytes();
        outer.update(&index.to_ne_bytes(), &value, MapFlags::ANY).context("sender_tables")?;
    }
    Ok(maps.sender_tables.reuse_fd(outer.as_fd())?)
}

/// Returns the pin of a rule's table in a generation's directory.
fn pin(generation: &Path, rule: u32) -> PathBuf {
    generation.join(format!("senders-{rule}"))
}

/// Returns an error if the table of one of a generation's rules cannot be opened.
pub fn check(directory: &Path, rules: &[Rule], ids: &[RuleIds]) -> anyhow::Result<()> {
    let counting = rules.iter().zip(ids).filter(|(rule, _)| rule.senders.is_some());
    for (_, ids) in counting {
        let path = pin(directory, ids.rule);
        MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// A sender, known or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub address: IpAddr,
    /// No rule takes its packets.
    pub refused: bool,
    pub packets: u64,
    pub bytes: u64,
    /// First and last packet, by a [`SenderClock`].
    pub first: u32,
    pub last: u32,
}

/// Returns the clock that the times of a generation's senders are of.
pub fn clock(generation: &Generation) -> anyhow::Result<SenderClock> {
    let settings = sender_tables::settings(lease::ticks_per_second()?);
    Ok(SenderClock { clock: flows::clock(generation)?, settings })
}

/// The tables of a generation.
pub struct SenderTables<'a> {
    guard: &'a ReadGuard,
    generation: &'a Generation,
    secret: u64,
}

impl<'a> SenderTables<'a> {
    pub fn open(guard: &'a ReadGuard, generation: &'a Generation) -> anyhow::Result<Self> {
        Ok(SenderTables { guard, generation, secret: flows::secret(guard)? })
    }

    /// Passes the senders of a rule that counts them to `each`, in no order. A sender may come twice.
    pub fn read(&self, rule: &Rule, ids: &RuleIds, each: impl FnMut(Record)) -> anyhow::Result<()> {
        let path = pin(&self.guard.generation(self.generation.number), ids.rule);
        let context = || path.display().to_string();
        let map = MapHandle::from_pinned_path(&path).with_context(context)?;
        read_table(&map, self.secret, rule.family() == Family::V6, each).with_context(context)
    }
}

/// Passes the senders in a table to `each`, in no order. `secret` is that of their hashes.
pub fn read_table(
    table: &MapHandle,
    secret: u64,
    ipv6: bool,
    mut each: impl FnMut(Record),
) -> io::Result<()> {
    read_mapped(table.as_fd(), table.max_entries() as usize, |bucket| {
        records(bucket, secret, ipv6).for_each(&mut each);
    })
}

/// Returns the senders in a bucket.
fn records(bucket: &types::sender_bucket, secret: u64, ipv6: bool) -> impl Iterator<Item = Record> {
    let places = bucket.tags.iter().zip(&bucket.senders).zip(bucket.first.iter().zip(&bucket.last));
    places.filter_map(move |((tag, sender), (first, last))| {
        let types::sender { high, low, packets, bytes } = *sender;
        let hash = sender_tables::hash(secret, high, low) as u32;
        let is_whole = tag.0 & tags::SENDER_USED.0 != 0
            && (tag.0 ^ hash) & !tags::SENDER_FLAGS.0 == 0
            && (ipv6 || high == 0);
        let words = match ipv6 {
            true => [high >> 32, high, low >> 32, low],
            false => [low, 0, 0, 0],
        };
        is_whole.then(|| Record {
            address: unwire(words.map(|word| word as u32), ipv6),
            refused: tag.0 & tags::SENDER_REFUSED.0 != 0,
            packets,
            bytes,
            first: *first,
            last: *last,
        })
    })
}
