//! Exclusion of upstreams that are down.

use udplb::bpf::types;
use udplb::config::{Action, Health, Source, Strategy};
use udplb::desired::{Rule, RuleIds};

use crate::program::Program;
use crate::testbed::{Case, Fate, NEAR, NEAR_MAC, Tamper, Testbed, datagram, rule, to};

/// Returns a rule with ten upstreams on one address; source port 5666 selects the first or last.
fn balanced(skip: Health) -> Rule {
    Rule {
        strategy: Strategy::SrcPort,
        health: skip,
        upstreams: (0..10).map(|port| to(NEAR, Some(9000 + port))).collect(),
        ..rule(Action::Block, Source::Vip, NEAR)
    }
}

fn set_down(program: &Program<'_>, ids: &[u32]) {
    for id in ids {
        program.change_nexthop(*id, |hop| {
            hop.address = udplb::bpf::wire(NEAR.into());
            hop.health = types::health::HEALTH_DOWN;
        });
    }
}

fn all_but_the_fourth_down(program: &Program<'_>, ids: &RuleIds) {
    let others: Vec<u32> =
        ids.upstreams.iter().copied().filter(|id| *id != ids.upstreams[3]).collect();
    set_down(program, &others);
    program.lease(true);
}

fn all_down(program: &Program<'_>, ids: &RuleIds) {
    set_down(program, &ids.upstreams);
    program.lease(true);
}

fn all_down_long_ago(program: &Program<'_>, ids: &RuleIds) {
    set_down(program, &ids.upstreams);
}

#[test]
fn down_upstreams_are_skipped() {
    let keyed = usize::from(5666_u16.swap_bytes()) % 10;
    assert_ne!(keyed, 3);
    #[rustfmt::skip]
    let table: [(&str, Health, Tamper, usize); 4] = [
        ("are left out",                   Health::Neighbour, all_but_the_fourth_down, 3),
        ("are not, where nobody asks",     Health::Off,       all_but_the_fourth_down, keyed),
        ("are not, where all are",         Health::Neighbour, all_down,                keyed),
        ("are not, where nobody vouches",  Health::Neighbour, all_down_long_ago,       keyed),
    ];
    Testbed::with(|testbed| {
        testbed.check_all(table.map(|(name, skip, tamper, chosen)| {
            let fate = Fate::Sent("forwarded", NEAR_MAC);
            let case = Case::new(name, balanced(skip), datagram(), fate);
            Case { tamper: Some(tamper), chosen, ..case }
        }));
    });
}
