//! Notifications of changes.

use std::io;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;
use rtnetlink::sys::Socket;
use tokio::io::unix::AsyncFd;

use super::neighbour::{Neighbour, NeighbourKey, neighbour};

/// A notification of the kernel.
#[derive(Clone, Debug)]
pub enum Event {
    Neighbour(Neighbour),
    NeighbourGone(NeighbourKey),
    /// Interfaces or addresses have changed.
    Links,
    /// Qdiscs or filters may have changed.
    Filters,
    /// Routes, rules or next hop objects have changed.
    Routes,
    /// The receive buffer overflowed: notifications are lost.
    Lost,
}

/// Change notifications of the kernel. Some may be lost; nothing may depend on all of them.
pub struct Events {
    socket: AsyncFd<Socket>,
    buffer: Vec<u8>,
}

impl Events {
    /// Size of the receive buffer in bytes. An overflow is reported as an event.
    const BACKLOG: usize = 1 << 20;

    /// Subscribes in the network namespace of this thread.
    pub fn open() -> io::Result<Events> {
        use MulticastGroup::{
            Ipv4Ifaddr, Ipv4Route, Ipv4Rule, Ipv6Ifaddr, Ipv6Ifinfo, Ipv6Route, Ipv6Rule, Link,
            Neigh, Nexthop, Tc,
        };
        let mut socket = Socket::new(rtnetlink::sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        // The system's limit may be lower; losses are noticed.
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

    /// Waits for notifications.
    pub async fn wait(&self) -> io::Result<()> {
        let mut ready = self.socket.readable().await?;
        ready.retain_ready();
        Ok(())
    }

    /// Returns the notifications received so far.
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
        // Unknown, perhaps of a newer kernel: it may matter.
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

/// Returns true for the types of qdiscs, classes, filters, actions and chains. The payload is not parsed.
fn is_about_tc(message: &[u8]) -> bool {
    let kind = message.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    kind.is_some_and(|kind| {
        (libc::RTM_NEWQDISC..=libc::RTM_GETACTION).contains(&kind) || (100..=102).contains(&kind)
    })
}
