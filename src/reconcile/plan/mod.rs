//! The actions that turn the observed state into the desired one. Pure.

mod refusal;
mod rollback;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::bpf::OBJECT_SHA256;
use crate::config::{Family, State, Xdp};
use crate::datapath::announcements::{self, Place};
use crate::datapath::description::{Generation, Origin};
use crate::datapath::generation::Draft;
use crate::datapath::hook::{Attachment, Hook, Slot};
use crate::datapath::state_maps::{Held, Pending};
use crate::datapath::xdp;
use crate::desired::Desired;
use crate::net::link::Layer;
use crate::net::qdisc::Qdisc;
use crate::reconcile::observe::{Interface, Observed};

pub use refusal::Refusal;
pub use rollback::{confirm, rollback};

/// One step of a plan. The executor runs them in order, and undoes those already done if one fails, up to
/// [`Action::SetCurrent`]. Later actions only clean up.
#[derive(Clone, Debug)]
pub enum Action {
    /// Removes a directory that a crash left half-built.
    RemoveUnfinished(String),
    /// Builds a generation under another name and renames it.
    Build(Box<Draft>),
    /// Writes the next hops of the generation's upstreams.
    WriteNextHops(u32),
    /// Copies the flows of the active generation to the tables of one that is not attached yet.
    CopyFlows {
        from: u32,
        to: u32,
    },
    AddClsact(String),
    /// Removes the tc filter that an interrupted handover has left beside the tcx link.
    EndHandover(String),
    /// The commit point of an interface.
    Attach {
        interface: String,
        generation: u32,
        attachment: Attachment,
        replaces: Slot,
    },
    Detach {
        interface: String,
        generation: u32,
        /// The clsact is udplb's, which is recorded. It stays.
        clsact: bool,
    },
    /// Attaches the generation's XDP program, once its program at tc is attached.
    AttachXdp {
        interface: String,
        generation: u32,
        mode: Xdp,
        replaces: xdp::Slot,
    },
    DetachXdp {
        interface: String,
        replaces: xdp::Slot,
    },
    /// Removes a clsact of udplb's that carries nothing.
    DeleteClsact(String),
    SetHeld(Option<Held>),
    SetPending(Option<Pending>),
    /// Stops or resumes arpd's attaching to an interface that is missing now.
    SetDetached {
        interface: String,
        detached: bool,
    },
    /// Sets the symlink `current`; `None` removes it: no generation is active.
    SetCurrent(Option<u32>),
    /// Sets or removes the override of an upstream's configured state.
    Override {
        /// For messages.
        upstream: String,
        id: u32,
        state: Option<State>,
    },
    /// Removes an announced address that arpd has put on an interface.
    TakeAddress(Place),
    /// Withdraws an address, or all, until the command that undoes it.
    SetWithdrawn {
        address: IpAddr,
        withdrawn: bool,
    },
    /// Waits until routers have followed a withdrawal.
    Settle(Duration),
    /// Moves the active generation's program from a tc filter to a tcx link or back. If both are the same, completes
    /// an interrupted handover.
    HandOver {
        interface: String,
        generation: u32,
        from: Attachment,
        to: Attachment,
    },
    /// Removes a generation that is not used.
    Drop(u32),
}

impl Action {
    /// Returns true for the actions behind the commit points: if one fails, the next apply makes up for it.
    pub fn is_clean_up(&self) -> bool {
        matches!(self, Action::HandOver { .. } | Action::Drop(_))
    }
}

/// A sequence of actions and the generation that is active afterwards.
#[derive(Clone, Debug)]
pub struct Plan {
    /// 0 for none.
    pub generation: u32,
    pub actions: Vec<Action>,
}

impl Plan {
    /// Returns the interfaces that a filter is attached to.
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

    /// Returns true if the change has to be confirmed.
    pub fn is_pending(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::SetPending(Some(_))))
    }

    /// Returns the change that is pending after the plan.
    pub fn pending(&self, observed: &Observed) -> Option<Pending> {
        let last = self.actions.iter().rev().find_map(|action| match action {
            Action::SetPending(pending) => Some(*pending),
            _ => None,
        });
        last.unwrap_or(observed.pending)
    }
}

/// Plans `apply`. `origin` is recorded in the new generation.
pub fn apply(
    observed: &Observed,
    desired: &Desired,
    origin: &Origin,
    force: bool,
) -> Result<Plan, Refusal> {
    apply_until(observed, &Arc::new(desired.clone()), origin, force, None)
}

