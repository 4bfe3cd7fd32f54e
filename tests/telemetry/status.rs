//! Views for operators: status, rates, top; and lossless counters.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use udplb::bpf::program_info;

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, packets, rule};
use crate::common::net::{Load, bind, local, poll, receive, set};
use crate::common::service::until;

/// Returns rules with two upstreams selected by source port, and copies to an upstream without a route.
fn rules() -> Value {
    let two = UPSTREAMS.map(|address| json!({ "address": address, "port": 7000 }));
    let named = json!({ "name": "nowhere", "address": "192.0.2.1" });
    config(&[
        rule("flows", 5000, json!({ "tc_action": "block" }), &two),
        rule("copies", 5001, json!({}), &[named]),
    ])
}

/// Sends three packets to the first upstream, one to the second, and two that are not sent on.
fn send(lab: &Lab) {
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7000));
    for (port, receiver, count) in [(5666, &receivers[0], 3), (60256, &receivers[1], 1)] {
        let sender = bind(&lab.client, CLIENTS[0], port);
        for _ in 0..count {
            sender.send_to(b"ten bytes!", (RELAY, 5000)).expect("sent");
            receive(receiver);
        }
    }
    let _here = bind(&lab.relay, RELAY, 5001);
    let sender = bind(&lab.client, CLIENTS[0], 0);
    for _ in 0..2 {
        sender.send_to(b"copied", (RELAY, 5001)).expect("sent");
    }
    until("the last packet is counted", || lab.packets("copies", "nowhere", "no-route") == 2);
}

/// Masks what varies: file, dates, MAC addresses and their state.
fn masked(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let words = line.split_inclusive(' ').map(|word| {
            let plain = word.trim_end();
            match plain {
                _ if plain.contains("/udplb-files-") => "FILE ",
                _ if plain.matches(':').count() == 5 => "MAC ",
                _ if plain.starts_with("20") && plain.ends_with('Z') => "TIME ",
                _ => word,
            }
        });
        let line: String = words.collect();
        let line = match line.split_once("(") {
            Some((start, end)) if end.ends_with("ago)") => format!("{start}(AGE ago)"),
            _ => line,
        };
        lines.push(line);
    }
    lines.join("\n") + "\n"
}

/// Returns the words of a table's rows, without those that vary.
fn rows(text: &str) -> Vec<Vec<String>> {
    let table = text.split_once("\n\n").map_or(text, |(_, table)| table);
    let cells = |line: &str| -> Vec<String> {
        line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(String::from).collect()
    };
    table.lines().map(cells).collect()
}

#[test]
fn status_text_shows_rules_and_counters() {
    let lab = Lab::new();
    lab.apply(&rules());
    send(&lab);
    let text = lab.run("status").expect(3).stdout;
    // without a command the output is the same
    let bare = lab.run("").expect(3).stdout;
    let first = |text: &str| text.split('(').next().map(String::from);
    assert_eq!(first(&bare), first(&text));
    let masked = masked(&text);
    let (first, rest) = masked.split_once('\n').expect("lines");
    assert!(
        first.contains("problem")
            && first.contains(": generation 1 of FILE applied TIME (AGE ago)"),
        "{masked}"
    );
    assert!(rest.starts_with("on eth0\ntotals are counted since TIME"), "{masked}");
    assert!(rest.contains("\n! copies: there is no route to nowhere: "), "{masked}");
    let mut rows = rows(&text);
    for row in &mut rows {
        // the next hop's MAC address, state and age
        let end = row[3].find(" dev up0").map(|place| place + " dev up0".len());
        let hop = &mut row[3];
        hop.truncate(end.unwrap_or(hop.len()));
    }
    let wanted = [
        "RULE|KEY|UPSTREAM|NEXT HOP|STATE|FORWARDED|BYTES|SHARE|NOT FORWARDED",
        "flows|10.1.0.1:5000 block|-|-|-|4|208|-|-",
        "flows|-|10.2.0.20:7000|10.2.0.20 dev up0|-|3|156|75.0%|-",
        "flows|-|10.2.0.21:7000|10.2.0.21 dev up0|-|1|52|25.0%|-",
        "copies|10.1.0.1:5001 pass|-|-|-|0|0|-|no-route 2",
        "copies|-|nowhere 192.0.2.1|no route|-|0|0|-|no-route 2",
    ];
    assert_eq!(rows.iter().map(|row| row.join("|")).collect::<Vec<_>>(), wanted);
    let one = lab.run("status copies").expect(3).stdout;
    assert!(one.contains("nowhere") && !one.contains("flows"), "{one}");
    // no colour unless requested
    assert!(!text.contains('\x1b'));
    assert!(lab.run("status --color always").stdout.contains("\x1b[1mRULE"));

    let status = lab.status();
    let rules = status["rules"].as_array().expect("rules");
    assert_eq!(rules[0]["counters"]["forwarded"], json!({ "packets": 4, "bytes": 208 }));
    assert_eq!(rules[0]["counters"]["matched"]["packets"], 4);
    assert_eq!(rules[0]["upstreams"][1]["share"], 0.25);
    assert_eq!(rules[1]["upstreams"][0]["share"], Value::Null);
    assert!(rules[0].get("rate").is_none());
}

