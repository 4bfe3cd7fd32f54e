//! What udplb asks of rtnetlink and tells it, in its own types. The only module that knows
//! the netlink crates: both change their interfaces often.

pub mod ipsec;
pub mod nexthop;
pub mod routing;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;
use std::{fmt, io};

use futures_util::{StreamExt, TryStreamExt, stream};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload, Nla,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, InfoData, InfoKind, InfoVlan, InfoVrf, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage, LinkXdp, Prop, VlanProtocol,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
    NeighbourState,
};
use netlink_packet_route::neighbour_table::{NeighbourTableAttribute, NeighbourTableMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHopFlags,
    RouteProtocol, RouteType, RouteVia,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcAttribute, TcBpfFlags, TcFilterBpfOption, TcFilterFlowerOption,
    TcFilterMatchAllOption, TcFilterU32Option, TcHandle, TcMessage, TcOption,
};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::sys::{Socket, SocketAddr};
use tokio::io::unix::AsyncFd;

use crate::config::{Address, Network};
use crate::net::ipsec::SecurityPolicy;
use crate::net::routing::{Match, PolicyAction, PolicyRule, TableRoute};

/// Requests under way at once: their answers fit into the socket's receive buffer.
const WINDOW: usize = 64;

/// How often a dump is asked for that is inconsistent.
const DUMP_ATTEMPTS: u32 = 4;
/// How long one message of an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

fn lost(what: &str) -> io::Error {
    io::Error::other(format!("netlink: {what}; whether the request was carried out is not known"))
}

/// All packets, whatever they carry.
pub const ETH_P_ALL: u16 = 0x0003;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Alternative names.
    pub altnames: Vec<String>,
    pub mac: Option<[u8; 6]>,
    pub mtu: u32,
    /// Of IPv6 packets, where a router or a sysctl has lowered it.
    pub mtu6: Option<u32>,
    /// Administratively.
    pub up: bool,
    /// And something is at the other end.
    pub carrier: bool,
    /// `None`: what udplb knows nothing of (InfiniBand, PPP).
    pub layer: Option<Layer>,
    /// As `ip -d link` names it: `veth`, `macvlan`; empty for hardware.
    pub kind: String,
    /// The interface it is stacked on (macvlan, VLAN); a veth's peer too.
    pub lower: Option<u32>,
    /// The interface that a VXLAN's own packets leave by.
    pub outer: Option<u32>,
    /// The bridge, bond or VRF it belongs to.
    pub controller: Option<u32>,
    /// Packets that came in so far.
    pub received: u64,
    /// XDP programs, each with the word that `ip link` has for its mode.
    pub xdp: Vec<(&'static str, u32)>,
    /// Protocol and id of a VLAN device above an interface of this network namespace.
    pub vlan: Option<(u16, u16)>,
    /// The table of a VRF.
    pub vrf: Option<u32>,
    /// Packets that come in are routed on, of IPv4 and of IPv6.
    pub forwards: [bool; 2],
}

/// How that begins which an interface carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// With an Ethernet header.
    Ethernet,
    /// With the IP header: tun, WireGuard, ipip. It knows no MAC addresses, and no neighbours to ask.
    Ip,
}

/// Returns true if `ip link` takes or shows `wanted` for an interface of that name: an alternative
/// name, or `eth0@if5` for eth0.
pub fn is_called(name: &str, altnames: &[String], wanted: &str) -> bool {
    let shown = wanted.split_once('@').is_some_and(|(before, _)| before == name);
    shown || wanted == name || altnames.iter().any(|altname| altname == wanted)
}

/// Returns the interface of that name, or else the one that is also called so.
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
    /// The longest packet to an address, in bytes, where the route says nothing.
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
    /// To which everybody on its network listens.
    pub broadcast: Option<IpAddr>,
    /// The addresses that are on its link.
    pub network: Network,
    /// The kernel does not use it yet: it looks for duplicates.
    pub tentative: bool,
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub ifindex: u32,
    /// The neighbour to ask for: a gateway, or the address itself.
    pub gateway: IpAddr,
    /// Bytes; `None`: that of the interface.
    pub mtu: Option<u32>,
    /// This host's own address on that way: what a local sender's packets would have.
    pub egress: Option<IpAddr>,
    /// The address is one of this host's.
    pub local: bool,
}

impl Route {
    /// The neighbour that its packets go to.
    pub fn neighbour(&self) -> NeighbourKey {
        (self.ifindex, self.gateway)
    }
}

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub ifindex: u32,
    pub address: IpAddr,
    pub mac: Option<[u8; 6]>,
    pub state: NudState,
    /// Since it last answered.
    pub confirmed: Option<Duration>,
    /// Since its state changed.
    pub updated: Option<Duration>,
    /// The kernel keeps it resolved by itself.
    pub managed: bool,
    /// Who made it, [`OUR_PROTOCOL`] for ours; 0: the kernel, or nobody said.
    pub protocol: u8,
    /// Somebody's control plane knows better than ARP.
    pub learned: bool,
}

/// The states of a neighbour, as `ip neigh` spells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NudState {
    None,
    Incomplete,
    Reachable,
    Stale,
    Delay,
    Probe,
    Failed,
    Noarp,
    Permanent,
}

