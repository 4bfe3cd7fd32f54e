//! `udplb init`: prints a commented configuration for this host.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::Context;
use clap::{Args, ValueEnum};

use super::netlink;
use crate::cli::output::print;
use crate::error::Result;
use crate::net::Netlink;
use crate::net::link::{Link, OwnAddress};

/// The configuration to print.
#[derive(Args)]
pub struct Options {
    #[arg(value_enum, default_value = "netflow", value_name = "USE")]
    purpose: Purpose,
}

#[derive(Clone, Copy, ValueEnum)]
enum Purpose {
    /// All exporters' flows to several collectors.
    Netflow,
    /// Messages to a local syslog server and a copy to others.
    Syslog,
    /// Metrics split by name over several servers.
    Statsd,
    /// Queries over several servers, which answer the senders themselves.
    Dns,
}

/// An interface with one of its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Input {
    name: String,
    address: IpAddr,
}

pub async fn run(options: &Options) -> Result<u8> {
    print(&document(options.purpose, &inputs(&netlink()?).await?))
}

/// Returns the interfaces that packets can come in on; that of the default route first.
async fn inputs(netlink: &Netlink) -> Result<Vec<Input>> {
    let links = netlink.links().await.context("interfaces")?;
    let addresses = netlink.addresses().await.context("addresses")?;
    let default = netlink.default_interface().context("routes")?;
    Ok(choose(&links, &addresses, default))
}

fn choose(links: &[Link], addresses: &[OwnAddress], default: Option<u32>) -> Vec<Input> {
    let usable = |link: &&Link| link.up && link.layer.is_some() && link.name != "lo";
    let mut links: Vec<&Link> = links.iter().filter(usable).collect();
    links.sort_by_key(|link| (Some(link.index) != default, link.index));
    let input = |link: &Link| {
        let own =
            addresses.iter().filter(|own| own.ifindex == link.index && !is_local(own.address));
        let address = own.map(|own| own.address).min_by_key(IpAddr::is_ipv6)?;
        Some(Input { name: link.name.clone(), address })
    };
    links.into_iter().filter_map(input).collect()
}

/// Returns true for an address that is only good on its own link.
fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
    }
}

fn document(purpose: Purpose, inputs: &[Input]) -> String {
    let documented = Input { name: "eth0".into(), address: Ipv4Addr::new(192, 0, 2, 1).into() };
    let (input, others) = match inputs {
        [] => (&documented, inputs),
        [first, others @ ..] => (first, others),
    };
    let mut text = String::from(
        "# Change the upstreams, then: udplb check FILE, udplb plan FILE, udplb apply FILE\nversion: 1\n\n\
         # Packets that come in on these interfaces are looked at.\n",
    );
    // writing to a string cannot fail
    let _ = writeln!(text, "interfaces: [{}]", input.name);
    if inputs.is_empty() {
        text.push_str("# This host has no interface with an address now: eth0 stands for it.\n");
    }
    for other in others {
        let _ = writeln!(text, "# or {}, which has {}", other.name, other.address);
    }
    let upstreams = match input.address {
        IpAddr::V4(_) => ["198.51.100.11", "198.51.100.12"],
        IpAddr::V6(_) => ["'2001:db8::11'", "'2001:db8::12'"],
    };
    text + &template(purpose)
        .replace("ADDRESS", &format!("'{}'", input.address))
        .replace("FIRST", upstreams[0])
        .replace("SECOND", upstreams[1])
}

fn template(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Netflow => {
            "
rules:
  - name: netflow
    # Destination of the exporters' datagrams: this host.
    key: { address: ADDRESS, port: 2055 }
    options:
      tc_action: block    # they end here; `pass`: a collector on this host gets them as well
      mode: replicate     # each upstream gets all of them; `balance`: one of them does
      source: preserve    # collectors see the exporters' addresses; `egress` where routers on the way drop those
    upstream:
      - { name: nfcapd, address: FIRST }
      - { name: archive, address: SECOND, port: 9995, sample: 10 }  # one of ten datagrams
"
        }
        Purpose::Syslog => {
            "
rules:
  - name: syslog
    key: { address: ADDRESS, port: 514 }
    options:
      tc_action: pass     # the syslog server of this host gets each message unchanged
      mode: replicate     # and so do all upstreams
      source: preserve    # with the sender's address
    upstream:
      - { name: siem, address: FIRST }
      - { name: archive, address: SECOND, port: 1514 }
"
        }
        Purpose::Statsd => {
            "
rules:
  - name: statsd
    key: { address: ADDRESS, port: 8125 }
    options:
      tc_action: block
      source: preserve
      strategy: payload   # a metric has one server, whoever sends it
      payload: statsd
      health: neighbour   # with `udplb arpd`: a server that does not answer is left out
    upstream:
      - { name: a, address: FIRST }
      - { name: b, address: SECOND, weight: 2 }  # twice as many metrics
"
        }
        Purpose::Dns => {
            "
rules:
  - name: dns
    key: { address: ADDRESS, port: 53 }
    options:
      tc_action: block
      source: preserve    # the servers see the clients
      strategy: src-ip    # a client has one server
      fragments: follow
    upstream:
      - { name: a, address: FIRST }
      - { name: b, address: SECOND }
"
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::{Input, Purpose, choose, document};
    use crate::config::{Config, Network};
    use crate::net::link::{Layer, Link, OwnAddress};

    #[test]
    fn each_document_is_valid() {
        let input = |name: &str, address: &str| Input {
            name: name.into(),
            address: address.parse().expect("an address"),
        };
        let hosts = [
            vec![],
            vec![input("ens3", "10.0.0.1"), input("ens4", "2001:db8:1::1")],
            vec![input("ens3", "2001:db8:1::1")],
        ];
        for purpose in Purpose::value_variants() {
            for inputs in &hosts {
                let text = document(*purpose, inputs);
                let config = Config::parse("init", &text);
                let config = config.unwrap_or_else(|errors| panic!("{text}\n{errors:?}"));
                assert_eq!(config.warnings, [], "{text}");
                let first = inputs.first().map_or("eth0", |input| &input.name);
                assert_eq!(config.interfaces, [first]);
            }
        }
    }

    #[test]
    fn interface_of_the_default_route_is_first() {
        let link = |index, name: &str| Link {
            index,
            name: name.into(),
            up: true,
            layer: Some(Layer::Ethernet),
            ..Link::default()
        };
        let own = |ifindex, address: &str| OwnAddress {
            ifindex,
            address: address.parse().expect("an address"),
            broadcast: None,
            network: address.parse::<Network>().expect("a network"),
            tentative: false,
        };
        let links = [link(1, "lo"), link(2, "ens3"), link(3, "ens4"), link(4, "ens5")];
        let addresses = [
            own(1, "127.0.0.1"),
            own(2, "fe80::1"),
            own(2, "10.0.0.1"),
            own(3, "2001:db8::1"),
            own(3, "10.0.1.1"),
            own(4, "169.254.0.1"),
        ];
        let chosen: Vec<String> = choose(&links, &addresses, Some(3))
            .iter()
            .map(|input| format!("{} {}", input.name, input.address))
            .collect();
        assert_eq!(chosen, ["ens4 10.0.1.1", "ens3 10.0.0.1"]);
    }
}
