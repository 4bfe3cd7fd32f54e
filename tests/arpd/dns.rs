//! A name server on the relay's loopback whose answers, or silence, the test sets.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::common::lab::Lab;

/// The answer to queries for a name; all other names do not exist.
#[derive(Clone)]
pub enum Answer {
    Addresses(Vec<IpAddr>),
    Late(Duration, Vec<IpAddr>),
    /// The response code SERVFAIL.
    Failure,
    Silence,
    /// A truncated answer; the TCP connection that follows is accepted and stays silent.
    Truncated,
}

impl Answer {
    pub fn of(addresses: &[&str]) -> Answer {
        let addresses = addresses.iter().map(|text| text.parse().expect("an address"));
        Answer::Addresses(addresses.collect())
    }
}

type Zone = Arc<Mutex<HashMap<String, Answer>>>;

pub struct Dns {
    zone: Zone,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Dns {
    pub fn start(lab: &Lab) -> Dns {
        let at = (Ipv4Addr::LOCALHOST, 53);
        let (udp, tcp) = lab.relay.enter(|| {
            (UdpSocket::bind(at).expect("UDP port 53"), TcpListener::bind(at).expect("TCP port 53"))
        });
        // much longer than the tests' own timeouts
        let options = "options timeout:30 attempts:5";
        lab.directory.write("resolv.conf", &format!("nameserver 127.0.0.1\nsearch .\n{options}\n"));
        lab.directory.write("nsswitch.conf", "hosts: files dns\n");
        lab.directory.write("hosts", "127.0.0.1 localhost\n");
        let (zone, stop) = (Zone::default(), Arc::new(AtomicBool::new(false)));
        let threads = vec![
            thread::spawn({
                let (zone, stop) = (zone.clone(), stop.clone());
                move || answer(&udp, &zone, &stop)
            }),
            thread::spawn({
                let stop = stop.clone();
                move || hold(&tcp, &stop)
            }),
        ];
        Dns { zone, stop, threads }
    }

    pub fn set(&self, name: impl Into<String>, answer: Answer) {
        self.zone.lock().expect("the zone").insert(name.into(), answer);
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Lab {
    /// Returns a udplb command on the relay that resolves names with the [`Dns`].
    pub fn with_dns(&self, words: &str) -> Command {
        let mut command = self.relay.command("unshare");
        let mounts = ["resolv.conf", "nsswitch.conf", "hosts"].map(|file| {
            format!("mount --bind {} /etc/{file}", self.directory.path().join(file).display())
        });
        let script = format!("{} && exec \"$@\"", mounts.join(" && "));
        command.args(["--mount", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_udplb")]);
        command.arg("--pin-dir").arg(self.bpffs.pins()).args(words.split_whitespace());
        command
    }
}

fn answer(socket: &UdpSocket, zone: &Zone, stop: &AtomicBool) {
    socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
        let question = Question::parse(&buffer[..length]);
        let answer = zone.lock().expect("the zone").get(&question.name).cloned();
        let reply = match answer {
            Some(Answer::Silence) => continue,
            Some(Answer::Late(delay, addresses)) => {
                let (socket, reply) = (socket.try_clone().expect("it"), question.found(&addresses));
                thread::spawn(move || {
                    thread::sleep(delay);
                    let _ = socket.send_to(&reply, from);
                });
                continue;
            }
            Some(Answer::Addresses(addresses)) => question.found(&addresses),
            Some(Answer::Truncated) => question.reply(0x0200, &[]),
            Some(Answer::Failure) => question.reply(2, &[]),
            None => question.reply(3, &[]),
        };
        let _ = socket.send_to(&reply, from);
    }
}

/// Accepts connections and stays silent.
fn hold(listener: &TcpListener, stop: &AtomicBool) {
    listener.set_nonblocking(true).expect("it");
    let mut held = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        held.extend(listener.accept());
        thread::sleep(Duration::from_millis(20));
    }
}

struct Question {
    id: [u8; 2],
    /// The question section as received.
    text: Vec<u8>,
    name: String,
    ipv6: bool,
}

impl Question {
    /// Parses a message with one question.
    fn parse(message: &[u8]) -> Question {
        let mut labels = Vec::new();
        let mut at = 12;
        while message[at] != 0 {
            let end = at + 1 + usize::from(message[at]);
            labels.push(String::from_utf8_lossy(&message[at + 1..end]).to_lowercase());
            at = end;
        }
        Question {
            id: [message[0], message[1]],
            text: message[12..at + 5].into(),
            name: labels.join("."),
            ipv6: message[at + 2] == 28,
        }
    }

    fn found(&self, addresses: &[IpAddr]) -> Vec<u8> {
        let of_type = addresses.iter().filter(|address| address.is_ipv6() == self.ipv6);
        self.reply(0, &of_type.copied().collect::<Vec<_>>())
    }

    fn reply(&self, flags: u16, addresses: &[IpAddr]) -> Vec<u8> {
        let mut reply = self.id.to_vec();
        let counts = [0x8180 | flags, 1, addresses.len() as u16, 0, 0];
        reply.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
        reply.extend(&self.text);
        for address in addresses {
            let (kind, bytes) = match address {
                IpAddr::V4(address) => (1, address.octets().to_vec()),
                IpAddr::V6(address) => (28, address.octets().to_vec()),
            };
            // a pointer to the question's name, the type, class IN, and a TTL of ten seconds
            reply.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 10, 0, bytes.len() as u8]);
            reply.extend(bytes);
        }
        reply
    }
}