impl NudState {
    /// `NUD_VALID`: the kernel would send to it.
    pub fn is_valid(self) -> bool {
        !matches!(self, NudState::None | NudState::Incomplete | NudState::Failed)
    }

    /// Nobody needs to ask for it.
    pub fn is_static(self) -> bool {
        matches!(self, NudState::Noarp | NudState::Permanent)
    }
}

/// `REACHABLE`
impl fmt::Display for NudState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_uppercase())
    }
}

/// What we tag the neighbours with that we have the kernel keep (`NDA_PROTOCOL`): nobody else's
/// in iproute2's rt_protos.
pub const OUR_PROTOCOL: u8 = 117;

/// A neighbour: the interface's index and the address.
pub type NeighbourKey = (u32, IpAddr);

/// What to do with a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourRequest {
    /// Ask for it where it is not known, and have the kernel keep it resolved from now on. Older
    /// kernels only ask.
    Keep,
    /// Have it answer now, though its address is known.
    Probe,
    /// Leave it to itself, as any other entry.
    Release,
}

/// How full a neighbour table of the kernel is: there is one for each family, for all network
/// namespaces.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeighbourTable {
    pub ipv6: bool,
    pub entries: u32,
    /// Beyond this, entries are thrown out a few seconds after their last use.
    pub threshold2: u32,
    /// Beyond this, there are no new ones.
    pub threshold3: u32,
}

