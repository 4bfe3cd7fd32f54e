//! The total of a rule counts each packet once, however its upstreams change.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use serde_json::{Value, json};
use udplb::bpf::{bytes_of, types};
use udplb::config::Config;
use udplb::datapath::description::{Generation, Origin};
use udplb::datapath::generation;
use udplb::datapath::pins;
use udplb::desired::Desired;
use udplb::net::Netlink;
use udplb::reconcile::execute::Executor;
use udplb::reconcile::observe::observe;
use udplb::reconcile::plan::{self, Action};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, packets, rule};
use crate::common::net::{bind, expect_silence_of, receive_any, set};
use crate::common::service::until;

/// Length of a datagram with its headers.
const BYTES: u64 = 47;
const HOSTS: usize = 4;

/// Returns upstreams or mirrors by host number.
fn hosts(numbers: &[usize]) -> Vec<Value> {
    let host = |number: &usize| {
        json!({
            "name": format!("u{number}"),
            "address": UPSTREAMS[number % 2],
            "port": 7000 + number,
        })
    };
    numbers.iter().map(host).collect()
}

fn to(mode: &str, upstreams: &[usize], mirrors: &[usize]) -> Value {
    let options = json!({ "tc_action": "block", "mode": mode });
    let mut rule = rule("only", 5000, options, &hosts(upstreams));
    if !mirrors.is_empty() {
        rule["mirror"] = json!(hosts(mirrors));
    }
    config(&[rule])
}

fn balance(upstreams: &[usize]) -> Value {
    to("balance", upstreams, &[])
}

/// Traffic of the rule, with its sockets.
struct Flows<'lab> {
    lab: &'lab Lab,
    /// The last sender's TTL is too low for forwarding.
    senders: Vec<UdpSocket>,
    receivers: Vec<UdpSocket>,
    sent: u64,
    old: u64,
}

impl Flows<'_> {
    fn new(lab: &Lab) -> Flows<'_> {
        // these source ports select each of two upstreams
        let sender = |number: u16| bind(&lab.client, CLIENTS[0], 20_000 + 257 * number);
        let senders: Vec<_> = (0..9).map(sender).collect();
        set(&senders[8], libc::IPPROTO_IP, libc::IP_TTL, 1);
        let receiver = |number| bind(&lab.upstream, UPSTREAMS[number % 2], 7000 + number as u16);
        let receivers = (0..HOSTS).map(receiver).collect();
        Flows { lab, senders, receivers, sent: 0, old: 0 }
    }

    /// Sends a packet from each sender and waits for `copies` datagrams per forwarded packet. Returns
    /// the number that each host received.
    fn send(&mut self, copies: usize) -> [u64; HOSTS] {
        let mut arrived = [0; HOSTS];
        for (index, sender) in self.senders.iter().enumerate() {
            sender.send_to(b"total", (RELAY, 5000)).expect("sent");
            if index < 8 {
                (0..copies).for_each(|_| arrived[receive_any(&self.receivers).0] += 1);
            }
        }
        self.sent += 9;
        self.old += 1;
        until("all are counted", || self.rule()["counters"]["matched"]["packets"] == self.sent);
        self.check();
        arrived
    }

    fn rule(&self) -> Value {
        self.lab.status()["rules"][0].clone()
    }

    /// Returns the packets forwarded to each host of the rule.
    fn forwarded(&self) -> BTreeMap<String, u64> {
        let rule = self.rule();
        let lists = [&rule["upstreams"], &rule["mirrors"]];
        let hosts = lists.into_iter().filter_map(Value::as_array).flatten();
        let one = |host: &Value| {
            let label = host["upstream"].as_str().expect("a label").into();
            (label, host["counters"]["forwarded"]["packets"].as_u64().expect("a number"))
        };
        hosts.map(one).collect()
    }

    /// Checks that the total equals the number of packets sent, and that every packet has one verdict.
    #[track_caller]
    fn check(&self) {
        let rule = self.rule();
        let counters = &rule["counters"];
        let all = json!({ "packets": self.sent, "bytes": self.sent * BYTES });
        assert_eq!(counters["matched"], all, "{rule:#}");
        let lost = counters["not_forwarded"].as_object().cloned().unwrap_or_default();
        let lost: u64 = lost.keys().map(|name| packets(counters, name)).sum();
        let sent_on = packets(counters, "forwarded") + packets(counters, "stale-neighbour");
        assert_eq!(sent_on + lost, self.sent, "{rule:#}");
        assert_eq!(packets(counters, "ttl"), self.old, "{rule:#}");
        let metrics = self.lab.run("metrics").expect(0).stdout;
        for (name, value) in [("packets", self.sent), ("bytes", self.sent * BYTES)] {
            let line = format!("udplb_rule_{name}_total{{rule={}}} {value}", rule["rule"]);
            assert!(metrics.lines().any(|it| it == line), "no {line}: {metrics}");
        }
    }

    #[track_caller]
    fn apply(&self, config: &Value) {
        assert_eq!(self.lab.apply(config)["changed"], true);
        self.check();
    }

    #[track_caller]
    fn rollback(&self) {
        self.lab.run("rollback").expect(0);
        self.check();
    }

    /// Returns the ids of the rule's upstreams in the active generation.
    fn ids(&self) -> Vec<u32> {
        let pins = pins::read(&self.lab.bpffs.pins(), Duration::ZERO).expect("the lock");
        let pins = pins.expect("something is applied");
        let serving: Generation = generation::read(&pins, None, pins.current().expect("current"))
            .expect("readable")
            .expect("a generation");
        serving.description.ids[0].upstreams.clone()
    }
}

