//! Our filter on an interface: how it is recognised, put there and taken away.

use std::os::fd::BorrowedFd;

use anyhow::Context;

use crate::generation::ProgramName;
use crate::netlink::{Direction, ETH_P_ALL, Filter, Netlink, Qdisc};
use crate::state::WriteGuard;

/// Where the filter sits on the hook. Filters of a lower priority run before it, and those of a
/// higher one see what it leaves alone.
pub const PRIORITY: u16 = 100;
/// One of our own, so that other programs of the same priority have theirs.
pub const HANDLE: u32 = 0x7564;
const NAME: &str = "udplb";

/// What is at our priority and handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Slot {
    Empty,
    /// A generation's program.
    Generation(u32),
    /// A filter with our name whose generation is gone; the program still runs.
    Orphan {
        program: u32,
        filter: String,
    },
    /// Somebody else's.
    Foreign(String),
}

/// The ingress hook of an interface.
#[derive(Clone, Debug)]
pub struct Hook {
    pub qdisc: Option<Qdisc>,
    pub slot: Slot,
    /// Other filters hang on the same qdisc.
    pub shared: bool,
}

/// Judges what is on a hook. `programs` are those of the generations that exist, by either of
/// two witnesses: the pinned program itself, or the name recorded in the description.
pub fn judge(
    qdisc: Option<Qdisc>,
    ingress: &[Filter],
    egress: &[Filter],
    programs: &[(u32, ProgramName)],
) -> Hook {
    let mut hook = Hook { qdisc, slot: Slot::Empty, shared: !egress.is_empty() };
    for filter in ingress {
        if (filter.chain, filter.priority, filter.handle) != (0, PRIORITY, HANDLE) {
            hook.shared = true;
            if takes_priority(filter) && hook.slot == Slot::Empty {
                hook.slot = Slot::Foreign(describe(filter));
            }
            continue;
        }
        let own = filter.program.as_ref().and_then(|program| {
            let name = ProgramName::new(program.id, program.tag);
            programs.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
        });
        hook.slot = match (own, &filter.program) {
            (Some(number), _) => Slot::Generation(number),
            (None, Some(program)) if program.name == NAME => {
                Slot::Orphan { program: program.id, filter: describe(filter) }
            }
            _ => Slot::Foreign(describe(filter)),
        };
    }
    hook
}

/// A priority belongs to one kind of filter and one protocol.
fn takes_priority(filter: &Filter) -> bool {
    (filter.chain, filter.priority) == (0, PRIORITY)
        && (filter.kind.as_str(), filter.protocol) != ("bpf", ETH_P_ALL)
}

/// A filter in words.
pub fn describe(filter: &Filter) -> String {
    let place = format!("pref {} handle {:#x}", filter.priority, filter.handle);
    match &filter.program {
        Some(program) => {
            format!("{} {place} {} (program {})", filter.kind, program.name, program.id)
        }
        None => format!("{} {place}", filter.kind),
    }
}

/// The hook of an interface as it is now.
pub async fn hook(
    netlink: &Netlink,
    ifindex: u32,
    qdisc: Option<Qdisc>,
    programs: &[(u32, ProgramName)],
) -> anyhow::Result<Hook> {
    if qdisc.is_none() {
        return Ok(judge(None, &[], &[], programs));
    }
    let ingress = netlink.filters(ifindex, Direction::Ingress).await?;
    let egress = match qdisc {
        Some(Qdisc::Clsact) => netlink.filters(ifindex, Direction::Egress).await?,
        _ => Vec::new(),
    };
    Ok(judge(qdisc, &ingress, &egress, programs))
}

/// Puts the program on the interface, in place of our filter there where `replace` says so.
pub async fn attach(
    _: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
    program: BorrowedFd<'_>,
    replace: bool,
) -> anyhow::Result<()> {
    netlink
        .set_filter(ifindex, PRIORITY, HANDLE, NAME, program, replace)
        .await
        .context("the tc filter")
}

/// Takes our filter away, and the clsact where the caller knows that it is ours and unused.
pub async fn detach(
    _: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
    clsact: bool,
) -> anyhow::Result<()> {
    netlink.delete_filter(ifindex, PRIORITY, HANDLE).await.context("the tc filter")?;
    if clsact {
        netlink.delete_clsact(ifindex).await.context("the clsact qdisc")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{HANDLE, NAME, PRIORITY, Slot, judge};
    use crate::generation::ProgramName;
    use crate::netlink::{ETH_P_ALL, Filter, FilterProgram, Qdisc};

    /// Ours, of the program with this id.
    fn filter(id: u32) -> Filter {
        Filter {
            chain: 0,
            priority: PRIORITY,
            protocol: ETH_P_ALL,
            handle: HANDLE,
            kind: "bpf".into(),
            program: Some(FilterProgram { id, name: NAME.into(), tag: [id as u8; 8] }),
            direct: true,
            action: None,
        }
    }

    fn slot(filters: &[Filter]) -> (Slot, bool) {
        let programs = [(41, ProgramName::new(1, [1; 8])), (42, ProgramName::new(2, [2; 8]))];
        let hook = judge(Some(Qdisc::Clsact), filters, &[], &programs);
        (hook.slot, hook.shared)
    }

    #[test]
    fn ours_is_known_by_id_and_tag() {
        assert_eq!(slot(&[]), (Slot::Empty, false));
        assert_eq!(slot(&[filter(2)]), (Slot::Generation(42), false));
        let text = "bpf pref 100 handle 0x7564 udplb (program 3)";
        let orphan = Slot::Orphan { program: 3, filter: text.into() };
        assert_eq!(slot(&[filter(3)]), (orphan, false));
        // an id that was given to another program
        let mut reused = filter(1);
        reused.program.as_mut().expect("a program").tag = [9; 8];
        assert!(matches!(slot(&[reused]).0, Slot::Orphan { program: 1, .. }));
    }

    #[test]
    fn others_are_let_alone_unless_they_take_our_place() {
        let beside = [
            Filter { priority: 99, ..filter(9) },
            Filter { handle: 1, ..filter(9) },
            Filter { chain: 5, ..filter(9) },
            Filter { chain: 5, kind: "u32".into(), program: None, ..filter(9) },
        ];
        for other in beside {
            assert_eq!(slot(std::slice::from_ref(&other)), (Slot::Empty, true));
            for both in [[other.clone(), filter(1)], [filter(1), other]] {
                assert_eq!(slot(&both), (Slot::Generation(41), true));
            }
        }
        let named = |filter: Filter| match slot(&[filter]).0 {
            Slot::Foreign(text) => text,
            slot => panic!("{slot:?}"),
        };
        let mut theirs = filter(9);
        theirs.program.as_mut().expect("a program").name = "theirs".into();
        assert_eq!(named(theirs), "bpf pref 100 handle 0x7564 theirs (program 9)");
        let classic = Filter { program: None, ..filter(9) };
        assert_eq!(named(classic), "bpf pref 100 handle 0x7564");
        let kind = Filter { kind: "flower".into(), handle: 1, program: None, ..filter(9) };
        assert_eq!(named(kind), "flower pref 100 handle 0x1");
        let protocol = Filter { protocol: 0x0800, handle: 1, program: None, ..filter(9) };
        assert_eq!(named(protocol), "bpf pref 100 handle 0x1");
    }

    #[test]
    fn egress_is_on_the_same_qdisc() {
        let hook = judge(Some(Qdisc::Clsact), &[filter(1)], &[filter(9)], &[]);
        assert!(hook.shared);
    }
}
