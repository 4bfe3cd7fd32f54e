//! Search for the pins of a program: in other pin directories and in other mount namespaces.

use std::fmt;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::datapath::generation;
use crate::net::link::Layer;

/// Advice for finding the pins of a filter that seems to be an orphan.
pub const HOW_TO_FIND: &str = "they are in a mount namespace that is not seen from here, or gone: look \
     for another udplb in containers and services (`grep -l ' - bpf ' /proc/*/mountinfo` names processes \
     that see a bpffs) and apply or detach there; if there is none";

/// Directories below a bpffs in which a pin directory is looked for.
const MAX_DEPTH: usize = 3;

/// A pin directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A process that sees it; `None`: this one does.
    pub process: Option<u32>,
    pub pin_dir: PathBuf,
}

impl Place {
    /// The beginning of a command line that works on it.
    pub fn command(&self) -> String {
        let udplb = format!("udplb --pin-dir {}", self.pin_dir.display());
        match self.process {
            Some(pid) => format!("nsenter --mount --target {pid} {udplb}"),
            None => udplb,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.pin_dir.display())?;
        match self.process {
            Some(pid) => write!(f, " in the mount namespace of process {pid}"),
            None => Ok(()),
        }
    }
}

/// Looks for the pin directory that has a program. What this process may not see is not found.
pub fn find(program: u32) -> Option<Place> {
    let processes = [None].into_iter().chain(mount_namespaces().into_iter().map(Some));
    processes.into_iter().find_map(|process| {
        let proc = process.map_or("/proc/self".into(), |pid| format!("/proc/{pid}"));
        let mounts = fs::read_to_string(format!("{proc}/mountinfo")).ok()?;
        let root = process.map_or(PathBuf::new(), |_| PathBuf::from(format!("{proc}/root")));
        bpffs(&mounts).into_iter().find_map(|mount| {
            let there = join(&root, &mount);
            let found = search(&there, program, MAX_DEPTH)?;
            let below = found.strip_prefix(&there).unwrap_or(Path::new(""));
            Some(Place { process, pin_dir: mount.join(below) })
        })
    })
}

/// One process of each mount namespace but this one's.
fn mount_namespaces() -> Vec<u32> {
    let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let mut known = Vec::from_iter(of("self"));
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(namespace) = of(&format!("{pid}")) else { continue };
        if !known.contains(&namespace) {
            known.push(namespace);
            processes.push(pid);
        }
    }
    processes
}

/// An absolute path below a root; `Path::join` would forget the root.
fn join(root: &Path, path: &Path) -> PathBuf {
    match root.as_os_str().is_empty() {
        true => path.into(),
        false => root.join(path.strip_prefix("/").unwrap_or(path)),
    }
}

/// The mount points of bpffs, of `/proc/PID/mountinfo`.
fn bpffs(mounts: &str) -> Vec<PathBuf> {
    let mount = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let point = mount.split(' ').nth(4)?;
        (kind.split(' ').next() == Some("bpf")).then(|| unescape(point))
    };
    mounts.lines().filter_map(mount).collect()
}

/// Blanks and the like are octal numbers there: `\040`.
fn unescape(text: &str) -> PathBuf {
    let mut parts = text.split('\\');
    let mut path = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => path.extend([char::from(code).to_string().as_str(), &part[3..]]),
            None => path.extend(["\\", part]),
        }
    }
    path.into()
}

fn search(directory: &Path, program: u32, depth: usize) -> Option<PathBuf> {
    if has_program(directory, program) {
        return Some(directory.into());
    }
    let entries = fs::read_dir(directory).ok()?.flatten();
    let directories = entries.filter(|it| it.file_type().is_ok_and(|kind| kind.is_dir()));
    match depth {
        0 => None,
        _ => directories.into_iter().find_map(|it| search(&it.path(), program, depth - 1)),
    }
}

fn has_program(pin_dir: &Path, program: u32) -> bool {
    let generations = fs::read_dir(pin_dir.join("generations")).into_iter().flatten().flatten();
    generations.into_iter().any(|generation| {
        [Layer::Ethernet, Layer::Ip].into_iter().any(|layer| {
            let pinned = generation::open_program(&generation.path(), layer).ok();
            let info = pinned.and_then(|pinned| crate::bpf::program_info(pinned.as_fd()).ok());
            info.is_some_and(|info| info.id == program)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::bpffs;

    #[test]
    fn bpffs_of_mountinfo() {
        let mounts = "\
24 30 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw
34 24 0:30 / /sys/fs/bpf rw,nosuid shared:11 - bpf bpf rw,mode=700
90 24 0:44 / /mnt/a\\040b\\134c rw - bpf none rw
91 24 0:45 / /mnt/bpf rw - tmpfs bpf rw
";
        assert_eq!(bpffs(mounts), [PathBuf::from("/sys/fs/bpf"), "/mnt/a b\\c".into()]);
    }
}
