//! Packets follow the kernel's routing: policy rules, all paths of a route, VRFs; `apply`, `arpd`,
//! `get` and `doctor` report it.
//!
//! ```text
//! client ── relay ─ up0 ── upstream  10.2.0.20 ┐
//!                 └ up1 ── second    10.3.0.20 ┴ 10.9.0.1, 2001:db8:9::1
//! ```

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use serde_json::{Value, json};
use udplb::datapath::kernel;

use crate::common::Namespace;
use crate::common::lab::{CLIENTS, Lab, Net, V4, V6, config};
use crate::common::net::{bind, expect_silence, receive, receive_any};
use crate::common::service::{Arpd, until};

const PORT: u16 = 5000;

struct Uplinks {
    lab: Lab,
    second: Namespace,
}

/// The collector's address and its gateways in one family.
struct Far {
    net: Net,
    address: IpAddr,
    gateways: [&'static str; 2],
    /// The relay's address on each path.
    own: [&'static str; 2],
    ip: &'static str,
    default: &'static str,
    forwarding: &'static str,
}

fn far() -> [Far; 2] {
    [
        Far {
            net: V4,
            address: "10.9.0.1".parse().expect("an address"),
            gateways: ["10.2.0.20", "10.3.0.20"],
            own: ["10.2.0.1", "10.3.0.1"],
            ip: "",
            default: "10.9.0.0/24",
            forwarding: "net.ipv4.ip_forward",
        },
        Far {
            net: V6,
            address: "2001:db8:9::1".parse().expect("an address"),
            gateways: ["2001:db8:2::20", "2001:db8:3::20"],
            own: ["2001:db8:2::1", "2001:db8:3::1"],
            ip: "-6 ",
            default: "2001:db8:9::/64",
            forwarding: "net.ipv6.conf.all.forwarding",
        },
    ]
}

impl Uplinks {
    fn new() -> Uplinks {
        let lab = Lab::dual(true, true);
        let second = Namespace::new();
        lab.relay.link("up1", &second, "eth0", true);
        lab.relay.ip("addr add 10.3.0.1/24 dev up1");
        lab.relay.ip("addr add 2001:db8:3::1/64 dev up1 nodad");
        second.ip("addr add 10.3.0.20/24 dev eth0");
        second.ip("addr add 2001:db8:3::20/64 dev eth0 nodad");
        second.ip("route add default via 10.3.0.1");
        second.ip("-6 route add default via 2001:db8:3::1");
        for host in [&lab.upstream, &second] {
            host.ip("addr add 10.9.0.1/32 dev lo");
            host.ip("addr add 2001:db8:9::1/128 dev lo nodad");
            for interface in ["all", "eth0"] {
                host.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "0");
            }
        }
        lab.relay.sysctl("net.ipv4.fib_multipath_hash_policy", "1");
        lab.relay.sysctl("net.ipv6.fib_multipath_hash_policy", "1");
        Uplinks { lab, second }
    }

    fn receivers(&self, far: &Far) -> [UdpSocket; 2] {
        [&self.lab.upstream, &self.second].map(|host| bind(host, far.address, PORT))
    }

    /// Returns a rule to the collector.
    fn rule(far: &Far, action: &str, source: &str) -> Value {
        let options = json!({ "tc_action": action, "source": source });
        let upstream = json!({ "name": "far", "address": far.address });
        config(&[far.net.rule("far", PORT, options, &[upstream])])
    }

    /// Applies a rule to the collector and returns the warnings.
    fn apply(&self, far: &Far, action: &str, source: &str) -> String {
        self.lab.try_apply(&Uplinks::rule(far, action, source), "").expect(0).stderr
    }

    /// Adds one route with both gateways.
    fn add_both_paths(&self, far: &Far) {
        let Far { ip, default, gateways: [first, second], .. } = far;
        let paths = format!("nexthop via {first} dev up0 nexthop via {second} dev up1");
        self.lab.relay.ip(&format!("{ip}route add {default} {paths}"));
    }

    /// Adds a route through the first gateway, and one through the second for packets of the second
    /// client.
    fn route_by_sender(&self, far: &Far) {
        let Far { ip, default, net, gateways: [first, second], .. } = far;
        self.lab.relay.ip(&format!("{ip}route add {default} via {first}"));
        self.lab.relay.ip(&format!("{ip}route add {default} via {second} table 100"));
        self.lab.relay.ip(&format!("{ip}rule add from {} lookup 100", net.clients[1]));
    }

    fn forward(&self, far: &Far, on: bool) {
        self.lab.relay.sysctl(far.forwarding, if on { "1" } else { "0" });
    }

    /// Flushes all neighbours except permanent ones.
    fn flush(&self) {
        self.lab.relay.ip("neigh flush all");
    }
}

/// Sends this many flows of one datagram each and returns the senders seen by each receiver.
fn send(
    lab: &Lab,
    net: &Net,
    client: IpAddr,
    flows: usize,
    to: &[UdpSocket; 2],
) -> [Vec<IpAddr>; 2] {
    let here = bind(&lab.relay, net.key, PORT);
    for _ in 0..flows {
        let sender = bind(&lab.client, client, 0);
        sender.send_to(b"flow", SocketAddr::new(net.key, PORT)).expect("sent");
    }
    let mut from = [Vec::new(), Vec::new()];
    for _ in 0..flows {
        let (index, datagram) = receive_any(to);
        from[index].push(datagram.from.ip());
    }
    drop(here);
    from
}

/// Returns the number of flows at each receiver.
fn spread(lab: &Lab, net: &Net, flows: usize, to: &[UdpSocket; 2]) -> [usize; 2] {
    send(lab, net, net.clients[0], flows, to).map(|from| from.len())
}

#[test]
fn all_paths_of_a_route_carry_copies() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    for far in far() {
        let [first, second] = far.gateways;
        uplinks.add_both_paths(&far);
        let receivers = uplinks.receivers(&far);
        for action in ["pass", "block"] {
            uplinks.flush();
            let said = uplinks.apply(&far, action, "preserve");
            assert!(said.contains("a route with several next hops decides by the flow"), "{said}");
            let found = spread(lab, &far.net, 32, &receivers);
            assert!(found.iter().all(|count| *count > 0), "{action}: {found:?}");
        }
        let doctor = lab.run("doctor").stdout;
        assert!(doctor.contains(&format!("{first} dev up0 or {second} dev up1")), "{doctor}");
        uplinks.apply(&far, "pass", "preserve");
        let arpd = Arpd::start(lab, "");
        lab.await_health("far", "up");
        for gateway in far.gateways {
            until("both are kept", || lab.neighbour(gateway).contains("proto 117"));
        }
        let found = spread(lab, &far.net, 32, &receivers);
        assert!(found.iter().all(|count| *count > 0), "with arpd: {found:?}");
        // the kernel no longer forwards and cannot be asked for routes
        uplinks.forward(&far, false);
        until("one path is chosen", || spread(lab, &far.net, 8, &receivers).contains(&8));
        uplinks.forward(&far, true);
        drop(arpd);
    }
}

