//! Keeps the announced addresses on their interfaces.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::serving::{Filter, is_attached};
use super::{Service, current, unless_locked};
use crate::arpd::announcer::{Fitness, Interfaces, Step};
use crate::config::Announce;
use crate::datapath::announcements::{Place, Records};
use crate::datapath::description::Description;
use crate::datapath::pins;
use crate::net::link::{OwnAddress, find_link};
use crate::reconcile::readiness::{Readiness, owner};

/// Time between two looks at the addresses.
const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(1);

/// Shortest lifetime of an address with `expire`: the kernel counts whole seconds.
const MIN_LIFETIME: Duration = Duration::from_secs(3);

impl Service {
    /// Compares the addresses on the interfaces of `announce` with the state of this host, and carries
    /// out the steps between. Without a usable generation, or while the kernel cannot be asked, all stays.
    pub(super) async fn announce(&mut self) -> anyhow::Result<()> {
        self.announce_due = Instant::now() + ANNOUNCE_INTERVAL;
        let Some(serving) = &self.serving else { return Ok(()) };
        let records = serving.maps.announcements.read()?;
        if serving.outline.announce.is_none() && records.placed.is_empty() {
            return Ok(());
        }
        let is_new = records.placed.is_empty();
        let is_current = !self.stale.generation && self.failed_vitals.is_empty();
        if !is_current || is_new && !self.is_settled() {
            return Ok(());
        }
        let own = self.netlink.addresses().await.context("addresses")?;
        let steps = self.decide(&records, &own)?;
        if !steps.is_empty() {
            self.move_addresses(&records, &steps).await?;
        }
        self.renew_lifetimes().await?;
        self.missing_interfaces()
    }

    /// Has the state machine follow the state of the host, and returns the steps.
    fn decide(&mut self, records: &Records, own: &[OwnAddress]) -> anyhow::Result<Vec<Step>> {
        let interfaces = self.announcing();
        let fitness = self.fitness(records, own, interfaces)?;
        let Some(serving) = &self.serving else { return Ok(Vec::new()) };
        let announce = &serving.outline.announce;
        let hold_down = announce.as_ref().map_or(Duration::ZERO, |it| it.hold_down.into());
        let there: BTreeSet<Place> = own.iter().map(|own| (own.address, own.ifindex)).collect();
        let placed: BTreeSet<Place> = records.placed.keys().copied().collect();
        let clock = (hold_down, Instant::now());
        for change in self.announcer.follow(&fitness, interfaces, &placed, clock) {
            log::info!("{change}");
        }
        Ok(self.announcer.steps(interfaces, &there, &placed))
    }

    /// Returns the interfaces of `announce` that exist.
    fn announcing(&self) -> Interfaces {
        let index =
            |name: &String| find_link(self.tracker.links().values(), name).map(|link| link.index);
        let Some(announce) = self.announcement() else { return Interfaces::default() };
        Interfaces {
            well: index(&announce.interface),
            last_resort: announce.last_resort.as_ref().and_then(index),
        }
    }

    fn announcement(&self) -> Option<&Announce> {
        self.serving.as_ref()?.outline.announce.as_ref()
    }

    fn fitness(
        &self,
        records: &Records,
        own: &[OwnAddress],
        interfaces: Interfaces,
    ) -> anyhow::Result<BTreeMap<IpAddr, Fitness>> {
        let Some(serving) = &self.serving else { return Ok(BTreeMap::new()) };
        let situation = serving.situation()?;
        let Description { desired, ids, .. } = &*serving.description()?;
        let is_lost = self.errors.contains_key("attaching again");
        let unattached =
            serving.interfaces.iter().filter(|(_, seen)| is_lost || !is_attached(seen));
        let unattached = unattached.map(|(name, _)| name.as_str()).collect();
        let readiness = Readiness { desired, ids, unattached, situation: &situation };
        let is_detached =
            serving.interfaces.values().all(|seen| matches!(seen, Filter::Detached(_)));
        let besides: Vec<u32> = interfaces.well.into_iter().chain(interfaces.last_resort).collect();
        let fitness = |(address, trouble): (IpAddr, Option<String>)| {
            let fitness = if is_detached {
                Fitness::Withdrawn("the filter is detached".into())
            } else if records.withdrawal(address).is_some() {
                Fitness::Withdrawn("by command".into())
            } else if let Some(ifindex) = owner(address, own, &besides) {
                let name = self.tracker.links().get(&ifindex).map_or("", |link| &link.name);
                Fitness::Withdrawn(format!("{name} has it"))
            } else {
                trouble.map_or(Fitness::Fit, Fitness::Unfit)
            };
            (address, fitness)
        };
        Ok(readiness.addresses().into_iter().map(fitness).collect())
    }

