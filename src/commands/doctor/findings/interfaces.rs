//! Findings about the interfaces of the configuration.

use super::host::start_arpd;
use crate::commands::doctor::before::Before;
use crate::commands::doctor::facts::{Facts, Input, InputLink};
use crate::datapath::hook::Attachment;
use crate::telemetry::diagnosis::Source;
use crate::telemetry::problem::{Problem, note, problem};

/// Reports settings of an interface that keep packets from the program, or from being forwarded.
pub fn input(facts: &Facts, input: &Input) -> Vec<Problem> {
    let name = &input.name;
    let Some(link) = &input.link else { return Vec::new() };
    let mut found = before(facts, name, link);
    if link.foreign_qdisc {
        let what = "its ingress qdisc was made by another program";
        let why = "who removes it removes udplb's filter too";
        let again = Source(&facts.file).apply();
        let fix = format!("{again} afterwards, or arpd and a timer that does");
        found.push(note("foreign-qdisc", name, what).why(why).fix(fix));
    }
    found.extend(link.moves_to.map(|to| moves(facts, name, to)));
    if let Some(sysctl) = &link.no_ipv6 {
        let what = "IPv6 is off there, and a rule is for it";
        let why = "nobody answers those who ask for its addresses";
        found.push(problem("ipv6-off", name, what).why(why).fix(format!("sysctl -w {sysctl}=0")));
    }
    if !link.not_forwarding.is_empty() && facts.arpd != Some(true) {
        let what = "forwarding is off there, and arpd does not run";
        let why = "packets go by what the last apply saw: changes of routes are not followed";
        let on: Vec<String> = link.not_forwarding.iter().map(|it| format!("{it}=1")).collect();
        let fix = format!("{}, or sysctl -w {}", start_arpd(facts), on.join(" "));
        found.push(note("forwarding-off", name, what).why(why).fix(fix));
    }
    if link.strict && link.passes && link.default_elsewhere {
        let what = "rp_filter is strict there, and the default route leaves elsewhere";
        let why = "of packets from beyond the router upstreams get their copy, and the local one is \
                   dropped";
        let fix = format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2");
        found.push(problem("rp-filter", name, what).why(why).fix(fix));
    }
    if let Some(device) = &link.lro {
        let what = format!("large receive offload is on at {device}");
        let why = "the device merges packets that cannot be taken apart again";
        found.push(problem("lro", name, what).why(why).fix(format!("ethtool -K {device} lro off")));
    }
    found.extend(generic_offload(facts, name, link));
    found
}

/// Reports a program that the next apply attaches in another way.
fn moves(facts: &Facts, name: &str, to: Attachment) -> Problem {
    let (what, why) = match to {
        Attachment::Filter => (
            "a tc filter of a lower priority than udplb's runs after it",
            "udplb is attached by a tcx link, and tcx runs before all filters",
        ),
        Attachment::Link => (
            "udplb is attached by a tc filter, and could be by a tcx link",
            "a link costs each packet about 40 ns less; no packet is lost by the move",
        ),
    };
    note("attachment", name, what).why(why).fix(Source(&facts.file).apply())
}

/// TCP segments a second from which generic receive offload is worth its cost.
const MANY_SEGMENTS: u64 = 1000;

/// Advises where generic receive offload costs more than it saves: datagrams of rules leave one by one, but TCP
/// of this host and packets that a rule passes go up the stack merged.
fn generic_offload(facts: &Facts, name: &str, link: &InputLink) -> Option<Problem> {
    let segments = facts.tcp_segments;
    if link.gro.is_empty() || link.delivers || segments > MANY_SEGMENTS {
        return None;
    }
    let what = format!("generic receive offload is on at {}", link.gro.join(", "));
    let why = format!(
        "it costs each packet of a `block` rule 75 to 85 ns and merges none; TCP to this host, {segments} \
         segments within a second, needs it"
    );
    let off: Vec<String> =
        link.gro.iter().map(|device| format!("ethtool -K {device} gro off")).collect();
    let fix = format!("{}, unless much TCP or a rule with `pass` comes later", off.join("; "));
    Some(note("gro", name, what).why(why).fix(fix))
}

/// Reports programs and filters that run before udplb's, or that none of the packets reached it.
fn before(facts: &Facts, name: &str, link: &InputLink) -> Vec<Problem> {
    let Some(packets) = facts.hidden.get(name) else {
        return link.before.iter().map(|before| runs_before(name, before)).collect();
    };
    let all = |part: fn(&Before) -> &str| link.before.iter().map(part).collect::<Vec<_>>();
    let (why, fix) = match link.before.is_empty() {
        false => (
            format!("before it: {}", all(|it| &it.name).join(", ")),
            all(|it| &it.remove).join("; "),
        ),
        true => ("something takes them before tc".into(), format!("ip -d link show {name}")),
    };
    let what = format!("{packets} packets came in within a second, and none reached udplb");
    vec![problem("packets-hidden", name, what).why(why).fix(fix)]
}

fn runs_before(name: &str, Before { name: filter, remove, takes_all }: &Before) -> Problem {
    let found = match takes_all {
        true => problem("packets-hidden", name, format!("{filter} hides every packet from udplb"))
            .why("it runs first, and decides on all packets"),
        false => note("runs-before", name, format!("{filter} runs first and may consume packets"))
            .why("packets that it drops, accepts or redirects do not meet the rules"),
    };
    found.fix(format!("{remove}, or have it run later"))
}
