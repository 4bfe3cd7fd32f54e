//! Lines: what each CPU has sent to the upstreams of a generation.

use std::os::fd::AsFd;

use anyhow::Context;
use libbpf_rs::{MapCore, MapHandle, MapType};

use crate::bpf::{from_bytes, possible_cpus, program_info, read_array, read_mapped, types};
use crate::datapath::counters::Count;
use crate::datapath::description::Generation;
use crate::datapath::generation;
use crate::datapath::pins::ReadGuard;
use crate::desired::tables::Tables;
use crate::net::link::Layer;

/// Name of the map's pin in a generation's directory.
pub const PIN: &str = "lines";

/// Returns the packets that were forwarded to the upstreams of a generation, summed over all CPUs, by id. An id
/// may occur twice. Empty if the map is gone.
pub fn read(guard: &ReadGuard, generation: &Generation) -> anyhow::Result<Vec<(u32, Count)>> {
    let Some(map) = open(guard, generation)? else { return Ok(Vec::new()) };
    let mut sums: Vec<_> = generation.destinations().map(|id| (id, Count::default())).collect();
    let entries = map.max_entries();
    let read = match map.map_type() {
        // of an earlier udplb: an entry has the lines of all CPUs
        MapType::PercpuArray => {
            let mut sums = sums.iter_mut();
            let add = |values: &[u8]| {
                sums.next().into_iter().for_each(|(_, sum)| *sum += count(values));
            };
            read_array(&map, entries, add).map_err(anyhow::Error::from)
        }
        _ => {
            let of_cpu = entries / possible_cpus()?;
            let mut indices = (0..of_cpu as usize).cycle();
            let add = |line: &types::line| {
                if let Some((_, sum)) = indices.next().and_then(|index| sums.get_mut(index)) {
                    *sum += Count { packets: line.packets, bytes: line.bytes };
                }
            };
            read_mapped(map.as_fd(), entries as usize, add).map_err(anyhow::Error::from)
        }
    };
    read.with_context(|| format!("lines of generation {}", generation.number))?;
    Ok(sums)
}

/// Returns the number of lines that each CPU has in a generation with these tables.
pub fn number(tables: &Tables) -> anyhow::Result<u32> {
    Ok(u32::try_from(tables.upstreams.len().max(1))?)
}

/// Opens the map by its pin, or else by its number, which needs CAP_SYS_ADMIN; `None` if neither leads to it.
fn open(guard: &ReadGuard, generation: &Generation) -> anyhow::Result<Option<MapHandle>> {
    let path = guard.generation(generation.number).join(PIN);
    if path.try_exists()? {
        let map = MapHandle::from_pinned_path(&path);
        return map.map(Some).with_context(|| path.display().to_string());
    }
    let Ok(program) = generation::program(guard, generation, Layer::Ethernet) else {
        return Ok(None);
    };
    let maps = program_info(program.as_fd())?.map_ids.into_iter();
    let mut maps = maps.filter_map(|id| MapHandle::from_map_id(id).ok());
    Ok(maps.find(|map| map.name() == PIN))
}

/// Adds up what lines have counted.
fn count(values: &[u8]) -> Count {
    let mut sum = Count::default();
    for line in values.chunks_exact(size_of::<types::line>()).filter_map(from_bytes) {
        let types::line { packets, bytes, .. } = line;
        sum += Count { packets, bytes };
    }
    sum
}
