//! The directory of pins: its lock, its layout, and the maps that outlive generations.
//!
//! ```text
//! /sys/fs/bpf/udplb/            mode 0700; flock: writers exclusive, readers shared
//!   current -> generations/42
//!   generations/                flock: whoever traces
//!     42/                       program, rules, slots, upstreams, config …
//!   building-43/                under construction; bpffs refuses names with a dot
//!   queue/                      flock: a writer that waits for readers to end, and readers that come after it
//!   state-4/                    counters, counters-0 …, nexthops, nexthops-0 …, heartbeat, held, retired …
//!                               flock: arpd
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapInfo, MapMut, OpenMap};

use crate::bpf::{OpenUdplbSkel, bytes_of, from_bytes, types};
use crate::datapath::chunked_map::Chunks;
use crate::datapath::counters::Counters;
use crate::datapath::generation::Origin;
use crate::datapath::lock;
use crate::datapath::marks::Marks;
use crate::datapath::overrides::Overrides;
use crate::datapath::retired::Retired;
use crate::error::{Failure, Result};
use crate::net::nexthop::NextHops;
use crate::time;

/// Where the pins are unless `--pin-dir` says otherwise.
pub const PIN_DIR: &str = "/sys/fs/bpf/udplb";
/// Where systems mount it, and udplb where they do not.
const BPFFS: &str = "/sys/fs/bpf";
/// The directory that a writer locks while it waits, so that readers queue behind it.
const QUEUE: &str = "queue";

/// The directory of what outlives generations. Another layout gets one of its own beside it, whose name
/// begins alike.
pub const STATE: &str = "state-4";
const STATES: &str = "state";

/// What is said where one of those maps is missing.
pub const INCOMPLETE: &str = "pins are missing; apply the file again";

/// Shared access: nobody changes anything meanwhile.
pub struct ReadGuard {
    path: PathBuf,
    _lock: File,
}

/// Exclusive access: what changes anything takes one of these.
pub struct WriteGuard {
    guard: ReadGuard,
    /// The bpffs was mounted for this, and goes again unless something is built in it.
    mounted: bool,
}

impl Deref for WriteGuard {
    type Target = ReadGuard;

    fn deref(&self) -> &ReadGuard {
        &self.guard
    }
}

/// Locks for reading; `None` where udplb has never been applied.
pub fn read(path: &Path, wait: Duration) -> Result<Option<ReadGuard>> {
    let end = Instant::now() + wait;
    loop {
        let Some(lock) = open(path)? else { return Ok(None) };
        // behind a writer that waits
        let turn = File::open(path.join(QUEUE)).ok();
        if let Some(turn) = &turn {
            lock::wait(path, wait, end, || turn.try_lock_shared())?;
        }
        lock::wait(path, wait, end, || lock.try_lock_shared())?;
        if is_at(path, &lock) {
            return Ok(Some(ReadGuard { path: path.into(), _lock: lock }));
        }
        // `detach --purge` has removed it meanwhile
    }
}

/// Locks for writing; makes the directory where it is missing.
pub fn write(path: &Path, wait: Duration) -> Result<WriteGuard> {
    let end = Instant::now() + wait;
    let mounted = ensure_bpffs(path)?;
    loop {
        make(path)?;
        let lock = open(path)?.with_context(|| format!("{} is gone", path.display()))?;
        make(&path.join(QUEUE))?;
        if lock.try_lock().is_err() {
            // those who come to read after this wait behind it, so that readers do not keep it out
            let turn = File::open(path.join(QUEUE)).context(QUEUE)?;
            lock::wait(path, wait, end, || turn.try_lock())?;
            lock::wait(path, wait, end, || lock.try_lock())?;
        }
        if is_at(path, &lock) {
            let guard = WriteGuard { guard: ReadGuard { path: path.into(), _lock: lock }, mounted };
            for directory in [guard.generations(), guard.state()] {
                fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
            }
            return Ok(guard);
        }
    }
}

