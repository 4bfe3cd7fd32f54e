//! A model of the kernel that applies actions in memory and panics on forbidden ones.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use udplb::bpf::OBJECT_SHA256;
use udplb::datapath::description::{Description, Generation, Origin, ProgramName};
use udplb::datapath::generation::Draft;
use udplb::datapath::hook::{Attachment, Hook, Slot};
use udplb::datapath::marks::Mark;
use udplb::datapath::xdp;
use udplb::desired::{Desired, RuleIds, assign_ids};
use udplb::net::qdisc::Qdisc;
use udplb::reconcile::observe::{Interface, Observed};
use udplb::reconcile::plan::{self, Action, Plan, Refusal};

/// Owner of an interface's clsact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Udplb,
    Other,
}

#[derive(Clone, Debug)]
pub struct Kernel {
    pub observed: Observed,
    pub clsacts: BTreeMap<String, Owner>,
    /// Attachment of a program where no foreign filter comes first.
    attachment: Attachment,
}

impl Kernel {
    pub fn new(interfaces: &[&str], attachment: Attachment) -> Kernel {
        let empty = |index: usize| Interface {
            altnames: Vec::new(),
            index: index as u32 + 1,
            layer: Some(udplb::net::link::Layer::Ethernet),
            up: true,
            carrier: true,
            received: 0,
            hook: Hook::empty(attachment),
            xdp: xdp::Slot::Empty,
        };
        let interfaces =
            interfaces.iter().enumerate().map(|(index, name)| (name.to_string(), empty(index)));
        let observed =
            Observed { namespace: 7, interfaces: interfaces.collect(), ..Observed::default() };
        Kernel { observed, clsacts: BTreeMap::new(), attachment }
    }

    /// Adds a foreign clsact where there is none. Skipped if a generation or mark records a clsact of
    /// udplb's: a rollback to it would take the foreign one for udplb's once it is empty.
    pub fn add_foreign_clsact(&mut self, interface: &str) {
        let claims = |it: &Generation| it.description.clsact.iter().any(|name| name == interface);
        let marked = self.observed.marks.get(interface).is_some_and(|mark| mark.clsact);
        if marked || self.observed.generations.values().any(claims) {
            return;
        }
        let hook = self.hook(interface);
        if hook.qdisc.is_none() {
            hook.qdisc = Some(Qdisc::Clsact);
            self.clsacts.insert(interface.into(), Owner::Other);
        }
    }

    /// Adds or removes a foreign filter.
    pub fn share(&mut self, interface: &str, shared: bool) {
        self.add_foreign_clsact(interface);
        let hook = self.hook(interface);
        hook.shared = shared && hook.qdisc.is_some();
    }

    /// Adds or removes a foreign filter that runs before udplb's priority.
    pub fn precede(&mut self, interface: &str, first: bool) {
        self.share(interface, first);
        let attachment = self.attachment;
        let hook = self.hook(interface);
        let precedes = first && hook.shared;
        hook.attachment = if precedes { Attachment::Filter } else { attachment };
    }

    /// Plans an `apply` and carries out its first `steps` actions.
    pub fn apply(&mut self, desired: &Desired, force: bool, steps: usize) -> Result<Plan, Refusal> {
        let plan = plan::apply(&self.observed, desired, &Origin::default(), force)?;
        self.carry_out(&plan.actions, steps);
        Ok(plan)
    }

    /// Plans an `apply --confirm` and carries out its first `steps` actions.
    pub fn apply_pending(
        &mut self,
        desired: &Desired,
        force: bool,
        steps: usize,
    ) -> Result<Plan, Refusal> {
        let (origin, deadline) = (Origin::default(), Some(Duration::from_secs(1)));
        let plan = plan::apply_until(
            &self.observed,
            &Arc::new(desired.clone()),
            &origin,
            force,
            deadline,
        )?;
        self.carry_out(&plan.actions, steps);
        Ok(plan)
    }

    pub fn rollback(&mut self, steps: usize) -> Result<Plan, Refusal> {
        let plan = plan::rollback(&self.observed, 1_000)?;
        self.carry_out(&plan.actions, steps);
        Ok(plan)
    }

    /// Confirms the pending change; a refused `confirm` changes nothing.
    pub fn confirm(&mut self) {
        if let Ok(actions) = plan::confirm(&self.observed) {
            self.carry_out(&actions, usize::MAX);
        }
    }

    pub fn detach(&mut self, interfaces: &[String], purge: bool, steps: usize) {
        let actions = plan::detach(&self.observed, interfaces, purge).expect("they exist");
        self.carry_out(&actions, steps);
    }

