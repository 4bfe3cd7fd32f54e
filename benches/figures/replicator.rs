//! The baseline for comparison: a program that receives datagrams on a socket and sends each to several
//! hosts, with as few system calls as possible.

use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::Namespace;
use crate::common::net::set;
use crate::floors;
use crate::host::PORT;

/// Datagrams per system call, and their maximum length.
const BATCH: usize = 64;
const LENGTH: usize = 2048;
/// Receive buffer with room for all datagrams of a round.
const BUFFER: i32 = 64 << 20;

/// A replicator in a thread, stopped on drop.
pub struct Replicator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Replicator {
    /// Starts a replicator to this number of hosts, from 10.0.2.2 on.
    pub fn start(relay: &Namespace, receivers: u8) -> Replicator {
        let socket = relay.enter(|| UdpSocket::bind(("10.0.1.1", PORT)).expect("a socket"));
        set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER);
        // The thread checks for its end after each timeout.
        socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time-out");
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                floors::stay_on_one_cpu();
                replicate(&socket, receivers, &stop);
            }
        });
        Replicator { stop, thread: Some(thread) }
    }
}

impl Drop for Replicator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the replicator runs");
        }
    }
}

fn replicate(socket: &UdpSocket, receivers: u8, stop: &AtomicBool) {
    let mut hosts: Vec<libc::sockaddr_in> = (2..2 + receivers).map(host).collect();
    let mut buffers = vec![[0_u8; LENGTH]; BATCH];
    let mut places: Vec<libc::iovec> = buffers.iter_mut().map(|buffer| place(buffer)).collect();
    let mut came: Vec<libc::mmsghdr> =
        places.iter_mut().map(|place| message(place, ptr::null_mut())).collect();
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: the messages point to places and buffers, which live as long as this function.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                came.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else { continue };
        for (place, message) in places.iter_mut().zip(&came[..count]) {
            place.iov_len = message.msg_len as usize;
        }
        let mut leaving = Vec::with_capacity(count * hosts.len());
        for place in &mut places[..count] {
            leaving.extend(hosts.iter_mut().map(|host| message(place, host)));
        }
        // SAFETY: as above, and the hosts live as long too.
        let sent = unsafe {
            libc::sendmmsg(socket.as_raw_fd(), leaving.as_mut_ptr(), leaving.len() as u32, 0)
        };
        assert_eq!(sent, leaving.len() as i32, "{}", std::io::Error::last_os_error());
        places.iter_mut().for_each(|place| place.iov_len = LENGTH);
    }
}

fn host(number: u8) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: PORT.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(Ipv4Addr::new(10, 0, 2, number).octets()),
        },
        sin_zero: [0; 8],
    }
}

fn place(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }
}

/// Returns a message with a buffer, and with a host's address to send to.
fn message(place: *mut libc::iovec, host: *mut libc::sockaddr_in) -> libc::mmsghdr {
    // SAFETY: all zeroes are an empty message.
    let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
    message.msg_hdr.msg_iov = place;
    message.msg_hdr.msg_iovlen = 1;
    if !host.is_null() {
        message.msg_hdr.msg_name = host.cast();
        message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    }
    message
}
