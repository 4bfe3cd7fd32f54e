//! Behaviour and messages in unusual environments: full disks, pipes as files, parts of /proc, odd
//! names, routes that lead nowhere.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde_json::json;
use udplb::datapath::kernel;

use crate::common::lab::{Lab, Outcome, RELAY, UPSTREAMS, config, rule, to_port};
use crate::common::net::bind;

/// Runs udplb with its standard output on a full disk.
fn to_full_disk(lab: &Lab, words: &str) -> Outcome {
    let mut command = lab.udplb(words);
    let full = File::create("/dev/full").expect("a full disk");
    let output = command.stdout(full).stderr(Stdio::piped()).output().expect("the program runs");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Outcome::new(output.status.code(), String::new(), stderr, words)
}

#[test]
fn change_with_full_stdout_succeeds_with_a_warning() {
    let lab = Lab::new();
    let says = ["warning: the change was made", "No space left"];
    let file = lab.write(&to_port(7001)).display().to_string();
    for format in ["table", "json"] {
        to_full_disk(&lab, &format!("apply {file} -o {format}")).expect(0).says(&says);
        assert_eq!(lab.status()["generation"], 1);
    }
    to_full_disk(&lab, "drain only/one").expect(0).says(&says);
    assert_eq!(lab.status()["rules"][0]["upstreams"][0]["state"], "drained");
    to_full_disk(&lab, "enable --all").expect(0).says(&says);
    lab.apply(&to_port(7002));
    to_full_disk(&lab, "rollback").expect(0).says(&says);
    assert_eq!(lab.status()["generation"], 1);
    // a read-only command has no effect besides its output
    to_full_disk(&lab, "status").expect(1).says(&["standard output: No space left"]);
    to_full_disk(&lab, &format!("plan {file}")).expect(1);
    to_full_disk(&lab, "detach").expect(0).says(&says);
    assert_eq!(lab.filters("eth0"), "");
}

#[test]
fn pipe_is_standard_input_for_later_commands() {
    let lab = Lab::new();
    let text = to_port(7001).to_string();
    let fifo = lab.directory.path().join("fifo");
    crate::common::run("mkfifo", [&fifo]);
    let apply = |path: &str, input: &str| {
        Outcome::with_input(&mut lab.udplb(&format!("apply {path}")), input).expect(0)
    };
    let checks = || {
        assert_eq!(lab.status()["file"], "-");
        assert!(!lab.run("metrics").expect(0).stdout.contains("udplb_config_drift"));
        let doctor = lab.run("doctor");
        assert!(!doctor.stdout.contains("cannot be applied"), "{doctor:?}");
    };
    apply("/dev/stdin", &text);
    checks();
    // a descriptor path of a regular file names another file in another process
    let file = lab.directory.write("a.yaml", &to_port(7002).to_string());
    let mut command = lab.udplb("apply /dev/stdin");
    command.stdin(File::open(file).expect("the file"));
    Outcome::of(&mut command).expect(0);
    checks();
    std::thread::scope(|scope| {
        scope.spawn(|| fs::write(&fifo, to_port(7003).to_string()).expect("written"));
        lab.run(&format!("apply {}", fifo.display())).expect(0);
    });
    checks();
    // a file that has become a pipe is not read either
    let kept = lab.write(&to_port(7004));
    lab.run(&format!("apply {}", kept.display())).expect(0);
    fs::remove_file(&kept).expect("removed");
    crate::common::run("mkfifo", [&kept]);
    lab.run("metrics").expect(0);
    lab.run("doctor");
}

#[test]
fn files_that_are_no_text_or_too_long_are_unreadable() {
    let directory = crate::common::lab::Directory::new();
    let check = |path: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_udplb"));
        Outcome::of(command.args(["check", path]))
    };
    let path = directory.path().join("latin.yaml");
    fs::write(&path, b"version: 1\n# caf\xe9\n").expect("a file");
    check(&path.display().to_string()).expect(66).says(&["not UTF-8 in line 2: byte 0xe9"]);
    let long = directory.path().join("long.yaml");
    File::create(&long).and_then(|file| file.set_len((64 << 20) + 1)).expect("a file");
    check(&long.display().to_string()).expect(66).says(&["longer than 64 MiB"]);
    check("/dev/zero").expect(66).says(&["longer than 64 MiB"]);
}

