//! Nanoseconds of CPU per packet on its whole way through a host, against nftables doing the same.
//!
//! A generator in the kernel puts packets on an interface as a driver would. It keeps its CPU
//! busy from the first packet to the last one's arrival, and everything happens on that CPU: the
//! time that this takes is CPU time, of which that of the generator alone is subtracted.

use std::fs;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags};

use crate::common::{Bpffs, Namespace, udplb};
use crate::floors::{self, FloorsSkel, Packet};
use crate::{Report, least};

/// So few packets take less time than a scheduler's slice: some rounds are disturbed by nobody.
const PACKETS: u64 = 2_000;
const ROUNDS: usize = 200;
const PORT: u16 = 2001;

const UDPLB: &str = "
version: 1
interfaces: [in0]
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: ACTION, source: preserve }
    upstream: [{ address: 10.0.2.2 }]
";
const DNAT: &str = "
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat
        ip daddr 10.0.1.1 udp dport 2001 dnat to 10.0.2.2
    }
}
";
const DUP: &str = "
table ip copy {
    chain prerouting {
        type filter hook prerouting priority mangle
        ip daddr 10.0.1.1 udp dport 2001 dup to 10.0.2.2 device out0
    }
}
";

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let hosts = [
        Host::new(&floors).udplb("block"),
        Host::new(&floors).nftables(DNAT),
        Host::new(&floors).udplb("pass").listening(&floors),
        Host::new(&floors).nftables(DUP).listening(&floors),
    ];
    let [generator, block, dnat, pass, dup] = least(ROUNDS, |index| match index.checked_sub(1) {
        None => hosts[0].generate(&floors, floors.progs.generate_nothing.as_fd(), [0, 0]),
        Some(host) => {
            let local = u64::from(hosts[host].socket.is_some()) * PACKETS;
            hosts[host].generate(&floors, floors.progs.generate.as_fd(), [PACKETS, local])
        }
    });
    let [block, dnat, pass, dup] = [block, dnat, pass, dup].map(|figure| figure - generator);
    let ns = |figure: f64| format!("{figure:.0} ns");
    report.title("CPU time of a packet's whole way over veth; how much cheaper udplb is");
    report.floor("nftables: dnat, with conntrack", dnat);
    report.at_least("udplb block", &ns(block), dnat / block, " x", 1.4);
    report.floor("nftables: dup, and a local socket", dup);
    report.at_least("udplb pass, and a local socket", &ns(pass), dup / pass, " x", 1.3);
}

/// A relay between a client's network and an upstream's.
struct Host {
    relay: Namespace,
    _outside: Namespace,
    bpffs: Bpffs,
    packet: Packet,
    socket: Option<UdpSocket>,
}

impl Host {
    fn new(floors: &FloorsSkel<'_>) -> Host {
        let (relay, outside) = (Namespace::new(), Namespace::new());
        for (here, there, address) in [("in0", "in1", "10.0.1.1"), ("out0", "out1", "10.0.2.1")] {
            relay.link(here, &outside, there, true);
            relay.ip(&format!("address add {address}/24 dev {here}"));
        }
        relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");
        relay.sysctl("net.ipv4.ip_forward", "1");
        floors::sink(floors, &outside, "out1");
        let packet = Packet::udp(&relay, PORT);
        Host { relay, _outside: outside, bpffs: Bpffs::new(), packet, socket: None }
    }

    /// Hands a file with a configuration to a program.
    fn configure(&self, text: &str, apply: impl FnOnce(&str)) {
        let file = self.bpffs.path.with_extension("yaml");
        fs::write(&file, text).expect("a file in the temporary directory");
        apply(file.to_str().expect("a path in ASCII"));
        fs::remove_file(&file).expect("the file was there");
    }

    fn udplb(self, action: &str) -> Host {
        self.configure(&UDPLB.replace("ACTION", action), |file| {
            let mut apply = udplb(&self.relay, &self.bpffs);
            assert!(apply.args(["apply", "-q", file]).status().expect("udplb").success());
        });
        self
    }

    fn nftables(self, rules: &str) -> Host {
        self.configure(rules, |file| {
            let mut nft = self.relay.command("nft");
            assert!(nft.args(["-f", file]).status().expect("nft").success());
        });
        self
    }

    fn listening(mut self, floors: &FloorsSkel<'_>) -> Host {
        let socket = self.relay.enter(|| UdpSocket::bind(("10.0.1.1", PORT)).expect("a socket"));
        let filter = floors.progs.socket_filter.as_fd().as_raw_fd();
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

    /// Nanoseconds per packet until so many more have arrived at the upstream and at the socket.
    fn generate(
        &self,
        floors: &FloorsSkel<'_>,
        program: BorrowedFd<'_>,
        expected: [u64; 2],
    ) -> f64 {
        self.packet.choose(floors);
        let before = arrived(floors);
        let wanted = [before[0] + expected[0], before[1] + expected[1]];
        let started = self.relay.enter(|| {
            floors::stay_on_one_cpu();
            let started = Instant::now();
            floors::run_xdp(program, &self.packet, PACKETS as i32);
            started
        });
        while arrived(floors) != wanted {
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "{wanted:?} {:?}",
                arrived(floors)
            );
            std::thread::yield_now();
        }
        started.elapsed().as_nanos() as f64 / PACKETS as f64
    }
}

/// At upstreams and at sockets.
fn arrived(floors: &FloorsSkel<'_>) -> [u64; 2] {
    [0_u32, 1].map(|place| {
        let counts = floors.maps.arrived.lookup_percpu(&place.to_ne_bytes(), MapFlags::ANY);
        let counts = counts.expect("arrived").unwrap_or_default();
        counts.iter().map(|count| u64::from_ne_bytes(count[..8].try_into().expect("8"))).sum()
    })
}
