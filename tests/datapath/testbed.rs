//! A relay with every kind of next hop, and test cases for its program: a rule, a packet and its
//! expected fate.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use libbpf_rs::skel::SkelBuilder;
use libbpf_rs::{OpenObject, TC_INGRESS, TcHookBuilder};
use udplb::bpf::{OpenUdplbSkel, UdplbSkelBuilder, types};
use udplb::config::{Action, Address, Flows, Hash, Key, Ports, Source};
use udplb::datapath::generation::open_for;
use udplb::datapath::kernel;
use udplb::desired::{Rule, RuleIds, Upstream};
use udplb::net::nexthop::{Hop, Macs, NextHop};

use crate::common::wire::{Tag, Wire, stay_on_this_cpu};
use crate::common::{Namespace, returning};
use crate::packet::{Datagram, Mac, endpoint};
use crate::program::{Context, Counted, Program, Run, SECONDS, flows};
use crate::reference::cut;

pub const UNSPEC: i32 = -1;
pub const SHOT: i32 = 2;
pub const REDIRECT: i32 = 7;

pub const XDP_PASS: i32 = 2;
pub const XDP_REDIRECT: i32 = 4;

/// Index of the interface that BPF_PROG_TEST_RUN has XDP programs see.
pub const LOOPBACK: u32 = 1;

pub const RELAY_MAC: Mac = [2, 0, 0, 0, 1, 1];
pub const OUT_MAC: Mac = [2, 0, 0, 0, 2, 1];
pub const NEAR_MAC: Mac = [2, 0, 0, 0, 2, 2];
pub const GATEWAY_MAC: Mac = [2, 0, 0, 0, 2, 254];

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);
/// The ports of [`rule`].
pub const PORTS: Ports = Ports { first: 2055, last: 2058 };

/// Upstreams, named after their route and neighbour. `COLD`: the neighbour is unresolved.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const NEAR_COLD: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 0, 3, 2);
pub const FAR_COLD: Ipv4Addr = Ipv4Addr::new(10, 0, 4, 2);
pub const BY_IPV6_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 5, 2);
pub const BY_IPV6_GATEWAY_COLD: Ipv4Addr = Ipv4Addr::new(10, 0, 10, 2);
/// The route's MTU is 1000 bytes, the interface's 1500.
pub const NARROW: Ipv4Addr = Ipv4Addr::new(10, 0, 6, 2);
pub const NARROW_COLD: Ipv4Addr = Ipv4Addr::new(10, 0, 6, 3);
pub const UNREACHABLE: Ipv4Addr = Ipv4Addr::new(10, 0, 7, 2);
pub const BLACKHOLE: Ipv4Addr = Ipv4Addr::new(10, 0, 8, 2);
pub const NO_ROUTE: Ipv4Addr = Ipv4Addr::new(10, 0, 9, 2);
pub const OWN: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
pub const OWN6: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 1);

const ADDRESSES: &[&str] = &[
    "link add in0 address 02:00:00:00:01:01 type veth",
    "link add in1 address 02:00:00:00:01:01 type veth",
    "link set in0 up",
    "link set in1 up",
    "link set out0 address 02:00:00:00:02:01",
    "address add 10.0.1.1/24 dev in0",
    "address add 10.0.2.1/24 dev out0",
    "neighbour add 10.0.2.2 lladdr 02:00:00:00:02:02 dev out0",
    "neighbour add 10.0.2.254 lladdr 02:00:00:00:02:fe dev out0",
    "neighbour add fe80::fe lladdr 02:00:00:00:02:fe dev out0",
    "route add 10.0.3.0/24 via 10.0.2.254",
    "route add 10.0.4.0/24 via 10.0.2.253",
    "route add 10.0.5.0/24 via inet6 fe80::fe dev out0",
    "route add 10.0.10.0/24 via inet6 fe80::fd dev out0",
    "route add 10.0.6.2 via 10.0.2.254 mtu lock 1000",
    "route add 10.0.6.3 via 10.0.2.253 mtu lock 1000",
    "route add unreachable 10.0.7.0/24",
    "route add blackhole 10.0.8.0/24",
    "address add fd00:1::1/64 dev in0 nodad",
    "address add fd00:2::1/64 dev out0 nodad",
    "neighbour add fd00:2::2 lladdr 02:00:00:00:02:02 dev out0",
    "neighbour add fd00:2::fe lladdr 02:00:00:00:02:fe dev out0",
    "route add fd00:3::/64 via fd00:2::fe",
    "route add fd00:4::/64 via fd00:2::fd",
    "route add fd00:6::2 via fd00:2::fe mtu lock 1300",
    "route add fd00:6::3 via fd00:2::fd mtu lock 1300",
];

