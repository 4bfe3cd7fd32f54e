//! Configuration files: accepted ones with their meaning, refused ones with their diagnostics.

use std::fmt::Write as _;
use std::path::Path as FilePath;

use proptest::prelude::*;
use udplb::config::{
    Action, Addresses, Admission, Config, Diagnostic, Family, Fragments, Hash, Health, Host,
    KeyAddress, MARKS, Message, Mode, Payload, Ports, Severity, Source, State, Strategy, Via,
    manual, markdown, schema,
};

const SEED: &str = include_str!("../../examples/seed.yaml");
const YAML: &str = include_str!("../../examples/udplb.yaml");
const TOML: &str = include_str!("../../examples/udplb.toml");

fn accept(name: &str, text: &str) -> Config {
    match Config::parse(name, text) {
        Ok(config) => config,
        Err(errors) => panic!("{}", render(&errors)),
    }
}

/// Returns a `version: 1` file with one rule; the arguments replace parts of a valid rule.
fn rule(key: &str, options: &str, upstream: &str) -> String {
    format!(
        "version: 1\nrules:\n- key: {{ {key} }}\n  options: {{ {options} }}\n  upstream: [{upstream}]\n"
    )
}

fn refuse(name: &str, text: &str) -> Vec<Diagnostic> {
    match Config::parse(name, text) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(errors) => errors,
    }
}

fn render(diagnostics: &[Diagnostic]) -> String {
    let lines = diagnostics.iter().map(Diagnostic::to_string);
    lines.collect::<Vec<_>>().join("\n")
}

// Refused configurations.

/// Checks each case of tests/config/refused.txt. `UPDATE=1` rewrites the diagnostics in the file;
/// review them before committing.
#[test]
fn refused_files_have_the_expected_diagnostics() {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/refused.txt");
    let file = std::fs::read_to_string(&path).unwrap();
    let (head, cases) = file.split_once("===== ").unwrap();
    let mut answers = String::from(head);
    for case in cases.split("\n===== ") {
        let (name, case) = case.split_once('\n').unwrap();
        let (text, _) = case.split_once("-----\n").unwrap();
        let answer = render(&refuse(name, text));
        write!(answers, "===== {name}\n{text}-----\n{answer}\n\n").unwrap();
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, answers.trim_end().to_string() + "\n").unwrap();
        return;
    }
    for (expected, answer) in file.split("\n===== ").zip(answers.split("\n===== ")) {
        assert_eq!(expected.trim_end(), answer.trim_end());
    }
}

/// Checks the table of words in docs/configuration.md. `UPDATE=1` rewrites the table.
#[test]
fn documented_words_are_those_of_the_program() {
    let path = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let file = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = file.split_once(MARKS.0).unwrap();
    let (_, tail) = rest.split_once(MARKS.1).unwrap();
    let fresh = [head, MARKS.0, &markdown(), MARKS.1, tail].concat();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, fresh).unwrap();
        return;
    }
    assert_eq!(file, fresh, "stale: UPDATE=1 cargo test --test config");
}

#[test]
fn manual_shows_every_word() {
    let page = manual(&[("mtu", "a `-` meaning".into())]);
    for word in
        ["options.tc_action", "options.zero\\-checksum", "key.from", "mtu", "upstream[].weight"]
    {
        assert!(page.contains(&format!(".TP\n\\fB\\&{word}\\fR\n")), "{word}: {page}");
    }
    assert!(page.contains("\\&a \\fB\\-\\fR meaning"));
}

