//! Checks of `strategy: quic-cid`: each upstream has an id of its own.

use super::repeated;
use crate::config::diagnostic::{Diagnostics, Message};
use crate::config::vocabulary as words;
use crate::config::{Addresses, RuleConfig, UpstreamConfig};

/// Reports upstreams without an id, with one that others have, or with one that is of no use.
pub(super) fn check(rule: &RuleConfig, diagnostics: &mut Diagnostics) {
    let at = |upstream: &UpstreamConfig| upstream.at.field(words::UPSTREAM_SERVER_ID.name);
    for upstream in &rule.upstreams {
        let message = match (&rule.server_id, &upstream.server_id) {
            (None, None) => continue,
            (None, Some(_)) => {
                Message::about(&at(upstream), "`server-id` needs `strategy: quic-cid`")
            }
            (Some(_), None) => {
                let message = "with `strategy: quic-cid` each upstream needs a `server-id`";
                let help = "the bytes that it puts into its connection ids: `server-id: \"0a01\"`";
                Message::about(&upstream.at, message).help(help)
            }
            (Some(place), Some(id)) if id.length() != usize::from(place.length) => {
                let (length, wanted) = (id.length(), place.length);
                let message = format!(
                    "`{id}` is {length} bytes long, and the ids of the rule are {wanted} (`server-id.length`)"
                );
                Message::about(&at(upstream), message)
            }
            (Some(_), Some(_)) if upstream.addresses == Addresses::All => {
                let message =
                    "`addresses: all` makes several upstreams, and an id is one upstream's";
                Message::about(&at(upstream), message).help("write an upstream for each address")
            }
            (Some(_), Some(_)) => continue,
        };
        diagnostics.push(message);
    }
    let ids = rule.upstreams.iter().enumerate();
    let ids = ids.filter_map(|(index, it)| Some((index, it.server_id.as_ref()?)));
    for (first, again) in repeated(ids) {
        let (first, again) = (&rule.upstreams[first], &rule.upstreams[again]);
        let message = Message::about(&at(again), "another upstream of the rule has this id");
        diagnostics.push(message.related(at(first), "the first with that id"));
    }
}
