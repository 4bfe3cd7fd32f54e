use std::net::{IpAddr, Ipv4Addr};

use super::*;
use crate::net::link::Layer;
use crate::net::neighbour::NudState;
use crate::net::routing::{Choice, Senders};

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
const THEIRS: [u8; 6] = [2, 0, 0, 0, 0, 2];
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const KEY: NeighbourKey = (7, IpAddr::V4(ADDRESS));

/// A tracker of one upstream on a link, and a clock.
struct World {
    tracker: NeighbourTracker,
    start: Instant,
    passed: Duration,
    layer: Layer,
    address: IpAddr,
}

impl World {
    fn new() -> World {
        World::of(ADDRESS.into(), Layer::Ethernet)
    }

    /// Tracks an upstream at an address, on a link of a kind.
    fn of(address: IpAddr, layer: Layer) -> World {
        let tracker = NeighbourTracker::new(Duration::from_secs(2));
        let (start, passed) = (Instant::now(), Duration::ZERO);
        let mut world = World { tracker, start, passed, layer, address };
        let upstream = TrackedUpstream { id: 1, target: target(address) };
        world.tracker.set_upstreams(vec![(upstream, types::nexthop::default())]);
        world.link(true);
        world.route(address);
        world
    }

    fn now(&self) -> Now {
        Now { instant: self.start + self.passed, seconds: 1000 + self.passed.as_secs() as u32 }
    }

    fn link(&mut self, carrier: bool) {
        let link = Link {
            index: 7,
            name: "eth0".into(),
            mac: Some(OWN),
            mtu: 1500,
            up: true,
            carrier,
            layer: Some(self.layer),
            forwards: [true; 2],
            ..Link::default()
        };
        self.tracker.set_links(vec![link]);
    }

    fn route(&mut self, gateway: impl Into<IpAddr>) {
        self.route_from(gateway, None);
    }

    fn route_from(&mut self, gateway: impl Into<IpAddr>, egress: Option<IpAddr>) {
        let gateway = gateway.into();
        let path = Route { ifindex: 7, gateway, mtu: None, egress, local: false };
        let paths = Paths { routes: vec![path], by: Choice::Only, routed: true };
        self.tracker.set_paths(vec![(target(self.address), Ok(paths))], self.now());
    }

    fn neighbour(&mut self, state: NudState) {
        let mac = state.is_valid().then_some(THEIRS);
        self.tracker.set_neighbour(entry((7, self.address), state, mac), self.now());
    }

    /// Lets time pass and returns what is to be done then.
    fn after(&mut self, milliseconds: u64) -> Vec<Effect> {
        self.passed += Duration::from_millis(milliseconds);
        self.tracker.tick(self.now());
        self.tracker.effects()
    }

    fn entry(&self) -> types::nexthop {
        self.tracker.written[&1].0
    }

    fn health(&self) -> Health {
        self.entry().health
    }
}

/// An upstream that gets packets of anybody.
fn target(address: IpAddr) -> Target {
    Target { address: address.into(), senders: Senders::Among(Vec::new()) }
}

fn entry(key: NeighbourKey, state: NudState, mac: Option<[u8; 6]>) -> Neighbour {
    Neighbour {
        ifindex: key.0,
        address: key.1,
        mac,
        state,
        confirmed: None,
        updated: None,
        managed: true,
        protocol: OUR_PROTOCOL,
        learned: false,
    }
}

fn asked(effects: &[Effect]) -> Vec<NeighbourRequest> {
    let request = |action: &Effect| match action {
        Effect::Request(_, request) => Some(*request),
        _ => None,
    };
    effects.iter().filter_map(request).collect()
}

fn told(effects: &[Effect]) -> Vec<String> {
    let text = |action: &Effect| match action {
        Effect::Log { text, .. } => Some(text.clone()),
        _ => None,
    };
    effects.iter().filter_map(text).collect()
}

