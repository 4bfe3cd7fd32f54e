//! `udplb trace`: prints packets as they are processed. The program reports them while a lease in
//! `state/tracing` holds, which is renewed here and expires after a kill.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use libbpf_rs::{MapCore, MapFlags, MapHandle, RingBuffer, RingBufferBuilder};

use super::{complete, netlink};
use crate::bpf::{bytes_of, from_bytes, types, wire};
use crate::cli::output::{Document, colour};
use crate::cli::terminal::{Signals, is_gone};
use crate::cli::{Global, Output, at_least_one};
use crate::config::Network;
use crate::datapath::description::Description;
use crate::datapath::gate::Gate;
use crate::datapath::state_maps::{self, INCOMPLETE};
use crate::datapath::{generation, lease, lock, pins};
use crate::error::{Failure, Result, say};
use crate::net::Netlink;
use crate::reconcile::drain;
use crate::reconcile::observe::observe;
use crate::telemetry::event::{Event, Names};
use crate::telemetry::pcap::Pcap;
use crate::time;

/// Time after which the program stops reporting without renewal.
const LEASE: Duration = Duration::from_secs(1);
const RENEWAL: Duration = Duration::from_millis(250);
/// Interval of polling the ring buffer; the program does not wake the reader.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Maximum of events read at once.
const BATCH: usize = 4096;
/// Timeout of the lock that an apply may hold; less than the lease.
const LOCK_TIMEOUT: Duration = Duration::from_millis(500);

/// Filters and output of `trace`.
#[derive(Args)]
pub struct Options {
    /// Only packets of this rule.
    #[arg(long, value_name = "RULE", add = ArgValueCandidates::new(complete::rules))]
    rule: Option<String>,
    /// Only packets from this network or address.
    #[arg(long, value_name = "CIDR")]
    src: Option<Network>,
    /// Only packets to this network or address.
    #[arg(long, value_name = "CIDR")]
    dst: Option<Network>,
    /// Only packets and copies that were not sent.
    #[arg(long)]
    drops: bool,
    /// UDP packets to this host that no rule matches, and why, instead.
    #[arg(long, conflicts_with_all = ["rule", "drops"])]
    unmatched: bool,
    /// Exit after this many lines.
    #[arg(short, long, value_name = "N", value_parser = at_least_one::<u64>)]
    count: Option<u64>,
    /// Only every N-th of these packets.
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one::<u32>)]
    sample: u32,
    /// Write the first 128 bytes of each frame, as received and as sent, to this file too; - writes to
    /// standard output instead of lines.
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    match trace(global, options, &netlink()?, colour(global)).await? {
        Some(_) => Ok(0),
        None => Err(Failure::NothingApplied),
    }
}

/// Traces until a signal or the number of lines. `None`: nothing is applied.
async fn trace(
    global: &Global,
    options: &Options,
    netlink: &Netlink,
    colour: bool,
) -> Result<Option<u64>> {
    let Some(guard) = pins::read(&global.pin_dir, global.lock_timeout)? else { return Ok(None) };
    let observed = observe(Some(&guard), netlink).await?;
    let Some(serving) = observed.described()? else { return Ok(None) };
    let maps = state_maps::open(&guard)?.context(INCOMPLETE)?;
    let description = &serving.description;
    let rule = match &options.rule {
        Some(name) => {
            let index = drain::rule_index(&description.desired, name)?;
            description.ids.get(index).map_or(0, |ids| ids.rule)
        }
        None => 0,
    };
    let beginning = beginning(options, description, serving.number);
    let alone = alone(&guard.generations())?;
    let own = match options.unmatched {
        true => Some(own_addresses(netlink).await?),
        false => None,
    };
    let mut printer = Printer::new(global, options, colour)?;
    observed.generations.into_values().for_each(|generation| printer.names.add(generation));
    let mut signals = Signals::new().context("signals")?;
    let settings = settings(options, rule);
    let pin = guard.state().join("tracing");
    let mut session = Session::new((maps.tracing, maps.gate), alone, pin, settings, own)?;
    drop(guard);
    if !global.quiet {
        say(beginning);
    }
    show(global, options, &maps.events, &mut session, &mut printer, &mut signals).await?;
    session.end()?;
    if let Some(summary) = summary(global, &printer, &session) {
        say(summary);
    }
    Ok(Some(printer.count))
}