#[test]
fn total_stays_when_upstreams_go() {
    let lab = Lab::new();
    lab.apply(&balance(&[0, 1]));
    let mut flows = Flows::new(&lab);
    let arrived = flows.send(1);
    assert!(arrived[0] > 0 && arrived[1] > 0, "{arrived:?}");
    let gone = flows.ids()[1];
    // one upstream is removed; the previous generation still has it and becomes active again
    flows.apply(&balance(&[0]));
    flows.send(1);
    for _ in 0..2 {
        flows.rollback();
        flows.send(1);
    }
    flows.rollback();
    flows.rollback();
    // the upstream is removed from all generations, and another one gets its id
    flows.apply(&balance(&[0, 2]));
    flows.send(1);
    flows.apply(&balance(&[0, 3]));
    assert_eq!(flows.ids()[1], gone);
    assert_eq!(flows.forwarded()["u3"], 0);
    assert!(flows.send(1)[3] > 0);
    for _ in 0..2 {
        flows.rollback();
        flows.send(1);
    }
    // by a manual override
    lab.run("drain only/u0").expect(0);
    assert_eq!(flows.send(1)[0], 0);
    lab.run("enable only/u0").expect(0);
    flows.check();
    // the upstream removed first is added again, without its old counters
    flows.apply(&balance(&[1, 0]));
    assert_eq!(flows.forwarded()["u1"], 0);
    flows.send(1);
    // all upstreams change at once, repeatedly
    for upstreams in [&[2, 3][..], &[0, 1], &[2], &[3], &[0]] {
        flows.apply(&balance(upstreams));
        flows.send(1);
    }
    flows.rollback();
    flows.send(1);
    lab.run("detach").expect(0);
    // `status` reports the detach as a problem; the counters stay right
    flows.check();
}

#[test]
fn copies_are_not_in_the_total() {
    let lab = Lab::new();
    lab.apply(&balance(&[0, 1]));
    let mut flows = Flows::new(&lab);
    assert!(flows.send(1)[1] > 0);
    // an upstream becomes a mirror, and a mirror an upstream
    flows.apply(&to("balance", &[0], &[1]));
    assert_eq!(flows.send(2), [8, 8, 0, 0]);
    flows.apply(&balance(&[0, 1]));
    flows.send(1);
    flows.apply(&to("balance", &[2], &[0, 1]));
    assert_eq!(flows.send(3), [8, 8, 8, 0]);
    // receivers that were upstreams or mirrors
    flows.apply(&to("replicate", &[0, 1, 2], &[]));
    assert!(flows.forwarded().values().all(|packets| *packets == 0), "{:?}", flows.forwarded());
    assert_eq!(flows.send(3), [8, 8, 8, 0]);
    assert!(flows.forwarded().values().all(|packets| *packets == 8), "{:?}", flows.forwarded());
    flows.rollback();
    flows.send(3);
    flows.rollback();
    flows.send(3);
    // receivers are added and removed
    flows.apply(&to("replicate", &[0, 3], &[]));
    flows.send(2);
    flows.apply(&to("replicate", &[2], &[]));
    flows.send(1);
    // and become upstreams again
    flows.apply(&balance(&[0, 2]));
    assert!(flows.forwarded().values().all(|packets| *packets == 0), "{:?}", flows.forwarded());
    flows.send(1);
    flows.apply(&balance(&[0, 1]));
    flows.apply(&balance(&[3]));
    flows.send(1);
    expect_silence_of(&flows.receivers);
}

