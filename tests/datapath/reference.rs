//! The specification of the packet path as code. It follows the RFCs and docs/, not the program that is
//! compared with it.
//!
//! ```text
//! frame ─ untag ─ IP ─ UDP or a later fragment ─ rule ─ for us? ─ well-formed? ─ whose? ─ upstream ─ TTL ─ way ─ MTU ─ rewrite
//! ```
//!
//! Each packet ends with one counted verdict; [`Host::judge`] follows that line.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

use udplb::config::{Action, Admission, Fragments, Hash, KeyAddress, Mode, Source, Strategy};
use udplb::desired::{Rule, RuleIds, Upstream};

use crate::common::wire::Tag;
use crate::packet::Mac;
use crate::program::Counted;

/// A name of `VERDICTS`.
pub type Verdict = &'static str;

/// The one that packets come to.
#[derive(Clone, Debug)]
pub struct Host {
    /// MAC address of the input interface.
    pub mac: Mac,
    pub rules: Vec<(Rule, RuleIds)>,
    /// Addresses that the key address `any` matches.
    pub addresses: Vec<IpAddr>,
    /// The subnets' broadcast addresses.
    pub broadcasts: Vec<IpAddr>,
    /// VLANs that it is in: protocols and ids of the tags, the outermost first.
    pub vlans: Vec<Vec<(u16, u16)>>,
    /// MAC address of the VLANs' interfaces.
    pub vlan_mac: Mac,
    /// The longest frame that the interfaces take; IP packets may have bytes behind them.
    pub longest: usize,
    /// By the address of the upstream; there is no route to others.
    pub ways: BTreeMap<IpAddr, Way>,
    pub hashed: Hashed,
}

#[derive(Clone, Debug)]
pub struct Way {
    /// Maximum length of whole IP packets.
    pub mtu: usize,
    /// This host's and the next hop's; none: the kernel has to ask for the next hop's.
    pub macs: Option<(Mac, Mac)>,
    /// Verdict that a sent packet counts as.
    pub verdict: Verdict,
    /// This host's address on that way.
    pub egress: Option<IpAddr>,
}

/// Chooses for a rule by the sender's address and port. The hashes themselves are not specified
/// here; that user space and the program agree on them is tested elsewhere.
pub type Hashed = fn(&Rule, IpAddr, u16) -> usize;

/// A receiver of packets, and the id of its counters.
#[derive(Clone, Copy)]
struct Receiver<'host> {
    upstream: &'host Upstream,
    id: u32,
    source: Source,
    /// Maximum number of earlier copies to the same host.
    again: usize,
    /// Packets from any source address are sent.
    martians: bool,
}

/// A packet, as it comes in.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'frame> {
    pub frame: &'frame [u8],
    /// Held beside the bytes.
    pub tag: Option<Tag>,
    /// The payload of a segment, if it is to be cut into some.
    pub gso_size: usize,
    /// 0: not counted yet.
    pub gso_segs: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub end: End,
    pub copies: Vec<Gone>,
    pub counted: Counted,
}

/// Fate of the packet itself.
#[derive(Clone, Debug, Default)]
pub enum End {
    /// Up the stack with every byte that it came with.
    #[default]
    Up,
    Dropped,
    /// Out, without a tag.
    Away(Gone),
    /// Dropped, and its sender may be told why.
    Answered(Answer),
}

/// A frame that leaves.
#[derive(Clone, Debug)]
pub struct Gone {
    pub frame: Vec<u8>,
    /// It is a piece of what was too large: those leave last.
    pub is_piece: bool,
    /// Its identification is new, and the same in all fragments of the datagram.
    pub fresh: Option<Fresh>,
}

#[derive(Clone, Debug)]
pub struct Fresh {
    datagram: Datagram,
    receiver: Place,
    host: IpAddr,
    /// Several senders are one there.
    is_merged: bool,
    /// Offset of the identification in the frame.
    field: Range<usize>,
}

/// An ICMP error.
#[derive(Clone, Debug)]
pub struct Answer {
    pub from: IpAddr,
    pub to: IpAddr,
    /// The MTU to use; none: the time was exceeded.
    pub mtu: Option<usize>,
    /// Beginning of the frame: the MAC addresses swapped, and the tags.
    pub link: Vec<u8>,
    /// The packet that was too big or too old.
    pub about: Vec<u8>,
    /// Number of bytes that must be quoted.
    pub least: usize,
}

/// Key of a datagram's fragments: source, destination, identification (RFC 791 section 3.2; IPv4's protocol
/// is always UDP here. In RFC 8200 section 4.5 the next header is not part of it: it may differ from
/// fragment to fragment). Whole datagrams have numbers of their own, above all identifications.
type Datagram = (IpAddr, IpAddr, u64);

/// A receiver: its id, and how many there are before it at its host.
type Place = (u32, usize);

/// The table of first fragments.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Indices of the rule and of its upstream; none: another datagram that is no rule's has the
    /// identification now.
    followed: HashMap<Datagram, Option<(usize, usize)>>,
    /// By datagram and receiver: the host and the new identification.
    fresh: HashMap<(Datagram, Place), (IpAddr, Vec<u8>)>,
    /// The packets that came.
    packets: u64,
}

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: [u16; 2] = [0x8100, 0x88a8];

