//! The program under test, loaded and run on one packet at a time with BPF_PROG_TEST_RUN.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{
    MapCore, MapFlags, MapHandle, MapMut, MapType, OpenMap, ProgramInput, TC_INGRESS, TcHookBuilder,
};
use udplb::bpf::{
    NOTES, OpenUdplbSkel, Pod, UdplbSkel, VERDICTS, bytes_of, create, from_bytes, possible_cpus,
    types, wire,
};
use udplb::config::{
    Action, Address, Decap, Flows, Hash, Key, Mode, Ports, Source, State, Strategy, Via,
};
use udplb::datapath::gate::suspects;
use udplb::datapath::lease::ticks_per_second;
use udplb::datapath::nexthops;
use udplb::datapath::senders::{Record, read_table};
use udplb::datapath::spares::{self, Situation};
use udplb::desired::flows::{buckets, port_lines, settings};
use udplb::desired::key_table::{Hashing, Key4, Key6, tuning_of};
use udplb::desired::sender_tables::{self, SenderTable};
use udplb::desired::tables::{Tables, first_upstreams};
use udplb::desired::{Desired, Rule, RuleIds, Upstream, assign_ids};
use udplb::net::nexthop::NextHop;

use crate::common::wire::{TYPE, Tag};
use crate::packet::Mac;
use crate::prelude::{Change, FAILED, Prelude, TAG_CONTROL, TAG_PRESENT, TAG_PROTOCOL};

/// Number of ids used in each chunk of counters; no configuration here has more.
const IDS: u32 = 80;

/// Number of chunks of counters.
const CHUNKS: u32 = 2;

/// Sizes of the maps of rules and upstreams, and of the slots.
const ENTRIES: u32 = 256;
const SLOT_LINES: u32 = 3200;

/// Place of the entry of answers whose upstream is gone.
const ORPHANS: u32 = ENTRIES - 1;

/// Number of flows that have room, and of ports.
pub const FLOWS: u32 = 1024;
pub const PORTS: Ports = Ports { first: 10_000, last: 14_095 };

/// Returns the usual settings of the flows. The unit of time is that of the program, see [`Program::second`].
pub fn flows() -> Flows {
    Flows { entries: FLOWS, ports: PORTS, ..Flows::default() }
}

/// Returns the tables of a configuration that takes off outer headers of all kinds.
fn all_tunnels() -> Tables {
    let decap = Some(Decap { from: Vec::new(), via: vec![Via::Ipip, Via::Gue] });
    Tables::new(&Desired { decap, ..Desired::default() }, &[])
}
/// Number of rules that can count their senders.
const SENDER_TABLES: u32 = 8;

/// Number of lines of each table of keys.
const LINES: u32 = 256;

/// MAC address of VLAN devices; differs from the interface's.
pub const VLAN_MAC: Mac = [2, 0, 0, 0, 3, 1];

/// Kernel seconds per second of the program's clock; gives busy machines more time.
pub const SECONDS: u32 = 10;

/// Metadata of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Ingress interface.
    pub ifindex: u32,
    pub gso_size: u32,
    pub gso_segs: u32,
    pub tag: Option<Tag>,
    /// Length to which the frame is truncated.
    pub length: Option<usize>,
}

/// Result of a run.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// Return value of the program.
    pub action: i32,
    pub frame: Vec<u8>,
    pub tag: Option<Tag>,
}

/// Packets and bytes by id and verdict; zero counters are omitted.
pub type Counted = BTreeMap<(u32, &'static str), (u64, u64)>;

pub struct Program<'object> {
    skeleton: UdplbSkel<'object>,
    chunks: [MapHandle; CHUNKS as usize],
    /// Tables of the rules that count their senders.
    sender_tables: RefCell<Vec<MapHandle>>,
    prelude: Prelude,
    /// Preludes loaded so far.
    preludes: RefCell<HashMap<Change, OwnedFd>>,
    hashing: Hashing<Key4>,
    hashing6: Hashing<Key6>,
    /// Addresses of this host.
    own: RefCell<Vec<IpAddr>>,
    configured: RefCell<(Desired, Vec<RuleIds>)>,
    flows: Flows,
    /// One second of the program in units of [`Program::jiffies`].
    pub second: u32,
}

