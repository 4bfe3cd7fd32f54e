//! The programs of bpf/bench/floors.bpf.c: loaded, and run on packets.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;

use etherparse::PacketBuilder;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, TC_INGRESS, TcHook};

use crate::common::Namespace;

#[allow(clippy::all, dead_code)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/floors.skel.rs"));
}

pub use skeleton::FloorsSkel;

/// Ethernet, IPv4 and UDP.
const HEADERS: usize = 14 + 20 + 8;

/// The object lives as long as the process.
pub fn load() -> FloorsSkel<'static> {
    let object = Box::leak(Box::new(MaybeUninit::uninit()));
    let skeleton = skeleton::FloorsSkelBuilder::default().open(object).expect("floors.bpf.o");
    skeleton.load().expect("the kernel takes the floors")
}

/// A packet to `port` of 10.0.1.1, and what a program may be told of it.
pub struct Packet {
    pub bytes: Vec<u8>,
    pub interface: u32,
}

impl Packet {
    pub fn udp(relay: &Namespace, port: u16) -> Packet {
        let mut bytes = Vec::new();
        builder(relay).udp(40000, port).write(&mut bytes, &[b'x'; 18]).expect("a packet");
        Packet { bytes, interface: relay.index("in0") }
    }

    pub fn tcp(relay: &Namespace, port: u16) -> Packet {
        let mut bytes = Vec::new();
        builder(relay).tcp(40000, port, 1, 1024).write(&mut bytes, &[]).expect("a packet");
        Packet { bytes, interface: relay.index("in0") }
    }

    /// Makes it the one that the programs restore or send.
    pub fn choose(&self, floors: &FloorsSkel<'_>) {
        let headers = &self.bytes[..HEADERS];
        floors.maps.frame.update(&0_u32.to_ne_bytes(), headers, MapFlags::ANY).expect("frame");
    }
}

fn builder(relay: &Namespace) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], relay.mac("in0")).ipv4(
        [10, 0, 1, 2],
        [10, 0, 1, 1],
        64,
    )
}

/// `struct __sk_buff`, of which a test run takes the words named here.
#[repr(C)]
struct Context([u32; 48]);

const INGRESS_IFINDEX: usize = 9;
const IFINDEX: usize = 10;
const CB: usize = 12;

/// Runs a program that takes an skb; returns its verdict.
pub fn run_tc(program: BorrowedFd<'_>, packet: &Packet, cb: [u32; 2], repeat: i32) -> i32 {
    let mut context = Context([0; 48]);
    context.0[INGRESS_IFINDEX] = packet.interface;
    context.0[IFINDEX] = packet.interface;
    context.0[CB..CB + cb.len()].copy_from_slice(&cb);
    run(program, packet, &context, repeat, 0).expect("a test run") as i32
}

/// Lets a program for XDP make packets, which come in on the packet's interface.
pub fn run_xdp(program: BorrowedFd<'_>, packet: &Packet, repeat: i32) {
    let context = libbpf_sys::xdp_md {
        data_end: packet.bytes.len() as u32,
        ingress_ifindex: packet.interface,
        ..Default::default()
    };
    let live = libbpf_sys::BPF_F_TEST_XDP_LIVE_FRAMES;
    run(program, packet, &context, repeat, live).expect("live frames, from Linux 5.18 on");
}

fn run<C>(
    program: BorrowedFd<'_>,
    packet: &Packet,
    context: &C,
    repeat: i32,
    flags: u32,
) -> io::Result<u32> {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: packet.bytes.as_ptr().cast(),
        data_size_in: packet.bytes.len() as u32,
        ctx_in: ptr::from_ref(context).cast(),
        ctx_size_in: size_of::<C>() as u32,
        repeat,
        flags,
        ..Default::default()
    };
    // SAFETY: packet and context outlive the call, which reads as many bytes of them as it is told.
    match unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) } {
        0 => Ok(options.retval),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Ends the way of all packets that come in on an interface.
pub fn sink(floors: &FloorsSkel<'_>, namespace: &Namespace, interface: &str) {
    let program = floors.progs.sink.as_fd();
    let index = namespace.index(interface) as i32;
    namespace.enter(|| {
        let mut hook = TcHook::new(program);
        hook.ifindex(index).attach_point(TC_INGRESS).handle(1).priority(1);
        hook.create().and_then(|mut hook| hook.attach()).expect("a tc filter");
    });
}

/// Keeps this thread on the last CPU; what it causes the kernel to do then happens there too.
pub fn stay_on_one_cpu() {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("CPUs");
    let last = online.trim().rsplit([',', '-']).next().and_then(|cpu| cpu.parse().ok());
    // SAFETY: all zeroes are an empty set, and the set outlives the calls.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(last.expect("a number"), &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
