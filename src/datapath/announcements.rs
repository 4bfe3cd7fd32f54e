//! Announced addresses: where arpd has put them, and those that are withdrawn by command.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, from_bytes, types};
use crate::datapath::pins::WriteGuard;
use crate::datapath::state_maps::INCOMPLETE;
use crate::time;

/// Stands for all addresses in a withdrawal.
pub const ALL: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// An address, and the index of the interface that it is on.
pub type Place = (IpAddr, u32);

/// The records, each with its time in seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Addresses that arpd has put on interfaces. Others on the same interfaces belong to someone else.
    pub placed: BTreeMap<Place, u64>,
    /// Addresses that `udplb withdraw` has named, or [`ALL`].
    pub withdrawn: BTreeMap<IpAddr, u64>,
}

impl Records {
    /// Returns the time of the withdrawal by command that holds for an address.
    pub fn withdrawal(&self, address: IpAddr) -> Option<u64> {
        [ALL, address].iter().find_map(|address| self.withdrawn.get(address)).copied()
    }
}

/// The map of records. Only the holder of the write guard writes to it.
pub struct Announcements(Option<MapHandle>);

impl Announcements {
    /// None in a directory of an older udplb.
    pub fn new(map: Option<MapHandle>) -> Announcements {
        Announcements(map)
    }

    /// Returns all records.
    pub fn read(&self) -> anyhow::Result<Records> {
        let mut records = Records::default();
        let Some(map) = &self.0 else { return Ok(records) };
        for key in map.keys() {
            let Some(time) = map.lookup(&key, MapFlags::ANY)? else { continue };
            let layout = "state/announcements has another layout";
            let since = u64::from_ne_bytes(time.try_into().ok().context(layout)?);
            let key: types::announcement_key = from_bytes(&key).context(layout)?;
            let address = Ipv6Addr::from(key.address).to_canonical();
            match key.ifindex {
                0 => records.withdrawn.insert(address, since),
                ifindex => records.placed.insert((address, ifindex), since),
            };
        }
        Ok(records)
    }

    /// Records that an address is put on an interface.
    pub fn place(&self, guard: &WriteGuard, place: Place) -> anyhow::Result<()> {
        self.insert(guard, place)
    }

    /// Removes the record of an address on an interface.
    pub fn forget(&self, guard: &WriteGuard, place: Place) -> anyhow::Result<()> {
        self.delete(guard, place)
    }

    /// Records a withdrawal by command, of an address or of [`ALL`].
    pub fn withdraw(&self, guard: &WriteGuard, address: IpAddr) -> anyhow::Result<()> {
        self.insert(guard, (address, 0))
    }

    /// Removes the record of a withdrawal.
    pub fn restore(&self, guard: &WriteGuard, address: IpAddr) -> anyhow::Result<()> {
        self.delete(guard, (address, 0))
    }

    fn insert(&self, _: &WriteGuard, place: Place) -> anyhow::Result<()> {
        let map = self.0.as_ref().context(INCOMPLETE)?;
        Ok(map.update(bytes_of(&key(place)), &time::now().to_ne_bytes(), MapFlags::ANY)?)
    }

    fn delete(&self, _: &WriteGuard, place: Place) -> anyhow::Result<()> {
        let Some(map) = &self.0 else { return Ok(()) };
        match map.delete(bytes_of(&key(place))) {
            Err(error) if error.kind() != libbpf_rs::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

fn key((address, ifindex): Place) -> types::announcement_key {
    let address = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    types::announcement_key { address: address.octets(), ifindex }
}
