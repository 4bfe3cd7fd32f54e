//! Packets in outer headers that come to this host: `decap`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::process::Stdio;

use serde_json::{Value, json};
use udplb::config::{Action, Decap, Key, Network, Ports, Via};
use udplb::desired::{Desired, Rule, Upstream};

use crate::answers::{VIPS, ip6};
use crate::common::lab::{Lab, Net, Outcome, V4, V6};
use crate::common::net::{
    TTL, UDP_SEGMENT, bind, expect, expect_silence_of, own, payload, receive, set,
};
use crate::common::tun::Tun;
use crate::common::wire::Tag;
use crate::common::{Bpffs, udplb};
use crate::forge::{Checksum, Forged, Ip, fragments};
use crate::program::{Context, Counted, Run};
use crate::replies::{ask_directly, direct_config, direct_lab};
use crate::testbed::{OWN, OWN6, RELAY_MAC, Testbed, UNSPEC};

const ETHERNET: usize = 14;

/// Kinds of outer headers, each with the family of both packets.
const TUNNELS: [(usize, Via); 4] = [(0, Via::Ipip), (0, Via::Gue), (1, Via::Ipip), (1, Via::Gue)];

const fn ip4(octets: [u8; 4]) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]))
}

/// A balancer of each family, another host, and this host.
pub const BALANCERS: [IpAddr; 2] = [ip4([10, 0, 2, 7]), ip6([0xfd00, 2, 0, 0, 0, 0, 0, 7])];
pub const STRANGERS: [IpAddr; 2] = [ip4([10, 0, 2, 8]), ip6([0xfd00, 2, 0, 0, 0, 0, 1, 7])];
pub const HERE: [IpAddr; 2] = [IpAddr::V4(OWN), IpAddr::V6(OWN6)];
const CLIENTS: [IpAddr; 2] = [ip4([198, 51, 100, 7]), ip6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7])];

/// An outer header, and that of GUE.
#[derive(Clone, Debug)]
pub struct Outer {
    pub family: usize,
    pub via: Via,
    pub from: IpAddr,
    pub to: IpAddr,
    /// The two lower bits of the TOS or traffic class.
    pub ecn: u8,
    pub port: u16,
    pub udp_checksum: u16,
    /// Added to the UDP length.
    pub udp_length: i16,
    /// Added to the length of the outer IP packet.
    pub length: i16,
    /// IPv4: flags and offset of a fragment.
    pub fragment: u16,
    /// IPv4: added to the checksum.
    pub checksum_error: u16,
}

impl Outer {
    pub fn new(family: usize, via: Via) -> Outer {
        Outer {
            family,
            via,
            from: BALANCERS[family],
            to: HERE[family],
            ecn: 0,
            port: 6080,
            udp_checksum: 0,
            udp_length: 0,
            length: 0,
            fragment: 0x4000,
            checksum_error: 0,
        }
    }

    /// Puts the IP packet of a frame into outer headers.
    pub fn around(&self, frame: &[u8]) -> Vec<u8> {
        let inner = &frame[ETHERNET..];
        let mut body = Vec::new();
        if self.via == Via::Gue {
            let length = (inner.len() as u16 + 8).wrapping_add_signed(self.udp_length);
            for word in [0xc123, self.port, length, self.udp_checksum] {
                body.extend(word.to_be_bytes());
            }
        }
        body.extend(inner);
        let length = (body.len() as u16).wrapping_add_signed(self.length);
        let protocol = match (self.via, self.family) {
            (Via::Gue, _) => 17,
            (_, 0) => 4,
            _ => 41,
        };
        let header = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = vec![0x45, self.ecn];
                header.extend((length + 20).to_be_bytes());
                header.extend([0, 0]);
                header.extend(self.fragment.to_be_bytes());
                header.extend([64, protocol, 0, 0]);
                header.extend(from.octets());
                header.extend(to.octets());
                let words =
                    header.chunks(2).map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])));
                let sum: u32 = words.sum();
                let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
                let checksum = checksum.wrapping_add(self.checksum_error);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                header
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut header = vec![0x60, self.ecn << 4, 1, 2];
                header.extend(length.to_be_bytes());
                header.extend([protocol, 64]);
                header.extend(from.octets());
                header.extend(to.octets());
                header
            }
            other => unreachable!("{other:?} are of two families"),
        };
        let ethertype = [[0x08, 0x00], [0x86, 0xdd]][self.family];
        [&frame[..12], &ethertype, &header, &body].concat()
    }
}