impl NeighbourTable {
    /// The full name of one of its settings.
    pub fn sysctl(&self, name: &str) -> String {
        format!("net.{}.neigh.default.{name}", if self.ipv6 { "ipv6" } else { "ipv4" })
    }
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
    /// The program's result is the verdict.
    pub direct: bool,
    /// What its own actions decide of a packet that it matches (`TC_ACT_OK` and the like); `None`:
    /// there are none, or none that say.
    pub action: Option<i32>,
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
        let (mut connection, handle, _) = rtnetlink::new_connection()?;
        // they tell an end of the answer from an end of the connection
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        tokio::spawn(connection);
        Ok(Netlink { handle })
    }

    /// Sends one message and collects what comes back for it. A dump that the kernel calls
    /// inconsistent, because what it lists changed meanwhile, is asked for again.
    ///
    /// # Errors
    /// See [`Netlink::request_once`].
    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 1..DUMP_ATTEMPTS {
            let (messages, is_consistent) = self.request_once(message.clone(), flags).await?;
            if is_consistent {
                return Ok(messages);
            }
        }
        // something changes all the time; what is missing here comes with the next look
        self.request_once(message, flags).await.map(|(messages, _)| messages)
    }

    /// Returns the answer, and false if it is an inconsistent dump.
    ///
    /// # Errors
    /// The kernel refused it, or its answer has no end: neither ACK nor DONE nor, without these
    /// flags, a message.
    async fn request_once(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut replies = self.handle.clone().request(request).map_err(io::Error::other)?;
        let (mut messages, mut is_consistent) = (Vec::new(), true);
        loop {
            let reply = tokio::time::timeout(ANSWER_TIMEOUT, replies.next()).await;
            let reply = reply.map_err(|_| lost("the kernel does not answer"))?;
            let reply = reply.ok_or_else(|| lost("the connection ended before the answer"))?;
            is_consistent &= reply.header.flags & NLM_F_DUMP_INTR == 0;
            match reply.payload {
                NetlinkPayload::InnerMessage(message) => {
                    messages.push(message);
                    if flags & (NLM_F_ACK | NLM_F_DUMP) == 0 {
                        return Ok((messages, true));
                    }
                }
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                    return Ok((messages, is_consistent));
                }
                NetlinkPayload::Overrun(_) => return Err(lost("an answer was lost (ENOBUFS)")),
                _ => {}
            }
        }
    }

    /// The rules of `ip rule` for a family, in the order of their priority.
    pub async fn rules(&self, ipv6: bool) -> io::Result<Vec<PolicyRule>> {
        let mut message = RuleMessage::default();
        message.header.family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let replies = self.request(RouteNetlinkMessage::GetRule(message), NLM_F_DUMP).await?;
        let mut rules: Vec<PolicyRule> = replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewRule(message) => Some(policy_rule(&message)),
                _ => None,
            })
            .collect();
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }

    /// The routes of all tables of a family that any of these addresses matches.
    pub async fn routes_to(
        &self,
        addresses: &BTreeSet<IpAddr>,
        ipv6: bool,
    ) -> io::Result<Vec<TableRoute>> {
        let mut message = RouteMessage::default();
        message.header.address_family =
            if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let replies = self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP).await?;
        let mut matched = HashMap::<u8, HashSet<Network>>::new();
        let mut routes = Vec::new();
        for reply in replies {
            let RouteNetlinkMessage::NewRoute(message) = reply else { continue };
            let Some(route) = table_route(&message, ipv6) else { continue };
            let prefix = route.network.prefix;
            let networks = matched.entry(prefix).or_insert_with(|| {
                addresses.iter().map(|address| Network::new(*address, prefix)).collect()
            });
            if networks.contains(&route.network) {
                routes.push(route);
            }
        }
        Ok(routes)
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

    /// The addresses of this host.
    pub async fn addresses(&self) -> io::Result<Vec<OwnAddress>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let replies = self.request(request, NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewAddress(message) => address(&message),
                _ => None,
            })
            .collect())
    }

    /// Returns all paths to each address, at least one, in the order asked, or the kernel's reason why
    /// there is none. `links` are all interfaces, by index.
    ///
    /// # Errors
    /// The kernel could not be asked, which says nothing of the paths.
    pub async fn paths(
        &self,
        addresses: &[Address],
        links: &HashMap<u32, Link>,
    ) -> io::Result<Vec<Result<Vec<Route>, String>>> {
        // collected, since a stream that borrows from a closure's argument is not Send
        let paths: Vec<_> = addresses.iter().map(|address| self.paths_to(address, links)).collect();
        let mut all: Vec<_> = stream::iter(paths).buffered(WINDOW).try_collect().await?;
        let mut unsourced: Vec<(IpAddr, &mut Route)> = addresses
            .iter()
            .zip(&mut all)
            .flat_map(|(address, paths)| paths.iter_mut().flatten().map(|path| (address.ip, path)))
            .collect();
        self.add_sources(&mut unsourced).await?;
        Ok(all)
    }

    /// Fills in this host's own address on paths to these addresses, where the route names none.
    pub async fn add_sources(&self, paths: &mut [(IpAddr, &mut Route)]) -> io::Result<()> {
        let is_unsourced = |path: &Route| !path.local && path.egress.is_none();
        let asked: HashMap<_, _> = paths
            .iter()
            .filter(|(_, path)| is_unsourced(path))
            .map(|(address, path)| (source_key(*address, path), *address))
            .collect();
        let sources = stream::iter(asked).map(|(key, address)| async move {
            // of several paths the kernel would choose one, but each has an address of its own
            let found = self.route(address, key.0, RouteFlags::empty()).await?;
            Ok::<_, io::Error>((key, found.ok().and_then(|found| found.first().copied())))
        });
        let sources: HashMap<_, _> = sources.buffer_unordered(WINDOW).try_collect().await?;
        for (address, path) in paths.iter_mut().filter(|(_, path)| is_unsourced(path)) {
            if let Some(Some(found)) = sources.get(&source_key(*address, path)) {
                (path.egress, path.local) = (found.egress, found.local);
            }
        }
        Ok(())
    }

    async fn paths_to(
        &self,
        address: &Address,
        links: &HashMap<u32, Link>,
    ) -> io::Result<Result<Vec<Route>, String>> {
        match &address.scope {
            Some(interface) => Ok(on_link(address.ip, interface, links).map(|path| vec![path])),
            None => self.route(address.ip, 0, RouteFlags::FibMatch).await,
        }
    }

    /// Asks as a local sender would, one that is bound to an interface if that is not 0: with an
    /// input interface the kernel refuses to answer while forwarding is off. The inner error is the
    /// kernel's reason why there is no path.
    async fn route(
        &self,
        address: IpAddr,
        output: u32,
        flags: RouteFlags,
    ) -> io::Result<Result<Vec<Route>, String>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address);
        message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        message.header.flags = flags;
        message.attributes.push(RouteAttribute::Destination(address.into()));
        if output != 0 {
            message.attributes.push(RouteAttribute::Oif(output));
        }
        let replies = match self.request(RouteNetlinkMessage::GetRoute(message), 0).await {
            Ok(replies) => replies,
            Err(error) => return no_route(&error).map_or(Err(error), |reason| Ok(Err(reason))),
        };
        let mut routes = replies.into_iter().filter_map(|reply| match reply {
            RouteNetlinkMessage::NewRoute(message) => Some(route(address, &message)),
            _ => None,
        });
        let routes = routes.next().unwrap_or_default();
        Ok(if routes.is_empty() { Err("no unicast route".into()) } else { Ok(routes) })
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

    /// Removes entries from the neighbour tables; those that have gone are no failure.
    pub async fn delete_neighbours(&self, neighbours: &[NeighbourKey]) -> io::Result<()> {
        for (ifindex, address) in neighbours {
            let mut message = NeighbourMessage::default();
            message.header.family = family(*address);
            message.header.ifindex = *ifindex;
            message.attributes.push(NeighbourAttribute::Destination((*address).into()));
            let request = RouteNetlinkMessage::DelNeighbour(message);
            match self.request(request, NLM_F_ACK).await {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the kernel probe neighbours that it knows. One that is gone meanwhile is no loss.
    pub async fn probe(&self, neighbours: &[NeighbourKey]) {
        let probes: Vec<_> = neighbours.iter().map(|key| self.probe_one(*key)).collect();
        stream::iter(probes).buffered(WINDOW).collect::<Vec<_>>().await;
    }

    async fn probe_one(&self, (ifindex, address): NeighbourKey) {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = ifindex;
        message.header.state = NeighbourState::Probe;
        message.attributes.push(NeighbourAttribute::Destination(address.into()));
        let probe = RouteNetlinkMessage::NewNeighbour(message);
        if let Err(error) = self.request(probe, NLM_F_ACK).await {
            log::info!("neighbour {address}: {error}");
        }
    }

    /// How full the neighbour tables are.
    pub async fn neighbour_tables(&self) -> io::Result<Vec<NeighbourTable>> {
        let request = RouteNetlinkMessage::GetNeighbourTable(NeighbourTableMessage::default());
        let replies = self.request(request, NLM_F_DUMP).await?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewNeighbourTable(message) => neighbour_table(message),
                _ => None,
            })
            .collect())
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

/// A socket for many small requests: they go out together, and the kernel has answered them all
/// when the call that sends them returns.
pub struct Batches {
    socket: Socket,
    sequence: u32,
}

impl Batches {
    /// Messages sent at once: their answers fit into the receive buffer.
    const MOST: usize = 64;

    /// Opens a socket in the network namespace of this thread.
    pub fn open() -> io::Result<Batches> {
        let mut socket = Socket::new(rtnetlink::sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_cap_ack(true)?;
        socket.set_non_blocking(true)?;
        Ok(Batches { socket, sequence: 0 })
    }

    /// Requests for neighbours; the errors are of the first of each request's messages that failed.
    pub fn neighbours(
        &mut self,
        requests: &[(NeighbourKey, NeighbourRequest)],
    ) -> io::Result<Vec<io::Result<()>>> {
        let mut results = Vec::with_capacity(requests.len());
        for requests in requests.chunks(Self::MOST / 2) {
            let mut messages = Vec::new();
            let mut owners = Vec::new();
            for (owner, (key, request)) in requests.iter().enumerate() {
                for message in neighbour_messages(*key, *request) {
                    let creates = *request == NeighbourRequest::Keep;
                    messages.push((message, if creates { NLM_F_CREATE } else { 0 }));
                    owners.push(owner);
                }
            }
            let mut errors: Vec<io::Result<()>> = requests.iter().map(|_| Ok(())).collect();
            for (answer, owner) in self.exchange(messages)?.into_iter().zip(owners) {
                if errors[owner].is_ok() {
                    errors[owner] = answer;
                }
            }
            results.append(&mut errors);
        }
        Ok(results)
    }

    fn exchange(
        &mut self,
        messages: Vec<(RouteNetlinkMessage, u16)>,
    ) -> io::Result<Vec<io::Result<()>>> {
        let first = self.sequence.wrapping_add(1);
        let mut answers: Vec<io::Result<()>> = messages.iter().map(|_| Ok(())).collect();
        let mut bytes = Vec::new();
        for (message, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut message = NetlinkMessage::from(message);
            message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            message.header.sequence_number = self.sequence;
            message.finalize();
            let start = bytes.len();
            bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut bytes[start..]);
        }
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut left = answers.len();
        let mut buffer = Vec::with_capacity(4096);
        while left > 0 {
            buffer.clear();
            self.socket.recv(&mut buffer, 0)?;
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&buffer)
                .map_err(io::Error::other)?;
            let index = answer.header.sequence_number.wrapping_sub(first) as usize;
            if let (NetlinkPayload::Error(error), Some(place)) =
                (answer.payload, answers.get_mut(index))
            {
                left -= 1;
                if error.code.is_some() {
                    *place = Err(error.to_io());
                }
            }
        }
        Ok(answers)
    }
}

