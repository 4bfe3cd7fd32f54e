//! Problems that `status`, `doctor` and `apply` report when packets do not arrive.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, V4, V6, config, rule, to_port};
use crate::common::net::{bind, receive, set};
use crate::common::service::{Arpd, until};

/// Returns the id and place of each problem of the status.
fn problems(lab: &Lab) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("a text").to_string();
    let status = lab.status();
    let problems = status["problems"].as_array().expect("problems");
    let problems = problems.iter().filter(|problem| problem["level"] == "problem");
    problems.map(|problem| (text(&problem["id"]), text(&problem["where"]))).collect()
}

#[track_caller]
fn expect(lab: &Lab, wanted: &[(&str, &str)]) -> Outcome {
    let found = problems(lab);
    let found: Vec<(&str, &str)> =
        found.iter().map(|(id, at)| (id.as_str(), at.as_str())).collect();
    assert_eq!(found, wanted);
    lab.run("status").expect(if wanted.is_empty() { 0 } else { 3 })
}

/// Runs the fix of doctor's first problem and returns the problem.
#[track_caller]
fn doctor_fixes(lab: &Lab, id: &str, place: &str) {
    let found = lab.run("doctor -o json").expect(3).json();
    let first = &found["findings"][0];
    assert_eq!(
        (first["id"].as_str(), first["where"].as_str()),
        (Some(id), Some(place)),
        "{found:#}"
    );
    for command in first["fix"].as_str().expect("a fix").split("; ") {
        match command.split_once(' ') {
            Some(("udplb", words)) => lab.run(words).expect(0),
            Some((program, words)) => {
                Outcome::of(lab.relay.command(program).args(words.split(' '))).expect(0)
            }
            None => panic!("{command}"),
        };
    }
}

/// Returns a rule for each family, each with two upstreams.
fn both_families(options: &Value) -> Value {
    let rules = [("four", V4), ("six", V6)].map(|(name, net)| {
        let upstreams = net.upstreams.map(|it| json!({ "name": it, "address": it, "port": 7000 }));
        net.rule(name, 5000, options.clone(), &upstreams)
    });
    config(&rules)
}

#[test]
fn downed_egress_interface_is_a_problem() {
    let lab = Lab::dual(true, true);
    // otherwise IPv6 addresses are lost when the link goes down
    lab.relay.sysctl("net.ipv6.conf.up0.keep_addr_on_down", "1");
    lab.apply(&both_families(&json!({ "tc_action": "block" })));
    expect(&lab, &[]);
    lab.relay.ip("link set up0 down");
    let status = expect(&lab, &[("interface-down", "up0")]).stdout;
    let line = "! up0: it is down: no packet leaves there to four/10.2.0.20, four/10.2.0.21";
    assert!(status.contains(line), "{status}");
    doctor_fixes(&lab, "interface-down", "up0");
    until("all is well", || problems(&lab).is_empty());
    lab.upstream.ip("link set eth0 down");
    let status = expect(&lab, &[("no-carrier", "up0")]).stdout;
    assert!(
        status.contains("! up0: it has no carrier: no packet leaves there to four/"),
        "{status}"
    );
    let found = lab.run("doctor").expect(3).stdout;
    assert!(found.starts_with("problem: up0: it has no carrier\n"), "{found}");
}

#[test]
fn downed_egress_interface_with_arpd_is_a_problem() {
    let lab = Lab::new();
    let _arpd = Arpd::start(&lab, "");
    lab.apply(&to_port(7001));
    until("it is up", || problems(&lab).is_empty() && lab.status()["arpd"] == true);
    lab.relay.ip("link set up0 down");
    let down = [("interface-down".to_string(), "up0".to_string())];
    until("it is down", || problems(&lab) == down);
    doctor_fixes(&lab, "interface-down", "up0");
    until("it is up", || problems(&lab).is_empty());
}

