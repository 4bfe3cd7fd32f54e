//! Network namespaces and a bpffs for tests, removed when their values are dropped.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod daemon;
pub mod kinds;
pub mod lab;
pub mod net;
pub mod numbered;
pub mod service;
pub mod tun;
pub mod verifier;
pub mod wire;

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Returns a name that no other test, run or process uses, short enough for an interface.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}{:x}x{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs a program and returns its standard output.
///
/// # Panics
/// If it fails, with its output.
pub fn run<I: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = I>) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A network namespace.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new() -> Namespace {
        let name = unique("udplb-");
        run("ip", ["netns", "add", &name]);
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs `ip` in the namespace; `words` are its arguments, separated by spaces.
    pub fn ip(&self, words: &str) -> String {
        run("ip", ["-n", &self.name].into_iter().chain(words.split_whitespace()))
    }

    /// Runs `tc` in the namespace.
    pub fn tc(&self, words: &str) -> String {
        run("tc", ["-n", &self.name].into_iter().chain(words.split_whitespace()))
    }

    /// Returns a command in the namespace. The command shares the test's mounts, and so its bpffs.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Sets a sysctl of this namespace, such as `net.ipv4.ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        self.enter(|| fs::write(&path, value)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Switches IP forwarding on or off.
    pub fn set_forwarding(&self, on: &str) {
        self.sysctl("net.ipv4.ip_forward", on);
        self.sysctl("net.ipv6.conf.all.forwarding", on);
    }

    /// Runs a closure on a thread in the namespace; sockets that the closure returns stay in the
    /// namespace.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(self.path()).expect("the namespace exists");
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // SAFETY: takes a descriptor that is open and moves this thread alone.
                let moved = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(moved, 0, "setns: {}", std::io::Error::last_os_error());
                inside()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Creates a veth pair to another namespace, both ends up. Without `offload`, checksum offload is
    /// off and received packets have complete checksums.
    pub fn link(&self, name: &str, other: &Namespace, other_name: &str, offload: bool) {
        let peer = format!("peer name {other_name} netns {}", other.name);
        self.ip(&format!("link add {name} type veth {peer}"));
        for (namespace, name) in [(self, name), (other, other_name)] {
            namespace.ip(&format!("link set {name} up"));
            if !offload {
                let mut ethtool = namespace.command("ethtool");
                let output = ethtool.args(["-K", name, "tx", "off"]).output().expect("ethtool");
                assert!(output.status.success(), "ethtool -K {name} tx off");
            }
        }
    }

    /// Returns the index of an interface in the namespace.
    pub fn index(&self, interface: &str) -> u32 {
        let name = CString::new(interface).expect("a name");
        // SAFETY: the name is a C string that outlives the call.
        let index = self.enter(move || unsafe { libc::if_nametoindex(name.as_ptr()) });
        assert_ne!(index, 0, "no interface {interface}");
        index
    }

    /// Returns the MAC address of an interface in the namespace.
    pub fn mac(&self, interface: &str) -> [u8; 6] {
        let words = self.ip(&format!("-o link show {interface}"));
        let mac = words.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        let bytes: Vec<u8> = mac
            .expect("an Ethernet interface")
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).expect("a MAC address"))
            .collect();
        bytes.try_into().expect("six bytes")
    }

    /// Returns the MAC address of an interface as `ip` shows it.
    pub fn mac_text(&self, interface: &str) -> String {
        self.mac(interface).map(|byte| format!("{byte:02x}")).join(":")
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// A private bpffs mount.
pub struct Bpffs {
    pub path: PathBuf,
}

impl Bpffs {
    pub fn new() -> Bpffs {
        let path = std::env::temp_dir().join(unique("udplb-bpffs-"));
        fs::create_dir(&path).expect("a directory for the bpffs");
        let bpffs = Bpffs { path };
        run("mount", ["-t".as_ref(), "bpf".as_ref(), "bpf".as_ref(), bpffs.path.as_os_str()]);
        bpffs
    }

    /// Returns udplb's pin directory.
    pub fn pins(&self) -> PathBuf {
        self.path.join("udplb")
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).output();
        let _ = fs::remove_dir(&self.path);
    }
}

/// Returns the udplb command under test in a namespace, with its pins in a bpffs.
pub fn udplb(namespace: &Namespace, bpffs: &Bpffs) -> Command {
    let mut command = namespace.command(env!("CARGO_BIN_EXE_udplb"));
    command.arg("--pin-dir").arg(bpffs.pins());
    command
}

/// Removes the limit of locked memory, as the units do: before 5.11 the kernel counts maps and programs
/// as locked memory. Where raising the limit is not permitted, in a container, the kernel is newer.
pub fn lock_any_memory(command: &mut Command) {
    const UNLIMITED: libc::rlimit =
        libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the closure makes one system call, with a limit that outlives it.
    unsafe {
        command.pre_exec(|| {
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &UNLIMITED);
            Ok(())
        });
    }
}

/// Loads a program of this kind and name that returns a constant.
pub fn returning(kind: u32, name: &CStr, value: i32) -> OwnedFd {
    let instructions = [
        libbpf_sys::bpf_insn { code: 0xb4, imm: value, ..Default::default() },
        libbpf_sys::bpf_insn { code: 0x95, ..Default::default() },
    ];
    // SAFETY: C strings and instructions outlive the call; the returned descriptor is owned here alone.
    unsafe {
        let program = libbpf_sys::bpf_prog_load(
            kind,
            name.as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        );
        assert!(program >= 0, "{program}");
        OwnedFd::from_raw_fd(program)
    }
}

/// Makes the kernel answer this thread as one without tcx: `BPF_PROG_QUERY`, which udplb uses for tcx alone, is
/// an unknown command. There is no way back.
pub fn hide_tcx() -> std::io::Result<()> {
    const PROG_QUERY: u32 = 16;
    const NUMBER: u32 = 0;
    const FIRST_ARGUMENT: u32 = 16;
    let load = |offset| (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset);
    let unless = |value, skip| (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, skip, value);
    let answer = |value| (libc::BPF_RET | libc::BPF_K, 0, value);
    let code = [
        load(NUMBER),
        unless(libc::SYS_bpf as u32, 3),
        load(FIRST_ARGUMENT),
        unless(PROG_QUERY, 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let mut code = code.map(|(code, jf, k)| libc::sock_filter { code: code as u16, jt: 0, jf, k });
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // SAFETY: the kernel copies the filter, which outlives the call.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::from_ref(&program))
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Runs a command and returns its exit code, standard output and standard error.
pub fn outcome(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the program runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code(), text(&stdout), text(&stderr))
}
