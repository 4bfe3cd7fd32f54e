//! Periodic resolution of upstreams' host names, in a task of its own: a silent name server must not
//! stop the lease.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::desired::Name;
use crate::desired::dns::{self, Answers};
use crate::desired::partial::Unresolved;

/// The longest interval while a host of the configuration has no address.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Resolver of the configuration's host names.
pub struct HostNames {
    interval: Duration,
    asked: Instant,
    /// Resolve without waiting for the interval.
    now: bool,
    asking: bool,
    sender: UnboundedSender<Answers>,
    receiver: UnboundedReceiver<Answers>,
    /// Names whose last answer lacked most of their addresses.
    pub shrunk: BTreeSet<Name>,
    /// Names without an address and the effect, each logged once.
    failing: BTreeSet<(String, String)>,
}

impl HostNames {
    /// Interval zero: never resolves.
    pub fn new(interval: Duration) -> HostNames {
        let (sender, receiver) = unbounded_channel();
        HostNames {
            interval,
            asked: Instant::now(),
            now: false,
            asking: false,
            sender,
            receiver,
            shrunk: BTreeSet::new(),
            failing: BTreeSet::new(),
        }
    }

    /// Makes the next [`HostNames::ask`] skip the interval.
    pub fn ask_now(&mut self) {
        self.now = true;
    }

    /// Starts to resolve all names, if it is time; sooner unless the configuration `is_complete`.
    pub fn ask(&mut self, names: &BTreeSet<Name>, is_complete: bool, timeout: Duration) {
        let interval = match is_complete {
            true => self.interval,
            false => self.interval.min(RETRY_INTERVAL),
        };
        let is_due = self.now || self.asked.elapsed() >= interval;
        if self.interval.is_zero() || self.asking || !is_due {
            return;
        }
        (self.asked, self.now) = (Instant::now(), false);
        if names.is_empty() {
            return;
        }
        self.asking = true;
        let (names, sender) = (names.clone(), self.sender.clone());
        tokio::spawn(async move {
            // fails only at exit, when the receiver is gone
            let _ = sender.send(dns::ask(names, timeout).await);
        });
    }

    /// Returns true while answers are awaited.
    pub fn is_asking(&self) -> bool {
        self.asking
    }

    /// Returns true if a name had no address in the last answers.
    pub fn has_failures(&self) -> bool {
        !self.failing.is_empty()
    }

    /// Waits for the answers.
    pub async fn answer(&mut self) -> Answers {
        match self.receiver.recv().await {
            Some(answers) => {
                self.asking = false;
                answers
            }
            // unreachable: `self` holds a sender
            None => std::future::pending().await,
        }
    }

    /// Logs names that have no address, and those that resolve again.
    pub fn log(&mut self, unresolved: &[Unresolved]) {
        let failing = unresolved.iter().map(|it| (it.host.clone(), it.effect.to_string()));
        let failing: BTreeSet<(String, String)> = failing.collect();
        for it in unresolved {
            if self.failing.insert((it.host.clone(), it.effect.to_string())) {
                log::warn!("{} {}; {}", it.host, it.cause, it.effect);
            }
        }
        for (host, effect) in std::mem::take(&mut self.failing) {
            if failing.contains(&(host.clone(), effect.clone())) {
                self.failing.insert((host, effect));
            } else if !failing.iter().any(|(other, _)| *other == host) {
                log::info!("{host} resolves again");
            }
        }
    }
}
