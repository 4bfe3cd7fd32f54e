//! Answers of upstreams: `reply: route` and `reply: direct`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use udplb::config::{Action, Key, Ports, Reply, Source, Via};
use udplb::desired::{Desired, Rule, RuleIds, Upstream};

use crate::answers::{
    CLIENTS, REFUSED, VIPS, ask, ask_for_many, check_error, check_kinds, datagram, expect_refused,
    icmp_error, ip6, replying, run,
};
use crate::common::lab::{Lab, Net, Outcome, V4, V6, packets};
use crate::common::net::{TTL, UDP_NO_CHECK6_RX, bind, expect, own, payload, receive, set};
use crate::common::wire::Tag;
use crate::common::{Bpffs, Namespace, udplb};
use crate::ends::cuts_up_without_offload;
use crate::forge::{Checksum, Forged, Ip, fragments};
use crate::program::{Context, Counted, Program, Run};
use crate::testbed::{
    CLIENT, GATEWAY_MAC, NARROW, NEAR, NEAR_MAC, OUT_MAC, OWN, OWN6, REDIRECT, RELAY_MAC, SHOT,
    Testbed, UNSPEC,
};

/// Upstreams of the tables, on the link of the packets.
const UPSTREAM: [IpAddr; 2] = [ip4([10, 0, 1, 9]), ip6([0xfd00, 1, 0, 0, 0, 0, 0, 9])];

const fn ip4(octets: [u8; 4]) -> IpAddr {
    IpAddr::V4(std::net::Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]))
}

fn one(port: u16) -> Ports {
    Ports { first: port, last: port }
}

/// Returns a rule of each family from port 53 to 5353 of the upstream, and one for a range of ports.
fn rules() -> Vec<Rule> {
    let families = (0..2).flat_map(|family| {
        let rule = |name: &str, ports, port| {
            let key = Key::new(VIPS[family], vec![ports]);
            let rule = Rule::new(
                format!("{name}{family}"),
                key,
                vec![Upstream::new(UPSTREAM[family], port)],
            );
            Rule { action: Action::Block, source: Source::Preserve, reply: Reply::Route, ..rule }
        };
        [rule("one", one(53), Some(5353)), rule("range", Ports { first: 2055, last: 2058 }, None)]
    });
    families.collect()
}

/// Returns the answer of a family's upstream from this port, as it arrives.
fn answer(family: usize, port: u16) -> Forged {
    let mut answer = Forged::between(RELAY_MAC, UPSTREAM[family], CLIENTS[family], 40000);
    answer.udp.source = port;
    answer
}

fn configure(program: &Program<'_>, rules: Vec<Rule>) -> Vec<RuleIds> {
    program.configure_all(&Desired { rules, ..Desired::default() }, &BTreeMap::new(), 0)
}

#[test]
fn answers_come_from_the_key() {
    Testbed::with(|testbed| {
        let ids = configure(&testbed.program, rules());
        for family in 0..2 {
            for (place, from, to) in [(0, 5353, 53), (1, 2055, 2055), (1, 2058, 2058)] {
                let id = ids[family * 2 + place].answers[0];
                let ends = ((VIPS[family], to), (CLIENTS[family], 40000), GATEWAY_MAC);
                check_kinds(testbed, &answer(family, from), ends, id);
            }
        }
    });
}

#[test]
fn other_packets_are_no_answers() {
    Testbed::with(|testbed| {
        configure(&testbed.program, rules());
        for family in 0..2 {
            let from = |port| answer(family, port);
            let stranger = match family {
                0 => ip4([10, 0, 1, 10]),
                _ => ip6([0xfd00, 1, 0, 0, 0, 0, 0, 10]),
            };
            let between = |source, destination| {
                let mut packet = Forged::between(RELAY_MAC, source, destination, 40000);
                packet.udp.source = 5353;
                packet
            };
            let packets = [
                ("the key's port", from(53)),
                ("below the range", from(2054)),
                ("above the range", from(2059)),
                ("another host", between(stranger, CLIENTS[family])),
                ("to this host", between(UPSTREAM[family], VIPS[family])),
                ("another frame", Forged { to: [2, 0, 0, 0, 9, 9], ..from(5353) }),
            ];
            for (name, packet) in packets {
                let wanted = Run { action: UNSPEC, frame: packet.frame(), tag: None };
                assert_eq!(run(testbed, &packet), (wanted, Counted::new()), "{name} {family}");
            }
        }
    });
}

