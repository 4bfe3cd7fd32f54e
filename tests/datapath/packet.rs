//! UDP frames over IPv4, built from scratch; every checksum is computed over all bytes.

use std::net::{Ipv4Addr, SocketAddrV4};

use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Header, Icmpv4Type, IpFragOffset, IpNumber, Ipv4Header,
    Ipv4Options, UdpHeader,
};

pub type Mac = [u8; 6];

/// Header lengths; the IP header is without options.
pub const ETHERNET: usize = 14;
pub const IP: usize = 20;
pub const UDP: usize = 8;

/// Offsets of fields that some tests overwrite, in a frame without IP options.
pub const VERSION: usize = ETHERNET;
pub const TOTAL_LENGTH: usize = ETHERNET + 2;
pub const IP_CHECKSUM: usize = ETHERNET + 10;
pub const PROTOCOL: usize = ETHERNET + 9;
pub const UDP_LENGTH: usize = ETHERNET + IP + 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    Valid,
    /// No checksum.
    Zero,
    /// Off by this amount, in one's complement.
    Wrong(u16),
}

/// Fields of a frame; [`Datagram::frame`] builds it.
#[derive(Clone, Debug)]
pub struct Datagram {
    pub to: Mac,
    pub from: Mac,
    pub source: SocketAddrV4,
    pub destination: SocketAddrV4,
    pub tos: u8,
    pub identification: u16,
    pub dont_fragment: bool,
    pub more_fragments: bool,
    /// Offset in units of eight bytes.
    pub fragment_offset: u16,
    pub ttl: u8,
    /// A multiple of four bytes, 40 at most.
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
    pub checksum: Checksum,
    /// Error added to the IP header's checksum, in one's complement.
    pub header_error: u16,
    /// Bytes of the IP packet beyond the UDP length.
    pub trailer: Vec<u8>,
    /// Number of bytes of the frame beyond the IP length.
    pub padding: usize,
}

impl Datagram {
    /// Returns a datagram with 16 bytes of payload and default fields.
    pub fn new(source: SocketAddrV4, destination: SocketAddrV4) -> Datagram {
        Datagram {
            to: [2, 0, 0, 0, 0, 1],
            from: [2, 0, 0, 0, 0, 2],
            source,
            destination,
            tos: 0,
            identification: 0x1234,
            dont_fragment: false,
            more_fragments: false,
            fragment_offset: 0,
            ttl: 64,
            options: Vec::new(),
            payload: payload(16),
            checksum: Checksum::Valid,
            header_error: 0,
            trailer: Vec::new(),
            padding: 0,
        }
    }

    pub fn frame(&self) -> Vec<u8> {
        let ethernet = Ethernet2Header {
            source: self.from,
            destination: self.to,
            ether_type: EtherType::IPV4,
        };
        let udp = self.udp();
        let mut frame = ethernet.to_bytes().to_vec();
        frame.extend_from_slice(&self.ip().to_bytes());
        frame.extend_from_slice(&udp.to_bytes());
        frame.extend_from_slice(&self.payload);
        frame.extend_from_slice(&self.trailer);
        frame.resize(frame.len() + self.padding, 0);
        frame
    }

    /// Returns the expected ICMP error to the sender: "fragmentation needed" with this MTU, or "time
    /// exceeded" for `None`.
    pub fn error(&self, mtu: Option<u16>) -> Vec<u8> {
        // RFC 1812, section 4.3.2.3
        const MOST: usize = 576 - IP - 8;
        let ethernet = Ethernet2Header {
            source: self.to,
            destination: self.from,
            ether_type: EtherType::IPV4,
        };
        let quoted = self.length().min(MOST) / 4 * 4;
        let quotation = &self.frame()[ETHERNET..ETHERNET + quoted];
        let [high, low] = mtu.unwrap_or(0).to_be_bytes();
        let (type_u8, code_u8) = if mtu.is_some() { (3, 4) } else { (11, 0) };
        let kind = Icmpv4Type::Unknown { type_u8, code_u8, bytes5to8: [0, 0, high, low] };
        let mut ip = Ipv4Header {
            dscp: 48.try_into().expect("six bits"), // internetwork control
            total_len: (IP + 8 + quoted) as u16,
            dont_fragment: true,
            time_to_live: 64,
            protocol: IpNumber::ICMP,
            source: self.destination.ip().octets(),
            destination: self.source.ip().octets(),
            ..Ipv4Header::default()
        };
        ip.header_checksum = ip.calc_header_checksum();
        let icmp = Icmpv4Header::with_checksum(kind, quotation);
        [&ethernet.to_bytes()[..], &ip.to_bytes(), &icmp.to_bytes(), quotation].concat()
    }

    /// Returns the length of the IP packet.
    pub fn length(&self) -> usize {
        IP + self.options.len() + UDP + self.payload.len() + self.trailer.len()
    }

    fn ip(&self) -> Ipv4Header {
        let mut ip = Ipv4Header {
            dscp: (self.tos >> 2).try_into().expect("six bits"),
            ecn: (self.tos & 3).try_into().expect("two bits"),
            total_len: self.length().try_into().expect("a length"),
            identification: self.identification,
            dont_fragment: self.dont_fragment,
            more_fragments: self.more_fragments,
            fragment_offset: IpFragOffset::try_new(self.fragment_offset).expect("an offset"),
            time_to_live: self.ttl,
            protocol: IpNumber::UDP,
            header_checksum: 0,
            source: self.source.ip().octets(),
            destination: self.destination.ip().octets(),
            options: Ipv4Options::try_from(self.options.as_slice()).expect("options"),
        };
        ip.header_checksum = off_by(ip.calc_header_checksum(), self.header_error);
        ip
    }

    fn udp(&self) -> UdpHeader {
        let (source, destination) = (self.source, self.destination);
        let mut udp = UdpHeader {
            source_port: source.port(),
            destination_port: destination.port(),
            length: (UDP + self.payload.len()) as u16,
            checksum: 0,
        };
        let valid = udp
            .calc_checksum_ipv4_raw(source.ip().octets(), destination.ip().octets(), &self.payload)
            .expect("a length");
        udp.checksum = match self.checksum {
            Checksum::Valid => valid,
            Checksum::Zero => 0,
            Checksum::Wrong(by) => match off_by(valid, by) {
                0 => u16::MAX,
                sum => sum,
            },
        };
        udp
    }

    /// Returns the checksum in the UDP header.
    pub fn udp_checksum(&self) -> u16 {
        self.udp().checksum
    }
}

/// Adds in one's complement.
fn off_by(checksum: u16, error: u16) -> u16 {
    let (sum, carry) = checksum.overflowing_add(error);
    sum + u16::from(carry)
}

/// Returns a payload of this length; adjacent bytes differ.
pub fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 + 1) as u8).collect()
}

/// Returns a frame with some of its bytes replaced.
pub fn with<const LENGTH: usize>(frame: Vec<u8>, at: usize, bytes: [u8; LENGTH]) -> Vec<u8> {
    let mut frame = frame;
    frame[at..at + LENGTH].copy_from_slice(&bytes);
    frame
}

/// Recomputes the checksum of a frame's IPv4 header without options.
pub fn summed(frame: Vec<u8>) -> Vec<u8> {
    let header = with(frame.clone(), IP_CHECKSUM, [0, 0]);
    let words = header[ETHERNET..ETHERNET + 20].chunks(2);
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    with(frame, IP_CHECKSUM, (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes())
}

/// Returns a socket address from its parts.
pub const fn endpoint(address: Ipv4Addr, port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(address, port)
}
