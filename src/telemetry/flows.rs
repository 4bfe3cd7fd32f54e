//! Flows of the active generation, for people and programs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use schemars::JsonSchema;
use serde::Serialize;

use crate::datapath::description::Generation;
use crate::datapath::flows::{self, Handle, Record};
use crate::datapath::pins::ReadGuard;
use crate::desired::flows::FlowClock;
use crate::desired::{Desired, RuleIds, Upstream};

/// A flow that is alive.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Flow<'a> {
    /// `None`, as `upstream`: the active configuration does not have the upstream any more.
    pub rule: Option<&'a str>,
    pub upstream: Option<&'a str>,
    pub client: SocketAddr,
    /// Address and port that the client has sent to.
    pub vip: SocketAddr,
    /// This host's address and port, which the upstream sees; `None` with `sticky`.
    pub egress: Option<SocketAddr>,
    /// Address and port of the upstream.
    pub server: SocketAddr,
    pub state: FlowState,
    #[serde(rename = "age_seconds")]
    pub age: f64,
    /// Time since the last packet of either side.
    #[serde(rename = "idle_seconds")]
    pub idle: f64,
    /// Time until it ends without another packet.
    #[serde(rename = "left_seconds")]
    pub left: f64,
    /// Packets of the client.
    pub packets: u32,
    /// Packets of the upstream.
    pub answers: u32,
    #[serde(skip)]
    pub handle: Handle,
    /// Id of `upstream`.
    #[serde(skip)]
    pub id: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FlowState {
    /// No answer has come.
    New,
    Answered,
    /// Its client has spoken again later, and no new flow takes its place.
    Assured,
}

impl FlowState {
    pub const ALL: [FlowState; 3] = [FlowState::New, FlowState::Answered, FlowState::Assured];

    pub fn word(self) -> &'static str {
        match self {
            FlowState::New => "new",
            FlowState::Answered => "answered",
            FlowState::Assured => "assured",
        }
    }

    /// Returns the state of a number of `enum flow_state`, where 0 is no flow.
    fn of(state: u8) -> Option<FlowState> {
        FlowState::ALL.get(usize::from(state).checked_sub(1)?).copied()
    }
}

/// The part of the flows that is asked for.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Ids of upstreams; `None`: any, also those that are gone.
    pub upstreams: Option<BTreeSet<u32>>,
    pub client: Option<Client>,
}

/// `A[:P]` of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    address: IpAddr,
    port: Option<u16>,
}

impl From<SocketAddr> for Client {
    fn from(client: SocketAddr) -> Client {
        Client { address: client.ip(), port: Some(client.port()) }
    }
}

impl std::str::FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Client, String> {
        let with_port = || text.parse().ok().map(|it: SocketAddr| (it.ip(), Some(it.port())));
        let (address, port) =
            text.parse().map(|address: IpAddr| (address, None)).ok().or_else(with_port).ok_or(
                "an address, with or without a port, like 10.0.9.20:5353 or [2001:db8::20]:5353",
            )?;
        Ok(Client { address, port })
    }
}

impl Selection {
    fn has(&self, flow: &Flow<'_>) -> bool {
        let is_upstream = |ids: &BTreeSet<u32>| flow.id.is_some_and(|id| ids.contains(&id));
        let is_client = |client: &Client| {
            client.address == flow.client.ip()
                && client.port.is_none_or(|port| port == flow.client.port())
        };
        self.upstreams.as_ref().is_none_or(is_upstream)
            && self.client.as_ref().is_none_or(is_client)
    }
}

/// The upstreams of a configuration by id, with the names of rule and upstream.
pub struct Names<'a>(HashMap<u32, (&'a str, String, &'a Upstream)>);