/// Runs udplb as on a terminal with this many columns.
fn in_columns(lab: &Lab, columns: usize, words: &str) -> String {
    let mut command = lab.udplb(words);
    Outcome::of(command.env("COLUMNS", columns.to_string())).stdout
}

#[test]
fn status_in_80_columns_is_a_tree() {
    let lab = Lab::new();
    let listener = bind(&lab.relay, RELAY, 5001);
    lab.apply(&rules());
    drop(listener);
    send(&lab);
    let text = in_columns(&lab, 80, "status --interval 0.2");
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{text}");
    assert!(lines[0].contains(": generation 1 of "), "{text}");
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let at = lines.iter().position(|line| line.starts_with("RULE")).expect("a table");
    let table: Vec<String> = lines[at..].iter().map(|line| words(line)).collect();
    let wanted = [
        "RULE PPS MBIT/S",
        "flows 10.1.0.1:5000 block 0 0.00",
        "├ 10.2.0.20:7000 0 0.00",
        "└ 10.2.0.21:7000 0 0.00",
        "copies 10.1.0.1:5001 pass 0 0.00",
        "└ nowhere 192.0.2.1 0 0.00",
        "not forwarded: no-route 2",
    ];
    assert_eq!(table, wanted, "{text}");
    assert!(text.contains("what was not forwarded is counted since 2"), "{text}");

    // only rates, if requested
    let _load = Load::start(bind(&lab.client, CLIENTS[0], 5666), 5001);
    let text = in_columns(&lab, 80, "status --rate --interval 0.5");
    let lost =
        text.lines().find(|line| line.contains("not forwarded/s: no-route ")).expect("losses");
    let rate: f64 = lost.rsplit(' ').next().and_then(|rate| rate.parse().ok()).expect("a rate");
    assert!(rate > 20.0 && !text.contains("counted since"), "{text}");
    // the wide form has everything on one line per upstream
    let wide = in_columns(&lab, 80, "status -o wide");
    assert!(wide.contains("NEXT HOP") && wide.contains("totals are counted since"), "{wide}");
    assert!(
        wide.lines().any(|line| line.starts_with("flows ") && line.contains("dev up0")),
        "{wide}"
    );

    lab.run("drain flows/10.2.0.20").expect(0);
    let colours = in_columns(&lab, 80, "status --interval 0.2 --color always");
    assert!(colours.contains("\x1b[33m├ 10.2.0.20:7000"), "{colours}");
    assert!(colours.contains("\x1b[31m    not forwarded: no-route"), "{colours}");
}

#[test]
fn problems_option_prints_problems_and_fixes() {
    let lab = Lab::new();
    lab.apply(&rules());
    lab.relay.ip("link set eth0 down");
    let text = lab.run("status --problems").expect(3).stdout;
    assert!(!text.contains("RULE"), "{text}");
    let first = text.lines().next().expect("a line");
    assert!(first.contains("problem") && first.contains("generation 1"), "{text}");
    assert!(text.contains("\n! eth0: ") && text.contains("\n  fix: ip link set eth0 up"), "{text}");
    lab.run("status --problems --watch").expect(64);
}

