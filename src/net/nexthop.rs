//! The way to each upstream: route, gateway and the gateway's MAC address.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::net::Netlink;
use crate::net::link::{Layer, Link, OwnAddress};
use crate::net::neighbour::{Neighbour, NudState};
use crate::net::route::Route;
use crate::net::routing::{self, Choice, Paths, Senders, Target};

/// Time that `apply` waits for neighbours to answer.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// Time before that for duplicate address detection, which takes up to two seconds.
const DETECTION: Duration = Duration::from_secs(3);

/// Next hop of one target, as far as known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Out by an interface, to a neighbour whose MAC address may still be unknown.
    Hop(Hop),
    /// By one of several hops. Where forwarding is on the kernel is asked for each packet which; otherwise
    /// all take the first.
    Several { hops: Vec<Hop>, by: Choice, routed: bool },
    /// It is this host's own.
    Local,
    /// No route; the reason in the kernel's words.
    None(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub interface: String,
    pub ifindex: u32,
    /// The neighbour to ask for: a gateway, or the upstream itself.
    pub gateway: IpAddr,
    /// Bytes.
    pub mtu: u32,
    /// This host's own address on that way.
    pub egress: Option<IpAddr>,
    pub macs: Macs,
}

/// Link-layer header in front of a packet's IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Macs {
    /// Nothing: the device has no MAC addresses.
    None,
    Unknown,
    Known {
        own: [u8; 6],
        neighbour: [u8; 6],
    },
}

impl Macs {
    /// On a link, with the neighbour's address if that is known.
    fn on(link: &Link, neighbour: Option<[u8; 6]>) -> Macs {
        match (link.layer, link.mac, neighbour) {
            (Some(Layer::Ip), _, _) => Macs::None,
            (Some(Layer::Ethernet), Some(own), Some(neighbour)) => Macs::Known { own, neighbour },
            _ => Macs::Unknown,
        }
    }
}

impl Hop {
    /// Returns true for the hop of this route.
    pub fn is_by(&self, route: &Route) -> bool {
        (self.ifindex, self.gateway) == route.neighbour()
    }
}

impl Way {
    /// Returns true where there is no route, or a next hop has not answered.
    pub fn is_wanting(&self) -> bool {
        matches!(self, Way::None(_)) || self.hops().iter().any(|hop| hop.macs == Macs::Unknown)
    }

    /// The hops that packets may take.
    pub fn hops(&self) -> &[Hop] {
        match self {
            Way::Hop(hop) => std::slice::from_ref(hop),
            Way::Several { hops, .. } => hops,
            Way::Local | Way::None(_) => &[],
        }
    }
}

impl Hop {
    /// By a route to an address, over the link that it names, to a neighbour whose MAC address
    /// may be known.
    pub fn new(address: IpAddr, route: &Route, link: &Link, neighbour: Option<[u8; 6]>) -> Hop {
        Hop {
            interface: link.name.clone(),
            ifindex: link.index,
            gateway: route.gateway,
            mtu: route.mtu.unwrap_or_else(|| link.mtu_to(address)),
            egress: route.egress,
            macs: Macs::on(link, neighbour),
        }
    }
}

