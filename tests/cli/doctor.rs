//! `udplb doctor`: each problem is found, and its fix works.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::{Value, json};
use udplb::net::Netlink;

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule, to_port};
use crate::common::net::{Load, bind, receive, set};
use crate::common::returning;
use crate::common::service::{Arpd, until};

/// Checks the exit code of `doctor` and returns its output.
fn examine(lab: &Lab, code: i32) -> String {
    lab.run("doctor").expect(code).stdout
}

/// Runs the fix of a problem.
fn fix(lab: &Lab, what: &str) {
    let outcome = lab.run("doctor -o json").json();
    let findings = outcome["findings"].as_array().expect("findings");
    let found = findings.iter().find(|it| it["what"].as_str().is_some_and(|it| it.contains(what)));
    let found = found.unwrap_or_else(|| panic!("no `{what}` in {outcome:#}"));
    let command = found["fix"].as_str().expect("a command");
    // the fix may list more than one command
    let command = command.split([',', ';']).next().expect("a command");
    match command.strip_prefix("udplb ") {
        Some(words) => lab.run(words).expect(0),
        None if command.contains("&&") => {
            Outcome::of(lab.relay.command("sh").args(["-c", command])).expect(0)
        }
        None => {
            let mut words = command.split_whitespace();
            let mut command = lab.relay.command(words.next().expect("a program"));
            Outcome::of(command.args(words)).expect(0)
        }
    };
}

#[test]
fn healthy_and_empty_hosts_have_no_findings() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001));
    let wanted =
        "problem: nothing is applied\n  why:  no packet is forwarded\n  fix:  udplb apply ";
    let found = lab.run(&format!("doctor {}", file.display())).expect(3).stdout;
    assert_eq!(found, format!("{wanted}{}\n1 problem\n", file.display()));
    assert_eq!(examine(&lab, 3), format!("{wanted}FILE\n1 problem\n"));
    lab.apply(&to_port(7001));
    assert_eq!(examine(&lab, 0), "all is well\n");
    assert_eq!(
        lab.run("doctor -o json").json(),
        json!({ "format_version": 1, "healthy": true, "findings": [] })
    );
    lab.run("doctor nowhere.yaml").expect(66);
}

#[test]
fn filter_without_pins_is_found() {
    let mut lab = Lab::new();
    lab.hide_tcx(true);
    lab.apply(&to_port(7001));
    fs::remove_file(lab.bpffs.pins().join("current/config")).expect("a pin");
    let found = examine(&lab, 3);
    assert!(found.starts_with("problem: the description of generation 1 is gone"), "{found}");
    for command in ["list", "trace", "get 10.1.0.20 10.1.0.1:5000", "drain only/one"] {
        lab.run(command).expect(1).says(&["generation 1 is damaged; apply the file again"]);
    }
    lab.apply(&to_port(7001));
    fs::remove_file(lab.state().join("overrides")).expect("a pin");
    for command in ["trace", "get 10.1.0.20 10.1.0.1:5000", "drain only/one", "enable --all"] {
        lab.run(command).expect(1).says(&["pins are missing; apply the file again"]);
    }
    fs::remove_dir_all(lab.bpffs.pins()).expect("pins");
    let status = lab.run("status").expect(3).stdout;
    assert!(status.contains("eth0: a filter of udplb whose pins are not here still"), "{status}");
    let file = lab.write(&to_port(7001)).display().to_string();
    let found = lab.run(&format!("doctor {file}")).expect(3).stdout;
    assert!(!found.contains("no packet is forwarded"), "{found}");
    assert!(found.contains("in a mount namespace that is not seen from here, or gone"), "{found}");
    assert!(found.contains(&format!("none: udplb apply {file} --force\n1 problem")), "{found}");
    lab.run(&format!("apply {file} --force")).expect(0);
    assert_eq!(examine(&lab, 0).lines().last(), Some("no problems, 1 note"));
}

#[test]
fn locked_pins_are_reported() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let lock = fs::File::open(lab.bpffs.pins()).expect("the pins");
    lock.lock().expect("nobody else has it");
    lab.run("doctor --lock-timeout 0").expect(75).says(&["still locked"]);
}

