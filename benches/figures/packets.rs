//! Nanoseconds per packet in the program alone, measured with `bpf_prog_test_run`.

use std::os::fd::AsFd;

use crate::floors::{self, FloorsSkel, Packet, Part, add_key};
use crate::relay::{Case, Program, Programs, REDIRECT, Relay, UNSPEC};
use crate::turns::{Costs, Turn, Turns};
use crate::{Report, copies, many};

const ROUNDS: usize = 200;

const FORWARD: u16 = floors::PORT;
const CLONE: u16 = 2002;
const NOBODYS: u16 = 2003;
const MODULO: u16 = 2004;
const MAGLEV: u16 = 2005;
const TEMPLATES: u16 = 2006;

/// Rules without IPv6, and without following fragments.
const PLAIN: &str = "
version: 1
interfaces: [in0]
defaults: { source: vip, fragments: pass }
rules:
  - key: { address: 10.0.1.1, port: 2001 }
    options: { tc_action: block }
    upstream: [{ address: 10.0.2.2, port: 9000 }]
  - key: { address: 10.0.1.1, port: 2002 }
    options: { tc_action: pass }
    upstream: [{ address: 10.0.2.2, port: 9000 }]
";
const MORE: &str = "
  - key: { address: 'fd00:1::1', port: 2001 }
    options: { tc_action: block, fragments: follow }
    upstream: [{ address: 'fd00:2::2', port: 9000 }]
";
const BALANCED: &str = "
  - key: { address: 10.0.1.1, port: PORT }
    options: { tc_action: block, OPTIONS }
    upstream: [UPSTREAMS]
";

/// Offset of the sender's address.
pub const SENDER: u32 = 14 + 12;

/// Packets per run with clones, which must fit into a queue.
const CLONES: i32 = 800;

pub fn measure(report: &mut Report) {
    measure_alone(report);
    many::measure(report);
    copies::measure_alone(report);
}

/// Relays with the same rules, without and with a lease, and one whose rules are plain.
struct Relays {
    free: Relay,
    leased: Relay,
    plain: Relay,
}

impl Relays {
    fn new(floors: &FloorsSkel<'_>) -> Relays {
        let balanced: String = [
            balanced(MODULO, "hash: modulo"),
            balanced(MAGLEV, "hash: maglev"),
            balanced(TEMPLATES, "hash: maglev, templates: all"),
        ]
        .concat();
        let rules = format!("{PLAIN}{MORE}{balanced}");
        Relays {
            free: Relay::new(floors, &rules),
            leased: Relay::new(floors, &rules).leased(),
            plain: Relay::new(floors, PLAIN).leased(),
        }
    }

    fn forwarded_everything(&self) {
        for relay in [&self.free, &self.leased, &self.plain] {
            relay.forwarded_everything();
        }
    }
}

fn balanced(port: u16, options: &str) -> String {
    let upstreams: Vec<String> =
        (2..12).map(|host| format!("{{ address: 10.0.2.{host} }}")).collect();
    BALANCED
        .replace("PORT", &port.to_string())
        .replace("OPTIONS", options)
        .replace("UPSTREAMS", &upstreams.join(", "))
}

/// The measurements of a part.
struct Bench<'a> {
    programs: &'a Programs<'a>,
    turns: Turns<'a>,
}

impl<'a> Bench<'a> {
    fn add(&mut self, relay: &'a Relay, program: Program, packet: Packet, case: Case) -> Turn {
        let programs = self.programs;
        let case = Case { out: relay.namespace.index("out0"), ..case };
        self.turns.add(move || programs.run(relay, program, &packet, case))
    }
}

