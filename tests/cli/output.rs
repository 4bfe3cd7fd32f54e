//! Checks the JSON of every command against its schema, and one vocabulary in all of them.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule, to_port};
use crate::common::net::bind;
use crate::common::service::{Arpd, until};
use crate::schema::violation;

/// Returns the schema of an output as udplb prints it.
fn schema(of: &str) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_udplb"));
    let schema = Outcome::of(command.args(["schema", of])).expect(0).json();
    assert_eq!(schema["$schema"], "http://json-schema.org/draft-07/schema#", "{of}");
    schema
}

#[track_caller]
fn expect_valid(of: &str, output: &Value) {
    if let Some(violation) = violation(&schema(of), output) {
        panic!("{of}: {violation}\n{output:#}");
    }
    assert_eq!(output["format_version"], 1, "{of}: {output:#}");
}

/// Creates a lab with a rule of each kind, packets for each, and a rollback.
fn busy() -> Lab {
    let lab = Lab::new();
    let two = UPSTREAMS.map(|address| json!({ "address": address, "port": 7000 }));
    let mut flows = rule("flows", 5000, json!({ "tc_action": "block", "senders": 64 }), &two);
    flows["mirror"] = json!([{ "name": "spy", "address": UPSTREAMS[0], "port": 7001 }]);
    let copies = [json!({ "name": "nowhere", "address": "192.0.2.1" }), two[0].clone()];
    let options = json!({ "mode": "replicate", "source": "preserve" });
    let mut copies = rule("copies", 5001, options, &copies);
    copies["options"]["tc_action"] = json!("block");
    let payload = json!({ "tc_action": "block", "strategy": "payload", "hash": "maglev",
                          "payload": { "offset": 8, "length": 4 } });
    let translated = json!({ "tc_action": "block", "reply": "nat" });
    let translated = rule("translated", 5003, translated, &two);
    let mut all = config(&[flows, copies, rule("short", 5002, payload, &two), translated]);
    all.as_object_mut().expect("a map").remove("defaults");
    lab.apply(&all);
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    for port in [5003, 5000, 5001, 5002, 5002] {
        sender.send_to(b"ten bytes!", (RELAY, port)).expect("sent");
    }
    until("the last packet is counted", || {
        lab.status()["rules"][2]["counters"]["matched"]["packets"] == 2
    });
    lab
}

#[test]
fn outputs_follow_their_schemas() {
    let lab = busy();
    let ok = |words: &str| lab.run(words).json();
    let file = |name: &str, value: &Value| {
        lab.directory.write(name, &value.to_string()).display().to_string()
    };
    let other = file("other.yaml", &to_port(7009));
    let third = file("third.yaml", &to_port(7010));
    let _arpd = Arpd::start(&lab, "");
    lab.run("drain flows/spy").expect(0);
    let status = ok("status -o json");
    for (of, output) in [
        ("status", &status),
        ("status", &ok("status -o json copies")),
        ("status", &ok("status --rate --interval 0.2 -o json")),
        ("top", &ok("top --once --interval 0.2 -o json")),
        ("doctor", &ok("doctor -o json")),
        ("plan", &ok(&format!("plan {other} -o json"))),
        ("apply", &ok(&format!("apply --dry-run {other} -o json"))),
        ("get", &ok("get 10.1.0.20:5666 10.1.0.1:5000 -o json")),
        ("get", &ok("get 10.1.0.20:5666 10.1.0.1:5001 -o json")),
        ("get", &ok("get 10.1.0.20:5666 10.1.0.1:9 -o json")),
        ("drain", &ok("drain flows/spy -o json")),
        ("flows", &ok("flows -o json")),
        ("flows", &ok("flows translated --client 10.1.0.20 --count -o json")),
        ("forget", &ok("forget translated -o json")),
        ("senders", &ok("senders flows -o json")),
        ("enable", &ok("enable flows/spy -o json")),
        ("enable", &ok("enable --all -o json")),
        ("apply", &ok(&format!("apply {other} -o json"))),
        ("apply", &ok(&format!("apply {other} -i eth0 -i nosuch0 --partial -o json"))),
        ("status", &ok("status -o json")),
        ("rollback", &ok("rollback --dry-run -o json")),
        ("rollback", &ok("rollback -o json")),
        ("apply", &ok(&format!("apply {third} --confirm 60 -o json"))),
        ("status", &ok("status -o json")),
        ("confirm", &ok("confirm -o json")),
        ("detach", &ok("detach -o json")),
        ("status", &ok("status -o json")),
        ("doctor", &ok("doctor -o json")),
        ("detach", &ok("detach --purge -o json")),
        ("detach", &ok("detach -o json")),
        ("status", &ok("status -o json")),
    ] {
        expect_valid(of, output);
    }
    // each line of a continuous output follows the schema
    lab.apply(&to_port(7009));
    let trace = lab.udplb("trace -c 1 -o json").stdout(std::process::Stdio::piped()).spawn();
    let trace = trace.expect("the program runs");
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    until("it traces", || lab.traced_until() > 0);
    sender.send_to(b"ten bytes!", (RELAY, 5000)).expect("sent");
    let lines = trace.wait_with_output().expect("it ends").stdout;
    let lines = String::from_utf8(lines).expect("text");
    assert_eq!(lines.lines().count(), 1);
    expect_valid("trace", &serde_json::from_str(&lines).expect("JSON"));
    // the output of `list` is a configuration file
    let list = lab.run("list -o json").expect(0).json();
    assert!(list.get("format_version").is_none(), "{list:#}");
    let listed = file("listed.json", &list);
    assert_eq!(lab.run(&format!("apply {listed} -o json")).json()["changed"], false);
}

