//! Resolves a configuration as far as its interfaces and host names allow now. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::{fmt, mem};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::desired::choose::RuleResolver;
use crate::desired::dns::Answers;
use crate::desired::{Desired, Name, Rule};

/// The record of what a generation lacks, from which arpd completes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incomplete {
    /// Interfaces that were missing when it was built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Unresolved>,
    /// Names with `addresses: all` whose last answer lacked most of their addresses, which stay until
    /// another answer confirms it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub shrunk: BTreeSet<Name>,
    /// All rules as written, see [`Desired::as_written`]; empty if the active rules imply them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// A host of a rule whose name has no address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Unresolved {
    pub rule: String,
    /// Display name.
    pub upstream: String,
    pub host: String,
    pub cause: String,
    pub effect: Effect,
    /// Place in the file, counted from 1.
    pub line: usize,
    pub column: usize,
}

/// The consequence of a missing address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// The rule is active without the host.
    LeftOut,
    /// The host keeps the addresses that it had.
    Kept(Vec<IpAddr>),
    /// No host of the rule has an address.
    RuleLeftOut,
    /// No host of the rule has an address; the previous form of the rule stays active.
    RuleKept,
}

impl Incomplete {
    pub fn is_empty(&self) -> bool {
        *self == Incomplete::default()
    }

    /// Compares without causes and places, and without interfaces.
    pub fn lacks_the_same(&self, other: &Incomplete) -> bool {
        let hosts = |it: &Incomplete| -> Vec<_> {
            it.hosts.iter().map(|it| (it.place(), it.effect.clone())).collect()
        };
        let rules = (&self.rules, &self.shrunk) == (&other.rules, &other.shrunk);
        rules && hosts(self) == hosts(other)
    }
}

impl Unresolved {
    fn place(&self) -> (String, String) {
        (self.rule.clone(), self.upstream.clone())
    }

    /// Describes cause and effect.
    pub fn message(&self) -> String {
        format!("`{}` {}; {}", self.host, self.cause, self.effect)
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Effect::LeftOut => f.write_str("the rule serves without it"),
            Effect::Kept(addresses) => {
                let all: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
                write!(f, "{}, as before, is kept", all.join(", "))
            }
            Effect::RuleLeftOut => f.write_str("the rule is left out"),
            Effect::RuleKept => f.write_str("the rule keeps the upstreams that it had"),
        }
    }
}

/// A configuration with addresses for its host names, as far as they have any.
#[derive(Debug, Default)]
pub struct Resolved {
    /// The resolved configuration; hosts in `incomplete` lack their places.
    pub desired: Desired,
    /// One for each host in `desired.incomplete`.
    pub gaps: Vec<Gap>,
    /// Notes on names of which an address is unused, or stays although the answer lacks it.
    pub notes: Vec<(Spot, String)>,
}

/// A host in a configuration: the index of its rule, and its own among the rule's destinations.
pub type Spot = (usize, usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub spot: Spot,
    /// True if a later attempt may succeed.
    pub temporary: bool,
}

/// The sources of addresses to choose from.
pub struct Known<'a> {
    pub answers: &'a Answers,
    /// This host's own addresses, which are no upstreams.
    pub own: &'a BTreeSet<IpAddr>,
    pub serving: Option<&'a Desired>,
    /// Names whose previous answer had lost most addresses too.
    pub shrunk: &'a BTreeSet<Name>,
}

/// Resolves the host names of a configuration as [`Desired::written`] made it. Of several addresses of a
/// name the active one is used, else the lowest, so that machines choose alike; with `addresses: all`
/// all are. A name without addresses keeps the active ones.
pub fn resolve(written: &Desired, known: &Known<'_>) -> Resolved {
    let resolver = RuleResolver::new(written, known);
    let mut resolved = Resolved { desired: written.without_rules(), ..Resolved::default() };
    for number in 0..written.rules.len() {
        let part = resolver.rule(number);
        let desired = &mut resolved.desired;
        desired.rules.extend(part.rule);
        desired.incomplete.hosts.extend(part.hosts);
        desired.incomplete.shrunk.extend(part.shrunk);
        resolved.gaps.extend(part.gaps);
        resolved.notes.extend(part.notes);
    }
    resolved.desired.keep_written(&written.rules);
    resolved
}

