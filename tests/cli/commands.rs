//! Command-line behaviour: exit codes, privileges, cron, configuration management, and output.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::lab::{
    CLIENTS, Directory, Lab, Outcome, RELAY, UPSTREAMS, config, rule, to_port,
};
use crate::common::net::{bind, expect, own, receive};
use crate::common::{Namespace, lock_any_memory, run};

const NOBODY: u32 = 65_534;

/// Runs udplb on the relay as a direct child of this process.
fn call(lab: &Lab, words: &str, prepare: impl FnOnce(&mut Command) + Send) -> Outcome {
    lab.relay.enter(|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_udplb"));
        command.arg("--pin-dir").arg(lab.bpffs.pins()).args(words.split_whitespace());
        prepare(&mut command);
        Outcome::of(&mut command)
    })
}

#[test]
fn every_exit_code_is_returned() {
    let lab = Lab::new();
    let write = |name: &str, text: &[u8]| {
        let path = lab.directory.path().join(name);
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let good = write("good.yaml", to_port(7001).to_string().as_bytes());
    let other = write("other.yaml", to_port(7002).to_string().as_bytes());
    let bare = write("bare.yaml", b"[]");
    let bad = write("bad.yaml", b"version: 1\nrules:\n  - keys: 1\n");
    let latin = write("latin.yaml", b"rules: \xe9\n");
    let missing = lab.directory.path().join("missing.yaml").display().to_string();
    let expect = |words: &str, code| lab.run(words).expect(code);

    expect(&format!("check {good}"), 0);
    expect("status", 3);
    expect("", 3);
    expect("doctor", 3);
    expect("metrics", 0);
    expect("list", 3).says(&["nothing is applied"]);
    for words in ["rollback", "drain a/b", "enable a/b", "enable --all", "trace", "arpd --once"] {
        expect(words, 3).says(&["nothing is applied"]);
    }
    expect("top --once", 3).says(&["nothing is applied"]);
    expect("get 10.1.0.20 10.1.0.1:5000", 3).says(&["nothing is applied"]);
    expect(&format!("plan {good}"), 0);
    expect(&format!("plan {good} --exit-code"), 2);
    expect(&format!("apply {good} --dry-run"), 0);
    assert!(!lab.bpffs.pins().join("current").exists());
    expect(&format!("apply {good}"), 0);
    expect("status", 0);
    expect("status only", 0);
    for words in ["status onyl", "trace --rule onyl", "drain onyl/one"] {
        expect(words, 1).says(&["there is no rule `onyl`; did you mean `only`?"]);
    }
    expect(&format!("plan {good} --exit-code"), 0);
    expect(&format!("plan {other} --exit-code"), 2);
    for words in [
        "aply",
        "apply",
        "apply --froce x",
        "status -o xml",
        "--lock-timeout soon list",
        "arpd --metrics relay",
    ] {
        expect(words, 64);
    }
    expect(&format!("apply {bare}"), 64).says(&["bare.yaml", "-i"]);
    expect(&format!("apply {bad}"), 65).says(&[
        "bad.yaml:3:5",
        "`keys`",
        "did you mean `key`",
        "^",
    ]);
    expect(&format!("check {good} {bad} {missing}"), 66);
    expect(&format!("apply {missing}"), 66).says(&["missing.yaml", "No such file"]);
    expect(&format!("apply {latin}"), 66).says(&["latin.yaml", "not UTF-8 in line 1"]);
    let lock = File::open(lab.bpffs.pins()).expect("the pin directory");
    lock.lock().expect("a lock");
    expect(&format!("apply {good} --lock-timeout 0"), 75);
    lock.unlock().expect("unlocked");
    let program = lab.directory.program();
    let as_nobody = |words: &str| {
        lab.relay.enter(|| {
            let mut command = Command::new(&program);
            command.arg("--pin-dir").arg(lab.bpffs.pins()).args(words.split_whitespace());
            Outcome::of(command.uid(NOBODY).gid(NOBODY))
        })
    };
    as_nobody(&format!("apply {good}")).expect(77);
    for reader in ["status", "list", &format!("plan {good}")] {
        as_nobody(reader).expect(77).says(&["run as root"]);
    }
    for writer in ["rollback", "detach"] {
        as_nobody(writer).expect(77).says(&["CAP_NET_ADMIN"]);
    }
    lab.run("status").expect(0);
}

#[test]
fn check_needs_no_privileges_and_no_network() {
    let lab = Lab::new();
    let nowhere = Namespace::new();
    let named = json!({ "address": "collector.example.net" });
    let file = lab.write(&config(&[rule("named", 5000, json!({}), &[named])]));
    let program = lab.directory.program();
    let check = |options: &str| {
        nowhere.enter(|| {
            let mut command = Command::new(&program);
            command.arg("check").arg(&file).args(options.split_whitespace());
            Outcome::of(command.uid(NOBODY).gid(NOBODY).env_clear())
        })
    };
    check("--no-resolve").expect(0);
    let outcome = check("--no-resolve -o json").expect(0);
    assert_eq!(outcome.json()["files"][0]["rule_count"], 1);
    // no name server is reachable
    check("").expect(75).says(&["udplb.yaml:1:", "`collector.example.net` does not resolve"]);
    // an unresolvable name changes nothing
    lab.apply(&to_port(7001));
    let before = lab.filters("eth0");
    let named = json!({ "address": "collector.invalid" });
    let unresolved = config(&[rule("named", 5000, json!({}), &[named])]);
    lab.try_apply(&unresolved, "").expect(75).says(&["`collector.invalid` does not resolve"]);
    assert_eq!(lab.filters("eth0"), before);
}

/// Limits the program to these capabilities, given by number.
fn limit(command: &mut Command, capabilities: &[i32]) {
    let capabilities = capabilities.to_vec();
    let drop_others = move || {
        for capability in (0..64).filter(|it| !capabilities.contains(it)) {
            // SAFETY: takes plain numbers; those that the kernel does not know are refused.
            let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            if dropped != 0 && capability < 40 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    lock_any_memory(command);
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(drop_others) };
}

#[test]
fn three_capabilities_suffice_and_each_is_needed() {
    const NEEDED: [(i32, &str); 3] = [(39, "CAP_BPF"), (12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON")];
    let all = NEEDED.map(|(number, _)| number);
    let lab = Lab::new();
    let with = |words: &str, capabilities: &[i32]| {
        call(&lab, words, |command| limit(command, capabilities))
    };
    let files = [7001, 7002].map(|port| {
        let path = lab.directory.write(&format!("{port}.yaml"), &to_port(port).to_string());
        format!("apply {} -o json", path.display())
    });
    for words in [&files[0], "rollback", "detach"] {
        for (index, (_, name)) in NEEDED.iter().enumerate() {
            let mut others = all.to_vec();
            others.remove(index);
            let outcome = with(words, &others).expect(77).says(&[name]);
            let unnamed = NEEDED.iter().filter(|(_, other)| other != name);
            for (_, other) in unnamed {
                assert!(!outcome.stderr.contains(other), "{outcome:?}");
            }
        }
    }
    assert!(!lab.bpffs.pins().exists());
    let receivers = [7001, 7002].map(|port| bind(&lab.upstream, UPSTREAMS[0], port));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let expect_way = |receiver| {
        sender.send_to(b"few", (RELAY, 5000)).expect("sent");
        assert_eq!(receive(receiver).payload, b"few");
    };
    with(&files[0], &all).expect(0);
    assert_eq!(with(&files[0], &all).expect(0).json()["changed"], false);
    expect_way(&receivers[0]);
    with(&files[1], &all).expect(0);
    expect_way(&receivers[1]);
    with("status", &all).expect(0);
    with("list", &all).expect(0);
    with("rollback", &all).expect(0);
    expect_way(&receivers[0]);
    // the pin of the active program is lost: the program cannot be looked up by its id, but it can be
    // replaced
    fs::remove_file(lab.bpffs.pins().join("generations/1/program")).expect("a pin");
    with("status", &all).expect(3);
    with(&files[0], &all).expect(0);
    expect_way(&receivers[0]);
    with("detach --purge", &all).expect(0);
    assert_eq!(lab.filters("eth0"), "");
}

/// Runs udplb as cron does: minimal environment, no terminal, no standard input.
fn from_cron(lab: &Lab, words: &str) -> Outcome {
    call(lab, words, |command| {
        command.env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
        command.stdin(std::process::Stdio::null());
        // SAFETY: a system call that takes nothing.
        unsafe {
            command.pre_exec(|| match libc::setsid() {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
    })
}

#[test]
fn cron_gets_output_on_failure_only() {
    let lab = Lab::new();
    // with something to warn about: the upstream does not answer
    let upstream = json!({ "address": UPSTREAMS[0] });
    let file = lab.write(&config(&[rule("relay", 5000, json!({}), &[upstream])]));
    let apply = format!("apply {} -q", file.display());
    for _ in 0..3 {
        let outcome = from_cron(&lab, &apply).expect(0);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    }
    lab.run("status").expect(0);
    lab.directory.write("udplb.yaml", "version: 1\nrules: 1\n");
    from_cron(&lab, &apply).expect(65).says(&["udplb.yaml:2:8"]);
    lab.write(&config(&[]));
    lab.apply(&to_port(7001));
    lab.run("rollback").expect(0);
    from_cron(&lab, &apply).expect(1).says(&["held since"]);
    lab.run("detach -q").expect(0);
    lab.run("status").expect(3);
}

#[test]
fn unread_warnings_stop_no_command() {
    let lab = Lab::new();
    let upstream = json!({ "address": UPSTREAMS[0] });
    let file = lab.write(&config(&[rule("relay", 5000, json!({}), &[upstream])]));
    let apply = format!("apply {}", file.display());
    let unread = |words: &str| {
        lab.relay.enter(|| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_udplb"));
            command.arg("--pin-dir").arg(lab.bpffs.pins()).args(words.split_whitespace());
            let full = File::create("/dev/full").expect("a disk that is full");
            command
                .stdout(std::process::Stdio::null())
                .stderr(full)
                .status()
                .expect("the program runs")
                .code()
        })
    };
    assert_eq!(unread(&apply), Some(0));
    lab.run("status").expect(0);
    assert_eq!(unread("apply nowhere.yaml"), Some(66));
}

#[test]
fn apply_reports_whether_it_changed() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001));
    let apply = format!("apply {} -o json", file.display());
    let first = lab.run(&apply).expect(0).json();
    assert_eq!(first["changed"], true);
    assert_eq!((&first["generation"], &first["previous"]), (&json!(1), &Value::Null));
    assert_eq!((&first["rule_count"], &first["upstream_count"]), (&json!(1), &json!(1)));
    assert_eq!(first["interfaces"], json!(["eth0"]));
    assert_eq!(lab.run(&apply).expect(0).json()["changed"], false);
    lab.write(&to_port(7002));
    let dry = lab.run(&format!("{apply} --dry-run")).expect(0).json();
    assert_eq!(dry["changed"], true);
    assert_eq!(
        dry["changed"],
        lab.run(&apply.replace("apply", "plan")).expect(0).json()["changed"]
    );
    assert_eq!(lab.run(&apply).expect(0).json()["previous"], 1);
    assert_eq!(lab.run(&format!("{apply} --dry-run")).expect(0).json()["changed"], false);
    assert_eq!(lab.run("rollback -o json").expect(0).json()["changed"], true);
    let detached = lab.run("detach -o json").expect(0).json();
    assert_eq!(detached, json!({ "format_version": 1, "changed": true, "detached": ["eth0"] }));
    let again = lab.run("detach -o json").expect(0).json();
    assert_eq!(again, json!({ "format_version": 1, "changed": false, "detached": [] }));
}

/// The same configuration in three formats.
const YAML: &str = "
version: 1
interfaces: [eth0]
rules:
  - name: flows
    key: { address: 10.1.0.1, port: [2055, '6343-6350'] }
    options: { source: preserve, strategy: src-ip, hash: modulo }
    upstream: [{ name: a, address: 10.2.0.20 }, { address: 10.2.0.21, port: 9 }]
  - key: { address: 10.1.0.1, port: 514 }
    options: { tc_action: block, hash: modulo }
    upstream: [{ address: 10.2.0.20, port: 5514 }]
";
const TOML: &str = r#"
version = 1
interfaces = ["eth0"]
[[rules]]
name = "flows"
key = { address = "10.1.0.1", port = [2055, "6343-6350"] }
options = { source = "preserve", strategy = "src-ip", hash = "modulo" }
upstream = [{ name = "a", address = "10.2.0.20" }, { address = "10.2.0.21", port = 9 }]
[[rules]]
key = { address = "10.1.0.1", port = 514 }
options = { tc_action = "block", hash = "modulo" }
upstream = [{ address = "10.2.0.20", port = 5514 }]
"#;
const JSON: &str = r#"{ "version": 1, "interfaces": ["eth0"], "rules": [
  { "name": "flows", "key": { "address": "10.1.0.1", "port": [2055, "6343-6350"] },
    "options": { "source": "preserve", "strategy": "src-ip", "hash": "modulo" },
    "upstream": [{ "name": "a", "address": "10.2.0.20" }, { "address": "10.2.0.21", "port": 9 }] },
  { "key": { "address": "10.1.0.1", "port": 514 },
    "options": { "tc_action": "block", "hash": "modulo" },
    "upstream": [{ "address": "10.2.0.20", "port": 5514 }] }]}"#;

#[test]
fn all_notations_apply_to_the_same_generation() {
    let lab = Lab::new();
    let apply = |input: &str, options: &str| {
        let mut command = lab.udplb(&format!("apply - -o json {options}"));
        Outcome::with_input(&mut command, input)
    };
    assert_eq!(apply(YAML, "").expect(0).json()["changed"], true);
    assert_eq!(apply(JSON, "").expect(0).json()["changed"], false);
    for (name, text) in [("a.yaml", YAML), ("a.json", JSON), ("a.toml", TOML), ("A.TOML", TOML)] {
        let file = lab.directory.write(name, text);
        let outcome = lab.run(&format!("apply {} -o json", file.display())).expect(0);
        assert_eq!(outcome.json()["changed"], false, "{name}");
    }
    let list = lab.run("list").expect(0).stdout;
    assert_eq!(apply(&list, "").expect(0).json()["changed"], false);
    let list = lab.run("list -o json").expect(0).stdout;
    assert_eq!(apply(&list, "").expect(0).json()["changed"], false);
    // `-i` replaces the interfaces of the file
    let moved = apply(&list, "-i up0").expect(0).json();
    assert_eq!((&moved["changed"], &moved["interfaces"]), (&json!(true), &json!(["up0"])));
    assert_eq!(lab.filters("eth0"), "");
    assert_eq!(apply(&list, "-i up0 -i up0").expect(0).json()["changed"], false);
}

#[test]
fn same_text_in_another_format_is_another_file() {
    let lab = Lab::new();
    let yaml = lab.write(&to_port(7001));
    lab.run(&format!("apply {}", yaml.display())).expect(0);
    let toml = lab.directory.write("udplb.toml", &fs::read_to_string(yaml).expect("the file"));
    lab.run(&format!("apply {}", toml.display())).expect(65).says(&["udplb.toml:1:"]);
}

#[test]
fn suspicious_configuration_is_warned_of() {
    let lab = Lab::new();
    let pass = |address: &str, upstream: &str| {
        let mut rule = rule("relay", 5000, json!({}), &[json!({ "address": upstream })]);
        rule["key"]["address"] = json!(address);
        config(&[rule])
    };
    let up = UPSTREAMS[0].to_string();
    lab.try_apply(&pass("10.1.0.1", &up), "").expect(0).says(&[
        "warning",
        "udplb.yaml:1:",
        "nobody listens on 10.1.0.1:5000",
    ]);
    let listener = bind(&lab.relay, RELAY, 5000);
    let quiet = lab.try_apply(&pass("10.1.0.1", &up), "").expect(0);
    assert_eq!(quiet.stderr, "");
    drop(listener);
    let _listener = bind(&lab.relay, [0, 0, 0, 0], 5000);
    assert_eq!(lab.try_apply(&pass("10.1.0.1", &up), "").expect(0).stderr, "");

    lab.relay.ip("link add mac0 link eth0 type macvlan mode bridge");
    lab.relay.ip("addr add 10.1.0.5/24 dev mac0");
    lab.try_apply(&pass("10.1.0.5", &up), "")
        .expect(0)
        .says(&["10.1.0.5 is an address of mac0, a macvlan above eth0", "name mac0"]);
    lab.relay.ip("link del mac0");
    lab.relay.ip("link add br0 address 02:00:00:00:00:99 type bridge");
    lab.relay.ip("addr add 10.1.0.6/24 dev br0");
    lab.relay.ip("link set eth0 master br0");
    lab.try_apply(&pass("10.1.0.6", &up), "").expect(0).says(&["br0, a bridge above eth0"]);
    // interfaces with the same MAC address both match the rules
    let mac = lab.relay.mac_text("eth0");
    lab.relay.ip(&format!("link set br0 address {mac}"));
    lab.relay.ip("link set br0 up");
    let both = lab.try_apply(&pass("10.1.0.1", &up), "-i eth0 -i br0").expect(0);
    both.says(&["br0 is above eth0", "copied once more on br0"]);
    lab.try_apply(&pass("10.1.0.1", &up), "").expect(0);
    lab.relay.ip("link set eth0 nomaster");
    lab.try_apply(&pass("10.1.0.1", "192.0.2.1"), "").expect(0).says(&["no route to 192.0.2.1"]);
    // invalid combinations are refused
    let before = lab.filters("eth0");
    for own in ["10.2.0.1", "10.1.0.6"] {
        let says = ["error", "udplb.yaml:1:", own, "an address of this host"];
        lab.try_apply(&pass("10.1.0.1", own), "").expect(65).says(&says);
    }
    assert_eq!(lab.filters("eth0"), before);
}

#[test]
fn plan_predicts_apply() {
    let lab = Lab::new();
    let two = |first: u16, second: u16| {
        let source = if second == 1 { "vip" } else { "preserve" };
        let upstreams = [(UPSTREAMS[0], first), (UPSTREAMS[1], second)]
            .map(|(address, port)| json!({ "address": address, "port": port }));
        config(&[
            rule("kept", 5000, json!({ "tc_action": "block", "source": source }), &upstreams),
            rule(&format!("r{second}"), 5001, json!({ "tc_action": "block" }), &upstreams[..1]),
        ])
    };
    let plan = |config: &Value| {
        let file = lab.write(config);
        lab.run(&format!("plan {}", file.display())).expect(0).stdout
    };
    let first = plan(&two(1, 1));
    assert!(first.starts_with("+ interface eth0\n+ rule kept (10.1.0.1:5000) -> "), "{first}");
    lab.apply(&two(1, 1));
    assert_eq!(plan(&two(1, 1)), "no changes\n");
    let next = plan(&two(1, 2));
    let words = format!("plan -o json {}", lab.write(&two(1, 2)).display());
    let json = lab.run(&words).expect(0).json();
    let kept = &json["altered"][0];
    assert_eq!((&json["changed"], &json["added"][0]["rule"]), (&json!(true), &json!("r2")));
    assert_eq!((&kept["rule"], &kept["moved_share"]), (&json!("kept"), &json!(0.5)), "{json:#}");
    assert_eq!(kept["added"], json!(["10.2.0.21:2"]), "{json:#}");
    assert_eq!(json["added"][0]["attributes"]["tc_action"], "block", "{json:#}");
    let source = json!([{ "attribute": "source", "old": "vip", "new": "preserve" }]);
    assert_eq!(kept["attributes"], source, "{json:#}");
    for line in [
        "+ rule r2 (10.1.0.1:5001) -> 10.2.0.20:1\n",
        "- rule r1 (10.1.0.1:5001) -> 10.2.0.20:1\n",
        "    tc_action: block\n",
        "~ rule kept: 50 % of its flows move\n    source: vip -> preserve\n",
        "    + upstream 10.2.0.21:2\n",
        "    - upstream 10.2.0.21:1\n",
    ] {
        assert!(next.contains(line), "no {line:?} in {next}");
    }
    assert_eq!(lab.status()["generation"], 1);
}

#[test]
fn relative_pin_directory_works() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let mut again = lab.relay.command(env!("CARGO_BIN_EXE_udplb"));
    again.current_dir(&lab.bpffs.path).args(["--pin-dir", "udplb", "apply"]);
    again.arg(lab.write(&to_port(7001)));
    assert!(Outcome::of(&mut again).expect(0).stdout.starts_with("unchanged"));
}