/// The IPsec policies for packets that leave, in the order of their priority; none where the kernel has
/// no IPsec.
///
/// # Errors
/// The kernel could not be asked, or a privilege is missing.
pub fn security_policies() -> io::Result<Vec<SecurityPolicy>> {
    const GET_POLICY: u16 = 0x15;
    const NEW_POLICY: u16 = 0x13;
    const HEADER: usize = 16;
    /// `struct xfrm_userpolicy_id`, all zeroes.
    const NONE: usize = 64;
    let socket = match Socket::new(rtnetlink::sys::protocols::NETLINK_XFRM) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        socket => socket?,
    };
    let mut request = vec![0; HEADER + NONE];
    let length = request.len() as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&GET_POLICY.to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut policies = Vec::new();
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        let mut rest = &buffer[..];
        while rest.len() >= HEADER {
            let word =
                |at: usize| u32::from_ne_bytes(rest[at..at + 4].try_into().expect("four bytes"));
            let (length, kind) = (word(0) as usize, u16::from_ne_bytes([rest[4], rest[5]]));
            let message = rest.get(HEADER..length).ok_or_else(|| lost("a message is cut off"))?;
            match (i32::from(kind), message.first_chunk()) {
                (_, _) if kind == NEW_POLICY => policies.extend(ipsec::parse(message)),
                (libc::NLMSG_ERROR, Some(code)) => {
                    return Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(*code)));
                }
                (libc::NLMSG_DONE, _) => {
                    policies.sort_by_key(|policy| policy.priority);
                    return Ok(policies);
                }
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

/// Something that the kernel told without being asked.
#[derive(Clone, Debug)]
pub enum Event {
    Neighbour(Neighbour),
    NeighbourGone(NeighbourKey),
    /// Interfaces or addresses are not what they were.
    Links,
    /// Qdiscs or filters may not be what they were.
    Filters,
    /// Routes, rules or next hop objects are not what they were.
    Routes,
    /// There was more than could be kept.
    Lost,
}

/// What the kernel tells of changes; nothing may depend on all of them arriving.
pub struct Events {
    socket: AsyncFd<Socket>,
    buffer: Vec<u8>,
}

