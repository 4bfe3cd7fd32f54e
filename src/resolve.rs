//! Host names of upstreams to addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::config::{Config, Diagnostic, Finding, Host};

/// What became of the host names of a configuration.
pub struct Names {
    pub addresses: BTreeMap<String, IpAddr>,
    /// Those without an IPv4 address, and where that is a trouble.
    pub unresolved: Vec<(String, Finding)>,
    /// Addresses that were not chosen.
    pub warnings: Vec<Finding>,
}

impl Names {
    /// All or nothing.
    ///
    /// # Errors
    /// A diagnostic for each name that has no IPv4 address.
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
    for upstream in config.rules.iter().flat_map(|rule| &rule.upstreams) {
        let Host::Name(name) = &upstream.address else { continue };
        if !asked.insert(name) {
            continue;
        }
        let error = match lookup(name).await.map(|addresses| choose(name, &addresses)) {
            Ok(Some((address, warning))) => {
                names.addresses.insert(name.clone(), address);
                names.warnings.extend(warning.map(|text| Finding::new(&upstream.at, text)));
                continue;
            }
            Ok(None) => format!("`{name}` has no IPv4 address"),
            Err(error) => format!("`{name}` does not resolve: {error}"),
        };
        names.unresolved.push((name.clone(), Finding::new(&upstream.at, error)));
    }
    names
}

/// The IPv4 addresses of a name.
pub async fn lookup(name: &str) -> std::io::Result<BTreeSet<IpAddr>> {
    let found = tokio::net::lookup_host((name, 0)).await?;
    Ok(found.map(|address| address.ip()).filter(IpAddr::is_ipv4).collect())
}

/// The lowest address, so that every machine chooses alike, and a warning if there are others.
pub fn choose(name: &str, addresses: &BTreeSet<IpAddr>) -> Option<(IpAddr, Option<String>)> {
    let first = *addresses.first()?;
    let others: Vec<String> = addresses.iter().skip(1).map(ToString::to_string).collect();
    let warning = (!others.is_empty()).then(|| {
        format!("`{name}` has several addresses: {first} is used, not {}", others.join(", "))
    });
    Some((first, warning))
}
