//! Resolves host names of upstreams by the system's resolver.
//!
//! `getaddrinfo` has neither a deadline nor a way to cancel it, and blocks for ever if a name server accepts
//! a TCP connection and stays silent. So a child process calls it, which is killed at the deadline: [`ask`]
//! starts this program with the argument [`PROCESS`], which runs [`answer`].

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_int};
use std::io::{self, BufRead, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{ExitCode, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::config::Family;
use crate::desired::{Desired, Name, Upstream};

/// The first argument of the resolving process.
pub const PROCESS: &str = "udplb-resolver";

/// Number of look-ups that are awaited before others start, so that no name server is flooded.
const BURST: usize = 64;
/// Time limit of that wait: look-ups of a slow server must not delay all others.
const SLOW: Duration = Duration::from_millis(200);
/// Maximum number of concurrent look-ups, each with a thread and a socket.
const MAX_LOOKUPS: usize = 1000;
const STACK: usize = 256 << 10;

/// The addresses of each name, at least one, or the reason why there are none.
pub type Answers = BTreeMap<Name, Answer>;

pub type Answer = Result<BTreeSet<IpAddr>, NoAnswer>;

/// The reason why a name has no address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoAnswer {
    /// Text after the name in a message.
    pub cause: String,
    /// True if a later attempt may succeed.
    pub temporary: bool,
}

impl NoAnswer {
    fn temporary(cause: impl Into<String>) -> NoAnswer {
        NoAnswer { cause: cause.into(), temporary: true }
    }
}

/// Returns the host names of a configuration.
pub fn names(desired: &Desired) -> BTreeSet<Name> {
    desired.upstreams().filter_map(Upstream::named).collect()
}

/// Resolves all names concurrently. A name without an answer in time has a [`NoAnswer`].
pub async fn ask(names: BTreeSet<Name>, timeout: Duration) -> Answers {
    let names: Vec<Name> = names.into_iter().collect();
    let mut answers = Answers::new();
    if names.is_empty() {
        return answers;
    }
    let asked = tokio::time::timeout(timeout, ask_process(&names, &mut answers)).await;
    let cause = match asked {
        Err(_) => no_resolution(format!("no answer within {} s", timeout.as_secs_f64())),
        Ok(Err(error)) => no_resolution(format!("{PROCESS}: {error}")),
        Ok(Ok(())) => no_resolution(format!("{PROCESS} ended early")),
    };
    for name in names {
        answers.entry(name).or_insert_with(|| Err(NoAnswer::temporary(&*cause)));
    }
    answers
}

/// Runs the resolving process, which ends when the future is dropped and its standard input closes.
async fn ask_process(names: &[Name], answers: &mut Answers) -> io::Result<()> {
    let mut process = Command::new("/proc/self/exe")
        .arg0(PROCESS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (Some(mut input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut question = serde_json::to_vec(names)?;
    question.push(b'\n');
    input.write_all(&question).await?;
    let mut lines = BufReader::new(output).lines();
    while let Some(line) = lines.next_line().await? {
        let (number, answer): (usize, Answer) = serde_json::from_str(&line)?;
        let name = names.get(number).ok_or(io::ErrorKind::InvalidData)?;
        answers.insert(name.clone(), answer);
    }
    Ok(())
}

/// Runs in the resolving process: reads names as one line of standard input, prints each answer with the
/// index of its name as a line, and ends after the last answer or at the end of its input.
pub fn answer() -> ExitCode {
    let mut input = io::BufReader::new(io::stdin());
    let mut line = String::new();
    let names = input.read_line(&mut line).and_then(|_| Ok(serde_json::from_str(&line)?));
    let names: Vec<Name> = match names {
        Ok(names) => names,
        Err(_) => return ExitCode::FAILURE,
    };
    let ends = thread::Builder::new().stack_size(STACK).spawn(move || {
        let _ = io::copy(&mut input, &mut io::sink());
        std::process::exit(1);
    });
    if ends.is_err() {
        return ExitCode::FAILURE;
    }
    raise_descriptor_limit();
    look_up_all(names);
    ExitCode::SUCCESS
}

fn look_up_all(names: Vec<Name>) {
    let (sender, done) = channel();
    let (mut running, mut waited_for) = (0, 0);
    for (number, name) in names.into_iter().enumerate() {
        while waited_for >= BURST || running >= MAX_LOOKUPS {
            match done.recv_timeout(SLOW) {
                Ok(()) => {
                    running -= 1;
                    waited_for = waited_for.saturating_sub(1);
                }
                Err(RecvTimeoutError::Timeout) => waited_for = 0,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        match spawn(number, name, sender.clone()) {
            Ok(()) => (running, waited_for) = (running + 1, waited_for + 1),
            Err(error) => print(number, &Err(NoAnswer::temporary(no_resolution(error)))),
        }
    }
    drop(sender);
    // Until all are done.
    done.iter().for_each(drop);
}

fn spawn(number: usize, name: Name, done: Sender<()>) -> io::Result<()> {
    let lookup = move || {
        print(number, &look_up(&name));
        let _ = done.send(());
    };
    thread::Builder::new().stack_size(STACK).spawn(lookup).map(drop)
}

fn print(number: usize, answer: &Answer) {
    if let Ok(line) = serde_json::to_string(&(number, answer)) {
        // The parent is gone if it cannot be written.
        let _ = writeln!(io::stdout().lock(), "{line}");
    }
}

fn no_resolution(why: impl std::fmt::Display) -> String {
    format!("does not resolve: {why}")
}

/// Resolves a name to the addresses of one family.
fn look_up((name, family): &Name) -> Answer {
    let no_name = |_| NoAnswer { cause: no_resolution("it is no name"), temporary: false };
    let name = CString::new(name.as_str()).map_err(no_name)?;
    let mut list = std::ptr::null_mut();
    // SAFETY: all zeroes are valid: no hints.
    let mut hints: libc::addrinfo = unsafe { std::mem::zeroed() };
    hints.ai_socktype = libc::SOCK_DGRAM;
    hints.ai_family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    // SAFETY: name, hints and list outlive the call.
    let code = unsafe { libc::getaddrinfo(name.as_ptr(), std::ptr::null(), &hints, &mut list) };
    if code != 0 {
        return Err(failure(code, *family));
    }
    let mut addresses = BTreeSet::new();
    let mut entry = list;
    // SAFETY: the list is the resolver's, valid until freeaddrinfo.
    while let Some(found) = unsafe { entry.as_ref() } {
        // SAFETY: an entry's address is null or of its family.
        addresses.extend(unsafe { address(found) });
        entry = found.ai_next;
    }
    // SAFETY: the list came from getaddrinfo and is not used again.
    unsafe { libc::freeaddrinfo(list) };
    match addresses.is_empty() {
        true => Err(failure(libc::EAI_NODATA, *family)),
        false => Ok(addresses),
    }
}

/// # Safety
/// The entry's address is null, or points to an address of its family.
unsafe fn address(entry: &libc::addrinfo) -> Option<IpAddr> {
    match entry.ai_family {
        libc::AF_INET => {
            // SAFETY: the family determines the type.
            let address = unsafe { entry.ai_addr.cast::<libc::sockaddr_in>().as_ref()? };
            Some(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let address = unsafe { entry.ai_addr.cast::<libc::sockaddr_in6>().as_ref()? };
            Some(Ipv6Addr::from(address.sin6_addr.s6_addr).into())
        }
        _ => None,
    }
}

/// Classifies an error of getaddrinfo.
fn failure(code: c_int, family: Family) -> NoAnswer {
    /// glibc's error for a name that /etc/hosts lists with the other family only.
    const EAI_ADDRFAMILY: c_int = -9;
    let temporary = match code {
        libc::EAI_NODATA | EAI_ADDRFAMILY => {
            let cause = no_resolution(format!("it has no {family} address"));
            return NoAnswer { cause, temporary: false };
        }
        libc::EAI_SYSTEM => return NoAnswer::temporary(no_resolution(io::Error::last_os_error())),
        code => code != libc::EAI_NONAME,
    };
    // SAFETY: gai_strerror returns a static string for any code.
    let text = unsafe { CStr::from_ptr(libc::gai_strerror(code)) };
    NoAnswer { cause: no_resolution(text.to_string_lossy()), temporary }
}

/// Raises the limit of open files to its maximum: each look-up needs a socket, and the default is often
/// 1,024.
fn raise_descriptor_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // a failure leaves the limit unchanged
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}
