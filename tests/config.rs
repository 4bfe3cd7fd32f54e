//! Configuration files: what is accepted and as what, what is refused and with which words.

use std::fmt::Write as _;
use std::path::Path as FilePath;

use proptest::prelude::*;
use udplb::config::{
    Action, Config, Diagnostic, Finding, Hash, Host, Ports, Severity, Source, Strategy, schema,
};

const SEED: &str = include_str!("../examples/seed.yaml");
const YAML: &str = include_str!("../examples/udplb.yaml");
const TOML: &str = include_str!("../examples/udplb.toml");

fn accept(name: &str, text: &str) -> Config {
    match Config::parse(name, text) {
        Ok(config) => config,
        Err(errors) => panic!("{}", render(&errors)),
    }
}

/// One rule in a `version: 1` file, which is good but for what is changed in it.
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

// What is refused.

/// Each case of tests/config/refused.txt. `UPDATE=1` writes the answers into the file anew, to be
/// read before they are committed.
#[test]
fn refused() {
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

#[test]
fn refused_for_characters_that_an_editor_would_lose() {
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
    let rules = |ports: &str, upstreams: usize| {
        let upstream = |nth| {
            let (a, b, c) = (nth / 10_000, nth / 100 % 100, nth % 100);
            format!("{{ address: 10.1{a}.{b}.{c} }}")
        };
        let upstreams: Vec<_> = (0..upstreams).map(upstream).collect();
        format!(
            "{}- key: {{ address: 10.0.0.6, port: 1-50000 }}\n  upstream: [{{ address: a }}]\n",
            rule(
                &format!("address: 10.0.0.5, port: {ports}"),
                "hash: modulo",
                &upstreams.join(", ")
            )
        )
    };
    accept("f", &rules("1-50000", 65_534));
    let errors = refuse("f", &rules("1-50001", 65_535));
    assert_eq!(
        errors.iter().map(|error| &error.message[..]).collect::<Vec<_>>(),
        [
            "100001 key entries (each port of a range is one), and at most 100000 fit",
            "65536 upstreams in all rules, and at most 65535 fit",
        ]
    );
}

#[test]
fn hostile_files_end_in_an_error() {
    let mut bomb = String::from("a0: &a0 [x, x]\n");
    for level in 1..64 {
        let below = level - 1;
        writeln!(bomb, "a{level}: &a{level} [*a{below}, *a{below}]").unwrap();
    }
    let wide = format!("a: &a [{}]\nb: [{}]\n", "x,".repeat(10_000), "*a,".repeat(10_000));
    let cases = [
        ("f", bomb),
        ("f", wide),
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

// What is accepted.

#[test]
fn the_bare_list_means_what_it_always_did() {
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

    // Nothing said: pass, by source port. The same upstream twice is a weight.
    let twice = "- key: { address: 10.0.0.5, port: 53 }\n  upstream:\n  - { address: h_1, port: 1 }\n  - { address: h_1, port: 1 }\n";
    let rule = accept("f", twice).rules.remove(0);
    assert_eq!(
        (rule.action, rule.strategy, rule.hash, rule.source),
        (Action::Pass, Strategy::SrcPort, Hash::Modulo, Source::Vip)
    );
    assert_eq!(rule.upstreams.len(), 2);
}

#[test]
fn the_map_form_has_its_own_defaults() {
    let text = rule("address: 10.0.0.5, port: 53", "", "{ address: 10.0.9.1 }");
    let rule = accept("f", &text).rules.remove(0);
    assert_eq!(
        (rule.action, rule.strategy, rule.hash, rule.source),
        (Action::Pass, Strategy::SrcIpPort, Hash::Maglev, Source::Vip)
    );
    assert_eq!(rule.upstreams[0].port, None);
}

#[test]
fn yaml_toml_and_json_say_the_same() {
    let yaml = accept("udplb.yaml", YAML);
    let toml = accept("udplb.toml", TOML);
    assert_eq!(yaml.rules, toml.rules);
    assert_eq!(yaml.interfaces, ["ens3"]);
    assert_eq!(toml.interfaces, ["ens3"]);

    let [flows, metrics, syslog] = &yaml.rules[..] else { panic!("three rules") };
    assert_eq!(flows.key.ports[2], Ports { first: 6343, last: 6350 });
    assert_eq!(flows.source, Source::Preserve);
    assert_eq!((metrics.action, metrics.strategy), (Action::Block, Strategy::SrcIp));
    assert_eq!(metrics.upstreams[1].port, Some(9125));
    assert_eq!(syslog.upstreams[0].address, Host::Name("logs.example.net".into()));

    let value: serde_json::Value = serde_yaml::from_str(YAML).unwrap();
    for json in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
        assert_eq!(accept("udplb.json", &json).rules, yaml.rules);
        assert_eq!(accept("-", &json).rules, yaml.rules);
    }
}

#[test]
fn defaults_hold_where_a_rule_says_nothing() {
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
fn ports_are_numbers_texts_ranges_and_lists() {
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
fn anchors_stand_for_what_they_name() {
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
fn upstreams_may_be_what_is_no_circle() {
    let other_port = "{ address: 10.0.0.5, port: 54 }";
    accept("f", &rule("address: 10.0.0.5, port: 53", "", other_port));
    // On a range, the packet's own port and one port are two different upstreams.
    let two = "{ address: 10.0.9.1 }, { address: 10.0.9.1, port: 53 }";
    accept("f", &rule("address: 10.0.0.5, port: 53-54", "hash: modulo", two));
    accept("f", &rule("address: 127.0.0.1, port: 53", "", "{ address: a.b-c.example. }"));
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
    let error = &config.errors(vec![Finding::new(&at, "does not resolve")])[0];
    assert_eq!((error.line, error.severity), (32, Severity::Error));
    assert_eq!(
        error.to_string().lines().next(),
        Some("error: udplb.yaml:32:35: rules[2].upstream[0].address: does not resolve")
    );
    let config = accept("udplb.toml", TOML);
    let warning = &config.warnings(vec![Finding::new(&at, "has two addresses")])[0];
    assert_eq!(
        warning.to_string().lines().next(),
        Some("warning: udplb.toml:32:43: rules[2].upstream[0].address: has two addresses")
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
    for text in ["10.0.9.1", "logs.example.net"] {
        let host: Host = serde_json::from_value(text.into()).unwrap();
        assert_eq!(host.to_string(), text);
        assert_eq!(serde_json::to_value(&host).unwrap(), text);
    }
    for text in ["127.0.0.1", "10.0.0.256", "::1", "a b", ""] {
        assert!(serde_json::from_value::<Host>(text.into()).is_err());
    }
}

/// The schema's words for an option, in the map form and in the bare list.
#[test]
fn the_schema_has_the_words_that_are_built() {
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
    assert_eq!(map["required"], serde_json::json!(["version", "rules"]));
    assert_eq!(map["additionalProperties"], false);

    let seed = &list["items"]["properties"];
    assert_eq!(seed["options"]["properties"]["hash"], serde_json::Value::Null);
    assert_eq!(seed["options"]["properties"]["strategy"]["default"], "src-port");
    assert_eq!(seed["name"], serde_json::Value::Null);
}

// Whatever the text: no panic, and every position lies in it.

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

/// Cuts a piece out of a text and puts another there.
fn mutate(text: &str, from: usize, length: usize, with: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let from = from % (characters.len() + 1);
    let to = (from + length).min(characters.len());
    let (before, after) = (&characters[..from], &characters[to..]);
    before.iter().copied().chain(with.chars()).chain(after.iter().copied()).collect()
}

/// Pieces that mean something to a parser.
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
    fn any_text(text in "\\PC{0,80}|[ \\n:{}\\[\\]&*!'\"a0-]{0,80}", toml in any::<bool>()) {
        check_positions(if toml { "f.toml" } else { "f" }, &text);
    }

    #[test]
    fn damaged_files(
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
    fn damaged_json(from in any::<usize>(), length in 0..12_usize, with in prop::sample::select(PIECES)) {
        let value: serde_json::Value = serde_yaml::from_str(YAML).unwrap();
        check_positions("f.json", &mutate(&value.to_string(), from, length, with));
    }
}
