//! One generation: a configuration in the kernel, immutable once it is built.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, anyhow, bail};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{
    MapCore, MapFlags, MapHandle, MapMut, OpenObject, PrintLevel, Program, ProgramMut,
};

use crate::bpf::{
    self, ID_LIMIT, OBJECT_SHA256, OpenUdplbSkel, Pod, UdplbSkel, UdplbSkelBuilder, bytes_of,
    bytes_of_all, map_id, types,
};
use crate::config::Reply;
use crate::datapath::description::{Description, Generation, Origin, ProgramName, all};
use crate::datapath::hook::Known;
use crate::datapath::pins::{ReadGuard, WriteGuard, remove_pins};
use crate::datapath::state_maps::{self, INCOMPLETE, StateMaps, random};
use crate::datapath::{
    flows, handover, kernel, lease, lines, packed, retired, senders, spares, xdp,
};
use crate::desired::flows::{egresses, settings};
use crate::desired::id_set::IdSet;
use crate::desired::key_table::KeyTables;
use crate::desired::sender_tables;
use crate::desired::tables::Tables;
use crate::desired::{Desired, RuleIds, assign_ids};
use crate::error::catch;
use crate::net::link::Layer;

/// The pins of its maps.
const MAPS: [&str; 18] = [
    "rules",
    "table",
    "table6",
    "senders",
    "addresses",
    "answers",
    "origins",
    "indexes",
    "servers",
    "flows",
    "flows6",
    "ports",
    "ports6",
    "slots",
    "upstreams",
    spares::PIN,
    lines::PIN,
    "config",
];

/// Maps of a skeleton that only the generation has, in the order of [`MAPS`]; `config` is not read by the program.
macro_rules! own_maps {
    ($maps:expr) => {
        [
            &mut $maps.rules,
            &mut $maps.table,
            &mut $maps.table6,
            &mut $maps.senders,
            &mut $maps.addresses,
            &mut $maps.answers,
            &mut $maps.origins,
            &mut $maps.indexes,
            &mut $maps.servers,
            &mut $maps.flows,
            &mut $maps.flows6,
            &mut $maps.ports,
            &mut $maps.ports6,
            &mut $maps.slots,
            &mut $maps.upstreams,
            &mut $maps.spares,
            &mut $maps.lines,
        ]
    };
}

/// Returns the name of a program's pin.
pub fn pin_of(layer: Layer) -> &'static str {
    match layer {
        Layer::Ethernet => "program",
        Layer::Ip => "program-l3",
    }
}

/// Input of a new generation.
#[derive(Clone, Debug)]
pub struct Draft {
    pub number: u32,
    pub origin: Origin,
    pub namespace: u64,
    pub clsact: Vec<String>,
    /// Some interface has no Ethernet header.
    pub l3: bool,
    pub desired: Arc<Desired>,
}

/// A generation just built, and the remarks to log about it.
pub struct Built {
    pub generation: Generation,
    /// Counters start at zero: there were none, or their map had gone.
    pub counters_reset: bool,
}

/// Builds a generation aside and moves it into place; `others` are those that exist, with the number of the active
/// one. Nothing of it is left behind where that fails.
pub fn build(
    guard: &WriteGuard,
    draft: &Draft,
    others: (&[&Generation], Option<u32>),
) -> anyhow::Result<Built> {
    let directory = guard.building(draft.number);
    DirBuilder::new()
        .mode(0o700)
        .create(&directory)
        .with_context(|| directory.display().to_string())?;
    let built = catch(|| build_in(guard, &directory, draft, others)).flatten().and_then(|built| {
        fs::rename(&directory, guard.generation(draft.number))
            .with_context(|| format!("generation {}", draft.number))?;
        Ok(built)
    });
    if built.is_err()
        && let Err(error) = remove_pins(&directory)
    {
        log::warn!("{error:#}");
    }
    built
}