/// Tags that are looked through in a frame.
const TAGS: usize = 2;

/// Extension headers that are looked through.
const EXTENSIONS: usize = 8;

/// The UDP header begins within so many bytes of the IPv6 packet.
const HEADERS: usize = 512;

/// Next header values, RFC 8200 section 4.
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// The beginning of a frame.
enum Parsed {
    /// Nothing to look at.
    Other,
    /// IPv6 whose extension headers are too many or cut off, in a frame of so many bytes.
    Unreadable {
        destination: IpAddr,
        bytes: usize,
    },
    Packet(Packet),
}

/// UDP, or a later fragment of what may be UDP.
struct Packet {
    /// Without its tags.
    bytes: Vec<u8>,
    source: IpAddr,
    destination: IpAddr,
    /// TTL or hop limit.
    ttl: u8,
    /// End of the IP packet by its header; the frame may end sooner.
    end: usize,
    /// Offset of the UDP header, or of a later fragment's data.
    body: usize,
    /// None: it is whole.
    fragment: Option<Fragment>,
    /// True if the fragment's datagram may be UDP, by this fragment's header.
    may_be_udp: bool,
    /// Offset of an IPv4 fragment's data in its datagram.
    offset: usize,
    /// May be told to use a smaller MTU.
    dont_fragment: bool,
    gso_size: usize,
    gso_segs: usize,
    /// Number of the packet, in order of arrival.
    number: u64,
}

struct Fragment {
    first: bool,
    identification: u32,
    /// Range of the field in the frame.
    field: Range<usize>,
}

impl Host {
    /// The packet's way; `table` is what the packets before left behind.
    pub fn judge(&self, table: &mut Table, arrival: Arrival<'_>) -> Outcome {
        let packet = match self.parse(arrival) {
            Parsed::Other => return Outcome::default(),
            Parsed::Unreadable { destination, bytes } => {
                return match self.has_key(destination) {
                    true => Outcome::default().counted(0, "malformed", (1, bytes as u64)),
                    false => Outcome::default(),
                };
            }
            Parsed::Packet(packet) => packet,
        };
        table.packets += 1;
        let packet = Packet { number: table.packets, ..packet };
        let count = packet.count();
        let found = match packet.is_later() {
            true => match table.followed.get(&packet.datagram()) {
                Some(None) => return Outcome::default(),
                followed => followed.copied().flatten(),
            },
            false => self.rule_for(&packet).map(|rule| {
                let chosen = self.choose(&self.rules[rule].0, &packet);
                (rule, chosen)
            }),
        };
        let Some((index, chosen)) = found else {
            if packet.is_first() {
                table.correct(packet.datagram());
            }
            if !packet.is_later() {
                return Outcome::default();
            }
            return match self.has_key(packet.destination) && packet.may_be_udp {
                true => Outcome::default().counted(0, "fragment-early", count),
                false => Outcome::default(),
            };
        };
        let (rule, ids) = &self.rules[index];
        if !self.is_for_us(&packet, arrival) {
            return Outcome::default().counted(ids.rule, "not-for-us", count);
        }
        if let Some(verdict) = self.objection(rule, &packet) {
            if packet.is_first() {
                table.correct(packet.datagram());
            }
            return Outcome::unsent(rule).counted(ids.rule, verdict, count);
        }
        if packet.fragment.is_some() {
            if packet.is_first() {
                table.remember(packet.datagram(), (index, chosen));
            }
            let outcome = match rule.fragments {
                Fragments::Follow => None,
                Fragments::Pass => Some(Outcome::default()),
                Fragments::Drop => Some(Outcome { end: End::Dropped, ..Outcome::default() }),
            };
            if let Some(outcome) = outcome {
                return outcome.counted(ids.rule, "fragment", count);
            }
        }
        let upstreams = receivers(rule, &rule.upstreams, &ids.upstreams, &[]);
        match rule.mode {
            Mode::Balance => {
                let mirrors = receivers(rule, &rule.mirrors, &ids.mirrors, &rule.upstreams);
                let outcome = self.copies(&mirrors, &packet);
                let chosen = Receiver { again: 0, ..upstreams[chosen] };
                self.balance(outcome, rule, chosen, &packet, arrival)
            }
            Mode::Replicate => {
                // the rule counts each packet once
                let outcome = self.copies(&upstreams, &packet);
                let verdicts: Vec<Verdict> =
                    upstreams.iter().map(|to| self.verdict(*to, &packet, true)).collect();
                let verdict = match verdicts.contains(&"forwarded") {
                    true => "forwarded",
                    false => verdicts.last().expect("an upstream"),
                };
                let end = Outcome::unsent(rule).end;
                Outcome { end, ..outcome }.counted(ids.rule, verdict, count)
            }
        }
    }

    fn verdict(&self, to: Receiver<'_>, packet: &Packet, copy: bool) -> Verdict {
        match self.send(to, packet, copy) {
            Ok((_, verdict)) | Err(verdict) => verdict,
        }
    }