    fn carry_out(&mut self, actions: &[Action], steps: usize) {
        for action in actions.iter().take(steps) {
            self.act(action);
        }
        // a crash in the middle of the next action
        match actions.get(steps) {
            Some(Action::Build(draft)) => {
                self.observed.unfinished.push(format!("building-{}", draft.number));
            }
            Some(Action::HandOver { interface, generation, from, to }) if from != to => {
                let hook = self.hook(interface);
                hook.filter = Slot::Generation(*generation);
                hook.link = Slot::Generation(*generation);
                hook.handover = true;
            }
            _ => {}
        }
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::RemoveUnfinished(name) => self.observed.unfinished.retain(|it| it != name),
            Action::Build(draft) => self.build(draft),
            Action::WriteNextHops(number) => assert!(self.generation(*number).intact),
            Action::CopyFlows { from, to } => {
                assert!(self.observed.generations.contains_key(from));
                assert!(!self.observed.is_attached(*to), "its tables are in use");
            }
            Action::AddClsact(interface) => {
                let hook = self.hook(interface);
                assert_eq!(hook.qdisc.replace(Qdisc::Clsact), None, "a clsact is there already");
                self.clsacts.insert(interface.clone(), Owner::Udplb);
            }
            Action::EndHandover(interface) => {
                let hook = self.hook(interface);
                assert!(hook.is_double(), "no handover on {interface}");
                hook.filter = Slot::Empty;
            }
            Action::Attach { interface, generation, attachment, replaces } => {
                assert!(self.generation(*generation).intact);
                let hook = self.hook(interface);
                assert!(!hook.is_double(), "packets would meet two generations");
                assert_eq!(hook.present().unwrap_or(*attachment), *attachment);
                assert_eq!(hook.slot(), replaces);
                put(hook, *attachment, Slot::Generation(*generation));
                hook.handover = false;
                self.observed.marks.entry(interface.clone()).or_default().detached = false;
            }
            Action::HandOver { interface, generation, from, to } => {
                let hook = self.hook(interface);
                assert!(!hook.is_double(), "packets would meet the program twice");
                assert_eq!((hook.present(), hook.attachment), (Some(*from), *to));
                assert_eq!(hook.slot(), &Slot::Generation(*generation));
                put(hook, *from, Slot::Empty);
                put(hook, *to, Slot::Generation(*generation));
                hook.handover = false;
            }
            Action::Detach { interface, generation, clsact } => {
                let hook = self.hook(interface);
                assert_eq!(hook.slot(), &Slot::Generation(*generation));
                (hook.filter, hook.link, hook.handover) = (Slot::Empty, Slot::Empty, false);
                let mark = Mark { detached: true, clsact: *clsact, ..Mark::default() };
                self.observed.marks.insert(interface.clone(), mark);
            }
            Action::DeleteClsact(interface) => {
                let hook = self.hook(interface);
                assert!(!hook.shared, "others hang on it");
                assert_eq!(hook.filter, Slot::Empty);
                hook.qdisc = None;
                assert_eq!(self.clsacts.remove(interface), Some(Owner::Udplb));
            }
            Action::SetDetached { interface, detached } => {
                self.observed.marks.entry(interface.clone()).or_default().detached = *detached;
            }
            Action::SetHeld(held) => self.observed.held = *held,
            Action::SetPending(pending) => self.observed.pending = *pending,
            Action::SetCurrent(number) => {
                assert!(number.is_none_or(|it| self.observed.generations.contains_key(&it)));
                self.observed.current = *number;
            }
            Action::Override { id, state: Some(state), .. } => {
                self.observed.overrides.insert(*id, *state);
            }
            Action::Override { id, state: None, .. } => {
                self.observed.overrides.remove(id);
            }
            Action::TakeAddress(place) => {
                let placed = self.observed.announcements.placed.remove(place);
                assert!(placed.is_some(), "{place:?} is not udplb's");
            }
            Action::SetWithdrawn { address, withdrawn: true } => {
                self.observed.announcements.withdrawn.insert(*address, 1);
            }
            Action::SetWithdrawn { address, withdrawn: false } => {
                self.observed.announcements.withdrawn.remove(address);
            }
            Action::Settle(_) => {}
            Action::AttachXdp { interface, generation, mode, replaces } => {
                let generation = Some(*generation);
                let slot = &mut self.interface(interface).xdp;
                assert_eq!(slot, replaces);
                *slot = xdp::Slot::Own { generation, mode: *mode };
            }
            Action::DetachXdp { interface, replaces } => {
                let slot = &mut self.interface(interface).xdp;
                assert_eq!(slot, replaces);
                *slot = xdp::Slot::Empty;
            }
            Action::Drop(number) => {
                let runs_there = |it: &Interface| matches!(it.xdp, xdp::Slot::Own { generation, .. } if generation == Some(*number));
                assert!(!self.observed.interfaces.values().any(runs_there), "{number} is at XDP");
                assert!(!self.observed.is_attached(*number), "{number} serves");
                self.observed.generations.remove(number);
                self.observed.damaged.retain(|it| it != number);
            }
        }
    }

    fn build(&mut self, draft: &Draft) {
        let known: Vec<(&Desired, &[RuleIds])> =
            self.observed.generations.values().map(Generation::hosts).collect();
        let ids = assign_ids(&draft.desired, &known, 1 << 19).expect("ids enough");
        let description = Description {
            version: "test".into(),
            object: OBJECT_SHA256.into(),
            origin: draft.origin.clone(),
            built: 0,
            namespace: draft.namespace,
            program: ProgramName::new(draft.number, [0; 8]),
            program_l3: draft.l3.then(|| ProgramName::new(draft.number, [3; 8])),
            program_xdp: (!draft.desired.xdp.is_empty())
                .then(|| ProgramName::new(draft.number, [4; 8])),
            clsact: draft.clsact.clone(),
            seed: 0,
            desired: draft.desired.clone(),
            ids,
        };
        let generation =
            Generation { number: draft.number, description: description.into(), intact: true };
        let before = self.observed.generations.insert(draft.number, generation);
        assert!(before.is_none(), "generation {} is there already", draft.number);
    }

    fn generation(&self, number: u32) -> &Generation {
        &self.observed.generations[&number]
    }

    fn interface(&mut self, interface: &str) -> &mut Interface {
        self.observed.interfaces.get_mut(interface).expect("an interface")
    }

    fn hook(&mut self, interface: &str) -> &mut Hook {
        &mut self.interface(interface).hook
    }
}

fn put(hook: &mut Hook, attachment: Attachment, slot: Slot) {
    match attachment {
        Attachment::Filter => {
            assert!(slot == Slot::Empty || hook.qdisc.is_some(), "no qdisc");
            hook.filter = slot;
        }
        Attachment::Link => hook.link = slot,
    }
}
