//! Sends probes and waits for their answers, each in a task of its own.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket as StdUdpSocket};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libc::c_int;
use rustix::rand::{GetRandomFlags, getrandom};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::probes::{Answer, Subject};
use super::questions::{self, Nonce};
use crate::bpf::types::probe_outcome as Outcome;
use crate::config::{Check, with_port};

/// Longest datagram of an answer that is looked at; the rest of a longer one is cut off.
const MAX_DATAGRAM: usize = 2048;
/// Number of source ports that are remembered: those of the last second or more.
const MAX_PORTS: usize = 512;
/// Most bytes of an HTTP answer that are read for its status.
const MAX_HEADER: usize = 8192;

/// The path of relayed packets to an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePath {
    /// Index of the egress interface.
    pub interface: u32,
    /// The VRF that it belongs to.
    pub vrf: Option<String>,
    /// This host's source address on the path.
    pub egress: Option<IpAddr>,
}

/// Probes that are under way.
#[derive(Default)]
pub struct Prober {
    running: JoinSet<(Arc<Subject>, Answer)>,
    /// Source ports of the last datagrams.
    ports: Arc<Mutex<VecDeque<u16>>>,
}

impl Prober {
    /// Starts a probe.
    pub fn start(&mut self, subject: Arc<Subject>, path: ProbePath) {
        let ports = Arc::clone(&self.ports);
        self.running.spawn(async move {
            let answer = probe(&subject, &path, &ports).await;
            (subject, answer)
        });
    }

    /// Returns true if one of the last datagrams left from this port.
    pub fn has_sent_from(&self, port: u16) -> bool {
        lock(&self.ports).contains(&port)
    }

    /// Waits for the next answer; for ever if no probe is under way.
    pub async fn answer(&mut self) -> (Arc<Subject>, Answer) {
        loop {
            match self.running.join_next().await {
                Some(Ok(answer)) => return answer,
                Some(Err(error)) => log::error!("probe: {error}"),
                None => std::future::pending().await,
            }
        }
    }
}

fn lock(ports: &Mutex<VecDeque<u16>>) -> MutexGuard<'_, VecDeque<u16>> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn probe(subject: &Subject, path: &ProbePath, ports: &Mutex<VecDeque<u16>>) -> Answer {
    let started = Instant::now();
    let limit = Duration::from(subject.probe.timeout);
    let mut is_wrong = false;
    let result = match subject.probe.check {
        Check::Tcp(_) | Check::Syslog { .. } | Check::Http { .. } => {
            timeout(limit, ask_by_tcp(subject, path)).await
        }
        _ => timeout(limit, ask_by_datagram(subject, path, ports, &mut is_wrong)).await,
    };
    match result {
        Ok(Ok(())) => Answer::After(started.elapsed()),
        Ok(Err(outcome)) => Answer::Failed(outcome),
        Err(_) if is_wrong => Answer::Failed(Outcome::PROBE_WRONG_ANSWER),
        Err(_) => Answer::Failed(Outcome::PROBE_NO_ANSWER),
    }
}

fn remember(ports: &Mutex<VecDeque<u16>>, port: u16) {
    let mut ports = lock(ports);
    if ports.len() == MAX_PORTS {
        ports.pop_front();
    }
    ports.push_back(port);
}

/// Sends the question and waits for a right answer from the address and port that was asked.
async fn ask_by_datagram(
    subject: &Subject,
    path: &ProbePath,
    ports: &Mutex<VecDeque<u16>>,
    is_wrong: &mut bool,
) -> Result<(), Outcome> {
    let check = &subject.probe.check;
    let is_echo = *check == Check::Icmp {};
    let to = destination(subject, path);
    let protocol = match to {
        SocketAddr::V4(_) if is_echo => Some(Protocol::ICMPV4),
        SocketAddr::V6(_) if is_echo => Some(Protocol::ICMPV6),
        _ => None,
    };
    let mut nonce = Nonce::default();
    let unsent = |error: io::Error| {
        log::debug!("probe of {to}: {error}");
        Outcome::PROBE_UNSENT
    };
    getrandom(&mut nonce, GetRandomFlags::empty()).map_err(|error| unsent(error.into()))?;
    let open = || {
        let socket = socket(to, Type::DGRAM, protocol, subject, path)?;
        stay_on_path(&socket, to, path)?;
        UdpSocket::from_std(StdUdpSocket::from(socket))
    };
    let socket = open().map_err(unsent)?;
    let question = questions::question(check, &nonce, to.ip());
    socket.send_to(&question, to).await.map_err(unsent)?;
    remember(ports, socket.local_addr().map_err(unsent)?.port());
    let mut buffer = [0; MAX_DATAGRAM];
    loop {
        let (length, from) =
            socket.recv_from(&mut buffer).await.map_err(|error| failure(&error))?;
        let is_from = from.ip() == to.ip() && (is_echo || from.port() == to.port());
        if is_from && questions::is_answer(check, &nonce, &buffer[..length]) {
            return Ok(());
        }
        // the right answer may follow one that somebody has forged
        *is_wrong |= is_from;
    }
}