impl<'a> Names<'a> {
    pub fn new((desired, ids): (&'a Desired, &'a [RuleIds])) -> Names<'a> {
        let rules = desired.rules.iter().zip(ids);
        let all = rules.flat_map(|(rule, ids)| {
            let destinations = rule.with_ids(ids).into_iter();
            destinations.map(|it| (it.id, (rule.name.as_str(), it.label, it.upstream)))
        });
        Names(all.collect())
    }

    /// Returns the flow of a record; `None`: it has expired.
    fn flow(&self, record: &Record, clock: &FlowClock) -> Option<Flow<'_>> {
        let Record { handle, flow, addresses } = *record;
        // in the order of `enum flow_end`
        let [client, vip, server, egress] =
            [0, 1, 2, 3].map(|end| SocketAddr::new(addresses[end], u16::from_be(flow.ports[end])));
        let (state, left) = (FlowState::of(flow.state)?, clock.left(flow.state, flow.touched)?);
        // ids are reissued
        let is_server = |upstream: &Upstream| {
            upstream.address.ip == server.ip()
                && upstream.port.unwrap_or(vip.port()) == server.port()
        };
        let known = self.0.get(&flow.upstream).filter(|(.., upstream)| is_server(upstream));
        Some(Flow {
            rule: known.map(|(rule, ..)| *rule),
            upstream: known.map(|(_, label, _)| label.as_str()),
            client,
            vip,
            egress: (egress.port() != 0).then_some(egress),
            server,
            state,
            age: clock.since(flow.created).as_secs_f64(),
            idle: clock.since(flow.touched).as_secs_f64(),
            left: left.as_secs_f64(),
            packets: flow.packets,
            answers: flow.answers,
            handle,
            id: known.map(|_| flow.upstream),
        })
    }
}

/// Passes the selected flows of a generation to `each`, in no order.
pub fn read<'a>(
    guard: &ReadGuard,
    generation: &Generation,
    names: &'a Names<'_>,
    selection: &Selection,
    mut each: impl FnMut(Flow<'a>),
) -> anyhow::Result<()> {
    let clock = flows::clock(generation)?;
    flows::read(guard, generation, |record| {
        if let Some(flow) = names.flow(&record, &clock).filter(|flow| selection.has(flow)) {
            each(flow);
        }
    })
}

/// Number of flows by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct FlowCounts {
    pub new: u64,
    pub answered: u64,
    pub assured: u64,
}

impl FlowCounts {
    pub fn of(&self, state: FlowState) -> u64 {
        match state {
            FlowState::New => self.new,
            FlowState::Answered => self.answered,
            FlowState::Assured => self.assured,
        }
    }

    pub fn all(&self) -> u64 {
        self.new + self.answered + self.assured
    }

    fn add(&mut self, state: FlowState) {
        match state {
            FlowState::New => self.new += 1,
            FlowState::Answered => self.answered += 1,
            FlowState::Assured => self.assured += 1,
        }
    }
}

impl std::iter::Sum for FlowCounts {
    fn sum<I: Iterator<Item = FlowCounts>>(all: I) -> FlowCounts {
        all.fold(FlowCounts::default(), |one, other| FlowCounts {
            new: one.new + other.new,
            answered: one.answered + other.answered,
            assured: one.assured + other.assured,
        })
    }
}

