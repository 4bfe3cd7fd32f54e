//! rtnetlink, in the project's own types. Only this folder uses the netlink crates, whose interfaces
//! change often.

pub mod address;
mod batch;
pub mod ethtool;
pub mod events;
pub mod ipsec;
pub mod link;
pub mod neighbour;
pub mod nexthop;
pub mod policy;
pub mod qdisc;
pub mod route;
pub mod routing;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use batch::Batches;

/// Number of concurrent requests: their answers fit into the socket's receive buffer.
const WINDOW: usize = 64;

/// Number of attempts at a dump that is inconsistent.
const DUMP_ATTEMPTS: u32 = 4;

/// Time limit for one message of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

fn lost(what: &str) -> io::Error {
    io::Error::other(format!("netlink: {what}; whether the request was carried out is not known"))
}

/// A connection to rtnetlink in the network namespace of the thread that opened it.
#[derive(Clone)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    batches: Arc<Batches>,
}

impl Netlink {
    /// Opens a socket and drives it as a task of the running tokio runtime.
    pub fn open() -> io::Result<Netlink> {
        let (mut connection, handle, _) = rtnetlink::new_connection()?;
        // The end of an answer differs from the end of the connection.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        tokio::spawn(connection);
        Ok(Netlink { handle, batches: Arc::new(Batches::open()?) })
    }

    /// Requests a dump and converts its messages; those that `convert` returns `None` for are left out.
    async fn dump<T>(
        &self,
        message: RouteNetlinkMessage,
        convert: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let replies = self.request(message, NLM_F_DUMP).await?;
        Ok(replies.into_iter().filter_map(convert).collect())
    }

    /// Sends one message and collects its answer. An inconsistent dump (NLM_F_DUMP_INTR: the table changed
    /// meanwhile) is repeated, which the handles of `rtnetlink` do not do.
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
        // The table changes all the time; the next dump has what this one lacks.
        self.request_once(message, flags).await.map(|(messages, _)| messages)
    }

    /// Returns the answer, and false if it is an inconsistent dump.
    ///
    /// # Errors
    /// The kernel refused the request, or its answer is incomplete: without ACK, DONE or, if neither is
    /// requested, a message.
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
}

fn family(address: IpAddr) -> AddressFamily {
    family_of(address.is_ipv6())
}

fn family_of(ipv6: bool) -> AddressFamily {
    if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn mac(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{Batches, Netlink};

    /// Drops the connection while a request waits for its answer.
    #[test]
    fn connection_that_dies_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let found = runtime.expect("a runtime").block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().expect("a socket");
            let batches = Arc::new(Batches::open().expect("another socket"));
            let netlink = Netlink { handle, batches };
            let died = async {
                tokio::task::yield_now().await;
                drop(connection);
            };
            let (links, ()) = tokio::join!(netlink.links(), died);
            // A later request on it fails too.
            (links, netlink.qdiscs().await)
        });
        let text = found.0.expect_err("no answer").to_string();
        assert!(text.contains("ended before the answer"), "{text}");
        assert!(found.1.is_err());
    }
}
