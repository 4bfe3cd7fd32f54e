//! What of a configuration can be applied while interfaces and host names are missing. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::config::{Address, upstream_refusal};
use crate::plan::{Desired, Name, Rule, Upstream};
use crate::resolve::{Answers, NoAnswer};

/// The record of what a generation lacks, from which arpd completes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incomplete {
    /// Interfaces that were missing when it was built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<Unresolved>,
    /// All rules as written, see [`Desired::as_written`]; none where they follow from those that
    /// serve.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// A host of a rule whose name has no address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unresolved {
    pub rule: String,
    /// Its label.
    pub upstream: String,
    pub host: String,
    pub cause: String,
    pub effect: Effect,
    /// Its place in the file, counted from 1.
    pub line: usize,
    pub column: usize,
}

/// The consequence of a missing address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// The rule serves without the host.
    LeftOut,
    /// The host keeps the addresses that it had.
    Kept(Vec<IpAddr>),
    /// No host of the rule has an address.
    RuleLeftOut,
    /// The same, and an earlier form of the rule serves on.
    RuleKept,
}

impl Incomplete {
    pub fn is_empty(&self) -> bool {
        self.interfaces.is_empty() && self.hosts.is_empty()
    }

    /// Compares without causes and places, and without interfaces.
    pub fn lacks_the_same(&self, other: &Incomplete) -> bool {
        let hosts = |it: &Incomplete| -> Vec<_> {
            it.hosts.iter().map(|it| (it.place(), it.effect.clone())).collect()
        };
        self.rules == other.rules && hosts(self) == hosts(other)
    }
}

impl Unresolved {
    fn place(&self) -> (String, String) {
        (self.rule.clone(), self.upstream.clone())
    }

    /// Cause and effect in words.
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
    /// Without places in `incomplete`.
    pub desired: Desired,
    /// One for each host in `desired.incomplete`.
    pub gaps: Vec<Gap>,
    /// Names with several addresses, of which one is used.
    pub several: Vec<(Spot, String)>,
}

/// A host in a configuration: the index of its rule, and its own among the rule's destinations.
pub type Spot = (usize, usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub spot: Spot,
    /// The resolver may know later.
    pub temporary: bool,
}

/// Fills in the addresses of a configuration as [`Desired::written`] made it. Of several addresses
/// of a name the one that `serving` has is used, else the lowest, so that machines choose alike. A
/// name without any keeps what `serving` has for it.
pub fn resolve(written: &Desired, answers: &Answers, serving: Option<&Desired>) -> Resolved {
    let before = Before::new(serving.map_or(&[], |serving| &serving.rules));
    let mut all = Resolved { desired: written.clone(), ..Resolved::default() };
    all.desired.rules.clear();
    for number in 0..written.rules.len() {
        let (rule, hosts) = resolve_rule(written, number, answers, &before, &mut all);
        all.desired.rules.extend(rule);
        all.desired.incomplete.hosts.extend(hosts);
    }
    let is_kept = |host: &Unresolved| matches!(host.effect, Effect::Kept(_));
    if !all.desired.incomplete.hosts.iter().all(is_kept) {
        all.desired.incomplete.rules.clone_from(&written.rules);
    }
    all
}

/// The configuration that serves with what its names stand for now, and the names without an address.
/// A host that has lost its address keeps it, which is not recorded: only `serving` says what is missing.
pub fn renew(serving: &Desired, answers: &Answers) -> (Desired, Vec<Unresolved>) {
    let mut renewed = resolve(&serving.as_written(), answers, Some(serving)).desired;
    renewed.addresses.clone_from(&serving.addresses);
    renewed.broadcasts.clone_from(&serving.broadcasts);
    let incomplete = &mut renewed.incomplete;
    incomplete.interfaces.clone_from(&serving.incomplete.interfaces);
    let unresolved = incomplete.hosts.clone();
    incomplete.hosts.retain_mut(|host| {
        let known = serving.incomplete.hosts.iter().find(|it| it.place() == host.place());
        if let Some(known) = known {
            (host.line, host.column) = (known.line, known.column);
        }
        known.is_some()
    });
    if incomplete.hosts.is_empty() {
        incomplete.rules.clear();
    }
    (renewed, unresolved)
}

/// The names that stand for other addresses than before, in words.
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

