//! Questions to services and the check of their answers, pure. A nonce in each question keeps late and guessed answers
//! from counting.

mod ber;

use std::net::IpAddr;

use hmac::{Hmac, KeyInit, Mac};
use md5::{Digest, Md5};

use crate::config::Check;
use crate::config::health::{matches, pattern, payload};

/// Random bytes of one question.
pub type Nonce = [u8; 16];

/// RADIUS: code, identifier, length and authenticator.
const RADIUS_HEADER: usize = 20;
const STATUS_SERVER: u8 = 12;
const ACCESS_ACCEPT: u8 = 2;
const ACCOUNTING_RESPONSE: u8 = 5;
const MESSAGE_AUTHENTICATOR: u8 = 80;

/// Returns the datagram that asks. Empty for checks over TCP.
pub fn question(check: &Check, nonce: &Nonce, address: IpAddr) -> Vec<u8> {
    match check {
        Check::Udp { send, .. } => payload(send).unwrap_or_default(),
        Check::Icmp {} => echo(address, nonce),
        Check::Dns { name, .. } => dns(name.as_deref(), nonce),
        Check::Ntp { .. } => {
            // version 4, mode client; the answer repeats the transmit timestamp
            let mut request = vec![0x23];
            request.resize(40, 0);
            request.extend(&nonce[..8]);
            request
        }
        Check::Snmp { community, .. } => ber::get_uptime(community.as_bytes(), request_id(nonce)),
        Check::Sip { .. } => sip(address, nonce),
        Check::Radius { secret, .. } => radius(secret.as_bytes(), nonce),
        Check::Tcp(_) | Check::Http { .. } | Check::Syslog { .. } => Vec::new(),
    }
}

/// Returns true if a datagram answers the question with this nonce.
pub fn is_answer(check: &Check, nonce: &Nonce, answer: &[u8]) -> bool {
    match check {
        Check::Udp { expect, .. } => {
            let expect = expect.as_deref().map(pattern).and_then(Result::ok).unwrap_or_default();
            matches(&expect, answer)
        }
        Check::Icmp {} => {
            const REPLIES: [u8; 2] = [0, 129];
            answer.len() >= 8 && REPLIES.contains(&answer[0]) && answer[8..] == nonce[..]
        }
        Check::Dns { name, .. } => is_dns_answer(name.is_some(), nonce, answer),
        Check::Ntp { .. } => {
            const SERVER: u8 = 4;
            const UNSYNCHRONISED: u8 = 3;
            answer.len() >= 48
                && answer[0] & 7 == SERVER
                && answer[0] >> 6 != UNSYNCHRONISED
                && (1..16).contains(&answer[1])
                && answer[24..32] == nonce[..8]
        }
        Check::Snmp { .. } => ber::is_response(answer, request_id(nonce)),
        Check::Sip { .. } => is_sip_answer(nonce, answer),
        Check::Radius { secret, .. } => is_radius_answer(secret.as_bytes(), nonce, answer),
        Check::Tcp(_) | Check::Http { .. } | Check::Syslog { .. } => false,
    }
}

/// Returns the request of an HTTP check.
pub fn http(path: &str, host: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: udplb\r\nConnection: close\r\n\r\n")
}

/// Checks the beginning of an HTTP answer; `None` while more is needed.
pub fn http_answer(expected: Option<u32>, answer: &[u8]) -> Option<bool> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    match (response.parse(answer), response.code) {
        (Err(httparse::Error::TooManyHeaders) | Ok(_), Some(code)) => Some(match expected {
            Some(expected) => u32::from(code) == expected,
            None => (200..400).contains(&code),
        }),
        (Err(_), _) => Some(false),
        (Ok(_), None) => None,
    }
}

/// An ICMP echo request; the kernel fills in identifier and checksum.
fn echo(address: IpAddr, nonce: &Nonce) -> Vec<u8> {
    let kind = if address.is_ipv6() { 128 } else { 8 };
    [&[kind, 0, 0, 0, 0, 0, nonce[0], nonce[1]], &nonce[..]].concat()
}