/// The older file format allows duplicates.
#[test]
fn duplicate_upstream_is_counted_once() {
    let lab = Lab::new();
    let apply = |numbers: &[usize]| {
        let upstream = |number| json!({ "address": UPSTREAMS[number % 2], "port": 7000 + number });
        let upstreams: Vec<Value> = numbers.iter().map(|number| upstream(*number)).collect();
        let key = json!({ "address": RELAY, "port": 5000 });
        let options = json!({ "tc_action": "block", "strategy": "src-port" });
        let rules = json!([{ "key": key, "options": options, "upstream": upstreams }]);
        let mut command = lab.udplb("apply - -i eth0");
        Outcome::with_input(&mut command, &rules.to_string()).expect(0);
    };
    apply(&[0, 1, 1]);
    let mut flows = Flows::new(&lab);
    assert!(flows.send(1)[1] > 0);
    for upstreams in [[0, 0, 2], [0, 2, 2], [3, 0, 3]] {
        apply(&upstreams);
        flows.check();
        flows.send(1);
    }
}

/// The rule is removed, and added again before and after its counters are discarded.
#[test]
fn removed_rule_begins_at_zero() {
    let lab = Lab::new();
    let without = |number: u16| {
        config(&[rule("other", 5001 + number, json!({ "tc_action": "block" }), &hosts(&[3]))])
    };
    lab.apply(&balance(&[0, 1]));
    let mut flows = Flows::new(&lab);
    flows.send(1);
    for upstreams in [[0, 2], [1, 2], [0, 3]] {
        flows.apply(&balance(&upstreams));
        flows.send(1);
    }
    lab.apply(&without(0));
    flows.apply(&balance(&[0, 2]));
    flows.send(1);
    lab.apply(&without(1));
    lab.apply(&without(2));
    // new holders of the ids start at zero
    lab.apply(&balance(&[0]));
    (flows.sent, flows.old) = (0, 0);
    flows.check();
    flows.send(1);
    flows.apply(&balance(&[1]));
    flows.apply(&balance(&[2]));
    flows.send(1);
}

/// A packet counted twice would stay in the total forever.
#[test]
fn crash_during_removal_counts_nothing_twice() {
    let lab = Lab::new();
    lab.apply(&balance(&[0, 1]));
    let mut flows = Flows::new(&lab);
    assert!(flows.send(1)[1] > 0);
    flows.apply(&balance(&[0]));
    // the generation's pins survive their removal by hard links
    let (pins, aside) = (lab.bpffs.pins().join("generations/1"), lab.bpffs.pins().join("aside"));
    let crash = |apply: &dyn Fn()| {
        fs::create_dir(&aside).expect("a directory");
        for pin in fs::read_dir(&pins).expect("pins") {
            let pin = pin.expect("a pin");
            fs::hard_link(pin.path(), aside.join(pin.file_name())).expect("a second pin");
        }
        apply();
        assert!(!pins.exists());
        fs::rename(&aside, &pins).expect("the generation is back");
        flows.check();
    };
    crash(&|| flows.apply(&balance(&[0, 2])));
    // an unchanged configuration still removes the leftover generation
    crash(&|| assert_eq!(lab.apply(&balance(&[0, 2]))["changed"], true));
    // the next generation is built with the leftover present and has that upstream again
    flows.apply(&balance(&[0, 1]));
    assert!(!pins.exists());
    assert_eq!(flows.forwarded()["u1"], 0);
    assert!(flows.send(1)[1] > 0);
    flows.apply(&balance(&[0, 3]));
    flows.apply(&balance(&[0]));
    flows.send(1);
}

