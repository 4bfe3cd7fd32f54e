//! Neighbour tables: entries, probes and limits.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use std::{fmt, io};

use futures_util::{StreamExt, stream};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
    NeighbourState,
};
use netlink_packet_route::neighbour_table::{NeighbourTableAttribute, NeighbourTableMessage};
use netlink_packet_route::route::RouteProtocol;
use rtnetlink::sys::{Socket, SocketAddr};

use super::{Netlink, WINDOW, family, mac};

/// An entry of the neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub ifindex: u32,
    pub address: IpAddr,
    pub mac: Option<[u8; 6]>,
    pub state: NudState,
    /// Time since its last answer.
    pub confirmed: Option<Duration>,
    /// Time since its state changed.
    pub updated: Option<Duration>,
    /// True if the kernel keeps it resolved (`NTF_EXT_MANAGED`).
    pub managed: bool,
    /// Creator: [`OUR_PROTOCOL`] for ours, 0 for the kernel or unknown.
    pub protocol: u8,
    /// True if a control plane maintains it instead of ARP (`NTF_EXT_LEARNED`).
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
    /// Returns true for `NUD_VALID`: the kernel sends to the neighbour.
    pub fn is_valid(self) -> bool {
        !matches!(self, NudState::None | NudState::Incomplete | NudState::Failed)
    }

    /// Returns true if the address is fixed, so that no request is needed.
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

/// Tag (`NDA_PROTOCOL`) of the neighbours that the kernel keeps for udplb. Unused in iproute2's
/// rt_protos.
pub const OUR_PROTOCOL: u8 = 117;

/// Key of a neighbour: index of the interface, and address.
pub type NeighbourKey = (u32, IpAddr);

/// Request about one neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourRequest {
    /// Resolve the address if unknown, and have the kernel keep it resolved. Kernels before 5.16 only
    /// resolve it.
    Keep,
    /// Probe the neighbour although its address is known.
    Probe,
    /// Stop keeping it resolved.
    Release,
}

/// Fill level of a neighbour table. The kernel has one per family for all network namespaces.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeighbourTable {
    pub ipv6: bool,
    pub entries: u32,
    /// Above this number, entries are removed a few seconds after their last use.
    pub threshold2: u32,
    /// Above this number, new entries are refused.
    pub threshold3: u32,
}

impl NeighbourTable {
    /// Returns the sysctl's name of one of its settings.
    pub fn sysctl(&self, name: &str) -> String {
        format!("net.{}.neigh.default.{name}", if self.ipv6 { "ipv6" } else { "ipv4" })
    }
}

