//! Specification of the packet path as code. Written from the RFCs and docs/, independently of the
//! program that is compared with it.
//!
//! ```text
//! frame ─ untag ─ IP ─ UDP or a later fragment ─ rule ─ for us? ─ well-formed? ─ valid source?
//!       ─ upstream ─ TTL ─ next hop ─ MTU ─ rewrite
//! ```
//!
//! Each packet gets one counted verdict. [`Host::judge`] implements these steps in this order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;

use udplb::config::{
    Action, Admission, Fragments, Hash, KeyAddress, Mode, Network, Reply, ServerId, Source,
    Strategy, Templates, Via,
};
use udplb::desired::{Rule, RuleIds, Upstream};

use crate::common::wire::Tag;
use crate::flow::Headers;
use crate::packet::Mac;
use crate::program::Counted;

/// A name of `VERDICTS`.
pub type Verdict = &'static str;

/// The relay host that receives the packets.
#[derive(Clone, Debug)]
pub struct Host {
    /// MAC address of the input interface.
    pub mac: Mac,
    pub rules: Vec<(Rule, RuleIds)>,
    /// Addresses that the key address `any` matches.
    pub addresses: Vec<IpAddr>,
    /// Broadcast addresses of the host's subnets.
    pub broadcasts: Vec<IpAddr>,
    /// VLANs of the host: protocols and ids of the tags, outermost first.
    pub vlans: Vec<Vec<(u16, u16)>>,
    /// MAC address of the VLANs' interfaces.
    pub vlan_mac: Mac,
    /// Maximum frame length of the interfaces. A frame may have bytes behind the IP packet.
    pub longest: usize,
    /// Maximum length of a frame that arrives again, in fragments, as a copy for this host or to wait for a
    /// neighbour: before 5.11 the kernel checks the MTU of the interface.
    pub longest_again: usize,
    /// Paths by upstream address; no other address has a route.
    pub ways: BTreeMap<IpAddr, NextHop>,
    /// Senders whose outer headers are taken off.
    pub decap: Vec<Network>,
    /// Ids of upstreams and mirrors that are drained.
    pub drained: HashSet<u32>,
    pub hashing: Hashing,
}

#[derive(Clone, Debug)]
pub struct NextHop {
    /// Maximum length of whole IP packets.
    pub mtu: usize,
    /// MAC addresses of this host and of the next hop; `None` if the kernel has to resolve the
    /// neighbour.
    pub macs: Option<(Mac, Mac)>,
    /// Verdict counted for a packet that is sent.
    pub verdict: Verdict,
    /// This host's address on the egress interface.
    pub egress: Option<IpAddr>,
}

/// The hashes, which are not specified here; another test checks that user space and the program compute the
/// same.
#[derive(Clone, Copy, Debug)]
pub struct Hashing {
    /// Returns the key that the headers have by the rule's strategy.
    pub key: fn(&Rule, Headers) -> u32,
    /// Returns the upstream of a key among those that are active.
    pub select: fn(u32, &[bool]) -> Option<usize>,
    /// Returns the hash in outer headers, of a sender and the port of a whole datagram.
    pub outer: fn(IpAddr, Option<u16>) -> u32,
}

/// An upstream or mirror that receives packets, and the id of its counters.
#[derive(Clone, Copy)]
struct Receiver<'host> {
    upstream: &'host Upstream,
    id: u32,
    source: Source,
    /// Way of packets that keep their destination.
    via: Option<Via>,
    /// Maximum number of earlier copies to the same host.
    again: usize,
    /// True if packets are sent whatever their source address.
    martians: bool,
}

/// A packet as received.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'frame> {
    pub frame: &'frame [u8],
    /// VLAN tag in the packet's metadata instead of its bytes.
    pub tag: Option<Tag>,
    /// Payload bytes per GSO segment; 0 for a single packet.
    pub gso_size: usize,
    /// Number of GSO segments; 0 if not computed yet.
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
    /// Delivered to the local stack unchanged.
    #[default]
    Up,
    Dropped,
    /// Delivered to a receiver on this host, and the packet without its tags.
    Here(Vec<u8>),
    /// Delivered to the local stack without its outer headers.
    Taken(Vec<u8>),
    /// Redirected out of an interface, untagged.
    Away(Gone),
    /// Dropped; an ICMP error may be sent to the sender.
    Answered(Answer),
}

/// An outgoing frame.
#[derive(Clone, Debug)]
pub struct Gone {
    pub frame: Vec<u8>,
    /// True for a fragment of a packet that exceeded the MTU. Fragments leave last.
    pub is_piece: bool,
    /// New identification, shared by all fragments of the datagram.
    pub fresh: Option<Fresh>,
}

#[derive(Clone, Debug)]
pub struct Fresh {
    datagram: Datagram,
    receiver: Place,
    host: IpAddr,
    /// True if the source address is rewritten, so that several senders share one address.
    is_merged: bool,
    /// Offset of the identification in the frame.
    field: Range<usize>,
}