#[test]
fn schema_and_completions_need_no_kernel() {
    let directory = Directory::new();
    let program = directory.program();
    let udplb = |words: &str| {
        let mut command = Command::new(&program);
        Outcome::of(command.args(words.split_whitespace()).uid(NOBODY).gid(NOBODY)).expect(0)
    };
    let schema = udplb("schema").json();
    assert_eq!(schema["$schema"], "http://json-schema.org/draft-07/schema#");
    for shell in ["bash", "zsh", "fish"] {
        assert!(udplb(&format!("completions {shell}")).stdout.contains("UDPLB_COMPLETE"));
    }
    let version = udplb("--version").stdout;
    let object = format!("\nkernel object: sha256 {}\n", udplb::bpf::OBJECT_SHA256);
    assert!(version.starts_with("udplb ") && version.ends_with(&object), "{version}");
    assert!(version.contains("\ncommit: "), "{version}");
    assert_eq!(udplb("-V").stdout.lines().count(), 1);
    assert!(udplb("--help").stdout.contains("Exit codes"));
    run("chmod", ["0777".as_ref(), directory.path().as_os_str()]);
    let pages = directory.path().join("man");
    udplb(&format!("man {}", pages.display()));
    assert!(pages.join("udplb-apply.1").exists());
    let page = fs::read_to_string(pages.join("udplb.1")).unwrap();
    for section in ["EXAMPLES", "FILES", "EXIT STATUS", "SIGNALS"] {
        assert!(page.contains(&format!("\n.SH {section}\n")), "{section}");
    }
}

