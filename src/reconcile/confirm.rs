//! Changes that are rolled back at a deadline unless they are confirmed.
//!
//! The deadline is in the kernel (`state/pending`), so that it outlives every process. An overdue rollback
//! is run, under the write lock and thus once, by the waiter (a process that `apply --confirm` starts in
//! its own session), by arpd if it runs, or by the next command that writes.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{self, Path};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::time::{sleep, timeout};

use crate::datapath::pins::{self, ReadGuard, Store, WriteGuard};
use crate::datapath::state_maps::{self, Pending};
use crate::error::{Failure, Result};
use crate::net::Netlink;
use crate::reconcile::observe::{Observed, observe};
use crate::reconcile::{execute, plan, resolve_next_hops};
use crate::time;

/// Interval at which the waiter checks that the change is still pending.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Time until a failed rollback is tried again.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Returns the pending change.
fn pending(guard: &ReadGuard) -> anyhow::Result<Option<Pending>> {
    // mostly there is none, and one map is opened faster than all
    let Some(pending) = state_maps::pending(guard)? else { return Ok(None) };
    Ok(state_maps::open(guard)?.map(|_| pending))
}

/// Rolls back the pending change if its deadline has passed; returns what was done, in words.
///
/// # Errors
/// The rollback failed. The change stays pending, and is overdue.
pub async fn settle(guard: &WriteGuard, netlink: &Netlink) -> anyhow::Result<Option<String>> {
    let Some(pending) = pending(guard)?.filter(|pending| pending.remaining().is_zero()) else {
        return Ok(None);
    };
    let observed = observe(Some(guard), netlink).await?;
    let left = observed.serving();
    undo(guard, netlink, &observed)
        .await
        .with_context(|| format!("generation {} was not confirmed in time", pending.generation))?;
    let number = pending.generation;
    Ok(Some(match pending.previous {
        // The apply was killed before its swap.
        previous if left == previous && !observed.is_attached(number) => {
            format!("generation {number} was never attached and waits for confirmation no longer")
        }
        Some(previous) => {
            format!("generation {number} was not confirmed in time: rolled back to {previous}")
        }
        None => format!("generation {number} was not confirmed in time: detached"),
    }))
}

async fn undo(guard: &WriteGuard, netlink: &Netlink, observed: &Observed) -> anyhow::Result<()> {
    let plan = plan::rollback(observed, time::now())?;
    let restored = observed.generations.get(&plan.generation);
    let desired = restored.map(|it| it.description.desired.clone()).unwrap_or_default();
    let next_hops = resolve_next_hops(netlink, &desired).await?;
    execute::reconcile(guard, netlink, observed, &plan, &next_hops).await.map(drop)
}

/// The process that waits for a deadline. It starts to wait when this value is dropped or its owner dies.
pub struct Waiter {
    _child: Child,
}

/// Starts the waiter in its own session, without a terminal and ignoring SIGHUP, so that it survives the
/// shell, the connection and the process group of the caller.
pub fn start_waiter(pin_dir: &Path, deadline: Duration) -> anyhow::Result<Waiter> {
    let pin_dir = path::absolute(pin_dir).context("the pin directory")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("udplb")
        .arg("--pin-dir")
        .arg(pin_dir)
        .args(["confirm", "--waiter", &deadline.as_nanos().to_string()])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: the closure makes two system calls that are safe after fork.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            match libc::setsid() {
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(()),
            }
        });
    }
    let child = command.spawn().context("the process that rolls back at the deadline")?;
    Ok(Waiter { _child: child })
}

/// Waits until the change with this deadline is confirmed, replaced or overdue; rolls it back then.
pub async fn wait(store: &Store, netlink: &Netlink, deadline: Duration) -> Result<u8> {
    wait_for_parent(deadline).await;
    while is_pending(store, deadline)? {
        let left = deadline.saturating_sub(time::since_boot());
        if !left.is_zero() {
            sleep(left.min(POLL_INTERVAL)).await;
            continue;
        }
        match settle_locked(store, netlink).await {
            Ok(done) => done.iter().for_each(|text| to_syslog(text)),
            Err(Failure::Locked(_)) => {}
            Err(failure) => {
                to_syslog(&failure.to_string());
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
    Ok(0)
}

async fn settle_locked(store: &Store, netlink: &Netlink) -> Result<Option<String>> {
    let guard = pins::write(&store.pin_dir, store.lock_timeout)?;
    Ok(settle(&guard, netlink).await?)
}

fn is_pending(store: &Store, deadline: Duration) -> Result<bool> {
    match pins::read(&store.pin_dir, store.lock_timeout) {
        Ok(guard) => {
            let pending = guard.as_ref().map(pending).transpose()?.flatten();
            Ok(pending.is_some_and(|pending| pending.deadline == deadline))
        }
        // Locked by a writer: check again later.
        Err(Failure::Locked(_)) => Ok(true),
        Err(failure) => Err(failure),
    }
}

/// Waits until the apply that started this process has ended, which closes standard input.
async fn wait_for_parent(deadline: Duration) {
    let input = io::stdin().as_fd().try_clone_to_owned().and_then(Receiver::from_owned_fd);
    if let Ok(mut input) = input {
        let left = deadline.saturating_sub(time::since_boot());
        let _ = timeout(left, input.read(&mut [0])).await;
    }
}

/// Writes a line to syslog: the output of this process is not read.
fn to_syslog(text: &str) {
    let Ok(text) = std::ffi::CString::new(format!("udplb: {text}")) else { return };
    // SAFETY: the format takes one C string, which outlives the call.
    unsafe { libc::syslog(libc::LOG_WARNING | libc::LOG_DAEMON, c"%s".as_ptr(), text.as_ptr()) };
}
