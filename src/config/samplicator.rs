//! samplicator's configuration file, as one of udplb. Pure.
//!
//! The grammar is that of samplicator 1.3.8 (`read_config.c`): `SENDER[/MASK]: RECEIVER...`, where a receiver is
//! `ADDRESS[/PORT[/FREQUENCY]][,TTL]`. IPv6 addresses stand in brackets.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::diagnostic::Message;
use super::document::Document;
use super::host::{Family, Host, KeyAddress};
use super::network::Network;
use super::quote::shorten;
use super::{Diagnostic, Severity};

/// The port of samplicator and of its receivers where none is given.
pub const PORT: u16 = 2000;

/// What samplicator gets on its command line.
pub struct CommandLine {
    pub address: KeyAddress,
    pub port: u16,
    /// `-S`: receivers see the sender's address.
    pub spoofs: bool,
    /// Of udplb; samplicator has none.
    pub interfaces: Vec<String>,
    /// They get all packets.
    pub receivers: Vec<Receiver>,
}

/// A host that samplicator sends to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    host: Host,
    port: u16,
    /// N: each N-th packet is sent.
    frequency: u32,
    ttl: Option<u8>,
}

/// A line of the file: the receivers of some senders.
struct Line {
    /// Counted from 1.
    number: usize,
    senders: Network,
    receivers: Vec<Receiver>,
}

/// Returns the YAML of the configuration that does the same, with comments where it does not.
///
/// # Errors
///
/// Returns all lines that are not understood, or that udplb cannot express.
pub fn import(name: &str, text: &str, command: &CommandLine) -> Result<String, Vec<Diagnostic>> {
    let (mut lines, mut errors, mut offset) = (Vec::new(), Vec::new(), 0);
    for (index, whole) in text.split_inclusive('\n').enumerate() {
        match line(index + 1, whole) {
            Ok(parsed) => lines.extend(parsed),
            Err(error) => {
                let place = offset + whole.len() - whole.trim_start().len();
                errors.push(error.offset(place));
            }
        }
        offset += whole.len();
    }
    if !errors.is_empty() {
        return Err(Document::new(name, text).diagnose(Severity::Error, &errors, None));
    }
    Ok(document(name, &lines, command))
}

/// Parses a line; none if it is empty or a comment.
fn line(number: usize, whole: &str) -> Result<Option<Line>, Message> {
    let text = whole.split('#').next().unwrap_or_default().trim();
    if text.is_empty() {
        return Ok(None);
    }
    let is_bracketed = text.starts_with('[');
    let from = if is_bracketed { text.find(']').unwrap_or(0) } else { 0 };
    let Some(colon) = text[from..].find(':') else {
        let help = "a line is `SENDER[/MASK]: RECEIVER[/PORT[/FREQUENCY]]...`";
        return Err(Message::new("there is no `:` behind the senders").help(help));
    };
    let (senders, receivers) = (&text[..from + colon], &text[from + colon + 1..]);
    let senders = network(senders.trim())?;
    let receivers = receivers.split_whitespace().map(str::parse).collect::<Result<_, _>>();
    Ok(Some(Line { number, senders, receivers: receivers.map_err(Message::new)? }))
}

/// Parses `ADDRESS[/MASK]`, whose mask is an address or the length of a prefix.
fn network(text: &str) -> Result<Network, Message> {
    let (address, mask) = match text.split_once('/') {
        Some((address, mask)) => (address, Some(mask.trim())),
        None => (text, None),
    };
    let address = address.trim().trim_start_matches('[').trim_end_matches(']');
    let address: IpAddr = address.parse().map_err(|_| {
        let message = format!("`{}` is not the address of a sender", shorten(address));
        Message::new(message)
            .help("host names of senders are resolved once by samplicator: write the address")
    })?;
    let prefix = match mask {
        None => return Ok(address.into()),
        Some(mask) => prefix(mask, address.is_ipv4())?,
    };
    Ok(Network::new(address, prefix))
}

/// Returns the length of the prefix that a mask leaves.
fn prefix(mask: &str, ipv4: bool) -> Result<u8, Message> {
    let longest = if ipv4 { 32 } else { 128 };
    if let Ok(length) = mask.parse::<u8>()
        && length <= longest
    {
        return Ok(length);
    }
    let bits = match mask.parse::<Ipv4Addr>() {
        Ok(mask) if ipv4 => mask.to_bits(),
        _ => return Err(Message::new(format!("`{}` is not a mask", shorten(mask)))),
    };
    let ones = bits.leading_ones();
    if ones != bits.count_ones() {
        let message = format!("the mask {mask} is not that of a prefix");
        return Err(
            Message::new(message).help("udplb selects senders by prefix: list the networks")
        );
    }
    Ok(ones as u8)
}

impl std::str::FromStr for Receiver {
    type Err = String;

