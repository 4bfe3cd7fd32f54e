//! Lists of senders: `from` and `not-from` of keys, upstreams and mirrors.

use super::super::diagnostic::{Diagnostics, Message};
use super::super::path::Path;
use super::super::vocabulary as words;
use super::super::{Mode, Network, RuleConfig, UpstreamConfig};
use super::twice;

/// Returns the lists of a rule with their places, in the order of [`RuleConfig::addresses`]. Pairs of empty lists are
/// left out: most rules have no others.
pub(super) fn lists(rule: &RuleConfig) -> Vec<(Path, &[Network])> {
    let mut lists = Vec::new();
    if !(rule.key.from.is_empty() && rule.key.not_from.is_empty()) {
        let key = rule.at.field(words::KEY.name);
        lists.push((key.field(words::KEY_FROM.name), &rule.key.from[..]));
        lists.push((key.field(words::KEY_NOT_FROM.name), &rule.key.not_from));
    }
    let limited = |it: &&UpstreamConfig| !(it.from.is_empty() && it.not_from.is_empty());
    for upstream in rule.destinations().filter(limited) {
        lists.push((upstream.at.field(words::UPSTREAM_FROM.name), &upstream.from));
        lists.push((upstream.at.field(words::UPSTREAM_NOT_FROM.name), &upstream.not_from));
    }
    lists
}

/// Reports networks that are named twice, also in the other list, and upstreams that cannot have senders.
pub(super) fn check(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    for both in lists(rule).chunks(2) {
        let [(from_at, from), (not_at, not_from)] = both else { continue };
        twice(from_at, from, Network::to_string, diagnostics);
        twice(not_at, not_from, Network::to_string, diagnostics);
        for (nth, network) in not_from.iter().enumerate() {
            let Some(other) = from.iter().position(|it| it == network) else { continue };
            let message = format!("{network} is in `from` and in `not-from`");
            let message = Message::about(&not_at.index(nth), message);
            diagnostics.push(message.related(from_at.index(other), "named here first"));
        }
    }
    if rule.mode == Mode::Replicate {
        return;
    }
    for upstream in &rule.upstreams {
        for (field, list) in [
            (&words::UPSTREAM_FROM, &upstream.from),
            (&words::UPSTREAM_NOT_FROM, &upstream.not_from),
        ] {
            if !list.is_empty() {
                let message = format!(
                    "`{}` needs `mode: replicate`: a balanced rule has upstreams for all its senders",
                    field.name
                );
                let help = "write a rule for these senders, with `key.from`; a mirror can have it";
                let at = upstream.at.field(field.name);
                diagnostics.push(Message::about(&at, message).help(help));
            }
        }
    }
}