fn build_in(
    guard: &WriteGuard,
    directory: &Path,
    draft: &Draft,
    (others, active): (&[&Generation], Option<u32>),
) -> anyhow::Result<Built> {
    let known: Vec<(&Desired, &[RuleIds])> = others.iter().map(|other| other.hosts()).collect();
    let ids = assign_ids(&draft.desired, &known, ID_LIMIT).map_err(|_| {
        anyhow!("more than {ID_LIMIT} rules and upstreams, the kept generations' included")
    })?;
    let tables = Tables::new(&draft.desired, &ids);
    let xdp = !draft.desired.xdp.is_empty();
    let features = types::features { generation: draft.number, xdp: xdp.into(), ..tables.features };
    let mut object = MaybeUninit::uninit();
    let mut skeleton = open(&features, &mut object)?;
    skeleton.progs.udplb_l3.set_autoload(draft.l3);
    skeleton.progs.udplb_xdp.set_autoload(xdp);
    skeleton.maps.devices.set_autocreate(xdp)?;
    skeleton.maps.xdp_sent.set_autocreate(xdp)?;
    let seed = random()?;
    let keys = key_tables(&tables, seed)?;
    let (mut state, counters_reset) = state_maps::ensure(guard, &skeleton)?;
    let held: IdSet = others.iter().flat_map(|other| other.ids()).collect();
    let fresh = all(&ids).filter(|id| !held.contains(*id));
    state.counters.prepare(&skeleton, all(&ids), fresh)?;
    retired::retain(guard, &held)?;
    state.overrides.retain(guard, &held, state.counters.room())?;
    state.nexthops.prepare(&skeleton, all(&ids))?;

    let mut description = Description {
        version: env!("CARGO_PKG_VERSION").into(),
        object: OBJECT_SHA256.into(),
        origin: draft.origin.clone(),
        built: std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs()),
        namespace: draft.namespace,
        // as long as the longest
        program: ProgramName::new(u32::MAX, [0; 8]),
        program_l3: draft.l3.then(|| ProgramName::new(u32::MAX, [0; 8])),
        program_xdp: xdp.then(|| ProgramName::new(u32::MAX, [0; 8])),
        clsact: draft.clsact.clone(),
        seed,
        desired: draft.desired.clone(),
        ids,
    };
    let packed = packed::pack(&description.desired.rules, &description.ids)?;
    size(&mut skeleton, &tables, &keys, description.bytes(&packed)?.len())?;
    flows::size(&mut skeleton, &draft.desired)?;
    flows::take_over(guard, &mut skeleton, &draft.desired, (others, active))?;
    senders::prepare(guard, &mut skeleton, directory, &tables.sender_tables, others)?;
    set_constants(&mut skeleton, &draft.desired, &tables, &keys, features)?;
    share(&mut skeleton, &state)?;
    skeleton.maps.bss_tracing.reuse_fd(state.tracing.as_fd())?;
    skeleton.maps.events.reuse_fd(state.events.as_fd())?;
    let mut skeleton = load(skeleton)?;
    if state.sequences.is_none() {
        state_maps::pin_sequences(guard, &mut skeleton.maps.sequences)?;
    }
    description.program = ProgramName::of(skeleton.progs.udplb.as_fd())?;
    if draft.l3 {
        description.program_l3 = Some(ProgramName::of(skeleton.progs.udplb_l3.as_fd())?);
    }
    if xdp {
        description.program_xdp = Some(ProgramName::of(skeleton.progs.udplb_xdp.as_fd())?);
        pin_xdp(&mut skeleton, directory)?;
    }
    fill(&mut skeleton, &tables, &keys, description.bytes(&packed)?)?;
    pin(&mut skeleton, directory, draft.l3)?;
    let description = Arc::new(description);
    let generation = Generation { number: draft.number, description, intact: true };
    Ok(Built { generation, counters_reset })
}

/// Messages of libbpf with the verifier's log; shown if a load fails.
static LOG: Mutex<String> = Mutex::new(String::new());

fn keep_log(_: PrintLevel, line: String) {
    if let Ok(mut log) = LOG.lock() {
        log.push_str(&line);
    }
}

/// Opens the small object where it suffices for these features and the kernel, otherwise the full one.
///
/// # Errors
/// libbpf cannot read the object.
pub fn open_for<'object>(
    features: &types::features,
    object: &'object mut MaybeUninit<OpenObject>,
) -> libbpf_rs::Result<OpenUdplbSkel<'object>> {
    let suffices = !features.extras.any() && kernel::version() >= kernel::CASTS;
    let object_bytes = suffices.then_some(bpf::SMALL_OBJECT);
    UdplbSkelBuilder { object: object_bytes, ..UdplbSkelBuilder::default() }.open(object)
}

