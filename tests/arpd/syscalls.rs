//! System calls that fail on demand: a seccomp filter passes them to a thread of the test.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// Length of a netlink address, which identifies netlink calls.
const NETLINK_ADDRESS: u32 = 12;

/// Failures of netlink requests of one program and its children.
pub struct Faults(Arc<State>);

#[derive(Default)]
struct State {
    /// Number of calls that succeed before the next failure.
    spared: AtomicI64,
    /// Number of calls that fail after those.
    failing: AtomicI64,
    failed: AtomicI64,
}

impl State {
    fn fails(&self) -> bool {
        if self.spared.fetch_sub(1, Ordering::SeqCst) > 0 {
            return false;
        }
        self.spared.store(0, Ordering::SeqCst);
        let fails = self.failing.fetch_sub(1, Ordering::SeqCst) > 0;
        if fails {
            self.failed.fetch_add(1, Ordering::SeqCst);
        } else {
            self.failing.store(0, Ordering::SeqCst);
        }
        fails
    }
}

impl Faults {
    /// Intercepts the netlink requests of a program that is about to be started.
    pub fn new(command: &mut Command) -> Faults {
        let (socket, childs) = UnixDatagram::pair().expect("sockets");
        // SAFETY: the closure makes system calls only, on memory of its own.
        unsafe {
            command.pre_exec(move || send_descriptor(childs.as_raw_fd(), install_filter()?));
        }
        let state = Arc::new(State::default());
        let faults = Faults(state.clone());
        std::thread::spawn(move || {
            answer(&receive_descriptor(&socket).expect("the filter's descriptor"), &state);
        });
        faults
    }

    /// Lets `spared` requests succeed, then makes `failing` requests fail.
    pub fn fail(&self, spared: i64, failing: i64) {
        self.0.failed.store(0, Ordering::SeqCst);
        self.0.failing.store(failing, Ordering::SeqCst);
        self.0.spared.store(spared, Ordering::SeqCst);
    }

    /// Returns the number of requests that failed since the last call of `fail`.
    pub fn failed(&self) -> i64 {
        self.0.failed.load(Ordering::SeqCst)
    }
}

/// Installs a filter that reports each sendto() with a netlink address; returns its descriptor.
fn install_filter() -> io::Result<RawFd> {
    let load = |offset: u32| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: offset };
    let differs =
        |value: u32, skip: u8| libc::sock_filter { code: 0x15, jt: 0, jf: skip, k: value };
    let result = |value: u32| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: value };
    // struct seccomp_data: the number, then the arguments from byte 16 on, the last at 56
    let low_half = if cfg!(target_endian = "little") { 56 } else { 60 };
    let mut program = [
        load(0),
        differs(libc::SYS_sendto as u32, 3),
        load(low_half),
        differs(NETLINK_ADDRESS, 1),
        result(libc::SECCOMP_RET_USER_NOTIF),
        result(libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter outlives the call.
    let descriptor = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        )
    };
    match descriptor {
        0.. => Ok(descriptor as RawFd),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Control buffer with room for one descriptor.
type Control = [u64; 4];

fn with_message<T>(control: &mut Control, call: impl FnOnce(&mut libc::msghdr) -> T) -> T {
    let mut byte = [0_u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: all zeroes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: it computes a length.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as usize;
    call(&mut message)
}

fn send_descriptor(socket: RawFd, descriptor: RawFd) -> io::Result<()> {
    let mut control = Control::default();
    let sent = with_message(&mut control, |message| {
        // SAFETY: the control buffer has room for the header and one descriptor.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(descriptor);
            libc::sendmsg(socket, message, 0)
        }
    });
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive_descriptor(socket: &UnixDatagram) -> io::Result<OwnedFd> {
    let mut control = Control::default();
    with_message(&mut control, |message| {
        // SAFETY: the message has room for what the child sends, which is one descriptor.
        unsafe {
            if libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_CMSG_CLOEXEC) < 0 {
                return Err(io::Error::last_os_error());
            }
            let header = libc::CMSG_FIRSTHDR(message);
            assert!(!header.is_null(), "no descriptor came");
            Ok(OwnedFd::from_raw_fd(libc::CMSG_DATA(header).cast::<RawFd>().read_unaligned()))
        }
    })
}

fn answer(listener: &OwnedFd, state: &State) {
    const RECEIVE: libc::Ioctl = 0xc050_2100_u32 as libc::Ioctl;
    const SEND: libc::Ioctl = 0xc018_2101_u32 as libc::Ioctl;
    loop {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the structures are of the kernel's layout and outlive the calls.
        unsafe {
            libc::poll(&raw mut poll, 1, -1);
            if poll.revents & libc::POLLHUP != 0 {
                return;
            }
            let mut call: libc::seccomp_notif = std::mem::zeroed();
            if libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut call) != 0 {
                continue;
            }
            let mut response: libc::seccomp_notif_resp = std::mem::zeroed();
            response.id = call.id;
            match state.fails() {
                true => response.error = -libc::ENOBUFS,
                false => response.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            }
            // the caller may have exited
            libc::ioctl(listener.as_raw_fd(), SEND, &raw mut response);
        }
    }
}
