//! Decisions that a CPU remembers, under traffic: none is used for a packet that was sent after a change has
//! ended, or, where nobody tells the program of it, after the documented time.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, RELAY, UPSTREAMS, config, rule};
use crate::common::net::bind;
use crate::common::service::until;

/// Twice the time that a line lives without arpd, and more for a busy machine.
const AGED: Duration = Duration::from_millis(300);

/// A sender of numbered datagrams, and for each upstream the last number that has arrived there.
struct Flow {
    next: AtomicU64,
    last: [AtomicU64; 2],
    stop: AtomicBool,
}

impl Flow {
    fn send(&self, socket: &UdpSocket) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::SeqCst);
            // an ICMP error of before is reported here
            let _ = socket.send_to(&number.to_be_bytes(), (RELAY, 5000));
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn receive(&self, place: usize, socket: &UdpSocket) {
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        let mut buffer = [0; 8];
        while !self.stop.load(Ordering::Relaxed) {
            if socket.recv(&mut buffer).is_ok() {
                self.last[place].fetch_max(u64::from_be_bytes(buffer), Ordering::SeqCst);
            }
        }
    }

    fn last(&self, place: usize) -> u64 {
        self.last[place].load(Ordering::SeqCst)
    }

    /// Waits until datagrams arrive at these upstreams, and checks that none arrives at the others that is sent
    /// from now on.
    #[track_caller]
    fn expect_only(&self, wanted: [bool; 2]) {
        // one may be on its way
        let now = self.next.load(Ordering::SeqCst) + 1;
        for place in [0, 1].into_iter().filter(|place| wanted[*place]) {
            until("datagrams arrive", || self.last(place) > now + 500);
        }
        thread::sleep(AGED);
        for place in [0, 1].into_iter().filter(|place| !wanted[*place]) {
            assert!(
                self.last(place) <= now,
                "upstream {place} got {} after {now}",
                self.last(place)
            );
        }
    }
}

/// Runs `check` while datagrams are sent.
fn under_traffic(lab: &Lab, check: impl FnOnce(&Flow)) {
    let flow = Flow {
        next: AtomicU64::new(1),
        last: [const { AtomicU64::new(0) }; 2],
        stop: AtomicBool::new(false),
    };
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7001));
    thread::scope(|scope| {
        scope.spawn(|| flow.send(&sender));
        for (place, receiver) in receivers.iter().enumerate() {
            let flow = &flow;
            scope.spawn(move || flow.receive(place, receiver));
        }
        // also if a check fails, otherwise the others would continue
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&flow)));
        flow.stop.store(true, Ordering::Relaxed);
        checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

fn to(places: &[usize]) -> Value {
    let upstream = |place: &usize| {
        let name = format!("u{place}");
        json!({ "name": name, "address": UPSTREAMS[*place], "port": 7001 })
    };
    let upstreams: Vec<Value> = places.iter().map(upstream).collect();
    let options = json!({ "tc_action": "block", "strategy": "random" });
    config(&[rule("only", 5000, options, &upstreams)])
}

#[test]
fn new_file_and_rollback_are_followed() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&to(&[0]));
        under_traffic(&lab, |flow| {
            flow.expect_only([true, false]);
            lab.apply(&to(&[1]));
            flow.expect_only([false, true]);
            lab.run("rollback").expect(0);
            flow.expect_only([true, false]);
        });
    }
}

#[test]
fn drained_and_enabled_upstreams_are_followed() {
    let lab = Lab::new();
    lab.apply(&to(&[0, 1]));
    under_traffic(&lab, |flow| {
        flow.expect_only([true, true]);
        lab.run("drain only/u0").expect(0);
        flow.expect_only([false, true]);
        lab.run("enable only/u0").expect(0);
        flow.expect_only([true, true]);
        lab.run("drain only/u1").expect(0);
        flow.expect_only([true, false]);
    });
}

/// Nobody tells the program: without arpd, next hops are asked for again ten times a second.
#[test]
fn routes_and_neighbours_are_followed_without_arpd() {
    let lab = Lab::new();
    lab.apply(&to(&[0]));
    under_traffic(&lab, |flow| {
        flow.expect_only([true, false]);
        lab.relay.ip(&format!("route add blackhole {}/32", UPSTREAMS[0]));
        thread::sleep(AGED);
        flow.expect_only([false, false]);
        lab.relay.ip(&format!("route del blackhole {}/32", UPSTREAMS[0]));
        flow.expect_only([true, false]);
        let elsewhere = "lladdr 02:00:00:00:00:77 dev up0 nud permanent";
        lab.relay.ip(&format!("neigh replace {} {elsewhere}", UPSTREAMS[0]));
        thread::sleep(AGED);
        flow.expect_only([false, false]);
    });
}

/// A trace sees each packet, those of rules and those of nobody.
#[test]
fn trace_sees_packets_that_were_on_the_fast_path() {
    let lab = Lab::new();
    lab.apply(&to(&[0]));
    under_traffic(&lab, |flow| {
        flow.expect_only([true, false]);
        let seen = lab.run("trace -c 200").expect(0).stdout;
        assert_eq!(seen.matches("forwarded").count(), 200, "{seen}");
        flow.expect_only([true, false]);
    });
}
