//! Host names of upstreams, asked for again and again beside the service's own work: a name
//! server that does not answer must not stop the lease.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::plan::{Desired, Name, Upstream};
use crate::resolve;

/// What a name stood for when it was asked for, or why it could not be said.
pub type Answers = BTreeMap<String, Result<BTreeSet<IpAddr>, String>>;

/// Asks for names.
pub struct Names {
    interval: Duration,
    due: Instant,
    asking: bool,
    sender: UnboundedSender<Answers>,
    receiver: UnboundedReceiver<Answers>,
    /// Names whose last answer was none, so that this is told once.
    failing: BTreeSet<Name>,
}

impl Names {
    /// With interval zero it never asks.
    pub fn new(interval: Duration) -> Names {
        let (sender, receiver) = unbounded_channel();
        let due = Instant::now() + interval;
        Names { interval, due, asking: false, sender, receiver, failing: BTreeSet::new() }
    }

    /// The next time there is no waiting.
    pub fn ask_now(&mut self) {
        self.due = Instant::now();
    }

    /// Asks for all names of the configuration, if it is time.
    pub fn ask(&mut self, desired: &Desired) {
        let now = Instant::now();
        if self.interval.is_zero() || self.asking || now < self.due {
            return;
        }
        self.due = now + self.interval;
        let names = desired.upstreams().filter_map(Upstream::named);
        let names: BTreeSet<String> = names.map(|(name, _)| name).collect();
        if names.is_empty() {
            return;
        }
        self.asking = true;
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let mut answers = Answers::new();
            for name in names {
                let answer = resolve::lookup(&name).await.map_err(|error| error.to_string());
                answers.insert(name, answer);
            }
            // nobody listens any more at the end
            let _ = sender.send(answers);
        });
    }

    /// Waits for the answers.
    pub async fn answer(&mut self) -> Answers {
        match self.receiver.recv().await {
            Some(answers) => {
                self.asking = false;
                answers
            }
            // cannot be: the sender is ours too
            None => std::future::pending().await,
        }
    }

    /// The names that stand for another address than the configuration has. An address that is
    /// still among several stays, so that an answer's order changes nothing.
    pub fn changed(&mut self, desired: &Desired, answers: &Answers) -> BTreeMap<Name, IpAddr> {
        let mut changed = BTreeMap::new();
        for upstream in desired.upstreams() {
            let Some(name) = upstream.named() else { continue };
            let (text, family) = &name;
            let reason = match answers.get(text) {
                None => continue,
                Some(Ok(addresses)) => match resolve::choose(&name, addresses) {
                    Some((address, _)) => {
                        if self.failing.remove(&name) {
                            log::info!("{text} resolves again");
                        }
                        if !addresses.contains(&upstream.address.ip) {
                            changed.insert(name, address);
                        }
                        continue;
                    }
                    None => &format!("it has no {family} address"),
                },
                Some(Err(reason)) => reason,
            };
            if self.failing.insert(name.clone()) {
                log::warn!("{text} does not resolve: {reason}; it stays {}", upstream.address);
            }
        }
        changed
    }
}
