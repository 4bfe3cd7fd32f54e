//! Findings from the facts, each with a fix. Pure.

mod host;
mod interfaces;
mod server;
mod upstreams;

use std::collections::BTreeMap;
use std::fmt::Write;

use super::facts::Facts;
use crate::cli::output::plural;
use crate::telemetry::problem::{Level, Problem};

/// Derives all findings, problems first.
pub fn diagnose(facts: &Facts) -> Vec<Problem> {
    let mut findings = if facts.needs_nothing { Vec::new() } else { of_balancer(facts) };
    findings.extend(facts.server.iter().flat_map(server::server));
    findings.sort_by_key(|finding| finding.level);
    findings
}

/// Derives the findings about a host with rules or `decap`.
fn of_balancer(facts: &Facts) -> Vec<Problem> {
    let mut findings = facts.problems.clone();
    // `growth` has exact numbers
    findings.retain(|problem| {
        problem.id != "packets-lost" || facts.growth.iter().all(|it| it.place != problem.place)
    });
    findings.extend(facts.growth.iter().map(upstreams::growth));
    findings.extend(host::kernel(facts));
    findings.extend(host::configuration(facts));
    findings.extend(facts.inputs.iter().flat_map(|input| interfaces::input(facts, input)));
    findings.extend(upstreams::paths(facts));
    findings.extend(upstreams::loops(facts));
    findings.extend(facts.senders.iter().map(upstreams::sender));
    findings
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::before::Before;
    use crate::commands::doctor::facts::{
        HopFacts, Input, InputLink, Kernel, PathFacts, UpstreamFacts,
    };
    use crate::commands::doctor::sample::Growth;
    use crate::net::neighbour::NeighbourTable;
    use crate::telemetry::problem::problem;

    /// A host on which all is well.
    fn healthy() -> Facts {
        Facts {
            file: "/etc/udplb.yaml".into(),
            drift: Some(Ok(false)),
            kernel: Kernel { version: (6, 1), btf: true, jit: true, locked_down: false },
            arpd: Some(true),
            inputs: vec![Input {
                name: "eth0".into(),
                link: Some(InputLink {
                    mtu: 1500,
                    lro: None,
                    gro: Vec::new(),
                    foreign_qdisc: false,
                    before: Vec::new(),
                    moves_to: None,
                    not_forwarding: Vec::new(),
                    no_ipv6: None,
                    strict: false,
                    default_elsewhere: false,
                    passes: true,
                    delivers: true,
                }),
            }],
            upstreams: vec![UpstreamFacts {
                rule: "flows".into(),
                label: "one".into(),
                address: [10, 2, 0, 20].into(),
                path: PathFacts::Hop(HopFacts {
                    interface: "up0".into(),
                    gateway: [10, 2, 0, 20].into(),
                    mtu: 1500,
                    lower: None,
                }),
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

    /// Checks the findings after a change: the starts of the title and, after a bar, of the fix.
    #[track_caller]
    fn check(change: impl FnOnce(&mut Facts), wanted: &[&str]) {
        let mut facts = healthy();
        change(&mut facts);
        let found = diagnose(&facts);
        assert_eq!(found.len(), wanted.len(), "{found:#?}");
        for (found, wanted) in found.iter().zip(wanted) {
            let (title, fix) = wanted.split_once(" | ").expect("a title and a fix");
            let text = format!("{}: {}", found.level, found.title());
            assert!(text.starts_with(title) && found.fix.starts_with(fix), "{found:#?}");
        }
    }

    fn link(facts: &mut Facts) -> &mut InputLink {
        facts.inputs[0].link.as_mut().expect("a link")
    }

    #[test]
    fn a_host_on_which_all_is_well() {
        check(|_| {}, &[]);
        assert_eq!(text(&[], false), "all is well\n");
    }

    #[test]
    fn packets_that_may_go_round() {
        check(
            |facts| facts.upstreams[0].spent = 7,
            &["note: flows: 7 packets came with a TTL of 1 | udplb trace --rule flows"],
        );
    }

    #[test]
    fn the_host() {
        check(
            |facts| facts.missing_capabilities = vec!["CAP_BPF (to load)".into()],
            &["problem: this user lacks CAP_BPF (to load) | run udplb as root"],
        );
        check(
            |facts| {
                facts.kernel = Kernel { version: (5, 4), btf: false, jit: false, locked_down: true }
            },
            &[
                "problem: Linux 5.4 is too old | install",
                "problem: the kernel has no BTF | run a kernel",
                "problem: the kernel is locked down | boot with lockdown=integrity",
                "problem: BPF programs are interpreted | sysctl -w net.core.bpf_jit_enable=1",
            ],
        );
        check(
            |facts| facts.next_hops = [3000, 0],
            &[
                "problem: 3000 neighbours | sysctl -w net.ipv4.neigh.default.gc_thresh2=4096 net.ipv4.neigh.default.gc_thresh3=8192",
            ],
        );
        check(
            |facts| facts.next_hops = [1, 600],
            &[
                "problem: 600 neighbours (600 next hops, 0 others) | sysctl -w net.ipv6.neigh.default.gc_thresh2=1024 net.ipv6.neigh.default.gc_thresh3=2048",
            ],
        );
        let no_arpd = "arpd does not run, and a rule";
        for (unit, restart, start) in [
            (true, "systemctl restart udplb-arpd", "systemctl enable --now udplb-arpd"),
            (false, "start `udplb arpd` again", "start `udplb arpd` and keep it running"),
        ] {
            check(
                |facts| (facts.arpd, facts.arpd_unit) = (Some(false), unit),
                &[&format!("problem: arpd has ended | {restart}")],
            );
            check(
                |facts| {
                    (facts.arpd, facts.arpd_unit, facts.wants_health) = (None, unit, true);
                },
                &[&format!("problem: {no_arpd} | {start}")],
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
            &["note: eth0: tc filter bpf pref 1 runs first and may consume | tc filter del, or"],
        );
        check(
            |facts| link(facts).before = vec![before(true)],
            &["problem: eth0: tc filter bpf pref 1 hides every packet | tc filter del, or"],
        );
        check(
            |facts| {
                link(facts).before = vec![before(false)];
                facts.hidden = [("eth0".to_string(), 9)].into();
            },
            &["problem: eth0: 9 packets came in within a second, and none | tc filter del"],
        );
    }

    #[test]
    fn packets_that_are_not_sent() {
        let growth = |verdict| Growth { place: "flows/one".into(), verdict, packets: 7 };
        let lost = problem("packets-lost", "flows/one", "packets were lost");
        check(
            |facts| {
                facts.growth = vec![growth("not-for-us"), growth("mtu")];
                facts.problems = vec![lost];
            },
            &[
                "problem: flows/one: 7 packets within a second were not sent: `mtu` | raise",
                "note: flows/one: 7 packets within a second were not sent: `not-for | nothing",
            ],
        );
    }

    #[test]
    fn interfaces() {
        check(
            |facts| link(facts).lro = Some("port1".into()),
            &["problem: eth0: large receive offload is on at port1 | ethtool -K port1 lro off"],
        );
        let gro = |facts: &mut Facts| {
            (link(facts).gro, link(facts).delivers) = (vec!["port1".into(), "port2".into()], false);
        };
        check(
            gro,
            &[
                "note: eth0: generic receive offload is on at port1, port2 | ethtool -K port1 gro off; \
               ethtool -K port2 gro off, unless",
            ],
        );
        // where it saves more than it costs
        check(|facts| (gro(facts), facts.tcp_segments = 5000).1, &[]);
        check(|facts| (gro(facts), link(facts).delivers = true).1, &[]);
        check(
            |facts| link(facts).foreign_qdisc = true,
            &["note: eth0: its ingress qdisc was made by another program | udplb apply"],
        );
        // with arpd it does not matter
        let off = vec!["net.ipv6.conf.eth0.forwarding".to_string()];
        check(|facts| link(facts).not_forwarding.clone_from(&off), &[]);
        check(
            |facts| (link(facts).not_forwarding, facts.arpd) = (off.clone(), None),
            &[
                "note: eth0: forwarding is off there | start `udplb arpd` and keep it running, or sysctl -w net.ipv6.conf.eth0.forwarding=1",
            ],
        );
        check(
            |facts| link(facts).no_ipv6 = Some("net.ipv6.conf.eth0.disable_ipv6".into()),
            &["problem: eth0: IPv6 is off | sysctl -w net.ipv6.conf.eth0.disable_ipv6=0"],
        );
        check(
            |facts| (link(facts).strict, link(facts).default_elsewhere) = (true, true),
            &["problem: eth0: rp_filter is strict | sysctl -w net.ipv4.conf.eth0.rp_filter=2"],
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
            change(|upstream| upstream.path = PathFacts::Local),
            &["problem: flows: one is this host itself | edit /etc/udplb.yaml"],
        );
        check(
            change(|upstream| upstream.lacks_egress = true),
            &["problem: flows: one is to get this host's address | ip addr add ADDRESS dev up0"],
        );
        let gateway = |mtu| {
            PathFacts::Hop(HopFacts {
                interface: "up0".into(),
                gateway: [10, 2, 0, 1].into(),
                mtu,
                lower: None,
            })
        };
        let mut facts = healthy();
        facts.upstreams[0].path = gateway(1400);
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
        let down = problem("upstream-down", "flows", "one is down")
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
