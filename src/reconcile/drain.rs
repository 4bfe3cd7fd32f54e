//! Overrides of upstreams' states: the target of `drain` and `enable`, and the actions. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use anyhow::{Context, anyhow};
use schemars::JsonSchema;
use serde::Serialize;

use crate::config::{State, nearest, with_port};
use crate::desired::diff::endpoint;
use crate::desired::export;
use crate::desired::{Desired, Destination, Role, Rule, RuleIds, Upstream};
use crate::reconcile::plan::Action;

/// Override states by upstream id.
pub type Overrides = BTreeMap<u32, State>;

/// `RULE/UPSTREAM` of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamName {
    pub rule: String,
    /// A name, an endpoint, or the label in the output of `status`.
    pub upstream: String,
}

impl FromStr for UpstreamName {
    type Err = String;

    fn from_str(text: &str) -> Result<UpstreamName, String> {
        // no name has a slash
        match text.split_once('/') {
            Some((rule, upstream)) if !rule.is_empty() && !upstream.is_empty() => {
                Ok(UpstreamName { rule: rule.into(), upstream: upstream.into() })
            }
            _ => Err("a rule, `/` and one of its upstreams, like flows/10.0.9.11:2055".into()),
        }
    }
}

/// `RULE[/UPSTREAM]` of the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuleOrUpstream {
    Rule(String),
    Upstream(UpstreamName),
}

impl FromStr for RuleOrUpstream {
    type Err = String;

    fn from_str(text: &str) -> Result<RuleOrUpstream, String> {
        match text.contains('/') {
            true => text.parse().map(RuleOrUpstream::Upstream),
            false => Ok(RuleOrUpstream::Rule(text.into())),
        }
    }
}

/// The state of an upstream, receiver or mirror: the configured one and its override.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct UpstreamState {
    pub rule: String,
    pub upstream: String,
    pub state: State,
    #[serde(rename = "override")]
    pub override_state: Option<State>,
    #[serde(skip)]
    id: u32,
    /// State from the configuration; `None` if the upstream is listed twice with different states.
    #[serde(skip)]
    configured: Option<State>,
    #[serde(skip)]
    role: Role,
    #[serde(skip)]
    rule_has_flows: bool,
}

impl UpstreamState {
    fn new(
        rule: &Rule,
        ids: &RuleIds,
        destination: &Destination<'_>,
        overrides: &Overrides,
    ) -> UpstreamState {
        let Destination { id, upstream, .. } = *destination;
        let same = ids.destinations().zip(rule.destinations()).filter(|(other, _)| *other == id);
        let mut configured = same.map(|(_, it)| it.state);
        let configured = configured.all(|state| state == upstream.state).then_some(upstream.state);
        let override_state = overrides.get(&id).copied();
        UpstreamState {
            rule: rule.name.clone(),
            upstream: destination.label.clone(),
            state: effective(configured, override_state),
            override_state,
            id,
            configured,
            role: destination.role,
            rule_has_flows: rule.has_flows(),
        }
    }

    /// Returns why the upstream can have no flows; `None`: it can.
    pub fn why_no_flows(&self) -> Option<String> {
        match (self.rule_has_flows, self.role) {
            (false, _) => Some(format!("rule {} has no `reply: nat` or `sticky`", self.rule)),
            (true, Role::Mirror) => Some("mirrors get copies only".into()),
            (true, Role::Upstream) => None,
        }
    }

    pub fn name(&self) -> String {
        format!("{}/{}", self.rule, self.upstream)
    }

    /// Returns the action that sets a state: an override, or none if the file has the same state.
    fn to(&self, state: State) -> Option<Action> {
        let override_state = (self.configured != Some(state)).then_some(state);
        (override_state != self.override_state).then(|| self.set_override(override_state))
    }

    fn set_override(&self, state: Option<State>) -> Action {
        Action::Override { upstream: self.name(), id: self.id, state }
    }

    fn after(mut self, action: Option<&Action>) -> UpstreamState {
        if let Some(Action::Override { state, .. }) = action {
            self.override_state = *state;
            self.state = effective(self.configured, *state);
        }
        self
    }

    /// Returns the origin of the state, for messages.
    fn by(&self) -> &'static str {
        if self.override_state.is_some() { "by hand" } else { "by the file" }
    }
}