/// Returns the shell completions for the last of these words.
fn completed(lab: &Lab, words: &str) -> Vec<String> {
    let mut command = lab.relay.command(env!("CARGO_BIN_EXE_udplb"));
    command.env("UDPLB_COMPLETE", "bash").env("_CLAP_IFS", "\n");
    let pins = format!("--pin-dir={}", lab.bpffs.pins().display());
    let words: Vec<&str> = ["udplb", &pins].into_iter().chain(words.split(' ')).collect();
    command.env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string());
    let outcome = Outcome::of(command.arg("--").args(words)).expect(0);
    let lines = outcome.stdout.lines().filter(|line| !line.starts_with("--"));
    lines.map(String::from).collect()
}

#[test]
fn completion_offers_active_rules() {
    let lab = Lab::new();
    assert_eq!(completed(&lab, "drain "), Vec::<String>::new());
    lab.relay.ip("link add spare0 type bridge");
    let unnamed = json!({ "address": UPSTREAMS[1], "port": 9 });
    let named = json!({ "name": "one", "address": UPSTREAMS[0] });
    lab.apply(&config(&[
        rule("flows", 5000, json!({ "tc_action": "block" }), &[named, unnamed]),
        rule("traps", 162, json!({ "tc_action": "block" }), &[json!({ "address": UPSTREAMS[0] })]),
    ]));
    let upstreams = ["flows/one", "flows/10.2.0.21", "traps/10.2.0.20"];
    for command in ["drain", "enable"] {
        assert_eq!(completed(&lab, &format!("{command} f")), upstreams[..2]);
        let offered = completed(&lab, &format!("{command} "));
        assert!(upstreams.iter().all(|it| offered.iter().any(|offer| offer == it)), "{offered:?}");
    }
    // every completion is accepted by the command
    for upstream in upstreams {
        lab.run(&format!("drain {upstream}")).expect(0);
    }
    assert_eq!(completed(&lab, "status t"), ["traps"]);
    assert_eq!(completed(&lab, "trace --rule fl"), ["flows"]);
    for words in ["apply x -i sp", "detach -i sp", "get a b --interface sp"] {
        assert_eq!(completed(&lab, words), ["spare0"], "{words}");
    }
    assert!(completed(&lab, "roll").contains(&"rollback".into()));
}