    /// To one upstream.
    fn balance(
        &self,
        mut outcome: Outcome,
        rule: &Rule,
        to: Receiver<'_>,
        packet: &Packet,
        arrival: Arrival<'_>,
    ) -> Outcome {
        let copy = rule.action == Action::Pass;
        let verdict = match self.send(to, packet, copy) {
            Ok((mut gone, verdict)) => {
                match gone.pop_if(|gone| !copy && !gone.is_piece) {
                    Some(gone) => outcome.end = End::Away(gone),
                    None => {
                        outcome.end = Outcome::unsent(rule).end;
                        outcome.copies.append(&mut gone);
                    }
                }
                verdict
            }
            Err(verdict) => {
                outcome.end = self.end_of_unsent(rule, to, packet, arrival, verdict);
                verdict
            }
        };
        outcome.counted(to.id, verdict, packet.count())
    }

    fn copies(&self, receivers: &[Receiver<'_>], packet: &Packet) -> Outcome {
        let mut outcome = Outcome::default();
        for receiver in receivers {
            let verdict = match self.send(*receiver, packet, true) {
                Ok((mut gone, verdict)) => {
                    outcome.copies.append(&mut gone);
                    verdict
                }
                Err(verdict) => verdict,
            };
            outcome = outcome.counted(receiver.id, verdict, packet.count());
        }
        outcome
    }

    /// Up to the way out. The packet itself keeps its MAC addresses till the kernel knows the
    /// neighbour; a copy and pieces wait for that in the kernel.
    fn send(
        &self,
        to: Receiver<'_>,
        packet: &Packet,
        copy: bool,
    ) -> Result<(Vec<Gone>, Verdict), Verdict> {
        // RFC 791 section 3.2, RFC 8200 section 3: it would arrive at zero
        if packet.ttl <= 1 {
            return Err("ttl");
        }
        let way = self.ways.get(&to.upstream.address.ip);
        let source = match to.source {
            Source::Vip => packet.destination,
            Source::Preserve => packet.source,
            Source::Egress => way.and_then(|way| way.egress).ok_or("no-route")?,
        };
        let receiver = to.upstream.address.ip;
        // it would be from itself
        if stays_here(source, receiver) || !to.martians && source == receiver {
            return Err("martian");
        }
        let way = way.ok_or("no-route")?;
        let is_cut = packet.length() > way.mtu;
        if is_cut && !packet.may_be_cut() {
            return Err("mtu");
        }
        let verdict = if way.macs.is_some() { way.verdict } else { "unresolved" };
        if (copy || is_cut) && way.macs.is_none() {
            return Ok((Vec::new(), verdict));
        }
        let frame = packet.rewritten(way.macs, source, to.upstream);
        if copy && !is_cut && frame.len() > self.longest {
            return Err("clone-failed");
        }
        let is_fresh = to.again > 0 || to.source != Source::Preserve;
        let field = match &packet.fragment {
            Some(fragment) => Some(fragment.field.clone()),
            None => is_cut.then_some(ETHERNET + 4..ETHERNET + 6),
        };
        let fresh = field.filter(|_| is_fresh).map(|field| Fresh {
            datagram: packet.datagram(),
            receiver: (to.id, to.again),
            host: to.upstream.address.ip,
            is_merged: to.source != Source::Preserve,
            field,
        });
        let frames = if is_cut { cut(&frame, way.mtu) } else { vec![frame] };
        let gone = |frame| Gone { frame, is_piece: is_cut, fresh: fresh.clone() };
        Ok((frames.into_iter().map(gone).collect(), verdict))
    }

    /// Errors go to whom a packet was taken from, and for nothing that many may have got, RFC 1122
    /// section 3.2.2, RFC 4443 section 2.4.
    fn end_of_unsent(
        &self,
        rule: &Rule,
        to: Receiver<'_>,
        packet: &Packet,
        arrival: Arrival<'_>,
        verdict: Verdict,
    ) -> End {
        let mtu = self.ways.get(&to.upstream.address.ip).map(|way| way.mtu);
        let mtu = match verdict {
            "ttl" => None,
            "mtu" if packet.dont_fragment => mtu,
            _ => return Outcome::unsent(rule).end,
        };
        let (to, from) = packet.macs();
        let for_many = to != self.mac || self.is_of_many(packet.destination);
        let of_one = is_one_host(packet.source);
        let answered = rule.action == Action::Block && !packet.is_later() && of_one && !for_many;
        if !answered {
            return Outcome::unsent(rule).end;
        }
        let tags = arrival.frame.len() - packet.bytes.len();
        End::Answered(Answer {
            from: packet.destination,
            to: packet.source,
            mtu,
            link: [&from, &to, &arrival.frame[12..ETHERNET + tags]].concat(),
            about: packet.bytes[ETHERNET..packet.end].to_vec(),
            least: packet.body + 8 - ETHERNET,
        })
    }

    fn is_of_many(&self, address: IpAddr) -> bool {
        let broadcast = address == Ipv4Addr::BROADCAST || self.broadcasts.contains(&address);
        address.is_multicast() || broadcast
    }

    fn parse(&self, arrival: Arrival<'_>) -> Parsed {
        let frame = arrival.frame;
        let Some(bytes) = untagged(frame) else { return Parsed::Other };
        let parsed = match word(&bytes, ETHERNET - 2) {
            Some(IPV4) => parse_ipv4(bytes),
            Some(IPV6) => parse_ipv6(bytes),
            _ => Parsed::Other,
        };
        match parsed {
            Parsed::Packet(packet) => {
                let Arrival { gso_size, gso_segs, .. } = arrival;
                Parsed::Packet(Packet { gso_size, gso_segs, ..packet })
            }
            parsed => parsed,
        }
    }

    /// An exact address before any address, then an exact port before any port, then the smallest
    /// network of senders.
    fn rule_for(&self, packet: &Packet) -> Option<usize> {
        let header = packet.bytes.get(packet.body..packet.body + 8)?;
        let port = word(header, 2)?;
        let matching = self.rules.iter().enumerate().filter_map(|(index, (rule, _))| {
            let key = &rule.key;
            let port = key.ports.is_empty() || key.ports.iter().any(|ports| ports.contains(port));
            let networks = key.from.iter().filter(|network| network.contains(packet.source));
            let prefix = networks.map(|network| network.prefix).max();
            let sender = key.from.is_empty() || prefix.is_some();
            let rank = (key.address != KeyAddress::Any, !key.ports.is_empty(), prefix);
            let matches = self.is_address(rule, packet.destination) && port && sender;
            matches.then_some((rank, index))
        });
        matching.max().map(|(_, index)| index)
    }

    fn is_address(&self, rule: &Rule, address: IpAddr) -> bool {
        match rule.key.address {
            KeyAddress::Is(key) => key == address,
            KeyAddress::Any => self.addresses.contains(&address),
        }
    }

    /// Returns true if a rule has this address.
    fn has_key(&self, address: IpAddr) -> bool {
        self.rules.iter().any(|(rule, _)| self.is_address(rule, address))
    }

    /// The seed's mapping: the port's two bytes as a little-endian number, or the address as a
    /// number, modulo the number of upstreams.
    fn choose(&self, rule: &Rule, packet: &Packet) -> usize {
        let count = rule.upstreams.len();
        let port = word(&packet.bytes, packet.body).unwrap_or_default();
        match (rule.hash, rule.strategy, packet.source) {
            (Hash::Modulo, Strategy::SrcPort, _) => usize::from(port.swap_bytes()) % count,
            (Hash::Modulo, Strategy::SrcIp, IpAddr::V4(address)) => {
                address.to_bits() as usize % count
            }
            (_, _, source) => (self.hashed)(rule, source, port),
        }
    }

    /// By the frame's destination, or that of the VLAN's interface, and by its tags: those of IEEE
    /// 802.1Q whose id is 0 say a priority only.
    fn is_for_us(&self, packet: &Packet, arrival: Arrival<'_>) -> bool {
        let (to, _) = packet.macs();
        let mut path = Vec::new();
        let beside = arrival.tag.map(|tag| (tag.protocol, tag.control));
        for (protocol, control) in beside.into_iter().chain(tags(arrival.frame)) {
            let id = control & 0xfff;
            path.push((protocol, id));
            if !self.vlans.contains(&path) {
                if id != 0 {
                    return false;
                }
                path.pop();
            }
        }
        // the group bit of IEEE 802
        to == self.mac || to[0] & 1 == 1 || !path.is_empty() && to == self.vlan_mac
    }

    /// Why a packet is none that the rule sends on.
    fn objection(&self, rule: &Rule, packet: &Packet) -> Option<Verdict> {
        let allows = rule.martians == Admission::Allow;
        if !packet.is_well_formed() {
            return Some("malformed");
        }
        match packet.route() {
            Route::Malformed => return Some("malformed"),
            Route::GoesOn if !allows => return Some("martian"),
            _ => {}
        }
        if packet.is_later() {
            return None;
        }
        // RFC 8200 section 8.1; RFC 6935
        let unchecked = packet.source.is_ipv6() && packet.udp_field(6) == 0;
        if unchecked && rule.zero_checksum == Admission::Deny {
            return Some("no-checksum");
        }
        if !allows && self.is_martian(packet) {
            return Some("martian");
        }
        if self.addresses.contains(&packet.source) {
            return Some("loop");
        }
        if self.broadcasts.contains(&packet.source) {
            return (!allows).then_some("martian");
        }
        self.is_answer(rule, packet).then_some("loop")
    }

    /// RFC 1812 section 5.3.7, RFC 3927 section 2.7; RFC 4291 sections 2.5.2, 2.5.3, 2.5.5.2 and 2.7.
    fn is_martian(&self, packet: &Packet) -> bool {
        if packet.source == packet.destination {
            return true;
        }
        match (packet.source, packet.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let dhcp = source.is_unspecified() && destination.is_broadcast();
                let on_link = destination.is_link_local() || self.is_of_many(packet.destination);
                source.octets()[0] == 0 && !dhcp
                    || source.is_loopback()
                    || source.is_multicast()
                    || source.is_broadcast()
                    || source.is_link_local() && !on_link
            }
            (IpAddr::V6(source), _) => {
                source.is_unspecified()
                    || source.is_loopback()
                    || source.is_multicast()
                    || source.to_ipv4_mapped().is_some()
            }
            mixed => panic!("two families: {mixed:?}"),
        }
    }