#[test]
fn source_is_the_address_of_the_path() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    for far in far() {
        uplinks.add_both_paths(&far);
        let receivers = uplinks.receivers(&far);
        for action in ["pass", "block"] {
            uplinks.apply(&far, action, "egress");
            let client = far.net.clients[0];
            let from = send(lab, &far.net, client, 16, &receivers);
            for (from, own) in from.iter().zip(far.own) {
                let others: BTreeSet<String> = from.iter().map(IpAddr::to_string).collect();
                assert!(others.iter().all(|other| other == own), "{others:?} by {own}");
            }
        }
    }
}

/// With forwarding off the kernel does not report routes by sender or ingress interface.
#[test]
fn policy_rules_hold_with_and_without_forwarding() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    for far in far() {
        let [first, second] = far.gateways;
        let Far { ip, default, net, .. } = &far;
        lab.relay.ip(&format!("{ip}route add {default} via {second} table 100"));
        let receivers = uplinks.receivers(&far);
        for (rule, main) in [(format!("from {}", net.key), true), ("iif eth0".into(), false)] {
            lab.relay.ip(&format!("{ip}rule add {rule} lookup 100"));
            if main {
                lab.relay.ip(&format!("{ip}route add {default} via {first}"));
            }
            for forwarding in [true, false] {
                uplinks.forward(&far, forwarding);
                for action in ["pass", "block"] {
                    uplinks.flush();
                    let said = uplinks.apply(&far, action, "vip");
                    assert!(!said.contains("no route"), "{said}");
                    let found = spread(lab, net, 4, &receivers);
                    assert_eq!(found, [0, 4], "{rule} {action} forwarding {forwarding}");
                    assert_eq!(lab.next_hop("far")["gateway"], second);
                }
            }
            let doctor = lab.run("doctor").stdout;
            assert!(!doctor.contains("no route"), "{doctor}");
            lab.relay.ip(&format!("{ip}rule del {rule}"));
            if main {
                lab.relay.ip(&format!("{ip}route del {default}"));
            }
        }
    }
}

