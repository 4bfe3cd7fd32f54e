//! Interfaces and their addresses.

use std::io;
use std::net::IpAddr;

use ipnet::Ipv4Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoVlan, InfoVrf, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, Prop, VlanProtocol,
};

use super::{Netlink, mac};
use crate::config::Network;

/// Index of the loopback interface of a network namespace.
pub const LOOPBACK: u32 = 1;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Alternative names.
    pub altnames: Vec<String>,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    /// MTU for IPv6 packets, if a router or a sysctl has lowered it.
    pub mtu6: Option<u32>,
    /// Administrative state.
    pub up: bool,
    /// True if a peer is connected.
    pub carrier: bool,
    /// `None` for types that udplb does not support (InfiniBand, PPP).
    pub layer: Option<Layer>,
    /// Kind as in `ip -d link`: `veth`, `macvlan`; empty for hardware.
    pub kind: String,
    /// Index of the interface below (macvlan, VLAN), or of a veth's peer.
    pub lower: Option<u32>,
    /// Index of the interface that a VXLAN sends its outer packets on.
    pub outer: Option<u32>,
    /// Index of the bridge, bond or VRF that it belongs to.
    pub controller: Option<u32>,
    /// Number of packets received.
    pub received: u64,
    /// XDP programs, each with its mode as in `ip link`.
    pub xdp: Vec<(&'static str, u32)>,
    /// Protocol and id of a VLAN device above an interface of this network namespace.
    pub vlan: Option<(u16, u16)>,
    /// Routing table of a VRF.
    pub vrf: Option<u32>,
    /// Forwarding of received packets, for IPv4 and for IPv6.
    pub forwards: [bool; 2],
}

/// Link-layer type of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Frames with an Ethernet header.
    Ethernet,
    /// Bare IP packets: tun, WireGuard, ipip. There are no MAC addresses and no neighbours.
    Ip,
}

/// Returns true if `wanted` names the interface in `ip link`: its name, an alternative name, or
/// `eth0@if5` for eth0.
pub fn is_called(name: &str, altnames: &[String], wanted: &str) -> bool {
    let shown = wanted.split_once('@').is_some_and(|(before, _)| before == name);
    shown || wanted == name || altnames.iter().any(|altname| altname == wanted)
}

/// Finds an interface by its name, or else by an alternative name.
pub fn find_link<'a>(
    links: impl Iterator<Item = &'a Link> + Clone,
    wanted: &str,
) -> Option<&'a Link> {
    links.clone().find(|link| link.name == wanted).or_else(|| {
        let mut links = links;
        links.find(|link| is_called(&link.name, &link.altnames, wanted))
    })
}

impl Link {
    /// Returns the MTU for packets to an address, in bytes, unless the route has one.
    pub fn mtu_to(&self, address: IpAddr) -> u32 {
        match self.mtu6 {
            Some(mtu6) if address.is_ipv6() => mtu6.min(self.mtu),
            _ => self.mtu,
        }
    }
}

/// An address of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnAddress {
    pub ifindex: u32,
    pub address: IpAddr,
    /// Broadcast address of its network.
    pub broadcast: Option<IpAddr>,
    /// Network of the addresses on its link.
    pub network: Network,
    /// True while duplicate address detection runs; the kernel does not use it yet.
    pub tentative: bool,
}

impl Netlink {
    /// Returns all interfaces of this network namespace.
    pub async fn links(&self) -> io::Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump(request, |reply| match reply {
            RouteNetlinkMessage::NewLink(message) => Some(link(message)),
            _ => None,
        })
        .await
    }

    /// Returns the addresses of this host.
    pub async fn addresses(&self) -> io::Result<Vec<OwnAddress>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(request, |reply| match reply {
            RouteNetlinkMessage::NewAddress(message) => address(&message),
            _ => None,
        })
        .await
    }
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        layer: layer(message.header.link_layer_type),
        ..Link::default()
    };
    let mut elsewhere = false;
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::PropList(properties) => link.altnames = altnames(properties),
            LinkAttribute::Address(bytes) => link.mac = mac(&bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(index) => link.lower = Some(index),
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::LinkInfo(infos) => read_infos(&mut link, infos),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::AfSpecUnspec(families) => read_families(&mut link, &families),
            LinkAttribute::Stats64(stats) => link.received = stats.rx_packets,
            LinkAttribute::Xdp(facts) => link.xdp = xdp(&facts),
            _ => {}
        }
    }
    if elsewhere {
        link.vlan = None;
    }
    link
}