fn open<'object>(
    features: &types::features,
    object: &'object mut MaybeUninit<OpenObject>,
) -> anyhow::Result<OpenUdplbSkel<'object>> {
    libbpf_rs::set_print(Some((PrintLevel::Warn, keep_log)));
    let mut skeleton = catch(|| open_for(features, object))??;
    bpf::load_only(&mut skeleton, &["udplb", "udplb_l3"]);
    skeleton.maps.counters_chunk.set_autocreate(false)?;
    skeleton.maps.nexthops_chunk.set_autocreate(false)?;
    skeleton.maps.handover.set_autocreate(false)?;
    skeleton.maps.devices.set_autocreate(false)?;
    skeleton.maps.xdp_sent.set_autocreate(false)?;
    skeleton.maps.held.set_autocreate(false)?;
    skeleton.maps.pending.set_autocreate(false)?;
    skeleton.maps.announcements.set_autocreate(false)?;
    skeleton.maps.marks.set_autocreate(false)?;
    skeleton.maps.origin.set_autocreate(false)?;
    skeleton.maps.retired.set_autocreate(false)?;
    skeleton.maps.sender_buckets.set_autocreate(false)?;
    Ok(skeleton)
}

/// Returns the tables of keys. The same seed gives the same tables.
fn key_tables(tables: &Tables, seed: u64) -> anyhow::Result<KeyTables> {
    let (keys, keys6) = (&tables.keys, &tables.keys6);
    KeyTables::new(keys, keys6, seed)
        .with_context(|| format!("no table holds these {} keys", keys.len() + keys6.len()))
}

/// Sets the constants of the programs; the time is that of the kernel's clock.
fn set_constants(
    skeleton: &mut OpenUdplbSkel<'_>,
    desired: &Desired,
    tables: &Tables,
    keys: &KeyTables,
    features: types::features,
) -> anyhow::Result<()> {
    let ticks = lease::ticks_per_second()?;
    let rodata = skeleton.maps.rodata_data.as_deref_mut().context("the object has no constants")?;
    let lines = lines::number(tables)?;
    rodata.features = types::features { ticks_per_second: ticks, lines, ..features };
    rodata.tuning = keys.tuning();
    rodata.decap_settings = tables.decap;
    rodata.flow_settings = flow_settings(desired, tables, ticks);
    rodata.flow_egresses = egresses(&desired.flows);
    rodata.sender_settings = sender_tables::settings(ticks);
    Ok(())
}

fn flow_settings(desired: &Desired, tables: &Tables, ticks: u32) -> types::flow_settings {
    let settings = settings(&desired.flows, ticks, tables.orphans);
    let any_nat = desired.rules.iter().any(|rule| rule.reply == Reply::Nat);
    // without ports, no packet is looked up as an answer
    types::flow_settings { ports: if any_nat { settings.ports } else { 0 }, ..settings }
}

fn size(
    skeleton: &mut OpenUdplbSkel<'_>,
    tables: &Tables,
    keys: &KeyTables,
    description: usize,
) -> anyhow::Result<()> {
    let chunks = description.div_ceil(size_of::<types::config_chunk>());
    for (map, entries) in [
        (&mut skeleton.maps.rules, tables.rules.len()),
        (&mut skeleton.maps.table, keys.table.places.len()),
        (&mut skeleton.maps.table6, keys.table6.places.len()),
        (&mut skeleton.maps.senders, tables.senders.len()),
        (&mut skeleton.maps.addresses, tables.addresses.len()),
        (&mut skeleton.maps.answers, tables.answers.len()),
        (&mut skeleton.maps.origins, tables.origins.len()),
        (&mut skeleton.maps.indexes, tables.indexes.len()),
        (&mut skeleton.maps.servers, tables.servers.len()),
        (&mut skeleton.maps.samples, tables.samples()),
        (&mut skeleton.maps.slots, tables.slots.len()),
        (&mut skeleton.maps.upstreams, tables.upstreams.len()),
        (&mut skeleton.maps.destinations, tables.destinations.len()),
        (&mut skeleton.maps.spares, tables.upstreams.len()),
        (
            &mut skeleton.maps.lines,
            lines::number(tables)? as usize * bpf::possible_cpus()? as usize,
        ),
        (&mut skeleton.maps.description, chunks),
    ] {
        map.set_max_entries(u32::try_from(entries.max(1))?)?;
    }
    if tables.features.extras.flows == 0 {
        skeleton.maps.returns.set_max_entries(1)?;
    }
    Ok(())
}

