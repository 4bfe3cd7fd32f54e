//! Next hops resolved from the kernel's tables, in network namespaces: both families, link-local
//! addresses, devices without MAC addresses, and egress addresses.

use std::net::IpAddr;

use udplb::config::Address;
use udplb::net::Netlink;
use udplb::net::neighbour::NeighbourKey;
use udplb::net::nexthop::{self, Hop, Macs, NextHop};
use udplb::net::routing::{Senders, Target};

use crate::common::Namespace;
use crate::common::service::until;

/// A host on one link with a neighbour:
///
/// ```text
/// host  10.2.0.1, 2001:db8:2::1, fe80::1 ── 10.2.0.20, .21, 2001:db8:2::20, ::21, fe80::20  neighbour
///                                    eth0   eth0
/// ```
struct Pair {
    host: Namespace,
    neighbour: Namespace,
}

impl Pair {
    fn new() -> Pair {
        let pair = Pair { host: Namespace::new(), neighbour: Namespace::new() };
        for namespace in [&pair.host, &pair.neighbour] {
            namespace.sysctl("net.ipv6.conf.default.accept_dad", "0");
            namespace.sysctl("net.ipv6.conf.default.addr_gen_mode", "1");
        }
        pair.host.link("eth0", &pair.neighbour, "eth0", true);
        for address in ["10.2.0.1/24", "2001:db8:2::1/64", "fe80::1/64"] {
            pair.host.ip(&format!("addr add {address} dev eth0"));
        }
        for address in [
            "10.2.0.20/24",
            "10.2.0.21/24",
            "2001:db8:2::20/64",
            "2001:db8:2::21/64",
            "fe80::20/64",
        ] {
            pair.neighbour.ip(&format!("addr add {address} dev eth0"));
        }
        // a new link drops the first packets
        until("the neighbour answers", || {
            matches!(pair.hop("2001:db8:2::20").macs, Macs::Known { .. })
        });
        pair
    }

