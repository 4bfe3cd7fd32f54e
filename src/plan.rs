//! What the kernel is to hold: a [`Config`] with its names resolved and its interfaces chosen.
//! Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::config::{
    Action, Address, Config, Diagnostic, Finding, Hash, Health, Host, Key, KeyAddress, Source,
    Strategy, upstream_refusal,
};

/// A configuration, as a generation carries it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// Sorted, without duplicates.
    pub interfaces: Vec<String>,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub name: String,
    pub key: Key,
    pub action: Action,
    pub strategy: Strategy,
    pub hash: Hash,
    pub source: Source,
    /// Generations of an earlier udplb do not say.
    #[serde(default)]
    pub health: Health,
    /// Never empty; their order is that of the file, which `modulo` counts in.
    pub upstreams: Vec<Upstream>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upstream {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// As the file has it.
    pub host: Host,
    /// What it was resolved to.
    pub address: Address,
    /// `None`: the port that the packet came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl Upstream {
    /// What it is called in output: its name, or its host and port.
    pub fn label(&self) -> String {
        match (&self.name, self.port) {
            (Some(name), _) => name.clone(),
            (None, Some(port)) => format!("{}:{port}", self.host),
            (None, None) => self.host.to_string(),
        }
    }
}

impl Desired {
    /// `names` has the address of every host name in the configuration.
    ///
    /// # Errors
    /// A name that stands for an address which is no upstream: missing, loopback, multicast,
    /// zero, or the rule's own key.
    pub fn new(
        config: &Config,
        interfaces: &[String],
        names: &BTreeMap<String, IpAddr>,
    ) -> Result<Desired, Vec<Diagnostic>> {
        let mut errors = Vec::new();
        let mut rules = Vec::with_capacity(config.rules.len());
        for rule in &config.rules {
            let mut upstreams = Vec::with_capacity(rule.upstreams.len());
            for upstream in &rule.upstreams {
                let address = match &upstream.address {
                    Host::Address(address) => address.clone(),
                    Host::Name(name) => match named(&rule.key, name, upstream.port, names) {
                        Ok(address) => address.into(),
                        Err(message) => {
                            errors.push(Finding::new(&upstream.at, message));
                            continue;
                        }
                    },
                };
                upstreams.push(Upstream {
                    name: upstream.name.clone(),
                    host: upstream.address.clone(),
                    address,
                    port: upstream.port,
                });
            }
            rules.push(Rule {
                name: rule.name.clone(),
                key: rule.key.clone(),
                action: rule.action,
                strategy: rule.strategy,
                hash: rule.hash,
                source: rule.source,
                health: rule.health,
                upstreams,
            });
        }
        let interfaces: BTreeSet<String> = interfaces.iter().cloned().collect();
        let desired = Desired { interfaces: interfaces.into_iter().collect(), rules };
        if errors.is_empty() { Ok(desired) } else { Err(config.errors(errors)) }
    }

    /// The same with the addresses that its host names have now; those that are not in `names`
    /// keep theirs. With the names whose address is none for an upstream, and why.
    pub fn renamed(&self, names: &BTreeMap<String, IpAddr>) -> (Desired, Vec<String>) {
        let mut desired = self.clone();
        let mut refused = Vec::new();
        for rule in &mut desired.rules {
            for upstream in &mut rule.upstreams {
                let Host::Name(name) = &upstream.host else { continue };
                if !names.contains_key(name) {
                    continue;
                }
                match named(&rule.key, name, upstream.port, names) {
                    Ok(address) => upstream.address = address.into(),
                    Err(reason) => refused.push(reason),
                }
            }
        }
        (desired, refused)
    }

    /// The addresses of all upstreams, each once.
    pub fn addresses(&self) -> BTreeSet<Address> {
        self.upstreams().map(|upstream| upstream.address.clone()).collect()
    }

    /// The upstreams of all rules.
    pub fn upstreams(&self) -> impl Iterator<Item = &Upstream> {
        self.rules.iter().flat_map(|rule| &rule.upstreams)
    }
}

fn named(
    key: &Key,
    name: &str,
    port: Option<u16>,
    names: &BTreeMap<String, IpAddr>,
) -> Result<IpAddr, String> {
    let address = *names.get(name).ok_or_else(|| format!("`{name}` was not resolved"))?;
    if let Some(reason) = upstream_refusal(address) {
        return Err(format!("`{name}`: {reason}"));
    }
    let own_port = port.is_none_or(|port| key.ports.iter().any(|ports| ports.contains(port)));
    if key.address == KeyAddress::Is(address) && own_port {
        return Err(format!("`{name}` is {address}, the rule's own key"));
    }
    Ok(address)
}

/// The ids of a rule and of its upstreams, in the order of [`Rule::upstreams`].
///
/// Counters and next hops are kept under them; the same rule and the same endpoint keep theirs
/// from generation to generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleIds {
    pub rule: u32,
    pub upstreams: Vec<u32>,
}

/// More rules and upstreams than there are counters for.
#[derive(Debug, PartialEq, Eq)]
pub struct IdsExhausted;

