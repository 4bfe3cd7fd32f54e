//! XDP: which packets take it, and traffic by it from socket to socket. That it does the same as the program at tc
//! is checked by each case of the packet tables.

use std::net::{IpAddr, Ipv6Addr, UdpSocket};

use serde_json::{Value, json};
use udplb::bpf::types;
use udplb::config::{Action, Key, Mode, Source, Strategy};
use udplb::desired::{Rule, Upstream};

use crate::common::lab::{Lab, Net, V4, V6, upstream};
use crate::common::net::{TTL, bind, expect, own, payload};
use crate::common::service::until;
use crate::common::{Namespace, run};
use crate::forge::Forged;
use crate::packet::Datagram;
use crate::testbed::{
    Case, Fate, GATEWAY_MAC, LOOPBACK, NEAR, NEAR_MAC, PORTS, RELAY_MAC, Testbed, XDP_PASS,
    XDP_REDIRECT, datagram, rule, to,
};

fn block(rule: Rule) -> Case {
    Case::new("block", rule, datagram(), Fate::Sent("forwarded", NEAR_MAC))
}

/// Has tc send the packet of a case, and returns what XDP does with this frame then.
fn xdp(testbed: &Testbed<'_>, case: &Case, frame: &[u8]) -> i32 {
    testbed.run(case);
    testbed.program.run_xdp(frame).action
}

#[test]
fn plain_datagrams_of_block_rules_take_it() {
    Testbed::with(|testbed| {
        let known = || Some(testbed.hop_to(NEAR.into(), 1500, Some(NEAR_MAC)));
        for source in [Source::Vip, Source::Preserve, Source::Egress] {
            let case = Case { known: known(), ..block(rule(Action::Block, source, NEAR)) };
            let action = xdp(testbed, &case, &datagram().frame());
            assert_eq!(action, XDP_REDIRECT, "{source:?}");
        }
        for strategy in [Strategy::SrcIp, Strategy::SrcIpPort, Strategy::Random] {
            let upstreams = vec![to(NEAR, Some(1)), to(NEAR, Some(2))];
            let rule = Rule { upstreams, strategy, ..rule(Action::Block, Source::Preserve, NEAR) };
            let case = Case { known: known(), ..block(rule) };
            // by chance, the packets of before selected one upstream only
            (0..32).for_each(|_| _ = testbed.run(&case));
            let sent = (0..8).any(|_| xdp(testbed, &case, &datagram().frame()) == XDP_REDIRECT);
            assert!(sent, "{strategy:?}");
        }
    });
}

#[test]
fn other_packets_pass_on_to_tc() {
    Testbed::with(|testbed| {
        let known = || Some(testbed.hop_by(NEAR.into(), 1500, Some(NEAR_MAC)));
        let plain = rule(Action::Block, Source::Preserve, NEAR);
        let case = Case { known: known(), ..block(plain.clone()) };
        let partial = {
            // the sum of the pseudo-header, as a sender leaves it that has a device compute the rest
            let mut frame = datagram().frame();
            let words =
                frame[26..34].chunks(2).map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])));
            let length = u32::from(u16::from_be_bytes([frame[38], frame[39]]));
            let sum = words.sum::<u32>() + 17 + length;
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
            frame[40..42].copy_from_slice(&sum.to_be_bytes());
            frame
        };
        for (what, frame) in [
            ("for another host", Datagram { to: GATEWAY_MAC, ..datagram() }.frame()),
            ("with a TTL that ends", Datagram { ttl: 1, ..datagram() }.frame()),
            ("without all of its checksum", partial),
            ("cut off", datagram().frame()[..30].to_vec()),
        ] {
            assert_eq!(xdp(testbed, &case, &frame), XDP_PASS, "{what}");
        }
        let replicating = Rule { mode: Mode::Replicate, ..plain.clone() };
        for rule in [Rule { action: Action::Pass, ..plain }, replicating] {
            let case = Case { known: known(), ..block(rule) };
            assert_eq!(xdp(testbed, &case, &datagram().frame()), XDP_PASS, "{:?}", case.rule);
        }
        testbed.run(&case);
        testbed.program.advance();
        let action = testbed.program.run_xdp(&datagram().frame()).action;
        assert_eq!(action, XDP_PASS, "of an earlier epoch");
    });
}

/// Native programs send to devices that take frames only: what others cannot send would be lost.
#[test]
fn frames_go_to_devices_that_take_them() {
    Testbed::with(|testbed| {
        let known = Some(testbed.hop_by(NEAR.into(), 1500, Some(NEAR_MAC)));
        let case = Case { known, ..block(rule(Action::Block, Source::Vip, NEAR)) };
        testbed.program.set_device(LOOPBACK, device(false));
        assert_eq!(xdp(testbed, &case, &datagram().frame()), XDP_PASS);
        testbed.program.set_device(testbed.out, device(true));
        assert_eq!(xdp(testbed, &case, &datagram().frame()), XDP_REDIRECT);
    });
}

fn device(takes_frames: bool) -> types::device {
    types::device { mac: RELAY_MAC, generic: 0, takes_frames: takes_frames.into() }
}

