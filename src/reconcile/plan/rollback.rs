//! Plans for `rollback` and `confirm`.

use super::{
    Action, Plan, Refusal, await_missing, before, detachment, held, insert_before_current,
    refuse_other_namespace, switch, to_attach, unfinished, xdp_detachments,
};
use crate::datapath::state_maps::{Held, Pending};
use crate::reconcile::observe::Observed;

/// Plans `rollback`: undoes a pending change, attaches what `detach` took off, completes an interrupted
/// rollback, or else switches to the previous generation, or back.
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
        // The very first apply was rolled back.
        (None, Some((held, left))) if left.intact => Some(held.generation),
        (None, _) => None,
    };
    let target = number.and_then(|number| observed.generations.get(&number));
    let target = target.ok_or(Refusal::NothingBefore)?;
    let mut actions = unfinished(observed);
    match serving {
        Some(serving) if serving == target.number => {}
        // Before the swap: nothing may restore a generation that a rollback has begun to leave.
        Some(serving) => {
            actions.push(Action::SetHeld(Some(Held { generation: serving, since: now })));
        }
        None => actions.push(Action::SetHeld(None)),
    }
    let interfaces = to_attach(observed, &target.description.desired);
    let place = (&interfaces[..], &*target.description.desired);
    switch(observed, target.number, place, false, &mut actions)?;
    Ok(Plan { generation: target.number, actions })
}

/// Attaches the active generation where `detach` took it off.
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
    let place = (&here[..], &*serving.description.desired);
    switch(observed, serving.number, place, false, &mut actions)?;
    Ok(Some(Plan { generation: serving.number, actions }))
}

/// Returns true if the rollback that holds this generation was interrupted.
fn is_interrupted(observed: &Observed, held: &Held) -> bool {
    observed.current == Some(held.generation) || observed.is_attached(held.generation)
}

/// Restores the generation before a pending change, and holds the one that it leaves.
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
            let desired = &previous.ok_or(Refusal::NothingBefore)?.description.desired;
            // A missing interface must not keep the others on the unconfirmed generation.
            let here = desired.interfaces.iter();
            let here = here.filter(|name| observed.interfaces.contains_key(*name)).cloned();
            let place = (&Vec::from_iter(here)[..], desired.as_ref());
            switch(observed, number, place, false, &mut actions)?;
        }
        None => {
            actions.extend(xdp_detachments(observed, |_| false));
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

/// Plans `confirm`: the pending change stays.
pub fn confirm(observed: &Observed) -> Result<Vec<Action>, Refusal> {
    refuse_other_namespace(observed)?;
    let nothing = || observed.held.map_or(Refusal::NothingToConfirm, Refusal::RolledBack);
    let Pending { generation, .. } = observed.pending.ok_or_else(nothing)?;
    let on_all = observed.attached().all(|(_, attached)| attached == generation);
    match on_all && observed.serving() == Some(generation) {
        true => Ok(vec![Action::SetPending(None)]),
        false => Err(Refusal::Interrupted(generation)),
    }
}