/// Attaches a foreign program to the relay's ingress.
fn attach(lab: &Lab, priority: u16, returned: i32) {
    let index = lab.relay.index("eth0");
    lab.relay.enter(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let netlink = Netlink::open().expect("netlink");
            let program = returning(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, c"foreign", returned);
            let attached =
                netlink.set_filter(index, priority, 1, "foreign", program.as_fd(), false);
            attached.await.expect("attached");
        });
    });
}

#[test]
fn filter_that_hides_packets_is_found() {
    let mut lab = Lab::new();
    lab.hide_tcx(true);
    lab.apply(&to_port(7001));
    // after udplb's filter
    attach(&lab, 101, 0);
    assert_eq!(examine(&lab, 0), "all is well\n");
    attach(&lab, 50, 0);
    // neighbour discovery of the new interfaces is hidden too
    until("it is quiet", || lab.run("doctor").code == Some(0));
    let found = examine(&lab, 0);
    let named = "note: eth0: tc filter bpf pref 50 handle 0x1 foreign (program ";
    assert!(found.starts_with(named), "{found}");
    assert!(found.contains(") runs first and may consume packets\n"), "{found}");
    let fix_of = "fix:  tc filter del dev eth0 ingress pref 50 handle 0x1 bpf, or";
    assert!(found.contains(fix_of), "{found}");
    let receiver = bind(&lab.upstream, UPSTREAMS[0], 7001);
    let load = Load::start(bind(&lab.client, CLIENTS[0], 0), 5000);
    let found = examine(&lab, 3);
    assert!(found.contains("packets came in within a second, and none reached udplb\n"), "{found}");
    fix(&lab, "none reached udplb");
    receive(&receiver);
    drop(load);
    assert_eq!(examine(&lab, 0), "all is well\n");
}

#[test]
fn earlier_programs_are_found() {
    let lab = Lab::new();
    let index = lab.relay.index("eth0") as i32;
    let xdp = returning(libbpf_sys::BPF_PROG_TYPE_XDP, c"other_xdp", 2);
    let tcx = returning(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, c"other_tcx", -1);
    lab.relay.enter(|| {
        // SAFETY: takes plain numbers, and options for which all zeroes are valid.
        let (by_xdp, by_tcx) = unsafe {
            let xdp = libbpf_sys::bpf_xdp_attach(index, xdp.as_raw_fd(), 0, std::ptr::null());
            let none = std::ptr::null();
            let hook = libbpf_sys::BPF_TCX_INGRESS;
            (xdp, libbpf_sys::bpf_prog_attach_opts(tcx.as_raw_fd(), index, hook, none))
        };
        assert_eq!((by_xdp, by_tcx), (0, 0));
    });
    lab.apply(&to_port(7001));
    let found = examine(&lab, 0);
    for name in ["XDP program ", "other_xdp runs first", "tcx program ", "other_tcx runs first"] {
        assert!(found.contains(name), "{name}: {found}");
    }
    assert!(found.contains("fix:  ip link set dev eth0 xdp"), "{found}");
    fix(&lab, "other_xdp");
    assert!(!examine(&lab, 0).contains("other_xdp"));
}

/// The program belongs where the filters of others leave room.
#[test]
fn program_in_another_place_is_found() {
    let mut lab = Lab::new();
    if !lab.has_links() {
        return;
    }
    lab.hide_tcx(true);
    lab.apply(&to_port(7001));
    lab.hide_tcx(false);
    let still = "note: eth0: udplb is attached by a tc filter, and could be by a tcx link\n";
    assert!(examine(&lab, 0).starts_with(still), "{}", examine(&lab, 0));
    fix(&lab, "could be by a tcx link");
    assert_eq!(examine(&lab, 0), "all is well\n");
    attach(&lab, 50, -1);
    let later = "note: eth0: a tc filter of a lower priority than udplb's runs after it\n";
    assert!(examine(&lab, 0).starts_with(later), "{}", examine(&lab, 0));
    fix(&lab, "runs after it");
    let found = examine(&lab, 0);
    assert!(found.contains("foreign") && found.contains("runs first"), "{found}");
}

#[test]
fn dead_upstream_without_traffic_is_found() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    lab.upstream.ip("link set eth0 arp off");
    lab.relay.ip("neigh change 10.2.0.20 dev up0 nud stale");
    // the neighbour was not used since, so the kernel has not noticed
    lab.run("status").expect(0);
    let found = examine(&lab, 3);
    assert!(found.starts_with("problem: only: one is down since "), "{found}");
    assert!(found.contains("10.2.0.20 on up0 does not answer (PROBE) ARP"), "{found}");
}