impl Events {
    /// Bytes of messages that wait to be read; beyond them they are lost, which is told.
    const BACKLOG: usize = 1 << 20;

    /// Listens in the network namespace of this thread.
    pub fn open() -> io::Result<Events> {
        use MulticastGroup::{
            Ipv4Ifaddr, Ipv4Route, Ipv4Rule, Ipv6Ifaddr, Ipv6Ifinfo, Ipv6Route, Ipv6Rule, Link,
            Neigh, Nexthop, Tc,
        };
        let mut socket = Socket::new(rtnetlink::sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        // what the system allows is enough, and losses are noticed
        let _ = socket.set_rx_buf_sz(Self::BACKLOG as libc::c_int);
        for group in [
            Link, Neigh, Nexthop, Ipv4Ifaddr, Ipv4Route, Ipv4Rule, Ipv6Ifaddr, Ipv6Ifinfo,
            Ipv6Route, Ipv6Rule, Tc,
        ] {
            socket.add_membership(group as u32)?;
        }
        // SAFETY: the socket owns its descriptor, and keeps it until it is dropped.
        let socket = unsafe { AsyncFd::register(socket) }.map_err(|error| error.into_parts().1)?;
        Ok(Events { socket, buffer: Vec::with_capacity(1 << 16) })
    }

    /// Waits until there are some.
    pub async fn wait(&self) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        ready.retain_ready();
        Ok(())
    }

    /// Takes those that there are.
    pub async fn take(&mut self) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        let mut ready = self.socket.readable().await?;
        loop {
            self.buffer.clear();
            match self.socket.get_ref().recv(&mut self.buffer, 0) {
                Ok(_) => events.extend(parse_event(&self.buffer)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    return Ok(events);
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    events.push(Event::Lost);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn parse_event(bytes: &[u8]) -> Option<Event> {
    use RouteNetlinkMessage::{
        DelAddress, DelLink, DelNeighbour, NewAddress, NewLink, NewNeighbour,
    };
    if is_about_tc(bytes) {
        return Some(Event::Filters);
    }
    let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else {
        // of a newer kernel perhaps: what it says may matter
        return Some(Event::Lost);
    };
    match message.payload {
        NetlinkPayload::InnerMessage(NewNeighbour(message)) => {
            neighbour(&message).map(Event::Neighbour)
        }
        NetlinkPayload::InnerMessage(DelNeighbour(message)) => {
            let gone = neighbour(&message)?;
            Some(Event::NeighbourGone((gone.ifindex, gone.address)))
        }
        NetlinkPayload::InnerMessage(NewLink(_) | DelLink(_) | NewAddress(_) | DelAddress(_)) => {
            Some(Event::Links)
        }
        NetlinkPayload::InnerMessage(_) => Some(Event::Routes),
        _ => None,
    }
}

/// Returns true for qdiscs, classes, filters, actions and chains; what they say is not looked at.
fn is_about_tc(message: &[u8]) -> bool {
    let kind = message.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    kind.is_some_and(|kind| {
        (libc::RTM_NEWQDISC..=libc::RTM_GETACTION).contains(&kind) || (100..=102).contains(&kind)
    })
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
            LinkAttribute::LinkInfo(infos) => {
                link.kind = link_kind(&infos);
                link.outer = outer_link(&infos);
                link.vlan = link_vlan(&infos);
                link.vrf = vrf_table(&infos);
            }
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::AfSpecUnspec(families) => {
                (link.mtu6, link.forwards) = (mtu6(&families), forwards(&families));
            }
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

/// As the kernel decides (`dev_is_mac_header_xmit`) whether a redirected packet loses its MAC header.
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

/// The kernel names a program by its mode, and again as the one program where there is only one.
fn xdp(facts: &[LinkXdp]) -> Vec<(&'static str, u32)> {
    let by_mode = |fact: &LinkXdp| match fact {
        LinkXdp::DrvProgId(id) => Some(("xdpdrv", *id)),
        LinkXdp::SkbProgId(id) => Some(("xdpgeneric", *id)),
        LinkXdp::HwProgId(id) => Some(("xdpoffload", *id)),
        _ => None,
    };
    facts.iter().filter_map(by_mode).collect()
}

fn mtu6(families: &[AfSpecUnspec]) -> Option<u32> {
    families.iter().find_map(|family| match family {
        AfSpecUnspec::Inet6(facts) => facts.iter().find_map(|fact| match fact {
            AfSpecInet6::DevConf(configuration) => u32::try_from(configuration.mtu6).ok(),
            _ => None,
        }),
        _ => None,
    })
}

/// Whether packets of IPv4 and of IPv6 that come in are routed on.
fn forwards(families: &[AfSpecUnspec]) -> [bool; 2] {
    let mut forwards = [false; 2];
    for family in families {
        match family {
            AfSpecUnspec::Inet(facts) => {
                let is_on = |fact: &AfSpecInet| matches!(fact, AfSpecInet::DevConf(conf) if conf.forwarding != 0);
                forwards[0] = facts.iter().any(is_on);
            }
            AfSpecUnspec::Inet6(facts) => {
                let is_on = |fact: &AfSpecInet6| matches!(fact, AfSpecInet6::DevConf(conf) if conf.forwarding != 0);
                forwards[1] = facts.iter().any(is_on);
            }
            _ => {}
        }
    }
    forwards
}

fn vrf_table(infos: &[LinkInfo]) -> Option<u32> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vrf(facts)) => facts.iter().find_map(|fact| match fact {
            InfoVrf::TableId(table) => Some(*table),
            _ => None,
        }),
        _ => None,
    })
}

/// `None` for the tables of other protocols, and for what single interfaces have set.
fn neighbour_table(message: NeighbourTableMessage) -> Option<NeighbourTable> {
    let mut table = NeighbourTable::default();
    let mut known = false;
    let mut whole = false;
    for attribute in message.attributes {
        match attribute {
            NeighbourTableAttribute::Name(name) => {
                table.ipv6 = name == "ndisc_cache";
                known = table.ipv6 || name == "arp_cache";
            }
            NeighbourTableAttribute::Config(config) => table.entries = config.entries,
            NeighbourTableAttribute::Threshold2(most) => table.threshold2 = most,
            NeighbourTableAttribute::Threshold3(most) => (table.threshold3, whole) = (most, true),
            _ => {}
        }
    }
    (known && whole).then_some(table)
}

fn outer_link(infos: &[LinkInfo]) -> Option<u32> {
    let of_vxlan = |info: &InfoVxlan| match info {
        InfoVxlan::Link(index) => Some(*index),
        _ => None,
    };
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(infos)) => infos.iter().find_map(of_vxlan),
        _ => None,
    })
}

