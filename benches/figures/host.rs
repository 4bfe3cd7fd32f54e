//! A host that packets pass on their whole way, and the CPU time that it takes.
//!
//! A generator in the kernel puts packets on an interface as a driver does. They end at the egress hook of the
//! interface that they leave by, or in a socket. All work from the first packet to the end of the last happens
//! on one busy CPU, so that the time is CPU time.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags, TC_EGRESS, TC_INGRESS};

use crate::common::{Bpffs, Namespace};
use crate::floors::{self, FloorsSkel, Packet, Part};
use crate::relay::{apply, grant_lease, load_nftables, networks, open_program};

/// Few enough packets for one scheduler slice, so that some rounds are undisturbed.
pub const PACKETS: u64 = 2_000;
pub const PORT: u16 = floors::PORT;

/// Attachment of a program to the ingress of an interface.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// By a filter of cls_bpf.
    Filter,
    /// By a tcx link.
    Link,
}

/// A relay between a client's network and upstreams'.
pub struct Host<'a> {
    pub relay: Namespace,
    _outside: Namespace,
    bpffs: Bpffs,
    floors: &'a FloorsSkel<'static>,
    packet: Packet,
    socket: Option<UdpSocket>,
    /// Number of copies of each packet that must leave.
    copies: u64,
    link: Option<OwnedFd>,
}

impl<'a> Host<'a> {
    pub fn new(floors: &'a FloorsSkel<'static>) -> Host<'a> {
        let [relay, outside] = networks();
        floors::attach_filter(&relay, "out0", TC_EGRESS, floors.progs.sink.as_fd());
        let packet = Packet::udp(&relay, PORT);
        Host {
            relay,
            _outside: outside,
            bpffs: Bpffs::new(),
            floors,
            packet,
            socket: None,
            copies: 1,
            link: None,
        }
    }

    /// Sends packets of IPv6.
    pub fn ipv6(mut self) -> Host<'a> {
        self.packet = Packet::part(&self.relay, true, Part::Whole, PORT);
        self
    }

    /// Drops packets on arrival, which leaves the generator's and the driver's part.
    pub fn arrival(self) -> Host<'a> {
        floors::sink(self.floors, &self.relay, "in0");
        self
    }

    /// Attaches one of the floors, which sends to out0.
    pub fn floor<F>(self, hook: Hook, choose: F) -> Host<'a>
    where
        F: for<'f> Fn(&'f FloorsSkel<'static>) -> BorrowedFd<'f>,
    {
        let floors = floors::load_for(self.relay.index("out0"));
        floors::add_key(&floors.maps.keys, [10, 0, 1, 1], PORT);
        self.attach(hook, choose(&floors))
    }

    /// Attaches the program for these rules, which are of the interface `spare`: apply attaches it there.
    pub fn udplb(self, hook: Hook, rules: &str) -> Host<'a> {
        self.relay.ip("link add spare type veth peer name spare1");
        apply(&self.relay, &self.bpffs, rules);
        let program = open_program(&self.bpffs);
        self.attach(hook, program.as_fd())
    }

    fn attach(mut self, hook: Hook, program: BorrowedFd<'_>) -> Host<'a> {
        match hook {
            Hook::Filter => floors::attach_filter(&self.relay, "in0", TC_INGRESS, program),
            Hook::Link => self.link = Some(floors::attach_link(&self.relay, "in0", program)),
        }
        self
    }

    /// Grants a lease, as held by a running arpd.
    pub fn leased(self) -> Host<'a> {
        grant_lease(&self.bpffs);
        self
    }

    /// Sets the number of copies of each packet that must leave.
    pub fn copying(self, copies: u64) -> Host<'a> {
        Host { copies, ..self }
    }

    pub fn nftables(self, rules: &str) -> Host<'a> {
        load_nftables(&self.relay, &self.bpffs, rules);
        self
    }

    /// Opens a socket that each packet must reach too.
    pub fn listening(mut self) -> Host<'a> {
        let socket = self.relay.enter(|| UdpSocket::bind(("10.0.1.1", PORT)).expect("a socket"));
        let filter = self.floors.progs.socket_filter.as_fd().as_raw_fd();
        // SAFETY: the kernel reads four bytes of the number, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_BPF,
                (&raw const filter).cast(),
                size_of_val(&filter) as libc::socklen_t,
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        self.socket = Some(socket);
        self
    }

    /// Returns nanoseconds per packet, from the first packet to the end of the last; infinite if a queue
    /// overflowed on a busy machine.
    pub fn generate(&self) -> f64 {
        let program = self.floors.progs.generate.as_fd();
        let wanted = [PACKETS * self.copies, if self.socket.is_some() { PACKETS } else { 0 }];
        generate(self.floors, program, (&self.relay, &self.packet), wanted)
    }
}

/// Generates packets on an interface of a namespace, by a program; returns nanoseconds per packet until `wanted`
/// have arrived, at an upstream and at the socket. Infinite if a queue overflowed.
pub fn generate(
    floors: &FloorsSkel<'_>,
    program: BorrowedFd<'_>,
    from: (&Namespace, &Packet),
    wanted: [u64; 2],
) -> f64 {
    generate_some(floors, program, from, PACKETS, wanted)
}

/// The same for another number of packets.
pub fn generate_some(
    floors: &FloorsSkel<'_>,
    program: BorrowedFd<'_>,
    (namespace, packet): (&Namespace, &Packet),
    packets: u64,
    wanted: [u64; 2],
) -> f64 {
    packet.choose(floors);
    let mut progress = [0; WORDS];
    progress[WANTED] = wanted.iter().sum();
    write(floors, progress);
    namespace.enter(|| {
        floors::stay_on_one_cpu();
        floors::run_xdp(program, packet, packets as i32);
    });
    let deadline = Instant::now() + Duration::from_secs(1);
    while progress[ENDED] == 0 {
        if Instant::now() > deadline {
            return f64::INFINITY;
        }
        std::thread::sleep(Duration::from_micros(100));
        progress = read(floors);
    }
    assert_eq!(progress[AT_UPSTREAM..=AT_SOCKET], wanted);
    (progress[ENDED] - progress[STARTED]) as f64 / packets as f64
}

/// The words of `struct progress`.
const WORDS: usize = 6;
const AT_UPSTREAM: usize = 1;
const AT_SOCKET: usize = 2;
const WANTED: usize = 3;
const STARTED: usize = 4;
const ENDED: usize = 5;

fn write(floors: &FloorsSkel<'_>, progress: [u64; WORDS]) {
    let bytes = progress.map(u64::to_ne_bytes).concat();
    floors.maps.progress.update(&0_u32.to_ne_bytes(), &bytes, MapFlags::ANY).expect("progress");
}

fn read(floors: &FloorsSkel<'_>) -> [u64; WORDS] {
    let bytes = floors.maps.progress.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY);
    let bytes = bytes.expect("progress").expect("an array has all entries");
    std::array::from_fn(|word| {
        u64::from_ne_bytes(bytes[word * 8..][..8].try_into().expect("eight bytes"))
    })
}