fn measure_alone(report: &mut Report) {
    let floors = floors::load();
    let relays = Relays::new(&floors);
    for port in [FORWARD, CLONE] {
        add_key(&floors.maps.keys, [10, 0, 1, 1], port);
    }
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let look_up = programs.add(floors.progs.look_up.as_fd());
    let look_up6 = programs.add(floors.progs.look_up6.as_fd());
    let clone = programs.add(floors.progs.clone.as_fd());
    let [free, leased, plain] =
        [&relays.free, &relays.leased, &relays.plain].map(|relay| programs.add(relay.program()));

    let udp = |relay: &Relay, port| Packet::udp(&relay.namespace, port);
    let udp6 = |relay: &Relay| Packet::part(&relay.namespace, true, Part::Whole, FORWARD);
    let [away, up] = [REDIRECT, UNSPEC].map(Case::new);
    let cloned = Case { runs: CLONES, ..up };
    let random = Case { random: SENDER, ..away };
    let mut bench = Bench { programs: &programs, turns: Turns::default() };
    let mut on = |relay, program, packet, case| bench.add(relay, program, packet, case);
    let Relays { free: without, leased: with, plain: plainly } = &relays;
    let turns = All {
        harness: on(without, at_once, udp(without, FORWARD), up),
        look_up: on(without, look_up, udp(without, FORWARD), away),
        block: [
            on(with, leased, udp(with, FORWARD), away),
            on(without, free, udp(without, FORWARD), away),
        ],
        look_up6: on(without, look_up6, udp6(without), away),
        block6: [on(with, leased, udp6(with), away), on(without, free, udp6(without), away)],
        cloning: on(without, at_once, udp(without, CLONE), cloned),
        clone: on(without, clone, udp(without, CLONE), cloned),
        pass: on(with, leased, udp(with, CLONE), cloned),
        returning: on(with, at_once, Packet::tcp(&with.namespace, FORWARD), up),
        tcp: on(with, leased, Packet::tcp(&with.namespace, FORWARD), up),
        stranger: on(with, leased, udp(with, NOBODYS), up),
        plain: on(plainly, plain, udp(plainly, FORWARD), away),
        plain_stranger: on(plainly, plain, udp(plainly, NOBODYS), up),
        unsent: on(with, at_once, udp(with, MODULO), Case { random: SENDER, ..up }),
        modulo: on(with, leased, udp(with, MODULO), random),
        maglev: on(with, leased, udp(with, MAGLEV), random),
        data: [MAGLEV, TEMPLATES]
            .map(|port| on(with, leased, Packet::netflow(&with.namespace, port), random)),
    };
    let costs = bench.turns.take(ROUNDS);
    relays.forwarded_everything();
    turns.write(report, &costs);
}

/// The measurements; pairs are with and without a lease.
struct All {
    harness: Turn,
    look_up: Turn,
    block: [Turn; 2],
    look_up6: Turn,
    block6: [Turn; 2],
    cloning: Turn,
    clone: Turn,
    pass: Turn,
    returning: Turn,
    tcp: Turn,
    stranger: Turn,
    plain: Turn,
    plain_stranger: Turn,
    unsent: Turn,
    modulo: Turn,
    maglev: Turn,
    /// Data of NetFlow without and with `templates: all`.
    data: [Turn; 2],
}

impl All {
    fn write(&self, report: &mut Report, costs: &Costs) {
        let net = |turn: Turn| costs[turn] - costs[self.harness];
        report.title("A packet in the program alone (bpf_prog_test_run), net, times its floor");
        report.floor("the harness: loop, restoring, tail call", costs[self.harness]);
        for (what, look_up, block, keys, limits) in [
            ("", self.look_up, self.block, ["block_lease_net", "block_none_net"], [0.7, 0.8]),
            (
                "IPv6: ",
                self.look_up6,
                self.block6,
                ["block6_lease_net", "block6_none_net"],
                [0.8, 0.9],
            ),
        ] {
            let floor = net(look_up);
            report.floor(&format!("{what}floor: parse, a hash look-up, redirect"), floor);
            for (nth, case) in ["under the lease", "without arpd"].into_iter().enumerate() {
                let cost = net(block[nth]);
                report.times(&format!("{what}block, {case}"), cost, floor, limits[nth]);
                report.record(keys[nth], (cost / floor).least);
            }
        }
        let [clone, pass] = [self.clone, self.pass].map(|turn| costs[turn] - costs[self.cloning]);
        report.floor("floor: bpf_clone_redirect", clone);
        report.times("pass, under the lease", pass, clone, 1.1);
        let beyond = |turn: Turn| costs[turn] - costs[self.returning];
        report.floor("floor: return at once, with the harness", costs[self.returning]);
        report.nanoseconds("TCP: more than that", beyond(self.tcp), 2.0);
        report.record("tcp_ns", beyond(self.tcp).least);
        report.nanoseconds("UDP of nobody's: more than that", beyond(self.stranger), 4.0);
        report.record("stranger_ns", beyond(self.stranger).least);
        self.write_others(report, costs);
    }

    /// Writes the figures that compare parts of udplb with one another.
    fn write_others(&self, report: &mut Report, costs: &Costs) {
        let net = |turn: Turn| costs[turn] - costs[self.harness];
        report.title("IPv6, and its cost to those who do not use it");
        report.times("IPv6, to IPv4", net(self.block6[0]), net(self.block[0]), 1.3);
        let more = costs[self.block[0]] - costs[self.plain];
        report.nanoseconds("a rule of IPv6 and fragments: IPv4, more", more, 2.0);
        let more = costs[self.stranger] - costs[self.plain_stranger];
        report.nanoseconds("the same: UDP of nobody's, more", more, 2.0);

        report.title("Selection among ten upstreams, senders at random");
        report.floor("modulo, net", costs[self.modulo] - costs[self.unsent]);
        let more = costs[self.maglev] - costs[self.modulo];
        report.nanoseconds("maglev: more than that", more, 10.0);
        let more = costs[self.data[1]] - costs[self.data[0]];
        report.nanoseconds("NetFlow data with `templates: all`: more", more, 30.0);
        report.record("templates_ns", more.least);
    }
}
