//! What it takes to get from what the kernel holds to what is wanted. Pure.

use crate::bpf::OBJECT_SHA256;
use crate::config::State;
use crate::generation::{Draft, Generation, Origin};
use crate::netlink::Layer;
use crate::observe::Observed;
use crate::plan::Desired;
use crate::state::Held;
use crate::tc::Slot;

/// One step. The executor carries them out in the order given and undoes those already done
/// when one fails, up to [`Action::SetCurrent`]; what comes after that is clean-up.
#[derive(Clone, Debug)]
pub enum Action {
    /// Remove what a crash left half-built.
    RemoveUnfinished(String),
    /// Build a generation aside and move it into place.
    Build(Box<Draft>),
    /// Tell the program where the upstreams of the generation are.
    WriteNextHops(u32),
    AddClsact(String),
    /// The commit point of an interface.
    Attach {
        interface: String,
        generation: u32,
        replaces: Slot,
    },
    Detach {
        interface: String,
        generation: u32,
        /// The clsact is ours and carries nothing else: it goes too.
        clsact: bool,
    },
    SetHeld(Option<Held>),
    SetCurrent(u32),
    /// What is said of an upstream, whatever the configuration says.
    Override {
        /// For messages.
        upstream: String,
        id: u32,
        state: Option<State>,
    },
    /// Remove a generation that nobody uses.
    Drop(u32),
}

/// A sequence of actions and the generation that serves when they are done.
#[derive(Clone, Debug)]
pub struct Plan {
    pub generation: u32,
    pub actions: Vec<Action>,
}

/// Why nothing may be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoInterface(String),
    UnknownLayer(String),
    Foreign { interface: String, filter: String },
    Orphan { interface: String, filter: String },
    OtherNamespace(u64),
    Held(Held),
    NothingBefore,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::NoInterface(name) => {
                write!(f, "there is no interface {name} here; `ip link` lists those there are")
            }
            Refusal::UnknownLayer(name) => {
                write!(f, "{name} carries neither Ethernet frames nor plain IP packets")
            }
            Refusal::Foreign { interface, filter } => write!(
                f,
                "{interface}: a filter that is not udplb's has its place on ingress: {filter}; \
                 move it to another priority or handle"
            ),
            Refusal::Orphan { interface, filter } => write!(
                f,
                "{interface}: a filter of udplb whose pins are gone is on ingress: {filter}; \
                 --force takes it over"
            ),
            Refusal::OtherNamespace(inode) => write!(
                f,
                "the pins belong to another network namespace (net:[{inode}]); use another \
                 --pin-dir in this one"
            ),
            Refusal::Held(held) => write!(
                f,
                "held since {}: a rollback left this configuration (generation {}); change the \
                 file, or apply it with --force",
                crate::clock::utc(held.since),
                held.generation
            ),
            Refusal::NothingBefore => {
                write!(f, "there is no earlier generation to roll back to")
            }
        }
    }
}

/// What `apply` is to do. `origin` is where the new generation says it came from.
pub fn apply(
    observed: &Observed,
    desired: &Desired,
    origin: &Origin,
    force: bool,
) -> Result<Plan, Refusal> {
    replace(observed, desired, origin, force, Why::Asked)
}

/// What is to be done when a host name of the configuration or `any` stands for other addresses: the
/// generation that serves is replaced, and what a rollback goes back to or has left stays.
pub fn renew(observed: &Observed, desired: &Desired, origin: &Origin) -> Result<Plan, Refusal> {
    replace(observed, desired, origin, false, Why::Moved)
}

/// Puts the generation that serves onto interfaces that have lost it; those that somebody else
/// uses, or that are not there, are left alone.
pub fn attach_again(observed: &Observed, interfaces: &[String]) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    let number = observed.serving().ok_or(Refusal::NothingBefore)?;
    let mut actions = Vec::new();
    for name in interfaces {
        let Some(interface) = observed.interfaces.get(name) else { continue };
        let there = observed.generations.get(&number);
        let mut programs = there.into_iter().flat_map(|it| it.description.programs());
        let has_program = programs.any(|(layer, _)| Some(layer) == interface.layer);
        if !has_program || interface.hook.slot != Slot::Empty {
            continue;
        }
        if interface.hook.qdisc.is_none() {
            actions.push(Action::AddClsact(name.clone()));
        }
        actions.push(Action::Attach {
            interface: name.clone(),
            generation: number,
            replaces: Slot::Empty,
        });
    }
    Ok(Plan { generation: number, actions })
}