/// Gives every rule and endpoint the id that it has in one of the `known` generations, the
/// first of which is asked first, or else one that none of them holds. Id 0 is never given;
/// ids are below `limit`.
pub fn assign_ids(
    desired: &Desired,
    known: &[(&Desired, &[RuleIds])],
    limit: u32,
) -> Result<Vec<RuleIds>, IdsExhausted> {
    /// A rule, or one of its upstreams.
    type Holder<'a> = (&'a str, Option<(&'a Address, Option<u16>)>);
    fn endpoint(upstream: &Upstream) -> Option<(&Address, Option<u16>)> {
        Some((&upstream.address, upstream.port))
    }
    let mut ids: HashMap<Holder<'_>, u32> = HashMap::new();
    let mut held = BTreeSet::new();
    for (desired, given) in known {
        for (rule, given) in desired.rules.iter().zip(*given) {
            held.insert(given.rule);
            ids.entry((&rule.name, None)).or_insert(given.rule);
            for (upstream, id) in rule.upstreams.iter().zip(&given.upstreams) {
                held.insert(*id);
                ids.entry((&rule.name, endpoint(upstream))).or_insert(*id);
            }
        }
    }
    let mut free = (1..limit).filter(|id| !held.contains(id));
    let mut id_of = |key| match ids.get(&key) {
        Some(id) => Ok(*id),
        None => {
            let id = free.next().ok_or(IdsExhausted)?;
            ids.insert(key, id);
            Ok(id)
        }
    };
    desired
        .rules
        .iter()
        .map(|rule| {
            Ok(RuleIds {
                rule: id_of((rule.name.as_str(), None))?,
                upstreams: rule
                    .upstreams
                    .iter()
                    .map(|upstream| id_of((rule.name.as_str(), endpoint(upstream))))
                    .collect::<Result<_, _>>()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::{Desired, IdsExhausted, Rule, RuleIds, Upstream, assign_ids};
    use crate::config::{
        Action, Address, Hash, Health, Host, Key, Ports, Source, Strategy as Selection,
    };

    fn desired(rules: &BTreeMap<u8, Vec<(u8, Option<u16>)>>) -> Desired {
        let upstream = |(host, port): &(u8, Option<u16>)| {
            let address = Address::from([10, 0, 9, *host]);
            Upstream { name: None, host: Host::Address(address.clone()), address, port: *port }
        };
        let rule = |(number, upstreams): (&u8, &Vec<_>)| Rule {
            name: number.to_string(),
            key: Key { address: [10, 0, 0, 5].into(), ports: vec![Ports { first: 1, last: 1 }] },
            action: Action::Pass,
            strategy: Selection::SrcIp,
            hash: Hash::Modulo,
            source: Source::Vip,
            health: Health::Off,
            upstreams: upstreams.iter().map(upstream).collect(),
        };
        Desired { interfaces: Vec::new(), rules: rules.iter().map(rule).collect() }
    }

    /// Each rule and each endpoint of it, with its id.
    fn holders(desired: &Desired, ids: &[RuleIds]) -> BTreeMap<String, u32> {
        let mut holders = BTreeMap::new();
        for (rule, ids) in desired.rules.iter().zip(ids) {
            assert_eq!(rule.upstreams.len(), ids.upstreams.len());
            let name = &rule.name;
            let endpoints = rule.upstreams.iter().zip(&ids.upstreams);
            let named = endpoints
                .map(|(it, id)| (format!("{name} to {} {:?}", it.address, it.port), *id))
                .chain([(name.clone(), ids.rule)]);
            for (holder, id) in named {
                assert_eq!(*holders.entry(holder.clone()).or_insert(id), id, "{holder}");
            }
        }
        holders
    }

    /// Upstreams by rule.
    fn file() -> impl Strategy<Value = BTreeMap<u8, Vec<(u8, Option<u16>)>>> {
        btree_map(0..5_u8, vec((0..4_u8, prop::option::of(1..3_u16)), 1..5), 0..4)
    }

    proptest! {
        #[test]
        fn an_id_stays_with_its_holder_while_any_generation_knows_it(files in vec(file(), 1..8)) {
            let mut known: Vec<(Desired, Vec<RuleIds>)> = Vec::new();
            for file in &files {
                let desired = desired(file);
                let before: Vec<(&Desired, &[RuleIds])> =
                    known.iter().map(|(desired, ids)| (desired, ids.as_slice())).collect();
                let ids = assign_ids(&desired, &before, 1000).expect("enough");
                let mine = holders(&desired, &ids);
                let theirs: BTreeMap<String, u32> =
                    known.iter().flat_map(|(desired, ids)| holders(desired, ids)).collect();
                let all: BTreeMap<&String, u32> =
                    theirs.iter().chain(&mine).map(|(holder, id)| (holder, *id)).collect();
                // nobody's changed, and no two have one
                for (holder, id) in theirs.iter().chain(&mine) {
                    prop_assert_eq!(all[holder], *id);
                    prop_assert_ne!(*id, 0);
                }
                let distinct: BTreeSet<u32> = all.values().copied().collect();
                prop_assert_eq!(distinct.len(), all.len());
                known.push((desired, ids));
                // the kernel keeps two
                let gone = known.len().saturating_sub(2);
                known.drain(..gone);
            }
        }
    }

    #[test]
    fn ids_end() {
        let desired = desired(&[(1, vec![(1, None), (2, None), (1, None)])].into());
        // one for the rule and one for each endpoint, from 1
        assert_eq!(assign_ids(&desired, &[], 3), Err(IdsExhausted));
        let ids = assign_ids(&desired, &[], 4);
        assert_eq!(ids, Ok(vec![RuleIds { rule: 1, upstreams: vec![2, 3, 2] }]));
    }
}