/// Returns a client's packet to an address of keys, as its balancer sends it on.
fn inner(family: usize) -> Forged {
    Forged::between(RELAY_MAC, CLIENTS[family], VIPS[family], 53)
}

/// Takes outer headers of both kinds off packets of the balancers.
pub fn from_balancers() -> Decap {
    let from = BALANCERS.map(Network::from);
    Decap { from: from.to_vec(), via: vec![Via::Ipip, Via::Gue] }
}

/// Configures `decap`, and rules that match what is in the outer headers, and GUE itself.
fn configure(testbed: &Testbed<'_>) {
    let rule = |name: &str, address: IpAddr, port: u16, upstream: IpAddr| {
        let key = Key::new(address, vec![Ports { first: port, last: port }]);
        let rule = Rule::new(name, key, vec![Upstream::new(upstream, None)]);
        Rule { action: Action::Block, ..rule }
    };
    let rules = vec![
        rule("dns4", VIPS[0], 53, ip4([10, 0, 2, 2])),
        rule("dns6", VIPS[1], 53, ip6([0xfd00, 2, 0, 0, 0, 0, 0, 2])),
    ];
    let desired = Desired { decap: Some(from_balancers()), rules, ..Desired::default() };
    testbed.program.configure_all(&desired, &BTreeMap::new(), 0);
}

/// Runs a frame as it arrives; returns what is counted too.
fn arrive(testbed: &Testbed<'_>, frame: &[u8], tag: Option<Tag>) -> (Run, Counted) {
    let context = Context { ifindex: testbed.routing, tag, ..Context::default() };
    (testbed.program.run(frame, context), testbed.program.take_counted())
}

/// Checks that outer headers are taken off, and nothing else is changed.
#[track_caller]
fn check_taken(testbed: &Testbed<'_>, outer: &Outer, frame: &[u8], tag: Option<Tag>) {
    let counted = [((0, "decapsulated"), (1, frame.len() as u64))].into();
    let wanted = (Run { action: UNSPEC, frame: frame.to_vec(), tag }, counted);
    assert_eq!(arrive(testbed, &outer.around(frame), tag), wanted);
}

/// Checks that a frame stays as it is and counts for a verdict under id 0, if for any.
#[track_caller]
fn check_left(testbed: &Testbed<'_>, name: &str, frame: &[u8], verdict: Option<&'static str>) {
    let wanted = Run { action: UNSPEC, frame: frame.to_vec(), tag: None };
    let count = (1, frame.len() as u64);
    let counted = verdict.map(|verdict| ((0, verdict), count)).into_iter().collect();
    assert_eq!(arrive(testbed, frame, None), (wanted, counted), "{name}");
}

#[test]
fn outer_headers_of_balancers_are_taken_off() {
    Testbed::with(|testbed| {
        configure(testbed);
        for (family, via) in TUNNELS {
            let outer = Outer::new(family, via);
            let whole = inner(family);
            let change = |change: &dyn Fn(&mut Forged)| {
                let mut packet = whole.clone();
                change(&mut packet);
                packet.frame()
            };
            let mut kinds = vec![
                whole.frame(),
                change(&|it| it.udp.payload = 0),
                change(&|it| it.udp.payload = 333),
                change(&|it| it.udp.payload = 1472),
                // the stack verifies it
                change(&|it| it.udp.checksum = Checksum::Off(7)),
            ];
            kinds.extend(fragments(&change(&|it| it.udp.payload = 900), 400, 77));
            if family == 0 {
                kinds.push(change(&|it| {
                    if let Ip::V4(ip) = &mut it.ip {
                        ip.options = 2;
                    }
                }));
            }
            for frame in kinds {
                check_taken(testbed, &outer, &frame, None);
            }
            let tag = Some(Tag { protocol: 0x8100, control: 7 });
            check_taken(testbed, &outer, &whole.frame(), tag);
            check_taken(testbed, &Outer { udp_checksum: 0x1234, ..outer }, &whole.frame(), None);
        }
    });
}