fn link_vlan(infos: &[LinkInfo]) -> Option<(u16, u16)> {
    let vlan = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vlan(vlan)) => Some(vlan),
        _ => None,
    })?;
    let (mut protocol, mut id) = (VlanProtocol::Ieee8021Q, None);
    for part in vlan {
        match part {
            InfoVlan::Id(number) => id = Some(*number),
            InfoVlan::Protocol(said) => protocol = *said,
            _ => {}
        }
    }
    Some((protocol.into(), id?))
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
        // nobody set one, and the kernel's routing has it all the same
        broadcast = Some(Ipv4Addr::from_bits(network.to_bits() | u32::MAX >> prefix).into());
    }
    // of a point-to-point link the plain address is the peer's
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

/// What the address of a local sender depends on: the interface, and the destination or, on IPv4,
/// the gateway, which many have.
fn source_key(destination: IpAddr, path: &Route) -> (u32, IpAddr, bool) {
    let by_gateway = destination.is_ipv4() && path.gateway != destination;
    (path.ifindex, if by_gateway { path.gateway } else { destination }, by_gateway)
}

/// An address that is nowhere but on one link: no table is asked where that is.
fn on_link(address: IpAddr, interface: &str, links: &HashMap<u32, Link>) -> Result<Route, String> {
    let link = find_link(links.values(), interface);
    let link = link.ok_or_else(|| format!("there is no interface {interface}"))?;
    Ok(Route { ifindex: link.index, gateway: address, mtu: None, egress: None, local: false })
}

/// The kernel's reason why an address has no route, by the error that a look-up ends with; any other
/// error is no answer.
fn no_route(error: &io::Error) -> Option<String> {
    let reason = match error.raw_os_error()? {
        libc::EINVAL => "a blackhole route drops its packets",
        libc::EACCES => "a prohibit route refuses its packets",
        libc::EHOSTUNREACH => "an unreachable route refuses its packets",
        libc::ENETUNREACH => "no route matches",
        libc::ENETDOWN | libc::ENODEV | libc::EADDRNOTAVAIL => return Some(error.to_string()),
        _ => return None,
    };
    Some(reason.into())
}

/// Nothing for a route that leads nowhere: blackhole, unreachable, multicast, broadcast. Paths
/// that are down come last.
fn route(address: IpAddr, message: &RouteMessage) -> Vec<Route> {
    let local = message.header.kind == RouteType::Local;
    if !local && message.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    });
    let egress = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(address) => ip(address),
        _ => None,
    });
    let mut only = Route { ifindex: 0, gateway: address, mtu, egress, local };
    let (mut alive, mut dead) = (Vec::new(), Vec::new());
    for attribute in &message.attributes {
        let RouteAttribute::MultiPath(hops) = attribute else { continue };
        for hop in hops {
            let mut path = Route { ifindex: hop.interface_index, ..only };
            read_hop(&mut path, &hop.attributes);
            let down = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
            if hop.flags.intersects(down) { dead.push(path) } else { alive.push(path) }
        }
    }
    if address.is_ipv6() {
        // the kernel begins with any of them
        alive.sort_by_key(Route::neighbour);
        dead.sort_by_key(Route::neighbour);
    }
    read_hop(&mut only, &message.attributes);
    alive.append(&mut dead);
    alive.push(only);
    alive.retain(|path| path.ifindex != 0);
    alive
}

