//! The fast path of packets that keep their destination: what it sends is what the slow path sends.

use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestRunner};
use udplb::config::Via;

use crate::answers::VIPS;
use crate::common::wire::Tag;
use crate::forge::{Checksum, Forged, Ip, Length};
use crate::nat_fast::{is_fast, set_ttl};
use crate::random::{Target, any_packet};
use crate::replies::{NEAR_BY, configure_direct, direct, outer, question};
use crate::testbed::{RELAY_MAC, Testbed};

const WAYS: [Via; 3] = [Via::Link, Via::Ipip, Via::Gue];

/// Returns the length of the longest payload that fits into outer headers.
fn longest(family: usize, via: Via) -> usize {
    let outer = if via == Via::Link { 0 } else { outer(family, via) };
    1500 - outer - [28, 48][family]
}

#[test]
fn plain_packets_take_the_fast_path() {
    const TAG: Tag = Tag { protocol: 0x8100, control: 7 };
    Testbed::with(|testbed| {
        for (family, via) in [0, 1].into_iter().flat_map(|family| WAYS.map(|via| (family, via))) {
            configure_direct(testbed, direct(family, via), family, 1500);
            let is_fast =
                |change: &dyn Fn(&mut Forged)| is_fast(testbed, &question(family, change).0);
            let longest = longest(family, via);
            let name = format!("{family} {via:?}");
            assert!(is_fast(&|_| ()), "plain: {name}");
            assert!(is_fast(&|it| it.udp.payload = 0), "empty: {name}");
            assert!(is_fast(&|it| it.udp.payload = 333), "odd: {name}");
            assert!(is_fast(&|it| it.udp.payload = longest), "as long as the MTU: {name}");
            assert!(is_fast(&|it| it.udp.checksum = Checksum::Off(7)), "wrong checksum: {name}");
            assert!(is_fast(&|it| it.padding = 7), "padding: {name}");
            assert!(is_fast(&|it| it.tag = Some(TAG)), "tag in the skb: {name}");
            assert!(is_fast(&|it| set_ttl(it, 2)), "last but one hop: {name}");

            assert!(!is_fast(&|it| it.tags = vec![TAG]), "tag in the frame: {name}");
            assert!(!is_fast(&|it| set_ttl(it, 1)), "last hop: {name}");
            assert!(!is_fast(&|it| it.udp.payload = longest + 1), "longer than the MTU: {name}");
            let gso = |it: &mut Forged| (it.udp.payload, it.gso) = (900, (300, 3));
            assert!(!is_fast(&gso), "GSO: {name}");
            assert!(!is_fast(&|it| it.udp.length = Length::Is(7)), "malformed: {name}");
            assert!(!is_fast(&|it| it.to = [2, 0, 0, 0, 9, 9]), "another host's: {name}");
            assert!(!is_fast(&|it| set_source(it, family)), "the upstream's own: {name}");
        }
    });
}

/// Sets the upstream's address as source, from which packets are dropped as martians.
fn set_source(packet: &mut Forged, family: usize) {
    match (&mut packet.ip, NEAR_BY[family]) {
        (Ip::V4(ip), IpAddr::V4(address)) => ip.source = address,
        (Ip::V6(ip), IpAddr::V6(address)) => ip.source = address,
        _ => unreachable!("a packet of the family"),
    }
}

/// Both paths do the same with any packet, by each way.
#[test]
fn any_packet_is_alike_by_both_paths() {
    const PACKETS: u32 = 600;
    const SHORTEST: usize = 14 + 40;
    Testbed::with(|testbed| {
        let mut fast = BTreeMap::<_, u32>::new();
        for (family, via) in [0, 1].into_iter().flat_map(|family| WAYS.map(|via| (family, via))) {
            configure_direct(testbed, direct(family, via), family, 1300);
            let target = Target { mac: RELAY_MAC, address: VIPS[family], port: 2055 };
            let mut runner = TestRunner::new(Config::default());
            for _ in 0..PACKETS {
                let packet = any_packet(target).new_tree(&mut runner).expect("a packet").current();
                if packet.frame().len() >= SHORTEST && packet.cut.is_none() {
                    *fast.entry((family, via as u8)).or_default() +=
                        u32::from(is_fast(testbed, &packet));
                }
            }
        }
        assert!(fast.values().all(|packets| *packets > PACKETS / 100), "{fast:?}");
    });
}
