//! Abilities and settings of the running kernel that decide whether the program loads.

use std::fs;
use std::path::Path;

use libbpf_rs::ErrorKind;

/// BTF of the kernel, which relocates the program when it is loaded.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// Returns major and minor version of the running kernel.
pub fn version() -> (u32, u32) {
    parse(&rustix::system::uname().release().to_string_lossy())
}

fn parse(release: &str) -> (u32, u32) {
    let number = |text: &str| {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..digits].parse().unwrap_or(0)
    };
    let mut numbers = release.split('.').map(number);
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Returns true if the kernel describes its types.
pub fn has_btf() -> bool {
    Path::new(BTF).exists()
}

/// First kernel that casts pointers for programs, so that they read its memory without the helpers that lockdown
/// disables.
pub const CASTS: (u32, u32) = (6, 2);

/// Returns true if lockdown keeps the program from being loaded; false also where securityfs is not
/// mounted.
pub fn is_locked_down() -> bool {
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown");
    version() < CASTS && lockdown.is_ok_and(|modes| modes.contains("[confidentiality]"))
}

/// Reason why a kernel in lockdown (confidentiality) refuses the program.
pub const CONFIDENTIAL: &str = "the kernel is locked down (confidentiality): before 6.2 it lets no \
                                program read kernel memory; boot it with lockdown=integrity";

/// Returns the likely cause of a refusal to load, and what to do, from the kind of error and libbpf's
/// and the verifier's log.
pub fn refusal(error: ErrorKind, log: &str) -> Option<String> {
    // to the verifier, helpers that lockdown disables are unknown
    let no_reads = ["cannot use helper bpf_probe_read", "unknown func bpf_probe_read"];
    if is_locked_down() || no_reads.iter().any(|message| log.contains(message)) {
        return Some(CONFIDENTIAL.into());
    }
    if !has_btf() {
        return Some(format!("the kernel has no BTF ({BTF}): run one with CONFIG_DEBUG_INFO_BTF"));
    }
    match error {
        ErrorKind::PermissionDenied if log.contains("RLIMIT_MEMLOCK") || log.contains("memlock") => {
            Some("locked memory is limited: raise the limit (ulimit -l unlimited)".into())
        }
        ErrorKind::PermissionDenied if !log.contains("processed ") => Some(
            "a security module, a seccomp filter or the container's user namespace forbids bpf(2): \
             run udplb as root of the host"
                .into(),
        ),
        ErrorKind::OutOfMemory => Some("no memory is left for its maps, or for this cgroup".into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use libbpf_rs::ErrorKind;

    use super::{CONFIDENTIAL, parse, refusal};

    #[test]
    fn versions_of_kernels() {
        for (release, wanted) in [
            ("6.12.57+deb13-amd64", (6, 12)),
            ("5.10.0-28-cloud-amd64", (5, 10)),
            ("6.18-rc1\0\0", (6, 18)),
            ("", (0, 0)),
        ] {
            assert_eq!(parse(release), wanted, "{release}");
        }
    }

    #[test]
    fn refusals_have_causes() {
        let log = "program of this type cannot use helper bpf_probe_read#4\nprocessed 90 insns";
        assert_eq!(refusal(ErrorKind::InvalidInput, log).as_deref(), Some(CONFIDENTIAL));
        let says = |error, log: &str, wanted: &str| {
            let said = refusal(error, log).unwrap_or_default();
            assert!(said.contains(wanted), "{said}");
        };
        // the kernel of the tests has BTF
        says(ErrorKind::PermissionDenied, "", "as root of the host");
        says(ErrorKind::PermissionDenied, "consider raising RLIMIT_MEMLOCK", "ulimit -l");
        says(ErrorKind::OutOfMemory, "", "memory");
        assert_eq!(
            refusal(ErrorKind::PermissionDenied, "R1 invalid mem access\nprocessed 9 insns"),
            None
        );
    }
}