/// VLANs of the relay: protocols and ids of the tags, outermost first.
pub const VLANS: &[&[(u16, u16)]] = &[
    &[(0x8100, 7)],
    &[(0x88a8, 100)],
    &[(0x88a8, 100), (0x8100, 7)],
    &[(0x88a8, 100), (0x88a8, 100)],
    &[(0x88a8, 100), (0x88a8, 100), (0x8100, 7)],
    &[(0x8100, 7), (0x8100, 7)],
    &[(0x88a8, 9)],
    &[(0x88a8, 9), (0x8100, 7)],
    &[(0x88a8, 9), (0x88a8, 100)],
    &[(0x88a8, 9), (0x88a8, 100), (0x8100, 7)],
    &[(0x88a8, 9), (0x8100, 7), (0x8100, 7)],
];

/// Returns the relay's addresses, each with true for a broadcast address.
fn own() -> Vec<(IpAddr, bool)> {
    let broadcasts = [VIP, OWN].map(|own| Ipv4Addr::from_bits(own.to_bits() | 0xff));
    let vip6 = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 1);
    let own = [VIP.into(), OWN.into(), vip6.into(), OWN6.into()].map(|own| (own, false));
    own.into_iter().chain(broadcasts.map(|address| (address.into(), true))).collect()
}

/// Ingress interface of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ingress {
    /// Forwarding is on.
    Routing,
    /// Forwarding is off.
    Closed,
}

/// The counter id of a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Under {
    Rule,
    Upstream,
    Zero,
}

