//! State of interfaces that outlives generations: detached by command, clsact created by udplb, number of
//! times that arpd has attached the filter again.

use std::collections::BTreeMap;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, from_bytes, types};
use crate::datapath::pins::WriteGuard;

/// Mark of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Index of the interface; a recreated one has another index. 0: the interface was missing, and the
    /// mark is for the next one of that name.
    pub index: u32,
    /// The filter was removed by `detach`, or by an apply that no longer names the interface.
    pub detached: bool,
    /// The clsact was made by udplb.
    pub clsact: bool,
    /// Number of times that arpd has attached the filter again after another program removed it.
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

    /// Returns all marks.
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

    /// Returns the mark of an interface.
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

    /// Sets or removes the mark of an interface.
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

/// Returns a name as a key, padded with zeroes (`IFNAMSIZ`).
fn key(interface: &str) -> [u8; 16] {
    let mut key = [0; 16];
    key.iter_mut().zip(interface.bytes()).for_each(|(to, from)| *to = from);
    key
}
