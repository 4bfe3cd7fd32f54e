//! `udplb metrics`: prints metrics for Prometheus once.

use super::netlink;
use crate::cli::Global;
use crate::cli::output::print;
use crate::error::Result;
use crate::telemetry::metrics::Gatherer;

pub async fn run(global: &Global) -> Result<u8> {
    print(&Gatherer::new(global.store()).gather(&netlink()?).await?)
}
