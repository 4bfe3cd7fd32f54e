//! Host names of upstreams to addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::config::{Config, Diagnostic, Family, Finding, Host};
use crate::plan::Name;

/// What became of the host names of a configuration.
pub struct Names {
    pub addresses: BTreeMap<Name, IpAddr>,
    /// Those without an address of the family, and where that is a trouble.
    pub unresolved: Vec<(Name, Finding)>,
    /// Addresses that were not chosen.
    pub warnings: Vec<Finding>,
}

impl Names {
    /// All or nothing.
    ///
    /// # Errors
    /// A diagnostic for each name that has no address of its rule's family.
    pub fn all(self, config: &Config) -> Result<Names, Vec<Diagnostic>> {
        match self.unresolved.is_empty() {
            true => Ok(self),
            false => {
                Err(config
                    .errors(self.unresolved.into_iter().map(|(_, finding)| finding).collect()))
            }
        }
    }
}

/// Asks the system's resolver for every host name of the configuration.
pub async fn names(config: &Config) -> Names {
    let mut names =
        Names { addresses: BTreeMap::new(), unresolved: Vec::new(), warnings: Vec::new() };
    let mut asked = BTreeSet::new();
    for rule in &config.rules {
        let family = rule.family();
        for upstream in rule.destinations() {
            let Host::Name(text) = &upstream.address else { continue };
            let name = (text.clone(), family);
            if !asked.insert(name.clone()) {
                continue;
            }
            let error = match lookup(text).await.map(|addresses| choose(&name, &addresses)) {
                Ok(Some((address, warning))) => {
                    names.addresses.insert(name, address);
                    names.warnings.extend(warning.map(|text| Finding::new(&upstream.at, text)));
                    continue;
                }
                Ok(None) => format!("`{text}` has no {family} address"),
                Err(error) => format!("`{text}` does not resolve: {error}"),
            };
            names.unresolved.push((name, Finding::new(&upstream.at, error)));
        }
    }
    names
}

/// The addresses of a name, of both families.
pub async fn lookup(name: &str) -> std::io::Result<BTreeSet<IpAddr>> {
    let found = tokio::net::lookup_host((name, 0)).await?;
    Ok(found.map(|address| address.ip()).collect())
}

/// The lowest address of the family, so that every machine chooses alike, and a warning if there
/// are others.
pub fn choose(
    (name, family): &Name,
    addresses: &BTreeSet<IpAddr>,
) -> Option<(IpAddr, Option<String>)> {
    let mut addresses = addresses.iter().filter(|address| Family::from(**address) == *family);
    let first = *addresses.next()?;
    let others: Vec<String> = addresses.map(ToString::to_string).collect();
    let warning = (!others.is_empty()).then(|| {
        format!("`{name}` has several addresses: {first} is used, not {}", others.join(", "))
    });
    Some((first, warning))
}
