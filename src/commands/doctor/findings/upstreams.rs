//! Findings about upstreams, the paths to them, and their packets.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::commands::doctor::facts::{Facts, HopFacts, PathFacts, Sender, UpstreamFacts};
use crate::commands::doctor::sample::Growth;
use crate::telemetry::diagnosis::{Explanation, Source, explain, is_loss};
use crate::telemetry::problem::{Problem, note, problem};

/// Reports packets that were not sent during the sample.
pub fn growth(Growth { place, verdict, packets }: &Growth) -> Problem {
    let Explanation { why, fix } = explain(verdict);
    let what = format!("{packets} packets within a second were not sent: `{verdict}`");
    let found = match is_loss(verdict) {
        true => problem("packets-lost", place, what),
        false => note("packets-left", place, what),
    };
    found.why(why).fix(fix)
}

/// Reports packets with an expired TTL, the only sign of relays that replicate to each other.
pub fn loops(facts: &Facts) -> Vec<Problem> {
    let mut rules = BTreeSet::new();
    let mut spent: Vec<&UpstreamFacts> = facts.upstreams.iter().filter(|it| it.spent > 0).collect();
    spent.retain(|upstream| rules.insert(&upstream.rule));
    let found = spent.into_iter().map(|UpstreamFacts { rule, spent, .. }| {
        let why = "senders of multicast use it unless they are told otherwise; or packets go round in \
                   a loop of relays that send to each other, each of which multiplies them if it \
                   replicates";
        let fix = format!(
            "udplb trace --rule {rule} --drops shows where they come from; relays must not have each \
             other as upstreams"
        );
        note("ttl", rule, format!("{spent} packets came with a TTL of 1")).why(why).fix(fix)
    });
    found.collect()
}

/// Reports paths to upstreams that lose packets, one finding for each path.
pub fn paths(facts: &Facts) -> Vec<Problem> {
    let links = facts.inputs.iter().filter_map(|input| input.link.as_ref());
    let largest = links.map(|link| link.mtu).max().unwrap_or(0);
    let (mut narrow, mut routers) = (BTreeSet::new(), BTreeSet::new());
    let source = Source(&facts.file);
    let mut found = Vec::new();
    for upstream in &facts.upstreams {
        let UpstreamFacts { rule, label, address, path, .. } = upstream;
        let hop = match path {
            PathFacts::Hop(hop) => hop,
            PathFacts::Local => {
                let what = format!("{label} is this host itself");
                let why = "its packets would come round again";
                found.push(problem("upstream-local", rule, what).why(why).fix(source.edit()));
                continue;
            }
            PathFacts::None(why) => {
                let what = format!("there is no route to {label}");
                let fix = format!("ip route add {address} via ROUTER");
                found.push(problem("no-route", rule, what).why(why).fix(fix));
                continue;
            }
        };
        let HopFacts { interface, gateway, mtu, .. } = hop;
        if *mtu < largest && narrow.insert((interface, mtu, upstream.too_large > 0)) {
            found.push(narrow_path(upstream, hop, largest));
        }
        if upstream.lacks_egress {
            let what = format!("{label} is to get this host's address, and there is none");
            let why = "packets to it are dropped as `no-route`";
            let fix = format!("ip addr add ADDRESS dev {interface}; {}", source.apply());
            found.push(problem("no-egress-address", rule, what).why(why).fix(fix));
        }
        if upstream.preserves && gateway != address && routers.insert(gateway) {
            found.push(behind_router(upstream, gateway));
        }
    }
    found
}

fn narrow_path(upstream: &UpstreamFacts, hop: &HopFacts, largest: u32) -> Problem {
    let UpstreamFacts { rule, label, too_large, .. } = upstream;
    let what = format!("the MTU on the way to {label} is {}", hop.mtu);
    let why = format!(
        "larger packets, up to {largest}, are fragmented, or dropped as `mtu` if they must not be"
    );
    let found = match too_large {
        0 => note("mtu", rule, what).why(why),
        count => problem("mtu", rule, what).why(format!("{why}: {count} so far")),
    };
    found.fix(widen(hop, largest))
}

/// Returns the command that sets an MTU, and that of a lower interface with room for the headers.
fn widen(HopFacts { interface, mtu, lower, .. }: &HopFacts, wanted: u32) -> String {
    let set = format!("ip link set {interface} mtu {wanted}");
    match lower {
        Some((lower, room)) => {
            let headers = room.saturating_sub(*mtu);
            format!("ip link set {lower} mtu {} && {set}", wanted + headers)
        }
        None => set,
    }
}

fn behind_router(UpstreamFacts { rule, label, .. }: &UpstreamFacts, gateway: &IpAddr) -> Problem {
    let what = format!("{label} is behind the router {gateway}, and gets senders' own addresses");
    let why = "a router that checks senders (uRPF) drops what comes from here with them";
    let mut fix = format!("on {gateway}: accept them from this host");
    if gateway.is_ipv4() {
        fix += "; on Linux sysctl -w net.ipv4.conf.all.rp_filter=2";
    }
    note("urpf", rule, what).why(why).fix(fix)
}

/// Reports a socket of this host that sends to a key.
pub fn sender(Sender { rule, from, to, uid }: &Sender) -> Problem {
    let what = format!("a socket of this host, {from} of user {uid}, sends to {to}");
    let why = "its packets stay on lo and meet no rule";
    problem("local-sender", rule, what).why(why).fix("have it send to an upstream itself")
}
