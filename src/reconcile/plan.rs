//! The actions that turn the observed state into the desired one. Pure.

use std::time::Duration;

use crate::bpf::OBJECT_SHA256;
use crate::config::State;
use crate::datapath::description::{Generation, Origin};
use crate::datapath::generation::Draft;
use crate::datapath::pin_search::{self, Place};
use crate::datapath::state_maps::{Held, Pending};
use crate::datapath::tc::Slot;
use crate::desired::Desired;
use crate::net::link::Layer;
use crate::net::qdisc::Qdisc;
use crate::reconcile::observe::Observed;

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
        /// The clsact is ours, which is remembered. It stays.
        clsact: bool,
    },
    /// Take away a clsact of ours that carries nothing.
    DeleteClsact(String),
    SetHeld(Option<Held>),
    SetPending(Option<Pending>),
    /// Stops or resumes arpd's attaching to an interface that is missing now.
    SetDetached {
        interface: String,
        detached: bool,
    },
    /// `None` removes it: nothing serves.
    SetCurrent(Option<u32>),
    /// Sets or removes the override of an upstream's configured state.
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
    /// 0: none.
    pub generation: u32,
    pub actions: Vec<Action>,
}

impl Plan {
    /// The interfaces that a filter is attached to.
    pub fn attached(&self) -> impl Iterator<Item = &str> {
        self.actions.iter().filter_map(|action| match action {
            Action::Attach { interface, .. } => Some(interface.as_str()),
            _ => None,
        })
    }

    /// Returns true if a generation is built.
    pub fn builds(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::Build(_)))
    }

    /// Returns true if the change waits for confirmation.
    pub fn is_pending(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::SetPending(Some(_))))
    }

    /// Returns the change that waits for confirmation once this is done.
    pub fn pending(&self, observed: &Observed) -> Option<Pending> {
        let last = self.actions.iter().rev().find_map(|action| match action {
            Action::SetPending(pending) => Some(*pending),
            _ => None,
        });
        last.unwrap_or(observed.pending)
    }
}

/// Why nothing may be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoInterface(String),
    UnknownLayer(String),
    Foreign {
        interface: String,
        filter: String,
    },
    Orphan {
        interface: String,
        filter: String,
    },
    Elsewhere {
        interface: String,
        filter: String,
        home: Place,
    },
    OtherNamespace(u64),
    Held(Held),
    Unconfirmed(Pending),
    NothingBefore,
    NothingToReturnTo(u32),
    NothingToConfirm(Option<Held>),
    /// The change that waits is not, or not everywhere, in place.
    Interrupted(u32),
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
                "{interface}: a filter of udplb whose pins are not in this pin directory is on \
                 ingress: {filter}; {}, {interface} is taken over with --force",
                pin_search::HOW_TO_FIND
            ),
            Refusal::Elsewhere { interface, filter, home } => write!(
                f,
                "{interface}: the filter of another udplb, whose pins are in {home}, is on \
                 ingress: {filter}; apply with that --pin-dir, or take it away with: {} detach -i \
                 {interface}",
                home.command()
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
                crate::time::utc(held.since),
                held.generation
            ),
            Refusal::Unconfirmed(pending) => write!(
                f,
                "generation {} waits for confirmation for {} s more; keep it with `udplb confirm` \
                 or undo it with `udplb rollback` first; --confirm replaces it, under a new \
                 deadline, and --force replaces it for good",
                pending.generation,
                pending.remaining().as_secs()
            ),
            Refusal::NothingBefore => {
                write!(f, "there is no earlier generation to roll back to")
            }
            Refusal::NothingToConfirm(None) => write!(f, "nothing waits for confirmation"),
            Refusal::NothingToConfirm(Some(held)) => write!(
                f,
                "nothing waits for confirmation; generation {} was rolled back at {}",
                held.generation,
                crate::time::utc(held.since)
            ),
            Refusal::Interrupted(number) => write!(
                f,
                "generation {number} is not on all of its interfaces: its apply was interrupted; \
                 apply it again, or undo it with `udplb rollback`"
            ),
            Refusal::NothingToReturnTo(number) => write!(
                f,
                "generation {number}, which serves now, has lost pins, so --confirm could not \
                 return to it; apply the file without --confirm"
            ),
        }
    }
}

/// Plans `apply`. `origin` is recorded in the new generation.
pub fn apply(
    observed: &Observed,
    desired: &Desired,
    origin: &Origin,
    force: bool,
) -> Result<Plan, Refusal> {
    apply_until(observed, desired, origin, force, None)
}

/// Like [`apply`]; with a deadline (time since boot) the change is pending until it is confirmed.
pub fn apply_until(
    observed: &Observed,
    desired: &Desired,
    origin: &Origin,
    force: bool,
    deadline: Option<Duration>,
) -> Result<Plan, Refusal> {
    replace(observed, desired, origin, &Request { force, deadline, moved: false })
}

