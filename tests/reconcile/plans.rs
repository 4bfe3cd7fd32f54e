//! Plans from the observed to the desired state: in the model, for any configurations and any crash,
//! and with the real executor, with a failure at every action.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{anyhow, bail};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use udplb::config::{
    Action as TcAction, Announce, Config, Hash, Key, Ports, Strategy as Selection, Xdp,
};
use udplb::datapath::description::Origin;
use udplb::datapath::hook::{Attachment, Slot};
use udplb::datapath::{pins, xdp};
use udplb::desired::{Desired, Rule, Upstream};
use udplb::net::routing::{Senders, Target};
use udplb::net::{Netlink, nexthop};
use udplb::reconcile::execute::Executor;
use udplb::reconcile::observe::{Observed, observe};
use udplb::reconcile::plan::{self, Action, Plan, Refusal};

use crate::common::lab::{CLIENTS, Lab, RELAY, UPSTREAMS, to_port};
use crate::common::net::bind;
use crate::expect_way;
use crate::model::{Kernel, Owner};

const INTERFACES: [&str; 3] = ["a", "b", "c"];
const ALL: usize = usize::MAX;

fn upstream() -> impl Strategy<Value = Upstream> {
    (1..=4_u8, prop::option::of(9_000..9_002_u16))
        .prop_map(|(host, port)| Upstream::new([10, 0, 9, host], port))
}

fn rule(number: u16) -> impl Strategy<Value = Rule> {
    let actions = select(vec![TcAction::Pass, TcAction::Block]);
    (actions, vec(upstream(), 1..4)).prop_map(move |(action, upstreams)| {
        let ports = Ports { first: 1000 + number, last: 1000 + number };
        let key = Key::new([10, 0, 0, 5], vec![ports]);
        let rule = Rule::new(format!("rule {number}"), key, upstreams);
        Rule { action, strategy: Selection::SrcIp, hash: Hash::Modulo, ..rule }
    })
}

fn desired() -> impl Strategy<Value = Desired> {
    let interfaces = subsequence(INTERFACES.to_vec(), 1..=INTERFACES.len());
    let rules = btree_set(0..5_u16, 0..4)
        .prop_flat_map(|numbers| numbers.into_iter().map(rule).collect::<Vec<_>>());
    let modes = vec(select(vec![Xdp::Off, Xdp::Native, Xdp::Generic]), INTERFACES.len());
    (interfaces, rules, modes).prop_map(|(interfaces, rules, modes)| {
        let interfaces: Vec<String> = interfaces.into_iter().map(String::from).collect();
        let xdp = interfaces.iter().cloned().zip(modes).filter(|(_, xdp)| *xdp != Xdp::Off);
        Desired { xdp: xdp.collect(), interfaces, rules, ..Desired::default() }
    })
}

