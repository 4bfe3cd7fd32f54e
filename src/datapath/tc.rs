//! Our filter on an interface: how it is recognised, put there and taken away.

use std::io;
use std::os::fd::BorrowedFd;

use anyhow::{Context, bail};

use crate::bpf;
use crate::datapath::description::ProgramName;
use crate::datapath::hook::{Known, Slot};
use crate::datapath::pins::WriteGuard;
use crate::net::Netlink;
use crate::net::qdisc::{Direction, ETH_P_ALL, Filter, Qdisc};

/// Priority of the filter. Filters of a lower priority run before it; those of a higher one get the
/// packets that it passes on.
pub const PRIORITY: u16 = 100;
/// One of our own, so that other programs of the same priority have theirs.
pub const HANDLE: u32 = 0x7564;
/// Beginning of the names of our programs.
pub const NAME: &str = "udplb";

/// The filters of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filters {
    /// Our place.
    pub slot: Slot,
    /// There are others on the same qdisc.
    pub shared: bool,
    /// No other filter runs before our priority on ingress.
    pub is_first: bool,
    /// In our place is a program of an interrupted handover.
    pub handover: bool,
}

/// Reads the filters of an interface.
pub async fn read(
    netlink: &Netlink,
    ifindex: u32,
    qdisc: Option<Qdisc>,
    known: &[Known],
) -> anyhow::Result<Filters> {
    if qdisc.is_none() {
        return Ok(classify(&[], &[], known));
    }
    let ingress = netlink.filters(ifindex, Direction::Ingress).await?;
    let egress = match qdisc {
        Some(Qdisc::Clsact) => netlink.filters(ifindex, Direction::Egress).await?,
        _ => Vec::new(),
    };
    Ok(classify(&ingress, &egress, known))
}

