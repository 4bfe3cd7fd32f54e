//! The capabilities that changing the kernel takes.

use crate::error::{Failure, Result};

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

/// Returns the capabilities that this process lacks, in words.
pub fn missing_now() -> Vec<String> {
    missing(effective())
}

/// The effective capabilities of this thread, a bit for each.
fn effective() -> u64 {
    /// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h: 64 capabilities.
    const VERSION: u32 = 0x2008_0522;
    let mut header = [VERSION, 0];
    // effective, permitted and inheritable, of the lower 32 and then of the upper
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: the kernel reads and writes a header of two words and two sets of three, and all of
    // them outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) };
    match result {
        0 => u64::from(sets[1][0]) << 32 | u64::from(sets[0][0]),
        _ => 0,
    }
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
    use std::fs;

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
    fn effective_set_is_that_of_proc() {
        let status = fs::read_to_string("/proc/thread-self/status").expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("a line");
        assert_eq!(u64::from_str_radix(line.trim(), 16), Ok(effective()));
    }
}