/// An event on a machine. `steps` is the number of actions before a crash; most events complete.
#[derive(Clone, Debug)]
enum Event {
    Apply(Desired, bool, usize),
    ApplyPending(Desired, bool, usize),
    Confirm,
    Rollback(usize),
    Detach(Vec<String>, bool, usize),
    ForeignClsact(&'static str),
    Share(&'static str, bool),
    Precede(&'static str, bool),
    LosePin(usize),
    LoseDescription(usize),
}

fn event() -> impl Strategy<Value = Event> {
    let steps = || prop_oneof![3 => Just(ALL), 1 => 0..12_usize];
    let interface = || select(INTERFACES.to_vec());
    let some = subsequence(INTERFACES.to_vec(), 0..=INTERFACES.len())
        .prop_map(|names| names.into_iter().map(String::from).collect());
    prop_oneof![
        6 => (desired(), any::<bool>(), steps())
            .prop_map(|(desired, force, steps)| Event::Apply(desired, force, steps)),
        3 => (desired(), any::<bool>(), steps())
            .prop_map(|(desired, force, steps)| Event::ApplyPending(desired, force, steps)),
        1 => Just(Event::Confirm),
        3 => steps().prop_map(Event::Rollback),
        2 => (some, any::<bool>(), steps())
            .prop_map(|(names, purge, steps)| Event::Detach(names, purge, steps)),
        1 => interface().prop_map(Event::ForeignClsact),
        1 => (interface(), any::<bool>()).prop_map(|(name, shared)| Event::Share(name, shared)),
        2 => (interface(), any::<bool>()).prop_map(|(name, first)| Event::Precede(name, first)),
        1 => (0..3_usize).prop_map(Event::LosePin),
        1 => (0..3_usize).prop_map(Event::LoseDescription),
    ]
}

fn happen(kernel: &mut Kernel, event: &Event) {
    let nth =
        |kernel: &Kernel, index: usize| kernel.observed.generations.keys().nth(index).copied();
    match event {
        // a refused event changes nothing
        Event::Apply(desired, force, steps) => drop(kernel.apply(desired, *force, *steps)),
        Event::ApplyPending(desired, force, steps) => {
            drop(kernel.apply_pending(desired, *force, *steps));
        }
        Event::Confirm => kernel.confirm(),
        Event::Rollback(steps) => drop(kernel.rollback(*steps)),
        Event::Detach(names, purge, steps) => kernel.detach(names, *purge, *steps),
        Event::ForeignClsact(name) => kernel.add_foreign_clsact(name),
        Event::Share(name, shared) => kernel.share(name, *shared),
        Event::Precede(name, first) => kernel.precede(name, *first),
        Event::LosePin(index) => {
            if let Some(number) = nth(kernel, *index) {
                kernel.observed.generations.get_mut(&number).expect("it is there").intact = false;
            }
        }
        Event::LoseDescription(index) => {
            if let Some(number) = nth(kernel, *index) {
                kernel.observed.generations.remove(&number);
                kernel.observed.damaged.push(number);
            }
        }
    }
}

fn attachment() -> impl Strategy<Value = Attachment> {
    select(vec![Attachment::Filter, Attachment::Link])
}

/// Generates a machine with random past events.
fn kernel() -> impl Strategy<Value = Kernel> {
    (attachment(), vec(event(), 0..8)).prop_map(|(attachment, events)| {
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        for event in &events {
            happen(&mut kernel, event);
            check_ids(&kernel);
        }
        kernel
    })
}

/// Checks that each id has one holder and each holder one id, over all generations.
fn check_ids(kernel: &Kernel) {
    let mut by_id = BTreeMap::new();
    let mut by_holder = BTreeMap::new();
    for generation in kernel.observed.generations.values() {
        let description = &generation.description;
        for (rule, ids) in description.desired.rules.iter().zip(&description.ids) {
            let mut holders = vec![(ids.rule, (&rule.name, None))];
            holders.extend(rule.upstreams.iter().zip(&ids.upstreams).map(|(upstream, id)| {
                (*id, (&rule.name, Some((&upstream.address, upstream.port))))
            }));
            for (id, holder) in holders {
                assert_ne!(id, 0);
                assert_eq!(*by_id.entry(id).or_insert(holder), holder, "id {id}");
                assert_eq!(*by_holder.entry(holder).or_insert(id), id, "{holder:?}");
            }
        }
    }
}

/// Checks that the configuration is active on exactly its interfaces and that nothing remains to do.
fn check_applied(kernel: &Kernel, desired: &Desired) {
    let observed = &kernel.observed;
    let serving = observed.serving().expect("something serves");
    assert_eq!(*observed.generations[&serving].description.desired, *desired);
    assert!(observed.generations[&serving].intact);
    assert_eq!(observed.current, Some(serving));
    let attached: Vec<(&str, u32)> = observed.attached().collect();
    let wanted: Vec<(&str, u32)> =
        desired.interfaces.iter().map(|name| (name.as_str(), serving)).collect();
    assert_eq!(attached, wanted);
    for (name, interface) in &observed.interfaces {
        let own = |mode: &Xdp| xdp::Slot::Own { generation: Some(serving), mode: *mode };
        assert_eq!(interface.xdp, desired.xdp.get(name).map_or(xdp::Slot::Empty, own), "{name}");
    }
    assert!(observed.unfinished.is_empty(), "{:?}", observed.unfinished);
    assert!(observed.damaged.is_empty(), "{:?}", observed.damaged);
    assert!(observed.generations.len() <= 2);
    check_ids(kernel);
    let again = plan::apply(observed, desired, &Origin::default(), false).expect("no refusal");
    assert_eq!(again.generation, serving);
    assert!(again.actions.is_empty(), "{:?}", again.actions);
}

fn configurations(kernel: &Kernel) -> BTreeSet<String> {
    let text = |desired: &Desired| serde_json::to_string(desired).expect("JSON");
    kernel.observed.generations.values().map(|it| text(&it.description.desired)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Routers send elsewhere before packets are no longer forwarded.
    #[test]
    fn addresses_are_withdrawn_before_the_last_filter_goes(
        mut kernel in kernel(),
        desired in desired(),
        interfaces in subsequence(INTERFACES.to_vec(), 0..=INTERFACES.len()),
        placed in btree_set((1..4_u8, 7..9_u32), 0..3),
    ) {
        let settle = "3s".parse().expect("a duration");
        let announce = Announce {
            interface: "anycast0".into(),
            last_resort: None,
            hold_down: settle,
            settle,
            expire: false,
        };
        let _ = kernel.apply(&Desired { announce: Some(announce), ..desired }, true, ALL);
        let places = placed.into_iter().map(|(last, ifindex)| (([10, 99, 0, last].into(), ifindex), 1));
        kernel.observed.announcements.placed = places.collect();
        let placed: Vec<_> = kernel.observed.announcements.placed.keys().copied().collect();
        let names: Vec<String> = interfaces.into_iter().map(String::from).collect();
        let actions = plan::detach(&kernel.observed, &names, false).expect("they exist");
        let taken = actions.iter().map_while(|action| match action {
            Action::TakeAddress(place) => Some(*place),
            _ => None,
        });
        let taken: Vec<_> = taken.collect();
        kernel.detach(&names, false, ALL);
        if kernel.observed.attached().next().is_some() {
            prop_assert!(taken.is_empty());
            return Ok(());
        }
        prop_assert_eq!(&taken, &placed);
        let waits = matches!(actions.get(taken.len()), Some(Action::Settle(_)));
        prop_assert_eq!(waits, !placed.is_empty(), "{:?}", actions);
        prop_assert!(kernel.observed.announcements.placed.is_empty());
    }

    #[test]
    fn apply_reaches_the_desired_state_from_any(mut kernel in kernel(), new in desired()) {
        kernel.apply(&new, true, ALL).expect("force");
        check_applied(&kernel, &new);
    }

    #[test]
    fn crash_at_any_planned_action_is_healed(
        mut kernel in kernel(), new in desired(), steps in 0..16_usize,
    ) {
        kernel.apply(&new, true, steps).expect("force");
        // the cron job's apply must not be refused for a reason that the first call overrode with force
        kernel.apply(&new, true, ALL).expect("force");
        check_applied(&kernel, &new);
    }

    #[test]
    fn hold_ends_with_the_next_apply(
        attachment in attachment(), old in desired(), left in desired(), new in desired(), steps in 0..16_usize,
    ) {
        prop_assume!(left != old && new != left && new != old);
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply(&old, false, ALL).expect("no refusal");
        kernel.apply(&left, false, ALL).expect("no refusal");
        kernel.rollback(ALL).expect("there is one before");
        prop_assert!(matches!(kernel.apply(&left, false, ALL), Err(Refusal::Held(_))));
        check_applied(&kernel, &old);
        // applying the old file changes nothing, and the generation that was left stays held
        prop_assert!(kernel.apply(&old, false, ALL).expect("no refusal").actions.is_empty());
        prop_assert!(kernel.observed.held.is_some());

        kernel.apply(&new, false, steps).expect("no refusal");
        kernel.apply(&new, false, ALL).expect("no refusal");
        prop_assert_eq!(kernel.observed.held, None);
        check_applied(&kernel, &new);
        kernel.apply(&left, false, ALL).expect("no refusal");
        check_applied(&kernel, &left);
    }

    #[test]
    fn second_rollback_undoes_the_first(
        attachment in attachment(), old in desired(), new in desired(), steps in 0..16_usize,
    ) {
        prop_assume!(old != new);
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply(&old, false, ALL).expect("no refusal");
        let there = kernel.apply(&new, false, ALL).expect("no refusal").generation;
        let both = configurations(&kernel);
        let back = kernel.rollback(ALL).expect("there is one before").generation;
        check_applied(&kernel, &old);
        prop_assert_eq!(kernel.rollback(ALL).expect("and back").generation, there);
        check_applied(&kernel, &new);
        prop_assert_eq!(kernel.rollback(ALL).expect("and forth").generation, back);
        prop_assert_eq!(configurations(&kernel), both);
        kernel.apply(&new, true, steps).expect("force");
        kernel.apply(&new, true, ALL).expect("force");
        prop_assert_eq!(kernel.observed.held, None);
        check_applied(&kernel, &new);
    }

    #[test]
    fn crashed_rollback_can_go_either_way(
        attachment in attachment(), old in desired(), new in desired(), steps in 0..16_usize, forward in any::<bool>(),
    ) {
        prop_assume!(old != new);
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply(&old, false, ALL).expect("no refusal");
        kernel.apply(&new, false, ALL).expect("no refusal");
        kernel.rollback(steps).expect("there is one before");
        let goal = if forward { &new } else { &old };
        kernel.apply(goal, true, ALL).expect("force");
        check_applied(&kernel, goal);
    }

    #[test]
    fn rollback_with_begun_swaps_is_not_undone_by_cron(
        attachment in attachment(), old in desired(), new in desired(), steps in 0..16_usize,
    ) {
        prop_assume!(old != new);
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply(&old, false, ALL).expect("no refusal");
        let left = kernel.apply(&new, false, ALL).expect("no refusal").generation;
        kernel.rollback(steps).expect("there is one before");
        let begun = kernel.observed.attached().any(|(_, number)| number != left);
        let cron = kernel.clone().apply(&new, false, ALL);
        if begun {
            prop_assert!(matches!(cron, Err(Refusal::Held(_))), "{cron:?}");
            // retries the rollback if it did not complete
            if kernel.observed.current == Some(left) {
                kernel.rollback(ALL).expect("there is one before");
            }
            check_applied(&kernel, &old);
        } else if kernel.observed.attached().next().is_some() {
            prop_assert!(cron.is_ok());
        }
    }

    #[test]
    fn unconfirmed_change_is_undone_after_any_crash(
        attachment in attachment(), old in desired(), news in vec(desired(), 1..4), steps in 0..16_usize, back in 0..16_usize,
    ) {
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply(&old, false, ALL).expect("no refusal");
        for new in &news {
            let result = kernel.apply_pending(new, false, steps);
            prop_assert!(result.is_ok(), "{result:?}");
        }
        // the deadline has passed; the process that rolls back is killed too
        for steps in [back, ALL] {
            if kernel.observed.pending.is_some() {
                kernel.rollback(steps).expect("there is one before");
            }
        }
        prop_assert_eq!(kernel.observed.pending, None);
        kernel.apply(&old, false, 0).expect("no refusal");
        let attached: Vec<(&str, u32)> = kernel.observed.attached().collect();
        prop_assert!(!attached.is_empty());
        for (_, number) in attached {
            prop_assert_eq!(&*kernel.observed.generations[&number].description.desired, &old);
        }
    }

    #[test]
    fn unconfirmed_first_apply_is_undone_after_any_crash(
        attachment in attachment(), new in desired(), steps in 0..16_usize, back in 0..16_usize,
    ) {
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply_pending(&new, false, steps).expect("no refusal");
        for steps in [back, ALL] {
            if kernel.observed.pending.is_some() {
                kernel.rollback(steps).expect("a detachment");
            }
        }
        prop_assert_eq!(kernel.observed.attached().count(), 0);
        prop_assert_eq!(kernel.observed.pending, None);
    }

    #[test]
    fn confirmed_change_stays_and_can_be_rolled_back(
        attachment in attachment(), old in desired(), first in desired(), second in desired(),
    ) {
        prop_assume!(old != first && old != second);
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        kernel.apply(&old, false, ALL).expect("no refusal");
        kernel.apply_pending(&first, false, ALL).expect("no refusal");
        kernel.apply_pending(&second, false, ALL).expect("no refusal");
        prop_assert!(first == second || matches!(
            kernel.clone().apply(&first, false, ALL), Err(Refusal::Unconfirmed(_))
        ));
        kernel.confirm();
        prop_assert_eq!(kernel.observed.pending, None);
        check_applied(&kernel, &second);
        kernel.rollback(ALL).expect("there is one before");
        check_applied(&kernel, &old);
    }

    #[test]
    fn detach_keeps_foreign_objects(mut kernel in kernel(), steps in 0..6_usize) {
        let foreign: Vec<String> = kernel
            .clsacts
            .iter()
            .filter(|(_, owner)| **owner == Owner::Other)
            .map(|(name, _)| name.clone())
            .collect();
        kernel.detach(&[], true, steps);
        kernel.detach(&[], true, ALL);
        prop_assert_eq!(kernel.observed.attached().count(), 0);
        for name in foreign {
            prop_assert_eq!(kernel.clsacts.get(&name), Some(&Owner::Other));
        }
    }

    #[test]
    fn apply_and_detach_leave_no_clsact(attachment in attachment(), configurations in vec(desired(), 1..5), back in any::<bool>()) {
        let mut kernel = Kernel::new(&INTERFACES, attachment);
        for desired in &configurations {
            kernel.apply(desired, false, ALL).expect("no refusal");
        }
        if back {
            drop(kernel.rollback(ALL));
        }
        kernel.detach(&[], false, ALL);
        kernel.detach(&[], true, ALL);
        prop_assert!(kernel.clsacts.is_empty(), "{:?}", kernel.clsacts);
    }
}

#[test]
fn never_attached_generation_is_no_rollback_target() {
    let mut kernel = Kernel::new(&INTERFACES, Attachment::Filter);
    assert!(matches!(kernel.rollback(ALL), Err(Refusal::NothingBefore)));
    let one = Desired { interfaces: vec!["a".into()], ..Desired::default() };
    kernel.apply(&one, false, ALL).expect("no refusal");
    assert!(matches!(kernel.rollback(ALL), Err(Refusal::NothingBefore)));
    let two = Desired { interfaces: vec!["b".into()], ..Desired::default() };
    let plan = plan::apply(&kernel.observed, &two, &Origin::default(), false).expect("no refusal");
    assert!(matches!(plan.actions[0], Action::Build(_)));
    kernel.apply(&two, false, 1).expect("no refusal");
    assert!(matches!(kernel.rollback(ALL), Err(Refusal::NothingBefore)));
}

#[test]
fn changed_program_is_another_generation() {
    let one = Desired { interfaces: vec!["a".into()], ..Desired::default() };
    let mut kernel = Kernel::new(&INTERFACES, Attachment::Filter);
    kernel.apply(&one, false, ALL).expect("no refusal");
    let object = &mut Arc::make_mut(
        &mut kernel.observed.generations.get_mut(&1).expect("it is there").description,
    )
    .object;
    *object = "an older udplb's".into();
    assert_eq!(kernel.apply(&one, false, ALL).expect("no refusal").generation, 2);
    // rollback of a bad upgrade: the cron job must not apply it again
    assert_eq!(kernel.rollback(ALL).expect("there is one before").generation, 1);
    assert!(matches!(kernel.apply(&one, false, ALL), Err(Refusal::Held(_))));
    kernel.apply(&one, true, ALL).expect("force");
    check_applied(&kernel, &one);
}

#[test]
fn foreign_objects_are_refused() {
    let one = Desired { interfaces: vec!["a".into()], ..Desired::default() };
    let kernel = Kernel::new(&INTERFACES, Attachment::Filter);
    let refusal = |change: &dyn Fn(&mut Kernel)| {
        let mut kernel = kernel.clone();
        change(&mut kernel);
        plan::apply(&kernel.observed, &one, &Origin::default(), false).expect_err("a refusal")
    };
    let interface = |kernel: &mut Kernel| kernel.observed.interfaces.remove("a").expect("a");
    let put = |kernel: &mut Kernel, slot: Slot| {
        let mut it = interface(kernel);
        it.hook.filter = slot;
        kernel.observed.interfaces.insert("a".into(), it);
    };
    assert_eq!(refusal(&|kernel| drop(interface(kernel))), Refusal::NoInterface("a".into()));
    let foreign = refusal(&|kernel| put(kernel, Slot::Foreign("theirs".into())));
    assert!(matches!(foreign, Refusal::Foreign { filter, .. } if filter == "theirs"));
    let ours = |home| Slot::Orphan { program: 1, filter: "ours".into(), link: None, home };
    let orphan = refusal(&|kernel| put(kernel, ours(None)));
    assert!(matches!(orphan, Refusal::Orphan { filter, .. } if filter == "ours"));
    let place = udplb::datapath::pin_search::Place { process: None, pin_dir: "/there".into() };
    let elsewhere = refusal(&|kernel| put(kernel, ours(Some(place.clone()))));
    assert!(matches!(elsewhere, Refusal::Elsewhere { home, .. } if home == place));
    let other = refusal(&|kernel| {
        kernel.apply(&one, false, ALL).expect("no refusal");
        kernel.observed.namespace = 8;
    });
    assert_eq!(other, Refusal::OtherNamespace(7));
}

pub type Planner<'a> = &'a (dyn Fn(&Observed) -> Result<Plan, Refusal> + Sync);

/// A fault at an action.
#[derive(Clone, Copy)]
pub enum Trouble {
    Failure,
    /// The process ends without undoing anything.
    Crash,
}

/// Observes the kernel, plans and carries the plan out in this process up to the fault at action
/// `stop`. Returns the number of actions.
pub fn carry_out(
    lab: &Lab,
    plan: Planner<'_>,
    stop: usize,
    trouble: Trouble,
) -> anyhow::Result<usize> {
    let inside = async || {
        let netlink = Netlink::open()?;
        let guard = pins::write(&lab.bpffs.pins(), std::time::Duration::ZERO)
            .map_err(|failure| anyhow!("{failure}"))?;
        let observed = observe(Some(&guard), &netlink).await?;
        let plan = plan(&observed).map_err(|refusal| anyhow!("{refusal}"))?;
        let mut targets: BTreeSet<Target> = UPSTREAMS
            .into_iter()
            .map(|upstream| Target {
                address: upstream.into(),
                senders: Senders::Among(vec![IpAddr::from(RELAY).into()]),
            })
            .collect();
        for generation in observed.generations.values() {
            targets.extend(generation.description.desired.targets());
        }
        let ways = nexthop::resolve(&netlink, targets, &["eth0".into()]).await?;
        let mut steps = 0;
        let mut observer = |_: &Action| {
            steps += 1;
            match trouble {
                _ if steps <= stop => Ok(()),
                Trouble::Failure => bail!("injected"),
                Trouble::Crash => std::panic::resume_unwind(Box::new("crashed")),
            }
        };
        let mut executor = Executor::new(&guard, &netlink, &observed, &ways);
        executor.run(&plan.actions, &mut observer).await?;
        Ok(plan.actions.len())
    };
    lab.enter_relay(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(inside())
    })
}

pub fn wanted(config: &Value) -> Desired {
    let config = Config::parse("udplb.yaml", &config.to_string()).expect("a good configuration");
    Desired::written(&config, &config.interfaces)
}

/// Returns the state that a failed apply must not change: filters and links with their programs, qdiscs,
/// generations, `current` and held generations. A link that was taken off and put back has another id.
fn snapshot(lab: &Lab) -> String {
    let mut text = lab.relay.tc("qdisc show");
    for interface in ["eth0", "up0"] {
        let shown = lab.relay.ip(&format!("link show dev {interface}"));
        text.extend(shown.lines().filter(|line| line.contains("prog/xdp")));
    }
    for line in (lab.filters("eth0") + &lab.filters("up0")).lines() {
        text += line.split(" link ").next().unwrap_or_default();
        text += "\n";
    }
    let mut pins = vec![String::new()];
    while let Some(directory) = pins.pop() {
        let path = lab.bpffs.pins().join(&directory);
        let mut names: Vec<String> = fs::read_dir(&path)
            .expect("a directory of pins")
            .map(|entry| entry.expect("a pin").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        text += &format!("{directory}: {names:?}\n");
        let inside = names.iter().map(|name| format!("{directory}/{name}"));
        let directories =
            inside.map(|name| name.trim_start_matches('/').to_string()).filter(|name| {
                // a failed apply may create state/, which belongs to no generation
                let path = lab.bpffs.pins().join(name);
                path.is_dir() && !path.is_symlink() && name != pins::STATE
            });
        pins.extend(directories);
    }
    let status = lab.status();
    text + &format!("{} {} {}", status["generation"], status["held"], status["pending"])
}

/// Fails at each action in turn in one lab, each try starting from the state the last failure left; the
/// final try succeeds.
fn fail_everywhere(lab: &Lab, serves: Option<u16>, plan: Planner<'_>) {
    drop(pins::write(&lab.bpffs.pins(), std::time::Duration::ZERO).expect("the pin directory"));
    let before = snapshot(lab);
    let mut stop = 0;
    loop {
        let counted = serves.map(|_| lab.packets("only", "one", "forwarded"));
        match carry_out(lab, plan, stop, Trouble::Failure) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.to_string(), "injected"),
        }
        assert_eq!(snapshot(lab), before, "after a failure at action {stop}");
        if let (Some(port), Some(counted)) = (serves, counted) {
            expect_way(lab, port);
            assert_eq!(lab.packets("only", "one", "forwarded"), counted + 1);
        }
        stop += 1;
    }
    assert!(stop > 2, "only {stop} actions could fail");
}

fn with_interfaces(config: Value, interfaces: &[&str]) -> Value {
    on(config, json!(interfaces))
}

fn on(config: Value, interfaces: Value) -> Value {
    let mut config = config;
    config["interfaces"] = interfaces;
    config
}

#[test]
fn failing_first_apply_leaves_nothing() {
    for lab in Lab::for_each_attachment() {
        let desired = wanted(&with_interfaces(to_port(7001), &["eth0", "up0"]));
        fail_everywhere(&lab, None, &|observed| {
            plan::apply(observed, &desired, &Origin::default(), false)
        });
        expect_way(&lab, 7001);
    }
}

#[test]
fn failing_apply_keeps_the_old_generation() {
    for lab in Lab::for_each_attachment() {
        // from two interfaces to one: detaches, with the clsact that udplb created
        let generic = json!({ "name": "eth0", "xdp": "generic" });
        lab.apply(&on(to_port(7001), json!([generic, "up0"])));
        let desired = wanted(&to_port(7002));
        fail_everywhere(&lab, Some(7001), &|observed| {
            plan::apply(observed, &desired, &Origin::default(), false)
        });
        expect_way(&lab, 7002);
        // back to two, with a generation to remove
        let desired = wanted(&on(to_port(7003), json!([generic, "up0"])));
        fail_everywhere(&lab, Some(7002), &|observed| {
            plan::apply(observed, &desired, &Origin::default(), false)
        });
        expect_way(&lab, 7003);
    }
}

#[test]
fn failing_rollback_keeps_the_new_generation() {
    let lab = Lab::new();
    lab.apply(&with_interfaces(to_port(7001), &["eth0", "up0"]));
    lab.apply(&to_port(7002));
    fail_everywhere(&lab, Some(7002), &|observed| plan::rollback(observed, 1_000));
    expect_way(&lab, 7001);
    assert_eq!(lab.status()["held"], 2);
    // out of the held state with --force
    let desired = wanted(&to_port(7002));
    fail_everywhere(&lab, Some(7001), &|observed| {
        plan::apply(observed, &desired, &Origin::default(), true)
    });
    expect_way(&lab, 7002);
    assert_eq!(lab.status()["held"], Value::Null);
}

#[test]
fn failing_apply_with_confirm_leaves_nothing_pending() {
    let lab = Lab::new();
    lab.apply(&with_interfaces(to_port(7001), &["eth0", "up0"]));
    let desired = std::sync::Arc::new(wanted(&to_port(7002)));
    let deadline = udplb::time::since_boot() + std::time::Duration::from_secs(3000);
    fail_everywhere(&lab, Some(7001), &|observed| {
        plan::apply_until(observed, &desired, &Origin::default(), false, Some(deadline))
    });
    assert_eq!(lab.status()["pending"]["previous"], 1);
    lab.run("confirm").expect(0);
    expect_way(&lab, 7002);
}

#[test]
fn failing_clean_up_is_no_failure() {
    let lab = Lab::new();
    for port in 7001..7003 {
        lab.apply(&to_port(port));
    }
    fs::create_dir(lab.bpffs.pins().join("building-9")).expect("leftovers");
    let desired = wanted(&to_port(7003));
    let plan = |observed: &Observed| plan::apply(observed, &desired, &Origin::default(), false);
    let all = carry_out(
        &lab,
        &|observed| {
            let mut plan = plan(observed)?;
            assert!(matches!(plan.actions.pop(), Some(Action::Drop(1))));
            Ok(plan)
        },
        usize::MAX,
        Trouble::Failure,
    );
    all.expect("all actions but the last");
    expect_way(&lab, 7003);
    assert!(lab.bpffs.pins().join("generations/1").exists());
    assert!(!lab.bpffs.pins().join("building-9").exists());
    assert_eq!(carry_out(&lab, &plan, 0, Trouble::Failure).expect("a warning only"), 1);
    assert!(lab.bpffs.pins().join("generations/1").exists());
    assert_eq!(lab.apply(&to_port(7003))["changed"], true);
    assert!(!lab.bpffs.pins().join("generations/1").exists());
    assert_eq!(lab.apply(&to_port(7003))["changed"], false);
}

#[test]
fn failing_take_over_leaves_the_orphan_serving() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    fs::remove_dir_all(lab.bpffs.pins().join("generations/1")).expect("pins");
    let before = lab.filters("eth0");
    let desired = wanted(&with_interfaces(to_port(7002), &["eth0", "up0"]));
    let plan = |observed: &Observed| plan::apply(observed, &desired, &Origin::default(), true);
    for stop in 0.. {
        match carry_out(&lab, &plan, stop, Trouble::Failure) {
            Ok(_) => break,
            Err(error) => assert_eq!(error.to_string(), "injected"),
        }
        assert_eq!(lab.filters("eth0"), before, "after a failure at action {stop}");
        expect_way(&lab, 7001);
    }
    expect_way(&lab, 7002);
}

#[test]
fn crash_at_any_executed_action_is_healed() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&with_interfaces(to_port(7001), &["eth0", "up0"]));
        // to one interface and back to two: all kinds of actions except those of a rollback
        let native = json!({ "name": "eth0", "xdp": "native" });
        let configurations =
            [on(to_port(7002), json!([native])), on(to_port(7001), json!(["eth0", "up0"]))]
                .map(|it| (wanted(&it), it));
        let mut stop = 0;
        'all: loop {
            for (desired, config) in &configurations {
                let plan =
                    |observed: &Observed| plan::apply(observed, desired, &Origin::default(), false);
                let crash =
                    std::panic::AssertUnwindSafe(|| carry_out(&lab, &plan, stop, Trouble::Crash));
                if let Ok(done) = std::panic::catch_unwind(crash) {
                    done.expect("no failure");
                    break 'all;
                }
                check_serving(&lab);
                lab.apply(config);
                lab.run("status").expect(0);
                assert_eq!(lab.apply(config)["changed"], false, "after a crash at action {stop}");
            }
            stop += 1;
        }
        assert!(stop > 4, "only {stop} actions could crash");
    }
}

