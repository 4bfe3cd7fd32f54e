//! Multicast groups as keys: joined by arpd, reported by apply and doctor if not joined.

use serde_json::{Value, json};

use crate::common::lab::{Lab, config, upstream};
use crate::common::service::{Arpd, until};

const GROUPS: [&str; 2] = ["239.1.1.1", "ff05::5"];

fn rules(groups: &[&str]) -> Value {
    let rules: Vec<Value> = groups
        .iter()
        .map(|group| {
            let to = if group.contains(':') { "2001:db8:2::20" } else { "10.2.0.20" };
            json!({
                "name": group,
                "key": { "address": group, "port": 5000 },
                "options": { "tc_action": "block", "source": "preserve" },
                "upstream": [upstream(to.parse::<std::net::IpAddr>().expect("an address"), 6000)],
            })
        })
        .collect();
    config(&rules)
}

fn is_joined(lab: &Lab, group: &str) -> bool {
    lab.relay.ip("maddr show dev eth0").split_whitespace().any(|word| word == group)
}

#[test]
fn groups_without_arpd_are_named_with_their_fix() {
    let lab = Lab::dual(true, true);
    let said = lab.try_apply(&rules(&GROUPS), "").expect(0).stderr;
    let doctor = || lab.run("doctor").stdout;
    let told = doctor();
    for (group, command) in [
        ("239.1.1.1", "ip addr add 239.1.1.1/32 dev eth0 autojoin"),
        ("ff05::5", "ip addr add ff05::5/128 dev eth0 autojoin"),
    ] {
        assert!(said.contains(command), "{said}");
        assert!(told.contains(command), "{told}");
        lab.relay.ip(command.strip_prefix("ip ").expect("a command of ip"));
        assert!(is_joined(&lab, group));
    }
    let told = doctor();
    assert!(!told.contains("autojoin"), "{told}");
    lab.run("detach --purge").expect(0);
    let said = lab.try_apply(&rules(&GROUPS), "").expect(0).stderr;
    assert!(!said.contains("autojoin"), "{said}");
}

#[test]
fn groups_follow_the_configuration() {
    let lab = Lab::dual(true, true);
    lab.apply(&rules(&[]));
    let arpd = Arpd::start(&lab, "");
    until("arpd has a lease", || lab.status()["arpd"] == true);
    let said = lab.try_apply(&rules(&GROUPS), "").expect(0).stderr;
    assert!(!said.contains("autojoin"), "{said}");
    for group in GROUPS {
        until("it is joined", || is_joined(&lab, group));
    }
    assert!(!lab.run("doctor").stdout.contains("autojoin"));
    lab.relay.ip("link del eth0");
    lab.client.link("eth0", &lab.relay, "eth0", true);
    for group in GROUPS {
        until("it is joined again", || is_joined(&lab, group));
    }
    lab.apply(&rules(&GROUPS[1..]));
    until("one is left", || !is_joined(&lab, GROUPS[0]));
    assert!(is_joined(&lab, GROUPS[1]));
    assert!(arpd.end(libc::SIGTERM).success());
    until("the other is left", || !is_joined(&lab, GROUPS[1]));
}
