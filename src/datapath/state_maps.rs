//! The maps that outlive generations, and the records in single entries of them.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapMut, OpenMap};

use crate::bpf::{OpenUdplbSkel, bytes_of, create, from_bytes, types};
use crate::datapath::chunked_map::Chunks;
use crate::datapath::counters::Counters;
use crate::datapath::description::Origin;
use crate::datapath::marks::Marks;
use crate::datapath::nexthops::NextHops;
use crate::datapath::overrides::Overrides;
use crate::datapath::pins::{ReadGuard, WriteGuard, names};
use crate::datapath::retired::Retired;
use crate::time;

/// Error if one of those maps is missing.
pub const INCOMPLETE: &str = "pins are missing; apply the file again";

/// Opens the maps that outlive generations; `None` if one of them is missing.
pub fn open(guard: &ReadGuard) -> anyhow::Result<Option<StateMaps>> {
    let state = guard.state();
    let open = |name: &str| -> anyhow::Result<Option<MapHandle>> {
        let path = state.join(name);
        if !path.try_exists()? {
            return Ok(None);
        }
        let map = MapHandle::from_pinned_path(&path);
        map.map(Some).with_context(|| path.display().to_string())
    };
    let (Some(counters), Some(nexthops), Some(heartbeat), Some(held)) =
        (open("counters")?, open("nexthops")?, open("heartbeat")?, open("held")?)
    else {
        return Ok(None);
    };
    let (Some(overrides), Some(fragments), Some(fragment_ring)) =
        (open("overrides")?, open("fragments")?, open("fragment_ring")?)
    else {
        return Ok(None);
    };
    let (Some(path_mtus), Some(tracing), Some(events)) =
        (open("path_mtus")?, open("tracing")?, open("events")?)
    else {
        return Ok(None);
    };
    let (Some(own), Some(suspects), Some(vlans)) =
        (open("own")?, open("suspects")?, open("vlans")?)
    else {
        return Ok(None);
    };
    let counters = Counters::open(counters, &state)?;
    let nexthops = NextHops::open(nexthops, &state)?;
    let whole = counters.is_whole()? && nexthops.is_whole()?;
    let (sequences, pending, origin) = (open("sequences")?, open("pending")?, open("origin")?);
    let marks = Marks::new(open("marks")?);
    Ok(whole.then_some(StateMaps {
        counters,
        retired: Retired::new(open("retired")?),
        nexthops,
        heartbeat,
        held,
        pending,
        marks,
        origin,
        overrides: Overrides::new(overrides),
        fragments,
        fragment_ring,
        path_mtus,
        own,
        suspects,
        vlans,
        tracing,
        events,
        sequences,
    }))
}

/// Opens the maps that outlive generations and creates missing ones as the program defines them. The
/// second value is true if counters start at zero because their map was missing.
pub fn ensure(
    guard: &WriteGuard,
    skeleton: &OpenUdplbSkel<'_>,
) -> anyhow::Result<(StateMaps, bool)> {
    let maps = &skeleton.maps;
    let state = guard.state();
    let fresh = !has_chunks(&state, "counters")?;
    for name in ["counters", "nexthops"] {
        if !has_chunks(&state, name)? {
            remove_chunks(&state, name)?;
        }
    }
    // retired counters belong to the counters that are gone
    if fresh && state.join("retired").try_exists()? {
        fs::remove_file(state.join("retired"))?;
    }
    let chunk = create(&maps.counters_chunk, None)?;
    let counters = ensure_map(&state, "counters", &maps.counters, Some(chunk.as_fd()))?;
    let chunk = create(&maps.nexthops_chunk, None)?;
    let nexthops = ensure_map(&state, "nexthops", &maps.nexthops, Some(chunk.as_fd()))?;
    let retired = ensure_map(&state, "retired", &maps.retired, None)?;
    let heartbeat = ensure_map(&state, "heartbeat", &maps.heartbeat, None)?;
    let held = ensure_map(&state, "held", &maps.held, None)?;
    let pending = Some(ensure_map(&state, "pending", &maps.pending, None)?);
    let marks = Marks::new(Some(ensure_map(&state, "marks", &maps.marks, None)?));
    let origin = Some(ensure_map(&state, "origin", &maps.origin, None)?);
    let overrides = ensure_map(&state, "overrides", &maps.overrides, None)?;
    let fragments = ensure_map(&state, "fragments", &maps.fragments, None)?;
    let fragment_ring = ensure_map(&state, "fragment_ring", &maps.fragment_ring, None)?;
    let path_mtus = ensure_map(&state, "path_mtus", &maps.path_mtus, None)?;
    let own = ensure_map(&state, "own", &maps.own, None)?;
    let suspects = ensure_map(&state, "suspects", &maps.suspects, None)?;
    let vlans = ensure_map(&state, "vlans", &maps.vlans, None)?;
    let tracing = ensure_map(&state, "tracing", &maps.tracing, None)?;
    let events = ensure_map(&state, "events", &maps.events, None)?;
    let sequences = state.join("sequences");
    let sequences = match sequences.try_exists()? {
        true => Some(MapHandle::from_pinned_path(&sequences).context("state: sequences")?),
        false => None,
    };
    let counters = Counters::open(counters, &state)?;
    let nexthops = NextHops::open(nexthops, &state)?;
    let maps = StateMaps {
        counters,
        retired: Retired::new(Some(retired)),
        nexthops,
        heartbeat,
        held,
        pending,
        marks,
        origin,
        overrides: Overrides::new(overrides),
        fragments,
        fragment_ring,
        path_mtus,
        own,
        suspects,
        vlans,
        tracing,
        events,
        sequences,
    };
    Ok((maps, fresh))
}

/// Pins the map of sequences of the first generation and sets its secret. The map has a spin lock, so
/// that only libbpf can create it.
pub fn pin_sequences(guard: &WriteGuard, map: &mut MapMut<'_>) -> anyhow::Result<()> {
    let mut sequences = types::sequences::default();
    let mut random = File::open("/dev/urandom")?;
    for secret in &mut sequences.secret {
        let mut bytes = [0; 8];
        random.read_exact(&mut bytes)?;
        *secret = u64::from_ne_bytes(bytes);
    }
    map.update(&0_u32.to_ne_bytes(), bytes_of(&sequences), MapFlags::ANY)?;
    let path = guard.state().join("sequences");
    map.pin(&path).with_context(|| path.display().to_string())
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
    pub retired: Retired,
    pub nexthops: NextHops,
    /// The lease of the next hops.
    pub heartbeat: MapHandle,
    pub overrides: Overrides,
    pub marks: Marks,
    pub fragments: MapHandle,
    pub fragment_ring: MapHandle,
    pub path_mtus: MapHandle,
    /// See [`Environment`](crate::datapath::environment::Environment).
    pub own: MapHandle,
    pub suspects: MapHandle,
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

impl StateMaps {
    /// Returns the change that waits for confirmation.
    pub fn pending(&self) -> anyhow::Result<Option<Pending>> {
        let Some(map) = &self.pending else { return Ok(None) };
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
