//! Flows of `reply: nat` outlive commands that crash, in tables of the same and of another size.

use std::net::{SocketAddr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use serde_json::{Value, json};
use udplb::datapath::description::Origin;
use udplb::reconcile::observe::Observed;
use udplb::reconcile::plan;

use crate::common::lab::{CLIENTS, Lab, RELAY, UPSTREAMS, rule, upstream};
use crate::common::net::{TTL, bind, expect, receive};
use crate::plans::{Planner, Trouble, carry_out, wanted};

/// Returns a configuration with so many flows, and a rule more that nobody uses.
fn nat(entries: u32, other: u16) -> Value {
    let options = json!({ "tc_action": "block", "reply": "nat" });
    let upstreams = [upstream(UPSTREAMS[0], 7001)];
    json!({
        "version": 1,
        "interfaces": ["eth0", "up0"],
        "flows": { "entries": entries },
        "rules": [
            rule("other", other, json!({}), &upstreams),
            rule("only", 5000, options, &upstreams),
        ],
    })
}

/// A client and its upstream.
struct Ends {
    client: UdpSocket,
    server: UdpSocket,
    begun: Instant,
}

impl Ends {
    fn new(lab: &Lab) -> Ends {
        let client = bind(&lab.client, CLIENTS[0], 0);
        client.connect((RELAY, 5000)).expect("connected");
        let server = bind(&lab.upstream, UPSTREAMS[0], 7001);
        Ends { client, server, begun: Instant::now() }
    }

    /// Checks that the only flow is as old as the talk.
    #[track_caller]
    fn expect_old(&self, lab: &Lab) {
        let since = self.begun.elapsed().as_secs_f64();
        let flows = lab.run("flows -o json").expect(0).json();
        assert_eq!(flows["count"], 1, "{flows:#}");
        let age = flows["flows"][0]["age_seconds"].as_f64().expect("an age");
        assert!(age > since - 1.0, "{age} of {since}");
    }

    /// Asks and answers; returns what the upstream has seen of the client.
    #[track_caller]
    fn ask(&self) -> SocketAddr {
        self.client.send(b"question").expect("sent");
        let asked = receive(&self.server);
        self.server.send_to(b"answer", asked.from).expect("sent");
        expect(&self.client, b"answer", (RELAY, 5000), TTL - 1);
        asked.from
    }
}

/// Carries a plan out until it crashes; returns false if it has fewer actions.
fn crashes(lab: &Lab, plan: Planner<'_>, stop: usize) -> bool {
    match catch_unwind(AssertUnwindSafe(|| carry_out(lab, plan, stop, Trouble::Crash))) {
        Ok(done) => {
            assert!(done.expect("no failure") > 4, "too few actions");
            false
        }
        Err(_) => true,
    }
}

#[test]
fn flows_survive_a_crash_of_apply_at_any_action() {
    for sizes in [[1024, 1024], [4096, 1024]] {
        let lab = Lab::new();
        lab.apply(&nat(1024, 1));
        let ends = Ends::new(&lab);
        let seen = ends.ask();
        let configurations = [nat(sizes[0], 2), nat(sizes[1], 1)];
        let mut stop = 0;
        'all: loop {
            for config in &configurations {
                let desired = wanted(config);
                let plan = |observed: &Observed| {
                    plan::apply(observed, &desired, &Origin::default(), false)
                };
                if !crashes(&lab, &plan, stop) {
                    break 'all;
                }
                assert_eq!(ends.ask(), seen, "{sizes:?}: after a crash at action {stop}");
                lab.apply(config);
                assert_eq!(ends.ask(), seen, "{sizes:?}: healed after action {stop}");
                ends.expect_old(&lab);
            }
            stop += 1;
        }
        assert_eq!(ends.ask(), seen);
    }
}

#[test]
fn flows_survive_a_crash_of_rollback_at_any_action() {
    let lab = Lab::new();
    let apply = |entries, other| lab.try_apply(&nat(entries, other), "--force").expect(0);
    apply(1024, 1);
    let ends = Ends::new(&lab);
    let seen = ends.ask();
    apply(4096, 2);
    let plan = |observed: &Observed| plan::rollback(observed, 1_000);
    for stop in 0.. {
        assert_eq!(ends.ask(), seen, "before action {stop}");
        if !crashes(&lab, &plan, stop) {
            break;
        }
        assert_eq!(ends.ask(), seen, "after a crash at action {stop}");
        apply(1024, 1);
        assert_eq!(ends.ask(), seen, "healed after action {stop}");
        apply(4096, 2);
        ends.expect_old(&lab);
    }
    assert_eq!(ends.ask(), seen);
}
