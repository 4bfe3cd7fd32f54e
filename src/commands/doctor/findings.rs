//! Findings from the facts, each with a fix. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;

use super::before::Before;
use super::facts::{Facts, Input, InputLink, Kernel, PathFacts, Sender, UpstreamFacts};
use super::sample::Growth;
use crate::net::neighbour;
use crate::telemetry::diagnosis::{Explanation, Source, explain, is_loss};
use crate::telemetry::problem::{Level, Problem};

/// Derives all findings, problems first.
pub fn diagnose(facts: &Facts) -> Vec<Problem> {
    let mut diagnosis = Diagnosis { facts, findings: facts.problems.clone() };
    // `growth` has exact numbers
    diagnosis.findings.retain(|problem| {
        problem.id != "packets-lost" || facts.growth.iter().all(|it| it.place != problem.place)
    });
    diagnosis.growth();
    diagnosis.host();
    diagnosis.generation();
    for input in &facts.inputs {
        diagnosis.input(input);
    }
    diagnosis.upstreams();
    diagnosis.loops();
    diagnosis.senders();
    diagnosis.findings.sort_by_key(|finding| finding.level);
    diagnosis.findings
}

struct Diagnosis<'a> {
    facts: &'a Facts,
    findings: Vec<Problem>,
}

impl Diagnosis<'_> {
    fn problem(
        &mut self,
        id: &'static str,
        place: &str,
        what: impl Into<String>,
        why: &str,
        fix: impl Into<String>,
    ) {
        self.findings.push(Problem::new(id, Level::Problem, place, what).why(why).fix(fix));
    }

    fn note(
        &mut self,
        id: &'static str,
        place: &str,
        what: impl Into<String>,
        why: &str,
        fix: impl Into<String>,
    ) {
        self.findings.push(Problem::new(id, Level::Note, place, what).why(why).fix(fix));
    }

    fn source(&self) -> Source<'_> {
        Source(&self.facts.file)
    }

    fn host(&mut self) {
        let facts = self.facts;
        let Kernel { version, btf, jit, confidential } = facts.kernel;
        for capability in &facts.missing_capabilities {
            self.problem(
                "privileges",
                "",
                format!("this user lacks {capability}"),
                "apply and arpd need it, and doctor sees less without it",
                "run udplb as root",
            );
        }
        if let Some(why) = &facts.unreadable {
            self.problem("unreadable", "", "what serves cannot be read", why, "run udplb as root");
        }
        if version < (5, 10) {
            let what = format!("Linux {}.{} is too old", version.0, version.1);
            self.problem(
                "kernel-too-old",
                "",
                what,
                "the program takes 5.10 or later",
                "install a newer kernel",
            );
        }
        if !btf {
            self.problem(
                "no-btf",
                "",
                "the kernel has no BTF",
                "the program is fitted to the kernel's types when it is loaded",
                "run a kernel with CONFIG_DEBUG_INFO_BTF",
            );
        }
        if confidential {
            self.problem(
                "lockdown",
                "",
                "the kernel is locked down (confidentiality)",
                "it lets no program read kernel memory, and so does not load udplb's",
                "boot with lockdown=integrity",
            );
        }
        if !jit {
            self.problem(
                "no-jit",
                "",
                "BPF programs are interpreted",
                "each packet costs several times as much",
                "sysctl -w net.core.bpf_jit_enable=1",
            );
        }
        for table in &facts.neighbours {
            let next_hops = facts.next_hops[usize::from(table.ipv6)];
            let others = (table.entries as usize).saturating_sub(next_hops);
            if let Some(what) = neighbour::overflow(next_hops, others, table) {
                let wanted = 2 * (next_hops + others).next_power_of_two();
                let (second, third) = (table.sysctl("gc_thresh2"), table.sysctl("gc_thresh3"));
                self.problem(
                    "neighbour-table",
                    "",
                    what,
                    "beyond it next hops are forgotten or cannot be learned",
                    format!("sysctl -w {second}={} {third}={wanted}", wanted / 2),
                );
            }
        }
    }

    fn generation(&mut self) {
        let facts = self.facts;
        for damage in &facts.damage {
            let why = "rollback, arpd or the next apply may miss it";
            self.problem("damage", "", damage.as_str(), why, self.source().apply());
        }
        match &facts.drift {
            Some(Ok(true)) => self.problem(
                "drift",
                &facts.file,
                "it is not what serves",
                match facts.held {
                    Some(_) => "a rollback left it, and it is held",
                    None => "it was changed after it was applied, or another file was applied",
                },
                match facts.held {
                    Some(_) => self.source().force(),
                    None => self.source().plan(),
                },
            ),
            Some(Err(why)) => {
                let fix = format!("udplb check {}", facts.file);
                self.problem("unusable-file", &facts.file, "it cannot be applied", why, fix);
            }
            _ => {}
        }
        match facts.arpd {
            Some(false) => self.problem(
                "arpd-ended",
                "",
                "arpd has ended",
                "nobody sees which upstreams are down, and next hops are asked of the kernel again",
                match facts.arpd_unit {
                    true => "systemctl restart udplb-arpd",
                    false => "start `udplb arpd` again",
                },
            ),
            None if facts.wants_health => self.problem(
                "arpd-missing",
                "",
                "arpd does not run, and a rule has `health: neighbour`",
                "nobody sees which upstreams are down",
                self.start_arpd(),
            ),
            _ => {}
        }
        for warning in &facts.warnings {
            self.note(
                "advice",
                "",
                warning.as_str(),
                "apply warns of it too",
                self.source().edit(),
            );
        }
        for (address, rule) in &facts.unassigned {
            self.note(
                "key-address-missing",
                rule,
                format!("{address} is an address of no interface"),
                "nobody answers for it here: packets come only if a router sends them this way",
                format!("ip addr add {address} dev lo, and route it here"),
            );
        }
    }

    fn start_arpd(&self) -> &'static str {
        match self.facts.arpd_unit {
            true => "systemctl enable --now udplb-arpd",
            false => "start `udplb arpd` and keep it running",
        }
    }

    fn input(&mut self, input: &Input) {
        let name = &input.name;
        let Some(link) = &input.link else { return };
        self.before(name, link);
        if link.foreign_qdisc {
            self.note(
                "foreign-qdisc",
                name,
                "its ingress qdisc was made by another program",
                "who removes it removes udplb's filter too",
                format!("{} afterwards, or arpd and a timer that does", self.source().apply()),
            );
        }
        if let Some(sysctl) = &link.no_ipv6 {
            self.problem(
                "ipv6-off",
                name,
                "IPv6 is off there, and a rule is for it",
                "nobody answers those who ask for its addresses",
                format!("sysctl -w {sysctl}=0"),
            );
        }
        if !link.not_forwarding.is_empty() && self.facts.arpd != Some(true) {
            let on: Vec<String> = link.not_forwarding.iter().map(|it| format!("{it}=1")).collect();
            self.note(
                "forwarding-off",
                name,
                "forwarding is off there, and arpd does not run",
                "packets go by what the last apply saw: changes of routes are not followed",
                format!("{}, or sysctl -w {}", self.start_arpd(), on.join(" ")),
            );
        }
        if link.strict && link.passes && link.default_elsewhere {
            self.problem("rp-filter", 
                name,
                "rp_filter is strict there, and the default route leaves elsewhere",
                "of packets from beyond the router upstreams get their copy, and the local one is dropped",
                format!("sysctl -w net.ipv4.conf.{name}.rp_filter=2"),
            );
        }
        if let Some(device) = &link.lro {
            self.problem(
                "lro",
                name,
                format!("large receive offload is on at {device}"),
                "the device merges packets that cannot be taken apart again",
                format!("ethtool -K {device} lro off"),
            );
        }
    }

    fn before(&mut self, name: &str, link: &InputLink) {
        let hidden = self.facts.hidden.get(name);
        let names: Vec<&str> = link.before.iter().map(|before| before.name.as_str()).collect();
        if let Some(packets) = hidden {
            let (why, fix) = match link.before.first() {
                Some(_) => (
                    format!("before it: {}", names.join(", ")),
                    link.before.iter().map(|it| it.remove.clone()).collect::<Vec<_>>().join("; "),
                ),
                None => {
                    ("something takes them before tc".into(), format!("ip -d link show {name}"))
                }
            };
            let what = format!("{packets} packets came in within a second, and none reached udplb");
            return self.problem("packets-hidden", name, what, &why, fix);
        }
        for Before { name: filter, remove, takes_all } in &link.before {
            let fix = format!("{remove}, or have it run later");
            match takes_all {
                true => self.problem(
                    "packets-hidden",
                    name,
                    format!("{filter} hides every packet from udplb"),
                    "it runs first, and decides on all packets",
                    fix,
                ),
                false => self.note(
                    "runs-before",
                    name,
                    format!("{filter} runs first and may consume packets"),
                    "packets that it drops, accepts or redirects do not meet the rules",
                    fix,
                ),
            }
        }
    }

    /// Reports packets that were not sent during the sample.
    fn growth(&mut self) {
        let facts = self.facts;
        for Growth { place, verdict, packets } in &facts.growth {
            let Explanation { why, fix } = explain(verdict);
            let what = format!("{packets} packets within a second were not sent: `{verdict}`");
            match is_loss(verdict) {
                true => self.problem("packets-lost", place, what, why, fix),
                false => self.note("packets-left", place, what, why, fix),
            }
        }
    }

    /// Reports packets with an expired TTL, the only sign of relays that replicate to each other.
    fn loops(&mut self) {
        let mut rules = BTreeSet::new();
        for upstream in self.facts.upstreams.iter().filter(|upstream| upstream.spent > 0) {
            let UpstreamFacts { rule, spent, .. } = upstream;
            if rules.insert(rule) {
                self.note(
                    "ttl",
                    rule,
                    format!("{spent} packets came with a TTL of 1"),
                    "senders of multicast use it unless they are told otherwise; or packets go round in a loop \
                     of relays that send to each other, each of which multiplies them if it replicates",
                    format!(
                        "udplb trace --rule {rule} --drops shows where they come from; relays must not have \
                         each other as upstreams"
                    ),
                );
            }
        }
    }

    fn upstreams(&mut self) {
        let largest = self.facts.inputs.iter().filter_map(|input| input.link.as_ref());
        let largest = largest.map(|link| link.mtu).max().unwrap_or(0);
        let mut narrow = BTreeSet::new();
        let mut routers = BTreeSet::new();
        for upstream in &self.facts.upstreams {
            let UpstreamFacts { rule, label, address, way, .. } = upstream;
            match way {
                PathFacts::Local => self.problem(
                    "upstream-local",
                    rule,
                    format!("{label} is this host itself"),
                    "its packets would come round again",
                    self.source().edit(),
                ),
                PathFacts::None(why) => {
                    let what = format!("there is no route to {label}");
                    self.problem(
                        "no-route",
                        rule,
                        what,
                        why,
                        format!("ip route add {address} via ROUTER"),
                    );
                }
                PathFacts::Hop { interface, gateway, mtu, lower } => {
                    // one finding for each path
                    if *mtu < largest && narrow.insert((interface, mtu, upstream.too_large > 0)) {
                        let what = format!("the MTU on the way to {label} is {mtu}");
                        let why = format!(
                            "larger packets, up to {largest}, are fragmented, or dropped as `mtu` if \
                             they must not be"
                        );
                        let fix = widen(interface, *mtu, lower.as_ref(), largest);
                        match upstream.too_large {
                            0 => self.note("mtu", rule, what, &why, fix),
                            count => self.problem(
                                "mtu",
                                rule,
                                what,
                                &format!("{why}: {count} so far"),
                                fix,
                            ),
                        }
                    }
                    if upstream.lacks_egress {
                        self.problem(
                            "no-egress-address",
                            rule,
                            format!("{label} is to get this host's address, and there is none"),
                            "packets to it are dropped as `no-route`",
                            format!(
                                "ip addr add ADDRESS dev {interface}; {}",
                                self.source().apply()
                            ),
                        );
                    }
                    if upstream.preserves && gateway != address && routers.insert(gateway) {
                        self.note("urpf", 
                            rule,
                            format!("{label} is behind the router {gateway}, and gets senders' own addresses"),
                            "a router that checks senders (uRPF) drops what comes from here with them",
                            match gateway {
                                IpAddr::V4(_) => format!("on {gateway}: accept them from this host; on Linux sysctl -w net.ipv4.conf.all.rp_filter=2"),
                                IpAddr::V6(_) => format!("on {gateway}: accept them from this host"),
                            },
                        );
                    }
                }
            }
        }
    }

    fn senders(&mut self) {
        for Sender { rule, from, to, uid } in &self.facts.senders {
            self.problem(
                "local-sender",
                rule,
                format!("a socket of this host, {from} of user {uid}, sends to {to}"),
                "its packets stay on lo and meet no rule",
                "have it send to an upstream itself",
            );
        }
    }
}