#[test]
fn watch_scrolls_and_quits() {
    let lab = Lab::new();
    let many: Vec<Value> = (1..=30)
        .map(|port| {
            let upstream = json!({ "address": UPSTREAMS[0], "port": 7000 });
            rule(&format!("rule{port}"), 5000 + port, json!({ "tc_action": "block" }), &[upstream])
        })
        .collect();
    lab.apply(&config(&many));
    let mut watch = OnTerminal::start(lab.udplb("status --watch --interval 0.3"));
    watch.until("the first lines", |frame| frame.contains("rule1 "));
    // several keys at once
    watch.keyboard.write_all(b"\x1b[F\x1b[A").expect("keys");
    watch.until("the last lines", |frame| frame.contains("rule30 "));
    watch.keyboard.write_all(b"q").expect("a key");
    let screen = watch.end(0);
    assert!(screen.starts_with(ENTER) && screen.ends_with(LEAVE), "{screen:?}");
    let frames: Vec<&str> = screen.split(HOME).collect();
    let last = frames.last().expect("a frame");
    assert!(frames.iter().any(|frame| frame.contains("rule1 ") && !frame.contains("rule30 ")));
    assert!(last.contains("rule30 ") && !last.contains("rule1 "), "{last}");
}

#[test]
fn mirrors_and_notes_are_shown() {
    let lab = Lab::new();
    let two = UPSTREAMS.map(|address| json!({ "address": address, "port": 7000 }));
    let payload = json!({ "strategy": "payload", "payload": { "offset": 4, "length": 4 } });
    let mut flows = rule("flows", 5000, payload, &two);
    flows["options"]["tc_action"] = json!("block");
    flows["mirror"] =
        json!([{ "name": "spy", "address": UPSTREAMS[0], "port": 7001, "sample": 2 }]);
    let receivers = [
        json!({ "name": "one", "address": UPSTREAMS[0], "port": 7002 }),
        json!({ "name": "none", "address": "192.0.2.1" }),
    ];
    let options = json!({ "tc_action": "block", "mode": "replicate", "source": "vip" });
    let mut all = config(&[flows, rule("copies", 5001, options, &receivers)]);
    all.as_object_mut().expect("a map").remove("defaults");
    lab.apply(&all);
    let sender = bind(&lab.client, CLIENTS[0], 5666);
    // the mirror gets one random packet of each two: two of four
    for text in ["long enough", "long enough", "short", "long enough"] {
        sender.send_to(text.as_bytes(), (RELAY, 5000)).expect("sent");
    }
    sender.send_to(b"x", (RELAY, 5001)).expect("sent");
    until("the last packet is counted", || lab.packets("copies", "one", "forwarded") == 1);
    let status = lab.status();
    let [flows, copies] = [0, 1].map(|index| &status["rules"][index]);
    // each packet counts once, however many copies were made
    assert_eq!(flows["counters"]["matched"]["packets"], 4);
    assert_eq!(flows["notes"], json!({ "short-payload": { "packets": 1, "bytes": 47 } }));
    assert_eq!(flows["mirrors"][0]["upstream"], "spy");
    assert_eq!(flows["mirrors"][0]["counters"]["forwarded"]["packets"], 2);
    assert_eq!(copies["counters"]["matched"]["packets"], 1);
    assert_eq!(copies["counters"]["forwarded"]["packets"], 1);
    assert_eq!(copies["upstreams"][1]["counters"]["not_forwarded"]["no-route"]["packets"], 1);
    assert!(copies.get("notes").is_none() && copies.get("mirrors").is_none());

    let rows: Vec<String> =
        rows(&lab.run("status").expect(3).stdout).iter().map(|row| row.join("|")).collect();
    assert!(rows[1].starts_with("flows|10.1.0.1:5000 block|-|-|-|4|"), "{rows:?}");
    assert!(rows[1].ends_with("|-|(short-payload 1)"), "{rows:?}");
    assert!(rows[4].starts_with("flows|-|mirror spy 10.2.0.20:7001|10.2.0.20 dev up0"), "{rows:?}");
    assert!(rows[4].contains("|50.0%|"), "{rows:?}");
    assert!(rows[5].starts_with("copies|10.1.0.1:5001 block replicate|-|-|-|1|"), "{rows:?}");
    assert_eq!(rows[7], "copies|-|none 192.0.2.1|no route|-|0|0|0.0%|no-route 1");
    let metrics = lab.run("metrics").expect(0).stdout;
    for line in [
        "udplb_rule_packets_total{rule=\"flows\"} 4",
        "udplb_upstream_packets_total{rule=\"flows\",upstream=\"spy\"} 2",
        "udplb_rule_notes_total{rule=\"flows\",note=\"short-payload\"} 1",
        "udplb_rule_packets_total{rule=\"copies\"} 1",
        "udplb_drops_total{rule=\"copies\",upstream=\"none\",reason=\"no-route\"} 1",
    ] {
        assert!(metrics.lines().any(|it| it == line), "no {line}: {metrics}");
    }
    let top = lab.run("top --once --sort name").expect(0).stdout;
    assert!(top.contains("mirror spy"), "{top}");
}

