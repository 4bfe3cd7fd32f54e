//! Executes plans: the only place where udplb changes the kernel.

use std::cell::OnceCell;
use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, anyhow};
use foldhash::HashMap;

use crate::config::{State, Xdp};
use crate::datapath::description::{Generation, Origin};
use crate::datapath::environment::Environment;
use crate::datapath::flows::{self, Copied};
use crate::datapath::hook::{self, Attachment, Slot};
use crate::datapath::marks::Mark;
use crate::datapath::pins::WriteGuard;
use crate::datapath::spares::{self, Situation};
use crate::datapath::state_maps::{self, INCOMPLETE, StateMaps};
use crate::datapath::{announcements, generation, handover, nexthops, retired, tc, tcx, xdp};
use crate::net::Netlink;
use crate::net::nexthop::NextHop;
use crate::net::routing::Target;
use crate::reconcile::observe::Observed;
use crate::reconcile::plan::{Action, Plan, Refusal};

/// Called before each action; an error counts as a failure of the action.
pub type Observer<'a> = &'a mut dyn FnMut(&Action) -> anyhow::Result<()>;

/// The result of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    pub changed: bool,
    /// The active generation; 0 if none.
    pub generation: u32,
    /// The previously active generation.
    pub previous: Option<u32>,
    /// Counters start at zero: there were none, or their map had gone.
    pub counters_reset: bool,
}

/// Executes a plan. Next hops are refreshed even if the plan is empty.
pub async fn reconcile(
    guard: &WriteGuard,
    netlink: &Netlink,
    observed: &Observed,
    plan: &Plan,
    ways: &HashMap<Target, NextHop>,
) -> anyhow::Result<Outcome> {
    let mut executor = Executor::new(guard, netlink, observed, ways);
    executor.run(&plan.actions, &mut log).await?;
    let written = plan.actions.iter().any(|action| matches!(action, Action::WriteNextHops(_)));
    if !written && plan.generation != 0 {
        executor.refresh(plan.generation).await?;
    }
    Ok(Outcome {
        changed: !plan.actions.is_empty(),
        generation: plan.generation,
        previous: observed.serving(),
        counters_reset: executor.counters_reset,
    })
}

/// Counts that arpd has attached the filter of an interface again.
pub fn count_reattached(
    guard: &WriteGuard,
    observed: &Observed,
    interface: &str,
) -> anyhow::Result<()> {
    let Some(maps) = state_maps::open(guard)? else { return Ok(()) };
    let index = observed.interfaces.get(interface).map_or(0, |interface| interface.index);
    let before = maps.marks.get(interface)?.unwrap_or_default();
    // For a new interface of the same name only the count is kept.
    let mark = if before.index == index { before } else { Mark { index, ..Mark::default() } };
    let mark = Mark { reattached: before.reattached + 1, ..mark };
    maps.marks.set(guard, interface, Some(mark))
}

/// Records the file that a generation was applied from this time, if it is another one. Drift is detected
/// by it.
pub fn record_origin(
    guard: &WriteGuard,
    observed: &Observed,
    number: u32,
    origin: &Origin,
) -> anyhow::Result<()> {
    let known = observed.generations.get(&number).map(|it| &it.description.origin);
    if known.is_none_or(|known| known == origin) {
        return Ok(());
    }
    state_maps::open(guard)?.map_or(Ok(()), |maps| maps.set_origin(number, origin))
}

/// An observer that logs each action.
pub fn log(action: &Action) -> anyhow::Result<()> {
    log::info!("{}", describe(action));
    Ok(())
}

/// The state that the executor works on.
pub struct Executor<'a> {
    guard: &'a WriteGuard,
    netlink: &'a Netlink,
    before: &'a Observed,
    built: Option<Generation>,
    dropped: BTreeSet<u32>,
    ways: &'a HashMap<Target, NextHop>,
    maps: OnceCell<StateMaps>,
    /// Counters start at zero: there were none, or their map had gone.
    pub counters_reset: bool,
}

