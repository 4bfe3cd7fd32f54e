//! IPsec policies (`ip xfrm policy`). Packets of udplb bypass them: a packet that a policy would have
//! encrypted, or dropped, leaves in clear.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use rtnetlink::sys::{Socket, SocketAddr};

use super::lost;
use crate::config::Network;
use crate::net::policy::{Match, covers};
use crate::net::routing::Senders;

/// An output policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecurityPolicy {
    pub source: Network,
    pub destination: Network,
    /// IP protocol; 0 for any.
    pub protocol: u8,
    pub source_port: PortMask,
    pub port: PortMask,
    /// Index of the output interface; 0 for any.
    pub ifindex: u32,
    /// Priority; the lowest value is matched first.
    pub priority: u32,
    pub effect: Effect,
}

/// A port with a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortMask {
    pub port: u16,
    pub mask: u16,
}

/// Effect of a policy on packets that match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Packets leave unchanged.
    Bypass,
    /// Packets are transformed, usually encrypted.
    Protect,
    Drop,
}

/// A set of outgoing packets.
#[derive(Clone, Debug)]
pub struct OutgoingFlow<'a> {
    pub address: IpAddr,
    pub senders: &'a Senders,
    /// This host's source address on the path.
    pub egress: Option<IpAddr>,
    /// Destination port; `None` for any.
    pub port: Option<u16>,
    pub ifindex: u32,
}

impl PortMask {
    fn matches(self, port: Option<u16>) -> Match {
        match port {
            _ if self.mask == 0 => Match::All,
            None => Match::Some,
            Some(port) if (port ^ self.port) & self.mask == 0 => Match::All,
            Some(_) => Match::No,
        }
    }
}

impl SecurityPolicy {
    fn matches(&self, flow: &OutgoingFlow<'_>) -> Match {
        const UDP: u8 = 17;
        let is = |is: bool| if is { Match::All } else { Match::No };
        let source = match (flow.senders, flow.egress) {
            (Senders::Among(networks), _) => covers(self.source, networks),
            (Senders::Own, Some(own)) => covers(self.source, &[own.into()]),
            (Senders::Own, None) => covers(self.source, &[]),
        };
        is(self.destination.contains(flow.address))
            .min(is(self.protocol == 0 || self.protocol == UDP))
            .min(is(self.ifindex == 0 || self.ifindex == flow.ifindex))
            .min(self.port.matches(flow.port))
            .min(self.source_port.matches(None))
            .min(if self.source.address.is_ipv4() == flow.address.is_ipv4() {
                source
            } else {
                Match::No
            })
    }

    /// Describes the policy as `ip xfrm policy` does.
    pub fn text(&self) -> String {
        let mut text = format!("src {} dst {}", self.source, self.destination);
        if self.protocol != 0 {
            text += &format!(" proto {}", self.protocol);
        }
        if self.port.mask != 0 {
            text += &format!(" dport {}", self.port.port);
        }
        text
    }
}

/// Returns the first policy that drops or transforms packets of a flow. `policies` are sorted by priority.
pub fn in_the_way<'a>(
    policies: &'a [SecurityPolicy],
    flow: &OutgoingFlow<'_>,
) -> Option<&'a SecurityPolicy> {
    for policy in policies {
        match (policy.effect, policy.matches(flow)) {
            (_, Match::No) | (Effect::Bypass, Match::Some) => {}
            (Effect::Bypass, Match::All) => return None,
            _ => return Some(policy),
        }
    }
    None
}

/// Parses a message of a dump: `struct xfrm_userpolicy_info` and attributes. Returns `None` unless it is an
/// output policy for packets without a mark and without an xfrm interface.
pub fn parse(message: &[u8]) -> Option<SecurityPolicy> {
    const INFO: usize = 168;
    const OUT: u8 = 1;
    const ALLOW: u8 = 0;
    const TEMPLATES: u16 = 5;
    const MARK: u16 = 21;
    const IF_ID: u16 = 31;
    let info = message.get(..INFO)?;
    let short = |at: usize| u16::from_be_bytes([info[at], info[at + 1]]);
    let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
    if info[160] != OUT {
        return None;
    }
    let (mut protects, mut applies) = (false, true);
    for (kind, value) in attributes(&message[INFO..]) {
        let words: Vec<u32> = value
            .chunks_exact(4)
            .map(|word| u32::from_ne_bytes(word.try_into().expect("four")))
            .collect();
        match kind {
            TEMPLATES => protects = !value.is_empty(),
            // Packets have mark 0.
            MARK => applies &= matches!(words[..], [value, mask] if value & mask == 0),
            IF_ID => applies &= words.first() == Some(&0),
            _ => {}
        }
    }
    let ipv6 = i32::from(u16::from_ne_bytes([info[40], info[41]])) == libc::AF_INET6;
    let network = |at: usize, prefix: u8| {
        let bytes: [u8; 16] = info[at..at + 16].try_into().expect("sixteen bytes");
        let address = match ipv6 {
            true => IpAddr::from(Ipv6Addr::from(bytes)),
            false => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
        };
        Network::new(address, prefix)
    };
    applies.then(|| SecurityPolicy {
        destination: network(0, info[42]),
        source: network(16, info[43]),
        port: PortMask { port: short(32), mask: short(34) },
        source_port: PortMask { port: short(36), mask: short(38) },
        protocol: info[44],
        ifindex: word(48),
        priority: word(152),
        effect: match (info[161], protects) {
            (ALLOW, true) => Effect::Protect,
            (ALLOW, false) => Effect::Bypass,
            _ => Effect::Drop,
        },
    })
}

