//! This host's addresses that rules depend on: those that `any` matches, and keys that are broadcast
//! addresses of the interfaces' networks.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::ensure;

use crate::config::{KEY_ENTRIES, KeyAddress, Ports};
use crate::desired::Desired;
use crate::desired::tables::takes_answers;
use crate::net::Netlink;
use crate::net::link::{self, Link, OwnAddress};

/// Returns the configuration with the current names and addresses of its interfaces and this host's local
/// ports; `None` if nothing changed.
///
/// # Errors
/// There are too many keys with these addresses.
pub async fn renewed(netlink: &Netlink, desired: &Desired) -> anyhow::Result<Option<Desired>> {
    let (links, own) = (netlink.links().await?, netlink.addresses().await?);
    let interfaces = canonical(&desired.interfaces, &links);
    let (addresses, broadcasts) = expand(desired, &of_interfaces(&interfaces, &links, &own));
    let local_ports = local_ports()
        .filter(|local| desired.rules.iter().any(|rule| takes_answers(rule, Some(*local))));
    let current = (&desired.interfaces, &desired.addresses, &desired.broadcasts);
    if (&interfaces, &addresses, &broadcasts) == current && local_ports == desired.local_ports {
        return Ok(None);
    }
    let xdp = desired.xdp.iter().map(|(name, xdp)| (own_name(name, &links), *xdp)).collect();
    let renewed =
        Desired { interfaces, addresses, broadcasts, local_ports, xdp, ..desired.clone() };
    fits(&renewed)?;
    Ok(Some(renewed))
}

/// Returns the kernel's own names of interfaces, sorted; those that are not here stay as they are.
fn canonical(names: &[String], links: &[Link]) -> Vec<String> {
    let own = names.iter().map(|name| own_name(name, links));
    own.collect::<BTreeSet<_>>().into_iter().collect()
}

fn own_name(name: &str, links: &[Link]) -> String {
    let link = link::find_link(links.iter(), name);
    link.map_or_else(|| name.into(), |link| link.name.clone())
}

/// Returns this host's own addresses.
pub async fn own(netlink: &Netlink) -> anyhow::Result<BTreeSet<IpAddr>> {
    Ok(netlink.addresses().await?.into_iter().map(|own| own.address).collect())
}

/// Reads net.ipv4.ip_local_port_range, which IPv6 shares; `None` if it cannot be read.
fn local_ports() -> Option<Ports> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut ports = text.split_whitespace().map_while(|port| port.parse().ok());
    Some(Ports { first: ports.next()?, last: ports.next()? })
}

/// Checks the number of keys, now that the addresses of `any` are known.
fn fits(desired: &Desired) -> anyhow::Result<()> {
    let all = desired.key_entries();
    ensure!(
        all <= KEY_ENTRIES,
        "`address: any` matches {} addresses of {}, which makes {all} key entries (each port for each \
         address and each network of senders), and at most {KEY_ENTRIES} fit; name the addresses that \
         are meant, or fewer ports",
        desired.addresses.len(),
        desired.interfaces.join(", ")
    );
    Ok(())
}

fn of_interfaces(interfaces: &[String], links: &[Link], own: &[OwnAddress]) -> Vec<OwnAddress> {
    let named: BTreeSet<u32> = links
        .iter()
        .filter(|link| interfaces.contains(&link.name))
        .map(|link| link.index)
        .collect();
    own.iter().filter(|own| named.contains(&own.ifindex)).copied().collect()
}

/// Returns [`Desired::addresses`] and [`Desired::broadcasts`].
fn expand(desired: &Desired, own: &[OwnAddress]) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let keys: BTreeSet<KeyAddress> = desired.rules.iter().map(|rule| rule.key.address).collect();
    let addresses: BTreeSet<IpAddr> = own
        .iter()
        .map(|own| own.address)
        .filter(|address| keys.contains(&KeyAddress::Any) && is_of_this_host_alone(*address))
        .collect();
    let broadcasts: BTreeSet<IpAddr> = own
        .iter()
        .filter_map(|own| own.broadcast)
        .filter(|address| keys.contains(&KeyAddress::Is(*address)))
        .collect();
    (addresses.into_iter().collect(), broadcasts.into_iter().collect())
}

/// Returns false for loopback and link-local addresses, which other hosts have too.
fn is_of_this_host_alone(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::{IpAddr, KeyAddress, OwnAddress, expand};
    use crate::config::{Key, Ports};
    use crate::desired::{Desired, Rule, Upstream};

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn desired(keys: &[KeyAddress]) -> Desired {
        let rule = |address: &KeyAddress| {
            let key = Key::new(*address, vec![Ports { first: 1, last: 1 }]);
            Rule::new("a rule", key, vec![Upstream::new([10, 0, 9, 1], None)])
        };
        Desired { rules: keys.iter().map(rule).collect(), ..Desired::default() }
    }

    #[test]
    fn any_is_what_is_of_this_host_alone_and_broadcasts_are_of_the_keys() {
        let own: Vec<OwnAddress> = [
            ("10.0.0.9", Some("10.0.0.255")),
            ("10.0.0.5", Some("10.0.0.255")),
            ("127.0.0.2", None),
            ("2001:db8::5", None),
            ("fe80::5", None),
        ]
        .map(|(address, broadcast)| OwnAddress {
            ifindex: 7,
            address: ip(address),
            broadcast: broadcast.map(ip),
            network: ip(address).into(),
            tentative: false,
        })
        .to_vec();
        let any = ["10.0.0.5", "10.0.0.9", "2001:db8::5"].map(ip).to_vec();
        assert_eq!(expand(&desired(&[KeyAddress::Any]), &own), (any, Vec::new()));
        let keys = ["10.0.0.5", "10.0.0.255", "10.0.1.255"].map(|key| KeyAddress::Is(ip(key)));
        assert_eq!(expand(&desired(&keys), &own), (Vec::new(), vec![ip("10.0.0.255")]));
    }

    #[test]
    fn as_many_addresses_as_fit() {
        let mut desired = desired(&[KeyAddress::Any, KeyAddress::Is(ip("10.0.0.5"))]);
        desired.rules[0].key.ports = vec![Ports { first: 1, last: u16::MAX }];
        let own = (1..=15).map(|host| IpAddr::from([10, 0, 1, host]));
        desired.addresses = own.chain([ip("2001:db8::5")]).collect();
        desired.rules[1].key.ports = vec![Ports { first: 1, last: 16_975 }];
        super::fits(&desired).expect("983,025 and 16,975");
        desired.rules[1].key.ports = vec![Ports { first: 1, last: 16_976 }];
        let error = super::fits(&desired).expect_err("one more").to_string();
        assert!(
            error.contains("16 addresses of") && error.contains("1000001 key entries"),
            "{error}"
        );
    }
}
