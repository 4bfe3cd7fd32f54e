//! Host names of upstreams, with a name server that answers, fails, delays or stays silent.

use std::fs;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, count, receive, send_until};
use crate::common::service::{Arpd, until};
use crate::dns::{Answer, Dns};

/// Timeout for commands that must not wait for the name server.
const SOON: Duration = Duration::from_secs(100);

fn upstream(name: &str) -> Value {
    json!({ "address": name })
}

fn balanced(upstreams: &[Value]) -> Value {
    config(&[rule("only", 5000, json!({ "tc_action": "block" }), upstreams)])
}

/// Runs a command on a configuration.
fn run(lab: &Lab, words: &str, config: &Value) -> Outcome {
    let file = lab.write(config);
    Outcome::of(&mut lab.with_dns(&format!("{words} {}", file.display())))
}

/// Returns the child processes of a process.
fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).expect("the process");
    text.split_whitespace().map(|child| child.parse().expect("a process")).collect()
}

/// Resolved sequentially, the names would take more than three minutes.
#[test]
fn thousand_slow_names_resolve_in_parallel() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    let mut upstreams = Vec::new();
    for host in 0..1000_u32 {
        let name = format!("host{host}.test");
        let address = IpAddr::from([10, 3, (host / 250) as u8, (host % 250 + 1) as u8]);
        dns.set(&name, Answer::Late(Duration::from_millis(200), vec![address]));
        upstreams.push(upstream(&name));
    }
    run(&lab, "check --resolve-timeout 90", &balanced(&upstreams)).expect(0);
}

#[test]
fn silent_name_server_is_a_temporary_failure() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    dns.set("silent.test", Answer::Silence);
    dns.set("broken.test", Answer::Failure);
    let started = Instant::now();
    for words in ["check", "plan", "apply"] {
        let words = format!("{words} --resolve-timeout 1");
        let config = balanced(&[upstream("silent.test")]);
        run(&lab, &words, &config).expect(75).says(&["`silent.test` does not resolve: no answer"]);
        run(&lab, &words, &balanced(&[upstream("broken.test")])).expect(75);
        // the nonexistence of a name is a final answer
        let config = balanced(&[upstream("silent.test"), upstream("none.test")]);
        run(&lab, &words, &config).expect(65).says(&["silent.test", "none.test"]);
    }
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    lab.run("status").expect(3);
    lab.run("list").expect(3);
}

#[test]
fn name_of_the_other_family_is_refused() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    dns.set("six.test", Answer::of(&["2001:db8:2::20"]));
    let says = ["`six.test` does not resolve: it has no IPv4 address"];
    run(&lab, "check", &balanced(&[upstream("six.test")])).expect(65).says(&says);
}

/// The server requests TCP, accepts the connection and stays silent: `getaddrinfo` waits forever.
#[test]
fn truncated_answer_without_tcp_delays_nothing() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    dns.set("good.test", Answer::of(&["10.2.0.20"]));
    dns.set("late.test", Answer::Truncated);
    let config = balanced(&[upstream("good.test"), upstream("late.test")]);
    let apply = run(&lab, "apply --partial --resolve-timeout 1", &config);
    apply.expect(4).says(&["late.test", "no answer within 1 s"]);

    let arpd = lab.with_dns("arpd --resolve-interval 1 --resolve-timeout 1 --lease 2");
    let arpd = Arpd::spawn(&lab, arpd);
    lab.await_health("good.test", "up");
    until("it is told", || arpd.log().contains("late.test does not resolve: no answer"));
    let mut resolvers = Vec::new();
    for _ in 0..30 {
        assert_eq!(lab.status()["arpd"], true, "the lease is kept");
        let running = children(arpd.pid());
        // a killed resolver may not have exited yet
        assert!(running.len() <= 2, "{running:?}");
        resolvers.extend(running);
        sleep(Duration::from_millis(100));
    }
    resolvers.dedup();
    assert!(resolvers.len() > 1, "it is asked again");

    dns.set("late.test", Answer::of(&["10.2.0.21"]));
    until("the name resolves", || arpd.log().contains("late.test is now 10.2.0.21"));
    until("nothing is missing", || lab.run("status -q").code == Some(0));

    // a killed arpd leaves no resolver running
    dns.set("late.test", Answer::Truncated);
    let mut resolver = 0;
    until("it asks", || {
        children(arpd.pid()).first().is_some_and(|pid| {
            resolver = *pid;
            true
        })
    });
    arpd.end(libc::SIGKILL);
    until("the resolver ends", || {
        let state = fs::read_to_string(format!("/proc/{resolver}/stat"));
        state.map_or(true, |state| state.contains(") Z"))
    });
}

