//! CPU nanoseconds per packet on the whole path through a host, compared with nftables doing the same.
//!
//! A generator in the kernel puts packets on an interface as a driver does. All work from the first packet
//! to the arrival of the last happens on one busy CPU, so that the time is CPU time. The cost of packets
//! that are dropped on reception (the generator and the driver's part) is subtracted.

use std::fs;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags};

use crate::common::{Bpffs, Namespace};
use crate::floors::{self, FloorsSkel, Packet};
use crate::relay::{UPSTREAMS, apply};
use crate::{Report, least};

/// Few enough packets for one scheduler slice, so that some rounds are undisturbed.
const PACKETS: u64 = 2_000;
const ROUNDS: usize = 200;
pub const PORT: u16 = 2001;

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
        Host::new(&floors),
        Host::new(&floors).nftables(DNAT),
        Host::new(&floors).udplb(&UDPLB.replace("ACTION", "block")),
        Host::new(&floors).nftables(DUP).listening(&floors),
        Host::new(&floors).udplb(&UDPLB.replace("ACTION", "pass")).listening(&floors),
    ];
    floors::sink(&floors, &hosts[0].relay, "in0");
    let [arrival, dnat, block, dup, pass] = least(ROUNDS, |index| hosts[index].generate(&floors));
    let [dnat, block, dup, pass] = [dnat, block, dup, pass].map(|figure| figure - arrival);
    let ns = |figure: f64| format!("{figure:.0} ns");
    report.title("CPU time of a packet on its way through a host; how much cheaper udplb is");
    report.floor("nftables: dnat, with conntrack", dnat);
    report.at_least("udplb block", &ns(block), dnat / block, " x", 1.4);
    report.floor("nftables: dup, and a local socket", dup);
    report.at_least("udplb pass, and a local socket", &ns(pass), dup / pass, " x", 1.3);
}

/// A relay between a client's network and upstreams'.
pub struct Host {
    pub relay: Namespace,
    _outside: Namespace,
    bpffs: Bpffs,
    packet: Packet,
    socket: Option<UdpSocket>,
    /// Number of copies of each packet that must arrive.
    copies: u64,
}

impl Host {
    pub fn new(floors: &FloorsSkel<'_>) -> Host {
        let (relay, outside) = (Namespace::new(), Namespace::new());
        for (here, there, address) in [("in0", "in1", "10.0.1.1"), ("out0", "out1", "10.0.2.1")] {
            relay.link(here, &outside, there, true);
            relay.ip(&format!("address add {address}/24 dev {here}"));
        }
        for host in 2..2 + UPSTREAMS {
            let mac = format!("02:00:00:00:00:{host:02x}");
            relay.ip(&format!("neighbour add 10.0.2.{host} lladdr {mac} dev out0 nud permanent"));
        }
        relay.sysctl("net.ipv4.ip_forward", "1");
        floors::sink(floors, &outside, "out1");
        let packet = Packet::udp(&relay, PORT);
        Host { relay, _outside: outside, bpffs: Bpffs::new(), packet, socket: None, copies: 1 }
    }

    pub fn udplb(self, rules: &str) -> Host {
        apply(&self.relay, &self.bpffs, rules);
        self
    }

    /// Sets the number of copies of each packet that must arrive.
    pub fn copying(self, copies: u64) -> Host {
        Host { copies, ..self }
    }

    pub fn nftables(self, rules: &str) -> Host {
        let file = self.bpffs.path.with_extension("nft");
        fs::write(&file, rules).expect("a file in the temporary directory");
        let status = self.relay.command("nft").arg("-f").arg(&file).status();
        fs::remove_file(&file).expect("the file was there");
        assert!(status.expect("nft").success(), "{rules}");
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

    /// Returns nanoseconds per packet, from the first packet to the arrival of the last; infinite if a
    /// queue overflowed on a busy machine.
    pub fn generate(&self, floors: &FloorsSkel<'_>) -> f64 {
        self.packet.choose(floors);
        let program = floors.progs.generate.as_fd();
        let wanted = [PACKETS * self.copies, if self.socket.is_some() { PACKETS } else { 0 }];
        let mut progress = [0; WORDS];
        progress[WANTED] = wanted.iter().sum();
        write(floors, progress);
        self.relay.enter(|| {
            floors::stay_on_one_cpu();
            floors::run_xdp(program, &self.packet, PACKETS as i32);
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
        (progress[ENDED] - progress[STARTED]) as f64 / PACKETS as f64
    }
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
