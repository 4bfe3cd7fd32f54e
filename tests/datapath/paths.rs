//! Next hops that answer late or never, and path MTUs below the interface's: in network namespaces,
//! with sockets at both ends.

use std::io::ErrorKind;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use udplb::datapath::kernel;

use crate::common::Namespace;
use crate::common::kinds::{all_kinds, rules};
use crate::common::lab::{Lab, Net, V4, V6, config, rule};
use crate::common::net::{PATIENCE, bind, set};
use crate::common::service::{Arpd, until};
use crate::ends::Ends;

/// Socket options from linux/in.h and linux/in6.h.
const IP_PMTUDISC_DONT: i32 = 0;
const IP_PMTUDISC_DO: i32 = 2;

fn discover(net: &Net, socket: &UdpSocket, how: i32) {
    match net.is_ipv6() {
        true => set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, how),
        false => set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, how),
    }
}

/// Without forwarding and arpd, packets are sent as soon as the kernel has the neighbour.
#[test]
fn neighbour_that_answers_late_gets_packets() {
    for offload in [true, false] {
        let lab = Lab::dual(offload, offload);
        lab.relay.set_forwarding("0");
        lab.upstream.ip("addr flush dev eth0");
        lab.apply(&all_kinds());
        for address in ["10.2.0.20/24", "2001:db8:2::20/64"] {
            lab.upstream.ip(&format!("addr add {address} dev eth0 nodad"));
        }
        for ends in Ends::both(&lab) {
            let (own, upstream) = (bind(&lab.relay, ends.net.egress, 0), ends.net.upstreams[0]);
            until("the kernel knows the neighbour", || {
                let _ = own.send_to(b"who has", (upstream, 9));
                lab.neighbour(&upstream.to_string()).contains("REACHABLE")
            });
            for length in [0, 1, 700, 1400] {
                ends.check_length(length);
            }
            ends.check_silence();
        }
        for (rule, upstream) in [("pass-vip", "10.2.0.20"), ("pass-vip-6", "2001:db8:2::20")] {
            assert_eq!(lab.packets(rule, upstream, "forwarded"), 4, "{:#}", lab.status());
        }
    }
}

/// Packets are sent after the upstream's MAC address changed and the kernel learnt the new one.
#[test]
fn neighbour_with_a_new_mac_address_gets_packets() {
    let lab = Lab::dual(true, false);
    lab.relay.set_forwarding("0");
    lab.apply(&all_kinds());
    lab.upstream.ip("link set eth0 address 02:00:00:00:77:77");
    lab.relay.ip("neigh flush dev up0");
    for ends in Ends::both(&lab) {
        ends.check_length(100);
        ends.check_silence();
    }
    // the first packet makes the kernel resolve the neighbour
    assert_eq!(lab.packets("pass-vip", "10.2.0.20", "unresolved"), 1, "{:#}", lab.status());
    assert_eq!(lab.packets("block-egress", "10.2.0.20", "forwarded"), 1, "{:#}", lab.status());
}

/// Packets to a silent next hop are counted as such, with and without forwarding, for packets and
/// copies; also if the next hop answered at the time of `apply`.
#[test]
fn silent_next_hop_is_unresolved() {
    for forwarding in ["0", "1"] {
        for action in ["block", "pass"] {
            let lab = Lab::new();
            lab.relay.set_forwarding(forwarding);
            let silent = json!({ "name": "silent", "address": "10.2.0.99", "port": 7000 });
            lab.apply(&config(&[rule("only", 5000, json!({ "tc_action": action }), &[silent])]));
            let sender = bind(&lab.client, V4.clients[0], 0);
            for _ in 0..3 {
                sender.send_to(b"to nobody", (V4.key, 5000)).expect("sent");
            }
            until("three are counted", || lab.packets("only", "silent", "unresolved") == 3);
            assert_eq!(lab.packets("only", "silent", "forwarded"), 0);
            let upstream = json!({ "name": "gone", "address": "10.2.0.20", "port": 7000 });
            lab.apply(&config(&[rule("only", 5000, json!({ "tc_action": action }), &[upstream])]));
            lab.upstream.ip("addr flush dev eth0");
            lab.relay.ip("neigh flush dev up0");
            for _ in 0..3 {
                sender.send_to(b"to nobody", (V4.key, 5000)).expect("sent");
            }
            until("three are counted", || lab.packets("only", "gone", "unresolved") == 3);
            assert_eq!(lab.packets("only", "gone", "forwarded"), 0);
            assert_eq!(lab.packets("only", "gone", "stale-neighbour"), 0);
        }
    }
}

