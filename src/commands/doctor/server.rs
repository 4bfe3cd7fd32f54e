//! Facts about this host as an upstream of rules with `reply: direct` elsewhere, which has the addresses of their
//! keys.

use std::net::IpAddr;

use anyhow::Context;

use super::facts::sysctl;
use crate::config::Address;
use crate::desired::Desired;
use crate::error::Result;
use crate::net::Netlink;
use crate::net::link::{LOOPBACK, Layer, Link, OwnAddress};
use crate::net::nexthop::{self, NextHop};
use crate::net::routing::{Senders, Target};

/// Kinds of devices that take IP headers off.
const TUNNELS: [&str; 3] = ["ipip", "ip6tnl", "sit"];

/// Kind of the devices that hold addresses and have no link.
const DUMMY: &str = "dummy";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerFacts {
    /// Addresses of the balancers' keys: those that are named, or all that the loopback interface and dummies have.
    pub addresses: Vec<ServedAddress>,
    /// Ethernet interfaces that are up and have an IPv4 address.
    pub links: Vec<ServerLink>,
    /// Tunnel devices that are up.
    pub tunnels: Vec<Tunnel>,
    /// Outer headers are taken off by `decap`.
    pub decap: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedAddress {
    pub address: IpAddr,
    pub place: Place,
}

/// Place of an address on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Nowhere,
    /// On the loopback interface or a dummy, or by a route of type `local`.
    Hidden,
    /// On an interface with a link, with the length of its prefix.
    Link(String, u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerLink {
    pub name: String,
    /// Sysctls of ARP, as they apply there.
    pub arp_ignore: i64,
    pub arp_announce: i64,
    /// Hidden IPv4 addresses that are in a network of the interface.
    pub near: Vec<IpAddr>,
    /// Packets in outer headers are expected there.
    pub takes_tunnels: bool,
    /// Strict reverse path filtering.
    pub strict: bool,
    /// The default route uses another interface.
    pub default_elsewhere: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    pub name: String,
    /// Strict reverse path filtering.
    pub strict: bool,
}

/// Reads the facts; `named` are the addresses of keys that this host has to have.
pub async fn read(
    netlink: &Netlink,
    named: &[IpAddr],
    desired: Option<&Desired>,
) -> Result<ServerFacts> {
    let links = netlink.links().await.context("interfaces")?;
    let own = netlink.addresses().await.context("addresses")?;
    let addresses = match named {
        [] => hidden(&links, &own),
        _ => served(netlink, named, &links, &own).await?,
    };
    let default = netlink.default_interface().context("routes")?;
    let decap = desired.filter(|desired| desired.decap.is_some());
    let is_near = |link: &Link, address: IpAddr| {
        own.iter().any(|own| own.ifindex == link.index && own.network.contains(address))
    };
    let near = |link: &Link| {
        let hidden = addresses.iter().filter(|it| it.place == Place::Hidden).map(|it| it.address);
        hidden.filter(|address| address.is_ipv4() && is_near(link, *address)).collect()
    };
    let has_ipv4 =
        |link: &&Link| own.iter().any(|own| own.ifindex == link.index && own.address.is_ipv4());
    let is_ethernet = |link: &&Link| link.up && link.layer == Some(Layer::Ethernet) && !holds(link);
    let server_link = |link: &Link| ServerLink {
        name: link.name.clone(),
        arp_ignore: applied(&link.name, "arp_ignore"),
        arp_announce: applied(&link.name, "arp_announce"),
        near: near(link),
        takes_tunnels: decap.is_some_and(|desired| desired.interfaces.contains(&link.name)),
        strict: applied(&link.name, "rp_filter") == 1,
        default_elsewhere: default.is_some_and(|ifindex| ifindex != link.index),
    };
    let tunnels = links.iter().filter(|link| link.up && TUNNELS.contains(&link.kind.as_str()));
    Ok(ServerFacts {
        links: links.iter().filter(is_ethernet).filter(has_ipv4).map(server_link).collect(),
        tunnels: tunnels
            .map(|link| Tunnel {
                name: link.name.clone(),
                strict: applied(&link.name, "rp_filter") == 1,
            })
            .collect(),
        addresses,
        decap: decap.is_some(),
    })
}

/// Returns a sysctl of IPv4 as it applies to an interface: the larger one of its own and that of all.
fn applied(interface: &str, name: &str) -> i64 {
    let value = |of: &str| sysctl(&format!("net/ipv4/conf/{of}/{name}")).unwrap_or(0);
    value("all").max(value(interface))
}

/// Returns true for interfaces whose addresses nobody hears of.
fn holds(link: &Link) -> bool {
    link.kind == DUMMY || link.index == LOOPBACK
}

/// Returns the addresses that the loopback interface and dummies have, without the host's own ones.
fn hidden(links: &[Link], own: &[OwnAddress]) -> Vec<ServedAddress> {
    let holders: Vec<u32> = links.iter().filter(|link| holds(link)).map(|it| it.index).collect();
    let is_link_local = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let on_them = own.iter().filter(|own| holders.contains(&own.ifindex)).map(|own| own.address);
    on_them
        .filter(|address| !address.is_loopback() && !is_link_local(address))
        .map(|address| ServedAddress { address, place: Place::Hidden })
        .collect()
}

/// Returns named addresses with their places.
async fn served(
    netlink: &Netlink,
    named: &[IpAddr],
    links: &[Link],
    own: &[OwnAddress],
) -> Result<Vec<ServedAddress>> {
    let target =
        |address: IpAddr| Target { address: Address::from(address), senders: Senders::Own };
    let next_hops = nexthop::look(netlink, named.iter().copied().map(target), &[]).await?;
    let place = |address: IpAddr| {
        let found = own.iter().find(|own| own.address == address);
        let link = found.and_then(|own| links.iter().find(|link| link.index == own.ifindex));
        match (found, link) {
            (Some(own), Some(link)) if !holds(link) => {
                Place::Link(link.name.clone(), own.network.prefix)
            }
            (Some(_), _) => Place::Hidden,
            (None, _) if next_hops.get(&target(address)) == Some(&NextHop::Local) => Place::Hidden,
            (None, _) => Place::Nowhere,
        }
    };
    Ok(named
        .iter()
        .map(|address| ServedAddress { address: *address, place: place(*address) })
        .collect())
}