/// A frame of the least length is padded behind the packet.
#[test]
fn padding_stays_behind_the_packet() {
    Testbed::with(|testbed| {
        configure(testbed);
        let mut packet = inner(0);
        packet.udp.payload = 0;
        let (mut came, mut gone) =
            (Outer::new(0, Via::Ipip).around(&packet.frame()), packet.frame());
        for frame in [&mut came, &mut gone] {
            frame.resize(frame.len() + 6, 0);
        }
        let (run, counted) = arrive(testbed, &came, None);
        assert_eq!((run.action, run.frame), (UNSPEC, gone));
        assert_eq!(counted.keys().collect::<Vec<_>>(), [&(0, "decapsulated")]);
    });
}

#[test]
fn other_outer_headers_stay() {
    Testbed::with(|testbed| {
        configure(testbed);
        for (family, via) in TUNNELS {
            let outer = Outer::new(family, via);
            let other = |change: &dyn Fn(&mut Outer)| {
                let mut outer = outer.clone();
                change(&mut outer);
                outer.around(&inner(family).frame())
            };
            let left = |name: &str, frame: &[u8]| check_left(testbed, name, frame, None);
            left("stranger", &other(&|it| it.from = STRANGERS[family]));
            left("elsewhere", &other(&|it| it.to = BALANCERS[family]));
            let mut frame = other(&|_| {});
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 9, 9]);
            left("another frame", &frame);
            left("none", &Forged::between(RELAY_MAC, BALANCERS[family], HERE[family], 9).frame());
            if via == Via::Gue {
                left("another port", &other(&|it| it.port = 6081));
            }
            let whole = other(&|_| {});
            let pieces = match family {
                0 => [other(&|it| it.fragment = 0x2000), other(&|it| it.fragment = 8)].to_vec(),
                // with a fragment header
                _ => fragments(&whole, 40, 77),
            };
            for piece in pieces {
                left("fragment", &piece);
            }
            if family == 0 {
                let mut options = whole.clone();
                options[ETHERNET] = 0x46;
                left("options", &options);
                left("broadcast", &other(&|it| it.to = ip4([10, 0, 2, 255])));
            }
            let tag = Some(Tag { protocol: 0x8100, control: 8 });
            let run = arrive(testbed, &whole, tag);
            assert_eq!((run.0.frame, run.1), (whole, Counted::new()), "a VLAN of others");
        }
    });
}

#[test]
fn malformed_tunnel_packets_stay_and_are_counted() {
    Testbed::with(|testbed| {
        configure(testbed);
        for (family, via) in TUNNELS {
            let outer = Outer::new(family, via);
            let malformed = |name: &str, outer: &Outer, inner: &[u8]| {
                let name = format!("{name} {family} {via:?}");
                check_left(testbed, &name, &outer.around(inner), Some("malformed"));
            };
            let whole = inner(family).frame();
            malformed("longer than the frame", &Outer { length: 1, ..outer.clone() }, &whole);
            malformed("cut", &outer, &whole[..whole.len() - 1]);
            malformed("no header", &outer, &whole[..ETHERNET + 12]);
            malformed("empty", &outer, &whole[..ETHERNET]);
            malformed("of the other family", &outer, &inner(1 - family).frame());
            let mut version = whole.clone();
            version[ETHERNET] &= 0xf;
            malformed("no version", &outer, &version);
            malformed("congestion", &Outer { ecn: 3, ..outer.clone() }, &whole);
            if via == Via::Gue {
                malformed("UDP length", &Outer { udp_length: -1, ..outer.clone() }, &whole);
            }
            if family == 0 {
                malformed("checksum", &Outer { checksum_error: 1, ..outer.clone() }, &whole);
                let mut words = whole.clone();
                words[ETHERNET] = 0x44;
                malformed("short header", &outer, &words);
                words[ETHERNET] = 0x4f;
                words[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&59_u16.to_be_bytes());
                malformed("longer header", &outer, &words);
            }
        }
    });
}

