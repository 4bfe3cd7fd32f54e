//! Decisions that a CPU remembers under arpd's lease, under traffic: none is used for a packet that was sent after
//! arpd has told of a change, or, where arpd tells nothing more, after its lease has run out.

use std::net::{Ipv4Addr, TcpListener};
use std::thread;

use serde_json::{Value, json};

use crate::common::Namespace;
use crate::common::lab::{Lab, UPSTREAMS, config, rule};
use crate::common::net::bind;
use crate::common::numbered::{AGED, PORT, under_traffic};
use crate::common::service::{Arpd, until};

/// An address beyond either gateway of a [`Fork`].
const FAR: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);

fn to(addresses: &[Ipv4Addr], options: Value) -> Value {
    let upstream = |address| json!({ "name": address, "address": address, "port": 7001 });
    let upstreams: Vec<Value> = addresses.iter().map(upstream).collect();
    config(&[rule("only", PORT, options, &upstreams)])
}

/// A relay with two ways to one address: by the lab's upstream, and by another host.
struct Fork {
    lab: Lab,
    other: Namespace,
}

impl Fork {
    fn new() -> Fork {
        let (lab, other) = (Lab::new(), Namespace::new());
        lab.relay.link("up1", &other, "eth0", true);
        lab.relay.ip("address add 10.3.0.1/24 dev up1");
        other.ip("address add 10.3.0.20/24 dev eth0");
        for host in [&lab.upstream, &other] {
            host.ip(&format!("address add {FAR}/32 dev lo"));
        }
        other.ip("route add default via 10.3.0.1");
        lab.relay.ip(&format!("route add {FAR} via 10.2.0.20 metric 1"));
        lab.apply(&to(&[FAR], json!({ "tc_action": "block" })));
        Fork { lab, other }
    }

    /// Checks that datagrams go by the lab's upstream, and after a change only by the other host.
    #[track_caller]
    fn expect_move(&self, change: impl FnOnce()) {
        let receivers = [&self.lab.upstream, &self.other].map(|host| bind(host, FAR, 7001));
        under_traffic(&self.lab, receivers, |flow| {
            flow.expect_only([true, false]);
            change();
            flow.expect_only([false, true]);
        });
    }

    fn await_gateway(&self, gateway: &str) {
        self.lab.await_hop("10.9.0.1", "gateway", gateway);
        self.lab.await_health("10.9.0.1", "up");
    }
}

#[test]
fn changed_route_is_followed() {
    let fork = Fork::new();
    let _arpd = Arpd::start(&fork.lab, "");
    fork.await_gateway("10.2.0.20");
    fork.expect_move(|| {
        fork.lab.relay.ip(&format!("route replace {FAR} via 10.3.0.20 metric 1"));
        fork.await_gateway("10.3.0.20");
    });
}

#[test]
fn link_that_goes_down_is_left() {
    let fork = Fork::new();
    fork.lab.relay.ip(&format!("route add {FAR} via 10.3.0.20 metric 2"));
    let _arpd = Arpd::start(&fork.lab, "");
    fork.await_gateway("10.2.0.20");
    fork.expect_move(|| {
        fork.lab.relay.ip("link set up0 down");
        fork.await_gateway("10.3.0.20");
    });
}

/// A stopped arpd holds its lease until it runs out; from then on the kernel's routes are asked for.
#[test]
fn lost_lease_is_noticed() {
    let fork = Fork::new();
    let arpd = Arpd::start(&fork.lab, "--lease 1");
    fork.await_gateway("10.2.0.20");
    fork.expect_move(|| {
        arpd.signal(libc::SIGSTOP);
        fork.lab.relay.ip(&format!("route replace {FAR} via 10.3.0.20 metric 1"));
        until("the lease runs out", || fork.lab.status()["arpd"] == false);
        thread::sleep(AGED);
    });
    arpd.end(libc::SIGKILL);
}

#[test]
fn changed_mac_address_is_followed() {
    let lab = Lab::new();
    lab.apply(&to(&UPSTREAMS[..1], json!({ "tc_action": "block" })));
    let _arpd = Arpd::start(&lab, "");
    lab.await_health("10.2.0.20", "up");
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7001));
    under_traffic(&lab, receivers, |flow| {
        flow.expect_only([true, false]);
        lab.upstream.sysctl("net.ipv4.conf.eth0.arp_notify", "1");
        // packets to the old one do not arrive
        lab.upstream.ip("link set eth0 address 02:00:00:00:00:ab");
        lab.await_hop("10.2.0.20", "mac", "02:00:00:00:00:ab");
        flow.expect_only([true, false]);
        lab.relay.ip("neigh replace 10.2.0.20 lladdr 02:00:00:00:00:77 dev up0 nud permanent");
        lab.await_hop("10.2.0.20", "mac", "02:00:00:00:00:77");
        flow.expect_only([false, false]);
    });
}

#[test]
fn failed_service_is_left() {
    const CHECKED: u16 = 7002;
    let lab = Lab::new();
    let listen = |address| {
        lab.upstream.enter(|| TcpListener::bind((address, CHECKED)).expect("a listening socket"))
    };
    let [first, _second] = UPSTREAMS.map(listen);
    let health = json!({ "tcp": CHECKED, "interval": "100ms", "timeout": "100ms", "fall": 1 });
    let options = json!({ "tc_action": "block", "strategy": "random", "health": health });
    lab.apply(&to(&UPSTREAMS, options));
    let _arpd = Arpd::start(&lab, "");
    UPSTREAMS.iter().for_each(|address| lab.await_health(&address.to_string(), "up"));
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7001));
    under_traffic(&lab, receivers, |flow| {
        flow.expect_only([true, true]);
        drop(first);
        lab.await_health("10.2.0.20", "down");
        flow.expect_only([false, true]);
    });
}
