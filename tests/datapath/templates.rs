//! Datagrams of NetFlow 9 and IPFIX with templates go to all upstreams: tables, traffic from socket to socket,
//! and a real exporter with real collectors.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Stdio};

use serde_json::{Value, json};
use udplb::config::{Mode, State, Strategy, Templates};
use udplb::desired::{Rule, Upstream};

use crate::common::daemon::is_there;
use crate::common::lab::{Lab, Net, RELAY, UPSTREAMS, V4, V6, config, rule};
use crate::common::net::{bind, expect, expect_silence_of, own, receive_any};
use crate::common::service::until;
use crate::common::{outcome, unique};
use crate::forge::fragments;
use crate::selection::{Flow, Relay, frame, rules};
use crate::testbed::{NO_ROUTE, Testbed};

const TEMPLATES: u16 = 0;
const OPTIONS: u16 = 1;
const IPFIX_TEMPLATES: u16 = 2;
const IPFIX_OPTIONS: u16 = 3;
const DATA: u16 = 256;

/// Returns a set whose header has a length of its own.
fn set_of(id: u16, length: u16, body: usize) -> Vec<u8> {
    [&id.to_be_bytes()[..], &length.to_be_bytes(), &vec![0; body]].concat()
}

fn set(id: u16) -> Vec<u8> {
    set_of(id, 12, 8)
}

fn netflow9(sets: &[Vec<u8>]) -> Vec<u8> {
    [&[0, 9, 0, 1][..], &[0x33; 16], &sets.concat()].concat()
}

/// Returns an IPFIX message; `error` is added to the length in its header.
fn ipfix_of(sets: &[Vec<u8>], error: i16) -> Vec<u8> {
    let sets = sets.concat();
    let length = (16 + sets.len() as u16).wrapping_add_signed(error);
    [&[0, 10][..], &length.to_be_bytes(), &[0x33; 12], &sets].concat()
}

fn ipfix(sets: &[Vec<u8>]) -> Vec<u8> {
    ipfix_of(sets, 0)
}

/// Returns payloads, and true for those that have templates.
fn payloads() -> Vec<(&'static str, Vec<u8>, bool)> {
    let nth = |sets: usize, id| [vec![set(DATA); sets - 1], vec![set(id)]].concat();
    let padded = |length| [netflow9(&[set(DATA)]), vec![0; length]].concat();
    vec![
        ("templates", netflow9(&[set(TEMPLATES)]), true),
        ("options templates", netflow9(&[set(OPTIONS)]), true),
        ("data", netflow9(&[set(DATA)]), false),
        ("templates before data", netflow9(&[set(TEMPLATES), set(DATA)]), true),
        ("data before templates", netflow9(&[set(DATA), set(TEMPLATES)]), true),
        ("templates in the eighth set", netflow9(&nth(8, TEMPLATES)), true),
        ("templates in the ninth set", netflow9(&nth(9, TEMPLATES)), false),
        ("reserved sets", netflow9(&[set(2), set(3), set(255)]), false),
        ("no set", netflow9(&[]), false),
        ("a set of no length", netflow9(&[set_of(DATA, 0, 8), set(TEMPLATES)]), false),
        ("a set shorter than its header", netflow9(&[set_of(TEMPLATES, 3, 8)]), false),
        ("an empty set of templates", netflow9(&[set_of(TEMPLATES, 4, 0)]), true),
        ("templates behind the end", netflow9(&[set_of(TEMPLATES, 13, 8)]), false),
        ("data behind the end", netflow9(&[set_of(DATA, 0xffff, 8), set(TEMPLATES)]), false),
        ("padding shorter than a set", padded(3), false),
        ("padding like an empty set", padded(4), false),
        ("templates before padding", [netflow9(&[set(TEMPLATES)]), vec![0; 3]].concat(), true),
        ("a header alone", netflow9(&[])[..19].to_vec(), false),
        ("half a set's header", netflow9(&[set(TEMPLATES)])[..22].to_vec(), false),
        ("a version alone", vec![0, 9], false),
        ("nothing", Vec::new(), false),
        ("version 5", [&[0, 5][..], &netflow9(&[set(TEMPLATES)])[2..]].concat(), false),
        (
            "version 9 in the other order",
            [&[9, 0][..], &netflow9(&[set(TEMPLATES)])[2..]].concat(),
            false,
        ),
        ("IPFIX: templates", ipfix(&[set(IPFIX_TEMPLATES)]), true),
        ("IPFIX: options templates", ipfix(&[set(IPFIX_OPTIONS)]), true),
        ("IPFIX: data", ipfix(&[set(DATA)]), false),
        ("IPFIX: NetFlow's sets", ipfix(&[set(TEMPLATES), set(OPTIONS)]), false),
        ("IPFIX: templates in the eighth set", ipfix(&nth(8, IPFIX_OPTIONS)), true),
        ("IPFIX: templates in the ninth set", ipfix(&nth(9, IPFIX_OPTIONS)), false),
        (
            "IPFIX: templates behind the message",
            ipfix_of(&[set(DATA), set(IPFIX_TEMPLATES)], -12),
            false,
        ),
        ("IPFIX: templates reach behind it", ipfix_of(&[set(IPFIX_TEMPLATES)], -1), false),
        ("IPFIX: a message behind the datagram", ipfix_of(&[set(IPFIX_TEMPLATES)], 1), false),
        ("IPFIX: a message shorter than its header", ipfix_of(&[set(IPFIX_TEMPLATES)], -16), false),
    ]
}

