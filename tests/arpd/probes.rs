//! Probes of services: real ones of the distribution, and one that misbehaves as told.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::daemon::Kind;
use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, expect_silence, receive};
use crate::common::service::{Arpd, until};

/// Port of the relay and of the upstreams' own service.
const PORT: u16 = 5000;

fn upstream(address: impl ToString) -> Value {
    json!({ "name": address.to_string(), "address": address.to_string() })
}

/// Returns a rule with both upstreams and a check with two failures and two answers in a row.
fn probed(check: &Value) -> Value {
    let mut health = json!({ "interval": "1s", "timeout": "1s", "rise": 2, "fall": 2 });
    let fields = check.as_object().expect("a map").clone();
    health.as_object_mut().expect("a map").extend(fields);
    let options = json!({ "tc_action": "block", "health": health });
    config(&[rule("only", PORT, options, &UPSTREAMS.map(upstream))])
}

/// Returns the check of a kind of service.
fn check(kind: Kind) -> Value {
    let port = kind.port();
    match kind {
        Kind::Dnsmasq => json!({ "dns": { "port": port, "name": "example.test" } }),
        Kind::Chrony => json!({ "ntp": { "port": port } }),
        Kind::Snmpd => json!({ "snmp": { "port": port } }),
        Kind::Freeradius => json!({ "radius": { "port": port, "secret": "testing123" } }),
        Kind::Nginx => json!({ "http": { "port": port, "path": "/healthz" } }),
        Kind::Rsyslog => json!({ "tcp": port }),
    }
}

#[track_caller]
fn await_evidence(lab: &Lab, label: &str, health: &str, evidence: &str) {
    let what = format!("{label} is {health}: {evidence}");
    until(&what, || {
        let status = lab.upstream_status(label);
        let found = status["evidence"].as_str().unwrap_or_default();
        status["health"] == health && found.contains(evidence)
    });
}

/// Forgets how often the first upstream was down, so that it comes back at once.
fn forgive(lab: &Lab) {
    lab.run("drain only/10.2.0.20").expect(0);
    lab.run("enable only/10.2.0.20").expect(0);
}

/// A service of each kind is up, stopped, firewalled and killed.
fn check_real_service(kind: Kind) {
    if !kind.is_installed() {
        return;
    }
    let lab = Lab::new();
    lab.apply(&probed(&check(kind)));
    let service = kind.start(&lab, &lab.upstream, "10.2.0.20");
    let arpd = Arpd::start(&lab, "");
    await_evidence(&lab, "10.2.0.20", "up", "probe answered");
    await_evidence(&lab, "10.2.0.21", "down", "refused 2 of 2");
    service.signal(libc::SIGSTOP);
    // HTTP, whose connection the kernel still accepts, and the bare connection differ
    if kind == Kind::Rsyslog {
        sleep(Duration::from_secs(4));
        await_evidence(&lab, "10.2.0.20", "up", "probe answered");
    } else {
        await_evidence(&lab, "10.2.0.20", "down", "not answered 2 of 2");
    }
    service.signal(libc::SIGCONT);
    await_evidence(&lab, "10.2.0.20", "up", "probe answered");
    for (verdict, evidence) in [("drop", "not answered"), ("reject", "")] {
        forgive(&lab);
        let nft = |words: &str| {
            Outcome::of(lab.upstream.command("nft").args(words.split_whitespace())).expect(0);
        };
        nft("add table inet wall");
        nft("add chain inet wall in { type filter hook input priority 0 ; }");
        nft(&format!("add rule inet wall in th dport {} {verdict}", kind.port()));
        await_evidence(&lab, "10.2.0.20", "down", evidence);
        nft("delete table inet wall");
        await_evidence(&lab, "10.2.0.20", "up", "probe answered");
    }
    forgive(&lab);
    drop(service);
    await_evidence(&lab, "10.2.0.20", "down", "refused 2 of 2");
    until("the log says so", || arpd.log().contains("is down: "));
}

#[test]
fn dnsmasq_is_probed() {
    check_real_service(Kind::Dnsmasq);
}