#[test]
fn rates_are_measured_and_watched() {
    let lab = Lab::new();
    lab.apply(&rules());
    let _receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7000));
    let _load = Load::start(bind(&lab.client, CLIENTS[0], 5666), 5000);
    let started = Instant::now();
    let status = lab.run("status --rate -o json").expect(3).json();
    assert!(started.elapsed() > Duration::from_secs(1));
    let upstreams = &status["rules"][0]["upstreams"];
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{status:#}"));
    let packets = number(&upstreams[0]["rate"]["packets_per_second"]);
    assert!(packets > 100.0, "{status:#}");
    // 50 bytes per packet: eight bytes of payload and the headers
    assert_eq!(number(&upstreams[0]["rate"]["bits_per_second"]).round(), (packets * 400.0).round());
    assert_eq!(number(&upstreams[0]["share"]), 1.0);
    assert_eq!(number(&upstreams[1]["rate"]["packets_per_second"]), 0.0);
    let titles = &rows(&lab.run("status --rate").expect(3).stdout)[0];
    assert_eq!(titles[5..], ["PPS", "MBIT/S", "SHARE", "NOT FORWARDED/S"]);

    // one line per interval; after a signal the exit code is that of the last one
    let mut command = lab.udplb("status --watch -o json");
    let mut child = command.stdout(Stdio::piped()).spawn().expect("the program runs");
    let started = Instant::now();
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines().take(3);
    let looks: Vec<Value> =
        lines.map(|line| serde_json::from_str(&line.expect("text")).expect("JSON")).collect();
    // the first line at once, then one per second
    let elapsed = started.elapsed();
    assert!(looks.len() == 3 && elapsed > Duration::from_millis(1_500), "{looks:?} {elapsed:?}");
    interrupt(&child);
    assert_eq!(child.wait().expect("the child").code(), Some(3));
    assert!(looks[0]["rules"][0].get("rate").is_none());
    assert!(looks[1]["rules"][0]["rate"]["packets_per_second"].as_f64() > Some(100.0));
}

fn interrupt(child: &Child) {
    // SAFETY: the process is a child that was not waited for.
    let sent = unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(sent, 0, "kill: {}", std::io::Error::last_os_error());
}

/// Opens a terminal of 100 columns and 10 lines; returns the test's end and the program's end.
fn open_terminal() -> (OwnedFd, OwnedFd) {
    let size = libc::winsize { ws_row: 10, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut ours, mut theirs) = (0, 0);
    // SAFETY: the numbers and the size outlive the call, and the descriptors are ours alone.
    unsafe {
        let null = std::ptr::null_mut();
        let opened = libc::openpty(&mut ours, &mut theirs, null, null.cast(), &size);
        assert_eq!(opened, 0, "openpty: {}", std::io::Error::last_os_error());
        // other children must not inherit the descriptor
        libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC);
        (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    }
}

