//! ICMP errors that quote relayed packets: evidence about services that costs no packet.

use std::io;
use std::net::{IpAddr, UdpSocket as StdUdpSocket};
use std::os::fd::AsRawFd;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

/// Most errors that are read at once, so that a flood does not hold up the lease.
const BATCH: usize = 64;
/// Bytes of an error that are looked at: its headers and those that it quotes.
const MAX_ERROR: usize = 256;

/// linux/icmp.h: a socket option of raw sockets, a mask of types that are left out.
const ICMP_FILTER: i32 = 1;
/// linux/icmpv6.h: the like for IPv6, eight words.
const ICMPV6_FILTER: i32 = 1;

/// The receiver and the sender's port of a UDP packet that did not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quote {
    pub address: IpAddr,
    pub port: u16,
    pub source_port: u16,
}

/// Sockets that receive the errors; none while nobody wants them.
#[derive(Default)]
pub struct Quotes {
    sockets: Option<[UdpSocket; 2]>,
}

impl Quotes {
    /// Opens or closes the sockets.
    ///
    /// # Errors
    /// Not permitted: CAP_NET_RAW is missing.
    pub fn listen(&mut self, wanted: bool) -> io::Result<()> {
        match (wanted, &self.sockets) {
            (true, None) => self.sockets = Some([open(false)?, open(true)?]),
            (false, Some(_)) => self.sockets = None,
            _ => {}
        }
        Ok(())
    }

    /// Waits for errors.
    pub async fn wait(&self) {
        let Some([ipv4, ipv6]) = &self.sockets else { return std::future::pending().await };
        let _ = tokio::select! {
            result = ipv4.readable() => result,
            result = ipv6.readable() => result,
        };
    }

    /// Takes the errors that have come.
    pub fn take(&self) -> Vec<Quote> {
        let mut quotes = Vec::new();
        let sockets = self.sockets.iter().flatten().zip([false, true]);
        for (socket, is_ipv6) in sockets {
            let mut buffer = [0; MAX_ERROR];
            for _ in 0..BATCH {
                let Ok((length, _)) = socket.try_recv_from(&mut buffer) else { break };
                quotes.extend(quote(is_ipv6, &buffer[..length]));
            }
        }
        quotes
    }
}

fn open(is_ipv6: bool) -> io::Result<UdpSocket> {
    const UNREACHABLE: u32 = 3;
    const UNREACHABLE_V6: u32 = 1;
    let (domain, protocol) = match is_ipv6 {
        false => (Domain::IPV4, Protocol::ICMPV4),
        true => (Domain::IPV6, Protocol::ICMPV6),
    };
    let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(protocol))?;
    let (level, option, mask) = match is_ipv6 {
        false => (libc::SOL_RAW, ICMP_FILTER, vec![!(1 << UNREACHABLE)]),
        true => {
            let mut mask = vec![u32::MAX; 8];
            mask[0] &= !(1 << UNREACHABLE_V6);
            (libc::IPPROTO_ICMPV6, ICMPV6_FILTER, mask)
        }
    };
    let length = size_of_val(&mask[..]) as libc::socklen_t;
    // SAFETY: the pointer is to integers that live during the call, and the length is their size.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, mask.as_ptr().cast(), length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    UdpSocket::from_std(StdUdpSocket::from(socket))
}

/// Returns the packet that an error quotes, if its port or host was unreachable. An IPv4 error has its IP
/// header, an IPv6 error has none.
fn quote(is_ipv6: bool, error: &[u8]) -> Option<Quote> {
    let header = match is_ipv6 {
        false => usize::from(error.first()? & 0xf) * 4,
        true => 0,
    };
    let icmp = error.get(header..)?;
    match (is_ipv6, icmp.get(..2)?) {
        (false, [3, 1 | 3]) | (true, [1, 3 | 4]) => {}
        _ => return None,
    }
    let packet = LaxSlicedPacket::from_ip(icmp.get(8..)?).ok()?;
    let address = match packet.net? {
        LaxNetSlice::Ipv4(ip) => ip.header().destination_addr().into(),
        LaxNetSlice::Ipv6(ip) => ip.header().destination_addr().into(),
        LaxNetSlice::Arp(_) => return None,
    };
    let TransportSlice::Udp(udp) = packet.transport? else { return None };
    Some(Quote { address, port: udp.destination_port(), source_port: udp.source_port() })
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::{Quote, quote};

    /// Returns the first bytes of a UDP packet from port 60000 to port 53.
    fn packet(is_ipv6: bool, length: usize) -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = match is_ipv6 {
            false => PacketBuilder::ipv4([10, 1, 0, 1], [10, 2, 0, 20], 64),
            true => PacketBuilder::ipv6([1; 16], [2; 16], 64),
        };
        builder.udp(60_000, 53).write(&mut packet, &[0; 100]).expect("a vector takes it");
        packet.truncate(length);
        packet
    }

    fn error(is_ipv6: bool, kind: u8, code: u8, quoted: &[u8]) -> Vec<u8> {
        let outer = if is_ipv6 { Vec::new() } else { packet(false, 20) };
        [&outer[..], &[kind, code, 0, 0, 0, 0, 0, 0], quoted].concat()
    }

    #[test]
    fn unreachable_ports_and_hosts_are_quotes() {
        let (ipv4, ipv6) = (packet(false, 28), packet(true, 100));
        let found = |address| Some(Quote { address, port: 53, source_port: 60_000 });
        let (host, host6) = ([10, 2, 0, 20].into(), [2; 16].into());
        assert_eq!(quote(false, &error(false, 3, 3, &ipv4)), found(host));
        assert_eq!(quote(false, &error(false, 3, 1, &ipv4)), found(host));
        assert_eq!(quote(true, &error(true, 1, 4, &ipv6)), found(host6));
        // fragmentation needed, and an echo
        assert_eq!(quote(false, &error(false, 3, 4, &ipv4)), None);
        assert_eq!(quote(false, &error(false, 8, 3, &ipv4)), None);
        assert_eq!(quote(false, &error(false, 3, 3, &ipv4[..24])), None);
    }

    proptest! {
        #[test]
        fn garbage_does_not_panic(is_ipv6: bool, error in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = quote(is_ipv6, &error);
        }
    }
}
