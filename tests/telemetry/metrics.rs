//! Metrics of real traffic, and slow scrapers, which must not delay arpd.

use std::env;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::common::lab::{CLIENTS, Lab, Outcome, RELAY, UPSTREAMS, config, rule};
use crate::common::net::{bind, receive};
use crate::common::service::{Arpd, until};

/// Returns rules with two upstreams selected by source port, and one without a route.
fn rules() -> Value {
    let two = UPSTREAMS.map(|address| json!({ "address": address, "port": 7000 }));
    let nowhere = json!({ "name": "a\"name\"", "address": "192.0.2.1" });
    config(&[
        rule("flows", 5000, json!({ "tc_action": "block" }), &two),
        rule("lost", 5001, json!({ "tc_action": "block" }), &[nowhere]),
    ])
}

/// Sends three packets to the first upstream, two to the second, and one that is lost.
fn send(lab: &Lab) {
    let receivers = UPSTREAMS.map(|address| bind(&lab.upstream, address, 7000));
    for (port, receiver, count) in [(5666, &receivers[0], 3), (60256, &receivers[1], 2)] {
        let sender = bind(&lab.client, CLIENTS[0], port);
        for _ in 0..count {
            sender.send_to(b"ten bytes!", (RELAY, 5000)).expect("sent");
            receive(receiver);
        }
    }
    bind(&lab.client, CLIENTS[0], 0).send_to(b"lost", (RELAY, 5001)).expect("sent");
    until("the last packet is counted", || lab.packets("lost", "a\"name\"", "no-route") == 1);
}

/// Removes comments and values that depend on the time.
fn samples(text: &str) -> Vec<&str> {
    let changes = ["#", "udplb_build_info", "udplb_config_last_apply", "udplb_neighbour_age"];
    text.lines().filter(|line| !changes.iter().any(|start| line.starts_with(start))).collect()
}

const WANTED: &str = r#"udplb_config_generation 1
udplb_config_drift 0
udplb_config_incomplete 0
udplb_interface_attached{interface="eth0"} 1
udplb_reattached_total{interface="eth0"} 0
udplb_arpd_up 0
udplb_choice_hash{rule="flows"} 3702940211069
udplb_choice_hash{rule="lost"} 259775284170862
udplb_map_fill_ratio{map="rules"} 0.000002
udplb_map_fill_ratio{map="upstreams"} 0.000015
udplb_map_fill_ratio{map="counters"} 0.000002384185791015625
udplb_rule_packets_total{rule="flows"} 5
udplb_rule_packets_total{rule="lost"} 1
udplb_rule_bytes_total{rule="flows"} 260
udplb_rule_bytes_total{rule="lost"} 46
udplb_upstream_packets_total{rule="flows",upstream="10.2.0.20:7000"} 3
udplb_upstream_packets_total{rule="flows",upstream="10.2.0.21:7000"} 2
udplb_upstream_packets_total{rule="lost",upstream="a\"name\""} 0
udplb_upstream_bytes_total{rule="flows",upstream="10.2.0.20:7000"} 156
udplb_upstream_bytes_total{rule="flows",upstream="10.2.0.21:7000"} 104
udplb_upstream_bytes_total{rule="lost",upstream="a\"name\""} 0
udplb_drops_total{rule="lost",upstream="a\"name\"",reason="no-route"} 1"#;

#[test]
fn metrics_show_real_traffic() {
    let lab = Lab::new();
    assert_eq!(samples(&lab.run("metrics").expect(0).stdout)[0], "udplb_config_generation 0");
    lab.apply(&rules());
    send(&lab);
    let text = lab.run("metrics").expect(0).stdout;
    assert_eq!(samples(&text), WANTED.lines().collect::<Vec<_>>());
    let version = format!("udplb_build_info{{version=\"{}\"}} 1\n", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(&version), "{text}");

    // the file differs from the active configuration, then equals it again
    let sample = |name: &str| {
        let text = lab.run("metrics").expect(0).stdout;
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        value.unwrap_or_else(|| panic!("no {name} in {text}")).to_string()
    };
    let mut other = rules();
    other["rules"][0]["upstream"][0]["port"] = json!(7001);
    lab.write(&other);
    assert_eq!(sample("udplb_config_drift"), "1");
    lab.directory.write("udplb.yaml", "version: 2\n");
    assert_eq!(sample("udplb_config_drift"), "1");
    lab.directory.write("udplb.yaml", &format!("# the same\n{}", rules()));
    assert_eq!(sample("udplb_config_drift"), "0");
    lab.run("detach").expect(0);
    assert_eq!(sample("udplb_interface_attached{interface=\"eth0\"}"), "0");
}