#[test]
fn chrony_is_probed() {
    check_real_service(Kind::Chrony);
}

#[test]
fn snmpd_is_probed() {
    check_real_service(Kind::Snmpd);
}

#[test]
fn freeradius_is_probed() {
    check_real_service(Kind::Freeradius);
}

#[test]
fn nginx_is_probed() {
    check_real_service(Kind::Nginx);
}

#[test]
fn rsyslog_is_probed() {
    check_real_service(Kind::Rsyslog);
}

const RIGHT: u8 = 0;
const GARBAGE: u8 = 1;
const SLOW: u8 = 2;
const FORGED: u8 = 3;
const SILENT: u8 = 4;
const STOPPED: u8 = 5;

/// A service at the first upstream that answers `ping` with `pong`, or does as told.
struct Answering {
    manner: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Answering {
    fn start(lab: &Lab) -> Answering {
        let socket = bind(&lab.upstream, UPSTREAMS[0], PORT);
        let forger = bind(&lab.upstream, UPSTREAMS[1], PORT);
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
        let manner = Arc::new(AtomicU8::new(RIGHT));
        let told = Arc::clone(&manner);
        let thread = std::thread::spawn(move || answer(&socket, &forger, &told));
        Answering { manner, thread: Some(thread) }
    }

    fn set(&self, manner: u8) {
        self.manner.store(manner, Ordering::Relaxed);
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.set(STOPPED);
        let _ = self.thread.take().expect("once").join();
    }
}

fn answer(socket: &UdpSocket, forger: &UdpSocket, told: &AtomicU8) {
    let mut buffer = [0; 100];
    loop {
        let manner = told.load(Ordering::Relaxed);
        if manner == STOPPED {
            return;
        }
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        if &buffer[..length] != b"ping" {
            continue;
        }
        let send = |socket: &UdpSocket, text: &[u8]| _ = socket.send_to(text, from);
        match manner {
            RIGHT => send(socket, b"pong"),
            GARBAGE => send(socket, b"gnop"),
            SLOW => {
                sleep(Duration::from_millis(1500));
                send(socket, b"pong");
            }
            FORGED => send(forger, b"pong"),
            _ => {}
        }
    }
}

fn ping() -> Value {
    json!({ "udp": { "send": "ping", "expect": "pong" } })
}

/// Garbage, lateness, silence and another's answer are failures, each by its name; packets go to the other
/// upstream meanwhile.
#[test]
fn misbehaving_service_is_left_out() {
    let lab = Lab::new();
    lab.apply(&probed(&ping()));
    let service = Answering::start(&lab);
    let arpd = Arpd::start(&lab, "");
    await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
    let table = [
        (GARBAGE, "UDP probe answered wrongly 2 of 2"),
        (SLOW, "UDP probe not answered 2 of 2"),
        (FORGED, "UDP probe not answered 2 of 2"),
        (SILENT, "UDP probe not answered 2 of 2"),
    ];
    for (manner, evidence) in table {
        service.set(manner);
        await_evidence(&lab, "10.2.0.20", "down", evidence);
        service.set(RIGHT);
        forgive(&lab);
        await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
    }
    // neither 10.2.0.21, whose socket is silent, nor anything else revives by itself
    await_evidence(&lab, "10.2.0.21", "down", "not answered 2 of 2");
    let log = arpd.log();
    assert!(log.contains("10.2.0.20:5000 is down: UDP probe answered wrongly 2 of 2"), "{log}");
    assert!(log.contains("10.2.0.20:5000 is up again: UDP probe answered"), "{log}");
}

/// Returns source ports of flows to either upstream: the wire value selects.
fn ports() -> impl Iterator<Item = u16> {
    (0..20).map(|nth| 40_000 + 251 * nth)
}

#[test]
fn packets_leave_out_a_failed_service_and_get_says_why() {
    let lab = Lab::new();
    let check = json!({ "udp": { "send": "ping", "expect": "pong", "port": 5001 } });
    lab.apply(&probed(&check));
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, PORT));
    let healthy = bind(&lab.upstream, UPSTREAMS[0], 5001);
    healthy.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
    let forger = bind(&lab.upstream, UPSTREAMS[1], 5002);
    let told = AtomicU8::new(RIGHT);
    std::thread::scope(|scope| {
        scope.spawn(|| answer(&healthy, &forger, &told));
        let end = Stop(&told);
        let _arpd = Arpd::start(&lab, "");
        await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
        await_evidence(&lab, "10.2.0.21", "down", "UDP probe refused 2 of 2");
        for port in ports() {
            let sender = bind(&lab.client, CLIENTS[0], port);
            sender.send_to(b"flow", (RELAY, PORT)).expect("sent");
            receive(&receivers[0]);
        }
        expect_silence(&receivers[1]);
        let answers = ports().map(|port| {
            lab.run(&format!("get {}:{port} 10.1.0.1:{PORT}", CLIENTS[0])).expect(0).stdout
        });
        let answers: String = answers.collect();
        let why = "10.2.0.21, which is down (UDP probe refused 2 of 2)";
        assert!(answers.contains(why), "{answers}");
        // the one that is down keeps its MAC address, and all are down: as if all were up
        told.store(SILENT, Ordering::Relaxed);
        await_evidence(&lab, "10.2.0.20", "down", "UDP probe not answered 2 of 2");
        let mut received = [0, 0];
        for port in ports() {
            let sender = bind(&lab.client, CLIENTS[0], port);
            sender.send_to(b"flow", (RELAY, PORT)).expect("sent");
            received[crate::common::net::receive_any(&receivers).0] += 1;
        }
        assert!(received.iter().all(|count| *count > 0), "{received:?}");
        drop(end);
    });
}