/// The dry-run program: a generation's program on the same maps, which sends and counts nothing and
/// records every packet.
pub struct DryRunProgram {
    pub program: OwnedFd,
    /// Ring buffer of its event records.
    pub events: MapHandle,
    pub tables: Tables,
}

/// Loads it; of what it writes it has maps of its own.
///
/// # Errors
/// Another udplb built the generation: its program is not known here.
pub fn dry_run_program(
    guard: &ReadGuard,
    generation: &Generation,
) -> anyhow::Result<DryRunProgram> {
    let description = &generation.description;
    if description.object != OBJECT_SHA256 {
        bail!(
            "generation {} was built by another udplb ({}), whose program this one does not have; apply \
             the file again",
            generation.number,
            description.version
        );
    }
    let tables = Tables::new(&description.desired, &description.ids);
    let extras = types::extras { sender_tables: 0, ..tables.features.extras };
    let features =
        types::features { dry_run: 1, generation: generation.number, extras, ..tables.features };
    let mut object = MaybeUninit::uninit();
    let mut skeleton = open(&features, &mut object)?;
    skeleton.progs.udplb_l3.set_autoload(false);
    skeleton.maps.sender_tables.set_autocreate(false)?;
    let keys = key_tables(&tables, description.seed)?;
    size(&mut skeleton, &tables, &keys, 1)?;
    flows::size(&mut skeleton, &description.desired)?;
    set_constants(&mut skeleton, &description.desired, &tables, &keys, features)?;
    let state = state_maps::open(guard)?.context(INCOMPLETE)?;
    let directory = guard.generation(generation.number);
    let maps = &mut skeleton.maps;
    maps.lines.set_max_entries(1)?;
    let shared = own_maps!(maps).into_iter().zip(MAPS).filter(|(_, name)| *name != lines::PIN);
    for (map, name) in shared {
        let path = directory.join(name);
        let pinned =
            MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
        map.reuse_fd(pinned.as_fd())?;
    }
    share(&mut skeleton, &state)?;
    let skeleton = load(skeleton)?;
    let trace = types::trace { until: u64::MAX, frames: 1, ..Default::default() };
    skeleton.maps.bss_tracing.update(&0_u32.to_ne_bytes(), bytes_of(&trace), MapFlags::ANY)?;
    Ok(DryRunProgram {
        program: skeleton.progs.udplb.as_fd().try_clone_to_owned()?,
        events: MapHandle::try_from(&skeleton.maps.events)?,
        tables,
    })
}

/// Reuses the maps that all generations share, except those of event records.
fn share(skeleton: &mut OpenUdplbSkel<'_>, state: &StateMaps) -> anyhow::Result<()> {
    skeleton.maps.counters.reuse_fd(state.counters.outer().as_fd())?;
    skeleton.maps.nexthops.reuse_fd(state.nexthops.outer().as_fd())?;
    skeleton.maps.heartbeat.reuse_fd(state.heartbeat.as_fd())?;
    skeleton.maps.bss_gate.reuse_fd(state.gate.map().as_fd())?;
    skeleton.maps.overrides.reuse_fd(state.overrides.map().as_fd())?;
    skeleton.maps.fragments.reuse_fd(state.fragments.as_fd())?;
    skeleton.maps.fragment_ring.reuse_fd(state.fragment_ring.as_fd())?;
    skeleton.maps.path_mtus.reuse_fd(state.path_mtus.as_fd())?;
    skeleton.maps.own.reuse_fd(state.own.as_fd())?;
    skeleton.maps.vlans.reuse_fd(state.vlans.as_fd())?;
    if let Some(sequences) = &state.sequences {
        skeleton.maps.sequences.reuse_fd(sequences.as_fd())?;
    }
    Ok(())
}

