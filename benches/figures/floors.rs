//! Loads the programs of bpf/bench/floors.bpf.c and runs them on packets.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use etherparse::err::packet::BuildWriteError;
use etherparse::{
    Ethernet2Header, IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv6Extensions,
    Ipv6FragmentHeader, Ipv6Header, PacketBuilder, PacketBuilderStep,
};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, TC_INGRESS, TcAttachPoint, TcHook};

use crate::common::Namespace;

pub use udplb_floors::FloorsSkel;

/// Length of the part of a packet that is restored before each run, and of the headers that a generator
/// sends.
const BEGINNING: usize = 72;

/// Loads the object, which lives as long as the process.
pub fn load() -> FloorsSkel<'static> {
    load_for(0)
}

/// Loads the object with floors that send to interface `out`, wherever they are attached.
pub fn load_for(out: u32) -> FloorsSkel<'static> {
    let object = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut skeleton =
        udplb_floors::FloorsSkelBuilder::default().open(object).expect("floors.bpf.o");
    skeleton.maps.rodata_data.as_deref_mut().expect("the object has constants").out = out;
    let floors = skeleton.load().expect("the kernel takes the floors");
    let key6: Vec<u8> = [address6(1).as_slice(), &PORT.to_be_bytes(), &[0; 2]].concat();
    floors.maps.keys6.update(&key6, &RULE, MapFlags::ANY).expect("keys6");
    floors
}

/// Port of the first rule, and the key of the floors for IPv6.
pub const PORT: u16 = 2001;

/// A value of the floors' maps of rules.
const RULE: [u8; 24] = [0; 24];

/// Adds a rule for a port to a map of the floors for IPv4.
pub fn add_key(map: &impl MapCore, address: [u8; 4], port: u16) {
    let key: Vec<u8> = [address.as_slice(), &port.to_be_bytes(), &[0; 2]].concat();
    map.update(&key, &RULE, MapFlags::ANY).expect("keys");
}

/// A packet to `port` of 10.0.1.1 or fd00:1::1, and its context.
pub struct Packet {
    pub bytes: Vec<u8>,
    pub interface: u32,
    pub flows: Flows,
    /// Number of packets generated.
    pub generated: AtomicU64,
}

/// The flows of a generator: each packet is of the next one.
#[derive(Clone, Copy)]
pub struct Flows {
    pub number: u32,
    /// Number of clients that share them; their addresses follow that of the packet.
    pub clients: u32,
}

/// The flows of one client, unless others are set.
const FLOWS: Flows = Flows { number: 16, clients: 1 };

/// The part of a datagram in a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    First,
    Later,
}

impl Packet {
    pub fn udp(relay: &Namespace, port: u16) -> Packet {
        Packet::part(relay, false, Part::Whole, port)
    }

    /// Returns a datagram of NetFlow 9 with one set of data.
    pub fn netflow(relay: &Namespace, port: u16) -> Packet {
        let payload = [&[0, 9, 0, 1][..], &[0; 16], &[1, 0, 0, 64], &[0; 60]].concat();
        Packet::new(relay, |builder, bytes| {
            let headers = ipv4_headers(Part::Whole);
            builder.ip(headers).udp(40000, port).write(bytes, &payload)
        })
    }

    /// Returns a part of a datagram. In a later fragment the port's bytes are payload.
    pub fn part(relay: &Namespace, ipv6: bool, part: Part, port: u16) -> Packet {
        let headers = if ipv6 { ipv6_headers(part) } else { ipv4_headers(part) };
        Packet::new(relay, |builder, bytes| {
            builder.ip(headers).udp(40000, port).write(bytes, &[b'x'; 64])
        })
    }

    pub fn tcp(relay: &Namespace, port: u16) -> Packet {
        let headers = ipv4_headers(Part::Whole);
        Packet::new(relay, |builder, bytes| {
            builder.ip(headers).tcp(40000, port, 1, 1024).write(bytes, &[b'x'; 64])
        })
    }

    /// Returns a datagram from an address and port, which those of all flows follow, to a port.
    pub fn datagram(
        relay: &Namespace,
        (source, from): ([u8; 4], u16),
        to: u16,
        payload: &[u8],
    ) -> Packet {
        let mut header = ipv4_header(Part::Whole);
        header.source = source;
        let headers = IpHeaders::Ipv4(header, Ipv4Extensions::default());
        Packet::new(relay, |builder, bytes| builder.ip(headers).udp(from, to).write(bytes, payload))
    }

    /// Has a generator send packets of these flows.
    pub fn of(self, flows: Flows) -> Packet {
        Packet { flows, ..self }
    }

    fn new(
        relay: &Namespace,
        build: impl FnOnce(
            PacketBuilderStep<Ethernet2Header>,
            &mut Vec<u8>,
        ) -> Result<(), BuildWriteError>,
    ) -> Packet {
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], relay.mac("in0"));
        build(builder, &mut bytes).expect("a packet");
        Packet { bytes, interface: relay.index("in0"), flows: FLOWS, generated: AtomicU64::new(0) }
    }

    /// Selects this packet for the programs to restore or send.
    pub fn choose(&self, floors: &FloorsSkel<'_>) {
        let beginning = [
            &self.bytes[..BEGINNING],
            &self.flows.number.to_ne_bytes(),
            &self.flows.clients.to_ne_bytes(),
            &self.generated.load(Ordering::Relaxed).to_ne_bytes(),
        ];
        let key = 0_u32.to_ne_bytes();
        floors.maps.beginning.update(&key, &beginning.concat(), MapFlags::ANY).expect("beginning");
    }
}

/// Fragment offset, in units of eight bytes.
const OFFSET: u16 = 64;

