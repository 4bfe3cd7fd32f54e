//! What leaves an interface, seen at the other end of the cable.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::Namespace;

/// Follows what a test sent; has the type of IPv4, as all that is listened for.
const SENTINEL: &[u8] = b"\x02\0\0\0\0\xff\x02\0\0\0\0\xff\x08\0the end of a test case";

/// The two ends of a cable whose frames are read after each case.
pub struct Wire {
    near: OwnedFd,
    far: OwnedFd,
}

impl Wire {
    /// From an interface of one namespace to one of another.
    pub fn new(near: (&Namespace, &str), far: (&Namespace, &str)) -> Wire {
        let open = |(namespace, interface): (&Namespace, &str)| {
            let index = namespace.index(interface);
            namespace.enter(|| listen(index)).unwrap_or_else(|error| panic!("{interface}: {error}"))
        };
        Wire { near: open(near), far: open(far) }
    }

    /// The IPv4 frames that arrived since the last call; does not wait for more, as frames that
    /// one CPU sends stay in order.
    pub fn drain(&self) -> Vec<Vec<u8>> {
        send(&self.near, SENTINEL);
        std::iter::repeat_with(|| receive(&self.far))
            .take_while(|frame| frame != SENTINEL)
            .collect()
    }
}

/// Keeps the thread on the CPU that it is on.
pub fn stay_on_this_cpu() {
    // SAFETY: the set is plain data, and concerns this thread alone.
    let result = unsafe {
        let mut cpus: libc::cpu_set_t = zeroed();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut cpus);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &cpus)
    };
    assert_eq!(result, 0, "sched_setaffinity: {}", io::Error::last_os_error());
}

/// A socket for whole IPv4 frames of an interface, in either direction.
fn listen(index: u32) -> io::Result<OwnedFd> {
    let protocol = (libc::ETH_P_IP as u16).to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    let patience = libc::timeval { tv_sec: 10, tv_usec: 0 };
    // SAFETY: the structures are plain data of the lengths given, and outlive the calls.
    unsafe {
        let socket = result(libc::socket(libc::AF_PACKET, kind, protocol.into()))?;
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        result(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        result(libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const patience).cast(),
            size_of::<libc::timeval>() as u32,
        ))?;
        Ok(socket)
    }
}

fn result(value: i32) -> io::Result<i32> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn send(socket: &OwnedFd, frame: &[u8]) {
    // SAFETY: the buffer is of the length given.
    let sent = unsafe { libc::send(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
    assert_eq!(sent, frame.len() as isize, "send: {}", io::Error::last_os_error());
}

fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut frame = vec![0; 1 << 16];
    // SAFETY: the buffer is of the length given.
    let length =
        unsafe { libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
    assert!(length >= 0, "recv: {}", io::Error::last_os_error());
    frame.truncate(length as usize);
    frame
}