    /// It comes from where an upstream of the rule got packets.
    fn is_answer(&self, rule: &Rule, packet: &Packet) -> bool {
        let port = packet.udp_field(0);
        let ports = &rule.key.ports;
        let of_key = ports.is_empty() || ports.iter().any(|ports| ports.contains(port));
        rule.destinations().any(|upstream| {
            upstream.address.ip == packet.source
                && upstream.port.map_or(of_key, |its_own| its_own == port)
        })
    }
}

/// Route that the options of an IPv4 header demand.
enum Route {
    Malformed,
    /// To other hosts first.
    GoesOn,
    EndsHere,
}

impl Packet {
    fn is_first(&self) -> bool {
        self.fragment.as_ref().is_some_and(|fragment| fragment.first)
    }

    fn is_later(&self) -> bool {
        self.fragment.as_ref().is_some_and(|fragment| !fragment.first)
    }

    fn datagram(&self) -> Datagram {
        let whole = (1 << 32) + self.number;
        let identification = self.fragment.as_ref().map_or(whole, |it| it.identification.into());
        (self.source, self.destination, identification)
    }

    /// Destination and source.
    fn macs(&self) -> (Mac, Mac) {
        let mac = |at: usize| self.bytes[at..at + 6].try_into().expect("six bytes");
        (mac(0), mac(6))
    }

