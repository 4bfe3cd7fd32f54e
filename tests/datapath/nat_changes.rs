//! Flows of `reply: nat` under commands: drained upstreams and other tables.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::answers::replying;
use crate::common::lab::{Lab, V4, V6};
use crate::common::net::{TTL, bind, expect, expect_silence, receive_any};

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
    for (name, why) in
        [("dns/tap", "mirrors get copies only"), ("dns6/u1", "rule dns6 has no `reply: nat`")]
    {
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