#[test]
fn silent_next_hop_is_a_problem() {
    let lab = Lab::dual(true, true);
    for (name, net, dead, asked) in
        [("four", V4, "10.2.0.99", "ARP"), ("six", V6, "2001:db8:2::99", "NDP")]
    {
        for mode in ["balance", "replicate"] {
            let options = json!({ "tc_action": "block", "mode": mode, "source": "preserve" });
            let upstreams = [
                json!({ "name": "dead", "address": dead }),
                json!({ "address": net.upstreams[0] }),
            ];
            let mut all = config(&[net.rule(name, 5000, options, &upstreams)]);
            all.as_object_mut().expect("a map").remove("defaults");
            lab.try_apply(&all, "")
                .expect(0)
                .says(&[&format!("{dead} on up0 does not answer {asked}")]);
            let status = expect(&lab, &[("upstream-down", name)]).stdout;
            assert!(status.contains(&format!("! {name}: dead is down")), "{status}");
            let answers = [format!("answered {asked}"), format!("answer (FAILED) {asked}")];
            assert!(answers.iter().any(|answer| status.contains(answer)), "{status}");
        }
        // a drained upstream is not reported
        lab.run(&format!("drain {name}/dead")).expect(0);
        expect(&lab, &[]);
        lab.run(&format!("enable {name}/dead")).expect(0);
    }
}

#[test]
fn failed_next_hop_is_a_problem() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    expect(&lab, &[]);
    lab.upstream.ip("link set eth0 arp off");
    lab.relay.ip("neigh flush dev up0");
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let down = [("upstream-down".to_string(), "only".to_string())];
    until("the kernel has given up", || {
        sender.send_to(b"lost", (RELAY, 5000)).expect("sent");
        let status = lab.run("status").stdout;
        problems(&lab).contains(&down[0])
            && status.contains("10.2.0.20 on up0 does not answer (FAILED) ARP")
    });
    let status = lab.status();
    let problem = &status["problems"][0];
    assert!(problem["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{status:#}");
}

#[test]
fn fully_drained_rule_is_a_problem() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    lab.run("drain only/one").expect(0);
    let status = expect(&lab, &[("all-drained", "only")]).stdout;
    assert!(status.contains("! only: all its upstreams are drained"), "{status}");
    doctor_fixes(&lab, "all-drained", "only");
    expect(&lab, &[]);
    let upstream = json!({ "address": UPSTREAMS[0], "state": "drained" });
    let options = json!({ "mode": "replicate", "source": "preserve" });
    let mut all = config(&[rule("copies", 5000, options, &[upstream])]);
    all.as_object_mut().expect("a map").remove("defaults");
    lab.apply(&all);
    expect(&lab, &[("all-drained", "copies")]);
}

#[test]
fn current_losses_are_a_problem() {
    let lab = Lab::new();
    let _receiver = bind(&lab.upstream, UPSTREAMS[0], 7001);
    lab.apply(&to_port(7001));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(b"fine", (RELAY, 5000)).expect("sent");
    receive(&_receiver);
    expect(&lab, &[]);
    set(&sender, libc::IPPROTO_IP, libc::IP_TTL, 1);
    let mut seen = false;
    until("it is said", || {
        sender.send_to(b"lost", (RELAY, 5000)).ok();
        let status = lab.run("status");
        seen = status.stdout.contains("! only/one: packets were lost in the last second as `ttl`");
        assert!(!seen || status.code == Some(3), "{status:?}");
        seen
    });
    std::thread::sleep(Duration::from_millis(1_100));
    expect(&lab, &[]);
}

#[test]
fn missing_route_is_a_problem() {
    let lab = Lab::new();
    let upstream = json!({ "name": "far", "address": "192.0.2.1" });
    let all = config(&[rule("copies", 5000, json!({}), &[upstream])]);
    lab.apply(&all);
    let status = expect(&lab, &[("no-route", "copies")]).stdout;
    assert!(status.contains("! copies: there is no route to far: "), "{status}");
    lab.relay.ip("route add 192.0.2.0/24 via 10.2.0.20");
    // the kernel's routing has the address by now
    expect(&lab, &[]);
    lab.apply(&all);
    expect(&lab, &[]);
    lab.relay.ip("route del 192.0.2.0/24");
    lab.relay.ip("link set up0 down");
    let status = lab.run("status").expect(3).stdout;
    assert!(status.contains("! up0: it is down: no packet leaves there to copies/far"), "{status}");
}