/// RFC 6040: a router's mark of congestion goes into the inner header.
#[test]
fn congestion_is_passed_on() {
    Testbed::with(|testbed| {
        configure(testbed);
        for (family, via) in TUNNELS {
            let marked = |ecn: u8| {
                let mut packet = inner(family);
                match &mut packet.ip {
                    Ip::V4(ip) => ip.tos = 0xb8 | ecn,
                    Ip::V6(ip) => ip.traffic_class = 0xb8 | ecn,
                }
                packet.frame()
            };
            for (outside, inside, wanted) in [(1, 2, 2), (2, 1, 1), (3, 1, 3), (3, 2, 3), (0, 3, 3)]
            {
                let outer = Outer { ecn: outside, ..Outer::new(family, via) };
                let (run, _) = arrive(testbed, &outer.around(&marked(inside)), None);
                assert_eq!(run.frame, marked(wanted), "{family} {via:?} {outside} {inside}");
            }
        }
    });
}

/// XDP leaves GUE to the program at tc, whatever rules there are.
#[test]
fn xdp_leaves_tunnels_alone() {
    Testbed::with(|testbed| {
        configure(testbed);
        for (family, via) in TUNNELS {
            let frame = Outer::new(family, via).around(&inner(family).frame());
            let run = testbed.program.run_xdp(&frame);
            assert_eq!((run.action, run.frame), (crate::testbed::XDP_PASS, frame));
        }
    });
}

/// udplb on the upstream of a lab.
struct Server<'lab> {
    lab: &'lab Lab,
    bpffs: Bpffs,
}

