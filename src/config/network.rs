//! Networks of senders.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::diagnostic::Message;
use super::quote::shorten;

/// The addresses that begin with the same `prefix` bits. Text: `10.20.0.0/16`; an address alone is
/// a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Network {
    /// Zero behind the prefix.
    pub address: IpAddr,
    pub prefix: u8,
}

impl Network {
    /// Returns the network of an address.
    pub fn new(address: IpAddr, prefix: u8) -> Network {
        let prefix = prefix.min(width(address));
        Network { address: masked(address, prefix), prefix }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && masked(address, self.prefix) == self.address
    }
}

/// Returns true if the senders in a network are among those of `from` and `not_from`, and the network of these
/// that decides: the one with the longest prefix. Where there is none, `from` must be empty.
pub fn deciding(
    from: &[Network],
    not_from: &[Network],
    senders: &Network,
) -> (bool, Option<Network>) {
    let all = from.iter().map(|it| (it, true)).chain(not_from.iter().map(|it| (it, false)));
    let around = all.filter(|(network, _)| {
        network.prefix <= senders.prefix && network.contains(senders.address)
    });
    match around.max_by_key(|(network, _)| network.prefix) {
        Some((network, admits)) => (admits, Some(*network)),
        None => (from.is_empty(), None),
    }
}

/// Returns the number of bits of an address of this family.
fn width(address: IpAddr) -> u8 {
    IpNet::from(address).max_prefix_len()
}

/// Returns the address with zeros behind the prefix, which is at most [`width`] bits long.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    IpNet::new(address, prefix).map_or(address, |network| network.network())
}

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Network {
        Network { address, prefix: width(address) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == width(self.address) {
            true => self.address.fmt(f),
            false => write!(f, "{}/{}", self.address, self.prefix),
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Network, String> {
        network(text).map_err(|message| message.text)
    }
}

/// Parses a network as it stands in a file.
pub(super) fn network(text: &str) -> Result<Network, Message> {
    let message = || Message::new(format!("`{}` is not a network", shorten(text)));
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let help = "a network is an address and the length of its prefix, like 10.20.0.0/16";
    let address: IpAddr = address.parse().map_err(|_| message().help(help))?;
    if let IpAddr::V6(mapped) = address
        && mapped.to_ipv4_mapped().is_some()
    {
        return Err(message().help("an IPv4 network is written as one"));
    }
    let Some(prefix) = prefix else { return Ok(address.into()) };
    let longest = width(address);
    let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix = match prefix.parse() {
        Ok(prefix) if digits && prefix <= longest => prefix,
        _ => {
            let help = format!("behind the `/` comes a number from 0 to {longest}");
            return Err(message().help(help));
        }
    };
    let network = Network { address: masked(address, prefix), prefix };
    if network.address != address {
        let message = format!("{address} has bits beyond the prefix of {prefix}");
        return Err(Message::new(message).help(format!("did you mean `{network}`?")));
    }
    Ok(network)
}
