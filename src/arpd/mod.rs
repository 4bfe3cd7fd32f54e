//! `udplb arpd`: keeps next hops resolved and fresh, and marks dead ones for the program.
//!
//! [`neighbours`], [`probes`] and `announcer`, that of announced addresses, are the pure state machines. `prober` asks
//! services the `questions`. `service` reads the kernel's tables, carries out the
//! effects, and renews the lease as long as both succeed. Everything is read again after each
//! interval; events only make that happen earlier.

mod announcer;
mod dns;
mod groups;
pub mod neighbours;
mod prober;
pub mod probes;
mod questions;
mod quotes;
mod service;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use service::Service;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;

use crate::datapath::capabilities;
use crate::datapath::pins::Store;
use crate::error::{Failure, Result, say};
use crate::net::events::Events;
use crate::telemetry::http;

/// Interval of the checks for due work and for another active generation.
const TICK: Duration = Duration::from_millis(250);
/// Wait for neighbours with `--once`. The kernel gives up after three requests, one a second.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(4);
/// Events come in bursts: wait this long for more.
const EVENT_DEBOUNCE: Duration = Duration::from_millis(10);

/// Options of the service.
#[derive(Clone)]
pub struct Options {
    /// Resolve everything once and exit.
    pub once: bool,
    /// Time between two reads of everything.
    pub interval: Duration,
    /// Time that the program relies on next hops that are not renewed.
    pub lease: Duration,
    /// Time between probes of a next hop.
    pub probe_interval: Duration,
    /// Time between resolutions of host names; zero: never.
    pub resolve_interval: Duration,
    /// Timeout for the addresses of all host names together.
    pub resolve_timeout: Duration,
    /// Listening address of the metrics.
    pub metrics: Option<SocketAddr>,
    /// Host names that scrapers may use for this host.
    pub metrics_hosts: Vec<String>,
}

/// Runs until SIGTERM or SIGINT, or once. Returns the exit status.
pub async fn run(store: &Store, options: &Options) -> Result<u8> {
    capabilities::require()?;
    let mut service = Service::open(store, options)?;
    service.read_everything().await;
    if options.once {
        service.resolve_names().await;
        settle(&mut service).await;
        if !service.is_active() && !service.has_errors() {
            return Err(Failure::NothingApplied);
        }
        let unreachable = service.unreachable();
        for address in &unreachable {
            say(format_args!("error: {address} cannot be reached; udplb doctor shows why"));
        }
        let silent = service.probe_once().await;
        for service in &silent {
            say(format_args!("error: {service}"));
        }
        let is_failed = service.has_errors() || !unreachable.is_empty() || !silent.is_empty();
        return Ok(is_failed.into());
    }
    if let Some(address) = options.metrics {
        http::serve(store, address, &options.metrics_hosts).context("the thread for metrics")?;
    }
    let result = serve(&mut service).await;
    service.release_neighbours();
    result
}

/// Waits until each neighbour has answered or failed.
async fn settle(service: &mut Service) {
    let end = Instant::now() + SETTLE_TIMEOUT;
    while !service.is_settled() && Instant::now() < end {
        tokio::time::sleep(EVENT_DEBOUNCE).await;
        service.take_events().await;
        service.work().await;
    }
}

async fn serve(service: &mut Service) -> Result<u8> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP")?;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    service.ready();
    loop {
        let Service { events, names, probes, prober, quotes, .. } = &mut *service;
        tokio::select! {
            biased;
            _ = terminate.recv() => return Ok(0),
            _ = interrupt.recv() => return Ok(0),
            _ = hangup.recv() => {
                service.read_everything().await;
                service.resolve_names_now();
            }
            // the lease comes before the events, of which there may be many
            _ = tick.tick() => service.tick().await?,
            () = has_events(events) => {
                tokio::time::sleep(EVENT_DEBOUNCE).await;
                service.take_events().await;
            }
            answer = names.answer() => service.take_answers(answer).await,
            answer = prober.answer() => service.take_probe(answer),
            () = quotes.wait() => service.take_quotes(),
            () = wait_until(probes.next_start()) => service.start_probes(),
        }
        service.work().await;
    }
}

/// Waits for events of the kernel. Errors are handled when events are taken.
async fn has_events(events: &Events) {
    let _ = events.wait().await;
}

/// Waits until a time; for ever if there is none.
async fn wait_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}
