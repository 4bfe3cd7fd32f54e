//! What udplb asks of rtnetlink and tells it, in its own types. The only module that knows
//! the netlink crates: both change their interfaces often.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, stream};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Requests under way at once: their answers fit into the socket's receive buffer.
const WINDOW: usize = 64;

/// All packets, whatever they carry.
pub const ETH_P_ALL: u16 = 0x0003;

/// A network interface.
#[derive(Clone, Debug)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    pub up: bool,
    /// Its frames begin with an Ethernet header.
    pub ethernet: bool,
    /// As `ip -d link` names it: `veth`, `macvlan`; empty for hardware.
    pub kind: String,
    /// The interface it is stacked on (macvlan, VLAN); a veth's peer too.
    pub lower: Option<u32>,
    /// The bridge or bond it belongs to.
    pub controller: Option<u32>,
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub ifindex: u32,
    /// The neighbour to ask for: a gateway, or the address itself.
    pub gateway: IpAddr,
    /// Bytes; `None`: that of the interface.
    pub mtu: Option<u32>,
    /// The address is one of this host's.
    pub local: bool,
}

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug)]
pub struct Neighbour {
    pub ifindex: u32,
    pub address: IpAddr,
    pub mac: Option<[u8; 6]>,
    /// `NUD_VALID`: the kernel would send to it.
    pub valid: bool,
    /// It was asked for and did not answer.
    pub failed: bool,
}

/// The qdisc that carries ingress filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qdisc {
    Clsact,
    /// The older kind, for ingress only. Filters go onto it in the same way.
    Ingress,
}

/// A tc filter.
#[derive(Clone, Debug)]
pub struct Filter {
    pub chain: u32,
    pub priority: u16,
    /// `ETH_P_ALL` and the like.
    pub protocol: u16,
    pub handle: u32,
    /// `bpf`, `flower`, …
    pub kind: String,
    pub program: Option<FilterProgram>,
}

/// The program of a filter of kind `bpf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterProgram {
    pub id: u32,
    pub name: String,
    pub tag: [u8; 8],
}

/// Which way a filter looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Ingress,
    Egress,
}

/// A connection to rtnetlink in the network namespace of the thread that opened it.
#[derive(Clone)]
pub struct Netlink {
    handle: rtnetlink::Handle,
}