/// Prints events until a signal or the number of lines.
async fn show(
    global: &Global,
    options: &Options,
    events: &MapHandle,
    session: &mut Session,
    printer: &mut Printer,
    signals: &mut Signals,
) -> Result<()> {
    let taken = RefCell::new(VecDeque::new());
    let take = |bytes: &[u8]| {
        let mut taken = taken.borrow_mut();
        taken.extend(Event::read(bytes));
        if taken.len() >= BATCH { FULL } else { 0 }
    };
    let mut builder = RingBufferBuilder::new();
    builder.add(events, take).context("events")?;
    let ring = builder.build().context("events")?;
    let mut ended = false;
    loop {
        session.keep()?;
        let more = look(&ring)?;
        let events: Vec<Event> = taken.borrow_mut().drain(..).collect();
        for event in &events {
            if !session.wants(event, options) {
                continue;
            }
            if !printer.names.knows(event.0.generation) {
                session.renew()?;
                learn(global, &mut printer.names, event.0.generation);
            }
            if !printer.print(event)? || options.count.is_some_and(|max| printer.count >= max) {
                ended = true;
                break;
            }
        }
        if !printer.flush()? || ended || is_gone() {
            return Ok(());
        }
        if !more && signals.within(POLL_INTERVAL).await {
            // read the remaining events
            session.end()?;
            ended = true;
        }
    }
}

/// Returns the addresses of this host, with broadcast addresses.
async fn own_addresses(netlink: &Netlink) -> Result<HashSet<IpAddr>> {
    let addresses = netlink.addresses().await.context("addresses")?;
    let all = Some(IpAddr::V4(Ipv4Addr::BROADCAST));
    let received = addresses.into_iter().flat_map(|own| [Some(own.address), own.broadcast, all]);
    Ok(received.flatten().collect())
}

/// Describes what is traced in one line.
fn beginning(options: &Options, description: &Description, number: u32) -> String {
    let Options { rule, src, dst, drops, unmatched, sample, count, .. } = options;
    let mut text = match (drops, rule) {
        _ if *unmatched => "tracing packets to this host that no rule takes".into(),
        (true, Some(rule)) => format!("tracing packets of rule {rule} that are not sent"),
        (true, None) => "tracing packets that are not sent".into(),
        (false, Some(rule)) => format!("tracing packets of rule {rule}"),
        (false, None) => "tracing packets of all rules".into(),
    };
    text += &format!(" on {}", description.desired.interfaces.join(", "));
    text.extend(src.map(|network| format!(", from {network}")));
    text.extend(dst.map(|network| format!(", to {network}")));
    if *sample > 1 {
        text += &format!(", one in {sample}");
    }
    let end = count.map_or("until Ctrl-C".into(), |count| format!("until {count} are shown"));
    format!("{text} (generation {number}), {end}")
}

fn summary(global: &Global, printer: &Printer, session: &Session) -> Option<String> {
    let shown = printer.count;
    match session.lost {
        _ if session.interrupted => Some(format!(
            "{shown} shown; nothing was traced while the output was not read for {} s",
            LEASE.as_secs()
        )),
        0 => (!global.quiet).then(|| format!("{shown} shown, none lost")),
        lost => Some(format!(
            "{shown} shown, {lost} lost: more came than could be told; --sample, --rule, --src, \
             --dst and --drops take fewer"
        )),
    }
}

fn settings(options: &Options, rule: u32) -> types::trace {
    let network = |network: Option<Network>| match network {
        Some(network) => (u32::from(network.prefix), wire(network.address)),
        None => (0, [0; 4]),
    };
    let (source_bits, source) = network(options.src);
    let (destination_bits, destination) = network(options.dst);
    types::trace {
        rule,
        sample: options.sample,
        traced: match (options.unmatched, options.drops) {
            (true, _) => types::traced::TRACED_UNMATCHED,
            (false, true) => types::traced::TRACED_DROPS,
            (false, false) => types::traced::TRACED_ALL,
        },
        frames: options.pcap.is_some().into(),
        source_bits,
        destination_bits,
        source,
        destination,
        ..Default::default()
    }
}

