//! `udplb arpd` running in a lab, stopped when the value is dropped.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use serde_json::Value;
use udplb::bpf::{from_bytes, types};

use super::lab::Lab;

/// Timeout for all waits, sufficient on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a condition holds.
///
/// # Panics
/// If it does not hold in time.
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(20));
    }
}

pub struct Arpd {
    child: Child,
    log: PathBuf,
}

impl Arpd {
    /// Starts arpd on the lab's relay and waits until arpd tracks the active configuration.
    pub fn start(lab: &Lab, options: &str) -> Arpd {
        Arpd::spawn(lab, lab.udplb(&format!("arpd {options}")))
    }

    /// Starts arpd by a command that finally executes it.
    pub fn spawn(lab: &Lab, mut command: Command) -> Arpd {
        let log = lab.directory.path().join(super::unique("arpd-"));
        command.stderr(File::create(&log).expect("a file"));
        let child = command.spawn().expect("the program runs");
        let arpd = Arpd { child, log };
        until("arpd is ready", || {
            let log = arpd.log();
            log.contains("next hops of") || log.contains("nothing is applied")
        });
        arpd
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("the log")
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the process is a child that was not waited for.
        let sent = unsafe { libc::kill(self.child.id() as i32, signal) };
        assert_eq!(sent, 0, "kill: {}", std::io::Error::last_os_error());
    }

    /// Stops arpd with a signal and returns its exit status.
    pub fn end(mut self, signal: i32) -> ExitStatus {
        self.signal(signal);
        self.child.wait().expect("the child")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Arpd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("arpd said:\n{}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

impl Lab {
    /// Returns the time on the program's clock until which packets are traced; 0 without a trace.
    pub fn traced_until(&self) -> u64 {
        let map = MapHandle::from_pinned_path(self.state().join("tracing")).expect("the flag");
        let value = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY).expect("a look-up");
        let value: types::trace = from_bytes(&value.expect("the only entry")).expect("a trace");
        value.until
    }

    /// Returns the upstream with this label from `status`.
    pub fn upstream_status(&self, label: &str) -> Value {
        let status = self.status();
        let rules = status["rules"].as_array().expect("rules");
        let mut upstreams =
            rules.iter().flat_map(|rule| rule["upstreams"].as_array().expect("upstreams"));
        let upstream = upstreams.find(|upstream| upstream["upstream"] == label);
        upstream.unwrap_or_else(|| panic!("no {label} in {status:#}")).clone()
    }

    /// Returns the next hop of the upstream with this label.
    pub fn next_hop(&self, label: &str) -> Value {
        self.upstream_status(label)["next_hop"].clone()
    }

    /// Waits until a field of an upstream's next hop has a value.
    #[track_caller]
    pub fn await_hop(&self, label: &str, field: &str, value: &str) {
        until(&format!("{field} of {label} is {value}"), || self.next_hop(label)[field] == value);
    }

    /// Waits until an upstream is up or down.
    #[track_caller]
    pub fn await_health(&self, label: &str, health: &str) {
        until(&format!("{label} is {health}"), || self.upstream_status(label)["health"] == health);
    }

    /// Returns a udplb command on the relay; `/etc/hosts` is a file in the lab's directory.
    pub fn with_hosts(&self, words: &str) -> Command {
        let hosts = self.directory.path().join("hosts");
        let mut command = self.relay.command("unshare");
        let script = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.display());
        command.args(["--mount", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_udplb")]);
        command.arg("--pin-dir").arg(self.bpffs.pins()).args(words.split_whitespace());
        command
    }

    /// Returns the kernel's entry for a neighbour of the relay.
    pub fn neighbour(&self, address: &str) -> String {
        self.relay.ip(&format!("-d neigh show {address}"))
    }
}