fn effective(configured: Option<State>, override_state: Option<State>) -> State {
    override_state.or(configured).unwrap_or(State::Active)
}

/// The result for one upstream.
pub struct Change {
    pub action: Option<Action>,
    pub before: UpstreamState,
    pub after: UpstreamState,
    /// True if the rule has no active upstream afterwards.
    pub leaves_none: bool,
}

impl Change {
    /// # Errors
    /// There is no such upstream, or several.
    pub fn new(
        desired: &Desired,
        ids: &[RuleIds],
        overrides: &Overrides,
        target: &UpstreamName,
        state: State,
    ) -> anyhow::Result<Change> {
        let (rule, ids) = find_rule(desired, ids, &target.rule)?;
        let destinations = rule.with_ids(ids);
        let before =
            UpstreamState::new(rule, ids, find(rule, &destinations, &target.upstream)?, overrides);
        let action = before.to(state);
        let after = before.clone().after(action.as_ref());
        let mut upstreams =
            destinations.iter().filter(|destination| destination.role == Role::Upstream);
        let leaves_none = upstreams.all(|Destination { id, upstream, .. }| match *id == after.id {
            true => after.state == State::Drained,
            false => overrides.get(id).copied().unwrap_or(upstream.state) == State::Drained,
        });
        Ok(Change { action, before, after, leaves_none })
    }

    /// Describes the change in one line.
    pub fn text(&self) -> String {
        let name = self.after.name();
        let is = word(self.after.state);
        match &self.action {
            None => format!("unchanged ({name} is {is} {})", self.after.by()),
            Some(_) if self.before.state == self.after.state => {
                format!("{name} stays {is} by the file; the override is removed")
            }
            Some(_) => format!("{name} is {is} {}", self.after.by()),
        }
    }

    pub fn warning(&self) -> Option<String> {
        let none = self.leaves_none && self.after.state == State::Drained;
        none.then(|| {
            let rule = &self.after.rule;
            format!("rule {rule} has no active upstream: its packets are counted no-upstream")
        })
    }
}

/// Returns the overrides of upstreams in these configurations, each once.
pub fn overridden<'a>(
    all: impl Iterator<Item = (&'a Desired, &'a [RuleIds])>,
    overrides: &Overrides,
) -> Vec<UpstreamState> {
    let mut left = overrides.clone();
    let mut found = Vec::new();
    for (desired, ids) in all {
        for (rule, ids) in desired.rules.iter().zip(ids) {
            if left.is_empty() {
                return found;
            }
            let destinations = rule.with_ids(ids).into_iter();
            for destination in
                destinations.filter(|destination| left.remove(&destination.id).is_some())
            {
                found.push(UpstreamState::new(rule, ids, &destination, overrides));
            }
        }
    }
    found
}

/// Returns the rules with overrides applied to their upstreams.
pub fn effective_rules(desired: &Desired, ids: &[RuleIds], overrides: &Overrides) -> Vec<Rule> {
    let mut rules = desired.rules.clone();
    for (rule, ids) in rules.iter_mut().zip(ids) {
        for (upstream, id) in rule.upstreams.iter_mut().zip(&ids.upstreams) {
            upstream.state = overrides.get(id).copied().unwrap_or(upstream.state);
        }
    }
    rules
}

/// Removes all overrides; returns the actions, and the states afterwards.
pub fn remove_all(overridden: Vec<UpstreamState>) -> (Vec<Action>, Vec<UpstreamState>) {
    let actions: Vec<Action> = overridden.iter().map(|one| one.set_override(None)).collect();
    let after = overridden.into_iter().zip(&actions).map(|(one, action)| one.after(Some(action)));
    let after = after.collect();
    (actions, after)
}

/// Returns `drained` or `active`.
pub fn word(state: State) -> &'static str {
    match state {
        State::Drained => "drained",
        State::Active => "active",
    }
}

/// Returns the line in the output of `plan`.
pub fn line(one: &UpstreamState) -> String {
    format!("override: {} is {} by hand", one.name(), word(one.state))
}

fn find_rule<'a>(
    desired: &'a Desired,
    ids: &'a [RuleIds],
    name: &str,
) -> anyhow::Result<(&'a Rule, &'a RuleIds)> {
    let index = rule_index(desired, name)?;
    Ok((&desired.rules[index], ids.get(index).context("a rule without ids")?))
}

