//! Rules and ids of a description, packed: JSON of 10,000 rules takes ten times as long to read.
//!
//! Most rules of a long file differ in names, keys, addresses and ports. These are written for each rule and upstream
//! as they come; all else is a pattern, which is written once, as JSON, so that versions of udplb may add words.

use std::collections::HashMap;
use std::net::IpAddr;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use crate::config::{Address, Host, Key, KeyAddress, Ports};
use crate::desired::{Rule, RuleIds, Upstream};

/// Rules and upstreams without what is written for each of them.
#[derive(Default, Serialize, Deserialize)]
struct Patterns {
    rules: Vec<Rule>,
    upstreams: Vec<Upstream>,
}

/// Returns rules and their ids, packed.
pub fn pack(rules: &[Rule], ids: &[RuleIds]) -> anyhow::Result<Vec<u8>> {
    let mut patterns = Patterns::default();
    let mut known = (Known::default(), Known::default());
    let mut rows = Writer::default();
    rows.count(rules.len())?;
    for (rule, ids) in rules.iter().zip(ids) {
        rows.count(known.0.number(&mut patterns.rules, rule_pattern(rule))?)?;
        rows.text(&rule.name)?;
        match rule.key.address {
            KeyAddress::Any => rows.ip(None),
            KeyAddress::Is(address) => rows.ip(Some(address)),
        }
        rows.count(rule.key.ports.len())?;
        for ports in &rule.key.ports {
            rows.port(ports.first);
            rows.port(ports.last);
        }
        for list in [&rule.upstreams, &rule.mirrors] {
            rows.count(list.len())?;
            for upstream in list {
                let pattern = upstream_pattern(upstream);
                rows.count(known.1.number(&mut patterns.upstreams, pattern)?)?;
                rows.upstream(upstream)?;
            }
        }
        rows.number(ids.rule);
        for ids in [&ids.upstreams, &ids.mirrors, &ids.answers] {
            rows.count(ids.len())?;
            ids.iter().for_each(|id| rows.number(*id));
        }
    }
    let mut all = Writer::default();
    all.bytes(&serde_json::to_vec(&patterns)?)?;
    all.0.extend(rows.0);
    Ok(all.0)
}

/// Reads what [`pack`] has written; bytes after it are ignored.
///
/// # Errors
/// It is cut off, or was written otherwise.
pub fn unpack(packed: &[u8]) -> anyhow::Result<(Vec<Rule>, Vec<RuleIds>)> {
    let mut rows = Reader(packed);
    let patterns: Patterns =
        serde_json::from_slice(rows.bytes()?).context("its patterns of rules")?;
    let count = rows.count()?;
    let (mut rules, mut ids) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..count {
        let pattern = rows.pattern(&patterns.rules)?;
        let name = rows.text()?.to_owned();
        let address = rows.ip()?.map_or(KeyAddress::Any, KeyAddress::Is);
        let ports = rows.list(|rows| Ok(Ports { first: rows.port()?, last: rows.port()? }))?;
        let key = Key { address, ports, ..pattern.key.clone() };
        let upstreams = rows.list(|rows| rows.upstream(&patterns))?;
        let mirrors = rows.list(|rows| rows.upstream(&patterns))?;
        rules.push(Rule { name, key, upstreams, mirrors, ..pattern.clone() });
        ids.push(RuleIds {
            rule: rows.number()?,
            upstreams: rows.list(Reader::number)?,
            mirrors: rows.list(Reader::number)?,
            answers: rows.list(Reader::number)?,
        });
    }
    Ok((rules, ids))
}

/// Returns a rule without what is written for each.
fn rule_pattern(rule: &Rule) -> Rule {
    let key = Key { address: KeyAddress::Any, ports: Vec::new(), ..rule.key.clone() };
    let (name, upstreams, mirrors) = (String::new(), Vec::new(), Vec::new());
    Rule { name, key, upstreams, mirrors, ..rule.clone() }
}

/// Returns an upstream without what is written for each: all have one address.
fn upstream_pattern(upstream: &Upstream) -> Upstream {
    let Upstream { name, host, address, port, .. } = Upstream::new([192, 0, 2, 1], None);
    Upstream { name, host, address, port, ..upstream.clone() }
}

/// Numbers of patterns.
#[derive(Default)]
struct Known {
    last: usize,
    by_text: HashMap<String, usize>,
}

impl Known {
    /// Returns the number of a pattern among `all`, to which it is added where it is missing.
    fn number<T: Serialize + PartialEq>(
        &mut self,
        all: &mut Vec<T>,
        pattern: T,
    ) -> anyhow::Result<usize> {
        if all.get(self.last) != Some(&pattern) {
            let next = all.len();
            self.last = *self.by_text.entry(serde_json::to_string(&pattern)?).or_insert(next);
            if self.last == next {
                all.push(pattern);
            }
        }
        Ok(self.last)
    }
}

