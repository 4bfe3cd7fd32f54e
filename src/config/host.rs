//! Addresses and host names.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::diagnostic::Message;
use super::hint::is_invisible;
use super::network::Network;
use super::quote::shorten;
use super::types::Source;
use super::vocabulary::{ANY, LOCAL};

/// The longest name that `ip link` takes for an interface, in bytes: that of an alternative name,
/// ALTIFNAMSIZ less the final zero.
pub(super) const INTERFACE: usize = 127;

/// An IP address, with the interface that an IPv6 link-local one is on: `10.0.0.5`, `2001:db8::5`,
/// `fe80::1%eth0`.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(into = "String", try_from = "String")]
pub struct Address {
    pub ip: IpAddr,
    pub scope: Option<String>,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scope {
            Some(interface) => write!(f, "{}%{interface}", self.ip),
            None => self.ip.fmt(f),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let (ip, scope) = match text.split_once('%') {
            Some((ip, interface)) => (ip, Some(interface.to_string())),
            None => (text, None),
        };
        let ip = ip.parse().map_err(|_| format!("`{}` is not an IP address", shorten(text)))?;
        Ok(Address { ip, scope })
    }
}

/// Version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    V4,
    V6,
}

impl From<IpAddr> for Family {
    fn from(address: IpAddr) -> Family {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}

/// `10.0.0.5:53`, `[2001:db8::5]:53`, `relay.example:53`
pub fn with_port(host: impl fmt::Display, port: impl fmt::Display) -> String {
    let host = host.to_string();
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

/// Destination address that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum KeyAddress {
    /// Any address of the rule's interfaces.
    Any,
    Is(IpAddr),
}

impl fmt::Display for KeyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyAddress::Any => f.write_str(ANY),
            KeyAddress::Is(address) => address.fmt(f),
        }
    }
}

impl FromStr for KeyAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<KeyAddress, String> {
        match text {
            ANY => Ok(KeyAddress::Any),
            _ => text
                .parse()
                .map(KeyAddress::Is)
                .map_err(|_| format!("`{}` is not an IP address", shorten(text))),
        }
    }
}

/// An upstream's address: as it is, or under a name that is resolved later.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Host {
    Address(Address),
    /// A valid host name, as it was written.
    Name(String),
    /// This host, at the address that a packet came to.
    Local,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Address(address) => address.fmt(f),
            Host::Name(name) => name.fmt(f),
            Host::Local => f.write_str(LOCAL),
        }
    }
}

impl FromStr for Host {
    type Err = String;

    /// Parses an address or a host name; refuses addresses that no upstream can have.
    fn from_str(text: &str) -> Result<Host, String> {
        upstream(text).map_err(|message| message.text)
    }
}

/// Converts types to text and back, for serde.
macro_rules! as_text {
    ($($name:ident),+) => {$(
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            fn try_from(text: String) -> Result<$name, String> {
                text.parse()
            }
        }
    )+};
}

as_text!(Address, KeyAddress, Host, Network, Source);

macro_rules! from_ip {
    ($make:expr => $name:ident: $($ip:ty),+) => {$(
        impl From<$ip> for $name {
            fn from(ip: $ip) -> $name {
                ($make)(ip.into())
            }
        }
    )+};
}

from_ip!(|ip| Address { ip, scope: None } => Address: IpAddr, Ipv4Addr, Ipv6Addr, [u8; 4]);
from_ip!(KeyAddress::Is => KeyAddress: IpAddr, Ipv4Addr, [u8; 4]);

/// Returns why an upstream cannot have this address, also one that a name resolved to; none if it can.
pub fn upstream_refusal(address: &Address) -> Option<String> {
    let ip = address.ip;
    if ip.is_loopback() {
        let why = "a redirected packet cannot reach a loopback address; a receiver on this host is `local`";
        return Some(format!("{ip} cannot be an upstream: {why}"));
    }
    let why = match ip {
        IpAddr::V4(ip) if ip.is_multicast() => "224.0.0.0/4 is multicast",
        IpAddr::V4(ip) if ip.is_broadcast() => "it is the broadcast address",
        IpAddr::V6(ip) if ip.is_multicast() => "ff00::/8 is multicast",
        IpAddr::V6(ip) if ip.is_unicast_link_local() && address.scope.is_none() => {
            return Some(format!("{ip} is a link-local address, and nothing says of which link"));
        }
        _ => return refusal(ip),
    };
    Some(format!("{ip} is not a host's address: {why}"))
}