    /// Carries out steps under the write lock; later if another udplb holds it, or has changed what they
    /// were decided by.
    async fn move_addresses(&mut self, records: &Records, steps: &[Step]) -> anyhow::Result<()> {
        let Some(guard) = self.lock_for_writing()? else { return Ok(()) };
        let Some(serving) = &self.serving else { return Ok(()) };
        let announcements = &serving.maps.announcements;
        let is_detached = |name: &String| -> anyhow::Result<bool> {
            Ok(serving.maps.marks.get(name)?.is_some_and(|mark| mark.detached))
        };
        for (name, seen) in &serving.interfaces {
            if is_detached(name)? && !matches!(seen, Filter::Detached(_) | Filter::Missing) {
                self.stale.interfaces = true;
                return Ok(());
            }
        }
        if current(&self.pin_dir) != self.current || announcements.read()? != *records {
            return Ok(());
        }
        let lifetime = self.lifetime();
        for step in steps {
            match *step {
                Step::Put(place @ (address, ifindex)) => {
                    announcements.place(&guard, place)?;
                    match self.netlink.add_address(ifindex, address, lifetime).await {
                        // another program has put it there just now
                        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                            announcements.forget(&guard, place)?;
                        }
                        result => result.with_context(|| format!("adding {address}"))?,
                    }
                }
                Step::Take(place @ (address, ifindex)) => {
                    let removed = self.netlink.remove_address(ifindex, address).await;
                    removed.with_context(|| format!("removing {address}"))?;
                    announcements.forget(&guard, place)?;
                }
            }
        }
        Ok(())
    }

    fn lifetime(&self) -> Option<Duration> {
        let expire = self.announcement().is_some_and(|announce| announce.expire);
        expire.then(|| self.options.lease.max(MIN_LIFETIME))
    }

    /// Renews the lifetimes of the addresses that have one, and ends those of addresses whose
    /// configuration has no `expire` any more.
    async fn renew_lifetimes(&mut self) -> anyhow::Result<()> {
        let Some(serving) = &self.serving else { return Ok(()) };
        let generation = serving.number;
        let lifetime = self.lifetime();
        if lifetime.is_none() && self.renewed_in == Some(generation) {
            return Ok(());
        }
        // `udplb withdraw` removes addresses under the exclusive lock
        let Some(guard) = unless_locked(pins::read(&self.pin_dir, Duration::ZERO))? else {
            return Ok(());
        };
        for (address, ifindex) in serving.maps.announcements.read()?.placed.into_keys() {
            let renewed = self.netlink.renew_address(ifindex, address, lifetime).await;
            renewed.with_context(|| format!("renewing {address}"))?;
        }
        drop(guard);
        self.renewed_in = Some(generation);
        Ok(())
    }

    /// Returns an error for interfaces of `announce` that are missing or down.
    fn missing_interfaces(&self) -> anyhow::Result<()> {
        let Some(announce) = self.announcement() else { return Ok(()) };
        for name in [Some(&announce.interface), announce.last_resort.as_ref()].into_iter().flatten()
        {
            match find_link(self.tracker.links().values(), name) {
                None => bail!("{name} is missing: ip link add {name} up type dummy"),
                Some(link) if !link.up => bail!("{name} is down: ip link set {name} up"),
                Some(_) => {}
            }
        }
        Ok(())
    }
}