/// An ICMP error.
#[derive(Clone, Debug)]
pub struct Answer {
    pub from: IpAddr,
    pub to: IpAddr,
    /// MTU reported to the sender; `None` for "time exceeded".
    pub mtu: Option<usize>,
    /// Start of the frame: swapped MAC addresses and the tags.
    pub link: Vec<u8>,
    /// The packet that the error reports.
    pub about: Vec<u8>,
    /// Minimum number of quoted bytes.
    pub least: usize,
}

/// Key of a datagram's fragments: source, destination, identification (RFC 791 section 3.2). The
/// protocol is omitted: in IPv4 it is always UDP here; in RFC 8200 section 4.5 the next header is not
/// part of the key and may differ between fragments. Unfragmented datagrams get numbers above all
/// identifications.
type Datagram = (IpAddr, IpAddr, u64);

/// A receiver: its counter id, and the number of earlier receivers on the same host.
type Place = (u32, usize);

/// The table of first fragments.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// `None` if a newer datagram that matches no rule uses the identification.
    followed: HashMap<Datagram, Option<Followed>>,
    /// Receiving host and new identification, by datagram and receiver.
    fresh: HashMap<(Datagram, Place), (IpAddr, Vec<u8>)>,
    /// Number of packets received.
    packets: u64,
}

/// Selection of a datagram.
#[derive(Clone, Debug)]
struct Followed {
    /// Index of the rule.
    rule: usize,
    /// Index of the upstream in the rule; `None` if all were drained.
    chosen: Option<usize>,
    /// Ids of upstreams and mirrors that get no copy.
    drained: HashSet<u32>,
    templates: bool,
}

const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: [u16; 2] = [0x8100, 0x88a8];

/// Maximum number of tags parsed in a frame.
const TAGS: usize = 2;

/// Maximum number of extension headers parsed.
const EXTENSIONS: usize = 8;

/// Maximum offset of the UDP header in an IPv6 packet, in bytes.
const HEADERS: usize = 512;

/// Next header values, RFC 8200 section 4.
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// The port of GUE.
const GUE: u16 = 6080;

/// "Congestion experienced", RFC 3168 section 5.
const CONGESTED: u8 = 3;

/// Result of parsing a frame.
enum Parsed {
    /// Neither UDP nor a fragment that may be UDP.
    Other,
    /// IPv6 with too many or truncated extension headers, and the length of its frame.
    Unreadable {
        destination: IpAddr,
        bytes: usize,
    },
    Packet(Packet),
}

/// A UDP packet, or a later fragment of a datagram that may be UDP.
struct Packet {
    /// The frame without its tags.
    bytes: Vec<u8>,
    /// Length of the frame with the tags in it.
    came: usize,
    source: IpAddr,
    destination: IpAddr,
    /// TTL or hop limit.
    ttl: u8,
    /// End of the IP packet according to its header; the frame may be shorter.
    end: usize,
    /// Offset of the UDP header, or of a later fragment's data.
    body: usize,
    /// `None` for an unfragmented packet.
    fragment: Option<Fragment>,
    /// True if the fragment's datagram may be UDP, by this fragment's header.
    may_be_udp: bool,
    /// Offset of an IPv4 fragment's data in its datagram.
    offset: usize,
    /// True if a "packet too big" error may be sent: IPv6, or IPv4 with DF set.
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
    /// Computes a packet's outcome. `table` holds the state left by earlier packets.
    pub fn judge(&self, table: &mut Table, arrival: Arrival<'_>) -> Outcome {
        let bytes = arrival.frame.len() as u64;
        match self.outer(arrival).map(|outer| outer.take_off(arrival.frame)) {
            None => self.judge_inner(table, arrival),
            Some(None) => self.judge_inner(table, arrival).counted(0, "malformed", (1, bytes)),
            Some(Some(frame)) => {
                let count = (1, frame.len() as u64);
                let outcome = Outcome { end: End::Taken(frame), ..Outcome::default() };
                outcome.counted(0, "decapsulated", count)
            }
        }
    }

    /// Returns the outer headers of a packet that a balancer has put into them for this host: one IP header without
    /// options of an unfragmented packet, and the UDP header of GUE.
    fn outer(&self, arrival: Arrival<'_>) -> Option<Outer> {
        let frame = arrival.frame;
        let to: Mac = frame.get(..6)?.try_into().expect("six bytes");
        let header = &frame[ETHERNET..];
        let at = |place: usize| word(header, place);
        let outer = match word(frame, ETHERNET - 2)? {
            IPV4 if header.len() >= 20 && header[0] == 0x45 && at(6)? & 0x3fff == 0 => {
                let address =
                    |at: usize| -> [u8; 4] { header[at..at + 4].try_into().expect("four") };
                Outer {
                    ends: (address(12).into(), address(16).into()),
                    protocol: header[9],
                    length: 20,
                    end: at(2)?.into(),
                    ecn: header[1] & 3,
                    is_valid: sum(&header[..20]) == u16::MAX,
                }
            }
            IPV6 if header.len() >= 40 && header[0] >> 4 == 6 => {
                let address =
                    |at: usize| -> [u8; 16] { header[at..at + 16].try_into().expect("16") };
                Outer {
                    ends: (address(8).into(), address(24).into()),
                    protocol: header[6],
                    length: 40,
                    end: 40 + usize::from(at(4)?),
                    ecn: header[1] >> 4 & 3,
                    is_valid: true,
                }
            }
            _ => return None,
        };
        let outer = match (outer.protocol, outer.ends.0) {
            (4, IpAddr::V4(_)) | (41, IpAddr::V6(_)) => outer,
            (UDP, _) if at(outer.length + 2)? == GUE && at(outer.length + 6).is_some() => {
                let room = outer.end.checked_sub(outer.length);
                let is_valid = outer.is_valid && room == at(outer.length + 4).map(usize::from);
                Outer { length: outer.length + 8, is_valid, ..outer }
            }
            _ => return None,
        };
        let (from, destination) = outer.ends;
        let trusted = self.decap.iter().any(|network| network.contains(from));
        let is_for_us = self.is_to_us(to, arrival) && self.addresses.contains(&destination);
        (trusted && is_for_us).then_some(outer)
    }

