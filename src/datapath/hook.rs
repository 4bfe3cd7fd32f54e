//! The ingress hook of an interface: what runs there, and where our program is put.
//!
//! From Linux 6.6 on the program is attached by a tcx link, before by a tc filter. tcx runs before all filters, so an
//! interface with somebody else's filter ahead of our priority keeps the filter: what ran before us still does.

use std::io;
use std::os::fd::BorrowedFd;

use anyhow::Context;
use libbpf_rs::ProgramHandle;

use crate::bpf::tcx::{Attached, query};
use crate::datapath::description::ProgramName;
use crate::datapath::pin_search::Place;
use crate::datapath::pins::WriteGuard;
use crate::datapath::tc::{self, Filters};
use crate::datapath::tcx;
use crate::net::Netlink;
use crate::net::qdisc::Qdisc;

/// Selects the hook of our program on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// By a tc filter.
    Filter,
    /// By a tcx link.
    Link,
}

/// Our place at tc or tcx.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    Empty,
    /// A generation's program.
    Generation(u32),
    /// A program with our name whose generation is not here; it still runs.
    Orphan {
        program: u32,
        /// The filter or link in words.
        filter: String,
        /// Id of the link; `None`: a filter.
        link: Option<u32>,
        /// The pin directory that has it; `None`: there is none that can be seen from here.
        home: Option<Place>,
    },
    /// Somebody else's filter.
    Foreign(String),
}

/// The ingress hook of an interface.
#[derive(Clone, Debug)]
pub struct Hook {
    pub qdisc: Option<Qdisc>,
    /// Other filters hang on the same qdisc.
    pub shared: bool,
    /// Our place among the filters.
    pub filter: Slot,
    /// Our place among the tcx programs; never foreign.
    pub link: Slot,
    /// The tcx programs of others that run before ours.
    pub earlier: Vec<Attached>,
    /// The hook that our program belongs to, by the filters of others.
    pub attachment: Attachment,
    /// A program of an interrupted handover is attached.
    pub handover: bool,
}

/// A program that a generation has.
#[derive(Clone, Debug)]
pub struct Known {
    pub generation: u32,
    pub name: ProgramName,
    /// One of the two that run the generation's program during a handover.
    pub handover: bool,
}

impl Hook {
    /// A hook with nothing on it.
    pub fn empty(attachment: Attachment) -> Hook {
        Hook {
            qdisc: None,
            shared: false,
            filter: Slot::Empty,
            link: Slot::Empty,
            earlier: Vec::new(),
            attachment,
            handover: false,
        }
    }

    /// Returns how a program of udplb is attached; `None`: there is none. tcx runs first.
    pub fn present(&self) -> Option<Attachment> {
        match (&self.link, &self.filter) {
            (Slot::Empty, Slot::Empty | Slot::Foreign(_)) => None,
            (Slot::Empty, _) => Some(Attachment::Filter),
            _ => Some(Attachment::Link),
        }
    }

    /// Returns the place that decides: where a program of udplb is, or else where ours is to be.
    pub fn slot(&self) -> &Slot {
        self.slot_at(self.present().unwrap_or(self.attachment))
    }

    fn slot_at(&self, attachment: Attachment) -> &Slot {
        match attachment {
            Attachment::Filter => &self.filter,
            Attachment::Link => &self.link,
        }
    }

    /// Returns true if a filter of a generation is left beside a link: a handover was interrupted.
    pub fn is_double(&self) -> bool {
        self.link != Slot::Empty && matches!(self.filter, Slot::Generation(_))
    }
}

/// Returns the command that takes an orphan off an interface.
pub fn removal(interface: &str, link: Option<u32>) -> String {
    match link {
        None => format!("tc filter del dev {interface} ingress pref {}", tc::PRIORITY),
        Some(id) => format!("bpftool link detach id {id}"),
    }
}

/// Reads the hook of an interface. `known` are the programs of the generations that exist, by either of two
/// witnesses: the pinned program itself, or the name recorded in the description.
pub async fn read(
    netlink: &Netlink,
    ifindex: u32,
    qdisc: Option<Qdisc>,
    known: &[Known],
) -> anyhow::Result<Hook> {
    let programs = match query(ifindex) {
        // the interface is gone meanwhile, or this user may not ask
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)) => None,
        answer => answer.context("its tcx programs")?,
    };
    let filters = tc::read(netlink, ifindex, qdisc, known).await?;
    Ok(classify(qdisc, filters, programs.as_deref(), known, name_of))
}

/// Judges what is on a hook; `programs` are those at tcx, if the kernel has it, and `name_of` names a program.
fn classify(
    qdisc: Option<Qdisc>,
    filters: Filters,
    programs: Option<&[Attached]>,
    known: &[Known],
    name_of: impl Fn(u32) -> Option<String>,
) -> Hook {
    let Filters { slot, shared, is_first, handover } = filters;
    let attachment = match programs {
        Some(_) if is_first => Attachment::Link,
        _ => Attachment::Filter,
    };
    let mut hook = Hook { qdisc, shared, filter: slot, handover, ..Hook::empty(attachment) };
    for program in programs.unwrap_or_default() {
        // one that somebody attached without a link is not ours
        let own = known.iter().find(|own| own.name.id == program.program && program.link != 0);
        match own {
            Some(own) => {
                hook.link = Slot::Generation(own.generation);
                hook.handover |= own.handover;
                return hook;
            }
            None => hook.earlier.push(*program),
        }
        if hook.link == Slot::Empty {
            hook.link = orphan(program, &name_of);
        }
    }
    hook
}