/// Returns a flow of the family.
fn flow(ipv6: bool, payload: &[u8]) -> Flow {
    let source: IpAddr = match ipv6 {
        true => "2001:db8::7".parse().expect("an address"),
        false => [198, 51, 100, 7].into(),
    };
    (source, 5666, payload.to_vec())
}

/// Returns a rule for each family with three upstreams and a mirror that gets next to nothing.
fn to_all() -> [Rule; 2] {
    rules(3).map(|mut rule| {
        rule.mirrors = vec![Upstream { sample: 1_000_000, ..rule.upstreams[0].clone() }];
        rule.mirrors[0].port = Some(9);
        Rule { templates: Templates::All, strategy: Strategy::SrcIp, ..rule }
    })
}

impl Relay<'_> {
    /// Returns how many upstreams beside the selected one a packet was sent to, and whether the mirror got it.
    fn copies(&self, nth: usize, frame: &[u8]) -> (usize, bool) {
        self.run(frame);
        let counted = self.counted();
        let ids = &self.ids[nth];
        let got =
            |id: u32, what| counted.get(&(id, what)).is_some_and(|(packets, _)| *packets == 1);
        let copies = ids.upstreams.iter().filter(|id| got(**id, "templates")).count();
        let forwarded = ids.upstreams.iter().filter(|id| got(**id, "forwarded")).count();
        assert_eq!(forwarded, 1, "one upstream is selected");
        (copies, got(ids.mirrors[0], "forwarded"))
    }
}

#[test]
fn templates_are_recognised() {
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &to_all());
        for (nth, ipv6) in [false, true].into_iter().enumerate() {
            for (what, payload, is_template) in payloads() {
                let wanted = if is_template { (2, true) } else { (0, false) };
                let got = relay.copies(nth, &frame(&flow(ipv6, &payload)));
                assert_eq!(got, wanted, "{what}, IPv6 {ipv6}");
            }
        }
    });
}

#[test]
fn first_fragment_decides_for_all() {
    let message = netflow9(&[set(DATA), set_of(TEMPLATES, 2000, 1996)]);
    let late = netflow9(&[set_of(DATA, 1604, 1600), set(TEMPLATES)]);
    Testbed::with(|testbed| {
        let relay = Relay::with(testbed, &to_all());
        for (nth, ipv6) in [false, true].into_iter().enumerate() {
            for (payload, identification, wanted) in
                [(&message, 7, (2, true)), (&late, 8, (0, false))]
            {
                for fragment in fragments(&frame(&flow(ipv6, payload)), 1400, identification) {
                    assert_eq!(relay.copies(nth, &fragment), wanted, "IPv6 {ipv6}");
                }
            }
        }
    });
}

#[test]
fn drained_upstreams_get_no_templates() {
    Testbed::with(|testbed| {
        let mut rules = to_all();
        for rule in &mut rules {
            rule.upstreams[1].state = State::Drained;
        }
        let relay = Relay::with(testbed, &rules);
        for (nth, ipv6) in [false, true].into_iter().enumerate() {
            let payload = netflow9(&[set(TEMPLATES)]);
            assert_eq!(relay.copies(nth, &frame(&flow(ipv6, &payload))), (1, true));
        }
    });
}

#[test]
fn sampled_receivers_get_all_templates() {
    Testbed::with(|testbed| {
        let samplers = rules(3).map(|mut rule| {
            rule.upstreams.iter_mut().for_each(|upstream| upstream.sample = 1_000_000);
            Rule { mode: Mode::Replicate, templates: Templates::All, ..rule }
        });
        let relay = Relay::with(testbed, &samplers);
        for (nth, ipv6) in [false, true].into_iter().enumerate() {
            let [data, templates] = [DATA, TEMPLATES].map(|id| {
                relay.run(&frame(&flow(ipv6, &netflow9(&[set(id)]))));
                let counted = relay.counted();
                let ids = relay.ids[nth].upstreams.iter();
                ids.filter(|id| counted.contains_key(&(**id, "forwarded"))).count()
            });
            assert_eq!((data, templates), (0, 3), "IPv6 {ipv6}");
        }
    });
}