#[test]
fn first_configuration_is_that_of_this_host() {
    let lab = Lab::new();
    for purpose in ["netflow", "syslog", "statsd", "dns"] {
        let text = lab.run(&format!("init {purpose}")).expect(0).stdout;
        assert!(text.contains(&format!("address: '{RELAY}'")), "{text}");
        let file = lab.directory.write("first.yaml", &text);
        lab.run(&format!("apply {} --dry-run", file.display())).expect(0);
    }
}

#[test]
fn samplicator_receivers_get_their_senders_packets() {
    let lab = Lab::new();
    let [all, some] = UPSTREAMS;
    let (first, second) = (bind(&lab.upstream, all, 9000), bind(&lab.upstream, some, 9001));
    let sender = bind(&lab.client, CLIENTS[0], 0);
    let lines = format!("# senders: receivers\n{}/255.255.255.255: {some}/9001\n", CLIENTS[0]);
    let file = lab.directory.write("samplicator.conf", &lines);
    let words = format!("import -i eth0 -s {RELAY} -p 7100 -S {} {all}/9000", file.display());
    let json = lab.run(&format!("{words} -o json")).expect(0).json();
    assert_eq!(json["rules"][0]["upstream"][1]["port"], json!(9001));
    let rules = lab.directory.write("rules.yaml", &lab.run(&words).expect(0).stdout);
    lab.run(&format!("apply {}", rules.display())).expect(0);
    sender.send_to(b"flows", (RELAY, 7100)).expect("a packet");
    for socket in [&first, &second] {
        expect(socket, b"flows", own(&sender), 63);
    }
    let here = bind(&lab.relay, RELAY, 9002);
    lab.directory.write("samplicator.conf", &format!("{}: 127.0.0.1/9002\n", CLIENTS[0]));
    let rules = lab.directory.write("rules.yaml", &lab.run(&words).expect(0).stdout);
    lab.run(&format!("apply {}", rules.display())).expect(0);
    sender.send_to(b"more", (RELAY, 7100)).expect("a packet");
    expect(&here, b"more", own(&sender), 64);
    lab.directory.write("samplicator.conf", "10.0.0.0/255.0.255.0: 10.0.0.1\n");
    lab.run(&words).expect(65).says(&["samplicator.conf:1:1", "not that of a prefix"]);
}