async fn ask_by_tcp(subject: &Subject, path: &ProbePath) -> Result<(), Outcome> {
    let to = destination(subject, path);
    let unsent = |error: io::Error| {
        log::debug!("probe of {to}: {error}");
        Outcome::PROBE_UNSENT
    };
    let open = || {
        let socket = socket(to, Type::STREAM, Some(Protocol::TCP), subject, path)?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
            _ => TcpStream::from_std(socket.into()),
        }
    };
    let mut stream = open().map_err(unsent)?;
    let connected = async {
        stream.writable().await?;
        stream.take_error()?.map_or(Ok(()), Err)
    };
    connected.await.map_err(|error: io::Error| failure(&error))?;
    let Check::Http { path, status, .. } = &subject.probe.check else { return Ok(()) };
    let request = questions::http(path, &with_port(to.ip(), to.port()));
    stream.write_all(request.as_bytes()).await.map_err(|error| failure(&error))?;
    let mut answer = Vec::new();
    while answer.len() < MAX_HEADER {
        if stream.read_buf(&mut answer).await.map_err(|error| failure(&error))? == 0 {
            break;
        }
        match questions::http_answer(*status, &answer) {
            Some(true) => return Ok(()),
            Some(false) => break,
            None => {}
        }
    }
    Err(Outcome::PROBE_WRONG_ANSWER)
}

/// Returns the address that is asked, with its interface if it is link-local.
fn destination(subject: &Subject, path: &ProbePath) -> SocketAddr {
    match subject.address.ip {
        IpAddr::V6(ip) if subject.address.scope.is_some() => {
            SocketAddrV6::new(ip, subject.port, 0, path.interface).into()
        }
        ip => (ip, subject.port).into(),
    }
}

/// Opens a socket with the source address of relayed packets, in the VRF of their path.
fn socket(
    to: SocketAddr,
    kind: Type,
    protocol: Option<Protocol>,
    subject: &Subject,
    path: &ProbePath,
) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind.nonblocking().cloexec(), protocol)?;
    if let Some(vrf) = &path.vrf {
        socket.bind_device(Some(vrf.as_bytes()))?;
    }
    let bind = |ip: IpAddr| match (ip, to) {
        // a link-local source needs its interface
        (IpAddr::V6(ip), SocketAddr::V6(to)) => {
            socket.bind(&SocketAddrV6::new(ip, 0, 0, to.scope_id()).into())
        }
        (ip, _) => socket.bind(&SocketAddr::new(ip, 0).into()),
    };
    let sources = [subject.source, path.egress].into_iter().flatten();
    for source in sources.filter(|source| source.is_ipv4() == to.is_ipv4()) {
        match bind(source) {
            // a matched address need not be one of this host
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            result => return result.map(|()| socket),
        }
    }
    Ok(socket)
}

/// Makes datagrams leave by the interface of the path; answers may come in by another. Has the kernel report
/// ICMP errors though the socket is not connected.
fn stay_on_path(socket: &Socket, to: SocketAddr, path: &ProbePath) -> io::Result<()> {
    let interface = path.interface.to_be() as c_int;
    let (level, unicast, errors) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_UNICAST_IF, libc::IP_RECVERR),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF, libc::IPV6_RECVERR),
    };
    set(socket, level, unicast, interface)?;
    set(socket, level, errors, 1)
}

fn set(socket: &Socket, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the pointer is to an integer that lives during the call, and the length is its size.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Returns the outcome for an error that came back from the network.
fn failure(error: &io::Error) -> Outcome {
    match error.kind() {
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => Outcome::PROBE_REFUSED,
        _ => Outcome::PROBE_UNREACHABLE,
    }
}
