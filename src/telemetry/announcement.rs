//! The announced addresses, and whether this host can serve its rules.

use std::fmt;
use std::net::IpAddr;

use anyhow::{Context, anyhow};
use schemars::JsonSchema;
use serde::Serialize;

use crate::config::{Announce, KeyAddress};
use crate::datapath::description::Generation;
use crate::datapath::hook::Slot;
use crate::datapath::pins::ReadGuard;
use crate::datapath::spares::Situation;
use crate::datapath::{announcements, lease, state_maps};
use crate::desired::Rule;
use crate::net::Netlink;
use crate::net::link::OwnAddress;
use crate::reconcile::drain::rule_index;
use crate::reconcile::observe::Observed;
use crate::reconcile::readiness::{Readiness, owner};
use crate::time;

/// State of an announced address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// On the interface that is announced.
    Well,
    /// On the interface of the last resort.
    Sick,
    /// On neither.
    Withdrawn,
}

impl State {
    pub const ALL: [State; 3] = [State::Well, State::Sick, State::Withdrawn];

    pub fn word(self) -> &'static str {
        match self {
            State::Well => "well",
            State::Sick => "sick",
            State::Withdrawn => "withdrawn",
        }
    }
}

/// An address of `announce`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct AnnouncedAddress {
    pub address: IpAddr,
    pub state: State,
    /// Reason why it is not well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Start of that state, in seconds since 1970.
    #[serde(serialize_with = "time::rfc3339", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub since: Option<u64>,
}

impl fmt::Display for AnnouncedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AnnouncedAddress { address, state, reason, since } = self;
        write!(f, "{address} {}", state.word())?;
        if let Some(since) = since {
            write!(f, " since {}", time::utc(*since))?;
        }
        reason.as_ref().map_or(Ok(()), |reason| write!(f, ": {reason}"))
    }
}

/// One reading of the kernel.
pub struct Announcement<'a> {
    observed: &'a Observed,
    serving: &'a Generation,
    situation: Situation,
    own: Vec<OwnAddress>,
    /// arpd's lease holds.
    arpd: bool,
}

impl<'a> Announcement<'a> {
    pub async fn read(
        guard: &ReadGuard,
        netlink: &Netlink,
        observed: &'a Observed,
        serving: &'a Generation,
    ) -> anyhow::Result<Announcement<'a>> {
        let own = match serving.description.desired.announce {
            Some(_) => netlink.addresses().await.context("addresses")?,
            None => Vec::new(),
        };
        let (mut situation, mut arpd) = (Situation::default(), false);
        if let Some(maps) = state_maps::open(guard)? {
            situation = Situation::read(&maps, serving.ids().max().unwrap_or(0))?;
            arpd = lease::remaining(&maps.heartbeat)?.is_some_and(|left| !left.is_zero());
        }
        Ok(Announcement { observed, serving, situation, own, arpd })
    }

    fn readiness(&self) -> Readiness<'_> {
        let (desired, ids) = self.serving.hosts();
        let is_attached = |name: &&String| {
            let interface = self.observed.interfaces.get(*name);
            let slot = interface.map(|interface| interface.hook.slot());
            slot == Some(&Slot::Generation(self.serving.number))
        };
        let unattached = desired.interfaces.iter().filter(|name| !is_attached(name));
        let unattached = unattached.map(String::as_str).collect();
        Readiness { desired, ids, unattached, situation: &self.situation }
    }

    /// Returns why the rules, or the named one, cannot be served well here; `None`: they can.
    ///
    /// # Errors
    /// There is no such rule.
    pub fn trouble(&self, rule: Option<&str>) -> anyhow::Result<Option<String>> {
        let desired = &self.serving.description.desired;
        let name = rule.map(|name| rule_index(desired, name)).transpose()?;
        let name = name.map(|index| desired.rules[index].name.as_str());
        let records = &self.observed.announcements;
        let is_chosen = |rule: &Rule| name.is_none_or(|it| it == rule.name);
        let withdrawn = desired.rules.iter().filter(|rule| is_chosen(rule)).find_map(|rule| {
            let address = match rule.key.address {
                KeyAddress::Is(address) => address,
                KeyAddress::Any => announcements::ALL,
            };
            records.withdrawal(address)?;
            Some(format!("{} is withdrawn by command", rule.key.address))
        });
        Ok(withdrawn.or_else(|| self.readiness().trouble(is_chosen)))
    }

    /// Returns the addresses of `announce` with their states.
    pub fn addresses(&self) -> Vec<AnnouncedAddress> {
        let Some(announce) = &self.serving.description.desired.announce else {
            return Vec::new();
        };
        let all = self.readiness().addresses().into_iter();
        all.map(|(address, trouble)| self.state(announce, address, trouble)).collect()
    }

    fn index(&self, name: &str) -> Option<u32> {
        let name = self.observed.canonical(name);
        self.observed.interfaces.get(&name).map(|interface| interface.index)
    }

    fn state(
        &self,
        announce: &Announce,
        address: IpAddr,
        trouble: Option<String>,
    ) -> AnnouncedAddress {
        let well = self.index(&announce.interface);
        let last_resort = announce.last_resort.as_ref().and_then(|name| self.index(name));
        let is_on = |place: Option<u32>| {
            place.is_some_and(|place| {
                self.own.iter().any(|own| (own.address, own.ifindex) == (address, place))
            })
        };
        let (state, place) = match () {
            () if is_on(well) => (State::Well, well),
            () if is_on(last_resort) => (State::Sick, last_resort),
            () => (State::Withdrawn, None),
        };
        let records = &self.observed.announcements;
        let withdrawal = records.withdrawal(address);
        let since = place.and_then(|place| records.placed.get(&(address, place)).copied());
        let besides: Vec<u32> = well.into_iter().chain(last_resort).collect();
        let reason = withdrawal.map(|_| "by command".to_string()).or(trouble).or_else(|| {
            let ifindex = owner(address, &self.own, &besides);
            let owner = self.observed.interfaces.iter().find(|(_, it)| Some(it.index) == ifindex);
            owner.map(|(name, _)| format!("{name} has it"))
        });
        let waits = || match () {
            () if state == State::Well => None,
            () if !self.arpd => Some("arpd does not run".into()),
            () if well.is_none() => Some(format!("there is no interface {}", announce.interface)),
            () if state == State::Sick => {
                Some(format!("it has been well for less than {}", announce.hold_down))
            }
            () => Some("arpd is about to announce it".into()),
        };
        AnnouncedAddress {
            address,
            state,
            reason: reason.or_else(waits),
            since: since.or(withdrawal),
        }
    }
}

/// Checks that addresses are announced by the configuration.
///
/// # Errors
/// One is not.
pub fn refuse_others(serving: &Generation, addresses: &[IpAddr]) -> anyhow::Result<()> {
    let announced = serving.description.desired.announced();
    let Some(other) = addresses.iter().find(|address| !announced.contains(*address)) else {
        return Ok(());
    };
    let all: Vec<String> = announced.iter().map(IpAddr::to_string).collect();
    Err(match all.is_empty() {
        true => anyhow!("{other} is not announced: the configuration has no `announce`"),
        false => anyhow!("{other} is not announced; announced are {}", all.join(", ")),
    })
}
