//! A tun or tap device with the test at its other end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use super::Namespace;
use super::net::poll;

/// Goes when the value does.
pub struct Tun(File);

impl Tun {
    /// Makes one for IP packets that is up.
    pub fn new(namespace: &Namespace, name: &str) -> Tun {
        Tun::with(namespace, name, libc::IFF_TUN)
    }

    /// One for frames with what a guest leaves to its host, as virtual machines have it.
    pub fn tap(namespace: &Namespace, name: &str) -> Tun {
        Tun::with(namespace, name, libc::IFF_TAP | libc::IFF_VNET_HDR)
    }

    fn with(namespace: &Namespace, name: &str, kind: i32) -> Tun {
        let file = namespace.enter(|| {
            let file = File::options().read(true).write(true).open("/dev/net/tun").expect("tun");
            // struct ifreq: the name, then the flags
            let mut request = [0_u8; 40];
            request[..name.len()].copy_from_slice(name.as_bytes());
            let flags = kind | libc::IFF_NO_PI;
            request[16..18].copy_from_slice(&(flags as u16).to_ne_bytes());
            // SAFETY: the descriptor is open, and the request is as long as the kernel's.
            let made =
                unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
            assert_eq!(made, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
            file
        });
        namespace.ip(&format!("link set {name} up"));
        Tun(file)
    }

    /// A packet comes in.
    pub fn send(&self, packet: &[u8]) {
        (&self.0).write_all(packet).expect("the device takes it");
    }

    /// A frame comes from a guest, which leaves it to the host to add the sum from `start` on to
    /// the UDP checksum, and to cut the payload into segments if it is longer.
    pub fn send_unfinished(&self, frame: &[u8], start: u16, segment: u16) {
        const GSO_UDP_L4: u8 = 5;
        self.send_large(frame, start, segment, GSO_UDP_L4);
    }

    /// The same of one datagram, for the host to make fragments of.
    pub fn send_unfragmented(&self, frame: &[u8], start: u16, fragment: u16) {
        const GSO_UDP: u8 = 3;
        self.send_large(frame, start, fragment, GSO_UDP);
    }

    fn send_large(&self, frame: &[u8], start: u16, segment: u16, kind: u8) {
        const NEEDS_CSUM: u8 = 1;
        const CHECKSUM: u16 = 6;
        const UDP: u16 = 8;
        let is_longer = frame.len() > usize::from(start + UDP + segment);
        // struct virtio_net_hdr
        let mut bytes = vec![NEEDS_CSUM, if is_longer { kind } else { 0 }];
        let segment = if is_longer { segment } else { 0 };
        for field in [start + UDP, segment, start, CHECKSUM] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(frame);
        self.send(&bytes);
    }

    /// Waits for a packet of such an address to go out.
    #[track_caller]
    pub fn receive(&self, destination: std::net::IpAddr) -> Vec<u8> {
        let mut packet = vec![0; 65_536];
        loop {
            poll(&[self.0.as_fd()], libc::POLLIN);
            let length = (&self.0).read(&mut packet).expect("a packet");
            let is_for =
                |address: &[u8], at| packet[..length].get(at..at + address.len()) == Some(address);
            let found = match destination {
                std::net::IpAddr::V4(to) => packet[0] >> 4 == 4 && is_for(&to.octets(), 16),
                std::net::IpAddr::V6(to) => packet[0] >> 4 == 6 && is_for(&to.octets(), 24),
            };
            if found {
                packet.truncate(length);
                return packet;
            }
        }
    }
}
