//! Decodes `options.health`.

use super::{
    Content, Decoder, Field, Fields, Message, Node, Table, Trail, number, scalar, shorten, words,
};
use crate::config::health::{COMMUNITY, Check, Health, Probe, pattern, payload};

/// Checks that users ask for and that cannot be, with the reason.
const REFUSED: [(&str, &str); 2] = [
    (
        "exec",
        "arpd may change this host's network, and runs no programs of others: let the program answer \
         `http`, or have it call `udplb drain` and `udplb enable`",
    ),
    (
        "wireguard",
        "WireGuard answers nobody without a key, so its silence proves nothing: probe its host with `icmp`",
    ),
];

/// Longest text of a probe, so that a datagram is never fragmented.
const TEXT: usize = 1200;

impl Decoder {
    pub(super) fn health(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Health> {
        match &node.content {
            Content::Text(word) => {
                let result = Health::from_word(word).ok_or_else(|| unknown(word));
                self.ok(at, result)
            }
            Content::Map(entries) => {
                let refused = |(name, _): &&(&str, &str)| entries.iter().any(|it| it.name == *name);
                if let Some((name, why)) = REFUSED.iter().find(refused) {
                    let message = Message::new(format!("`{name}` is no health check")).help(*why);
                    self.error(&at.field(name), message);
                    return None;
                }
                let probe = self.probe(node, at)?;
                Some(Health::Probe(Box::new(probe)))
            }
            _ => self.ok(at, scalar::expected("a health check (a word or a map)", node)),
        }
    }

    fn probe(&mut self, node: &Node<'_>, at: &Trail<'_>) -> Option<Probe> {
        let fields = self.fields(node, &words::HEALTH_MAP, at)?;
        let given: Vec<&Field> =
            words::CHECKS.into_iter().filter(|field| fields.get(field).is_some()).collect();
        let check = match given[..] {
            [field] => self.check(field, fields.get(field)?, &at.field(field.name)),
            [] => {
                let names = words::CHECKS.map(|field| field.name);
                let help = format!("write one of {}", words::list(&names));
                self.error(at, Message::new("a health check needs something to ask").help(help));
                None
            }
            [_, second, ..] => {
                let message = "an upstream has one check, and this is another";
                self.error(&at.field(second.name), Message::new(message));
                None
            }
        };
        let interval = self.duration(&fields, &words::HEALTH_INTERVAL, at);
        let timeout = self.duration(&fields, &words::HEALTH_TIMEOUT, at);
        let rise = self.optional(&fields, &words::HEALTH_RISE, at, number(&words::RISE));
        let fall = self.optional(&fields, &words::HEALTH_FALL, at, number(&words::FALL));
        let (interval, timeout) = (interval?, timeout?);
        if timeout > interval {
            let message = format!("a timeout of {timeout} is longer than the interval, {interval}");
            let help = "an answer must have come before the next question";
            self.error(&at.field(words::HEALTH_TIMEOUT.name), Message::new(message).help(help));
            return None;
        }
        let (rise, fall) = (rise?, fall?);
        let probe = Probe::new(check?);
        let (rise, fall) = (rise.unwrap_or(probe.rise), fall.unwrap_or(probe.fall));
        Some(Probe { interval, timeout, rise, fall, ..probe })
    }

    fn check(&mut self, field: &'static Field, node: &Node<'_>, at: &Trail<'_>) -> Option<Check> {
        let words::Shape::Map(table) = field.shape else {
            return self.ok(at, scalar::port(node)).map(Check::Tcp);
        };
        let fields = self.fields(node, table, at)?;
        let port = match has(table, &words::PROBE_PORT) {
            true => self.optional(&fields, &words::PROBE_PORT, at, scalar::port)?,
            false => None,
        };
        Some(match field.name {
            "udp" => {
                let expect = self.optional(&fields, &words::PROBE_EXPECT, at, expect);
                let send = self.required(&fields, &words::PROBE_SEND, at, send);
                Check::Udp { send: send?, expect: expect?, port }
            }
            "http" => {
                let path = self.optional(&fields, &words::PROBE_PATH, at, path);
                let status =
                    self.optional(&fields, &words::PROBE_STATUS, at, number(&words::STATUS));
                Check::Http { port, path: path?.unwrap_or_else(|| "/".into()), status: status? }
            }
            "icmp" => Check::Icmp {},
            "dns" => {
                let name = self.optional(&fields, &words::PROBE_NAME, at, domain)?;
                Check::Dns { port, name }
            }
            "ntp" => Check::Ntp { port },
            "snmp" => {
                let community = self.optional(&fields, &words::PROBE_COMMUNITY, at, secret)?;
                Check::Snmp { port, community: community.unwrap_or_else(|| COMMUNITY.into()) }
            }
            "sip" => Check::Sip { port },
            "radius" => {
                let secret = self.required(&fields, &words::PROBE_SECRET, at, secret)?;
                Check::Radius { port, secret }
            }
            _ => Check::Syslog { port },
        })
    }

    /// Reads a field whose absence has been reported.
    fn required<T>(
        &mut self,
        fields: &Fields<'_, '_>,
        field: &'static Field,
        at: &Trail<'_>,
        read: impl FnOnce(&Node<'_>) -> Result<T, Message>,
    ) -> Option<T> {
        self.optional(fields, field, at, read).flatten()
    }
}

fn unknown(word: &str) -> Message {
    match REFUSED.iter().find(|(name, _)| *name == word) {
        Some((name, why)) => Message::new(format!("`{name}` is no health check")).help(*why),
        None => {
            let word = shorten(word);
            let known = words::list(words::HEALTH_WORDS);
            Message::new(format!("unknown word `{word}`"))
                .help(format!("known here: {known}, or a map"))
        }
    }
}

fn has(table: &Table, field: &'static Field) -> bool {
    table.fields.iter().any(|it| std::ptr::eq(*it, field))
}

/// Reads text, of at least `least` bytes.
fn text(node: &Node<'_>, what: &str, least: usize) -> Result<String, Message> {
    let text = scalar::quoted(node, what)?;
    match text.len() {
        length if length > TEXT => {
            Err(Message::new(format!("{length} bytes are more than {what} has ({TEXT})")))
        }
        length if length < least => Err(Message::new(format!("{what} cannot be empty"))),
        _ => Ok(text),
    }
}

fn send(node: &Node<'_>) -> Result<String, Message> {
    let text = text(node, "a payload", 0)?;
    payload(&text).map_err(Message::new)?;
    Ok(text)
}

fn expect(node: &Node<'_>) -> Result<String, Message> {
    let text = text(node, "an answer", 1)?;
    pattern(&text).map_err(Message::new)?;
    Ok(text)
}

fn path(node: &Node<'_>) -> Result<String, Message> {
    let text = text(node, "a path", 1)?;
    match text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(text),
        false => Err(Message::new(
            "a path starts with `/` and has no blanks and no characters beyond ASCII",
        )),
    }
}

fn domain(node: &Node<'_>) -> Result<String, Message> {
    let text = text(node, "a domain name", 1)?;
    let is_label = |label: &str| {
        (1..64).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match text.len() < 254 && text.trim_end_matches('.').split('.').all(is_label) {
        true => Ok(text),
        false => Err(Message::new("no domain name: labels of 1 to 63 bytes between dots")),
    }
}

fn secret(node: &Node<'_>) -> Result<String, Message> {
    let text = text(node, "a secret", 1)?;
    match text.len() {
        0..128 => Ok(text),
        _ => Err(Message::new("127 bytes are the most")),
    }
}
