//! Fragmented datagrams, from socket to socket.

use std::net::{IpAddr, UdpSocket};

use serde_json::json;

use crate::common::kinds::{KINDS, all_kinds, options, rules};
use crate::common::lab::{Lab, Net, V4, V6, config};
use crate::common::net::{
    TTL, bind, expect, expect_silence_of, own, payload, receive_any, send_frame, set,
};
use crate::common::service::Arpd;
use crate::ends::Ends;
use crate::forge::{Forged, fragments};

#[test]
fn large_datagrams_arrive_whole() {
    for offload in [true, false] {
        let lab = Lab::dual(offload, false);
        lab.apply(&all_kinds());
        for ends in Ends::both(&lab) {
            ends.check_length(9000);
            ends.check_count(&lab, "forwarded", 7);
            for length in [1453, 1473, 2000, 30_000, 65_000] {
                ends.check_length(length);
            }
            if !ends.net.is_ipv6() {
                // without "do not fragment"
                let off = libc::IP_PMTUDISC_DONT;
                set(&ends.sender, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, off);
                ends.check_length(9000);
            }
            ends.check_silence();
        }
        let _arpd = Arpd::start(&lab, "");
        for ends in Ends::both(&lab) {
            ends.check_length(9000);
            ends.check_silence();
        }
    }
}

#[test]
fn fragments_pass_or_drop_as_the_rule_says() {
    let lab = Lab::dual(true, false);
    let words = ["pass", "drop"];
    let rules = [V4, V6].map(|net| {
        let mut rules = rules(&net);
        for (rule, word) in rules.iter_mut().zip(words.iter().cycle()) {
            rule["options"]["fragments"] = json!(word);
        }
        rules
    });
    lab.apply(&config(&rules.concat()));
    for ends in Ends::both(&lab) {
        for (index, (port, ..)) in KINDS.into_iter().enumerate() {
            let payload = payload(9000);
            ends.sender.send_to(&payload, (ends.net.key, port)).expect("sent");
            if words[index % 2] == "pass" {
                expect(&ends.here[index], &payload, own(&ends.sender), TTL);
            }
        }
        ends.check_silence();
        // unfragmented datagrams are forwarded
        ends.check_length(1000);
    }
}

/// Returns a datagram from a client to the relay.
fn datagram(lab: &Lab, net: &Net, from: IpAddr, port: u16, length: usize, first: u16) -> Forged {
    let mut datagram = Forged::between(lab.relay.mac("eth0"), from, net.key, port);
    datagram.udp.payload = length;
    datagram.udp.first = first;
    datagram
}

/// Two senders share port and identification, and the rewritten source address.
#[test]
fn senders_with_one_source_do_not_mix() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        let net = ends.net;
        for (index, (port, ..)) in KINDS.into_iter().enumerate() {
            let frames = [0, 1].map(|client: usize| {
                let from = net.clients[client];
                datagram(&lab, &net, from, port, 4000, client as u16)
            });
            let parts = frames.each_ref().map(|frame| fragments(&frame.frame(), 1400, 0x1234));
            for (one, other) in parts[0].iter().zip(&parts[1]) {
                send_frame(&lab.client, "eth0", one);
                send_frame(&lab.client, "eth0", other);
            }
            for (client, frame) in net.clients.into_iter().zip(&frames) {
                let sender = (client, 5666).into();
                ends.expect(index, &frame.payload(), sender);
            }
        }
        ends.check_silence();
    }
}

/// Fragments arrive in any order after the first, twice, and interleaved with another datagram.
#[test]
fn unordered_fragments_arrive_whole() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        let net = ends.net;
        for (index, (port, ..)) in KINDS.into_iter().enumerate() {
            let from = net.clients[0];
            let frame = datagram(&lab, &net, from, port, 9000, 0);
            let parts = fragments(&frame.frame(), 1400, 77);
            for part in [0, 6, 3, 5, 1, 2, 4] {
                if part == 3 {
                    ends.sender.send_to(b"between", (net.key, port)).expect("sent");
                    ends.expect(index, b"between", own(&ends.sender));
                }
                send_frame(&lab.client, "eth0", &parts[part]);
            }
            let sender = (from, 5666).into();
            ends.expect(index, &frame.payload(), sender);
        }
        ends.check_silence();
    }
}

/// Copies to the upstreams depend on the first fragment arriving first; this host reassembles the
/// datagram in any case.
#[test]
fn first_fragment_last_reaches_the_host() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        for (index, (port, action, _)) in KINDS.into_iter().enumerate() {
            let from = ends.net.clients[0];
            let frame = datagram(&lab, &ends.net, from, port, 4000, 0);
            for part in fragments(&frame.frame(), 1400, 78).iter().rev() {
                send_frame(&lab.client, "eth0", part);
            }
            if action == "pass" {
                expect(&ends.here[index], &frame.payload(), (from, 5666), TTL);
            }
        }
    }
}

/// The first fragment passes one generation, the later fragments the next one.
#[test]
fn new_generation_between_fragments_loses_nothing() {
    let lab = Lab::dual(true, false);
    let with = |upstreams: &[u16]| {
        let rules = [V4, V6].map(|net| {
            let upstreams: Vec<_> = upstreams
                .iter()
                .map(|port| json!({ "address": net.upstreams[0], "port": port }))
                .collect();
            let name = if net.is_ipv6() { "6" } else { "4" };
            let mut options = options("block", "vip");
            options["hash"] = json!("maglev");
            net.rule(name, 5000, options, &upstreams)
        });
        config(&rules)
    };
    lab.apply(&with(&[7000, 7001, 7002, 7003]));
    let sockets = |net: &Net| -> Vec<UdpSocket> {
        (7000..7004).map(|port| bind(&lab.upstream, net.upstreams[0], port)).collect()
    };
    let nets = [V4, V6].map(|net| (net, sockets(&net)));
    let frames = [V4, V6].map(|net| {
        (0..8)
            .map(|first| datagram(&lab, &net, net.clients[0], 5000, 4000, first))
            .collect::<Vec<_>>()
    });
    let send = |parts: std::ops::Range<usize>| {
        for frames in &frames {
            for (identification, frame) in (500..).zip(frames) {
                for part in &fragments(&frame.frame(), 1400, identification)[parts.clone()] {
                    send_frame(&lab.client, "eth0", part);
                }
            }
        }
    };
    send(0..1);
    // the same upstreams in another order, and one more
    lab.apply(&with(&[7003, 7004, 7000, 7002, 7001]));
    send(1..3);
    for ((net, sockets), frames) in nets.iter().zip(&frames) {
        let (index, first) = receive_any(sockets);
        assert!(first.payload == frames[0].payload());
        for frame in &frames[1..] {
            expect(&sockets[index], &frame.payload(), (net.key, 5666), TTL - 1);
        }
        expect_silence_of(sockets);
    }
}
