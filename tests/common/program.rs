//! The program, loaded but attached nowhere: one packet at a time by BPF_PROG_TEST_RUN.

use std::collections::BTreeMap;
use std::mem::{MaybeUninit, size_of};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapMut, OpenObject, ProgramInput};
use udplb::bpf::{Pod, UdplbSkel, UdplbSkelBuilder, VERDICTS, bytes_of, from_bytes, types};
use udplb::nexthop::{self, Way};
use udplb::plan::{Desired, Rule, RuleIds, assign_ids};
use udplb::tables::Tables;

/// Counters are read for ids below this; no configuration here gives more.
const IDS: u32 = 32;

/// Room in the maps of rules and upstreams, and in slots.
const ENTRIES: u32 = 64;
const SLOT_LINES: u32 = 2;

/// What the kernel is told of a packet besides its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Context {
    /// Where it came in.
    pub ifindex: u32,
    pub gso_size: u32,
    pub gso_segs: u32,
}

/// What became of a packet.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// What the program returned.
    pub action: i32,
    pub frame: Vec<u8>,
}

/// Packets and bytes by id and verdict, without those that are zero.
pub type Counted = BTreeMap<(u32, &'static str), (u64, u64)>;

pub struct Program<'object> {
    skeleton: UdplbSkel<'object>,
}

impl<'object> Program<'object> {
    pub fn load(object: &'object mut MaybeUninit<OpenObject>) -> Program<'object> {
        let mut skeleton = UdplbSkelBuilder::default().open(object).expect("the object opens");
        let maps = &mut skeleton.maps;
        for (map, entries) in [
            (&mut maps.rules, ENTRIES),
            (&mut maps.upstreams, ENTRIES),
            (&mut maps.slots, SLOT_LINES),
        ] {
            map.set_max_entries(entries).expect("the size of a map");
        }
        let skeleton = skeleton.load().expect("the program loads");
        let chunk = skeleton.maps.counters_chunk.as_fd().as_raw_fd();
        write(&skeleton.maps.counters, 0, &chunk.to_ne_bytes());
        Program { skeleton }
    }

    /// Puts one rule in the place of those that were there, forgets what was counted, and returns
    /// the rule's ids.
    pub fn configure(&self, rule: &Rule, ways: &BTreeMap<Ipv4Addr, Way>) -> RuleIds {
        let desired = Desired { interfaces: Vec::new(), rules: vec![rule.clone()] };
        let ids = assign_ids(&desired, &[], IDS).expect("ids suffice");
        let tables = Tables::new(&desired, &ids);
        let maps = &self.skeleton.maps;
        clear(&maps.rules);
        clear(&maps.nexthops);
        for (key, rule) in &tables.rules {
            maps.rules.update(bytes_of(key), bytes_of(rule), MapFlags::ANY).expect("a rule");
        }
        write_all(&maps.slots, &tables.slots);
        write_all(&maps.upstreams, &tables.upstreams);
        if !ways.is_empty() {
            let nexthops = MapHandle::try_from(&maps.nexthops).expect("a descriptor");
            nexthop::write(&nexthops, &desired, &ids, ways).expect("next hops");
        }
        self.reset();
        ids.into_iter().next().expect("the ids of the one rule")
    }

    /// Has every slot lead to an upstream that the map has no room for.
    pub fn lose_upstreams(&self) {
        let line = types::slot_line { upstream: [ENTRIES as u16; _] };
        write_all(&self.skeleton.maps.slots, &[line]);
    }

    /// Changes the entry that user space wrote for an upstream.
    pub fn change_nexthop(&self, id: u32, change: impl FnOnce(&mut types::nexthop)) {
        let map = &self.skeleton.maps.nexthops;
        let bytes = map.lookup(&id.to_ne_bytes(), MapFlags::ANY).expect("a lookup");
        let mut entry = bytes.and_then(|bytes| from_bytes(&bytes)).expect("an entry");
        change(&mut entry);
        write(map, id, bytes_of(&entry));
    }

    /// # Panics
    /// The kernel refuses to run it.
    pub fn run(&self, frame: &[u8], context: Context) -> Run {
        let mut room = vec![0; frame.len() + 256];
        let mut kernel_context = MaybeUninit::<types::__sk_buff>::zeroed();
        // SAFETY: all zeroes are a __sk_buff, and its padding stays zero.
        let context_in = unsafe {
            let fields = kernel_context.assume_init_mut();
            fields.ifindex = context.ifindex;
            fields.ingress_ifindex = context.ifindex;
            fields.gso_size = context.gso_size;
            fields.gso_segs = context.gso_segs;
            let bytes = kernel_context.as_mut_ptr().cast::<u8>();
            std::slice::from_raw_parts_mut(bytes, size_of::<types::__sk_buff>())
        };
        let input = ProgramInput {
            context_in: Some(context_in),
            data_in: Some(frame),
            data_out: Some(&mut room),
            ..Default::default()
        };
        let output = self.skeleton.progs.udplb.test_run(input).expect("the program runs");
        let frame = output.data.map(|data| data.to_vec()).unwrap_or_default();
        Run { action: output.return_value as i32, frame }
    }

    /// Over all CPUs.
    pub fn counted(&self) -> Counted {
        let mut counted = Counted::new();
        for id in 0..IDS {
            let chunk = &self.skeleton.maps.counters_chunk;
            let values = chunk.lookup_percpu(&id.to_ne_bytes(), MapFlags::ANY).expect("a lookup");
            for value in values.expect("counters") {
                let counters: types::counters = from_bytes(&value).expect("the contract's layout");
                for (verdict, name) in VERDICTS {
                    let counter = counters.of[verdict.0 as usize];
                    let sum = counted.entry((id, name)).or_default();
                    *sum = (sum.0 + counter.packets, sum.1 + counter.bytes);
                }
            }
        }
        counted.retain(|_, count| *count != (0, 0));
        counted
    }

    fn reset(&self) {
        let cpus = libbpf_rs::num_possible_cpus().expect("the number of CPUs");
        let zeroes = vec![bytes_of(&types::counters::default()).to_vec(); cpus];
        for id in 0..IDS {
            let chunk = &self.skeleton.maps.counters_chunk;
            chunk.update_percpu(&id.to_ne_bytes(), &zeroes, MapFlags::ANY).expect("an update");
        }
    }
}

fn write(map: &MapMut<'_>, key: u32, value: &[u8]) {
    let written = map.update(&key.to_ne_bytes(), value, MapFlags::ANY);
    written.unwrap_or_else(|error| panic!("{}[{key}]: {error}", map.name().display()));
}

fn write_all<T: Pod>(map: &MapMut<'_>, values: &[T]) {
    for (key, value) in values.iter().enumerate() {
        write(map, key as u32, bytes_of(value));
    }
}

fn clear(map: &MapMut<'_>) {
    for key in map.keys().collect::<Vec<_>>() {
        map.delete(&key).expect("an entry that was there");
    }
}
