//! This host's addresses and VLANs, as tables of the packet path.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::{bytes_of, types, wire};
use crate::datapath::state_maps::StateMaps;
use crate::desired::Desired;
use crate::net::Netlink;
use crate::net::link::{Link, OwnAddress};

/// `enum own` of udplb.h, which the skeleton has not: no map is of that type.
const OWN_ADDRESS: u32 = 1;
const OWN_BROADCAST: u32 = 2;

/// Entries of a map, key by key.
type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    own: BTreeMap<IpAddr, u32>,
    vlans: Entries,
}

impl Environment {
    pub async fn read(netlink: &Netlink) -> anyhow::Result<Environment> {
        Ok(Environment::new(&netlink.addresses().await?, &netlink.links().await?))
    }

    fn new(addresses: &[OwnAddress], links: &[Link]) -> Environment {
        let broadcasts = addresses.iter().filter_map(|own| own.broadcast);
        // an address counts as such where it is a broadcast address, too
        let own = broadcasts.map(|address| (address, OWN_BROADCAST));
        let own = own.chain(addresses.iter().map(|own| (own.address, OWN_ADDRESS))).collect();
        Environment { own, vlans: links.iter().flat_map(|link| vlans(link, links)).collect() }
    }

    /// Tells the program. `all` are the configurations of all generations; with `keep` there may be others,
    /// whose answers are still looked for.
    pub fn write<'a>(
        &self,
        maps: &StateMaps,
        all: impl Iterator<Item = &'a Desired>,
        keep: bool,
    ) -> anyhow::Result<()> {
        let own = self.own.iter().map(|(address, kind)| {
            (words_of(*address).flat_map(u32::to_ne_bytes).collect(), kind.to_ne_bytes().to_vec())
        });
        let answering = all.flat_map(Desired::upstreams).map(|upstream| upstream.address.ip);
        maps.gate.suspect(self.own.keys().copied().chain(answering), keep);
        replace(&maps.own, &own.collect()).context("state/own")?;
        replace(&maps.vlans, &self.vlans).context("state/vlans")
    }
}

fn words_of(address: IpAddr) -> impl Iterator<Item = u32> {
    wire(address).into_iter()
}

/// The frames that are taken off an interface by what is stacked on it.
fn vlans<'a>(link: &'a Link, links: &'a [Link]) -> impl Iterator<Item = (Vec<u8>, Vec<u8>)> + 'a {
    let entry = |key: types::vlan_key, link: &Link| {
        let mac = link.mac.unwrap_or_default();
        let vlan = types::vlan { ifindex: link.index, mac, unused: 0 };
        (bytes_of(&key).to_vec(), bytes_of(&vlan).to_vec())
    };
    let vlan = link.vlan.zip(link.lower).filter(|_| link.up).map(|((protocol, id), lower)| {
        let key = types::vlan_key { ifindex: lower, protocol: protocol.to_be(), id };
        entry(key, link)
    });
    // it decides by itself; a VRF takes no frames
    let controller = link.controller.and_then(|index| links.iter().find(|it| it.index == index));
    let all = controller.filter(|controller| controller.kind != "vrf").map(|controller| {
        let key = types::vlan_key { ifindex: link.index, protocol: 0, id: 0 };
        entry(key, controller)
    });
    vlan.into_iter().chain(all)
}

/// Makes a hash hold these entries, and leaves alone those that are the same.
fn replace(map: &MapHandle, entries: &Entries) -> anyhow::Result<()> {
    for (key, value) in entries.iter().take(map.max_entries() as usize) {
        if map.lookup(key, MapFlags::ANY)?.as_ref() != Some(value) {
            map.update(key, value, MapFlags::ANY)?;
        }
    }
    let gone: Vec<Vec<u8>> = map.keys().filter(|key| !entries.contains_key(key)).collect();
    gone.iter().try_for_each(|key| Ok(map.delete(key)?))
}

#[cfg(test)]
mod tests {
    use super::{Environment, OWN_ADDRESS, OWN_BROADCAST};
    use crate::bpf::{from_bytes, types};
    use crate::net::link::{Layer, Link, OwnAddress};

    fn link(index: u32, kind: &str) -> Link {
        Link {
            index,
            name: format!("if{index}"),
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            mtu: 1500,
            up: true,
            carrier: true,
            layer: Some(Layer::Ethernet),
            kind: kind.into(),
            ..Link::default()
        }
    }

    #[test]
    fn vlans_are_those_of_devices_that_are_up() {
        let vlan = |index, lower, protocol, id| Link {
            lower: Some(lower),
            vlan: Some((protocol, id)),
            ..link(index, "vlan")
        };
        let links = [
            link(2, ""),
            vlan(3, 2, 0x8100, 100),
            Link { up: false, ..vlan(4, 2, 0x8100, 200) },
            // of the provider, and within
            vlan(5, 2, 0x88a8, 300),
            vlan(6, 5, 0x8100, 7),
            link(7, "bridge"),
            Link { controller: Some(7), ..link(8, "veth") },
            link(9, "vrf"),
            Link { controller: Some(9), ..link(10, "veth") },
        ];
        let environment = Environment::new(&[], &links);
        let found: Vec<(u32, u16, u16, u32)> = environment
            .vlans
            .iter()
            .map(|(key, value)| {
                let key: types::vlan_key = from_bytes(key).expect("a key");
                let value: types::vlan = from_bytes(value).expect("a value");
                (key.ifindex, u16::from_be(key.protocol), key.id, value.ifindex)
            })
            .collect();
        let wanted = [(2, 0x8100, 100, 3), (2, 0x88a8, 300, 5), (5, 0x8100, 7, 6), (8, 0, 0, 7)];
        assert_eq!(found, wanted);
    }

    #[test]
    fn an_address_is_more_than_a_broadcast_address() {
        let own = |address: [u8; 4], broadcast: [u8; 4]| OwnAddress {
            ifindex: 2,
            address: address.into(),
            broadcast: Some(broadcast.into()),
            network: std::net::IpAddr::from(address).into(),
            tentative: false,
        };
        let environment = Environment::new(
            &[own([10, 0, 0, 1], [10, 0, 0, 255]), own([10, 0, 0, 255], [10, 0, 1, 255])],
            &[],
        );
        let kinds: Vec<u32> = environment.own.into_values().collect();
        assert_eq!(kinds, [OWN_ADDRESS, OWN_ADDRESS, OWN_BROADCAST]);
    }
}