impl<'a> Executor<'a> {
    /// `before` is the state that the plan was made from, `ways` are the next hops of its upstreams.
    pub fn new(
        guard: &'a WriteGuard,
        netlink: &'a Netlink,
        before: &'a Observed,
        ways: &'a HashMap<Target, NextHop>,
    ) -> Executor<'a> {
        let (built, dropped, maps) = (None, BTreeSet::new(), OnceCell::new());
        Executor { guard, netlink, before, built, dropped, ways, maps, counters_reset: false }
    }

    /// Returns the maps that outlive generations; `None` if one of them is missing. They are opened once, since
    /// nobody else changes them under the guard.
    fn maps(&self) -> anyhow::Result<Option<&StateMaps>> {
        if self.maps.get().is_none()
            && let Some(maps) = state_maps::open(self.guard)?
        {
            self.maps.get_or_init(|| maps);
        }
        Ok(self.maps.get())
    }

    fn generation(&self, number: u32) -> Option<&Generation> {
        let built = self.built.as_ref().filter(|built| built.number == number);
        built.or_else(|| self.before.generations.get(&number))
    }

    /// Executes actions.
    ///
    /// # Errors
    /// The first action that failed; those before it were undone, in reverse.
    pub async fn run(&mut self, actions: &[Action], observer: Observer<'_>) -> anyhow::Result<()> {
        let committed = actions.iter().position(Action::is_clean_up).unwrap_or(actions.len());
        let (change, clean_up) = actions.split_at(committed);
        let mut undo = Vec::new();
        for action in change {
            let done = match observer(action) {
                Ok(()) => self.act(action).await.with_context(|| describe(action)),
                Err(error) => Err(error),
            };
            match done {
                Ok(undoing) => undo.extend(undoing),
                Err(error) => {
                    self.undo(undo).await;
                    return Err(error);
                }
            }
        }
        for action in clean_up {
            let done = match observer(action) {
                Ok(()) => self.act(action).await.map(drop),
                Err(error) => Err(error),
            };
            // The generation is active already; the next apply cleans up.
            if let Err(error) = done {
                log::warn!("{}: {error:#}", describe(action));
            }
        }
        Ok(())
    }

    async fn act(&mut self, action: &Action) -> anyhow::Result<Option<Undo>> {
        match action {
            Action::RemoveUnfinished(name) => {
                self.guard.remove_unfinished(name)?;
                Ok(None)
            }
            Action::Build(draft) => {
                let others: Vec<&Generation> = self.before.generations.values().collect();
                let others = (&others[..], self.before.serving());
                let built = generation::build(self.guard, draft, others)?;
                self.counters_reset = built.counters_reset && !others.0.is_empty();
                self.built = Some(built.generation);
                self.maps = OnceCell::new();
                if let Err(error) = tcx::sweep(self.guard) {
                    log::warn!("{error:#}");
                }
                Ok(Some(Undo::Drop(draft.number)))
            }
            Action::WriteNextHops(number) => {
                self.refresh(*number).await?;
                Ok(None)
            }
            Action::CopyFlows { from, to } => {
                self.copy_flows(*from, *to)?;
                // nothing reads them
                Ok(None)
            }
            Action::AddClsact(interface) => {
                tc::add_clsact(self.guard, self.netlink, self.index(interface)?).await?;
                Ok(Some(Undo::DeleteClsact(interface.clone())))
            }
            Action::DeleteClsact(interface) => {
                let index = self.index(interface)?;
                tc::delete_unused_clsact(self.guard, self.netlink, index).await?;
                Ok(None)
            }
            Action::EndHandover(interface) => {
                handover::end(self.guard, self.netlink, self.index(interface)?).await?;
                Ok(None)
            }
            Action::Attach { interface, generation, attachment, replaces } => {
                self.attach(interface, *generation, *attachment, replaces).await.map(Some)
            }
            Action::Detach { interface, generation, clsact } => {
                self.detach(interface, *generation, *clsact).await
            }
            Action::AttachXdp { interface, generation, mode, replaces } => {
                self.attach_xdp(interface, *generation, *mode, replaces).map(Some)
            }
            Action::DetachXdp { interface, replaces } => {
                let before = self.replaced_xdp(replaces);
                xdp::detach(self.guard, self.index(interface)?)?;
                Ok(Some(Undo::Xdp { interface: interface.clone(), before }))
            }
            Action::SetDetached { interface, detached } => {
                self.mark(interface, |mark| mark.detached = *detached)?;
                Ok(Some(Undo::RestoreMark(interface.clone())))
            }
            Action::SetHeld(held) => {
                let maps = self.maps()?.context(INCOMPLETE)?;
                maps.set_held(*held)?;
                Ok(Some(Undo::SetHeld))
            }
            Action::SetPending(pending) => {
                let maps = self.maps()?.context(INCOMPLETE)?;
                maps.set_pending(*pending)?;
                Ok(Some(Undo::SetPending))
            }
            Action::SetCurrent(number) => {
                self.guard.set_current(*number)?;
                Ok(Some(Undo::SetCurrent))
            }
            Action::Override { id, state, .. } => {
                self.set_override(*id, *state)?;
                Ok(Some(Undo::Override(*id)))
            }
            Action::TakeAddress(place @ (address, ifindex)) => {
                let maps = self.maps()?.context(INCOMPLETE)?;
                self.netlink.remove_address(*ifindex, *address).await?;
                maps.announcements.forget(self.guard, *place)?;
                // arpd puts it back
                Ok(None)
            }
            Action::SetWithdrawn { address, withdrawn } => {
                self.set_withdrawn(*address, *withdrawn)?;
                Ok(Some(Undo::SetWithdrawn(*address)))
            }
            Action::Settle(time) => {
                tokio::time::sleep(*time).await;
                Ok(None)
            }
            Action::HandOver { interface, generation, from, to } => {
                self.hand_over(interface, *generation, (*from, *to)).await?;
                Ok(None)
            }
            Action::Drop(number) => {
                self.drop(*number)?;
                self.dropped.insert(*number);
                Ok(None)
            }
        }
    }

    /// Copies flows to the tables of a generation that is not attached yet.
    fn copy_flows(&self, from: u32, to: u32) -> anyhow::Result<()> {
        let generation = |number| self.generation(number).context("no such generation");
        let Copied { flows, lost } = flows::copy(self.guard, generation(from)?, generation(to)?)?;
        log::info!("{flows} flows copied");
        if lost > 0 {
            log::warn!("{lost} of {} flows have no room in the new table: they end", flows + lost);
        }
        Ok(())
    }

    async fn attach(
        &self,
        interface: &str,
        generation: u32,
        attachment: Attachment,
        replaces: &Slot,
    ) -> anyhow::Result<Undo> {
        let before = self.replaced(interface, replaces);
        let program = self.program(interface, generation)?;
        let index = self.index(interface)?;
        // First, so that arpd attaches if this process dies between the two.
        self.mark(interface, |mark| mark.detached = false)?;
        // One of a handover is another program than the generation's.
        let is_handover = self.before.interfaces[interface].hook.handover;
        let old = before.as_ref().filter(|_| !is_handover).map(OwnedFd::as_fd);
        let place = (*replaces != Slot::Empty, old);
        let done = self.put(self.netlink, index, attachment, program.as_fd(), place).await;
        if done.is_err() {
            self.restore_mark(interface)?;
        }
        let interface = interface.to_string();
        done.map(|()| match before {
            Some(program) => Undo::Attach { interface, attachment, program, replaces: true },
            None => Undo::Detach { interface, attachment, program },
        })
    }

    async fn put(
        &self,
        netlink: &Netlink,
        index: u32,
        attachment: Attachment,
        program: BorrowedFd<'_>,
        place: (bool, Option<BorrowedFd<'_>>),
    ) -> anyhow::Result<()> {
        hook::attach(self.guard, netlink, index, attachment, program, place).await
    }

    async fn detach(
        &self,
        interface: &str,
        generation: u32,
        clsact: bool,
    ) -> anyhow::Result<Option<Undo>> {
        let program = self.program(interface, generation).ok();
        let index = self.index(interface)?;
        let hook = &self.before.interfaces[interface].hook;
        let attachment = hook.present().context("nothing is attached")?;
        // First, so that arpd never finds a missing filter without the mark.
        self.mark(interface, |mark| *mark = Mark { index, detached: true, clsact, ..*mark })?;
        if hook.is_double() {
            handover::end(self.guard, self.netlink, index).await?;
        }
        let there = program.as_ref().map(OwnedFd::as_fd);
        let done = hook::detach(self.guard, self.netlink, index, attachment, there).await;
        if done.is_err() {
            self.restore_mark(interface)?;
        }
        let interface = interface.into();
        done.map(|()| {
            program.map(|program| Undo::Attach { interface, attachment, program, replaces: false })
        })
    }

    fn set_withdrawn(&self, address: IpAddr, withdrawn: bool) -> anyhow::Result<()> {
        let maps = self.maps()?.context(INCOMPLETE)?;
        match withdrawn {
            true => maps.announcements.withdraw(self.guard, address),
            false => maps.announcements.restore(self.guard, address),
        }
    }

    fn attach_xdp(
        &self,
        interface: &str,
        generation: u32,
        mode: Xdp,
        replaces: &xdp::Slot,
    ) -> anyhow::Result<Undo> {
        let before = self.replaced_xdp(replaces);
        let program = generation::xdp_program(self.guard, generation)?;
        let there = match replaces {
            xdp::Slot::Own { mode, .. } => Some(*mode),
            _ => None,
        };
        xdp::attach(self.guard, self.index(interface)?, program.as_fd(), mode, there)?;
        Ok(Undo::Xdp { interface: interface.into(), before })
    }

    /// Opens the XDP program that another takes the place of.
    fn replaced_xdp(&self, replaces: &xdp::Slot) -> Option<(OwnedFd, Xdp)> {
        match replaces {
            xdp::Slot::Own { generation: Some(number), mode } => {
                Some((generation::xdp_program(self.guard, *number).ok()?, *mode))
            }
            _ => None,
        }
    }

    async fn hand_over(
        &self,
        interface: &str,
        number: u32,
        ends: (Attachment, Attachment),
    ) -> anyhow::Result<()> {
        let program = self.program(interface, number)?;
        let index = self.index(interface)?;
        let (directory, program) = (self.guard.generation(number), program.as_fd());
        handover::hand_over(self.guard, self.netlink, index, (&directory, program), ends).await
    }

    /// Opens the program that an attachment replaces.
    fn replaced(&self, interface: &str, replaces: &Slot) -> Option<OwnedFd> {
        match replaces {
            Slot::Generation(number) => self.program(interface, *number).ok(),
            Slot::Orphan { program, .. } => libbpf_rs::Program::fd_from_id(*program).ok(),
            _ => None,
        }
    }

    /// Changes the mark of an interface; does nothing if the state maps are missing.
    fn mark(&self, interface: &str, change: impl FnOnce(&mut Mark)) -> anyhow::Result<()> {
        let Some(maps) = self.maps()? else { return Ok(()) };
        let before = self.before.marks.get(interface).copied();
        let mut mark = before.unwrap_or_default();
        change(&mut mark);
        match before.unwrap_or_default() == mark {
            true => Ok(()),
            false => maps.marks.set(self.guard, interface, Some(mark)),
        }
    }

    fn restore_mark(&self, interface: &str) -> anyhow::Result<()> {
        let Some(maps) = self.maps()? else { return Ok(()) };
        maps.marks.set(self.guard, interface, self.before.marks.get(interface).copied())
    }

    fn index(&self, interface: &str) -> anyhow::Result<u32> {
        let found = self.before.interfaces.get(interface);
        found.map(|interface| interface.index).with_context(|| format!("no interface {interface}"))
    }

    /// Opens the program of a generation for an interface. Its pin alone is enough.
    fn program(&self, interface: &str, number: u32) -> anyhow::Result<OwnedFd> {
        let layer = self.before.interfaces.get(interface).and_then(|interface| interface.layer);
        let layer = layer.with_context(|| Refusal::UnknownLayer(interface.into()).to_string())?;
        match self.generation(number) {
            Some(generation) => generation::program(self.guard, generation, layer),
            None => generation::open_program(&self.guard.generation(number), layer),
        }
    }

    /// Writes the maps besides a generation's own tables: next hops, replacements of upstreams that cannot
    /// be selected, and this host's addresses and VLANs.
    async fn refresh(&self, number: u32) -> anyhow::Result<()> {
        let generation = self.generation(number).context("no such generation")?;
        let maps = self.maps()?.context(INCOMPLETE)?;
        let (desired, ids) = generation.hosts();
        nexthops::write(&maps.nexthops, desired, ids, self.ways).context("next hops")?;
        let situation = Situation::read(maps, generation.ids().max().unwrap_or(0))?;
        spares::write(self.guard, number, (desired, ids), &[&situation], None, &maps.gate)?;
        if !desired.xdp.is_empty() {
            let links = self.netlink.links().await.context("interfaces")?;
            let directory = self.guard.generation(number);
            xdp::write_devices(&directory, &desired.xdp, &links, &maps.gate)?;
        }
        let environment = Environment::read(self.netlink).await.context("addresses")?;
        environment.write(maps, self.generations().map(|it| it.hosts().0), false)
    }

    /// Overrides the state of an upstream. Its replacements are written before the state changes, and again
    /// after it.
    fn set_override(&self, id: u32, state: Option<State>) -> anyhow::Result<()> {
        let maps = self.maps()?.context(INCOMPLETE)?;
        let max = self.generations().flat_map(Generation::ids).max().unwrap_or(0);
        let before = Situation::read(maps, max)?;
        let mut after = before.clone();
        match state {
            Some(state) => after.overrides.insert(id, state),
            None => after.overrides.remove(&id),
        };
        let write = |situations: &[&Situation]| {
            let changed = Some(&HashSet::from([id]));
            self.generations().try_for_each(|it| {
                spares::write(self.guard, it.number, it.hosts(), situations, changed, &maps.gate)
            })
        };
        write(&[&before, &after])?;
        maps.overrides.set(self.guard, id, state)?;
        if state != Some(State::Drained) {
            maps.probes.forgive(id)?;
        }
        write(&[&after])
    }

    /// Returns the generations that exist.
    fn generations(&self) -> impl Iterator<Item = &Generation> {
        let before = self.before.generations.values();
        before.chain(&self.built).filter(|it| !self.dropped.contains(&it.number))
    }

    /// Removes a generation, whose counters are kept for the rules of other generations.
    fn drop(&self, number: u32) -> anyhow::Result<()> {
        let (gone, others): (Vec<_>, Vec<_>) =
            self.generations().partition(|it| it.number == number);
        if let (Some(maps), [gone]) = (self.maps()?, &gone[..]) {
            // a packet may still be on its way through the program of a filter that was just replaced
            if self.before.is_attached(number) || !self.before.generations.contains_key(&number) {
                maps.counters.settle()?;
            }
            retired::keep(self.guard, &maps.counters, gone, &others)?;
        }
        generation::drop(self.guard, number)
    }

    async fn undo(&self, steps: Vec<Undo>) {
        if steps.is_empty() {
            return;
        }
        // The connection itself may have failed.
        let anew = Netlink::open();
        let netlink = anew.as_ref().unwrap_or(self.netlink);
        for step in steps.into_iter().rev() {
            if let Err(error) = self.undo_step(netlink, &step).await {
                log::error!("undoing it: {error:#}");
            }
        }
    }

    async fn undo_step(&self, netlink: &Netlink, step: &Undo) -> anyhow::Result<()> {
        match step {
            Undo::Drop(number) => self.drop(*number),
            Undo::DeleteClsact(interface) => {
                tc::delete_unused_clsact(self.guard, netlink, self.index(interface)?).await
            }
            Undo::Detach { interface, attachment, program } => {
                let (index, program) = (self.index(interface)?, Some(program.as_fd()));
                hook::detach(self.guard, netlink, index, *attachment, program).await?;
                self.restore_mark(interface)
            }
            Undo::Attach { interface, attachment, program, replaces } => {
                let index = self.index(interface)?;
                let place = (*replaces, None);
                self.put(netlink, index, *attachment, program.as_fd(), place).await?;
                self.restore_mark(interface)
            }
            Undo::Xdp { interface, before } => {
                let index = self.index(interface)?;
                match before {
                    Some((program, mode)) => {
                        xdp::attach(self.guard, index, program.as_fd(), *mode, None)
                    }
                    None => xdp::detach(self.guard, index),
                }
            }
            Undo::SetHeld => {
                let maps = self.maps()?.ok_or_else(|| anyhow!("state/ is gone"))?;
                maps.set_held(self.before.held)
            }
            Undo::RestoreMark(interface) => self.restore_mark(interface),
            Undo::SetPending => {
                let maps = self.maps()?.context("state/ is gone")?;
                maps.set_pending(self.before.pending)
            }
            Undo::SetCurrent => self.guard.set_current(self.before.current),
            Undo::SetWithdrawn(address) => {
                let withdrawn = &self.before.announcements.withdrawn;
                self.set_withdrawn(*address, withdrawn.contains_key(address))
            }
            Undo::Override(id) => self.set_override(*id, self.before.overrides.get(id).copied()),
        }
    }
}