    /// Returns true if the lengths are consistent: RFC 768, "Length is the length in octets of this user datagram
    /// including this header and the data. (This means the minimum value of the length is eight.)"; IP may
    /// carry more than that, a fragment less.
    fn is_well_formed(&self) -> bool {
        if self.end > self.bytes.len() {
            return false;
        }
        if self.is_later() {
            return self.body <= self.end;
        }
        let length = usize::from(self.udp_field(4));
        let fits = self.fragment.is_some() || self.body + length <= self.end;
        self.body + 8 <= self.end && length >= 8 && fits
    }

    fn udp_field(&self, at: usize) -> u16 {
        word(&self.bytes, self.body + at).unwrap_or_default()
    }

    /// RFC 791 section 3.1.
    fn route(&self) -> Route {
        if self.source.is_ipv6() {
            return Route::EndsHere;
        }
        let header = &self.bytes[ETHERNET..self.body];
        if sum(header) != u16::MAX {
            return Route::Malformed;
        }
        let (mut options, mut route) = (&header[20..], Route::EndsHere);
        while let [kind, rest @ ..] = options {
            let length = match (kind, rest) {
                (0, _) => break,
                (1, _) => 1,
                // loose and strict source routes
                (131 | 137, [length @ 3..=255, pointer, ..]) => {
                    if pointer <= length {
                        route = Route::GoesOn;
                    }
                    usize::from(*length)
                }
                (131 | 137, _) => return Route::Malformed,
                (_, [length @ 2..=255, ..]) => usize::from(*length),
                _ => return Route::Malformed,
            };
            let Some(left) = options.get(length..) else { return Route::Malformed };
            options = left;
        }
        route
    }

    /// RFC 791, section 3.2: in IPv4, if the sender allows it. What a device is to cut into
    /// segments is left to it, and what ends behind the longest datagram is no part of one.
    fn may_be_cut(&self) -> bool {
        let end = self.offset + self.end - self.body;
        self.source.is_ipv4() && !self.dont_fragment && self.gso_size == 0 && end <= 65535
    }

    /// Returns the length of the IP packet, or of the largest fragment that it is split into.
    fn length(&self) -> usize {
        match self.gso_size {
            0 => self.end - ETHERNET,
            size => self.body + 8 - ETHERNET + size,
        }
    }

    /// Packets and bytes, with the Ethernet header and without tags. Segments have headers of
    /// their own.
    fn count(&self) -> (u64, u64) {
        let headers = self.body + 8;
        let bytes = self.bytes.len();
        if self.gso_size == 0 {
            return (1, bytes as u64);
        }
        let segments = match self.gso_segs {
            0 => bytes.saturating_sub(headers).div_ceil(self.gso_size).max(1),
            segments => segments,
        };
        (segments as u64, (bytes + (segments - 1) * headers) as u64)
    }