fn altnames(properties: Vec<Prop>) -> Vec<String> {
    let name = |property| match property {
        Prop::AltIfName(name) => Some(name),
        _ => None,
    };
    properties.into_iter().filter_map(name).collect()
}

/// Follows `dev_is_mac_header_xmit`, by which the kernel strips the MAC header of redirected packets.
fn layer(kind: LinkLayerType) -> Option<Layer> {
    match kind {
        LinkLayerType::Ether => Some(Layer::Ethernet),
        LinkLayerType::None
        | LinkLayerType::Void
        | LinkLayerType::Rawip
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => Some(Layer::Ip),
        _ => None,
    }
}

/// Reads the XDP programs. The kernel lists a single program twice: by its mode, and alone.
fn xdp(facts: &[LinkXdp]) -> Vec<(&'static str, u32)> {
    let by_mode = |fact: &LinkXdp| match fact {
        LinkXdp::DrvProgId(id) => Some(("xdpdrv", *id)),
        LinkXdp::SkbProgId(id) => Some(("xdpgeneric", *id)),
        LinkXdp::HwProgId(id) => Some(("xdpoffload", *id)),
        _ => None,
    };
    facts.iter().filter_map(by_mode).collect()
}

/// Reads the MTU for IPv6, and forwarding of IPv4 and IPv6.
fn read_families(link: &mut Link, families: &[AfSpecUnspec]) {
    for family in families {
        match family {
            AfSpecUnspec::Inet(facts) => {
                for fact in facts {
                    let AfSpecInet::DevConf(conf) = fact else { continue };
                    link.forwards[0] = conf.forwarding != 0;
                }
            }
            AfSpecUnspec::Inet6(facts) => {
                for fact in facts {
                    let AfSpecInet6::DevConf(conf) = fact else { continue };
                    link.forwards[1] = conf.forwarding != 0;
                    link.mtu6 = u32::try_from(conf.mtu6).ok();
                }
            }
            _ => {}
        }
    }
}

/// Reads the kind of a virtual interface and its settings.
fn read_infos(link: &mut Link, infos: Vec<LinkInfo>) {
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Other(kind)) => link.kind = kind,
            LinkInfo::Kind(kind) => link.kind = kind.to_string(),
            LinkInfo::Data(InfoData::Vlan(facts)) => link.vlan = vlan(&facts),
            LinkInfo::Data(InfoData::Vxlan(facts)) => {
                link.outer = facts.iter().find_map(|fact| match fact {
                    InfoVxlan::Link(index) => Some(*index),
                    _ => None,
                });
            }
            LinkInfo::Data(InfoData::Vrf(facts)) => {
                link.vrf = facts.iter().find_map(|fact| match fact {
                    InfoVrf::TableId(table) => Some(*table),
                    _ => None,
                });
            }
            _ => {}
        }
    }
}

/// Returns protocol and id of a VLAN.
fn vlan(facts: &[InfoVlan]) -> Option<(u16, u16)> {
    let (mut protocol, mut id) = (VlanProtocol::Ieee8021Q, None);
    for fact in facts {
        match fact {
            InfoVlan::Id(number) => id = Some(*number),
            InfoVlan::Protocol(other) => protocol = *other,
            _ => {}
        }
    }
    Some((protocol.into(), id?))
}

fn address(message: &AddressMessage) -> Option<OwnAddress> {
    let (mut local, mut plain, mut broadcast) = (None, None, None);
    let flags = u32::from(message.header.flags.bits());
    let mut flags = AddressFlags::from_bits_retain(flags);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => plain = Some(*address),
            AddressAttribute::Broadcast(address) => broadcast = Some(IpAddr::V4(*address)),
            _ => {}
        }
    }
    if let (None, Some(IpAddr::V4(network)), prefix @ ..31) =
        (broadcast, plain, message.header.prefix_len)
    {
        // Without a broadcast address the kernel's local table still has the network's last one.
        broadcast = Ipv4Net::new(network, prefix).ok().map(|network| network.broadcast().into());
    }
    // On a point-to-point link IFA_ADDRESS is the peer's.
    let tentative = flags.contains(AddressFlags::Tentative)
        && !flags.intersects(AddressFlags::Dadfailed | AddressFlags::Optimistic);
    Some(OwnAddress {
        ifindex: message.header.index,
        address: local.or(plain)?,
        broadcast,
        tentative,
        network: Network::new(plain.or(local)?, message.header.prefix_len),
    })
}