/// Makes a directory for root alone, unless it is there.
fn make(path: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

/// Opens the pin directory; `None` where there is none.
///
/// # Errors
/// Somebody else could change what is in it.
fn open(path: &Path) -> Result<Option<File>> {
    let directory =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(path);
    match directory {
        Ok(directory) => {
            refuse_unsafe(path, &directory)?;
            Ok(Some(directory))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(Failure::Privileges(format!("{}: {error}; run as root", path.display())))
        }
        Err(_) if path.is_symlink() => Err(anyhow!(
            "{} is a symbolic link, which anybody who owns it can point elsewhere; name the \
             directory itself",
            path.display()
        )
        .into()),
        Err(error) => Err(anyhow!(error).context(path.display().to_string()).into()),
    }
}

/// Whoever can write to the pin directory, or owns it, decides what udplb does.
fn refuse_unsafe(path: &Path, directory: &File) -> anyhow::Result<()> {
    let metadata = directory.metadata().with_context(|| path.display().to_string())?;
    // SAFETY: takes and changes nothing.
    let own = unsafe { libc::geteuid() };
    if ![0, own].contains(&metadata.uid()) {
        bail!(
            "{} belongs to user {}, who could change what udplb does; remove it, or give another \
             --pin-dir",
            path.display(),
            metadata.uid()
        );
    }
    if metadata.mode() & 0o022 != 0 {
        bail!(
            "{} can be written by others (mode {:o}), who could change what udplb does; close it \
             with: chmod 0700 {}",
            path.display(),
            metadata.mode() & 0o7777,
            path.display()
        );
    }
    Ok(())
}

/// Returns true if the directory is still the one at this path.
fn is_at(path: &Path, directory: &File) -> bool {
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (fs::symlink_metadata(path), directory.metadata()) {
        (Ok(there), Ok(ours)) => place(there) == place(ours),
        _ => false,
    }
}

/// The pins' parent must be on a bpffs. Returns true if one was mounted on [`BPFFS`], the only place
/// where udplb mounts anything.
fn ensure_bpffs(path: &Path) -> anyhow::Result<bool> {
    let parent = match path.parent().context("the pin directory has no parent")? {
        // of a bare name
        parent if parent.as_os_str().is_empty() => Path::new("."),
        parent => parent,
    };
    if is_bpffs(parent)? {
        return Ok(false);
    }
    let how = format!("mount one with: mount -t bpf -o mode=0700 bpf {}", parent.display());
    if parent != Path::new(BPFFS) {
        bail!(
            "{} is not on a bpffs, where pins are; leave --pin-dir away, or {how}",
            parent.display()
        );
    }
    // SAFETY: constant C strings that outlive the call.
    let result = unsafe {
        let target = std::ffi::CString::new(BPFFS)?;
        let options = c"mode=0700".as_ptr().cast();
        libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, options)
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        bail!("{BPFFS} is not a bpffs, and mounting one failed ({error}); {how}");
    }
    log::info!("mounted bpffs on {BPFFS}");
    Ok(true)
}

impl WriteGuard {
    /// Has a bpffs stay that was mounted for this, though nothing was built in it.
    pub fn keep_mount(&mut self) {
        self.mounted = false;
    }

    /// Takes the bpffs away again where nothing was built in it.
    fn unmount(&self) -> anyhow::Result<()> {
        if !self.numbers()?.is_empty() {
            return Ok(());
        }
        self.remove_all()?;
        // it is busy as long as anybody has a directory of it open, this guard too
        // SAFETY: a constant C string that outlives the call.
        let result = unsafe {
            let target = std::ffi::CString::new(BPFFS)?;
            libc::umount2(target.as_ptr(), libc::MNT_DETACH)
        };
        if result != 0 {
            return Err(io::Error::last_os_error()).context(BPFFS);
        }
        log::info!("unmounted bpffs from {BPFFS}");
        Ok(())
    }
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = self.unmount()
        {
            log::warn!("{error:#}");
        }
    }
}

fn is_bpffs(path: &Path) -> anyhow::Result<bool> {
    let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path is a C string, and statfs fills the struct where it returns 0.
    let filled = unsafe { libc::statfs(c_path.as_ptr(), stat.as_mut_ptr()) } == 0;
    if !filled {
        let error = io::Error::last_os_error();
        bail!("{}: {error}", path.display());
    }
    // SAFETY: filled, as just checked.
    let f_type = unsafe { stat.assume_init() }.f_type;
    // signed with glibc, unsigned with musl
    Ok(i128::from(f_type) == i128::from(libc::BPF_FS_MAGIC))
}

impl ReadGuard {
    /// The directory of all generations.
    pub fn generations(&self) -> PathBuf {
        self.path.join("generations")
    }

    /// The directory of one generation.
    pub fn generation(&self, number: u32) -> PathBuf {
        self.generations().join(number.to_string())
    }

    /// Where a generation is built.
    pub fn building(&self, number: u32) -> PathBuf {
        self.path.join(format!("building-{number}"))
    }

    /// The directory of what outlives generations.
    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    /// The generation that `current` points at, whether or not it exists.
    pub fn current(&self) -> Option<u32> {
        fs::read_link(self.path.join("current")).ok()?.file_name()?.to_str()?.parse().ok()
    }