/// Return value of the callback for a full batch.
const FULL: i32 = -1;

/// Reads available events; returns true if there may be more.
fn look(ring: &RingBuffer<'_>) -> anyhow::Result<bool> {
    match ring.consume_raw() {
        FULL => Ok(true),
        error if error < 0 => Err(io::Error::from_raw_os_error(-error)).context("events"),
        _ => Ok(false),
    }
}

/// Reads the description of a new generation.
fn learn(global: &Global, names: &mut Names, number: u32) {
    // tried again with the next event if an apply holds the lock
    let Ok(Some(guard)) = pins::read(&global.pin_dir, LOCK_TIMEOUT) else { return };
    let maps = state_maps::open(&guard).unwrap_or_default();
    match generation::read(&guard, maps.as_ref(), number) {
        Ok(Some(generation)) => names.add(generation),
        Ok(None) | Err(_) => names.give_up(number),
    }
}

/// Locks against another trace.
fn alone(directory: &Path) -> Result<File> {
    let lock = File::open(directory).with_context(|| directory.display().to_string())?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Failure::Locked(format!(
            "{} is tracing, and there can be only one trace at a time",
            lock::holders(directory)
        ))),
        Err(TryLockError::Error(error)) => {
            Err(anyhow!(error).context(directory.display().to_string()).into())
        }
    }
}

/// A trace; the program reports packets until it is dropped.
struct Session {
    map: MapHandle,
    gate: Gate,
    _alone: File,
    pin: PathBuf,
    /// Inode of the pin, to notice that it was replaced.
    inode: u64,
    settings: types::trace,
    /// Addresses of this host, if only packets to them are traced.
    own: Option<HashSet<IpAddr>>,
    started: u64,
    renewed: Instant,
    lost: u64,
    /// True if the lease expired because the output was not read.
    interrupted: bool,
}

impl Session {
    fn new(
        (map, gate): (MapHandle, Gate),
        alone: File,
        pin: PathBuf,
        settings: types::trace,
        own: Option<HashSet<IpAddr>>,
    ) -> anyhow::Result<Session> {
        let inode = fs::metadata(&pin).with_context(|| pin.display().to_string())?.ino();
        let (started, renewed) = (now(), Instant::now());
        let mut session = Session {
            map,
            gate,
            _alone: alone,
            pin,
            inode,
            settings,
            own,
            started,
            renewed,
            lost: 0,
            interrupted: false,
        };
        // overwrites the settings of a trace that was killed
        session.write(&types::trace { until: now() + nanoseconds(LEASE), ..settings })?;
        Ok(session)
    }

    fn read(&self) -> anyhow::Result<types::trace> {
        let bytes = self.map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?;
        bytes.and_then(|bytes| from_bytes(&bytes)).context("state/tracing is of another layout")
    }

    fn write(&mut self, value: &types::trace) -> anyhow::Result<()> {
        self.map.update(&0_u32.to_ne_bytes(), bytes_of(value), MapFlags::ANY)?;
        // the fast path reports nothing
        self.gate.advance();
        self.renewed = Instant::now();
        Ok(())
    }

    /// Renews the lease if it is time.
    fn keep(&mut self) -> anyhow::Result<()> {
        if self.renewed.elapsed() < RENEWAL {
            return Ok(());
        }
        if fs::metadata(&self.pin).ok().map(|pin| pin.ino()) != Some(self.inode) {
            bail!("the pins were removed; nothing is traced any more");
        }
        self.renew()
    }

    fn renew(&mut self) -> anyhow::Result<()> {
        self.set(now() + nanoseconds(LEASE))
    }

    /// Adds up lost events and sets the lease. Events lost between the two system calls, about a microsecond,
    /// are not counted.
    fn set(&mut self, until: u64) -> anyhow::Result<()> {
        let types::trace { passed, lost, .. } = self.read()?;
        self.lost += u64::from(lost);
        self.interrupted |= self.renewed.elapsed() > LEASE;
        self.write(&types::trace { until, passed, ..self.settings })
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.set(0)
    }

