//! `udplb trace`: one line for each packet or copy.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::kinds::all_kinds;
use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, V4, V6, config, rule};
use crate::common::net::{bind, is_mac, payload, receive};
use crate::common::service::{Arpd, until};

/// Returns a rule of each kind.
fn rules() -> Value {
    let two = UPSTREAMS.map(|address| json!({ "address": address, "port": 7000 }));
    let copies = [
        json!({ "name": "one", "address": UPSTREAMS[0], "port": 7001 }),
        json!({ "name": "other", "address": UPSTREAMS[1], "port": 7001, "source": "preserve" }),
        json!({ "name": "no", "address": "192.0.2.1", "port": 7001, "source": "egress" }),
    ];
    let mut mirrored = rule(
        "mirrored",
        5002,
        json!({ "tc_action": "block" }),
        &[json!({ "address": UPSTREAMS[0], "port": 7000 })],
    );
    mirrored["mirror"] = json!([{ "name": "spy", "address": UPSTREAMS[1], "port": 7002 }]);
    let replicate = json!({
        "name": "copies",
        "key": { "address": RELAY, "port": 5001 },
        "options": { "tc_action": "block", "mode": "replicate", "source": "vip" },
        "upstream": copies,
    });
    let mut all = config(&[
        rule(
            "flows",
            5000,
            json!({ "tc_action": "block", "strategy": "src-port", "hash": "modulo" }),
            &two,
        ),
        replicate,
        mirrored,
        rule("lost", 5003, json!({}), &[json!({ "name": "nowhere", "address": "192.0.2.1" })]),
    ]);
    all.as_object_mut().expect("a map").remove("defaults");
    all
}

/// A running trace, stopped when the value is dropped.
struct Trace(Child);

