//! What is wrong with the configuration that serves, and why. Pure.

use crate::generation::Generation;
use crate::observe::{Interface, Observed};
use crate::partial::Unresolved;
use crate::pins::{self, Place};
use crate::problem::{Level, Problem};
use crate::status::RuleStatus;
use crate::tc::{self, Slot};

/// The file of a configuration, for advice. Standard input cannot be edited or applied again.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a>(pub &'a str);

impl Source<'_> {
    fn is_stdin(self) -> bool {
        self.0 == "-"
    }

    /// A command that applies it again.
    pub fn apply(self) -> String {
        match self.is_stdin() {
            true => "apply the configuration again (it came from standard input)".into(),
            false => format!("udplb apply {}", self.0),
        }
    }

    /// The same in spite of filters whose pins are gone, or of a hold.
    pub fn force(self) -> String {
        match self.is_stdin() {
            true => format!("{}, with --force", self.apply()),
            false => format!("{} --force", self.apply()),
        }
    }

    /// Commands that show what it would change, and apply it.
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

/// What the kernel holds, and how it is used.
pub struct Facts<'a> {
    pub observed: &'a Observed,
    /// None if nothing is applied, or the description is gone.
    pub serving: Option<&'a Generation>,
    pub rules: &'a [RuleStatus],
    pub source: Source<'a>,
}

/// All problems, causes before their consequences.
pub fn problems(facts: &Facts<'_>) -> Vec<Problem> {
    let mut problems = Vec::from_iter(overdue(facts.observed));
    let Some(serving) = facts.serving else {
        problems.extend(nothing(facts));
        return problems;
    };
    problems.extend(generation(facts, serving));
    problems.extend(interfaces(facts, serving));
    problems.extend(serving.description.desired.incomplete.hosts.iter().map(unresolved));
    problems.extend(facts.rules.iter().flat_map(upstreams));
    problems
}

fn problem(id: &'static str, place: &str, what: impl Into<String>) -> Problem {
    Problem::new(id, Level::Problem, place, what)
}

/// A change that was not confirmed in time, and that nobody has rolled back.
fn overdue(observed: &Observed) -> Option<Problem> {
    let pending = observed.pending.filter(|pending| pending.remaining().is_zero())?;
    let what = format!(
        "generation {} was not confirmed in time, and its rollback is overdue",
        pending.generation
    );
    let why = "the process that was to roll it back is gone, and no arpd runs";
    Some(problem("rollback-overdue", "", what).why(why).fix("udplb rollback"))
}

/// No generation that can be described serves.
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

/// A filter of a udplb with other pins, or whose pins are gone.
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
                .fix(format!("{}: {}", pins::HOW_TO_FIND, facts.source.force()))
        }
    }
}

/// The generation as a whole.
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

/// A host without an address.
fn unresolved(host: &Unresolved) -> Problem {
    let place = format!("{}/{}", host.rule, host.upstream);
    problem("name-unresolved", &place, host.effect.to_string())
        .why(format!("`{}` {}", host.host, host.cause))
        .fix(format!("getent ahosts {}", host.host))
}

/// The interfaces whose packets are to meet the rules, and those whose packets do.
fn interfaces(facts: &Facts<'_>, serving: &Generation) -> Vec<Problem> {
    let wanted = &serving.description.desired.interfaces;
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
        problems.extend(link(name, interface, "no packet comes in there".into()));
        problems.extend(slot(facts, serving.number, name, &interface.hook.slot));
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

/// An interface that is down, or whose link is.
fn link(name: &str, interface: &Interface, consequence: String) -> Option<Problem> {
    let problem = match (interface.up, interface.carrier) {
        (false, _) => {
            problem("interface-down", name, "it is down").fix(format!("ip link set {name} up"))
        }
        (true, false) => problem("no-carrier", name, "it has no carrier")
            .fix(format!("check the cable and the other end of {name}: ip -d link show {name}")),
        (true, true) => return None,
    };
    Some(problem.why(consequence))
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

/// The upstreams and mirrors that do not answer.
fn upstreams(rule: &RuleStatus) -> impl Iterator<Item = Problem> {
    let all = rule.destinations().map(|(upstream, _)| upstream);
    let down = all.filter(|upstream| upstream.health == Some("down"));
    down.map(|upstream| {
        let since = upstream.since.filter(|since| *since > 0).map(u64::from);
        problem("upstream-down", &rule.name, format!("{} is down", upstream.label))
            .why("its next hop does not answer")
            .since(since)
            .fix(format!("ip route get {}; ip neigh show", upstream.address))
    })
}