/// Ends the thread that answers, also when an assertion fails.
struct Stop<'a>(&'a AtomicU8);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(STOPPED, Ordering::Relaxed);
    }
}

#[test]
fn rule_that_needs_an_upstream_drops_while_all_are_down() {
    let lab = Lab::new();
    let mut config = probed(&ping());
    config["rules"][0]["options"]["all-down"] = "drop".into();
    lab.apply(&config);
    let arpd = Arpd::start(&lab, "");
    for label in ["10.2.0.20", "10.2.0.21"] {
        await_evidence(&lab, label, "down", "UDP probe refused 2 of 2");
    }
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, PORT));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(b"flow", (RELAY, PORT)).expect("sent");
    until("it is counted", || {
        let status = lab.status();
        status["rules"][0]["counters"].to_string().contains("no-upstream")
    });
    receivers.iter().for_each(|receiver| {
        receiver.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        let mut buffer = [0; 100];
        while let Ok((length, _)) = receiver.recv_from(&mut buffer) {
            assert_eq!(&buffer[..length], b"ping", "only probes arrive");
        }
    });
    // a stopped arpd vouches for nothing: all are up again once the lease is over
    arpd.signal(libc::SIGSTOP);
    until("the lease is over", || lab.status()["arpd"] == false);
    assert_eq!(lab.upstream_status("10.2.0.20")["health"], Value::Null);
    until("it is received", || {
        sender.send_to(b"flow", (RELAY, PORT)).expect("sent");
        let mut buffer = [0; 100];
        receivers.iter().any(|receiver| {
            receiver.recv_from(&mut buffer).is_ok_and(|(length, _)| &buffer[..length] == b"flow")
        })
    });
}

#[test]
fn arpd_once_probes_once() {
    let lab = Lab::new();
    lab.apply(&probed(&ping()));
    let service = Answering::start(&lab);
    let outcome = lab.run("arpd --once").expect(1);
    assert!(outcome.stderr.contains("error: 10.2.0.21:5000: UDP probe not answered"));
    assert!(!outcome.stderr.contains("10.2.0.20"), "{}", outcome.stderr);
    drop(service);
}

