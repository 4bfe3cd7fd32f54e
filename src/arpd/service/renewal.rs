//! Attaches filters again, and renews the generation when addresses, names or interfaces have changed.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::bail;
use foldhash::HashMap;

use super::Service;
use super::serving::{Filter, filters, is_attached};
use crate::bpf::OBJECT_SHA256;
use crate::datapath::environment::Environment;
use crate::datapath::pins::ReadGuard;
use crate::datapath::xdp;
use crate::desired::dns::Answers;
use crate::desired::{Desired, partial};
use crate::net::nexthop;
use crate::reconcile::observe::observe;
use crate::reconcile::{addresses, execute, plan, resolve_next_hops};

/// Pause after filters were attached again.
const ATTACH_PAUSE: Duration = Duration::from_secs(1);

impl Service {
    /// Attaches the filter again where it is gone without a `detach`: the interface was recreated, or
    /// another program removed the filter or its qdisc.
    pub(super) async fn read_interfaces(&mut self) -> anyhow::Result<()> {
        self.stale.interfaces = false;
        let Some(serving) = &mut self.serving else { return Ok(()) };
        let found = filters(&self.netlink, serving).await?;
        let lacked = |name: &String| serving.outline.incomplete.interfaces.contains(name);
        let lost = found.iter().filter(|(_, seen)| matches!(seen, Filter::Lost(_)));
        let (appeared, lost): (Vec<String>, Vec<String>) =
            lost.map(|(name, _)| name.clone()).partition(lacked);
        if !appeared.is_empty() {
            let mut desired = Desired::clone(&serving.description()?.desired);
            desired.incomplete.interfaces.retain(|name| !appeared.contains(name));
            return self.attach_new(desired, &appeared).await;
        }
        if lost.is_empty() {
            if serving.interfaces != found {
                serving.interfaces = found;
                self.track_upstreams()?;
                self.stale.routes = true;
            }
            return Ok(());
        }
        // keep the last known states until this succeeds
        self.stale.interfaces = true;
        self.attach_not_before = Instant::now() + ATTACH_PAUSE;
        self.attach_again(&lost).await
    }

    async fn attach_again(&mut self, lost: &[String]) -> anyhow::Result<()> {
        let Some(guard) = self.lock_for_writing()? else { return Ok(()) };
        let observed = observe(Some(&guard), &self.netlink).await?;
        self.stale.generation = true;
        let number = self.serving.as_ref().map(|serving| serving.number);
        if observed.serving() != number {
            return Ok(());
        }
        // leave out interfaces that were detached meanwhile
        let lost: Vec<String> =
            lost.iter().filter(|name| !observed.is_detached(name)).cloned().collect();
        let plan = plan::attach_again(&observed, &lost)?;
        let next_hops = HashMap::default();
        let mut executor = execute::Executor::new(&guard, &self.netlink, &observed, &next_hops);
        executor.run(&plan.actions, &mut execute::log).await?;
        let before = self.serving.as_ref().map(|serving| &serving.interfaces);
        for name in plan.attached() {
            let index = observed.interfaces[name].index;
            let before = match before.and_then(|before| before.get(name)) {
                Some(Filter::Attached(old) | Filter::Detached(old) | Filter::Lost(old)) => {
                    Some(*old)
                }
                Some(Filter::Missing) | None => None,
            };
            if before != Some(index) {
                log::info!("{name} was recreated: attached");
                continue;
            }
            log::warn!("{name}: udplb's filter was gone, and no detach took it: attached again");
            execute::count_reattached(&guard, &observed, name)?;
        }
        self.stale.interfaces = false;
        Ok(())
    }

    /// Attaches to interfaces that were missing so far, with a new generation: its description records who
    /// owns their qdiscs, and it has a program for interfaces without an Ethernet header.
    async fn attach_new(
        &mut self,
        mut desired: Desired,
        appeared: &[String],
    ) -> anyhow::Result<()> {
        if let Some(renewed) = addresses::renewed(&self.netlink, &desired).await? {
            desired = renewed;
        }
        let Some(serving) = &self.serving else { return Ok(()) };
        let number = serving.number;
        match self.renew(number, &desired).await? {
            Some(renewed) => {
                let names = appeared.join(", ");
                log::info!("attached to {names}: generation {number} -> {renewed}");
            }
            None => self.stale.interfaces = true,
        }
        Ok(())
    }

