//! Chooses addresses for the host names of a rule. Pure.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use crate::config::{Address, Addresses, Hash, Mode, RECEIVERS, Templates, upstream_refusal};
use crate::desired::dns::NoAnswer;
use crate::desired::partial::{Effect, Gap, Known, Spot, Unresolved};
use crate::desired::{Desired, Name, Rule, Upstream};
use crate::maglev;

/// Resolves the rules of a configuration one by one.
pub(super) struct RuleResolver<'a> {
    written: &'a Desired,
    known: &'a Known<'a>,
    before: ActiveRules<'a>,
}

/// A rule, as far as its names have addresses.
#[derive(Default)]
pub(super) struct ResolvedRule {
    pub rule: Option<Rule>,
    pub hosts: Vec<Unresolved>,
    pub gaps: Vec<Gap>,
    pub notes: Vec<(Spot, String)>,
    pub shrunk: BTreeSet<Name>,
}

/// Addresses for a host.
#[derive(Default)]
struct HostAddresses {
    addresses: Vec<Address>,
    note: Option<String>,
    shrunk: bool,
}

impl<'a> RuleResolver<'a> {
    pub fn new(written: &'a Desired, known: &'a Known<'a>) -> RuleResolver<'a> {
        let before = ActiveRules::new(known.serving.map_or(&[], |serving| &serving.rules));
        RuleResolver { written, known, before }
    }

    /// Resolves a rule, with as many addresses of its names as fit.
    pub fn rule(&self, number: usize) -> ResolvedRule {
        let mut max = RECEIVERS;
        loop {
            let part = self.rule_with(number, max);
            if max == 1 || part.rule.as_ref().is_none_or(fits) {
                return part;
            }
            max /= 2;
        }
    }

    /// Resolves a rule with at max `max` addresses of a name.
    fn rule_with(&self, number: usize, max: usize) -> ResolvedRule {
        let rule = &self.written.rules[number];
        let mut part = ResolvedRule::default();
        let mut resolved = Rule { upstreams: Vec::new(), mirrors: Vec::new(), ..rule.clone() };
        let mut lacking = Vec::new();
        for (nth, upstream) in rule.destinations().enumerate() {
            let list = match nth < rule.upstreams.len() {
                true => &mut resolved.upstreams,
                false => &mut resolved.mirrors,
            };
            let Some(name) = upstream.named() else {
                list.push(upstream.clone());
                continue;
            };
            let kept = self.kept(rule, upstream, &name);
            let addresses = match self.choose(rule, upstream, &name, &kept, max) {
                Ok(choice) => {
                    part.notes.extend(choice.note.map(|text| ((number, nth), text)));
                    part.shrunk.extend(choice.shrunk.then_some(name));
                    choice.addresses
                }
                Err(no) => {
                    part.gaps.push(Gap { spot: (number, nth), temporary: no.temporary });
                    lacking.push((upstream, no.cause, kept.clone()));
                    kept
                }
            };
            for address in addresses {
                let one = Upstream { address, ..upstream.clone() };
                // Two names may share an address, which must not get each packet twice.
                let is_same = |it: &Upstream| (&it.address, it.port) == (&one.address, one.port);
                if one.addresses == Addresses::One || !list.iter().any(is_same) {
                    list.push(one);
                }
            }
        }
        let is_whole = !resolved.upstreams.is_empty();
        part.rule = match is_whole {
            true => Some(resolved),
            false => self.before.rule(self.written, number).cloned(),
        };
        let effect = |kept: Vec<Address>| match (&part.rule, is_whole) {
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
        part.hosts = unresolved.collect();
        part
    }

    /// Returns the active addresses of a name that are still valid for the rule.
    fn kept(&self, rule: &Rule, upstream: &Upstream, name: &Name) -> Vec<Address> {
        let serving = self.before.addresses(rule, upstream, name).iter();
        let good = serving.filter(|address| self.refusal(rule, upstream, address.ip).is_none());
        let max = if upstream.addresses == Addresses::One { 1 } else { RECEIVERS };
        good.take(max).cloned().collect()
    }

    fn choose(
        &self,
        rule: &Rule,
        upstream: &Upstream,
        name: &Name,
        kept: &[Address],
        max: usize,
    ) -> Result<HostAddresses, NoAnswer> {
        let found = match self.known.answers.get(name) {
            Some(answer) => answer.as_ref().map_err(NoAnswer::clone)?,
            None => return Err(NoAnswer { cause: "was not asked for".into(), temporary: true }),
        };
        let refusal = |ip: &&IpAddr| self.refusal(rule, upstream, **ip);
        let good: BTreeSet<IpAddr> =
            found.iter().filter(|ip| refusal(ip).is_none()).copied().collect();
        if good.is_empty() {
            let cause = found.iter().find_map(|ip| refusal(&ip));
            let none = || format!("does not resolve: it has no {} address", name.1);
            return Err(NoAnswer { cause: cause.unwrap_or_else(none), temporary: false });
        }
        let kept: Vec<IpAddr> = kept.iter().map(|address| address.ip).collect();
        Ok(match upstream.addresses {
            Addresses::One => one(&name.0, &good, &kept),
            Addresses::All => {
                let is_confirmed = self.known.shrunk.contains(name);
                all(&name.0, good, &kept, is_confirmed, max)
            }
        })
    }

    /// Returns the reason why an address cannot be an upstream of this rule.
    fn refusal(&self, rule: &Rule, upstream: &Upstream, ip: IpAddr) -> Option<String> {
        match upstream_refusal(&ip.into()) {
            Some(reason) => Some(format!("is no upstream: {reason}")),
            None if rule.key.is(ip, upstream.port) => Some(format!("is {ip}, the rule's own key")),
            None if self.known.own.contains(&ip) => {
                Some(format!("is {ip}, an address of this host, which is no upstream"))
            }
            None => None,
        }
    }
}

/// Returns true if a rule has no more hosts than it may.
fn fits(rule: &Rule) -> bool {
    let receivers = match (rule.mode, rule.templates) {
        (Mode::Balance, Templates::One) => 0,
        _ => rule.upstreams.len(),
    };
    let weights: Vec<u32> = rule.preferred().map(|(_, upstream)| upstream.weight).collect();
    receivers.max(rule.mirrors.len()) <= RECEIVERS
        && (rule.hash == Hash::Modulo || maglev::size(&weights).is_ok())
}

/// Chooses the active address if it is still in the answer, else the lowest.
fn one(name: &str, good: &BTreeSet<IpAddr>, kept: &[IpAddr]) -> HostAddresses {
    let stays = kept.iter().find(|ip| good.contains(ip));
    let Some(ip) = stays.or(good.first()) else { return HostAddresses::default() };
    let others: Vec<String> =
        good.iter().filter(|other| *other != ip).map(IpAddr::to_string).collect();
    let note = (!others.is_empty()).then(|| {
        format!("`{name}` has several addresses: {ip} is used, not {}", others.join(", "))
    });
    HostAddresses { addresses: vec![(*ip).into()], note, shrunk: false }
}

/// Chooses up to `max` addresses. An answer with less than half of the active addresses may be a mistake:
/// the others stay until another answer confirms it.
fn all(
    name: &str,
    mut good: BTreeSet<IpAddr>,
    kept: &[IpAddr],
    is_confirmed: bool,
    max: usize,
) -> HostAddresses {
    let (count, before) = (good.len(), kept.len());
    let shrunk = 2 * count < before && !is_confirmed;
    let mut note = None;
    if shrunk {
        good.extend(kept);
        note = Some(format!(
            "`{name}` has fewer addresses, {count}, than serve, {before}: these stay until another answer \
             confirms it"
        ));
    }
    let (stay, new): (Vec<IpAddr>, Vec<IpAddr>) = good.iter().partition(|ip| kept.contains(ip));
    if good.len() > max {
        note = Some(format!("`{name}` has {} addresses: {max} of them are used", good.len()));
    }
    let mut used: Vec<IpAddr> = stay.into_iter().chain(new).take(max).collect();
    used.sort_unstable();
    HostAddresses { addresses: used.into_iter().map(Address::from).collect(), note, shrunk }
}

/// The active rules, and the addresses of host names in them.
struct ActiveRules<'a> {
    rules: &'a [Rule],
    /// Addresses by rule, name and option; an empty rule name stands for any rule.
    names: HashMap<(&'a str, Name, Addresses), Vec<Address>>,
}

impl<'a> ActiveRules<'a> {
    fn new(rules: &'a [Rule]) -> ActiveRules<'a> {
        let mut names: HashMap<_, Vec<Address>> = HashMap::new();
        for rule in rules {
            for upstream in rule.destinations() {
                let Some(name) = upstream.named() else { continue };
                for rule in [rule.name.as_str(), ""] {
                    let known = names.entry((rule, name.clone(), upstream.addresses)).or_default();
                    if !known.contains(&upstream.address) {
                        known.push(upstream.address.clone());
                    }
                }
            }
        }
        ActiveRules { rules, names }
    }

    /// Returns the addresses of a name in a rule, or else in others; of hosts with the same `addresses`
    /// option, or else of others.
    fn addresses<'b>(&'b self, rule: &'b Rule, host: &Upstream, name: &Name) -> &'b [Address] {
        let other = match host.addresses {
            Addresses::One => Addresses::All,
            Addresses::All => Addresses::One,
        };
        let own = rule.name.as_str();
        let places = [(own, host.addresses), (own, other), ("", host.addresses), ("", other)];
        let mut found = places
            .into_iter()
            .filter_map(|(rule, addresses)| self.names.get(&(rule, name.clone(), addresses)));
        found.next().map_or(&[], Vec::as_slice)
    }

    /// Returns the active rule that replaces one without upstreams: with the same name, or else the same
    /// key. It must not conflict with another rule.
    fn rule(&self, written: &Desired, number: usize) -> Option<&'a Rule> {
        let rule = &written.rules[number];
        let find = |is: &dyn Fn(&Rule) -> bool| self.rules.iter().find(|it| is(it));
        let before = find(&|it| it.name == rule.name).or_else(|| find(&|it| it.key == rule.key))?;
        let mut others = written.rules.iter().enumerate().filter(|(other, _)| *other != number);
        let conflicts = others.any(|(_, other)| {
            other.name == before.name || (before.key != rule.key && other.key.overlaps(&before.key))
        });
        (!conflicts).then_some(before)
    }
}