/// A probe that cannot be sent says nothing: the upstream stays in use.
#[test]
fn unsent_probe_is_unknown() {
    let lab = Lab::new();
    lab.apply(&probed(&ping()));
    let service = Answering::start(&lab);
    let _arpd = Arpd::start(&lab, "");
    await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
    let nft = |words: &str| {
        Outcome::of(lab.relay.command("nft").args(words.split_whitespace())).expect(0);
    };
    nft("add table inet wall");
    nft("add chain inet wall out { type filter hook output priority 0 ; }");
    nft("add rule inet wall out udp dport 5000 drop");
    await_evidence(&lab, "10.2.0.20", "up", "UDP probe cannot be sent");
    nft("delete table inet wall");
    await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
    drop(service);
}

/// An echo needs no service at all, and comes from the matched address.
#[test]
fn echo_is_sent_from_the_matched_address() {
    let lab = Lab::new();
    lab.relay.sysctl("net.ipv4.ping_group_range", "0 0");
    lab.apply(&probed(&json!({ "icmp": {} })));
    let _arpd = Arpd::start(&lab, "");
    await_evidence(&lab, "10.2.0.20", "up", "ICMP probe answered");
    let nft = |words: &str| {
        Outcome::of(lab.upstream.command("nft").args(words.split_whitespace())).expect(0);
    };
    nft("add table inet wall");
    nft("add chain inet wall in { type filter hook input priority 0 ; }");
    nft("add rule inet wall in icmp type echo-request ip saddr != 10.1.0.1 drop");
    sleep(Duration::from_secs(4));
    await_evidence(&lab, "10.2.0.20", "up", "ICMP probe answered");
    nft("add rule inet wall in icmp type echo-request drop");
    await_evidence(&lab, "10.2.0.20", "down", "ICMP probe not answered 2 of 2");
}

/// The kernel of an upstream answers relayed packets with ICMP errors long before the next probe is due: each
/// counts, and has the service probed at once.
#[test]
fn relayed_packets_are_evidence_of_failure() {
    let lab = Lab::new();
    let health =
        json!({ "udp": { "send": "ping", "expect": "pong" }, "interval": "1h", "fall": 2 });
    let options = json!({ "tc_action": "block", "health": health });
    lab.apply(&config(&[rule("only", PORT, options, &[upstream(UPSTREAMS[0])])]));
    let service = Answering::start(&lab);
    let _arpd = Arpd::start(&lab, "");
    await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
    drop(service);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    until("it is down", || {
        sender.send_to(b"flow", (RELAY, PORT)).expect("sent");
        lab.upstream_status("10.2.0.20")["health"] == "down"
    });
    let text = lab.run("metrics").expect(0).stdout;
    assert!(text.contains(r#"upstream="10.2.0.20",reason="icmp"} 1"#), "{text}");
    // only an answer to a probe revives, and none is due
    assert_eq!(lab.upstream_status("10.2.0.20")["evidence"], "UDP probe refused 2 of 2");
}

#[test]
fn metrics_have_latencies_and_reasons() {
    let lab = Lab::new();
    lab.apply(&probed(&ping()));
    let service = Answering::start(&lab);
    let _arpd = Arpd::start(&lab, "");
    await_evidence(&lab, "10.2.0.20", "up", "UDP probe answered");
    await_evidence(&lab, "10.2.0.21", "down", "UDP probe not answered 2 of 2");
    let text = lab.run("metrics").expect(0).stdout;
    let value = |start: &str| -> f64 {
        let line = text.lines().find(|line| line.starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no {start} in {text}"));
        line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("a number")
    };
    let first = r#"{rule="only",upstream="10.2.0.20"}"#;
    let second = r#"rule="only",upstream="10.2.0.21""#;
    assert_eq!(value(&format!("udplb_upstream_up{first}")), 1.0);
    assert_eq!(value(&format!("udplb_upstream_up{{{second}}}")), 0.0);
    let name = "udplb_upstream_probe_latency_seconds";
    assert!(value(&format!("{name}_count{first}")) >= 1.0);
    assert!(value(&format!("{name}_sum{first}")) > 0.0);
    let failures = format!(r#"udplb_probe_failures_total{{{second},reason="no-answer"}}"#);
    assert!(value(&failures) >= 2.0);
    let status = lab.run("status").stdout;
    assert!(status.contains("UDP probe not answered 2 of 2"), "{status}");
    drop(service);
}
