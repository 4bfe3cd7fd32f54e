//! The tables of flows: each generation pins those that it uses, and a new one takes over those of a generation
//! before that have the same size.

use anyhow::Context;
use libbpf_rs::{MapCore, MapHandle, OpenMapMut};

use std::os::fd::AsFd;

use crate::bpf::OpenUdplbSkel;
use crate::config::Family;
use crate::datapath::description::Generation;
use crate::datapath::pins::ReadGuard;
use crate::desired::{Desired, flows};

/// Sets the sizes of the tables: one entry for a family without flows.
pub fn size(skeleton: &mut OpenUdplbSkel<'_>, desired: &Desired) -> anyhow::Result<()> {
    let maps = &mut skeleton.maps;
    let (buckets, lines) = (flows::buckets(&desired.flows), flows::port_lines(&desired.flows));
    for (family, table, ports) in [
        (Family::V4, &mut maps.flows, &mut maps.ports),
        (Family::V6, &mut maps.flows6, &mut maps.ports6),
    ] {
        if desired.has_flows(family) {
            table.set_max_entries(buckets)?;
            ports.set_max_entries(lines)?;
        }
    }
    Ok(())
}

/// Takes over the tables of the latest of other generations that has them in the same size, with all flows.
pub fn take_over(
    guard: &ReadGuard,
    skeleton: &mut OpenUdplbSkel<'_>,
    desired: &Desired,
    others: &[&Generation],
) -> anyhow::Result<()> {
    let mut numbers: Vec<u32> = others.iter().map(|other| other.number).collect();
    numbers.sort_unstable_by(|one, other| other.cmp(one));
    let maps = &mut skeleton.maps;
    for (family, mut pair) in [
        (Family::V4, [&mut maps.flows, &mut maps.ports]),
        (Family::V6, [&mut maps.flows6, &mut maps.ports6]),
    ] {
        if !desired.has_flows(family) {
            continue;
        }
        let same = |number: &u32| {
            let pinned = |map: &OpenMapMut<'_>| {
                let path = guard.generation(*number).join(map.name());
                let pinned = MapHandle::from_pinned_path(path).ok()?;
                let same = pinned.max_entries() == map.max_entries()
                    && pinned.value_size() == map.value_size()
                    && pinned.map_type() == map.map_type();
                same.then_some(pinned)
            };
            Some([pinned(pair[0])?, pinned(pair[1])?])
        };
        let Some(pinned) = numbers.iter().find_map(same) else { continue };
        for (map, pinned) in pair.iter_mut().zip(pinned) {
            map.reuse_fd(pinned.as_fd()).with_context(|| map.name().display().to_string())?;
        }
    }
    Ok(())
}