/// A rule for some senders translates only the answers to them.
#[test]
fn answers_to_strangers_of_a_rule_stay() {
    let mut rules = rules();
    for rule in &mut rules {
        let network = if rule.family() == udplb::config::Family::V4 {
            "198.51.100.0/24"
        } else {
            "2001:db8::/32"
        };
        rule.key.from = vec![network.parse().expect("a network")];
    }
    Testbed::with(|testbed| {
        configure(&testbed.program, rules.clone());
        for family in 0..2 {
            let packet = answer(family, 5353);
            assert_eq!(run(testbed, &packet).0.action, UNSPEC);
        }
        // there is no route to this client
        let mut packet = Forged::between(RELAY_MAC, UPSTREAM[0], CLIENT.into(), 40000);
        packet.udp.source = 5353;
        assert_eq!(run(testbed, &packet).0.action, SHOT);
    });
}

#[test]
fn answers_that_cannot_be_sent_are_counted() {
    Testbed::with(|testbed| {
        let ids = configure(&testbed.program, rules());
        let id = ids[0].answers[0];
        let change = |change: &dyn Fn(&mut Forged)| {
            let mut packet = answer(0, 5353);
            change(&mut packet);
            packet
        };
        // the sender of one that is too old or too long hears of it
        let old = change(&|it| {
            if let Ip::V4(ip) = &mut it.ip {
                ip.ttl = 1;
            }
        });
        let long = change(&|it| {
            it.udp.payload = 1001 - 28;
            if let Ip::V4(ip) = &mut it.ip {
                (ip.destination, ip.flags) = (NARROW, 2);
            }
        });
        let short = change(&|it| it.udp.length = crate::forge::Length::Is(7));
        for (verdict, packet, action, kind) in [
            ("ttl", old, REDIRECT, Some((11, 0))),
            ("mtu", long, REDIRECT, Some((3, 4))),
            ("malformed", short, SHOT, None),
        ] {
            let (run, counted) = run(testbed, &packet);
            assert_eq!(run.action, action, "{verdict}");
            assert_eq!(counted.keys().collect::<Vec<_>>(), [&(id, verdict)]);
            if let Some((kind, code)) = kind {
                assert_eq!((run.frame[34], run.frame[35]), (kind, code));
                // it quotes what the upstream had sent
                assert_eq!(run.frame[42..70], packet.frame()[14..42]);
            }
        }
    });
}

#[test]
fn fragments_of_answers_follow_the_first() {
    Testbed::with(|testbed| {
        let ids = configure(&testbed.program, rules());
        for family in 0..2 {
            let mut whole = answer(family, 5353);
            whole.udp.payload = 900;
            let mut identifications = Vec::new();
            for (nth, piece) in fragments(&whole.frame(), 400, 77).into_iter().enumerate() {
                let context = Context { ifindex: testbed.routing, ..Context::default() };
                let run = testbed.program.run(&piece, context);
                assert_eq!(run.action, REDIRECT, "{family} {nth}");
                let (source, identification) = match family {
                    0 => (26..30, 18..20),
                    _ => (22..38, 58..62),
                };
                let vip = match VIPS[family] {
                    IpAddr::V4(vip) => vip.octets().to_vec(),
                    IpAddr::V6(vip) => vip.octets().to_vec(),
                };
                assert_eq!(run.frame[source], vip);
                identifications.push(run.frame[identification].to_vec());
                let headers = if family == 0 { 34 } else { 62 };
                let changed = if nth == 0 { headers + 8 } else { headers };
                assert_eq!(run.frame[changed..], piece[changed..]);
                if nth == 0 {
                    assert_eq!(run.frame[headers..headers + 2], 53_u16.to_be_bytes());
                }
            }
            identifications.dedup();
            assert_eq!(identifications.len(), 1);
            let counted = testbed.program.take_counted();
            let id = ids[family * 2].answers[0];
            assert_eq!(counted.keys().collect::<Vec<_>>(), [&(id, "forwarded")]);
        }
    });
}

