//! Findings about this host as an upstream of rules with `reply: direct` elsewhere.

use crate::commands::doctor::server::{Place, ServedAddress, ServerFacts, ServerLink, Tunnel};
use crate::telemetry::problem::{Problem, note, problem};

/// Reports what keeps the host from getting packets to the addresses of keys, or from answering as those.
pub fn server(facts: &ServerFacts) -> Vec<Problem> {
    let mut found: Vec<Problem> = facts.addresses.iter().filter_map(address).collect();
    if facts.addresses.is_empty() {
        let what = "neither lo nor a dummy has the address of a key";
        let why =
            "packets of `reply: direct` keep the key's address, which this host must have too";
        let fix = "ip address add ADDRESS/32 dev lo";
        found.push(problem("key-address-missing", "", what).why(why).fix(fix));
    }
    let has_ipv4 = facts.addresses.iter().any(|it| it.address.is_ipv4());
    if has_ipv4 {
        found.extend(facts.links.iter().filter_map(arp));
    }
    found.extend(facts.links.iter().filter_map(|link| reverse_path(facts, link)));
    found.extend(facts.tunnels.iter().filter_map(tunnel));
    if !facts.decap && facts.tunnels.is_empty() {
        let what = "no tunnel device is up, and no `decap` is applied";
        let why = "only packets that come by `via: link` are taken";
        let fix = "ip link set tunl0 up; for `via: gue`, ip fou add port 6080 gue; or apply a file with `decap`";
        found.push(note("no-tunnel-end", "", what).why(why).fix(fix));
    }
    found
}

/// Reports an address that the host lacks, or that others in its network hear of.
fn address(served: &ServedAddress) -> Option<Problem> {
    let address = served.address;
    let length = if address.is_ipv4() { 32 } else { 128 };
    let add = format!("ip address add {address}/{length} dev lo");
    match &served.place {
        Place::Hidden => None,
        Place::Nowhere => {
            let what = format!("{address} is no address of this host");
            let why = "packets of `reply: direct` keep it as their destination, and are not taken";
            Some(problem("key-address-missing", "", what).why(why).fix(add))
        }
        Place::Link(interface, prefix) => {
            let what = format!("{address} is on this interface, and not on lo");
            let why =
                "this host answers for it in its network, and takes packets from the balancer";
            let fix = format!("ip address del {address}/{prefix} dev {interface}; {add}");
            Some(problem("key-address-exposed", interface, what).why(why).fix(fix))
        }
    }
}

/// Reports an interface that tells others in its network of the hidden addresses by ARP.
fn arp(link: &ServerLink) -> Option<Problem> {
    // 1 and 2: answers for addresses of the interface alone; 8: for none of this host
    let is_silent = matches!(link.arp_ignore, 1 | 2 | 8);
    if is_silent && link.arp_announce == 2 {
        return None;
    }
    let name = &link.name;
    let what =
        format!("arp_ignore is {} there, arp_announce {}", link.arp_ignore, link.arp_announce);
    let sysctl = |what: &str| format!("net.ipv4.conf.{name}.{what}");
    let fix = format!("sysctl -w {}=1 {}=2", sysctl("arp_ignore"), sysctl("arp_announce"));
    let found = match link.near.first() {
        Some(near) => problem("arp", name, what)
            .why(format!("{near} is in its network, where hosts take this one for the balancer")),
        None => note("arp", name, what).why(
            "hosts of its network that ask for the address of a key take this one for the balancer",
        ),
    };
    Some(found.fix(fix))
}