fn load(skeleton: OpenUdplbSkel<'_>) -> anyhow::Result<UdplbSkel<'_>> {
    if let Ok(mut log) = LOG.lock() {
        log.clear();
    }
    // its code panics where a map's name is not what it was
    catch(|| skeleton.load())?.map_err(|error| {
        let log = LOG.lock().map(|log| log.clone()).unwrap_or_default();
        let cause = kernel::refusal(error.kind(), &log).unwrap_or_else(|| error.to_string());
        anyhow!("the kernel refuses the program: {cause}\n{}", log.trim_end())
    })
}

fn fill(
    skeleton: &mut UdplbSkel<'_>,
    tables: &Tables,
    keys: &KeyTables,
    mut description: Vec<u8>,
) -> anyhow::Result<()> {
    write_array(&skeleton.maps.rules, bytes_of_all(&tables.rules))?;
    write_mapped(&skeleton.maps.table, bytes_of_all(&keys.table.places))?;
    write_mapped(&skeleton.maps.table6, bytes_of_all(&keys.table6.places))?;
    write_pairs(&skeleton.maps.senders, &tables.senders)?;
    write_pairs(&skeleton.maps.addresses, &tables.addresses)?;
    write_pairs(&skeleton.maps.destinations, &tables.destinations)?;
    write_pairs(&skeleton.maps.answers, &tables.answers)?;
    write_pairs(&skeleton.maps.origins, &tables.origins)?;
    write_pairs(&skeleton.maps.indexes, &tables.indexes)?;
    write_pairs(&skeleton.maps.servers, &tables.servers)?;
    write_array(&skeleton.maps.slots, bytes_of_all(&tables.slots))?;
    write_array(&skeleton.maps.upstreams, bytes_of_all(&tables.upstreams))?;
    let whole = description.len().next_multiple_of(size_of::<types::config_chunk>());
    description.resize(whole, 0);
    write_array(&skeleton.maps.description, &description)
}

fn write_pairs<K: Pod, V: Pod>(map: &MapMut<'_>, pairs: &[(K, V)]) -> anyhow::Result<()> {
    let (keys, values): (Vec<&[u8]>, Vec<&[u8]>) =
        pairs.iter().map(|(key, value)| (bytes_of(key), bytes_of(value))).unzip();
    write(map, &keys.concat(), &values.concat())
}

fn write_array(map: &MapMut<'_>, values: &[u8]) -> anyhow::Result<()> {
    let count = values.len() / map.value_size() as usize;
    let keys: Vec<u8> = (0..count as u32).flat_map(u32::to_ne_bytes).collect();
    write(map, &keys, values)
}

/// Writes the values of an array that is made to be mapped, by system calls where it cannot be.
fn write_mapped(map: &MapMut<'_>, values: &[u8]) -> anyhow::Result<()> {
    match bpf::fill_mapped(map.as_fd(), values) {
        Ok(()) => freeze(map),
        Err(_) => write_array(map, values),
    }
}

fn freeze(map: &MapMut<'_>) -> anyhow::Result<()> {
    let name = map.name().to_string_lossy();
    MapHandle::try_from(map)?.freeze().with_context(|| format!("map {name}"))
}

/// Writes all entries at once and freezes the map.
fn write(map: &MapMut<'_>, keys: &[u8], values: &[u8]) -> anyhow::Result<()> {
    let name = map.name().to_string_lossy().into_owned();
    let count = (keys.len() / map.key_size() as usize) as u32;
    if count > 0 {
        write_all(map, keys, values, count)
            .with_context(|| format!("map {name}: {count} entries"))?;
    }
    freeze(map)
}

/// At once where the kernel can: it cannot for the trie before 5.13.
fn write_all(map: &MapMut<'_>, keys: &[u8], values: &[u8], count: u32) -> libbpf_rs::Result<()> {
    if map.update_batch(keys, values, count, MapFlags::ANY, MapFlags::ANY).is_ok() {
        return Ok(());
    }
    let values = values.chunks(map.value_size() as usize);
    let mut pairs = keys.chunks(map.key_size() as usize).zip(values);
    pairs.try_for_each(|(key, value)| map.update(key, value, MapFlags::ANY))
}

fn pin(skeleton: &mut UdplbSkel<'_>, directory: &Path, l3: bool) -> anyhow::Result<()> {
    let maps = &mut skeleton.maps;
    for map in own_maps!(maps) {
        // the small object has no code that uses some of them
        bpf::bind_map(skeleton.progs.udplb.as_fd(), map.as_fd())?;
    }
    let all = own_maps!(maps).into_iter().chain([&mut maps.description]);
    for (map, name) in all.zip(MAPS) {
        let path = directory.join(name);
        map.pin(&path).with_context(|| path.display().to_string())?;
    }
    let pin = |program: &mut ProgramMut<'_>, layer| {
        let path = directory.join(pin_of(layer));
        program.pin(&path).with_context(|| path.display().to_string())
    };
    if l3 {
        pin(&mut skeleton.progs.udplb_l3, Layer::Ip)?;
    }
    pin(&mut skeleton.progs.udplb, Layer::Ethernet)
}

