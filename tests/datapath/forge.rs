//! Valid and invalid frames of every kind: each header field can be set freely.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::common::wire::Tag;
use crate::packet::Mac;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const UDP: u8 = 17;

/// Fields of a frame; [`Forged::frame`] builds it.
#[derive(Clone, Debug)]
pub struct Forged {
    pub to: Mac,
    pub from: Mac,
    /// VLAN tag in the packet's metadata instead of its bytes.
    pub tag: Option<Tag>,
    /// Tags in the frame, outermost first.
    pub tags: Vec<Tag>,
    /// EtherType that replaces the one of the IP version.
    pub ethertype: Option<u16>,
    pub ip: Ip,
    pub udp: Udp,
    /// Number of bytes behind the IP packet.
    pub padding: usize,
    /// Length to which the frame is truncated.
    pub cut: Option<usize>,
    /// `gso_size` and `gso_segs`.
    pub gso: (u32, u32),
}

#[derive(Clone, Debug)]
pub enum Ip {
    V4(V4),
    V6(V6),
}

/// Value of a length field.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    Right,
    Off(i16),
    Is(u16),
}

impl Length {
    fn said(self, right: usize) -> [u8; 2] {
        let right = right as u16;
        let said = match self {
            Length::Right => right,
            Length::Off(by) => right.wrapping_add_signed(by),
            Length::Is(length) => length,
        };
        said.to_be_bytes()
    }
}

/// An IPv4 header, RFC 791, section 3.1.
#[derive(Clone, Debug)]
pub struct V4 {
    pub version: u8,
    /// Header length in words that replaces the right one.
    pub words: Option<u8>,
    pub tos: u8,
    pub total_length: Length,
    pub identification: u16,
    /// The reserved bit, "do not fragment" and "more fragments".
    pub flags: u8,
    /// Offset in units of eight bytes.
    pub fragment_offset: u16,
    pub ttl: u8,
    pub protocol: u8,
    /// Error added to the checksum, in one's complement.
    pub checksum_error: u16,
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    /// Length of the options in words.
    pub options: u8,
    /// Pointer of a loose source route of seven bytes in the options.
    pub source_route: Option<u8>,
}

/// An IPv6 header, RFC 8200, section 3.
#[derive(Clone, Debug)]
pub struct V6 {
    pub version: u8,
    pub traffic_class: u8,
    pub flow_label: u32,
    pub payload_length: Length,
    pub hop_limit: u8,
    pub source: Ipv6Addr,
    pub destination: Ipv6Addr,
    pub extensions: Vec<Extension>,
    /// The next header value behind the extension headers.
    pub protocol: u8,
}

/// An extension header.
#[derive(Clone, Debug)]
pub struct Extension {
    pub kind: Kind,
    /// Length beyond the first eight bytes, in its own units.
    pub units: u8,
    /// Wrong value of the length field.
    pub lie: Option<u8>,
}

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    HopByHop,
    Destination,
    Routing { segments_left: u8 },
    Fragment(Fragment),
    Authentication,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Fragment {
    /// Offset in units of eight bytes.
    pub offset: u16,
    pub more: bool,
    /// Value of the reserved bits.
    pub reserved: u8,
    pub identification: u32,
}

/// Payload of the IP packet: a UDP datagram, or bytes that look like one.
#[derive(Clone, Debug)]
pub struct Udp {
    pub source: u16,
    pub destination: u16,
    pub length: Length,
    pub checksum: Checksum,
    /// Length of the payload; `first` is its first two bytes.
    pub payload: usize,
    pub first: u16,
    /// Bytes at the beginning of the payload, as far as it goes.
    pub message: Vec<u8>,
    /// Number of bytes of the IP packet behind the datagram.
    pub trailer: usize,
    /// Length to which datagram and trailer are truncated.
    pub cut: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub enum Checksum {
    Right,
    Is(u16),
    /// Off by this amount, in one's complement.
    Off(u16),
    /// Checksum of the pseudo-header; the device adds the rest.
    Unfinished,
}

impl Forged {
    /// Returns a valid frame with 16 bytes of payload.
    pub fn new(to: Mac, ip: Ip, port: u16) -> Forged {
        Forged {
            to,
            from: [2, 0, 0, 0, 1, 2],
            tag: None,
            tags: Vec::new(),
            ethertype: None,
            ip,
            udp: Udp {
                source: 5666,
                destination: port,
                length: Length::Right,
                checksum: Checksum::Right,
                payload: 16,
                first: 0,
                message: Vec::new(),
                trailer: 0,
                cut: None,
            },
            padding: 0,
            cut: None,
            gso: (0, 0),
        }
    }