    /// The same to another host. What is not named here leaves as it came.
    fn rewritten(&self, macs: Option<(Mac, Mac)>, source: IpAddr, to: &Upstream) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        match macs {
            Some((from, to)) => bytes[..12].copy_from_slice(&[to, from].concat()),
            // the kernel gives what is addressed to a group no neighbour's address
            None if bytes[0] & 1 == 1 => bytes[..12].fill(0),
            None => {}
        }
        let addresses = match (source, to.address.ip) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                bytes[ETHERNET + 8] -= 1;
                let addresses = [from.octets(), to.octets()].concat();
                bytes[ETHERNET + 12..ETHERNET + 20].copy_from_slice(&addresses);
                update_ipv4_checksum(&self.bytes, &mut bytes);
                addresses
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                bytes[ETHERNET + 7] -= 1;
                let addresses = [from.octets(), to.octets()].concat();
                bytes[ETHERNET + 8..ETHERNET + 40].copy_from_slice(&addresses);
                addresses
            }
            mixed => panic!("two families: {mixed:?}"),
        };
        if self.is_later() {
            return bytes;
        }
        let old_port = word(&self.bytes, self.body + 2).expect("a UDP header");
        let new_port = to.port.unwrap_or(old_port);
        bytes[self.body + 2..self.body + 4].copy_from_slice(&new_port.to_be_bytes());
        let checksum = word(&self.bytes, self.body + 6).expect("a UDP header");
        // RFC 768: zero says that there is none, and ones stand for a zero that was computed
        if checksum != 0 {
            let ports = [old_port, new_port].map(|port| port.to_be_bytes().to_vec());
            let old = [octets(self.source), octets(self.destination), ports[0].clone()].concat();
            let new = [addresses, ports[1].clone()].concat();
            let checksum = match updated(checksum, &old, &new) {
                0 => u16::MAX,
                checksum => checksum,
            };
            bytes[self.body + 6..self.body + 8].copy_from_slice(&checksum.to_be_bytes());
        }
        bytes
    }
}

/// The frame without its tags; none: it ends within one.
fn untagged(frame: &[u8]) -> Option<Vec<u8>> {
    let tags = tags(frame).count();
    word(frame, ETHERNET - 2 + tags * 4)?;
    Some([&frame[..ETHERNET - 2], &frame[ETHERNET - 2 + tags * 4..]].concat())
}

/// Protocols and controls of the frame's tags.
fn tags(frame: &[u8]) -> impl Iterator<Item = (u16, u16)> {
    let tags = (0..TAGS).map_while(|number| {
        let at = ETHERNET - 2 + number * 4;
        let protocol = word(frame, at).filter(|protocol| VLAN.contains(protocol))?;
        Some((protocol, word(frame, at + 2)?))
    });
    tags.collect::<Vec<_>>().into_iter()
}

/// RFC 791, section 3.1.
fn parse_ipv4(bytes: Vec<u8>) -> Parsed {
    let Some(header) = bytes.get(ETHERNET..ETHERNET + 20) else { return Parsed::Other };
    let length = usize::from(header[0] & 15) * 4;
    let field = |at| word(header, at).expect("within the header");
    if header[0] >> 4 != 4 || length < 20 || header[9] != UDP {
        return Parsed::Other;
    }
    let (more, offset) = (field(6) & 0x2000 != 0, field(6) & 0x1fff);
    let fragment = Fragment {
        first: offset == 0,
        identification: field(4).into(),
        field: ETHERNET + 4..ETHERNET + 6,
    };
    let address = |at: usize| -> [u8; 4] { header[at..at + 4].try_into().expect("four bytes") };
    let packet = Packet {
        source: address(12).into(),
        destination: address(16).into(),
        ttl: header[8],
        end: ETHERNET + usize::from(field(2)),
        body: ETHERNET + length,
        offset: usize::from(offset) * 8,
        dont_fragment: field(6) & 0x4000 != 0,
        gso_size: 0,
        gso_segs: 0,
        number: 0,
        fragment: (more || offset > 0).then_some(fragment),
        may_be_udp: true,
        bytes,
    };
    // the ports must have come; not all fragments have them
    let came = packet.fragment.is_some() || packet.bytes.len() >= packet.body + 8;
    if came { Parsed::Packet(packet) } else { Parsed::Other }
}

/// RFC 8200, sections 3 and 4.
fn parse_ipv6(bytes: Vec<u8>) -> Parsed {
    let Some(header) = bytes.get(ETHERNET..ETHERNET + 40) else { return Parsed::Other };
    if header[0] >> 4 != 6 {
        return Parsed::Other;
    }
    let address = |at: usize| -> [u8; 16] { header[at..at + 16].try_into().expect("16 bytes") };
    let destination = IpAddr::from(address(24));
    let unreadable = Parsed::Unreadable { destination, bytes: bytes.len() };
    let mut packet = Packet {
        source: address(8).into(),
        destination,
        ttl: header[7],
        end: ETHERNET + 40 + usize::from(word(header, 4).expect("within the header")),
        body: ETHERNET + 40,
        offset: 0,
        dont_fragment: true,
        gso_size: 0,
        gso_segs: 0,
        number: 0,
        fragment: None,
        may_be_udp: true,
        bytes: Vec::new(),
    };
    let mut next = header[6];
    let mut fragmented = false;
    for number in 0.. {
        // section 4.1: a Hop-by-Hop Options header elsewhere than first is no known next header
        let known = matches!(next, ROUTING | FRAGMENT | DESTINATION);
        if next == UDP || !known && (next != HOP_BY_HOP || number > 0) {
            break;
        }
        let extension = bytes.get(packet.body..packet.body + 8);
        let Some(extension) = extension.filter(|_| number < EXTENSIONS) else {
            return unreadable;
        };
        // sections 4.3 to 4.6
        let length = if next == FRAGMENT { 8 } else { (usize::from(extension[1]) + 1) * 8 };
        // section 4.4: this is not the final destination
        if next == ROUTING && extension[3] != 0 {
            return Parsed::Other;
        }
        // section 4.1: each of them at most once
        let again = next == FRAGMENT && fragmented;
        let end = packet.body + length;
        if again || end > bytes.len() || end > ETHERNET + HEADERS {
            return unreadable;
        }
        if next == FRAGMENT {
            fragmented = true;
            let field = word(extension, 2).expect("within the header");
            let (offset, more) = (field >> 3, field & 1 != 0);
            let identification = extension[4..8].try_into().expect("four bytes");
            // RFC 6946: one that is first and last at once is a whole packet
            packet.fragment = (more || offset > 0).then_some(Fragment {
                first: offset == 0,
                identification: u32::from_be_bytes(identification),
                field: packet.body + 4..packet.body + 8,
            });
        }
        next = extension[0];
        packet.body += length;
        if packet.is_later() {
            break;
        }
    }
    // of a later fragment this is what the data of the first begin with
    packet.may_be_udp = matches!(next, UDP | HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION);
    let came = packet.fragment.is_some() || bytes.len() >= packet.body + 8;
    let came = packet.is_later() || next == UDP && came;
    if came { Parsed::Packet(Packet { bytes, ..packet }) } else { Parsed::Other }
}

