//! ICMP errors to the sender of a datagram that cannot be forwarded.

use std::net::UdpSocket;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::json;
use udplb::datapath::kernel;

use crate::common::kinds::{KINDS, all_kinds};
use crate::common::lab::{Lab, Outcome, V4, V6, config, upstream};
use crate::common::net::{TTL, UDP_SEGMENT, bind, expect, own, payload, set};
use crate::common::service::{Arpd, until};
use crate::ends::{Ends, cuts_up_without_offload};
use crate::kernel::{SentBack, counted, expect_no_error, sent_back, try_sent_back, want_errors};

/// MTU of the upstreams' link.
const NARROW: usize = 1280;

/// Hosts that use checksum offload on the link between client and relay.
#[derive(Clone, Copy)]
enum Offload {
    Nobody,
    Both,
    Client,
}

const OFFLOADS: [Offload; 3] = [Offload::Nobody, Offload::Both, Offload::Client];

fn lab(offload: Offload) -> Lab {
    let lab = Lab::dual(!matches!(offload, Offload::Nobody), false);
    if matches!(offload, Offload::Client) {
        let mut ethtool = lab.relay.command("ethtool");
        Outcome::of(ethtool.args(["-K", "eth0", "tx", "off"])).expect(0);
    }
    lab
}

fn narrow_lab(offload: Offload) -> Lab {
    let lab = lab(offload);
    lab.relay.ip(&format!("link set up0 mtu {NARROW}"));
    lab.upstream.ip(&format!("link set eth0 mtu {NARROW}"));
    lab
}

/// Handling of packets above a learnt path MTU by the sender's kernel: none, fragmentation, or an
/// error.
enum Discovery {
    Off,
    Learns,
    Refuses,
}

fn discover(socket: &UdpSocket, discovery: Discovery) {
    let value = match discovery {
        Discovery::Off => libc::IP_PMTUDISC_DONT,
        Discovery::Learns => libc::IP_PMTUDISC_WANT,
        Discovery::Refuses => libc::IP_PMTUDISC_DO,
    };
    match own(socket).is_ipv4() {
        true => set(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, value),
        false => set(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, value),
    }
}

/// Clears the path MTUs that the client has learnt.
fn forget(lab: &Lab) {
    lab.client.ip("-4 route flush cache");
    lab.client.ip("-6 route flush cache");
}

fn check_too_big(lab: &Lab) {
    for ends in Ends::both(lab) {
        let net = ends.net;
        let headers = if net.is_ipv6() { 48 } else { 28 };
        want_errors(&ends.sender);
        let (fits, large) = (payload(NARROW - headers), payload(1400));
        ends.check(&fits, &[&fits]);
        for (index, (port, action, source)) in KINDS.into_iter().enumerate() {
            let to = (net.key, port);
            forget(lab);
            discover(&ends.sender, Discovery::Refuses);
            ends.sender.send_to(&large, to).expect("sent");
            if action == "pass" {
                expect(&ends.here[index], &large, own(&ends.sender), TTL);
                expect_no_error(&ends.sender);
                continue;
            }
            let error = sent_back(&ends.sender);
            let wanted = SentBack {
                errno: libc::EMSGSIZE,
                kind: if net.is_ipv6() { (2, 0) } else { (3, 4) },
                info: NARROW as u32,
                by: net.key,
                to: to.into(),
                payload: error.payload.clone(),
            };
            assert_eq!(error, wanted);
            assert!(error.payload.len() >= 512 && large.starts_with(&error.payload), "{error:?}");
            until("the sender knows", || match ends.sender.send_to(&large, to) {
                Ok(_) => false,
                Err(error) => error.raw_os_error() == Some(libc::EMSGSIZE),
            });
            ends.check_silence();
            // fragments made for the learnt MTU arrive
            discover(&ends.sender, Discovery::Learns);
            until("it may send again", || ends.sender.send_to(&[], to).is_ok());
            expect(&ends.upstreams[index], &[], net.seen(source, own(&ends.sender)), TTL - 1);
            ends.sender.send_to(&large, to).expect("sent");
            expect(&ends.upstreams[index], &large, net.seen(source, own(&ends.sender)), TTL - 1);
        }
        ends.check_silence();
    }
}

#[test]
fn datagram_above_the_mtu_is_answered() {
    for offload in OFFLOADS {
        let lab = narrow_lab(offload);
        lab.apply(&all_kinds());
        check_too_big(&lab);
        let _arpd = Arpd::start(&lab, "");
        check_too_big(&lab);
    }
}

/// The kernel reports the MTU of a route only from 5.12 on; `apply` warns about older ones. On those no
/// error is sent.
#[test]
fn lowered_mtu_is_answered() {
    let says = kernel::version() >= (5, 12);
    let lab = lab(Offload::Both);
    let applied = lab.try_apply(&all_kinds(), "").expect(0);
    assert_eq!(applied.stderr.contains("does not report the MTU of a route"), !says);
    lab.relay.ip(&format!("link set up0 mtu {NARROW}"));
    for ends in Ends::both(&lab) {
        want_errors(&ends.sender);
        discover(&ends.sender, Discovery::Refuses);
        for (port, ..) in KINDS.into_iter().filter(|(_, action, _)| *action == "block") {
            forget(&lab);
            ends.sender.send_to(&payload(1400), (ends.net.key, port)).expect("sent");
            match says {
                true => assert_eq!(sent_back(&ends.sender).info, NARROW as u32),
                false => expect_no_error(&ends.sender),
            }
        }
    }
}