/// Finds the way to each target of packets that come in by any of `interfaces`, and has the kernel ask
/// for the neighbours it does not know; waits for them, but for no longer than [`PATIENCE`], and before
/// that for own addresses that are still tentative.
pub async fn resolve(
    netlink: &Netlink,
    targets: &BTreeSet<Target>,
    interfaces: &[String],
) -> anyhow::Result<BTreeMap<Target, Way>> {
    let links = links(netlink).await?;
    let asked: Vec<Target> = targets.iter().cloned().collect();
    let paths = settled_paths(netlink, &asked, interfaces, &links).await?;
    let mut found = Found::all(&asked, paths, &links);
    let end = Instant::now() + PATIENCE;
    let mut asked_for = HashSet::new();
    loop {
        let hops = found.iter_mut().flat_map(Found::hops);
        let missing = add_macs(hops, &links, &netlink.neighbours().await?, &asked_for);
        let new: Vec<(u32, IpAddr)> =
            missing.iter().filter(|neighbour| asked_for.insert(**neighbour)).copied().collect();
        for (neighbour, result) in new.iter().zip(netlink.solicit(&new).await) {
            if let Err(error) = result {
                log::warn!("neighbour {}: {error}", neighbour.1);
            }
        }
        if missing.is_empty() || Instant::now() >= end {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(found
        .into_iter()
        .zip(asked)
        .map(|(found, target)| (target.clone(), found.way(&target)))
        .collect())
}

/// Finds the same ways with the neighbours that the kernel knows now, and has it ask for none.
pub async fn look(
    netlink: &Netlink,
    targets: &BTreeSet<Target>,
    interfaces: &[String],
) -> anyhow::Result<BTreeMap<Target, Way>> {
    let links = links(netlink).await?;
    let asked: Vec<Target> = targets.iter().cloned().collect();
    let paths = routing::paths(netlink, &asked, interfaces, &links).await?;
    let mut found = Found::all(&asked, paths, &links);
    let hops = found.iter_mut().flat_map(Found::hops);
    add_macs(hops, &links, &netlink.neighbours().await?, &HashSet::new());
    Ok(found
        .into_iter()
        .zip(asked)
        .map(|(found, target)| (target.clone(), found.way(&target)))
        .collect())
}

/// All interfaces, by index.
async fn links(netlink: &Netlink) -> anyhow::Result<HashMap<u32, Link>> {
    Ok(netlink.links().await?.into_iter().map(|link| (link.index, link)).collect())
}

/// Asks for the paths, again where the kernel may not send on one yet because its own IPv6 addresses
/// there are tentative: while it looks for duplicates it neither asks for neighbours nor has a source.
async fn settled_paths(
    netlink: &Netlink,
    targets: &[Target],
    interfaces: &[String],
    links: &HashMap<u32, Link>,
) -> anyhow::Result<Vec<Result<Paths, String>>> {
    let end = Instant::now() + DETECTION;
    let mut waited = false;
    loop {
        let found = routing::paths(netlink, targets, interfaces, links).await?;
        let tentative: HashSet<u32> = match targets.iter().any(|it| it.address.ip.is_ipv6()) {
            true => {
                let own = netlink.addresses().await?;
                let is_tested = |own: &OwnAddress| {
                    let link = links.get(&own.ifindex);
                    own.tentative && link.is_some_and(|link| link.up && link.carrier)
                };
                own.into_iter().filter(is_tested).map(|own| own.ifindex).collect()
            }
            false => HashSet::new(),
        };
        let routes = found.iter().flatten().flat_map(|paths| &paths.routes);
        let waits = routes
            .filter(|route| route.gateway.is_ipv6())
            .any(|route| tentative.contains(&route.ifindex));
        if !waits || Instant::now() >= end {
            return Ok(found);
        }
        if !std::mem::replace(&mut waited, true) {
            log::info!("waiting for IPv6 addresses that are still tentative");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A target's paths, with what is learned of their neighbours.
enum Found {
    Paths(Paths, Vec<Hop>),
    Way(Way),
}

impl Found {
    fn all(
        targets: &[Target],
        paths: Vec<Result<Paths, String>>,
        links: &HashMap<u32, Link>,
    ) -> Vec<Found> {
        let paths = targets.iter().zip(paths);
        paths.map(|(target, paths)| Found::new(target, paths, links)).collect()
    }

    fn new(target: &Target, paths: Result<Paths, String>, links: &HashMap<u32, Link>) -> Found {
        let paths = match paths {
            Ok(paths) if paths.routes.iter().any(|route| route.local) => {
                return Found::Way(Way::Local);
            }
            Ok(paths) => paths,
            Err(reason) => return Found::Way(Way::None(reason)),
        };
        let mut hops = Vec::new();
        for route in &paths.routes {
            match links.get(&route.ifindex) {
                Some(link) => hops.push(Hop::new(target.address.ip, route, link, None)),
                None => {
                    let reason = format!("the interface with index {} is gone", route.ifindex);
                    return Found::Way(Way::None(reason));
                }
            }
        }
        Found::Paths(paths, hops)
    }

    fn hops(&mut self) -> &mut [Hop] {
        match self {
            Found::Paths(_, hops) => hops,
            Found::Way(_) => &mut [],
        }
    }

    fn way(self, target: &Target) -> Way {
        let (paths, mut hops) = match self {
            Found::Paths(paths, hops) => (paths, hops),
            Found::Way(way) => return way,
        };
        let alive: Vec<bool> = hops.iter().map(|hop| hop.macs != Macs::Unknown).collect();
        match choose(&paths, &target.senders, &hops, &alive) {
            // whichever path of one route it is, it leads there
            Ok(Chosen { path, leased: true }) if paths.by != Choice::Sender => {
                Way::Hop(hops.swap_remove(path))
            }
            Ok(Chosen { path, leased }) => {
                hops.swap(0, path);
                Way::Several { hops, by: paths.by, routed: !leased }
            }
            Err(reason) => Way::None(reason.into()),
        }
    }
}

/// The path of several that an entry of the table is for.
pub struct Chosen {
    /// Its index.
    pub path: usize,
    /// The entry stands for the path of every packet, so that the kernel need not be asked.
    pub leased: bool,
}

/// Chooses the path that the program is told of. `alive` tells for each whether its neighbour answers.
///
/// # Errors
/// No path is right for all packets, and the kernel cannot be asked for each; the reason why.
pub fn choose(
    paths: &Paths,
    senders: &Senders,
    hops: &[Hop],
    alive: &[bool],
) -> Result<Chosen, &'static str> {
    let Paths { by, routed, .. } = *paths;
    let first_alive = alive.iter().position(|alive| *alive).unwrap_or(0);
    // its source is the address of one path, whatever the kernel's hash says
    let own = *senders == Senders::Own;
    match by {
        Choice::Only => Ok(Chosen { path: 0, leased: true }),
        Choice::Flow => {
            // nor does the kernel know a neighbour where there are no MAC addresses
            let bare = hops.iter().any(|hop| hop.macs == Macs::None);
            let leased = !routed || own || bare || alive.contains(&false);
            Ok(Chosen { path: first_alive, leased })
        }
        Choice::Sender => Ok(Chosen { path: 0, leased: !routed || own }),
        Choice::Interface if own => Err(
            "with `source: egress` the interfaces need the same path: give each a rule of its own",
        ),
        Choice::Interface if !routed => {
            Err("it depends on the interface, and forwarding is off there")
        }
        Choice::Interface => Ok(Chosen { path: 0, leased: false }),
    }
}

/// Fills in what the neighbour table has; returns the neighbours it lacks and that may yet answer.
fn add_macs<'a>(
    hops: impl Iterator<Item = &'a mut Hop>,
    links: &HashMap<u32, Link>,
    neighbours: &[Neighbour],
    asked_for: &HashSet<(u32, IpAddr)>,
) -> HashSet<(u32, IpAddr)> {
    let table: HashMap<(u32, IpAddr), &Neighbour> = neighbours
        .iter()
        .map(|neighbour| ((neighbour.ifindex, neighbour.address), neighbour))
        .collect();
    let mut missing = HashSet::new();
    for hop in hops {
        let key = (hop.ifindex, hop.gateway);
        let Some(link) = links.get(&hop.ifindex) else { continue };
        let neighbour = table.get(&key);
        let known =
            neighbour.filter(|neighbour| neighbour.state.is_valid()).and_then(|found| found.mac);
        hop.macs = Macs::on(link, known);
        // one that failed before anybody asked now may have come back
        let failed = neighbour.is_some_and(|found| found.state == NudState::Failed);
        let gave_up = asked_for.contains(&key) && failed;
        let askable = link.layer == Some(Layer::Ethernet) && link.mac.is_some();
        if askable && known.is_none() && !gave_up {
            missing.insert(key);
        }
    }
    missing
}
