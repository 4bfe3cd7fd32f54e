//! samplicator's configuration file, as one of udplb. Pure.
//!
//! The grammar is that of samplicator 1.3.8 (`read_config.c`): `SENDER[/MASK]: RECEIVER...`, where a receiver is
//! `ADDRESS[/PORT[/FREQUENCY]][,TTL]`. IPv6 addresses stand in brackets.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use super::diagnostic::Message;
use super::document::Document;
use super::host::{Family, Host, KeyAddress};
use super::network::Network;
use super::quote::shorten;
use super::{Diagnostic, Severity};

/// The port of samplicator and of its receivers where none is given.
pub const PORT: u16 = 2000;

/// samplicator's command line.
pub struct CommandLine {
    pub address: KeyAddress,
    pub port: u16,
    /// `-S`: receivers see the sender's address.
    pub spoofs: bool,
    /// Interfaces that udplb needs; samplicator has none.
    pub interfaces: Vec<String>,
    /// They get all packets.
    pub receivers: Vec<Receiver>,
}

/// A host that samplicator sends to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    host: Host,
    /// Family of the loopback address that is `local` now.
    loopback: Option<Family>,
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
    let mask = match mask.parse::<Ipv4Addr>() {
        Ok(mask) if ipv4 => mask,
        _ => return Err(Message::new(format!("`{}` is not a mask", shorten(mask)))),
    };
    ipnet::ipv4_mask_to_prefix(mask).map_err(|_| {
        let message = Message::new(format!("the mask {mask} is not that of a prefix"));
        message.help("udplb selects senders by prefix: list the networks")
    })
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
        let (host, loopback) = match host.parse::<IpAddr>() {
            Ok(ip) if ip.is_loopback() => (Host::Local, Some(Family::from(ip))),
            _ if host.eq_ignore_ascii_case("localhost") => (Host::Local, None),
            _ => (host.parse()?, None),
        };
        Ok(Receiver { host, loopback, port: port_number, frequency, ttl })
    }
}

impl Receiver {
    /// Returns true if a rule of that family can send to it; a host name can have addresses of either.
    fn is_of(&self, family: Family) -> bool {
        match &self.host {
            Host::Address(address) => Family::from(address.ip) == family,
            Host::Name(_) | Host::Local => self.loopback.is_none_or(|it| it == family),
        }
    }
}

/// The receivers of one host and port, merged.
struct Upstream<'a> {
    receiver: &'a Receiver,
    /// None: it gets the packets of all senders.
    from: Vec<Network>,
}

fn document(name: &str, lines: &[Line], command: &CommandLine) -> String {
    let source = if command.spoofs { "preserve" } else { "egress" };
    let interfaces = match command.interfaces.is_empty() {
        true => "# interfaces: [ens3]  # that packets come in on, or `udplb apply -i`".into(),
        false => format!("interfaces: [{}]", command.interfaces.join(", ")),
    };
    let mut text = format!(
        "# From {name}.\nversion: 1\n{interfaces}\n\
         defaults: {{ tc_action: block, mode: replicate, source: {source} }}\nrules:\n"
    );
    for family in [Family::V4, Family::V6] {
        let is_other = match command.address {
            KeyAddress::Is(address) => Family::from(address) != family,
            KeyAddress::Any => false,
        };
        let (upstreams, notes) = upstreams(family, lines, command);
        if is_other || upstreams.is_empty() {
            continue;
        }
        let address = quoted(command.address);
        let port = command.port;
        // writing to a string cannot fail
        let _ = writeln!(
            text,
            "  - name: samplicator-{}\n    key: {{ address: {address}, port: {port} }}\n    upstream:",
            family.to_string().to_lowercase()
        );
        text.extend(upstreams.iter().map(Upstream::line));
        text.push_str(&notes);
    }
    text
}

