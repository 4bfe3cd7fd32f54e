//! What outlives generations about interfaces: where udplb was taken off by command, where the clsact is
//! its own, and how often arpd put the filter back.

use std::collections::BTreeMap;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, from_bytes, types};
use crate::datapath::pins::WriteGuard;

/// What is remembered of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Index of the interface; one with another index is another interface. 0: it was missing, and the
    /// next one of that name is meant.
    pub index: u32,
    /// `detach`, or an apply that no longer names it, has taken the filter off.
    pub detached: bool,
    /// The clsact was made by udplb.
    pub clsact: bool,
    /// How often arpd put back a filter that somebody else had removed.
    pub reattached: u64,
}

impl Mark {
    /// Returns true for the interface with this index.
    pub fn is_of(&self, index: u32) -> bool {
        [0, index].contains(&self.index)
    }
}

/// The marks, by the interface's name.
pub struct Marks(Option<MapHandle>);

impl Marks {
    /// None in a directory of an older udplb.
    pub fn new(map: Option<MapHandle>) -> Marks {
        Marks(map)
    }

    /// Returns all of them.
    pub fn read(&self) -> anyhow::Result<BTreeMap<String, Mark>> {
        let keys = self.0.iter().flat_map(MapCore::keys);
        let marks = keys.map(|key| {
            let length = key.iter().position(|byte| *byte == 0).unwrap_or(key.len());
            let name = String::from_utf8_lossy(&key[..length]).into_owned();
            let mark = self.get(&name)?.unwrap_or_default();
            Ok((name, mark))
        });
        marks.collect()
    }

    /// Returns that of one interface.
    pub fn get(&self, interface: &str) -> anyhow::Result<Option<Mark>> {
        let Some(map) = &self.0 else { return Ok(None) };
        let Some(bytes) = map.lookup(&key(interface), MapFlags::ANY)? else { return Ok(None) };
        let mark: types::mark = from_bytes(&bytes).context("state/marks has another layout")?;
        Ok(Some(Mark {
            index: mark.ifindex,
            detached: mark.detached != 0,
            clsact: mark.clsact != 0,
            reattached: mark.reattached,
        }))
    }

    /// Sets or removes that of one interface.
    pub fn set(&self, _: &WriteGuard, interface: &str, mark: Option<Mark>) -> anyhow::Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        let Some(mark) = mark else {
            return match map.delete(&key(interface)) {
                Err(error) if error.kind() != libbpf_rs::ErrorKind::NotFound => Err(error.into()),
                _ => Ok(()),
            };
        };
        let value = types::mark {
            reattached: mark.reattached,
            ifindex: mark.index,
            detached: mark.detached.into(),
            clsact: mark.clsact.into(),
            ..Default::default()
        };
        map.update(&key(interface), bytes_of(&value), MapFlags::ANY).context("state/marks")
    }
}

/// A name fills the key with zeroes (`IFNAMSIZ`).
fn key(interface: &str) -> [u8; 16] {
    let mut key = [0; 16];
    key.iter_mut().zip(interface.bytes()).for_each(|(to, from)| *to = from);
    key
}
