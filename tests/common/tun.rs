//! A tun or tap device whose other end is the test.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use super::Namespace;
use super::net::poll;

/// The device, removed when the value is dropped.
pub struct Tun(File);

impl Tun {
    /// Creates a tun device (IP packets) that is up.
    pub fn new(namespace: &Namespace, name: &str) -> Tun {
        Tun::with(namespace, name, libc::IFF_TUN)
    }

    /// Creates a tap device (frames) with offload headers, as virtual machines use it.
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

    /// Delivers a packet to the device's ingress.
    pub fn send(&self, packet: &[u8]) {
        (&self.0).write_all(packet).expect("the device takes it");
    }

    /// Delivers a frame to a tap device of which only the Ethernet header is in the linear part; it must be longer
    /// than a page.
    pub fn send_paged(&self, frame: &[u8]) {
        // struct virtio_net_hdr: the length of the headers is the third field
        let header = [0, 0, 14, 0, 0, 0, 0, 0, 0, 0];
        self.send(&[&header, frame].concat());
    }

    /// Delivers a frame of a guest that leaves to the host the UDP checksum, over the bytes from
    /// `start` on, and the segmentation of payloads longer than `segment`.
    pub fn send_unfinished(&self, frame: &[u8], start: u16, segment: u16) {
        const GSO_UDP_L4: u8 = 5;
        self.send_large(frame, start, segment, GSO_UDP_L4);
    }

    /// Delivers a frame of a guest that leaves to the host the fragmentation of one datagram.
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

    /// Waits for an outgoing packet with such an address.
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