    fn from_str(text: &str) -> Result<Receiver, String> {
        let wrong = |what: &str, part: &str| {
            Err(format!("`{}` of the receiver `{}` is not {what}", shorten(part), shorten(text)))
        };
        let (text, ttl) = match text.split_once(',') {
            Some((text, ttl)) => match ttl.parse() {
                Ok(ttl) => (text, Some(ttl)),
                Err(_) => return wrong("a TTL", ttl),
            },
            None => (text, None),
        };
        let (host, rest) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
            Some((host, rest)) => (host, rest.trim_start_matches('/')),
            None => text.split_once('/').unwrap_or((text, "")),
        };
        let (port, frequency) = rest.split_once('/').unwrap_or((rest, ""));
        let number = |part: &str, default: u32| match part {
            "" => Some(default),
            _ => part.parse().ok().filter(|number| *number > 0),
        };
        let Some(port_number) = number(port, PORT.into()).and_then(|port| port.try_into().ok())
        else {
            return wrong("a port", port);
        };
        let Some(frequency) = number(frequency, 1) else { return wrong("a frequency", frequency) };
        Ok(Receiver { host: host.parse()?, port: port_number, frequency, ttl })
    }
}

impl Receiver {
    /// Returns true if a rule of that family can send to it; a host name can have addresses of either.
    fn is_of(&self, family: Family) -> bool {
        match &self.host {
            Host::Address(address) => Family::from(address.ip) == family,
            Host::Name(_) => true,
        }
    }
}