/// Resolves the active configuration again; returns it and the names without an address. A host that
/// has lost its address keeps it and is not recorded as missing.
pub fn renew(
    serving: &Desired,
    answers: &Answers,
    own: &BTreeSet<IpAddr>,
    shrunk: &mut BTreeSet<Name>,
) -> (Desired, Vec<Unresolved>) {
    let written = serving.as_written();
    shrunk.extend(serving.incomplete.shrunk.iter().cloned());
    let known = Known { answers, own, serving: Some(serving), shrunk };
    let mut renewed = resolve(&written, &known).desired;
    renewed.addresses.clone_from(&serving.addresses);
    renewed.broadcasts.clone_from(&serving.broadcasts);
    let incomplete = &mut renewed.incomplete;
    // The next answer comes soon; a generation for it would be wasted.
    *shrunk = mem::take(&mut incomplete.shrunk);
    let is_open = |name: &Name| answers.get(name).is_none_or(Result::is_err);
    let open = serving.incomplete.shrunk.iter().filter(|name| is_open(name));
    incomplete.shrunk = open.cloned().collect();
    incomplete.interfaces.clone_from(&serving.incomplete.interfaces);
    let unresolved = incomplete.hosts.clone();
    incomplete.hosts.retain_mut(|host| {
        let known = serving.incomplete.hosts.iter().find(|it| it.place() == host.place());
        if let Some(known) = known {
            (host.line, host.column) = (known.line, known.column);
        }
        known.is_some()
    });
    renewed.keep_written(&written.rules);
    (renewed, unresolved)
}

