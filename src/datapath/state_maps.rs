//! The maps that outlive generations, and the records in single entries of them.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapMut, OpenMap};

use crate::bpf::{OpenUdplbSkel, bytes_of, create, from_bytes, types};
use crate::datapath::announcements::Announcements;
use crate::datapath::chunked_map::Chunks;
use crate::datapath::counters::Counters;
use crate::datapath::description::Origin;
use crate::datapath::gate::Gate;
use crate::datapath::marks::Marks;
use crate::datapath::nexthops::NextHops;
use crate::datapath::overrides::Overrides;
use crate::datapath::pins::{ReadGuard, WriteGuard, names};
use crate::datapath::probes::Probes;
use crate::datapath::retired;
use crate::time;

/// Error if one of those maps is missing.
pub const INCOMPLETE: &str = "pins are missing; apply the file again";

/// Opens the maps that outlive generations; `None` if one of them is missing.
pub fn open(guard: &ReadGuard) -> anyhow::Result<Option<StateMaps>> {
    let state = guard.state();
    let Some(maps) = collect(&state, |name| open_map(&state, name))? else { return Ok(None) };
    let whole = maps.counters.is_whole()? && maps.nexthops.is_whole()?;
    Ok(whole.then_some(maps))
}

/// Opens the maps that outlive generations and creates missing ones as the program defines them. The
/// second value is true if counters start at zero because their map was missing.
pub fn ensure(
    guard: &WriteGuard,
    skeleton: &OpenUdplbSkel<'_>,
) -> anyhow::Result<(StateMaps, bool)> {
    let state = guard.state();
    let fresh = !has_chunks(&state, "counters")?;
    for name in ["counters", "nexthops"] {
        if !has_chunks(&state, name)? {
            remove_chunks(&state, name)?;
        }
    }
    // retired counters belong to the counters that are gone
    if fresh && state.join(retired::PIN).try_exists()? {
        fs::remove_file(state.join(retired::PIN))?;
    }
    let maps = collect(&state, |name| {
        let chunk = match name {
            // libbpf alone can create it, when the program is loaded
            "sequences" => return open_map(&state, name),
            "counters" => Some(create(&skeleton.maps.counters_chunk, None)?),
            "nexthops" => Some(create(&skeleton.maps.nexthops_chunk, None)?),
            _ => None,
        };
        let mut definitions = skeleton.open_object().maps();
        // a section's name ends in the name of its variable: `.bss.gate`
        let definition = definitions
            .find(|map| map.name().to_str().and_then(|it| it.rsplit('.').next()) == Some(name));
        let definition = definition.with_context(|| format!("the object has no map {name}"))?;
        ensure_map(&state, name, &definition, chunk.as_ref().map(AsFd::as_fd)).map(Some)
    });
    Ok((maps?.context(INCOMPLETE)?, fresh))
}

/// Opens a map that outlives generations; `None` if it is missing.
fn open_map(state: &Path, name: &str) -> anyhow::Result<Option<MapHandle>> {
    let path = state.join(name);
    if !path.try_exists()? {
        return Ok(None);
    }
    MapHandle::from_pinned_path(&path).map(Some).with_context(|| path.display().to_string())
}

/// Takes each map by its name from `map`; `None` if one is missing that every layout has.
fn collect(
    state: &Path,
    mut map: impl FnMut(&str) -> anyhow::Result<Option<MapHandle>>,
) -> anyhow::Result<Option<StateMaps>> {
    macro_rules! required {
        ($name:literal) => {
            match map($name)? {
                Some(map) => map,
                None => return Ok(None),
            }
        };
    }
    let gate = Gate::open(required!("gate"))?;
    Ok(Some(StateMaps {
        counters: Counters::open(required!("counters"), state)?,
        nexthops: NextHops::open(required!("nexthops"), state, gate.clone())?,
        heartbeat: required!("heartbeat"),
        gate: gate.clone(),
        held: required!("held"),
        pending: map("pending")?,
        marks: Marks::new(map("marks")?),
        announcements: Announcements::new(map("announcements")?),
        probes: Probes::new(map("probes")?),
        origin: map("origin")?,
        overrides: Overrides::new(required!("overrides"), gate.clone()),
        fragments: required!("fragments"),
        fragment_ring: required!("fragment_ring"),
        path_mtus: required!("path_mtus"),
        own: required!("own"),
        vlans: required!("vlans"),
        tracing: required!("tracing"),
        events: required!("events"),
        sequences: map("sequences")?,
    }))
}