impl Trace {
    /// Starts a trace and returns once events are traced.
    fn start(lab: &Lab, words: &str) -> Trace {
        let mut command = lab.udplb(&format!("trace {words}"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let trace = Trace(command.spawn().expect("the program runs"));
        until("it traces", || lab.traced_until() > 0);
        trace
    }

    fn signal(&self, signal: i32) {
        // nsenter has executed the program, so the pid is the program's
        // SAFETY: the process is a child that was not waited for.
        let sent = unsafe { libc::kill(self.0.id() as i32, signal) };
        assert_eq!(sent, 0, "kill: {}", std::io::Error::last_os_error());
    }

    /// Waits for the trace's exit and returns the output.
    fn end(mut self) -> Outcome {
        let mut text = [String::new(), String::new()];
        self.0.stdout.take().expect("a pipe").read_to_string(&mut text[0]).expect("text");
        self.0.stderr.take().expect("a pipe").read_to_string(&mut text[1]).expect("text");
        let code = self.0.wait().expect("the child").code();
        let [stdout, stderr] = text;
        Outcome::new(code, stdout, stderr, "trace")
    }

    /// Interrupts the trace, which then reads all events written so far.
    fn stop(self) -> Outcome {
        self.signal(libc::SIGINT);
        self.end()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn send(lab: &Lab, from: (Ipv4Addr, u16), port: u16, payload: &[u8]) {
    bind(&lab.client, from.0, from.1).send_to(payload, (RELAY, port)).expect("sent");
}

/// Masks the time of day and MAC addresses.
fn masked(text: &str) -> Vec<String> {
    let word = |word: &str| match word.matches(':').count() {
        _ if is_mac(word) => "MAC".into(),
        2 if word.contains('.') && word.len() == "00:00:00.000000".len() => "TIME".into(),
        _ => word.to_string(),
    };
    text.lines().map(|line| line.split(' ').map(word).collect::<Vec<_>>().join(" ")).collect()
}

/// A payload of odd length.
const PAYLOAD: &[u8] = b"eleven byte";

/// Sends one packet to each rule, and a second one for another upstream.
fn send_all(lab: &Lab) {
    let _here = bind(&lab.relay, RELAY, 5003);
    for (port, to) in [(5666, 5000), (60256, 5000), (5666, 5001), (5666, 5002), (5666, 5003)] {
        send(lab, (CLIENTS[0], port), to, PAYLOAD);
    }
    until("the last packet is counted", || lab.packets("lost", "nowhere", "no-route") >= 1);
}

#[test]
fn every_event_kind_is_printed() {
    let lab = Lab::new();
    lab.apply(&rules());
    let trace = Trace::start(&lab, "");
    send_all(&lab);
    let outcome = trace.stop().expect(0).says(&[
        "tracing packets of all rules on eth0 (generation 1), until Ctrl-C\n",
        "8 shown, none lost",
    ]);
    let from = "TIME eth0 flows 10.1.0.20";
    let wanted = [
        format!("{from}:5666 > 10.1.0.1:5000 length 53 src-port 5666 slot 0 -> 10.2.0.20:7000 dev up0 MAC forwarded"),
        format!("{from}:60256 > 10.1.0.1:5000 length 53 src-port 60256 slot 1 -> 10.2.0.21:7000 dev up0 MAC forwarded"),
        "TIME eth0 copies 10.1.0.20:5666 > 10.1.0.1:5001 length 53 -> copy to one 10.2.0.20:7001 dev up0 MAC forwarded".into(),
        "TIME eth0 copies 10.1.0.20:5666 > 10.1.0.1:5001 length 53 -> copy to other 10.2.0.21:7001 dev up0 MAC forwarded".into(),
        "TIME eth0 copies 10.1.0.20:5666 > 10.1.0.1:5001 length 53 -> copy to no 192.0.2.1:7001 no-route".into(),
        "TIME eth0 mirrored 10.1.0.20:5666 > 10.1.0.1:5002 length 53 -> copy to spy 10.2.0.21:7002 dev up0 MAC forwarded".into(),
        "TIME eth0 mirrored 10.1.0.20:5666 > 10.1.0.1:5002 length 53 -> 10.2.0.20:7000 dev up0 MAC forwarded".into(),
        "TIME eth0 lost 10.1.0.20:5666 > 10.1.0.1:5003 length 53 -> nowhere 192.0.2.1 no-route".into(),
    ];
    assert_eq!(masked(&outcome.stdout), wanted);
    assert_eq!(lab.traced_until(), 0);
}

/// A later fragment shows no ports.
#[test]
fn fragments_and_ipv6_are_printed() {
    let lab = Lab::dual(false, false);
    lab.apply(&all_kinds());
    let trace = Trace::start(&lab, "");
    for net in [V4, V6] {
        let sender = bind(&lab.client, net.clients[0], 40_000);
        sender.send_to(&payload(2000), (net.key, 5003)).expect("sent");
    }
    for (rule, net) in [("block-vip", V4), ("block-vip-6", V6)] {
        let upstream = net.upstreams[0].to_string();
        until("both fragments are counted", || lab.packets(rule, &upstream, "forwarded") == 2);
    }
    let four = "-> 10.2.0.20 10.2.0.20:7003 dev up0 MAC forwarded";
    let six = "-> 2001:db8:2::20 [2001:db8:2::20]:7003 dev up0 MAC forwarded";
    let (from, to) = ("2001:db8:1::20", "2001:db8:1::1");
    let wanted = [
        format!("TIME eth0 block-vip 10.1.0.20:40000 > 10.1.0.1:5003 length 1514 {four}"),
        format!("TIME eth0 block-vip 10.1.0.20 > 10.1.0.1 length 562 fragment {four}"),
        format!("TIME eth0 block-vip-6 [{from}]:40000 > [{to}]:5003 length 1510 {six}"),
        format!("TIME eth0 block-vip-6 {from} > {to} length 622 fragment {six}"),
    ];
    assert_eq!(masked(&trace.stop().expect(0).stdout), wanted);
}

/// Sends several packets from each client to the first rule.
fn send_flows(lab: &Lab, count: usize) {
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 7000);
    for client in CLIENTS {
        let sender = bind(&lab.client, client, 5666);
        for _ in 0..count {
            sender.send_to(b"ten bytes!", (RELAY, 5000)).expect("sent");
            receive(&receiver);
        }
    }
}

#[track_caller]
fn expect_lines(outcome: &Outcome, count: usize, with: &str) {
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines.len(), count, "{outcome:?}");
    assert!(lines.iter().all(|line| line.contains(with)), "{outcome:?}");
}

#[test]
fn filter_options_select_events() {
    let lab = Lab::new();
    lab.apply(&rules());
    for (words, count, with) in [
        ("--drops", 2, "no-route"),
        ("--rule mirrored", 2, " mirrored "),
        ("--src 10.1.0.21", 6, " 10.1.0.21:5666 > "),
        ("--src 10.1.0.20/31 --rule flows", 14, " flows "),
        ("--dst 10.1.0.0/24 --src 10.9.0.0/16", 0, ""),
        ("--src ::/0", 0, ""),
        ("--rule flows --sample 4", 3, " flows "),
    ] {
        let trace = Trace::start(&lab, words);
        send_all(&lab);
        send_flows(&lab, 6);
        let outcome = trace.stop().expect(0);
        expect_lines(&outcome, count, with);
    }
}

#[test]
fn second_trace_is_refused() {
    let lab = Lab::new();
    assert_eq!(lab.run("trace").code, Some(3));
    lab.apply(&rules());
    lab.run("trace --rule flow").expect(1).says(&["no rule `flow`; did you mean `flows`?"]);
    lab.run("trace --rule x").expect(1).says(&["there is no rule `x`"]);
    lab.run("trace --sample 0").expect(64);
    lab.run("trace --pcap /dev/full").expect(1).says(&["/dev/full: No space left"]);

    // arpd's lock does not block a trace
    let _arpd = Arpd::start(&lab, "");
    let trace = Trace::start(&lab, "-c 3 -o json");
    lab.run("trace").expect(75).says(&[" trace -c 3 -o json` (pid ", ") is tracing, and"]);
    send_flows(&lab, 6);
    let outcome = trace.end().expect(0).says(&["3 shown"]);
    assert_eq!(lab.traced_until(), 0);
    let events: Vec<Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(events.len(), 3, "{outcome:?}");
    let mut event = events[0].clone();
    let event = event.as_object_mut().expect("an object");
    let time = event.remove("time").expect("a time");
    assert!(time.as_str().is_some_and(|time| time.ends_with('Z') && time.contains('T')), "{time}");
    let hop = event.remove("next_hop").expect("a next hop");
    assert_eq!(hop["mac"].as_str().map(str::len), Some(17));
    assert_eq!((&hop["interface"], &hop["gateway"]), (&json!("up0"), &Value::Null));
    let wanted = json!({
        "format_version": 1, "interface": "eth0", "generation": 1, "rule": "flows",
        "source": "10.1.0.20:5666", "destination": "10.1.0.1:5000", "length": 52, "fragment": false,
        // 5666 is 0x1622; the bytes are swapped
        "selection": { "strategy": "src-port", "value": "5666", "number": 0x2216, "slot": 0 },
        "upstream": "10.2.0.20:7000", "copy": false,
        "sent": true, "verdict": "forwarded",
    });
    assert_eq!(Value::Object(event.clone()), wanted);

    // the reader closes the pipe
    let mut trace = Trace::start(&lab, "");
    drop(trace.0.stdout.take());
    send_flows(&lab, 1);
    until("it ends", || trace.0.try_wait().expect("the child").is_some());
    assert_eq!(trace.0.wait().expect("the child").code(), Some(0));
    assert_eq!(lab.traced_until(), 0);
}

#[test]
fn killed_trace_ends_with_its_lease() {
    let lab = Lab::new();
    lab.apply(&rules());
    let trace = Trace::start(&lab, "");
    let killed = Instant::now();
    trace.signal(libc::SIGKILL);
    drop(trace);
    assert!(lab.traced_until() > 0);
    // the first packet after the lease's end clears it
    sleep(Duration::from_millis(1_100).saturating_sub(killed.elapsed()));
    send_flows(&lab, 1);
    until("it is cleared", || lab.traced_until() == 0);
    // the next trace can start, and shows no events of the first
    let trace = Trace::start(&lab, "-c 1");
    send(&lab, (CLIENTS[1], 60256), 5000, b"new");
    let outcome = trace.end().expect(0);
    expect_lines(&outcome, 1, "10.1.0.21:60256");
}

#[test]
fn events_of_other_generations_have_names() {
    let lab = Lab::new();
    lab.apply(&rules());
    let trace = Trace::start(&lab, "--drops");
    let mut changed = rules();
    changed["rules"][3]["name"] = json!("renamed");
    changed["rules"][3]["upstream"][0]["name"] = json!("void");
    lab.apply(&changed);
    let _here = bind(&lab.relay, RELAY, 5003);
    send(&lab, (CLIENTS[0], 5666), 5003, b"ten bytes!");
    until("it is counted", || lab.packets("renamed", "void", "no-route") == 1);
    let outcome = trace.stop().expect(0);
    let wanted =
        "TIME eth0 renamed 10.1.0.20:5666 > 10.1.0.1:5003 length 52 -> void 192.0.2.1 no-route";
    assert_eq!(masked(&outcome.stdout), [wanted]);

    let trace = Trace::start(&lab, "");
    lab.run("detach --purge").expect(0);
    trace.end().expect(1).says(&["the pins were removed"]);
}

/// Returns the addresses and ports of the packets in a file.
fn packets(file: &[u8]) -> Vec<String> {
    let mut reader = pcap(file);
    let frames = std::iter::from_fn(|| reader.next());
    frames.map(|frame| describe(&frame)).collect()
}

fn describe(frame: &[u8]) -> String {
    let packet = etherparse::SlicedPacket::from_ethernet(frame).expect("a frame");
    let Some(etherparse::NetSlice::Ipv4(ip)) = packet.net else { panic!("no IPv4: {frame:?}") };
    let Some(etherparse::TransportSlice::Udp(udp)) = packet.transport else { panic!("no UDP") };
    assert_eq!(udp.payload(), PAYLOAD);
    let header = ip.header();
    let (from, to) = (header.source_addr(), header.destination_addr());
    format!("{from}:{} > {to}:{} ttl {}", udp.source_port(), udp.destination_port(), header.ttl())
}

/// Returns the frames of a file in the classic pcap format.
fn pcap(file: &[u8]) -> std::vec::IntoIter<Vec<u8>> {
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("a word"));
    assert_eq!((word(0), word(20)), (0xa1b2_3c4d, 1));
    let (mut frames, mut at) = (Vec::new(), 24);
    while at < file.len() {
        let (there, length) = (word(at + 8) as usize, word(at + 12) as usize);
        assert_eq!(there, length.min(128));
        frames.push(file[at + 16..at + 16 + there].to_vec());
        at += 16 + there;
    }
    frames.into_iter()
}

#[test]
fn pcap_has_packets_before_and_after() {
    let lab = Lab::new();
    lab.apply(&rules());
    let file = lab.directory.path().join("trace.pcap");
    let trace = Trace::start(&lab, &format!("--pcap {}", file.display()));
    send_all(&lab);
    expect_lines(&trace.stop().expect(0), 8, " length 53 ");
    let came = |port: u16, to: u16| format!("10.1.0.20:{port} > 10.1.0.1:{to} ttl 64");
    let left = |from: &str, to: &str| format!("{from} > {to} ttl 63");
    let wanted = [
        came(5666, 5000),
        left("10.1.0.1:5666", "10.2.0.20:7000"),
        came(60256, 5000),
        left("10.1.0.1:60256", "10.2.0.21:7000"),
        came(5666, 5001),
        left("10.1.0.1:5666", "10.2.0.20:7001"),
        left("10.1.0.20:5666", "10.2.0.21:7001"),
        came(5666, 5002),
        left("10.1.0.1:5666", "10.2.0.21:7002"),
        left("10.1.0.1:5666", "10.2.0.20:7000"),
        came(5666, 5003),
    ];
    assert_eq!(packets(&fs::read(&file).expect("the file")), wanted);
}

#[test]
fn lost_events_are_counted() {
    let lab = Lab::new();
    lab.apply(&rules());
    // frames make events large, so the buffer overflows while the reader sleeps
    let trace = Trace::start(&lab, "--rule flows --pcap /dev/null");
    let before = lab.status()["rules"][0]["counters"]["matched"]["packets"].clone();
    assert_eq!(before, 0);
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 7000);
    trace.signal(libc::SIGSTOP);
    let count = 5_000_u64;
    for _ in 0..count {
        sender.send_to(b"ten bytes!", (RELAY, 5000)).expect("sent");
    }
    (0..count).for_each(|_| drop(receive(&receiver)));
    trace.signal(libc::SIGCONT);
    let outcome = trace.stop().expect(0);
    let shown = outcome.stdout.lines().count() as u64;
    let end = outcome.stderr.lines().last().expect("a summary");
    let words: Vec<&str> = end.split_whitespace().collect();
    assert!(words[1].starts_with("shown"), "{outcome:?}");
    assert_eq!(words[0].parse(), Ok(shown), "{outcome:?}");
    if words[1] == "shown," {
        let lost: u64 = words[2].parse().unwrap_or(0);
        assert!(lost > 0 && shown + lost == count, "{outcome:?}");
    }
}