#[test]
fn a_neighbour_is_kept_then_probed() {
    let mut world = World::new();
    assert_eq!(asked(&world.after(0)), [NeighbourRequest::Keep]);
    assert!(asked(&world.after(250)).is_empty());
    world.neighbour(NudState::Reachable);
    let effects = world.after(0);
    assert!(matches!(&effects[..], [Effect::Write(1, entry)] if entry.0.destination == THEIRS));
    assert_eq!(world.health(), Health::HEALTH_UP);
    assert!(asked(&world.after(1750)).is_empty());
    assert_eq!(asked(&world.after(250)), [NeighbourRequest::Probe]);
    // until it has answered there is nothing to add
    assert!(asked(&world.after(2000)).is_empty());
}

#[test]
fn one_of_ipv6_likewise() {
    let address: IpAddr = "2001:db8::2".parse().unwrap();
    let mut world = World::of(address, Layer::Ethernet);
    let asked_for = |effects: Vec<Effect>| match effects[..] {
        [Effect::Request(key, request), ..] => (key, request),
        _ => panic!("{effects:?}"),
    };
    assert_eq!(asked_for(world.after(0)), ((7, address), NeighbourRequest::Keep));
    world.neighbour(NudState::Reachable);
    world.after(0);
    let entry = world.entry();
    assert_eq!((entry.health, entry.macs), (Health::HEALTH_UP, types::macs::MACS_FRESH));
    assert_eq!(nexthops::gateway(&entry), address);
    assert_eq!(entry.address.map(u32::from_be), [0x2001_0db8, 0, 0, 2]);
    assert_eq!(asked_for(world.after(2000)), ((7, address), NeighbourRequest::Probe));
}

#[test]
fn where_there_are_no_mac_addresses_nobody_asks() {
    let mut world = World::of(ADDRESS.into(), Layer::Ip);
    for _ in 0..3 {
        assert!(asked(&world.after(2000)).is_empty());
    }
    assert!(world.tracker.is_settled());
    let entry = world.entry();
    assert_eq!((entry.health, entry.macs), (Health::HEALTH_UP, types::macs::MACS_NONE));
    assert_eq!((entry.ifindex, nexthops::gateway(&entry)), (7, ADDRESS.into()));
    world.link(false);
    assert_eq!(told(&world.after(0)).len(), 1);
    assert_eq!(world.health(), Health::HEALTH_DOWN);
    world.link(true);
    world.after(0);
    assert_eq!(world.health(), Health::HEALTH_UP);
}

#[test]
fn the_own_address_on_the_way_is_followed() {
    let mut world = World::new();
    world.after(0);
    for own in [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 7)] {
        world.route_from(ADDRESS, Some(own.into()));
        world.after(0);
        assert_eq!(world.entry().egress, [u32::from_ne_bytes(own.octets()), 0, 0, 0]);
    }
}

#[test]
fn down_takes_a_second_chance_and_up_two_answers() {
    let mut world = World::new();
    world.neighbour(NudState::Reachable);
    world.after(0);
    assert_eq!(asked(&world.after(2000)), [NeighbourRequest::Probe]);
    world.after(1500);
    assert_eq!(world.health(), Health::HEALTH_STALE);
    world.after(1500);
    world.neighbour(NudState::Failed);
    // asked for by everybody's address
    assert_eq!(asked(&world.after(0)), [NeighbourRequest::Keep]);
    assert_eq!(world.health(), Health::HEALTH_STALE);
    let effects = world.after(250);
    assert_eq!(told(&effects), ["10.0.0.2 dev eth0 is down: no answer (1 upstream)"]);
    let entry = world.entry();
    assert_eq!((entry.health, entry.since), (Health::HEALTH_DOWN, 1005));
    // the last address is kept for copies
    assert_eq!((entry.macs, entry.destination), (types::macs::MACS_KNOWN, THEIRS));

    world.neighbour(NudState::Reachable);
    assert_eq!(asked(&world.after(0)), [NeighbourRequest::Probe]);
    world.neighbour(NudState::Reachable);
    assert_eq!(asked(&world.after(1000)), [NeighbourRequest::Probe]);
    assert_eq!(world.health(), Health::HEALTH_DOWN);
    world.neighbour(NudState::Reachable);
    assert_eq!(told(&world.after(0)), ["10.0.0.2 dev eth0 is up again (1 upstream)"]);
}