/// Why a generation takes the place of another.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Why {
    Asked,
    Moved,
}

fn replace(
    observed: &Observed,
    desired: &Desired,
    origin: &Origin,
    force: bool,
    why: Why,
) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    let held = held(observed);
    if let Some((held, left)) = held
        && !force
        && left.description.desired.as_written() == desired.as_written()
    {
        return Err(Refusal::Held(held));
    }
    let clsact = clsact_after(observed, desired);
    let l3 = desired
        .interfaces
        .iter()
        .any(|name| observed.interfaces.get(name).is_some_and(|it| it.layer == Some(Layer::Ip)));
    let reusable = reusable(observed, desired, &clsact, l3);
    let number = reusable.unwrap_or_else(|| next_number(observed));

    let mut actions = unfinished(observed);
    if reusable.is_none() {
        actions.push(Action::Build(Box::new(Draft {
            number,
            origin: origin.clone(),
            namespace: observed.namespace,
            clsact,
            l3,
            desired: desired.clone(),
        })));
    }
    // one that is not intact is dropped below, and nothing could be compared with it then
    let stays = held.filter(|(_, left)| {
        left.intact && (why == Why::Moved || observed.serving() == Some(number))
    });
    if observed.held.is_some() && stays.is_none() {
        // before the swap: a crash after it must not leave what is held now held for ever
        actions.push(Action::SetHeld(None));
    }
    let interfaces: Vec<String> = match why {
        Why::Asked => desired.interfaces.clone(),
        // one that it was taken off, or that is gone, is nothing that a name or address changes
        Why::Moved => observed.attached().map(|(name, _)| name.into()).collect(),
    };
    switch(observed, number, &interfaces, force, &mut actions)?;
    let stays = stays.map(|(held, _)| held);
    let before = match observed.serving().and_then(|serving| observed.generations.get(&serving)) {
        // it is the same configuration: going back leads to the one before
        Some(serving) if why == Why::Moved => {
            before(observed, serving.number, stays).or(Some(serving.number))
        }
        Some(serving) if serving.number < number && serving.intact => Some(serving.number),
        _ => before(observed, number, stays),
    };
    let there = observed.generations.keys().chain(&observed.damaged);
    let others = there.filter(|other| ![Some(number), before].contains(&Some(**other)));
    actions.extend(others.copied().map(Action::Drop));
    Ok(Plan { generation: number, actions })
}

/// The generation that may serve as it is: an equal one, and none before the one that serves, so
/// that going back keeps its direction.
fn reusable(observed: &Observed, desired: &Desired, clsact: &[String], l3: bool) -> Option<u32> {
    let least = observed.serving().unwrap_or(0);
    observed
        .generations
        .range(least..)
        .map(|(_, generation)| generation)
        .filter(|generation| generation.intact)
        .find(|Generation { description, .. }| {
            description.desired == *desired
                && description.object == OBJECT_SHA256
                && description.clsact == clsact
                && description.program_l3.is_some() == l3
        })
        .map(|generation| generation.number)
}

/// What a rollback left, unless that serves again or is gone.
fn held(observed: &Observed) -> Option<(Held, &Generation)> {
    let held = observed.held?;
    let left = observed.generations.get(&held.generation)?;
    (observed.serving() != Some(held.generation)).then_some((held, left))
}

/// The generation that a rollback from `number` leads to.
fn before(observed: &Observed, number: u32, held: Option<Held>) -> Option<u32> {
    let intact = |number: &u32| observed.generations.get(number).is_some_and(|it| it.intact);
    let held = held.map(|held| held.generation).filter(intact);
    held.or_else(|| {
        observed.generations.range(..number).rev().map(|(number, _)| *number).find(intact)
    })
}

/// What `rollback` is to do: back to the generation before, and from there to and fro.
pub fn rollback(observed: &Observed, now: u64) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    let serving = observed.serving().ok_or(Refusal::NothingBefore)?;
    let number = before(observed, serving, held(observed).map(|(held, _)| held));
    let target = number.and_then(|number| observed.generations.get(&number));
    let target = target.ok_or(Refusal::NothingBefore)?;
    let mut actions = unfinished(observed);
    switch(observed, target.number, &target.description.desired.interfaces, false, &mut actions)?;
    let held = Held { generation: serving, since: now };
    insert_before_current(&mut actions, Action::SetHeld(Some(held)));
    Ok(Plan { generation: target.number, actions })
}

