//! The capabilities that changing the kernel takes.

use std::fs;

use crate::failure::{Failure, Result};

/// Name, number in include/uapi/linux/capability.h, and what it is for.
const NEEDED: [(&str, u32, &str); 3] = [
    ("CAP_BPF", 39, "to load the program"),
    ("CAP_NET_ADMIN", 12, "to attach it"),
    ("CAP_PERFMON", 38, "to read packets at offsets that they give themselves"),
];
/// Stands for CAP_BPF and CAP_PERFMON, which were split off from it in 5.8.
const CAP_SYS_ADMIN: u32 = 21;

/// Checks that this process has them.
///
/// # Errors
/// [`Failure::Privileges`], with those that are missing.
pub fn require() -> Result<()> {
    let missing = missing_now();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::Privileges(format!("missing {}; run as root", missing.join(", "))))
}

/// Those that this process lacks, in words.
pub fn missing_now() -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing(effective(&status).unwrap_or(0))
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn missing(effective: u64) -> Vec<String> {
    let has = |number: u32| effective >> number & 1 == 1;
    NEEDED
        .iter()
        .filter(|(name, number, _)| {
            !has(*number) && (*name == "CAP_NET_ADMIN" || !has(CAP_SYS_ADMIN))
        })
        .map(|(name, _, purpose)| format!("{name} ({purpose})"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{effective, missing};

    #[test]
    fn names_what_is_missing() {
        let all = 1 << 39 | 1 << 38 | 1 << 12;
        assert!(missing(all).is_empty());
        assert!(missing(1 << 21 | 1 << 12).is_empty());
        assert_eq!(missing(all & !(1 << 12)), ["CAP_NET_ADMIN (to attach it)"]);
        assert_eq!(missing(0).len(), 3);
    }

    #[test]
    fn reads_the_effective_set() {
        assert_eq!(effective("CapPrm:\t1\nCapEff:\t000001ffffffffff\n"), Some(0x1ff_ffff_ffff));
        assert_eq!(effective("Name:\tudplb\n"), None);
    }
}
