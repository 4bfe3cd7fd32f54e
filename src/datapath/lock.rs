//! Waiting for a lock on a directory, and its holders.

use std::fs::{self, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use crate::error::{Failure, Result};

/// Interval of the attempts to take a lock.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Tries a lock until `end`, `wait` after the beginning. `path` is the directory that it protects.
pub fn wait(
    path: &Path,
    wait: Duration,
    end: Instant,
    mut lock: impl FnMut() -> std::result::Result<(), TryLockError>,
) -> Result<()> {
    loop {
        match lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(POLL_INTERVAL);
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::Locked(format!(
                    "{} is still locked after {} s by {}",
                    path.display(),
                    wait.as_secs(),
                    holders(path)
                )));
            }
            Err(TryLockError::Error(error)) => {
                return Err(anyhow!(error).context(path.display().to_string()).into());
            }
        }
    }
}

/// Returns the holders of a lock on a directory, with command lines: `udplb apply a.yaml (pid 7)`.
pub fn holders(path: &Path) -> String {
    let unknown = || format!("another udplb (fuser {} shows which)", path.display());
    let Ok(metadata) = fs::metadata(path) else { return unknown() };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let pids = pids(&locks, metadata.dev(), metadata.ino());
    let holders: Vec<String> = pids.into_iter().map(describe).collect();
    if holders.is_empty() { unknown() } else { holders.join(", ") }
}

fn describe(pid: u32) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = String::from_utf8_lossy(&words).replace('\0', " ");
    match words.trim() {
        "" => format!("pid {pid}"),
        words => format!("`{words}` (pid {pid})"),
    }
}

/// Returns the processes that hold a flock on an inode, from `/proc/locks`:
/// `1: FLOCK  ADVISORY  WRITE 1234 00:2b:5678 0 EOF`. Waiting processes have `->` after the number.
fn pids(locks: &str, device: u64, inode: u64) -> Vec<u32> {
    let place = format!("{:02x}:{:02x}:{inode}", libc::major(device), libc::minor(device));
    let mut pids: Vec<u32> = locks
        .lines()
        .filter_map(|line| match line.split_whitespace().collect::<Vec<_>>()[..] {
            [_, "FLOCK", _, _, pid, found, ..] if found == place => pid.parse().ok(),
            _ => None,
        })
        .collect();
    pids.dedup();
    pids
}

#[cfg(test)]
mod tests {
    use super::pids;

    #[test]
    fn pids_are_those_that_hold_a_flock() {
        let locks = "\
1: FLOCK  ADVISORY  WRITE 1234 00:2b:5678 0 EOF
1: -> FLOCK  ADVISORY  READ 99 00:2b:5678 0 EOF
2: POSIX  ADVISORY  WRITE 7 00:2b:5678 0 EOF
3: FLOCK  ADVISORY  READ 8 00:2c:5678 0 EOF
4: FLOCK  ADVISORY  READ 9 00:2b:5678 0 EOF
5: FLOCK  ADVISORY  READ -1 00:2b:5678 0 EOF
";
        assert_eq!(pids(locks, libc::makedev(0, 0x2b), 5678), [1234, 9]);
        assert!(pids("", 0, 5678).is_empty());
    }
}