/// Returns the network of all senders of a family.
fn everyone(family: Family) -> Network {
    match family {
        Family::V4 => Network::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        Family::V6 => Network::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

fn document(name: &str, lines: &[Line], command: &CommandLine) -> String {
    let source = if command.spoofs { "preserve" } else { "egress" };
    let interfaces = match command.interfaces.is_empty() {
        true => "# interfaces: [ens3]  # that packets come in on, or `udplb apply -i`".into(),
        false => format!("interfaces: [{}]", command.interfaces.join(", ")),
    };
    let mut text = format!(
        "# From {name}. samplicator adds up all lines that match; udplb goes by the longest prefix, so\n\
         # that a rule repeats the receivers of shorter prefixes.\n\
         version: 1\n{interfaces}\n\
         defaults: {{ tc_action: block, mode: replicate, source: {source} }}\nrules:\n"
    );
    for senders in networks(lines, command) {
        rule(&mut text, senders, lines, command);
    }
    text
}

/// Returns the senders of each rule, long prefixes first.
fn networks(lines: &[Line], command: &CommandLine) -> Vec<Network> {
    let mut networks: BTreeSet<Network> = lines.iter().map(|line| line.senders).collect();
    for family in [Family::V4, Family::V6] {
        if command.receivers.iter().any(|receiver| receiver.is_of(family)) {
            networks.insert(everyone(family));
        }
    }
    if let KeyAddress::Is(address) = command.address {
        networks.retain(|network| network.address.is_ipv4() == address.is_ipv4());
    }
    let mut networks: Vec<Network> = networks.into_iter().collect();
    networks.sort_by_key(|network| std::cmp::Reverse(network.prefix));
    networks
}

/// Appends the rule of some senders.
fn rule(text: &mut String, senders: Network, lines: &[Line], command: &CommandLine) {
    let matching = |line: &&Line| {
        line.senders.prefix <= senders.prefix && line.senders.contains(senders.address)
    };
    let own = lines.iter().find(|line| line.senders == senders);
    let name = match (own, senders.address.is_ipv4()) {
        (Some(line), _) => format!("line-{}", line.number),
        (None, true) => "others".into(),
        (None, false) => "others-ipv6".into(),
    };
    let mut from = String::new();
    if senders.prefix > 0 {
        from = format!(", from: ['{senders}']");
    }
    let address = quoted(command.address);
    let key = format!("{{ address: {address}, port: {}{from} }}", command.port);
    // writing to a string cannot fail
    let _ = writeln!(text, "  - name: {name}\n    key: {key}\n    upstream:");
    let mut seen = Vec::new();
    let all = lines.iter().filter(matching).flat_map(|line| &line.receivers);
    for receiver in command.receivers.iter().chain(all) {
        let is_again = seen.contains(&(&receiver.host, receiver.port));
        seen.push((&receiver.host, receiver.port));
        text.push_str(&upstream(receiver, senders.address.into(), is_again));
    }
}

/// Returns the line of a receiver, or a comment why there is none.
fn upstream(receiver: &Receiver, family: Family, is_again: bool) -> String {
    let Receiver { host, port, frequency, ttl } = receiver;
    let (mut fields, mut notes) = (format!("address: {}, port: {port}", quoted(host)), Vec::new());
    if *frequency > 1 {
        let _ = write!(fields, ", sample: {frequency}");
        notes.push(format!("one of {frequency} at random, not each {frequency}th"));
    }
    if let Some(ttl) = ttl {
        notes.push(format!("not with TTL {ttl}, but with the packet's less one"));
    }
    if is_again {
        return format!("      # {{ {fields} }} is left out: the rule has it already\n");
    }
    if !receiver.is_of(family) {
        return format!(
            "      # {{ {fields} }} is left out: all addresses of a rule are {family}\n"
        );
    }
    match notes.is_empty() {
        true => format!("      - {{ {fields} }}\n"),
        false => format!("      - {{ {fields} }} # {}\n", notes.join("; ")),
    }
}

/// Returns a value in quotes where YAML needs them.
fn quoted(value: impl std::fmt::Display) -> String {
    let text = value.to_string();
    if text.contains(':') { format!("'{text}'") } else { text }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Config, KeyAddress};
    use super::{CommandLine, PORT, import};

    fn command(receivers: &[&str]) -> CommandLine {
        CommandLine {
            address: KeyAddress::Is([192, 0, 2, 1].into()),
            port: 2055,
            spoofs: true,
            interfaces: vec!["ens3".into()],
            receivers: receivers.iter().map(|it| it.parse().expect("a receiver")).collect(),
        }
    }

    /// Returns each rule of the import: its senders and its upstreams with ports and samples.
    fn rules(text: &str, command: &CommandLine) -> Vec<(String, Vec<String>)> {
        let yaml = import("samplicator.conf", text, command).expect("a configuration");
        let config = Config::parse("import", &yaml).unwrap_or_else(|it| panic!("{yaml}\n{it:?}"));
        let rule = |rule: &super::super::RuleConfig| {
            let from: Vec<String> = rule.key.from.iter().map(ToString::to_string).collect();
            let upstreams = rule.upstreams.iter();
            let upstream = |it: &super::super::UpstreamConfig| match it.sample {
                Some(sample) => format!("{} {sample}", it.endpoint()),
                None => it.endpoint(),
            };
            (from.join(" "), upstreams.map(upstream).collect())
        };
        config.rules.iter().map(rule).collect()
    }

    #[test]
    fn longer_prefixes_repeat_the_receivers_of_shorter_ones() {
        let text = "# comment\n\n10.0.0.0/255.0.0.0: 203.0.113.12/9995/10 # more\n\
                    10.20.0.0/16:203.0.113.13/9995 collector.example/9996/1,3\n\
                    10.20.0.7: 203.0.113.14\n10.0.0.0/8: 203.0.113.15/1\n";
        let rules = rules(text, &command(&["198.51.100.11/2055"]));
        let expected = [
            (
                "10.20.0.7",
                "198.51.100.11:2055 203.0.113.12:9995 10 203.0.113.13:9995 \
                 collector.example:9996 203.0.113.14:2000 203.0.113.15:1",
            ),
            (
                "10.20.0.0/16",
                "198.51.100.11:2055 203.0.113.12:9995 10 203.0.113.13:9995 \
                 collector.example:9996 203.0.113.15:1",
            ),
            ("10.0.0.0/8", "198.51.100.11:2055 203.0.113.12:9995 10 203.0.113.15:1"),
            ("", "198.51.100.11:2055"),
        ];
        let found: Vec<(&str, String)> =
            rules.iter().map(|(from, upstreams)| (&from[..], upstreams.join(" "))).collect();
        let expected = expected.map(|(from, upstreams)| (from, upstreams.to_string()));
        assert_eq!(found, expected);
    }

    #[test]
    fn families_are_rules_of_their_own() {
        let any =
            CommandLine { address: KeyAddress::Any, ..command(&["[2001:db8::1]/9", "10.0.0.1"]) };
        let rules =
            rules("[2001:db8:1::]/48: [2001:db8::2]/10 10.0.0.2\n0.0.0.0/0: 10.0.0.3", &any);
        let upstreams: Vec<String> = rules.iter().map(|(_, it)| it.join(" ")).collect();
        let expected =
            ["[2001:db8::1]:9 [2001:db8::2]:10", "10.0.0.1:2000 10.0.0.3:2000", "[2001:db8::1]:9"];
        assert_eq!(upstreams, expected);
        assert_eq!(rules[0].0, "2001:db8:1::/48");
    }

    #[test]
    fn differences_are_comments() {
        let yaml = import("f", "10.0.0.1: 10.9.9.9/1/5,7 10.9.9.9/1", &command(&[])).expect("it");
        assert!(
            yaml.contains("sample: 5 } # one of 5 at random, not each 5th; not with TTL 7"),
            "{yaml}"
        );
        assert!(
            yaml.contains("# { address: 10.9.9.9, port: 1 } is left out: the rule has it already")
        );
    }

    #[test]
    fn errors_name_their_lines() {
        let text = "10.0.0.0/255.0.255.0: 10.9.9.9\n10.0.0.1 10.9.9.9\nhost: 10.9.9.9\n10.0.0.1: 10.9.9.9/http\n";
        let errors = import("f", text, &command(&[])).expect_err("errors");
        let found: Vec<(usize, &str)> =
            errors.iter().map(|it| (it.line, &it.message[..])).collect();
        let expected = [
            (1, "the mask 255.0.255.0 is not that of a prefix"),
            (2, "there is no `:` behind the senders"),
            (3, "`host` is not the address of a sender"),
            (4, "`http` of the receiver `10.9.9.9/http` is not a port"),
        ];
        assert_eq!(found, expected);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[0-9a-f:./,# \\[\\]\n]{0,80}", port in 1..PORT) {
            let command = CommandLine { port, ..command(&[]) };
            let _ = import("f", &text, &command);
        }
    }
}
