//! The tables of flows: each generation pins those that it uses, and a new one takes over those of the active
//! generation, or gets their flows if its own have another size. Flows are read under the locks of their buckets, which only packets that make
//! or end flows take, and ended by a program, as packets do it.

use std::mem::{MaybeUninit, offset_of};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, OpenMapMut};

use crate::bpf::{
    self, OpenUdplbSkel, Pod, UdplbSkelBuilder, bytes_of, from_bytes, map_id, shifted_jiffies,
    types, unwire,
};
use crate::config::Family;
use crate::datapath::description::Generation;
use crate::datapath::pins::{ReadGuard, WriteGuard};
use crate::datapath::{lease, state_maps};
use crate::desired::Desired;
use crate::desired::flow_copy::{self, New, Old, Placed, Sizes};
use crate::desired::flows::{self, FlowClock, HINTS, WAYS};
use crate::error::catch;

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

/// Takes over the tables of the active generation, or else of the latest that has flows, if they have the same size.
pub fn take_over(
    guard: &ReadGuard,
    skeleton: &mut OpenUdplbSkel<'_>,
    desired: &Desired,
    (others, active): (&[&Generation], Option<u32>),
) -> anyhow::Result<()> {
    let maps = &mut skeleton.maps;
    for (family, mut pair) in [
        (Family::V4, [&mut maps.flows, &mut maps.ports]),
        (Family::V6, [&mut maps.flows6, &mut maps.ports6]),
    ] {
        let with_flows = others.iter().filter(|other| other.description.desired.has_flows(family));
        let latest = with_flows.max_by_key(|other| (Some(other.number) == active, other.number));
        let (Some(latest), true) = (latest, desired.has_flows(family)) else { continue };
        let directory = guard.generation(latest.number);
        let same = |map: &OpenMapMut<'_>| bpf::pinned_alike(&directory.join(map.name()), map);
        let Some(pinned) = same(pair[0]).zip(same(pair[1])) else { continue };
        for (map, pinned) in pair.iter_mut().zip([pinned.0, pinned.1]) {
            map.reuse_fd(pinned.as_fd()).with_context(|| map.name().display().to_string())?;
        }
    }
    Ok(())
}

/// The pinned tables of a generation for one family.
struct Tables {
    flows: MapHandle,
    ports: MapHandle,
}

impl Tables {
    fn open(guard: &ReadGuard, number: u32, family: Family) -> anyhow::Result<Tables> {
        let open = |name: &str| {
            let path = guard.generation(number).join(name);
            MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())
        };
        Ok(match family {
            Family::V4 => Tables { flows: open("flows")?, ports: open("ports")? },
            Family::V6 => Tables { flows: open("flows6")?, ports: open("ports6")? },
        })
    }

    /// Reads all flows and hints.
    fn read(&self, family: Family) -> anyhow::Result<Old> {
        let (mut flows, mut hints) = (Vec::new(), Vec::new());
        match family {
            Family::V4 => read_map(&self.flows, |_, types::flow4 { flow, addresses }| {
                let addresses = addresses.map(|address| [address, 0, 0, 0]);
                flows.push(types::flow6 { flow, addresses });
            })?,
            Family::V6 => read_map(&self.flows, |_, flow| flows.push(flow))?,
        }
        bpf::read_locked(&self.ports, |line| {
            hints.extend(from_bytes(line).map_or([0; _], |line: types::port_line| line.hints));
        })
        .context("ports")?;
        Ok(Old { flows, hints })
    }

    /// Writes all buckets and hints. Also free places get `version`: no handle of a flow that was there before, like
    /// that of a first fragment, is one of these flows'.
    fn write(&self, family: Family, old: &Old, new: &New, version: u32) -> anyhow::Result<()> {
        let flow = |placed: &Option<Placed>| {
            let flow = placed.map_or_else(Default::default, |it| old.flows[it.flow as usize]);
            types::flow6 { flow: types::flow { version, ..flow.flow }, ..flow }
        };
        let buckets = new.buckets.iter().map(|bucket| {
            let flows = bucket.each_ref().map(flow);
            let tags = bucket.map(|placed| placed.map_or(0, |placed| placed.tag));
            let (states, touched) =
                (flows.map(|it| it.flow.state), flows.map(|it| it.flow.touched));
            match family {
                Family::V4 => {
                    let flows = flows.map(|types::flow6 { flow, addresses }| types::flow4 {
                        flow,
                        addresses: addresses.map(|words| words[0]),
                    });
                    let bucket =
                        types::flow_bucket { tags, states, touched, flows, ..Default::default() };
                    bytes_of(&bucket).to_vec()
                }
                Family::V6 => {
                    let bucket =
                        types::flow_bucket6 { tags, states, touched, flows, ..Default::default() };
                    bytes_of(&bucket).to_vec()
                }
            }
        });
        bpf::write_array(&self.flows, buckets).context("flows")?;
        let lines = new.hints.chunks_exact(HINTS as usize).map(|hints| {
            let mut line = types::port_line::default();
            line.hints.copy_from_slice(hints);
            bytes_of(&line).to_vec()
        });
        bpf::write_array(&self.ports, lines).context("ports")
    }
}