/// Kind of a host: it is the upstream's address, or a name.
const ADDRESS: u8 = 0;
const NAME: u8 = 1;

/// Kind of an optional value.
const ABSENT: u8 = 0;
const PRESENT: u8 = 1;

/// Kind of an address besides its family: the key's `any`.
const ANY: u8 = 0;
const IPV4: u8 = 4;
const IPV6: u8 = 6;

/// Appends values; numbers are little-endian.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: u32) {
        self.0.extend(number.to_le_bytes());
    }

    fn count(&mut self, count: usize) -> anyhow::Result<()> {
        self.number(u32::try_from(count)?);
        Ok(())
    }

    fn port(&mut self, port: u16) {
        self.0.extend(port.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.count(bytes.len())?;
        self.0.extend(bytes);
        Ok(())
    }

    fn text(&mut self, text: &str) -> anyhow::Result<()> {
        self.bytes(text.as_bytes())
    }

    fn optional(&mut self, text: Option<&str>) -> anyhow::Result<()> {
        self.0.push(if text.is_some() { PRESENT } else { ABSENT });
        text.map_or(Ok(()), |text| self.text(text))
    }

    fn ip(&mut self, address: Option<IpAddr>) {
        match address {
            None => self.0.push(ANY),
            Some(IpAddr::V4(address)) => {
                self.0.push(IPV4);
                self.0.extend(address.octets());
            }
            Some(IpAddr::V6(address)) => {
                self.0.push(IPV6);
                self.0.extend(address.octets());
            }
        }
    }

    /// Appends what its pattern lacks.
    fn upstream(&mut self, upstream: &Upstream) -> anyhow::Result<()> {
        self.optional(upstream.name.as_deref())?;
        self.ip(Some(upstream.address.ip));
        self.optional(upstream.address.scope.as_deref())?;
        match &upstream.host {
            Host::Address(address) if *address == upstream.address => self.0.push(ADDRESS),
            host => {
                self.0.push(NAME);
                self.text(&host.to_string())?;
            }
        }
        self.0.push(if upstream.port.is_some() { PRESENT } else { ABSENT });
        upstream.port.into_iter().for_each(|port| self.port(port));
        Ok(())
    }
}

/// Takes values off the front.
struct Reader<'p>(&'p [u8]);