#[test]
fn global_options_have_a_heading() {
    for words in [&["--help"][..], &["apply", "--help"], &["trace", "-h"]] {
        let help = Outcome::of(Command::new(env!("CARGO_BIN_EXE_udplb")).args(words)).stdout;
        let (own, global) = help.split_once("Global options:").expect("a heading");
        assert!(global.contains("--pin-dir") && !own.contains("--pin-dir"), "{help}");
    }
}

#[test]
fn invalid_numbers_are_explained() {
    let lab = Lab::new();
    for (words, says) in [
        ("trace -c 0", "a number, at least 1"),
        ("trace --sample -1", ""),
        ("trace --sample none", "a number, at least 1"),
        ("status --interval 0", "at least 0.1 seconds"),
        ("status --interval 1,5", "a number of seconds, like 2 or 0.5"),
        ("status --lock-timeout inf", "a number of seconds, like 2 or 0.5"),
        ("arpd --metrics relay.example.net", "host names are not resolved"),
    ] {
        let outcome = lab.run(words).expect(64).says(&[says]);
        assert!(!outcome.stderr.contains("18446744073709551615"), "{outcome:?}");
    }
    lab.apply(&to_port(7001));
    lab.run("status --rate --interval 0.2 --lock-timeout 0.5").expect(0);
    lab.run("status --lock-timeout 1e12").expect(0);
}

