//! Sockets in namespaces.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Namespace;

/// Timeout for events that must happen.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Wait before concluding that no datagram arrives; longer than a datagram takes on a veth.
pub const SILENCE: Duration = Duration::from_millis(100);

/// Returns a bound UDP socket in the namespace, with a large buffer.
pub fn bind(namespace: &Namespace, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    bind_to(namespace, (address.into(), port).into())
}

/// Returns a UDP socket bound to an address that may be link-local.
pub fn bind_to(namespace: &Namespace, address: SocketAddr) -> UdpSocket {
    let end = Instant::now() + PATIENCE;
    let socket = loop {
        match namespace.enter(|| UdpSocket::bind(address)) {
            Ok(socket) => break socket,
            // a child forked by another test may hold the closed socket until its exec
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{address} in {}: {error}", namespace.name),
        }
    };
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20);
    match address {
        SocketAddr::V4(_) => set(&socket, libc::IPPROTO_IP, libc::IP_RECVTTL, 1),
        SocketAddr::V6(_) => set(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1),
    }
    socket
}

/// Default TTL of the senders and of the kernel.
pub const TTL: i32 = 64;

/// Socket option from `linux/udp.h`.
pub const UDP_NO_CHECK6_RX: i32 = 102;
pub const UDP_SEGMENT: i32 = 103;
pub const UDP_GRO: i32 = 104;

/// Returns true if a word is a MAC address; IPv6 addresses have colons too.
pub fn is_mac(word: &str) -> bool {
    word.len() == 17 && word.split(':').all(|byte| byte.len() == 2)
}

/// Sets an integer socket option.
pub fn set(socket: &UdpSocket, level: i32, option: i32, value: i32) {
    set_bytes(socket, level, option, &value.to_ne_bytes());
}

/// Returns an integer socket option.
pub fn get(socket: &UdpSocket, level: i32, option: i32) -> i32 {
    let (mut value, mut length) = (0_i32, size_of::<i32>() as libc::socklen_t);
    // SAFETY: the value and its length outlive the call.
    let result = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(socket.as_raw_fd(), level, option, value, &raw mut length)
    };
    assert_eq!(result, 0, "getsockopt {level} {option}: {}", io::Error::last_os_error());
    value
}

/// Sets a socket option.
pub fn set_bytes(socket: &UdpSocket, level: i32, option: i32, value: &[u8]) {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the value outlives the call.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), length)
    };
    assert_eq!(result, 0, "setsockopt {level} {option}: {}", io::Error::last_os_error());
}

/// A received datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    pub payload: Vec<u8>,
    pub from: SocketAddr,
    /// TTL, or hop limit with IPv6.
    pub ttl: i32,
    /// Length of each datagram, where GRO merged several.
    pub segment: Option<i32>,
}

/// Waits for a datagram.
///
/// # Panics
/// If none arrives in time.
#[track_caller]
pub fn receive(socket: &UdpSocket) -> Datagram {
    loop {
        match try_receive(socket) {
            Ok(datagram) => return datagram,
            // a resumed machine interrupts the call
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => panic!("{:?}: {error}", own(socket)),
        }
    }
}

/// Waits for a datagram at one of several sockets and returns the index of the socket.
#[track_caller]
pub fn receive_any(sockets: &[UdpSocket]) -> (usize, Datagram) {
    let descriptors: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    let index = poll(&descriptors, libc::POLLIN);
    (index, receive(&sockets[index]))
}

/// Waits for events at several descriptors and returns the index of the first with one; errors count.
#[track_caller]
pub fn poll(descriptors: &[BorrowedFd<'_>], events: i16) -> usize {
    let wanted = |it: &BorrowedFd<'_>| libc::pollfd { fd: it.as_raw_fd(), events, revents: 0 };
    let mut polls: Vec<_> = descriptors.iter().map(wanted).collect();
    let (count, patience) = (polls.len() as libc::nfds_t, PATIENCE.as_millis() as i32);
    loop {
        // SAFETY: the list is of the length given.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), count, patience) };
        match polls.iter().position(|poll| poll.revents != 0) {
            Some(index) if ready > 0 => return index,
            _ => {
                let error = io::Error::last_os_error();
                let again = ready < 0 && error.kind() == io::ErrorKind::Interrupted;
                assert!(again, "nothing came: {ready} {error}");
            }
        }
    }
}

/// Checks that no datagram arrives.
#[track_caller]
pub fn expect_silence(socket: &UdpSocket) {
    expect_silence_of([socket]);
}

/// Checks that no datagram arrives at any of the sockets.
#[track_caller]
pub fn expect_silence_of<'sockets>(sockets: impl IntoIterator<Item = &'sockets UdpSocket>) {
    std::thread::sleep(SILENCE);
    for socket in sockets {
        socket.set_nonblocking(true).expect("a socket");
        let received = try_receive(socket);
        socket.set_nonblocking(false).expect("a socket");
        assert!(received.is_err(), "{:?} got {received:?}", socket.local_addr());
    }
}