/// Each segment of a GSO packet is subject to the MTU.
#[test]
fn segments_above_the_mtu_are_answered() {
    for offload in OFFLOADS {
        let lab = narrow_lab(offload);
        if matches!(offload, Offload::Nobody) && !cuts_up_without_offload(&lab) {
            continue;
        }
        lab.apply(&all_kinds());
        for ends in Ends::both(&lab) {
            want_errors(&ends.sender);
            discover(&ends.sender, Discovery::Refuses);
            let segments = payload(3 * 1400);
            for (port, action, _) in KINDS {
                if action == "block" {
                    forget(&lab);
                    // where the sender's kernel segments the datagrams itself, the error is for the
                    // first
                    set(&ends.sender, libc::SOL_UDP, UDP_SEGMENT, 1400);
                    ends.sender.send_to(&segments, (ends.net.key, port)).expect("sent");
                    let error = sent_back(&ends.sender);
                    assert_eq!((error.by, error.info), (ends.net.key, NARROW as u32));
                    assert!(segments.starts_with(&error.payload), "{error:?}");
                    while try_sent_back(&ends.sender).is_ok() {}
                }
            }
            ends.check_silence();
        }
    }
}

/// Datagrams without DF are fragmented, without an error.
#[test]
fn datagram_without_df_is_fragmented() {
    let lab = narrow_lab(Offload::Both);
    lab.apply(&all_kinds());
    let ends = Ends::new(&lab, V4);
    want_errors(&ends.sender);
    discover(&ends.sender, Discovery::Off);
    ends.check_length(1400);
    expect_no_error(&ends.sender);
    ends.check_silence();
    ends.check_count(&lab, "forwarded", 1);
}

/// Sends a datagram with a TTL of one and returns the error.
fn time_exceeded(ends: &Ends, port: u16, payload: &[u8]) -> SentBack {
    SentBack {
        errno: libc::EHOSTUNREACH,
        kind: if ends.net.is_ipv6() { (3, 0) } else { (11, 0) },
        info: 0,
        by: ends.net.key,
        to: (ends.net.key, port).into(),
        payload: payload.into(),
    }
}

#[test]
fn expired_ttl_is_answered() {
    for offload in OFFLOADS {
        let lab = lab(offload);
        lab.apply(&all_kinds());
        for ends in Ends::both(&lab) {
            want_errors(&ends.sender);
            ends.set_ttl(1);
            for (index, (port, action, _)) in KINDS.into_iter().enumerate() {
                for length in [0, 1, 4, 101, 500] {
                    let payload = payload(length);
                    ends.sender.send_to(&payload, (ends.net.key, port)).expect("sent");
                    if action == "pass" {
                        expect(&ends.here[index], &payload, own(&ends.sender), 1);
                        continue;
                    }
                    let error = sent_back(&ends.sender);
                    // up to three bytes at the end may be missing
                    assert!(error.payload.len() + 3 >= length, "{error:?}");
                    let payload = &payload[..error.payload.len()];
                    assert_eq!(error, time_exceeded(&ends, port, payload));
                }
            }
            expect_no_error(&ends.sender);
            ends.check_silence();
            ends.check_count(&lab, "ttl", 5);
        }
    }
}

/// A sender gets errors for packets lost to one receiver, but not for copies, of which others arrived.
#[test]
fn copies_are_not_answered() {
    let lab = narrow_lab(Offload::Both);
    let rules = [V4, V6].map(|net| {
        let name = if net.is_ipv6() { "6" } else { "4" };
        let upstreams = net.upstreams.map(|address| upstream(address, 7000));
        let options = json!({ "tc_action": "block", "mode": "replicate", "source": "vip" });
        net.rule(name, 5000, options, &upstreams)
    });
    lab.apply(&config(&rules));
    for net in [V4, V6] {
        let sender = bind(&lab.client, net.clients[0], 0);
        want_errors(&sender);
        discover(&sender, Discovery::Refuses);
        sender.send_to(&payload(1400), (net.key, 5000)).expect("sent");
        let ttl = if net.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS)
        } else {
            (libc::IPPROTO_IP, libc::IP_TTL)
        };
        set(&sender, ttl.0, ttl.1, 1);
        sender.send_to(b"too far", (net.key, 5000)).expect("sent");
        expect_no_error(&sender);
    }
}

/// A sender gets a burst of 20 errors, then 100 per second.
#[test]
fn answers_are_limited() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for (ends, name) in Ends::both(&lab).into_iter().zip(["IcmpInTimeExcds", "Icmp6InTimeExcds"]) {
        let answers = || counted(&lab.client, name);
        let to = (ends.net.key, 5003);
        ends.set_ttl(1);
        let (mut sent, before, start) = (0, answers(), Instant::now());
        // loops until fewer errors come back than packets were sent, however busy the machine is
        while sent < 200_000 && answers() - before + 200 > sent {
            for _ in 0..500 {
                // the ICMP error for an earlier datagram may be reported here
                sent += u64::from(ends.sender.send_to(b"too far", to).is_ok());
            }
        }
        until("the first ones are there", || answers() - before >= 20);
        let most = 20 + start.elapsed().as_millis() as u64 / 10 + 20;
        let got = answers() - before;
        assert!(got <= most && got < sent, "{got} answers to {sent} datagrams, of {most} at most");
        until("there are answers again", || {
            let before = answers();
            sleep(Duration::from_millis(20));
            let _ = ends.sender.send_to(b"too far", to);
            sleep(Duration::from_millis(20));
            answers() == before + 1
        });
    }
}