/// Pins the XDP program and its maps.
fn pin_xdp(skeleton: &mut UdplbSkel<'_>, directory: &Path) -> anyhow::Result<()> {
    for (map, name) in
        [(&mut skeleton.maps.devices, xdp::DEVICES), (&mut skeleton.maps.xdp_sent, xdp::SENT)]
    {
        let path = directory.join(name);
        map.pin(&path).with_context(|| path.display().to_string())?;
    }
    let path = directory.join(xdp::PROGRAM);
    skeleton.progs.udplb_xdp.pin(&path).with_context(|| path.display().to_string())
}

/// Reads a generation back; `maps` are those that outlive it, `None` if one is missing. Returns `None` if its
/// description is missing or is none, and what is left of it is of no use.
///
/// # Errors
/// It cannot be read now, which says nothing about it.
pub fn read(
    guard: &ReadGuard,
    maps: Option<&StateMaps>,
    number: u32,
) -> anyhow::Result<Option<Generation>> {
    let directory = guard.generation(number);
    let damage = match DescriptionMap::open(&directory).and_then(|map| map.read()) {
        Ok(description) => {
            let intact = unless_damaged(check(maps, &directory, &description))?;
            if let Err(error) = &intact {
                log::debug!("generation {number}: {error:#}");
            }
            return Ok(Some(Generation { number, description, intact: intact.is_ok() }));
        }
        error => unless_damaged(error)?,
    };
    if let Err(error) = damage {
        log::warn!("generation {number} is damaged: {error:#}");
    }
    Ok(None)
}

/// Separates damage of a generation (inner error) from errors of reading it (outer error): too few
/// descriptors, too little memory, a missing privilege.
fn unless_damaged<T>(result: anyhow::Result<T>) -> anyhow::Result<anyhow::Result<T>> {
    match result {
        Err(error) if !is_damage(&error) => {
            Err(error.context("what is applied cannot be read now; nothing was changed"))
        }
        result => Ok(result),
    }
}

/// Returns true for a missing pin, a pin of another kind, or an error of our own checks.
fn is_damage(error: &anyhow::Error) -> bool {
    use libbpf_rs::ErrorKind::{InvalidData as Data, InvalidInput as Invalid, NotFound as Missing};
    use std::io::ErrorKind::{InvalidData, InvalidInput, NotFound};
    error.chain().all(|cause| {
        let map = cause.downcast_ref::<libbpf_rs::Error>().map(libbpf_rs::Error::kind);
        let file = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        map.is_none_or(|kind| matches!(kind, Missing | Invalid | Data))
            && file.is_none_or(|kind| matches!(kind, NotFound | InvalidInput | InvalidData))
    })
}

/// The descriptions that were read last, by the kernel's number of the map. Such a map is frozen and numbers
/// are not used again, so a description is decoded once for all that ask for it.
static DESCRIPTIONS: Mutex<BTreeMap<u32, Arc<Description>>> = Mutex::new(BTreeMap::new());

/// Number of descriptions that are kept: of the active generation, and of the one before it.
const KEPT: usize = 2;

fn known() -> MutexGuard<'static, BTreeMap<u32, Arc<Description>>> {
    DESCRIPTIONS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Frees the descriptions that are kept. Of 10,000 rules each has 6 MB.
pub fn forget_descriptions() {
    known().clear();
}

/// The map of a generation's description, which lasts while this is open.
pub struct DescriptionMap(MapHandle);

impl DescriptionMap {
    pub fn open(directory: &Path) -> anyhow::Result<DescriptionMap> {
        let path = directory.join("config");
        let map = MapHandle::from_pinned_path(&path);
        map.map(DescriptionMap).with_context(|| path.display().to_string())
    }

    pub fn read(&self) -> anyhow::Result<Arc<Description>> {
        let DescriptionMap(map) = self;
        let id = map_id(map)?;
        if let Some(description) = known().get(&id) {
            return Ok(description.clone());
        }
        let mut bytes = Vec::new();
        bpf::read_array(map, map.max_entries(), |chunk| bytes.extend_from_slice(chunk))?;
        let description = Arc::new(Description::read(&bytes).context("its description")?);
        let mut known = known();
        known.insert(id, description.clone());
        while known.len() > KEPT {
            known.pop_first();
        }
        Ok(description)
    }
}

