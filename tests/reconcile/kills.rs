//! `apply` as a process that is killed at random moments, under traffic with flows.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, RandomState};
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, RELAY, UPSTREAMS, rule, upstream};
use crate::common::net::{PATIENCE, TTL, bind, expect, expect_silence, receive, try_receive};
use crate::faults::unfinished;

/// Time for the kills of one kind of attachment.
const TIME: Duration = Duration::from_secs(7);

/// Number of clients, each with a flow.
const FLOWS: usize = 4;

/// Returns a configuration with flows, and a rule that shows which configuration serves.
fn config(entries: u32, shown: u16) -> Value {
    let options = json!({ "tc_action": "block", "reply": "nat" });
    json!({
        "version": 1,
        "interfaces": ["eth0", "up0"],
        "flows": { "entries": entries },
        "rules": [
            rule("shown", shown, json!({ "tc_action": "block" }), &[upstream(UPSTREAMS[0], 7002)]),
            rule("flows", 5000, options, &[upstream(UPSTREAMS[0], 7001)]),
        ],
    })
}

/// Returns the next of a sequence of random numbers.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(1);
    BuildHasherDefault::<DefaultHasher>::default().hash_one(*state)
}

/// Clients that ask one question after the other, and their upstream.
#[derive(Default)]
struct Traffic {
    stopped: AtomicBool,
    answered: [AtomicU32; FLOWS],
    /// Ports that the upstream has seen of each client.
    seen: Mutex<[BTreeSet<SocketAddr>; FLOWS]>,
}

/// Ends the traffic, also after a panic.
struct Stop<'a>(&'a Traffic);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Relaxed);
    }
}

impl Traffic {
    /// Asks until the traffic stops; each question must be answered.
    fn ask(&self, number: usize, client: &UdpSocket) {
        while !self.stopped.load(Ordering::Relaxed) {
            client.send(&[number as u8]).expect("sent");
            expect(client, &[number as u8], (RELAY, 5000), TTL - 1);
            self.answered[number].fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Answers until the traffic has stopped and nothing is left to answer.
    fn answer(&self, server: &UdpSocket) {
        server.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
        loop {
            match try_receive(server) {
                Ok(asked) => {
                    let number = usize::from(asked.payload[0]);
                    self.seen.lock().expect("no panic")[number].insert(asked.from);
                    server.send_to(&asked.payload, asked.from).expect("sent");
                }
                Err(_) if self.stopped.load(Ordering::Relaxed) => break,
                Err(_) => {}
            }
        }
    }

    /// Waits until each client has asked a new question and got its answer.
    #[track_caller]
    fn expect_progress(&self) {
        let end = Instant::now() + PATIENCE;
        for answered in &self.answered {
            // the first one may have been asked before
            let wanted = answered.load(Ordering::Relaxed) + 2;
            while answered.load(Ordering::Relaxed) < wanted {
                assert!(Instant::now() < end, "a flow is stuck");
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Returns the first of two ports if its rule serves, else the second; exactly one of them must.
#[track_caller]
fn serving(lab: &Lab, [old, new]: [u16; 2]) -> u16 {
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 7002);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    for port in [old, new] {
        sender.send_to(&port.to_be_bytes(), (RELAY, port)).expect("sent");
    }
    let got = receive(&receiver).payload;
    expect_silence(&receiver);
    u16::from_be_bytes(got.try_into().expect("two bytes"))
}

/// Applies other configurations, kills each `apply` once at random, and repeats it.
fn kill_and_heal(lab: &Lab, traffic: &Traffic, state: &mut u64) {
    let begun = Instant::now();
    let mut shown = 6000;
    lab.apply(&config(1024, shown));
    let mut usual = begun.elapsed();
    let mut kills = [0, 0, 0];
    while begun.elapsed() < TIME || kills[0] + kills[1] < 3 {
        assert!(begun.elapsed() < 10 * TIME, "old, new, killed too late: {kills:?}");
        let new = shown + 1;
        let file = lab.write(&config([1024, 4096][usize::from(new) / 2 % 2], new));
        let words = format!("apply {}", file.display());
        let mut apply = lab.udplb(&words);
        apply.stdout(Stdio::null()).stderr(Stdio::null());
        let started = Instant::now();
        let mut apply = apply.spawn().expect("the program runs");
        // more often in the later half, where the kernel changes
        let share = (random(state) as f64 / u64::MAX as f64).sqrt();
        thread::sleep(usual.mul_f64(1.1 * share));
        // it becomes udplb in place
        apply.kill().expect("killed");
        let ended = apply.wait().expect("a status").code();
        assert!(matches!(ended, None | Some(0)), "{ended:?}");
        if ended.is_some() {
            usual = usual.min(started.elapsed());
        }
        traffic.expect_progress();
        let serving = serving(lab, [shown, new]);
        kills[if ended.is_some() { 2 } else { usize::from(serving - shown) }] += 1;
        let repeated = Instant::now();
        if lab.run(&format!("{words} -o json")).expect(0).json()["changed"] == true {
            // the machine may be less busy now
            usual = usual.min(repeated.elapsed());
        }
        traffic.expect_progress();
        assert!(unfinished(lab).is_empty(), "{:?}", unfinished(lab));
        let generations = fs::read_dir(lab.bpffs.pins().join("generations")).expect("pins");
        assert!(generations.count() <= 2, "older generations are left");
        lab.run("status").expect(0);
        shown = new;
    }
    println!("old, new, killed too late: {kills:?}");
}

#[test]
fn killed_apply_leaves_one_configuration_and_flows() {
    let known = std::env::var("UDPLB_KILL_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut state = known.unwrap_or_else(|| RandomState::new().hash_one(0));
    for lab in Lab::for_each_attachment() {
        println!("UDPLB_KILL_SEED={state}");
        lab.apply(&config(1024, 5999));
        let traffic = Traffic::default();
        let server = bind(&lab.upstream, UPSTREAMS[0], 7001);
        let clients: Vec<UdpSocket> =
            (0..FLOWS).map(|number| bind(&lab.client, CLIENTS[number % 2], 0)).collect();
        thread::scope(|scope| {
            let stop = Stop(&traffic);
            scope.spawn(|| traffic.answer(&server));
            for (number, client) in clients.iter().enumerate() {
                client.connect((RELAY, 5000)).expect("connected");
                let traffic = &traffic;
                scope.spawn(move || {
                    let _stop = Stop(traffic);
                    traffic.ask(number, client);
                });
            }
            kill_and_heal(&lab, &traffic, &mut state);
            drop(stop);
        });
        let seen = traffic.seen.into_inner().expect("no panic");
        assert!(seen.iter().all(|ports| ports.len() == 1), "flows were made anew: {seen:?}");
    }
}