/// Returns the ids of a rule's upstreams, or of one of them.
///
/// # Errors
/// There is no such rule or upstream, or several.
pub fn ids_of(
    desired: &Desired,
    ids: &[RuleIds],
    target: &RuleOrUpstream,
) -> anyhow::Result<BTreeSet<u32>> {
    let (RuleOrUpstream::Rule(name) | RuleOrUpstream::Upstream(UpstreamName { rule: name, .. })) =
        target;
    let (rule, ids) = find_rule(desired, ids, name)?;
    Ok(match target {
        RuleOrUpstream::Rule(_) => ids.destinations().collect(),
        RuleOrUpstream::Upstream(UpstreamName { upstream, .. }) => {
            [find(rule, &rule.with_ids(ids), upstream)?.id].into()
        }
    })
}

/// Returns the fields of an upstream in the file, drained.
///
/// # Errors
/// There is no such upstream, or several.
pub fn drained_fields(
    desired: &Desired,
    ids: &[RuleIds],
    target: &UpstreamName,
) -> anyhow::Result<serde_json::Value> {
    let (rule, ids) = find_rule(desired, ids, &target.rule)?;
    let destinations = rule.with_ids(ids);
    let found = find(rule, &destinations, &target.upstream)?;
    Ok(export::host(&Upstream { state: State::Drained, ..found.upstream.clone() }))
}

/// Finds a rule by its name.
///
/// # Errors
/// There is none; the error suggests a similar name.
pub fn rule_index(desired: &Desired, name: &str) -> anyhow::Result<usize> {
    desired.rules.iter().position(|rule| rule.name == name).ok_or_else(|| {
        let known: Vec<&str> = desired.rules.iter().map(|rule| rule.name.as_str()).collect();
        anyhow!("there is no rule `{name}`; {}", hint(name, &known))
    })
}

/// Finds a host by its name or endpoint, or else by its address with any port.
///
/// # Errors
/// There is none, or several.
fn find<'a>(
    rule: &Rule,
    destinations: &'a [Destination<'a>],
    text: &str,
) -> anyhow::Result<&'a Destination<'a>> {
    for forms in [forms, bare_forms] {
        let is_form =
            |destination: &&Destination<'_>| forms(destination).iter().any(|form| form == text);
        let found: Vec<&Destination<'_>> = destinations.iter().filter(is_form).collect();
        match found[..] {
            [] => {}
            [one] => return Ok(one),
            _ => {
                let each: Vec<String> =
                    found.iter().map(|destination| format!("`{}`", full(destination))).collect();
                let (rule, each) = (&rule.name, each.join(" or "));
                return Err(anyhow!("`{text}` of rule {rule} is ambiguous: name {each}"));
            }
        }
    }
    let known: Vec<&str> =
        destinations.iter().map(|destination| destination.label.as_str()).collect();
    Err(anyhow!("rule {} has no upstream `{text}`; {}", rule.name, hint(text, &known)))
}

/// Returns the names that the command line accepts for a host.
fn forms(destination: &Destination<'_>) -> Vec<String> {
    let with_port = |host| match destination.upstream.port {
        Some(port) => with_port(host, port),
        None => host,
    };
    let mut forms =
        vec![destination.label.clone(), endpoint(destination.upstream), full(destination)];
    forms.extend(bare_forms(destination).into_iter().map(with_port));
    forms.extend(destination.upstream.name.clone());
    forms
}

fn bare_forms(destination: &Destination<'_>) -> Vec<String> {
    let Upstream { host, address, .. } = destination.upstream;
    vec![host.to_string(), address.to_string()]
}

/// Returns a name that is unique in the rule.
fn full(destination: &Destination<'_>) -> String {
    let role = match destination.role {
        Role::Upstream => "upstream",
        Role::Mirror => "mirror",
    };
    format!("{role} {}", endpoint(destination.upstream))
}