/// Upstreams on the link of the clients' gateway.
pub const NEAR_BY: [IpAddr; 2] = [IpAddr::V4(NEAR), ip6([0xfd00, 2, 0, 0, 0, 0, 0, 2])];
const EGRESS: [IpAddr; 2] = [IpAddr::V4(OWN), IpAddr::V6(OWN6)];

/// Returns a rule whose upstream has the key's address too.
pub fn direct(family: usize, via: Via) -> Rule {
    let key = Key::new(VIPS[family], vec![Ports { first: 2055, last: 2058 }]);
    let rule = Rule::new("direct", key, vec![Upstream::new(NEAR_BY[family], None)]);
    let (action, source) = (Action::Block, Source::Preserve);
    Rule { action, source, reply: Reply::Direct, via: Some(via), ..rule }
}

/// Configures a rule, with the next hop of its upstream.
pub fn configure_direct(testbed: &Testbed<'_>, rule: Rule, family: usize, mtu: u32) -> RuleIds {
    let hop = testbed.hop_to(NEAR_BY[family], mtu, Some(NEAR_MAC));
    let ways = [(rule.upstreams[0].address.clone(), hop)].into();
    let desired = Desired { rules: vec![rule], ..Desired::default() };
    testbed.program.configure_all(&desired, &ways, 0).remove(0)
}

/// Returns a client's packet, as it arrives, and as it goes to an upstream that has the key's address.
pub fn question(family: usize, change: &dyn Fn(&mut Forged)) -> (Forged, Forged) {
    let client = [ip4([198, 51, 100, 7]), ip6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7])];
    let mut came = Forged::between(RELAY_MAC, client[family], VIPS[family], 2056);
    change(&mut came);
    let mut gone =
        Forged { to: NEAR_MAC, from: OUT_MAC, tag: None, tags: Vec::new(), ..came.clone() };
    match &mut gone.ip {
        Ip::V4(ip) => ip.ttl -= 1,
        Ip::V6(ip) => ip.hop_limit -= 1,
    }
    (came, gone)
}

#[test]
fn direct_packets_keep_their_destination() {
    Testbed::with(|testbed| {
        for family in 0..2 {
            let ids = configure_direct(testbed, direct(family, Via::Link), family, 1500);
            for (name, change) in [
                ("plain", (|_| {}) as fn(&mut Forged)),
                ("wrong checksum", |it| it.udp.checksum = Checksum::Off(7)),
                ("tag", |it| it.tags = vec![Tag { protocol: 0x8100, control: 7 }]),
                ("full", |it| it.udp.payload = 1500 - 48),
            ] {
                let (came, gone) = question(family, &change);
                let frame = gone.frame();
                let counted = [((ids.upstreams[0], "forwarded"), (1, frame.len() as u64))].into();
                let wanted = (Run { action: REDIRECT, frame, tag: None }, counted);
                // by the slow path, then by what it has remembered
                for _ in 0..2 {
                    assert_eq!(run(testbed, &came), wanted, "{name} {family}");
                }
            }
        }
    });
}

/// Returns the outer headers' length.
pub fn outer(family: usize, via: Via) -> usize {
    [20, 40][family] + if via == Via::Gue { 8 } else { 0 }
}

#[test]
fn tunnels_have_outer_headers() {
    Testbed::with(|testbed| {
        for (family, via) in [(0, Via::Ipip), (0, Via::Gue), (1, Via::Ipip), (1, Via::Gue)] {
            let outer = outer(family, via);
            let ids = configure_direct(testbed, direct(family, via), family, 1500);
            for payload in [0, 16, 333, 1500 - outer - [28, 48][family]] {
                let (came, gone) = question(family, &|it| it.udp.payload = payload);
                let (run, counted) = run(testbed, &came);
                assert_eq!(run.action, REDIRECT, "{family} {via:?} {payload}");
                assert_eq!(counted.keys().collect::<Vec<_>>(), [&(ids.upstreams[0], "forwarded")]);
                let inner = gone.frame();
                assert_eq!(run.frame[..14], inner[..14]);
                assert_eq!(run.frame[14 + outer..], inner[14..]);
                check_outer(&run.frame[14..], family, via);
            }
        }
    });
}

