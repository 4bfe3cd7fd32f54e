//! Problems of configured, attached and egress interfaces.

use std::collections::BTreeMap;

use super::upstreams::Unreached;
use super::{Facts, few};
use crate::datapath::description::Generation;
use crate::datapath::hook::{Hook, Slot};
use crate::datapath::pin_search;
use crate::datapath::tc;
use crate::datapath::xdp;
use crate::reconcile::observe::{Interface, Orphan};
use crate::telemetry::problem::{Problem, note, problem};
use crate::telemetry::status::{RuleStatus, UpstreamStatus};

/// Reports problems of configured, attached and egress interfaces.
pub(super) fn problems(
    facts: &Facts<'_>,
    serving: &Generation,
    unreached: &[(&RuleStatus, &UpstreamStatus, Unreached<'_>)],
) -> Vec<Problem> {
    let wanted = &serving.description.desired.interfaces;
    let mut behind: BTreeMap<&str, Vec<(&RuleStatus, &UpstreamStatus)>> = BTreeMap::new();
    for (rule, upstream, why) in unreached {
        if let Unreached::Link(interface) = why {
            behind.entry(interface).or_default().push((rule, upstream));
        }
    }
    let mut problems = Vec::new();
    for name in wanted {
        let Some(interface) = facts.observed.interfaces.get(name) else {
            problems.push(
                problem("interface-missing", name, "there is no such interface")
                    .why("no packet comes in there")
                    .fix(format!("ip link show; {}", facts.source.edit())),
            );
            continue;
        };
        let behind = behind.remove(name.as_str()).unwrap_or_default();
        problems.extend(link(facts, name, interface, true, &behind));
        problems.extend(slot(facts, serving.number, name, &interface.hook));
        problems.extend(xdp_slot(facts, serving, name, &interface.xdp));
    }
    for (name, behind) in behind {
        let Some(interface) = facts.observed.interfaces.get(name) else { continue };
        problems.extend(link(facts, name, interface, false, &behind));
    }
    for (name, attached) in facts.observed.attached().filter(|(name, _)| !is_in(wanted, name)) {
        let what = format!("generation {attached} serves here");
        let why = "its packets meet rules of a configuration that does not name it";
        problems.push(problem("other-generation", name, what).why(why).fix(facts.source.apply()));
    }
    problems.extend(unannounced(facts, serving));
    problems
}

/// Reports interfaces of `announce` that are missing or down: no routing daemon announces their addresses.
fn unannounced(facts: &Facts<'_>, serving: &Generation) -> Vec<Problem> {
    let announce = serving.description.desired.announce.iter();
    let names = announce.flat_map(|it| [Some(&it.interface), it.last_resort.as_ref()]).flatten();
    let problems = names.filter_map(|name| {
        let interface = facts.observed.interfaces.get(&facts.observed.canonical(name));
        let (what, fix) = match interface {
            None => ("there is no such interface", format!("ip link add {name} up type dummy")),
            Some(interface) if interface.up => return None,
            Some(_) => ("it is down", format!("ip link set {name} up")),
        };
        Some(
            problem("announce-interface", name, what)
                .why("its addresses are not announced")
                .fix(fix),
        )
    });
    problems.collect()
}

fn is_in(names: &[String], name: &str) -> bool {
    names.iter().any(|other| other == name)
}

/// Reports an interface that is down or has no carrier. `behind` are the upstreams reached by it.
fn link(
    facts: &Facts<'_>,
    name: &str,
    interface: &Interface,
    is_input: bool,
    behind: &[(&RuleStatus, &UpstreamStatus)],
) -> Option<Problem> {
    let problem = match (interface.up, interface.carrier) {
        (false, _) => problem("interface-down", name, "it is down")
            .fix(format!("ip link set {name} up; {}", facts.source.apply())),
        (true, false) => problem("no-carrier", name, "it has no carrier")
            .fix(format!("ip -d link show {name}; check the cable and its other end")),
        (true, true) => return None,
    };
    let names = behind.iter().map(|(rule, upstream)| format!("{}/{}", rule.name, upstream.label));
    let names: Vec<String> = names.collect();
    let why = match (is_input, names.is_empty()) {
        (true, true) => "no packet comes in there".into(),
        (true, false) => format!("no packet comes in there, or leaves to {}", few(&names)),
        (false, _) => format!("no packet leaves there to {}", few(&names)),
    };
    // known while arpd runs
    let since = behind.iter().filter_map(|(_, upstream)| upstream.down_since()).min();
    Some(problem.why(why).since(since))
}

fn slot(facts: &Facts<'_>, number: u32, name: &str, hook: &Hook) -> Option<Problem> {
    let why = "its packets do not meet the rules";
    let apply = facts.source.apply();
    match hook.slot() {
        Slot::Generation(attached) if *attached == number => hook.handover.then(|| {
            note("handover", name, "a move between tc filter and tcx link was interrupted")
                .why("each packet costs one call more; none is lost")
                .fix(apply)
        }),
        Slot::Generation(attached) => Some(
            problem("other-generation", name, format!("generation {attached} still serves here"))
                .why("its packets meet the rules of before")
                .fix(apply),
        ),
        Slot::Empty => {
            Some(problem("not-attached", name, "udplb is not attached").why(why).fix(apply))
        }
        Slot::Orphan { filter, link, home, .. } => {
            let (interface, home) = (name, home.as_ref());
            Some(orphan(facts, &Orphan { interface, filter, link: *link, home }))
        }
        Slot::Foreign(filter) => Some(
            problem("place-taken", name, format!("another filter has udplb's place: {filter}"))
                .why(why)
                .fix(format!("tc filter del dev {name} ingress pref {}; {apply}", tc::PRIORITY)),
        ),
    }
}

/// Reports an XDP program that is missing, or another's in its place.
fn xdp_slot(
    facts: &Facts<'_>,
    serving: &Generation,
    name: &str,
    slot: &xdp::Slot,
) -> Option<Problem> {
    let mode = *serving.description.desired.xdp.get(name)?;
    let what = match slot {
        xdp::Slot::Own { generation, mode: there }
            if (*generation, *there) == (Some(serving.number), mode) =>
        {
            return None;
        }
        xdp::Slot::Other(program) => format!("the XDP program {program} has the place of udplb's"),
        _ => "its XDP program is not attached".into(),
    };
    let note = note("xdp", name, what).why("its packets go by tc, which costs more; none is lost");
    Some(note.fix(facts.source.apply()))
}

/// Reports a filter of another udplb, or one whose pins are missing.
pub(super) fn orphan(facts: &Facts<'_>, orphan: &Orphan<'_>) -> Problem {
    let Orphan { interface, filter, home, .. } = *orphan;
    match home {
        Some(home) => {
            let what =
                format!("another udplb, whose pins are in {home}, has its filter here: {filter}");
            problem("other-pin-dir", interface, what)
                .why("an interface has one udplb, and its packets meet the rules of that one")
                .fix(format!("{0} list; {0} detach -i {interface}", home.command()))
        }
        None => {
            let what =
                format!("a filter of udplb whose pins are not here still sends on: {filter}");
            problem("orphan", interface, what)
                .why("its packets meet rules that cannot be read from here")
                .fix(format!("{}: {}", pin_search::HOW_TO_FIND, facts.source.force()))
        }
    }
}