    /// Builds a new generation, as `apply` would, if the addresses of `any` or a key's broadcast address
    /// have changed.
    pub(super) async fn read_addresses(&mut self) -> anyhow::Result<()> {
        self.stale.addresses = false;
        let Some(serving) = &self.serving else { return Ok(()) };
        let desired = &serving.description()?.desired;
        Environment::read(&self.netlink).await?.write(
            &serving.maps,
            [desired.as_ref()].into_iter(),
            true,
        )?;
        if !desired.xdp.is_empty() {
            let directory = self.pin_dir.join(ReadGuard::name_of(serving.number));
            let links = self.netlink.links().await?;
            xdp::write_devices(&directory, &desired.xdp, &links, &serving.maps.gate)?;
        }
        let lacked = &desired.incomplete.interfaces;
        // a recreated interface gets its addresses back soon
        let mut gone = serving.interfaces.iter().filter(|(name, _)| !lacked.contains(name));
        let is_gone = gone.any(|(_, seen)| *seen == Filter::Missing);
        if is_gone || !serving.interfaces.values().any(is_attached) {
            return Ok(());
        }
        let Some(desired) = addresses::renewed(&self.netlink, desired).await? else {
            return Ok(());
        };
        let number = serving.number;
        match self.renew(number, &desired).await? {
            Some(renewed) => {
                let all: Vec<String> = desired.addresses.iter().map(IpAddr::to_string).collect();
                log::info!("any is now {}: generation {number} -> {renewed}", all.join(", "));
            }
            None => self.stale.addresses = true,
        }
        Ok(())
    }

    /// Builds a new generation, as `apply` would, if host names resolve to other addresses.
    pub async fn take_answers(&mut self, answers: Answers) {
        let own = match addresses::own(&self.netlink).await {
            Ok(own) => own,
            Err(error) => return self.report("names", Err(error)),
        };
        let Some(serving) = &self.serving else { return };
        if !serving.interfaces.values().any(is_attached) {
            return;
        }
        let before = &match serving.description() {
            Ok(description) => description.desired.clone(),
            Err(error) => return self.report("names", Err(error)),
        };
        let (desired, unresolved) = partial::renew(before, &answers, &own, &mut self.names.shrunk);
        self.names.log(&unresolved);
        if desired.serves(before) {
            self.errors.remove("names");
            return;
        }
        let number = serving.number;
        let text = partial::moved(before, &desired);
        let result = self.renew(number, &desired).await;
        if let Ok(Some(renewed)) = &result {
            log::info!("{text}: generation {number} -> {renewed}");
        }
        self.report("names", result.map(drop));
    }

    async fn renew(&mut self, number: u32, desired: &Desired) -> anyhow::Result<Option<u32>> {
        let next_hops = resolve_next_hops(&self.netlink, desired).await?;
        if let Some((target, _)) =
            next_hops.iter().find(|(_, next_hop)| **next_hop == nexthop::NextHop::Local)
        {
            let address = &target.address;
            bail!("{address} is an address of this host, which is no upstream");
        }
        let Some(guard) = self.lock_for_writing()? else { return Ok(None) };
        let observed = observe(Some(&guard), &self.netlink).await?;
        let Some(serving) = observed.serving().and_then(|other| observed.generations.get(&other))
        else {
            bail!("nothing is applied any more");
        };
        self.stale.generation = true;
        if serving.number != number {
            // a concurrent apply has resolved the names too
            return Ok(None);
        }
        if serving.description.object != OBJECT_SHA256 {
            bail!("generation {number} was built by another udplb: restart arpd");
        }
        let plan = plan::renew(&observed, desired, &serving.description.origin)?;
        let outcome =
            execute::reconcile(&guard, &self.netlink, &observed, &plan, &next_hops).await?;
        Ok(Some(outcome.generation))
    }
}