/// Checks outer headers; the packet is correct otherwise.
fn check_outer(packet: &[u8], family: usize, via: Via) {
    let gue = via == Via::Gue;
    if family == 0 {
        let ip = etherparse::Ipv4HeaderSlice::from_slice(packet).expect("an IPv4 header");
        assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
        assert_eq!(usize::from(ip.total_len()), packet.len());
        assert_eq!((ip.ttl(), ip.dont_fragment()), (64, true));
        assert_eq!(ip.protocol().0, if gue { 17 } else { 4 });
        let ends = [ip.source_addr(), ip.destination_addr()].map(IpAddr::V4);
        assert_eq!(ends, [EGRESS[0], NEAR_BY[0]]);
    } else {
        let ip = etherparse::Ipv6HeaderSlice::from_slice(packet).expect("an IPv6 header");
        assert_eq!(usize::from(ip.payload_length()) + 40, packet.len());
        assert_eq!((ip.hop_limit(), ip.next_header().0), (64, if gue { 17 } else { 41 }));
        assert_ne!(ip.flow_label().value(), 0);
        let ends = [ip.source_addr(), ip.destination_addr()].map(IpAddr::V6);
        assert_eq!(ends, [EGRESS[1], NEAR_BY[1]]);
    }
    if gue {
        let header = packet.len().min([20, 40][family]);
        let udp = etherparse::UdpHeaderSlice::from_slice(&packet[header..]).expect("UDP");
        assert_eq!((udp.destination_port(), udp.checksum()), (6080, 0));
        assert_eq!(usize::from(udp.length()), packet.len() - header);
        assert!(udp.source_port() >= 0xc000);
    }
}

/// The sender of a packet that leaves no room for outer headers hears of it, with or without DF.
#[test]
fn packets_too_long_for_a_tunnel_are_answered() {
    Testbed::with(|testbed| {
        for (family, via) in [(0, Via::Ipip), (0, Via::Gue), (1, Via::Ipip), (1, Via::Gue)] {
            let ids = configure_direct(testbed, direct(family, via), family, 1500);
            let most = 1500 - outer(family, via);
            let (came, _) = question(family, &|it| it.udp.payload = most + 1 - [28, 48][family]);
            let (run, counted) = run(testbed, &came);
            assert_eq!(run.action, REDIRECT, "{family} {via:?}");
            assert_eq!(counted.keys().collect::<Vec<_>>(), [&(ids.upstreams[0], "mtu")]);
            let (kind, mtu) = if family == 0 { (34, 40..42) } else { (54, 60..62) };
            assert_eq!(run.frame[kind], [3, 2][family]);
            assert_eq!(run.frame[mtu], (most as u16).to_be_bytes());
        }
    });
}

/// Returns a configuration whose upstreams answer through the relay.
fn check_answers(client_offload: bool, upstream_offload: bool) {
    let lab = Lab::dual(client_offload, upstream_offload);
    lab.apply(&replying("route"));
    for net in [V4, V6] {
        let client = bind(&lab.client, net.clients[0], 0);
        client.connect((net.key, 53)).expect("connected");
        let server = bind(&lab.upstream, net.upstreams[0], 5353);
        let header = if net.is_ipv6() { 48 } else { 28 };
        for size in [0, 1, 39, 1000, 1500 - header, 4000] {
            assert_eq!(ask(&client, &server, &payload(size), &payload(size)), own(&client));
        }
        let mut answers = 6;
        if !net.is_ipv6() {
            set(&server, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1);
            assert_eq!(ask(&client, &server, b"no checksum", b"none either"), own(&client));
            set(&server, libc::SOL_SOCKET, libc::SO_NO_CHECK, 0);
            answers += 1;
        }
        // fragments are packets of their own
        answers += 2;
        if upstream_offload || cuts_up_without_offload(&lab) {
            ask_for_many(&client, &server);
            answers += 10;
        }
        let status = lab.status();
        let rule = if net.is_ipv6() { 1 } else { 0 };
        let upstream = &status["rules"][rule]["upstreams"][0];
        assert_eq!(packets(&upstream["answers"], "forwarded"), answers, "{upstream:#}");
    }
}