/// Returns the programs of a generation, by their pins.
pub fn pinned_programs(guard: &ReadGuard, number: u32) -> anyhow::Result<Vec<Known>> {
    let directory = &guard.generation(number);
    let mut known = Vec::new();
    for layer in [Layer::Ethernet, Layer::Ip] {
        let name = open_program(directory, layer)
            .and_then(|program| Ok(ProgramName::of(program.as_fd())?));
        let name = unless_damaged(name)?.into_iter();
        known.extend(name.map(|name| Known { generation: number, name, handover: false }));
    }
    let pair = unless_damaged(handover::pinned_programs(directory))?.into_iter().flatten();
    known.extend(pair.map(|name| Known { generation: number, name, handover: true }));
    Ok(known)
}

/// Returns the configuration of a generation, if it is intact and has this digest.
pub fn made_of(guard: &ReadGuard, number: u32, digest: &str) -> Option<Arc<Desired>> {
    let config = MapHandle::from_pinned_path(guard.generation(number).join("config")).ok()?;
    let start = config.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY).ok()??;
    if !start.starts_with(format!("{{\"digest\":\"{digest}\"").as_bytes()) {
        return None;
    }
    let maps = state_maps::open(guard).ok()?;
    let generation =
        read(guard, maps.as_ref(), number).ok()?.filter(|generation| generation.intact)?;
    Some(generation.description.desired.clone())
}

fn check(
    maps: Option<&StateMaps>,
    directory: &Path,
    description: &Description,
) -> anyhow::Result<()> {
    for (layer, name) in description.programs() {
        if ProgramName::of(open_program(directory, layer)?.as_fd())? != *name {
            bail!("its {} is another one", pin_of(layer));
        }
    }
    if let Some(name) = &description.program_xdp
        && ProgramName::of(open_pinned(directory, xdp::PROGRAM)?.as_fd())? != *name
    {
        bail!("its {} is another one", xdp::PROGRAM);
    }
    let program = bpf::program_info(open_program(directory, Layer::Ethernet)?.as_fd())?;
    let state = maps.context(INCOMPLETE)?;
    let mut maps = vec![
        map_id(state.counters.outer())?,
        map_id(state.nexthops.outer())?,
        map_id(&state.heartbeat)?,
        map_id(state.gate.map())?,
        map_id(state.overrides.map())?,
        map_id(&state.fragments)?,
        map_id(&state.fragment_ring)?,
        map_id(&state.path_mtus)?,
        map_id(&state.own)?,
        map_id(&state.vlans)?,
        map_id(&state.tracing)?,
        map_id(&state.events)?,
        map_id(state.sequences.as_ref().context("state/sequences is missing")?)?,
    ];
    for name in &MAPS {
        let map = MapHandle::from_pinned_path(directory.join(name))?;
        // the program does not read its description
        if *name != "config" {
            maps.push(map_id(&map)?);
        }
    }
    let (desired, ids) = (&description.desired, &description.ids);
    senders::check(directory, &desired.rules, ids)?;
    match maps.iter().find(|id| !program.map_ids.contains(id)) {
        Some(id) => bail!("its program does not use map {id}"),
        None => Ok(()),
    }
}

/// Opens a pinned program in a generation's directory.
pub fn open_program(directory: &Path, layer: Layer) -> anyhow::Result<OwnedFd> {
    open_pinned(directory, pin_of(layer))
}

fn open_pinned(directory: &Path, pin: &str) -> anyhow::Result<OwnedFd> {
    let path = directory.join(pin);
    Program::fd_from_pinned_path(&path).with_context(|| path.display().to_string())
}

/// Opens the XDP program of a generation.
pub fn xdp_program(guard: &ReadGuard, number: u32) -> anyhow::Result<OwnedFd> {
    open_pinned(&guard.generation(number), xdp::PROGRAM)
}

/// Opens the program of a generation for interfaces of a link layer.
pub fn program(
    guard: &ReadGuard,
    generation: &Generation,
    layer: Layer,
) -> anyhow::Result<OwnedFd> {
    open_program(&guard.generation(generation.number), layer).or_else(|error| {
        // without its pin, a filter may still run it
        let mut programs = generation.description.programs();
        let name = programs.find(|(other, _)| *other == layer);
        name.and_then(|(_, name)| Program::fd_from_id(name.id).ok()).ok_or(error)
    })
}

/// Removes the pins of a generation. A filter keeps its program alive.
pub fn drop(guard: &WriteGuard, number: u32) -> anyhow::Result<()> {
    remove_pins(&guard.generation(number))
}