/// Counts the flows of a generation's upstreams, by id.
pub fn count(
    guard: &ReadGuard,
    generation: &Generation,
) -> anyhow::Result<BTreeMap<u32, FlowCounts>> {
    let mut counts: BTreeMap<u32, FlowCounts> = BTreeMap::new();
    let names = Names::new(generation.hosts());
    read(guard, generation, &names, &Selection::default(), |flow| {
        if let Some(id) = flow.id {
            counts.entry(id).or_default().add(flow.state);
        }
    })?;
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{Client, FlowState, Names, Selection};
    use crate::bpf::types;
    use crate::config::{Flows, Key, Ports};
    use crate::datapath::flows::{Handle, Record};
    use crate::desired::flows::{FlowClock, settings};
    use crate::desired::{Desired, Rule, RuleIds, Upstream};

    /// Returns a flow of upstream 2 that a client at port 40000 has made.
    fn record(state: u8) -> Record {
        let flow = types::flow {
            upstream: 2,
            created: 0,
            touched: 92,
            packets: 3,
            answers: 1,
            ports: [40_000, 53, 5353, 1024].map(u16::to_be),
            state,
            ..Default::default()
        };
        let addresses =
            ["10.0.3.2", "10.0.1.1", "10.0.2.2", "10.0.2.1"].map(|it| it.parse().unwrap());
        Record { handle: Handle::default(), flow, addresses }
    }

    fn desired(port: u16) -> (Desired, [RuleIds; 1]) {
        let vip: IpAddr = "10.0.1.1".parse().unwrap();
        let key = Key::new(vip, vec![Ports { first: 53, last: 53 }]);
        let address: IpAddr = "10.0.2.2".parse().unwrap();
        let upstream = Upstream { name: Some("a".into()), ..Upstream::new(address, Some(port)) };
        let rules = vec![Rule::new("dns", key, vec![upstream])];
        let ids = RuleIds { rule: 1, upstreams: vec![2], ..RuleIds::default() };
        (Desired { rules, ..Desired::default() }, [ids])
    }

    fn clock() -> FlowClock {
        FlowClock::new(settings(&Flows::default(), 1000, 9), 1000, 100)
    }

    #[test]
    fn records_become_flows() {
        let (desired, ids) = desired(5353);
        let names = Names::new((&desired, &ids));
        let flow = names.flow(&record(2), &clock()).unwrap();
        assert_eq!((flow.rule, flow.upstream, flow.id), (Some("dns"), Some("a"), Some(2)));
        assert_eq!(flow.client, "10.0.3.2:40000".parse().unwrap());
        assert_eq!(flow.vip, "10.0.1.1:53".parse().unwrap());
        assert_eq!(flow.server, "10.0.2.2:5353".parse().unwrap());
        assert_eq!(flow.egress, "10.0.2.1:1024".parse().ok());
        assert_eq!((flow.state, flow.packets, flow.answers), (FlowState::Answered, 3, 1));
        assert_eq!((flow.age, flow.idle, flow.left), (12.8, 1.024, 226.0 * 0.128));
        assert_eq!(names.flow(&record(0), &clock()), None);
        assert_eq!(names.flow(&record(4), &clock()), None, "it is being written");
        let late = FlowClock::new(settings(&Flows::default(), 1000, 9), 1000, 92 + 235);
        assert_eq!(names.flow(&record(2), &late), None, "it has expired");
        assert!(names.flow(&record(3), &late).is_some(), "assured flows live longer");
    }

    #[test]
    fn an_id_that_another_upstream_has_now_is_not_believed() {
        let (desired, ids) = desired(5354);
        let names = Names::new((&desired, &ids));
        let flow = names.flow(&record(2), &clock()).unwrap();
        assert_eq!((flow.rule, flow.upstream, flow.id), (None, None, None));
        let of_rule = Selection { upstreams: Some([2].into()), client: None };
        assert!(!of_rule.has(&flow) && Selection::default().has(&flow));
    }

    #[test]
    fn clients_with_and_without_port() {
        let (desired, ids) = desired(5353);
        let names = Names::new((&desired, &ids));
        let flow = names.flow(&record(1), &clock()).unwrap();
        for (client, has) in [
            ("10.0.3.2", true),
            ("10.0.3.2:40000", true),
            ("10.0.3.2:40001", false),
            ("10.0.3.3", false),
            ("2001:db8::1", false),
            ("[2001:db8::1]:40000", false),
        ] {
            let client: Client = client.parse().unwrap();
            let selection = Selection { upstreams: None, client: Some(client) };
            assert_eq!(selection.has(&flow), has, "{client:?}");
        }
        for wrong in ["", "host", "10.0.3.2:", "10.0.3.2:65536", "10.0.3.0/24"] {
            assert!(wrong.parse::<Client>().is_err(), "{wrong}");
        }
    }
}
