//! A round trip: a client's question goes through a host to an upstream, whose answer comes back through it.
//!
//! As in `host`, a generator puts the questions on an interface as a driver does. The upstream turns them round
//! where it receives them, and the trip ends where the client's host receives the answer. All of it happens on one
//! busy CPU, programs in user space included, so that the time is CPU time.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libbpf_rs::TC_INGRESS;

use crate::common::{Bpffs, Namespace};
use crate::floors::{self, FloorsSkel, Flows, Packet};
use crate::host::generate_some;
use crate::relay::{apply, grant_lease, load_nftables, networks, status};

/// Port of the questions; those of flows are above.
pub const ASKED: u16 = 53;

/// Port of the upstreams.
pub const SERVER: u16 = 2000;

/// Address of the first client.
const CLIENT: [u8; 4] = [10, 9, 0, 0];

/// Question for the address of a host: headers and a name of four labels.
const QUESTION: &[u8] = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\
      \x03www\x07service\x07example\x03net\x00\x00\x01\x00\x01";

pub struct Trip<'a> {
    pub relay: Namespace,
    _outside: Namespace,
    pub bpffs: Bpffs,
    floors: &'a FloorsSkel<'static>,
    packet: Packet,
    packets: u64,
    links: Vec<OwnedFd>,
    proxy: Option<Proxy>,
}

/// A program in user space, and the file with its configuration.
struct Proxy {
    process: Child,
    file: PathBuf,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_file(&self.file);
    }
}

impl<'a> Trip<'a> {
    /// Creates a host, whose rounds are of so many questions, by turns of these flows.
    pub fn new(floors: &'a FloorsSkel<'static>, flows: Flows, packets: u64) -> Trip<'a> {
        let [relay, outside] = networks();
        relay.ip("route add 10.9.0.0/16 via 10.0.1.2");
        relay.ip("neighbour add 10.0.1.2 lladdr 02:00:00:00:01:02 dev in0 nud permanent");
        floors::attach_filter(&outside, "out1", TC_INGRESS, floors.progs.echo.as_fd());
        floors::sink(floors, &outside, "in1");
        let packet = Packet::datagram(&relay, (CLIENT, 1024), ASKED, QUESTION).of(flows);
        let (bpffs, links) = (Bpffs::new(), Vec::new());
        Trip { relay, _outside: outside, bpffs, floors, packet, packets, links, proxy: None }
    }

    /// Drops questions on arrival.
    pub fn arrival(self) -> Trip<'a> {
        floors::sink(self.floors, &self.relay, "in0");
        self
    }

    /// Sends whatever comes in by one interface on by the other.
    pub fn floor(mut self) -> Trip<'a> {
        for (here, there) in [("in0", "out0"), ("out0", "in0")] {
            let floors = floors::load_for(self.relay.index(there));
            let program = floors.progs.redirect.as_fd();
            self.links.push(floors::attach_link(&self.relay, here, program));
        }
        self
    }

    pub fn udplb(self, rules: &str) -> Trip<'a> {
        apply(&self.relay, &self.bpffs, rules);
        self
    }

    /// Grants a lease, as held by a running arpd.
    pub fn leased(self) -> Trip<'a> {
        grant_lease(&self.bpffs);
        self
    }

    pub fn nftables(self, rules: &str) -> Trip<'a> {
        load_nftables(&self.relay, &self.bpffs, rules);
        self
    }

    /// Runs a command in the namespace of the host.
    pub fn command(self, program: &str, words: &[&str]) -> Trip<'a> {
        let status = self.relay.command(program).args(words).status();
        assert!(status.expect(program).success(), "{program} {words:?}");
        self
    }

    /// Starts a proxy with a configuration, on the CPU of the packets. `None` if it does not answer.
    pub fn proxy(
        mut self,
        configuration: &str,
        command: impl FnOnce(&str) -> Command + Send,
    ) -> Option<Trip<'a>> {
        let file = self.bpffs.path.with_extension("conf");
        fs::write(&file, configuration).expect("a file in the temporary directory");
        let mut command = command(file.to_str().expect("a name of ASCII"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = self.relay.enter(|| {
            // it answers what has come before the generator goes on: few questions fit into a socket
            floors::stay_with_priority(2);
            command.spawn()
        });
        self.proxy = Some(Proxy { process: process.expect("the program is there"), file });
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if self.generate().is_finite() {
                return Some(self);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        None
    }

    /// Has each flow begin, and then be assured.
    pub fn warm(self) -> Trip<'a> {
        let rounds = u64::from(self.packet.flows.number).div_ceil(self.packets) + 1;
        for pause in [3, 0] {
            let lost = (0..rounds).filter(|_| self.generate().is_infinite()).count();
            assert!(lost < rounds as usize / 2, "{lost} of {rounds} rounds lost packets");
            std::thread::sleep(Duration::from_secs(pause));
        }
        self
    }

    /// Returns nanoseconds per question, from the first one to the arrival of the last answer; infinite if some did
    /// not arrive.
    pub fn generate(&self) -> f64 {
        let program = self.floors.progs.generate.as_fd();
        let from = (&self.relay, &self.packet);
        generate_some(self.floors, program, from, self.packets, [self.packets, 0])
    }

    /// Asserts that udplb has forwarded all questions and answers.
    pub fn forwarded_everything(&self) {
        for rule in status(&self.relay, &self.bpffs)["rules"].as_array().expect("rules") {
            let counters = &rule["counters"];
            assert_eq!(counters["forwarded"], counters["matched"], "{rule:#}");
        }
    }
}
