//! The next hop of each upstream: route, gateway and the gateway's MAC address.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use foldhash::{HashMap, HashSet, HashSetExt};

use crate::net::Netlink;
use crate::net::link::{Layer, Link, OwnAddress};
use crate::net::neighbour::{Neighbour, NeighbourKey, NudState};
use crate::net::route::Route;
use crate::net::routing::{self, Choice, Paths, Senders, Target};

/// Time that `apply` waits for neighbours to answer.
pub const NEIGHBOUR_TIMEOUT: Duration = Duration::from_secs(1);

/// Time before that for duplicate address detection, which takes up to two seconds.
const DAD_TIMEOUT: Duration = Duration::from_secs(3);

/// Next hop of one target, as far as known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// One neighbour, whose MAC address may still be unknown.
    Hop(Hop),
    /// Several hops. If `routed`, the program looks up the kernel's choice for each packet; else all
    /// packets take the first.
    Several { hops: Vec<Hop>, by: Choice, routed: bool },
    /// The address is this host's own.
    Local,
    /// No route; the kernel's reason.
    None(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    pub interface: String,
    pub ifindex: u32,
    /// Address of the neighbour: a gateway, or the upstream itself.
    pub gateway: IpAddr,
    /// In bytes.
    pub mtu: u32,
    /// This host's source address on the path.
    pub egress: Option<IpAddr>,
    pub macs: Macs,
}

/// Link-layer header in front of a packet's IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Macs {
    /// None: the device has no MAC addresses.
    None,
    Unknown,
    Known {
        own: [u8; 6],
        neighbour: [u8; 6],
    },
}

impl Macs {
    /// Returns the header on a link; `neighbour` is the neighbour's MAC address, if known.
    fn on(link: &Link, neighbour: Option<[u8; 6]>) -> Macs {
        match (link.layer, link.mac, neighbour) {
            (Some(Layer::Ip), _, _) => Macs::None,
            (Some(Layer::Ethernet), Some(own), Some(neighbour)) => Macs::Known { own, neighbour },
            _ => Macs::Unknown,
        }
    }
}

impl NextHop {
    /// Returns true if there is no route, or a next hop has not answered.
    pub fn is_wanting(&self) -> bool {
        matches!(self, NextHop::None(_)) || self.hops().iter().any(|hop| hop.macs == Macs::Unknown)
    }

    /// Returns the hops that packets may take.
    pub fn hops(&self) -> &[Hop] {
        match self {
            NextHop::Hop(hop) => std::slice::from_ref(hop),
            NextHop::Several { hops, .. } => hops,
            NextHop::Local | NextHop::None(_) => &[],
        }
    }
}

impl Hop {
    /// Returns the hop of a route to an address over `link`; `neighbour` is the gateway's MAC address, if
    /// known.
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

    /// Returns true if the hop is that of a route.
    pub fn is_by(&self, route: &Route) -> bool {
        (self.ifindex, self.gateway) == route.neighbour()
    }
}