/// Fragmentable packets are fragmented as by a router: whole datagrams and fragments, with checksums
/// from software or hardware.
#[test]
fn datagrams_are_fragmented_for_a_small_mtu() {
    for (client, upstream) in [(true, true), (true, false), (false, true), (false, false)] {
        for forwarding in ["1", "0"] {
            let lab = Lab::with_offload(client, upstream);
            lab.relay.set_forwarding(forwarding);
            lab.relay.ip("link set up0 mtu 1000");
            lab.apply(&config(&rules(&V4)));
            let ends = Ends::new(&lab, V4);
            discover(&V4, &ends.sender, IP_PMTUDISC_DONT);
            for without_checksum in [0, 1] {
                set(&ends.sender, libc::SOL_SOCKET, libc::SO_NO_CHECK, without_checksum);
                for length in [972, 973, 974, 1471, 1472, 1473, 3000, 9001, 35_190] {
                    ends.check_length(length);
                }
            }
            ends.check_silence();
        }
    }
}

/// Creates a network with an MTU of 1400 behind the upstream's host.
fn narrow_network(lab: &Lab) -> Namespace {
    let far = Namespace::new();
    lab.upstream.link("far", &far, "eth0", false);
    lab.upstream.set_forwarding("1");
    for (namespace, device, host) in [(&lab.upstream, "far", "1"), (&far, "eth0", "20")] {
        namespace.ip(&format!("link set {device} mtu 1400"));
        namespace.ip(&format!("addr add 10.3.0.{host}/24 dev {device}"));
        namespace.ip(&format!("addr add 2001:db8:3::{host}/64 dev {device} nodad"));
    }
    far.ip("route add default via 10.3.0.1");
    far.ip("-6 route add default via 2001:db8:3::1");
    for namespace in [&lab.relay, &lab.client] {
        let (v4, v6) = match namespace.name == lab.relay.name {
            true => ("10.2.0.20", "2001:db8:2::20"),
            false => ("10.1.0.1", "2001:db8:1::1"),
        };
        namespace.ip(&format!("route add default via {v4}"));
        namespace.ip(&format!("-6 route add default via {v6}"));
    }
    far
}

fn far_address(net: &Net) -> IpAddr {
    let address = if net.is_ipv6() { "2001:db8:3::20" } else { "10.3.0.20" };
    address.parse().expect("an address")
}

/// Returns a rule of each family for the host in that network.
fn to_far(source: &str) -> [Value; 2] {
    [V4, V6].map(|net| {
        let upstream = json!({ "name": "far", "address": far_address(&net) });
        let options = json!({ "tc_action": "block", "source": source });
        net.rule(if net.is_ipv6() { "six" } else { "four" }, 5000, options, &[upstream])
    })
}

/// Sends large datagrams until the sender's kernel has received the path MTU.
#[track_caller]
fn send_until_told(net: &Net, sender: &UdpSocket, port: u16, what: &str) {
    let end = Instant::now() + PATIENCE;
    loop {
        match sender.send_to(&[7; 1430], (net.key, port)) {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => return,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => panic!("{error}"),
            Ok(_) => {}
        }
        assert!(Instant::now() < end, "{:?} has not heard of it: {what}", net.key);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A router behind the next hop reports the MTU to the relay, and the relay to the sender; smaller
/// packets are forwarded.
#[test]
fn small_path_mtu_behind_the_next_hop_is_answered() {
    for source in ["vip", "egress"] {
        for forwarding in ["0", "1"] {
            let lab = Lab::dual(false, false);
            lab.relay.set_forwarding(forwarding);
            let far = narrow_network(&lab);
            // the router's errors about packets from the relay's egress address arrive on that
            // interface
            let mut configuration = config(&to_far(source));
            configuration["interfaces"] = json!(["eth0", "up0"]);
            lab.apply(&configuration);
            for net in [V4, V6] {
                let receiver = bind(&far, far_address(&net), 5000);
                let sender = bind(&lab.client, net.clients[0], 0);
                discover(&net, &sender, IP_PMTUDISC_DO);
                send_until_told(&net, &sender, 5000, &format!("{source}, forwarding {forwarding}"));
                sender.send_to(&[9; 1300], (net.key, 5000)).expect("sent");
                assert_eq!(crate::common::net::receive(&receiver).payload, [9; 1300]);
            }
        }
    }
}

/// Path MTUs that the kernel has learned for its own traffic apply to upstreams, also while a lease holds.
#[test]
fn path_mtu_of_the_kernel_holds_with_a_lease() {
    if kernel::version() < (5, 12) {
        eprintln!("SKIPPED: this kernel reports no MTU of a route to packets that are larger");
        return;
    }
    let lab = Lab::dual(false, false);
    let _far = narrow_network(&lab);
    lab.apply(&config(&to_far("vip")));
    let _arpd = Arpd::start(&lab, "");
    for net in [V4, V6] {
        // learned by a local socket
        let own = bind(&lab.relay, net.egress, 0);
        discover(&net, &own, IP_PMTUDISC_DO);
        own.connect((far_address(&net), 9)).expect("connected");
        until("the kernel has learned it", || {
            own.send(&[7; 1430]).is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE))
        });
        let sender = bind(&lab.client, net.clients[0], 0);
        discover(&net, &sender, IP_PMTUDISC_DO);
        send_until_told(&net, &sender, 5000, "lease");
    }
}
