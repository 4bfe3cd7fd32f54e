//! System calls about the XDP hook of an interface, which runs one program before the kernel makes packets an
//! skb. The program is there by a link (Linux 5.9), which lasts while it is open or pinned.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use libbpf_sys::{BPF_LINK_TYPE_XDP, BPF_XDP};

use super::tcx::{self, LinkInfo};

/// Flags of linux/if_link.h that select who runs the program.
const GENERIC: u32 = 1 << 1;
const NATIVE: u32 = 1 << 2;

/// Attaches a program: to the driver, or with `generic` to the kernel.
///
/// # Errors
/// Another program is attached (EBUSY), or the driver lacks XDP.
pub fn attach(program: BorrowedFd<'_>, ifindex: u32, generic: bool) -> io::Result<OwnedFd> {
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        flags: if generic { GENERIC } else { NATIVE },
        ..Default::default()
    };
    // SAFETY: the kernel reads the options, which outlive the call.
    tcx::descriptor(unsafe {
        libbpf_sys::bpf_link_create(program.as_raw_fd(), ifindex as i32, BPF_XDP, &options)
    })
}

/// Returns id, program and interface of an XDP link.
pub fn info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info = tcx::info_of(link, BPF_LINK_TYPE_XDP)?;
    // SAFETY: any bytes are a number, which the type of the link says that this is.
    let ifindex = unsafe { info.__bindgen_anon_1.xdp.ifindex };
    Ok(LinkInfo { id: info.id, program: info.prog_id, ifindex })
}

/// Returns true if a device sends frames that XDP redirects to it (`ndo_xdp_xmit`). Linux 6.3 and later tell.
pub fn takes_frames(ifindex: u32) -> bool {
    /// `NETDEV_XDP_ACT_NDO_XMIT` of linux/netdev.h.
    const NDO_XMIT: u64 = 1 << 2;
    let mut options = libbpf_sys::bpf_xdp_query_opts {
        sz: size_of::<libbpf_sys::bpf_xdp_query_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    // SAFETY: libbpf writes the options, which outlive the call.
    let result = unsafe { libbpf_sys::bpf_xdp_query(ifindex as i32, 0, &mut options) };
    result == 0 && options.feature_flags & NDO_XMIT != 0
}