impl Outcome {
    /// Returns the outcome of a packet that cannot be sent: with `block` it is not delivered here either.
    fn unsent(rule: &Rule) -> Outcome {
        let end = if rule.action == Action::Pass { End::Up } else { End::Dropped };
        Outcome { end, ..Outcome::default() }
    }

    fn counted(mut self, id: u32, verdict: Verdict, (packets, bytes): (u64, u64)) -> Outcome {
        let sum = self.counted.entry((id, verdict)).or_default();
        *sum = (sum.0 + packets, sum.1 + bytes);
        self
    }
}

impl Table {
    /// Another datagram has the identification now.
    fn remember(&mut self, datagram: Datagram, rule_and_upstream: (usize, usize)) {
        self.followed.insert(datagram, Some(rule_and_upstream));
        self.fresh.retain(|(known, _), _| *known != datagram);
    }

    /// The same of one that is no rule's; what was not remembered is not to be remembered now.
    fn correct(&mut self, datagram: Datagram) {
        if let Some(followed) = self.followed.get_mut(&datagram) {
            *followed = None;
        }
    }

    /// Returns true if a frame is the expected one. The first fragment of a datagram chooses the identification
    /// of the later ones. Since all senders become one, no other datagram may have it (RFC 6864 section 4.3),
    /// nor may two copies for one host.
    pub fn admit(&mut self, wanted: &Gone, got: &[u8]) -> bool {
        let Some(Fresh { datagram, receiver, host, is_merged, field }) = &wanted.fresh else {
            return wanted.frame == got;
        };
        let key = (*datagram, *receiver);
        let chosen = match self.fresh.get(&key) {
            Some((_, chosen)) => Some(chosen.clone()),
            None => got.get(field.clone()).map(<[u8]>::to_vec),
        };
        let Some(chosen) = chosen else { return false };
        let taken = self.fresh.iter().any(|((other, to), (at, identification))| {
            let meets = match other == datagram {
                true => to != receiver && at == host,
                false => to == receiver && *is_merged,
            };
            meets && *identification == chosen
        });
        if taken || (!is_merged && wanted.frame[field.clone()] == chosen) {
            return false;
        }
        let mut frame = wanted.frame.clone();
        frame[field.clone()].copy_from_slice(&chosen);
        if word(&frame, ETHERNET - 2) == Some(IPV4) {
            update_ipv4_checksum(&wanted.frame, &mut frame);
        }
        self.fresh.insert(key, (*host, chosen));
        frame == got
    }
}

impl Answer {
    /// Returns true if a frame is this error: RFC 792, RFC 1191 section 4, RFC 1812 section 4.3.2.3, RFC 4443
    /// sections 3.2 and 3.3.
    pub fn is(&self, frame: &[u8]) -> bool {
        let (ip, protocol, most) = match self.from {
            IpAddr::V4(_) => (20, 1, 576),
            IpAddr::V6(_) => (40, 58, 1280),
        };
        let Some(packet) = frame.strip_prefix(&self.link[..]) else { return false };
        let least = (ip + 8 + self.least.min(self.about.len())).min(most);
        if !(least..=most).contains(&packet.len()) {
            return false;
        }
        let (header, icmp) = packet.split_at(ip);
        let addresses = [octets(self.from), octets(self.to)].concat();
        let (kind, field) = (self.kind(), self.mtu.unwrap_or_default() as u32);
        let (right_header, pseudo_header) = match self.from {
            IpAddr::V4(_) => {
                let length = word(header, 2) == Some(packet.len() as u16);
                let whole = word(header, 6).is_some_and(|field| field & 0x3fff == 0);
                let right = header[0] == 0x45 && length && whole && sum(header) == u16::MAX;
                (right && header[8] > 0 && header[9] == protocol, Vec::new())
            }
            IpAddr::V6(_) => {
                let length = word(header, 4) == Some(icmp.len() as u16);
                let right = header[0] >> 4 == 6 && length && header[7] > 0;
                let pseudo_header = (icmp.len() as u32).to_be_bytes();
                let pseudo_header = [&addresses[..], &pseudo_header, &[0, 0, 0, protocol]].concat();
                (right && header[6] == protocol, pseudo_header)
            }
        };
        right_header
            && header.ends_with(&addresses)
            && icmp[..2] == kind
            && icmp[4..8] == field.to_be_bytes()
            && sum(&[&pseudo_header, icmp].concat()) == u16::MAX
            && self.about.starts_with(&icmp[8..])
    }