/// Returns why no packet can be addressed to this address; none if one can.
fn refusal(address: IpAddr) -> Option<String> {
    let why = match address {
        IpAddr::V4(address) => match address.octets() {
            [0, ..] => "0.0.0.0/8 means no host",
            [255, 255, 255, 255] => return None,
            [240..=255, ..] => "240.0.0.0/4 is reserved",
            _ => return None,
        },
        IpAddr::V6(address) if address.is_unspecified() => ":: means no host",
        IpAddr::V6(address) => match address.to_ipv4_mapped() {
            Some(mapped) => return Some(format!("{address} stands for {mapped}: write that")),
            None => return None,
        },
    };
    Some(format!("{address} is not a host's address: {why}"))
}

const ANY_ADDRESS: &str = "`address: any` matches every address of the interfaces";

/// Returns true for spellings of `any` in other programs' files.
pub(super) fn means_any(text: &str) -> bool {
    matches!(text, "*" | "all" | "ANY" | "Any" | "0/0" | "0.0.0.0/0" | "::/0")
}

/// Parses the address that a rule matches.
pub(super) fn key(text: &str) -> Result<KeyAddress, Message> {
    if text == ANY {
        return Ok(KeyAddress::Any);
    }
    if let Some(address) = address(text)? {
        let why = match &address.scope {
            Some(_) => {
                Some(format!("`{}`: the interface is not part of a key's address", shorten(text)))
            }
            None => refusal(address.ip),
        };
        return match why {
            Some(why) if address.ip.is_unspecified() => Err(Message::new(why).help(ANY_ADDRESS)),
            Some(why) => Err(Message::new(why)),
            None => Ok(KeyAddress::Is(address.ip)),
        };
    }
    let message = Message::new(format!("`{}` is not an IP address", shorten(text)));
    if means_any(text) {
        return Err(message.help(ANY_ADDRESS));
    }
    Err(match host_name(text) {
        Ok(_) => message.help("a key has an address, like 10.0.0.5, or `any`, and no host name"),
        Err(_) => message,
    })
}

/// Parses the address or host name of an upstream.
pub(super) fn upstream(text: &str) -> Result<Host, Message> {
    if text == ANY {
        return Err(Message::new(format!("`{ANY}` is no host: only a key's address can be that")));
    }
    if text == LOCAL {
        return Ok(Host::Local);
    }
    let Some(address) = address(text)? else {
        return host_name(text).map(|name| Host::Name(name.into()));
    };
    match upstream_refusal(&address) {
        Some(why) if is_link_local(&address.ip) => {
            Err(Message::new(why).help(format!("write its interface behind: `{text}%eth0`")))
        }
        Some(why) => Err(Message::new(why)),
        None => Ok(Host::Address(address)),
    }
}

/// Parses a word for the source of packets, or its address, with or without a port.
pub(super) fn source(text: &str) -> Result<Source, Message> {
    if let Some((_, source)) = Source::WORDS.iter().find(|(word, _)| *word == text) {
        return Ok(*source);
    }
    let endpoint = match (text.parse::<IpAddr>(), text.parse::<SocketAddr>()) {
        (Ok(address), _) => Some((address, None)),
        (_, Ok(endpoint)) => Some((endpoint.ip(), Some(endpoint.port()))),
        _ => None,
    };
    let Some((address, port)) = endpoint else {
        let message = format!("`{}` is neither a word for a source nor an address", shorten(text));
        let help = "an address is `10.0.0.9`, one with a port `\"10.0.0.9:9995\"` or \
                    `\"[2001:db8::9]:9995\"`";
        return Err(Message::new(message).help(help));
    };
    let why = match address {
        _ if port == Some(0) => Some("0 is not a port (1 to 65535)".into()),
        IpAddr::V6(address) if address.is_unicast_link_local() => {
            Some(format!("{address} is a link-local address, which no router forwards"))
        }
        _ => upstream_refusal(&address.into())
            .map(|_| format!("{address} cannot be a source: it is not the address of one host")),
    };
    match why {
        Some(why) => Err(Message::new(why)),
        None => Ok(Source::Fixed { address, port }),
    }
}