#[test]
fn growing_verdicts_are_explained() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    set(&sender, libc::IPPROTO_IP, libc::IP_TTL, 1);
    let _load = Load::start(sender, 5000);
    let found = examine(&lab, 3);
    let said = "packets within a second were not sent: `ttl`\n  why:  the packets' TTL is spent\n";
    assert!(found.contains(said), "{found}");
    assert!(found.starts_with("problem: only/one: "), "{found}");
}

#[test]
fn drift_and_detached_interfaces_are_found() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let file = lab.write(&to_port(7002)).display().to_string();
    let found = examine(&lab, 3);
    let wanted = format!(
        "problem: {file}: it is not what serves\n  \
         why:  it was changed after it was applied, or another file was applied\n  \
         fix:  udplb plan {file}; udplb apply {file}\n1 problem\n"
    );
    assert_eq!(found, wanted);
    lab.run(&format!("apply {file}")).expect(0);
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.run("rollback").expect(0);
    assert!(examine(&lab, 3).contains("a rollback left it, and it is held"));
    fix(&lab, "not what serves");
    assert_eq!(examine(&lab, 0), "all is well\n");
    fs::write(&file, "version: 1\nrules: 1\n").expect("the file");
    assert!(
        examine(&lab, 3)
            .contains(&format!("{file}: it cannot be applied\n  why:  error: {file}:2:8"))
    );
    lab.write(&to_port(7002));

    lab.run("detach").expect(0);
    assert!(examine(&lab, 3).starts_with("problem: eth0: udplb is not attached\n"));
    fix(&lab, "not attached");
    lab.relay.ip("link set eth0 down");
    assert!(examine(&lab, 3).contains("eth0: it is down\n"));
    fix(&lab, "it is down");
    assert_eq!(examine(&lab, 0), "all is well\n");
    fs::remove_file(lab.bpffs.pins().join("current/slots")).expect("a pin");
    let number = &lab.status()["generation"];
    assert!(examine(&lab, 3).contains(&format!("pins of generation {number} are missing")));
    fix(&lab, "pins of generation");
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.relay.ip("link set eth0 down");
    lab.relay.ip("link set eth0 name eth7");
    assert!(examine(&lab, 3).starts_with("problem: eth0: there is no such interface\n"));
}

#[test]
fn drift_of_a_relative_path_is_found() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001)).display().to_string();
    let mut apply = lab.udplb("apply udplb.yaml");
    Outcome::of(apply.current_dir(lab.directory.path())).expect(0);
    assert_eq!(lab.status()["file"], file);
    lab.write(&to_port(7002));
    assert!(examine(&lab, 3).starts_with(&format!("problem: {file}: it is not what serves\n")));
    assert!(lab.run("metrics").expect(0).stdout.contains("\nudplb_config_drift 1\n"));
}

#[test]
fn drift_follows_the_file_that_was_applied_last() {
    let lab = Lab::new();
    let text = to_port(7001).to_string();
    let [first, second] = ["first.yaml", "second.yaml"]
        .map(|name| lab.directory.write(name, &text).display().to_string());
    let apply = |words: &str| {
        let changed = lab.run(&format!("apply {words} -o json")).expect(0).json();
        changed["changed"].as_bool().expect("a truth value")
    };
    assert!(apply(&first));
    assert!(!apply(&second));
    assert_eq!(lab.status()["file"], second);
    let other = to_port(7002).to_string();
    lab.directory.write("first.yaml", &other);
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.directory.write("second.yaml", &other);
    assert!(examine(&lab, 3).starts_with(&format!("problem: {second}: it is not what serves")));
    // each generation has its own file; a rollback restores the previous one
    assert!(apply(&first));
    assert_eq!(lab.status()["file"], first);
    lab.run("rollback").expect(0);
    assert_eq!(lab.status()["file"], second);
    // a configuration from standard input has no file to compare or edit
    let mut stdin = lab.udplb("apply - -o json");
    let outcome = Outcome::with_input(&mut stdin, &text).expect(0);
    assert_eq!(outcome.json()["changed"], false);
    lab.run("detach").expect(0);
    let found = examine(&lab, 3);
    assert!(
        found.contains("fix:  apply the configuration again (it came from standard input)"),
        "{found}"
    );
    for advice in ["edit -", "apply -", "plan -", "check -"] {
        assert!(!found.contains(&format!("{advice}\n")), "{found}");
    }
}

