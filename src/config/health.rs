//! Health checks of upstreams.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Period;
use super::vocabulary::{Field, HEALTH_FALL, HEALTH_INTERVAL, HEALTH_RISE, HEALTH_TIMEOUT};

/// Check that an upstream must pass to be selected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// None.
    #[default]
    Off,
    /// Its next hop answers, which tells little about a host behind a router.
    Neighbour,
    /// Its next hop answers, and so does the service.
    #[serde(untagged)]
    Probe(Box<Probe>),
}

/// A question to the service, and how often it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Probe {
    #[serde(flatten)]
    pub check: Check,
    /// Time between two probes.
    pub interval: Period,
    /// Time that an answer may take; at most the interval.
    pub timeout: Period,
    /// Successes in a row after which an upstream that was down is up.
    pub rise: u32,
    /// Failures in a row after which an upstream is down.
    pub fall: u32,
}

/// The question. A missing port is that of the upstream.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    Udp {
        /// See [`payload`].
        send: String,
        /// See [`pattern`]; none: any answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expect: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
    },
    Tcp(u16),
    Http {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        path: String,
        /// None: 200 to 399.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<u32>,
    },
    Icmp {},
    Dns {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        /// A name that must exist; none: any answer but SERVFAIL to a question about the root.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
    },
    Ntp {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
    },
    Snmp {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        community: String,
    },
    Sip {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
    },
    Radius {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
        secret: String,
    },
    /// A TCP connection.
    Syslog {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<u16>,
    },
}

/// Treatment of packets while all upstreams are down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AllDown {
    /// As if all were up.
    #[default]
    Open,
    Drop,
}

impl Health {
    /// Returns the probe of the service.
    pub fn probe(&self) -> Option<&Probe> {
        match self {
            Health::Probe(probe) => Some(probe),
            Health::Off | Health::Neighbour => None,
        }
    }

    /// Returns the check that a single word asks for.
    pub(super) fn from_word(word: &str) -> Option<Health> {
        let port = None;
        let check = match word {
            "off" => return Some(Health::Off),
            "neighbour" => return Some(Health::Neighbour),
            "icmp" => Check::Icmp {},
            "dns" => Check::Dns { port, name: None },
            "ntp" => Check::Ntp { port },
            "snmp" => Check::Snmp { port, community: COMMUNITY.into() },
            "sip" => Check::Sip { port },
            "syslog" => Check::Syslog { port },
            _ => return None,
        };
        Some(Health::Probe(Box::new(Probe::new(check))))
    }
}

/// Default of `snmp`.
pub(super) const COMMUNITY: &str = "public";

impl Probe {
    /// Returns a probe at the default pace.
    pub fn new(check: Check) -> Probe {
        Probe {
            check,
            interval: default(&HEALTH_INTERVAL),
            timeout: default(&HEALTH_TIMEOUT),
            rise: default(&HEALTH_RISE),
            fall: default(&HEALTH_FALL),
        }
    }
}

fn default<T: FromStr<Err: fmt::Debug>>(field: &Field) -> T {
    field.default.parse().expect("a test reads each default")
}

impl Check {
    /// Returns the port that the file names.
    pub fn port(&self) -> Option<u16> {
        match self {
            Check::Tcp(port) => Some(*port),
            Check::Icmp {} => None,
            Check::Udp { port, .. }
            | Check::Http { port, .. }
            | Check::Dns { port, .. }
            | Check::Ntp { port }
            | Check::Snmp { port, .. }
            | Check::Sip { port }
            | Check::Radius { port, .. }
            | Check::Syslog { port } => *port,
        }
    }

    /// Returns true if the question goes to a port.
    pub fn has_port(&self) -> bool {
        *self != Check::Icmp {}
    }

    /// Returns true if the question is a UDP datagram.
    pub fn is_udp(&self) -> bool {
        match self {
            Check::Tcp(_) | Check::Http { .. } | Check::Icmp {} | Check::Syslog { .. } => false,
            Check::Udp { .. }
            | Check::Dns { .. }
            | Check::Ntp { .. }
            | Check::Snmp { .. }
            | Check::Sip { .. }
            | Check::Radius { .. } => true,
        }
    }

    /// Returns the protocol's name for messages.
    pub fn name(&self) -> &'static str {
        match self {
            Check::Udp { .. } => "UDP",
            Check::Tcp(_) => "TCP",
            Check::Http { .. } => "HTTP",
            Check::Icmp {} => "ICMP",
            Check::Dns { .. } => "DNS",
            Check::Ntp { .. } => "NTP",
            Check::Snmp { .. } => "SNMP",
            Check::Sip { .. } => "SIP",
            Check::Radius { .. } => "RADIUS",
            Check::Syslog { .. } => "syslog",
        }
    }
}

