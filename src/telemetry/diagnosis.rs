//! Problems of the active configuration and their causes. Pure.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use crate::config::{Address, Mode, Network, State};
use crate::datapath::description::Generation;
use crate::datapath::pin_search::{self, Place};
use crate::datapath::tc::{self, Slot};
use crate::desired::partial::Unresolved;
use crate::net::neighbour::NudState;
use crate::reconcile::observe::{Interface, Observed};
use crate::telemetry::problem::{Level, Problem};
use crate::telemetry::status::{RuleStatus, UpstreamStatus};

/// Age up to which a lost packet is a problem.
const RECENT: Duration = Duration::from_secs(1);

/// Seconds after an apply before silent rules are reported.
const GRACE: u64 = 60;

/// Maximum of names in one message.
const NAMES: usize = 3;

/// Maximum of silent rules with a note each; more share one note.
const SILENT: usize = 5;

/// The file of a configuration, for fixes. `-` is standard input, which cannot be applied again.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a>(pub &'a str);

impl Source<'_> {
    fn is_stdin(self) -> bool {
        self.0 == "-"
    }

    /// Returns the command that applies the file again.
    pub fn apply(self) -> String {
        match self.is_stdin() {
            true => "apply the configuration again (it came from standard input)".into(),
            false => format!("udplb apply {}", self.0),
        }
    }

    /// Returns the same command with `--force`.
    pub fn force(self) -> String {
        match self.is_stdin() {
            true => format!("{}, with --force", self.apply()),
            false => format!("{} --force", self.apply()),
        }
    }

    /// Returns the commands that show its changes and apply it.
    pub fn plan(self) -> String {
        match self.is_stdin() {
            true => self.apply(),
            false => format!("udplb plan {}; {}", self.0, self.apply()),
        }
    }

    pub fn edit(self) -> String {
        match self.is_stdin() {
            true => "change what was applied from standard input, and apply it again".into(),
            false => format!("edit {}", self.0),
        }
    }
}

/// The current time by two clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Seconds since 1970.
    pub utc: u64,
    /// CLOCK_MONOTONIC.
    pub monotonic: Duration,
}

impl Now {
    /// Converts a time of CLOCK_MONOTONIC to seconds since 1970.
    fn at(self, monotonic: Duration) -> u64 {
        self.utc.saturating_sub(self.monotonic.saturating_sub(monotonic).as_secs())
    }
}

/// Current routes to upstreams whose recorded next hop is missing or unusable.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// Interface, or the kernel's reason why there is no route.
    pub to: BTreeMap<Address, Result<String, String>>,
    /// Networks of interfaces that are down.
    pub down: Vec<(String, Network)>,
}

/// Input of the diagnosis.
pub struct Facts<'a> {
    pub observed: &'a Observed,
    /// `None` if nothing is applied, or the description is missing.
    pub serving: Option<&'a Generation>,
    pub rules: &'a [RuleStatus],
    pub routes: &'a Routes,
    pub source: Source<'a>,
    pub now: Now,
}