#[test]
fn errors_are_json_too() {
    let lab = Lab::new();
    let bad = lab.directory.write("bad.yaml", "version: 1\nrules:\n  - keys: 1\n");
    let good = lab.write(&to_port(7001));
    let (bad, good) = (bad.display(), good.display());
    for (words, code, kind) in [
        ("rollback", 3, "nothing-applied"),
        ("list", 3, "nothing-applied"),
        ("aply", 64, "usage"),
        ("trace --sample 0", 64, "usage"),
        (&format!("apply {bad}"), 65, "configuration"),
        ("apply nowhere.yaml", 66, "unreadable"),
        (&format!("apply {good} -i nosuch0"), 1, "failed"),
    ] {
        for json in ["-o json", "--output=json", "-ojson"] {
            let outcome = lab.run(&format!("{words} {json}")).expect(code);
            let output = outcome.json();
            expect_valid("error", &output);
            let error = &output["error"];
            assert_eq!((&error["kind"], &error["exit_code"]), (&json!(kind), &json!(code)));
            assert!(!outcome.stderr.is_empty(), "{outcome:?}");
            let diagnostics = error["diagnostics"].as_array().map_or(0, Vec::len);
            assert_eq!(diagnostics > 0, code == 65, "{output:#}");
        }
    }
    let checked = lab.run(&format!("check --no-resolve {good} {bad} nowhere.yaml -o json"));
    let checked = checked.expect(66).json();
    expect_valid("check", &checked);
    assert_eq!(checked["valid"], false);
    let valid: Vec<bool> = checked["files"]
        .as_array()
        .expect("files")
        .iter()
        .map(|file| file["valid"].as_bool().expect("a boolean"))
        .collect();
    assert_eq!(valid, [true, false, false]);
    assert_eq!(checked["files"][0]["rule_count"], 1);
    let diagnostic = &checked["files"][1]["diagnostics"][0];
    assert_eq!((&diagnostic["line"], &diagnostic["field"]), (&json!(3), &json!("rules[0].keys")));
    assert_eq!(checked["files"][2]["error"]["kind"], "unreadable");
}

/// Collects the values of a field at any depth.
fn values<'a>(output: &'a Value, name: &str, found: &mut Vec<&'a Value>) {
    match output {
        Value::Object(fields) => {
            found.extend(fields.get(name));
            fields.values().for_each(|value| values(value, name, found));
        }
        Value::Array(items) => items.iter().for_each(|value| values(value, name, found)),
        _ => {}
    }
}

#[test]
fn one_thing_has_one_name() {
    let lab = busy();
    let outputs: BTreeMap<&str, Value> = [
        ("status", "status -o json"),
        ("top", "top --once --interval 0.2 -o json"),
        ("get", "get 10.1.0.20:5666 10.1.0.1:5000 -o json"),
        ("drain", "drain flows/spy -o json"),
        ("flows", "flows -o json"),
    ]
    .map(|(of, words)| (of, lab.run(words).json()))
    .into();
    let of = |output: &str, name: &str| {
        let mut found = Vec::new();
        values(&outputs[output], name, &mut found);
        found.into_iter().filter_map(|value| value.as_str().map(String::from)).collect::<Vec<_>>()
    };
    let known = of("status", "upstream");
    assert!(known.contains(&"spy".into()) && known.contains(&"10.2.0.20:7000".into()), "{known:?}");
    for output in ["top", "get", "drain", "flows"] {
        let (upstreams, rules) = (of(output, "upstream"), of(output, "rule"));
        assert!(!upstreams.is_empty() && !rules.is_empty(), "{:#}", outputs[output]);
        assert!(upstreams.iter().all(|it| known.contains(it)), "{:#}", outputs[output]);
        assert!(rules.iter().all(|it| of("status", "rule").contains(it)));
    }
    assert!(of("get", "key").iter().all(|key| of("status", "key").contains(key)));
    assert!(of("get", "interface").contains(&"up0".into()));
    assert!(of("status", "interface").contains(&"up0".into()));
    let time = of("status", "applied").remove(0);
    assert!(time.starts_with("20") && time.ends_with('Z') && time.contains('T'), "{time}");
    let status = &outputs["status"];
    let counters = &status["rules"][1]["counters"];
    // a loss of one receiver is not a loss of the rule
    assert_eq!(counters["forwarded"]["packets"], 1, "{counters:#}");
    assert!(counters.get("not_forwarded").is_none(), "{counters:#}");
    let lost = &status["rules"][1]["upstreams"][0]["counters"];
    assert_eq!(lost["not_forwarded"]["no-route"]["packets"], 1, "{lost:#}");
    for output in outputs.values() {
        let mut shares = Vec::new();
        values(output, "share", &mut shares);
        assert!(shares.iter().filter_map(|it| it.as_f64()).all(|it| (0.0..=1.0).contains(&it)));
    }
    let mut ids = Vec::new();
    lab.relay.ip("link set eth0 down");
    let doctor = lab.run("doctor -o json").json();
    values(&doctor["findings"], "id", &mut ids);
    assert!(ids.contains(&&json!("interface-down")), "{doctor:#}");
}
