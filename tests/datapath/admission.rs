//! Packets that no rule accepts: answers, this host's own packets, other VLANs, and answers to local
//! sockets; from socket to socket.

use std::net::IpAddr;

use serde_json::{Value, json};
use udplb::datapath::kernel;

use crate::common::lab::{Lab, Net, V4, V6, config, packets};
use crate::common::net::{
    TTL, bind, expect, expect_silence, expect_silence_of, own, receive, send_frame,
};
use crate::common::service::{Arpd, until};
use crate::common::wire::Tag;
use crate::forge::{Forged, Ip};

/// Returns the packets of the first rule with a verdict.
fn counted(lab: &Lab, verdict: &str) -> u64 {
    packets(&lab.status()["rules"][0]["counters"], verdict)
}

fn rule(net: &Net, port: Value, options: Value, upstreams: &[IpAddr]) -> Value {
    let upstream = |address: &IpAddr| json!({ "address": address });
    let upstreams: Vec<Value> = upstreams.iter().map(upstream).collect();
    let mut rule = net.rule("only", 0, options, &upstreams);
    rule["key"]["port"] = port;
    rule
}

/// Answers of upstreams do not match the rule: one packet in, one packet out.
#[test]
fn answers_of_upstreams_are_not_relayed() {
    let lab = Lab::dual(true, true);
    for net in [V4, V6] {
        for options in [
            json!({ "tc_action": "block" }),
            json!({ "tc_action": "pass" }),
            json!({ "tc_action": "block", "mode": "replicate", "source": "vip" }),
        ] {
            let rule = rule(&net, json!("5060-5061"), options.clone(), &net.upstreams[..1]);
            let mut config = config(&[rule]);
            config["interfaces"] = json!(["eth0", "up0"]);
            lab.apply(&config);
            let before = counted(&lab, "loop");
            let sender = bind(&lab.client, net.clients[0], 5061);
            let service = bind(&lab.upstream, net.upstreams[0], 5060);
            let here = bind(&lab.relay, net.key, 5061);
            sender.send_to(b"ask", (net.key, 5060)).expect("sent");
            let asked = receive(&service);
            service.send_to(b"answer", asked.from).expect("sent");
            until("the answer is counted", || counted(&lab, "loop") == before + 1);
            if options["tc_action"] == "pass" {
                expect(&here, b"answer", (net.upstreams[0], 5060), TTL);
            }
            expect_silence_of([&service, &sender, &here]);
        }
    }
}

/// `block` takes packets to local servers and leaves local sockets the answers to their own packets.
#[test]
fn local_sockets_get_their_answers() {
    let lab = Lab::dual(true, true);
    for net in [V4, V6] {
        for port in [json!("any"), json!("1024-65535")] {
            let block = json!({ "tc_action": "block" });
            let config = config(&[rule(&net, port, block, &net.upstreams[..1])]);
            let applied = lab.try_apply(&config, "").expect(0);
            // before 6.2 the program cannot see whether the kernel chose a socket's port
            let sees_ports = kernel::version() >= (6, 2);
            let warning = "takes answers to this host's own questions";
            assert_eq!(applied.stderr.contains(warning), !sees_ports, "{applied:?}");
            let before = counted(&lab, "local-socket");
            let peer = bind(&lab.client, net.clients[0], 5353);
            let stranger = bind(&lab.client, net.clients[1], 5353);
            let asking = bind(&lab.relay, net.key, 0);
            if sees_ports {
                asking.send_to(b"ask", own(&peer)).expect("sent");
                let asked = receive(&peer);
                peer.send_to(b"answer", asked.from).expect("sent");
                expect(&asking, b"answer", own(&peer), TTL);
            }
            // a connected socket gets only its peer's packets
            let connected = bind(&lab.relay, net.key, 40_123);
            connected.connect(own(&peer)).expect("connected");
            let service = bind(&lab.upstream, net.upstreams[0], 40_123);
            peer.send_to(b"answer", own(&connected)).expect("sent");
            expect(&connected, b"answer", own(&peer), TTL);
            stranger.send_to(b"traffic", own(&connected)).expect("sent");
            expect(&service, b"traffic", net.seen("vip", own(&stranger)), TTL - 1);
            assert_eq!(counted(&lab, "local-socket"), before + 1 + u64::from(sees_ports));
            // an unconnected socket with its own port is a server
            let server = bind(&lab.relay, net.key, 40_124);
            let service = bind(&lab.upstream, net.upstreams[0], 40_124);
            peer.send_to(b"traffic", own(&server)).expect("sent");
            expect(&service, b"traffic", net.seen("vip", own(&peer)), TTL - 1);
            expect_silence_of([&server, &asking, &connected]);
        }
    }
}