/// Runs udplb in its own mount namespace after a preparing command.
fn with_mounts(lab: &Lab, prepare: &str, words: &str) -> Outcome {
    let mut command = lab.relay.command("unshare");
    let udplb =
        format!("{} --pin-dir {} {words}", env!("CARGO_BIN_EXE_udplb"), lab.bpffs.pins().display());
    command.args(["-m", "--propagation", "private", "sh", "-c"]);
    Outcome::of(command.arg(format!("{prepare} && {udplb}")))
}

#[test]
fn partial_proc_is_no_fault_of_kernel_or_user() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001)).display().to_string();
    let pids = "mount -t proc -o subset=pid proc /proc";
    with_mounts(&lab, pids, &format!("apply {file}")).expect(0);
    let doctor = with_mounts(&lab, pids, &format!("doctor {file}"));
    assert!(!doctor.stdout.contains("too old"), "{doctor:?}");
    let none = with_mounts(&lab, "mount -t tmpfs none /proc", &format!("apply {file}"));
    let none = none.expect(1).says(&["needs /proc"]);
    assert!(!none.stderr.contains("CAP_"), "{none:?}");
}

#[test]
fn routes_that_lead_nowhere_are_named() {
    let lab = Lab::dual(true, true);
    for (kind, word) in
        [("blackhole", "blackhole"), ("prohibit", "prohibit"), ("unreachable", "unreachable")]
    {
        for (upstream, key) in [("192.0.2.10", "10.1.0.1"), ("2001:db8:9::1", "2001:db8:1::1")] {
            lab.relay.ip(&format!("route add {kind} {upstream}"));
            let mut rule = rule("relay", 5000, json!({}), &[json!({ "address": upstream })]);
            rule["key"]["address"] = json!(key);
            let says = format!("no route to {upstream}");
            let applied = lab.try_apply(&config(&[rule]), "").expect(0).says(&[&says]);
            assert!(
                applied.stderr.contains(word) && !applied.stderr.contains("os error"),
                "{applied:?}"
            );
            lab.relay.ip(&format!("route del {kind} {upstream}"));
        }
    }
}

#[test]
fn dot_in_the_pin_directory_is_wrong_usage() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001));
    let mut command = lab.relay.command(env!("CARGO_BIN_EXE_udplb"));
    command.arg("--pin-dir").arg(lab.bpffs.path.join("udplb.d")).arg("apply").arg(file);
    Outcome::of(&mut command).expect(64).says(&["no names with a dot"]);
}

#[test]
fn bridge_with_the_mac_of_its_port_is_no_warning() {
    let lab = Lab::new();
    let _listener = bind(&lab.relay, [0, 0, 0, 0], 5000);
    lab.relay.ip("link add br0 type bridge");
    lab.relay.ip("link set eth0 master br0");
    lab.relay.ip("addr add 10.1.0.6/24 dev br0");
    lab.relay.ip("link set br0 up");
    let mut relay = rule("relay", 5000, json!({}), &[json!({ "address": UPSTREAMS[0] })]);
    relay["key"]["address"] = json!("10.1.0.6");
    let quiet = lab.try_apply(&config(std::slice::from_ref(&relay)), "").expect(0);
    assert!(!quiet.stderr.contains("no packet will match"), "{quiet:?}");
    lab.relay.ip("link set br0 address 02:00:00:00:00:99");
    lab.write(&config(&[]));
    lab.try_apply(&config(&[]), "").expect(0);
    let warned = lab.try_apply(&config(&[relay]), "").expect(0);
    warned.says(&["10.1.0.6 is an address of br0, a bridge above eth0: no packet will match"]);
}

