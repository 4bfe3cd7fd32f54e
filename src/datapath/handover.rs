//! Moves a program between a tc filter and a tcx link while packets come. Each packet meets the program once.
//!
//! While the program is at both, `udplb_mark` stands at tcx, marks each packet and runs the program, and `udplb_skip`
//! stands among the filters and runs it for packets without the mark. They are pinned in the generation's directory:
//! after a crash each of them alone still serves, and so do both.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::Context;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, Program};

use crate::bpf::{self, UdplbSkelBuilder};
use crate::datapath::description::ProgramName;
use crate::datapath::hook::{Attachment, wait_for_packets};
use crate::datapath::pins::{WriteGuard, names};
use crate::datapath::state_maps::random;
use crate::datapath::{tc, tcx};
use crate::error::catch;
use crate::net::Netlink;

/// Beginning of the names of its pins.
const PINS: &str = "handover-";

/// The two programs of a handover.
struct Pair {
    mark: OwnedFd,
    skip: OwnedFd,
}

/// Moves the program of an interface. `directory` is that of its generation.
///
/// # Errors
/// The handover is interrupted: the program serves, and a later one completes it.
pub async fn hand_over(
    guard: &WriteGuard,
    netlink: &Netlink,
    ifindex: u32,
    (directory, program): (&Path, BorrowedFd<'_>),
    (from, to): (Attachment, Attachment),
) -> anyhow::Result<()> {
    let filter = |program, replaces| tc::attach(guard, netlink, ifindex, program, replaces);
    let link = |program, replaces| tcx::attach(guard, ifindex, program, (replaces, None));
    // one of the pair may be there, of an interrupted handover
    match from {
        Attachment::Filter => filter(program, true).await?,
        Attachment::Link => link(program, true)?,
    }
    remove_pins(directory, ifindex)?;
    if from == to {
        return Ok(());
    }
    let pair = Pair::load(program, directory, ifindex)?;
    match to {
        Attachment::Link => {
            filter(pair.skip.as_fd(), true).await?;
            link(pair.mark.as_fd(), false)?;
            // packets that have passed tcx without the mark
            wait_for_packets();
            tc::detach(guard, netlink, ifindex).await?;
            wait_for_packets();
            link(program, true)?;
        }
        Attachment::Filter => {
            link(pair.mark.as_fd(), true)?;
            // packets that have passed tcx without the mark
            wait_for_packets();
            filter(pair.skip.as_fd(), false).await?;
            wait_for_packets();
            tcx::detach(guard, ifindex, None)?;
            // packets that have the mark
            wait_for_packets();
            filter(program, true).await?;
        }
    }
    remove_pins(directory, ifindex)
}

/// Removes the filter that an interrupted handover has left beside the link. The link serves.
pub async fn end(guard: &WriteGuard, netlink: &Netlink, ifindex: u32) -> anyhow::Result<()> {
    wait_for_packets();
    tc::detach(guard, netlink, ifindex).await?;
    wait_for_packets();
    Ok(())
}

impl Pair {
    /// Loads both for a program, and pins them with the map that leads to it: the map would lose the program with
    /// its last descriptor.
    fn load(program: BorrowedFd<'_>, directory: &Path, ifindex: u32) -> anyhow::Result<Pair> {
        catch(|| {
            let mut object = MaybeUninit::uninit();
            let mut skeleton = UdplbSkelBuilder::default().open(&mut object)?;
            bpf::load_only(&mut skeleton, &["udplb_mark", "udplb_skip"]);
            bpf::create_only(&mut skeleton, &["handover"])?;
            let constants = skeleton.maps.rodata_data.as_deref_mut();
            // no other handover's, and not 0
            constants.context("the object has no constants")?.handover_mark = random()? as u32 | 1;
            let mut skeleton = skeleton.load().context("the kernel refuses the handover")?;
            let map = &mut skeleton.maps.handover;
            let descriptor = program.as_raw_fd().to_ne_bytes();
            map.update(&0_u32.to_ne_bytes(), &descriptor, MapFlags::ANY)?;
            map.pin(pin_of(directory, ifindex, ""))?;
            skeleton.progs.udplb_mark.pin(pin_of(directory, ifindex, "-mark"))?;
            skeleton.progs.udplb_skip.pin(pin_of(directory, ifindex, "-skip"))?;
            Ok(Pair {
                mark: skeleton.progs.udplb_mark.as_fd().try_clone_to_owned()?,
                skip: skeleton.progs.udplb_skip.as_fd().try_clone_to_owned()?,
            })
        })
        .flatten()
    }
}

fn pin_of(directory: &Path, ifindex: u32, part: &str) -> PathBuf {
    directory.join(format!("{PINS}{ifindex}{part}"))
}

fn remove_pins(directory: &Path, ifindex: u32) -> anyhow::Result<()> {
    for path in ["-mark", "-skip", ""].map(|part| pin_of(directory, ifindex, part)) {
        if path.try_exists()? {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// Returns the pinned programs of interrupted handovers of a generation.
pub fn pinned_programs(directory: &Path) -> anyhow::Result<Vec<ProgramName>> {
    let pins = names(directory)?.into_iter();
    let programs = pins.filter(|name| name.starts_with(PINS) && name.matches('-').count() == 2);
    programs
        .map(|name| {
            let path = directory.join(name);
            let program = Program::fd_from_pinned_path(&path);
            let program = program.with_context(|| path.display().to_string())?;
            Ok(ProgramName::of(program.as_fd())?)
        })
        .collect()
}