impl<'object> Program<'object> {
    /// Loads the program with settings of the flows; a second of its clock takes so many seconds.
    pub fn load(
        mut skeleton: OpenUdplbSkel<'object>,
        flows: Flows,
        seconds: u32,
    ) -> Program<'object> {
        let second = seconds * ticks_per_second().expect("the kernel's clock");
        let maps = &mut skeleton.maps;
        let constants = maps.rodata_data.as_deref_mut().expect("constants");
        constants.features.ticks_per_second = second;
        constants.features.xdp = 1;
        constants.features.lines = ENTRIES;
        constants.flow_settings = settings(&flows, second, ORPHANS);
        constants.decap_settings = all_tunnels().decap;
        constants.sender_settings = sender_tables::settings(second);
        let mut seeds = (1..).map(|number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut seed = || seeds.next().expect("a seed");
        let hashing = Hashing::new(LINES as usize, &mut seed);
        let hashing6 = Hashing::new(LINES as usize, &mut seed);
        constants.tuning = tuning_of(&hashing, &hashing6);
        for (map, entries) in [
            (&mut maps.rules, ENTRIES),
            (&mut maps.table, hashing.size() as u32),
            (&mut maps.table6, hashing6.size() as u32),
            (&mut maps.senders, ENTRIES),
            (&mut maps.addresses, ENTRIES),
            (&mut maps.answers, ENTRIES),
            (&mut maps.origins, ENTRIES),
            (&mut maps.indexes, ENTRIES),
            (&mut maps.servers, ENTRIES),
            (&mut maps.flows, buckets(&flows)),
            (&mut maps.flows6, buckets(&flows)),
            (&mut maps.ports, port_lines(&flows)),
            (&mut maps.ports6, port_lines(&flows)),
            (&mut maps.upstreams, ENTRIES),
            (&mut maps.destinations, ENTRIES),
            (&mut maps.spares, ENTRIES),
            (&mut maps.samples, ENTRIES),
            (&mut maps.lines, ENTRIES * possible_cpus().expect("CPUs")),
            (&mut maps.slots, SLOT_LINES),
        ] {
            map.set_max_entries(entries).expect("the size of a map");
        }
        let chunks = [0; CHUNKS as usize].map(|_| counters_chunk(&maps.counters_chunk));
        // before kernel 6.2, an inner map with type information differs from one without
        maps.counters.set_inner_map_fd(chunks[0].as_fd()).expect("a model of the chunks");
        maps.sender_tables.set_max_entries(SENDER_TABLES).expect("the size of a map");
        let model = create(&maps.sender_buckets, None).expect("a table of senders");
        maps.sender_tables.set_inner_map_fd(model.as_fd()).expect("a model of the tables");
        let skeleton = skeleton.load().expect("the program loads");
        for (index, chunk) in (0..).zip(&chunks) {
            write(&skeleton.maps.counters, index, &chunk.as_fd().as_raw_fd().to_ne_bytes());
        }
        let chunk = skeleton.maps.nexthops_chunk.as_fd().as_raw_fd();
        write(&skeleton.maps.nexthops, 0, &chunk.to_ne_bytes());
        let prelude = Prelude::new(skeleton.progs.udplb.as_fd());
        let preludes = RefCell::default();
        let (own, configured) = (RefCell::default(), RefCell::default());
        let sender_tables = RefCell::default();
        Program {
            skeleton,
            chunks,
            sender_tables,
            prelude,
            preludes,
            hashing,
            hashing6,
            own,
            configured,
            flows,
            second,
        }
    }