#[test]
fn refused_characters_are_named() {
    let cases = [
        (
            "",
            "error: f:1:1: the file is empty\n  = help: a configuration is a map with \
             `version: 1` and `rules:`, or a bare list of rules",
        ),
        (
            "\u{feff}version: 2\n",
            "error: f:1:10: version: version 2 is unknown: this udplb understands version 1\n  \
             |\n1 | version: 2\n  |          ^",
        ),
        (
            "version: 1\r\nrules: é\r\n",
            "error: f:2:8: rules: expected a list of rules, found the text `é`\n  |\n\
             2 | rules: é\n  |        ^",
        ),
        (
            "version: 1\nrules: \x07\n",
            "error: f:2:8: control characters are not allowed\n  |\n2 | rules: \u{fffd}\n  \
             |        ^",
        ),
        (
            "version: 1 # \u{2028}\nrules: 5",
            "error: f:2:8: rules: expected a list of rules, found the number 5\n  |\n\
             2 | rules: 5\n  |        ^",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(render(&refuse("f", text)), expected);
    }
}

#[test]
fn twenty_errors_are_shown_and_the_rest_is_counted() {
    let many = |count| format!("version: 1\nrules:\n{}", "- 5\n".repeat(count));
    assert_eq!(refuse("f", &many(20)).len(), 20);
    let errors = refuse("f", &many(21));
    assert_eq!(errors.len(), 21);
    assert!(errors[20].message.starts_with("expected a rule"));
    let errors = refuse("f", &many(30));
    assert_eq!(errors.len(), 21);
    assert_eq!(errors[20].to_string(), "error: f:23:3: rules[20]: and 10 more errors");
}

#[test]
fn key_entries_and_upstreams_are_limited() {
    let rules = |ports: &str, upstreams: &[usize]| {
        let upstream = |nth| {
            let (a, b, c) = (nth / 10_000, nth / 100 % 100, nth % 100);
            format!("{{ \"address\": \"10.1{a}.{b}.{c}\" }}")
        };
        let rule = |(nth, count): (usize, &usize)| {
            let upstreams: Vec<_> = (0..*count).map(upstream).collect();
            let ports = if nth == 0 { ports } else { "1-50000" };
            format!(
                "{{ \"key\": {{ \"address\": \"10.0.0.{nth}\", \"port\": \"{ports}\" }}, \"options\": \
                 {{ \"hash\": \"modulo\" }}, \"upstream\": [{}] }}",
                upstreams.join(", ")
            )
        };
        let rules: Vec<_> = upstreams.iter().enumerate().map(rule).collect();
        format!("{{ \"version\": 1, \"rules\": [{}] }}", rules.join(", "))
    };
    let messages = |text: &str| -> Vec<String> {
        refuse("f", text).into_iter().map(|error| error.message.to_string()).collect()
    };
    accept("f", &rules("1-50000", &[65_535]));
    let mut upstreams = [1; 20];
    upstreams[..4].copy_from_slice(&[65_535, 65_535, 65_535, 3380]);
    assert_eq!(
        messages(&rules("1-50001", &upstreams)),
        [
            "1000001 key entries (each port of a range is one, for each network of senders), and at most 1000000 fit",
            "200001 upstreams in all rules, and at most 200000 fit",
        ]
    );
    let message = "65536 upstreams, and at most 65535 fit into a rule";
    assert_eq!(messages(&rules("1", &[65_536])), [message]);
}

#[test]
fn packet_has_64_receivers_at_most() {
    let hosts = |count| {
        let host = |nth| format!("{{ address: 10.0.9.{nth} }}");
        (1..=count).map(host).collect::<Vec<_>>().join(", ")
    };
    let key = "address: 10.0.0.5, port: 53";
    let replicate = |count| rule(key, "mode: replicate, source: vip", &hosts(count));
    let mirrors =
        |count| rule(key, "", "{ address: a }") + &format!("  mirror: [{}]\n", hosts(count));
    for (text, field) in [
        (replicate(64), ""),
        (mirrors(64), ""),
        (replicate(65), "upstream"),
        (mirrors(65), "mirror"),
    ] {
        if field.is_empty() {
            accept("f", &text);
            continue;
        }
        let error = &refuse("f", &text)[0];
        assert_eq!(error.field, format!("rules[0].{field}"));
        assert_eq!(error.message, "65 hosts, and at most 64 can get one packet");
    }
    accept("f", &rule(key, "", &hosts(65)));
}

#[test]
fn hostile_files_end_in_an_error() {
    let mut bomb = String::from("a0: &a0 [x, x]\n");
    for level in 1..64 {
        let below = level - 1;
        writeln!(bomb, "a{level}: &a{level} [*a{below}, *a{below}]").unwrap();
    }
    let wide = format!("a: &a [{}]\nb: [{}]\n", "x,".repeat(10_000), "*a,".repeat(10_000));
    let numbers = |form: fn(u32) -> String| (1..10_000).map(form).collect::<Vec<_>>().join(", ");
    let ports = numbers(|port| port.to_string());
    let from = numbers(|nth| format!("10.0.{}.{}", nth / 100, nth % 100));
    let claims = format!("address: 10.0.0.5, port: [{ports}], from: [{from}]");
    let cases = [
        ("f", bomb),
        ("f", wide),
        ("f", rule(&claims, "", "{ address: 10.0.9.1 }")),
        ("f", "[".repeat(100_000)),
        ("f", "{a: ".repeat(100_000)),
        ("f", "- ".repeat(100_000)),
        ("f", "? ".repeat(10_000)),
        ("f.toml", format!("a = {}", "[".repeat(100_000))),
        ("f.toml", format!("{} = 1", vec!["a"; 100_000].join("."))),
    ];
    for (name, text) in cases {
        assert!(!refuse(name, &text).is_empty());
    }
}

// Accepted configurations.

#[test]
fn bare_list_keeps_its_defaults() {
    let config = accept("seed.yaml", SEED);
    let [rule] = &config.rules[..] else { panic!("one rule") };
    assert!(config.interfaces.is_empty() && config.warnings.is_empty());
    assert_eq!(rule.name, "1.2.3.4:1111");
    assert_eq!(rule.key.address.to_string(), "1.2.3.4");
    assert_eq!(rule.key.ports, [Ports { first: 1111, last: 1111 }]);
    assert_eq!(
        (rule.action, rule.strategy, rule.hash, rule.source),
        (Action::Pass, Strategy::SrcIp, Hash::Modulo, Source::Vip)
    );
    assert_eq!(rule.upstreams[0].endpoint(), "10.100.53.27:2222");
    assert_eq!(rule.upstreams[0].at.to_string(), "[0].upstream[0]");

    // Defaults: pass, src-port. A repeated upstream counts as a weight.
    let twice = "- key: { address: 10.0.0.5, port: 53 }\n  upstream:\n  - { address: h_1, port: 1 }\n  - { address: h_1, port: 1 }\n";
    let rule = accept("f", twice).rules.remove(0);
    assert_eq!(
        (rule.action, rule.strategy, rule.hash, rule.source),
        (Action::Pass, Strategy::SrcPort, Hash::Modulo, Source::Vip)
    );
    assert_eq!(rule.upstreams.len(), 2);
}

#[test]
fn map_form_has_its_own_defaults() {
    let text = rule("address: 10.0.0.5, port: 53", "", "{ address: 10.0.9.1 }");
    let rule = accept("f", &text).rules.remove(0);
    assert_eq!(
        (rule.action, rule.strategy, rule.hash, rule.source),
        (Action::Pass, Strategy::SrcIpPort, Hash::Maglev, Source::Vip)
    );
    assert_eq!(rule.upstreams[0].port, None);
}

#[test]
fn every_word_is_accepted() {
    let text = "
version: 1
defaults: { strategy: payload, payload: statsd, hash: modulo, fragments: drop, martians: allow }
rules:
- name: all
  key: { address: 10.0.0.5, port: any, from: [10.20.0.0/16, 192.0.2.1] }
  options: { tc_action: block, mode: replicate, source: preserve, senders: 4096 }
  upstream:
  - { address: 10.0.9.1, sample: 10 }
  - { address: 10.0.9.2, source: egress, state: drained }
- name: one
  key: { address: any, port: 53 }
  options: { hash: maglev, payload: { offset: 4, length: \"8\" }, health: neighbour, fragments: pass,
             zero-checksum: allow, martians: deny }
  upstream:
  - { address: a.example, weight: 2, state: active, addresses: all }
  mirror:
  - { name: m, address: 10.0.9.1, port: 54, sample: 1000000, source: vip, state: drained }
- name: names
  key: { address: any, port: 53, from: \"::/0\" }
  options: { strategy: random }
  upstream: [{ address: a.example }]
";
    let config = accept("f", text);
    assert!(config.warnings.is_empty());
    let [all, one, names] = &config.rules[..] else { panic!("three rules") };
    assert!(all.key.ports.is_empty());
    assert_eq!(
        all.key.from.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.20.0.0/16", "192.0.2.1"]
    );
    // the defaults' selection options do not apply to a replicating rule
    assert_eq!(
        (all.mode, all.strategy, all.payload, all.hash),
        (Mode::Replicate, Strategy::SrcIpPort, None, Hash::Maglev)
    );
    assert_eq!((all.source, all.fragments), (Source::Preserve, Fragments::Drop));
    assert_eq!((all.zero_checksum, all.martians), (Admission::Deny, Admission::Allow));
    assert_eq!((all.senders, one.senders), (Some(4096), None));
    let [sampled, drained] = &all.upstreams[..] else { panic!("two upstreams") };
    assert_eq!((sampled.sample, sampled.source, sampled.state), (Some(10), None, State::Active));
    assert_eq!(
        (drained.sample, drained.source, drained.state),
        (None, Some(Source::Egress), State::Drained)
    );

    assert_eq!(one.key.address, KeyAddress::Any);
    assert_eq!(
        (one.mode, one.strategy, one.payload, one.hash),
        (
            Mode::Balance,
            Strategy::Payload,
            Some(Payload::Bytes { offset: 4, length: 8 }),
            Hash::Maglev
        )
    );
    assert_eq!((&one.health, one.fragments), (&Health::Neighbour, Fragments::Pass));
    assert_eq!((one.zero_checksum, one.martians), (Admission::Allow, Admission::Deny));
    assert_eq!(one.upstreams[0].weight, Some(2));
    assert_eq!(one.upstreams[0].addresses, Addresses::All);
    assert_eq!(names.upstreams[0].addresses, Addresses::One);
    let mirror = &one.mirrors[0];
    assert_eq!((mirror.sample, mirror.source), (Some(1_000_000), Some(Source::Vip)));
    assert_eq!((mirror.state, mirror.endpoint()), (State::Drained, "10.0.9.1:54".into()));
    // the family follows from the mirror, or from the senders
    assert_eq!((one.family(), names.family()), (Family::V4, Family::V6));
    assert_eq!((names.strategy, names.payload), (Strategy::Random, None));
}

#[test]
fn decap_needs_no_rules() {
    let file = |from: &str| {
        let text = format!("version: 1\ninterfaces: [ens3]\ndecap: {{ from: {from}, via: gue }}\n");
        accept("f", &text)
    };
    let config = file("10.2.0.0/24");
    assert!(config.warnings.is_empty() && config.rules.is_empty(), "{config:?}");
    let decap = config.decap.expect("it is there");
    assert_eq!((decap.from.len(), &decap.via[..]), (1, &[Via::Gue][..]));
    assert!(
        accept("f", "version: 1\nrules: []\ndecap: { from: \"::1\", via: [ipip] }\n")
            .warnings
            .is_empty()
    );
    let all = file("[10.2.0.1, \"::/0\"]");
    assert!(all.warnings[0].message.contains("::/0 has anybody put packets"), "{all:?}");
}

#[test]
fn addresses_of_both_families_are_accepted() {
    let text = "
- key: { address: 2001:DB8::5, port: 53 }
  upstream:
  - { address: fe80::1%eth0, port: 54 }
  - { address: \"2001:db8:0::6\", port: 54 }
";
    for text in [text.into(), format!("version: 1\nrules:{text}")] {
        let rule = accept("f", &text).rules.remove(0);
        assert_eq!((rule.name.as_str(), rule.family()), ("[2001:db8::5]:53", Family::V6));
        let endpoints: Vec<String> = rule.upstreams.iter().map(|it| it.endpoint()).collect();
        assert_eq!(endpoints, ["[fe80::1%eth0]:54", "[2001:db8::6]:54"]);
    }
    for key in ["224.0.0.1", "239.1.2.3", "255.255.255.255", "10.0.0.255", "127.0.0.1"] {
        let key = format!("address: {key}, port: 53");
        accept("f", &rule(&key, "source: preserve", "{ address: 10.0.9.1 }"));
    }
    for key in ["ff02::1", "fe80::5", "::1"] {
        let key = format!("address: \"{key}\", port: any");
        let upstream = "{ address: a, source: egress }";
        let rule = accept("f", &rule(&key, "", upstream)).rules.remove(0);
        assert_eq!(rule.family(), Family::V6);
    }
}

/// The more specific of two keys matches, so overlapping keys are different.
#[test]
fn overlapping_keys_are_accepted_if_unambiguous() {
    let rules = |keys: &[&str]| {
        let rules = keys.iter().enumerate().map(|(nth, key)| {
            let (v6, key) = (key.contains(":db8:"), key);
            let upstream = if v6 { "\"2001:db8::9\"" } else { "10.0.9.1" };
            format!("- name: r{nth}\n  key: {{ {key} }}\n  upstream: [{{ address: {upstream} }}]\n")
        });
        format!("version: 1\nrules:\n{}", rules.collect::<String>())
    };
    let good = [
        "address: 10.0.0.5, port: 53",
        "address: 10.0.0.5, port: any",
        "address: 10.0.0.5, port: 50-60, from: 10.0.0.0/8",
        "address: 10.0.0.5, port: [53, 54], from: 10.1.0.0/16",
        "address: 10.0.0.5, port: any, from: [10.2.0.0/16, 10.1.0.0/16]",
        "address: any, port: 53",
        "address: any, port: any",
        "address: any, port: 53, from: 2001:db8::/32",
        "address: any, port: any, from: 2001:db8::/32",
        "address: any, port: any, from: 192.0.2.1",
    ];
    assert!(accept("f", &rules(&good)).warnings.is_empty());
    for key in good {
        refuse("f", &rules(&[key, key]));
    }
}

#[test]
fn copies_from_this_host_alone_are_a_warning() {
    let key = "address: 10.0.0.5, port: 53";
    let warnings = |options: &str, upstream: &str| {
        let warnings = accept("f", &rule(key, options, upstream)).warnings;
        warnings.into_iter().map(|it| (it.field, it.line)).collect::<Vec<_>>()
    };
    let two = "{ address: 10.0.9.1 }, { address: 10.0.9.2 }";
    let one_says = "{ address: 10.0.9.1, source: vip }, { address: 10.0.9.2 }";
    let both_say = "{ address: 10.0.9.1, source: vip }, { address: 10.0.9.2, source: egress }";
    let warned = || vec![("rules[0].options".to_string(), 4)];
    assert_eq!(warnings("mode: replicate", two), warned());
    assert_eq!(warnings("mode: replicate", one_says), warned());
    assert_eq!(warnings("mode: replicate", both_say), []);
    assert_eq!(warnings("mode: replicate, source: vip", two), []);
    assert_eq!(warnings("mode: balance", two), []);
    let by_default = rule(key, "mode: replicate", two)
        .replace("rules:", "defaults: { source: preserve }\nrules:");
    assert!(accept("f", &by_default).warnings.is_empty());
}

#[test]
fn sum_of_weights_is_limited() {
    let weights = |first: u32, second: u32| {
        let upstream = format!(
            "{{ address: 10.0.9.1, weight: {first} }}, {{ address: 10.0.9.2, weight: {second} }}"
        );
        Config::parse("f", &rule("address: 10.0.0.5, port: 53", "", &upstream)).is_ok()
    };
    assert!(weights(9_999, 1) && weights(10_000, 10_000) && weights(10_000, 2));
    assert!(!weights(10_000, 1));
}

#[test]
fn yaml_toml_and_json_are_equivalent() {
    let yaml = accept("udplb.yaml", YAML);
    let toml = accept("udplb.toml", TOML);
    assert_eq!(yaml.rules, toml.rules);
    assert_eq!(yaml.interfaces, ["ens3"]);
    assert_eq!(toml.interfaces, ["ens3"]);

    assert!(yaml.warnings.is_empty());
    let [flows, metrics, syslog, syslog6] = &yaml.rules[..] else { panic!("four rules") };
    assert_eq!(flows.key.ports[2], Ports { first: 6343, last: 6350 });
    assert_eq!((flows.mode, flows.source), (Mode::Replicate, Source::Preserve));
    assert_eq!(flows.upstreams[2].source, Some(Source::Egress));
    assert_eq!((metrics.action, metrics.strategy), (Action::Block, Strategy::SrcIp));
    assert_eq!(metrics.upstreams[1].port, Some(9125));
    assert_eq!(metrics.upstreams[2].state, State::Drained);
    assert_eq!(syslog.upstreams[0].address, Host::Name("logs.example.net".into()));
    assert_eq!(syslog.mirrors[0].endpoint(), "10.0.9.30");
    assert_eq!(syslog6.family(), Family::V6);

    let value: serde_json::Value = serde_yaml::from_str(YAML).unwrap();
    for json in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
        assert_eq!(accept("udplb.json", &json).rules, yaml.rules);
        assert_eq!(accept("-", &json).rules, yaml.rules);
    }
}

#[test]
fn defaults_apply_to_rules_without_options() {
    let text = "
version: 1
defaults: { tc_action: block, hash: modulo, source: preserve, mode: balance }
rules:
- key: { address: 10.0.0.5, port: 53 }
  options: { source: vip }
  upstream: [{ address: 10.0.9.1 }, { address: 10.0.9.2 }]
";
    let rule = accept("f", text).rules.remove(0);
    assert_eq!((rule.action, rule.source), (Action::Block, Source::Vip));
}

#[test]
fn ports_are_numbers_strings_ranges_and_lists() {
    let ports = |port: &str| {
        let key = format!("address: 10.0.0.5, port: {port}");
        let rule = accept("f", &rule(&key, "", "{ address: a }")).rules.remove(0);
        let ports = rule.key.ports.iter().map(Ports::to_string);
        ports.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(ports("53"), "53");
    assert_eq!(ports("\"53\""), "53");
    assert_eq!(ports("0x35"), "53");
    assert_eq!(ports("65535"), "65535");
    assert_eq!(ports("53-54"), "53-54");
    assert_eq!(ports("'53 - 53'"), "53");
    assert_eq!(ports("[53, \"54\", 60-70]"), "53 54 60-70");
}

#[test]
fn anchors_are_resolved() {
    let text = "
version: 1
rules:
- key: { address: 10.0.0.5, port: 53 }
  options: &options { hash: modulo }
  upstream: &upstream [{ address: 10.0.9.1 }, { address: 10.0.9.2 }]
- key: { address: 10.0.0.5, port: 54 }
  options: *options
  upstream: *upstream
";
    let config = accept("f", text);
    assert_eq!(config.rules[1].upstreams[1].endpoint(), "10.0.9.2");
}

#[test]
fn upstreams_that_form_no_loop_are_accepted() {
    let other_port = "{ address: 10.0.0.5, port: 54 }";
    accept("f", &rule("address: 10.0.0.5, port: 53", "", other_port));
    // With a range of ports, the original port and a fixed port are two different upstreams.
    let two = "{ address: 10.0.9.1 }, { address: 10.0.9.1, port: 53 }";
    accept("f", &rule("address: 10.0.0.5, port: 53-54", "hash: modulo", two));
    accept("f", &rule("address: 127.0.0.1, port: 53", "", "{ address: a.b-c.example. }"));
}

#[test]
fn lossy_implicit_defaults_are_warnings() {
    let warned = |port: &str, action: &str, options: &str, upstream: &str| {
        let text = format!(
            "version: 1\n{options}\nrules:\n- key: {{ address: any, port: {port} }}\n  \
             options: {{ tc_action: {action} }}\n  upstream: [{upstream}]\n"
        );
        let warnings = accept("f", &text).warnings.into_iter();
        let words = ["all senders look like", "each packet goes to one", "every datagram"];
        warnings
            .map(|it| words.iter().position(|word| it.message.contains(word)).expect("a warning"))
            .map(|place| place.to_string())
            .collect::<String>()
    };
    let one = "{ address: 10.0.9.1 }";
    let two = "{ address: 10.0.9.1 }, { address: 10.0.9.2 }";
    for port in [162, 514, 2055, 4739, 6343, 9995, 9996] {
        assert_eq!(warned(&port.to_string(), "pass", "", one), "0", "{port}");
    }
    assert_eq!(warned("'500-600'", "block", "", one), "0");
    assert_eq!(warned("2055", "pass", "defaults: { source: vip }", one), "");
    assert_eq!(warned("2055", "pass", "", "{ address: 10.0.9.1, source: egress }"), "");
    assert_eq!(warned("53", "pass", "", one), "");
    assert_eq!(warned("53", "pass", "", two), "1");
    assert_eq!(warned("2055", "pass", "", two), "10");
    for said in ["mode: balance", "strategy: random", "hash: modulo"] {
        assert_eq!(warned("53", "pass", &format!("defaults: {{ {said} }}"), two), "", "{said}");
    }
    assert_eq!(warned("53", "pass", "", &two.replace("9.2", "9.2, weight: 2")), "");
    assert_eq!(warned("any", "block", "", one), "2");
    assert_eq!(warned("any", "pass", "", one), "");
    // the bare list has no options to avoid the warning
    let bare = "- key: { address: 10.0.0.5, port: 514 }\n  upstream: [{ address: 10.0.9.1 }, { address: 10.0.9.2 }]\n";
    assert!(accept("f", bare).warnings.is_empty());
}

#[test]
fn examples_have_no_warnings() {
    for (name, text) in [("seed.yaml", SEED), ("udplb.yaml", YAML), ("udplb.toml", TOML)] {
        let warnings = accept(name, text).warnings;
        assert!(warnings.is_empty(), "{name}: {}", render(&warnings));
    }
    // the example in the comment of Debian's file
    let debian = include_str!("../../contrib/debian/udplb.yaml");
    let (_, example) = debian.split_once("This example").expect("an example");
    let lines = example.lines().filter_map(|line| line.strip_prefix("#   "));
    let text = format!("version: 1\n{}", lines.collect::<Vec<_>>().join("\n"));
    let config = accept("udplb.yaml", &text);
    assert_eq!((config.rules.len(), render(&config.warnings).as_str()), (1, ""));
}

#[test]
fn no_rules_are_a_warning() {
    let config = accept("f", "version: 1\nrules: []\n");
    assert_eq!(
        render(&config.warnings),
        "warning: f:2:1: rules: no rules: nothing will match\n  |\n2 | rules: []\n  | ^"
    );
    assert_eq!(accept("f", "[]").warnings.len(), 1);
}

#[test]
fn later_stages_cite_the_file() {
    let config = accept("udplb.yaml", YAML);
    let at = config.rules[2].upstreams[0].at.field("address");
    let error = &config.errors(vec![Message::about(&at, "does not resolve")])[0];
    assert_eq!((error.line, error.severity), (38, Severity::Error));
    assert_eq!(
        error.to_string().lines().next(),
        Some("error: udplb.yaml:38:35: rules[2].upstream[0].address: does not resolve")
    );
    let config = accept("udplb.toml", TOML);
    let warning = &config.warnings(vec![Message::about(&at, "has two addresses")])[0];
    assert_eq!(
        warning.to_string().lines().next(),
        Some("warning: udplb.toml:40:43: rules[2].upstream[0].address: has two addresses")
    );
}

#[test]
fn diagnostics_are_data() {
    let errors = refuse("f", "version: 1\ninterfaces: [a, a]\nrules: []\n");
    assert_eq!(
        serde_json::to_value(&errors).unwrap(),
        serde_json::json!([{
            "severity": "error",
            "file": "f",
            "line": 2,
            "column": 17,
            "field": "interfaces[1]",
            "message": "`a` is named twice",
            "help": null,
            "related": {
                "line": 2,
                "column": 14,
                "field": "interfaces[0]",
                "label": "named here first",
            },
        }])
    );
}

#[test]
fn hosts_are_plain_strings() {
    for text in ["10.0.9.1", "2001:db8::5", "fe80::1%eth0", "logs.example.net"] {
        let host: Host = serde_json::from_value(text.into()).unwrap();
        assert_eq!(host.to_string(), text);
        assert_eq!(serde_json::to_value(&host).unwrap(), text);
    }
    for text in ["127.0.0.1", "10.0.0.256", "::1", "a b", ""] {
        assert!(serde_json::from_value::<Host>(text.into()).is_err());
    }
}

/// Returns the schema's words for an option, in the map form and in the bare list.
#[test]
fn schema_has_every_word() {
    let schema = schema();
    assert_eq!(schema["$schema"], "http://json-schema.org/draft-07/schema#");
    let [map, list] = &schema["oneOf"].as_array().unwrap()[..] else { panic!("two forms") };
    let rule = &map["properties"]["rules"]["items"]["properties"];
    assert_eq!(rule["options"], {
        let mut options = map["properties"]["defaults"].clone();
        options["description"] = rule["options"]["description"].clone();
        options
    });
    let options = &rule["options"]["properties"];
    assert_eq!(options["hash"]["enum"], serde_json::json!(["modulo", "maglev"]));
    assert_eq!(options["hash"]["default"], "maglev");
    assert_eq!(options["tc_action"]["default"], "pass");
    assert_eq!(options["payload"]["anyOf"][0]["enum"][6], "radius-id");
    let upstream = &rule["upstream"]["items"]["properties"];
    let sources = &upstream["source"]["anyOf"];
    assert_eq!(sources[0]["enum"], serde_json::json!(["vip", "preserve", "egress"]));
    assert!(sources[2]["pattern"].is_string(), "an address with a port");
    assert_eq!(upstream["source"]["default"], serde_json::Value::Null);
    assert_eq!(upstream["weight"]["maximum"], 10_000);
    assert_eq!(rule["mirror"]["items"]["properties"]["weight"], serde_json::Value::Null);
    assert_eq!(map["required"], serde_json::json!(["version"]));
    let either = serde_json::json!([{ "required": ["rules"] }, { "required": ["decap"] }]);
    assert_eq!(map["anyOf"], either);
    assert_eq!(map["additionalProperties"], false);

    let seed = &list["items"]["properties"];
    assert_eq!(seed["options"]["properties"]["hash"], serde_json::Value::Null);
    assert_eq!(seed["options"]["properties"]["strategy"]["default"], "src-port");
    assert_eq!(seed["name"], serde_json::Value::Null);
}

// Any text: no panic, and every reported position lies in the text.

fn check_positions(name: &str, text: &str) {
    let diagnostics = match Config::parse(name, text) {
        Ok(config) => config.warnings,
        Err(errors) => {
            assert!(!errors.is_empty());
            errors
        }
    };
    let text = text.trim_start_matches('\u{feff}');
    for diagnostic in diagnostics {
        let related = diagnostic.related.iter();
        let places = related.map(|related| (related.line, related.column));
        for (line, column) in places.chain([(diagnostic.line, diagnostic.column)]) {
            let line = text.split('\n').nth(line - 1);
            let length = line.unwrap_or_else(|| panic!("{diagnostic}")).chars().count();
            assert!((1..=length + 1).contains(&column), "{diagnostic}");
        }
        assert!(diagnostic.to_string().lines().count() <= 8);
    }
}

fn file() -> impl proptest::strategy::Strategy<Value = (&'static str, &'static str)> {
    prop::sample::select(vec![("f", SEED), ("f", YAML), ("f.toml", TOML)])
}

/// Replaces a piece of a text.
fn mutate(text: &str, from: usize, length: usize, with: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let from = from % (characters.len() + 1);
    let to = (from + length).min(characters.len());
    let (before, after) = (&characters[..from], &characters[to..]);
    before.iter().copied().chain(with.chars()).chain(after.iter().copied()).collect()
}

/// Pieces with a meaning for the parsers.
const PIECES: &[&str] = &[
    "",
    " ",
    "\n",
    "\n  ",
    "\t",
    "\r",
    "\u{85}",
    "\u{2028}",
    "\u{feff}",
    "é",
    "\0",
    "-",
    "- ",
    ":",
    ": ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "#",
    "'",
    "\"",
    "\\",
    "&a ",
    "*a",
    "!t ",
    "!!int ",
    "|\n",
    ">\n",
    "? ",
    "<<: ",
    "---\n",
    "...\n",
    "%",
    "@",
    "=",
    "[[rules]]\n",
    "null",
    "~",
    "true",
    "0",
    "-1",
    "1e9",
    "99999",
    "2-1",
    "1-65535",
    "port",
    "port: 1",
    "port: any",
    "from: [10.0.0.0/8]",
    "weight: 2",
    "sample: 2",
    "addresses: all",
    "mode: replicate",
    "mirror: [{address: a}]",
    "payload: {offset: 1, length: 2}",
    "strategy: payload",
    "2001:db8::1",
    "fe80::1%e",
    "address: 1",
    "version: 1\n",
    "name: a\n",
    "\\e",
    "1979-05-27",
    "\u{1b}[31m",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_text_is_parsed_or_refused(text in "\\PC{0,80}|[ \\n:{}\\[\\]&*!'\"a0-]{0,80}", toml in any::<bool>()) {
        check_positions(if toml { "f.toml" } else { "f" }, &text);
    }

    #[test]
    fn damaged_files_are_parsed_or_refused(
        (name, text) in file(),
        changes in prop::collection::vec(
            (any::<usize>(), 0..12_usize, prop::sample::select(PIECES)), 1..6,
        ),
    ) {
        let mut text = text.to_string();
        for (from, length, with) in changes {
            text = mutate(&text, from, length, with);
        }
        check_positions(name, &text);
        check_positions("f", &text);
    }

    #[test]
    fn damaged_json_is_parsed_or_refused(from in any::<usize>(), length in 0..12_usize, with in prop::sample::select(PIECES)) {
        let value: serde_json::Value = serde_yaml::from_str(YAML).unwrap();
        check_positions("f.json", &mutate(&value.to_string(), from, length, with));
    }
}

#[test]
fn weights_with_large_tables_are_a_warning() {
    let weighted = |weight: u32| {
        let upstreams =
            format!("{{ address: 10.0.9.1 }}, {{ address: 10.0.9.2, weight: {weight} }}");
        accept("f", &rule("address: 10.0.0.5, port: 53", "", &upstreams)).warnings
    };
    assert!(weighted(99).is_empty());
    assert!(weighted(100)[0].message.contains("a table of 100003 slots"));
    let warning = &weighted(9_999)[0];
    assert!(warning.message.contains("up to 2000 kB of kernel memory"), "{warning}");
    assert_eq!(
        (warning.severity, warning.field.as_str()),
        (Severity::Warning, "rules[0].upstream")
    );
}
