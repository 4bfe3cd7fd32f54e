//! Probes of services: how long packets go to a dead one, and what probing many costs.

use std::fs;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Report;
use crate::common::lab::{CLIENTS, Lab, RELAY, UPSTREAMS};
use crate::common::net::bind;
use crate::common::service::{Arpd, until};

const ROUNDS: u64 = 5;
const PORT: u16 = 5000;
const MANY: u32 = 1000;
/// Interval between datagrams of the flows.
const PACE: Duration = Duration::from_millis(1);
/// Time over which arpd is watched.
const WATCHED: Duration = Duration::from_secs(20);

pub fn measure(report: &mut Report) {
    death(report);
    cost(report);
}

/// Measures from the death of a service to the last packet that it gets, with the default pace.
fn death(report: &mut Report) {
    let lab = Lab::new();
    let health = json!({ "udp": { "send": "ping", "expect": "pong" } });
    let options = json!({ "tc_action": "block", "strategy": "random", "health": health });
    let upstreams = UPSTREAMS.map(|address| json!({ "address": address.to_string() }));
    lab.apply(&json!({
        "version": 1,
        "interfaces": ["eth0"],
        "rules": [{ "name": "only", "key": { "address": "10.1.0.1", "port": PORT },
                    "options": options, "upstream": upstreams }],
    }));
    let sockets = UPSTREAMS.map(|address| bind(&lab.upstream, address, PORT));
    for socket in &sockets {
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
    }
    let (is_dead, ends) = (AtomicBool::new(false), AtomicBool::new(false));
    let _arpd = Arpd::start(&lab, "");
    let (mut times, mut lost) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| serve(&sockets[0], &AtomicBool::new(false), &ends, &mut |_| {}));
        let (sender, arrivals) = std::sync::mpsc::channel();
        let dead = &is_dead;
        let ends_ref = &ends;
        let socket = &sockets[1];
        scope.spawn(move || {
            serve(socket, dead, ends_ref, &mut |time| _ = sender.send(time));
        });
        let client = bind(&lab.client, CLIENTS[0], 0);
        for round in 0..ROUNDS {
            is_dead.store(false, Ordering::Relaxed);
            lab.run("drain only/10.2.0.21").expect(0);
            lab.run("enable only/10.2.0.21").expect(0);
            UPSTREAMS.iter().for_each(|address| lab.await_health(&address.to_string(), "up"));
            // any time between two probes
            std::thread::sleep(Duration::from_millis(400 * round));
            while arrivals.try_recv().is_ok() {}
            is_dead.store(true, Ordering::Relaxed);
            let died = Instant::now();
            while died.elapsed() < Duration::from_secs(9) {
                client.send_to(b"flow", (RELAY, PORT)).expect("sent");
                std::thread::sleep(PACE);
            }
            let late: Vec<Instant> = arrivals.try_iter().filter(|time| *time >= died).collect();
            times.push(late.last().map_or(Duration::ZERO, |last| *last - died));
            lost.push(late.len());
        }
        ends.store(true, Ordering::Relaxed);
    });
    let bound = 3.0 * 2.0 + 1.0;
    let worst = times.iter().max().expect("rounds").as_secs_f64();
    report.title(
        "Probes of services: from death to the last packet, bound: fall x interval + timeout",
    );
    report.at_most("worst time / bound of 7 s", &format!("{worst:.2} s"), worst / bound, "", 1.0);
    lost.sort_unstable();
    let text = format!("median {}, max {}", lost[lost.len() / 2], lost[lost.len() - 1]);
    report.note("packets that it got meanwhile, 500 a second", &text);
}

/// Answers probes unless dead, and reports when other packets arrive.
fn serve(
    socket: &UdpSocket,
    is_dead: &AtomicBool,
    ends: &AtomicBool,
    arrived: &mut dyn FnMut(Instant),
) {
    let mut buffer = [0; 100];
    while !ends.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        match &buffer[..length] {
            b"ping" if is_dead.load(Ordering::Relaxed) => {}
            b"ping" => _ = socket.send_to(b"pong", from),
            _ => arrived(Instant::now()),
        }
    }
}

/// Measures the CPU time and the memory of arpd with a thousand upstreams that are probed every two seconds.
fn cost(report: &mut Report) {
    let lab = Lab::new();
    lab.relay.sysctl("net.ipv4.ping_group_range", "0 0");
    lab.upstream.ip("route add local 10.3.0.0/16 dev lo");
    lab.upstream.sysctl("net.ipv4.icmp_ratelimit", "0");
    lab.relay.ip("route add 10.3.0.0/16 via 10.2.0.20");
    let upstreams: Vec<_> = (0..MANY)
        .map(|host| json!({ "address": format!("10.3.{}.{}", host / 250, host % 250 + 1) }))
        .collect();
    let options = json!({ "tc_action": "block", "health": { "icmp": {} } });
    lab.apply(&json!({
        "version": 1,
        "interfaces": ["eth0"],
        "rules": [{ "name": "only", "key": { "address": "10.1.0.1", "port": PORT },
                    "options": options, "upstream": upstreams }],
    }));
    let arpd = Arpd::start(&lab, "");
    until("all are probed", || {
        let status = lab.status();
        let upstreams = status["rules"][0]["upstreams"].as_array().expect("upstreams").clone();
        upstreams.iter().all(|upstream| upstream["evidence"] == "ICMP probe answered")
    });
    let (started, before) = (Instant::now(), processor_time(arpd.pid()));
    std::thread::sleep(WATCHED);
    let used = processor_time(arpd.pid()) - before;
    let percent = used.as_secs_f64() / started.elapsed().as_secs_f64() * 100.0;
    report.title("Probes of services: 1,000 upstreams every 2 s");
    report.at_most("processor time of arpd", "", percent, " % of a core", 2.0);
    report.at_most("memory of arpd", "", memory(arpd.pid()), " MB", 30.0);
}

/// Returns the processor time of a process.
fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("a process");
    let nanoseconds = stat.split(' ').next().and_then(|time| time.parse().ok());
    Duration::from_nanos(nanoseconds.expect("a time"))
}

/// Returns the resident memory of a process in megabytes.
pub fn memory(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kibibytes: f64 =
        line.trim().split(' ').next().and_then(|size| size.parse().ok()).expect("a number");
    kibibytes * 1024.0 / 1e6
}