impl Netlink {
    /// Returns the neighbours of both families.
    pub async fn neighbours(&self) -> io::Result<Vec<Neighbour>> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump(request, |reply| match reply {
            RouteNetlinkMessage::NewNeighbour(message) => neighbour(&message),
            _ => None,
        })
        .await
    }

    /// Has the kernel resolve each neighbour as for a waiting packet (`NTF_USE`).
    pub async fn solicit(&self, neighbours: &[NeighbourKey]) -> Vec<io::Result<()>> {
        let solicit = |key: &NeighbourKey| {
            let message = message(*key, NeighbourState::None, NeighbourFlags::Use);
            let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
            self.request(RouteNetlinkMessage::NewNeighbour(message), flags)
        };
        let results = stream::iter(neighbours.iter().map(solicit)).buffered(WINDOW);
        results.map(|result| result.map(drop)).collect().await
    }

    /// Removes entries from the neighbour tables; a missing entry is no error.
    pub async fn delete_neighbours(&self, neighbours: &[NeighbourKey]) -> io::Result<()> {
        for key in neighbours {
            let message = message(*key, NeighbourState::None, NeighbourFlags::empty());
            match self.request(RouteNetlinkMessage::DelNeighbour(message), NLM_F_ACK).await {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the kernel probe known neighbours; a missing entry is no error.
    pub async fn probe(&self, neighbours: &[NeighbourKey]) {
        let probe = |key: &NeighbourKey| {
            let message = message(*key, NeighbourState::Probe, NeighbourFlags::empty());
            self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_ACK)
        };
        let results: Vec<_> =
            stream::iter(neighbours.iter().map(probe)).buffered(WINDOW).collect().await;
        for ((_, address), result) in neighbours.iter().zip(results) {
            if let Err(error) = result {
                log::info!("neighbour {address}: {error}");
            }
        }
    }

    /// Returns the fill levels of the neighbour tables.
    pub async fn neighbour_tables(&self) -> io::Result<Vec<NeighbourTable>> {
        let request = RouteNetlinkMessage::GetNeighbourTable(NeighbourTableMessage::default());
        self.dump(request, |reply| match reply {
            RouteNetlinkMessage::NewNeighbourTable(message) => neighbour_table(message),
            _ => None,
        })
        .await
    }
}

/// A socket for many small requests. They are sent in batches; the kernel has answered a batch when
/// `send` returns.
pub struct Batches {
    socket: Socket,
    sequence: u32,
}

impl Batches {
    /// Number of messages of a batch: their answers fit into the receive buffer.
    const MAX_MESSAGES: usize = 64;

    /// Opens a socket in the network namespace of this thread.
    pub fn open() -> io::Result<Batches> {
        let mut socket = Socket::new(rtnetlink::sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_cap_ack(true)?;
        socket.set_non_blocking(true)?;
        Ok(Batches { socket, sequence: 0 })
    }

    /// Sends requests; returns the first error of each request's messages.
    pub fn neighbours(
        &mut self,
        requests: &[(NeighbourKey, NeighbourRequest)],
    ) -> io::Result<Vec<io::Result<()>>> {
        let mut results = Vec::with_capacity(requests.len());
        for requests in requests.chunks(Self::MAX_MESSAGES / 2) {
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

/// Parses a neighbour table; `None` for other protocols and for settings of single interfaces.
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
            NeighbourTableAttribute::Threshold2(max) => table.threshold2 = max,
            NeighbourTableAttribute::Threshold3(max) => (table.threshold3, whole) = (max, true),
            _ => {}
        }
    }
    (known && whole).then_some(table)
}

pub(super) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
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
            // In units of USER_HZ, a hundredth of a second.
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

fn message(
    (ifindex, address): NeighbourKey,
    state: NeighbourState,
    flags: NeighbourFlags,
) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = ifindex;
    message.header.state = state;
    message.header.flags = flags;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message
}

/// Returns the messages of a request. Setting a state clears NTF_EXT_MANAGED, so a probe sets it again.
/// NLM_F_REPLACE is not set: it would clear the router flag of an IPv6 neighbour.
fn neighbour_messages(key: NeighbourKey, request: NeighbourRequest) -> Vec<RouteNetlinkMessage> {
    let message = |state, flags, ext_flags| {
        let mut message = message(key, state, flags);
        message.attributes.extend([
            NeighbourAttribute::Protocol(RouteProtocol::from(OUR_PROTOCOL)),
            NeighbourAttribute::ExtFlags(ext_flags),
        ]);
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

/// Returns advice if more neighbours are needed than the kernel's table holds.
pub fn overflow(wanted: usize, others: usize, table: &NeighbourTable) -> Option<String> {
    let all = wanted + others;
    let (name, limit) = if all >= table.threshold3 as usize {
        ("gc_thresh3", table.threshold3)
    } else if all > table.threshold2 as usize {
        ("gc_thresh2", table.threshold2)
    } else {
        return None;
    };
    Some(format!(
        "{all} neighbours ({wanted} next hops, {others} others) are more than the kernel's table is set for: \
         raise the sysctl {} (now {limit})",
        table.sysctl(name)
    ))
}

#[cfg(test)]
mod tests {
    use super::{NeighbourTable, overflow};

    #[test]
    fn limits_of_the_table() {
        let mut table = NeighbourTable { threshold2: 512, threshold3: 1024, ..Default::default() };
        assert_eq!(overflow(400, 112, &table), None);
        let text = overflow(500, 100, &table).expect("too many");
        assert!(text.contains("net.ipv4.neigh.default.gc_thresh2 (now 512)"), "{text}");
        table.ipv6 = true;
        let text = overflow(1000, 100, &table).expect("too many");
        assert!(text.contains("net.ipv6.neigh.default.gc_thresh3 (now 1024)"), "{text}");
    }
}
