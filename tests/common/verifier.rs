//! Statistics of the kernel's verifier.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Returns the number of instructions that the verifier processed; 0 before kernel 5.16, which does not
/// report it.
pub fn walked(program: BorrowedFd<'_>) -> u32 {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut length = size_of_val(&info) as u32;
    // SAFETY: the kernel writes `length` bytes of the info, which outlives the call.
    let result =
        unsafe { libbpf_sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), &mut info, &mut length) };
    assert_eq!(result, 0, "what the kernel says of the program");
    info.verified_insns
}
