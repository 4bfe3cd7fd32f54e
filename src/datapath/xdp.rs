//! Our program on the XDP hook of an interface, by a link that lasts as long as its pin. There is one program at
//! most: another's is left alone. Whatever happens here loses no packet, since all that XDP passes on is processed
//! at tc.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use libbpf_rs::{MapCore, MapFlags, MapHandle, ProgramHandle};

use crate::bpf::{bytes_of_all, tcx, types, xdp};
use crate::config::Xdp;
use crate::datapath::description::Generation;
use crate::datapath::gate::Gate;
use crate::datapath::pins::{ReadGuard, WriteGuard};
use crate::net::link::{Layer, Link};

/// Names of pins in a generation's directory.
pub const PROGRAM: &str = "program-xdp";
pub const DEVICES: &str = "devices";
pub const SENT: &str = "xdp-sent";

/// The program on the XDP hook of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Slot {
    #[default]
    Empty,
    /// Ours. Its generation is `None` if it is gone.
    Own { generation: Option<u32>, mode: Xdp },
    /// Another's, by id and name.
    Other(String),
}

/// Reads the hook of an interface. `known` are the generations' XDP programs by id.
pub fn read(guard: Option<&ReadGuard>, link: &Link, known: &BTreeMap<u32, u32>) -> Slot {
    let Some((mode, program)) = link.xdp.first() else { return Slot::Empty };
    let mode = if *mode == "xdpgeneric" { Xdp::Generic } else { Xdp::Native };
    let generation = known.get(program).copied();
    if generation.is_some() || guard.is_some_and(|guard| is_pinned(guard, link.index, *program)) {
        return Slot::Own { generation, mode };
    }
    let name = ProgramHandle::from_prog_id(*program);
    Slot::Other(name.map_or(program.to_string(), |it| format!("{program} {}", it.name().display())))
}

/// Returns true if our link on an interface runs a program.
fn is_pinned(guard: &ReadGuard, ifindex: u32, program: u32) -> bool {
    let link = tcx::open(&guard.xdp_link(ifindex));
    let info = link.and_then(|link| xdp::info(link.as_fd()));
    info.is_ok_and(|info| (info.ifindex, info.program) == (ifindex, program))
}

/// Attaches the program, in place of ours there if `there` is its mode.
///
/// # Errors
/// Another's program is attached, or the driver lacks XDP.
pub fn attach(
    guard: &WriteGuard,
    ifindex: u32,
    program: BorrowedFd<'_>,
    mode: Xdp,
    there: Option<Xdp>,
) -> anyhow::Result<()> {
    if there == Some(mode)
        && let Some(link) = open(guard, ifindex)?
    {
        return tcx::replace(link.as_fd(), program, None).context("the XDP link");
    }
    detach(guard, ifindex)?;
    let link = xdp::attach(program, ifindex, mode == Xdp::Generic).with_context(|| match mode {
        Xdp::Native => {
            "an XDP link to the driver, which may lack XDP, or ask for a smaller MTU (`xdp: generic` \
             needs no driver)"
        }
        _ => "an XDP link",
    })?;
    // without its pin the link goes with this descriptor
    let path = guard.xdp_link(ifindex);
    tcx::pin(link.as_fd(), &path).with_context(|| path.display().to_string())
}

/// Takes our program away, if it is there.
pub fn detach(guard: &WriteGuard, ifindex: u32) -> anyhow::Result<()> {
    let Some(link) = open(guard, ifindex)? else { return Ok(()) };
    tcx::detach(link.as_fd()).context("the XDP link")?;
    let path = guard.xdp_link(ifindex);
    fs::remove_file(&path).with_context(|| path.display().to_string())
}

/// Opens our link on an interface. Removes the pin of a link that is on no interface or another one.
fn open(guard: &WriteGuard, ifindex: u32) -> anyhow::Result<Option<OwnedFd>> {
    let path = guard.xdp_link(ifindex);
    let context = || path.display().to_string();
    let link = match tcx::open(&path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(context),
    };
    if xdp::info(link.as_fd()).with_context(context)?.ifindex == ifindex {
        return Ok(Some(link));
    }
    fs::remove_file(&path).with_context(context)?;
    Ok(None)
}

/// Writes the devices that the XDP program of a generation meets; `modes` are those of its interfaces.
pub fn write_devices(
    directory: &Path,
    modes: &BTreeMap<String, Xdp>,
    links: &[Link],
    gate: &Gate,
) -> anyhow::Result<()> {
    let path = directory.join(DEVICES);
    let map = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    let mut devices = vec![types::device::default(); map.max_entries() as usize];
    for link in links.iter().filter(|link| link.layer == Some(Layer::Ethernet)) {
        if let Some(device) = devices.get_mut(link.index as usize) {
            device.mac = link.mac.unwrap_or_default();
            device.generic = (modes.get(&link.name) == Some(&Xdp::Generic)).into();
            device.takes_frames = xdp::takes_frames(link.index).into();
        }
    }
    let keys: Vec<u8> = (0..map.max_entries()).flat_map(u32::to_ne_bytes).collect();
    let (any, count) = (MapFlags::ANY, map.max_entries());
    map.update_batch(&keys, bytes_of_all(&devices), count, any, any).context(DEVICES)?;
    gate.advance();
    Ok(())
}

/// Returns the number of packets that a generation's XDP program has sent; `None` if it has no such program.
pub fn sent(guard: &ReadGuard, generation: &Generation) -> anyhow::Result<Option<u64>> {
    let path = guard.generation(generation.number).join(SENT);
    if !path.try_exists()? {
        return Ok(None);
    }
    let map = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    let values = map.lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY)?.unwrap_or_default();
    let number = |value: &Vec<u8>| value.as_slice().try_into().map_or(0, u64::from_ne_bytes);
    Ok(Some(values.iter().map(number).sum()))
}