#[test]
fn missing_listener_is_a_conditional_warning() {
    let lab = Lab::new();
    let applied = lab.try_apply(
        &config(&[rule("relay", 5000, json!({}), &[json!({ "address": UPSTREAMS[0] })])]),
        "",
    );
    applied.expect(0).says(&[&format!("nobody listens on {RELAY}:5000"), "unless", "DNAT"]);
}

#[test]
fn source_of_another_host_is_named_by_plan_apply_and_doctor() {
    let lab = Lab::new();
    let blocking = json!({ "tc_action": "block", "source": "10.2.0.9:9995" });
    let relay = rule("relay", 5000, blocking, &[json!({ "address": UPSTREAMS[0] })]);
    let file = lab.write(&config(&[relay])).display().to_string();
    let foreign = "10.2.0.9 is no address of this host";
    for command in ["plan", "apply --dry-run", "apply"] {
        let answer = lab.run(&format!("{command} {file}")).expect(0);
        answer.says(&["rules[0].options.source", foreign, "uRPF"]);
    }
    let report = lab.run("doctor").stdout;
    assert!(report.contains(foreign), "{report}");
    lab.relay.ip("addr add 10.2.0.9/32 dev up0");
    let report = lab.run("doctor").stdout;
    assert!(!report.contains(foreign), "{report}");
}

#[test]
fn blocked_listener_is_named_by_plan_apply_and_doctor() {
    let lab = Lab::new();
    let _listener = bind(&lab.relay, RELAY, 5000);
    let blocking = json!({ "tc_action": "block" });
    let blocked = rule("relay", 5000, blocking, &[json!({ "address": UPSTREAMS[0] })]);
    let file = lab.write(&config(&[blocked])).display().to_string();
    let listens = format!("a socket of this host listens on {RELAY}:5000");
    for command in ["plan", "apply --dry-run", "apply"] {
        lab.run(&format!("{command} {file}")).expect(0).says(&[&listens]);
    }
    let report = lab.run("doctor").stdout;
    assert!(report.contains(&listens), "{report}");
    // the same file again changes nothing
    assert_eq!(lab.run(&format!("plan {file}")).expect(0).stderr, "");
}

#[test]
fn interfaces_go_by_every_name_that_ip_shows() {
    let lab = Lab::dual(true, true);
    const LONG: &str = "a-name-longer-than-15-bytes";
    lab.relay.ip(&format!("link property add dev eth0 altname enp0s31f6 altname {LONG}"));
    lab.relay.ip("link property add dev up0 altname uplink-with-a-long-name");
    let shown = lab.relay.ip("-br link");
    let shown = shown.split_whitespace().find(|word| word.starts_with("eth0@")).expect("a veth");
    let named = |name: &str| {
        let mut all = to_port(7001);
        all["interfaces"] = json!([name]);
        all
    };
    assert_eq!(lab.apply(&named("eth0"))["changed"], true);
    for name in ["enp0s31f6", LONG, shown] {
        for options in ["", "--partial"] {
            let applied = lab.try_apply(&named(name), options).expect(0).json();
            assert_eq!(applied["changed"], false, "{name}");
            assert_eq!(applied["interfaces"], json!(["eth0"]));
        }
        let applied = lab.try_apply(&named("lo"), &format!("-i {name}")).expect(0).json();
        assert_eq!(applied["changed"], false, "{name}");
        let get = lab.run(&format!("get 10.1.0.20 10.1.0.1 -i {name} -o json")).expect(0).json();
        assert_eq!(get["interface"], "eth0");
    }
    // a different text with the same meaning is not a change
    let file = lab.write(&named(LONG));
    fs::write(&file, format!("{}\n", named(LONG))).expect("written");
    let metrics = lab.run("metrics").expect(0).stdout;
    assert!(metrics.contains("\nudplb_config_drift 0\n"), "{metrics}");
    assert_eq!(lab.run(&format!("detach -i {LONG} -o json")).json()["detached"], json!(["eth0"]));

    // the interface of a link-local address is checked too
    let upstream = json!({ "address": "fe80::20%uplink-with-a-long-name", "port": 7001 });
    let mut six = rule("six", 5000, json!({}), &[upstream]);
    six["key"]["address"] = json!("2001:db8:1::1");
    let applied = lab.try_apply(&config(&[six]), "").expect(0);
    assert!(!applied.stderr.contains("no route"), "{applied:?}");
    assert_eq!(lab.status()["rules"][0]["upstreams"][0]["next_hop"]["interface"], "up0");
    lab.try_apply(&named("eth7@if3"), "").expect(1).says(&["there is no interface eth7@if3"]);
}