#[test]
fn quiet_status_prints_problems_only() {
    let lab = Lab::new();
    let quiet = lab.run("status -q").expect(3);
    assert!(quiet.stdout.starts_with("! nothing is applied"), "{quiet:?}");
    lab.apply(&to_port(7001));
    assert_eq!(lab.run("status -q").expect(0).stdout, "");
    lab.relay.ip("link set eth0 down");
    let quiet = lab.run("status -q").expect(3);
    assert!(quiet.stdout.starts_with("! eth0: "), "{quiet:?}");
    assert!(quiet.stdout.lines().all(|line| line.starts_with("! ")), "{quiet:?}");
}

#[test]
fn journal_gets_priorities() {
    let lab = Lab::new();
    let to_journal = |words: &str, own: bool| {
        let log = lab.directory.path().join("journal");
        let file = File::create(&log).expect("a file");
        let meta = std::os::unix::fs::MetadataExt::ino(&file.metadata().expect("metadata"));
        let device = std::os::unix::fs::MetadataExt::dev(&file.metadata().expect("metadata"));
        let inode = if own { meta } else { meta + 1 };
        let mut command = lab.udplb(words);
        command.env("JOURNAL_STREAM", format!("{device}:{inode}")).stderr(file);
        command.stdout(std::process::Stdio::null()).status().expect("the program runs");
        fs::read_to_string(log).expect("the log")
    };
    let bad = lab.directory.write("bad.yaml", "version: 1\nrules: 1\n").display().to_string();
    let text = to_journal(&format!("apply {bad}"), true);
    assert!(text.lines().count() > 1 && text.lines().all(|line| line.starts_with("<3>")), "{text}");
    let file = lab.write(&config(&[])).display().to_string();
    let text = to_journal(&format!("apply {file}"), true);
    assert!(text.starts_with("<4>warning: "), "{text}");
    let text = to_journal(&format!("apply {file} -v --force"), true);
    assert!(text.lines().all(|line| line.starts_with('<')), "{text}");
    // JOURNAL_STREAM names another process's stream
    assert!(to_journal(&format!("apply {bad}"), false).starts_with("error: "));
}