#[test]
fn clients_get_answers_from_the_key() {
    check_answers(true, true);
}

#[test]
fn clients_get_answers_without_offload() {
    check_answers(false, false);
}

/// Another relay with the same file translates the answers of questions that it has not seen.
#[test]
fn answers_go_through_any_relay() {
    let lab = Lab::new();
    let (relay, bpffs) = (Namespace::new(), Bpffs::new());
    lab.client.link("eth1", &relay, "eth0", true);
    relay.link("up0", &lab.upstream, "eth1", true);
    relay.ip("addr add 10.1.1.1/24 dev eth0");
    relay.ip("addr add 10.2.1.1/24 dev up0");
    relay.ip("route add 10.1.0.20 via 10.1.1.20");
    relay.sysctl("net.ipv4.ip_forward", "1");
    lab.client.ip("addr add 10.1.1.20/24 dev eth1");
    lab.upstream.ip("addr add 10.2.1.20/24 dev eth1");
    lab.upstream.ip("route add 10.1.0.20 via 10.2.1.1");
    for namespace in [&lab.client, &relay, &lab.upstream] {
        namespace.sysctl("net.ipv4.conf.all.rp_filter", "0");
    }
    lab.client.sysctl("net.ipv4.conf.eth1.rp_filter", "0");
    relay.sysctl("net.ipv4.conf.up0.rp_filter", "0");
    lab.upstream.sysctl("net.ipv4.conf.eth0.rp_filter", "0");
    let file = lab.write(&replying("route"));
    lab.run(&format!("apply {}", file.display())).expect(0);
    let other = |words: &str| {
        let mut command = udplb(&relay, &bpffs);
        command.args(words.split_whitespace());
        Outcome::of(&mut command)
    };
    other(&format!("apply {}", file.display())).expect(0);
    let client = bind(&lab.client, V4.clients[0], 0);
    client.connect((V4.key, 53)).expect("connected");
    let server = bind(&lab.upstream, V4.upstreams[0], 5353);
    for round in 0..3 {
        assert_eq!(ask(&client, &server, &payload(round), b"by another way"), own(&client));
    }
    let answers = |status: &Value| -> u64 {
        let counters = &status["rules"][0]["upstreams"][0]["answers"];
        // the first may have waited for the client's MAC address
        ["forwarded", "unresolved"].map(|verdict| packets(counters, verdict)).iter().sum()
    };
    assert_eq!(answers(&lab.status()), 0);
    assert_eq!(answers(&other("status -o json").json()), 3);
}

/// A configuration whose upstream has the key's address too.
pub fn direct_config(net: &Net, via: &str) -> Value {
    let upstream = json!({ "name": "u1", "address": net.upstreams[0] });
    let options = json!({ "tc_action": "block", "reply": "direct", "via": via });
    json!({ "version": 1, "interfaces": ["eth0"], "rules": [net.rule("dns", 53, options, &[upstream])] })
}

/// Creates a lab whose upstream has the key's addresses on lo, and a way of its own to the client.
pub fn direct_lab(offload: bool) -> Lab {
    let lab = Lab::dual(offload, offload);
    lab.client.link("eth1", &lab.upstream, "eth1", offload);
    for namespace in [&lab.client, &lab.upstream] {
        for interface in ["all", "eth0", "eth1"] {
            namespace.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "0");
        }
        namespace.sysctl("net.ipv4.conf.all.arp_ignore", "1");
        namespace.sysctl("net.ipv4.conf.all.arp_announce", "2");
    }
    lab.upstream.ip("addr add 10.1.0.1/32 dev lo");
    lab.upstream.ip("addr add 2001:db8:1::1/128 dev lo nodad");
    lab.client.ip("addr add 10.9.0.20/24 dev eth1");
    lab.upstream.ip("addr add 10.9.0.2/24 dev eth1");
    lab.client.ip("addr add 2001:db8:9::20/64 dev eth1 nodad");
    lab.upstream.ip("addr add 2001:db8:9::2/64 dev eth1 nodad");
    lab.upstream.ip("route add 10.1.0.20 via 10.9.0.20");
    lab.upstream.ip("route add 2001:db8:1::20 via 2001:db8:9::20");
    lab
}

