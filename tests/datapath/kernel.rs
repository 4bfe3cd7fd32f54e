//! ICMP errors that the kernel delivers to a sender, and the kernel's counters.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use crate::common::Namespace;
use crate::common::net::{SILENCE, own, poll, set, socket_address};

/// Returns a counter of /proc/net/snmp or snmp6 by its name there, such as `UdpInCsumErrors`.
pub fn counted(namespace: &Namespace, name: &str) -> u64 {
    let read = |file: &str| {
        namespace.enter(|| fs::read_to_string(format!("/proc/thread-self/net/{file}"))).expect("it")
    };
    let (four, six) = (read("snmp"), read("snmp6"));
    let lines: Vec<&str> = four.lines().collect();
    // a line of names, then a line of values, both starting with the protocol
    let pairs = lines.chunks(2).flat_map(|pair| {
        let words = pair[0].split_whitespace().zip(pair[1].split_whitespace());
        let protocol = pair[0].split(':').next().unwrap_or_default();
        words.skip(1).map(move |(name, value)| (format!("{protocol}{name}"), value))
    });
    let sixes = six.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let all = pairs.chain(sixes.map(|(name, value)| (name.into(), value.trim())));
    let value = all.filter(|(found, _)| found == name).map(|(_, value)| value).next();
    value.unwrap_or_else(|| panic!("nothing counts {name}")).parse().expect("a number")
}

/// Enables the error queue of a socket.
pub fn want_errors(socket: &UdpSocket) {
    match own(socket).is_ipv4() {
        true => set(socket, libc::IPPROTO_IP, libc::IP_RECVERR, 1),
        false => set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1),
    }
}

/// An ICMP error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentBack {
    pub errno: i32,
    /// ICMP type and code.
    pub kind: (u8, u8),
    /// The reported MTU, or 0.
    pub info: u32,
    /// Address of the host that sent the error.
    pub by: IpAddr,
    /// Destination of the rejected datagram; `payload` is the start of its payload.
    pub to: SocketAddr,
    pub payload: Vec<u8>,
}

/// Checks that no error arrives.
#[track_caller]
pub fn expect_no_error(socket: &UdpSocket) {
    std::thread::sleep(SILENCE);
    let found = try_sent_back(socket);
    assert!(found.is_err(), "{found:?}");
}

/// Waits for an error, ignoring those of the local kernel.
#[track_caller]
pub fn sent_back(socket: &UdpSocket) -> SentBack {
    loop {
        poll(&[socket.as_fd()], 0);
        if let Ok(Some(error)) = try_sent_back(socket) {
            return error;
        }
    }
}

/// Returns the next error in the queue; `None` for one of the local kernel.
pub fn try_sent_back(socket: &UdpSocket) -> io::Result<Option<SentBack>> {
    let mut payload = vec![0_u8; 2048];
    let mut control = [0_u64; 64];
    let mut part = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    // SAFETY: all zeroes are a valid msghdr and address; the buffers outlive the call, and the control
    // messages are iterated with libc's macros. The message read is an error followed by an address.
    unsafe {
        let mut to: libc::sockaddr_storage = std::mem::zeroed();
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = (&raw mut to).cast();
        message.msg_namelen = size_of_val(&to) as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE);
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        payload.truncate(length as usize);
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let is = ((*header).cmsg_level, (*header).cmsg_type);
            if is == (libc::IPPROTO_IP, libc::IP_RECVERR)
                || is == (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
            {
                let error = libc::CMSG_DATA(header).cast::<libc::sock_extended_err>();
                let by = error.add(1).cast::<libc::sockaddr_in6>().read_unaligned();
                let error = error.read_unaligned();
                if error.ee_origin == libc::SO_EE_ORIGIN_LOCAL {
                    return Ok(None);
                }
                let mut address: libc::sockaddr_storage = std::mem::zeroed();
                (&raw mut address).cast::<libc::sockaddr_in6>().write(by);
                return Ok(Some(SentBack {
                    errno: error.ee_errno as i32,
                    kind: (error.ee_type, error.ee_code),
                    info: error.ee_info,
                    by: socket_address(&address).ip(),
                    to: socket_address(&to),
                    payload,
                }));
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    panic!("an error without its reason");
}