#[test]
fn an_entry_that_vanishes_is_asked_for_at_once() {
    let mut world = World::new();
    world.after(0);
    world.neighbour(NudState::Reachable);
    world.after(0);
    world.tracker.remove_neighbour(KEY, world.now());
    assert_eq!(asked(&world.tracker.effects()), [NeighbourRequest::Keep]);
    world.tracker.set_neighbours(vec![entry(KEY, NudState::Stale, Some(THEIRS))], world.now());
    world.tracker.set_neighbours(Vec::new(), world.now());
    assert_eq!(asked(&world.tracker.effects()), [NeighbourRequest::Keep]);
}

#[test]
fn without_carrier_it_is_down_and_nobody_asks() {
    let mut world = World::new();
    world.neighbour(NudState::Reachable);
    world.after(0);
    world.link(false);
    world.tracker.remove_neighbour(KEY, world.now());
    let effects = world.after(0);
    assert!(asked(&effects).is_empty(), "{effects:?}");
    assert_eq!(told(&effects), ["10.0.0.2 dev eth0 is down: its interface is down (1 upstream)"]);
}

const GATEWAYS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 0, 0, 8), Ipv4Addr::new(10, 0, 0, 9)];

impl World {
    /// Both gateways answer, and something chooses between them for each packet.
    fn two_paths(&mut self, by: Choice, routed: bool, senders: Senders) {
        let address = ADDRESS.into();
        let target = Target { address, senders };
        let upstream = TrackedUpstream { id: 1, target: target.clone() };
        self.tracker.set_upstreams(vec![(upstream, types::nexthop::default())]);
        let routes = GATEWAYS.map(|gateway| Route {
            ifindex: 7,
            gateway: gateway.into(),
            mtu: None,
            egress: None,
            local: false,
        });
        let paths = Paths { routes: routes.to_vec(), by, routed };
        self.tracker.set_paths(vec![(target, Ok(paths))], self.now());
        for gateway in GATEWAYS {
            let entry = entry((7, gateway.into()), NudState::Reachable, Some(THEIRS));
            self.tracker.set_neighbour(entry, self.now());
        }
        self.after(0);
    }

    fn fail(&mut self, gateway: Ipv4Addr) {
        let failed = entry((7, gateway.into()), NudState::Failed, None);
        self.tracker.set_neighbour(failed, self.now());
        self.after(500);
    }

    /// Gateway, whether it stands for all packets, and health.
    fn told(&self) -> (IpAddr, bool, Health) {
        let entry = self.entry();
        let leased = entry.macs == types::macs::MACS_FRESH;
        (nexthops::gateway(&entry), leased, entry.health)
    }
}

#[test]
fn of_two_paths_the_kernel_chooses_while_both_are_alive() {
    let mut world = World::new();
    let [first, second] = GATEWAYS.map(IpAddr::from);
    world.two_paths(Choice::Flow, true, Senders::Among(Vec::new()));
    assert_eq!(world.told(), (first, false, Health::HEALTH_UP));
    world.fail(GATEWAYS[0]);
    assert_eq!(world.told(), (second, true, Health::HEALTH_UP));
}

#[test]
fn of_two_paths_one_where_the_kernel_cannot_choose() {
    for (routed, senders) in [(false, Senders::Among(Vec::new())), (true, Senders::Own)] {
        let mut world = World::new();
        world.two_paths(Choice::Flow, routed, senders);
        assert_eq!(world.told(), (GATEWAYS[0].into(), true, Health::HEALTH_UP));
        world.fail(GATEWAYS[0]);
        assert_eq!(world.told(), (GATEWAYS[1].into(), true, Health::HEALTH_UP));
    }
}

