//! Programs of the distribution that ask and answer through udplb: DNS, RADIUS, SNMP, iperf3 and QUIC.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::common::Namespace;
use crate::common::daemon::{Daemon, Kind, is_there};
use crate::common::lab::{Lab, Outcome, RELAY, UPSTREAMS, V4};
use crate::common::service::until;
use crate::replies::direct_lab;

/// Ways of the answers that need no other configuration of the upstream than [`prepare`] makes.
const REPLIES: [&str; 3] = ["nat", "route", "direct"];

/// Returns a lab for a kind of replies, and the address that the upstream answers from.
fn prepare(reply: &str, port: u16) -> (Lab, Ipv4Addr) {
    let (lab, server) = match reply {
        "direct" => (direct_lab(true), RELAY),
        _ => (Lab::new(), UPSTREAMS[0]),
    };
    if reply == "nat" {
        // its upstreams need no way back to the clients
        lab.upstream.ip("route del default");
    }
    let mut options = json!({ "tc_action": "block", "reply": reply });
    if reply == "direct" {
        options["via"] = json!("link");
    }
    let upstream = json!({ "name": "u1", "address": UPSTREAMS[0] });
    let rule = V4.rule("service", port, options, &[upstream]);
    lab.apply(&json!({ "version": 1, "interfaces": ["eth0", "up0"], "rules": [rule] }));
    (lab, server)
}

/// Waits until a socket of a namespace has an IPv4 port.
fn await_port(namespace: &Namespace, table: &str, port: u16) {
    let path = format!("/proc/thread-self/net/{table}");
    let local = format!(":{port:04X} ");
    until("the service has its port", || {
        let sockets = namespace.enter(|| fs::read_to_string(&path)).expect("the sockets");
        sockets.lines().any(|line| {
            line.split_whitespace().nth(1).is_some_and(|it| format!("{it} ").ends_with(&local))
        })
    });
}

/// Starts a service on the upstream of a lab.
fn serve(kind: Kind, lab: &Lab, address: Ipv4Addr) -> Daemon {
    let daemon = kind.start(lab, &lab.upstream, &address.to_string());
    await_port(&lab.upstream, "udp", kind.port());
    daemon
}

/// Runs a client; returns its output.
fn client(lab: &Lab, program: &str, words: &str) -> Outcome {
    Outcome::of(lab.client.command(program).args(words.split_whitespace()))
}

#[test]
fn dig_gets_answers_of_dnsmasq() {
    if !Kind::Dnsmasq.is_installed() || !is_there("/usr/bin/dig") {
        return;
    }
    for reply in REPLIES {
        let (lab, server) = prepare(reply, 53);
        let _dnsmasq = serve(Kind::Dnsmasq, &lab, server);
        for _ in 0..4 {
            let outcome = client(&lab, "dig", "+short @10.1.0.1 example.test").expect(0);
            assert_eq!(outcome.stdout, "10.9.9.9\n", "{reply}");
        }
    }
}

#[test]
fn radclient_gets_answers_of_freeradius() {
    if !Kind::Freeradius.is_installed() || !is_there("/usr/bin/radclient") {
        return;
    }
    for reply in REPLIES {
        let (lab, server) = prepare(reply, 1812);
        let _freeradius = serve(Kind::Freeradius, &lab, server);
        for (kind, question, answer) in [
            ("auth", "User-Name = one, User-Password = two", "Received Access-Reject"),
            ("status", "Message-Authenticator = 0x00", "Received Access-Accept"),
        ] {
            let mut radclient = lab.client.command("radclient");
            radclient.args(["-x", "10.1.0.1:1812", kind, "testing123"]);
            let outcome = Outcome::with_input(&mut radclient, question);
            assert!(outcome.stdout.contains(answer), "{reply}: {outcome:?}");
            assert!(outcome.stdout.contains("from 10.1.0.1:1812"), "{reply}: {outcome:?}");
        }
    }
}

#[test]
fn snmpwalk_walks_over_snmpd() {
    if !Kind::Snmpd.is_installed() || !is_there("/usr/bin/snmpwalk") {
        return;
    }
    for reply in REPLIES {
        let (lab, server) = prepare(reply, 161);
        let _snmpd = serve(Kind::Snmpd, &lab, server);
        let walked =
            client(&lab, "snmpwalk", "-v2c -c public -On 10.1.0.1 1.3.6.1.2.1.1").expect(0);
        // sysDescr, and much behind it
        assert!(walked.stdout.starts_with(".1.3.6.1.2.1.1.1.0 = STRING: "), "{reply}: {walked:?}");
        assert!(walked.stdout.lines().count() > 8, "{reply}: {walked:?}");
    }
}