/// Plans the renewal after a host name or `any` got other addresses: replaces the active
/// generation, and keeps those that a rollback returns to or holds.
pub fn renew(observed: &Observed, desired: &Desired, origin: &Origin) -> Result<Plan, Refusal> {
    replace(observed, desired, origin, &Request { force: false, deadline: None, moved: true })
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

/// Options for replacing one generation by another.
struct Request {
    force: bool,
    /// When it is rolled back unless it is confirmed.
    deadline: Option<Duration>,
    /// The configuration is the same; only addresses that it stands for have changed.
    moved: bool,
}

fn replace(
    observed: &Observed,
    desired: &Desired,
    origin: &Origin,
    request: &Request,
) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    let held = held(observed);
    if let Some((held, left)) = held
        && !request.force
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
    if !request.moved {
        actions.extend(await_missing(observed, desired));
    }
    // one that is not intact is dropped below, and nothing could be compared with it then
    let stays = held
        .filter(|(_, left)| left.intact && (request.moved || observed.serving() == Some(number)));
    if observed.held.is_some() && stays.is_none() {
        // before the swap: a crash after it must not leave what is held now held for ever
        actions.push(Action::SetHeld(None));
    }
    let interfaces: Vec<String> = match request.moved {
        false => to_attach(observed, desired),
        // one that it was taken off, or that is gone, is nothing that a name or address changes
        true => {
            let attached = observed.attached().map(|(name, _)| name.into());
            attached.chain(appeared(observed, desired)).collect()
        }
    };
    let mut swaps = Vec::new();
    switch(observed, number, &interfaces, request.force, &mut swaps)?;
    let changes = !actions.is_empty() || !swaps.is_empty();
    let pending = pending_after(observed, desired, number, request, changes)?;
    if pending.is_some() && pending != observed.pending {
        actions.push(Action::SetPending(pending));
    }
    actions.append(&mut swaps);
    if pending.is_none() && observed.pending.is_some() {
        insert_before_current(&mut actions, Action::SetPending(None));
    }
    let stays = stays.map(|(held, _)| held);
    let before = match observed.serving().and_then(|serving| observed.generations.get(&serving)) {
        _ if pending.is_some() => pending.and_then(|pending| pending.previous),
        // it is the same configuration: going back leads to the one before
        Some(serving)
            if request.moved
                || (serving.description.object == OBJECT_SHA256
                    && serving.description.desired.as_written() == desired.as_written()) =>
        {
            // one that has lost pins is of no use
            let same = Some(serving.number).filter(|_| serving.intact);
            before(observed, serving.number, stays).or(same)
        }
        Some(serving) if serving.number < number && serving.intact => Some(serving.number),
        _ => before(observed, number, stays),
    };
    let there = observed.generations.keys().chain(&observed.damaged);
    let others = there.filter(|other| ![Some(number), before].contains(&Some(**other)));
    actions.extend(others.copied().map(Action::Drop));
    Ok(Plan { generation: number, actions })
}

/// Returns the change that waits for confirmation once generation `number` is in place.
///
/// # Errors
/// One waits already, and this is another configuration; or there is nothing to return to.
fn pending_after(
    observed: &Observed,
    desired: &Desired,
    number: u32,
    request: &Request,
    changes: bool,
) -> Result<Option<Pending>, Refusal> {
    if let Some(deadline) = request.deadline {
        let previous = match observed.pending {
            Some(pending) => pending.previous,
            None if !changes => return Ok(None),
            None => previous(observed)?,
        };
        return Ok(Some(Pending { deadline, generation: number, previous }));
    }
    let Some(pending) = observed.pending else { return Ok(None) };
    let waiting = observed.generations.get(&pending.generation);
    let is_same =
        waiting.is_some_and(|it| it.description.desired.as_written() == desired.as_written());
    if request.moved || is_same {
        return Ok(Some(Pending { generation: number, ..pending }));
    }
    match request.force || pending.previous == Some(number) {
        true => Ok(None),
        false => Err(Refusal::Unconfirmed(pending)),
    }
}

/// Returns the generation that a change is rolled back to; `None`: no filter is attached.
fn previous(observed: &Observed) -> Result<Option<u32>, Refusal> {
    let Some(serving) = observed.serving().filter(|_| observed.attached().next().is_some()) else {
        return Ok(None);
    };
    let intact = observed.generations.get(&serving).is_some_and(|it| it.intact);
    if intact { Ok(Some(serving)) } else { Err(Refusal::NothingToReturnTo(serving)) }
}

