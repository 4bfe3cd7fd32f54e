//! `udplb arpd`: keeps next hops resolved and fresh, and tells the program which are dead.
//!
//! [`neighbours`] decides; this is the rim: it reads what the kernel has, carries out what is to be
//! done, and renews the lease as long as both succeed. Events only make it look earlier: every
//! interval it looks at everything.

mod dns;
mod groups;
pub mod neighbours;
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
use crate::net::nexthop::NEIGHBOUR_TIMEOUT;
use crate::telemetry::http;

/// How often it looks whether something is due, or another generation serves.
const TICK: Duration = Duration::from_millis(250);
/// Events come in swarms: this long others are waited for.
const SWARM: Duration = Duration::from_millis(10);

/// How next hops and host names are kept.
#[derive(Clone)]
pub struct Options {
    /// Resolve everything once and end.
    pub once: bool,
    /// Time between looks at everything.
    pub interval: Duration,
    /// How long the program relies on next hops that are not renewed.
    pub lease: Duration,
    /// Time between probes of a next hop.
    pub probe_interval: Duration,
    /// Time between resolutions of host names; zero: never.
    pub resolve_interval: Duration,
    /// Wait for the addresses of all host names together.
    pub resolve_timeout: Duration,
    /// Address of the metrics.
    pub metrics: Option<SocketAddr>,
    /// Names of this host that scrapers may use.
    pub metrics_hosts: Vec<String>,
}

/// Runs until SIGTERM or SIGINT, or once.
pub async fn run(store: &Store, options: &Options) -> Result<u8> {
    capabilities::require()?;
    let mut service = Service::open(store, options)?;
    service.look_at_everything().await;
    if options.once {
        settle(&mut service).await;
        if !service.serves() && !service.is_in_trouble() {
            return Err(Failure::NothingApplied);
        }
        let unreachable = service.unreachable();
        for address in &unreachable {
            say(format_args!("error: {address} cannot be reached; udplb doctor says why"));
        }
        return Ok((service.is_in_trouble() || !unreachable.is_empty()).into());
    }
    if let Some(address) = options.metrics {
        http::serve(store, address, &options.metrics_hosts).context("the thread for metrics")?;
    }
    let result = serve(&mut service).await;
    service.end();
    result
}

/// Waits for neighbours to answer, as long as `apply` does.
async fn settle(service: &mut Service) {
    let end = Instant::now() + NEIGHBOUR_TIMEOUT;
    while !service.is_settled() && Instant::now() < end {
        tokio::time::sleep(SWARM).await;
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
        let Service { events, names, .. } = &mut *service;
        tokio::select! {
            biased;
            _ = terminate.recv() => return Ok(0),
            _ = interrupt.recv() => return Ok(0),
            _ = hangup.recv() => {
                service.look_at_everything().await;
                service.resolve_names_now();
            }
            // the lease comes before the events, of which there may be many
            _ = tick.tick() => service.tick().await?,
            () = has_events(events) => {
                tokio::time::sleep(SWARM).await;
                service.take_events().await;
            }
            answer = names.answer() => service.renamed(answer).await,
        }
        service.work().await;
    }
}

/// Waits until the kernel has something to tell; an error is found again when events are taken.
async fn has_events(events: &Events) {
    let _ = events.wait().await;
}