/// Pins the map of sequences of the first generation and sets its secret. The map has a spin lock, so
/// that only libbpf can create it.
pub fn pin_sequences(guard: &WriteGuard, map: &mut MapMut<'_>) -> anyhow::Result<()> {
    let sequences = types::sequences { secret: [random()?, random()?], ..Default::default() };
    map.update(&0_u32.to_ne_bytes(), bytes_of(&sequences), MapFlags::ANY)?;
    let path = guard.state().join("sequences");
    map.pin(&path).with_context(|| path.display().to_string())
}

/// Returns a random number.
pub fn random() -> anyhow::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Returns true if a growing table exists with all of its chunks.
fn has_chunks(state: &Path, name: &'static str) -> anyhow::Result<bool> {
    let path = state.join(name);
    if !path.try_exists()? {
        return Ok(false);
    }
    let outer = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    Chunks::open(outer, state, name)?.is_whole()
}

/// Removes the rest of an incomplete table, which cannot be read.
fn remove_chunks(state: &Path, name: &str) -> anyhow::Result<()> {
    let chunk = format!("{name}-");
    let is_part = |it: &&String| *it == name || it.starts_with(&chunk);
    for name in names(state)?.iter().filter(is_part) {
        fs::remove_file(state.join(name))?;
    }
    Ok(())
}

fn ensure_map(
    state: &Path,
    name: &str,
    definition: &OpenMap<'_>,
    inner: Option<BorrowedFd<'_>>,
) -> anyhow::Result<MapHandle> {
    let path = state.join(name);
    if !path.try_exists()? {
        let mut map = create(definition, inner)?;
        map.pin(&path).with_context(|| path.display().to_string())?;
        return Ok(map);
    }
    let map = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    let shape = (map.map_type(), map.key_size(), map.value_size(), map.max_entries());
    let wanted = (
        definition.map_type(),
        definition.key_size(),
        definition.value_size(),
        definition.max_entries(),
    );
    if shape != wanted {
        bail!(
            "{} is not udplb's map (type, key, value, entries are {shape:?}, not {wanted:?}); \
             remove it with: rm {}",
            path.display(),
            path.display()
        );
    }
    Ok(map)
}

/// The maps that outlive generations.
pub struct StateMaps {
    pub counters: Counters,
    pub nexthops: NextHops,
    pub gate: Gate,
    /// The lease of the next hops.
    pub heartbeat: MapHandle,
    pub overrides: Overrides,
    pub marks: Marks,
    pub announcements: Announcements,
    pub probes: Probes,
    pub fragments: MapHandle,
    pub fragment_ring: MapHandle,
    pub path_mtus: MapHandle,
    /// See [`Environment`](crate::datapath::environment::Environment).
    pub own: MapHandle,
    pub vlans: MapHandle,
    /// Filter of the packets that are traced, and the ring buffer of their event records.
    pub tracing: MapHandle,
    pub events: MapHandle,
    /// `None` before the first generation.
    pub sequences: Option<MapHandle>,
    held: MapHandle,
    /// `None` in a directory of an older udplb.
    pending: Option<MapHandle>,
    /// `None` if an earlier udplb built the generation.
    origin: Option<MapHandle>,
}

/// The configuration that a rollback left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub generation: u32,
    /// Seconds since 1970.
    pub since: u64,
}

/// A change that is rolled back at its deadline unless it is confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Time since boot, see [`time::since_boot`].
    pub deadline: Duration,
    pub generation: u32,
    /// Generation that is restored; `None`: nothing was attached, the filters are removed.
    pub previous: Option<u32>,
}