    /// Returns a valid frame between two addresses of one family.
    pub fn between(to: Mac, source: IpAddr, destination: IpAddr, port: u16) -> Forged {
        let ip = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => Ip::V4(V4::new(source, destination)),
            (IpAddr::V6(source), IpAddr::V6(destination)) => Ip::V6(V6::new(source, destination)),
            other => panic!("{other:?} are of two families"),
        };
        Forged::new(to, ip, port)
    }

    /// Returns the payload of the UDP datagram.
    pub fn payload(&self) -> Vec<u8> {
        self.udp.bytes(&[], &[])[8..].to_vec()
    }

    /// Returns the checksum in the UDP header.
    pub fn udp_checksum(&self) -> u16 {
        let (source, destination) = match &self.ip {
            Ip::V4(ip) => (ip.source.octets().to_vec(), ip.destination.octets().to_vec()),
            Ip::V6(ip) => (ip.source.octets().to_vec(), ip.destination.octets().to_vec()),
        };
        let bytes = self.udp.bytes(&source, &destination);
        u16::from_be_bytes([bytes[6], bytes[7]])
    }

    pub fn frame(&self) -> Vec<u8> {
        let mut frame = [self.to, self.from].concat();
        for tag in &self.tags {
            frame.extend(tag.protocol.to_be_bytes());
            frame.extend(tag.control.to_be_bytes());
        }
        let (own, packet) = match &self.ip {
            Ip::V4(ip) => (IPV4, ip.packet(&self.udp)),
            Ip::V6(ip) => (IPV6, ip.packet(&self.udp)),
        };
        frame.extend(self.ethertype.unwrap_or(own).to_be_bytes());
        frame.extend(packet);
        frame.resize(frame.len() + self.padding, 0x5a);
        frame
    }
}