/// Describes the names whose addresses have changed.
pub fn moved(before: &Desired, after: &Desired) -> String {
    let addresses = |desired: &Desired| {
        let mut names: BTreeMap<Name, BTreeSet<IpAddr>> = BTreeMap::new();
        for upstream in desired.upstreams() {
            if let Some(name) = upstream.named() {
                names.entry(name).or_default().insert(upstream.address.ip);
            }
        }
        names
    };
    let before = addresses(before);
    let moved = addresses(after).into_iter().filter(|(name, now)| before.get(name) != Some(now));
    let moved: Vec<String> = moved
        .map(|((name, _), now)| {
            let now: Vec<String> = now.iter().map(IpAddr::to_string).collect();
            format!("{name} is now {}", now.join(", "))
        })
        .collect();
    if moved.is_empty() { "names resolve again".into() } else { moved.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Family};
    use crate::desired::Upstream;
    use crate::desired::dns::NoAnswer;

    const FILE: &str = "
version: 1
interfaces: [eth0]
rules:
  - name: copies
    key: { address: 10.0.0.1, port: 1 }
    options: { mode: replicate, source: preserve }
    upstream: [{ address: 10.0.0.2 }, { address: a.example }, { address: b.example }]
  - name: flows
    key: { address: 10.0.0.1, port: 2 }
    upstream: [{ address: 10.0.0.2 }, { address: a.example }]
    mirror: [{ address: b.example }, { address: 10.0.0.9 }]
  - name: alone
    key: { address: 10.0.0.1, port: 3 }
    upstream: [{ address: a.example }]
  - name: six
    key: { address: '2001:db8::1', port: 1 }
    upstream: [{ address: a.example }]
";

    fn written(file: &str) -> Desired {
        let config = Config::parse("test.yaml", file).expect("a good file");
        Desired::written(&config, &config.interfaces)
    }

    /// As apply does it, on a host with one address.
    fn applied(file: &str, answers: &Answers, serving: Option<&Desired>) -> Resolved {
        let own = BTreeSet::from([IpAddr::from([10, 0, 0, 7])]);
        let shrunk = serving.map(|it| it.incomplete.shrunk.clone()).unwrap_or_default();
        resolve(&written(file), &Known { answers, own: &own, serving, shrunk: &shrunk })
    }

    /// Answers for IPv4; a name without addresses does not resolve.
    fn answers(names: &[(&str, &[&str])]) -> Answers {
        let answer = |(name, addresses): &(&str, &[&str])| {
            let addresses = addresses.iter().map(|text| text.parse().expect("an address"));
            let addresses: BTreeSet<IpAddr> = addresses.collect();
            let no = NoAnswer { cause: "does not resolve".into(), temporary: false };
            let answer = if addresses.is_empty() { Err(no) } else { Ok(addresses) };
            ((name.to_string(), Family::V4), answer)
        };
        names.iter().map(answer).collect()
    }

    /// `rule: address, address | mirror`
    fn rules(desired: &Desired) -> Vec<String> {
        let list = |hosts: &[Upstream]| {
            let hosts: Vec<String> = hosts.iter().map(|it| it.address.to_string()).collect();
            hosts.join(", ")
        };
        let rule = |rule: &Rule| {
            let text = format!("{}: {}", rule.name, list(&rule.upstreams));
            match rule.mirrors.is_empty() {
                true => text,
                false => text + " | " + &list(&rule.mirrors),
            }
        };
        desired.rules.iter().map(rule).collect()
    }

    fn effects(desired: &Desired) -> Vec<String> {
        let hosts = desired.incomplete.hosts.iter();
        hosts.map(|it| format!("{}/{}: {}", it.rule, it.upstream, it.effect)).collect()
    }

    #[test]
    fn only_the_host_without_an_address_is_left_out() {
        let names = answers(&[("a.example", &[]), ("b.example", &["10.0.0.4"])]);
        let resolved = applied(FILE, &names, None);
        let desired = &resolved.desired;
        assert_eq!(
            rules(desired),
            ["copies: 10.0.0.2, 10.0.0.4", "flows: 10.0.0.2 | 10.0.0.4, 10.0.0.9"]
        );
        let without = "the rule serves without it";
        assert_eq!(
            effects(desired),
            [
                format!("copies/a.example: {without}"),
                format!("flows/a.example: {without}"),
                "alone/a.example: the rule is left out".into(),
                "six/a.example: the rule is left out".into(),
            ]
        );
        let spots: Vec<Spot> = resolved.gaps.iter().map(|gap| gap.spot).collect();
        assert_eq!(spots, [(0, 1), (1, 1), (2, 0), (3, 0)]);
        assert_eq!(desired.as_written(), written(FILE));
    }

    #[test]
    fn nothing_is_missing_where_every_name_resolves() {
        let mut names = answers(&[("a.example", &["10.0.0.3"]), ("b.example", &["10.0.0.4"])]);
        let six = ("a.example".to_string(), Family::V6);
        names.insert(six, Ok(["2001:db8::3".parse().expect("an address")].into()));
        let desired = applied(FILE, &names, None).desired;
        assert_eq!(rules(&desired)[3], "six: 2001:db8::3");
        assert!(desired.incomplete.is_empty() && desired.incomplete.rules.is_empty());
        assert_eq!(desired.as_written(), written(FILE));
    }

    #[test]
    fn a_name_keeps_the_address_that_serves() {
        let good = answers(&[("a.example", &["10.0.0.3"]), ("b.example", &["10.0.0.4"])]);
        let serving = applied(FILE, &good, None).desired;
        let failing = answers(&[("a.example", &[]), ("b.example", &["10.0.0.5", "10.0.0.4"])]);
        let resolved = applied(FILE, &failing, Some(&serving));
        assert_eq!(rules(&resolved.desired), rules(&serving));
        assert_eq!(effects(&resolved.desired)[0], "copies/a.example: 10.0.0.3, as before, is kept");
        assert_eq!(resolved.notes.len(), 2);
        // and a rule that is new has what others have for the name
        let more = FILE.replace("name: alone", "name: new");
        let resolved = applied(&more, &failing, Some(&serving));
        assert_eq!(rules(&resolved.desired)[2], "new: 10.0.0.3");
    }

    #[test]
    fn a_rule_without_upstreams_keeps_what_serves() {
        let file = |text: &str| {
            format!(
                "version: 1\ninterfaces: [eth0]\nrules:\n\
                 - {{ name: a, key: {{ address: 10.0.0.1, port: 1 }}, upstream: [{{ address: 10.0.0.2 }}] }}\n{text}"
            )
        };
        let rule = |name: &str, port: u16, upstream: &str| {
            format!(
                "- {{ name: {name}, key: {{ address: 10.0.0.1, port: {port} }}, \
                 upstream: [{{ address: {upstream} }}] }}\n"
            )
        };
        let names = answers(&[("typo.example", &[])]);
        let serving = applied(&file(&rule("b", 2, "10.0.0.3")), &names, None).desired;
        for (rules_of_file, expected) in [
            (rule("b", 2, "typo.example"), "b: 10.0.0.3"),
            // renamed, and with another key
            (rule("c", 2, "typo.example"), "b: 10.0.0.3"),
            (rule("b", 3, "typo.example"), "b: 10.0.0.3"),
        ] {
            let resolved = applied(&file(&rules_of_file), &names, Some(&serving));
            assert_eq!(rules(&resolved.desired), ["a: 10.0.0.2", expected]);
            assert!(effects(&resolved.desired)[0].ends_with("keeps the upstreams that it had"));
            assert_eq!(resolved.desired.as_written(), written(&file(&rules_of_file)));
        }
        // its key is another rule's now, or its name is
        for other in [rule("d", 2, "10.0.0.5"), rule("b", 4, "10.0.0.5")] {
            let new = rule(if other.contains("name: b") { "e" } else { "b" }, 3, "typo.example");
            let resolved = applied(&file(&(other + &new)), &names, Some(&serving));
            assert_eq!(resolved.desired.rules.len(), 2, "{:?}", rules(&resolved.desired));
            assert!(effects(&resolved.desired)[0].ends_with("the rule is left out"));
        }
    }

    #[test]
    fn an_address_that_is_no_upstream_is_none() {
        for (address, cause) in [
            ("127.0.0.1", "loopback"),
            ("10.0.0.1", "own key"),
            ("10.0.0.7", "address of this host"),
        ] {
            let names = answers(&[("a.example", &[address]), ("b.example", &["10.0.0.4"])]);
            let desired = applied(FILE, &names, None).desired;
            let hosts = &desired.incomplete.hosts;
            assert!(hosts[0].cause.contains(cause), "{hosts:?}");
            assert_eq!(rules(&desired)[0], "copies: 10.0.0.2, 10.0.0.4");
        }
    }

    #[test]
    fn renew_completes_and_records_no_new_failure() {
        let serving = answers(&[("a.example", &[]), ("b.example", &["10.0.0.4"])]);
        let serving = applied(FILE, &serving, None).desired;
        let names = answers(&[("a.example", &["10.0.0.3"]), ("b.example", &[])]);
        let (renewed, unresolved) = renew(&serving, &names, &BTreeSet::new(), &mut BTreeSet::new());
        assert_eq!(
            rules(&renewed),
            [
                "copies: 10.0.0.2, 10.0.0.3, 10.0.0.4",
                "flows: 10.0.0.2, 10.0.0.3 | 10.0.0.4, 10.0.0.9",
                "alone: 10.0.0.3",
            ]
        );
        assert_eq!(effects(&renewed), ["six/a.example: the rule is left out"]);
        assert_eq!(renewed.as_written(), written(FILE));
        assert_eq!(unresolved.len(), 3, "{unresolved:?}");
        assert_eq!(moved(&serving, &renewed), "a.example is now 10.0.0.3");
        // nothing new: nothing to do
        let (same, _) = renew(&renewed, &names, &BTreeSet::new(), &mut BTreeSet::new());
        assert!(renewed.serves(&same));
    }

    #[test]
    fn causes_and_gone_interfaces_need_no_generation() {
        let names = answers(&[("a.example", &[]), ("b.example", &["10.0.0.4"])]);
        let serving = applied(FILE, &names, None).desired;
        let mut wanted = serving.clone();
        wanted.incomplete.hosts[0].cause = "no answer".into();
        wanted.incomplete.interfaces = vec!["eth0".into()];
        assert!(serving.serves(&wanted));
        // what it lacked is there: arpd would go on looking for it
        assert!(!wanted.serves(&serving));
        wanted.incomplete.hosts.pop();
        assert!(!serving.serves(&wanted));
    }

    const POOL: &str = "
version: 1
interfaces: [eth0]
rules:
  - name: copies
    key: { address: 10.0.0.1, port: 1 }
    options: { mode: replicate, source: preserve }
    upstream: [{ address: 10.0.0.2 }, { name: p, address: a.example, addresses: all, port: 9 }]
  - name: flows
    key: { address: 10.0.0.1, port: 2 }
    upstream: [{ address: a.example, addresses: all, port: 9 }, { address: a.example }]
";

    #[test]
    fn all_addresses_of_a_name_are_upstreams() {
        let names = answers(&[("a.example", &["10.0.0.4", "10.0.0.3", "127.0.0.1"])]);
        let desired = applied(POOL, &names, None).desired;
        assert_eq!(
            rules(&desired),
            ["copies: 10.0.0.2, 10.0.0.3, 10.0.0.4", "flows: 10.0.0.3, 10.0.0.4, 10.0.0.3"]
        );
        let labels: Vec<String> = desired.upstreams().map(Upstream::label).collect();
        let pool = ["10.0.0.2", "p@10.0.0.3", "p@10.0.0.4"];
        let flows = ["a.example@10.0.0.3:9", "a.example@10.0.0.4:9", "a.example"];
        assert_eq!(labels, [pool, flows].concat());
        assert_eq!(desired.as_written(), written(POOL));
        // one that is in the list already does not get a second copy
        let file = POOL.replace(", port: 9", "");
        let names = answers(&[("a.example", &["10.0.0.2"])]);
        let desired = applied(&file.replace(", { address: a.example }", ""), &names, None).desired;
        assert_eq!(rules(&desired)[0], "copies: 10.0.0.2");
        assert_eq!(desired.as_written(), written(&file.replace(", { address: a.example }", "")));
    }

    #[test]
    fn a_name_with_too_many_addresses_is_cut() {
        let all: Vec<String> = (1..=100).map(|host| format!("10.1.0.{host}")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let later = answers(&[("a.example", &all)]);
        let serving = applied(POOL, &answers(&[("a.example", &["10.1.0.99"])]), None).desired;
        let resolved = applied(POOL, &later, Some(&serving));
        // 64 receivers at most, and one is there
        let copies = &resolved.desired.rules[0].upstreams;
        assert_eq!(copies.len(), 33);
        assert!(copies.iter().any(|it| it.address == [10, 1, 0, 99].into()), "what serves stays");
        assert_eq!(resolved.desired.rules[1].upstreams.len(), 65);
        assert!(resolved.notes[0].1.contains("100 addresses: 32 of them"), "{:?}", resolved.notes);
    }

    #[test]
    fn a_name_that_shrinks_waits_for_another_answer() {
        let of = |addresses: &[&str]| answers(&[("a.example", addresses)]);
        let five = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5"];
        let serving = applied(POOL, &of(&five), None).desired;
        let addresses = |desired: &Desired| desired.rules[1].upstreams.len() - 1;
        // by less than half, or to as many others: at once
        let fewer = applied(POOL, &of(&five[..3]), Some(&serving)).desired;
        assert_eq!((addresses(&fewer), fewer.incomplete.is_empty()), (3, true));
        let others = ["10.2.0.1", "10.2.0.2", "10.2.0.3"];
        assert_eq!(addresses(&applied(POOL, &of(&others), Some(&serving)).desired), 3);
        // by more than half: the second time, with what is new at once
        let small = of(&["10.1.0.2", "10.2.0.1"]);
        let first = applied(POOL, &small, Some(&serving));
        assert_eq!(addresses(&first.desired), 6);
        assert!(
            first.notes[0].1.contains("fewer addresses, 2, than serve, 5"),
            "{:?}",
            first.notes
        );
        assert!(!serving.serves(&first.desired), "the first answer is recorded");
        let second = applied(POOL, &small, Some(&first.desired)).desired;
        assert_eq!((addresses(&second), second.incomplete.is_empty()), (2, true));
        // and not where the answer between was whole
        let whole = applied(POOL, &of(&five), Some(&first.desired)).desired;
        assert!(whole.incomplete.is_empty());
        assert_eq!(addresses(&applied(POOL, &small, Some(&whole)).desired), 6);
    }

    #[test]
    fn renew_takes_addresses_out_at_the_second_answer() {
        let of = |addresses: &[&str]| answers(&[("a.example", addresses)]);
        let file = POOL.replace(", { address: a.example }", "");
        let serving = applied(&file, &of(&["10.1.0.1", "10.1.0.2", "10.1.0.3"]), None).desired;
        let own = BTreeSet::new();
        let mut shrunk = BTreeSet::new();
        let (first, _) = renew(&serving, &of(&["10.1.0.3"]), &own, &mut shrunk);
        assert!(serving.serves(&first), "no generation to remember it");
        // no answer at all is none
        let (none, unresolved) = renew(&serving, &of(&[]), &own, &mut shrunk.clone());
        assert!(serving.serves(&none) && unresolved.len() == 2, "{unresolved:?}");
        let (second, _) = renew(&serving, &of(&["10.1.0.3"]), &own, &mut shrunk);
        assert_eq!(rules(&second)[0], "copies: 10.0.0.2, 10.1.0.3");
        assert!(shrunk.is_empty());
    }
}