/// A program on its own terminal.
struct OnTerminal {
    child: Child,
    keyboard: File,
    screen: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl OnTerminal {
    fn start(mut command: Command) -> OnTerminal {
        let (ours, theirs) = open_terminal();
        let copy = || Stdio::from(theirs.try_clone().expect("a copy"));
        command.stdin(copy()).stdout(copy()).stderr(Stdio::null());
        let child = command.spawn().expect("the program runs");
        drop((theirs, command));
        let mut reader = File::from(ours.try_clone().expect("a copy"));
        let screen = Arc::<Mutex<Vec<u8>>>::default();
        let written = Arc::clone(&screen);
        let reader = spawn(move || {
            let mut buffer = [0; 4096];
            // reading fails when the terminal is closed
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                written.lock().expect("the screen").extend(&buffer[..length]);
            }
        });
        OnTerminal { child, keyboard: File::from(ours), screen, reader }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("the screen")).into_owned()
    }

    /// Waits until a condition holds for the last frame.
    #[track_caller]
    fn until(&self, what: &str, shows: impl Fn(&str) -> bool) {
        until(what, || shows(self.text().split(HOME).last().expect("a frame")));
    }

    /// Waits for the program's exit and returns all its screen output.
    fn end(mut self, wanted: i32) -> String {
        let code = self.child.wait().expect("the child").code();
        assert_eq!(code, Some(wanted));
        drop(self.keyboard);
        self.reader.join().expect("the reader");
        String::from_utf8_lossy(&self.screen.lock().expect("the screen")).into_owned()
    }
}

const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const HOME: &str = "\x1b[H";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";

#[test]
fn watch_restores_the_terminal() {
    let lab = Lab::new();
    lab.apply(&rules());
    send(&lab);
    let watch = OnTerminal::start(lab.udplb("status --watch"));
    watch.until("a table", |frame| frame.contains("RULE"));
    interrupt(&watch.child);
    let screen = watch.end(3);
    assert!(screen.starts_with(ENTER) && screen.ends_with(LEAVE), "{screen:?}");
    assert!(screen.matches(HOME).count() >= 2, "{screen:?}");
    // no line is wider than the terminal
    let escapes = ["\x1b[K", "\x1b[J", "\x1b[1m", "\x1b[0m"];
    let plain = escapes.iter().fold(screen, |screen, escape| screen.replace(escape, ""));
    let frame = plain.split(HOME).last().expect("a frame");
    for line in frame.lines() {
        assert!(line.chars().count() <= 100, "{line:?}");
    }
    assert!(frame.contains("RULE"), "{frame}");
}

/// SIGHUP, as when the window is closed or the connection breaks.
#[test]
fn terminal_that_goes_away_ends_the_view() {
    let lab = Lab::new();
    lab.apply(&rules());
    for words in ["top", "status --watch", "trace"] {
        let (ours, theirs) = open_terminal();
        let copy = || Stdio::from(theirs.try_clone().expect("a copy"));
        let mut command = lab.udplb(words);
        command.stdin(copy()).stdout(copy()).stderr(copy());
        let mut child = command.spawn().expect("the program runs");
        drop((theirs, command));
        poll(&[ours.as_fd()], libc::POLLIN);
        drop(ours);
        until("it ends", || child.try_wait().expect("the child").is_some());
        let code = child.wait().expect("the child").code();
        assert!(matches!(code, Some(0 | 3)), "{words}: {code:?}");
    }
}

/// Run times of all programs of the machine are measured only if asked for.
#[test]
fn top_measures_with_cost_only() {
    let lab = Lab::new();
    lab.apply(&rules());
    let log = lab.directory.path().join("strace");
    for (words, measures) in [("", false), ("--cost", true)] {
        let mut command = lab.relay.command("strace");
        command.args(["-f", "-qq", "-e", "trace=bpf", "-o"]).arg(&log);
        command.args([env!("CARGO_BIN_EXE_udplb"), "--pin-dir"]).arg(lab.bpffs.pins());
        command.args(["top", "--once", "--interval", "0.1"]).args(words.split_whitespace());
        let text = Outcome::of(&mut command).expect(0).stdout;
        assert_eq!(text.contains("every BPF program of this machine"), measures, "{text}");
        let calls = fs::read_to_string(&log).expect("what strace saw");
        assert_eq!(calls.contains("BPF_ENABLE_STATS"), measures, "{words}: {calls}");
    }
}