impl<'lab> Server<'lab> {
    /// Applies a configuration that takes off these outer headers of the relay.
    fn new(lab: &'lab Lab, via: &[&str]) -> Server<'lab> {
        let server = Server { lab, bpffs: Bpffs::new() };
        server.apply(&decap_config(&["10.2.0.0/24", "2001:db8:2::1"], via)).expect(0);
        server
    }

    fn apply(&self, config: &Value) -> Outcome {
        let file = self.lab.directory.write("upstream.yaml", &config.to_string());
        self.run(&format!("apply {}", file.display()))
    }

    fn run(&self, words: &str) -> Outcome {
        Outcome::of(&mut self.command(words))
    }

    fn command(&self, words: &str) -> std::process::Command {
        let mut command = udplb(&self.lab.upstream, &self.bpffs);
        command.args(words.split_whitespace());
        command
    }

    /// Returns the number of packets whose outer headers were taken off.
    fn taken(&self) -> u64 {
        let status = self.run("status -o json").json();
        status["decap"]["packets"].as_u64().unwrap_or_else(|| panic!("no decap in {status:#}"))
    }
}

fn decap_config(from: &[&str], via: &[&str]) -> Value {
    json!({ "version": 1, "interfaces": ["eth0"], "decap": { "from": from, "via": via } })
}

/// Returns a lab whose upstream has the key's addresses, and room for outer headers on the way there.
fn tunnel_lab(offload: bool) -> Lab {
    let lab = direct_lab(offload);
    lab.relay.ip("link set up0 mtu 1548");
    lab.upstream.ip("link set eth0 mtu 1548");
    lab
}

/// Clients ask through the tunnel, and get the answers from the upstream itself.
#[test]
fn upstreams_take_tunnels_off_and_answer_themselves() {
    for offload in [true, false] {
        let lab = tunnel_lab(offload);
        let server = Server::new(&lab, &["ipip", "gue"]);
        let mut taken = 0;
        for (net, via) in [(V4, "ipip"), (V4, "gue"), (V6, "ipip"), (V6, "gue")] {
            lab.apply(&direct_config(&net, via));
            let header = if net.is_ipv6() { 48 } else { 28 };
            ask_directly(&net, &lab, &[0, 1, 39, 1000, 1500 - header, 4000]);
            // the last one in three fragments
            taken += 8;
            assert_eq!(server.taken(), taken, "{via}");
            if offload {
                taken += ask_for_much(&net, &lab, via);
            }
        }
    }
}

/// Sends ten datagrams in one GSO packet through the tunnel; returns as how many packets they arrive. A GSO packet
/// in GUE has to be cut up before: the kernel cannot take one whose outer headers are gone.
fn ask_for_much(net: &Net, lab: &Lab, via: &str) -> u64 {
    let is_cut_up = via == "gue";
    if is_cut_up {
        let off = ["-K", "up0", "tx-udp_tnl-segmentation", "off"];
        Outcome::of(lab.relay.command("ethtool").args(off)).expect(0);
    }
    let client = bind(&lab.client, net.clients[0], 0);
    client.connect((net.key, 53)).expect("connected");
    set(&client, libc::SOL_UDP, UDP_SEGMENT, 1000);
    let server = bind(&lab.upstream, net.key, 53);
    let long = payload(9_500);
    client.send(&long).expect("sent");
    for part in long.chunks(1000) {
        expect(&server, part, own(&client), TTL - 1);
    }
    if is_cut_up { 10 } else { 1 }
}

/// The kernel's own devices take off what `direct` puts on. Modules that the kernel lacks are reported on standard
/// error and skipped; `./dev kernels` has them.
#[test]
fn kernels_own_devices_take_tunnels_off() {
    let lab = tunnel_lab(false);
    for (net, via) in [(V4, "ipip"), (V4, "gue"), (V6, "ipip"), (V6, "gue")] {
        let device = if net.is_ipv6() { ("ip6_tunnel", "ip6tnl0") } else { ("ipip", "tunl0") };
        let modules = [Some(device.0), (via == "gue").then_some("fou")];
        if modules.into_iter().flatten().any(|module| !has_module(module)) {
            continue;
        }
        lab.upstream.ip(&format!("link set {} up", device.1));
        if via == "gue" {
            let family = if net.is_ipv6() { "-6" } else { "-4" };
            lab.upstream.ip(&format!("{family} fou add port 6080 gue"));
        }
        if !net.is_ipv6() {
            lab.upstream.sysctl("net.ipv4.conf.tunl0.rp_filter", "0");
        }
        lab.apply(&direct_config(&net, via));
        let header = if net.is_ipv6() { 48 } else { 28 };
        ask_directly(&net, &lab, &[0, 1, 39, 1000, 1500 - header, 4000]);
    }
}

/// Returns true if the kernel has a module, loaded now or built in.
fn has_module(name: &str) -> bool {
    let loaded = Outcome::of(std::process::Command::new("modprobe").arg(name));
    if loaded.code != Some(0) {
        // past the harness, which hides what a test that passes prints
        let _ = writeln!(std::io::stderr(), "SKIPPED: no {name} here: {}", loaded.stderr.trim());
    }
    loaded.code == Some(0)
}

#[test]
fn tunnels_of_strangers_and_other_kinds_stay() {
    let lab = tunnel_lab(false);
    let server = Server::new(&lab, &["ipip"]);
    lab.apply(&direct_config(&V4, "gue"));
    let tunnel = bind(&lab.upstream, V4.upstreams[0], 6080);
    let inside = bind(&lab.upstream, V4.key, 53);
    let client = bind(&lab.client, V4.clients[0], 0);
    client.send_to(b"by gue", (V4.key, 53)).expect("sent");
    assert_eq!(receive(&tunnel).payload[28..], *b"by gue");
    server.apply(&decap_config(&["10.2.0.2", "2001:db8:2::/64"], &["ipip", "gue"])).expect(0);
    client.send_to(b"a stranger's", (V4.key, 53)).expect("sent");
    assert_eq!(receive(&tunnel).payload[28..], *b"a stranger's");
    lab.apply(&direct_config(&V4, "ipip"));
    client.send_to(b"another's", (V4.key, 53)).expect("sent");
    expect_silence_of([&inside, &tunnel]);
    assert_eq!(server.taken(), 0);
    server.apply(&decap_config(&["10.2.0.1"], &["ipip", "gue"])).expect(0);
    client.send_to(b"the balancer's", (V4.key, 53)).expect("sent");
    expect(&inside, b"the balancer's", own(&client), TTL - 1);
    assert_eq!(server.taken(), 1);
}

/// An interface without an Ethernet header.
#[test]
fn tunnels_end_at_tun_devices_too() {
    let lab = Lab::dual(true, true);
    let tun = Tun::new(&lab.relay, "tun0");
    lab.relay.ip("addr add 10.0.2.1/24 dev tun0");
    lab.relay.ip("addr add fd00:2::1/64 dev tun0 nodad");
    lab.relay.sysctl("net.ipv4.conf.tun0.rp_filter", "0");
    lab.relay.sysctl("net.ipv4.conf.all.rp_filter", "0");
    let mut config = decap_config(&["10.0.2.7", "fd00:2::7"], &["ipip", "gue"]);
    config["interfaces"] = json!(["tun0"]);
    lab.apply(&config);
    for (family, via) in TUNNELS {
        let net = [V4, V6][family];
        let receiver = bind(&lab.relay, net.key, 53);
        let frame = Forged::between([0; 6], net.clients[1], net.key, 53);
        tun.send(&Outer::new(family, via).around(&frame.frame())[ETHERNET..]);
        expect(&receiver, &frame.payload(), (net.clients[1], 5666), TTL);
    }
    assert_eq!(lab.status()["decap"]["packets"], 4);
}

/// The protocol counts wherever the header lies.
#[test]
fn other_protocols_behind_a_short_head_stay() {
    let lab = Lab::new();
    let tap = Tun::tap(&lab.relay, "tap0");
    lab.relay.ip("addr add 10.0.2.1/24 dev tap0");
    let mut config = decap_config(&["10.0.2.7"], &["ipip"]);
    config["interfaces"] = json!(["tap0"]);
    lab.apply(&config);
    let mut packet = Forged::between(lab.relay.mac("tap0"), CLIENTS[0], HERE[0], 53);
    packet.udp.payload = 4500;
    let ipip = Outer::new(0, Via::Ipip);
    // the checksum makes up for the protocol
    let tcp = Outer { checksum_error: 4_u16.wrapping_sub(6), ..ipip.clone() };
    let mut frame = tcp.around(&packet.frame());
    frame[ETHERNET + 9] = 6;
    tap.send_paged(&frame);
    assert_eq!(lab.status()["decap"]["packets"], 0);
    tap.send_paged(&ipip.around(&packet.frame()));
    assert_eq!(lab.status()["decap"]["packets"], 1);
}

#[test]
fn decap_is_planned_listed_and_shown() {
    let lab = tunnel_lab(true);
    let server = Server::new(&lab, &["ipip", "gue"]);
    lab.apply(&direct_config(&V4, "gue"));
    let listed = server.run("list -o json").expect(0).json();
    let wanted = json!({ "from": ["10.2.0.0/24", "2001:db8:2::1"], "via": ["ipip", "gue"] });
    assert_eq!(listed["decap"], wanted);
    let file = lab.directory.write("listed.yaml", &listed.to_string());
    assert_eq!(server.run(&format!("plan {}", file.display())).expect(0).stdout, "no changes\n");
    let other = decap_config(&["10.2.0.1"], &["gue"]);
    let file = lab.directory.write("other.yaml", &other.to_string());
    let planned = server.run(&format!("plan {}", file.display())).expect(0).stdout;
    let wanted =
        "~ decap\n    from: 10.2.0.0/24,2001:db8:2::1 -> 10.2.0.1\n    via: ipip,gue -> gue\n";
    assert_eq!(planned, wanted);
    let mut trace = server.command("trace -c 1");
    let mut trace =
        trace.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
    let mut said = String::new();
    let stderr = trace.stderr.as_mut().expect("a pipe");
    BufReader::new(stderr).read_line(&mut said).expect("it says that it has begun");
    ask_directly(&V4, &lab, &[9]);
    let traced = trace.wait_with_output().expect("it ends after one").stdout;
    let traced = String::from_utf8_lossy(&traced);
    assert!(traced.contains(" eth0 - 10.1.0.20:"), "{traced}");
    assert!(traced.ends_with(" > 10.1.0.1:53 length 51 decapsulated\n"), "{traced}");
    let text = server.run("status").expect(0).stdout;
    let line = "\ndecap ipip, gue from 10.2.0.0/24, 2001:db8:2::1: 1 packet\n";
    assert!(text.contains(line), "{text}");
    let metrics = server.run("metrics").expect(0).stdout;
    for line in ["udplb_decapsulated_packets_total 1\n", "udplb_decapsulated_bytes_total 51\n"] {
        assert!(metrics.contains(line), "{metrics}");
    }
    assert_eq!(server.run("doctor").expect(0).stdout, "all is well\n");
}