    /// Creates empty tables of senders.
    fn write_sender_tables(&self, tables: &[SenderTable]) {
        let maps = &self.skeleton.maps;
        let flags = libbpf_sys::BPF_F_MMAPABLE | libbpf_sys::BPF_F_INNER_MAP;
        let options = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
            map_flags: flags,
            ..Default::default()
        };
        let value = size_of::<types::sender_bucket>() as u32;
        let table = |table: &SenderTable| {
            let name = Some("senders");
            MapHandle::create(MapType::Array, name, 4, value, table.buckets(), &options)
                .expect("a table of senders")
        };
        let all: Vec<MapHandle> = tables.iter().map(table).collect();
        for (index, table) in (0..).zip(&all) {
            write(&maps.sender_tables, index, &table.as_fd().as_raw_fd().to_ne_bytes());
        }
        *self.sender_tables.borrow_mut() = all;
    }

    /// Returns the senders in a table of a family, by address; refused ones last.
    pub fn senders(&self, table: usize, ipv6: bool) -> Vec<Record> {
        let mut senders = Vec::new();
        let tables = self.sender_tables.borrow();
        read_table(&tables[table], self.secret()[1], ipv6, |it| senders.push(it)).expect("senders");
        senders.sort_by_key(|it| (it.refused, it.address));
        senders
    }

    /// Makes all senders in a table so many seconds older.
    pub fn age_senders(&self, table: usize, seconds: u32) {
        let beats = (seconds * self.second) >> settings(&self.flows, self.second, 0).beat_shift;
        let table = &self.sender_tables.borrow()[table];
        for index in 0..table.max_entries() {
            let key = index.to_ne_bytes();
            let bytes = table.lookup(&key, MapFlags::ANY).expect("a lookup").expect("a bucket");
            let mut bucket: types::sender_bucket = from_bytes(&bytes).expect("a bucket");
            for time in bucket.first.iter_mut().chain(&mut bucket.last) {
                *time = time.wrapping_sub(beats);
            }
            table.update(&key, bytes_of(&bucket), MapFlags::ANY).expect("an update");
        }
    }

    /// Writes this host's addresses, each with true for a broadcast address.
    pub fn set_own(&self, addresses: &[(IpAddr, bool)]) {
        for (address, broadcast) in addresses {
            let key = types::key_address { words: wire(*address) };
            write_pairs(&self.skeleton.maps.own, &[(key, 1 + u32::from(*broadcast))]);
        }
        *self.own.borrow_mut() = addresses.iter().map(|(address, _)| *address).collect();
    }

    /// Sets the VLANs of an interface: the accepted tags, outermost first.
    pub fn set_vlans(&self, ifindex: u32, paths: &[&[(u16, u16)]]) {
        const FIRST: u32 = 1_000_000;
        let place = |path: &[(u16, u16)]| match path {
            [] => ifindex,
            path => {
                let place = paths.iter().position(|it| *it == path).expect("what it is within");
                FIRST + place as u32
            }
        };
        for path in paths {
            let (inner, outer) = path.split_last().expect("a tag");
            let (protocol, id) = *inner;
            let key = types::vlan_key { ifindex: place(outer), protocol: protocol.to_be(), id };
            let vlan = types::vlan { ifindex: place(path), mac: VLAN_MAC, unused: 0 };
            write_pairs(&self.skeleton.maps.vlans, &[(key, vlan)]);
        }
    }

    /// Invalidates all lines, as each writer of what the slow path reads does.
    pub fn advance(&self) {
        self.change_gate(|gate| gate.epoch += 1);
    }

    fn change_gate(&self, change: impl FnOnce(&mut types::gate)) {
        let map = &self.skeleton.maps.bss_gate;
        let bytes = map.lookup(&[0; 4], MapFlags::ANY).expect("a lookup");
        let mut gate: types::gate = bytes.and_then(|bytes| from_bytes(&bytes)).expect("a gate");
        change(&mut gate);
        write(map, 0, bytes_of(&gate));
    }

    fn write_spares(&self, situation: &Situation) {
        let (desired, ids) = &*self.configured.borrow();
        let rules = desired.rules.iter().zip(ids).zip(first_upstreams(desired));
        for ((rule, ids), first) in rules.filter(|((rule, _), _)| rule.mode == Mode::Balance) {
            for (index, spare) in (first..).zip(spares::table(first, rule, ids, &[situation])) {
                write(&self.skeleton.maps.spares, index, bytes_of(&spare));
            }
        }
    }

    /// Replaces all rules by one rule behind a decoy and returns the rule's ids; the first assigned id
    /// is the one after `first_id`.
    pub fn configure(
        &self,
        rule: &Rule,
        ways: &BTreeMap<Address, NextHop>,
        first_id: u32,
    ) -> RuleIds {
        let rules = vec![decoy(), rule.clone()];
        self.configure_all(&Desired { rules, ..Desired::default() }, ways, first_id)
            .pop()
            .expect("the ids of the rule")
    }

    /// Replaces all rules by those of a configuration and returns their ids.
    pub fn configure_all(
        &self,
        desired: &Desired,
        ways: &BTreeMap<Address, NextHop>,
        first_id: u32,
    ) -> Vec<RuleIds> {
        let mut ids = assign_ids(desired, &[], IDS).expect("ids suffice");
        for ids in &mut ids {
            ids.rule += first_id;
            let hosts = ids.upstreams.iter_mut().chain(&mut ids.mirrors);
            hosts.chain(&mut ids.answers).for_each(|id| *id += first_id);
        }
        self.configure_with(desired, ways, ids)
    }

    /// Replaces all rules, as `apply` does: what was configured before keeps its ids. Returns the ids.
    pub fn reconfigure(
        &self,
        desired: &Desired,
        ways: &BTreeMap<Address, NextHop>,
    ) -> Vec<RuleIds> {
        let (before, known) = self.configured.borrow().clone();
        let ids = assign_ids(desired, &[(&before, &known)], IDS).expect("ids suffice");
        self.configure_with(desired, ways, ids)
    }

    fn configure_with(
        &self,
        desired: &Desired,
        ways: &BTreeMap<Address, NextHop>,
        ids: Vec<RuleIds>,
    ) -> Vec<RuleIds> {
        let tables = Tables::new(desired, &ids);
        let maps = &self.skeleton.maps;
        clear(&maps.senders);
        clear(&maps.addresses);
        clear(&maps.destinations);
        clear(&maps.path_mtus);
        clear(&maps.answers);
        clear(&maps.origins);
        clear(&maps.indexes);
        clear(&maps.servers);
        self.forget_fragments();
        // refill the error budgets; forget_fragments() moved all senders to other buckets
        for kind in 0..4 {
            write(&maps.budget, kind, &[0; size_of::<types::budget>()]);
        }
        let sampled = size_of::<types::sampled>();
        write_bytes(&maps.samples, sampled, &vec![0; ENTRIES as usize * sampled]);
        write_bytes(&maps.overrides, 8, &[0; 8 * IDS.div_ceil(32) as usize]);
        write_all(&maps.nexthops_chunk, &[types::nexthop_slot::default(); IDS as usize]);
        self.lease(false);
        write_all(&maps.rules, &tables.rules);
        write_all(&maps.table, &self.hashing.fill(&tables.keys).expect("room for the keys"));
        write_all(&maps.table6, &self.hashing6.fill(&tables.keys6).expect("room for the keys"));
        write_pairs(&maps.senders, &tables.senders);
        write_pairs(&maps.addresses, &tables.addresses);
        write_pairs(&maps.destinations, &tables.destinations);
        write_pairs(&maps.answers, &tables.answers);
        write_pairs(&maps.origins, &tables.origins);
        write_pairs(&maps.indexes, &tables.indexes);
        write_pairs(&maps.servers, &tables.servers);
        self.write_sender_tables(&tables.sender_tables);
        let answering = desired.upstreams().map(|upstream| upstream.address.ip);
        let suspects = suspects(self.own.borrow().iter().copied().chain(answering));
        self.change_gate(|gate| gate.suspects.copy_from_slice(&suspects));
        *self.configured.borrow_mut() = (desired.clone(), ids.clone());
        self.write_spares(&Situation::default());
        write_all(&maps.slots, &tables.slots);
        write_all(&maps.upstreams, &tables.upstreams);
        if let Some(orphans) = tables.upstreams.get(tables.orphans as usize) {
            write(&maps.upstreams, ORPHANS, bytes_of(orphans));
        }
        if !ways.is_empty() {
            for (id, entry) in nexthops::entries(desired, &ids, |target| ways.get(&target.address))
            {
                let slot = types::nexthop_slot { copies: [entry; 2], ..Default::default() };
                write(&maps.nexthops_chunk, id, bytes_of(&slot));
            }
        }
        self.advance();
        ids
    }

    /// Changes the hash secret, so that recorded fragments and senders of errors are not found again.
    pub fn forget_fragments(&self) {
        let mut sequences = self.sequences();
        sequences.secret[0] += 1;
        write(&self.skeleton.maps.sequences, 0, bytes_of(&sequences));
    }

    fn sequences(&self) -> types::sequences {
        let map = &self.skeleton.maps.sequences;
        let bytes = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY).expect("a lookup");
        bytes.and_then(|bytes| from_bytes(&bytes)).expect("sequences")
    }

    /// Returns the secret that hashes the keys of first fragments.
    pub fn secret(&self) -> [u64; 2] {
        self.sequences().secret
    }

    /// Returns the keys of all recorded first fragments.
    pub fn fragment_keys(&self) -> Vec<u64> {
        let keys = self.skeleton.maps.fragments.keys();
        keys.map(|key| u64::from_ne_bytes(key.try_into().expect("eight bytes"))).collect()
    }

    /// Attaches the program to the ingress of an interface.
    pub fn attach(&self, ifindex: u32) {
        let mut hook = TcHookBuilder::new(self.program());
        let mut hook = hook.ifindex(ifindex as i32).handle(1).priority(1).hook(TC_INGRESS);
        hook.create().and_then(|mut hook| hook.attach()).expect("the program attached");
    }

    pub fn program(&self) -> BorrowedFd<'_> {
        self.skeleton.progs.udplb.as_fd()
    }

    /// Sets the override of one upstream, as `drain` and `enable` do, and clears the others.
    pub fn override_state(&self, id: u32, drained: bool) {
        let [index, shift] = [id / 32, id % 32 * 2];
        let state: u64 = if drained { 1 } else { 2 };
        let said = if drained { State::Drained } else { State::Active };
        let overrides = [(id, said)].into();
        self.write_spares(&Situation { overrides, ..Situation::default() });
        write(&self.skeleton.maps.overrides, index, &(state << shift).to_ne_bytes());
        self.advance();
    }

    /// Spends the budgets of ICMP errors. Their fill time lies in the future, as if another CPU had
    /// read a later time than the next packet's.
    pub fn spend_errors(&self) {
        let filled = u64::MAX / 2;
        let budget = [&[0; 8], &filled.to_ne_bytes()[..]].concat();
        for kind in 0..2 {
            write(&self.skeleton.maps.budget, kind, &budget);
        }
    }

    /// Returns the current time of the program's clock.
    pub fn jiffies(&self) -> u32 {
        test_run(self.skeleton.progs.udplb_heartbeat.as_fd(), &[0; 64], Context::default());
        let bytes = self.skeleton.maps.heartbeat.lookup(&[0; 4], MapFlags::ANY).expect("a lookup");
        let beat: Option<types::heartbeat> = bytes.and_then(|bytes| from_bytes(&bytes));
        self.lease(false);
        beat.expect("a heartbeat").until as u32
    }

    /// Fills the ring of first fragments with entries of time `since`.
    pub fn fill_fragments(&self, since: u32) {
        let map = &self.skeleton.maps.fragment_ring;
        let place = [&[0xff; 8][..], &since.to_ne_bytes(), &1_u32.to_ne_bytes()].concat();
        write_bytes(map, place.len(), &place.repeat(map.max_entries() as usize));
    }

    /// Makes the next first fragment reuse the ring's first slot, last used at time `since`.
    pub fn turn_fragments(&self, since: u32) {
        let (sequences, ring) = (&self.skeleton.maps.sequences, &self.skeleton.maps.fragment_ring);
        for (map, at, value) in [(sequences, 4, 0), (ring, 8, since)] {
            let mut bytes = map.lookup(&[0; 4], MapFlags::ANY).expect("a lookup").expect("a value");
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            write(map, 0, &bytes);
        }
    }

    /// Sets the arrival time of all recorded first fragments.
    pub fn age_fragments(&self, since: u32) {
        let map = &self.skeleton.maps.fragments;
        for key in map.keys().collect::<Vec<_>>() {
            let mut entry = map.lookup(&key, MapFlags::ANY).expect("a lookup").expect("an entry");
            entry[4..8].copy_from_slice(&since.to_ne_bytes());
            map.update(&key, &entry, MapFlags::ANY).expect("an update");
        }
    }

    /// Returns the number of first fragments in the table.
    pub fn fragments(&self) -> usize {
        self.skeleton.maps.fragments.keys().count()
    }

    /// Makes all flows, and the uses of ports, so many seconds older.
    pub fn age_flows(&self, seconds: u32) {
        let settings = settings(&self.flows, self.second, ORPHANS);
        self.age_flows_by((seconds * self.second) >> settings.beat_shift);
    }

    /// Does the same by so many beats of the program's clock, which goes round.
    pub fn age_flows_by(&self, beats: u32) {
        const HINT_BITS: u32 = 22;
        self.change_flows(|touched, flow| {
            *touched = touched.wrapping_sub(beats);
            for time in [&mut flow.created, &mut flow.touched, &mut flow.chosen] {
                *time = time.wrapping_sub(beats);
            }
        });
        let maps = &self.skeleton.maps;
        for map in [&maps.ports, &maps.ports6] {
            for index in 0..port_lines(&self.flows) {
                let bytes = map.lookup(&index.to_ne_bytes(), MapFlags::ANY).expect("a lookup");
                let mut line: types::port_line =
                    bytes.and_then(|bytes| from_bytes(&bytes)).expect("a line");
                for hint in line.hints.iter_mut().filter(|hint| **hint != 0) {
                    *hint = hint.wrapping_sub(beats << HINT_BITS);
                }
                write(map, index, bytes_of(&line));
            }
        }
    }

    /// Returns the sum of the versions of all flows of IPv4.
    pub fn flow_versions(&self) -> u64 {
        let mut sum = 0;
        for index in 0..buckets(&self.flows) {
            let bytes = self.skeleton.maps.flows.lookup(&index.to_ne_bytes(), MapFlags::ANY);
            let bytes = bytes.expect("a lookup").expect("a bucket");
            let bucket: types::flow_bucket = from_bytes(&bytes).expect("a bucket");
            sum += bucket.flows.iter().map(|it| u64::from(it.flow.version)).sum::<u64>();
        }
        sum
    }

    /// Ends all flows, and forgets the uses of ports.
    pub fn clear_flows(&self) {
        let maps = &self.skeleton.maps;
        let buckets = buckets(&self.flows) as usize;
        write_all(&maps.flows, &vec![types::flow_bucket::default(); buckets]);
        write_all(&maps.flows6, &vec![types::flow_bucket6::default(); buckets]);
        for map in [&maps.ports, &maps.ports6] {
            write_all(map, &vec![types::port_line::default(); port_lines(&self.flows) as usize]);
        }
    }

    /// Returns the states of all flows.
    pub fn flow_states(&self) -> Vec<u8> {
        let mut states = Vec::new();
        self.change_flows(|_, flow| states.push(flow.state));
        states.retain(|state| *state != 0);
        states
    }

    /// Passes each flow to `change`, with its time in the bucket.
    fn change_flows(&self, mut change: impl FnMut(&mut u32, &mut types::flow)) {
        let maps = &self.skeleton.maps;
        for index in 0..buckets(&self.flows) {
            let read = |map: &MapMut<'_>| {
                map.lookup(&index.to_ne_bytes(), MapFlags::ANY)
                    .expect("a lookup")
                    .expect("a bucket")
            };
            let mut bucket: types::flow_bucket = from_bytes(&read(&maps.flows)).expect("a bucket");
            for (touched, flow) in bucket.touched.iter_mut().zip(&mut bucket.flows) {
                change(touched, &mut flow.flow);
            }
            write(&maps.flows, index, bytes_of(&bucket));
            let mut bucket: types::flow_bucket6 =
                from_bytes(&read(&maps.flows6)).expect("a bucket");
            for (touched, flow) in bucket.touched.iter_mut().zip(&mut bucket.flows) {
                change(touched, &mut flow.flow);
            }
            write(&maps.flows6, index, bytes_of(&bucket));
        }
    }

    /// Returns the recorded path MTUs by upstream address.
    pub fn path_mtus(&self) -> BTreeMap<[u32; 4], u32> {
        let map = &self.skeleton.maps.path_mtus;
        let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().expect("four bytes"));
        let noted = |key: Vec<u8>| {
            let value = map.lookup(&key, MapFlags::ANY).expect("a lookup").expect("an entry");
            let address: Vec<u32> = key.chunks(4).map(word).collect();
            (address.try_into().expect("four words"), word(&value[8..12]))
        };
        map.keys().map(noted).collect()
    }

    /// Ages the recorded path MTUs by this number of jiffies.
    pub fn age_path_mtus(&self, jiffies: u32) {
        let map = &self.skeleton.maps.path_mtus;
        for key in map.keys().collect::<Vec<_>>() {
            let mut value = map.lookup(&key, MapFlags::ANY).expect("a lookup").expect("an entry");
            let until = u64::from_ne_bytes(value[..8].try_into().expect("eight bytes"));
            value[..8].copy_from_slice(&(until - u64::from(jiffies)).to_ne_bytes());
            map.update(&key, &value, MapFlags::ANY).expect("an update");
        }
    }

    /// Points every slot at an index beyond the map of upstreams.
    pub fn lose_upstreams(&self) {
        let line = types::slot_line { upstream: [ENTRIES as u16; _] };
        write_all(&self.skeleton.maps.slots, &[line; SLOT_LINES as usize]);
        self.advance();
    }

    /// Changes an upstream's next hop as written by user space.
    pub fn change_nexthop(&self, id: u32, change: impl FnOnce(&mut types::nexthop)) {
        self.change_nexthop_quietly(id, change);
        self.advance();
    }

    /// Changes it without a step of the epoch.
    pub fn change_nexthop_quietly(&self, id: u32, change: impl FnOnce(&mut types::nexthop)) {
        let map = &self.skeleton.maps.nexthops_chunk;
        let bytes = map.lookup(&id.to_ne_bytes(), MapFlags::ANY).expect("a lookup");
        let mut slot: types::nexthop_slot =
            bytes.and_then(|bytes| from_bytes(&bytes)).expect("an entry");
        // with an odd sequence, readers must use the second copy
        slot.sequence = 1;
        slot.copies[0] = types::nexthop::default();
        change(&mut slot.copies[1]);
        write(map, id, bytes_of(&slot));
    }

    /// Returns true if this CPU has a line of the current epoch.
    pub fn remembers(&self) -> bool {
        let mut epoch = 0;
        self.change_gate(|gate| epoch = gate.epoch);
        let lines = &self.skeleton.maps.lines;
        let is_valid =
            |line: &[u8]| from_bytes(line).is_some_and(|it: types::line| it.epoch == epoch);
        lines.keys().any(|key| {
            let line = lines.lookup(&key, MapFlags::ANY).expect("a lookup");
            is_valid(&line.expect("a line"))
        })
    }

    /// Returns true if the slow path has counted a packet since the counters were taken: it notes the time of each
    /// packet that it forwards.
    pub fn took_slow_path(&self) -> bool {
        self.counters().any(|(_, chunk, index)| {
            let value = chunk.lookup(&index.to_ne_bytes(), MapFlags::ANY).expect("a lookup");
            value.expect("counters").iter().any(|byte| *byte != 0)
        })
    }

    /// Grants or ends arpd's lease.
    pub fn lease(&self, holds: bool) {
        let until = if holds { u64::MAX / 2 } else { 0 };
        let beat = types::heartbeat { until, until_ktime: 0 };
        write(&self.skeleton.maps.heartbeat, 0, bytes_of(&beat));
        self.advance();
    }

    /// # Panics
    /// If the kernel refuses the run.
    pub fn run(&self, frame: &[u8], context: Context) -> Run {
        let tagged = matches!(frame[TYPE..], [0x81, 0, ..] | [0x88, 0xa8, ..]);
        if context.tag.is_none() && context.length.is_none() && !tagged {
            return test_run(self.skeleton.progs.udplb.as_fd(), frame, context);
        }
        let change = (context.length, context.tag);
        let mut preludes = self.preludes.borrow_mut();
        let prelude = preludes.entry(change).or_insert_with(|| self.prelude.load(change));
        let run = test_run(prelude.as_fd(), frame, context);
        assert_ne!(run.action, FAILED, "the prelude with {context:?}");
        match run.tag {
            // a tag in the metadata is equivalent to one in the bytes
            Some(tag) if context.tag.is_none() => {
                Run { frame: tag.put_into(run.frame), tag: None, ..run }
            }
            _ => run,
        }
    }

    /// Sets what the XDP program knows of a device.
    pub fn set_device(&self, ifindex: u32, device: types::device) {
        write_pairs(&self.skeleton.maps.devices, &[(ifindex, device)]);
    }

    /// Begins a trace.
    pub fn trace(&self) {
        let trace = types::trace { until: u64::MAX, ..Default::default() };
        write(&self.skeleton.maps.bss_tracing, 0, bytes_of(&trace));
        self.advance();
    }

    pub fn end_trace(&self) {
        write(&self.skeleton.maps.bss_tracing, 0, bytes_of(&types::trace::default()));
        self.advance();
    }

    /// Runs the XDP program on a frame, as if loopback had received it.
    pub fn run_xdp(&self, frame: &[u8]) -> Run {
        let mut room = vec![0; frame.len()];
        let input = ProgramInput {
            data_in: Some(frame),
            data_out: Some(&mut room),
            ..ProgramInput::default()
        };
        let output = self.skeleton.progs.udplb_xdp.test_run(input).expect("a run");
        Run { action: output.return_value as i32, frame: room, tag: None }
    }

    /// Returns the counters since the last call, summed over all CPUs.
    pub fn take_counted(&self) -> Counted {
        let mut counted = Counted::new();
        let zero = types::counters::default();
        for (id, chunk, index) in self.counters() {
            let key = index.to_ne_bytes();
            let value = chunk.lookup(&key, MapFlags::ANY).expect("a lookup").expect("counters");
            if value.iter().all(|byte| *byte == 0) {
                continue;
            }
            let counters: types::counters = from_bytes(&value).expect("the contract's layout");
            for (verdict, name) in VERDICTS.into_iter().chain(NOTES) {
                let types::counter { packets, bytes } = counters.of[verdict.0 as usize];
                counted.insert((id, name), (packets, bytes));
            }
            chunk.update(&key, bytes_of(&zero), MapFlags::ANY).expect("an update");
        }
        self.take_lines(&mut counted);
        counted.retain(|_, count| *count != (0, 0));
        counted
    }

    /// Adds what the lines of the upstreams have counted since the last call.
    fn take_lines(&self, counted: &mut Counted) {
        let (_, ids) = &*self.configured.borrow();
        let answers = ids.iter().flat_map(|ids| ids.answers.iter().copied());
        let all = ids.iter().flat_map(RuleIds::destinations).chain(answers);
        let map = &self.skeleton.maps.lines;
        for (index, id) in (0_u32..).zip(all) {
            for at in (index..map.max_entries()).step_by(ENTRIES as usize) {
                let key = at.to_ne_bytes();
                let value = map.lookup(&key, MapFlags::ANY).expect("a lookup").expect("a line");
                let mut line: types::line = from_bytes(&value).expect("the contract's layout");
                let sum = counted.entry((id, "forwarded")).or_default();
                *sum = (sum.0 + line.packets, sum.1 + line.bytes);
                (line.packets, line.bytes) = (0, 0);
                write(map, at, bytes_of(&line));
            }
        }
    }

    /// Returns each id with the map and index of its counters.
    fn counters(&self) -> impl Iterator<Item = (u32, &MapHandle, u32)> {
        (0..).zip(&self.chunks).flat_map(|(chunk, map)| {
            (0..IDS).map(move |index| (chunk * map.max_entries() + index, map, index))
        })
    }
}

