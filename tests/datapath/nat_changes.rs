//! Flows of `reply: nat` under commands: drained upstreams and other tables.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::answers::{ask, replying};
use crate::common::lab::{Lab, Net, V4, V6, packets};
use crate::common::net::{
    PATIENCE, TTL, bind, expect, expect_silence, receive, receive_any, try_receive,
};

/// Returns a configuration with two upstreams for each family.
fn two_upstreams(lifetime: &str) -> Value {
    let mut config = replying("nat");
    config["flows"] = json!({ "unanswered": lifetime, "assured": lifetime });
    for (rule, net) in [V4, V6].iter().enumerate() {
        let second = json!({ "name": "u2", "address": net.upstreams[1], "port": 5353 });
        config["rules"][rule]["upstream"].as_array_mut().expect("a list").push(second);
    }
    config
}

/// Returns a client that is connected to the key of IPv4.
fn client(lab: &Lab) -> UdpSocket {
    let client = bind(&lab.client, V4.clients[0], 0);
    client.connect((V4.key, 53)).expect("connected");
    client
}

fn servers(lab: &Lab) -> [UdpSocket; 2] {
    V4.upstreams.map(|address| bind(&lab.upstream, address, 5353))
}

/// Asks, and returns the place of the upstream that has answered, and what it has seen of the client.
fn ask_any(client: &UdpSocket, servers: &[UdpSocket; 2]) -> (usize, SocketAddr) {
    client.send(b"which").expect("sent");
    let (place, asked) = receive_any(servers);
    servers[place].send_to(b"this", asked.from).expect("sent");
    expect(client, b"this", client.peer_addr().expect("connected"), TTL - 1);
    (place, asked.from)
}

#[test]
fn drain_now_moves_flows_at_once() {
    let lab = Lab::dual(true, true);
    lab.apply(&two_upstreams("1m"));
    let (client, servers) = (client(&lab), servers(&lab));
    let (place, seen) = ask_any(&client, &servers);
    let name = ["dns/u1", "dns/u2"][place];
    lab.run(&format!("drain {name}")).expect(0);
    assert_eq!(ask_any(&client, &servers), (place, seen), "drained: the flow stays");
    let text = lab.run(&format!("drain {name} --now")).expect(0).stdout;
    assert_eq!(text, format!("unchanged ({name} is drained by hand)\n1 flow ended\n"));
    servers[place].send_to(b"late", seen).expect("sent");
    expect_silence(&client);
    assert_eq!(ask_any(&client, &servers).0, 1 - place);
    let again = lab.run(&format!("drain {name} --now -o json")).expect(0).json();
    assert_eq!((&again["flows_ended"], &again["changed"]), (&json!(0), &json!(false)));
    assert_eq!((&again["flows_left"], &again["no_flows"]), (&Value::Null, &Value::Null));
}

#[test]
fn drain_waits_for_the_last_flow() {
    let lab = Lab::dual(true, true);
    lab.apply(&two_upstreams("3s"));
    let (client, servers) = (client(&lab), servers(&lab));
    let (place, _) = ask_any(&client, &servers);
    let (name, other) = (["dns/u1", "dns/u2"][place], ["dns/u2", "dns/u1"][place]);
    let early = lab.run(&format!("drain {name} --wait 0 -o json")).expect(75).json();
    assert_eq!((&early["flows_left"], &early["state"]), (&json!(1), &json!("drained")));
    ask_any(&client, &servers);
    let late = lab.run(&format!("drain {name} --wait 60")).expect(0);
    assert!(late.stdout.ends_with(&format!("{name} has no flows left\n")), "{late:?}");
    late.says(&[&format!("{name}: 1 flow left")]);
    // without a timeout; the other upstream's flow does not count
    assert_eq!(ask_any(&client, &servers).0, 1 - place);
    let none = lab.run(&format!("drain {name} --wait -o json")).expect(0).json();
    assert_eq!(none["flows_left"], 0);

    // the last one of the rule: its flows stay as long as the client speaks
    let waiting = thread::scope(|scope| {
        let waiting = scope.spawn(|| lab.run(&format!("drain {other} --wait")));
        while !waiting.is_finished() {
            ask_any(&client, &servers);
            lab.run(&format!("enable {other}")).expect(0);
            thread::sleep(Duration::from_millis(200));
        }
        waiting.join().expect("an outcome")
    });
    waiting.expect(1).says(&[&format!("{other} was enabled meanwhile")]);
}