/// Judges the filters of an interface.
fn classify(ingress: &[Filter], egress: &[Filter], known: &[Known]) -> Filters {
    let mut found =
        Filters { slot: Slot::Empty, shared: !egress.is_empty(), is_first: true, handover: false };
    for filter in ingress {
        if !is_in_our_place(filter) {
            found.shared = true;
            found.is_first &= (filter.chain, filter.priority < PRIORITY) != (0, true);
            if takes_priority(filter) && found.slot == Slot::Empty {
                found.slot = Slot::Foreign(describe(filter));
            }
            continue;
        }
        let own = filter.program.as_ref().and_then(|program| {
            let name = ProgramName::new(program.id, program.tag);
            known.iter().find(|known| known.name == name)
        });
        found.handover = own.is_some_and(|own| own.handover);
        found.slot = match (own, &filter.program) {
            (Some(own), _) => Slot::Generation(own.generation),
            (None, Some(program)) if program.name == NAME => {
                let (program, filter) = (program.id, describe(filter));
                Slot::Orphan { program, filter, link: None, home: None }
            }
            _ => Slot::Foreign(describe(filter)),
        };
    }
    found
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

/// Puts the program on the interface, in place of our filter there where `replace` says so.
///
/// # Errors
/// Another program runs there afterwards, whatever the kernel answered.
pub async fn attach(
    _: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
    program: BorrowedFd<'_>,
    replace: bool,
) -> anyhow::Result<()> {
    let wanted = bpf::program_info(program).context("the program")?.id;
    let answer = netlink.set_filter(ifindex, PRIORITY, HANDLE, NAME, program, replace).await;
    settle(answer, netlink, ifindex, |found| found == Some(wanted)).await
}

/// Takes our filter away.
///
/// # Errors
/// It is there afterwards, whatever the kernel answered.
pub async fn detach(_: &WriteGuard, netlink: &Netlink, ifindex: u32) -> anyhow::Result<()> {
    let answer = netlink.delete_filter(ifindex, PRIORITY, HANDLE).await;
    settle(answer, netlink, ifindex, |found| found.is_none()).await
}

/// Looks whether what was asked for is there: an answer may be lost, and its connection with it.
async fn settle(
    answer: io::Result<()>,
    netlink: &Netlink,
    ifindex: u32,
    is_done: impl Fn(Option<u32>) -> bool,
) -> anyhow::Result<()> {
    // the kernel has refused it
    if answer.as_ref().is_err_and(|error| error.raw_os_error().is_some()) {
        return answer.context("the tc filter");
    }
    let found = match attached(netlink, ifindex).await {
        Ok(found) => found,
        Err(_) => {
            let anew = Netlink::open().context("netlink")?;
            attached(&anew, ifindex).await.context("the tc filter cannot be read back")?
        }
    };
    match (is_done(found), answer) {
        (true, _) => Ok(()),
        (false, Err(error)) => Err(error).context("the tc filter"),
        (false, Ok(())) => bail!(
            "the tc filter: the kernel said that it is done, and it is not; another program \
             changes the same filter"
        ),
    }
}

/// The program that our filter on an interface runs.
async fn attached(netlink: &Netlink, ifindex: u32) -> io::Result<Option<u32>> {
    let filters = netlink.filters(ifindex, Direction::Ingress).await?;
    let ours = filters.into_iter().find(is_in_our_place);
    Ok(ours.and_then(|filter| filter.program).map(|program| program.id))
}

fn is_in_our_place(filter: &Filter) -> bool {
    (filter.chain, filter.priority, filter.handle) == (0, PRIORITY, HANDLE)
}

/// Puts a clsact onto an interface that has none.
pub async fn add_clsact(_: &WriteGuard, netlink: &Netlink, ifindex: u32) -> anyhow::Result<()> {
    match netlink.add_clsact(ifindex).await {
        // the answer was lost
        Err(error) if error.raw_os_error().is_none() => {
            let qdiscs = Netlink::open().context("netlink")?.qdiscs().await.context("qdiscs")?;
            match qdiscs.contains(&(ifindex, Qdisc::Clsact)) {
                true => Ok(()),
                false => Err(error).context("the clsact qdisc"),
            }
        }
        answer => answer.context("the clsact qdisc"),
    }
}

/// Takes a clsact of ours away, unless anything hangs on it: the kernel would take that away with it, and
/// cannot be asked to look first. What somebody adds between the look and the request is lost.
pub async fn delete_unused_clsact(
    _: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
) -> anyhow::Result<()> {
    let is_there = netlink.qdiscs().await?.contains(&(ifindex, Qdisc::Clsact));
    for direction in [Direction::Egress, Direction::Ingress] {
        if !is_there || !netlink.filters(ifindex, direction).await?.is_empty() {
            return Ok(());
        }
    }
    netlink.delete_clsact(ifindex).await.context("the clsact qdisc")
}

#[cfg(test)]
mod tests {
    use super::{Filters, HANDLE, NAME, PRIORITY, classify};
    use crate::datapath::description::ProgramName;
    use crate::datapath::hook::{Known, Slot};
    use crate::net::qdisc::{ETH_P_ALL, Filter, FilterProgram};

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

    fn found(filters: &[Filter]) -> Filters {
        let known = [(41, 1), (42, 2)].map(|(generation, id)| Known {
            generation,
            name: ProgramName::new(id, [id as u8; 8]),
            handover: id == 2,
        });
        classify(filters, &[], &known)
    }

    fn slot(filters: &[Filter]) -> (Slot, bool) {
        let found = found(filters);
        (found.slot, found.shared)
    }

    #[test]
    fn ours_is_known_by_id_and_tag() {
        assert_eq!(slot(&[]), (Slot::Empty, false));
        assert_eq!(slot(&[filter(2)]), (Slot::Generation(42), false));
        let text = "bpf pref 100 handle 0x7564 udplb (program 3)";
        let orphan = Slot::Orphan { program: 3, filter: text.into(), link: None, home: None };
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
    fn filters_before_ours_are_seen() {
        let first = |other: Filter| found(&[filter(2), other]).is_first;
        assert!(found(&[]).is_first);
        assert!(!first(Filter { priority: 99, ..filter(9) }));
        assert!(first(Filter { priority: 99, chain: 5, ..filter(9) }));
        assert!(first(Filter { priority: 101, ..filter(9) }));
        assert!(first(Filter { handle: 1, ..filter(9) }));
        assert_eq!([filter(1), filter(2)].map(|it| found(&[it]).handover), [false, true]);
    }

    #[test]
    fn egress_is_on_the_same_qdisc() {
        assert!(classify(&[filter(1)], &[filter(9)], &[]).shared);
    }
}