/// Connects as a scraper on the relay.
fn connect(lab: &Lab) -> TcpStream {
    let stream = lab.relay.enter(|| TcpStream::connect(("127.0.0.1", 9477))).expect("connected");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
    stream
}

/// Sends a request and returns the answer; an error if the connection ends early.
fn ask(lab: &Lab, request: &str) -> io::Result<String> {
    let mut stream = connect(lab);
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.is_empty() {
        true => Err(io::ErrorKind::UnexpectedEof.into()),
        false => Ok(answer),
    }
}

const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9477\r\n\r\n";

#[test]
fn arpd_answers_scrapers() {
    let lab = Lab::new();
    lab.apply(&rules());
    let arpd = Arpd::start(&lab, "--metrics");
    until("it listens", || arpd.log().contains("metrics at http://127.0.0.1:9477/metrics"));
    lab.await_health("10.2.0.20:7000", "up");
    send(&lab);
    std::thread::sleep(Duration::from_millis(1100));
    let answer = ask(&lab, SCRAPE).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    for line in [
        "udplb_arpd_up 1",
        "udplb_rule_packets_total{rule=\"flows\"} 5",
        "udplb_upstream_up{rule=\"flows\",upstream=\"10.2.0.21:7000\"} 1",
        "udplb_neighbour_age_seconds{rule=\"flows\",upstream=\"10.2.0.20:7000\"} ",
    ] {
        assert!(body.lines().any(|it| it.starts_with(line)), "no {line} in {body}");
    }
    let state = |request: &str| ask(&lab, request).expect("an answer")[..12].to_string();
    assert_eq!(state("GET / HTTP/1.0\r\n\r\n"), "HTTP/1.1 200");
    assert_eq!(state("GET /metrics?name=x HTTP/1.0\r\n\r\n"), "HTTP/1.1 200");
    assert_eq!(state("GET /etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n"), "HTTP/1.1 404");
    assert_eq!(state("POST /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"), "HTTP/1.1 405");
    assert_eq!(state("GET /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 400");
    let evil = ask(&lab, "GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n").expect("an answer");
    assert!(evil.starts_with("HTTP/1.1 421") && !evil.contains("udplb_"), "{evil}");
    let head = ask(&lab, &SCRAPE.replace("GET", "HEAD")).expect("an answer");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(!head.contains("Content-Length: 0"), "{head}");
    assert_eq!(state("hello\r\n\r\n"), "HTTP/1.1 400");
    assert_eq!(state(&format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(4096))), "HTTP/1.1 431");

    lab.upstream.ip("link set eth0 down");
    lab.await_health("10.2.0.20:7000", "down");
    until("it is seen", || {
        let down = "udplb_upstream_up{rule=\"flows\",upstream=\"10.2.0.20:7000\"} 0\n";
        ask(&lab, SCRAPE).expect("an answer").contains(down)
    });
}

#[test]
fn no_scraper_holds_up_arpd() {
    let lab = Lab::new();
    lab.apply(&rules());
    let arpd = Arpd::start(&lab, "--metrics --lease 2");
    until("it listens", || arpd.log().contains("metrics at"));
    // incomplete requests on more connections than the limit: complete requests are still answered
    let half: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = connect(&lab);
            // new connections replace the oldest ones
            let _ = stream.write_all(b"GET /metr");
            stream
        })
        .collect();
    for _ in 0..5 {
        assert!(ask(&lab, SCRAPE).is_ok_and(|it| it.contains("udplb_arpd_up 1\n")));
    }
    drop(half);
    // 10,000 connections; every third sends a request and does not read the answer
    for _ in 0..50 {
        let streams: Vec<TcpStream> = (0..200).map(|_| connect(&lab)).collect();
        for mut stream in streams.into_iter().step_by(3) {
            // the connection may be closed already
            let _ = stream.write_all(SCRAPE.as_bytes());
        }
    }
    assert_eq!(lab.status()["arpd"], true);
    until("it answers again", || {
        ask(&lab, SCRAPE).is_ok_and(|it| it.contains("udplb_arpd_up 1\n"))
    });
    // a scrape while another udplb holds the lock does not delay arpd either
    let lock = std::fs::File::open(lab.bpffs.pins()).expect("the pin directory");
    lock.lock().expect("a lock");
    std::thread::sleep(Duration::from_millis(1100));
    let answer = ask(&lab, SCRAPE).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    lock.unlock().expect("unlocked");
    assert!(ask(&lab, SCRAPE).expect("an answer").contains("udplb_arpd_up 1\n"));
}

