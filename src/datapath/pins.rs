//! The directory of pins: its lock and its layout.
//!
//! ```text
//! /sys/fs/bpf/udplb/            mode 0700; flock: writers exclusive, readers shared
//!   current -> generations/42
//!   generations/                flock: whoever traces
//!     42/                       program, rules, table, upstreams, config …
//!   building-43/                under construction; bpffs refuses names with a dot
//!   links/                      by index of an interface: its tcx link, and its XDP link, as xdp-7
//!   queue/                      flock: a writer that waits for readers to end, and readers that come after it
//!   state-5/                    counters, counters-0 …, nexthops, nexthops-0 …, heartbeat, held, retired …
//!                               flock: arpd
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::geteuid;

use crate::datapath::lock;
use crate::error::{Failure, Result};

/// Default of `--pin-dir`.
pub const PIN_DIR: &str = "/sys/fs/bpf/udplb";

/// The usual mount point of bpffs. udplb mounts one there if it is missing.
const BPFFS: &str = "/sys/fs/bpf";

/// The directory that a writer locks while it waits, so that readers queue behind it.
const QUEUE: &str = "queue";

/// The directory of links.
const LINKS: &str = "links";

/// Directory of the state that outlives generations. Each layout of it has a directory of its own, whose
/// name begins with `STATES`.
pub const STATE: &str = "state-5";

const STATES: &str = "state";

/// A pin directory and the timeout of its lock.
#[derive(Clone, Debug)]
pub struct Store {
    pub pin_dir: PathBuf,
    pub lock_timeout: Duration,
}

/// Shared access: no other process changes anything meanwhile.
pub struct ReadGuard {
    path: PathBuf,
    _lock: File,
}

/// Exclusive access: everything that changes pins takes one.
pub struct WriteGuard {
    guard: ReadGuard,
    /// This guard has mounted the bpffs, and unmounts it unless something is built in it.
    mounted: bool,
}

impl Deref for WriteGuard {
    type Target = ReadGuard;

    fn deref(&self) -> &ReadGuard {
        &self.guard
    }
}