/// A route as a dump has it.
fn table_route(message: &RouteMessage, ipv6: bool) -> Option<TableRoute> {
    let anywhere: IpAddr = match ipv6 {
        true => Ipv6Addr::UNSPECIFIED.into(),
        false => Ipv4Addr::UNSPECIFIED.into(),
    };
    let header = &message.header;
    let (mut table, mut address, mut metric) = (u32::from(header.table), anywhere, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(destination) => address = ip(destination)?,
            RouteAttribute::Priority(priority) => metric = *priority,
            // for some senders or classes of service only, which the kernel has hardly ever
            RouteAttribute::Source(_) => return None,
            _ => {}
        }
    }
    let outcome = match header.kind {
        RouteType::Throw => None,
        RouteType::BlackHole => Some(Err("a blackhole route drops its packets".into())),
        RouteType::Prohibit => Some(Err("a prohibit route refuses its packets".into())),
        RouteType::Unreachable => Some(Err("an unreachable route refuses its packets".into())),
        _ => match route(anywhere, message) {
            routes if routes.is_empty() => Some(Err("no unicast route".into())),
            routes => Some(Ok(routes)),
        },
    };
    let network = Network::new(address, header.destination_prefix_length);
    Some(TableRoute { table, network, metric, outcome })
}

/// A rule of `ip rule`. Packets come without a mark, as those of the program do that the kernel is asked
/// about; their source port and class of service are anything.
fn policy_rule(message: &RuleMessage) -> PolicyRule {
    let header = &message.header;
    let mut rule = PolicyRule {
        priority: 0,
        inverted: header.flags.contains(RuleFlags::Invert),
        from: None,
        to: None,
        input: None,
        vrf: false,
        others: if header.tos == 0 { Match::All } else { Match::Some },
        suppressed: None,
        action: PolicyAction::Nop,
    };
    let (mut table, mut target, mut mark, mut mask) = (u32::from(header.table), 0, 0, u32::MAX);
    for attribute in &message.attributes {
        let matches = match attribute {
            RuleAttribute::Source(address) => {
                rule.from = Some(Network::new(*address, header.src_len));
                Match::All
            }
            RuleAttribute::Destination(address) => {
                rule.to = Some(Network::new(*address, header.dst_len));
                Match::All
            }
            RuleAttribute::Iifname(name) => {
                rule.input = Some(name.clone());
                Match::All
            }
            RuleAttribute::L3MDev(is_set) => {
                rule.vrf = *is_set;
                Match::All
            }
            RuleAttribute::SuppressPrefixLen(length) => {
                // all ones: none
                rule.suppressed = u8::try_from(*length).ok();
                Match::All
            }
            RuleAttribute::Priority(priority) => {
                rule.priority = *priority;
                Match::All
            }
            RuleAttribute::Table(id) => {
                table = *id;
                Match::All
            }
            RuleAttribute::Goto(priority) => {
                target = *priority;
                Match::All
            }
            RuleAttribute::FwMark(bits) => {
                mark = *bits;
                Match::All
            }
            RuleAttribute::FwMask(bits) => {
                mask = *bits;
                Match::All
            }
            // a route's protocol, and its realm
            RuleAttribute::Protocol(_) | RuleAttribute::Realm(_) => Match::All,
            RuleAttribute::Oifname(_) => Match::No,
            RuleAttribute::TunId(id) if *id != 0 => Match::No,
            RuleAttribute::IpProtocol(protocol) if *protocol != IpProtocol::Udp => Match::No,
            RuleAttribute::UidRange(range) if range.start != 0 => Match::No,
            RuleAttribute::TunId(_) | RuleAttribute::IpProtocol(_) | RuleAttribute::UidRange(_) => {
                Match::All
            }
            // ports, and whatever else there is
            _ => Match::Some,
        };
        rule.others = rule.others.min(matches);
    }
    if mark & mask != 0 {
        rule.others = Match::No;
    }
    rule.action = match header.action {
        RuleAction::ToTable => PolicyAction::Table(table),
        RuleAction::Goto if !header.flags.contains(RuleFlags::Unresolved) => {
            PolicyAction::Goto(target)
        }
        RuleAction::Blackhole => PolicyAction::Refuse("a blackhole rule drops its packets"),
        RuleAction::Unreachable => PolicyAction::Refuse("an unreachable rule refuses its packets"),
        RuleAction::Prohibit => PolicyAction::Refuse("a prohibit rule refuses its packets"),
        _ => PolicyAction::Nop,
    };
    rule
}

fn read_hop(route: &mut Route, attributes: &[RouteAttribute]) {
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => route.ifindex = *index,
            RouteAttribute::Gateway(gateway) => {
                route.gateway = ip(gateway).unwrap_or(route.gateway);
            }
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => route.gateway = (*gateway).into(),
            _ => {}
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let mut neighbour = Neighbour {
        ifindex: message.header.ifindex,
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        mac: None,
        state: nud_state(message.header.state),
        confirmed: None,
        updated: None,
        managed: false,
        protocol: 0,
        learned: message.header.flags.contains(NeighbourFlags::ExtLearned),
    };
    let mut found = false;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(inet)) => {
                (neighbour.address, found) = (IpAddr::V4(*inet), true);
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(inet6)) => {
                (neighbour.address, found) = (IpAddr::V6(*inet6), true);
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => neighbour.mac = mac(bytes),
            // in hundredths of a second, whatever the kernel's own clock
            NeighbourAttribute::CacheInfo(info) => {
                let age = |hundredths: u32| Some(Duration::from_millis(u64::from(hundredths) * 10));
                (neighbour.confirmed, neighbour.updated) = (age(info.confirmed), age(info.updated));
            }
            NeighbourAttribute::Protocol(protocol) => neighbour.protocol = u8::from(*protocol),
            NeighbourAttribute::ExtFlags(flags) => {
                neighbour.managed = flags.contains(NeighbourExtFlags::Managed);
            }
            _ => {}
        }
    }
    found.then_some(neighbour)
}