/// An upstream without a route costs the others nothing, and what it does not get is counted.
#[test]
fn lost_copies_are_counted() {
    Testbed::with(|testbed| {
        let [mut rule, _] = to_all();
        rule.upstreams[1].priority = 2;
        rule.upstreams[2].priority = 3;
        rule.upstreams[1].address = NO_ROUTE.into();
        let relay = Relay::with(testbed, &[rule]);
        relay.run(&frame(&flow(false, &netflow9(&[set(TEMPLATES)]))));
        let counted = relay.counted();
        let outcomes = relay.ids[0].upstreams.iter().map(|id| {
            let mut outcomes = counted.keys().filter(|(counted, _)| counted == id);
            outcomes.next().map(|(_, outcome)| *outcome)
        });
        let wanted = ["forwarded", "no-route", "templates"].map(Some);
        assert_eq!(Vec::from_iter(outcomes), wanted, "{counted:?}");
    });
}

/// Returns a rule with three upstreams.
fn balanced(net: &Net, action: &str, strategy: Value) -> Value {
    let upstream =
        |port: u16| json!({ "name": port.to_string(), "address": net.upstreams[0], "port": port });
    let options = json!({ "tc_action": action, "source": "preserve", "templates": "all",
                          "strategy": strategy, "payload": "netflow9-source" });
    net.rule("flows", 5000, options, &[7001, 7002, 7003].map(upstream))
}

fn of_map(rule: Value) -> Value {
    let mut config = config(&[rule]);
    config.as_object_mut().expect("a map").remove("defaults");
    config
}

#[test]
fn every_collector_gets_templates_and_one_gets_data() {
    let lab = Lab::dual(true, false);
    for (net, action) in [(V4, "block"), (V4, "pass"), (V6, "block"), (V6, "pass")] {
        lab.apply(&of_map(balanced(&net, action, json!(["src-ip", "payload"]))));
        let sender = bind(&lab.client, net.clients[0], 0);
        let receivers: Vec<UdpSocket> =
            [7001, 7002, 7003].map(|port| bind(&lab.upstream, net.upstreams[0], port)).into();
        // whole, and in fragments
        for body in [8, 3000] {
            let templates = netflow9(&[set_of(TEMPLATES, 4 + body, body.into())]);
            sender.send_to(&templates, (net.key, 5000)).expect("sent");
            for receiver in &receivers {
                expect(receiver, &templates, own(&sender), 63);
            }
            let data = netflow9(&[set_of(DATA, 4 + body, body.into())]);
            let targets = [0, 1, 2].map(|_| {
                sender.send_to(&data, (net.key, 5000)).expect("sent");
                let (target, datagram) = receive_any(&receivers);
                assert_eq!((&datagram.payload, datagram.from), (&data, own(&sender)));
                target
            });
            assert_eq!(targets, [targets[0]; 3]);
        }
        expect_silence_of(&receivers);
    }
    let rule = &lab.status()["rules"][0];
    let packets = |of: &Value, what: &str| of[what]["packets"].as_u64().unwrap_or_default();
    // each once: 4 datagrams whole, and 4 in 3 fragments, of which one has templates
    assert_eq!(packets(&rule["counters"], "matched"), 4 * (4 + 4 * 3), "{rule:#}");
    assert_eq!(packets(&rule["notes"], "templates"), 4 * 2 * (1 + 3), "{rule:#}");
    let upstreams = rule["upstreams"].as_array().expect("upstreams").iter();
    let noted: u64 = upstreams.map(|it| packets(&it["notes"], "templates")).sum();
    // those of IPv4 are gone
    assert_eq!(noted, 2 * 2 * (1 + 3), "{rule:#}");

    lab.run("drain flows/7002").expect(0);
    let sender = bind(&lab.client, V6.clients[1], 0);
    let receivers = [7001, 7002, 7003].map(|port| bind(&lab.upstream, V6.upstreams[0], port));
    let templates = ipfix(&[set(IPFIX_OPTIONS)]);
    sender.send_to(&templates, (V6.key, 5000)).expect("sent");
    for receiver in [&receivers[0], &receivers[2]] {
        expect(receiver, &templates, own(&sender), 63);
    }
    expect_silence_of(&receivers);
}

/// Number of flows that the exporter reports.
const FLOWS: u16 = 2000;
const FIRST: u16 = 10_000;

