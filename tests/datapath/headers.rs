//! Datagrams behind unusual headers and with unusual checksums, from socket to socket.

use crate::common::kinds::{KINDS, all_kinds, rules};
use crate::common::lab::{Lab, V6, config};
use crate::common::net::{TTL, expect, send_frame, set_bytes};
use crate::ends::Ends;
use crate::forge::{Checksum, Extension, Forged, Ip, Kind};
use crate::kernel::counted;

/// Eight bytes of padding in the format of a socket option: next header and length, then PadN.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

#[test]
fn ip_options_are_kept() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for ends in Ends::both(&lab) {
        let options: &[(i32, i32, &[u8])] = match ends.net.is_ipv6() {
            // two no-operations and the end of the list
            false => &[(libc::IPPROTO_IP, libc::IP_OPTIONS, &[1, 1, 0, 0])],
            true => &[
                (libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS, &PADDING),
                (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &PADDING),
            ],
        };
        for (level, option, value) in options {
            set_bytes(&ends.sender, *level, *option, value);
            for length in [0, 1, 1000, 1400, 9000] {
                ends.check_length(length);
            }
        }
        ends.check_silence();
    }
}

#[test]
fn extension_header_chains_are_walked() {
    let lab = Lab::dual(true, false);
    lab.apply(&config(&rules(&V6)));
    let ends = Ends::new(&lab, V6);
    let chain =
        |kinds: &[Kind]| -> Vec<Extension> { kinds.iter().copied().map(Extension::new).collect() };
    let routing = Kind::Routing { segments_left: 0 };
    let walked = [
        chain(&[Kind::HopByHop, Kind::Destination, routing, Kind::Destination]),
        chain(&[Kind::Destination; 8]),
    ];
    // more headers than the program parses, and packets that are UDP only for the receiver: ignored
    let left = [chain(&[Kind::Destination; 9])];
    for (extensions, is_sent) in
        walked.into_iter().map(|it| (it, true)).chain(left.into_iter().map(|it| (it, false)))
    {
        for (index, (port, action, source)) in KINDS.into_iter().enumerate() {
            let mac = lab.relay.mac("eth0");
            let mut datagram = Forged::between(mac, V6.clients[0], V6.key, port);
            let Ip::V6(ip) = &mut datagram.ip else { panic!("IPv6") };
            ip.extensions.clone_from(&extensions);
            send_frame(&lab.client, "eth0", &datagram.frame());
            let sender = (V6.clients[0], datagram.udp.source).into();
            if is_sent {
                let from = V6.seen(source, sender);
                expect(&ends.upstreams[index], &datagram.payload(), from, TTL - 1);
            }
            if action == "pass" || !is_sent {
                expect(&ends.here[index], &datagram.payload(), sender, TTL);
            }
        }
    }
    ends.check_silence();
}

/// A corrupt checksum must stay corrupt.
#[test]
fn corrupt_checksums_stay_corrupt() {
    let lab = Lab::dual(true, false);
    lab.apply(&all_kinds());
    for (ends, name) in Ends::both(&lab).into_iter().zip(["UdpInCsumErrors", "Udp6InCsumErrors"]) {
        for (sent, error) in [1, 0x100, 0x8000, 0xfffe].into_iter().enumerate() {
            for (port, ..) in KINDS {
                let (mac, net) = (lab.relay.mac("eth0"), ends.net);
                let mut datagram = Forged::between(mac, net.clients[0], net.key, port);
                datagram.udp.checksum = Checksum::Off(error);
                send_frame(&lab.client, "eth0", &datagram.frame());
            }
            ends.check_silence();
            let corrupt = [&lab.upstream, &lab.relay].map(|namespace| counted(namespace, name));
            let sent = sent as u64 + 1;
            assert_eq!(corrupt, [6 * sent, 3 * sent], "{name}, off by {error:#x}");
        }
        ends.check(b"not corrupt", &[b"not corrupt"]);
    }
}

/// A datagram over IPv6 without a checksum is invalid (RFC 8200, section 8.1).
#[test]
fn ipv6_without_checksum_reaches_nobody() {
    let lab = Lab::dual(true, false);
    lab.apply(&config(&rules(&V6)));
    let ends = Ends::new(&lab, V6);
    for (port, ..) in KINDS {
        let mut datagram = Forged::between(lab.relay.mac("eth0"), V6.clients[0], V6.key, port);
        datagram.udp.checksum = Checksum::Is(0);
        send_frame(&lab.client, "eth0", &datagram.frame());
    }
    ends.check_silence();
}