    /// The numbers of the generations there are, in order.
    pub fn numbers(&self) -> anyhow::Result<Vec<u32>> {
        let mut numbers: Vec<u32> =
            names(&self.generations())?.iter().filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// What a crash left half-built, as names in the directory.
    pub fn unfinished(&self) -> anyhow::Result<Vec<String>> {
        let mut names = names(&self.path)?;
        names.retain(|name| name.starts_with("building-") || name == NEXT_CURRENT);
        Ok(names)
    }

    /// The maps that outlive generations; `None` where one of them is missing.
    pub fn maps(&self) -> anyhow::Result<Option<StateMaps>> {
        let state = self.state();
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
}

/// The names in a directory; none where it does not exist.
fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| directory.display().to_string()),
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()
        .with_context(|| directory.display().to_string())
}

const NEXT_CURRENT: &str = "current-next";

impl WriteGuard {
    /// Points `current` at a generation, in one step; `None` removes it.
    pub fn set_current(&self, number: Option<u32>) -> anyhow::Result<()> {
        let Some(number) = number else {
            return match fs::remove_file(self.path.join("current")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(error).context("current")
                }
                _ => Ok(()),
            };
        };
        let next = self.path.join(NEXT_CURRENT);
        let _ = fs::remove_file(&next);
        symlink(format!("generations/{number}"), &next)
            .and_then(|()| fs::rename(&next, self.path.join("current")))
            .with_context(|| format!("current -> generations/{number}"))
    }

    /// Removes what a crash left half-built.
    pub fn remove_unfinished(&self, name: &str) -> anyhow::Result<()> {
        let path = self.path.join(name);
        if path.is_dir() && !path.is_symlink() {
            remove_pins(&path)
        } else {
            Ok(fs::remove_file(&path)?)
        }
        .with_context(|| path.display().to_string())
    }

    /// Returns true if nothing was ever built in the directory.
    pub fn is_empty(&self) -> anyhow::Result<bool> {
        let mut kept = vec![self.generations()];
        let states = names(&self.path)?.into_iter().filter(|name| name.starts_with(STATES));
        kept.extend(states.map(|name| self.path.join(name)));
        let mut empty = self.current().is_none() && self.unfinished()?.is_empty();
        for directory in kept {
            empty &= names(&directory)?.is_empty();
        }
        Ok(empty)
    }

    /// Removes every pin, and the directory.
    pub fn remove_all(&self) -> anyhow::Result<()> {
        let _ = fs::remove_file(self.path.join("current"));
        for name in self.unfinished()? {
            self.remove_unfinished(&name)?;
        }
        for number in self.numbers()? {
            remove_pins(&self.generation(number))?;
        }
        for name in names(&self.path)?.iter().filter(|name| name.starts_with(STATES)) {
            remove_pins(&self.path.join(name))?;
        }
        for name in ["generations", QUEUE] {
            fs::remove_dir(self.path.join(name)).context(name)?;
        }
        // last: those who wait for it look whether it is still there
        fs::remove_dir(&self.path).with_context(|| self.path.display().to_string())
    }

    /// The maps that outlive generations; those that are missing are made as the program wants
    /// them. The second value says that counters start at zero because theirs was missing.
    pub fn ensure_maps(&self, skeleton: &OpenUdplbSkel<'_>) -> anyhow::Result<(StateMaps, bool)> {
        let maps = &skeleton.maps;
        let state = self.state();
        let fresh = !has_chunks(&state, "counters")?;
        for name in ["counters", "nexthops"] {
            if !has_chunks(&state, name)? {
                remove_chunks(&state, name)?;
            }
        }
        // what was counted before is gone, and so is this part of it
        if fresh && state.join("retired").try_exists()? {
            fs::remove_file(state.join("retired"))?;
        }
        let chunk = create(&maps.counters_chunk, None)?;
        let counters = ensure(&state, "counters", &maps.counters, Some(chunk.as_fd()))?;
        let chunk = create(&maps.nexthops_chunk, None)?;
        let nexthops = ensure(&state, "nexthops", &maps.nexthops, Some(chunk.as_fd()))?;
        let retired = ensure(&state, "retired", &maps.retired, None)?;
        let heartbeat = ensure(&state, "heartbeat", &maps.heartbeat, None)?;
        let held = ensure(&state, "held", &maps.held, None)?;
        let pending = Some(ensure(&state, "pending", &maps.pending, None)?);
        let marks = Marks::new(Some(ensure(&state, "marks", &maps.marks, None)?));
        let origin = Some(ensure(&state, "origin", &maps.origin, None)?);
        let overrides = ensure(&state, "overrides", &maps.overrides, None)?;
        let fragments = ensure(&state, "fragments", &maps.fragments, None)?;
        let fragment_ring = ensure(&state, "fragment_ring", &maps.fragment_ring, None)?;
        let path_mtus = ensure(&state, "path_mtus", &maps.path_mtus, None)?;
        let own = ensure(&state, "own", &maps.own, None)?;
        let suspects = ensure(&state, "suspects", &maps.suspects, None)?;
        let vlans = ensure(&state, "vlans", &maps.vlans, None)?;
        let tracing = ensure(&state, "tracing", &maps.tracing, None)?;
        let events = ensure(&state, "events", &maps.events, None)?;
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

    /// Keeps the map of sequences that the first generation was loaded with, and gives it a secret:
    /// only libbpf makes one with a lock in it.
    pub fn pin_sequences(&self, map: &mut MapMut<'_>) -> anyhow::Result<()> {
        let mut sequences = types::sequences::default();
        let mut random = File::open("/dev/urandom")?;
        for secret in &mut sequences.secret {
            let mut bytes = [0; 8];
            random.read_exact(&mut bytes)?;
            *secret = u64::from_ne_bytes(bytes);
        }
        map.update(&0_u32.to_ne_bytes(), bytes_of(&sequences), MapFlags::ANY)?;
        let path = self.state().join("sequences");
        map.pin(&path).with_context(|| path.display().to_string())
    }
}