/// Returns what serves of a rule, and its hosts without an address.
fn resolve_rule(
    written: &Desired,
    number: usize,
    answers: &Answers,
    before: &Before<'_>,
    all: &mut Resolved,
) -> (Option<Rule>, Vec<Unresolved>) {
    let rule = &written.rules[number];
    let mut resolved = Rule { upstreams: Vec::new(), mirrors: Vec::new(), ..rule.clone() };
    let mut lacking = Vec::new();
    for (nth, upstream) in rule.destinations().enumerate() {
        let spot = (number, nth);
        let addresses = match upstream.named() {
            None => vec![upstream.address.clone()],
            Some(name) => {
                let kept = before.addresses(rule, &name);
                match addresses(rule, upstream, &name, answers, &kept) {
                    Ok((addresses, several)) => {
                        all.several.extend(several.map(|text| (spot, text)));
                        addresses
                    }
                    Err(no) => {
                        all.gaps.push(Gap { spot, temporary: no.temporary });
                        lacking.push((upstream, no.cause, kept.clone()));
                        kept
                    }
                }
            }
        };
        let list = match nth < rule.upstreams.len() {
            true => &mut resolved.upstreams,
            false => &mut resolved.mirrors,
        };
        list.extend(addresses.into_iter().map(|address| Upstream { address, ..upstream.clone() }));
    }
    let is_whole = !resolved.upstreams.is_empty();
    let serves = match is_whole {
        true => Some(resolved),
        false => before.rule(written, number).cloned(),
    };
    let effect = |kept: Vec<Address>| match (&serves, is_whole) {
        (None, _) => Effect::RuleLeftOut,
        (Some(_), false) => Effect::RuleKept,
        _ if kept.is_empty() => Effect::LeftOut,
        _ => Effect::Kept(kept.into_iter().map(|address| address.ip).collect()),
    };
    let unresolved = lacking.into_iter().map(|(upstream, cause, kept)| Unresolved {
        rule: rule.name.clone(),
        upstream: upstream.label(),
        host: upstream.host.to_string(),
        cause,
        effect: effect(kept),
        line: 0,
        column: 0,
    });
    let unresolved = unresolved.collect();
    (serves, unresolved)
}

/// Chooses the addresses of a host, with a warning where the name has others. `serving` are those
/// that it has now.
fn addresses(
    rule: &Rule,
    upstream: &Upstream,
    name: &Name,
    answers: &Answers,
    serving: &[Address],
) -> Result<(Vec<Address>, Option<String>), NoAnswer> {
    let no = |cause| NoAnswer { cause, temporary: false };
    let found = match answers.get(name) {
        Some(answer) => answer.as_ref().map_err(NoAnswer::clone)?,
        None => return Err(NoAnswer { cause: "was not asked for".into(), temporary: true }),
    };
    let stays = serving.iter().map(|address| address.ip).find(|ip| found.contains(ip));
    let ip = stays.or(found.first().copied());
    let ip = ip.ok_or_else(|| no(format!("does not resolve: it has no {} address", name.1)))?;
    if let Some(reason) = upstream_refusal(&ip.into()) {
        return Err(no(format!("is no upstream: {reason}")));
    }
    if rule.key.is(ip, upstream.port) {
        return Err(no(format!("is {ip}, the rule's own key")));
    }
    let others: Vec<String> =
        found.iter().filter(|other| **other != ip).map(IpAddr::to_string).collect();
    let several = (!others.is_empty()).then(|| {
        format!("`{}` has several addresses: {ip} is used, not {}", name.0, others.join(", "))
    });
    Ok((vec![ip.into()], several))
}

/// The rules that serve, and what host names stand for in them.
struct Before<'a> {
    rules: &'a [Rule],
    /// By rule; an empty name stands for any rule.
    names: HashMap<(&'a str, Name), Vec<Address>>,
}

impl<'a> Before<'a> {
    fn new(rules: &'a [Rule]) -> Before<'a> {
        let mut names: HashMap<_, Vec<Address>> = HashMap::new();
        for rule in rules {
            for upstream in rule.destinations() {
                let Some(name) = upstream.named() else { continue };
                for rule in [rule.name.as_str(), ""] {
                    let known = names.entry((rule, name.clone())).or_default();
                    if !known.contains(&upstream.address) {
                        known.push(upstream.address.clone());
                    }
                }
            }
        }
        Before { rules, names }
    }

    /// The addresses of a name in a rule, or else in the others.
    fn addresses(&self, rule: &Rule, name: &Name) -> Vec<Address> {
        let of = |rule| self.names.get(&(rule, name.clone()));
        of(rule.name.as_str()).or_else(|| of("")).into_iter().flatten().take(1).cloned().collect()
    }

    /// The rule that serves in place of one that has no upstream: of the same name, or else with the
    /// same key. It must not be in the way of another rule.
    fn rule(&self, written: &Desired, number: usize) -> Option<&'a Rule> {
        let rule = &written.rules[number];
        let find = |is: &dyn Fn(&Rule) -> bool| self.rules.iter().find(|it| is(it));
        let before = find(&|it| it.name == rule.name).or_else(|| find(&|it| it.key == rule.key))?;
        let mut others = written.rules.iter().enumerate().filter(|(other, _)| *other != number);
        let is_in_the_way = others.any(|(_, other)| {
            other.name == before.name || (before.key != rule.key && other.key.overlaps(&before.key))
        });
        (!is_in_the_way).then_some(before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Family};

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
        let resolved = resolve(&written(FILE), &names, None);
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
        let desired = resolve(&written(FILE), &names, None).desired;
        assert_eq!(rules(&desired)[3], "six: 2001:db8::3");
        assert!(desired.incomplete.is_empty() && desired.incomplete.rules.is_empty());
        assert_eq!(desired.as_written(), written(FILE));
    }