#[test]
fn forwarding_and_reverse_path_filters_are_found() {
    let lab = Lab::new();
    let _here = bind(&lab.relay, RELAY, 5000);
    let upstream = json!({ "address": UPSTREAMS[0], "port": 7001 });
    lab.apply(&config(&[rule("copies", 5000, json!({}), &[upstream])]));
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.relay.sysctl("net.ipv4.ip_forward", "0");
    assert!(examine(&lab, 0).starts_with("note: eth0: forwarding is off there"));
    {
        let _arpd = Arpd::start(&lab, "");
        until("arpd vouches", || lab.run("doctor").stdout == "all is well\n");
    }
    lab.relay.sysctl("net.ipv4.ip_forward", "1");
    until("the lease has run out", || lab.status()["arpd"] == false);
    assert!(examine(&lab, 3).starts_with("problem: arpd has ended\n"));
    let _arpd = Arpd::start(&lab, "");
    until("arpd vouches", || lab.status()["arpd"] == true);
    // strict mode causes no problem if the return path is the same
    lab.relay.sysctl("net.ipv4.conf.eth0.rp_filter", "1");
    lab.relay.ip("route add default via 10.1.0.20");
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.relay.ip("route replace default via 10.2.0.20");
    let found = examine(&lab, 3);
    assert!(found.starts_with("problem: eth0: rp_filter is strict there"), "{found}");
    fix(&lab, "rp_filter is strict");
    assert_eq!(examine(&lab, 0), "all is well\n");
}

/// Without a file, and with one that has nothing but `decap`.
#[test]
fn upstreams_of_direct_rules_are_examined() {
    let lab = Lab::dual(true, true);
    for name in ["all", "default", "eth0", "up0"] {
        lab.relay.sysctl(&format!("net.ipv4.conf.{name}.rp_filter"), "0");
    }
    // in the network of the clients, elsewhere, and of IPv6
    let examine_named = |code: i32, wanted: &[&str]| {
        let named = "doctor --upstream 10.1.0.9,10.99.0.1,2001:db8:99::1";
        let found = lab.run(named).expect(code).stdout;
        for wanted in wanted {
            assert!(found.contains(wanted), "{wanted}: {found}");
        }
    };
    let no_tunnel = "note: no tunnel device is up, and no `decap` is applied\n";
    examine_named(
        3,
        &[
            "problem: 10.1.0.9 is no address of this host\n",
            "problem: 10.99.0.1 is no address of this host\n",
            "fix:  ip address add 2001:db8:99::1/128 dev lo\n",
            no_tunnel,
            "\n3 problems, 3 notes\n",
        ],
    );
    lab.relay.ip("address add 10.1.0.9/24 dev eth0");
    lab.relay.ip("address add 10.99.0.1/32 dev lo");
    lab.relay.ip("-6 route add local 2001:db8:99::/64 dev lo");
    examine_named(
        3,
        &[
            "problem: eth0: 10.1.0.9 is on this interface, and not on lo\n",
            "fix:  ip address del 10.1.0.9/24 dev eth0; ip address add 10.1.0.9/32 dev lo\n",
            "\n1 problem, 3 notes\n",
        ],
    );
    lab.relay.ip("address del 10.1.0.9/24 dev eth0");
    lab.relay.ip("address add 10.1.0.9/32 dev lo");
    examine_named(
        3,
        &[
            "problem: eth0: arp_ignore is 0 there, arp_announce 0\n",
            "note: up0: arp_ignore is 0 there, arp_announce 0\n",
            "\n1 problem, 2 notes\n",
        ],
    );
    for (name, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
        lab.relay.sysctl(&format!("net.ipv4.conf.all.{name}"), value);
    }
    examine_named(0, &[no_tunnel, "\nno problems, 1 note\n"]);

    let decap = json!({ "from": "10.1.0.20", "via": ["ipip", "gue"] });
    lab.apply(&json!({ "version": 1, "interfaces": ["eth0"], "decap": decap }));
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.relay.sysctl("net.ipv4.conf.eth0.rp_filter", "1");
    lab.relay.ip("route add default via 10.2.0.20");
    let found = examine(&lab, 3);
    assert!(found.starts_with("problem: eth0: rp_filter is strict there"), "{found}");
    fix(&lab, "rp_filter is strict");
    assert_eq!(examine(&lab, 0), "all is well\n");
    lab.relay.ip("address del 10.1.0.9/32 dev lo");
    lab.relay.ip("address del 10.99.0.1/32 dev lo");
    let found = examine(&lab, 3);
    assert!(found.starts_with("problem: neither lo nor a dummy has the address"), "{found}");
}