/// Receives one datagram with its sender and TTL.
pub fn try_receive(socket: &UdpSocket) -> io::Result<Datagram> {
    let mut payload = vec![0_u8; 65_536];
    let mut control = [0_u64; 8];
    let mut part = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    let (mut ttl, mut segment) = (0, None);
    // SAFETY: all zeroes are a valid msghdr and address; the buffers outlive the call, and the control
    // messages, each an int, are iterated with libc's macros.
    let (length, from) = unsafe {
        let mut from: libc::sockaddr_storage = std::mem::zeroed();
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of_val(&from) as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            let value = libc::CMSG_DATA(header).cast::<i32>().read_unaligned();
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::SOL_UDP, UDP_GRO) => segment = Some(value),
                _ => ttl = value,
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
        (length as usize, from)
    };
    payload.truncate(length);
    Ok(Datagram { payload, from: socket_address(&from), ttl, segment })
}

/// Converts an address from the kernel, without the index of a link.
pub fn socket_address(address: &libc::sockaddr_storage) -> SocketAddr {
    if i32::from(address.ss_family) == libc::AF_INET {
        // SAFETY: the family is AF_INET, and the storage is larger.
        let address = unsafe { &*std::ptr::from_ref(address).cast::<libc::sockaddr_in>() };
        let ip = Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes());
        return SocketAddrV4::new(ip, u16::from_be(address.sin_port)).into();
    }
    assert_eq!(i32::from(address.ss_family), libc::AF_INET6);
    // SAFETY: likewise.
    let address = unsafe { &*std::ptr::from_ref(address).cast::<libc::sockaddr_in6>() };
    let (ip, port) = (address.sin6_addr.s6_addr.into(), u16::from_be(address.sin6_port));
    SocketAddrV6::new(ip, port, 0, 0).into()
}

/// Returns a socket's local IPv4 address and port.
pub fn local(socket: &UdpSocket) -> SocketAddrV4 {
    match socket.local_addr() {
        Ok(SocketAddr::V4(address)) => address,
        other => panic!("{other:?}"),
    }
}

/// Returns a socket's local address and port.
pub fn own(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().expect("a bound socket")
}

/// Waits for a datagram and checks every byte, the sender and the TTL.
#[track_caller]
pub fn expect(socket: &UdpSocket, payload: &[u8], from: impl Into<SocketAddr>, ttl: i32) {
    let received = receive(socket);
    let from = from.into();
    let differs = received.payload.iter().zip(payload).position(|(one, other)| one != other);
    assert!(
        received.payload == payload && (received.from, received.ttl) == (from, ttl),
        "{:?} got {} bytes from {} with TTL {}, not {} bytes from {from} with {ttl}; the first that \
         differs: {differs:?}",
        own(socket),
        received.payload.len(),
        received.from,
        received.ttl,
        payload.len(),
    );
}

/// Returns a payload with position-dependent bytes.
pub fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + index / 251) as u8).collect()
}

/// Sends a whole frame out of an interface.
pub fn send_frame(namespace: &Namespace, interface: &str, frame: &[u8]) {
    let index = namespace.index(interface);
    // SAFETY: takes plain numbers and returns a descriptor without another owner; the address is a
    // sockaddr_ll, for which all zeroes are valid, and the address and the frame outlive the call.
    let sent = namespace.enter(|| unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index as i32;
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    });
    assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
}

/// Final marker that ends a stream of datagrams for [`count`].
const LAST: &[u8] = b"that is all";

/// Sends numbered datagrams until `stop` is set, then a final marker; returns the number of datagrams
/// sent.
pub fn send_until(stop: &AtomicBool, socket: &UdpSocket, to: (Ipv4Addr, u16)) -> u64 {
    let mut sent = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        // with no listener, the ICMP error for the previous datagram is reported here
        if socket.send_to(&sent.to_be_bytes(), to).is_ok() {
            sent += 1;
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    send_last(socket, to);
    sent
}

/// A sender that runs until the value is dropped.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Load {
    pub fn start(socket: UdpSocket, port: u16) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread =
            std::thread::spawn(move || send_until(&stopped, &socket, (super::lab::RELAY, port)));
        Load { stop, thread: Some(thread) }
    }

    /// Stops the sender and returns the number of datagrams sent.
    pub fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        // plus the final marker
        self.thread.take().expect("running").join().expect("sent") + 1
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Sends the final marker for [`count`].
pub fn send_last(socket: &UdpSocket, to: (Ipv4Addr, u16)) {
    socket.send_to(LAST, to).expect("the last datagram");
}

/// Counts received datagrams on a thread until the final marker arrives and no datagram follows.
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