/// Judges a tcx program of no generation here.
fn orphan(attached: &Attached, name_of: impl Fn(u32) -> Option<String>) -> Slot {
    let Attached { program, link } = *attached;
    let name = name_of(program).filter(|name| link != 0 && name.starts_with(tc::NAME));
    name.map_or(Slot::Empty, |name| Slot::Orphan {
        program,
        filter: format!("tcx link {link} {name} (program {program})"),
        link: Some(link),
        home: None,
    })
}

/// Returns the name of a program; `None` without CAP_SYS_ADMIN.
fn name_of(program: u32) -> Option<String> {
    Some(ProgramHandle::from_prog_id(program).ok()?.name().to_string_lossy().into_owned())
}

/// Attaches the program, in place of ours there if `replaces`; `old` is that one, if it can be opened.
///
/// # Errors
/// Another program runs there afterwards, whatever the kernel answered.
pub async fn attach(
    guard: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
    attachment: Attachment,
    program: BorrowedFd<'_>,
    (replaces, old): (bool, Option<BorrowedFd<'_>>),
) -> anyhow::Result<()> {
    match attachment {
        Attachment::Filter => tc::attach(guard, netlink, ifindex, program, replaces).await,
        Attachment::Link => tcx::attach(guard, ifindex, program, (replaces, old)),
    }
}

/// Takes our program away. `program` is the one there, if it can be opened.
///
/// # Errors
/// It is there afterwards, whatever the kernel answered.
pub async fn detach(
    guard: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
    attachment: Attachment,
    program: Option<BorrowedFd<'_>>,
) -> anyhow::Result<()> {
    match attachment {
        Attachment::Filter => tc::detach(guard, netlink, ifindex).await,
        Attachment::Link => tcx::detach(guard, ifindex, program),
    }
}

/// Waits until every packet that is being processed now has left the hook; for longer than that takes where the
/// kernel cannot be asked to wait.
pub fn wait_for_packets() {
    /// `MEMBARRIER_CMD_GLOBAL` of linux/membarrier.h: an RCU grace period, in which ingress runs.
    const GLOBAL: i32 = 1;
    // SAFETY: takes plain numbers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result < 0 {
        log::debug!("membarrier: {}", io::Error::last_os_error());
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}

#[cfg(test)]
mod tests {
    use super::{Attached, Attachment, Filters, Hook, Known, Slot, classify};
    use crate::datapath::description::ProgramName;

    fn hook(filters: Filters, programs: Option<&[(u32, u32)]>) -> Hook {
        let known = |generation, id, handover| Known {
            generation,
            name: ProgramName::new(id, [0; 8]),
            handover,
        };
        let known = [known(41, 1, false), known(42, 2, false), known(42, 3, true)];
        let attached = |list: &[(u32, u32)]| {
            list.iter().map(|&(program, link)| Attached { program, link }).collect::<Vec<_>>()
        };
        let name = |program| (program != 7).then(|| format!("udplb_{program}"));
        classify(None, filters, programs.map(attached).as_deref(), &known, name)
    }

    fn filters(slot: Slot, is_first: bool) -> Filters {
        Filters { slot, shared: false, is_first, handover: false }
    }

    #[test]
    fn links_are_for_kernels_that_have_them() {
        let attachment =
            |is_first, programs| hook(filters(Slot::Empty, is_first), programs).attachment;
        assert_eq!(attachment(true, None), Attachment::Filter);
        assert_eq!(attachment(true, Some(&[][..])), Attachment::Link);
        // somebody's filter would run after a link
        assert_eq!(attachment(false, Some(&[][..])), Attachment::Filter);
    }

    #[test]
    fn links_are_known_by_their_programs() {
        let empty = || filters(Slot::Empty, true);
        let slot = |programs: &[(u32, u32)]| hook(empty(), Some(programs)).slot().clone();
        assert_eq!(slot(&[]), Slot::Empty);
        assert_eq!(slot(&[(7, 1), (2, 5)]), Slot::Generation(42));
        // attached without a link, or of an unknown name
        assert_eq!(slot(&[(2, 0), (7, 1)]), Slot::Empty);
        let text = "tcx link 6 udplb_9 (program 9)";
        let orphan = Slot::Orphan { program: 9, filter: text.into(), link: Some(6), home: None };
        assert_eq!(slot(&[(9, 6)]), orphan);
        assert_eq!(slot(&[(9, 6), (1, 7)]), Slot::Generation(41));
        assert!(hook(empty(), Some(&[(3, 6)])).handover);
        let earlier = hook(empty(), Some(&[(7, 1), (2, 5), (8, 2)])).earlier;
        assert_eq!(earlier, [Attached { program: 7, link: 1 }]);
    }

    #[test]
    fn place_that_decides_is_the_one_in_use() {
        let both = hook(filters(Slot::Generation(41), true), Some(&[(2, 6)]));
        assert_eq!((both.slot(), both.is_double()), (&Slot::Generation(42), true));
        let old = hook(filters(Slot::Generation(41), true), Some(&[]));
        assert_eq!((old.slot(), old.is_double()), (&Slot::Generation(41), false));
        assert_eq!(old.present(), Some(Attachment::Filter));
        // somebody's filter at our priority is no obstacle to a link
        let taken = || Slot::Foreign("flower".into());
        assert_eq!(hook(filters(taken(), true), Some(&[])).slot(), &Slot::Empty);
        assert_eq!(hook(filters(taken(), true), None).slot(), &taken());
    }
}
