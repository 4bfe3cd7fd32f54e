//! Nanoseconds per packet in the program alone, measured with `bpf_prog_test_run`.

use std::os::fd::AsFd;

use libbpf_rs::{MapCore, MapFlags};

use crate::floors::{self, Packet, Part};
use crate::relay::{Case, Programs, REDIRECT, Relay, UNSPEC};
use crate::{Report, least};

const ROUNDS: usize = 200;

const FORWARD: u16 = 2001;
const CLONE: u16 = 2002;
const NOBODYS: u16 = 2003;
const MODULO: u16 = 2004;
const MAGLEV: u16 = 2005;

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
    options: { tc_action: block, hash: HASH }
    upstream: [UPSTREAMS]
";

/// Offset of the sender's address.
const SENDER: u32 = 14 + 12;

pub fn measure(report: &mut Report) {
    let floors = floors::load();
    let plain = Relay::new(&floors, PLAIN);
    let balanced = |port: u16, hash| {
        let upstreams: Vec<String> =
            (2..12).map(|host| format!("{{ address: 10.0.2.{host} }}")).collect();
        BALANCED
            .replace("PORT", &port.to_string())
            .replace("HASH", hash)
            .replace("UPSTREAMS", &upstreams.join(", "))
    };
    let rules =
        format!("{PLAIN}{MORE}{}{}", balanced(MODULO, "modulo"), balanced(MAGLEV, "maglev"));
    let relay = Relay::new(&floors, &rules);
    for port in [FORWARD, CLONE] {
        let mut key = [10, 0, 1, 1, 0, 0, 0, 0];
        key[4..6].copy_from_slice(&port.to_be_bytes());
        floors.maps.keys.update(&key, &[0; 24], MapFlags::ANY).expect("keys");
    }
    let mut programs = Programs::new(&floors);
    let at_once = programs.add(floors.progs.at_once.as_fd());
    let look_up = programs.add(floors.progs.look_up.as_fd());
    let route = programs.add(floors.progs.route.as_fd());
    let clone_alone = programs.add(floors.progs.clone.as_fd());
    let plainly = programs.add(plain.program());
    let udplb = programs.add(relay.program());

    let to = |port| Packet::udp(&relay.namespace, port);
    let (udp, pass, tcp) = (to(FORWARD), to(CLONE), Packet::tcp(&relay.namespace, FORWARD));
    let ipv6 = Packet::part(&relay.namespace, true, Part::Whole, FORWARD);
    let (nobodys, modulo, maglev) = (to(NOBODYS), to(MODULO), to(MAGLEV));
    let plain_packets = [FORWARD, NOBODYS].map(|port| Packet::udp(&plain.namespace, port));
    let up = Case { out: relay.namespace.index("out0"), ..Case::new(UNSPEC) };
    let away = Case { out: up.out, ..Case::new(REDIRECT) };
    let random = Case { random: SENDER, ..away.leased() };
    let unsent = Case { random: SENDER, ..up };
    let cases = [
        (&relay, at_once, &udp, up),
        (&relay, look_up, &udp, away),
        (&relay, udplb, &udp, away),
        (&relay, udplb, &udp, away.leased()),
        (&relay, udplb, &ipv6, away),
        (&relay, udplb, &ipv6, away.leased()),
        (&relay, route, &udp, up),
        (&relay, route, &ipv6, up),
        (&relay, clone_alone, &pass, up),
        (&relay, udplb, &pass, up),
        (&relay, udplb, &pass, up.leased()),
        (&relay, at_once, &tcp, up),
        (&relay, udplb, &tcp, up),
        (&relay, udplb, &nobodys, up),
        (&plain, plainly, &plain_packets[0], away.leased()),
        (&plain, plainly, &plain_packets[1], up),
        (&relay, at_once, &modulo, unsent),
        (&relay, udplb, &modulo, random),
        (&relay, udplb, &maglev, random),
    ];
    let alone = floors.progs.at_once.as_fd();
    let [loop_alone, figures @ ..]: [f64; 20] = least(ROUNDS, |index| match index {
        0 => programs.run_alone(&relay, alone, &udp),
        _ => {
            let (relay, program, packet, case) = cases[index - 1];
            programs.run(relay, program, packet, case)
        }
    });
    plain.forwarded_everything();
    relay.forwarded_everything();
    write(report, loop_alone, figures);
}

/// Writes the report: nanoseconds of the empty loop and of each case.
fn write(report: &mut Report, loop_alone: f64, figures: [f64; 19]) {
    // All figures include the loop of the test run, none includes restoring the packet.
    let restoring = figures[0] - loop_alone;
    let figures = figures.map(|figure| figure - restoring);
    let [_, look_up, forward, leased, forward6, leased6, figures @ ..] = figures;
    let [route, route6, clone_alone, clone, leased_clone, figures @ ..] = figures;
    let [route, route6] = [route, route6].map(|figure| figure - loop_alone);
    let [tcp_at_once, tcp, nobodys, plain, plain_nobodys, figures @ ..] = figures;
    let [_, modulo, maglev] = figures;
    let ns = |figure: f64| format!("{figure:.1} ns");
    report.title("A packet in the program alone (bpf_prog_test_run), as a multiple of its floor");
    report.floor("floor: parse, a hash look-up, bpf_redirect", look_up);
    report.at_most("udplb block", &ns(forward), forward / look_up, " x", 3.0);
    report.at_most("udplb block, while arpd runs", &ns(leased), leased / look_up, " x", 1.8);
    report.floor("floor: bpf_clone_redirect", clone_alone);
    report.at_most("udplb pass", &ns(clone), clone / clone_alone, " x", 1.3);
    let what = "udplb pass, while arpd runs";
    report.at_most(what, &ns(leased_clone), leased_clone / clone_alone, " x", 1.2);
    report.floor("floor: return at once", loop_alone);
    report.at_most("udplb, TCP: more than that", &ns(tcp), tcp - tcp_at_once, " ns", 3.0);

    report.title("IPv6, and what it costs those who do not use it");
    report.at_most("IPv6 to IPv4, while arpd runs", &ns(leased6), leased6 / leased, " x", 1.2);
    let routes = format!("{} {}", ns(route), ns(route6));
    report.note("bpf_fib_lookup, IPv4 and IPv6", &routes);
    let what = "IPv6 to IPv4, by the kernel's routes";
    report.note(what, &format!("{}{:>11}", ns(forward6), format!("{:.2} x", forward6 / forward)));
    let (own6, own) = (forward6 - route6, forward - route);
    report.at_most("besides bpf_fib_lookup", &ns(own6), own6 / own, " x", 1.2);
    let what = "a rule of IPv6 and fragments: IPv4, more";
    report.at_most(what, &ns(leased), leased - plain, " ns", 2.0);
    let what = "the same: UDP of nobody's, more";
    report.at_most(what, &ns(nobodys), nobodys - plain_nobodys, " ns", 2.0);

    report.title("Selection among ten upstreams, senders at random");
    report.floor("modulo", modulo);
    report.at_most("maglev: more than that", &ns(maglev), maglev - modulo, " ns", 10.0);
}
