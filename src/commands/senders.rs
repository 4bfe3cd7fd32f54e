//! `udplb senders`: lists the senders of rules that count them.

use std::cmp::Reverse;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use schemars::JsonSchema;
use serde::Serialize;

use super::{complete, netlink};
use crate::cli::output::{report, terminal_style};
use crate::cli::table::{self, Column};
use crate::cli::{Global, Output};
use crate::config::Period;
use crate::datapath::pins;
use crate::desired::Desired;
use crate::error::{Failure, Result};
use crate::reconcile::drain;
use crate::reconcile::observe::observe;
use crate::telemetry::senders::{self, SILENT_AFTER, Sender, SenderState};
use crate::time;

/// The senders to list.
#[derive(Args)]
pub struct Options {
    /// A rule with `senders`. Default: all of them.
    #[arg(value_name = "RULE", add = ArgValueCandidates::new(complete::rules))]
    rule: Option<String>,
    /// Only senders that were heard for long, and not for this time, like 5m.
    #[arg(long, value_name = "TIME")]
    silent: Option<Period>,
    /// Order of the list.
    #[arg(long, value_enum, default_value = "address")]
    sort: Order,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Order {
    /// Rules in their order, refused senders last.
    Address,
    /// Most packets first.
    Packets,
    /// Most bytes first.
    Bytes,
    /// Longest known first.
    First,
    /// Longest silent first.
    Last,
}

/// Output of `senders`.
#[derive(Serialize, JsonSchema)]
pub struct Senders<'a> {
    pub count: usize,
    pub senders: Vec<Sender<'a>>,
}

const COLUMNS: [Column; 7] = [
    Column::text("RULE", 8),
    Column::text("SENDER", 12),
    Column::text("STATE", 7),
    Column::number("PACKETS"),
    Column::number("BYTES"),
    Column::number("FIRST"),
    Column::number("LAST"),
];

pub async fn run(global: &Global, options: &Options) -> Result<u8> {
    let guard = pins::read(&global.pin_dir, global.lock_timeout)?.ok_or(Failure::NothingApplied)?;
    let observed = observe(Some(&guard), &netlink()?).await?;
    let serving = observed.described()?.ok_or(Failure::NothingApplied)?;
    let rule = rule_index(&serving.description.desired, options.rule.as_deref())?;
    let silent_after = options.silent.map_or(SILENT_AFTER, Duration::from);
    let mut senders = senders::read(&guard, serving, rule, silent_after)?;
    drop(guard);
    if options.silent.is_some() {
        senders.retain(|sender| sender.state == SenderState::Silent);
    }
    sort(&mut senders, options.sort);
    let text = match global.output {
        Output::Json => String::new(),
        _ => text(&senders, terminal_style(global).width),
    };
    report(global, &text, Senders { count: senders.len(), senders })
}

/// Returns the index of the rule whose senders are asked for; `None`: all.
///
/// # Errors
/// There is no such rule, or it does not count its senders, or no rule does.
fn rule_index(desired: &Desired, name: Option<&str>) -> anyhow::Result<Option<usize>> {
    let rule = name.map(|name| drain::rule_index(desired, name)).transpose()?;
    let mut counting = desired.rules.iter().enumerate().filter(|(_, it)| it.senders.is_some());
    let is_there = counting.any(|(index, _)| rule.is_none_or(|rule| rule == index));
    let whose = name
        .map_or("no rule counts its".into(), |name| format!("rule `{name}` does not count its"));
    match is_there {
        true => Ok(rule),
        false => Err(anyhow!("{whose} senders; set `options.senders` to their number and apply")),
    }
}

fn sort(senders: &mut [Sender<'_>], order: Order) {
    match order {
        Order::Address => {}
        Order::Packets => senders.sort_by_key(|it| Reverse(it.packets)),
        Order::Bytes => senders.sort_by_key(|it| Reverse(it.bytes)),
        Order::First => senders.sort_by(|one, other| other.first.total_cmp(&one.first)),
        Order::Last => senders.sort_by(|one, other| other.last.total_cmp(&one.last)),
    }
}

fn text(senders: &[Sender<'_>], width: Option<usize>) -> String {
    let age = |seconds: f64| time::age(seconds as u64);
    let row = |sender: &Sender<'_>| {
        vec![
            sender.rule.into(),
            sender.address.to_string(),
            sender.state.word().into(),
            sender.packets.to_string(),
            sender.bytes.to_string(),
            age(sender.first),
            age(sender.last),
        ]
    };
    let rows: Vec<Vec<String>> = senders.iter().map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    table::lines(&COLUMNS, &rows, width).join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::{Order, sort, text};
    use crate::telemetry::senders::{Sender, SenderState};

    fn sender(address: &str, (packets, bytes): (u64, u64), first: f64, last: f64) -> Sender<'_> {
        let address = address.parse().unwrap();
        Sender { rule: "syslog", address, state: SenderState::Active, packets, bytes, first, last }
    }

    fn senders() -> [Sender<'static>; 3] {
        [
            sender("10.0.0.1", (5, 900), 60.0, 3.0),
            sender("10.0.0.2", (9, 100), 90.0, 4000.0),
            sender("10.0.0.3", (7, 500), 700.0, 2.0),
        ]
    }

    #[test]
    fn orders_begin_with_the_most() {
        for (order, expected) in [
            (Order::Address, [1, 2, 3]),
            (Order::Packets, [2, 3, 1]),
            (Order::Bytes, [1, 3, 2]),
            (Order::First, [3, 2, 1]),
            (Order::Last, [2, 1, 3]),
        ] {
            let mut senders = senders();
            sort(&mut senders, order);
            let order = senders.map(|it| it.address.to_string());
            assert_eq!(order, expected.map(|last| format!("10.0.0.{last}")));
        }
    }

    #[test]
    fn lines_of_senders() {
        assert_eq!(text(&[], None), "");
        assert_eq!(
            text(&senders()[..2], None),
            "RULE    SENDER    STATE   PACKETS  BYTES  FIRST  LAST\n\
             syslog  10.0.0.1  active        5    900     1m    3s\n\
             syslog  10.0.0.2  active        9    100  1m30s  1h6m\n"
        );
    }
}