/// Returns all problems, causes before their effects.
pub fn problems(facts: &Facts<'_>) -> Vec<Problem> {
    let mut problems = Vec::from_iter(overdue(facts.observed));
    let Some(serving) = facts.serving else {
        problems.extend(nothing(facts));
        return problems;
    };
    let unreached: Vec<(&RuleStatus, &UpstreamStatus, Unreached<'_>)> = active(facts.rules)
        .filter_map(|(rule, upstream)| Some((rule, upstream, unreached(facts, upstream)?)))
        .collect();
    problems.extend(generation(facts, serving));
    problems.extend(interfaces(facts, serving, &unreached));
    problems.extend(serving.description.desired.incomplete.hosts.iter().map(unresolved));
    problems.extend(facts.rules.iter().filter_map(|rule| all_drained(facts, rule)));
    problems.extend(
        unreached
            .iter()
            .filter_map(|(rule, upstream, why)| unreachable(facts, rule, upstream, why)),
    );
    // losses with a known cause are not repeated
    let explained: HashSet<u32> = unreached.iter().map(|(_, upstream, _)| upstream.id).collect();
    problems.extend(facts.rules.iter().flat_map(|rule| losses(facts, rule, &explained)));
    problems.extend(silent(facts, serving));
    problems
}

/// Returns the active upstreams and mirrors, each with its rule.
fn active(rules: &[RuleStatus]) -> impl Iterator<Item = (&RuleStatus, &UpstreamStatus)> {
    let all = rules.iter().flat_map(|rule| rule.destinations().map(move |(it, _)| (rule, it)));
    all.filter(|(_, upstream)| upstream.state == State::Active)
}

/// Returns the addresses of upstreams whose recorded next hop is missing or unusable, for [`Routes`].
pub fn suspects(rules: &[RuleStatus], observed: &Observed) -> Vec<Address> {
    let usable = |interface: &str| observed.interfaces.get(interface).is_some_and(is_usable);
    let suspect = active(rules)
        .map(|(_, upstream)| upstream)
        .filter(|upstream| upstream.next_hop.as_ref().is_none_or(|hop| !usable(&hop.interface)));
    let mut addresses: Vec<Address> = suspect.map(|upstream| upstream.address.clone()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn is_usable(interface: &Interface) -> bool {
    interface.up && interface.carrier
}

fn problem(id: &'static str, place: &str, what: impl Into<String>) -> Problem {
    Problem::new(id, Level::Problem, place, what)
}

/// Reports a change that was neither confirmed in time nor rolled back.
fn overdue(observed: &Observed) -> Option<Problem> {
    let pending = observed.pending.filter(|pending| pending.remaining().is_zero())?;
    let what = format!(
        "generation {} was not confirmed in time, and its rollback is overdue",
        pending.generation
    );
    let why = "the process that was to roll it back is gone, and no arpd runs";
    Some(problem("rollback-overdue", "", what).why(why).fix("udplb rollback"))
}

/// Reports the problems without a described active generation.
fn nothing(facts: &Facts<'_>) -> Vec<Problem> {
    let orphans = facts.observed.orphans();
    let orphans: Vec<Problem> =
        orphans.map(|(interface, filter, home)| orphan(facts, interface, filter, home)).collect();
    if let Some(number) = facts.observed.serving() {
        let what = format!("the description of generation {number} is gone");
        let why = "its program still runs, and nobody can tell what it does";
        return vec![problem("damage", "", what).why(why).fix(facts.source.apply())];
    }
    if !orphans.is_empty() {
        return orphans;
    }
    let nothing = problem("nothing-applied", "", "nothing is applied");
    vec![nothing.why("no packet is forwarded").fix(facts.source.apply())]
}

/// Reports a filter of another udplb, or one whose pins are missing.
fn orphan(facts: &Facts<'_>, interface: &str, filter: &str, home: Option<&Place>) -> Problem {
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

/// Reports problems of the generation as a whole.
fn generation(facts: &Facts<'_>, serving: &Generation) -> Vec<Problem> {
    let mut problems = Vec::new();
    if !serving.intact {
        let what = format!("pins of generation {} are missing", serving.number);
        let why = "rollback, arpd or the next apply may miss them";
        problems.push(problem("damage", "", what).why(why).fix(facts.source.apply()));
    }
    let namespace = serving.description.namespace;
    if namespace != facts.observed.namespace {
        let what = "the pins belong to another network namespace";
        let why = format!("they are of net:[{namespace}]");
        let fix = "run udplb in that namespace, or with another --pin-dir";
        problems.push(problem("other-namespace", "", what).why(why).fix(fix));
    }
    problems
}

/// Reports a host without an address.
fn unresolved(host: &Unresolved) -> Problem {
    let place = format!("{}/{}", host.rule, host.upstream);
    problem("name-unresolved", &place, host.effect.to_string())
        .why(format!("`{}` {}", host.host, host.cause))
        .fix(format!("getent ahosts {}", host.host))
}

/// Reports problems of configured, attached and egress interfaces.
fn interfaces(
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
        problems.extend(slot(facts, serving.number, name, &interface.hook.slot));
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
    problems
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

/// Lists the first names and the number of the others.
fn few(names: &[String]) -> String {
    match names.len().saturating_sub(NAMES) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..NAMES].join(", ")),
    }
}

fn slot(facts: &Facts<'_>, number: u32, name: &str, slot: &Slot) -> Option<Problem> {
    let why = "its packets do not meet the rules";
    let apply = facts.source.apply();
    match slot {
        Slot::Generation(attached) if *attached == number => None,
        Slot::Generation(attached) => Some(
            problem("other-generation", name, format!("generation {attached} still serves here"))
                .why("its packets meet the rules of before")
                .fix(apply),
        ),
        Slot::Empty => {
            Some(problem("not-attached", name, "udplb is not attached").why(why).fix(apply))
        }
        Slot::Orphan { filter, home, .. } => Some(orphan(facts, name, filter, home.as_ref())),
        Slot::Foreign(filter) => Some(
            problem("place-taken", name, format!("another filter has udplb's place: {filter}"))
                .why(why)
                .fix(format!("tc filter del dev {name} ingress pref {}; {apply}", tc::PRIORITY)),
        ),
    }
}

/// Reason why an upstream is not reached.
enum Unreached<'a> {
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
    /// State of an entry for which the kernel has no answer.
    Failed(NudState),
    /// No answer since the entry was created.
    Never,
}

fn unreached<'a>(facts: &Facts<'a>, upstream: &'a UpstreamStatus) -> Option<Unreached<'a>> {
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
fn unreachable(
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
            Problem::new("new-route", Level::Note, place, what).why(why).fix(apply)
        }
        Unreached::Silent(silence) => {
            let hop = upstream.next_hop.as_ref()?;
            let asked = if hop.gateway.is_ipv4() { "ARP" } else { "NDP" };
            let whom = match hop.gateway == address.ip {
                true => hop.gateway.to_string(),
                false => format!("the gateway {}", hop.gateway),
            };
            let answer = match silence.state {
                Answer::Down => "does not answer",
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
fn instead_of(rule: &RuleStatus, upstream: &UpstreamStatus, gateway: std::net::IpAddr) -> String {
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
fn all_drained(facts: &Facts<'_>, rule: &RuleStatus) -> Option<Problem> {
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
fn losses(facts: &Facts<'_>, rule: &RuleStatus, explained: &HashSet<u32>) -> Vec<Problem> {
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

/// Returns true for verdicts that mean loss, like `is_lost()` in the program.
pub fn is_loss(verdict: &str) -> bool {
    !["not-for-us", "fragment", "unresolved"].contains(&verdict)
}

/// Cause and fix of a verdict.
pub struct Explanation {
    pub why: &'static str,
    pub fix: &'static str,
}

/// Explains a verdict of packets that were not sent.
pub fn explain(verdict: &str) -> Explanation {
    let (why, fix) = match verdict {
        "no-route" => ("there is no route to the upstream", "ip route get UPSTREAM"),
        "no-neighbour" => ("the next hop does not answer ARP or NDP", "ip neigh show; start it"),
        "unresolved" => (
            "the kernel asks for the next hop, and drops what it does not answer for",
            "ip neigh show; udplb arpd keeps next hops resolved",
        ),
        "mtu" => (
            "the packets are larger than the way to the upstream takes",
            "raise the MTU on the way, or have the senders send less at once",
        ),
        "ttl" => ("the packets' TTL is spent", "have the senders send with a larger TTL"),
        "no-upstream" => ("all upstreams of the rule are drained", "udplb enable RULE/UPSTREAM"),
        "clone-failed" => (
            "there is no memory for copies, or the way out refuses them",
            "look at the drops of the interface that they leave by: ip -s link; tc -s qdisc",
        ),
        "malformed" => (
            "lengths or checksums in the packets are wrong",
            "find out who sends them: udplb trace --drops",
        ),
        "fragment-early" => (
            "a later fragment came before its first one",
            "have the senders send datagrams that need no fragments",
        ),
        "fragment-full" => (
            "more datagrams come in fragments than there is room for",
            "say `fragments: drop`, or have the senders send less at once",
        ),
        "loop" => (
            "the packets come from an upstream of the rule itself, or were here before",
            "have upstreams answer to another port, or name another one in the rule",
        ),
        "martian" => (
            "the sender's address is one that no router forwards, or a source route is unfinished",
            "find out who sends them: udplb trace --drops; or say `martians: allow`",
        ),
        "no-checksum" => (
            "UDP over IPv6 came without a checksum",
            "say `zero-checksum: allow`, if the upstream takes such datagrams",
        ),
        "local-socket" => (
            "a socket of this host asked for the packets, and gets them",
            "nothing is lost; leave the ephemeral ports out of the rule to spare the look-up",
        ),
        "fragment" => ("the rule says so of fragments", "change `fragments` of the rule"),
        "not-for-us" => (
            "the frames are for other hosts, and are left alone",
            "nothing is lost; a switch floods them, or the interface is promiscuous",
        ),
        _ => ("they were not sent", "udplb trace --drops"),
    };
    Explanation { why, fix }
}

/// Reports rules that no packet has matched since the apply.
fn silent(facts: &Facts<'_>, serving: &Generation) -> Vec<Problem> {
    let built = serving.description.built;
    if facts.now.utc.saturating_sub(built) < GRACE {
        return Vec::new();
    }
    let last = |rule: &RuleStatus| rule.counters.last().map_or(0, |last| facts.now.at(last));
    let silent: Vec<&RuleStatus> = facts.rules.iter().filter(|rule| last(rule) < built).collect();
    let fix = |key: &str| format!("udplb get SENDER {key}; tcpdump -ni any udp");
    let note = |place: &str, what: String, fix: String| {
        Problem::new("rule-silent", Level::Note, place, what)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Action, Key, Ports};
    use crate::datapath::counters::Counts;
    use crate::datapath::description::{Description, Origin, ProgramName};
    use crate::datapath::tc::Hook;
    use crate::desired::{Desired, Rule, Upstream};

    const BUILT: u64 = 1_000_000;

    fn serving(rules: usize) -> Generation {
        let key = || Key::new([10, 0, 0, 5], vec![Ports { first: 1, last: 1 }]);
        let upstream = || vec![Upstream::new([10, 0, 9, 1], None)];
        let rules = (0..rules).map(|index| Rule::new(format!("rule{index}"), key(), upstream()));
        let desired = Desired {
            interfaces: vec!["eth0".into()],
            rules: rules.collect(),
            ..Desired::default()
        };
        let description = Description {
            origin: Origin { file: "/etc/udplb.yaml".into(), ..Origin::default() },
            version: String::new(),
            object: String::new(),
            built: BUILT,
            namespace: 1,
            program: ProgramName::default(),
            program_l3: None,
            clsact: Vec::new(),
            desired,
            ids: Vec::new(),
        };
        Generation { number: 2, description, intact: true }
    }

    fn interface(slot: Slot) -> Interface {
        let hook = Hook { qdisc: None, slot, shared: false };
        Interface {
            index: 1,
            altnames: Vec::new(),
            layer: None,
            up: true,
            carrier: true,
            received: 0,
            hook,
        }
    }

    /// The rows of rules that matched their last packet so many seconds after they were applied.
    fn rows(last: &[Option<u64>]) -> Vec<RuleStatus> {
        let row = |(index, last): (usize, &Option<u64>)| RuleStatus {
            name: format!("rule{index}"),
            key: "10.0.0.5:1".into(),
            tc_action: Action::Pass,
            mode: Mode::Balance,
            upstreams: Vec::new(),
            mirrors: Vec::new(),
            counters: last.map_or_else(Counts::default, |last| {
                // the clock of BUILT is one second after the start
                Counts::forwarded_at(Duration::from_secs(last + 1))
            }),
            own: Counts::default(),
            notes: BTreeMap::new(),
            rate: None,
            losses: BTreeMap::new(),
            own_losses: BTreeMap::new(),
        };
        last.iter().enumerate().map(row).collect()
    }

    /// Problems so many seconds after the generation was built: level, id and title.
    fn found(slot: Slot, rules: &[RuleStatus], age: u64) -> Vec<(Level, &'static str, String)> {
        let serving = serving(rules.len());
        let mut observed = Observed { namespace: 1, ..Observed::default() };
        observed.interfaces.insert("eth0".into(), interface(slot));
        let facts = Facts {
            observed: &observed,
            serving: Some(&serving),
            rules,
            routes: &Routes::default(),
            source: Source("/etc/udplb.yaml"),
            now: Now { utc: BUILT + age, monotonic: Duration::from_secs(1 + age) },
        };
        let problems = problems(&facts);
        let drained = |problem: &&Problem| problem.id != "all-drained";
        let problems = problems.iter().filter(drained);
        problems.map(|problem| (problem.level, problem.id, problem.title())).collect()
    }

    #[test]
    fn hooks() {
        let ids = |slot: Slot| -> Vec<&'static str> {
            found(slot, &[], 0).iter().map(|(_, id, _)| *id).collect()
        };
        assert!(ids(Slot::Generation(2)).is_empty());
        assert_eq!(ids(Slot::Empty), ["not-attached"]);
        assert_eq!(ids(Slot::Generation(1)), ["other-generation"]);
        assert_eq!(ids(Slot::Foreign("flower".into())), ["place-taken"]);
        assert_eq!(ids(Slot::Orphan { program: 1, filter: "bpf".into(), home: None }), ["orphan"]);
    }

    #[test]
    fn silent_rules_are_notes_after_a_grace() {
        let found = |rules: &[Option<u64>], age| found(Slot::Generation(2), &rows(rules), age);
        assert!(found(&[None, Some(5)], GRACE - 1).is_empty());
        let note = |title: &str| vec![(Level::Note, "rule-silent", title.to_string())];
        let since = "since 1970-01-12T13:46:40Z";
        let one = format!("rule0: no packet has matched it {since}");
        assert_eq!(found(&[None, Some(5)], GRACE), note(&one));
        // before it was applied
        assert_eq!(found(&[Some(0), Some(5)], GRACE).len(), 0);
        let many =
            format!("no packet has matched 8 of 9 rules, rule0, rule1, rule2 and 5 more, {since}");
        let mut rules = vec![None; 9];
        rules[8] = Some(1);
        assert_eq!(found(&rules, GRACE), note(&many));
    }

    #[test]
    fn every_verdict_is_explained() {
        for (verdict, name) in crate::bpf::VERDICTS {
            let is_other = explain(name).why == explain("something else").why;
            assert_eq!(is_other, crate::bpf::is_forwarded(verdict), "{name}");
        }
    }

    #[test]
    fn standard_input_is_no_file() {
        let source = Source("-");
        for advice in [source.apply(), source.edit(), source.plan(), source.force()] {
            assert!(!advice.contains("apply -") && !advice.contains("edit -"), "{advice}");
        }
    }
}