/// Like [`apply`]; with a deadline (time since boot) the change is pending until it is confirmed.
pub fn apply_until(
    observed: &Observed,
    desired: &Arc<Desired>,
    origin: &Origin,
    force: bool,
    deadline: Option<Duration>,
) -> Result<Plan, Refusal> {
    replace(observed, desired, origin, &Replacement { force, deadline, moved: false })
}

/// Plans the renewal after a host name or `any` got other addresses: replaces the active
/// generation, and keeps those that a rollback returns to or holds.
pub fn renew(observed: &Observed, desired: &Desired, origin: &Origin) -> Result<Plan, Refusal> {
    let desired = Arc::new(desired.clone());
    replace(observed, &desired, origin, &Replacement { force: false, deadline: None, moved: true })
}

/// Plans to attach the active generation to interfaces that have lost it. Interfaces that are missing or
/// carry another filter are left alone.
pub fn attach_again(observed: &Observed, interfaces: &[String]) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    let number = observed.serving().ok_or(Refusal::NothingBefore)?;
    let mut actions = Vec::new();
    for name in interfaces {
        let Some(interface) = observed.interfaces.get(name) else { continue };
        let there = observed.generations.get(&number);
        let mut programs = there.into_iter().flat_map(|it| it.description.programs());
        let has_program = programs.any(|(layer, _)| Some(layer) == interface.layer);
        if !has_program || *interface.hook.slot() != Slot::Empty {
            continue;
        }
        attach(name, &interface.hook, number, &mut actions);
        let xdp = there.and_then(|it| it.description.desired.xdp.get(name));
        actions.extend(xdp.and_then(|mode| attach_xdp(name, &interface.xdp, number, *mode)));
    }
    Ok(Plan { generation: number, actions })
}

/// Options for replacing one generation by another.
struct Replacement {
    force: bool,
    /// Time since boot at which it is rolled back unless confirmed.
    deadline: Option<Duration>,
    /// The configuration is the same; only resolved addresses have changed.
    moved: bool,
}

fn replace(
    observed: &Observed,
    desired: &Arc<Desired>,
    origin: &Origin,
    request: &Replacement,
) -> Result<Plan, Refusal> {
    refuse_other_namespace(observed)?;
    let held = held(observed);
    if let Some((held, left)) = held
        && !request.force
        && left.description.desired.is_written_as(desired)
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
    // A generation that is not intact is dropped below, and could not be compared any more.
    let stays = held
        .filter(|(_, left)| left.intact && (request.moved || observed.serving() == Some(number)));
    if observed.held.is_some() && stays.is_none() {
        // Before the swap: after a crash later, the hold would stay for ever.
        actions.push(Action::SetHeld(None));
    }
    let interfaces: Vec<String> = match request.moved {
        false => to_attach(observed, desired),
        // New addresses do not attach interfaces that were detached or are gone.
        true => {
            let attached = observed.attached().map(|(name, _)| name.into());
            attached.chain(appeared(observed, desired)).collect()
        }
    };
    let mut swaps = Vec::new();
    switch(observed, number, (&interfaces, desired), request.force, &mut swaps)?;
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
    let kept = match pending {
        // a damaged one cannot be restored
        Some(pending) => pending.previous.filter(|previous| !observed.damaged.contains(previous)),
        None => fallback(observed, desired, number, request, stays),
    };
    let there = observed.generations.keys().chain(&observed.damaged);
    let others = there.filter(|other| ![Some(number), kept].contains(&Some(**other)));
    actions.extend(others.copied().map(Action::Drop));
    Ok(Plan { generation: number, actions })
}

/// Returns the generation that is kept for a rollback from generation `number`, which `desired` becomes.
fn fallback(
    observed: &Observed,
    desired: &Desired,
    number: u32,
    request: &Replacement,
    held: Option<Held>,
) -> Option<u32> {
    match observed.serving().and_then(|serving| observed.generations.get(&serving)) {
        // The same configuration: a rollback leads to the one before it.
        Some(serving)
            if request.moved
                || (serving.description.object == OBJECT_SHA256
                    && serving.description.desired.is_written_as(desired)) =>
        {
            // A generation that has lost pins cannot be restored.
            let same = Some(serving.number).filter(|_| serving.intact);
            before(observed, serving.number, held).or(same)
        }
        Some(serving) if serving.number < number && serving.intact => Some(serving.number),
        _ => before(observed, number, held),
    }
}