#[test]
fn listen_address_may_come_later() {
    let lab = Lab::new();
    let arpd = Arpd::start(&lab, "--metrics 10.1.0.9:9500");
    until("it cannot listen", || arpd.log().contains("metrics at 10.1.0.9:9500: "));
    lab.relay.ip("addr add 10.1.0.9/24 dev eth0");
    until("it listens", || arpd.log().contains("metrics at http://10.1.0.9:9500/metrics"));
}

/// Prometheus on the relay, stopped when the value is dropped.
struct Prometheus(Child);

impl Prometheus {
    fn start(lab: &Lab, programs: &Path) -> Prometheus {
        let alerts = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/alerts.yaml");
        let configuration = json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": [alerts],
            "scrape_configs": [
                { "job_name": "udplb", "static_configs": [{ "targets": ["127.0.0.1:9477"] }] },
            ],
        });
        let file = lab.directory.write("prometheus.yaml", &configuration.to_string());
        let mut command = lab.relay.command(programs.join("prometheus"));
        command
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", lab.directory.path().join("tsdb").display()))
            .arg("--web.listen-address=127.0.0.1:9090")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Prometheus(command.spawn().expect("Prometheus runs"))
    }

    fn get(&self, lab: &Lab, path: &str) -> io::Result<String> {
        let mut stream = lab.relay.enter(|| TcpStream::connect(("127.0.0.1", 9090)))?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Returns true once Prometheus is ready; it listens earlier.
    fn is_ready(&self, lab: &Lab) -> bool {
        self.get(lab, "/-/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.0 200"))
    }

    /// Returns the result of an expression.
    ///
    /// # Panics
    /// If the query fails.
    fn query(&self, lab: &Lab, expression: &str) -> Vec<Value> {
        let query: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let answer =
            self.get(lab, &format!("/api/v1/query?query={query}")).expect("Prometheus answers");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a head");
        let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{answer}"));
        assert_eq!(body["status"], "success", "{expression}: {body}");
        body["data"]["result"].as_array().expect("results").clone()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Collects every value with this name.
fn all<'a>(value: &'a Value, name: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get(name).and_then(Value::as_str));
            map.values().for_each(|value| all(value, name, found));
        }
        Value::Array(list) => list.iter().for_each(|value| all(value, name, found)),
        _ => {}
    }
}

#[test]
#[ignore = "takes Prometheus: ./dev metrics"]
fn prometheus_scrapes_and_alerts() {
    let programs = env::var("PROMETHEUS").expect("PROMETHEUS: the folder of its programs");
    let programs = Path::new(&programs);
    let lab = Lab::new();
    lab.apply(&rules());
    let _arpd = Arpd::start(&lab, "--metrics");
    send(&lab);
    lab.await_health("10.2.0.20:7000", "up");
    let mut check = Command::new(programs.join("promtool"));
    let text = lab.run("metrics").expect(0).stdout;
    let checked = Outcome::with_input(check.args(["check", "metrics"]), &text).expect(0);
    assert_eq!((checked.stdout.as_str(), checked.stderr.as_str()), ("", ""));

    let prometheus = Prometheus::start(&lab, programs);
    until("Prometheus serves", || prometheus.is_ready(&lab));
    until("it has scraped twice", || {
        let scrapes = prometheus.query(&lab, "count_over_time(up{job=\"udplb\"}[1m]) > 2");
        !scrapes.is_empty() && !prometheus.query(&lab, "up{job=\"udplb\"} == 1").is_empty()
    });
    let packets = prometheus.query(&lab, "sum(udplb_rule_packets_total)");
    assert_eq!(packets[0]["value"][1], "6");
    // each panel of the dashboard has data
    let dashboard = include_str!("../../contrib/grafana.json");
    let dashboard: Value = serde_json::from_str(dashboard).expect("JSON");
    let mut expressions = Vec::new();
    all(&dashboard["panels"], "expr", &mut expressions);
    assert!(expressions.len() > 10, "{expressions:?}");
    for expression in expressions {
        let expression = expression.replace("$instance", ".*").replace("$rule", ".*");
        let expression = expression.replace("$__rate_interval", "1m");
        assert!(!prometheus.query(&lab, &expression).is_empty(), "nothing: {expression}");
    }
    // and an alert fires
    lab.upstream.ip("link set eth0 down");
    until("the alert is there", || {
        let alert = "ALERTS{alertname=\"UdplbUpstreamDown\", upstream=\"10.2.0.20:7000\"}";
        !prometheus.query(&lab, alert).is_empty()
    });
}