#[test]
fn source_rules_are_looked_up_for_each_packet() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    for far in far() {
        let ([first, second], net) = (far.gateways, &far.net);
        uplinks.route_by_sender(&far);
        let receivers = uplinks.receivers(&far);
        for action in ["pass", "block"] {
            uplinks.flush();
            let said = uplinks.apply(&far, action, "preserve");
            assert!(said.contains("routing rules decide by the sender"), "{said}");
            for arpd in [false, true] {
                let _arpd = arpd.then(|| {
                    let arpd = Arpd::start(lab, "");
                    lab.await_health("far", "up");
                    until("the second is kept", || lab.neighbour(second).contains("proto 117"));
                    arpd
                });
                for (index, client) in net.clients.into_iter().enumerate() {
                    let found = send(lab, net, client, 4, &receivers).map(|from| from.len());
                    let wanted = if index == 0 { [4, 0] } else { [0, 4] };
                    assert_eq!(found, wanted, "{client} {action} arpd {arpd}");
                }
            }
        }
        assert!(lab.run("doctor").stdout.contains("routing rules decide by the sender"));
        // the kernel no longer forwards and cannot be asked for routes
        uplinks.forward(&far, false);
        let said = uplinks.apply(&far, "pass", "preserve");
        assert!(said.contains(&format!("all go via {first}")), "{said}");
        let found = send(lab, net, net.clients[1], 4, &receivers).map(|from| from.len());
        assert_eq!(found, [4, 0]);
        uplinks.forward(&far, true);
    }
}

#[test]
fn arpd_follows_policy_rules() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    let [far, _] = far();
    let [first, second] = far.gateways;
    lab.relay.ip(&format!("route add {} via {first}", far.default));
    lab.relay.ip(&format!("route add {} via {second} table 100", far.default));
    uplinks.apply(&far, "pass", "vip");
    let _arpd = Arpd::start(lab, "");
    lab.await_hop("far", "gateway", first);
    lab.relay.ip("rule add iif eth0 lookup 100");
    lab.await_hop("far", "gateway", second);
    lab.relay.ip("rule del iif eth0 lookup 100");
    lab.await_hop("far", "gateway", first);
}

#[test]
fn get_names_the_next_hop_of_the_packet() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    for far in far() {
        let ([first, second], net) = (far.gateways, &far.net);
        uplinks.route_by_sender(&far);
        uplinks.apply(&far, "block", "preserve");
        for (client, gateway, host) in [(0, first, &lab.upstream), (1, second, &uplinks.second)] {
            let destination = SocketAddr::new(net.key, PORT);
            let words = format!("get {} {destination} -o json", net.clients[client]);
            let answer = lab.run(&words).expect(0).json();
            let outcome = &answer["outcomes"][0]["next_hop"];
            assert_eq!(outcome["gateway"], gateway, "{answer:#}");
            let mac = host.mac_text("eth0");
            assert_eq!(outcome["mac"], mac, "{answer:#}");
            assert!(outcome["state"].is_string(), "{answer:#}");
        }
        lab.relay.ip(&format!("neigh del {second} dev up1"));
        let words = format!("get {} {} -o json", net.clients[1], SocketAddr::new(net.key, PORT));
        let answer = lab.run(&words).expect(0).json();
        assert_eq!(answer["outcomes"][0]["next_hop"]["gateway"], second, "{answer:#}");
        assert_eq!(answer["outcomes"][0]["next_hop"]["state"], Value::Null, "{answer:#}");
    }
}

#[test]
fn silent_next_hop_is_reported_each_time() {
    let lab = Lab::dual(true, true);
    for (net, dead, protocol) in [(V4, "10.2.0.77", "ARP"), (V6, "2001:db8:2::77", "NDP")] {
        let options = json!({ "tc_action": "block" });
        let upstreams = [json!({ "address": net.upstreams[0] }), json!({ "address": dead })];
        let config = config(&[net.rule("some", PORT, options, &upstreams)]);
        for first in [true, false] {
            let outcome = lab.try_apply(&config, "").expect(0);
            let wanted = format!("{dead} on up0 does not answer {protocol}");
            assert!(outcome.stderr.contains(&wanted), "{outcome:?}");
            let warnings = outcome.json()["warnings"].clone();
            let places: Vec<&Value> =
                warnings.as_array().expect("a list").iter().map(|it| &it["field"]).collect();
            // `apply` warns about features that older kernels lack, at the rule, once a generation
            let wanted = ["rules[0]", "rules[0].upstream[1]"];
            let older = usize::from(first && kernel::version() < (5, 12));
            assert_eq!(places, wanted[1 - older..], "{warnings:#}");
        }
    }
}