/// Makes only libbpf's feature probes fail, as when memory is short; they are recognized by their
/// shorter attributes.
fn fail_probes(command: &mut Command) {
    const PROBE: u32 = 148;
    const BPF_PROG_LOAD: u32 = 5;
    let jump =
        |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load =
        |offset: usize| jump(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset as u32);
    let unless =
        |value: u32, skip: u8| jump(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value);
    let answer = |value: u32| jump(libc::BPF_RET | libc::BPF_K, 0, 0, value);
    // offsets of the lower halves of the first and the third argument
    let argument = |nth: usize| 16 + 8 * nth + if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut filter = [
        load(0),
        unless(libc::SYS_bpf as u32, 5),
        load(argument(0)),
        unless(BPF_PROG_LOAD, 3),
        load(argument(2)),
        unless(PROBE, 1),
        answer(libc::SECCOMP_RET_ERRNO | libc::ENOMEM as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: takes plain numbers and a program that outlives the calls.
        let failed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(install) };
}

#[test]
fn refused_map_is_an_error_and_leaves_nothing() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001)).display().to_string();
    let mut command = lab.udplb(&format!("apply {file}"));
    fail_probes(&mut command);
    Outcome::of(&mut command).expect(1).says(&["building generation 1", "no name"]);
    let left: Vec<_> = fs::read_dir(lab.bpffs.pins())
        .expect("pins")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!left.iter().any(|name| name.starts_with("building")), "{left:?}");
    assert_eq!(lab.filters("eth0"), "");
    lab.run(&format!("apply {file}")).expect(0);
}

#[test]
fn kernel_without_types_or_locked_down_is_named() {
    let lab = Lab::new();
    let file = lab.write(&to_port(7001)).display().to_string();
    let no_btf = "mount -t tmpfs none /sys/kernel/btf";
    with_mounts(&lab, no_btf, &format!("apply {file}")).expect(1).says(&["no BTF", "run one with"]);
    let doctor = with_mounts(&lab, no_btf, &format!("doctor {file}")).expect(3);
    assert!(doctor.stdout.contains("the kernel has no BTF"), "{doctor:?}");
    let locked = "mount -t tmpfs none /sys/kernel/security && \
                  echo 'none integrity [confidentiality]' >/sys/kernel/security/lockdown";
    let doctor = with_mounts(&lab, locked, &format!("doctor {file}")).expect(3);
    // from 6.2 on the program is loaded all the same
    let is_named = doctor.stdout.contains("the kernel is locked down (confidentiality)");
    assert_eq!(is_named, kernel::version() < (6, 2), "{doctor:?}");
}

#[test]
fn bond_that_lets_its_members_merge_is_no_problem() {
    let lab = Lab::new();
    let bond = lab.relay.command("ip").args("link add bond0 type bond".split(' ')).output();
    if !bond.expect("ip").status.success() {
        eprintln!("skipped: this kernel has no bonds");
        return;
    }
    lab.relay.ip("link set eth0 down");
    lab.relay.ip("link set eth0 master bond0");
    lab.relay.ip("link set bond0 up");
    lab.relay.ip("addr flush dev eth0");
    lab.relay.ip("addr add 10.1.0.1/24 dev bond0");
    let mut all = to_port(7001);
    all["interfaces"] = json!(["bond0"]);
    lab.apply(&all);
    let doctor = lab.run("doctor");
    assert!(!doctor.stdout.contains("large receive offload"), "{doctor:?}");
}