    /// Returns true unless the event is older than the trace, or of the other address family: the program
    /// compares bits only.
    fn wants(&self, event: &Event, options: &Options) -> bool {
        let within = |network: Option<Network>, address: IpAddr| {
            network.is_none_or(|network| network.contains(address))
        };
        let is_own = |address: IpAddr| {
            let own = self.own.as_ref();
            own.is_none_or(|own| own.contains(&address) || address.is_multicast())
        };
        event.0.time >= self.started
            && is_own(event.destination())
            && within(options.src, event.source())
            && within(options.dst, event.destination())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Returns CLOCK_MONOTONIC in nanoseconds, the clock of events.
fn now() -> u64 {
    nanoseconds(lease::monotonic())
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Number of packets remembered to write each once, whatever its copies.
const REMEMBERED: usize = 64;

struct Printer {
    names: Names,
    output: Output,
    /// `None` if the capture goes to standard output.
    out: Option<BufWriter<io::Stdout>>,
    pcap: Option<Pcap<BufWriter<Box<dyn Write>>>>,
    /// Name of the capture file, for errors.
    file: String,
    colour: bool,
    count: u64,
    /// Time and interface of packets that were written as received.
    written: VecDeque<(u64, u32)>,
}

impl Printer {
    fn new(global: &Global, options: &Options, colour: bool) -> Result<Printer> {
        let is_stdout = options.pcap.as_deref() == Some(Path::new("-"));
        let pcap = match &options.pcap {
            None => None,
            Some(path) => {
                let begin = || -> io::Result<_> {
                    let file: Box<dyn Write> = match is_stdout {
                        true => Box::new(io::stdout()),
                        false => Box::new(File::create(path)?),
                    };
                    Pcap::new(BufWriter::new(file))
                };
                Some(begin().with_context(|| path.display().to_string())?)
            }
        };
        Ok(Printer {
            names: Names::default(),
            output: global.output,
            out: (!is_stdout).then(|| BufWriter::new(io::stdout())),
            pcap,
            file: options.pcap.as_ref().map_or_else(String::new, |it| it.display().to_string()),
            colour,
            count: 0,
            written: VecDeque::new(),
        })
    }

    /// Prints an event; returns false if nobody reads the output.
    fn print(&mut self, event: &Event) -> Result<bool> {
        let since_1970 = time::since_1970().saturating_sub(lease::monotonic());
        self.count += 1;
        if let Some(pcap) = &mut self.pcap {
            let time = since_1970 + Duration::from_nanos(event.0.time);
            let packet = (event.0.time, event.0.interface);
            let mut add = || -> io::Result<()> {
                if !self.written.contains(&packet) {
                    pcap.add(time, &event.0.received)?;
                    self.written.truncate(REMEMBERED - 1);
                    self.written.push_front(packet);
                }
                if event.0.sent.captured > 0 {
                    pcap.add(time, &event.0.sent)?;
                }
                Ok(())
            };
            if !is_read(add(), &self.file)? {
                return Ok(false);
            }
        }
        let Some(out) = &mut self.out else { return Ok(true) };
        let record = self.names.record(event, since_1970);
        let written = match self.output {
            Output::Json => {
                writeln!(out, "{}", serde_json::to_string(&Document::new(&record)).context("JSON")?)
            }
            _ if self.colour && !record.sent => {
                writeln!(out, "\x1b[31m{record}\x1b[0m")
            }
            _ => writeln!(out, "{record}"),
        };
        is_read(written, STANDARD_OUTPUT)
    }

    fn flush(&mut self) -> Result<bool> {
        let pcap = self.pcap.as_mut().map_or(Ok(()), Pcap::flush);
        let out = self.out.as_mut().map_or(Ok(()), BufWriter::flush);
        Ok(is_read(pcap, &self.file)? && is_read(out, STANDARD_OUTPUT)?)
    }
}

const STANDARD_OUTPUT: &str = "standard output";

/// Returns false for a closed pipe, which is not an error.
fn is_read(written: io::Result<()>, to: &str) -> Result<bool> {
    match written {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(anyhow!(error).context(to.to_string()).into()),
    }
}