/// The interfaces of a configuration, without those that are known to be missing.
fn to_attach(observed: &Observed, desired: &Desired) -> Vec<String> {
    let is_missing = |name: &&String| {
        desired.incomplete.interfaces.contains(name) && !observed.interfaces.contains_key(*name)
    };
    desired.interfaces.iter().filter(|name| !is_missing(name)).cloned().collect()
}

/// Has arpd attach to the missing interfaces of a configuration again, after a `detach`.
fn await_missing(observed: &Observed, desired: &Desired) -> Vec<Action> {
    let missing = desired
        .interfaces
        .iter()
        .filter(|name| !observed.interfaces.contains_key(*name) && observed.is_detached(name));
    let wait = |name: &String| Action::SetDetached { interface: name.clone(), detached: false };
    missing.map(wait).collect()
}

/// The interfaces that the generation that serves lacked, and `desired` does not lack any more.
fn appeared(observed: &Observed, desired: &Desired) -> Vec<String> {
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let lacked = serving.map_or(&[][..], |it| &it.description.desired.incomplete.interfaces);
    let is_empty = |name: &String| {
        let interface = observed.interfaces.get(name);
        interface.is_some_and(|interface| interface.hook.slot == Slot::Empty)
    };
    let lacked = lacked.iter().filter(|name| !desired.incomplete.interfaces.contains(name));
    lacked.map(|name| observed.canonical(name)).filter(is_empty).collect()
}

/// The generation that may serve as it is: an equal one, and none before the one that serves or
/// would be restored, so that going back keeps its direction.
fn reusable(observed: &Observed, desired: &Desired, clsact: &[String], l3: bool) -> Option<u32> {
    let restored = observed.pending.and_then(|pending| pending.previous);
    let least = restored.or(observed.serving()).unwrap_or(0);
    observed
        .generations
        .range(least..)
        .map(|(_, generation)| generation)
        .filter(|generation| generation.intact)
        .find(|Generation { description, .. }| {
            description.desired.serves(desired)
                && description.object == OBJECT_SHA256
                && description.clsact == clsact
                && description.program_l3.is_some() == l3
        })
        .map(|generation| generation.number)
}

/// Returns the generation that a rollback left, unless it is active again or gone.
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

/// Returns what `rollback` does: switch to the generation before, or back. A pending change is
/// undone, what `detach` took off is attached again, and a rollback that was interrupted is completed.
pub fn rollback(observed: &Observed, now: u64) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    if let Some(pending) = &observed.pending {
        return undo_pending(observed, pending, now);
    }
    if let Some(plan) = attach_detached(observed)? {
        return Ok(plan);
    }
    let held = held(observed);
    let serving = observed.serving();
    let number = match (serving, &held) {
        (Some(serving), Some((held, _))) if is_interrupted(observed, held) => Some(serving),
        (Some(serving), _) => before(observed, serving, held.map(|(held, _)| held)),
        // the first apply of all was rolled back
        (None, Some((held, left))) if left.intact => Some(held.generation),
        (None, _) => None,
    };
    let target = number.and_then(|number| observed.generations.get(&number));
    let target = target.ok_or(Refusal::NothingBefore)?;
    let mut actions = unfinished(observed);
    match serving {
        Some(serving) if serving == target.number => {}
        // before the swap: nothing may put back what a rollback has begun to leave
        Some(serving) => {
            actions.push(Action::SetHeld(Some(Held { generation: serving, since: now })));
        }
        None => actions.push(Action::SetHeld(None)),
    }
    let interfaces = to_attach(observed, &target.description.desired);
    switch(observed, target.number, &interfaces, false, &mut actions)?;
    Ok(Plan { generation: target.number, actions })
}

/// Undoes `detach`: what serves, or would, is attached again where it was taken off.
fn attach_detached(observed: &Observed) -> Result<Option<Plan>, Refusal> {
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let Some(serving) = serving.filter(|serving| serving.intact) else { return Ok(None) };
    let here = serving.description.desired.interfaces.iter();
    let here: Vec<String> =
        here.filter(|name| observed.interfaces.contains_key(*name)).cloned().collect();
    if !here.iter().any(|name| observed.is_detached(name)) {
        return Ok(None);
    }
    let mut actions = unfinished(observed);
    actions.extend(await_missing(observed, &serving.description.desired));
    switch(observed, serving.number, &here, false, &mut actions)?;
    Ok(Some(Plan { generation: serving.number, actions }))
}

/// Returns true if a rollback has held this generation and was interrupted before its end.
fn is_interrupted(observed: &Observed, held: &Held) -> bool {
    observed.current == Some(held.generation) || observed.is_attached(held.generation)
}

