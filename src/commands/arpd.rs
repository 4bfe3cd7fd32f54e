//! `udplb arpd`: its arguments; the service itself is [`crate::arpd`].

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use clap::Args;

use crate::cli::{Global, Resolver, seconds, some_seconds};
use crate::error::Result;

/// Arguments of `arpd`.
#[derive(Args)]
pub struct Options {
    /// Resolve next hops and host names once and exit, for cron.
    #[arg(long)]
    once: bool,
    /// Refresh everything this often, in seconds, even without events from the kernel.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = some_seconds)]
    interval: Duration,
    /// Use next hops this long without renewal, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = some_seconds)]
    lease: Duration,
    /// Probe each next hop this often, in seconds; at most 100 probes a second in total.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = some_seconds)]
    probe_interval: Duration,
    /// Resolve host names this often, in seconds; 0: never.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    resolve_interval: Duration,
    #[command(flatten)]
    resolver: Resolver,
    /// Serve metrics at /metrics on this address; default 127.0.0.1, port 9477.
    #[arg(long, value_name = "ADDRESS[:PORT]", num_args = 0..=1, default_missing_value = "127.0.0.1",
          value_parser = metrics_address)]
    metrics: Option<SocketAddr>,
    /// Accept HTTP requests for this host name too, beside this host's own name and addresses; * is
    /// any name; may be repeated.
    #[arg(long = "metrics-host", value_name = "NAME", requires = "metrics")]
    metrics_hosts: Vec<String>,
}

/// Default port of the exporter.
const METRICS_PORT: u16 = 9477;

fn metrics_address(text: &str) -> std::result::Result<SocketAddr, String> {
    text.parse()
        .or_else(|_| text.parse().map(|address: IpAddr| SocketAddr::new(address, METRICS_PORT)))
        .map_err(|_| {
            "an IP address, like `127.0.0.1` or `[::1]:9477`; host names are not resolved".into()
        })
}

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let options = crate::arpd::Options {
        once: options.once,
        interval: options.interval,
        lease: options.lease,
        probe_interval: options.probe_interval,
        resolve_interval: options.resolve_interval,
        resolve_timeout: options.resolver.resolve_timeout,
        metrics: options.metrics,
        metrics_hosts: options.metrics_hosts.clone(),
    };
    crate::arpd::run(&global.store(), &options).await
}