#[test]
fn crash_at_any_rollback_action_is_healed() {
    let lab = Lab::new();
    let plan = |observed: &Observed| plan::rollback(observed, 1_000);
    for stop in 0.. {
        lab.apply(&with_interfaces(to_port(7001), &["eth0", "up0"]));
        lab.apply(&to_port(7002));
        let crash = std::panic::AssertUnwindSafe(|| carry_out(&lab, &plan, stop, Trouble::Crash));
        if let Ok(done) = std::panic::catch_unwind(crash) {
            assert!(done.expect("no failure") > 4);
            break;
        }
        check_serving(&lab);
        // retries the rollback, or runs the cron job's apply: held or not, one of them succeeds
        let again = lab.run("rollback");
        if stop % 2 == 0 || again.code != Some(0) {
            lab.try_apply(&to_port(7002), "--force").expect(0);
            expect_way(&lab, 7002);
        }
        lab.run("status").expect(0);
        check_serving(&lab);
        lab.run("detach --purge").expect(0);
    }
}

/// Checks that the old or the new upstream port receives the datagrams.
fn check_serving(lab: &Lab) {
    let receivers = [7001, 7002].map(|port| bind(&lab.upstream, UPSTREAMS[0], port));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    sender.send_to(b"anybody", (RELAY, 5000)).expect("sent");
    let arrived = || receivers.iter().any(|it| it.peek_from(&mut [0; 16]).is_ok());
    for receiver in &receivers {
        receiver.set_nonblocking(true).expect("a socket");
    }
    let end = std::time::Instant::now() + crate::common::net::PATIENCE;
    while !arrived() {
        assert!(std::time::Instant::now() < end, "nothing serves");
        std::thread::yield_now();
    }
}