/// Creates a map with the program's inner map as template.
fn counters_chunk(model: &OpenMap<'_>) -> MapHandle {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    let (key, value, entries) = (model.key_size(), model.value_size(), model.max_entries());
    MapHandle::create(model.map_type(), Some("counters"), key, value, entries, &options)
        .expect("a chunk of counters")
}

/// Returns a rule that no packet matches; its entries come first in each map.
fn decoy() -> Rule {
    let address = Ipv4Addr::new(192, 0, 2, 1);
    let upstream = |port| Upstream::new(address, Some(port));
    let key = Key::new(address, vec![Ports { first: 2055, last: 2055 }]);
    Rule {
        action: Action::Block,
        strategy: Strategy::SrcPort,
        hash: Hash::Modulo,
        source: Source::Preserve,
        ..Rule::new("decoy", key, (1..=3).map(upstream).collect())
    }
}

/// Runs a program on a frame.
pub fn test_run(program: BorrowedFd<'_>, frame: &[u8], context: Context) -> Run {
    // built in place: the kernel refuses nonzero bytes in the other fields, padding included
    let mut came = MaybeUninit::<types::__sk_buff>::zeroed();
    let mut gone = MaybeUninit::<types::__sk_buff>::zeroed();
    // SAFETY: all zeroes are a __sk_buff.
    let fields = unsafe { came.assume_init_mut() };
    fields.ifindex = context.ifindex;
    fields.gso_size = context.gso_size;
    fields.gso_segs = context.gso_segs;
    let mut room = vec![0; frame.len() + 256];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: room.as_mut_ptr().cast(),
        data_size_out: room.len() as u32,
        ctx_in: came.as_ptr().cast(),
        ctx_size_in: size_of::<types::__sk_buff>() as u32,
        ctx_out: gone.as_mut_ptr().cast(),
        ctx_size_out: size_of::<types::__sk_buff>() as u32,
        ..Default::default()
    };
    // SAFETY: the buffers are of the lengths given, and outlive the call.
    let error =
        unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &raw mut options) };
    assert_eq!(error, 0, "{}", std::io::Error::from_raw_os_error(-error));
    room.truncate(options.data_size_out as usize);
    // SAFETY: any bytes that the kernel wrote are a __sk_buff.
    let report = unsafe { gone.assume_init_ref() }.cb;
    let tag = (report[TAG_PRESENT] != 0).then_some(Tag {
        protocol: u16::from_be(report[TAG_PROTOCOL] as u16),
        control: report[TAG_CONTROL] as u16,
    });
    Run { action: options.retval as i32, frame: room, tag }
}