impl<'p> Reader<'p> {
    fn take(&mut self, count: usize) -> anyhow::Result<&'p [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).context("its rules are cut off")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> anyhow::Result<[u8; N]> {
        Ok(self.take(N)?.try_into()?)
    }

    fn byte(&mut self) -> anyhow::Result<u8> {
        self.array().map(|[byte]| byte)
    }

    fn number(&mut self) -> anyhow::Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// Returns a number of values, each of which takes a byte at least.
    fn count(&mut self) -> anyhow::Result<usize> {
        let count = self.number()? as usize;
        if count > self.0.len() {
            bail!("its rules are cut off");
        }
        Ok(count)
    }

    fn list<T>(
        &mut self,
        mut value: impl FnMut(&mut Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<Vec<T>> {
        let count = self.count()?;
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(value(self)?);
        }
        Ok(list)
    }

    fn port(&mut self) -> anyhow::Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn bytes(&mut self) -> anyhow::Result<&'p [u8]> {
        let count = self.count()?;
        self.take(count)
    }

    fn text(&mut self) -> anyhow::Result<&'p str> {
        std::str::from_utf8(self.bytes()?).context("a text of its rules")
    }

    fn is_present(&mut self) -> anyhow::Result<bool> {
        match self.byte()? {
            ABSENT => Ok(false),
            PRESENT => Ok(true),
            kind => bail!("its rules have a value of kind {kind}"),
        }
    }

    fn optional(&mut self) -> anyhow::Result<Option<String>> {
        Ok(if self.is_present()? { Some(self.text()?.to_owned()) } else { None })
    }

    fn ip(&mut self) -> anyhow::Result<Option<IpAddr>> {
        Ok(match self.byte()? {
            ANY => None,
            IPV4 => Some(IpAddr::from(self.array::<4>()?)),
            IPV6 => Some(IpAddr::from(self.array::<16>()?)),
            kind => bail!("its rules have an address of kind {kind}"),
        })
    }

    fn pattern<'a, T>(&mut self, patterns: &'a [T]) -> anyhow::Result<&'a T> {
        let number = self.number()? as usize;
        patterns.get(number).with_context(|| format!("its rules have no pattern {number}"))
    }

    fn upstream(&mut self, patterns: &Patterns) -> anyhow::Result<Upstream> {
        let pattern = self.pattern(&patterns.upstreams)?;
        let name = self.optional()?;
        let ip = self.ip()?.context("an upstream of its rules has no address")?;
        let address = Address { ip, scope: self.optional()? };
        let host = match self.byte()? {
            ADDRESS => Host::Address(address.clone()),
            NAME => self.text()?.parse().map_err(anyhow::Error::msg)?,
            kind => bail!("its rules have a host of kind {kind}"),
        };
        let port = if self.is_present()? { Some(self.port()?) } else { None };
        Ok(Upstream { name, host, address, port, ..pattern.clone() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{pack, unpack};
    use crate::config::{
        Address, Addresses, Health, Host, Key, KeyAddress, Mode, Ports, Reply, Source, State,
    };
    use crate::desired::{Rule, RuleIds, Upstream};

    /// Returns rules that differ in everything that is written for each, and in some of what is not.
    fn rules() -> (Vec<Rule>, Vec<RuleIds>) {
        let ports = |first, last| Ports { first, last };
        let network = |text: &str| text.parse().expect("a network");
        let named = Upstream {
            name: Some("über".into()),
            host: Host::Name("relay.example".into()),
            addresses: Addresses::All,
            weight: 7,
            ..Upstream::new([10, 0, 9, 1], Some(53))
        };
        let link_local: Address = "fe80::1%eth0".parse().expect("an address");
        let linked = Upstream { state: State::Drained, ..Upstream::new(link_local, None) };
        let sampled = Upstream {
            sample: 10,
            source: Some(Source::Preserve),
            from: vec![network("10.1.0.0/16")],
            ..Upstream::new([10, 0, 9, 2], Some(u16::MAX))
        };
        let plain = |number: u8| {
            let key = Key::new([10, 0, 0, number], vec![ports(514, 514)]);
            Rule::new(format!("plain {number}"), key, vec![Upstream::new([10, 0, 8, number], None)])
        };
        let any = Key::new(KeyAddress::Any, vec![ports(1, 2), ports(9, 65_535)]);
        let rules = vec![
            plain(1),
            plain(2),
            Rule { mirrors: vec![sampled.clone()], ..Rule::new("", any, vec![named, linked]) },
            Rule {
                mode: Mode::Replicate,
                reply: Reply::Nat,
                health: Health::Neighbour,
                answers: Some(1),
                ..Rule::new("flows", Key::new([10, 0, 0, 3], Vec::new()), vec![sampled])
            },
            plain(4),
        ];
        let ids = (1_u32..).zip(&rules).map(|(first, rule)| RuleIds {
            rule: first << 20,
            upstreams: rule.upstreams.iter().zip(first * 100..).map(|(_, id)| id).collect(),
            mirrors: rule.mirrors.iter().map(|_| first).collect(),
            answers: if rule.reply == Reply::Nat { vec![9] } else { Vec::new() },
        });
        let ids = ids.collect();
        (rules, ids)
    }

    #[test]
    fn packed_rules_are_read_as_they_were() {
        let (rules, ids) = rules();
        let packed = pack(&rules, &ids).expect("packed rules");
        assert_eq!(unpack(&packed).expect("rules"), (rules.clone(), ids.clone()));
        // the last bytes of a map
        let padded = [&packed[..], &[0; 9]].concat();
        assert_eq!(unpack(&padded).expect("rules"), (rules, ids));
        assert_eq!(unpack(&pack(&[], &[]).expect("none")).expect("none"), (vec![], vec![]));
    }

    #[test]
    fn patterns_are_written_once() {
        let (rules, ids) = rules();
        let packed = pack(&rules, &ids).expect("packed rules");
        let text = String::from_utf8_lossy(&packed);
        // of the plain rules, the one with a mirror, and the one with flows
        assert_eq!(text.matches("\"strategy\"").count(), 2, "{text}");
        assert_eq!(text.matches("192.0.2.1").count(), 2 * 4, "{text}");
    }

    #[test]
    fn cut_off_rules_are_refused() {
        let (rules, ids) = rules();
        let packed = pack(&rules, &ids).expect("packed rules");
        for length in 0..packed.len() {
            assert!(unpack(&packed[..length]).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn damaged_rules_do_no_harm(at: prop::sample::Index, byte: u8) {
            let (rules, ids) = rules();
            let mut packed = pack(&rules, &ids).expect("packed rules");
            let at = at.index(packed.len());
            packed[at] = byte;
            // other rules, or an error
            let _ = unpack(&packed);
        }
    }
}
