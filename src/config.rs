//! A configuration file: text in, [`Config`] or [`Diagnostic`]s out. Pure.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// What happens to a matched packet here, after it was sent to its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The original goes up the local stack, byte-identical; the upstream gets a copy.
    Pass,
    /// The packet ends here: forwarded, or dropped and counted.
    Block,
}

/// What of a packet selects its upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    SrcPort,
    SrcIp,
    SrcIpPort,
}

/// How the selected key becomes a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hash {
    Modulo,
}

/// The source address of what is sent to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The destination address that the packet matched.
    Vip,
    /// The sender's own.
    Preserve,
}

/// UDP ports `first..=last`, host byte order, never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ports {
    pub first: u16,
    pub last: u16,
}

/// The destination that a rule matches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    pub address: Ipv4Addr,
    pub ports: Vec<Ports>,
}