/// Locks for reading; `None` if udplb has never been applied.
pub fn read(path: &Path, wait: Duration) -> Result<Option<ReadGuard>> {
    let end = Instant::now() + wait;
    loop {
        let Some(lock) = open(path)? else { return Ok(None) };
        // queue behind a waiting writer
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

/// Locks for writing; creates the directory if it is missing.
pub fn write(path: &Path, wait: Duration) -> Result<WriteGuard> {
    let end = Instant::now() + wait;
    let mounted = ensure_bpffs(path)?;
    loop {
        make(path)?;
        let lock = open(path)?.with_context(|| format!("{} is gone", path.display()))?;
        make(&path.join(QUEUE))?;
        if lock.try_lock().is_err() {
            // later readers queue behind this writer, so that they cannot starve it
            let turn = File::open(path.join(QUEUE)).context(QUEUE)?;
            lock::wait(path, wait, end, || turn.try_lock())?;
            lock::wait(path, wait, end, || lock.try_lock())?;
        }
        if is_at(path, &lock) {
            let guard = WriteGuard { guard: ReadGuard { path: path.into(), _lock: lock }, mounted };
            for directory in [guard.generations(), guard.links_directory(), guard.state()] {
                fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
            }
            return Ok(guard);
        }
    }
}

/// Creates a directory of mode 0700, unless it exists.
fn make(path: &Path) -> anyhow::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

/// Opens the pin directory; `None` if it does not exist.
///
/// # Errors
/// Another user could change its content.
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

/// Refuses a pin directory that another user owns or can write to: that user could control udplb.
fn refuse_unsafe(path: &Path, directory: &File) -> anyhow::Result<()> {
    let metadata = directory.metadata().with_context(|| path.display().to_string())?;
    if ![0, geteuid().as_raw()].contains(&metadata.uid()) {
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

/// Ensures that the pins' parent is on a bpffs. Returns true if one was mounted on [`BPFFS`], the only
/// place where udplb mounts anything.
fn ensure_bpffs(path: &Path) -> anyhow::Result<bool> {
    let parent = match path.parent().context("the pin directory has no parent")? {
        // the path is a bare name
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
    if let Err(error) = mount("bpf", BPFFS, "bpf", MountFlags::empty(), c"mode=0700") {
        let error = io::Error::from(error);
        bail!("{BPFFS} is not a bpffs, and mounting one failed ({error}); {how}");
    }
    log::info!("mounted bpffs on {BPFFS}");
    Ok(true)
}

impl WriteGuard {
    /// Keeps a bpffs that this guard has mounted, even if nothing is built in it.
    pub fn keep_mount(&mut self) {
        self.mounted = false;
    }

    /// Unmounts the bpffs if nothing was built in it.
    fn unmount(&self) -> anyhow::Result<()> {
        if !self.numbers()?.is_empty() {
            return Ok(());
        }
        self.remove_all()?;
        // lazily: the bpffs is busy while a directory of it is open, as in this guard
        unmount(BPFFS, UnmountFlags::DETACH).map_err(io::Error::from).context(BPFFS)?;
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
    let stat = statfs(path).map_err(io::Error::from).with_context(|| path.display().to_string())?;
    Ok(i128::from(stat.f_type) == i128::from(libc::BPF_FS_MAGIC))
}

impl ReadGuard {
    /// Returns the directory of all generations.
    pub fn generations(&self) -> PathBuf {
        self.path.join("generations")
    }

    /// Returns the directory of one generation.
    pub fn generation(&self, number: u32) -> PathBuf {
        self.path.join(ReadGuard::name_of(number))
    }

    /// Returns the name of that directory, as in [`ReadGuard::unfinished`].
    pub fn name_of(number: u32) -> String {
        format!("generations/{number}")
    }

    /// Returns the directory where a generation is built.
    pub fn building(&self, number: u32) -> PathBuf {
        self.path.join(format!("building-{number}"))
    }

    /// Returns the directory of the state that outlives generations.
    pub fn state(&self) -> PathBuf {
        self.path.join(STATE)
    }

    fn links_directory(&self) -> PathBuf {
        self.path.join(LINKS)
    }

    /// Returns the pin of the tcx link of an interface, by its index.
    pub fn link(&self, ifindex: u32) -> PathBuf {
        self.links_directory().join(ifindex.to_string())
    }

    /// Returns the pin of the XDP link of an interface, by its index.
    pub fn xdp_link(&self, ifindex: u32) -> PathBuf {
        self.links_directory().join(format!("xdp-{ifindex}"))
    }

    /// Returns the indices of the interfaces with a pinned tcx link.
    pub fn links(&self) -> anyhow::Result<Vec<u32>> {
        Ok(names(&self.links_directory())?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Returns the generation that `current` points at, whether or not it exists.
    pub fn current(&self) -> Option<u32> {
        fs::read_link(self.path.join("current")).ok()?.file_name()?.to_str()?.parse().ok()
    }

    /// Returns the numbers of all generations, in order.
    pub fn numbers(&self) -> anyhow::Result<Vec<u32>> {
        let mut numbers: Vec<u32> =
            names(&self.generations())?.iter().filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Returns the names of directories and symlinks that a crash left unfinished.
    pub fn unfinished(&self) -> anyhow::Result<Vec<String>> {
        let mut names = names(&self.path)?;
        names.retain(|name| name.starts_with("building-") || name == NEXT_CURRENT);
        Ok(names)
    }
}

/// Returns the names in a directory; none if it does not exist.
pub(super) fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
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

    /// Removes what a crash left half-built or half-removed.
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
        remove_pins(&self.links_directory())?;
        for name in ["generations", QUEUE] {
            fs::remove_dir(self.path.join(name)).context(name)?;
        }
        // last: waiting processes check that it still exists
        fs::remove_dir(&self.path).with_context(|| self.path.display().to_string())
    }
}

/// Removes a directory of pins.
pub fn remove_pins(directory: &Path) -> anyhow::Result<()> {
    for name in names(directory)? {
        fs::remove_file(directory.join(name))?;
    }
    fs::remove_dir(directory).with_context(|| directory.display().to_string())
}
