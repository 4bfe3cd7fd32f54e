//! How long Maglev tables take to make.

use std::time::Instant;

use udplb::maglev::{Member, size, table};

use crate::{Report, least};

const ROUNDS: usize = 5;

pub fn measure(report: &mut Report) {
    report.title("Maglev tables");
    let mut judge = |what, tables, members, weight, limit| {
        let [time] = least(ROUNDS, |_| time(tables, members, weight));
        report.at_most(what, "", time, " ms", limit);
    };
    judge("1,000 of 10 upstreams, 10,007 slots each", 1000, 10, 1, 300.0);
    judge("one of 100 upstreams, 1,000,003 slots", 1, 100, 100, 1000.0);
}

/// In milliseconds, for `tables` tables of `members` members; all but the first of each weigh
/// `weight`.
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