/// Whether a table that grows is there with all of its chunks.
fn has_chunks(state: &Path, name: &'static str) -> anyhow::Result<bool> {
    let path = state.join(name);
    if !path.try_exists()? {
        return Ok(false);
    }
    let outer = MapHandle::from_pinned_path(&path).with_context(|| path.display().to_string())?;
    Chunks::open(outer, state, name)?.is_whole()
}

/// What is left of a table that is not whole is of no use: nobody can look at it.
fn remove_chunks(state: &Path, name: &str) -> anyhow::Result<()> {
    let chunk = format!("{name}-");
    let is_part = |it: &&String| *it == name || it.starts_with(&chunk);
    for name in names(state)?.iter().filter(is_part) {
        fs::remove_file(state.join(name))?;
    }
    Ok(())
}

/// Removes a directory of pins.
pub fn remove_pins(directory: &Path) -> anyhow::Result<()> {
    for name in names(directory)? {
        fs::remove_file(directory.join(name))?;
    }
    fs::remove_dir(directory).with_context(|| directory.display().to_string())
}

/// A map that is not part of an object, as the object defines it.
pub fn create(
    definition: &OpenMap<'_>,
    inner: Option<BorrowedFd<'_>>,
) -> anyhow::Result<MapHandle> {
    use std::os::fd::AsRawFd;
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        map_flags: definition.map_flags(),
        inner_map_fd: inner.map_or(0, |fd| fd.as_raw_fd() as u32),
        ..Default::default()
    };
    let context = || format!("map {}", definition.name().display());
    let map = MapHandle::create(
        definition.map_type(),
        Some(definition.name()),
        definition.key_size(),
        definition.value_size(),
        definition.max_entries(),
        &options,
    )
    .with_context(context)?;
    // libbpf takes a kernel that was short of memory when it probed for one without names, and no
    // later program could use the map
    if MapInfo::new(map.as_fd()).with_context(context)?.info.name[0] == 0 {
        bail!("{}: the kernel kept no name for it; try again", context());
    }
    Ok(map)
}

fn ensure(
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
    /// What of the packets is to be told, and where it is.
    pub tracing: MapHandle,
    pub events: MapHandle,
    /// None before the first generation.
    pub sequences: Option<MapHandle>,
    held: MapHandle,
    /// None in a directory of an older udplb.
    pending: Option<MapHandle>,
    /// None where an earlier udplb built the generation.
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
            // it is not found again, as one of standard input
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

    /// What is held, if anything is.
    pub fn held(&self) -> anyhow::Result<Option<Held>> {
        let bytes = self.held.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?;
        let held: types::held =
            bytes.and_then(|bytes| from_bytes(&bytes)).context("state/held is no held map")?;
        Ok((held.since != 0).then_some(Held { generation: held.generation, since: held.since }))
    }

    /// Holds a configuration, or lets go of it.
    pub fn set_held(&self, held: Option<Held>) -> anyhow::Result<()> {
        let held = held.map_or_else(types::held::default, |held| types::held {
            since: held.since,
            generation: held.generation,
            unused: 0,
        });
        Ok(self.held.update(&0_u32.to_ne_bytes(), bytes_of(&held), MapFlags::ANY)?)
    }
}