/// Reports an interface where the kernel drops packets of clients that it would answer by another one.
fn reverse_path(facts: &ServerFacts, link: &ServerLink) -> Option<Problem> {
    if !link.strict || !link.default_elsewhere {
        return None;
    }
    let name = &link.name;
    let what = "rp_filter is strict there, and the default route leaves elsewhere";
    let found = match link.takes_tunnels {
        true => problem("rp-filter", name, what)
            .why("clients' packets without their outer headers are dropped"),
        // they may come in elsewhere, or by a tunnel device
        false if facts.decap => return None,
        false => note("rp-filter", name, what).why("clients' packets that come by it are dropped"),
    };
    Some(found.fix(format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2")))
}

/// Reports a tunnel device where the kernel drops packets of clients, since answers do not leave by it.
fn tunnel(tunnel: &Tunnel) -> Option<Problem> {
    let name = &tunnel.name;
    let what = "rp_filter is strict on this tunnel device";
    let why = "answers to clients leave elsewhere, so that their packets are dropped";
    let fix = format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2");
    tunnel.strict.then(|| problem("rp-filter", name, what).why(why).fix(fix))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An upstream on which all is well.
    fn healthy() -> ServerFacts {
        ServerFacts {
            addresses: vec![ServedAddress { address: [10, 1, 0, 1].into(), place: Place::Hidden }],
            links: vec![ServerLink {
                name: "eth0".into(),
                arp_ignore: 1,
                arp_announce: 2,
                near: Vec::new(),
                takes_tunnels: true,
                strict: false,
                default_elsewhere: true,
            }],
            tunnels: Vec::new(),
            decap: true,
        }
    }

    /// Checks the findings after a change: the starts of the title and, after a bar, of the fix.
    #[track_caller]
    fn check(change: impl FnOnce(&mut ServerFacts), wanted: &[&str]) {
        let mut facts = healthy();
        change(&mut facts);
        let found = server(&facts);
        assert_eq!(found.len(), wanted.len(), "{found:#?}");
        for (found, wanted) in found.iter().zip(wanted) {
            let (title, fix) = wanted.split_once(" | ").expect("a title and a fix");
            let text = format!("{}: {}", found.level, found.title());
            assert!(text.starts_with(title) && found.fix.starts_with(fix), "{found:#?}");
        }
    }

    #[test]
    fn addresses_of_keys() {
        check(|_| {}, &[]);
        check(
            |facts| facts.addresses.clear(),
            &["problem: neither lo nor a dummy | ip address add ADDRESS/32 dev lo"],
        );
        check(
            |facts| facts.addresses[0].place = Place::Nowhere,
            &["problem: 10.1.0.1 is no address of this host | ip address add 10.1.0.1/32 dev lo"],
        );
        check(
            |facts| facts.addresses[0].place = Place::Link("eth0".into(), 24),
            &[
                "problem: eth0: 10.1.0.1 is on this interface | ip address del 10.1.0.1/24 dev eth0; ip address add",
            ],
        );
    }

    #[test]
    fn address_resolution() {
        let fix = "sysctl -w net.ipv4.conf.eth0.arp_ignore=1 net.ipv4.conf.eth0.arp_announce=2";
        let answers = |facts: &mut ServerFacts| facts.links[0].arp_ignore = 0;
        check(answers, &[&format!("note: eth0: arp_ignore is 0 there, arp_announce 2 | {fix}")]);
        check(
            |facts| {
                facts.links[0].near = vec![[10, 1, 0, 1].into()];
                (facts.links[0].arp_ignore, facts.links[0].arp_announce) = (2, 1);
            },
            &[&format!("problem: eth0: arp_ignore is 2 there, arp_announce 1 | {fix}")],
        );
        // nobody asks for IPv6 addresses by ARP
        let v6 = |facts: &mut ServerFacts| {
            answers(facts);
            facts.addresses[0].address = "2001:db8::1".parse().expect("an address");
        };
        check(v6, &[]);
    }

    #[test]
    fn reverse_path_filters() {
        let fix = "sysctl -w net.ipv4.conf.eth0.rp_filter=2";
        let strict = |facts: &mut ServerFacts| facts.links[0].strict = true;
        check(strict, &[&format!("problem: eth0: rp_filter is strict there | {fix}")]);
        check(|facts| (strict(facts), facts.links[0].takes_tunnels = false).1, &[]);
        check(|facts| (strict(facts), facts.links[0].default_elsewhere = false).1, &[]);
        check(
            |facts| {
                strict(facts);
                (facts.links[0].takes_tunnels, facts.decap) = (false, false);
                facts.tunnels = vec![Tunnel { name: "tunl0".into(), strict: true }];
            },
            &[
                &format!("note: eth0: rp_filter is strict there | {fix}"),
                "problem: tunl0: rp_filter is strict on this | sysctl -w net.ipv4.conf.tunl0.rp_filter=2",
            ],
        );
    }

    #[test]
    fn ends_of_tunnels() {
        let none = |facts: &mut ServerFacts| facts.decap = false;
        check(none, &["note: no tunnel device is up | ip link set tunl0 up; for `via: gue`"]);
        let device = |facts: &mut ServerFacts| {
            none(facts);
            facts.tunnels = vec![Tunnel { name: "tunl0".into(), strict: false }];
        };
        check(device, &[]);
    }
}