/// Asks an upstream that has the key's address, and takes its answer from there.
pub fn ask_directly(net: &Net, lab: &Lab, sizes: &[usize]) {
    let client = bind(&lab.client, net.clients[0], 0);
    client.connect((net.key, 53)).expect("connected");
    let server = bind(&lab.upstream, net.key, 53);
    for size in sizes {
        client.send(&payload(*size)).expect("sent");
        expect(&server, &payload(*size), own(&client), TTL - 1);
        server.send_to(b"an answer", own(&client)).expect("sent");
        expect(&client, b"an answer", client.peer_addr().expect("connected"), TTL);
    }
}

#[test]
fn upstreams_on_the_link_answer_themselves() {
    for offload in [true, false] {
        let lab = direct_lab(offload);
        for net in [V4, V6] {
            lab.apply(&direct_config(&net, "link"));
            let header = if net.is_ipv6() { 48 } else { 28 };
            ask_directly(&net, &lab, &[0, 1, 39, 1000, 1500 - header, 4000]);
            assert_eq!(lab.packets("dns", "u1", "forwarded"), 8);
        }
    }
}

/// The kernel tells no next hop for answers that come in where it does not forward.
#[test]
fn apply_warns_of_answers_that_are_not_forwarded() {
    let lab = Lab::new();
    let mut config = replying("route");
    config["rules"].as_array_mut().expect("rules").truncate(1);
    lab.relay.sysctl("net.ipv4.conf.up0.forwarding", "0");
    for reply in ["route", "nat"] {
        config["rules"][0]["options"]["reply"] = json!(reply);
        let warned = "answers that come in on up0 are dropped: it does not forward";
        lab.try_apply(&config, "").expect(0).says(&[warned]);
    }
    lab.relay.sysctl("net.ipv4.conf.up0.forwarding", "1");
    config["rules"][0]["options"]["reply"] = json!("route");
    let silent = lab.try_apply(&config, "").expect(0);
    assert!(!silent.stderr.contains("forward"), "{silent:?}");
}

/// `apply` says which packets are too long for outer headers, and for `link` that there is a router between.
#[test]
fn apply_warns_of_direct_ways() {
    let lab = direct_lab(true);
    let warnings = |config: &Value| lab.try_apply(config, "").expect(0).stderr;
    assert!(warnings(&direct_config(&V4, "gue")).contains("packets of more than 1472 bytes"));
    lab.relay.ip("link set up0 mtu 1528");
    assert!(!warnings(&direct_config(&V4, "gue")).contains("packets of more than"));
    let mut far = direct_config(&V4, "link");
    far["rules"][0]["upstream"][0]["address"] = json!("10.3.0.20");
    lab.relay.ip("route add 10.3.0.0/24 via 10.2.0.20");
    assert!(warnings(&far).contains("10.3.0.20 is behind 10.2.0.20"));
}

#[test]
fn errors_about_questions_come_from_the_key() {
    Testbed::with(|testbed| {
        configure(&testbed.program, rules());
        for family in 0..2 {
            let client = (CLIENTS[family], 40000);
            let checksums: &[Checksum] = match family {
                0 => &[Checksum::Right, Checksum::Is(0)],
                _ => &[Checksum::Right],
            };
            for checksum in checksums {
                let sent = datagram(client, (UPSTREAM[family], 5353), *checksum).frame();
                let asked = datagram(client, (VIPS[family], 53), *checksum).frame();
                for quoted in [[28, 48][family], 500] {
                    let error = |from, about, ttl| {
                        icmp_error(REFUSED[family], (from, client.0), about, quoted, ttl)
                    };
                    let came = error(UPSTREAM[family], &sent, 64);
                    let gone = error(VIPS[family], &asked, 63);
                    check_error(testbed, &came, &gone, GATEWAY_MAC);
                }
            }
            // about another upstream's
            let other = datagram(client, (UPSTREAM[family], 5354), Checksum::Right).frame();
            let came = icmp_error(REFUSED[family], (UPSTREAM[family], client.0), &other, 500, 64);
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            assert_eq!(testbed.program.run(&came, context).action, UNSPEC);
        }
    });
}