/// Iterates over the attributes after a message's fixed part.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let (length, kind) = (usize::from(half(0)?), half(2)?);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Returns the output policies, sorted by priority; none if the kernel lacks IPsec.
///
/// # Errors
/// The request failed, or a privilege is missing.
pub fn security_policies() -> io::Result<Vec<SecurityPolicy>> {
    const GET_POLICY: u16 = 0x15;
    const NEW_POLICY: u16 = 0x13;
    const HEADER: usize = 16;
    /// `struct xfrm_userpolicy_id`, all zeroes.
    const NONE: usize = 64;
    let socket = match Socket::new(rtnetlink::sys::protocols::NETLINK_XFRM) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        socket => socket?,
    };
    let mut request = vec![0; HEADER + NONE];
    let length = request.len() as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&GET_POLICY.to_ne_bytes());
    request[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut policies = Vec::new();
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        let mut rest = &buffer[..];
        while rest.len() >= HEADER {
            let word =
                |at: usize| u32::from_ne_bytes(rest[at..at + 4].try_into().expect("four bytes"));
            let (length, kind) = (word(0) as usize, u16::from_ne_bytes([rest[4], rest[5]]));
            let message = rest.get(HEADER..length).ok_or_else(|| lost("a message is cut off"))?;
            match (i32::from(kind), message.first_chunk()) {
                (_, _) if kind == NEW_POLICY => policies.extend(parse(message)),
                (libc::NLMSG_ERROR, Some(code)) => {
                    return Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(*code)));
                }
                (libc::NLMSG_DONE, _) => {
                    policies.sort_by_key(|policy| policy.priority);
                    return Ok(policies);
                }
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(source: &str, destination: &str, effect: Effect) -> SecurityPolicy {
        let any = PortMask { port: 0, mask: 0 };
        SecurityPolicy {
            source: source.parse().expect("a network"),
            destination: destination.parse().expect("a network"),
            protocol: 0,
            source_port: any,
            port: any,
            ifindex: 0,
            priority: 0,
            effect,
        }
    }

    fn found(policies: &[SecurityPolicy], senders: &[&str], port: Option<u16>) -> Option<usize> {
        let senders = senders.iter().map(|text| text.parse().expect("a network")).collect();
        let senders = Senders::Among(senders);
        let address = "10.9.0.1".parse().expect("an address");
        let flow = OutgoingFlow { address, senders: &senders, egress: None, port, ifindex: 3 };
        let found = in_the_way(policies, &flow)?;
        policies.iter().position(|policy| policy == found)
    }

    #[test]
    fn the_first_that_matches_decides() {
        let protect = policy("10.0.0.0/8", "10.9.0.0/16", Effect::Protect);
        let drop = policy("0.0.0.0/0", "0.0.0.0/0", Effect::Drop);
        let bypass = policy("0.0.0.0/0", "10.9.0.1", Effect::Bypass);
        let one = |policy: &SecurityPolicy| vec![policy.clone()];
        assert_eq!(found(&one(&protect), &["10.1.0.5"], None), Some(0));
        assert_eq!(found(&one(&protect), &["192.0.2.5"], None), None);
        assert_eq!(found(&one(&protect), &[], None), Some(0));
        assert_eq!(found(&[bypass.clone(), protect.clone()], &[], None), None);
        assert_eq!(found(&[protect.clone(), drop.clone()], &["192.0.2.5"], None), Some(1));
        let narrow = SecurityPolicy { source: bypass.source, ..bypass.clone() };
        let partial = SecurityPolicy { source: "10.1.0.0/16".parse().expect("one"), ..narrow };
        assert_eq!(found(&[partial, drop], &[], None), Some(1));
        let elsewhere = policy("10.0.0.0/8", "10.8.0.0/16", Effect::Protect);
        assert_eq!(found(&one(&elsewhere), &[], None), None);
    }

    #[test]
    fn ports_protocols_and_interfaces() {
        let all = policy("0.0.0.0/0", "0.0.0.0/0", Effect::Protect);
        let port = PortMask { port: 514, mask: 0xffff };
        for (policy, port, wanted) in [
            (SecurityPolicy { protocol: 6, ..all.clone() }, None, None),
            (SecurityPolicy { protocol: 17, ..all.clone() }, None, Some(0)),
            (SecurityPolicy { ifindex: 4, ..all.clone() }, None, None),
            (SecurityPolicy { ifindex: 3, ..all.clone() }, None, Some(0)),
            (SecurityPolicy { port, ..all.clone() }, Some(514), Some(0)),
            (SecurityPolicy { port, ..all.clone() }, Some(515), None),
            (SecurityPolicy { port, ..all.clone() }, None, Some(0)),
            (SecurityPolicy { source_port: port, ..all.clone() }, Some(514), Some(0)),
        ] {
            assert_eq!(found(std::slice::from_ref(&policy), &[], port), wanted, "{policy:?}");
        }
        let ipv6 = policy("::/0", "::/0", Effect::Protect);
        assert_eq!(found(&[ipv6], &[], None), None);
    }
}