/// Returns the change that is pending once generation `number` is active.
///
/// # Errors
/// Another change is pending already, or there is nothing to return to.
fn pending_after(
    observed: &Observed,
    desired: &Desired,
    number: u32,
    request: &Replacement,
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
    let is_same = waiting.is_some_and(|it| it.description.desired.is_written_as(desired));
    if request.moved || is_same {
        return Ok(Some(Pending { generation: number, ..pending }));
    }
    match request.force || pending.previous == Some(number) {
        true => Ok(None),
        false => Err(Refusal::Unconfirmed(pending)),
    }
}

/// Returns the generation that a change is rolled back to; `None` if no filter is attached.
fn previous(observed: &Observed) -> Result<Option<u32>, Refusal> {
    let Some(serving) = observed.serving().filter(|_| observed.attached().next().is_some()) else {
        return Ok(None);
    };
    let intact = observed.generations.get(&serving).is_some_and(|it| it.intact);
    if intact { Ok(Some(serving)) } else { Err(Refusal::NothingToReturnTo(serving)) }
}

/// Returns the interfaces of a configuration without those that are recorded as missing.
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

/// Returns the interfaces that the active generation lacked and `desired` does not.
fn appeared(observed: &Observed, desired: &Desired) -> Vec<String> {
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let lacked = serving.map_or(&[][..], |it| &it.description.desired.incomplete.interfaces);
    let is_empty = |name: &String| {
        let interface = observed.interfaces.get(name);
        interface.is_some_and(|interface| *interface.hook.slot() == Slot::Empty)
    };
    let lacked = lacked.iter().filter(|name| !desired.incomplete.interfaces.contains(name));
    lacked.map(|name| observed.canonical(name)).filter(is_empty).collect()
}

