//! Findings about the host, what serves there, and arpd.

use crate::commands::doctor::facts::{Facts, Kernel};
use crate::net::neighbour::{self, NeighbourTable};
use crate::telemetry::diagnosis::Source;
use crate::telemetry::problem::{Problem, note, problem};

/// Reports missing privileges, and a kernel without what the program needs.
pub fn kernel(facts: &Facts) -> Vec<Problem> {
    let Kernel { version: (major, minor), btf, jit, locked_down } = facts.kernel;
    let mut found = Vec::new();
    for capability in &facts.missing_capabilities {
        let what = format!("this user lacks {capability}");
        let why = "apply and arpd need it, and doctor sees less without it";
        found.push(problem("privileges", "", what).why(why).fix("run udplb as root"));
    }
    if let Some(why) = &facts.unreadable {
        let what = "what serves cannot be read";
        found.push(problem("unreadable", "", what).why(why).fix("run udplb as root"));
    }
    if (major, minor) < (5, 10) {
        let what = format!("Linux {major}.{minor} is too old");
        let why = "the program takes 5.10 or later";
        found.push(problem("kernel-too-old", "", what).why(why).fix("install a newer kernel"));
    }
    if !btf {
        let why = "the program is fitted to the kernel's types when it is loaded";
        let fix = "run a kernel with CONFIG_DEBUG_INFO_BTF";
        found.push(problem("no-btf", "", "the kernel has no BTF").why(why).fix(fix));
    }
    if locked_down {
        let what = "the kernel is locked down (confidentiality)";
        let why = "before 6.2 it lets no program read kernel memory, and does not load udplb's";
        let fix = "boot with lockdown=integrity, or run Linux 6.2 or later";
        found.push(problem("lockdown", "", what).why(why).fix(fix));
    }
    if !jit {
        let why = "each packet costs several times as much";
        let fix = "sysctl -w net.core.bpf_jit_enable=1";
        found.push(problem("no-jit", "", "BPF programs are interpreted").why(why).fix(fix));
    }
    found.extend(facts.neighbours.iter().filter_map(|table| neighbour_table(facts, table)));
    found
}

fn neighbour_table(facts: &Facts, table: &NeighbourTable) -> Option<Problem> {
    let next_hops = facts.next_hops[usize::from(table.ipv6)];
    let others = (table.entries as usize).saturating_sub(next_hops);
    let what = neighbour::overflow(next_hops, others, table)?;
    let why = "beyond it next hops are forgotten or cannot be learned";
    let wanted = 2 * (next_hops + others).next_power_of_two();
    let (second, third) = (table.sysctl("gc_thresh2"), table.sysctl("gc_thresh3"));
    let fix = format!("sysctl -w {second}={} {third}={wanted}", wanted / 2);
    Some(problem("neighbour-table", "", what).why(why).fix(fix))
}

/// Reports damaged pins, a file that differs from what serves, and the warnings of `apply`.
pub fn configuration(facts: &Facts) -> Vec<Problem> {
    let source = Source(&facts.file);
    let damage = facts.damage.iter().map(|damage| {
        let why = "rollback, arpd or the next apply may miss it";
        problem("damage", "", damage).why(why).fix(source.apply())
    });
    let warnings = facts
        .warnings
        .iter()
        .map(|warning| note("advice", "", warning).why("apply warns of it too").fix(source.edit()));
    let unassigned = facts.unassigned.iter().map(|(address, rule)| {
        let what = format!("{address} is an address of no interface");
        let why = "nobody answers for it here: packets come only if a router sends them this way";
        let fix = format!("ip addr add {address} dev lo, and route it here");
        note("key-address-missing", rule, what).why(why).fix(fix)
    });
    damage.chain(drift(facts)).chain(arpd(facts)).chain(warnings).chain(unassigned).collect()
}

fn drift(facts: &Facts) -> Option<Problem> {
    let source = Source(&facts.file);
    let (why, fix) = match (facts.drift.as_ref()?, facts.held) {
        (Ok(false), _) => return None,
        (Ok(true), Some(_)) => ("a rollback left it, and it is held", source.force()),
        (Ok(true), None) => {
            ("it was changed after it was applied, or another file was applied", source.plan())
        }
        (Err(why), _) => {
            let what = "it cannot be applied";
            let fix = format!("udplb check {}", facts.file);
            return Some(problem("unusable-file", &facts.file, what).why(why).fix(fix));
        }
    };
    Some(problem("drift", &facts.file, "it is not what serves").why(why).fix(fix))
}

fn arpd(facts: &Facts) -> Option<Problem> {
    match facts.arpd {
        Some(false) => {
            let why =
                "nobody sees which upstreams are down, and next hops are asked of the kernel again";
            let fix = match facts.arpd_unit {
                true => "systemctl restart udplb-arpd",
                false => "start `udplb arpd` again",
            };
            Some(problem("arpd-ended", "", "arpd has ended").why(why).fix(fix))
        }
        None if facts.wants_health => {
            let what = "arpd does not run, and a rule has `health`";
            let why = "nobody sees which upstreams are down";
            Some(problem("arpd-missing", "", what).why(why).fix(start_arpd(facts)))
        }
        _ => None,
    }
}

pub fn start_arpd(facts: &Facts) -> &'static str {
    match facts.arpd_unit {
        true => "systemctl enable --now udplb-arpd",
        false => "start `udplb arpd` and keep it running",
    }
}