fn nud_state(state: NeighbourState) -> NudState {
    match state {
        NeighbourState::Incomplete => NudState::Incomplete,
        NeighbourState::Reachable => NudState::Reachable,
        NeighbourState::Stale => NudState::Stale,
        NeighbourState::Delay => NudState::Delay,
        NeighbourState::Probe => NudState::Probe,
        NeighbourState::Failed => NudState::Failed,
        NeighbourState::Noarp => NudState::Noarp,
        NeighbourState::Permanent => NudState::Permanent,
        _ => NudState::None,
    }
}

/// The messages of a request: the kernel forgets that it keeps an entry whenever its state is
/// set, so that a probe has to say so again. They do not ask to replace anything (NLM_F_REPLACE):
/// that would make of an IPv6 router an ordinary host.
fn neighbour_messages(key: NeighbourKey, request: NeighbourRequest) -> Vec<RouteNetlinkMessage> {
    let message = |state, flags, ext_flags| {
        let mut message = NeighbourMessage::default();
        message.header.family = family(key.1);
        message.header.ifindex = key.0;
        message.header.state = state;
        message.header.flags = flags;
        message.attributes = vec![
            NeighbourAttribute::Destination(key.1.into()),
            NeighbourAttribute::Protocol(RouteProtocol::from(OUR_PROTOCOL)),
            NeighbourAttribute::ExtFlags(ext_flags),
        ];
        RouteNetlinkMessage::NewNeighbour(message)
    };
    let (no_flags, none) = (NeighbourFlags::empty(), NeighbourExtFlags::empty());
    let keep = message(NeighbourState::None, NeighbourFlags::Use, NeighbourExtFlags::Managed);
    match request {
        NeighbourRequest::Keep => vec![keep],
        NeighbourRequest::Probe => vec![message(NeighbourState::Probe, no_flags, none), keep],
        NeighbourRequest::Release => vec![message(NeighbourState::Stale, no_flags, none)],
    }
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
    let (mut chain, mut direct, mut action) = (0, false, None);
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
                TcOption::Bpf(TcFilterBpfOption::Flags(flags)) => {
                    direct = flags.contains(TcBpfFlags::DirectAction);
                }
                TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))
                | TcOption::U32(TcFilterU32Option::Action(actions))
                | TcOption::Flower(TcFilterFlowerOption::Actions(actions)) => {
                    action = actions.iter().find_map(decision);
                }
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
        direct,
        action,
    })
}

/// What an action decides; `None`: the next one is asked, or it does not say.
fn decision(action: &TcAction) -> Option<i32> {
    /// `TCA_GACT_PARMS`, and `TCA_MIRRED_PARMS` and others after it.
    const PARAMETERS: u16 = 2;
    const PIPE: i32 = 3;
    action.attributes.iter().find_map(|attribute| {
        let TcActionAttribute::Options(options) = attribute else { return None };
        let parameters = options.iter().find(|option| option.kind() == PARAMETERS)?;
        let mut bytes = vec![0; parameters.value_len()];
        parameters.emit_value(&mut bytes);
        // struct tc_gen: index, capabilities, action
        let decision = i32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        (decision != PIPE).then_some(decision)
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::tc::{TcAction, TcActionAttribute, TcActionOption};

    use super::{Netlink, decision};

    /// Polls a request until it waits for its answer, and lets the connection die then.
    #[test]
    fn connection_that_dies_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let found = runtime.expect("a runtime").block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().expect("a socket");
            let netlink = Netlink { handle };
            let died = async {
                tokio::task::yield_now().await;
                drop(connection);
            };
            let (links, ()) = tokio::join!(netlink.links(), died);
            // nor is one that has died before
            (links, netlink.qdiscs().await)
        });
        let text = found.0.expect_err("no answer").to_string();
        assert!(text.contains("ended before the answer"), "{text}");
        assert!(found.1.is_err());
    }

    /// Its parameters are these words.
    fn action(kind: u16, words: &[i32]) -> TcAction {
        let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let option = TcActionOption::Other(DefaultNla::new(kind, bytes));
        let mut action = TcAction::default();
        action.attributes =
            vec![TcActionAttribute::Kind("gact".into()), TcActionAttribute::Options(vec![option])];
        action
    }

    #[test]
    fn what_actions_decide() {
        // index, capabilities, action, and how often it is used
        assert_eq!(decision(&action(2, &[1, 0, 0, 1, 1])), Some(0));
        assert_eq!(decision(&action(2, &[1, 0, -1, 1, 1])), Some(-1));
        assert_eq!(decision(&action(2, &[1, 0, 3, 1, 1])), None);
        assert_eq!(decision(&action(2, &[1, 0])), None);
        assert_eq!(decision(&action(7, &[1, 0, 0])), None);
    }
}