/// Number of flows that were copied, and of those that found no place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub flows: usize,
    pub lost: usize,
}

/// Copies the flows of a generation to the tables of another one that no packet looks at yet, unless both have the same
/// tables.
pub fn copy(guard: &WriteGuard, from: &Generation, to: &Generation) -> anyhow::Result<Copied> {
    let (clock, mut copied) = (clock(from)?, Copied::default());
    for family in [Family::V4, Family::V6] {
        let have = |it: &&Generation| it.description.desired.has_flows(family);
        if ![from, to].iter().all(have) {
            continue;
        }
        let [source, target] = [from, to].map(|it| Tables::open(guard, it.number, family));
        let (source, target) = (source?, target?);
        if map_id(&source.flows)? == map_id(&target.flows)? {
            continue;
        }
        if source.flows.value_size() != target.flows.value_size() {
            log::warn!("flows have another layout now: they begin anew");
            continue;
        }
        let old = source.read(family)?;
        let sizes = Sizes {
            buckets: target.flows.max_entries(),
            port_lines: target.ports.max_entries(),
            secret: secret(guard)?,
            ipv6: family == Family::V6,
        };
        let new = flow_copy::place(&sizes, &clock, &old);
        // even: no flow is being written
        target.write(family, &old, &new, state_maps::random()? as u32 & !1)?;
        let placed = new.buckets.as_flattened().iter().flatten().count();
        copied = Copied { flows: copied.flows + placed, lost: copied.lost + new.lost };
    }
    Ok(copied)
}

/// Returns the secret of the places of flows and senders.
pub fn secret(guard: &ReadGuard) -> anyhow::Result<u64> {
    let sequences = open_sequences(guard)?;
    let value = bpf::read_entry(&sequences, 0, MapFlags::LOCK)?;
    let value: types::sequences = from_bytes(&value).context("state/sequences has another size")?;
    Ok(value.secret[1])
}

fn open_sequences(guard: &ReadGuard) -> anyhow::Result<MapHandle> {
    let state = state_maps::open(guard)?.context(state_maps::INCOMPLETE)?;
    state.sequences.context("state/sequences is missing")
}

/// Names a flow until it ends: its number, its version, and whether it is in the table of IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handle {
    number: u32,
    version: u32,
    ipv6: bool,
}

/// A flow, alive or expired.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    pub handle: Handle,
    pub flow: types::flow,
    /// In the order of `enum flow_end`.
    pub addresses: [IpAddr; 4],
}

/// Returns the clock that the times of a generation's flows are of.
pub fn clock(generation: &Generation) -> anyhow::Result<FlowClock> {
    let ticks = lease::ticks_per_second()?;
    let settings = flows::settings(&generation.description.desired.flows, ticks, 0);
    let now = shifted_jiffies(settings.beat_shift).context("the kernel's clock")?;
    Ok(FlowClock::new(settings, ticks, now))
}

/// Passes the flows of a generation to `each`.
pub fn read(
    guard: &ReadGuard,
    generation: &Generation,
    mut each: impl FnMut(Record),
) -> anyhow::Result<()> {
    let directory = guard.generation(generation.number);
    let open = |name: &str| {
        let path = directory.join(name);
        MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())
    };
    let desired = &generation.description.desired;
    if desired.has_flows(Family::V4) {
        read_map(&open("flows")?, |number, types::flow4 { flow, addresses }| {
            let handle = Handle { number, version: flow.version, ipv6: false };
            let addresses = addresses.map(|address| unwire([address, 0, 0, 0], false));
            each(Record { handle, flow, addresses });
        })?;
    }
    if desired.has_flows(Family::V6) {
        read_map(&open("flows6")?, |number, types::flow6 { flow, addresses }| {
            let handle = Handle { number, version: flow.version, ipv6: true };
            each(Record { handle, flow, addresses: addresses.map(|it| unwire(it, true)) });
        })?;
    }
    Ok(())
}