/// Returns a configuration with XDP whose rules have `block`, for both families.
fn config(mode: &str) -> Value {
    let rules = [V4, V6].map(|net| {
        let options = json!({ "tc_action": "block", "source": "preserve" });
        net.rule(&format!("{}", net.key), 5000, options, &[upstream(net.upstreams[0], 6000)])
    });
    json!({ "version": 1, "interfaces": [{ "name": "eth0", "xdp": mode }], "rules": rules })
}

/// Sends until XDP has sent a packet of each family, if it is to; checks payload, source and TTL of each.
fn check(lab: &Lab, takes_xdp: bool) {
    for net in [V4, V6] {
        let receiver = bind(&lab.upstream, net.upstreams[0], 6000);
        let sender = bind(&lab.client, net.clients[0], 0);
        let before = sent(lab);
        let mut round = 0;
        until("a packet by XDP", || {
            round += 1;
            for length in [0, 1, 500, 1000 + round % 7] {
                check_one(&sender, &receiver, net, length);
            }
            sent(lab) > before || (!takes_xdp && round > 5)
        });
        assert_eq!(sent(lab) > before, takes_xdp, "{}", net.key);
    }
}

fn check_one(sender: &UdpSocket, receiver: &UdpSocket, net: Net, length: usize) {
    let payload = payload(length);
    sender.send_to(&payload, (net.key, 5000)).expect("sent");
    expect(receiver, &payload, own(sender), TTL - 1);
}

/// Returns the number of packets that XDP has sent.
fn sent(lab: &Lab) -> u64 {
    lab.status()["xdp"]["packets"].as_u64().expect("XDP is on")
}

/// A veth takes frames if its peer receives by NAPI, which GRO switches on.
fn gro(namespace: &Namespace, interface: &str) {
    namespace.enter(|| run("ethtool", ["-K", interface, "gro", "on"]));
}

#[test]
fn sockets_are_served_by_the_kernel_and_by_the_driver() {
    for mode in ["generic", "native"] {
        let lab = Lab::dual(false, false);
        gro(&lab.upstream, "eth0");
        let report = lab.apply(&config(mode));
        assert_eq!(report["warnings"], json!([]), "{mode}");
        check(&lab, true);
        let status = lab.status();
        assert_eq!(status["interfaces"][0]["xdp"], mode);
        assert!(status["xdp"]["share"].as_f64().expect("a share") > 0.0, "{status:#}");
        let forwarded: u64 = [V4, V6]
            .map(|net| {
                lab.packets(&net.key.to_string(), &net.upstreams[0].to_string(), "forwarded")
            })
            .iter()
            .sum();
        assert!(forwarded >= status["xdp"]["packets"].as_u64().expect("a number"));
        let sent = status["xdp"]["packets"].as_u64().expect("a number");
        let metrics = lab.run("metrics").stdout;
        assert!(metrics.contains(&format!("udplb_xdp_packets_total {sent}\n")), "{metrics}");
        lab.run("detach").expect(0);
        assert!(!lab.relay.ip("link show dev eth0").contains("prog/xdp"), "{mode}");
    }
}

/// Virtual senders leave the checksum to a device, which XDP cannot ask: their packets go by tc, whole.
#[test]
fn packets_without_their_checksum_go_by_tc() {
    let lab = Lab::dual(true, false);
    gro(&lab.upstream, "eth0");
    lab.apply(&config("generic"));
    check(&lab, false);
}

/// Nothing is lost where the way out takes no frames, and the warning names it.
#[test]
fn devices_without_frames_are_served_by_tc() {
    let lab = Lab::dual(false, false);
    lab.upstream.enter(|| run("ethtool", ["-K", "eth0", "gro", "off"]));
    let report = lab.apply(&config("native"));
    assert!(report["warnings"].to_string().contains("XDP cannot send to up0"), "{report:#}");
    check(&lab, false);
}

/// While somebody listens, all packets are seen.
#[test]
fn traced_packets_pass_on_to_tc() {
    Testbed::with(|testbed| {
        let known = Some(testbed.hop_by(NEAR.into(), 1500, Some(NEAR_MAC)));
        let case = Case { known, ..block(rule(Action::Block, Source::Vip, NEAR)) };
        assert_eq!(xdp(testbed, &case, &datagram().frame()), XDP_REDIRECT);
        testbed.program.trace();
        testbed.send(&case);
        assert_eq!(testbed.program.run_xdp(&datagram().frame()).action, XDP_PASS);
    });
}

#[test]
fn ipv6_takes_it() {
    Testbed::with(|testbed| {
        let near: Ipv6Addr = "fd00:2::2".parse().expect("an address");
        let vip: Ipv6Addr = "fd00:1::1".parse().expect("an address");
        let key = Key::new(IpAddr::from(vip), vec![PORTS]);
        let rule = Rule::new("six", key, vec![Upstream::new(IpAddr::from(near), None)]);
        let rule = Rule { action: Action::Block, ..rule };
        let sender = "2001:db8::7".parse().expect("an address");
        let frame = Forged::between(RELAY_MAC, sender, vip.into(), PORTS.first).frame();
        let case = Case::new("six", rule, frame.clone(), Fate::Unmatched);
        let known = Some(testbed.hop_to(near.into(), 1500, Some(NEAR_MAC)));
        assert_eq!(xdp(testbed, &Case { known, ..case }, &frame), XDP_REDIRECT);
    });
}