/// A generation is active for a moment before the rest of the apply fails.
#[test]
fn failed_apply_keeps_the_total() {
    let lab = Lab::new();
    lab.apply(&balance(&[0]));
    let mut flows = Flows::new(&lab);
    flows.send(1);
    let config = Config::parse("udplb.yaml", &balance(&[1]).to_string()).expect("a configuration");
    let desired = Desired::written(&config, &config.interfaces);
    let mut served = [0; HOSTS];
    let (sender, receivers) = (&flows.senders[0], &flows.receivers);
    let mut inside = async || {
        let netlink = Netlink::open()?;
        let guard = pins::write(&lab.bpffs.pins(), Duration::ZERO)
            .map_err(|failure| anyhow!("{failure}"))?;
        let observed = observe(Some(&guard), &netlink).await?;
        let plan = plan::apply(&observed, &desired, &Origin::default(), false)
            .map_err(|refusal| anyhow!("{refusal}"))?;
        let mut observer = |action: &Action| {
            if let Action::SetCurrent(_) = action {
                sender.send_to(b"total", (RELAY, 5000)).expect("sent");
                served[receive_any(receivers).0] += 1;
                bail!("injected");
            }
            Ok(())
        };
        let ways = foldhash::HashMap::default();
        Executor::new(&guard, &netlink, &observed, &ways).run(&plan.actions, &mut observer).await
    };
    let failed: anyhow::Result<()> = lab.relay.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(inside())
    });
    assert_eq!(failed.expect_err("a failure").to_string(), "injected");
    assert_eq!(served, [0, 1, 0, 0]);
    flows.sent += 1;
    flows.check();
    flows.send(1);
}

#[test]
fn lost_pin_of_lines_loses_no_packet() {
    let lab = Lab::new();
    lab.apply(&balance(&[0, 1]));
    let mut flows = Flows::new(&lab);
    flows.send(1);
    fs::remove_file(lab.bpffs.pins().join("generations/1/lines")).expect("a pin");
    flows.send(1);
    // the same file heals it
    flows.apply(&balance(&[0, 1]));
    flows.send(1);
    let before = flows.forwarded()["u0"];
    flows.apply(&balance(&[0, 2]));
    assert_eq!(flows.forwarded()["u0"], before);
    flows.apply(&balance(&[3]));
    flows.send(1);
}

#[test]
fn lines_of_an_earlier_udplb_are_counted() {
    let lab = Lab::new();
    lab.apply(&balance(&[0, 1]));
    let pin = lab.bpffs.pins().join("generations/1/lines");
    fs::remove_file(&pin).expect("a pin");
    // its map was a per-CPU array
    let (kind, width) = (MapType::PercpuArray, size_of::<types::line>() as u32);
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    let mut lines = MapHandle::create(kind, Some("lines"), 4, width, 2, &options).expect("a map");
    for (index, packets) in [(0_u32, 3), (1, 4)] {
        let line = types::line { packets, bytes: packets * BYTES, ..types::line::default() };
        let cpus = libbpf_rs::num_possible_cpus().expect("CPUs");
        let values = vec![bytes_of(&line).to_vec(); cpus];
        lines.update_percpu(&index.to_ne_bytes(), &values, MapFlags::ANY).expect("an update");
    }
    lines.pin(&pin).expect("a pin");
    let cpus = libbpf_rs::num_possible_cpus().expect("CPUs") as u64;
    let forwarded = Flows::new(&lab).forwarded();
    assert_eq!([forwarded["u0"], forwarded["u1"]], [3 * cpus, 4 * cpus]);
}

#[test]
fn rates_hold_across_applies() {
    let lab = Lab::new();
    lab.apply(&balance(&[0, 1]));
    let mut flows = Flows::new(&lab);
    // more packets than are sent during the interval
    for _ in 0..5 {
        flows.send(1);
    }
    let rate = (0..10).find_map(|_| rate_over_two_applies(&lab, &mut flows));
    let rate = rate.expect("two applies within five seconds");
    // 18 packets in six seconds, with a margin for the length of the interval
    assert!((2.4..=3.0).contains(&rate), "{rate}");
}

/// Returns the rate of one interval of six seconds with 18 packets and two applies; `None` if the
/// machine was too busy for them.
fn rate_over_two_applies(lab: &Lab, flows: &mut Flows<'_>) -> Option<f64> {
    lab.apply(&balance(&[0, 1]));
    let mut command = lab.udplb("status --watch --interval 6 -o json");
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the program runs");
    let mut looks = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let mut look = || -> Value {
        let line = looks.next().expect("a look").expect("text");
        serde_json::from_str(&line).expect("JSON")
    };
    assert_eq!(look()["rules"][0]["rate"], Value::Null);
    let started = Instant::now();
    flows.send(1);
    flows.apply(&balance(&[0]));
    flows.apply(&balance(&[2]));
    flows.send(1);
    let is_in_time = started.elapsed() < Duration::from_secs(5);
    let rate = is_in_time.then(|| look()["rules"][0]["rate"]["packets_per_second"].clone());
    child.kill().expect("the program runs");
    child.wait().expect("it ends");
    rate.map(|rate| rate.as_f64().expect("a rate"))
}
