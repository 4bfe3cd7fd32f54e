//! Reads the kernel's tables, and carries out the effects of the neighbour tracker.

use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::{ROUTES_PAUSE, Service, current, now, unless_locked};
use crate::arpd::neighbours::{self, Effect};
use crate::datapath::pins;
use crate::net::neighbour::{self, Batches, NeighbourKey, NeighbourRequest, NeighbourTable};
use crate::net::routing;

impl Service {
    pub(super) async fn read_links(&mut self) -> anyhow::Result<()> {
        self.tracker.set_links(self.netlink.links().await?);
        self.stale.links = false;
        Ok(())
    }

    pub(super) async fn read_routes(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        let targets = self.tracker.targets();
        let interfaces =
            self.serving.as_ref().map_or(&[][..], |serving| &serving.outline.interfaces);
        let links = self.tracker.links();
        let paths = routing::paths(&self.netlink, &targets, interfaces, links).await?;
        self.tracker.set_paths(targets.into_iter().zip(paths).collect(), now());
        self.stale.routes = false;
        self.routes_not_before = started + started.elapsed() * ROUTES_PAUSE;
        // the kernel may know neighbours that were not tracked so far
        self.stale.neighbours = true;
        Ok(())
    }

    pub(super) async fn read_neighbours(&mut self) -> anyhow::Result<()> {
        let table = self.netlink.neighbours().await?;
        // per family
        let mut known = [0; 2];
        for entry in &table {
            let tracked = self.tracker.is_tracked((entry.ifindex, entry.address));
            known[usize::from(entry.address.is_ipv6())] += usize::from(tracked);
        }
        self.tracker.set_neighbours(table, now());
        for table in self.netlink.neighbour_tables().await? {
            let others = (table.entries as usize).saturating_sub(known[usize::from(table.ipv6)]);
            let advice =
                neighbour::overflow(self.tracker.neighbours_of(table.ipv6), others, &table);
            let what = table_of(table.ipv6);
            let room = neighbours::room(&table);
            self.tracker.set_room(table.ipv6, room);
            let advice = match room {
                0 => advice.map(|advice| format!("{advice}; until then no next hops are added")),
                _ => advice,
            };
            match advice {
                // the number of other entries varies: do not log each value
                Some(_) if self.errors.contains_key(what) => {}
                Some(advice) => self.report(what, Err(anyhow!(advice))),
                None => self.report(what, Ok(())),
            }
        }
        self.stale.neighbours = false;
        Ok(())
    }

    pub(super) async fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut requests = Vec::new();
        for effect in effects {
            match effect {
                Effect::Request(key, request) => requests.push((key, request)),
                Effect::Write(id, entry) => self.unwritten.push((id, entry)),
                Effect::Log { warning: true, text } => log::warn!("{text}"),
                Effect::Log { warning: false, text } => log::info!("{text}"),
            }
        }
        if !requests.is_empty() {
            self.request(&requests).await;
        }
    }

    async fn request(&mut self, requests: &[(NeighbourKey, NeighbourRequest)]) {
        let results = match self.batches.neighbours(requests) {
            Ok(results) => results,
            Err(error) => {
                // late answers must not be taken for those of the next request
                if let Ok(batches) = Batches::open() {
                    self.batches = batches;
                }
                // no request was sent, unlike the tracker believes
                self.stale.neighbours = true;
                return self.report("neighbour requests", Err(error.into()));
            }
        };
        self.report("neighbour requests", Ok(()));
        let mut unmanaged = Vec::new();
        for ((key, request), result) in requests.iter().zip(results) {
            let Err(error) = result else { continue };
            match (request, error.raw_os_error()) {
                (NeighbourRequest::Keep, Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                    unmanaged.push(*key);
                }
                (NeighbourRequest::Keep, Some(libc::ENOBUFS)) => {
                    let ipv6 = key.1.is_ipv6();
                    self.tracker.set_room(ipv6, 0);
                    let sysctl = NeighbourTable { ipv6, ..Default::default() }.sysctl("gc_thresh3");
                    if !self.errors.contains_key(table_of(ipv6)) {
                        let advice = format!("it is full: raise the sysctl {sysctl}");
                        self.report(table_of(ipv6), Err(anyhow!(advice)));
                    }
                }
                // gone meanwhile: an event follows
                _ => log::debug!("neighbour {}: {error}", key.1),
            }
        }
        self.netlink.solicit(&unmanaged).await;
    }

    /// Writes next hops; later if another udplb holds the lock. The shared lock keeps an apply out, so the
    /// active generation is still the one that was read.
    pub(super) fn write(&mut self) -> anyhow::Result<()> {
        let Some(guard) = unless_locked(pins::read(&self.pin_dir, Duration::ZERO))? else {
            return Ok(());
        };
        if guard.is_some() && current(&self.pin_dir) != self.current {
            self.stale.generation = true;
            return Ok(());
        }
        if let (Some(serving), Some(guard)) = (&self.serving, &guard) {
            serving.write(guard, &self.unwritten)?;
        }
        drop(guard);
        // frees the room too: arpd writes all next hops when it starts
        self.unwritten = Vec::new();
        Ok(())
    }
}

/// Returns the key of a neighbour table in the errors.
fn table_of(ipv6: bool) -> &'static str {
    if ipv6 { "IPv6 neighbour table" } else { "neighbour table" }
}