fn dns(name: Option<&str>, nonce: &Nonce) -> Vec<u8> {
    const A: u8 = 1;
    const NS: u8 = 2;
    // recursion desired, one question
    let mut query = vec![nonce[0], nonce[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    let labels = name.map_or("", |name| name.trim_end_matches('.')).split('.');
    for label in labels.filter(|label| !label.is_empty()) {
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    let kind = if name.is_some() { A } else { NS };
    query.extend([0, 0, kind, 0, 1]);
    query
}

fn is_dns_answer(has_name: bool, nonce: &Nonce, answer: &[u8]) -> bool {
    const SERVFAIL: u8 = 2;
    if answer.len() < 12 || answer[..2] != nonce[..2] || answer[2] & 0x80 == 0 {
        return false;
    }
    let code = answer[3] & 0xf;
    if has_name { code == 0 } else { code != SERVFAIL }
}

/// Returns a positive number whose DER form has four bytes.
fn request_id(nonce: &Nonce) -> [u8; 4] {
    [nonce[0] & 0x3f | 0x40, nonce[1], nonce[2], nonce[3]]
}

fn hex(nonce: &Nonce) -> String {
    nonce.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sip(address: IpAddr, nonce: &Nonce) -> Vec<u8> {
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let nonce = hex(nonce);
    // with `rport` the answer goes to the address and port that the request came from
    format!(
        "OPTIONS sip:{host} SIP/2.0\r\n\
         Via: SIP/2.0/UDP udplb.invalid;branch=z9hG4bK{nonce};rport\r\n\
         Max-Forwards: 70\r\n\
         From: <sip:udplb@udplb.invalid>;tag={nonce}\r\n\
         To: <sip:{host}>\r\n\
         Call-ID: {nonce}@udplb.invalid\r\n\
         CSeq: 1 OPTIONS\r\n\
         Content-Length: 0\r\n\r\n"
    )
    .into_bytes()
}

fn is_sip_answer(nonce: &Nonce, answer: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(answer) else { return false };
    if !text.contains("\r\n\r\n") {
        return false;
    }
    let status = text.strip_prefix("SIP/2.0 ").and_then(|rest| rest.get(..3)?.parse().ok());
    status.is_some_and(|status: u16| (100..500).contains(&status)) && text.contains(&hex(nonce))
}

fn radius(secret: &[u8], nonce: &Nonce) -> Vec<u8> {
    let length = RADIUS_HEADER + 18;
    let mut request = vec![STATUS_SERVER, nonce[0], 0, length as u8];
    request.extend(nonce);
    request.extend([MESSAGE_AUTHENTICATOR, 18]);
    request.resize(length, 0);
    let mut mac = Hmac::<Md5>::new_from_slice(secret).expect("HMAC takes keys of any length");
    mac.update(&request);
    request[RADIUS_HEADER + 2..].copy_from_slice(&mac.finalize().into_bytes());
    request
}

fn is_radius_answer(secret: &[u8], nonce: &Nonce, answer: &[u8]) -> bool {
    if answer.len() < RADIUS_HEADER {
        return false;
    }
    let length = usize::from(u16::from_be_bytes([answer[2], answer[3]]));
    if ![ACCESS_ACCEPT, ACCOUNTING_RESPONSE].contains(&answer[0])
        || answer[1] != nonce[0]
        || !(RADIUS_HEADER..=answer.len()).contains(&length)
    {
        return false;
    }
    let mut digest = Md5::new();
    digest.update(&answer[..4]);
    digest.update(nonce);
    digest.update(&answer[RADIUS_HEADER..length]);
    digest.update(secret);
    digest.finalize()[..] == answer[4..RADIUS_HEADER]
}

#[cfg(test)]
mod tests;
