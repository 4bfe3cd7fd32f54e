//! `udplb flows`: lists the flows of rules with `reply: nat` or `sticky`.

use clap::Args;
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::{complete, netlink};
use crate::cli::output::{report, terminal_style};
use crate::cli::table::{self, Column};
use crate::cli::{Global, Output};
use crate::datapath::description::Generation;
use crate::datapath::pins;
use crate::error::{Failure, Result};
use crate::reconcile::drain::{self, RuleOrUpstream};
use crate::reconcile::observe::observe;
use crate::telemetry::flows::{self, Client, Flow, Names, Selection};
use crate::time;

/// The flows to list.
#[derive(Args)]
pub struct Options {
    /// A rule, or one of its upstreams, by name or address as in status. Default: all.
    #[arg(value_name = "RULE[/UPSTREAM]", add = ArgValueCandidates::new(complete::upstreams))]
    target: Option<RuleOrUpstream>,
    /// Only flows of this client.
    #[arg(long, value_name = "A[:P]")]
    client: Option<Client>,
    /// Only their number.
    #[arg(long)]
    count: bool,
}

/// Output of `flows`.
#[derive(Serialize, JsonSchema)]
pub struct Flows<'a> {
    pub count: usize,
    /// By client; left out with `--count`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flows: Option<Vec<Flow<'a>>>,
}

const COLUMNS: [Column; 10] = [
    Column::text("CLIENT", 12),
    Column::text("VIP", 12),
    Column::text("UPSTREAM", 12),
    Column::text("EGRESS", 12),
    Column::text("STATE", 8),
    Column::number("AGE"),
    Column::number("IDLE"),
    Column::number("LEFT"),
    Column::number("PACKETS"),
    Column::number("ANSWERS"),
];

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?.ok_or(Failure::NothingApplied)?;
    let observed = observe(Some(&guard), &netlink()?).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let selection = selection(serving, options.target.as_ref(), options.client)?;
    let names = Names::new(serving.hosts());
    let mut flows = Vec::new();
    flows::read(&guard, serving, &names, &selection, |flow| flows.push(flow))?;
    drop(guard);
    flows.sort_unstable_by_key(|flow| (flow.client, flow.vip));
    let count = flows.len();
    if options.count {
        return report(global, &format!("{count}\n"), Flows { count, flows: None });
    }
    let text = match global.output {
        Output::Json => String::new(),
        _ => text(&flows, terminal_style(global).width),
    };
    report(global, &text, Flows { count, flows: Some(flows) })
}

/// Returns the part of the flows that the command line asks for.
pub(super) fn selection(
    serving: &Generation,
    target: Option<&RuleOrUpstream>,
    client: Option<Client>,
) -> Result<Selection> {
    let (desired, ids) = serving.hosts();
    let upstreams = target.map(|target| drain::ids_of(desired, ids, target)).transpose()?;
    Ok(Selection { upstreams, client })
}

fn text(flows: &[Flow<'_>], width: Option<usize>) -> String {
    let age = |seconds: f64| time::age(seconds as u64);
    let row = |flow: &Flow<'_>| {
        let upstream = flow.rule.zip(flow.upstream);
        vec![
            flow.client.to_string(),
            flow.vip.to_string(),
            upstream.map_or("gone".into(), |(rule, upstream)| format!("{rule}/{upstream}")),
            flow.egress.map_or("-".into(), |egress| egress.to_string()),
            flow.state.word().into(),
            age(flow.age),
            age(flow.idle),
            age(flow.left),
            flow.packets.to_string(),
            flow.answers.to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = flows.iter().map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    table::lines(&COLUMNS, &rows, width).join("\n") + "\n"
}