    /// Type and code.
    pub fn kind(&self) -> [u8; 2] {
        match (self.from, self.mtu) {
            (IpAddr::V4(_), Some(_)) => [3, 4],
            (IpAddr::V4(_), None) => [11, 0],
            (IpAddr::V6(_), Some(_)) => [2, 0],
            (IpAddr::V6(_), None) => [3, 0],
        }
    }
}

/// "a source address that does not define a single host -- e.g., a zero address, a loopback address, a
/// broadcast address, a multicast address, or a Class E address", RFC 1122 section 3.2.2.
fn is_one_host(source: IpAddr) -> bool {
    // RFC 6890: all that begins with a zero is "this host on this network"
    let v4 = matches!(source, IpAddr::V4(address) if matches!(address.octets()[0], 0 | 240..));
    !(source.is_unspecified() || source.is_loopback() || source.is_multicast() || v4)
}

/// Returns true for packets that no router may forward: RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7.
fn stays_here(source: IpAddr, destination: IpAddr) -> bool {
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (source, destination) else { return false };
    let to_other_links = source.is_unicast_link_local() && !destination.is_unicast_link_local();
    source.is_unspecified() || source.is_loopback() || source.is_multicast() || to_other_links
}

fn receivers<'host>(
    rule: &'host Rule,
    upstreams: &'host [Upstream],
    ids: &[u32],
    others: &[Upstream],
) -> Vec<Receiver<'host>> {
    let is_at = |upstream: &Upstream, other: &Upstream| other.address.ip == upstream.address.ip;
    let receiver = |(index, (upstream, id)): (usize, (&'host Upstream, &u32))| Receiver {
        upstream,
        id: *id,
        source: rule.source_of(upstream),
        martians: rule.martians == Admission::Allow,
        again: others
            .iter()
            .chain(&upstreams[..index])
            .filter(|other| is_at(upstream, other))
            .count(),
    };
    upstreams.iter().zip(ids).enumerate().map(receiver).collect()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The number in network byte order at that place.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    words.fold(0, |sum, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). What was wrong stays wrong by as much.
fn updated(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    let inverted: Vec<u8> = old.iter().map(|byte| !byte).collect();
    !sum(&[&(!checksum).to_be_bytes(), &inverted[..], new].concat())
}

/// RFC 791, section 3.2: an example fragmentation procedure. What is behind the IP packet is left out.
pub fn cut(frame: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let header = usize::from(frame[ETHERNET] & 15) * 4;
    let field = |at: usize| word(frame, ETHERNET + at).expect("within the header");
    let end = ETHERNET + usize::from(field(2));
    let data: Vec<&[u8]> = frame[ETHERNET + header..end].chunks((mtu - header) / 8 * 8).collect();
    let (first, mut offset) = (field(6) & 0x1fff, 0);
    let piece = |(index, part): (usize, &&[u8])| {
        let more = if index + 1 < data.len() { 0x2000 } else { field(6) & 0x2000 };
        let mut piece = [&frame[..ETHERNET + header], part].concat();
        piece[ETHERNET + 2..ETHERNET + 4]
            .copy_from_slice(&((header + part.len()) as u16).to_be_bytes());
        let place = (first + offset) | more;
        piece[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&place.to_be_bytes());
        if index > 0 {
            leave_out_options(&mut piece[ETHERNET + 20..ETHERNET + header]);
        }
        piece[ETHERNET + 10..ETHERNET + 12].fill(0);
        let checksum = !sum(&piece[ETHERNET..ETHERNET + header]);
        piece[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&checksum.to_be_bytes());
        offset += (part.len() / 8) as u16;
        piece
    };
    data.iter().enumerate().map(piece).collect()
}

/// RFC 791, section 3.1: without the copied flag they are in the first fragment only.
fn leave_out_options(options: &mut [u8]) {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const COPIED: u8 = 0x80;
    let mut at = 0;
    while at < options.len() && options[at] != END {
        let length = match options[at] {
            NO_OPERATION => 1,
            _ => options.get(at + 1).map_or(1, |length| usize::from(*length)).max(1),
        };
        let end = options.len().min(at + length);
        if options[at] & COPIED == 0 {
            options[at..end].fill(NO_OPERATION);
        }
        at += length;
    }
}

/// For the change from one frame to the other.
fn update_ipv4_checksum(old: &[u8], new: &mut [u8]) {
    const FIELD: Range<usize> = ETHERNET + 10..ETHERNET + 12;
    let end = ETHERNET + usize::from(old[ETHERNET] & 15) * 4;
    let header = |bytes: &[u8]| [&bytes[ETHERNET..FIELD.start], &bytes[FIELD.end..end]].concat();
    let checksum = word(old, FIELD.start).expect("a header");
    let checksum = updated(checksum, &header(old), &header(new));
    new[FIELD].copy_from_slice(&checksum.to_be_bytes());
}