#[test]
fn partial_apply_is_completed_by_arpd() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    dns.set("silent.test", Answer::Silence);
    dns.set("good.test", Answer::of(&["10.2.0.20"]));
    let copies = json!({ "tc_action": "block", "mode": "replicate", "source": "preserve" });
    let config = config(&[
        rule("copies", 5000, copies, &[upstream("good.test"), upstream("silent.test")]),
        rule("alone", 5001, json!({}), &[upstream("silent.test")]),
    ]);
    let apply = run(&lab, "apply --partial --resolve-timeout 1 -o json", &config).expect(4);
    assert_eq!(apply.json()["missing"].as_array().map(Vec::len), Some(2));
    let status = lab.status();
    assert_eq!(status["rules"].as_array().map(Vec::len), Some(1), "{status:#}");
    // the partially applied state is not taken for the complete configuration
    run(&lab, "plan --exit-code --resolve-timeout 1", &config).expect(75);

    let arpd = lab.with_dns("arpd --resolve-interval 1 --resolve-timeout 1");
    let arpd = Arpd::spawn(&lab, arpd);
    dns.set("silent.test", Answer::of(&["10.2.0.21"]));
    until("the name resolves", || arpd.log().contains("silent.test is now 10.2.0.21"));
    until("nothing is missing", || lab.run("status -q").code == Some(0));
    let status = lab.status();
    assert_eq!(status["rules"].as_array().map(Vec::len), Some(2), "{status:#}");
    assert_eq!(status["rules"][0]["upstreams"][1]["address"], json!(UPSTREAMS[1]));
    run(&lab, "plan --exit-code", &config).expect(0);
}

/// Returns the label and the number of forwarded datagrams of each upstream of the first rule.
fn upstreams(lab: &Lab) -> Vec<(String, u64)> {
    let status = lab.status();
    let upstreams = status["rules"][0]["upstreams"].as_array().into_iter().flatten();
    let one = |it: &Value| {
        let label = it["upstream"].as_str().expect("a label").to_string();
        (label, it["counters"]["forwarded"]["packets"].as_u64().unwrap_or(0))
    };
    upstreams.map(one).collect()
}

fn pool(options: Value) -> Value {
    let upstream = json!({ "name": "p", "address": "pool.test", "addresses": "all" });
    config(&[rule("only", 5000, options, &[upstream])])
}

