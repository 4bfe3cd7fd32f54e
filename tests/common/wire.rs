//! Frames that leave an interface, captured at the other end of the veth pair.
//!
//! The kernel removes a frame's VLAN tag before delivery; the tag is put back here.

use std::io;
use std::mem::{size_of, size_of_val, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Namespace;

/// Offset of a frame's EtherType, or of its first tag.
pub const TYPE: usize = 12;

/// An 802.1Q or 802.1ad tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    pub protocol: u16,
    /// Priority and VLAN id.
    pub control: u16,
}

impl Tag {
    /// Inserts the tag as the first of a frame.
    pub fn put_into(self, mut frame: Vec<u8>) -> Vec<u8> {
        frame.splice(TYPE..TYPE, [self.protocol, self.control].map(u16::to_be_bytes).concat());
        frame
    }
}

/// Socket option from linux/if_packet.h for the metadata of a frame.
const PACKET_AUXDATA: i32 = 8;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct Auxiliary {
    status: u32,
    length: u32,
    captured: u32,
    mac: u16,
    network: u16,
    tag_control: u16,
    tag_protocol: u16,
}

/// Frame that marks the end of a test case. Its EtherType is IPv4, as the receiver captures only IP.
const SENTINEL: &[u8] = b"\x02\0\0\0\0\xff\x02\0\0\0\0\xff\x08\0the end of a test case";

/// The two ends of a veth pair whose frames are read after each case.
pub struct Wire {
    near: OwnedFd,
    far: OwnedFd,
}

impl Wire {
    /// Opens both ends: an interface of one namespace and one of another.
    pub fn new(near: (&Namespace, &str), far: (&Namespace, &str)) -> Wire {
        let open = |(namespace, interface): (&Namespace, &str), protocol| {
            let index = namespace.index(interface);
            let socket = namespace.enter(|| open(index, protocol));
            socket.unwrap_or_else(|error| panic!("{interface}: {error}"))
        };
        // only a socket for all protocols sees the tags
        Wire { near: open(near, 0), far: open(far, libc::ETH_P_ALL as u16) }
    }

    /// Returns the IP frames that arrived since the last call, without waiting for more: frames that
    /// one CPU sends stay in order.
    pub fn drain(&self) -> Vec<Vec<u8>> {
        self.send(SENTINEL);
        std::iter::repeat_with(|| receive(&self.far))
            .filter(|frame| {
                match frame[TYPE..] {
                    // neighbour discovery and group reports of the kernel go to group addresses
                    [0x86, 0xdd, ..] => frame[0] & 1 == 0,
                    [0x08, 0, ..] | [0x81, 0, ..] | [0x88, 0xa8, ..] => true,
                    _ => false,
                }
            })
            .take_while(|frame| frame != SENTINEL)
            .collect()
    }

    /// Returns the IP frames that arrived since the last call, once there are this many. Before kernel 5.18,
    /// ksoftirqd processes copies at ingress, after the run that made them.
    pub fn drain_at_least(&self, count: usize) -> Vec<Vec<u8>> {
        let mut frames = self.drain();
        let end = Instant::now() + Duration::from_millis(500);
        while frames.len() < count && Instant::now() < end {
            sleep(Duration::from_millis(1));
            frames.extend(self.drain());
        }
        frames
    }

    /// Waits for the next IP frame that arrives.
    pub fn next(&self) -> Vec<u8> {
        loop {
            let frame = receive(&self.far);
            let mut at = TYPE;
            while matches!(frame[at..], [0x81, 0, ..] | [0x88, 0xa8, ..]) {
                at += 4;
            }
            if matches!(frame[at..], [0x08, 0, ..] | [0x86, 0xdd, ..]) {
                return frame;
            }
        }
    }

    /// Sends a frame through the interface that the program uses.
    pub fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer is of the length given.
        let sent =
            unsafe { libc::send(self.near.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "send: {}", io::Error::last_os_error());
    }
}

/// Pins the thread to its current CPU, and returns that.
pub fn stay_on_this_cpu() -> usize {
    // SAFETY: takes and returns plain numbers.
    let cpu = unsafe { libc::sched_getcpu() } as usize;
    run_on_cpu(cpu);
    cpu
}

/// Pins the thread to a CPU, or to the last one if there are fewer.
pub fn run_on_cpu(cpu: usize) {
    let cpu = cpu.min(libbpf_rs::num_possible_cpus().expect("the number of CPUs") - 1);
    // SAFETY: the set is plain data, and concerns this thread alone.
    let result = unsafe {
        let mut cpus: libc::cpu_set_t = zeroed();
        libc::CPU_SET(cpu, &mut cpus);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &cpus)
    };
    assert_eq!(result, 0, "sched_setaffinity: {}", io::Error::last_os_error());
}

/// Opens a socket for the frames of an interface with this protocol, in both directions.
fn open(index: u32, protocol: u16) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: the address is plain data of the length given, and outlives the call; the new descriptor
    // has no other owner.
    let socket = unsafe {
        // receives nothing before it is bound
        let socket = OwnedFd::from_raw_fd(result(libc::socket(libc::AF_PACKET, kind, 0))?);
        let mut address: libc::sockaddr_ll = zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        result(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        socket
    };
    let patience = libc::timeval { tv_sec: 10, tv_usec: 0 };
    set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &patience)?;
    set_option(&socket, libc::SOL_PACKET, PACKET_AUXDATA, &1_i32)?;
    Ok(socket)
}

fn set_option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<i32> {
    let length = size_of::<T>() as u32;
    // SAFETY: the value is of the length given.
    result(unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length)
    })
}

fn result(value: i32) -> io::Result<i32> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// Receives the next frame as it was on the wire.
fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut frame = vec![0; 1 << 16];
    let mut control = [0_u64; 16];
    let mut buffer = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() };
    // SAFETY: the structures are plain data, and the buffers are of the lengths given; a control
    // message is there as a whole where CMSG_FIRSTHDR finds one.
    let (length, auxiliary) = unsafe {
        let mut message: libc::msghdr = zeroed();
        message.msg_iov = &raw mut buffer;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        let length = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
        assert!(length >= 0, "recvmsg: {}", io::Error::last_os_error());
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!header.is_null(), "a frame without its tag's whereabouts");
        (length as usize, libc::CMSG_DATA(header).cast::<Auxiliary>().read_unaligned())
    };
    frame.truncate(length);
    if auxiliary.status & TP_STATUS_VLAN_VALID != 0 {
        let (protocol, control) = (auxiliary.tag_protocol, auxiliary.tag_control);
        return Tag { protocol, control }.put_into(frame);
    }
    frame
}