    fn ask<T: Send>(&self, question: impl AsyncFnOnce(Netlink) -> T + Send) -> T {
        self.host.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .expect("a runtime")
                .block_on(async { question(Netlink::open().expect("netlink")).await })
        })
    }

    fn way(&self, address: &str) -> NextHop {
        let address: Address = address.parse().expect("an address");
        let target = Target { address, senders: Senders::Own };
        let ways = self.ask(async |netlink| {
            nexthop::resolve(&netlink, [target.clone()], &["eth0".into()]).await.expect("ways")
        });
        ways[&target].clone()
    }

    #[track_caller]
    fn hop(&self, address: &str) -> Hop {
        match self.way(address) {
            NextHop::Hop(hop) => hop,
            way => panic!("{address}: {way:?}"),
        }
    }

    /// Checks interface, neighbour, egress address and MTU of the next hop to an address; the MAC
    /// address is known.
    #[track_caller]
    fn check(&self, address: &str, gateway: &str, egress: &str, mtu: u32) {
        let hop = self.hop(address);
        let macs =
            Macs::Known { own: self.host.mac("eth0"), neighbour: self.neighbour.mac("eth0") };
        let wanted = Hop {
            interface: "eth0".into(),
            ifindex: self.host.index("eth0"),
            gateway: ip(gateway),
            mtu,
            egress: Some(ip(egress)),
            macs,
        };
        assert_eq!(hop, wanted, "{address}");
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn neighbours_and_gateways_are_resolved() {
    let pair = Pair::new();
    pair.check("10.2.0.20", "10.2.0.20", "10.2.0.1", 1500);
    pair.check("2001:db8:2::20", "2001:db8:2::20", "2001:db8:2::1", 1500);
    for route in [
        "10.9.0.0/24 via 10.2.0.20 mtu 1400",
        "2001:db8:9::/64 via 2001:db8:2::20 mtu 1400",
        "2001:db8:a::/64 via fe80::20 dev eth0",
        "10.10.0.0/24 via 10.2.0.20 src 10.2.0.7",
        "10.11.0.0/24 via inet6 fe80::20 dev eth0",
    ] {
        // an address used as `src` must exist
        pair.host.ip("addr replace 10.2.0.7/24 dev eth0");
        pair.host.ip(&format!("route add {route}"));
    }
    pair.check("10.9.0.1", "10.2.0.20", "10.2.0.1", 1400);
    pair.check("2001:db8:9::1", "2001:db8:2::20", "2001:db8:2::1", 1400);
    pair.check("2001:db8:a::1", "fe80::20", "2001:db8:2::1", 1500);
    pair.check("10.10.0.1", "10.2.0.20", "10.2.0.7", 1500);
    pair.check("10.11.0.1", "fe80::20", "10.2.0.1", 1500);
    // an MTU as a router advertises it
    pair.host.sysctl("net.ipv6.conf.eth0.mtu", "1300");
    pair.check("2001:db8:2::20", "2001:db8:2::20", "2001:db8:2::1", 1300);
    pair.check("10.2.0.20", "10.2.0.20", "10.2.0.1", 1500);
}

#[test]
fn policy_rules_and_nexthop_objects_are_resolved() {
    let pair = Pair::new();
    pair.host.ip("-6 route add 2001:db8:9::/64 via 2001:db8:2::21 table 100");
    pair.host.ip("-6 rule add to 2001:db8:9::/64 lookup 100");
    pair.check("2001:db8:9::1", "2001:db8:2::21", "2001:db8:2::1", 1500);
    pair.host.ip("nexthop add id 7 via 2001:db8:2::20 dev eth0");
    pair.host.ip("-6 route add 2001:db8:b::/64 nhid 7");
    pair.check("2001:db8:b::1", "2001:db8:2::20", "2001:db8:2::1", 1500);
}

/// The kernel lists the paths in any order; all hosts must choose the same path.
#[test]
fn multipath_choice_is_stable() {
    let pair = Pair::new();
    pair.host.ip("-6 route add 2001:db8:9::/64 nexthop via 2001:db8:2::21 dev eth0 \
         nexthop via 2001:db8:2::20 dev eth0");
    for host in 1..20 {
        let hop = pair.hop(&format!("2001:db8:9::{host}"));
        assert_eq!(hop.gateway, ip("2001:db8:2::20"));
    }
}

/// Each of several paths has its own egress address.
#[test]
fn egress_address_is_of_the_path() {
    let pair = Pair::new();
    pair.host.link("eth1", &pair.neighbour, "eth1", true);
    pair.host.ip("addr add 10.3.0.1/24 dev eth1");
    pair.host.ip("addr add 2001:db8:3::1/64 dev eth1");
    pair.host.ip("route add 10.9.0.0/24 nexthop via 10.2.0.20 nexthop via 10.3.0.20");
    pair.host
        .ip("-6 route add 2001:db8:9::/64 nexthop via 2001:db8:2::20 nexthop via 2001:db8:3::20");
    for (address, own) in [
        ("10.9.0.1", ["10.2.0.1", "10.3.0.1"]),
        ("2001:db8:9::1", ["2001:db8:2::1", "2001:db8:3::1"]),
    ] {
        let paths = pair.ask(async |netlink| {
            let links = netlink.links().await.expect("links");
            let links = links.into_iter().map(|link| (link.index, link)).collect();
            netlink.paths(&[address.parse().expect("an address")], &links).expect("answers")
        });
        let paths = paths.into_iter().next().expect("an answer").expect("paths");
        let egress: Vec<_> = paths.iter().filter_map(|path| path.egress).collect();
        assert_eq!(egress, own.map(ip));
    }
}

/// Link-local addresses are on their link, whatever the routing tables contain.
#[test]
fn link_local_addresses_are_resolved() {
    let pair = Pair::new();
    pair.check("fe80::20%eth0", "fe80::20", "fe80::1", 1500);
    pair.host.ip("-6 rule add pref 1 to fe80::/10 lookup 100");
    pair.host.ip("-6 route add default via 2001:db8:2::21 dev eth0 table 100");
    let hop = pair.hop("fe80::20%eth0");
    assert_eq!((hop.gateway, hop.interface.as_str()), (ip("fe80::20"), "eth0"));
    let none = |address: &str| match pair.way(address) {
        NextHop::None(reason) => reason,
        way => panic!("{address}: {way:?}"),
    };
    assert_eq!(none("fe80::20%eth7"), "there is no interface eth7");
    assert_eq!(pair.way("fe80::1%eth0"), NextHop::Local);
}

#[test]
fn own_and_unroutable_addresses_are_recognised() {
    let pair = Pair::new();
    assert_eq!(pair.way("2001:db8:2::1"), NextHop::Local);
    pair.host.ip("-6 route add unreachable 2001:db8:c::/64");
    pair.host.ip("-6 route add blackhole 2001:db8:d::/64");
    for address in ["2001:db8:c::1", "2001:db8:d::1", "2001:db8:ffff::1", "10.77.0.1"] {
        assert!(
            matches!(pair.way(address), NextHop::None(_)),
            "{address}: {:?}",
            pair.way(address)
        );
    }
}

#[test]
fn devices_without_mac_addresses_are_resolved() {
    let pair = Pair::new();
    pair.host.ip("tuntap add tun0 mode tun");
    pair.host.ip("tuntap add tun1 mode tun");
    pair.host.ip("addr add 10.4.0.1/24 dev tun0");
    pair.host.ip("addr add 10.5.0.1 peer 10.5.0.2 dev tun1");
    pair.host.ip("addr add 2001:db8:4::1/64 dev tun0 nodad");
    for name in ["tun0", "tun1"] {
        pair.host.ip(&format!("link set {name} up"));
    }
    pair.host.ip("route add 10.6.0.0/24 via 10.5.0.2 dev tun1");
    for (address, interface, gateway, own) in [
        ("10.4.0.9", "tun0", "10.4.0.9", "10.4.0.1"),
        ("2001:db8:4::9", "tun0", "2001:db8:4::9", "2001:db8:4::1"),
        ("10.5.0.2", "tun1", "10.5.0.2", "10.5.0.1"),
        ("10.6.0.9", "tun1", "10.5.0.2", "10.5.0.1"),
    ] {
        let hop = pair.hop(address);
        assert_eq!(
            (hop.interface.as_str(), hop.gateway, hop.egress, hop.macs),
            (interface, ip(gateway), Some(ip(own)), Macs::None),
            "{address}"
        );
    }
}

/// A neighbour's router flag survives every kind of probe.
#[test]
fn probe_keeps_the_router_flag() {
    use udplb::net::neighbour::{Batches, NeighbourRequest};
    let pair = Pair::new();
    // no host answers, so the flag cannot be set again
    pair.host.ip("neigh add fe80::77 lladdr 02:00:00:00:00:77 router nud stale dev eth0");
    let key: NeighbourKey = (pair.host.index("eth0"), ip("fe80::77"));
    for request in [NeighbourRequest::Keep, NeighbourRequest::Probe, NeighbourRequest::Release] {
        let results = pair.host.enter(|| {
            Batches::open().expect("a socket").neighbours(&[(key, request)]).expect("answers")
        });
        results.into_iter().for_each(|result| result.expect("it is done"));
        let entry = pair.host.ip("-d neigh show fe80::77");
        assert!(entry.contains("router"), "{request:?}: {entry}");
        assert_eq!(entry.contains("managed"), request != NeighbourRequest::Release, "{entry}");
    }
}

#[test]
fn broadcast_addresses_are_read() {
    let pair = Pair::new();
    pair.host.ip("addr add 10.7.0.1/30 brd 10.7.0.9 dev eth0");
    pair.host.ip("addr add 10.8.0.0/31 dev eth0");
    pair.host.ip("addr add 10.5.0.1 peer 10.6.0.0/25 dev eth0");
    let found = pair.ask(async |netlink| netlink.addresses().await.expect("addresses"));
    let broadcast = |address: &str| {
        let own = found.iter().find(|own| own.address == ip(address));
        own.unwrap_or_else(|| panic!("no {address} in {found:?}")).broadcast
    };
    assert_eq!(broadcast("10.2.0.1"), Some(ip("10.2.0.255")));
    assert_eq!(broadcast("10.7.0.1"), Some(ip("10.7.0.9")));
    assert_eq!(broadcast("10.8.0.0"), None);
    assert_eq!(broadcast("10.5.0.1"), Some(ip("10.6.0.127")));
    assert_eq!(broadcast("2001:db8:2::1"), None);
}