#[test]
fn paths_by_sender_are_up_while_one_is() {
    let mut world = World::new();
    world.two_paths(Choice::Sender, true, Senders::Among(Vec::new()));
    world.fail(GATEWAYS[0]);
    assert_eq!(world.told(), (GATEWAYS[0].into(), false, Health::HEALTH_UP));
    world.fail(GATEWAYS[1]);
    assert_eq!(world.health(), Health::HEALTH_DOWN);
}

/// Sending to another VRF's network is worse than losing packets.
#[test]
fn paths_by_interface_need_the_kernel() {
    let mut world = World::new();
    world.two_paths(Choice::Interface, true, Senders::Among(Vec::new()));
    assert_eq!(world.told(), (GATEWAYS[0].into(), false, Health::HEALTH_UP));
    for (routed, senders) in [(false, Senders::Among(Vec::new())), (true, Senders::Own)] {
        let mut world = World::new();
        world.two_paths(Choice::Interface, routed, senders);
        assert_eq!((world.entry().ifindex, world.health()), (0, Health::HEALTH_DOWN));
    }
}

#[test]
fn new_entries_are_asked_for_while_there_is_room() {
    let mut world = World::new();
    world.tracker.set_room(false, 0);
    assert!(asked(&world.after(3000)).is_empty());
    // one that is there takes no room
    world.neighbour(NudState::Stale);
    assert!(asked(&world.after(3000)).contains(&NeighbourRequest::Probe));
    world.tracker.remove_neighbour(KEY, world.now());
    world.tracker.set_room(true, 1);
    assert!(asked(&world.after(3000)).is_empty());
    world.tracker.set_room(false, 1);
    assert_eq!(asked(&world.after(3000)), [NeighbourRequest::Keep]);
    assert!(asked(&world.after(3000)).is_empty());
}

#[test]
fn a_sixteenth_of_the_table_is_the_hosts() {
    let table = |entries| NeighbourTable { entries, threshold3: 1024, ..Default::default() };
    assert_eq!([0, 900, 960, 2000].map(|entries| room(&table(entries))), [960, 60, 0, 0]);
}

#[test]
fn others_entries_are_left_alone() {
    for change in [
        |entry: &mut Neighbour| entry.state = NudState::Permanent,
        |entry: &mut Neighbour| entry.learned = true,
        |entry: &mut Neighbour| entry.protocol = 42,
    ] {
        let mut world = World::new();
        let mut entry = entry(KEY, NudState::Reachable, Some(THEIRS));
        change(&mut entry);
        world.tracker.set_neighbour(entry, world.now());
        let effects = world.after(60_000);
        assert!(asked(&effects).is_empty(), "{entry:?}: {effects:?}");
        assert_eq!(world.health(), Health::HEALTH_UP);
    }
}

#[test]
fn what_is_not_wanted_is_let_go_once_and_only_if_ours() {
    let mut world = World::new();
    let old = entry((7, Ipv4Addr::new(10, 0, 0, 3).into()), NudState::Reachable, None);
    let others = Neighbour { protocol: 0, ..old };
    world.tracker.set_neighbours(vec![others], world.now());
    assert!(!asked(&world.after(0)).contains(&NeighbourRequest::Release));
    let mut world = World::new();
    world.tracker.set_neighbours(vec![old], world.now());
    assert!(asked(&world.after(0)).contains(&NeighbourRequest::Release));
    // it is somebody else's by now
    world.tracker.set_neighbours(vec![old], world.now());
    assert!(!asked(&world.after(0)).contains(&NeighbourRequest::Release));
}

#[test]
fn a_route_that_moves_is_told_in_one_line() {
    let mut world = World::new();
    world.route(Ipv4Addr::new(10, 0, 0, 9));
    let moved = "10.0.0.2: via 10.0.0.9 dev eth0, was via 10.0.0.2 dev eth0";
    assert_eq!(told(&world.after(0)), [moved]);
}
