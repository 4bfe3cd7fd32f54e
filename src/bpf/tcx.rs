//! System calls about the tcx hook (Linux 6.6) of an interface's ingress, which runs programs before all tc
//! filters, in the order of a list. A program is there by a link, which lasts while it is open or pinned.

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libbpf_sys::BPF_TCX_INGRESS;

/// A program on the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Id of the program.
    pub program: u32,
    /// Id of the link; 0: it was attached without one.
    pub link: u32,
}

/// The kernel's information about a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    pub id: u32,
    /// Id of the program.
    pub program: u32,
    /// Index of the interface, in the network namespace that it is in now; 0: the interface is gone, or the
    /// link was detached.
    pub ifindex: u32,
}

/// Returns the programs on the hook of an interface, in their order; `None`: the kernel has no such hook.
///
/// # Errors
/// There is no such interface, or CAP_NET_ADMIN is missing.
pub fn query(ifindex: u32) -> io::Result<Option<Vec<Attached>>> {
    /// The kernel's limit.
    const MAX_PROGRAMS: usize = 64;
    let (mut programs, mut links) = ([0_u32; MAX_PROGRAMS], [0_u32; MAX_PROGRAMS]);
    let mut options = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as libbpf_sys::size_t,
        prog_ids: programs.as_mut_ptr(),
        link_ids: links.as_mut_ptr(),
        ..Default::default()
    };
    options.__bindgen_anon_1.count = MAX_PROGRAMS as u32;
    // SAFETY: the kernel writes at most `count` ids to each list, and everything outlives the call; the
    // union is one of two names of the same number.
    let (result, count) = unsafe {
        let result = libbpf_sys::bpf_prog_query_opts(ifindex as i32, BPF_TCX_INGRESS, &mut options);
        (result, options.__bindgen_anon_1.count as usize)
    };
    match result {
        0 => {
            let pairs = programs.into_iter().zip(links).take(count);
            Ok(Some(pairs.map(|(program, link)| Attached { program, link }).collect()))
        }
        // an unknown type of attachment
        error if -error == libc::EINVAL => Ok(None),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Attaches a program behind those that are there already.
pub fn attach(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes plain numbers, and no options.
    descriptor(unsafe {
        libbpf_sys::bpf_link_create(
            program.as_raw_fd(),
            ifindex as i32,
            BPF_TCX_INGRESS,
            std::ptr::null(),
        )
    })
}

/// Replaces the program of a link, at its place in the list. With `old` only if it has that one now.
pub fn replace(
    link: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    old: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let options = libbpf_sys::bpf_link_update_opts {
        sz: size_of::<libbpf_sys::bpf_link_update_opts>() as libbpf_sys::size_t,
        flags: if old.is_some() { libbpf_sys::BPF_F_REPLACE } else { 0 },
        old_prog_fd: old.map_or(0, |old| old.as_raw_fd() as u32),
        ..Default::default()
    };
    // SAFETY: the kernel reads the options, which outlive the call.
    done(unsafe { libbpf_sys::bpf_link_update(link.as_raw_fd(), program.as_raw_fd(), &options) })
}

/// Takes a link's program off its interface, whoever else has the link.
pub fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes a plain number.
    done(unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) })
}

/// Pins a link.
pub fn pin(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: the path is a C string that outlives the call.
    done(unsafe { libbpf_sys::bpf_obj_pin(link.as_raw_fd(), path.as_ptr()) })
}

/// Opens a pinned link.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    // SAFETY: the path is a C string that outlives the call.
    descriptor(unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) })
}

/// Opens a link by its id. Needs CAP_SYS_ADMIN.
pub fn open_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes a plain number.
    descriptor(unsafe { libbpf_sys::bpf_link_get_fd_by_id(id) })
}

/// Returns id, program and interface of a link.
pub fn info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let info = info_of(link, libbpf_sys::BPF_LINK_TYPE_TCX)?;
    // SAFETY: any bytes are two numbers, which the type of the link says that these are.
    let tcx = unsafe { info.__bindgen_anon_1.tcx };
    if tcx.attach_type != BPF_TCX_INGRESS {
        return Err(another_kind());
    }
    Ok(LinkInfo { id: info.id, program: info.prog_id, ifindex: tcx.ifindex })
}

/// Returns the kernel's information about a link of a type.
pub(super) fn info_of(link: BorrowedFd<'_>, kind: u32) -> io::Result<libbpf_sys::bpf_link_info> {
    let mut info = libbpf_sys::bpf_link_info::default();
    let mut length = size_of::<libbpf_sys::bpf_link_info>() as u32;
    // SAFETY: the kernel writes at most `length` bytes of `info`, and both outlive the call.
    done(unsafe { libbpf_sys::bpf_link_get_info_by_fd(link.as_raw_fd(), &mut info, &mut length) })?;
    if info.type_ == kind { Ok(info) } else { Err(another_kind()) }
}

fn another_kind() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a link of another kind")
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn done(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

pub(super) fn descriptor(result: i32) -> io::Result<OwnedFd> {
    done(result)?;
    // SAFETY: the kernel has just returned it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}