#[test]
fn drain_says_why_there_are_no_flows() {
    let lab = Lab::dual(true, true);
    let mut config = replying("nat");
    config["rules"][0]["mirror"] =
        json!([{ "name": "tap", "address": V4.upstreams[1], "port": 9 }]);
    config["rules"][1] = replying("route")["rules"][1].take();
    lab.apply(&config);
    for (name, why) in [
        ("dns/tap", "mirrors get copies only"),
        ("dns6/u1", "rule dns6 has no `reply: nat` or `sticky`"),
    ] {
        for option in ["--now", "--wait", "--wait 5"] {
            let text = lab.run(&format!("drain {name} {option}")).expect(0).stdout;
            assert!(text.ends_with(&format!("{name} has no flows: {why}\n")), "{text}");
        }
        let fields = lab.run(&format!("drain {name} --wait -o json")).expect(0).json();
        assert_eq!((&fields["no_flows"], &fields["flows_left"]), (&json!(why), &Value::Null));
    }
    lab.run("drain dns/u1 --now --wait").expect(64);
    lab.run("drain dns/u1 --print --now").expect(64);
    lab.run("drain dns/u1 --wait soon").expect(64).says(&["a number of seconds"]);
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Upstreams' view of each client, by family and number.
type Seen = BTreeMap<(usize, u32), BTreeSet<SocketAddr>>;

/// Has clients of both families ask one after the other, without pause, while `change` runs. Each question must be
/// answered; returns which ports the upstreams have seen of each client.
fn under_traffic(lab: &Lab, clients: u32, change: impl FnOnce()) -> Seen {
    let (stop, asking) = (AtomicBool::new(false), AtomicU32::new(2));
    let (begun, seen) = (Barrier::new(3), Mutex::new(Seen::new()));
    let ask_all = |sockets: &[UdpSocket]| {
        for (number, socket) in (0_u32..).zip(sockets) {
            socket.send(&number.to_be_bytes()).expect("sent");
            let mut answer = [0; 4];
            socket.recv(&mut answer).unwrap_or_else(|error| panic!("{number}: {error}"));
            assert_eq!(answer, number.to_be_bytes());
            thread::sleep(Duration::from_micros(500));
        }
    };
    thread::scope(|scope| {
        for (family, net) in [V4, V6].iter().enumerate() {
            let server = bind(&lab.upstream, net.upstreams[0], 5353);
            server.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
            let sockets = (0..clients).map(|_| {
                let socket = bind(&lab.client, net.clients[0], 0);
                socket.connect((net.key, 53)).expect("connected");
                socket
            });
            let sockets: Vec<UdpSocket> = sockets.collect();
            let (stop, asking, seen, begun) = (&stop, &asking, &seen, &begun);
            scope.spawn(move || {
                ask_all(&sockets);
                begun.wait();
                while !stop.load(Ordering::SeqCst) {
                    ask_all(&sockets);
                }
                asking.fetch_sub(1, Ordering::SeqCst);
            });
            scope.spawn(move || {
                let mut question = [0; 4];
                while asking.load(Ordering::SeqCst) > 0 {
                    let Ok((_, from)) = server.recv_from(&mut question) else { continue };
                    let client = (family, u32::from_be_bytes(question));
                    seen.lock().expect("no panic").entry(client).or_default().insert(from);
                    server.send_to(&question, from).expect("sent");
                }
            });
        }
        begun.wait();
        // also where it panics: the scope waits for the threads
        let _ends = SetOnDrop(&stop);
        change();
    });
    seen.into_inner().expect("no panic")
}

/// Checks that there are 100 flows, and that none has begun later than this.
#[track_caller]
fn expect_old_flows(lab: &Lab, begun: Instant) {
    let since = begun.elapsed().as_secs_f64();
    let flows = lab.run("flows -o json").expect(0).json();
    let flows = flows["flows"].as_array().expect("a list").clone();
    assert_eq!(flows.len(), 100);
    for flow in flows {
        assert!(flow["age_seconds"].as_f64().expect("an age") >= since - 0.5, "{flow:#}");
    }
}

/// Returns a configuration with so many flows.
fn with_entries(entries: u32) -> Value {
    let mut config = replying("nat");
    config["flows"] = json!({ "entries": entries });
    config
}

#[test]
fn flows_keep_their_ports_in_tables_of_any_size() {
    let lab = Lab::dual(true, true);
    lab.apply(&with_entries(1024));
    let seen = under_traffic(&lab, 50, || {
        let begun = Instant::now();
        for entries in [4096, 100_000, 1024] {
            lab.apply(&with_entries(entries));
            expect_old_flows(&lab, begun);
        }
        for _ in 0..2 {
            lab.run("rollback").expect(0);
            expect_old_flows(&lab, begun);
        }
    });
    assert_eq!(seen.len(), 100);
    let moved: Vec<_> = seen.iter().filter(|(_, ports)| ports.len() != 1).collect();
    assert!(moved.is_empty(), "{moved:?}");
}

#[test]
fn smaller_table_keeps_assured_flows() {
    let lab = Lab::dual(true, true);
    lab.apply(&with_entries(4096));
    let server = bind(&lab.upstream, V4.upstreams[0], 5353);
    let clients: Vec<UdpSocket> = (0..20).map(|_| client(&lab)).collect();
    let ask_all = || -> Vec<SocketAddr> {
        clients.iter().map(|client| ask(client, &server, b"a", b"b")).collect()
    };
    let seen = ask_all();
    thread::sleep(Duration::from_millis(2500));
    assert_eq!(ask_all(), seen);
    for port in 2000..3500 {
        let stranger = bind(&lab.client, V4.clients[1], port);
        stranger.send_to(b"one", (V4.key, 53)).expect("sent");
        receive(&server);
    }
    let count = |rest: &str| -> usize {
        let count = lab.run(&format!("flows --count {rest}")).expect(0).stdout;
        count.trim().parse().expect("a number")
    };
    assert_eq!(count(""), 1520);
    let outcome = lab.try_apply(&with_entries(1024), "").expect(0);
    let left = count("");
    assert!((950..=1024).contains(&left), "{left}");
    outcome.says(&[&format!("{} of 1520 flows have no room", 1520 - left)]);
    assert_eq!(count(&format!("--client {}", V4.clients[0])), 20);
    assert_eq!(ask_all(), seen);
}

/// New programs and old ones that come back, a rule more or less: no flow notices.
#[test]
fn flows_go_on_through_25_generations() {
    let lab = Lab::dual(true, true);
    let mut other = replying("nat");
    lab.apply(&other);
    other["rules"]
        .as_array_mut()
        .expect("rules")
        .insert(0, V4.rule("more", 60, json!({}), &[json!({ "address": V4.upstreams[1] })]));
    let seen = under_traffic(&lab, 50, || {
        let begun = Instant::now();
        for _ in 0..5 {
            lab.try_apply(&other, "--force").expect(0);
            (0..3).for_each(|_| _ = lab.run("rollback").expect(0));
            lab.try_apply(&replying("nat"), "--force").expect(0);
        }
        expect_old_flows(&lab, begun);
    });
    let moved: Vec<_> = seen.iter().filter(|(_, ports)| ports.len() != 1).collect();
    assert!(seen.len() == 100 && moved.is_empty(), "{moved:?}");
}

#[test]
fn purge_ends_all_flows() {
    let lab = Lab::dual(true, true);
    lab.apply(&replying("nat"));
    let (client, server) = (client(&lab), bind(&lab.upstream, V4.upstreams[0], 5353));
    let seen = ask(&client, &server, b"a", b"b");
    lab.run("detach").expect(0);
    server.send_to(b"late", seen).expect("sent");
    expect_silence(&client);
    lab.run("rollback").expect(0);
    assert_eq!(ask(&client, &server, b"a", b"b"), seen, "detached: flows stay");
    lab.run("detach --purge").expect(0);
    lab.apply(&replying("nat"));
    assert_eq!(lab.run("flows --count").expect(0).stdout, "0\n");
    server.send_to(b"late", seen).expect("sent");
    expect_silence(&client);
    ask(&client, &server, b"a", b"b");
}

/// Returns a configuration whose flows have four ports at these addresses, at the next hop's where there are none.
fn with_addresses(addresses: &[&str]) -> Value {
    let mut config = replying("nat");
    config["flows"] = json!({ "ports": "20000-20003" });
    if !addresses.is_empty() {
        config["flows"]["addresses"] = json!(addresses);
    }
    config
}

/// Asks from so many new clients; returns what the upstream has seen of those whose flow was not refused.
fn ask_from_new(
    lab: &Lab,
    net: &Net,
    server: &UdpSocket,
    clients: usize,
) -> Vec<(UdpSocket, SocketAddr)> {
    let mut seen = Vec::new();
    for _ in 0..clients {
        let client = bind(&lab.client, net.clients[0], 0);
        client.connect((net.key, 53)).expect("connected");
        client.send(b"one").expect("sent");
        server.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        if let Ok(asked) = try_receive(server) {
            server.send_to(b"two", asked.from).expect("sent");
            expect(&client, b"two", (net.key, 53), TTL - 1);
            seen.push((client, asked.from));
        }
    }
    seen
}

/// Asks again when flows can be assured, so that no other takes their ports.
fn assure(server: &UdpSocket, flows: &[(UdpSocket, SocketAddr)]) {
    thread::sleep(Duration::from_millis(2500));
    server.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    for (client, seen) in flows {
        assert_eq!(ask(client, server, b"a", b"b"), *seen);
    }
}

/// Each address has all ports; flows go on when their address is taken out of the file.
#[test]
fn flows_are_spread_over_addresses() {
    let lab = Lab::dual(true, true);
    lab.relay.ip("addr add 10.2.0.5/24 dev up0");
    lab.relay.ip("addr add 2001:db8:2::5/64 dev up0 nodad");
    let of = |net: &Net| {
        if net.is_ipv6() { ["2001:db8:2::1", "2001:db8:2::5"] } else { ["10.2.0.1", "10.2.0.5"] }
    };
    let addresses = [of(&V4), of(&V6)].concat();
    for net in [V4, V6] {
        lab.apply(&with_addresses(&addresses));
        let server = bind(&lab.upstream, net.upstreams[0], 5353);
        let seen = ask_from_new(&lab, &net, &server, 8);
        let distinct: BTreeSet<SocketAddr> = seen.iter().map(|(_, seen)| *seen).collect();
        assert_eq!(distinct.len(), 8, "{distinct:?}");
        for address in of(&net) {
            let address: IpAddr = address.parse().expect("an address");
            assert_eq!(distinct.iter().filter(|seen| seen.ip() == address).count(), 4);
        }
        assert!(distinct.iter().all(|seen| (20_000..=20_003).contains(&seen.port())));
        assure(&server, &seen);
        assert!(ask_from_new(&lab, &net, &server, 1).is_empty(), "no port is left");
        // the other family keeps its own
        lab.apply(&with_addresses(&[of(&net)[1]]));
        for (client, seen) in &seen {
            assert_eq!(ask(client, &server, b"a", b"b"), *seen);
        }
    }
}

/// `get` shows the address and port that a new flow would get.
#[test]
fn a_dry_run_shows_the_address_of_new_flows() {
    let lab = Lab::dual(true, true);
    lab.relay.ip("addr add 10.2.0.5/24 dev up0");
    lab.apply(&with_addresses(&["10.2.0.5"]));
    let (client, key) = (V4.clients[0], V4.key);
    let get = lab.run(&format!("get {client}:40000 {key}:53 -i eth0 -o json")).expect(0).json();
    let source: SocketAddr =
        get["outcomes"][0]["source"].as_str().expect("a source").parse().expect("one");
    assert_eq!(source.ip().to_string(), "10.2.0.5");
    assert!((20_000..=20_003).contains(&source.port()), "{source}");
}

#[test]
fn flows_without_port_are_refused_until_an_address_is_added() {
    let lab = Lab::dual(true, true);
    lab.relay.ip("addr add 10.2.0.5/24 dev up0");
    lab.apply(&with_addresses(&[]));
    // a socket of this host, as a name server has it
    let own = bind(&lab.relay, V4.egress, 20_001);
    let server = bind(&lab.upstream, V4.upstreams[0], 5353);
    let seen = ask_from_new(&lab, &V4, &server, 3);
    assure(&server, &seen);
    assert!(ask_from_new(&lab, &V4, &server, 2).is_empty(), "no port is left");
    let mut ports: Vec<u16> = seen.iter().map(|(_, seen)| seen.port()).collect();
    ports.sort_unstable();
    assert_eq!(ports, [20_000, 20_002, 20_003]);
    let refused = packets(&lab.status()["rules"][0]["counters"], "no-flow");
    assert_eq!(refused, 2);
    server.send_to(b"own", (V4.egress, 20_001)).expect("sent");
    assert_eq!(receive(&own).payload, b"own");
    lab.apply(&with_addresses(&["10.2.0.1", "10.2.0.5"]));
    let more = ask_from_new(&lab, &V4, &server, 4);
    let second: IpAddr = "10.2.0.5".parse().expect("an address");
    assert!(more.len() == 4 && more.iter().all(|(_, seen)| seen.ip() == second), "{more:?}");
    for (client, seen) in seen.iter().chain(&more) {
        assert_eq!(ask(client, &server, b"a", b"b"), *seen);
    }
}

#[test]
fn addresses_of_flows_are_this_hosts_and_have_no_rules() {
    let lab = Lab::dual(true, true);
    let foreign = lab.try_apply(&with_addresses(&["10.2.0.9"]), "").expect(0);
    foreign.says(&["10.2.0.9 is no address of this host"]);
    let on_egress = |flows: Value| {
        let mut config = replying("nat");
        config["flows"] = flows;
        let mut rule = V4.rule("own", 20_002, json!({}), &[json!({ "address": V4.upstreams[1] })]);
        rule["key"]["address"] = json!(V4.egress);
        config["rules"].as_array_mut().expect("rules").push(rule);
        config
    };
    let taken = "10.2.0.1 has ports of 20000-20003, at which flows get answers";
    let ports = json!({ "ports": "20000-20003" });
    lab.try_apply(&on_egress(ports), "").expect(65).says(&[taken]);
    let named = json!({ "ports": "20000-20003", "addresses": ["10.2.0.1"] });
    lab.try_apply(&on_egress(named), "").expect(65).says(&[taken]);
    lab.apply(&on_egress(json!({ "ports": "20003-20009" })));
    let elsewhere = json!({ "ports": "20000-20003", "addresses": ["10.1.0.1"] });
    lab.apply(&on_egress(elsewhere));
}