/// Expected fate of a packet. Each but the last names the counted verdict.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// The packet, or a copy of it with `pass`, is sent to this MAC address.
    Sent(&'static str, Mac),
    /// The packet leaves with its MAC addresses unchanged; the kernel resolves the neighbour.
    Queued(&'static str),
    /// Fragments for this MTU are sent to this MAC address.
    Cut(&'static str, Mac, usize),
    /// The packet is dropped; with `pass`, no copy is sent.
    Dropped(&'static str, Under),
    /// Dropped; if the packet itself was to be sent, its sender gets an ICMP error: "packet too big"
    /// with this MTU, or "time exceeded" for `None`.
    Answered(&'static str, Option<u16>),
    /// The packet is delivered to the local stack at the upstream's port; a copy of it with `pass`.
    Here,
    /// The packet is delivered to the local stack, whatever the rule's action.
    Untouched(&'static str, Under),
    Unmatched,
}

#[derive(Clone, Debug)]
pub enum Packet {
    Datagram(Datagram),
    Bytes(Vec<u8>),
}

impl Packet {
    fn frame(&self) -> Vec<u8> {
        match self {
            Packet::Datagram(datagram) => datagram.frame(),
            Packet::Bytes(bytes) => bytes.clone(),
        }
    }

    fn datagram(&self) -> &Datagram {
        match self {
            Packet::Datagram(datagram) => datagram,
            Packet::Bytes(_) => panic!("no case has an answer to bytes"),
        }
    }
}

impl From<Datagram> for Packet {
    fn from(datagram: Datagram) -> Packet {
        Packet::Datagram(datagram)
    }
}

impl From<Vec<u8>> for Packet {
    fn from(bytes: Vec<u8>) -> Packet {
        Packet::Bytes(bytes)
    }
}

/// Changes to the maps that no configuration causes.
pub type Tamper = fn(&Program<'_>, &RuleIds);

#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub rule: Rule,
    pub ingress: Ingress,
    /// Next hop of the upstream as written by user space; `None` leaves the lookup to the program.
    pub known: Option<NextHop>,
    pub tamper: Option<Tamper>,
    pub packet: Packet,
    /// VLAN tag in the packet's metadata instead of its bytes.
    pub tag: Option<Tag>,
    /// Tags in the frame, outermost first.
    pub tags: Vec<Tag>,
    /// Length to which the packet is truncated.
    pub length: Option<usize>,
    /// `gso_size` and `gso_segs`.
    pub gso: (u32, u32),
    pub fate: Fate,
    /// Index of the upstream that must be selected.
    pub chosen: usize,
    /// Counter ids are assigned from the one after this.
    pub first_id: u32,
    /// Expected packets and bytes; by default one packet and the whole frame.
    pub count: Option<(u64, u64)>,
}

impl Case {
    pub fn new(name: impl Into<String>, rule: Rule, packet: impl Into<Packet>, fate: Fate) -> Case {
        Case {
            name: name.into(),
            rule,
            ingress: Ingress::Routing,
            known: None,
            tamper: None,
            packet: packet.into(),
            tag: None,
            tags: Vec::new(),
            length: None,
            gso: (0, 0),
            fate,
            chosen: 0,
            first_id: 0,
            count: None,
        }
    }

    /// Returns the received frame with its tags.
    fn frame(&self) -> Vec<u8> {
        self.tagged(self.packet.frame())
    }

    fn tagged(&self, frame: Vec<u8>) -> Vec<u8> {
        self.tags.iter().rev().fold(frame, |frame, tag| tag.put_into(frame))
    }

    /// Returns the expected outcome. `identification` is that of the fragments.
    fn expected(&self, ids: &RuleIds, identification: Option<u16>) -> Outcome {
        let mut frame = self.packet.frame();
        frame.truncate(self.length.unwrap_or(frame.len()));
        let count = self.count.unwrap_or((1, frame.len() as u64));
        let counted = self.counter(ids).map(|counter| (counter, count)).into_iter().collect();
        let pass = self.rule.action == Action::Pass;
        let stays = |action, frame| Run { action, frame: self.tagged(frame), tag: self.tag };
        let action = if pass { UNSPEC } else { SHOT };
        let (run, copies) = match (self.fate, self.departed(identification)) {
            (Fate::Here, None) if !pass => (stays(UNSPEC, self.arrived()), Vec::new()),
            (Fate::Cut(_, _, mtu), Some(gone)) => (stays(action, frame), cut(&gone, mtu)),
            (_, Some(gone)) if pass => (stays(UNSPEC, frame), vec![gone]),
            // redirected frames have no tag
            (_, Some(gone)) => (Run { action: REDIRECT, frame: gone, tag: None }, Vec::new()),
            (Fate::Dropped(..), None) if !pass => (stays(SHOT, frame), Vec::new()),
            (Fate::Answered(_, mtu), None) if !pass => {
                (stays(REDIRECT, self.packet.datagram().error(mtu)), Vec::new())
            }
            (_, None) => (stays(UNSPEC, frame), Vec::new()),
        };
        Outcome { run, copies, counted }
    }

    fn counter(&self, ids: &RuleIds) -> Option<(u32, &'static str)> {
        let (verdict, under) = match self.fate {
            Fate::Sent(verdict, _) | Fate::Queued(verdict) => (verdict, Under::Upstream),
            Fate::Cut(verdict, ..) => (verdict, Under::Upstream),
            Fate::Here => ("forwarded", Under::Upstream),
            Fate::Answered(verdict, _) => (verdict, Under::Upstream),
            Fate::Dropped(verdict, under) | Fate::Untouched(verdict, under) => (verdict, under),
            Fate::Unmatched => return None,
        };
        let id = match under {
            Under::Rule => ids.rule,
            Under::Upstream => ids.upstreams[self.chosen],
            Under::Zero => 0,
        };
        Some((id, verdict))
    }

    /// Builds the frame that a receiver on this host gets from scratch.
    fn arrived(&self) -> Vec<u8> {
        let came = self.packet.datagram();
        let port = self.rule.upstreams[self.chosen].port.unwrap_or(came.destination.port());
        let destination = endpoint(*came.destination.ip(), port);
        Datagram { destination, ..came.clone() }.frame()
    }

    /// Builds the expected outgoing frame from scratch.
    fn departed(&self, identification: Option<u16>) -> Option<Vec<u8>> {
        let Packet::Datagram(came) = &self.packet else { return None };
        let (to, from) = match self.fate {
            Fate::Sent(_, to) | Fate::Cut(_, to, _) => (to, OUT_MAC),
            Fate::Queued(_) => (came.to, came.from),
            _ => return None,
        };
        let upstream = &self.rule.upstreams[self.chosen];
        let sender = came.source.port();
        let source = match self.rule.source_of(upstream) {
            Source::Vip => endpoint(*came.destination.ip(), sender),
            Source::Preserve => came.source,
            Source::Egress => unimplemented!("no case has it yet"),
            Source::Fixed { address, port } => {
                endpoint(ipv4(&address.into()), port.unwrap_or(sender))
            }
        };
        let port = upstream.port.unwrap_or(came.destination.port());
        let gone = Datagram {
            to,
            from,
            source,
            destination: endpoint(ipv4(&upstream.address), port),
            ttl: came.ttl - 1,
            identification: identification.unwrap_or(came.identification),
            ..came.clone()
        };
        Some(gone.frame())
    }
}

/// Result of a case.
#[derive(PartialEq, Eq)]
pub struct Outcome {
    pub run: Run,
    /// Frames sent through the upstreams' interface.
    pub copies: Vec<Vec<u8>>,
    pub counted: Counted,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Run { action, tag, .. } = self.run;
        writeln!(f, "returned {action}, tag {tag:x?}, counted {:?}", self.counted)?;
        writeln!(f, "  frame {}", hexadecimal(&self.run.frame))?;
        self.copies.iter().try_for_each(|copy| writeln!(f, "  copy  {}", hexadecimal(copy)))
    }
}

/// Formats the first bytes of a frame and its length.
fn hexadecimal(frame: &[u8]) -> String {
    const SHOWN: usize = 80;
    let shown = &frame[..frame.len().min(SHOWN)];
    let bytes: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{bytes} of {} bytes", frame.len())
}

/// Returns a rule for [`VIP`] and [`PORTS`] with one upstream at port 9995.
pub fn rule(action: Action, source: Source, upstream: Ipv4Addr) -> Rule {
    let rule = Rule::new("rule", Key::new(VIP, vec![PORTS]), vec![to(upstream, Some(9995))]);
    Rule { action, hash: Hash::Modulo, source, ..rule }
}

/// Returns an upstream. Without a port the packets keep their destination port.
pub fn to(address: Ipv4Addr, port: Option<u16>) -> Upstream {
    Upstream::new(address, port)
}

fn ipv4(address: &Address) -> Ipv4Addr {
    match address.ip {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => panic!("{address} is no IPv4 address"),
    }
}

/// Returns a datagram that matches [`rule`].
pub fn datagram() -> Datagram {
    Datagram { to: RELAY_MAC, ..Datagram::new(endpoint(CLIENT, 5666), endpoint(VIP, PORTS.first)) }
}

pub struct Testbed<'object> {
    pub program: Program<'object>,
    pub wire: Wire,
    pub routing: u32,
    pub closed: u32,
    pub out: u32,
}

/// Has another CPU process what arrives at an interface. Before 5.18 BPF_PROG_TEST_RUN lets an interrupt process
/// copies that arrive again while the program runs, which overwrites the program's memory for this CPU: with
/// packets that arrive by the network the kernel never does.
fn receive_on_another_cpu(relay: &Namespace, interface: &str, cpu: usize) {
    let others = 1 << usize::from(cpu == 0);
    let path = format!("/sys/class/net/{interface}/queues/rx-0/rps_cpus");
    let script = format!("mount -t sysfs sysfs /sys && echo {others:x} >{path}");
    let mut command = relay.command("unshare");
    let status = command.args(["--mount", "sh", "-c", &script]).status().expect("unshare runs");
    assert!(status.success(), "{script}");
}

impl Testbed<'_> {
    /// Creates a testbed, runs the test in it and removes it.
    pub fn with(test: impl FnOnce(&Testbed<'_>) + Send) {
        Testbed::with_flows(flows(), SECONDS, test);
    }

    /// Does the same with the small object.
    pub fn with_small_object(test: impl FnOnce(&Testbed<'_>) + Send) {
        let features = types::features::default();
        Testbed::with_object(|object| open_for(&features, object), flows(), SECONDS, test);
    }

    /// Does the same with other settings of the flows, and a clock whose seconds take so many.
    pub fn with_flows(flows: Flows, seconds: u32, test: impl FnOnce(&Testbed<'_>) + Send) {
        let builder = UdplbSkelBuilder::default;
        Testbed::with_object(|object| builder().open(object), flows, seconds, test);
    }

    fn with_object(
        open: impl FnOnce(&mut MaybeUninit<OpenObject>) -> libbpf_rs::Result<OpenUdplbSkel<'_>> + Send,
        flows: Flows,
        seconds: u32,
        test: impl FnOnce(&Testbed<'_>) + Send,
    ) {
        let (relay, upstreams) = (Namespace::new(), Namespace::new());
        relay.link("out0", &upstreams, "relay0", true);
        for command in ADDRESSES {
            relay.ip(command);
        }
        relay.sysctl("net.ipv4.conf.in0.forwarding", "1");
        relay.sysctl("net.ipv4.conf.in1.forwarding", "0");
        relay.sysctl("net.ipv6.conf.in0.forwarding", "1");
        let wire = Wire::new((&relay, "out0"), (&upstreams, "relay0"));
        let [routing, closed, out] = ["in0", "in1", "out0"].map(|name| relay.index(name));
        let relay = &relay;
        relay.enter(move || {
            // `Wire::drain` relies on frames of one CPU staying in order
            let cpu = stay_on_this_cpu();
            if kernel::version() < (5, 18) {
                receive_on_another_cpu(relay, "in0", cpu);
                receive_on_another_cpu(relay, "in1", cpu);
            }
            let mut object = MaybeUninit::uninit();
            let skeleton = open(&mut object).expect("the object opens");
            let program = Program::load(skeleton, flows, seconds);
            // copies pass the program again at ingress
            // the kernel would answer those to this host
            let drop = returning(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, c"drop", SHOT);
            for ifindex in [routing, closed] {
                program.attach(ifindex);
                let mut hook = TcHookBuilder::new(drop.as_fd());
                let mut hook = hook.ifindex(ifindex as i32).handle(1).priority(2).hook(TC_INGRESS);
                hook.attach().expect("a filter behind the program");
            }
            program.set_own(&own());
            let device = types::device { mac: RELAY_MAC, generic: 1, takes_frames: 0 };
            program.set_device(LOOPBACK, device);
            program.set_vlans(routing, VLANS);
            program.set_vlans(closed, VLANS);
            test(&Testbed { program, wire, routing, closed, out });
        });
    }

    /// Returns the next hop of an upstream behind the gateway, as user space resolves it.
    pub fn hop(&self, mtu: u32, mac: Option<Mac>) -> NextHop {
        self.hop_by(Ipv4Addr::new(10, 0, 2, 254).into(), mtu, mac)
    }

    /// Returns the next hop through another gateway.
    pub fn hop_by(&self, gateway: IpAddr, mtu: u32, mac: Option<Mac>) -> NextHop {
        NextHop::Hop(Hop {
            interface: "out0".into(),
            ifindex: self.out,
            gateway,
            mtu,
            egress: None,
            macs: mac.map_or(Macs::Unknown, |neighbour| Macs::Known { own: OUT_MAC, neighbour }),
        })
    }

    /// Returns the next hop of an upstream of either family, with this host's egress address.
    pub fn hop_to(&self, upstream: IpAddr, mtu: u32, mac: Option<Mac>) -> NextHop {
        let (gateway, egress) = match upstream {
            IpAddr::V4(_) => (Ipv4Addr::new(10, 0, 2, 254).into(), OWN.into()),
            IpAddr::V6(_) => (Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 0xfe).into(), OWN6.into()),
        };
        match self.hop_by(gateway, mtu, mac) {
            NextHop::Hop(hop) => NextHop::Hop(Hop { egress: Some(egress), ..hop }),
            way => way,
        }
    }

    /// Runs a case and returns its outcome unchecked.
    pub fn run(&self, case: &Case) -> (RuleIds, Outcome) {
        self.run_after(case, |_| {})
    }

    /// Configures the program, calls `before`, then runs the case.
    fn run_after(&self, case: &Case, before: impl FnOnce(&Program<'_>)) -> (RuleIds, Outcome) {
        let address = &case.rule.upstreams[case.chosen].address;
        let ways: BTreeMap<_, _> =
            case.known.iter().map(|way| (address.clone(), way.clone())).collect();
        let ids = self.program.configure(&case.rule, &ways, case.first_id);
        if let Some(tamper) = case.tamper {
            tamper(&self.program, &ids);
        }
        before(&self.program);
        (ids, self.send(case))
    }

    /// Runs the packet of a case with the configured program.
    pub fn send(&self, case: &Case) -> Outcome {
        let ifindex = match case.ingress {
            Ingress::Routing => self.routing,
            Ingress::Closed => self.closed,
        };
        let (gso_size, gso_segs) = case.gso;
        let (tag, length) = (case.tag, case.length);
        let context = Context { ifindex, gso_size, gso_segs, tag, length };
        let run = self.program.run(&case.frame(), context);
        Outcome { run, copies: self.wire.drain(), counted: self.program.take_counted() }
    }

    /// Runs a case; the error contains the expected and the actual outcome.
    pub fn check(&self, case: &Case) -> Result<(), String> {
        self.try_after(case, |_| {})
    }

    /// # Panics
    /// If the case fails; `before` runs with the configured program.
    #[track_caller]
    pub fn check_after(&self, case: &Case, before: impl FnOnce(&Program<'_>)) {
        self.try_after(case, before).unwrap_or_else(|wrong| panic!("{wrong}"));
    }

    fn try_after(&self, case: &Case, before: impl FnOnce(&Program<'_>)) -> Result<(), String> {
        let (ids, mut got) = self.run_after(case, before);
        let copies = case.expected(&ids, None).copies.len();
        let late = copies.saturating_sub(got.copies.len());
        got.copies.extend(self.wire.drain_at_least(late));
        // fragments get a new identification where several senders share one address
        let identification = match (case.fate, got.copies.first()) {
            (Fate::Cut(..), Some(piece)) => Some(u16::from_be_bytes([piece[18], piece[19]])),
            _ => None,
        };
        let wanted = case.expected(&ids, identification);
        // the slow path has filled lines, if the packet is one for the fast path
        if got == wanted && matches!(case.fate, Fate::Sent(..)) {
            got = self.send(case);
            got.copies.extend(self.wire.drain_at_least(copies.saturating_sub(got.copies.len())));
        }
        if got == wanted {
            got = self.xdp_after(case, got);
        }
        if got == wanted {
            return Ok(());
        }
        let name = format!("{} ({:?}, {:?})", case.name, case.rule.action, case.rule.source);
        Err(format!("{name}\n wanted: {wanted} got: {got}"))
    }

    /// Runs the XDP program on the packet of a case; returns `by_tc`, the outcome of the program at tc, if it passes
    /// the packet on as it came, and else what it has done, in terms of tc.
    fn xdp_after(&self, case: &Case, by_tc: Outcome) -> Outcome {
        // XDP sees no metadata
        if case.tag.is_some() || case.length.is_some() || case.gso != (0, 0) {
            return by_tc;
        }
        let frame = case.frame();
        let run = self.program.run_xdp(&frame);
        let counted = self.program.take_counted();
        match run.action {
            XDP_PASS if run.frame == frame && counted.is_empty() => by_tc,
            XDP_REDIRECT => {
                Outcome { run: Run { action: REDIRECT, ..run }, copies: self.wire.drain(), counted }
            }
            _ => Outcome { run, copies: self.wire.drain(), counted },
        }
    }

    /// Runs all cases and reports every failure.
    pub fn check_all(&self, cases: impl IntoIterator<Item = Case>) {
        let wrong: Vec<String> =
            cases.into_iter().filter_map(|case| self.check(&case).err()).collect();
        assert!(wrong.is_empty(), "{} cases went wrong:\n{}", wrong.len(), wrong.join("\n"));
    }
}