/// Passes number and contents of the used flows of a table to `each`. A bucket is copied under its lock, and a flow
/// that is being written then is read again.
fn read_map<T: Pod>(map: &MapHandle, mut each: impl FnMut(u32, T)) -> anyhow::Result<()> {
    const TRIES: usize = 1000;
    let number = |bucket: u32, way| bucket * WAYS + way + 1;
    let (mut index, mut unfinished) = (0, Vec::new());
    bpf::read_locked(map, |bucket| {
        for way in 0..WAYS {
            match flow_in(bucket, way) {
                Place::Free => {}
                Place::Writing => unfinished.push((index, way)),
                Place::Flow(flow) => each(number(index, way), flow),
            }
        }
        index += 1;
    })
    .context("flows")?;
    for (index, way) in unfinished {
        for _ in 0..TRIES {
            match flow_in(&bpf::read_entry(map, index, MapFlags::LOCK).context("flows")?, way) {
                Place::Free => {}
                Place::Writing => continue,
                Place::Flow(flow) => each(number(index, way), flow),
            }
            break;
        }
    }
    Ok(())
}

/// Contents of one of a bucket's places.
#[derive(Debug)]
enum Place<T> {
    Free,
    /// Between two flows.
    Writing,
    Flow(T),
}

fn flow_in<T: Pod>(bucket: &[u8], way: u32) -> Place<T> {
    let states = &bucket[offset_of!(types::flow_bucket, states)..];
    if states[way as usize] == 0 {
        return Place::Free;
    }
    let end = bucket.len() - (WAYS - 1 - way) as usize * size_of::<T>();
    let flow = &bucket[end - size_of::<T>()..end];
    // the version is the first member, and odd while the flow is being written
    let version = flow.first_chunk().map_or(1, |bytes| u32::from_ne_bytes(*bytes));
    from_bytes(flow).filter(|_| version & 1 == 0).map_or(Place::Writing, Place::Flow)
}

/// Ends flows of a generation.
pub struct Ender(OwnedFd);

impl Ender {
    /// Loads the program that ends flows.
    pub fn load(guard: &WriteGuard, generation: &Generation) -> anyhow::Result<Ender> {
        catch(|| Ender::load_for(guard, generation)).flatten()
    }

    fn load_for(guard: &WriteGuard, generation: &Generation) -> anyhow::Result<Ender> {
        let mut object = MaybeUninit::uninit();
        let mut skeleton = UdplbSkelBuilder::default().open(&mut object)?;
        bpf::load_only(&mut skeleton, &["udplb_end_flow"]);
        let tables = ["flows", "flows6", "ports", "ports6"];
        bpf::create_only(&mut skeleton, &[&tables[..], &["sequences"]].concat())?;
        let directory = guard.generation(generation.number);
        let maps = &mut skeleton.maps;
        for (map, name) in [&mut maps.flows, &mut maps.flows6, &mut maps.ports, &mut maps.ports6]
            .into_iter()
            .zip(tables)
        {
            let path = directory.join(name);
            let pinned = MapHandle::from_pinned_path(&path);
            map.reuse_fd(pinned.with_context(|| path.display().to_string())?.as_fd())?;
        }
        maps.sequences.reuse_fd(open_sequences(guard)?.as_fd())?;
        let ticks = lease::ticks_per_second()?;
        let settings = flows::settings(&generation.description.desired.flows, ticks, 0);
        // another udplb may have made them of another size
        let port_lines = maps.ports.max_entries().max(maps.ports6.max_entries());
        let constants = maps.rodata_data.as_deref_mut().context("the object has no constants")?;
        constants.flow_settings = types::flow_settings { port_lines, ..settings };
        let skeleton = skeleton.load().context("the kernel refuses the program that ends flows")?;
        Ok(Ender(skeleton.progs.udplb_end_flow.as_fd().try_clone_to_owned()?))
    }

    /// Ends a flow; false if it has ended already.
    pub fn end(&self, handle: Handle) -> anyhow::Result<bool> {
        let words = [handle.number, handle.version, handle.ipv6.into(), 0, 0];
        let ended = bpf::run_program(self.0.as_fd(), words).context("the end of a flow")?;
        Ok(ended != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Place, flow_in};
    use crate::bpf::{bytes_of, types};

    #[test]
    fn places_of_a_bucket() {
        let mut bucket = types::flow_bucket6::default();
        for (way, state) in [(0, 1), (6, 4), (7, 3)] {
            bucket.states[way] = state;
            bucket.flows[way].flow.version = if state == 4 { 5 } else { 6 };
            bucket.flows[way].addresses[3] = [way as u32; 4];
        }
        let place = |way| flow_in::<types::flow6>(bytes_of(&bucket), way);
        assert!(matches!(place(1), Place::Free));
        assert!(matches!(place(6), Place::Writing));
        for way in [0, 7] {
            let Place::Flow(flow) = place(way) else { panic!("{:?}", place(way)) };
            assert_eq!(flow.addresses[3], [way; 4]);
        }
    }
}