#[test]
fn top_shows_rates_and_sorts() {
    let lab = Lab::new();
    lab.apply(&rules());
    let _receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7000));
    let load = Load::start(bind(&lab.client, CLIENTS[0], 60256), 5000);
    let view = lab.run("top --once --cost -o json").expect(0).json();
    let upstreams = view["upstreams"].as_array().expect("upstreams");
    assert_eq!(upstreams.len(), 3);
    assert_eq!(upstreams[0]["upstream"], "10.2.0.21:7000");
    assert_eq!(upstreams[0]["share"], 1.0);
    assert!(upstreams[0]["packets_per_second"].as_f64() > Some(100.0), "{view:#}");
    let cost = view["nanoseconds_per_packet"].as_f64().unwrap_or_else(|| panic!("{view:#}"));
    assert!((5.0..100_000.0).contains(&cost), "{cost}");
    let text = lab.run("top --once --sort name").expect(0).stdout;
    let names: Vec<String> = rows(&text)[2..].iter().map(|row| row[..2].join(" ")).collect();
    assert_eq!(names, ["copies nowhere", "flows 10.2.0.20:7000", "flows 10.2.0.21:7000"], "{text}");

    let mut top = OnTerminal::start(lab.udplb("top --cost"));
    let order = |frame: &str, one: &str, other: &str| {
        frame.find(one).zip(frame.find(other)).is_some_and(|(one, other)| one < other)
    };
    top.until("the busiest first", |frame| order(frame, "10.2.0.21:7000", "10.2.0.20:7000"));
    top.keyboard.write_all(b"n").expect("a key");
    top.until("by name", |frame| order(frame, "10.2.0.20:7000", "10.2.0.21:7000"));
    top.keyboard.write_all(b"q").expect("a key");
    let screen = top.end(0);
    assert!(screen.starts_with(ENTER) && screen.ends_with(LEAVE), "{screen:?}");
    let after = screen.split(HOME).last().expect("a frame");
    assert!(after.contains("ns/packet") && after.contains('█'), "{after:?}");

    // the kernel no longer measures run time, unless another test runs top
    let runs = || {
        let program =
            libbpf_rs::Program::fd_from_pinned_path(lab.bpffs.pins().join("current/program"))
                .expect("the program");
        program_info(program.as_fd()).expect("its numbers").runs.count
    };
    until("nobody measures", || {
        let before = runs();
        sleep(Duration::from_millis(100));
        runs() == before
    });
    load.end();
}

/// Returns the number of datagrams in the socket's buffer.
fn arrived(socket: &UdpSocket) -> u64 {
    socket.set_nonblocking(true).expect("non-blocking");
    let mut buffer = [0; 2048];
    std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count() as u64
}

/// Returns the entry with this name from a list in the status.
fn find<'a>(list: &'a Value, field: &str, name: &str) -> &'a Value {
    let found = list.as_array().and_then(|list| list.iter().find(|it| it[field] == name));
    found.unwrap_or_else(|| panic!("no {name} in {list:#}"))
}

/// Checks that each packet has one verdict: their sum is the number that matched.
#[track_caller]
fn expect_conserved(counters: &Value) {
    let lost = counters["not_forwarded"].as_object().cloned().unwrap_or_default();
    let lost: u64 = lost.keys().map(|name| packets(counters, name)).sum();
    let sent_on = counters["forwarded"]["packets"].as_u64().expect("a number");
    assert_eq!(sent_on + lost, packets(counters, "matched"), "{counters:#}");
}