#[test]
fn every_address_of_a_name_gets_a_copy() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    dns.set("pool.test", Answer::of(&["10.2.0.20"]));
    let options = json!({ "tc_action": "block", "mode": "replicate", "source": "preserve" });
    run(&lab, "apply", &pool(options.clone())).expect(0);
    let arpd = Arpd::spawn(&lab, lab.with_dns("arpd --resolve-interval 1"));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 5000));
    let first = count(receivers[0].try_clone().expect("a socket"));
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sent = scope.spawn(|| send_until(&stop, &sender, (RELAY, 5000)));
        dns.set("pool.test", Answer::of(&["10.2.0.21", "10.2.0.20"]));
        until("both serve", || upstreams(&lab).len() == 2);
        stop.store(true, Ordering::Relaxed);
        sent.join().expect("sent")
    });
    assert_eq!(first.join().expect("counted"), sent, "what served lost nothing");
    let served = upstreams(&lab);
    assert_eq!((served[0].0.as_str(), served[1].0.as_str()), ("p@10.2.0.20", "p@10.2.0.21"));
    // includes the final marker; the counters continued
    assert_eq!(served[0].1, sent + 1);
    sender.send_to(b"both", (RELAY, 5000)).expect("sent");
    assert_eq!(receive(&receivers[0]).payload, b"both");
    until("the other gets it too", || receive(&receivers[1]).payload == b"both");

    // each address is a separate upstream
    lab.run("drain only/p@10.2.0.21").expect(0);
    let list = lab.run("list").expect(0).stdout;
    assert_eq!(list.matches("addresses: all").count(), 1, "{list}");
    assert!(!list.contains("10.2.0.2"), "{list}");
    run(&lab, "plan --exit-code", &pool(options)).expect(0);
    assert_eq!(upstreams(&lab).len(), 2);
    drop(arpd);
}

#[test]
fn name_with_fewer_addresses_is_resolved_twice() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    let three = ["10.2.0.20", "10.2.0.21", "10.2.0.22"];
    let pool = pool(json!({ "tc_action": "block" }));
    dns.set("pool.test", Answer::of(&three));
    run(&lab, "apply", &pool).expect(0);
    assert_eq!(upstreams(&lab).len(), 3);

    // fewer addresses at an apply
    dns.set("pool.test", Answer::of(&three[..1]));
    let says = ["`pool.test` has fewer addresses, 1, than serve, 3"];
    run(&lab, "apply", &pool).expect(0).says(&says);
    assert_eq!(upstreams(&lab).len(), 3);
    run(&lab, "apply", &pool).expect(0);
    assert_eq!(upstreams(&lab).len(), 1);

    // fewer addresses while arpd runs; a failure does not count as an answer
    dns.set("pool.test", Answer::of(&three));
    run(&lab, "apply", &pool).expect(0);
    let arpd = Arpd::spawn(&lab, lab.with_dns("arpd --resolve-interval 1"));
    dns.set("pool.test", Answer::Failure);
    until("it is told", || arpd.log().contains("pool.test does not resolve"));
    assert_eq!(upstreams(&lab).len(), 3);
    dns.set("pool.test", Answer::of(&three[2..]));
    until("the others go", || upstreams(&lab).len() == 1);
    assert_eq!(upstreams(&lab)[0].0, "p@10.2.0.22");
}

#[test]
fn once_follows_a_name_with_fewer_addresses() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    let three = ["10.2.0.20", "10.2.0.21", "10.2.0.22"];
    dns.set("pool.test", Answer::of(&three));
    run(&lab, "apply", &pool(json!({ "tc_action": "block" }))).expect(0);
    dns.set("pool.test", Answer::of(&three[..1]));
    Outcome::of(&mut lab.with_dns("arpd --once")).expect(0);
    assert_eq!(upstreams(&lab).len(), 1);
    // a silent name server costs the time of the option, and no upstream
    dns.set("pool.test", Answer::Silence);
    let began = Instant::now();
    let silent = Outcome::of(&mut lab.with_dns("arpd --once --resolve-timeout 1")).expect(1);
    silent.says(&["pool.test"]);
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(upstreams(&lab).len(), 1);
}

#[test]
fn name_of_this_host_is_left_out() {
    let lab = Lab::new();
    let dns = Dns::start(&lab);
    dns.set("self.test", Answer::of(&["10.2.0.1"]));
    dns.set("good.test", Answer::of(&["10.2.0.20"]));
    let config = balanced(&[upstream("good.test"), upstream("self.test")]);
    run(&lab, "apply", &config).expect(65).says(&["is 10.2.0.1, an address of this host"]);
    run(&lab, "apply --partial", &config).expect(4).says(&["an address of this host"]);
    assert_eq!(upstreams(&lab).len(), 1);
}