impl Netlink {
    /// Opens a socket and drives it as a task of the running tokio runtime.
    pub fn open() -> io::Result<Netlink> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Netlink { handle })
    }

    /// Sends one message and collects what comes back for it.
    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut replies = self.handle.clone().request(request).map_err(io::Error::other)?;
        let mut messages = Vec::new();
        while let Some(reply) = replies.next().await {
            match reply.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Overrun(_) => {
                    return Err(io::Error::other("netlink lost an answer (ENOBUFS)"));
                }
                _ => {}
            }
        }
        Ok(messages)
    }

    /// All interfaces of this network namespace.
    pub async fn links(&self) -> io::Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let replies = self.request(request, NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewLink(message) => Some(link(message)),
                _ => None,
            })
            .collect())
    }

    /// The IPv4 addresses of this host, each with the index of its interface.
    pub async fn addresses(&self) -> io::Result<Vec<(u32, Ipv4Addr)>> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        let replies = self.request(RouteNetlinkMessage::GetAddress(message), NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewAddress(message) => address(&message),
                _ => None,
            })
            .collect())
    }

    /// The route to each address, in the order asked; the error of one does not touch the others.
    pub async fn routes(&self, addresses: &[Ipv4Addr]) -> Vec<io::Result<Route>> {
        stream::iter(addresses).map(|address| self.route(*address)).buffered(WINDOW).collect().await
    }

    /// Asks as a local sender would: with an input interface the kernel refuses to answer while
    /// forwarding is off.
    async fn route(&self, address: Ipv4Addr) -> io::Result<Route> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.destination_prefix_length = 32;
        message.header.flags = RouteFlags::FibMatch;
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(address)));
        let replies = self.request(RouteNetlinkMessage::GetRoute(message), 0).await?;
        replies
            .into_iter()
            .find_map(|reply| match reply {
                RouteNetlinkMessage::NewRoute(message) => route(address, &message),
                _ => None,
            })
            .ok_or_else(|| io::Error::new(io::ErrorKind::HostUnreachable, "no unicast route"))
    }

    /// The neighbour tables of both families.
    pub async fn neighbours(&self) -> io::Result<Vec<Neighbour>> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let replies = self.request(request, NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewNeighbour(message) => neighbour(&message),
                _ => None,
            })
            .collect())
    }

    /// Has the kernel ask for each neighbour as if a packet were waiting for it (`NTF_USE`).
    pub async fn solicit(&self, neighbours: &[(u32, IpAddr)]) -> Vec<io::Result<()>> {
        stream::iter(neighbours)
            .map(|(ifindex, address)| async {
                let mut message = NeighbourMessage::default();
                message.header.family = family(*address);
                message.header.ifindex = *ifindex;
                message.header.state = NeighbourState::None;
                message.header.flags = NeighbourFlags::Use;
                message.attributes.push(NeighbourAttribute::Destination((*address).into()));
                self.request(
                    RouteNetlinkMessage::NewNeighbour(message),
                    NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
                )
                .await
                .map(drop)
            })
            .buffered(WINDOW)
            .collect()
            .await
    }

    /// The qdiscs that carry ingress filters, each with the index of its interface.
    pub async fn qdiscs(&self) -> io::Result<Vec<(u32, Qdisc)>> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let replies = self.request(request, NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewQueueDiscipline(message) => {
                    let qdisc = match kind(&message)? {
                        "clsact" => Qdisc::Clsact,
                        "ingress" => Qdisc::Ingress,
                        _ => return None,
                    };
                    Some((message.header.index as u32, qdisc))
                }
                _ => None,
            })
            .collect())
    }

    /// Puts a clsact onto the interface.
    pub async fn add_clsact(&self, ifindex: u32) -> io::Result<()> {
        let request = RouteNetlinkMessage::NewQueueDiscipline(clsact(ifindex));
        self.request(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).await.map(drop)
    }

    /// Takes the clsact away, with every filter on it.
    pub async fn delete_clsact(&self, ifindex: u32) -> io::Result<()> {
        let request = RouteNetlinkMessage::DelQueueDiscipline(clsact(ifindex));
        self.request(request, NLM_F_ACK).await.map(drop)
    }

    /// The filters of an interface that has a qdisc for them, in no order.
    pub async fn filters(&self, ifindex: u32, direction: Direction) -> io::Result<Vec<Filter>> {
        let message = filter_message(ifindex, direction);
        let replies =
            self.request(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewTrafficFilter(message) => filter(&message),
                _ => None,
            })
            .collect())
    }

    /// Puts a direct-action program on ingress. With `replace` it takes the place of the filter
    /// there in one step and no packet passes between; without, any filter there is an error.
    pub async fn set_filter(
        &self,
        ifindex: u32,
        priority: u16,
        handle: u32,
        name: &str,
        program: BorrowedFd<'_>,
        replace: bool,
    ) -> io::Result<()> {
        let mut message = our_filter(ifindex, priority, handle);
        message.attributes.push(TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(name.into())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]));
        let exclusive = if replace { 0 } else { NLM_F_EXCL };
        self.request(
            RouteNetlinkMessage::NewTrafficFilter(message),
            NLM_F_ACK | NLM_F_CREATE | exclusive,
        )
        .await
        .map(drop)
    }

    /// Takes one ingress filter away.
    pub async fn delete_filter(&self, ifindex: u32, priority: u16, handle: u32) -> io::Result<()> {
        let message = our_filter(ifindex, priority, handle);
        self.request(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK).await.map(drop)
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn mac(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok()
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
        kind: String::new(),
        lower: None,
        controller: None,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(bytes) => link.mac = mac(&bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Link(index) => link.lower = Some(index),
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::LinkInfo(infos) => link.kind = link_kind(&infos),
            _ => {}
        }
    }
    link
}

