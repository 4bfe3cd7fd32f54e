//! Problems of rules and upstreams.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use super::verdicts::{Explanation, explain};
use super::{Facts, few, is_usable};
use crate::config::{Mode, State};
use crate::datapath::description::Generation;
use crate::net::neighbour::NudState;
use crate::telemetry::problem::{Problem, note, problem};
use crate::telemetry::status::{RuleStatus, UpstreamStatus};

/// Age up to which a lost packet is a problem.
const RECENT: Duration = Duration::from_secs(1);

/// Seconds after an apply before silent rules are reported.
pub(super) const GRACE: u64 = 60;

/// Maximum of silent rules with a note each; more share one note.
const SILENT: usize = 5;

/// Reason why an upstream is not reached.
pub(super) enum Unreached<'a> {
    /// The interface is down, or has no carrier.
    Link(&'a str),
    /// The kernel's reason.
    NoRoute(&'a str),
    /// A route was added after the next hop was recorded.
    NewRoute(&'a str),
    Silent(Silence),
}

/// A next hop that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    pub state: Answer,
    /// Seconds since 1970.
    pub since: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No answer to the probes of arpd.
    Down,
    /// The next hop answers, and the service does not.
    Failing,
    /// State of an entry for which the kernel has no answer.
    Failed(NudState),
    /// No answer since the entry was created.
    Never,
}

pub(super) fn unreached<'a>(
    facts: &Facts<'a>,
    upstream: &'a UpstreamStatus,
) -> Option<Unreached<'a>> {
    let is_up = |name: &str| facts.observed.interfaces.get(name).is_some_and(is_usable);
    let hop = upstream.next_hop.as_ref();
    if hop.is_some_and(|hop| is_up(&hop.interface)) {
        return upstream.silence.map(Unreached::Silent);
    }
    match (facts.routes.to.get(&upstream.address)?, hop) {
        // the kernel uses another route by now
        (Ok(interface), Some(_)) if is_up(interface) => None,
        (Ok(interface), None) if is_up(interface) => Some(Unreached::NewRoute(interface)),
        (Ok(interface), _) => Some(Unreached::Link(interface)),
        (Err(_), Some(hop)) => Some(Unreached::Link(&hop.interface)),
        (Err(reason), None) => {
            let down = facts.routes.down.iter();
            let mut down = down.filter(|(_, network)| network.contains(upstream.address.ip));
            let interface = down.next().map(|(interface, _)| interface.as_str());
            Some(interface.map_or(Unreached::NoRoute(reason), Unreached::Link))
        }
    }
}

/// Reports an unreached upstream, unless its interface is the reason, which is reported on its own.
pub(super) fn unreachable(
    facts: &Facts<'_>,
    rule: &RuleStatus,
    upstream: &UpstreamStatus,
    why: &Unreached<'_>,
) -> Option<Problem> {
    let UpstreamStatus { label, address, .. } = upstream;
    let place = &rule.name;
    let apply = facts.source.apply();
    Some(match why {
        Unreached::Link(_) => return None,
        Unreached::NoRoute(reason) => {
            let mut why = reason.to_string();
            if let Some((interface, _)) = facts.routes.down.first() {
                why += &format!("; {interface} is down, and has no routes therefore");
            }
            problem("no-route", place, format!("there is no route to {label}"))
                .why(why)
                .fix(format!("ip route add {address} via ROUTER; {apply}"))
        }
        Unreached::NewRoute(interface) => {
            let what = format!("the route to {label} came after it was applied");
            let why = format!("by {interface}; without forwarding or arpd it is not used");
            note("new-route", place, what).why(why).fix(apply)
        }
        Unreached::Silent(Silence { state: Answer::Failing, since }) => {
            let why = upstream.evidence.clone().unwrap_or_default();
            problem("upstream-down", place, format!("{label} is down"))
                .why(why)
                .since(*since)
                .fix(format!("repair the service at {label}"))
        }
        Unreached::Silent(silence) => {
            let hop = upstream.next_hop.as_ref()?;
            let asked = if hop.gateway.is_ipv4() { "ARP" } else { "NDP" };
            let whom = match hop.gateway == address.ip {
                true => hop.gateway.to_string(),
                false => format!("the gateway {}", hop.gateway),
            };
            let answer = match silence.state {
                Answer::Down | Answer::Failing => "does not answer",
                Answer::Failed(state) => &format!("does not answer ({state})"),
                Answer::Never => "has never answered",
            };
            problem("upstream-down", place, format!("{label} is down"))
                .why(format!("{whom} on {} {answer} {asked}", hop.interface))
                .since(silence.since)
                .fix(instead_of(rule, upstream, hop.gateway))
        }
    })
}

