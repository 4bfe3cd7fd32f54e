//! Membership in the multicast groups of keys: otherwise snooping switches and multicast routers send
//! none of their packets here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use anyhow::anyhow;
use socket2::{Domain, InterfaceIndexOrAddress, Socket, Type};

use crate::net::link::Link;

/// A group and the index of an interface.
type Membership = (IpAddr, u32);

/// Memberships of this process, each held by a socket that is never read.
#[derive(Default)]
pub struct Groups(BTreeMap<Membership, Socket>);

impl Groups {
    /// Joins groups on these interfaces, and leaves all others.
    ///
    /// # Errors
    /// Groups that could not be joined; the next call tries again.
    pub fn follow<'a>(
        &mut self,
        groups: Option<&BTreeSet<IpAddr>>,
        links: impl Iterator<Item = &'a Link>,
    ) -> anyhow::Result<()> {
        let wanted = groups.map(|groups| memberships(groups, links)).unwrap_or_default();
        self.0.retain(|membership, _| wanted.contains_key(membership));
        let mut errors = Vec::new();
        for ((group, ifindex), name) in wanted {
            if self.0.contains_key(&(group, ifindex)) {
                continue;
            }
            match join(group, ifindex) {
                Ok(socket) => _ = self.0.insert((group, ifindex), socket),
                Err(error) => errors.push(format!("{group} on {name}: {error}")),
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(anyhow!("{}", errors.join("; "))) }
    }
}

/// Returns the memberships in groups on these interfaces, with the interfaces' names.
fn memberships<'a>(
    groups: &BTreeSet<IpAddr>,
    links: impl Iterator<Item = &'a Link>,
) -> BTreeMap<Membership, &'a str> {
    links
        .flat_map(|link| groups.iter().map(|group| ((*group, link.index), link.name.as_str())))
        .collect()
}

fn join(group: IpAddr, ifindex: u32) -> io::Result<Socket> {
    match group {
        IpAddr::V4(group) => {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
            socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(ifindex))?;
            Ok(socket)
        }
        IpAddr::V6(group) => {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
            socket.join_multicast_v6(&group, ifindex)?;
            Ok(socket)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Key, KeyAddress};
    use crate::desired::{Desired, Rule};

    #[test]
    fn memberships_are_of_the_groups_on_the_interfaces() {
        let key = |address: &str| {
            Key::new(KeyAddress::Is(address.parse().expect("an address")), Vec::new())
        };
        let rules = ["239.1.1.1", "10.0.0.5", "ff05::5", "239.1.1.1"];
        let desired = Desired {
            rules: rules.map(|address| Rule::new(address, key(address), Vec::new())).to_vec(),
            ..Desired::default()
        };
        let link = |index, name: &str| Link { index, name: name.into(), ..Link::default() };
        let links = [link(2, "eth0"), link(3, "eth1")];
        let found: Vec<String> = memberships(&desired.groups().collect(), links.iter())
            .into_iter()
            .map(|((group, index), name)| format!("{group} {index} {name}"))
            .collect();
        let wanted = ["239.1.1.1 2 eth0", "239.1.1.1 3 eth1", "ff05::5 2 eth0", "ff05::5 3 eth1"];
        assert_eq!(found, wanted);
    }
}