fn link_kind(infos: &[LinkInfo]) -> String {
    infos
        .iter()
        .find_map(|info| match info {
            LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind.clone()),
            LinkInfo::Kind(kind) => Some(kind.to_string()),
            _ => None,
        })
        .unwrap_or_default()
}

fn address(message: &AddressMessage) -> Option<(u32, Ipv4Addr)> {
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) if local => Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) if !local => Some(*address),
            _ => None,
        })
    };
    // of a point-to-point link the plain address is the peer's
    Some((message.header.index, find(true).or_else(|| find(false))?))
}

/// `None` for a route that leads nowhere: blackhole, unreachable, multicast, broadcast.
fn route(address: Ipv4Addr, message: &RouteMessage) -> Option<Route> {
    let local = message.header.kind == RouteType::Local;
    if !local && message.header.kind != RouteType::Unicast {
        return None;
    }
    let mut route = Route { ifindex: 0, gateway: address.into(), mtu: None, local };
    read_hop(&mut route, &message.attributes);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            // any of them reaches the upstream; the kernel balances where it does the lookup
            RouteAttribute::MultiPath(hops) => {
                if let Some(hop) = hops.first() {
                    route.ifindex = hop.interface_index;
                    read_hop(&mut route, &hop.attributes);
                }
            }
            _ => {}
        }
    }
    (route.ifindex != 0).then_some(route)
}

fn read_hop(route: &mut Route, attributes: &[RouteAttribute]) {
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.ifindex = *index,
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => {
                route.gateway = (*gateway).into();
            }
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => route.gateway = (*gateway).into(),
            _ => {}
        }
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let mut address = None;
    let mut link_layer = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(inet)) => {
                address = Some(IpAddr::V4(*inet));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(inet6)) => {
                address = Some(IpAddr::V6(*inet6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => link_layer = mac(bytes),
            _ => {}
        }
    }
    use NeighbourState::{Delay, Failed, Noarp, Permanent, Probe, Reachable, Stale};
    Some(Neighbour {
        ifindex: message.header.ifindex,
        address: address?,
        mac: link_layer,
        valid: matches!(
            message.header.state,
            Reachable | Stale | Delay | Probe | Noarp | Permanent
        ),
        failed: message.header.state == Failed,
    })
}

fn clsact(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

fn filter_message(ifindex: u32, direction: Direction) -> TcMessage {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle { major: u16::MAX, minor };
    message
}

fn our_filter(ifindex: u32, priority: u16, handle: u32) -> TcMessage {
    let mut message = filter_message(ifindex, Direction::Ingress);
    message.header.info = u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be());
    message.header.handle = handle.into();
    message.attributes.push(TcAttribute::Kind("bpf".into()));
    message
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })
}

/// `None` for what is no filter: the kernel lists the head of each priority with handle 0.
fn filter(message: &TcMessage) -> Option<Filter> {
    let handle = u32::from(message.header.handle);
    if handle == 0 {
        return None;
    }
    let mut program = FilterProgram { id: 0, name: String::new(), tag: [0; 8] };
    let mut chain = 0;
    for attribute in &message.attributes {
        let options = match attribute {
            TcAttribute::Options(options) => options,
            TcAttribute::Chain(number) => {
                chain = *number;
                continue;
            }
            _ => continue,
        };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program.id = *id,
                TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => program.name = name.clone(),
                TcOption::Bpf(TcFilterBpfOption::ProgTag(tag)) => program.tag = *tag,
                _ => {}
            }
        }
    }
    Some(Filter {
        chain,
        priority: (message.header.info >> 16) as u16,
        protocol: u16::from_be(message.header.info as u16),
        handle,
        kind: kind(message)?.into(),
        program: (program.id != 0).then_some(program),
    })
}
