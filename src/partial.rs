//! What of a configuration can be applied now, where a part of it is not there yet. Pure.

use std::mem;

use crate::config::{Config, Host};
use crate::plan::{Desired, Upstream};
use crate::resolve::Names;

/// Takes out the interfaces that are not here, and the rules with a host name that has no address;
/// a name that the generation that serves has an address for keeps that one. Says what is missing.
pub fn reduce(
    config: &mut Config,
    interfaces: &mut Vec<String>,
    names: &mut Names,
    is_here: impl Fn(&str) -> bool,
    serving: Option<&Desired>,
) -> Vec<String> {
    let mut missing = Vec::new();
    interfaces.retain(|name| {
        let here = is_here(name);
        if !here {
            missing.push(format!("error: there is no interface {name}"));
        }
        here
    });
    let mut unresolved = Vec::new();
    for (name, mut finding) in mem::take(&mut names.unresolved) {
        let is_it = |it: &&Upstream| it.named().as_ref() == Some(&name);
        let known = serving.and_then(|serving| serving.upstreams().find(is_it));
        finding.message += &match known {
            Some(upstream) => format!("; {}, as before, is kept", upstream.address),
            None => "; the rule is left out".into(),
        };
        unresolved.push(finding);
        names.addresses.extend(known.map(|upstream| (name, upstream.address.ip)));
    }
    missing.extend(config.errors(unresolved).iter().map(ToString::to_string));
    config.rules.retain(|rule| {
        rule.destinations().all(|upstream| match &upstream.address {
            Host::Address(_) => true,
            Host::Name(name) => names.addresses.contains_key(&(name.clone(), rule.family())),
        })
    });
    missing
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use super::reduce;
    use crate::config::{Config, Family, Finding};
    use crate::plan::{Desired, Name};
    use crate::resolve::Names;

    const FILE: &str = "
version: 1
interfaces: [eth0, eth1]
rules:
  - key: { address: 10.0.0.1, port: 1 }
    upstream: [{ address: 10.0.0.2 }]
  - key: { address: 10.0.0.1, port: 2 }
    upstream: [{ address: a.example }]
";

    fn config() -> Config {
        Config::parse("test.yaml", FILE).expect("a good file")
    }

    fn unresolved(config: &Config) -> Names {
        let upstream = &config.rules[1].upstreams[0];
        Names {
            addresses: BTreeMap::new(),
            unresolved: vec![(name(), Finding::new(&upstream.at, "no address"))],
            warnings: Vec::new(),
        }
    }

    fn name() -> Name {
        ("a.example".into(), Family::V4)
    }

    fn resolved(address: IpAddr) -> BTreeMap<Name, IpAddr> {
        BTreeMap::from([(name(), address)])
    }

    #[test]
    fn nothing_is_missing() {
        let mut config = config();
        let mut interfaces = config.interfaces.clone();
        let mut names = unresolved(&config);
        names.unresolved.clear();
        names.addresses = resolved([10, 0, 0, 3].into());
        let missing = reduce(&mut config, &mut interfaces, &mut names, |_| true, None);
        assert!(missing.is_empty());
        assert_eq!((interfaces.len(), config.rules.len()), (2, 2));
    }

    #[test]
    fn an_interface_and_a_name_are_missing() {
        let mut config = config();
        let mut interfaces = config.interfaces.clone();
        let mut names = unresolved(&config);
        let missing = reduce(&mut config, &mut interfaces, &mut names, |it| it == "eth1", None);
        assert_eq!(interfaces, ["eth1"]);
        assert_eq!(config.rules.len(), 1);
        assert_eq!(missing[0], "error: there is no interface eth0");
        assert!(
            missing[1].contains("test.yaml:8") && missing[1].contains("left out"),
            "{missing:?}"
        );
    }

    #[test]
    fn a_mirror_or_an_address_of_the_family_is_missing() {
        let file = "
version: 1
rules:
  - key: { address: 10.0.0.1, port: 1 }
    upstream: [{ address: 10.0.0.2 }]
    mirror: [{ address: a.example }]
  - key: { address: \"2001:db8::1\", port: 1 }
    upstream: [{ address: a.example }]
";
        let left = |names: &[Family]| {
            let mut config = Config::parse("test.yaml", file).expect("a good file");
            let address = [10, 0, 0, 3].into();
            let addresses = names.iter().map(|family| (("a.example".into(), *family), address));
            let addresses = addresses.collect();
            let mut names = Names { addresses, unresolved: Vec::new(), warnings: Vec::new() };
            reduce(&mut config, &mut Vec::new(), &mut names, |_| true, None);
            config.rules.iter().map(|rule| rule.name.clone()).collect::<Vec<_>>()
        };
        assert!(left(&[]).is_empty());
        assert_eq!(left(&[Family::V4]), ["10.0.0.1:1"]);
        assert_eq!(left(&[Family::V6]), ["[2001:db8::1]:1"]);
    }

    #[test]
    fn a_name_keeps_the_address_that_serves() {
        let mut config = config();
        let interfaces = config.interfaces.clone();
        let address = [10, 0, 0, 3].into();
        let serving = Desired::new(&config, &interfaces, &resolved(address)).expect("resolved");
        let mut names = unresolved(&config);
        let mut wanted = interfaces.clone();
        let missing = reduce(&mut config, &mut wanted, &mut names, |_| true, Some(&serving));
        assert_eq!(Desired::new(&config, &wanted, &names.addresses), Ok(serving));
        assert!(missing[0].contains("10.0.0.3"), "{missing:?}");
    }
}