/// Splits a frame without tags and extension headers into fragments of at most `room` bytes (RFC 791
/// section 3.2, RFC 8200 section 4.5).
pub fn fragments(frame: &[u8], room: usize, identification: u32) -> Vec<Vec<u8>> {
    let ipv6 = frame[14] >> 4 == 6;
    let (headers, body) = frame.split_at(if ipv6 { 54 } else { 34 });
    let parts: Vec<&[u8]> = body.chunks(room / 8 * 8).collect();
    let fragment = |(index, part): (usize, &&[u8])| {
        let (offset, more) = (index * (room / 8), index + 1 < parts.len());
        let mut headers = headers.to_vec();
        if ipv6 {
            headers[18..20].copy_from_slice(&(8 + part.len() as u16).to_be_bytes());
            headers[20] = Kind::Fragment(Fragment::default()).number();
            let fragment = Fragment { offset: offset as u16, more, reserved: 0, identification };
            headers.extend(Extension::new(Kind::Fragment(fragment)).bytes(UDP));
        } else {
            headers[16..18].copy_from_slice(&(20 + part.len() as u16).to_be_bytes());
            headers[18..20].copy_from_slice(&(identification as u16).to_be_bytes());
            let offset = offset as u16 | u16::from(more) << 13;
            headers[20..22].copy_from_slice(&offset.to_be_bytes());
            headers[24..26].fill(0);
            let checksum = !sum(&headers[14..]);
            headers[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        [&headers, *part].concat()
    };
    parts.iter().enumerate().map(fragment).collect()
}

impl V4 {
    pub fn new(source: Ipv4Addr, destination: Ipv4Addr) -> V4 {
        V4 {
            version: 4,
            words: None,
            tos: 0,
            total_length: Length::Right,
            identification: 0,
            flags: 0,
            fragment_offset: 0,
            ttl: 64,
            protocol: UDP,
            checksum_error: 0,
            source,
            destination,
            options: 0,
            source_route: None,
        }
    }

    fn packet(&self, udp: &Udp) -> Vec<u8> {
        let body = udp.bytes(&self.source.octets(), &self.destination.octets());
        let length = 20 + usize::from(self.options) * 4;
        let words = self.words.unwrap_or(length as u8 / 4);
        let fragment = u16::from(self.flags) << 13 | self.fragment_offset & 0x1fff;
        let mut header = vec![self.version << 4 | words & 15, self.tos];
        header.extend(self.total_length.said(length + body.len()));
        header.extend(self.identification.to_be_bytes());
        header.extend(fragment.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(self.source.octets());
        header.extend(self.destination.octets());
        header.extend((20..length).map(|at| if at < length - 1 { 1 } else { 0 }));
        if let Some(pointer) = self.source_route.filter(|_| self.options > 1) {
            header[20..23].copy_from_slice(&[131, 7, pointer]);
        }
        let checksum = off_by(!sum(&header), self.checksum_error);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        [header, body].concat()
    }
}

impl V6 {
    pub fn new(source: Ipv6Addr, destination: Ipv6Addr) -> V6 {
        V6 {
            version: 6,
            traffic_class: 0,
            flow_label: 0,
            payload_length: Length::Right,
            hop_limit: 64,
            source,
            destination,
            extensions: Vec::new(),
            protocol: UDP,
        }
    }

    fn packet(&self, udp: &Udp) -> Vec<u8> {
        let body = udp.bytes(&self.source.octets(), &self.destination.octets());
        let numbers = self.extensions.iter().map(|extension| extension.kind.number());
        let mut next = numbers.chain([self.protocol]);
        let first = u32::from(self.version) << 28
            | u32::from(self.traffic_class) << 20
            | self.flow_label & 0xf_ffff;
        let mut packet = first.to_be_bytes().to_vec();
        packet.extend([0, 0, next.next().unwrap_or(self.protocol), self.hop_limit]);
        packet.extend(self.source.octets());
        packet.extend(self.destination.octets());
        for (extension, next) in self.extensions.iter().zip(next) {
            packet.extend(extension.bytes(next));
        }
        packet.extend(body);
        let length = self.payload_length.said(packet.len() - 40);
        packet[4..6].copy_from_slice(&length);
        packet
    }
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Kind::HopByHop => 0,
            Kind::Destination => 60,
            Kind::Routing { .. } => 43,
            Kind::Fragment(_) => 44,
            Kind::Authentication => 51,
        }
    }
}

impl Extension {
    pub fn new(kind: Kind) -> Extension {
        Extension { kind, units: 0, lie: None }
    }

    fn bytes(&self, next: u8) -> Vec<u8> {
        let said = self.lie.unwrap_or(self.units);
        if let Kind::Fragment(fragment) = self.kind {
            let Fragment { offset, more, reserved, identification } = fragment;
            let offset = offset << 3 | u16::from(reserved & 3) << 1 | u16::from(more);
            // the second byte is reserved: this header's length is fixed
            let mut bytes = vec![next, self.lie.unwrap_or(0)];
            bytes.extend(offset.to_be_bytes());
            bytes.extend(identification.to_be_bytes());
            return bytes;
        }
        // zero bytes are padding in all extension headers
        let mut bytes = match self.kind {
            // RFC 4302: in units of four bytes, beyond the first two of them
            Kind::Authentication => vec![0; 8 + usize::from(self.units) * 4],
            _ => vec![0; 8 + usize::from(self.units) * 8],
        };
        bytes[..2].copy_from_slice(&[next, said]);
        if let Kind::Routing { segments_left } = self.kind {
            bytes[3] = segments_left;
        }
        bytes
    }
}

impl Udp {
    fn bytes(&self, source: &[u8], destination: &[u8]) -> Vec<u8> {
        let length = 8 + self.payload;
        let mut bytes = [self.source.to_be_bytes(), self.destination.to_be_bytes()].concat();
        bytes.extend(self.length.said(length));
        bytes.extend([0, 0]);
        bytes.extend((0..self.payload).map(|index| (index * 7 + 3) as u8));
        for (byte, first) in bytes[8..].iter_mut().zip(self.first.to_be_bytes()) {
            *byte = first;
        }
        for (byte, message) in bytes[8..].iter_mut().zip(&self.message) {
            *byte = *message;
        }
        let pseudo_header = pseudo_header(source, destination, length);
        let right = match !sum(&[&pseudo_header, &bytes[..]].concat()) {
            0 => u16::MAX,
            checksum => checksum,
        };
        let checksum = match self.checksum {
            Checksum::Right => right,
            Checksum::Is(checksum) => checksum,
            Checksum::Off(by) => off_by(right, by),
            Checksum::Unfinished => sum(&pseudo_header),
        };
        bytes[6..8].copy_from_slice(&checksum.to_be_bytes());
        bytes.extend((0..self.trailer).map(|index| (index * 5 + 0x80) as u8));
        bytes.truncate(self.cut.unwrap_or(bytes.len()));
        bytes
    }
}

/// Returns the pseudo-header, RFC 768 and RFC 8200 section 8.1; zero bytes do not change the sum.
fn pseudo_header(source: &[u8], destination: &[u8], length: usize) -> Vec<u8> {
    [source, destination, &(length as u32).to_be_bytes(), &[0, UDP]].concat()
}

/// Computes the one's complement sum, RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    words.fold(0, off_by)
}

/// Adds in one's complement.
fn off_by(checksum: u16, error: u16) -> u16 {
    let (sum, carry) = checksum.overflowing_add(error);
    sum + u16::from(carry)
}
