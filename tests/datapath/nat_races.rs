//! Flows of `reply: nat` under load: several CPUs, forged senders, and clocks that go round.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use udplb::config::{Flows, Ports};

use crate::answers::{CLIENTS, VIPS};
use crate::common::wire::run_on_cpu;
use crate::nat::{between, configure, ends, rule};
use crate::program::{Context, PORTS, flows, test_run};
use crate::testbed::{NEAR, REDIRECT, SHOT, Testbed, UNSPEC};

const SERVER: (IpAddr, u16) = (IpAddr::V4(NEAR), 5353);

/// Frames whose addresses and ports are changed in place: checksums of UDP over IPv4 may be missing.
#[derive(Clone)]
struct Frames {
    question: Vec<u8>,
    answer: Vec<u8>,
}

impl Frames {
    fn new() -> Frames {
        let frame = |from, to| {
            let mut frame = between(from, to).frame();
            frame[40..42].fill(0);
            frame
        };
        let egress = (IpAddr::V4(crate::testbed::OWN), 1);
        Frames { question: frame((CLIENTS[0], 1), (VIPS[0], 53)), answer: frame(SERVER, egress) }
    }

    /// Returns the question of a client, whose number is in its network and its port.
    fn question(&mut self, client: u32) -> &[u8] {
        // the last byte of the address, and its difference in the checksum of the header
        let (host, port) = ((client >> 15) as u8, 1024 + (client & 0x7fff) as u16);
        let word = u16::from_be_bytes([self.question[28], self.question[29]]);
        let changed = word & 0xff00 | u16::from(host);
        let checksum = u16::from_be_bytes([self.question[24], self.question[25]]);
        let sum = u32::from(!checksum) + u32::from(!word) + u32::from(changed);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
        self.question[24..26].copy_from_slice(&sum.to_be_bytes());
        self.question[28..30].copy_from_slice(&changed.to_be_bytes());
        self.question[34..36].copy_from_slice(&port.to_be_bytes());
        &self.question
    }

    /// Returns the answer of the server to what it has seen of a client.
    fn answer(&mut self, egress_port: u16) -> &[u8] {
        self.answer[36..38].copy_from_slice(&egress_port.to_be_bytes());
        &self.answer
    }
}

/// Returns the client that an answer goes to, as [`Frames::question`] numbers them.
fn client_of(frame: &[u8]) -> u32 {
    let [_, (address, port)] = ends(frame);
    let IpAddr::V4(address) = address else { panic!("{address}") };
    u32::from(address.octets()[3]) << 15 | u32::from(port - 1024)
}

/// A program, and the interface that its packets come in on.
#[derive(Clone, Copy)]
struct Runner<'a> {
    program: BorrowedFd<'a>,
    context: Context,
}

impl Runner<'_> {
    fn new<'a>(testbed: &'a Testbed<'_>) -> Runner<'a> {
        let context = Context { ifindex: testbed.routing, ..Context::default() };
        Runner { program: testbed.program.program(), context }
    }

    /// Asks; returns the port that the server sees, `None` if the flow is refused.
    fn ask(self, frames: &mut Frames, client: u32) -> Option<u16> {
        let run = test_run(self.program, frames.question(client), self.context);
        assert!([REDIRECT, SHOT].contains(&run.action), "{}", run.action);
        (run.action == REDIRECT).then(|| ends(&run.frame)[0].1)
    }

    /// Answers; returns the client that gets it. An answer whose flow just ends is dropped.
    fn answer(self, frames: &mut Frames, port: u16) -> Option<u32> {
        let run = test_run(self.program, frames.answer(port), self.context);
        assert!([REDIRECT, UNSPEC, SHOT].contains(&run.action), "{}", run.action);
        (run.action == REDIRECT).then(|| client_of(&run.frame))
    }
}

/// Two CPUs make flows that evict each other's: an answer reaches its client or nobody.
#[test]
fn answers_reach_no_other_client_on_two_cpus() {
    const CLIENTS: u32 = 20_000;
    Testbed::with_flows(flows(), 1, |testbed| {
        configure(testbed, vec![rule(0, &[SERVER.0])]);
        let runner = Runner::new(testbed);
        let end = Instant::now() + Duration::from_secs(4);
        let work = |cpu: usize| {
            run_on_cpu(cpu);
            let (mut frames, mut random) = (Frames::new(), 88_172_645_463_325_252 + cpu as u64);
            let (mut delivered, mut ended) = (0, 0);
            while Instant::now() < end {
                for _ in 0..100 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let client = (random % u64::from(CLIENTS)) as u32;
                    let Some(port) = runner.ask(&mut frames, client) else { continue };
                    match runner.answer(&mut frames, port) {
                        Some(other) => {
                            assert_eq!(other, client, "misdelivered");
                            delivered += 1;
                        }
                        None => ended += 1,
                    }
                }
            }
            (delivered, ended)
        };
        let (one, other) = thread::scope(|scope| {
            let other = scope.spawn(|| work(1));
            (work(0), other.join().expect("no panic"))
        });
        assert!(one.0 > 2000 && other.0 > 2000, "{one:?} {other:?}");
        assert!(one.1 + other.1 < (one.0 + other.0) / 100, "{one:?} {other:?}");
    });
}