/// Finds the next hops of each target for packets received on `interfaces`. Waits until own IPv6 addresses
/// are no longer tentative, has the kernel resolve unknown neighbours, and waits for them up to
/// [`NEIGHBOUR_TIMEOUT`].
pub async fn resolve(
    netlink: &Netlink,
    targets: impl IntoIterator<Item = Target>,
    interfaces: &[String],
) -> anyhow::Result<HashMap<Target, NextHop>> {
    let links = links(netlink).await?;
    let asked: Vec<Target> = targets.into_iter().collect();
    let paths = settled_paths(netlink, &asked, interfaces, &links).await?;
    let mut found = Found::all(&asked, paths, &links);
    let end = Instant::now() + NEIGHBOUR_TIMEOUT;
    let mut asked_for = HashSet::new();
    loop {
        let hops = found.iter_mut().flat_map(Found::hops);
        let missing = add_macs(hops, &links, &netlink.neighbours().await?, &asked_for);
        let new: Vec<NeighbourKey> =
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
    Ok(Found::next_hops(found, asked))
}

/// Finds the next hops with the neighbours that the kernel knows now, without resolving others.
pub async fn look(
    netlink: &Netlink,
    targets: impl IntoIterator<Item = Target>,
    interfaces: &[String],
) -> anyhow::Result<HashMap<Target, NextHop>> {
    let links = links(netlink).await?;
    let asked: Vec<Target> = targets.into_iter().collect();
    let paths = routing::paths(netlink, &asked, interfaces, &links).await?;
    let mut found = Found::all(&asked, paths, &links);
    let hops = found.iter_mut().flat_map(Found::hops);
    add_macs(hops, &links, &netlink.neighbours().await?, &HashSet::new());
    Ok(Found::next_hops(found, asked))
}

/// Returns all interfaces by index.
async fn links(netlink: &Netlink) -> anyhow::Result<HashMap<u32, Link>> {
    Ok(netlink.links().await?.into_iter().map(|link| (link.index, link)).collect())
}

/// Finds the paths; repeats it while own IPv6 addresses on them are tentative. During duplicate address
/// detection the kernel neither resolves neighbours nor has a source address.
async fn settled_paths(
    netlink: &Netlink,
    targets: &[Target],
    interfaces: &[String],
    links: &HashMap<u32, Link>,
) -> anyhow::Result<Vec<Result<Paths, String>>> {
    let end = Instant::now() + DAD_TIMEOUT;
    let mut waited = false;
    loop {
        let found = routing::paths(netlink, targets, interfaces, links).await?;
        let own = match targets.iter().any(|it| it.address.ip.is_ipv6()) {
            true => netlink.addresses().await?,
            false => Vec::new(),
        };
        let is_tested = |own: &&OwnAddress| {
            let link = links.get(&own.ifindex);
            own.tentative && link.is_some_and(|link| link.up && link.carrier)
        };
        let tentative: HashSet<u32> = own.iter().filter(is_tested).map(|own| own.ifindex).collect();
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

/// The paths of a target, and their neighbours as far as known.
enum Found {
    Paths(Paths, Vec<Hop>),
    NextHop(NextHop),
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

    fn next_hops(found: Vec<Found>, targets: Vec<Target>) -> HashMap<Target, NextHop> {
        let found = found.into_iter().zip(targets).map(|(found, target)| {
            let next_hop = found.next_hop(&target);
            (target, next_hop)
        });
        found.collect()
    }

    fn new(target: &Target, paths: Result<Paths, String>, links: &HashMap<u32, Link>) -> Found {
        let paths = match paths {
            Ok(paths) if paths.routes.iter().any(|route| route.local) => {
                return Found::NextHop(NextHop::Local);
            }
            Ok(paths) => paths,
            Err(reason) => return Found::NextHop(NextHop::None(reason)),
        };
        let mut hops = Vec::new();
        for route in &paths.routes {
            match links.get(&route.ifindex) {
                Some(link) => hops.push(Hop::new(target.address.ip, route, link, None)),
                None => {
                    let reason = format!("the interface with index {} is gone", route.ifindex);
                    return Found::NextHop(NextHop::None(reason));
                }
            }
        }
        Found::Paths(paths, hops)
    }

    fn hops(&mut self) -> &mut [Hop] {
        match self {
            Found::Paths(_, hops) => hops,
            Found::NextHop(_) => &mut [],
        }
    }

    fn next_hop(self, target: &Target) -> NextHop {
        let (paths, mut hops) = match self {
            Found::Paths(paths, hops) => (paths, hops),
            Found::NextHop(next_hop) => return next_hop,
        };
        let alive: Vec<bool> = hops.iter().map(|hop| hop.macs != Macs::Unknown).collect();
        match choose(&paths, &target.senders, &hops, &alive) {
            // Each path of one route leads there.
            Ok(Chosen { path, leased: true }) if paths.by != Choice::Sender => {
                NextHop::Hop(hops.swap_remove(path))
            }
            Ok(Chosen { path, leased }) => {
                hops.swap(0, path);
                NextHop::Several { hops, by: paths.by, routed: !leased }
            }
            Err(reason) => NextHop::None(reason.into()),
        }
    }
}

/// The path that the entry in the next hop map is for.
pub struct Chosen {
    /// Index of the path.
    pub path: usize,
    /// The entry is valid for every packet, so that the program need not look up the route.
    pub leased: bool,
}

/// Chooses the path of the entry in the next hop map. `alive` is true for each path whose neighbour
/// answers.
///
/// # Errors
/// No path is valid for all packets, and the route of each cannot be looked up; the reason.
pub fn choose(
    paths: &Paths,
    senders: &Senders,
    hops: &[Hop],
    alive: &[bool],
) -> Result<Chosen, &'static str> {
    let Paths { by, routed, .. } = *paths;
    let first_alive = alive.iter().position(|alive| *alive).unwrap_or(0);
    // The source is the address of one path, whatever the kernel's hash selects.
    let own = *senders == Senders::Own;
    match by {
        Choice::Only => Ok(Chosen { path: 0, leased: true }),
        Choice::Flow => {
            // Without MAC addresses a route look-up returns no neighbour.
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

/// Sets the MAC addresses that the neighbour table has; returns neighbours that may still answer.
fn add_macs<'a>(
    hops: impl Iterator<Item = &'a mut Hop>,
    links: &HashMap<u32, Link>,
    neighbours: &[Neighbour],
    asked_for: &HashSet<NeighbourKey>,
) -> HashSet<NeighbourKey> {
    let table: HashMap<NeighbourKey, &Neighbour> =
        neighbours.iter().map(|it| ((it.ifindex, it.address), it)).collect();
    let mut missing = HashSet::new();
    for hop in hops {
        let key = (hop.ifindex, hop.gateway);
        let Some(link) = links.get(&hop.ifindex) else { continue };
        let neighbour = table.get(&key);
        let known =
            neighbour.filter(|neighbour| neighbour.state.is_valid()).and_then(|found| found.mac);
        hop.macs = Macs::on(link, known);
        // An entry that failed before this request may answer now.
        let failed = neighbour.is_some_and(|found| found.state == NudState::Failed);
        let gave_up = asked_for.contains(&key) && failed;
        let askable = link.layer == Some(Layer::Ethernet) && link.mac.is_some();
        if askable && known.is_none() && !gave_up {
            missing.insert(key);
        }
    }
    missing
}