    #[test]
    fn a_name_keeps_the_address_that_serves() {
        let good = answers(&[("a.example", &["10.0.0.3"]), ("b.example", &["10.0.0.4"])]);
        let serving = resolve(&written(FILE), &good, None).desired;
        let failing = answers(&[("a.example", &[]), ("b.example", &["10.0.0.5", "10.0.0.4"])]);
        let resolved = resolve(&written(FILE), &failing, Some(&serving));
        assert_eq!(rules(&resolved.desired), rules(&serving));
        assert_eq!(effects(&resolved.desired)[0], "copies/a.example: 10.0.0.3, as before, is kept");
        assert_eq!(resolved.several.len(), 2);
        // and a rule that is new has what others have for the name
        let more = FILE.replace("name: alone", "name: new");
        let resolved = resolve(&written(&more), &failing, Some(&serving));
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
        let serving = resolve(&written(&file(&rule("b", 2, "10.0.0.3"))), &names, None).desired;
        for (rules_of_file, expected) in [
            (rule("b", 2, "typo.example"), "b: 10.0.0.3"),
            // renamed, and with another key
            (rule("c", 2, "typo.example"), "b: 10.0.0.3"),
            (rule("b", 3, "typo.example"), "b: 10.0.0.3"),
        ] {
            let resolved = resolve(&written(&file(&rules_of_file)), &names, Some(&serving));
            assert_eq!(rules(&resolved.desired), ["a: 10.0.0.2", expected]);
            assert!(effects(&resolved.desired)[0].ends_with("keeps the upstreams that it had"));
            assert_eq!(resolved.desired.as_written(), written(&file(&rules_of_file)));
        }
        // its key is another rule's now, or its name is
        for other in [rule("d", 2, "10.0.0.5"), rule("b", 4, "10.0.0.5")] {
            let new = rule(if other.contains("name: b") { "e" } else { "b" }, 3, "typo.example");
            let resolved = resolve(&written(&file(&(other + &new))), &names, Some(&serving));
            assert_eq!(resolved.desired.rules.len(), 2, "{:?}", rules(&resolved.desired));
            assert!(effects(&resolved.desired)[0].ends_with("the rule is left out"));
        }
    }

    #[test]
    fn an_address_that_is_no_upstream_is_none() {
        for (address, cause) in [("127.0.0.1", "loopback"), ("10.0.0.1", "own key")] {
            let names = answers(&[("a.example", &[address]), ("b.example", &["10.0.0.4"])]);
            let desired = resolve(&written(FILE), &names, None).desired;
            let hosts = &desired.incomplete.hosts;
            assert!(hosts[0].cause.contains(cause), "{hosts:?}");
            assert_eq!(rules(&desired)[0], "copies: 10.0.0.2, 10.0.0.4");
        }
    }

    #[test]
    fn renew_completes_and_records_no_new_failure() {
        let serving = answers(&[("a.example", &[]), ("b.example", &["10.0.0.4"])]);
        let serving = resolve(&written(FILE), &serving, None).desired;
        let names = answers(&[("a.example", &["10.0.0.3"]), ("b.example", &[])]);
        let (renewed, unresolved) = renew(&serving, &names);
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
        let (same, _) = renew(&renewed, &names);
        assert!(renewed.serves(&same));
    }

    #[test]
    fn causes_and_gone_interfaces_need_no_generation() {
        let names = answers(&[("a.example", &[]), ("b.example", &["10.0.0.4"])]);
        let serving = resolve(&written(FILE), &names, None).desired;
        let mut wanted = serving.clone();
        wanted.incomplete.hosts[0].cause = "no answer".into();
        wanted.incomplete.interfaces = vec!["eth0".into()];
        assert!(serving.serves(&wanted));
        // what it lacked is there: arpd would go on looking for it
        assert!(!wanted.serves(&serving));
        wanted.incomplete.hosts.pop();
        assert!(!serving.serves(&wanted));
    }
}
