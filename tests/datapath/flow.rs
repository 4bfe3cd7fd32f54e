//! Selection keys, computed in user space with the arithmetic of bpf/lb.h.

use std::net::IpAddr;

use udplb::config::{Hash, Strategy, StrategyPart};
use udplb::desired::Rule;
use udplb::desired::tables::Tables;

/// Maximum length of a metric's name in bytes.
const METRIC_MOST: usize = 256;

/// Applies the finalizer of MurmurHash3.
pub fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

/// Computes the FNV-1a hash.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn fold(address: IpAddr) -> u64 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => {
            let bits = address.to_bits();
            mix(mix((bits >> 64) as u64) ^ bits as u64)
        }
    }
}

/// The sender's address, source port and destination port of a packet.
pub type Headers = (IpAddr, u16, u16);

/// Returns the key of the headers according to the rule's strategy.
pub fn header_key(rule: &Rule, headers: Headers) -> u32 {
    let (source, port, to_port) = headers;
    let number = match rule.strategy {
        Strategy::SrcPort => port.swap_bytes().into(),
        Strategy::SrcIp => fold(source),
        Strategy::DstPort => to_port.into(),
        Strategy::Parts(_) => return mix(combined(rule, headers, None)) as u32,
        _ => return by_address_and_port(source, port),
    };
    if rule.hash == Hash::Maglev { mix(number) as u32 } else { number as u32 }
}

/// Returns the key of a strategy that has the payload's key; `None` stands for a payload without one.
pub fn key_with_payload(rule: &Rule, headers: Headers, payload: Option<u32>) -> u32 {
    match (rule.strategy, payload) {
        (_, None) => by_address_and_port(headers.0, headers.1),
        (Strategy::Parts(_), payload) => mix(combined(rule, headers, payload)) as u32,
        (_, Some(payload)) => payload,
    }
}

/// Hashes the parts of a list in their order, all but the last one.
fn combined(rule: &Rule, (source, port, to_port): Headers, payload: Option<u32>) -> u64 {
    let Strategy::Parts(parts) = rule.strategy else { panic!("no list: {:?}", rule.strategy) };
    let values = parts.iter().map(|part| match part {
        StrategyPart::SrcIp => fold(source),
        StrategyPart::SrcPort => port.into(),
        StrategyPart::DstPort => to_port.into(),
        StrategyPart::Payload => payload.expect("a payload").into(),
    });
    values.reduce(|key, value| mix(key) ^ value).expect("parts")
}

/// Maximum number of further slots that are tried for a key.
const REHASHES: u32 = 8;

/// Returns the upstream of a key among `count` with a slot and a weight of one each: that of its own slot, of
/// further slots, or one by the table of spares, whichever is the first that is active.
pub fn select(key: u32, count: usize, is_active: impl Fn(&usize) -> bool) -> Option<usize> {
    let slot = |key: u32| key as usize % count;
    let mut further = key;
    let further = (0..REHASHES).map(|attempt| {
        further = (further ^ further >> 15).wrapping_mul(0x9e37_79b1).wrapping_add(attempt);
        slot(further)
    });
    let active: Vec<usize> = (0..count).filter(&is_active).collect();
    std::iter::once(slot(key)).chain(further).find(&is_active).or_else(|| {
        let share = (u64::from(mix(u64::from(key) + 1) as u32) * active.len() as u64) >> 32;
        active.get(share as usize).copied()
    })
}

/// Returns the hash that spreads the outer headers of a sender, with the port of a whole datagram.
pub fn outer_hash(source: IpAddr, port: Option<u16>) -> u32 {
    mix(fold(source) << 16 ^ u64::from(port.unwrap_or_default().swap_bytes())) as u32
}

/// Returns the key for payloads without a key.
pub fn by_address_and_port(source: IpAddr, port: u16) -> u32 {
    mix(fold(source) << 16 ^ u64::from(port)) as u32
}

/// Returns the key from bytes of the payload; `None` if the payload is too short.
pub fn payload_key(payload: &[u8], offset: usize, length: usize) -> Option<u32> {
    payload.get(offset..offset + length).map(|bytes| mix(fnv(bytes)) as u32)
}

/// Returns the key from the first metric's name; `None` without a name. Empty lines are skipped.
pub fn metric_key(payload: &[u8]) -> Option<u32> {
    let start = payload.iter().position(|byte| !matches!(byte, b'\r' | b'\n'))?;
    let payload = &payload[start..];
    let end = payload.iter().take(METRIC_MOST + 1).position(|byte| matches!(byte, b':' | b'\n'))?;
    let name = &payload[..end];
    (payload[end] == b':' && end > 0).then(|| mix(fnv(name)) as u32)
}

/// Returns the upstream of a key in the tables of a configuration, for the rule with this id.
pub fn upstream(tables: &Tables, rule_id: u32, key: u32) -> usize {
    let rule = tables.rules.iter().find(|rule| rule.id == rule_id).expect("the rule");
    let slot = (rule.first_slot + key % rule.slots) as usize;
    let width = tables.slots[0].upstream.len();
    tables.slots[slot / width].upstream[slot % width].into()
}