/// Unmatched datagrams to the relay are shown with the reason, in both families; matched packets and
/// packets in transit are not shown.
#[test]
fn unmatched_packets_are_shown_with_the_reason() {
    let lab = Lab::dual(true, false);
    let mut rules = [V4, V6].map(|net| {
        let name = if net.is_ipv6() { "six" } else { "four" };
        net.rule(
            name,
            5000,
            json!({ "tc_action": "block" }),
            &[json!({ "address": net.upstreams[0] })],
        )
    });
    rules[0]["key"]["from"] = json!(CLIENTS[0]);
    lab.apply(&config(&rules));
    let trace = Trace::start(&lab, "--unmatched -c 4 -o json");
    let send = |from: IpAddr, to: IpAddr, port: u16| {
        bind(&lab.client, from, 5666).send_to(b"lost", (to, port)).expect("sent");
    };
    lab.client.ip("route add 10.2.0.0/24 via 10.1.0.1");
    // not shown: matched by a rule, or addressed to another host
    send(V4.clients[0], V4.key, 5000);
    send(V4.clients[0], V4.upstreams[1], 5000);
    send(V4.clients[1], V4.key, 5000);
    send(V4.clients[0], V4.key, 5001);
    send(V4.clients[0], V4.egress, 5000);
    send(V6.clients[0], V6.key, 5001);
    let outcome =
        trace.end().expect(0).says(&["packets to this host that no rule takes", "4 shown"]);
    let shown: Vec<Value> =
        outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let seen = shown.iter().map(|event| {
        let (source, destination) = (&event["source"], &event["destination"]);
        let miss = &event["misses"][0];
        json!([source, destination, event["verdict"], miss["rule"], miss["differs"]])
    });
    let wanted = json!([
        ["10.1.0.21:5666", "10.1.0.1:5000", "unmatched", "four", "sender"],
        ["10.1.0.20:5666", "10.1.0.1:5001", "unmatched", "four", "port"],
        ["10.1.0.20:5666", "10.2.0.1:5000", "unmatched", "four", "address"],
        ["[2001:db8:1::20]:5666", "[2001:db8:1::1]:5001", "unmatched", "six", "port"],
    ]);
    assert_eq!(json!(seen.collect::<Vec<_>>()), wanted, "{outcome:?}");
    assert!(shown.iter().all(|event| event["rule"].is_null() && event["sent"] == false));
}

#[test]
fn unmatched_packets_have_a_line_each() {
    let lab = Lab::new();
    lab.apply(&rules());
    let trace = Trace::start(&lab, "--unmatched -c 1");
    send(&lab, (CLIENTS[1], 5666), 5999, PAYLOAD);
    let line = masked(&trace.end().expect(0).stdout).remove(0);
    let wanted = "TIME eth0 - 10.1.0.21:5666 > 10.1.0.1:5999 length 53 unmatched: rule flows matches 10.1.0.1 \
                  on port 5000 only";
    assert_eq!(line, wanted);
    lab.run("trace --unmatched --drops").expect(64);
    lab.run("trace --unmatched --rule flows").expect(64);
}