#[test]
fn counters_lose_nothing_across_applies() {
    const APPLIES: u32 = 12;
    let lab = Lab::new();
    // each generation differs; rules and endpoints stay
    let configuration = |round: u32| {
        let upstream = |address: usize, port: u16| json!({ "name": format!("u{port}"), "address": UPSTREAMS[address], "port": port });
        let mut two = vec![upstream(0, 7000), upstream(1, 7001)];
        let mut copies = vec![upstream(0, 7002), upstream(1, 7003)];
        if round % 2 == 1 {
            two.reverse();
            copies.reverse();
        }
        let port = 6000 + round as u16;
        config(&[
            rule("flows", 5000, json!({ "tc_action": "block" }), &two),
            rule("copies", 5001, json!({ "source": "preserve" }), &copies),
            rule("old", 5002, json!({ "tc_action": "block" }), &[upstream(0, 7004)]),
            rule("changes", port, json!({ "tc_action": "block" }), &[upstream(0, 7005)]),
        ])
    };
    let receivers: Vec<(String, UdpSocket)> = (7000..=7004_u16)
        .map(|port| (format!("u{port}"), bind(&lab.upstream, UPSTREAMS[(port % 2) as usize], port)))
        .collect();
    let _here = bind(&lab.relay, RELAY, 5001);
    lab.apply(&configuration(0));
    let sender = |port: u16, ttl: i32| {
        let socket = bind(&lab.client, CLIENTS[0], port);
        set(&socket, libc::IPPROTO_IP, libc::IP_TTL, ttl);
        assert_eq!(local(&socket).port(), port);
        socket
    };
    // packets of the last load have a TTL of one and are not sent on
    let loads = [
        ("flows", Load::start(sender(5666, 64), 5000)),
        ("flows", Load::start(sender(60256, 64), 5000)),
        ("copies", Load::start(sender(5667, 64), 5001)),
        ("copies", Load::start(sender(60257, 64), 5001)),
        ("old", Load::start(sender(5668, 1), 5002)),
    ];
    let mut last = Vec::new();
    for round in 1..=APPLIES {
        sleep(Duration::from_millis(50));
        assert_eq!(lab.apply(&configuration(round))["changed"], true);
        // no counter ever decreases
        let status = lab.status();
        let now: Vec<u64> = ["flows", "copies", "old"]
            .map(|name| packets(&find(&status["rules"], "rule", name)["counters"], "matched"))
            .to_vec();
        assert!(last.iter().zip(&now).all(|(last, now)| last <= now), "{last:?} {now:?}");
        last = now;
    }
    let mut sent = std::collections::BTreeMap::new();
    for (name, load) in loads {
        *sent.entry(name).or_insert(0) += load.end();
    }
    let matched =
        |name: &str| packets(&find(&lab.status()["rules"], "rule", name)["counters"], "matched");
    for (name, sent) in &sent {
        until("all are counted", || matched(name) >= *sent);
        assert_eq!(matched(name), *sent, "{name}");
    }
    let status = lab.status();
    for name in ["flows", "copies", "old"] {
        let rule = find(&status["rules"], "rule", name);
        expect_conserved(&rule["counters"]);
        let mut forwarded = 0;
        for upstream in rule["upstreams"].as_array().expect("upstreams") {
            expect_conserved(&upstream["counters"]);
            let label = upstream["upstream"].as_str().expect("a label");
            let (_, socket) = receivers.iter().find(|(it, _)| it == label).expect("a receiver");
            let sent_on = packets(&upstream["counters"], "forwarded")
                + packets(&upstream["counters"], "stale-neighbour");
            let mut got = 0;
            until("all have arrived", || {
                got += arrived(socket);
                got >= sent_on
            });
            assert_eq!(got, sent_on, "{name} {label}");
            forwarded += sent_on;
        }
        let counters = &rule["counters"];
        assert_eq!(
            packets(counters, "forwarded") + packets(counters, "stale-neighbour"),
            forwarded
        );
    }
    let old = &find(&status["rules"], "rule", "old")["counters"];
    assert_eq!(packets(old, "ttl"), sent["old"]);
    assert_eq!(
        packets(&find(&status["rules"], "rule", "flows")["counters"], "forwarded"),
        sent["flows"]
    );
}
