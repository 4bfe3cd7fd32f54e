//! Log lines about neighbours and routes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Effect, NeighbourTracker};
use crate::config::Address;
use crate::net::neighbour::NeighbourKey;
use crate::net::routing::{Paths, Target};

impl NeighbourTracker {
    /// Logs routes that differ from the present ones, one line for those that changed alike.
    pub(super) fn log_moves(&mut self, paths: &BTreeMap<Target, Result<Paths, String>>) {
        let mut moves: BTreeMap<(String, String), BTreeSet<&Address>> = BTreeMap::new();
        for (target, new) in paths {
            let Some(old) = self.paths.get(target) else { continue };
            let (old, new) = (self.path_text(old), self.path_text(new));
            if old != new {
                moves.entry((old, new)).or_default().insert(&target.address);
            }
        }
        for ((old, new), addresses) in moves {
            let others = match addresses.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            let first = addresses.first().expect("not empty");
            let text = format!("{first}{others}: {new}, was {old}");
            self.effects.push(Effect::Log { warning: new.starts_with("no route"), text });
        }
    }

    fn path_text(&self, paths: &Result<Paths, String>) -> String {
        match paths {
            Ok(paths) => {
                let hops: Vec<String> =
                    paths.routes.iter().map(|path| self.name(path.neighbour())).collect();
                format!("via {}", hops.join(", "))
            }
            Err(reason) => format!("no route ({reason})"),
        }
    }

    fn name(&self, key: NeighbourKey) -> String {
        match self.links.get(&key.0) {
            Some(link) => format!("{} dev {}", key.1, link.name),
            None => format!("{} dev {}", key.1, key.0),
        }
    }

    /// Logs a neighbour's MAC address if it has changed.
    pub(super) fn log_mac(&mut self, key: NeighbourKey, new: Option<[u8; 6]>) {
        let (Some(tracked), Some(new)) = (self.tracked.get_mut(&key), new) else { return };
        if let Some(old) = tracked.mac.replace(new).filter(|old| *old != new) {
            let text = format!("{}: now at {}, was {}", self.name(key), mac(new), mac(old));
            self.effects.push(Effect::Log { warning: false, text });
        }
    }

    /// Logs changes of health, one line for those that happened alike on an interface.
    pub(super) fn log_changes(&mut self) {
        let mut alike: BTreeMap<(bool, &str, u32), Vec<NeighbourKey>> = BTreeMap::new();
        for (key, down, why) in std::mem::take(&mut self.changes) {
            alike.entry((down, why, key.0)).or_default().push(key);
        }
        for ((down, why, _), keys) in alike {
            let upstreams: usize = keys
                .iter()
                .filter_map(|key| self.tracked.get(key))
                .map(|tracked| tracked.upstreams.len())
                .sum();
            let others = match keys.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            let is = match (keys.len(), down) {
                (1, true) => format!("is down: {why}"),
                (1, false) => "is up again".into(),
                (_, true) => format!("are down: {why}"),
                (_, false) => "are up again".into(),
            };
            let plural = if upstreams == 1 { "" } else { "s" };
            let name = self.name(keys[0]);
            let text = format!("{name}{others} {is} ({upstreams} upstream{plural})");
            self.effects.push(Effect::Log { warning: down, text });
        }
    }
}

fn mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