struct Leaves<'a>(&'a AtomicU32);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.store(u32::MAX, Ordering::SeqCst);
    }
}

/// The first two packets of a client come on two CPUs at once: both are forwarded, and both are answered.
#[test]
fn flow_that_begins_on_two_cpus_loses_nothing() {
    const ROUNDS: u32 = 1500;
    let settings = Flows { entries: 8192, ports: Ports { first: 1024, last: 65_535 }, ..flows() };
    Testbed::with_flows(settings, 1, |testbed| {
        configure(testbed, vec![rule(0, &[SERVER.0])]);
        let runner = Runner::new(testbed);
        let arrived = [const { AtomicU32::new(0) }; 2];
        let work = |cpu: usize| {
            run_on_cpu(cpu);
            // also where it panics: the other one waits
            let _leaves = Leaves(&arrived[cpu]);
            let mut frames = Frames::new();
            for round in 1..=ROUNDS {
                arrived[cpu].store(round, Ordering::SeqCst);
                while arrived[1 - cpu].load(Ordering::SeqCst) < round {
                    thread::yield_now();
                }
                let port = runner.ask(&mut frames, round).expect("forwarded");
                assert_eq!(runner.answer(&mut frames, port), Some(round));
            }
        };
        thread::scope(|scope| {
            let other = scope.spawn(|| work(1));
            work(0);
            other.join().expect("no panic");
        });
    });
}

/// Forged senders evict each other, and no flow that is assured.
#[test]
fn flood_leaves_assured_flows() {
    const ASSURED: u32 = 50_000;
    let forged: u32 =
        std::env::var("FLOOD").map_or(200_000, |text| text.parse().expect("a number"));
    let servers = [2, 254].map(|host| IpAddr::V4(Ipv4Addr::new(10, 0, 2, host)));
    let settings = Flows { entries: 65_536, ports: Ports { first: 1024, last: 65_535 }, ..flows() };
    Testbed::with_flows(settings, 10, |testbed| {
        configure(testbed, vec![rule(0, &servers)]);
        let (runner, mut frames) = (Runner::new(testbed), Frames::new());
        let mut made = 0;
        for client in 0..ASSURED {
            let run = test_run(runner.program, frames.question(client), runner.context);
            assert_eq!(run.action, REDIRECT);
            let [egress, server] = ends(&run.frame);
            let mut answer = between(server, egress).frame();
            answer[40..42].fill(0);
            assert_eq!(test_run(runner.program, &answer, runner.context).action, REDIRECT);
            made += 1;
        }
        testbed.program.age_flows(3);
        (0..ASSURED).for_each(|client| assert!(runner.ask(&mut frames, client).is_some()));
        let assured =
            || testbed.program.flow_states().iter().filter(|state| **state == 3).count() as u32;
        // in a table that is three quarters full some flows give way before they are assured
        let before = assured();
        assert!(before * 1000 >= ASSURED * 999, "{before} of {ASSURED} assured");
        for client in ASSURED..ASSURED + forged {
            made += u64::from(runner.ask(&mut frames, client).is_some());
        }
        let left = assured();
        assert!(left * 1000 >= before * 999, "{left} of {before} left");
        let admitted = made - u64::from(ASSURED);
        assert!(admitted > 10_000, "{admitted} of {forged} admitted");
        let live = testbed.program.flow_states().len() as u64;
        // each flow that is made adds two to a version, each that ends for a port two more
        let versions = testbed.program.flow_versions() / 2;
        assert!(
            live <= made && made <= versions && versions <= made + admitted,
            "{live} {made} {versions}"
        );
    });
}

/// Times of hints go round after 1024 beats, those of flows after years.
#[test]
fn clocks_that_go_round_end_and_hold_no_flow() {
    Testbed::with(|testbed| {
        configure(testbed, vec![rule(0, &[SERVER.0])]);
        let (runner, mut frames) = (Runner::new(testbed), Frames::new());
        let port = runner.ask(&mut frames, 7).expect("a flow");
        assert!((PORTS.first..=PORTS.last).contains(&port));
        // 1000 beats of 0.2 s: the hint is as old as it looks
        testbed.program.age_flows(205);
        assert_eq!(runner.answer(&mut frames, port), None, "it has expired");
        assert_eq!(runner.ask(&mut frames, 7), Some(port));
        // 1025 beats: it looks as if the port rested, and another one is as good
        testbed.program.age_flows(210);
        let other = runner.ask(&mut frames, 7).expect("a flow");
        assert_ne!(other, port);
        assert_eq!(runner.answer(&mut frames, other), Some(7));
        // another CPU has stored a later time than this one reads
        testbed.program.age_flows_by(0_u32.wrapping_sub(3));
        assert_eq!(runner.answer(&mut frames, other), Some(7));
        assert_eq!(runner.ask(&mut frames, 7), Some(other));
    });
}