/// Returns the fix of an upstream that is down: drain it if others can take its packets.
fn instead_of(rule: &RuleStatus, upstream: &UpstreamStatus, gateway: IpAddr) -> String {
    let is_other = |it: &&UpstreamStatus| {
        it.label != upstream.label && it.state == State::Active && it.silence.is_none()
    };
    let start = format!("start {gateway}, or repair the network to it");
    let balanced = rule.mode == Mode::Balance && rule.upstreams.iter().any(|it| is_other(&it));
    match balanced && rule.upstreams.iter().any(|it| it.label == upstream.label) {
        true => format!("udplb drain {}/{}, until it answers; {start}", rule.name, upstream.label),
        false => start,
    }
}

/// Reports a rule without active upstreams.
pub(super) fn all_drained(facts: &Facts<'_>, rule: &RuleStatus) -> Option<Problem> {
    if rule.upstreams.iter().any(|upstream| upstream.state == State::Active) {
        return None;
    }
    let by_hand = rule.upstreams.iter().find(|upstream| upstream.override_state.is_some());
    let fix = match by_hand {
        Some(upstream) => format!("udplb enable {}/{}", rule.name, upstream.label),
        None => facts.source.edit(),
    };
    let what = "all its upstreams are drained";
    let why = "its packets are counted no-upstream, and go nowhere";
    Some(problem("all-drained", &rule.name, what).why(why).fix(fix))
}

/// Reports recently lost packets of a rule, except to `explained` upstreams, which have a problem already.
pub(super) fn losses(
    facts: &Facts<'_>,
    rule: &RuleStatus,
    explained: &HashSet<u32>,
) -> Vec<Problem> {
    let recent = |lost: Option<(Duration, &'static str)>| {
        let (time, verdict) = lost?;
        (facts.now.monotonic.saturating_sub(time) < RECENT).then_some(verdict)
    };
    let loss = |place: &str, verdict: &'static str| {
        let Explanation { why, fix } = explain(verdict);
        let what = format!("packets were lost in the last second as `{verdict}`");
        problem("packets-lost", place, what).why(why).fix(fix)
    };
    let lossy: Vec<(&UpstreamStatus, &'static str)> = rule
        .destinations()
        .filter_map(|(upstream, _)| Some((upstream, recent(upstream.counters.last_lost())?)))
        .collect();
    // if no copy was sent, the rule's own counter repeats the verdict
    if lossy.is_empty() && rule.upstreams.iter().any(|it| it.state == State::Active) {
        return recent(rule.own.last_lost())
            .map(|verdict| loss(&rule.name, verdict))
            .into_iter()
            .collect();
    }
    let unexplained = lossy.into_iter().filter(|(upstream, _)| !explained.contains(&upstream.id));
    unexplained
        .map(|(upstream, verdict)| loss(&format!("{}/{}", rule.name, upstream.label), verdict))
        .collect()
}

/// Reports rules that no packet has matched since the apply.
pub(super) fn silent(facts: &Facts<'_>, serving: &Generation) -> Vec<Problem> {
    let built = serving.description.built;
    if facts.now.utc.saturating_sub(built) < GRACE {
        return Vec::new();
    }
    let last = |rule: &RuleStatus| rule.counters.last().map_or(0, |last| facts.now.at(last));
    let silent: Vec<&RuleStatus> = facts.rules.iter().filter(|rule| last(rule) < built).collect();
    let fix = |key: &str| format!("udplb get SENDER {key}; tcpdump -ni any udp");
    let note = |place: &str, what: String, fix: String| {
        self::note("rule-silent", place, what)
            .why("nobody sends, or what is sent does not match")
            .since(Some(built))
            .fix(fix)
    };
    match silent.len() {
        0..=SILENT => silent
            .into_iter()
            .map(|rule| note(&rule.name, "no packet has matched it".into(), fix(&rule.key)))
            .collect(),
        many => {
            let names: Vec<String> = silent.iter().map(|rule| rule.name.clone()).collect();
            let all = facts.rules.len();
            let what = format!("no packet has matched {many} of {all} rules, {},", few(&names));
            vec![note("", what, fix("KEY"))]
        }
    }
}
