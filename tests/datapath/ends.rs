//! Sockets at both ends of a rule of every kind.

use std::net::{SocketAddr, UdpSocket};

use crate::common::Namespace;
use crate::common::kinds::{KINDS, name};
use crate::common::lab::{CLIENTS, Lab, Net, RELAY, V4, V6};
use crate::common::net::{TTL, UDP_SEGMENT, bind, expect, expect_silence_of, own, payload, set};

pub struct Ends {
    pub net: Net,
    pub sender: UdpSocket,
    pub upstreams: Vec<UdpSocket>,
    pub here: Vec<UdpSocket>,
    /// Number of hops to the upstream.
    pub hops: i32,
}

impl Ends {
    pub fn new(lab: &Lab, net: Net) -> Ends {
        Ends::with(lab, net, &lab.upstream)
    }

    /// Opens the sockets; the upstreams are in this namespace.
    pub fn with(lab: &Lab, net: Net, upstream: &Namespace) -> Ends {
        Ends {
            net,
            sender: bind(&lab.client, net.clients[0], 0),
            upstreams: KINDS
                .iter()
                .map(|(port, ..)| bind(upstream, net.upstreams[0], port + 2000))
                .collect(),
            here: KINDS.iter().map(|(port, ..)| bind(&lab.relay, net.key, *port)).collect(),
            hops: 1,
        }
    }

    /// Opens the sockets of each family.
    pub fn both(lab: &Lab) -> [Ends; 2] {
        [V4, V6].map(|net| Ends::new(lab, net))
    }

    /// Sends with one call to every kind of rule and expects these datagrams.
    #[track_caller]
    pub fn check(&self, payload: &[u8], datagrams: &[&[u8]]) {
        self.check_kinds(payload, datagrams, |_| true);
    }

    /// Sends with one call to the `block` rules and expects these datagrams.
    #[track_caller]
    pub fn check_blocked(&self, payload: &[u8]) {
        self.check_kinds(payload, &[payload], |action| action == "block");
    }

    #[track_caller]
    fn check_kinds(&self, payload: &[u8], datagrams: &[&[u8]], takes: impl Fn(&str) -> bool) {
        let sender = own(&self.sender);
        for (index, (port, action, _)) in KINDS.iter().enumerate() {
            if takes(action) {
                self.sender.send_to(payload, (self.net.key, *port)).expect("sent");
                datagrams.iter().for_each(|datagram| self.expect(index, datagram, sender));
            }
        }
    }

    /// Waits for a sender's datagram at the rule's upstream and, with `pass`, at the relay.
    #[track_caller]
    pub fn expect(&self, index: usize, payload: &[u8], sender: SocketAddr) {
        let (_, action, source) = KINDS[index];
        let from = self.net.seen(source, sender);
        expect(&self.upstreams[index], payload, from, TTL - self.hops);
        if action == "pass" {
            expect(&self.here[index], payload, sender, TTL);
        }
    }

    /// Checks a datagram of this length.
    #[track_caller]
    pub fn check_length(&self, length: usize) {
        let payload = payload(length);
        self.check(&payload, &[&payload]);
    }

    /// Checks a GSO packet: one packet for the sender's stack, ten datagrams for receivers and
    /// counters.
    #[track_caller]
    pub fn check_segments(&self) {
        set(&self.sender, libc::SOL_UDP, UDP_SEGMENT, 1000);
        let payload = payload(9_500);
        self.check(&payload, &payload.chunks(1000).collect::<Vec<_>>());
        set(&self.sender, libc::SOL_UDP, UDP_SEGMENT, 0);
    }

    /// Sets the sender's TTL or hop limit.
    pub fn set_ttl(&self, ttl: i32) {
        match self.net.is_ipv6() {
            false => set(&self.sender, libc::IPPROTO_IP, libc::IP_TTL, ttl),
            true => set(&self.sender, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, ttl),
        }
    }

    /// Checks that no further datagrams arrive.
    #[track_caller]
    pub fn check_silence(&self) {
        expect_silence_of(self.upstreams.iter().chain(&self.here));
    }

    /// Checks a counter of each kind of rule.
    #[track_caller]
    pub fn check_count(&self, lab: &Lab, verdict: &str, count: u64) {
        for (_, action, source) in KINDS {
            let name = name(&self.net, action, source);
            let upstream = self.net.upstreams[0].to_string();
            assert_eq!(lab.packets(&name, &upstream, verdict), count, "{name} {verdict}");
        }
    }
}

/// Returns true if the client's kernel accepts UDP_SEGMENT without checksum offload: from 6.11 on.
pub fn cuts_up_without_offload(lab: &Lab) -> bool {
    let sender = bind(&lab.client, CLIENTS[0], 0);
    set(&sender, libc::SOL_UDP, UDP_SEGMENT, 1000);
    match sender.send_to(&payload(2000), (RELAY, 5999)) {
        Ok(_) => true,
        Err(error) if error.raw_os_error() == Some(libc::EIO) => false,
        Err(error) => panic!("{error}"),
    }
}