    fn judge_inner(&self, table: &mut Table, arrival: Arrival<'_>) -> Outcome {
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
                followed => followed.cloned().flatten(),
            },
            false => self.rule_for(&packet).map(|index| {
                let (rule, ids) = &self.rules[index];
                let templates = rule.templates == Templates::All && packet.has_templates();
                let chosen = self.choose(rule, ids, &packet);
                Followed { rule: index, chosen, drained: self.drained.clone(), templates }
            }),
        };
        let Some(followed) = found else {
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
        let (rule, ids) = &self.rules[followed.rule];
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
                table.remember(packet.datagram(), followed.clone());
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
        let mut upstreams = receivers(rule, &rule.upstreams, &ids.upstreams, &[]);
        match rule.mode {
            Mode::Balance => {
                let mut mirrors = receivers(rule, &rule.mirrors, &ids.mirrors, &rule.upstreams);
                mirrors.retain(|receiver| takes(receiver.upstream, &packet));
                mirrors.retain(|receiver| !followed.drained.contains(&receiver.id));
                let mut outcome = self.copies(&mirrors, &packet);
                let Some(chosen) = followed.chosen else {
                    outcome.end = Outcome::unsent(rule).end;
                    return outcome.counted(ids.rule, "no-upstream", count);
                };
                let mut chosen = upstreams.remove(chosen);
                if rule.templates == Templates::One {
                    chosen.again = 0;
                }
                if followed.templates {
                    upstreams.retain(|receiver| !self.drained.contains(&receiver.id));
                    outcome = self.template_copies(outcome, &upstreams, &packet);
                }
                self.balance(outcome, rule, chosen, &packet, arrival)
            }
            Mode::Replicate => {
                upstreams.retain(|receiver| takes(receiver.upstream, &packet));
                upstreams.retain(|receiver| !followed.drained.contains(&receiver.id));
                if upstreams.is_empty() {
                    return Outcome::unsent(rule).counted(ids.rule, "no-upstream", count);
                }
                // stable: those elsewhere stay in their order
                upstreams.sort_by_key(|receiver| receiver.upstream.is_local());
                // the last one gets the packet itself, if it is not delivered here
                let copied = upstreams.len() - usize::from(rule.action == Action::Block);
                let mut outcome = self.copies(&upstreams[..copied], &packet);
                outcome.end = Outcome::unsent(rule).end;
                let verdicts: Vec<Verdict> = (0..)
                    .zip(&upstreams)
                    .map(|(place, to)| self.verdict(*to, &packet, place < copied))
                    .collect();
                for last in &upstreams[copied..] {
                    let verdict = self.send(*last, &packet, false).map(|(gone, verdict)| {
                        outcome.leave(rule, *last, &packet, gone);
                        verdict
                    });
                    let verdict = verdict.unwrap_or_else(|verdict| verdict);
                    outcome = outcome.counted(last.id, verdict, count);
                }
                // the rule counts each packet once
                let verdict = match verdicts.contains(&"forwarded") {
                    true => "forwarded",
                    false => verdicts.last().expect("an upstream"),
                };
                outcome.counted(ids.rule, verdict, count)
            }
        }
    }

    fn verdict(&self, to: Receiver<'_>, packet: &Packet, copy: bool) -> Verdict {
        match self.send(to, packet, copy) {
            Ok((_, verdict)) | Err(verdict) => verdict,
        }
    }

    /// Sends a packet, or a copy for `pass`, to one upstream.
    fn balance(
        &self,
        mut outcome: Outcome,
        rule: &Rule,
        to: Receiver<'_>,
        packet: &Packet,
        arrival: Arrival<'_>,
    ) -> Outcome {
        let copy = rule.action == Action::Pass;
        let (packets, mut bytes) = packet.count();
        let verdict = match self.send(to, packet, copy) {
            Ok((gone, verdict)) => {
                outcome.leave(rule, to, packet, gone);
                // as it leaves
                bytes += outer_length(to.via, to.upstream.address.ip) as u64;
                verdict
            }
            Err(verdict) => {
                outcome.end = self.end_of_unsent(rule, to, packet, arrival, verdict);
                verdict
            }
        };
        outcome.counted(to.id, verdict, (packets, bytes))
    }

    /// Sends templates to the upstreams that were not chosen: a copy that is sent has no verdict, but a note.
    fn template_copies(
        &self,
        mut outcome: Outcome,
        others: &[Receiver<'_>],
        packet: &Packet,
    ) -> Outcome {
        for other in others {
            let note = match self.send(*other, packet, true) {
                Ok((mut gone, _)) => {
                    outcome.copies.append(&mut gone);
                    "templates"
                }
                Err(verdict) => verdict,
            };
            outcome = outcome.counted(other.id, note, packet.count());
        }
        outcome
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

    /// Builds the frames to one receiver and their verdict. With an unresolved neighbour the packet
    /// itself keeps its MAC addresses, while a copy or fragments wait in the kernel.
    fn send(
        &self,
        to: Receiver<'_>,
        packet: &Packet,
        copy: bool,
    ) -> Result<(Vec<Gone>, Verdict), Verdict> {
        // a copy arrives again, and leaves by no interface
        if to.upstream.is_local() {
            return match copy && packet.came > self.longest_again {
                true => Err("clone-failed"),
                false => Ok((Vec::new(), "forwarded")),
            };
        }
        // RFC 791 section 3.2, RFC 8200 section 3: the decremented TTL would be zero
        if packet.ttl <= 1 {
            return Err("ttl");
        }
        let way = self.ways.get(&to.upstream.address.ip);
        let egress = way.and_then(|way| way.egress).ok_or("no-route");
        if outer_length(to.via, to.upstream.address.ip) > 0 {
            egress?;
        }
        let source = match to.source {
            Source::Vip => packet.destination,
            Source::Preserve => packet.source,
            Source::Egress => egress?,
            Source::Fixed { address, .. } => address,
        };
        let source_port = match to.source {
            Source::Fixed { port, .. } => port,
            Source::Vip | Source::Preserve | Source::Egress => None,
        };
        let receiver = to.upstream.address.ip;
        // the receiver would get a packet from its own address
        if stays_here(source, receiver) || !to.martians && source == receiver {
            return Err("martian");
        }
        let way = way.ok_or("no-route")?;
        let is_cut = packet.length() + outer_length(to.via, receiver) > way.mtu;
        if is_cut && (to.via.is_some() || !packet.may_be_cut()) {
            return Err("mtu");
        }
        if (is_cut || copy && way.macs.is_none()) && packet.bytes.len() > self.longest_again {
            return Err("clone-failed");
        }
        let verdict = if way.macs.is_some() { way.verdict } else { "unresolved" };
        if (copy || is_cut) && way.macs.is_none() {
            return Ok((Vec::new(), verdict));
        }
        let frame = match to.via {
            None => packet.rewritten(way.macs, (source, source_port), to.upstream),
            Some(via) => packet.kept(way.macs, via, (egress?, receiver), self.hashing.outer),
        };
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

    /// Returns the fate of an unsent packet. An ICMP error is sent only when the packet itself was to
    /// be sent, and never for broadcast or multicast: RFC 1122 section 3.2.2, RFC 4443 section 2.4.
    fn end_of_unsent(
        &self,
        rule: &Rule,
        to: Receiver<'_>,
        packet: &Packet,
        arrival: Arrival<'_>,
        verdict: Verdict,
    ) -> End {
        let outer = outer_length(to.via, to.upstream.address.ip);
        let mtu = self.ways.get(&to.upstream.address.ip).map(|way| way.mtu - outer);
        let mtu = match verdict {
            "ttl" => None,
            "mtu" if packet.dont_fragment || to.via.is_some() => mtu,
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
                let Arrival { frame, gso_size, gso_segs, .. } = arrival;
                Parsed::Packet(Packet { came: frame.len(), gso_size, gso_segs, ..packet })
            }
            parsed => parsed,
        }
    }

    /// Returns the matching rule. An exact address takes precedence over `any`, then an exact port over
    /// any port, then the longest sender prefix.
    fn rule_for(&self, packet: &Packet) -> Option<usize> {
        let header = packet.bytes.get(packet.body..packet.body + 8)?;
        let port = word(header, 2)?;
        let matching = self.rules.iter().enumerate().filter_map(|(index, (rule, _))| {
            let key = &rule.key;
            let port = key.ports.is_empty() || key.ports.iter().any(|ports| ports.contains(port));
            let (sender, prefix) = decide(&key.from, &key.not_from, packet.source);
            let sender = sender && (rule.mode == Mode::Balance || has_receiver(rule, packet));
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

    /// Selects the upstream; `None` if all are drained.
    fn choose(&self, rule: &Rule, ids: &RuleIds, packet: &Packet) -> Option<usize> {
        // a connection stays at its server
        if let Some(named) = packet.named(rule) {
            return Some(named);
        }
        let key = self.key(rule, packet);
        let active: Vec<bool> = ids.upstreams.iter().map(|id| !self.drained.contains(id)).collect();
        match (rule.hash, key as usize % active.len()) {
            (Hash::Modulo, own) if active[own] => Some(own),
            _ => (self.hashing.select)(key, &active),
        }
    }

    /// Returns the key of a packet. With `modulo`, as in udplb's first version: the port's two bytes read as
    /// little-endian, or the IPv4 address as a number.
    fn key(&self, rule: &Rule, packet: &Packet) -> u32 {
        let port = word(&packet.bytes, packet.body).unwrap_or_default();
        let to_port = word(&packet.bytes, packet.body + 2).unwrap_or_default();
        match (rule.hash, rule.strategy, packet.source) {
            (Hash::Modulo, Strategy::DstPort, _) => to_port.into(),
            (Hash::Modulo, Strategy::SrcPort, _) => port.swap_bytes().into(),
            (Hash::Modulo, Strategy::SrcIp, IpAddr::V4(address)) => address.to_bits(),
            (_, _, source) => (self.hashing.key)(rule, (source, port, to_port)),
        }
    }

    /// Returns true if the frame is addressed to this host: by destination MAC address (the
    /// interface's, a group's or the VLAN interface's) and tags. An 802.1Q tag with VLAN id 0 carries
    /// only a priority.
    fn is_for_us(&self, packet: &Packet, arrival: Arrival<'_>) -> bool {
        self.is_to_us(packet.macs().0, arrival)
    }

    fn is_to_us(&self, to: Mac, arrival: Arrival<'_>) -> bool {
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

    /// Returns the verdict of a packet that the rule does not forward.
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

    /// Returns true for an invalid source address: RFC 1812 section 5.3.7, RFC 3927 section 2.7; RFC
    /// 4291 sections 2.5.2, 2.5.3, 2.5.5.2 and 2.7.
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

    /// Returns true if the source address and port are those of an upstream or mirror of the rule.
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

/// Source route in an IPv4 header's options.
enum Route {
    Malformed,
    /// The route continues to other hosts.
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

    /// Returns the destination and source MAC addresses.
    fn macs(&self) -> (Mac, Mac) {
        let mac = |at: usize| self.bytes[at..at + 6].try_into().expect("six bytes");
        (mac(0), mac(6))
    }

    /// Returns true if the lengths are consistent: RFC 768, "Length is the length in octets of this
    /// user datagram including this header and the data. (This means the minimum value of the length is
    /// eight.)" The IP packet may be longer; a fragment may be shorter.
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

    /// Returns the upstream that a QUIC packet's destination connection id names in plaintext: RFC 8999 section 5,
    /// draft-ietf-quic-load-balancers. Shorter datagrams than ids of the greatest length are no packets of QUIC.
    fn named(&self, rule: &Rule) -> Option<usize> {
        let place = rule.server_id?;
        let payload = self.bytes.get(self.body + 8..)?;
        let (offset, length) = (usize::from(place.offset), usize::from(place.length));
        let connection_id = match payload.get(..6)? {
            [first, .., known] if first & 0x80 != 0 => {
                (usize::from(*known) >= offset + length).then_some(6)?
            }
            _ => 1,
        };
        let id = connection_id + offset..connection_id + offset + ServerId::MAX;
        if usize::from(self.udp_field(4)) < 8 + id.end {
            return None;
        }
        let server = ServerId::from(&payload.get(id)?[..length]);
        rule.upstreams.iter().position(|upstream| upstream.server_id.as_ref() == Some(&server))
    }

    /// Parses the options of the IPv4 header for a source route, RFC 791 section 3.1.
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

    /// Returns true if the packet may be fragmented: IPv4 without DF (RFC 791, section 3.2). GSO
    /// packets are left to the device. A fragment that ends beyond 65535 bytes belongs to no valid
    /// datagram.
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

    /// Returns packets and bytes, with the Ethernet header and without tags. Each GSO segment counts
    /// its own headers.
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

    /// Rewrites the packet for an upstream. All other bytes stay unchanged, and the source port without another
    /// one.
    fn rewritten(
        &self,
        macs: Option<(Mac, Mac)>,
        (source, source_port): (IpAddr, Option<u16>),
        to: &Upstream,
    ) -> Vec<u8> {
        let mut bytes = self.addressed(macs);
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
        self.with_ports(bytes, addresses, [source_port, to.port])
    }

    /// Returns the packet with the MAC addresses of its next hop, as far as known.
    fn addressed(&self, macs: Option<(Mac, Mac)>) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        match macs {
            Some((from, to)) => bytes[..12].copy_from_slice(&[to, from].concat()),
            // the kernel sets no neighbour's address on frames to a group address
            None if bytes[0] & 1 == 1 => bytes[..12].fill(0),
            None => {}
        }
        bytes
    }

    /// Returns the packet for an upstream that has its destination address, too: only the TTL changes. Outer headers
    /// have this host's address and the upstream's: RFC 2003, RFC 2473, draft-ietf-intarea-gue variant 1.
    fn kept(
        &self,
        macs: Option<(Mac, Mac)>,
        via: Via,
        ends: (IpAddr, IpAddr),
        hash: fn(IpAddr, Option<u16>) -> u32,
    ) -> Vec<u8> {
        let mut bytes = self.addressed(macs);
        let ttl = ETHERNET + if self.source.is_ipv4() { 8 } else { 7 };
        bytes[ttl] -= 1;
        if self.source.is_ipv4() {
            update_ipv4_checksum(&self.bytes, &mut bytes);
        }
        let port = self.fragment.is_none().then(|| self.udp_field(0));
        let outer = self.outer(via, ends, hash(self.source, port));
        [&bytes[..ETHERNET], &outer, &bytes[ETHERNET..]].concat()
    }

    fn outer(&self, via: Via, (from, to): (IpAddr, IpAddr), hash: u32) -> Vec<u8> {
        let (first, inner) = (&self.bytes[ETHERNET..], (self.end - ETHERNET) as u16);
        let udp = match via {
            Via::Link => return Vec::new(),
            Via::Ipip => Vec::new(),
            Via::Gue => {
                [0xc000 | (hash & 0x3fff) as u16, 6080, 8 + inner, 0].map(u16::to_be_bytes).concat()
            }
        };
        let ends = [octets(from), octets(to)].concat();
        let payload = (udp.len() as u16 + inner).to_be_bytes();
        if from.is_ipv6() {
            let label = hash.to_be_bytes();
            let start = [first[0], first[1] & 0xf0 | label[1] & 0x0f, label[2], label[3]];
            let rest = [if udp.is_empty() { 41 } else { 17 }, 64];
            return [&start[..], &payload, &rest, &ends, &udp].concat();
        }
        let length = (20 + udp.len() as u16 + inner).to_be_bytes();
        let protocol = if udp.is_empty() { 4 } else { 17 };
        let start = [0x45, first[1], length[0], length[1], 0, 0, 0x40, 0, 64, protocol];
        let checksum = (!sum(&[&start[..], &ends].concat())).to_be_bytes();
        [&start[..], &checksum, &ends, &udp].concat()
    }

    /// Rewrites the packet for a receiver on this host, which has a port of its own.
    fn arrived(&self, to: &Upstream) -> Vec<u8> {
        let addresses = [octets(self.source), octets(self.destination)].concat();
        self.with_ports(self.bytes.clone(), addresses, [None, to.port])
    }

    /// Replaces source and destination port, and the checksum by them and the new addresses.
    fn with_ports(
        &self,
        mut bytes: Vec<u8>,
        addresses: Vec<u8>,
        [source_port, port]: [Option<u16>; 2],
    ) -> Vec<u8> {
        if self.is_later() {
            return bytes;
        }
        let ports = self.body..self.body + 4;
        let old_ports = &self.bytes[ports.clone()];
        for (place, port) in [(0, source_port), (2, port)] {
            if let Some(port) = port {
                bytes[self.body + place..][..2].copy_from_slice(&port.to_be_bytes());
            }
        }
        let new_ports = bytes[ports].to_vec();
        let checksum = word(&self.bytes, self.body + 6).expect("a UDP header");
        // RFC 768: zero means no checksum; a computed zero is sent as all ones
        if checksum != 0 {
            let old = [&octets(self.source), &octets(self.destination), old_ports].concat();
            let new = [addresses, new_ports].concat();
            let checksum = match updated(checksum, &old, &new) {
                0 => u16::MAX,
                checksum => checksum,
            };
            bytes[self.body + 6..self.body + 8].copy_from_slice(&checksum.to_be_bytes());
        }
        bytes
    }
}

/// Returns the frame without its tags; `None` if the frame ends within a tag.
fn untagged(frame: &[u8]) -> Option<Vec<u8>> {
    let tags = tags(frame).count();
    word(frame, ETHERNET - 2 + tags * 4)?;
    Some([&frame[..ETHERNET - 2], &frame[ETHERNET - 2 + tags * 4..]].concat())
}

/// Returns the protocol and control field of each tag in the frame.
fn tags(frame: &[u8]) -> impl Iterator<Item = (u16, u16)> {
    let tags = (0..TAGS).map_while(|number| {
        let at = ETHERNET - 2 + number * 4;
        let protocol = word(frame, at).filter(|protocol| VLAN.contains(protocol))?;
        Some((protocol, word(frame, at + 2)?))
    });
    tags.collect::<Vec<_>>().into_iter()
}

/// Parses an IPv4 packet, RFC 791, section 3.1.
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
        came: 0,
        gso_size: 0,
        gso_segs: 0,
        number: 0,
        fragment: (more || offset > 0).then_some(fragment),
        may_be_udp: true,
        bytes,
    };
    // the UDP header must be present, except in fragments
    let came = packet.fragment.is_some() || packet.bytes.len() >= packet.body + 8;
    if came { Parsed::Packet(packet) } else { Parsed::Other }
}

/// Parses an IPv6 packet, RFC 8200, sections 3 and 4.
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
        came: 0,
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
        // section 4.1: a Hop-by-Hop Options header is valid only as the first header
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
        // section 4.4: this host is not the final destination
        if next == ROUTING && extension[3] != 0 {
            return Parsed::Other;
        }
        // section 4.1: at most one Fragment header
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
            // RFC 6946: a fragment that is both first and last is a whole packet
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
    // in a later fragment, `next` is the type of the first header in the datagram's data
    packet.may_be_udp = matches!(next, UDP | HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION);
    let came = packet.fragment.is_some() || bytes.len() >= packet.body + 8;
    let came = packet.is_later() || next == UDP && came;
    if came { Parsed::Packet(Packet { bytes, ..packet }) } else { Parsed::Other }
}

/// Outer headers of a packet.
struct Outer {
    ends: (IpAddr, IpAddr),
    protocol: u8,
    /// Bytes of all outer headers.
    length: usize,
    /// End of the IP packet, from the beginning of its header.
    end: usize,
    ecn: u8,
    is_valid: bool,
}

impl Outer {
    /// Returns the frame of the inner packet; `None` if it is not whole. A mark of congestion goes into it: RFC 6040.
    fn take_off(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let room = self.end.checked_sub(self.length)?;
        if !self.is_valid || ETHERNET + self.end > frame.len() {
            return None;
        }
        let inner = &frame[ETHERNET + self.length..];
        let is_ipv4 = self.ends.0.is_ipv4();
        inner.get(..if is_ipv4 { 20 } else { 40 })?;
        let (length, header, ecn) = match is_ipv4 {
            true => (word(inner, 2)?.into(), usize::from(inner[0] & 15) * 4, inner[1] & 3),
            false => (40 + usize::from(word(inner, 4)?), 40, inner[1] >> 4 & 3),
        };
        let version = if is_ipv4 { 4 } else { 6 };
        let is_whole = header >= 20 && length >= header && length <= room;
        if inner[0] >> 4 != version || !is_whole || self.ecn == CONGESTED && ecn == 0 {
            return None;
        }
        let bare = [&frame[..ETHERNET], inner].concat();
        let mut marked = bare.clone();
        if self.ecn == CONGESTED && ecn != CONGESTED {
            marked[ETHERNET + 1] |= if is_ipv4 { CONGESTED } else { CONGESTED << 4 };
            if is_ipv4 {
                update_ipv4_checksum(&bare, &mut marked);
            }
        }
        Some(marked)
    }
}

impl Outcome {
    /// Adds frames of one receiver; a whole one is the packet itself unless that is delivered here.
    fn leave(&mut self, rule: &Rule, to: Receiver<'_>, packet: &Packet, mut gone: Vec<Gone>) {
        if to.upstream.is_local() && rule.action == Action::Block {
            self.end = End::Here(packet.arrived(to.upstream));
            return;
        }
        match gone.pop_if(|gone| rule.action == Action::Block && !gone.is_piece) {
            Some(gone) => self.end = End::Away(gone),
            None => {
                self.end = Outcome::unsent(rule).end;
                self.copies.append(&mut gone);
            }
        }
    }

    /// Returns the outcome of an unsent packet: delivered locally with `pass`, dropped with `block`.
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
    /// Records a first fragment. A new datagram uses the identification, so earlier entries are
    /// removed.
    fn remember(&mut self, datagram: Datagram, followed: Followed) {
        self.followed.insert(datagram, Some(followed));
        self.fresh.retain(|(known, _), _| *known != datagram);
    }

    /// Marks a known identification as used by a datagram that matches no rule. Unknown datagrams are
    /// not recorded.
    fn correct(&mut self, datagram: Datagram) {
        if let Some(followed) = self.followed.get_mut(&datagram) {
            *followed = None;
        }
    }

    /// Returns true if a frame is the expected one. The first fragment's identification applies to all
    /// later fragments. With a rewritten source no other datagram may use it (RFC 6864 section 4.3),
    /// and no two copies for one host may share it.
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
        let is_same = frame == got;
        if is_same {
            self.fresh.insert(key, (*host, chosen));
        }
        is_same
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

    /// Returns the ICMP type and code.
    pub fn kind(&self) -> [u8; 2] {
        match (self.from, self.mtu) {
            (IpAddr::V4(_), Some(_)) => [3, 4],
            (IpAddr::V4(_), None) => [11, 0],
            (IpAddr::V6(_), Some(_)) => [2, 0],
            (IpAddr::V6(_), None) => [3, 0],
        }
    }
}

/// Returns true if a source address belongs to a single host. RFC 1122 section 3.2.2 excludes "a source
/// address that does not define a single host -- e.g., a zero address, a loopback address, a broadcast
/// address, a multicast address, or a Class E address".
fn is_one_host(source: IpAddr) -> bool {
    // RFC 6890: 0.0.0.0/8 is "this host on this network"
    let v4 = matches!(source, IpAddr::V4(address) if matches!(address.octets()[0], 0 | 240..));
    !(source.is_unspecified() || source.is_loopback() || source.is_multicast() || v4)
}

/// Returns true for packets that no router may forward: RFC 4291, sections 2.5.2, 2.5.3, 2.5.6 and 2.7.
fn stays_here(source: IpAddr, destination: IpAddr) -> bool {
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (source, destination) else { return false };
    let to_other_links = source.is_unicast_link_local() && !destination.is_unicast_link_local();
    source.is_unspecified() || source.is_loopback() || source.is_multicast() || to_other_links
}

/// Returns true if a sender is among those of two lists, and the prefix by which it is in the first.
fn decide(from: &[Network], not_from: &[Network], sender: IpAddr) -> (bool, Option<u8>) {
    let longest =
        |list: &[Network]| list.iter().filter(|it| it.contains(sender)).map(|it| it.prefix).max();
    match (longest(from), longest(not_from)) {
        (None, None) => (from.is_empty(), None),
        (yes, no) => (yes > no, yes),
    }
}

fn takes(receiver: &Upstream, packet: &Packet) -> bool {
    decide(&receiver.from, &receiver.not_from, packet.source).0
}

fn has_receiver(rule: &Rule, packet: &Packet) -> bool {
    rule.upstreams.iter().any(|upstream| takes(upstream, packet))
}

/// Maximum number of sets of a message that are looked at.
const SETS: usize = 8;

impl Packet {
    /// Returns true if one of its datagrams has templates; a GSO packet has several.
    fn has_templates(&self) -> bool {
        let Some(length) = word(&self.bytes, self.body + 4) else { return false };
        let start = self.body + 8;
        let end = start + usize::from(length).saturating_sub(8);
        let step = if self.gso_size == 0 { usize::MAX } else { self.gso_size };
        (start..end)
            .step_by(step)
            .any(|start| has_template_set(&self.bytes, start..end.min(start.saturating_add(step))))
    }
}

/// Returns true if a message of NetFlow 9 (RFC 3954 section 5) or IPFIX (RFC 7011 section 3) has templates or
/// options templates. In a first fragment the message is longer than the bytes.
fn has_template_set(bytes: &[u8], message: Range<usize>) -> bool {
    let said = word(bytes, message.start + 2).map(usize::from);
    let (mut at, end, ids) = match (word(bytes, message.start), said) {
        (Some(9), Some(_)) => (message.start + 20, message.end, [0, 1]),
        (Some(10), Some(said)) if said <= message.len() => {
            (message.start + 16, message.start + said, [2, 3])
        }
        _ => return false,
    };
    for _ in 0..SETS {
        let (Some(id), Some(length)) = (word(bytes, at), word(bytes, at + 2)) else { return false };
        if at + 4 > end || length < 4 || at + usize::from(length) > end {
            return false;
        }
        if ids.contains(&id) {
            return true;
        }
        at += usize::from(length);
    }
    false
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
        via: (rule.reply == Reply::Direct).then(|| rule.via_of(upstream).unwrap_or(Via::Link)),
        martians: rule.martians == Admission::Allow,
        again: others
            .iter()
            .chain(&upstreams[..index])
            .filter(|other| is_at(upstream, other))
            .count(),
    };
    upstreams.iter().zip(ids).enumerate().map(receiver).collect()
}

/// Returns the length of the headers in front of a packet to an upstream.
fn outer_length(via: Option<Via>, upstream: IpAddr) -> usize {
    let ip = if upstream.is_ipv4() { 20 } else { 40 };
    match via {
        None | Some(Via::Link) => 0,
        Some(Via::Ipip) => ip,
        Some(Via::Gue) => ip + 8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Reads a big-endian 16-bit number at an offset.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Computes the one's complement sum, RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    words.fold(0, |sum, word| {
        let (sum, carry) = sum.overflowing_add(word);
        sum + u16::from(carry)
    })
}