/// Maximum of findings shown for one reason: all of 10,000 upstreams may be down.
const SHOWN: usize = 5;

/// Formats findings as text.
pub fn text(findings: &[Problem], bold: bool) -> String {
    let mut text = String::new();
    let mut alike: BTreeMap<&str, usize> = BTreeMap::new();
    for problem in findings {
        let Problem { level, why, fix, .. } = problem;
        let seen = alike.entry(why).or_default();
        *seen += 1;
        if *seen > SHOWN {
            continue;
        }
        let level = match level {
            Level::Problem => "problem",
            Level::Note => "note",
        };
        let title = problem.title();
        let _ = match bold {
            true => writeln!(text, "\x1b[1m{level}: {title}\x1b[0m"),
            false => writeln!(text, "{level}: {title}"),
        };
        let _ = writeln!(text, "  why:  {why}\n  fix:  {fix}");
    }
    for (why, count) in alike.into_iter().filter(|(_, count)| *count > SHOWN) {
        let _ = writeln!(text, "and {} more for this reason: {why}", count - SHOWN);
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let plural = |count, noun| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    let _ = match (count(Level::Problem), count(Level::Note)) {
        (0, 0) => writeln!(text, "all is well"),
        (0, notes) => writeln!(text, "no problems, {}", plural(notes, "note")),
        (problems, 0) => writeln!(text, "{}", plural(problems, "problem")),
        (problems, notes) => {
            writeln!(text, "{}, {}", plural(problems, "problem"), plural(notes, "note"))
        }
    };
    text
}

/// Returns the command that sets an MTU, and that of a lower interface with room for the headers.
fn widen(interface: &str, mtu: u32, lower: Option<&(String, u32)>, wanted: u32) -> String {
    let set = format!("ip link set {interface} mtu {wanted}");
    match lower {
        Some((lower, room)) => {
            let headers = room.saturating_sub(mtu);
            format!("ip link set {lower} mtu {} && {set}", wanted + headers)
        }
        None => set,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::neighbour::NeighbourTable;

    /// A host on which all is well.
    fn healthy() -> Facts {
        Facts {
            file: "/etc/udplb.yaml".into(),
            drift: Some(Ok(false)),
            kernel: Kernel { version: (6, 1), btf: true, jit: true, confidential: false },
            arpd: Some(true),
            inputs: vec![Input {
                name: "eth0".into(),
                link: Some(InputLink {
                    mtu: 1500,
                    lro: None,
                    foreign_qdisc: false,
                    before: Vec::new(),
                    not_forwarding: Vec::new(),
                    no_ipv6: None,
                    strict: false,
                    default_elsewhere: false,
                    passes: true,
                }),
            }],
            upstreams: vec![UpstreamFacts {
                rule: "flows".into(),
                label: "one".into(),
                address: [10, 2, 0, 20].into(),
                way: PathFacts::Hop {
                    interface: "up0".into(),
                    gateway: [10, 2, 0, 20].into(),
                    mtu: 1500,
                    lower: None,
                },
                preserves: true,
                lacks_egress: false,
                too_large: 0,
                spent: 0,
            }],
            neighbours: [false, true]
                .map(|ipv6| NeighbourTable { ipv6, entries: 9, threshold2: 512, threshold3: 1024 })
                .to_vec(),
            next_hops: [1, 0],
            ..Facts::default()
        }
    }

    /// Checks the findings after a change: level, place, and the start of what and fix.
    #[track_caller]
    fn check(change: impl FnOnce(&mut Facts), wanted: &[(Level, &str, &str, &str)]) {
        let mut facts = healthy();
        change(&mut facts);
        let found = diagnose(&facts);
        assert_eq!(found.len(), wanted.len(), "{found:#?}");
        for (found, (level, place, what, fix)) in found.iter().zip(wanted) {
            assert_eq!((found.level, found.place.as_str()), (*level, *place), "{found:#?}");
            assert!(found.what.starts_with(what), "{found:#?}");
            assert!(found.fix.starts_with(fix), "{found:#?}");
        }
    }

    fn link(facts: &mut Facts) -> &mut InputLink {
        facts.inputs[0].link.as_mut().expect("a link")
    }

    use Level::{Note, Problem};

    #[test]
    fn a_host_on_which_all_is_well() {
        check(|_| {}, &[]);
        assert_eq!(text(&[], false), "all is well\n");
    }

    #[test]
    fn packets_that_may_go_round() {
        check(
            |facts| facts.upstreams[0].spent = 7,
            &[(Note, "flows", "7 packets came with a TTL of 1", "udplb trace --rule flows")],
        );
    }

    #[test]
    fn the_host() {
        check(
            |facts| facts.missing_capabilities = vec!["CAP_BPF (to load)".into()],
            &[(Problem, "", "this user lacks CAP_BPF (to load)", "run udplb as root")],
        );
        check(
            |facts| {
                facts.kernel =
                    Kernel { version: (5, 4), btf: false, jit: false, confidential: true }
            },
            &[
                (Problem, "", "Linux 5.4 is too old", "install"),
                (Problem, "", "the kernel has no BTF", "run a kernel"),
                (Problem, "", "the kernel is locked down", "boot with lockdown=integrity"),
                (
                    Problem,
                    "",
                    "BPF programs are interpreted",
                    "sysctl -w net.core.bpf_jit_enable=1",
                ),
            ],
        );
        check(
            |facts| facts.next_hops = [3000, 0],
            &[(
                Problem,
                "",
                "3000 neighbours",
                "sysctl -w net.ipv4.neigh.default.gc_thresh2=4096 net.ipv4.neigh.default.gc_thresh3=8192",
            )],
        );
        check(
            |facts| facts.next_hops = [1, 600],
            &[(
                Problem,
                "",
                "600 neighbours (600 next hops, 0 others)",
                "sysctl -w net.ipv6.neigh.default.gc_thresh2=1024 net.ipv6.neigh.default.gc_thresh3=2048",
            )],
        );
        let no_arpd = "arpd does not run, and a rule";
        for (unit, restart, start) in [
            (true, "systemctl restart udplb-arpd", "systemctl enable --now udplb-arpd"),
            (false, "start `udplb arpd` again", "start `udplb arpd` and keep it running"),
        ] {
            check(
                |facts| (facts.arpd, facts.arpd_unit) = (Some(false), unit),
                &[(Problem, "", "arpd has ended", restart)],
            );
            check(
                |facts| {
                    (facts.arpd, facts.arpd_unit, facts.wants_health) = (None, unit, true);
                },
                &[(Problem, "", no_arpd, start)],
            );
        }
    }

    #[test]
    fn programs_before_ours() {
        let before = |takes_all| Before {
            name: "tc filter bpf pref 1".into(),
            remove: "tc filter del".into(),
            takes_all,
        };
        check(
            |facts| link(facts).before = vec![before(false)],
            &[(
                Note,
                "eth0",
                "tc filter bpf pref 1 runs first and may consume",
                "tc filter del, or",
            )],
        );
        check(
            |facts| link(facts).before = vec![before(true)],
            &[(Problem, "eth0", "tc filter bpf pref 1 hides every packet", "tc filter del, or")],
        );
        check(
            |facts| {
                link(facts).before = vec![before(false)];
                facts.hidden = [("eth0".to_string(), 9)].into();
            },
            &[(Problem, "eth0", "9 packets came in within a second, and none", "tc filter del")],
        );
    }

    #[test]
    fn packets_that_are_not_sent() {
        let growth = |verdict| Growth { place: "flows/one".into(), verdict, packets: 7 };
        let lost = super::Problem::new("packets-lost", Problem, "flows/one", "packets were lost");
        check(
            |facts| {
                facts.growth = vec![growth("not-for-us"), growth("mtu")];
                facts.problems = vec![lost];
            },
            &[
                (Problem, "flows/one", "7 packets within a second were not sent: `mtu`", "raise"),
                (Note, "flows/one", "7 packets within a second were not sent: `not-for", "nothing"),
            ],
        );
    }

    #[test]
    fn interfaces() {
        check(
            |facts| link(facts).lro = Some("port1".into()),
            &[(
                Problem,
                "eth0",
                "large receive offload is on at port1",
                "ethtool -K port1 lro off",
            )],
        );
        check(
            |facts| link(facts).foreign_qdisc = true,
            &[(Note, "eth0", "its ingress qdisc was made by another program", "udplb apply")],
        );
        // with arpd it does not matter
        let off = vec!["net.ipv6.conf.eth0.forwarding".to_string()];
        check(|facts| link(facts).not_forwarding.clone_from(&off), &[]);
        check(
            |facts| (link(facts).not_forwarding, facts.arpd) = (off.clone(), None),
            &[(
                Note,
                "eth0",
                "forwarding is off there",
                "start `udplb arpd` and keep it running, or sysctl -w net.ipv6.conf.eth0.forwarding=1",
            )],
        );
        check(
            |facts| link(facts).no_ipv6 = Some("net.ipv6.conf.eth0.disable_ipv6".into()),
            &[(Problem, "eth0", "IPv6 is off", "sysctl -w net.ipv6.conf.eth0.disable_ipv6=0")],
        );
        check(
            |facts| (link(facts).strict, link(facts).default_elsewhere) = (true, true),
            &[(Problem, "eth0", "rp_filter is strict", "sysctl -w net.ipv4.conf.eth0.rp_filter=2")],
        );
        check(
            |facts| {
                let link = link(facts);
                (link.strict, link.default_elsewhere, link.passes) = (true, true, false);
            },
            &[],
        );
    }

    #[test]
    fn upstreams() {
        let change = |change: fn(&mut UpstreamFacts)| {
            move |facts: &mut Facts| change(&mut facts.upstreams[0])
        };
        check(
            change(|upstream| upstream.way = PathFacts::Local),
            &[(Problem, "flows", "one is this host itself", "edit /etc/udplb.yaml")],
        );
        check(
            change(|upstream| upstream.lacks_egress = true),
            &[(
                Problem,
                "flows",
                "one is to get this host's address",
                "ip addr add ADDRESS dev up0",
            )],
        );
        let gateway = |mtu| PathFacts::Hop {
            interface: "up0".into(),
            gateway: [10, 2, 0, 1].into(),
            mtu,
            lower: None,
        };
        let mut facts = healthy();
        facts.upstreams[0].way = gateway(1400);
        facts.upstreams.push(facts.upstreams[0].clone());
        let found = diagnose(&facts);
        // one of each for all that go the same way
        let what: Vec<&str> = found.iter().map(|found| found.what.as_str()).collect();
        assert_eq!(
            what,
            [
                "the MTU on the way to one is 1400",
                "one is behind the router 10.2.0.1, and gets senders' own addresses"
            ]
        );
    }

    #[test]
    fn findings_in_words() {
        let mut facts = healthy();
        facts.drift = Some(Ok(true));
        facts.warnings = vec!["nobody listens on 10.1.0.1:5000".into()];
        let wanted = "\
problem: /etc/udplb.yaml: it is not what serves
  why:  it was changed after it was applied, or another file was applied
  fix:  udplb plan /etc/udplb.yaml; udplb apply /etc/udplb.yaml
note: nobody listens on 10.1.0.1:5000
  why:  apply warns of it too
  fix:  edit /etc/udplb.yaml
1 problem, 1 note
";
        assert_eq!(text(&diagnose(&facts), false), wanted);

        let mut facts = healthy();
        let down = super::Problem::new("upstream-down", Problem, "flows", "one is down")
            .why("it does not answer")
            .since(Some(951_782_400));
        facts.problems = vec![down; 7];
        let many = text(&diagnose(&facts), false);
        let line = "problem: flows: one is down since 2000-02-29T00:00:00Z\n";
        assert_eq!(many.matches(line).count(), 5, "{many}");
        let end = "and 2 more for this reason: it does not answer\n7 problems\n";
        assert!(many.ends_with(end), "{many}");
    }
}
