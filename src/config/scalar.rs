//! Single values: ports, names, interfaces.

use std::net::IpAddr;

use super::diagnostic::Message;
use super::hint::is_invisible;
use super::node::{Content, Node};
use super::quote::shorten;
use super::vocabulary::{ANY, Limits, Number, PART_WORDS, TUNNELS, list as list_of, unknown_word};
use super::{
    Host, KeyAddress, Network, Period, Ports, ServerId, StrategyPart, Via, host, network, period,
};

type Result<T> = std::result::Result<T, Message>;

pub(super) const INTERFACES: &str = "a list of interfaces";

/// The longest name, in bytes.
const NAME: usize = 64;

const PORTS_HELP: &str =
    "one port is `2055`, a range `\"6343-6350\"`, several are a list: `[2055, \"6343-6350\"]`";

pub(super) fn expected<T>(what: &str, found: &Node<'_>) -> Result<T> {
    let found = found.describe();
    Err(Message::new(format!("expected {what}, found {found}")))
}

/// Refuses a value that is no list, and shows how it becomes one.
pub(super) fn list<T>(what: &str, found: &Node<'_>) -> Result<T> {
    let help = match &found.content {
        Content::Text(text) if what == INTERFACES => format!("write a list: `[{}]`", shorten(text)),
        Content::Text(text) if what.ends_with("(a map)") => {
            format!("write `[{{ address: {} }}]`", shorten(text))
        }
        Content::Map(_) => "write it as a list: `- ` before its first field".into(),
        _ => return expected(what, found),
    };
    expected(what, found).map_err(|message| message.help(help))
}

fn text<'n>(node: &'n Node<'_>, what: &str) -> Result<&'n str> {
    match &node.content {
        Content::Text(text) => Ok(text),
        _ => expected(what, node),
    }
}

pub(super) fn version(node: &Node<'_>) -> Result<()> {
    match &node.content {
        Content::Int(1) => Ok(()),
        Content::Int(other) => Err(Message::new(format!(
            "version {other} is unknown: this udplb understands version 1"
        ))),
        Content::Text(text) if text == "1" => expected("the number 1", node)
            .map_err(|message: Message| message.help("write `version: 1`, without quotes")),
        _ => expected("the number 1", node),
    }
}

/// Reads a part of a list of parts that select together.
pub(super) fn part(node: &Node<'_>) -> Result<StrategyPart> {
    let word = text(node, &format!("one of {}", list_of(&PART_WORDS)))?;
    if let Some((_, part)) = StrategyPart::WORDS.iter().find(|(known, _)| *known == word) {
        return Ok(*part);
    }
    let help = match word {
        "random" => "`random` selects by no part: write `strategy: random`",
        "src-ip-port" => "in a list these are two parts: `src-ip, src-port`",
        _ => return Err(unknown_word(word, &PART_WORDS)),
    };
    Err(Message::new(format!("`{word}` is no part of a list")).help(help))
}

/// Reads a kind of outer headers.
pub(super) fn tunnel(node: &Node<'_>) -> Result<Via> {
    match text(node, &format!("one of {}", list_of(TUNNELS)))? {
        "ipip" => Ok(Via::Ipip),
        "gue" => Ok(Via::Gue),
        other => Err(unknown_word(other, TUNNELS)),
    }
}

/// Reads a server's id. YAML takes digits without quotes for a number.
pub(super) fn server_id(node: &Node<'_>) -> Result<ServerId> {
    const WHAT: &str = "hexadecimal digits in quotes, like `\"0a01\"`";
    let text = text(node, WHAT)?;
    ServerId::try_from(text.to_string())
        .map_err(|why| Message::new(format!("`{}` is no server id: {why}", shorten(text))))
}

pub(super) fn key_address(node: &Node<'_>) -> Result<KeyAddress> {
    host::key(text(node, "an IP address")?)
}

/// Reads an address that packets of this host can come from.
pub(super) fn own_address(node: &Node<'_>) -> Result<IpAddr> {
    let text = text(node, "an IP address")?;
    match text.parse() {
        Ok(address) => host::source(text).map(|_| address),
        Err(_) => Err(Message::new(format!("`{}` is not an IP address", shorten(text)))),
    }
}

pub(super) fn upstream_address(node: &Node<'_>) -> Result<Host> {
    host::upstream(text(node, "an IP address or a host name")?)
}

/// Reads a port in host byte order, written as a number or, quoted, as text.
pub(super) fn port(node: &Node<'_>) -> Result<u16> {
    match &node.content {
        Content::Int(number) => port_number(*number),
        Content::Text(text) => match number(text) {
            Some(number) => port_number(number),
            None if range(text).is_some() => {
                Err(Message::new(format!("`{text}` is a range, and only one port can stand here")))
            }
            None => Err(not_a_port(text)),
        },
        Content::List(_) => Err(Message::new("only one port can stand here, found a list")),
        _ => expected("a port (1 to 65535)", node),
    }
}