/// Returns true for text that is meant as an address rather than a word.
pub(super) fn resembles_address(text: &str) -> bool {
    text.contains(['.', ':']) || text.starts_with(|first: char| first.is_ascii_digit())
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// Parses an address; none for text that does not look like one.
fn address(text: &str) -> Result<Option<Address>, Message> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(Some(ip.into()));
    }
    if let Some((ip, interface)) = text.split_once('%')
        && let Ok(ip) = ip.parse::<IpAddr>()
    {
        return scoped(ip, interface).map(Some);
    }
    let message = || Message::new(format!("`{}` is not an IP address", shorten(text)));
    let host_and_port = match text.strip_prefix('[') {
        Some(bracketed) => bracketed.split_once("]:"),
        None => text.split_once(':'),
    };
    if let Some((host, port)) = host_and_port
        && port.parse::<u16>().is_ok()
    {
        let help =
            format!("the port is a field of its own: `address: {}`, `port: {port}`", shorten(host));
        return Err(message().help(help));
    }
    let inside = text.trim_start_matches('[').trim_end_matches(']');
    if inside.parse::<Ipv6Addr>().is_ok() {
        return Err(message().help(format!("write it without brackets: `{inside}`")));
    }
    if let Some((network, _)) = text.split_once('/')
        && network.parse::<IpAddr>().is_ok()
    {
        return Err(message().help("a network has no place here, only one address"));
    }
    if text.matches(':').count() > 1 {
        return Err(message());
    }
    // A resolver takes 1.2.3 and 0x7f.1 for addresses; here they are mistakes.
    if text.rsplit('.').next().is_some_and(is_number) {
        let help = "an address is four numbers from 0 to 255, without leading zeros, like 10.0.0.5";
        return Err(message().help(help));
    }
    Ok(None)
}

fn scoped(ip: IpAddr, interface: &str) -> Result<Address, Message> {
    if !is_link_local(&ip) {
        let message = format!("{ip} is no link-local address, and so has no interface");
        return Err(Message::new(message).help(format!("write `{ip}`")));
    }
    let scope = Some(interface_name(interface)?);
    Ok(Address { ip, scope })
}

/// Checks the name of an interface by the kernel's rules.
pub(super) fn interface_name(name: &str) -> Result<String, Message> {
    let refuse = |why: &str| {
        let message = format!("`{}` cannot be an interface: {why}", shorten(name));
        Err(Message::new(message))
    };
    let forbidden =
        |c: char| c.is_whitespace() || c.is_control() || is_invisible(c) || c == '/' || c == ':';
    match name {
        "" => refuse("its name is empty"),
        "." | ".." => refuse("the kernel refuses that name"),
        _ if name.len() > INTERFACE => refuse("its name is longer than 127 bytes"),
        _ if name.contains(forbidden) => {
            refuse("its name has a blank, a control or invisible character, a `/` or a `:`")
        }
        _ => Ok(name.into()),
    }
}

fn is_number(label: &str) -> bool {
    let hexadecimal = label.strip_prefix("0x").or(label.strip_prefix("0X"));
    !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_digit())
        || hexadecimal.is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Checks a host name by RFC 1123. An underscore is allowed: container engines resolve such names.
fn host_name(text: &str) -> Result<&str, Message> {
    let message = |help: &str| {
        let message = format!("`{}` is neither an IP address nor a host name", shorten(text));
        Err(Message::new(message).help(help))
    };
    let name = text.strip_suffix('.').unwrap_or(text);
    if name.len() > 253 {
        return message("a host name has at most 253 characters");
    }
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return message("each part between the dots of a host name has 1 to 63 characters");
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if !label.bytes().all(allowed) {
            return message("a host name is made of letters, digits, `-` and `.`");
        }
        if label.starts_with('-') || label.ends_with('-') {
            return message("no part of a host name begins or ends with `-`");
        }
    }
    Ok(text)
}