/// Suggests the most similar known name, or lists the first few.
fn hint(word: &str, known: &[&str]) -> String {
    const MAX: usize = 8;
    if let Some(near) = nearest(word, known) {
        return format!("did you mean `{near}`?");
    }
    let few: Vec<String> = known.iter().take(MAX).map(|it| format!("`{it}`")).collect();
    match (known.len(), known.len().saturating_sub(MAX)) {
        (0, _) => "there is none".into(),
        (_, 0) => format!("known: {}", few.join(", ")),
        (_, more) => format!("known: {} and {more} more", few.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Change, Overrides, UpstreamName, overridden, remove_all};
    use crate::config::{Config, State};
    use crate::desired::{Desired, RuleIds, assign_ids};
    use crate::reconcile::plan::Action;

    const FILE: &str = "
version: 1
interfaces: [eth0]
rules:
  - name: flows
    key: { address: 10.0.0.5, port: 2055 }
    options: { mode: replicate, source: preserve }
    upstream:
      - { name: nfcapd, address: 10.0.9.11 }
      - { address: 10.0.9.12 }
      - { address: 10.0.9.12, port: 9995 }
      - { address: 10.0.9.13, port: 1, state: drained }
  - name: Metrics
    key: { address: 10.0.0.5, port: 8125 }
    upstream: [{ address: 10.0.9.21, port: 1 }, { address: 10.0.9.21, port: 2 }]
    mirror: [{ address: 10.0.9.21, port: 1 }, { name: 10.0.9.21, address: 10.0.9.23 }]
  - key: { address: '2001:db8::5', port: 53 }
    upstream: [{ address: '2001:db8::9', port: 53 }, { address: 'fe80::1%eth0' }]
";
    // ids: flows 1, its upstreams 2 to 5; Metrics 6, upstreams 7 and 8, mirrors 9 and 10; the last 11 to 13

    fn applied() -> (Desired, Vec<RuleIds>) {
        let config = Config::parse("test.yaml", FILE).expect("a good configuration");
        let desired = Desired::written(&config, &config.interfaces);
        let ids = assign_ids(&desired, &[], 100).expect("ids enough");
        (desired, ids)
    }

    fn set_override(overrides: &Overrides, target: &str, state: State) -> Result<Change, String> {
        let (desired, ids) = applied();
        let target: UpstreamName = target.parse()?;
        Change::new(&desired, &ids, overrides, &target, state).map_err(|error| error.to_string())
    }

    fn written(change: &Change) -> Option<(u32, Option<State>)> {
        match change.action {
            Some(Action::Override { id, state, .. }) => Some((id, state)),
            _ => None,
        }
    }

    #[test]
    fn upstreams_have_several_names() {
        for (target, id) in [
            ("flows/nfcapd", 2),
            ("flows/10.0.9.11", 2),
            ("flows/nfcapd 10.0.9.11", 2),
            ("flows/upstream nfcapd 10.0.9.11", 2),
            ("flows/10.0.9.12", 3),
            ("flows/10.0.9.12:9995", 4),
            ("Metrics/upstream 10.0.9.21:1", 7),
            ("Metrics/10.0.9.21:2", 8),
            ("Metrics/mirror 10.0.9.21:1", 9),
            ("Metrics/10.0.9.21:1'", 9),
            ("Metrics/10.0.9.21", 10),
            ("Metrics/10.0.9.23", 10),
            ("[2001:db8::5]:53/[2001:db8::9]:53", 12),
            ("[2001:db8::5]:53/2001:db8::9", 12),
            ("[2001:db8::5]:53/fe80::1%eth0", 13),
        ] {
            let change = set_override(&Overrides::new(), target, State::Drained).expect(target);
            assert_eq!(written(&change), Some((id, Some(State::Drained))), "{target}");
        }
        for (target, says) in [
            ("flows", "a rule, `/` and one of its upstreams"),
            ("/nfcapd", "a rule, `/` and one of its upstreams"),
            ("flows/", "a rule, `/` and one of its upstreams"),
            ("flwos/nfcapd", "there is no rule `flwos`; did you mean `flows`?"),
            ("metrics/x", "there is no rule `metrics`; did you mean `Metrics`?"),
            ("x/nfcapd", "there is no rule `x`; known: `flows`, `Metrics`, `[2001:db8::5]:53`"),
            ("flows/nfcadp", "rule flows has no upstream `nfcadp`; did you mean `nfcapd`?"),
            (
                "flows/x",
                "rule flows has no upstream `x`; known: `nfcapd`, `10.0.9.12`, \
                 `10.0.9.12:9995`, `10.0.9.13:1`",
            ),
            (
                "Metrics/10.0.9.21:1",
                "`10.0.9.21:1` of rule Metrics is ambiguous: name `upstream 10.0.9.21:1` or \
                 `mirror 10.0.9.21:1`",
            ),
        ] {
            let error = set_override(&Overrides::new(), target, State::Drained).err();
            assert!(error.as_ref().is_some_and(|it| it.contains(says)), "{target}: {error:?}");
        }
    }

    #[test]
    fn an_override_is_what_differs_from_the_file() {
        use State::{Active, Drained};
        let drained = "flows/10.0.9.13:1";
        #[rustfmt::skip]
        let table = [
            ("flows/nfcapd", None,          Drained, Some(Some(Drained)), "flows/nfcapd is drained by hand"),
            ("flows/nfcapd", Some(Drained), Drained, None,                "unchanged (flows/nfcapd is drained by hand)"),
            ("flows/nfcapd", Some(Drained), Active,  Some(None),          "flows/nfcapd is active by the file"),
            ("flows/nfcapd", None,          Active,  None,                "unchanged (flows/nfcapd is active by the file)"),
            ("flows/nfcapd", Some(Active),  Active,  Some(None),          "flows/nfcapd stays active by the file; the override is removed"),
            (drained,        None,          Drained, None,                "unchanged (flows/10.0.9.13:1 is drained by the file)"),
            (drained,        None,          Active,  Some(Some(Active)),  "flows/10.0.9.13:1 is active by hand"),
            (drained,        Some(Active),  Active,  None,                "unchanged (flows/10.0.9.13:1 is active by hand)"),
            (drained,        Some(Active),  Drained, Some(None),          "flows/10.0.9.13:1 is drained by the file"),
            (drained,        Some(Drained), Drained, Some(None),          "flows/10.0.9.13:1 stays drained by the file; the override is removed"),
        ];
        for (target, before, to, writes, text) in table {
            let id = if target == drained { 5 } else { 2 };
            let overrides: Overrides = before.map(|state| (id, state)).into_iter().collect();
            let change = set_override(&overrides, target, to).expect(target);
            assert_eq!(written(&change), writes.map(|state| (id, state)), "{text}");
            assert_eq!((change.text().as_str(), change.after.state), (text, to));
        }
    }

    #[test]
    fn the_last_one() {
        use State::{Active, Drained};
        let but_nfcapd: Overrides = [(3, Drained), (4, Drained)].into();
        let warns = |overrides: &Overrides, target, to| {
            set_override(overrides, target, to).expect(target).warning().is_some()
        };
        assert!(warns(&but_nfcapd, "flows/nfcapd", Drained));
        assert!(!warns(&but_nfcapd, "flows/nfcapd", Active));
        assert!(!warns(&but_nfcapd, "flows/10.0.9.12", Drained));
        let all = [(2, Drained), (3, Drained), (4, Drained), (5, Active)].into();
        assert!(warns(&all, "flows/10.0.9.13:1", Drained));
        // mirrors do not stand in for upstreams
        assert!(!warns(&[(7, Drained)].into(), "Metrics/10.0.9.23", Drained));
        assert!(warns(&[(7, Drained)].into(), "Metrics/10.0.9.21:2", Drained));
    }

    #[test]
    fn all_are_taken_back_once() {
        let (desired, ids) = applied();
        let overrides = [(2, State::Drained), (5, State::Active), (9, State::Drained)].into();
        let twice = [(&desired, &ids[..]), (&desired, &ids[..])].into_iter();
        let (actions, after) = remove_all(overridden(twice, &overrides));
        let after: Vec<String> = after
            .iter()
            .map(|it| format!("{} {:?} {:?}", it.name(), it.state, it.override_state))
            .collect();
        assert_eq!(
            after,
            [
                "flows/nfcapd Active None",
                "flows/10.0.9.13:1 Drained None",
                "Metrics/10.0.9.21:1' Active None"
            ]
        );
        let written = actions.iter().map(|action| match action {
            Action::Override { id, state: None, .. } => *id,
            other => panic!("{other:?}"),
        });
        assert_eq!(written.collect::<Vec<_>>(), [2, 5, 9]);
    }
}