/// What `detach` is to do: off the named interfaces, or off all where none is named.
pub fn detach(observed: &Observed, interfaces: &[String]) -> Result<Vec<Action>, Refusal> {
    refuse_other_namespace(observed)?;
    for name in interfaces {
        if !observed.interfaces.contains_key(name) {
            return Err(Refusal::NoInterface(name.clone()));
        }
    }
    Ok(observed
        .attached()
        .filter(|(name, _)| interfaces.is_empty() || interfaces.iter().any(|named| named == name))
        .map(|(name, generation)| detachment(observed, name, generation))
        .collect())
}

/// The filters of another network namespace are none of ours.
pub fn refuse_other_namespace(observed: &Observed) -> Result<(), Refusal> {
    let other = observed
        .generations
        .values()
        .map(|generation| generation.description.namespace)
        .find(|namespace| *namespace != observed.namespace);
    other.map_or(Ok(()), |namespace| Err(Refusal::OtherNamespace(namespace)))
}

/// One that no generation has, and that nothing speaks of.
fn next_number(observed: &Observed) -> u32 {
    let held = observed.held.as_ref().map(|held| &held.generation);
    let numbers = observed.generations.keys().chain(&observed.damaged).chain(&observed.current);
    numbers.chain(held).max().map_or(1, |number| number + 1)
}

fn unfinished(observed: &Observed) -> Vec<Action> {
    observed.unfinished.iter().cloned().map(Action::RemoveUnfinished).collect()
}

/// The interfaces whose clsact is ours once `desired` is applied.
fn clsact_after(observed: &Observed, desired: &Desired) -> Vec<String> {
    let ours = |name: &&String| {
        let interface = observed.interfaces.get(*name);
        interface.is_some_and(|it| it.hook.qdisc.is_none()) || made_clsact(observed, name)
    };
    desired.interfaces.iter().filter(ours).cloned().collect()
}

/// Says so the generation that is attached there: where none is, the clsact may be anybody's.
fn made_clsact(observed: &Observed, interface: &str) -> bool {
    let Some(Slot::Generation(number)) =
        observed.interfaces.get(interface).map(|interface| &interface.hook.slot)
    else {
        return false;
    };
    let generation = observed.generations.get(number);
    generation.is_some_and(|it| it.description.clsact.iter().any(|name| name == interface))
}

/// Puts a generation on `interfaces` and takes others off the rest.
fn switch(
    observed: &Observed,
    number: u32,
    interfaces: &[String],
    force: bool,
    actions: &mut Vec<Action>,
) -> Result<(), Refusal> {
    let mut attachments = Vec::new();
    for name in interfaces {
        let interface =
            observed.interfaces.get(name).ok_or_else(|| Refusal::NoInterface(name.clone()))?;
        if interface.layer.is_none() {
            return Err(Refusal::UnknownLayer(name.clone()));
        }
        match &interface.hook.slot {
            Slot::Generation(attached) if *attached == number => continue,
            Slot::Foreign(filter) => {
                return Err(Refusal::Foreign { interface: name.clone(), filter: filter.clone() });
            }
            Slot::Orphan { filter, .. } if !force => {
                return Err(Refusal::Orphan { interface: name.clone(), filter: filter.clone() });
            }
            _ => {}
        }
        if interface.hook.qdisc.is_none() {
            attachments.push(Action::AddClsact(name.clone()));
        }
        attachments.push(Action::Attach {
            interface: name.clone(),
            generation: number,
            replaces: interface.hook.slot.clone(),
        });
    }
    let detachments = observed
        .attached()
        .filter(|(name, _)| !interfaces.iter().any(|wanted| wanted == name))
        .map(|(name, generation)| detachment(observed, name, generation));
    attachments.extend(detachments);
    if !attachments.is_empty() {
        actions.push(Action::WriteNextHops(number));
        actions.append(&mut attachments);
    }
    if observed.current != Some(number) {
        actions.push(Action::SetCurrent(number));
    }
    Ok(())
}

fn detachment(observed: &Observed, interface: &str, generation: u32) -> Action {
    let shared = observed.interfaces.get(interface).is_some_and(|it| it.hook.shared);
    Action::Detach {
        interface: interface.into(),
        generation,
        clsact: !shared && made_clsact(observed, interface),
    }
}

fn insert_before_current(actions: &mut Vec<Action>, action: Action) {
    let at = actions
        .iter()
        .position(|action| matches!(action, Action::SetCurrent(_)))
        .unwrap_or(actions.len());
    actions.insert(at, action);
}
