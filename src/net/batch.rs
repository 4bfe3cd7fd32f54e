//! Many requests with one system call. The kernel answers each before the call returns.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use super::{WINDOW, lost};

/// Room for the answers that one call to the socket returns.
const ANSWERS: usize = 1 << 16;

/// A socket of its own, in the network namespace of the thread that opened it.
pub(super) struct Batches {
    socket: Socket,
    /// Sequence number of the next request.
    next: AtomicU32,
}

/// The message that answers a request, or the kernel's error.
pub(super) type Answer = io::Result<RouteNetlinkMessage>;

impl Batches {
    pub fn open() -> io::Result<Batches> {
        Ok(Batches { socket: Socket::new(NETLINK_ROUTE)?, next: AtomicU32::new(1) })
    }

    /// Sends requests that one message answers; returns the answers in their order.
    ///
    /// # Errors
    /// An answer was lost.
    pub fn request(&self, requests: Vec<RouteNetlinkMessage>) -> io::Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let window = requests.by_ref().take(WINDOW);
            let first = self.next.fetch_add(WINDOW as u32, Ordering::Relaxed);
            let sent = self.send(first, NLM_F_REQUEST, window)?;
            answers.extend(self.receive(first, sent)?);
        }
        Ok(answers)
    }

    /// Passes the messages of a dump to `each` until it returns false; returns true if the dump came to its end and
    /// is consistent. Closing the socket ends a dump.
    pub fn dump(
        self,
        request: RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage) -> bool,
    ) -> io::Result<bool> {
        self.send(0, NLM_F_REQUEST | NLM_F_DUMP, std::iter::once(request))?;
        let mut bytes = vec![0; ANSWERS];
        loop {
            let length = self.socket.recv(&mut &mut bytes[..], 0)?;
            let mut rest = &bytes[..length.min(ANSWERS)];
            while !rest.is_empty() {
                let message = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
                let after = (message.header.length as usize).next_multiple_of(4).min(rest.len());
                if let NetlinkPayload::Done(done) = message.payload {
                    return Ok(done.code == 0);
                }
                if message.header.flags & NLM_F_DUMP_INTR != 0 || !each(answer(message.payload)?) {
                    return Ok(false);
                }
                rest = &rest[after..];
            }
        }
    }

    /// Sends requests with sequence numbers from `first` on; returns how many.
    fn send(
        &self,
        first: u32,
        flags: u16,
        requests: impl Iterator<Item = RouteNetlinkMessage>,
    ) -> io::Result<usize> {
        let (mut bytes, mut count) = (Vec::new(), 0);
        for request in requests {
            let mut message = NetlinkMessage::from(request);
            message.header.flags = flags;
            message.header.sequence_number = first.wrapping_add(count);
            message.finalize();
            let start = bytes.len();
            bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut bytes[start..]);
            count += 1;
        }
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        Ok(count as usize)
    }

    /// Receives the answers to so many requests.
    fn receive(&self, first: u32, count: usize) -> io::Result<Vec<Answer>> {
        let mut answers: Vec<Option<Answer>> = (0..count).map(|_| None).collect();
        let mut bytes = vec![0; ANSWERS];
        while answers.iter().any(Option::is_none) {
            let length = self.socket.recv(&mut &mut bytes[..], libc::MSG_DONTWAIT);
            let length = length.map_err(|error| lost(&format!("an answer was lost: {error}")))?;
            let mut rest = &bytes[..length.min(ANSWERS)];
            while !rest.is_empty() {
                let message = NetlinkMessage::deserialize(rest).map_err(io::Error::other)?;
                let nth = message.header.sequence_number.wrapping_sub(first) as usize;
                let after = (message.header.length as usize).next_multiple_of(4).min(rest.len());
                // an earlier batch may have failed before its last answer
                if let Some(place) = answers.get_mut(nth) {
                    *place = Some(answer(message.payload));
                }
                rest = &rest[after..];
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}

fn answer(payload: NetlinkPayload<RouteNetlinkMessage>) -> Answer {
    match payload {
        NetlinkPayload::InnerMessage(message) => Ok(message),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(lost("the answer is none")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::Batches;
    use crate::net::route::{RouteFlags, route_request};

    /// All of 127.0.0.0/8 is this host's; a third is asked for from an interface that does not exist.
    #[test]
    fn answers_are_in_the_order_of_the_requests() {
        let batches = Batches::open().expect("a socket");
        let request = |nth: u32| {
            let address = Ipv4Addr::from_bits(0x7f00_0001 + nth);
            let output = if nth.is_multiple_of(3) { i32::MAX as u32 } else { 0 };
            route_request(address.into(), output, RouteFlags::empty())
        };
        let answers = batches.request((0..1000).map(request).collect()).expect("answers");
        assert_eq!(answers.len(), 1000);
        for (nth, answer) in (0_u32..).zip(answers) {
            assert_eq!(answer.is_err(), nth.is_multiple_of(3), "{nth}: {answer:?}");
        }
    }
}