/// The reversal of an action.
enum Undo {
    Drop(u32),
    DeleteClsact(String),
    /// Detaches the program.
    Detach {
        interface: String,
        attachment: Attachment,
        program: OwnedFd,
    },
    /// Attaches the program that was there before.
    Attach {
        interface: String,
        attachment: Attachment,
        program: OwnedFd,
        replaces: bool,
    },
    /// Attaches the XDP program that was there before, or removes the one that is there.
    Xdp {
        interface: String,
        before: Option<(OwnedFd, Xdp)>,
    },
    SetHeld,
    SetPending,
    RestoreMark(String),
    SetCurrent,
    SetWithdrawn(IpAddr),
    Override(u32),
}

/// Describes an action, for errors and logs.
pub fn describe(action: &Action) -> String {
    match action {
        Action::RemoveUnfinished(name) => format!("removing the unfinished {name}"),
        Action::Build(draft) => format!("building generation {}", draft.number),
        Action::WriteNextHops(number) => format!("next hops of generation {number}"),
        Action::CopyFlows { from, to } => {
            format!("copying the flows of generation {from} to generation {to}")
        }
        Action::AddClsact(interface) => format!("adding a clsact qdisc to {interface}"),
        Action::DeleteClsact(interface) => format!("removing the clsact qdisc of {interface}"),
        Action::EndHandover(interface) => {
            format!("removing the filter of {interface} beside its link")
        }
        Action::HandOver { interface, to, .. } => match to {
            Attachment::Filter => format!("moving {interface} to a tc filter"),
            Attachment::Link => format!("moving {interface} to a tcx link"),
        },
        Action::Attach { interface, generation, .. } => {
            format!("attaching generation {generation} to {interface}")
        }
        Action::Detach { interface, .. } => format!("detaching from {interface}"),
        Action::AttachXdp { interface, generation, .. } => {
            format!("attaching generation {generation} to XDP of {interface}")
        }
        Action::DetachXdp { interface, .. } => format!("detaching from XDP of {interface}"),
        Action::SetHeld(Some(held)) => format!("holding generation {}", held.generation),
        Action::SetHeld(None) => "releasing the held configuration".into(),
        Action::SetPending(Some(pending)) => {
            format!("waiting for confirmation of generation {}", pending.generation)
        }
        Action::SetDetached { interface, detached: true } => {
            format!("leaving {interface}, which is missing, without the filter")
        }
        Action::SetDetached { interface, detached: false } => {
            format!("waiting for {interface}")
        }
        Action::SetPending(None) => "ending the wait for confirmation".into(),
        Action::SetCurrent(Some(number)) => format!("pointing `current` at generation {number}"),
        Action::SetCurrent(None) => "removing `current`".into(),
        Action::Override { upstream, state, .. } => match state {
            Some(State::Drained) => format!("draining {upstream}"),
            Some(State::Active) => format!("enabling {upstream}"),
            None => format!("removing the override of {upstream}"),
        },
        Action::TakeAddress((address, _)) => format!("withdrawing {address}"),
        Action::SetWithdrawn { address: announcements::ALL, withdrawn: true } => {
            "withdrawing all addresses until they are announced again".into()
        }
        Action::SetWithdrawn { address, withdrawn: true } => {
            format!("withdrawing {address} until it is announced again")
        }
        Action::SetWithdrawn { address: announcements::ALL, withdrawn: false } => {
            "announcing all addresses again".into()
        }
        Action::SetWithdrawn { address, withdrawn: false } => format!("announcing {address} again"),
        Action::Settle(time) => format!("waiting {time:?} for the routers"),
        Action::Drop(number) => format!("removing generation {number}"),
    }
}