/// iperf3 has a TCP connection beside its datagrams: the key is an address of the upstream, to which the relay routes it.
#[test]
fn iperf3_loses_nothing_either_way() {
    const KEY: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
    const PORT: u16 = 5201;
    if !is_there("/usr/bin/iperf3") {
        return;
    }
    for reply in ["nat", "route"] {
        let (lab, _) = prepare(reply, PORT);
        lab.client.ip(&format!("route add {KEY} via 10.1.0.1"));
        lab.relay.ip(&format!("route add {KEY} via 10.2.0.20"));
        lab.upstream.ip(&format!("addr add {KEY}/32 dev lo"));
        if reply == "nat" {
            lab.upstream.ip("route add 10.1.0.0/24 via 10.2.0.1");
        }
        let mut config: Value = lab.run("list -o json").json();
        config["rules"][0]["key"]["address"] = json!(KEY);
        lab.apply(&config);
        let mut iperf3 = lab.upstream.command("iperf3");
        iperf3.args(["-s", "-4", "-p", "5201"]);
        let _iperf3 = Daemon::spawn(iperf3);
        await_port(&lab.upstream, "tcp", PORT);
        for direction in ["", "-R"] {
            let words = format!("-u -4 -c {KEY} -b 4M -l 1000 -t 1 -J {direction}");
            let sum = client(&lab, "iperf3", &words).expect(0).json()["end"]["sum"].take();
            let of =
                |what: &str| sum[what].as_u64().unwrap_or_else(|| panic!("no {what}: {sum:#}"));
            assert!(of("packets") > 300 && of("lost_packets") == 0, "{reply} {direction}: {sum:#}");
        }
        assert!(lab.packets("service", "u1", "forwarded") > 300, "the datagrams went past udplb");
    }
}

/// Returns the Python that has aioquic, which `./dev test` installs where PyPI can be reached.
fn aioquic() -> Option<PathBuf> {
    let test = std::env::current_exe().expect("a path");
    let python = test.ancestors().nth(3)?.join("aioquic/bin/python");
    if !python.exists() {
        // past the harness, which hides what a test that passes prints
        let _ = writeln!(std::io::stderr(), "SKIPPED: {} is missing", python.display());
        return None;
    }
    Some(python)
}

/// Returns a command that runs the QUIC server or client in a namespace.
fn quic(namespace: &Namespace, python: &PathBuf) -> Command {
    let mut command = namespace.command(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/datapath/quic.py"));
    command
}

/// Starts a QUIC server on the upstream.
fn serve_quic(lab: &Lab, python: &PathBuf, address: Ipv4Addr) -> Daemon {
    let mut server = quic(&lab.upstream, python);
    server.args(["server", &address.to_string(), "443"]).arg(lab.directory.path());
    let daemon = Daemon::spawn(server);
    await_port(&lab.upstream, "udp", 443);
    daemon
}

/// A QUIC client with one connection.
struct QuicClient {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl QuicClient {
    fn connect(lab: &Lab, python: &PathBuf) -> QuicClient {
        let mut client = quic(&lab.client, python);
        client.args(["client", "10.1.0.1", "443"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = client.spawn().expect("the client starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        QuicClient { child, lines }
    }

    /// Waits for the echo of a stream.
    fn await_echo(&mut self) {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("a line");
        assert_eq!(line, "echoed\n");
    }

    /// Has the client send another stream.
    fn go_on(&mut self) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        stdin.write_all(b"\n").expect("the client listens");
    }
}

impl Drop for QuicClient {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn quic_connections_have_their_streams() {
    let Some(python) = aioquic() else { return };
    for reply in REPLIES {
        let (lab, server) = prepare(reply, 443);
        let _server = serve_quic(&lab, &python, server);
        let mut client = QuicClient::connect(&lab, &python);
        client.await_echo();
        if reply == "nat" {
            // its flow is gone, and the next one may have another port: the server follows
            let forgotten = lab.run("forget service").expect(0).stdout;
            assert_eq!(forgotten, "1 flow ended\n");
        }
        client.go_on();
        client.await_echo();
    }
}