/// Returns a capture of one packet for each flow; they differ in the source port.
fn capture() -> Vec<u8> {
    let mut file = [0xa1b2_c3d4_u32, 2 | 4 << 16, 0, 0, 65_535, 1].map(u32::to_ne_bytes).concat();
    for port in FIRST..FIRST + FLOWS {
        let packet = etherparse::PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([192, 0, 2, 1], [198, 51, 100, 2], 64)
            .udp(port, 53);
        let mut bytes = Vec::new();
        packet.write(&mut bytes, b"question").expect("a packet");
        let (time, length) = (1_700_000_000 + u32::from(port / 100), bytes.len() as u32);
        file.extend([time, 0, length, length].map(u32::to_ne_bytes).concat());
        file.extend(bytes);
    }
    file
}

/// A collector that writes what it decodes to a folder.
struct Collector {
    child: Child,
    folder: PathBuf,
}

impl Collector {
    fn start(lab: &Lab, port: u16) -> Collector {
        let folder = lab.directory.path().join(unique("flows-"));
        fs::create_dir(&folder).expect("a directory");
        // its shared memory outlives it, with a key that a later folder may have
        let mut command = lab.upstream.command("unshare");
        command.args(["--ipc", NFCAPD, "-w"]).arg(&folder).args(["-b", &UPSTREAMS[0].to_string()]);
        command.args(["-p", &port.to_string(), "-B", "2000000"]);
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("the collector starts");
        until("the collector is there", || {
            let sockets = lab.upstream.enter(|| fs::read_to_string("/proc/thread-self/net/udp"));
            sockets.expect("the sockets").contains(&format!(":{port:04X} "))
        });
        Collector { child, folder }
    }

    /// Ends the collector and returns the source ports of the flows that it has decoded.
    fn decoded(mut self) -> BTreeSet<u16> {
        // SAFETY: the process is a child that was not waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
        self.child.wait().expect("it ends");
        let mut command = std::process::Command::new(NFDUMP);
        command.arg("-R").arg(&self.folder).args(["-q", "-o", "fmt:%sp"]);
        let (_, text, _) = outcome(&mut command);
        text.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SOFTFLOWD: &str = "/usr/sbin/softflowd";
const NFCAPD: &str = "/usr/bin/nfcapd";
const NFDUMP: &str = "/usr/bin/nfdump";

/// Sends the flows of an exporter to three collectors in turn, and returns those that each decodes.
fn collect(lab: &Lab, templates: &str, version: &str) -> [BTreeSet<u16>; 3] {
    let upstream =
        |port: u16| json!({ "name": port.to_string(), "address": UPSTREAMS[0], "port": port });
    let options = json!({ "tc_action": "block", "source": "preserve", "strategy": "random",
                          "templates": templates });
    lab.apply(&of_map(rule("flows", 5000, options, &[7001, 7002, 7003].map(upstream))));
    let collectors = [7001, 7002, 7003].map(|port| Collector::start(lab, port));
    let file = lab.directory.path().join("capture");
    fs::write(&file, capture()).expect("a file");
    let pid = lab.directory.path().join("pid").display().to_string();
    let mut exporter = lab.client.command(SOFTFLOWD);
    exporter.arg("-r").arg(&file).args(["-n", &format!("{RELAY}:5000"), "-v", version]);
    exporter.args(["-d", "-p", &pid, "-c", "none"]);
    let (code, _, errors) = outcome(&mut exporter);
    assert_eq!(code, Some(0), "{errors}");
    until("the collectors have read everything", || {
        let (_, text, _) = outcome(lab.upstream.command("ss").args(["-Hunl"]));
        let waiting = |line: &str| line.split_whitespace().nth(1) != Some("0");
        !text.is_empty() && !text.lines().any(waiting)
    });
    collectors.map(Collector::decoded)
}

#[test]
fn real_collectors_decode_every_flow() {
    if ![SOFTFLOWD, NFCAPD, NFDUMP].into_iter().all(is_there) {
        return;
    }
    let lab = Lab::new();
    let all: BTreeSet<u16> = (FIRST..FIRST + FLOWS).collect();
    for version in ["9", "10"] {
        let collected = collect(&lab, "all", version);
        let together: BTreeSet<u16> = collected.iter().flatten().copied().collect();
        assert_eq!(together.len(), all.len(), "version {version}");
        assert_eq!(together, all, "version {version}");
        // each has a share of its own
        assert!(collected.iter().all(|it| (50..1900).contains(&it.len())), "version {version}");
        // without the word, two know no templates for a while
        let together: BTreeSet<u16> = collect(&lab, "one", version).into_iter().flatten().collect();
        assert!(together.len() < all.len(), "version {version}");
    }
}