/// As at boot: during duplicate address detection the kernel resolves no neighbours and has no source
/// address.
#[test]
fn apply_waits_for_tentative_addresses() {
    let lab = Lab::dual(true, true);
    lab.relay.sysctl("net.ipv6.conf.up0.accept_dad", "1");
    lab.relay.sysctl("net.ipv6.conf.up0.dad_transmits", "1");
    lab.relay.ip("-6 addr flush dev up0");
    lab.relay.ip("-6 addr add fe80::1/64 dev up0");
    lab.relay.ip("-6 addr add 2001:db8:2::1/64 dev up0");
    assert!(lab.relay.ip("-6 addr show dev up0").contains("tentative"));
    let options = json!({ "tc_action": "pass", "source": "egress" });
    let upstream = json!({ "name": "one", "address": V6.upstreams[0], "port": 6000 });
    let config = config(&[V6.rule("only", PORT, options, &[upstream])]);
    let said = lab.try_apply(&config, "").expect(0).stderr;
    assert!(!said.contains("answered"), "{said}");
    let receiver = bind(&lab.upstream, V6.upstreams[0], 6000);
    let _here = bind(&lab.relay, V6.key, PORT);
    let sender = bind(&lab.client, V6.clients[0], 0);
    sender.send_to(b"early", SocketAddr::new(V6.key, PORT)).expect("sent");
    let datagram = receive(&receiver);
    assert_eq!((&datagram.payload[..], datagram.from.ip()), (&b"early"[..], V6.egress));
}

/// Runs `ip` in the namespace; returns false if the kernel lacks the feature.
fn try_ip(namespace: &Namespace, words: &str) -> bool {
    let mut command = namespace.command("ip");
    command.args(words.split_whitespace()).output().expect("ip runs").status.success()
}

/// Two tenants have the same addresses: packets of each leave only through its own VRF.
#[test]
fn packets_stay_in_their_vrf() {
    let uplinks = Uplinks::new();
    let Uplinks { lab, .. } = &uplinks;
    if !try_ip(&lab.relay, "link add red type vrf table 10") {
        eprintln!("SKIPPED: this kernel has no VRFs");
        return;
    }
    let [far, _] = far();
    lab.relay.ip("link set red up");
    lab.relay.ip("link set eth0 master red");
    lab.relay.ip("link set up1 master red");
    // the other tenant has the same network
    lab.relay.ip("route add 10.9.0.0/24 via 10.2.0.20");
    let receivers = uplinks.receivers(&far);
    let here = |action: &str| Uplinks::rule(&far, action, "preserve");
    let lost = lab.try_apply(&here("pass"), "").expect(0).stderr;
    assert!(lost.contains("no route matches in table 10 of the VRF red"), "{lost}");
    lab.relay.ip("route add 10.9.0.0/24 via 10.3.0.20 table 10");
    for forwarding in ["1", "0"] {
        lab.relay.sysctl("net.ipv4.ip_forward", forwarding);
        for action in ["pass", "block"] {
            lab.relay.ip("neigh flush all");
            let said = lab.try_apply(&here(action), "").expect(0).stderr;
            assert!(!said.contains("no route"), "{said}");
            for _ in 0..4 {
                let sender = bind(&lab.client, CLIENTS[0], 0);
                sender.send_to(b"red", SocketAddr::new(far.net.key, PORT)).expect("sent");
                assert_eq!(receive(&receivers[1]).payload, b"red");
            }
        }
    }
    let _arpd = Arpd::start(lab, "");
    lab.await_hop("far", "gateway", "10.3.0.20");
    expect_silence(&receivers[0]);
}

/// Redirected packets bypass IPsec: routes that a policy protects are refused.
#[test]
fn routes_with_ipsec_are_refused() {
    let lab = Lab::dual(true, true);
    let template = "tmpl src 10.2.0.1 dst 10.2.0.20 proto esp mode tunnel";
    if !try_ip(&lab.relay, &format!("xfrm policy add dst 10.7.0.0/16 dir out {template}")) {
        eprintln!("SKIPPED: this kernel has no IPsec");
        return;
    }
    for (net, all) in [(V4, "10.2.0.0/16"), (V6, "2001:db8:2::/48")] {
        for action in ["pass", "block"] {
            let options = json!({ "tc_action": action });
            let upstream = json!({ "name": "one", "address": net.upstreams[0] });
            let config = config(&[net.rule("only", PORT, options, &[upstream])]);
            lab.try_apply(&config, "").expect(0);
            let before = lab.status()["generation"].clone();
            lab.relay.ip(&format!("xfrm policy add dst {all} dir out priority 9 {template}"));
            // the same file again, then another one
            let refused = lab.try_apply(&config, "").expect(65);
            let allow =
                format!("ip xfrm policy add dst {} proto udp dir out priority 0", net.upstreams[0]);
            refused.says(&["an IPsec policy encrypts packets to", &allow]);
            assert_eq!(lab.status()["generation"], before);
            assert!(lab.run("doctor").stdout.contains("an IPsec policy encrypts packets to"));
            lab.relay.ip(allow.strip_prefix("ip ").expect("a command of ip"));
            lab.try_apply(&config, "").expect(0);
            lab.relay.ip("xfrm policy flush");
        }
    }
}