fn write(map: &MapMut<'_>, key: u32, value: &[u8]) {
    let written = map.update(&key.to_ne_bytes(), value, MapFlags::ANY);
    written.unwrap_or_else(|error| panic!("{}[{key}]: {error}", map.name().display()));
}

fn write_all<T: Pod>(map: &MapMut<'_>, values: &[T]) {
    let values: Vec<u8> = values.iter().flat_map(bytes_of).copied().collect();
    write_bytes(map, size_of::<T>(), &values);
}

/// Writes concatenated raw values of the given size.
fn write_bytes(map: &MapMut<'_>, size: usize, values: &[u8]) {
    let count = (values.len() / size) as u32;
    let keys: Vec<u8> = (0..count).flat_map(u32::to_ne_bytes).collect();
    if count > 0 {
        let written = map.update_batch(&keys, values, count, MapFlags::ANY, MapFlags::ANY);
        written.unwrap_or_else(|error| panic!("{}: {error}", map.name().display()));
    }
}

fn write_pairs<K: Pod, V: Pod>(map: &MapMut<'_>, pairs: &[(K, V)]) {
    for (key, value) in pairs {
        let written = map.update(bytes_of(key), bytes_of(value), MapFlags::ANY);
        written.unwrap_or_else(|error| panic!("{}: {error}", map.name().display()));
    }
}

fn clear(map: &MapMut<'_>) {
    for key in map.keys().collect::<Vec<_>>() {
        map.delete(&key).expect("an entry that was there");
    }
}