/// Reads a port or a range of ports.
pub(super) fn ports(node: &Node<'_>) -> Result<Ports> {
    if let Content::Text(text) = &node.content
        && let Some((first, last)) = range(text)
    {
        let (first, last) = (port_number(first)?, port_number(last)?);
        if first > last {
            let message = format!("the range {first}-{last} runs backwards");
            let help = format!("did you mean `{last}-{first}`?");
            return Err(Message::new(message).help(help));
        }
        return Ok(Ports { first, last });
    }
    if let Content::Text(text) = &node.content
        && host::means_any(text)
    {
        let help = "`port: any` matches every port";
        return Err(Message::new(format!("`{}` is not a UDP port", shorten(text))).help(help));
    }
    let port = port(node)?;
    Ok(Ports { first: port, last: port })
}

fn range(text: &str) -> Option<(i64, i64)> {
    let (first, last) = text.split_once('-')?;
    Some((number(first.trim_end())?, number(last.trim_start())?))
}

/// Parses decimal digits without a leading zero, which means octal elsewhere.
fn number(text: &str) -> Option<i64> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = !text.starts_with('0') || text == "0";
    if digits && plain { text.parse().ok() } else { None }
}

fn port_number(number: i64) -> Result<u16> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Message::new(format!("{number} is not a UDP port (1 to 65535)"))),
    }
}

fn not_a_port(text: &str) -> Message {
    Message::new(format!("`{}` is not a UDP port", shorten(text))).help(PORTS_HELP)
}

/// Reads text, which YAML may take for a number.
pub(super) fn quoted(node: &Node<'_>, what: &str) -> Result<String> {
    match &node.content {
        Content::Int(_) | Content::Float(_) | Content::Bool(_) => {
            expected(what, node).map_err(|message: Message| message.help("put it in quotes"))
        }
        _ => text(node, what).map(Into::into),
    }
}

/// Reads the name of a rule or an upstream.
pub(super) fn name(node: &Node<'_>) -> Result<String> {
    let name = quoted(node, "a name")?;
    let refuse = |why: &str| {
        let message = format!("`{}` cannot be a name: {why}", shorten(&name));
        Err(Message::new(message))
    };
    let forbidden = |c: char| c.is_whitespace() || c.is_control() || is_invisible(c) || c == '/';
    match name.as_str() {
        "" => refuse("it is empty"),
        _ if name.len() > NAME => refuse("it is longer than 64 bytes"),
        _ if name.contains(forbidden) => {
            refuse("it has a blank, a control or invisible character or a `/`")
        }
        _ => Ok(name),
    }
}

pub(super) fn interface(node: &Node<'_>) -> Result<String> {
    host::interface_name(text(node, "an interface")?)
}

/// Reads the only network of a key, where there is no list of them.
pub(super) fn networks(node: &Node<'_>) -> Result<Network> {
    match &node.content {
        Content::Text(text) if text == ANY || host::means_any(text) && text.len() < 4 => {
            let message = format!("`{}` is not a network", shorten(text));
            Err(Message::new(message).help("leave `from` out to match any sender"))
        }
        _ => network(node),
    }
}

pub(super) fn network(node: &Node<'_>) -> Result<Network> {
    network::network(text(node, "a network")?)
}

/// Reads a number within its limits, written as one or as text.
pub(super) fn number_of(node: &Node<'_>, what: &Number) -> Result<u32> {
    let number = match &node.content {
        Content::Int(number) => Some(*number),
        Content::Text(text) => number(text),
        _ => None,
    };
    let Number { what, first, last } = what;
    match number {
        Some(number) if (i64::from(*first)..=(*last).into()).contains(&number) => Ok(number as u32),
        Some(number) => Err(Message::new(format!("{number} is not {what} ({first} to {last})"))),
        None => expected(&format!("{what} ({first} to {last})"), node),
    }
}

/// Reads a duration within its limits.
pub(super) fn duration(node: &Node<'_>, limits: &Limits) -> Result<Period> {
    let Limits { what, first, last } = limits;
    let what = format!("{what} ({first} to {last})");
    let period = match &node.content {
        Content::Int(number) => {
            let help = format!("write its unit: `{number}s`");
            return expected(&what, node).map_err(|message: Message| message.help(help));
        }
        _ => period::period(text(node, &what)?)?,
    };
    match (*first..=*last).contains(&period) {
        true => Ok(period),
        false => Err(Message::new(format!("{period} is not {what}"))),
    }
}

pub(super) fn switch(node: &Node<'_>) -> Result<bool> {
    match &node.content {
        Content::Bool(value) => Ok(*value),
        _ => expected("`true` or `false`", node),
    }
}