/// Restores what served before a pending change, and holds what is left.
fn undo_pending(observed: &Observed, pending: &Pending, now: u64) -> Result<Plan, Refusal> {
    let mut actions = unfinished(observed);
    let left = Some(pending.generation)
        .filter(|number| observed.is_attached(*number))
        .or(observed.serving().filter(|serving| Some(*serving) != pending.previous));
    if let Some(generation) = left {
        actions.push(Action::SetHeld(Some(Held { generation, since: now })));
    }
    match pending.previous {
        Some(number) => {
            let previous = observed.generations.get(&number).filter(|it| it.intact);
            let interfaces =
                &previous.ok_or(Refusal::NothingBefore)?.description.desired.interfaces;
            // one that has gone since must not keep the others on the unconfirmed generation
            let here = interfaces.iter().filter(|name| observed.interfaces.contains_key(*name));
            switch(observed, number, &Vec::from_iter(here.cloned()), false, &mut actions)?;
        }
        None => {
            let attached = observed.attached();
            actions.extend(attached.map(|(name, number)| detachment(observed, name, number)));
            if observed.current.is_some() {
                actions.push(Action::SetCurrent(None));
            }
        }
    }
    insert_before_current(&mut actions, Action::SetPending(None));
    Ok(Plan { generation: pending.previous.unwrap_or(0), actions })
}

/// Returns what `confirm` does: the pending change stays.
pub fn confirm(observed: &Observed) -> Result<Vec<Action>, Refusal> {
    refuse_other_namespace(observed)?;
    let held = observed.held;
    let Pending { generation, .. } = observed.pending.ok_or(Refusal::NothingToConfirm(held))?;
    let on_all = observed.attached().all(|(_, attached)| attached == generation);
    match on_all && observed.serving() == Some(generation) {
        true => Ok(vec![Action::SetPending(None)]),
        false => Err(Refusal::Interrupted(generation)),
    }
}

/// Returns what `detach` does: remove the filter from the named interfaces, or from all where none is
/// named. A purge also removes each clsact of ours that carries nothing else.
pub fn detach(
    observed: &Observed,
    interfaces: &[String],
    purge: bool,
) -> Result<Vec<Action>, Refusal> {
    refuse_other_namespace(observed)?;
    for name in interfaces {
        if !observed.interfaces.contains_key(name) {
            return Err(Refusal::NoInterface(name.clone()));
        }
    }
    let is_named = |name: &str| interfaces.is_empty() || interfaces.iter().any(|it| it == name);
    let mut actions: Vec<Action> = observed
        .attached()
        .filter(|(name, _)| is_named(name))
        .map(|(name, generation)| detachment(observed, name, generation))
        .collect();
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let meant = serving.map_or(&[][..], |serving| &serving.description.desired.interfaces);
    let missing = meant.iter().filter(|name| {
        is_named(name) && !observed.interfaces.contains_key(*name) && !observed.is_detached(name)
    });
    if !purge {
        let detached =
            |name: &String| Action::SetDetached { interface: name.clone(), detached: true };
        actions.extend(missing.map(detached));
    }
    // with nothing attached there is nothing to confirm, and nothing may be attached again
    let detaches = |action: &&Action| matches!(action, Action::Detach { .. });
    let detached = actions.iter().filter(detaches).count();
    if observed.pending.is_some() && detached == observed.attached().count() {
        actions.push(Action::SetPending(None));
    }
    if purge {
        let unused = observed.interfaces.iter().filter(|(name, interface)| {
            let hook = &interface.hook;
            hook.qdisc == Some(Qdisc::Clsact) && !hook.shared && made_clsact(observed, name)
        });
        let unused = unused.filter(|(name, _)| is_named(name));
        actions.extend(unused.map(|(name, _)| Action::DeleteClsact(name.clone())));
    }
    Ok(actions)
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

/// Returns true if the clsact is udplb's: the generation that is attached there says so, or what is
/// remembered of its detachment.
fn made_clsact(observed: &Observed, interface: &str) -> bool {
    let slot = observed.interfaces.get(interface).map(|interface| &interface.hook.slot);
    let Some(Slot::Generation(number)) = slot else {
        return observed.marks.get(interface).is_some_and(|mark| mark.clsact);
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
            Slot::Orphan { filter, home: Some(home), .. } => {
                let (interface, filter, home) = (name.clone(), filter.clone(), home.clone());
                return Err(Refusal::Elsewhere { interface, filter, home });
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
        actions.push(Action::SetCurrent(Some(number)));
    }
    Ok(())
}

fn detachment(observed: &Observed, interface: &str, generation: u32) -> Action {
    Action::Detach {
        interface: interface.into(),
        generation,
        clsact: made_clsact(observed, interface),
    }
}

fn insert_before_current(actions: &mut Vec<Action>, action: Action) {
    let at = actions
        .iter()
        .position(|action| matches!(action, Action::SetCurrent(_)))
        .unwrap_or(actions.len());
    actions.insert(at, action);
}