/// Rules for a single port skip the socket lookup.
#[test]
fn single_port_belongs_to_the_rule() {
    let lab = Lab::new();
    let block = json!({ "tc_action": "block" });
    lab.apply(&config(&[rule(&V4, json!(40_123), block, &V4.upstreams[..1])]));
    let peer = bind(&lab.client, V4.clients[0], 5353);
    let connected = bind(&lab.relay, V4.key, 40_123);
    connected.connect(own(&peer)).expect("connected");
    let service = bind(&lab.upstream, V4.upstreams[0], 40_123);
    peer.send_to(b"traffic", own(&connected)).expect("sent");
    expect(&service, b"traffic", V4.seen("vip", own(&peer)), TTL - 1);
    expect_silence(&connected);
}

/// Devices and addresses added while arpd runs take effect.
#[test]
fn own_vlans_and_addresses_are_followed() {
    let lab = Lab::dual(false, true);
    let add_vlan = |id: u16| {
        let words = format!("link add link eth0 name eth0.{id} up type vlan id {id}");
        lab.relay.command("ip").args(words.split(' ')).status().expect("ip").success()
    };
    // a kernel without 802.1Q has no VLANs
    let has_vlans = add_vlan(7);
    let block = json!({ "tc_action": "block" });
    lab.apply(&config(&[rule(&V4, json!(5000), block, &V4.upstreams[..1])]));
    let service = bind(&lab.upstream, V4.upstreams[0], 5000);
    let mac = lab.relay.mac("eth0");
    let send = |source: IpAddr, vlan: Option<u16>| {
        let mut frame = Forged::between(mac, source, V4.key, 5000);
        frame.tags = vlan.map(|id| Tag { protocol: 0x8100, control: id }).into_iter().collect();
        if let Ip::V4(ip) = &mut frame.ip {
            ip.ttl = TTL as u8;
        }
        send_frame(&lab.client, "eth0", &frame.frame());
        frame.payload()
    };
    let of_client = V4.clients[0];
    let goes = |vlan| {
        let payload = send(of_client, vlan);
        expect(&service, &payload, (V4.key, 5666), TTL - 1);
    };
    goes(None);
    goes(Some(0));
    if has_vlans {
        goes(Some(7));
    }
    send(of_client, Some(8));
    until("it is for others", || counted(&lab, "not-for-us") == 1);
    send(V4.egress, None);
    until("it is this host's", || counted(&lab, "loop") == 1);
    let later: IpAddr = "10.9.9.9".parse().expect("an address");
    let payload = send(later, None);
    expect(&service, &payload, (V4.key, 5666), TTL - 1);

    let _arpd = Arpd::start(&lab, "");
    let eighth = if has_vlans && add_vlan(8) { Some(8) } else { None };
    lab.relay.ip("addr add 10.9.9.9/32 dev up0");
    until("arpd has seen both", || {
        let all = || ["forwarded", "loop", "not-for-us"].map(|verdict| counted(&lab, verdict));
        let before = all();
        send(of_client, eighth);
        send(later, None);
        until("both are counted", || all().iter().sum::<u64>() == before.iter().sum::<u64>() + 2);
        all() == [before[0] + 1, before[1] + 1, before[2]]
    });
    if !has_vlans {
        return;
    }
    lab.relay.ip("link del eth0.7");
    until("arpd has seen that it is gone", || {
        let before = counted(&lab, "not-for-us");
        send(of_client, Some(7));
        std::thread::sleep(std::time::Duration::from_millis(20));
        counted(&lab, "not-for-us") > before
    });
}