impl Pending {
    /// Time until the deadline; zero once it has passed.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_sub(time::since_boot())
    }
}

/// Returns the change that waits for confirmation, without a look at the other maps.
pub fn pending(guard: &ReadGuard) -> anyhow::Result<Option<Pending>> {
    open_map(&guard.state(), "pending")?.map_or(Ok(None), |map| read_pending(&map))
}

fn read_pending(map: &MapHandle) -> anyhow::Result<Option<Pending>> {
    let bytes = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?;
    let pending: types::pending = bytes
        .and_then(|bytes| from_bytes(&bytes))
        .context("state/pending is no map of pending changes")?;
    Ok((pending.deadline != 0).then_some(Pending {
        deadline: Duration::from_nanos(pending.deadline),
        generation: pending.generation,
        previous: (pending.previous != 0).then_some(pending.previous),
    }))
}

impl StateMaps {
    /// Returns the change that waits for confirmation.
    pub fn pending(&self) -> anyhow::Result<Option<Pending>> {
        self.pending.as_ref().map_or(Ok(None), read_pending)
    }

    /// Returns the generation whose configuration was applied again from elsewhere, and from where.
    pub fn origin(&self) -> anyhow::Result<Option<(u32, Origin)>> {
        let Some(map) = &self.origin else { return Ok(None) };
        let bytes = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?;
        let value: types::origin =
            bytes.and_then(|bytes| from_bytes(&bytes)).context("state/origin is no origin map")?;
        let Some(json) = value.json.get(..value.length as usize).filter(|json| !json.is_empty())
        else {
            return Ok(None);
        };
        Ok(Some((value.generation, serde_json::from_slice(json).context("state/origin")?)))
    }

    /// Records where the configuration of a generation was applied from last.
    pub fn set_origin(&self, generation: u32, origin: &Origin) -> anyhow::Result<()> {
        let Some(map) = &self.origin else { return Ok(()) };
        let mut json = serde_json::to_vec(origin)?;
        let mut value = types::origin { generation, ..Default::default() };
        if json.len() > value.json.len() {
            // too long to store: treated like standard input
            json = serde_json::to_vec(&Origin { file: "-".into(), ..Origin::default() })?;
        }
        value.length = json.len() as u32;
        value.json[..json.len()].copy_from_slice(&json);
        Ok(map.update(&0_u32.to_ne_bytes(), bytes_of(&value), MapFlags::ANY)?)
    }

    /// Records a pending change, or that there is none.
    pub fn set_pending(&self, pending: Option<Pending>) -> anyhow::Result<()> {
        let map = match (&self.pending, pending) {
            (Some(map), _) => map,
            (None, None) => return Ok(()),
            (None, Some(_)) => bail!("state/pending is missing"),
        };
        let value = match pending {
            Some(pending) => types::pending {
                deadline: u64::try_from(pending.deadline.as_nanos())?,
                generation: pending.generation,
                previous: pending.previous.unwrap_or(0),
            },
            None => types::pending::default(),
        };
        Ok(map.update(&0_u32.to_ne_bytes(), bytes_of(&value), MapFlags::ANY)?)
    }

    /// Returns the held configuration.
    pub fn held(&self) -> anyhow::Result<Option<Held>> {
        let bytes = self.held.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?;
        let held: types::held =
            bytes.and_then(|bytes| from_bytes(&bytes)).context("state/held is no held map")?;
        Ok((held.since != 0).then_some(Held { generation: held.generation, since: held.since }))
    }

    /// Holds a configuration, or releases it.
    pub fn set_held(&self, held: Option<Held>) -> anyhow::Result<()> {
        let held = held.map_or_else(types::held::default, |held| types::held {
            since: held.since,
            generation: held.generation,
            unused: 0,
        });
        Ok(self.held.update(&0_u32.to_ne_bytes(), bytes_of(&held), MapFlags::ANY)?)
    }
}
