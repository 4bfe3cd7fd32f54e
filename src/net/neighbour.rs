//! Neighbour tables: entries, probes and limits.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use std::{fmt, io};

use futures_util::{StreamExt, stream};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
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
    /// Since it last answered.
    pub confirmed: Option<Duration>,
    /// Since its state changed.
    pub updated: Option<Duration>,
    /// The kernel keeps it resolved by itself.
    pub managed: bool,
    /// Creator: [`OUR_PROTOCOL`] for ours, 0 for the kernel or unknown.
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

/// Tag (`NDA_PROTOCOL`) of the neighbours that the kernel keeps for udplb. Unused in iproute2's
/// rt_protos.
pub const OUR_PROTOCOL: u8 = 117;

/// A neighbour: the interface's index and the address.
pub type NeighbourKey = (u32, IpAddr);

/// Request about one neighbour.
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

/// Fill level of a neighbour table. The kernel has one per family for all network namespaces.
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

impl Netlink {
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

    /// Returns the fill levels of the neighbour tables.
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