/// Returns the upstreams of a rule, and comments for the receivers that it cannot have.
fn upstreams<'a>(
    family: Family,
    lines: &'a [Line],
    command: &'a CommandLine,
) -> (Vec<Upstream<'a>>, String) {
    let (mut upstreams, mut notes) = (Vec::<Upstream<'_>>::new(), String::new());
    let of_lines = lines.iter().filter(|line| Family::from(line.senders.address) == family);
    let of_lines =
        of_lines.flat_map(|line| line.receivers.iter().map(move |receiver| (receiver, Some(line))));
    let of_all = command.receivers.iter().map(|receiver| (receiver, None));
    for (receiver, line) in of_all.chain(of_lines) {
        let senders = line.map(|line| line.senders).filter(|senders| senders.prefix > 0);
        let place = (&receiver.host, receiver.port);
        let known = upstreams.iter_mut().find(|it| (&it.receiver.host, it.receiver.port) == place);
        match (known, senders) {
            _ if receiver.host == Host::Local && receiver.port == command.port => {
                let origin =
                    line.map_or("a receiver".into(), |line| format!("line {}", line.number));
                let _ = writeln!(
                    notes,
                    "      # {origin}: port {} of this host is the rule's own: `tc_action: pass` delivers there",
                    receiver.port
                );
            }
            _ if !receiver.is_of(family) => {
                if let Some(line) = line {
                    let _ = writeln!(
                        notes,
                        "      # line {}: {} is left out, since all addresses of a rule are {family}",
                        line.number, receiver.host
                    );
                }
            }
            (None, _) => upstreams.push(Upstream { receiver, from: senders.into_iter().collect() }),
            (Some(known), Some(senders)) if !known.from.is_empty() => {
                if !known.from.contains(&senders) {
                    known.from.push(senders);
                }
            }
            (Some(known), _) => known.from.clear(),
        }
    }
    (upstreams, notes)
}

impl Upstream<'_> {
    fn line(&self) -> String {
        let Receiver { host, port, frequency, ttl, .. } = self.receiver;
        let mut fields = format!("address: {}, port: {port}", quoted(host));
        let mut notes = Vec::new();
        if *frequency > 1 {
            let _ = write!(fields, ", sample: {frequency}");
            notes.push(format!("one of {frequency} at random, not each {frequency}th"));
        }
        if *host == Host::Local {
            notes.push(
                "not to 127.0.0.1 or ::1, but to the address that the packet was sent to".into(),
            );
        } else if let Some(ttl) = ttl {
            notes.push(format!("not with TTL {ttl}, but with the packet's less one"));
        }
        if !self.from.is_empty() {
            let from: Vec<String> = self.from.iter().map(quoted).collect();
            let _ = write!(fields, ", from: [{}]", from.join(", "));
        }
        match notes.is_empty() {
            true => format!("      - {{ {fields} }}\n"),
            false => format!("      - {{ {fields} }} # {}\n", notes.join("; ")),
        }
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

    use super::super::{Config, KeyAddress, UpstreamConfig};
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

    /// Returns the upstreams of each rule of the import: endpoint, sample and senders.
    fn rules(text: &str, command: &CommandLine) -> Vec<Vec<String>> {
        let yaml = import("samplicator.conf", text, command).expect("a configuration");
        let config = Config::parse("import", &yaml).unwrap_or_else(|it| panic!("{yaml}\n{it:?}"));
        let upstream = |it: &UpstreamConfig| {
            let from: Vec<String> = it.from.iter().map(ToString::to_string).collect();
            format!("{} 1/{} {}", it.endpoint(), it.sample.unwrap_or(1), from.join(","))
        };
        let rules = config.rules.iter();
        rules.map(|rule| rule.upstreams.iter().map(upstream).collect()).collect()
    }

    #[test]
    fn lines_add_up() {
        let text = "# comment\n\n10.0.0.0/255.0.0.0: 203.0.113.12/9995/10 # more\n\
                    10.20.0.0/16:203.0.113.13/9995 collector.example/9996/1,3\n\
                    10.20.0.7: 203.0.113.14\n192.0.2.0/24: 203.0.113.13/9995\n\
                    0.0.0.0/0: 203.0.113.14\n";
        let expected = [
            "198.51.100.11:2055 1/1 ",
            "203.0.113.12:9995 1/10 10.0.0.0/8",
            "203.0.113.13:9995 1/1 10.20.0.0/16,192.0.2.0/24",
            "collector.example:9996 1/1 10.20.0.0/16",
            "203.0.113.14:2000 1/1 ",
        ];
        assert_eq!(rules(text, &command(&["198.51.100.11/2055"])), [expected]);
    }

    #[test]
    fn families_are_rules_of_their_own() {
        let any =
            CommandLine { address: KeyAddress::Any, ..command(&["[2001:db8::1]/9", "10.0.0.1"]) };
        let text = "[2001:db8:1::]/48: [2001:db8::2]/10 10.0.0.2\n0.0.0.0/0: 10.0.0.3";
        let expected = [
            ["10.0.0.1:2000 1/1 ", "10.0.0.3:2000 1/1 "],
            ["[2001:db8::1]:9 1/1 ", "[2001:db8::2]:10 1/1 2001:db8:1::/48"],
        ];
        assert_eq!(rules(text, &any), expected);
        let yaml = import("f", text, &any).expect("a configuration");
        assert!(yaml.contains("# line 1: 10.0.0.2 is left out, since all"), "{yaml}");
    }

    #[test]
    fn differences_are_comments() {
        let yaml = import("f", "10.0.0.1: 10.9.9.9/1/5,7", &command(&[])).expect("it");
        let comment = "# one of 5 at random, not each 5th; not with TTL 7, but";
        assert!(yaml.contains(comment), "{yaml}");
    }

    #[test]
    fn loopback_is_this_host() {
        let text = "10.0.0.1: 127.0.0.1/1162 127.0.0.2/1162 LocalHost/1163 [::1]/1164 127.0.0.1/2055\n\
                    [2001:db8::7]: [::1]/1162,9\n";
        let any = CommandLine { address: KeyAddress::Any, ..command(&[]) };
        let expected = [
            &["local:1162 1/1 10.0.0.1", "local:1163 1/1 10.0.0.1"][..],
            &["local:1162 1/1 2001:db8::7"],
        ];
        assert_eq!(rules(text, &any), expected);
        let yaml = import("f", text, &any).expect("a configuration");
        for comment in [
            "address: local, port: 1162, from: [10.0.0.1] } # not to 127.0.0.1 or ::1, but to the",
            "# line 1: local is left out, since all addresses of a rule are IPv4",
            "# line 1: port 2055 of this host is the rule's own: `tc_action: pass`",
        ] {
            assert!(yaml.contains(comment), "{comment}: {yaml}");
        }
        assert!(!yaml.contains("TTL"), "{yaml}");
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
