//! The part of a routing daemon's configuration that announces the addresses. Pure.

use std::fmt::Write;
use std::net::IpAddr;
use std::str::FromStr;

use crate::config::Announce;

/// A routing daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// BIRD 2.
    Bird,
    /// FRR.
    Frr,
}

/// A router that the addresses are announced to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    address: IpAddr,
    autonomous_system: u32,
}

impl FromStr for Neighbour {
    type Err = String;

    fn from_str(text: &str) -> Result<Neighbour, String> {
        let parse = || {
            let (address, autonomous_system) = text.split_once('=')?;
            Some(Neighbour {
                address: address.parse().ok()?,
                autonomous_system: autonomous_system.parse().ok()?,
            })
        };
        parse()
            .ok_or("a router's address, `=` and its autonomous system, like 10.0.0.1=64999".into())
    }
}

impl Engine {
    /// Returns the part as text.
    pub fn part(self, announce: &Announce, own: u32, neighbours: &[Neighbour]) -> String {
        match self {
            Engine::Bird => bird(announce, own, neighbours),
            Engine::Frr => frr(announce, own, neighbours),
        }
    }
}

/// `(65535, 0)` is the well-known community of a graceful shutdown (RFC 8326).
fn bird(announce: &Announce, own: u32, neighbours: &[Neighbour]) -> String {
    let interface = &announce.interface;
    let (mut interfaces, mut worse) = (format!("\"{interface}\""), String::new());
    if let Some(last_resort) = &announce.last_resort {
        interfaces += &format!(", \"{last_resort}\"");
        worse = format!(
            "\tif ifname = \"{last_resort}\" then {{\n\t\tbgp_path.prepend({own});\n\
             \t\tbgp_path.prepend({own});\n\t\tbgp_community.add((65535, 0));\n\t}}\n"
        );
    }
    let mut text = format!(
        "# The addresses that udplb announces, for an `include` in the configuration of BIRD 2, which has\n\
         # a router id and `protocol device`.\n\
         protocol direct udplb {{\n\tipv4;\n\tipv6;\n\tinterface {interfaces};\n}}\n\n\
         filter udplb_announced {{\n\tif proto != \"udplb\" then reject;\n{worse}\taccept;\n}}\n\n\
         protocol bfd udplb_bfd {{\n\tinterface \"*\" {{\n\t\tmin rx interval 100 ms;\n\
         \t\tmin tx interval 100 ms;\n\t\tmultiplier 3;\n\t}};\n}}\n"
    );
    for (nth, Neighbour { address, autonomous_system }) in (1..).zip(neighbours) {
        let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
        let _ = write!(
            text,
            "\nprotocol bgp udplb{nth} {{\n\tlocal as {own};\n\
             \tneighbor {address} as {autonomous_system};\n\tbfd on;\n\thold time 9;\n\
             \tconnect delay time 1;\n\terror wait time 1, 10;\n\
             \t{family} {{\n\t\timport none;\n\t\texport filter udplb_announced;\n\
             \t\tnext hop self;\n\t}};\n}}\n"
        );
    }
    text
}

/// Redistributed routes have the origin `incomplete`, and routers make no group of these and others: hence
/// `set origin igp`.
fn frr(announce: &Announce, own: u32, neighbours: &[Neighbour]) -> String {
    let mut text = format!(
        "! The addresses that udplb announces, for FRR's zebra, bgpd and bfdd.\n\
         route-map udplb permit 10\n match interface {}\n set origin igp\n",
        announce.interface
    );
    if let Some(last_resort) = &announce.last_resort {
        let _ = write!(
            text,
            "route-map udplb permit 20\n match interface {last_resort}\n set origin igp\n \
             set as-path prepend {own} {own}\n set community graceful-shutdown\n"
        );
    }
    let _ = write!(
        text,
        "route-map udplb-all permit 10\nroute-map udplb-none deny 10\nrouter bgp {own}\n no bgp default ipv4-unicast\n"
    );
    for Neighbour { address, autonomous_system } in neighbours {
        let _ = write!(
            text,
            " neighbor {address} remote-as {autonomous_system}\n neighbor {address} timers 3 9\n \
             neighbor {address} timers connect 1\n neighbor {address} bfd profile udplb\n"
        );
    }
    for (family, is_ipv4) in [("ipv4", true), ("ipv6", false)] {
        let of_family = || neighbours.iter().filter(|it| it.address.is_ipv4() == is_ipv4);
        if of_family().next().is_none() {
            continue;
        }
        let _ = write!(
            text,
            " address-family {family} unicast\n  redistribute connected route-map udplb\n"
        );
        for Neighbour { address, .. } in of_family() {
            let _ = write!(
                text,
                "  neighbor {address} activate\n  neighbor {address} route-map udplb-none in\n  \
                 neighbor {address} route-map udplb-all out\n"
            );
        }
        text += " exit-address-family\n";
    }
    // last: the daemons that do not know it go on where they were
    text + "bfd\n profile udplb\n  detect-multiplier 3\n  receive-interval 100\n  transmit-interval 100\n"
}

#[cfg(test)]
mod tests {
    use super::{Engine, Neighbour};
    use crate::config::Config;

    fn part(engine: Engine, announce: &str, neighbours: &[&str]) -> String {
        let file = format!("version: 1\nannounce: {announce}\nrules: []\n");
        let config = Config::parse("test.yaml", &file).expect("a good configuration");
        let neighbours: Vec<Neighbour> =
            neighbours.iter().map(|it| it.parse().expect("a neighbour")).collect();
        engine.part(&config.announce.expect("an announcement"), 65001, &neighbours)
    }

    #[test]
    fn each_family_has_its_neighbours() {
        let both = ["10.0.0.1=64999", "2001:db8::1=64999"];
        let announce = "{ interface: anycast0, last_resort: anycast1 }";
        let bird = part(Engine::Bird, announce, &both);
        assert!(bird.contains("neighbor 10.0.0.1 as 64999;"), "{bird}");
        assert!(bird.contains("interface \"anycast0\", \"anycast1\";"), "{bird}");
        assert!(bird.contains("protocol bgp udplb2 {"), "{bird}");
        let frr = part(Engine::Frr, announce, &both);
        let (ipv4, ipv6) = frr.split_once(" address-family ipv6").expect("both families");
        assert!(ipv4.contains("  neighbor 10.0.0.1 activate"), "{frr}");
        assert!(ipv6.contains("  neighbor 2001:db8::1 activate"), "{frr}");
        assert!(frr.contains(" set as-path prepend 65001 65001\n"), "{frr}");
    }

    #[test]
    fn without_last_resort_nothing_is_announced_as_worse() {
        for engine in [Engine::Bird, Engine::Frr] {
            let text = part(engine, "{ interface: anycast0 }", &["10.0.0.1=64999"]);
            assert!(text.contains("anycast0") && !text.contains("prepend"), "{text}");
            assert!(!text.contains("ipv6 {") && !text.contains("family ipv6"), "{text}");
        }
    }

    #[test]
    fn a_neighbour_is_an_address_and_a_number() {
        for text in ["", "10.0.0.1", "10.0.0.1=", "=1", "router=1", "10.0.0.1=4294967296"] {
            assert!(text.parse::<Neighbour>().is_err(), "{text}");
        }
    }
}
