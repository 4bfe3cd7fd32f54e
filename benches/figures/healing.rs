//! Recovery time after a change around `udplb arpd`: from the change until the program's table, or
//! `status`, is right again.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::Report;
use crate::common::lab::{CLIENTS, Lab, RELAY, config, rule};
use crate::common::net::bind;
use crate::common::service::Arpd;
use crate::probing;

const ROUNDS: usize = 20;
/// Time limit of a recovery.
const LIMIT: Duration = Duration::from_secs(60);
/// Interval between datagrams of the background flow.
const PACE: Duration = Duration::from_millis(1);

pub fn measure(report: &mut Report) {
    let lab = Lab::new();
    lab.upstream.sysctl("net.ipv4.conf.eth0.arp_notify", "1");
    lab.upstream.ip("addr add 10.9.0.1/32 dev lo");
    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.20");
    let upstreams = |port, address: &str| {
        let upstream = json!({ "name": address, "address": address });
        rule(address, port, json!({ "tc_action": "block" }), &[upstream])
    };
    lab.apply(&config(&[upstreams(5000, "10.2.0.20"), upstreams(5001, "10.9.0.1")]));
    let _arpd = Arpd::start(&lab, "");
    lab.await_health("10.9.0.1", "up");

    report.title("udplb arpd: from a change to what the program knows, median of 20");
    let mut next = 0_u8;
    let mut new_mac = || {
        next += 1;
        format!("02:00:00:00:01:{next:02x}")
    };
    let announced = median(&lab, |lab| {
        let mac = new_mac();
        lab.upstream.ip(&format!("link set eth0 address {mac}"));
        Box::new(move |lab| lab.next_hop("10.2.0.20")["mac"] == mac.as_str())
    });
    show(report, "gratuitous ARP", &announced, 0.1);
    let mut turn = 0;
    let moved = median(&lab, |lab| {
        turn += 1;
        let gateway = ["10.2.0.20", "10.2.0.21"][turn % 2];
        lab.relay.ip(&format!("route replace 10.9.0.0/24 via {gateway}"));
        Box::new(move |lab| {
            let hop = lab.next_hop("10.9.0.1");
            hop["gateway"] == gateway && hop["mac"].is_string()
        })
    });
    show(report, "route moved to another gateway", &moved, 0.2);
    lab.upstream.sysctl("net.ipv4.conf.eth0.arp_notify", "0");
    let silent = median(&lab, |lab| {
        let mac = new_mac();
        lab.upstream.ip(&format!("link set eth0 address {mac}"));
        Box::new(move |lab| lab.next_hop("10.2.0.20")["mac"] == mac.as_str())
    });
    show(report, "MAC address replaced in silence", &silent, 5.0);
    let (mut gone, mut back) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        wait(round);
        lab.upstream.sysctl("net.ipv4.conf.eth0.arp_ignore", "8");
        gone.push(time(&lab, &|lab| lab.upstream_status("10.2.0.20")["health"] == "down"));
        lab.upstream.sysctl("net.ipv4.conf.eth0.arp_ignore", "0");
        back.push(time(&lab, &|lab| lab.upstream_status("10.2.0.20")["health"] == "up"));
    }
    show(report, "upstream gone, seen", &sorted(gone), 5.0);
    show(report, "upstream back, seen", &sorted(back), 3.0);
    report.note("lost in a MAC change, 1,000 datagrams a second", &lost(&lab, new_mac()));
    drop(lab);
    probing::measure(report);
}

type Healed = Box<dyn Fn(&Lab) -> bool>;

fn median(lab: &Lab, mut change: impl FnMut(&Lab) -> Healed) -> Vec<Duration> {
    let times = (0..ROUNDS).map(|round| {
        wait(round);
        let started = Instant::now();
        let healed = change(lab);
        time_since(started, lab, &healed)
    });
    sorted(times.collect())
}

/// Waits longer in each round, so that changes occur at any time between two probes.
fn wait(round: usize) {
    std::thread::sleep(Duration::from_millis(100 * (round as u64 + 1)));
}

fn time(lab: &Lab, healed: &dyn Fn(&Lab) -> bool) -> Duration {
    time_since(Instant::now(), lab, healed)
}

fn time_since(started: Instant, lab: &Lab, healed: &dyn Fn(&Lab) -> bool) -> Duration {
    loop {
        // The request itself takes some milliseconds.
        let asked = started.elapsed();
        if healed(lab) {
            return asked;
        }
        assert!(asked < LIMIT, "not healed within {LIMIT:?}");
    }
}

fn sorted(mut times: Vec<Duration>) -> Vec<Duration> {
    times.sort_unstable();
    times
}

fn show(report: &mut Report, what: &str, times: &[Duration], limit: f64) {
    let worst = format!("max {:.2}", times[times.len() - 1].as_secs_f64());
    report.at_most(what, &worst, times[times.len() / 2].as_secs_f64(), " s", limit);
}

/// Counts the packets of a steady flow that are lost while the upstream's MAC address changes silently.
fn lost(lab: &Lab, mac: String) -> String {
    let receiver = bind(&lab.upstream, [10, 2, 0, 20], 5000);
    receiver.set_nonblocking(true).expect("a socket");
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let (mut sent, mut received) = (0, 0);
    let mut step = || {
        sender.send_to(b"flow", (RELAY, 5000)).expect("sent");
        std::thread::sleep(PACE);
        sent += 1;
        while receiver.recv(&mut [0; 16]).is_ok() {
            received += 1;
        }
        (sent, received)
    };
    for _ in 0..200 {
        step();
    }
    lab.upstream.ip(&format!("link set eth0 address {mac}"));
    let started = Instant::now();
    let mut last = step();
    while started.elapsed() < Duration::from_secs(8) {
        last = step();
    }
    std::thread::sleep(Duration::from_millis(100));
    while receiver.recv(&mut [0; 16]).is_ok() {
        last.1 += 1;
    }
    format!("{} of {}", last.0 - last.1, last.0)
}