/// Updates a checksum by RFC 1624, equation 3: HC' = ~(~HC + ~m + m'). An incorrect checksum stays
/// incorrect by the same amount.
fn updated(checksum: u16, old: &[u8], new: &[u8]) -> u16 {
    let inverted: Vec<u8> = old.iter().map(|byte| !byte).collect();
    !sum(&[&(!checksum).to_be_bytes(), &inverted[..], new].concat())
}

/// Fragments an IPv4 frame by the example procedure of RFC 791, section 3.2. Bytes behind the IP packet
/// are omitted.
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

/// Replaces options without the copied flag by no-operations: RFC 791, section 3.1 keeps them in the
/// first fragment only.
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

/// Updates the IPv4 header checksum for the differences between two frames.
fn update_ipv4_checksum(old: &[u8], new: &mut [u8]) {
    const FIELD: Range<usize> = ETHERNET + 10..ETHERNET + 12;
    let end = ETHERNET + usize::from(old[ETHERNET] & 15) * 4;
    let header = |bytes: &[u8]| [&bytes[ETHERNET..FIELD.start], &bytes[FIELD.end..end]].concat();
    let checksum = word(old, FIELD.start).expect("a header");
    let checksum = updated(checksum, &header(old), &header(new));
    new[FIELD].copy_from_slice(&checksum.to_be_bytes());
}