#[test]
fn mtu_losses_and_routed_senders_are_found() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    lab.relay.ip("link set up0 mtu 1400");
    let found = examine(&lab, 0);
    assert!(found.starts_with("note: only: the MTU on the way to one is 1400\n"), "{found}");
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(&[0; 1450], (RELAY, 5000)).expect("sent");
    until("it is counted", || lab.packets("only", "one", "mtu") == 1);
    let found = examine(&lab, 3);
    assert!(found.contains("dropped as `mtu` if they must not be: 1 so far"), "{found}");
    fix(&lab, "the MTU");
    assert_eq!(examine(&lab, 0), "all is well\n");

    // if the underlying device leaves too little MTU, that problem is reported first
    lab.relay.ip("link add vx0 type vxlan id 42 remote 10.2.0.20 dstport 4789 dev up0");
    lab.relay.ip("addr add 10.8.0.1/24 dev vx0");
    lab.relay.ip("link set vx0 up");
    let behind = json!({ "name": "behind", "address": "10.8.0.20" });
    lab.apply(&config(&[rule("tunnel", 5000, json!({ "tc_action": "block" }), &[behind])]));
    // no host answers
    let found = examine(&lab, 3);
    assert!(found.contains("the MTU on the way to behind is 1450"), "{found}");
    fix(&lab, "the MTU");
    assert!(!examine(&lab, 3).contains("the MTU"));
    lab.relay.ip("link del vx0");

    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.21");
    let options = json!({ "tc_action": "block", "source": "preserve" });
    let upstreams = ["10.9.0.1", "10.9.0.2"].map(|address| json!({ "address": address }));
    lab.apply(&config(&[rule("far", 5000, options, &upstreams)]));
    let found = examine(&lab, 0);
    let wanted =
        "note: far: 10.9.0.1 is behind the router 10.2.0.21, and gets senders' own addresses\n";
    assert!(found.starts_with(wanted), "{found}");
    assert!(found.ends_with("no problems, 1 note\n"), "{found}");
    lab.relay.ip("route del 10.9.0.0/24");
    assert!(examine(&lab, 3).starts_with("problem: far: there is no route to 10.9.0.1\n"));
}

#[test]
fn local_senders_are_found() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let sender = bind(&lab.relay, RELAY, 40_000);
    sender.connect((RELAY, 5000)).expect("connected");
    let wanted =
        "problem: only: a socket of this host, 10.1.0.1:40000 of user 0, sends to 10.1.0.1:5000\n";
    let found = examine(&lab, 3);
    assert!(found.starts_with(wanted), "{found}");
    drop(sender);
    assert_eq!(examine(&lab, 0), "all is well\n");
}

#[test]
fn missing_privileges_are_reported() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let program = lab.directory.path().join("udplb");
    fs::copy(env!("CARGO_BIN_EXE_udplb"), &program).expect("a copy of udplb");
    let outcome = lab.relay.enter(|| {
        let mut command = Command::new(&program);
        command.arg("--pin-dir").arg(lab.bpffs.pins()).args(["doctor", "-o", "json"]);
        Outcome::of(command.uid(65_534).gid(65_534))
    });
    let found = outcome.expect(3).json();
    let what: Vec<&Value> =
        found["findings"].as_array().expect("findings").iter().map(|it| &it["what"]).collect();
    assert!(what.contains(&&json!("what serves cannot be read")), "{found:#}");
    assert!(
        what.iter().any(|what| what.as_str().is_some_and(|it| it.contains("CAP_BPF"))),
        "{found:#}"
    );
}