#[test]
fn errors_about_answers_go_to_the_upstream() {
    Testbed::with(|testbed| {
        for family in 0..2 {
            let client = (CLIENTS[family], 40000);
            let error = |from: (IpAddr, u16), ttl| {
                let answer = datagram(from, client, Checksum::Right).frame();
                icmp_error(REFUSED[family], (client.0, from.0), &answer, 500, ttl)
            };
            let came = error((VIPS[family], 2056), 64);
            // an upstream that has the key's address gets it as it is
            configure_direct(testbed, direct(family, Via::Link), family, 1500);
            let gone = error((VIPS[family], 2056), 63);
            check_error(testbed, &came, &gone, NEAR_MAC);
            configure_direct(testbed, direct(family, Via::Ipip), family, 1500);
            let context = Context { ifindex: testbed.routing, ..Context::default() };
            let run = testbed.program.run(&came, context);
            assert_eq!(
                (run.action, &run.frame[14 + outer(family, Via::Ipip)..]),
                (REDIRECT, &gone[14..])
            );
            // another one gets one about what it has sent
            let mut rule = direct(family, Via::Link);
            (rule.reply, rule.via) = (Reply::Route, None);
            configure_direct(testbed, rule, family, 1500);
            let gone = error((NEAR_BY[family], 2056), 63);
            check_error(testbed, &came, &gone, NEAR_MAC);
        }
    });
}

/// A socket that is connected to the other end hears that nobody is there.
#[test]
fn errors_reach_the_sockets_of_both_ends() {
    let lab = Lab::dual(false, false);
    for reply in ["route", "nat"] {
        lab.apply(&replying(reply));
        for net in [V4, V6] {
            let client = bind(&lab.client, net.clients[0], 0);
            client.connect((net.key, 53)).expect("connected");
            client.send(b"nobody is there").expect("sent");
            expect_refused(&client);
            let server = bind(&lab.upstream, net.upstreams[0], 5353);
            let seen = ask(&client, &server, b"a question", b"an answer");
            server.connect(seen).expect("connected");
            drop(client);
            server.send(b"the client is gone").expect("sent");
            expect_refused(&server);
        }
    }
}

/// A receiver at the port of GUE gets the packet as it was sent, but for its TTL, whatever its size.
#[test]
fn tunnels_carry_packets_unchanged() {
    let lab = Lab::dual(false, false);
    lab.relay.ip("link set up0 mtu 1548");
    lab.upstream.ip("link set eth0 mtu 1548");
    for net in [V4, V6] {
        lab.apply(&direct_config(&net, "gue"));
        let client = bind(&lab.client, net.clients[0], 40000);
        let tunnel = bind(&lab.upstream, net.upstreams[0], 6080);
        // the kernel drops UDP over IPv6 without a checksum, unless a socket allows it (RFC 6936)
        set(&tunnel, libc::SOL_UDP, UDP_NO_CHECK6_RX, 1);
        let family = usize::from(net.is_ipv6());
        let headers = [28, 48][family];
        for size in [0, 1, 333, 1500 - headers] {
            client.send_to(&payload(size), (net.key, 53)).expect("sent");
            let received = receive(&tunnel);
            assert_eq!(received.from.ip(), net.egress);
            assert!(received.from.port() >= 0xc000, "{received:?}");
            let inner = &received.payload;
            assert_eq!(inner.len(), headers + size);
            let mut sent = datagram((net.clients[0], 40000), (net.key, 53), Checksum::Right);
            sent.udp.payload = size;
            let ends = if net.is_ipv6() { 8..40 } else { 12..20 };
            assert_eq!(inner[ends.clone()], sent.frame()[14..][ends]);
            assert_eq!(inner[[8, 7][family]], TTL as u8 - 1);
            assert_eq!(inner[headers..], payload(size));
        }
        assert_eq!(lab.packets("dns", "u1", "forwarded"), 4);
    }
}
