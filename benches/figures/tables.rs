//! Build time of Maglev tables, and the kernel memory of the tables and counters.

use std::fmt::Write;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use libbpf_rs::{MapCore, MapFlags, MapHandle};

use udplb::bpf::possible_cpus;
use udplb::maglev::{Member, size, table};

use crate::common::{Bpffs, Namespace};
use crate::relay::{apply, open_state};
use crate::{Report, least};

const ROUNDS: usize = 5;

pub fn measure(report: &mut Report) {
    report.title("Maglev tables");
    let mut compare = |what, tables, members, weight, limit| {
        let [time] = least(ROUNDS, |_| time(tables, members, weight));
        report.at_most(what, "", time, " ms", limit);
    };
    compare("1,000 of 10 upstreams, 10,007 slots each", 1000, 10, 1, 300.0);
    compare("one of 100 upstreams, 1,000,003 slots", 1, 100, 100, 1000.0);
    memory(report);
}

/// Reports the memory of 1,000 rules with 10 upstreams each, all distinct.
fn memory(report: &mut Report) {
    let (relay, upstream) = (Namespace::new(), Namespace::new());
    for (here, there, net) in [("in0", "in1", 1), ("out0", "out1", 2)] {
        relay.link(here, &upstream, there, true);
        relay.ip(&format!("address add 10.0.{net}.1/24 dev {here}"));
    }
    relay.ip("neighbour add 10.0.2.2 lladdr 02:00:00:00:00:02 dev out0 nud permanent");
    relay.ip("route add 10.1.0.0/16 via 10.0.2.2");
    let mut rules = String::from("version: 1\ninterfaces: [in0]\nrules:\n");
    for rule in 0..1000_u16 {
        let upstreams: Vec<String> = (rule * 10..rule * 10 + 10)
            .map(|number| {
                let [high, low] = number.to_be_bytes();
                format!("{{ address: 10.1.{high}.{low} }}")
            })
            .collect();
        let port = 10_000 + rule;
        let _ = writeln!(
            rules,
            "  - key: {{ address: 10.0.1.1, port: {port} }}\n    upstream: [{}]",
            upstreams.join(", ")
        );
    }
    let bpffs = Bpffs::new();
    apply(&relay, &bpffs, &rules);
    let slots = MapHandle::from_pinned_path(bpffs.pins().join("generations/1/slots"));
    let slots = megabytes([slots.expect("slots")]);
    report.title("Memory of 1,000 rules of 10 distinct upstreams each");
    report.at_most("slots", "", slots, " MB", 25.0);
    let chunks = |name| megabytes(inner(&open_state(&bpffs, name)));
    let lines = MapHandle::from_pinned_path(bpffs.pins().join("generations/1/lines"));
    let cpus = possible_cpus().expect("CPUs");
    let lines = megabytes([lines.expect("lines")]) / f64::from(cpus);
    report.note("counters of all but forwarded packets", &format!("{:.1} MB", chunks("counters")));
    report.note(&format!("lines, for each of {cpus} CPUs"), &format!("{lines:.1} MB"));
    report.note("next hops", &format!("{:.1} MB", chunks("nexthops")));
}

/// Returns the maps in a map of maps.
fn inner(outer: &MapHandle) -> Vec<MapHandle> {
    let ids = outer.keys().filter_map(|key| {
        let id = outer.lookup(&key, MapFlags::ANY).expect("a map's id")?;
        Some(u32::from_ne_bytes(id.try_into().expect("a number")))
    });
    ids.map(|id| MapHandle::from_map_id(id).expect("a map")).collect()
}

/// Returns the memory of maps in megabytes.
fn megabytes(maps: impl IntoIterator<Item = MapHandle>) -> f64 {
    maps.into_iter().map(|map| bytes(&map)).sum::<f64>() / 1e6
}

/// Returns the memory of a map in bytes, as the kernel accounts for it.
pub fn bytes(map: &MapHandle) -> f64 {
    let info = format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd());
    let info = fs::read_to_string(info).expect("what the kernel says of a map");
    let locked = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    locked.expect("a size").trim().parse().expect("a number")
}

/// Returns the milliseconds to make `tables` tables of `members` members. All but the first of each have
/// weight `weight`.
fn time(tables: usize, members: usize, weight: u32) -> f64 {
    let mut weights = vec![weight; members];
    weights[0] = 1;
    let size = size(&weights).expect("even enough");
    let start = Instant::now();
    for number in 0..tables {
        let identities: Vec<String> =
            (0..members).map(|member| format!("10.0.9.{member}:{number}")).collect();
        let members: Vec<Member<'_>> = identities
            .iter()
            .zip(&weights)
            .map(|(identity, weight)| Member { identity: identity.as_bytes(), weight: *weight })
            .collect();
        assert_eq!(table(&members, size).len(), size as usize);
    }
    start.elapsed().as_secs_f64() * 1000.0
}