/// Returns an equal generation that can be used again. It is not older than the active or the restored one,
/// so that a rollback keeps its direction.
fn reusable(observed: &Observed, desired: &Desired, clsact: &[String], l3: bool) -> Option<u32> {
    let restored = observed.pending.and_then(|pending| pending.previous);
    let min = restored.or(observed.serving()).unwrap_or(0);
    observed
        .generations
        .range(min..)
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

/// Returns the generation that a rollback from `number` leads to.
fn before(observed: &Observed, number: u32, held: Option<Held>) -> Option<u32> {
    let intact = |number: &u32| observed.generations.get(number).is_some_and(|it| it.intact);
    let held = held.map(|held| held.generation).filter(intact);
    held.or_else(|| {
        observed.generations.range(..number).rev().map(|(number, _)| *number).find(intact)
    })
}

/// Plans `detach`: removes the filter from the named interfaces, or from all if none is named. A purge also
/// removes each clsact of udplb's that carries nothing else.
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
    let mut actions = match observed.attached().all(|(name, _)| is_named(name)) {
        true => leave(observed),
        false => Vec::new(),
    };
    let named = observed.attached().filter(|(name, _)| is_named(name));
    actions.extend(xdp_detachments(observed, |name| !is_named(name)));
    actions.extend(named.map(|(name, generation)| detachment(observed, name, generation)));
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
    // Without a filter nothing can be confirmed, and a timeout must not attach one again.
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

/// Plans the end of the announcement before the filter goes: all addresses are removed, and routers get
/// the time to send elsewhere while packets are still forwarded.
fn leave(observed: &Observed) -> Vec<Action> {
    let placed = observed.announcements.placed.keys();
    let mut actions: Vec<Action> = placed.copied().map(Action::TakeAddress).collect();
    let serving = observed.serving().and_then(|number| observed.generations.get(&number));
    let announce = serving.and_then(|serving| serving.description.desired.announce.as_ref());
    if let Some(announce) = announce.filter(|_| !actions.is_empty()) {
        actions.push(Action::Settle(announce.settle.into()));
    }
    actions
}

/// Plans `withdraw`: removes the addresses from their interfaces, and keeps arpd from putting them back.
pub fn withdraw(observed: &Observed, addresses: &[IpAddr]) -> Vec<Action> {
    let records = &observed.announcements;
    let is_named =
        |address: &IpAddr| addresses.contains(address) || addresses.contains(&announcements::ALL);
    let new = addresses.iter().filter(|address| !records.withdrawn.contains_key(*address));
    let withdrawn = new.map(|address| Action::SetWithdrawn { address: *address, withdrawn: true });
    let placed = records.placed.keys().filter(|(address, _)| is_named(address));
    withdrawn.chain(placed.copied().map(Action::TakeAddress)).collect()
}

/// Plans `announce` with addresses: ends their withdrawal.
pub fn restore(observed: &Observed, addresses: &[IpAddr]) -> Vec<Action> {
    let records = &observed.announcements;
    let known = addresses.iter().filter(|address| records.withdrawn.contains_key(*address));
    known.map(|address| Action::SetWithdrawn { address: *address, withdrawn: false }).collect()
}

/// Refuses pins that belong to another network namespace.
pub fn refuse_other_namespace(observed: &Observed) -> Result<(), Refusal> {
    let other = observed
        .generations
        .values()
        .map(|generation| generation.description.namespace)
        .find(|namespace| *namespace != observed.namespace);
    other.map_or(Ok(()), |namespace| Err(Refusal::OtherNamespace(namespace)))
}

/// Returns a number that no generation has, and that no record refers to.
fn next_number(observed: &Observed) -> u32 {
    let held = observed.held.as_ref().map(|held| &held.generation);
    let numbers = observed.generations.keys().chain(&observed.damaged).chain(&observed.current);
    numbers.chain(held).max().map_or(1, |number| number + 1)
}

fn unfinished(observed: &Observed) -> Vec<Action> {
    observed.unfinished.iter().cloned().map(Action::RemoveUnfinished).collect()
}

/// Returns the interfaces whose clsact is udplb's once `desired` is applied.
fn clsact_after(observed: &Observed, desired: &Desired) -> Vec<String> {
    let ours = |name: &&String| {
        let interface = observed.interfaces.get(*name);
        interface.is_some_and(|it| lacks_clsact(&it.hook)) || made_clsact(observed, name)
    };
    desired.interfaces.iter().filter(ours).cloned().collect()
}

/// Returns true if our program needs a clsact that is not there.
fn lacks_clsact(hook: &Hook) -> bool {
    hook.attachment == Attachment::Filter && hook.qdisc.is_none()
}

/// Returns true if the clsact is udplb's, by the generation that is attached there or by the mark of its
/// detachment.
fn made_clsact(observed: &Observed, interface: &str) -> bool {
    let slot = observed.interfaces.get(interface).map(|interface| interface.hook.slot());
    let Some(Slot::Generation(number)) = slot else {
        return observed.marks.get(interface).is_some_and(|mark| mark.clsact);
    };
    let generation = observed.generations.get(number);
    generation.is_some_and(|it| it.description.clsact.iter().any(|name| name == interface))
}

/// Attaches a generation, which `desired` is or becomes, to `interfaces`, and detaches from all others.
fn switch(
    observed: &Observed,
    number: u32,
    (interfaces, desired): (&[String], &Desired),
    force: bool,
    actions: &mut Vec<Action>,
) -> Result<(), Refusal> {
    let keeps_xdp =
        |name: &str| interfaces.iter().any(|it| it == name) && desired.xdp.contains_key(name);
    // First: a program of the generation before must not answer for this one.
    let mut attachments: Vec<Action> = xdp_detachments(observed, keeps_xdp).collect();
    let mut handovers = Vec::new();
    for name in interfaces {
        let interface =
            observed.interfaces.get(name).ok_or_else(|| Refusal::NoInterface(name.clone()))?;
        if interface.layer.is_none() {
            return Err(Refusal::UnknownLayer(name.clone()));
        }
        let hook = &interface.hook;
        refuse_taken(name, hook.slot(), force)?;
        attach(name, hook, number, &mut attachments);
        if let Some(mode) = desired.xdp.get(name) {
            refuse_xdp(name, interface)?;
            attachments.extend(attach_xdp(name, &interface.xdp, number, *mode));
        }
        handovers.extend(handover(name, hook, number));
    }
    let detachments = observed
        .attached()
        .filter(|(name, _)| !interfaces.iter().any(|wanted| wanted == name))
        .map(|(name, generation)| detachment(observed, name, generation));
    attachments.extend(detachments);
    if !attachments.is_empty() {
        actions.push(Action::WriteNextHops(number));
        actions.extend(copy_flows(observed, number, desired));
        actions.append(&mut attachments);
    }
    if observed.current != Some(number) {
        actions.push(Action::SetCurrent(Some(number)));
    }
    actions.append(&mut handovers);
    Ok(())
}

/// Copies flows where the tables have another size, or may have another layout; `None`: they are the same, or there is
/// nothing to copy.
fn copy_flows(observed: &Observed, number: u32, desired: &Desired) -> Option<Action> {
    let from = observed.serving().filter(|from| *from != number)?;
    let (serving, there) = (observed.generations.get(&from)?, observed.generations.get(&number));
    let before = &serving.description.desired;
    let object = there.map_or(OBJECT_SHA256, |it| &it.description.object);
    let is_same =
        before.flows.entries == desired.flows.entries && serving.description.object == object;
    let both = |family| before.has_flows(family) && desired.has_flows(family);
    let has_flows = both(Family::V4) || both(Family::V6);
    // where the generation is attached, its tables are in use
    let copies = has_flows && !is_same && !observed.is_attached(number);
    copies.then_some(Action::CopyFlows { from, to: number })
}

/// Refuses an interface on which a program that is not ours has our place.
fn refuse_taken(name: &str, slot: &Slot, force: bool) -> Result<(), Refusal> {
    let interface = name.to_string();
    match slot.clone() {
        Slot::Foreign(filter) => Err(Refusal::Foreign { interface, filter }),
        Slot::Orphan { filter, home: Some(home), .. } => {
            Err(Refusal::Elsewhere { interface, filter, home })
        }
        Slot::Orphan { filter, .. } if !force => Err(Refusal::Orphan { interface, filter }),
        _ => Ok(()),
    }
}

/// Attaches a generation, as what is there is attached now; a handover comes later.
fn attach(name: &str, hook: &Hook, number: u32, actions: &mut Vec<Action>) {
    let interface = name.to_string();
    if lacks_clsact(hook) {
        actions.push(Action::AddClsact(interface.clone()));
    }
    if hook.is_double() {
        actions.push(Action::EndHandover(interface.clone()));
    }
    if *hook.slot() != Slot::Generation(number) {
        let (generation, replaces) = (number, hook.slot().clone());
        let attachment = hook.present().unwrap_or(hook.attachment);
        actions.push(Action::Attach { interface, generation, attachment, replaces });
    }
}

/// Attaches the XDP program of a generation; `None`: it is there.
fn attach_xdp(name: &str, there: &xdp::Slot, number: u32, mode: Xdp) -> Option<Action> {
    let wanted = xdp::Slot::Own { generation: Some(number), mode };
    let (interface, generation) = (name.into(), number);
    let replaces = there.clone();
    (*there != wanted).then_some(Action::AttachXdp { interface, generation, mode, replaces })
}

/// Removes our XDP programs from the interfaces that do not keep them.
fn xdp_detachments(
    observed: &Observed,
    keeps: impl Fn(&str) -> bool,
) -> impl Iterator<Item = Action> {
    observed.interfaces.iter().filter_map(move |(name, interface)| {
        let is_own = matches!(interface.xdp, xdp::Slot::Own { .. });
        let (interface, replaces) = (name.clone(), interface.xdp.clone());
        (is_own && !keeps(name)).then_some(Action::DetachXdp { interface, replaces })
    })
}

/// Refuses XDP where another's program is, and on interfaces without an Ethernet header.
fn refuse_xdp(name: &str, interface: &Interface) -> Result<(), Refusal> {
    let (interface, program) = match (&interface.xdp, interface.layer) {
        (xdp::Slot::Other(program), _) => (name.into(), program.clone()),
        (_, Some(Layer::Ethernet)) => return Ok(()),
        _ => return Err(Refusal::NoXdp(name.into())),
    };
    Err(Refusal::ForeignXdp { interface, program })
}

/// Moves the program to where it belongs, once a generation serves; `None`: it is there already.
fn handover(name: &str, hook: &Hook, number: u32) -> Option<Action> {
    let to = hook.attachment;
    let from = hook.present().unwrap_or(to);
    let is_left = hook.handover && *hook.slot() == Slot::Generation(number);
    let (interface, generation) = (name.into(), number);
    (from != to || is_left).then_some(Action::HandOver { interface, generation, from, to })
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
        .position(|action| matches!(action, Action::SetCurrent(_)) || action.is_clean_up())
        .unwrap_or(actions.len());
    actions.insert(at, action);
}