/// `off`, `neighbour`, or `DNS probe of port 53 every 2s, timeout 1s, rise 2, fall 3`. Secrets are left out.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Health::Off => f.write_str("off"),
            Health::Neighbour => f.write_str("neighbour"),
            Health::Probe(probe) => probe.fmt(f),
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Probe { check, interval, timeout, rise, fall } = self;
        write!(f, "{} probe", check.name())?;
        match check {
            Check::Udp { send, expect, .. } => {
                write!(f, " {send:?}")?;
                expect.iter().try_for_each(|expect| write!(f, " -> {expect:?}"))?;
            }
            Check::Http { path, status, .. } => {
                write!(f, " {path:?}")?;
                status.iter().try_for_each(|status| write!(f, " -> {status}"))?;
            }
            Check::Dns { name: Some(name), .. } => write!(f, " {name:?}")?,
            _ => {}
        }
        check.port().iter().try_for_each(|port| write!(f, " of port {port}"))?;
        write!(f, " every {interval}, timeout {timeout}, rise {rise}, fall {fall}")
    }
}

const HEX: &str = "0x";

/// Returns the bytes of a payload: text, or hexadecimal digits after `0x`.
pub fn payload(text: &str) -> Result<Vec<u8>, String> {
    let digits = pattern(text)?;
    digits.into_iter().map(|byte| byte.value()).collect::<Option<_>>().ok_or_else(|| {
        "`?` stands for a digit of `expect`, and a payload has no unknown digits".into()
    })
}

/// Part of a pattern: the byte and the mask of its known bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PatternByte {
    byte: u8,
    mask: u8,
}

impl PatternByte {
    fn value(self) -> Option<u8> {
        (self.mask == u8::MAX).then_some(self.byte)
    }
}

/// Returns the pattern that an answer must begin with: text, or after `0x` hexadecimal digits with `?` for
/// any digit.
pub fn pattern(text: &str) -> Result<Vec<PatternByte>, String> {
    let Some(digits) = text.strip_prefix(HEX) else {
        return Ok(text.bytes().map(|byte| PatternByte { byte, mask: u8::MAX }).collect());
    };
    let mut nibbles = Vec::new();
    for digit in digits.chars().filter(|digit| !digit.is_ascii_whitespace()) {
        nibbles.push(match (digit, digit.to_digit(16)) {
            ('?', _) => (0, 0),
            (_, Some(value)) => (value as u8, 0xf),
            (_, None) => return Err(format!("`{digit}` is no hexadecimal digit")),
        });
    }
    let (pairs, rest) = nibbles.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(format!("{} hexadecimal digits are no whole bytes", nibbles.len()));
    }
    let byte = |[high, low]: &[(u8, u8); 2]| PatternByte {
        byte: high.0 << 4 | low.0,
        mask: high.1 << 4 | low.1,
    };
    Ok(pairs.iter().map(byte).collect())
}

/// Returns true if an answer begins with the pattern.
pub fn matches(pattern: &[PatternByte], answer: &[u8]) -> bool {
    let fits = |(byte, part): (&u8, &PatternByte)| byte & part.mask == part.byte;
    answer.len() >= pattern.len() && answer.iter().zip(pattern).all(fits)
}

#[cfg(test)]
mod tests {
    use super::{Check, Health, Probe, matches, pattern, payload};

    #[test]
    fn probes_have_default_paces() {
        let health = Health::Probe(Box::new(Probe::new(Check::Tcp(53))));
        let text = "TCP probe of port 53 every 2s, timeout 1s, rise 2, fall 3";
        assert_eq!(health.to_string(), text);
    }

    #[test]
    fn payloads_are_text_or_hexadecimal() {
        assert_eq!(payload("ping\n"), Ok(b"ping\n".to_vec()));
        assert_eq!(payload("0x00 ff1A"), Ok(vec![0, 255, 26]));
        assert_eq!(payload(""), Ok(Vec::new()));
        for bad in ["0x0", "0x0g", "0x0?", "0x0\u{fc}"] {
            assert!(payload(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn patterns_match_from_the_start() {
        let is = |text: &str, answer: &[u8]| matches(&pattern(text).unwrap(), answer);
        assert!(is("pong", b"pong 1") && !is("pong", b"pon") && !is("pong", b" pong"));
        assert!(is("0x?1 ?? 0?", &[0xf1, 9, 0x0a]) && !is("0x?1 ?? 0?", &[0xf2, 9, 0x0a]));
        assert!(!is("0x??", b"") && is("0x", b""));
    }
}
