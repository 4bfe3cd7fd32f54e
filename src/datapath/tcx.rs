//! Our link on the tcx hook of an interface, by the interface's index in the pin directory. The link lasts as long as
//! its pin; replacing its program is the commit point of a swap.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, bail};

use crate::bpf;
use crate::bpf::tcx;
use crate::datapath::pins::WriteGuard;

/// Attaches the program, in place of ours there if `replaces`; `old` is that one, if it can be opened.
pub fn attach(
    guard: &WriteGuard,
    ifindex: u32,
    program: BorrowedFd<'_>,
    (replaces, old): (bool, Option<BorrowedFd<'_>>),
) -> anyhow::Result<()> {
    if let Some(link) = find(guard, ifindex, old)? {
        return tcx::replace(link.as_fd(), program, old).context("the tcx link");
    }
    if replaces {
        bail!("the tcx link is gone, or another program has changed it");
    }
    let link = tcx::attach(program, ifindex).context("a tcx link")?;
    // without its pin the link goes with this descriptor
    pin(guard, ifindex, &link)
}

/// Takes our link away. `program` is the one there, if it can be opened.
pub fn detach(
    guard: &WriteGuard,
    ifindex: u32,
    program: Option<BorrowedFd<'_>>,
) -> anyhow::Result<()> {
    let link = find(guard, ifindex, program)?.context("the tcx link is gone")?;
    tcx::detach(link.as_fd()).context("the tcx link")?;
    let path = guard.link(ifindex);
    fs::remove_file(&path).with_context(|| path.display().to_string())
}

/// Opens our link on an interface: the pinned one, or else the one that runs `program`, which is pinned again.
fn find(
    guard: &WriteGuard,
    ifindex: u32,
    program: Option<BorrowedFd<'_>>,
) -> anyhow::Result<Option<OwnedFd>> {
    if let Some(link) = open_pinned(guard, ifindex)? {
        return Ok(Some(link));
    }
    let Some(program) = program else { return Ok(None) };
    let id = bpf::program_info(program).context("the program")?.id;
    let attached = tcx::query(ifindex).context("tcx programs")?.unwrap_or_default();
    let Some(found) = attached.into_iter().find(|it| it.program == id && it.link != 0) else {
        return Ok(None);
    };
    let link = tcx::open_id(found.link).with_context(|| format!("tcx link {}", found.link))?;
    pin(guard, ifindex, &link)?;
    Ok(Some(link))
}

fn pin(guard: &WriteGuard, ifindex: u32, link: &OwnedFd) -> anyhow::Result<()> {
    let path = guard.link(ifindex);
    tcx::pin(link.as_fd(), &path).with_context(|| path.display().to_string())
}

/// Opens the pinned link of an interface. Removes the pin if the link is there no more: somebody has detached it, or
/// the interface is gone or in another network namespace.
fn open_pinned(guard: &WriteGuard, ifindex: u32) -> anyhow::Result<Option<OwnedFd>> {
    let path = guard.link(ifindex);
    let context = || path.display().to_string();
    let link = match tcx::open(&path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(context),
    };
    let info = tcx::info(link.as_fd()).with_context(context)?;
    if info.ifindex == ifindex && is_here(ifindex, info.id)? {
        return Ok(Some(link));
    }
    fs::remove_file(&path).with_context(context)?;
    Ok(None)
}

/// Returns true if the link is on the interface with this index in this network namespace.
fn is_here(ifindex: u32, link: u32) -> anyhow::Result<bool> {
    match tcx::query(ifindex) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        attached => {
            let attached = attached.context("tcx programs")?.unwrap_or_default();
            Ok(attached.iter().any(|it| it.link == link))
        }
    }
}

/// Removes the pins of links that are there no more, each of which would keep its program.
pub fn sweep(guard: &WriteGuard) -> anyhow::Result<()> {
    guard.links()?.into_iter().try_for_each(|ifindex| open_pinned(guard, ifindex).map(drop))
}
