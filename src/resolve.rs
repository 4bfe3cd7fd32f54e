//! Host names of upstreams to addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use crate::config::{Config, Diagnostic, Finding, Host};

/// Asks the system's resolver for every host name of the configuration. The warnings name what
/// was not chosen.
///
/// # Errors
/// A diagnostic for each name that has no IPv4 address.
pub async fn names(
    config: &Config,
) -> Result<(BTreeMap<String, Ipv4Addr>, Vec<Diagnostic>), Vec<Diagnostic>> {
    let mut names = BTreeMap::new();
    let mut failed = BTreeSet::new();
    let (mut errors, mut warnings) = (Vec::new(), Vec::new());
    for upstream in config.rules.iter().flat_map(|rule| &rule.upstreams) {
        let Host::Name(name) = &upstream.address else { continue };
        if names.contains_key(name) || failed.contains(name) {
            continue;
        }
        match lookup(name).await.map(|addresses| choose(name, &addresses)) {
            Ok(Some((address, warning))) => {
                names.insert(name.clone(), address);
                warnings.extend(warning.map(|text| Finding::new(&upstream.at, text)));
            }
            Ok(None) => {
                failed.insert(name.clone());
                errors.push(Finding::new(&upstream.at, format!("`{name}` has no IPv4 address")));
            }
            Err(error) => {
                failed.insert(name.clone());
                let message = format!("`{name}` does not resolve: {error}");
                errors.push(Finding::new(&upstream.at, message));
            }
        }
    }
    if errors.is_empty() {
        Ok((names, config.warnings(warnings)))
    } else {
        Err(config.errors(errors))
    }
}

/// The IPv4 addresses of a name.
pub async fn lookup(name: &str) -> std::io::Result<BTreeSet<Ipv4Addr>> {
    let found = tokio::net::lookup_host((name, 0)).await?;
    Ok(found
        .filter_map(|address| match address.ip() {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        })
        .collect())
}

/// The lowest address, so that every machine chooses alike, and a warning if there are others.
pub fn choose(name: &str, addresses: &BTreeSet<Ipv4Addr>) -> Option<(Ipv4Addr, Option<String>)> {
    let first = *addresses.first()?;
    let others: Vec<String> = addresses.iter().skip(1).map(ToString::to_string).collect();
    let warning = (!others.is_empty()).then(|| {
        format!("`{name}` has several addresses: {first} is used, not {}", others.join(", "))
    });
    Some((first, warning))
}