fn offset(part: Part) -> IpFragOffset {
    IpFragOffset::try_new(if part == Part::Later { OFFSET } else { 0 }).expect("13 bits")
}

fn ipv4_headers(part: Part) -> IpHeaders {
    IpHeaders::Ipv4(ipv4_header(part), Ipv4Extensions::default())
}

fn ipv4_header(part: Part) -> Ipv4Header {
    let addresses = [[10, 0, 1, 2], [10, 0, 1, 1]];
    let mut header =
        Ipv4Header::new(0, 64, IpNumber::UDP, addresses[0], addresses[1]).expect("a short packet");
    header.identification = 7;
    header.dont_fragment = part == Part::Whole;
    header.more_fragments = part == Part::First;
    header.fragment_offset = offset(part);
    header
}

fn address6(host: u16) -> [u8; 16] {
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, host).octets()
}

fn ipv6_headers(part: Part) -> IpHeaders {
    let header = Ipv6Header {
        hop_limit: 64,
        source: address6(2),
        destination: address6(1),
        ..Ipv6Header::default()
    };
    let fragment = (part != Part::Whole)
        .then(|| Ipv6FragmentHeader::new(IpNumber::UDP, offset(part), part == Part::First, 7));
    IpHeaders::Ipv6(header, Ipv6Extensions { fragment, ..Ipv6Extensions::default() })
}

/// `struct __sk_buff`; a test run reads the fields named here.
#[repr(C)]
struct Context([u32; 48]);

const INGRESS_IFINDEX: usize = 9;
const IFINDEX: usize = 10;
const CB: usize = 12;

/// Arguments of the program `start`.
#[derive(Clone, Copy, Default)]
pub struct Run {
    /// Index of the program in the map `measured`.
    pub program: u32,
    /// Interface that floors send to.
    pub out: u32,
    pub copies: u32,
    /// Offset of the IPv4 sender, random in each packet; 0: it stays.
    pub random: u32,
    /// Number of rules of which each packet is for a random one; 0: it stays.
    pub rules: u32,
    pub repeat: i32,
}

/// Runs a tc program; returns its verdict.
pub fn run_tc(start: BorrowedFd<'_>, packet: &Packet, run: Run) -> i32 {
    let mut context = Context([0; 48]);
    context.0[INGRESS_IFINDEX] = packet.interface;
    context.0[IFINDEX] = packet.interface;
    let cb = [run.program, run.out, run.copies, run.random, run.rules];
    context.0[CB..CB + cb.len()].copy_from_slice(&cb);
    test_run(start, packet, &context, run.repeat, 0).expect("a test run") as i32
}

/// Generates packets with an XDP program; the packets are received on the packet's interface.
pub fn run_xdp(program: BorrowedFd<'_>, packet: &Packet, repeat: i32) {
    let context = libbpf_sys::xdp_md {
        data_end: packet.bytes.len() as u32,
        ingress_ifindex: packet.interface,
        ..Default::default()
    };
    let live = libbpf_sys::BPF_F_TEST_XDP_LIVE_FRAMES;
    test_run(program, packet, &context, repeat, live).expect("live frames, from Linux 5.18 on");
    packet.generated.fetch_add(repeat as u64, Ordering::Relaxed);
}

fn test_run<C>(
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
        // The copies of a batch must fit into a queue.
        batch_size: if flags == 0 { 0 } else { 16 },
        ..Default::default()
    };
    // SAFETY: packet and context outlive the call, which reads the lengths given here.
    match unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) } {
        0 => Ok(options.retval),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Attaches a program to an interface by a tc filter.
pub fn attach_filter(
    namespace: &Namespace,
    interface: &str,
    point: TcAttachPoint,
    program: BorrowedFd<'_>,
) {
    let index = namespace.index(interface) as i32;
    namespace.enter(|| {
        let mut hook = TcHook::new(program);
        hook.ifindex(index).attach_point(point).handle(1).priority(1);
        hook.create().and_then(|mut hook| hook.attach()).expect("a tc filter");
    });
}

/// Attaches a program to the ingress of an interface by a tcx link, until the link is closed.
pub fn attach_link(namespace: &Namespace, interface: &str, program: BorrowedFd<'_>) -> OwnedFd {
    let index = namespace.index(interface) as i32;
    namespace.enter(|| {
        // SAFETY: plain numbers, and no options.
        let link = unsafe {
            libbpf_sys::bpf_link_create(
                program.as_raw_fd(),
                index,
                libbpf_sys::BPF_TCX_INGRESS,
                ptr::null(),
            )
        };
        assert!(link >= 0, "tcx, from Linux 6.6 on: {}", io::Error::last_os_error());
        // SAFETY: a new descriptor, which nobody else has.
        unsafe { OwnedFd::from_raw_fd(link) }
    })
}

/// Takes all packets received on an interface.
pub fn sink(floors: &FloorsSkel<'_>, namespace: &Namespace, interface: &str) {
    attach_filter(namespace, interface, TC_INGRESS, floors.progs.sink.as_fd());
}

/// Pins this thread to the last CPU, where the kernel then processes its packets too, and has it run before
/// other processes where that is permitted.
pub fn stay_on_one_cpu() {
    stay_with_priority(1);
}

/// The same before threads with a lower number.
pub fn stay_with_priority(sched_priority: i32) {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").expect("CPUs");
    let last = online.trim().rsplit([',', '-']).next().and_then(|cpu| cpu.parse().ok());
    // SAFETY: all zeroes are an empty set, and the set outlives the calls.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(last.expect("a number"), &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    let priority = libc::sched_param { sched_priority };
    // SAFETY: the parameter outlives the call.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}
