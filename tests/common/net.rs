//! Sockets in namespaces.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Namespace;

/// Longer than anything takes that happens at all.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// What a datagram on a veth never takes.
const SILENCE: Duration = Duration::from_millis(100);

/// A UDP socket inside, with a large buffer; bound once this returns.
pub fn bind(namespace: &Namespace, address: Ipv4Addr, port: u16) -> UdpSocket {
    let socket = namespace
        .enter(|| UdpSocket::bind((address, port)))
        .unwrap_or_else(|error| panic!("{address}:{port} in {}: {error}", namespace.name));
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20);
    set(&socket, libc::IPPROTO_IP, libc::IP_RECVTTL, 1);
    socket
}

/// The senders' and the kernel's default.
pub const TTL: i32 = 64;

/// From `linux/udp.h`.
pub const UDP_SEGMENT: i32 = 103;

/// Sets an integer option.
pub fn set(socket: &UdpSocket, level: i32, option: i32, value: i32) {
    // SAFETY: the value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "setsockopt {level} {option}: {}", io::Error::last_os_error());
}

/// What arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub payload: Vec<u8>,
    pub from: SocketAddrV4,
    pub ttl: i32,
}

/// Waits for a datagram.
///
/// # Panics
/// None comes.
#[track_caller]
pub fn receive(socket: &UdpSocket) -> Datagram {
    try_receive(socket).unwrap_or_else(|error| panic!("{:?}: {error}", socket.local_addr()))
}

/// Checks that nothing comes.
#[track_caller]
pub fn expect_silence(socket: &UdpSocket) {
    socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
    let received = try_receive(socket);
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    assert!(received.is_err(), "{:?} got {received:?}", socket.local_addr());
}

/// One datagram with its sender and TTL.
pub fn try_receive(socket: &UdpSocket) -> io::Result<Datagram> {
    let mut payload = vec![0_u8; 65_536];
    let mut control = [0_u64; 8];
    let mut from = libc::sockaddr_in {
        sin_family: 0,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: 0 },
        sin_zero: [0; 8],
    };
    let mut part = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    // SAFETY: all zeroes are a msghdr; the buffers outlive the call, and the control messages are
    // walked with libc's macros.
    let (length, ttl) = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of_val(&from) as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        let ttl = match header.is_null() {
            true => 0,
            false => libc::CMSG_DATA(header).cast::<i32>().read_unaligned(),
        };
        (length as usize, ttl)
    };
    payload.truncate(length);
    let address = Ipv4Addr::from(from.sin_addr.s_addr.to_ne_bytes());
    Ok(Datagram { payload, from: SocketAddrV4::new(address, u16::from_be(from.sin_port)), ttl })
}

/// The IPv4 address and port that a socket has.
pub fn local(socket: &UdpSocket) -> SocketAddrV4 {
    match socket.local_addr() {
        Ok(SocketAddr::V4(address)) => address,
        other => panic!("{other:?}"),
    }
}

/// Bytes that differ from place to place.
pub fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 251) as u8).collect()
}

/// Ends a stream of datagrams for [`count`].
const LAST: &[u8] = b"that is all";

/// Sends numbered datagrams until told to stop, and one that says so; returns how many.
pub fn send_until(stop: &AtomicBool, socket: &UdpSocket, to: (Ipv4Addr, u16)) -> u64 {
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        // where nobody listens the answer to the one before is an error here
        if socket.send_to(&sent.to_be_bytes(), to).is_ok() {
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    send_last(socket, to);
    sent
}

/// Tells a [`count`]er that nothing follows.
pub fn send_last(socket: &UdpSocket, to: (Ipv4Addr, u16)) {
    socket.send_to(LAST, to).expect("the last datagram");
}

/// Counts what arrives, on a thread, until the sender says that it was the last and nothing
/// follows.
pub fn count(socket: UdpSocket) -> JoinHandle<u64> {
    socket.set_read_timeout(Some(10 * PATIENCE)).expect("a timeout");
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        let (mut count, mut last) = (0, false);
        loop {
            match socket.recv(&mut buffer) {
                Ok(length) if &buffer[..length] == LAST => {
                    last = true;
                    socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
                }
                Ok(_) => count += 1,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) if last => return count,
                Err(error) => panic!("after {count} datagrams: {error}"),
            }
        }
    })
}
