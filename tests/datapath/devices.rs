//! Every kind of network device, as ingress and as egress device.
//!
//! Kinds that the kernel lacks are reported on standard error and skipped; `./dev kernels` has them
//! all.

use udplb::datapath::kernel;

use crate::common::Namespace;
use crate::common::kinds::all_kinds;
use crate::common::lab::{Lab, Outcome};
use crate::ends::Ends;

/// Addresses of the underlying veth pair.
const LOWER: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
/// Port of WireGuard's encapsulated packets.
const WIREGUARD: &str = "51820";

/// An interface to create, with its namespace.
type End<'lab> = (&'lab Namespace, &'static str);

/// Returns true if the kernel has this kind of device.
fn exists(kind: &str, words: &str) -> bool {
    let namespace = Namespace::new();
    namespace.ip("link add lower0 type veth");
    namespace.ip("addr add 192.0.2.1/24 dev lower0");
    let words = format!("link add it0 {}", filled(words, "lower0", LOWER[0], LOWER[1]));
    let made = Outcome::of(namespace.command("ip").args(words.split_whitespace()));
    let exists = made.code == Some(0) && (kind != "wireguard" || has_wg(&namespace));
    if !exists {
        eprintln!("SKIPPED: no {kind} here: {}", made.stderr);
    }
    exists
}

fn has_wg(namespace: &Namespace) -> bool {
    Outcome::of(namespace.command("sh").args(["-c", "command -v wg"])).code == Some(0)
}

fn filled(words: &str, lower: &str, local: &str, remote: &str) -> String {
    words.replace("LOWER", lower).replace("LOCAL", local).replace("REMOTE", remote)
}

/// Connects two namespaces by devices of a kind, on top of a veth pair.
fn connect(kind: &str, words: &str, ends: [End<'_>; 2]) {
    let lower = ends.map(|(_, name)| format!("lower-{name}"));
    let [(left, _), (right, _)] = ends;
    left.link(&lower[0], right, &lower[1], true);
    for (index, (namespace, name)) in ends.into_iter().enumerate() {
        let lower = &lower[index];
        // otherwise the lower device answers ARP for the upper device's address and receives its
        // packets
        namespace.sysctl("net.ipv4.conf.all.arp_ignore", "1");
        namespace.ip(&format!("addr add {}/24 dev {lower}", LOWER[index]));
        let words = filled(words, lower, LOWER[index], LOWER[1 - index]);
        namespace.ip(&format!("link add {name} {words}"));
        if ["bond", "bridge"].contains(&kind) {
            namespace.ip(&format!("link set {lower} down"));
            namespace.ip(&format!("link set {lower} master {name}"));
            namespace.ip(&format!("link set {lower} up"));
        }
    }
    if kind == "wireguard" {
        make_peers(ends);
    }
    for (namespace, name) in ends {
        namespace.ip(&format!("link set {name} up"));
    }
}

/// Sets the other end's key and address at each end of a WireGuard tunnel.
fn make_peers(ends: [End<'_>; 2]) {
    let keys = [
        "wP5iY2EtjdCQHo4GyDCyTSvNBrFYKlHjlkpFDFMxVGo=",
        "KLGj7sVy3gqPhMDhz1gsbYPkBAnWvGWjVMyPQyWMl3c=",
    ];
    let public = [0, 1].map(|index| {
        let (namespace, name) = ends[index];
        let words = format!("wg set {name} listen-port {WIREGUARD} private-key /proc/self/fd/0");
        wg(namespace, &words, keys[index]);
        wg(namespace, &format!("wg show {name} public-key"), "").trim().to_owned()
    });
    for (index, (namespace, name)) in ends.into_iter().enumerate() {
        let peer = 1 - index;
        let endpoint = format!("{}:{WIREGUARD}", LOWER[peer]);
        let words = format!(
            "wg set {name} peer {} allowed-ips 0.0.0.0/0,::/0 endpoint {endpoint}",
            public[peer]
        );
        wg(namespace, &words, "");
    }
}

/// Runs `wg` with a standard input and returns what it prints.
fn wg(namespace: &Namespace, words: &str, input: &str) -> String {
    let mut words = words.split_whitespace();
    let mut command = namespace.command(words.next().expect("a program"));
    command.args(words);
    Outcome::with_input(&mut command, input).expect(0).stdout
}

/// Checks relaying by every kind of rule in both families, with whole datagrams and segments.
fn check(lab: &Lab) {
    lab.add_ipv6();
    lab.apply(&all_kinds());
    for ends in Ends::both(lab) {
        for length in [1, 1200] {
            ends.check_length(length);
        }
        ends.check_segments();
        ends.check_silence();
        ends.check_count(lab, "forwarded", 12);
    }
    let doctor = lab.run("doctor").stdout;
    assert!(!doctor.contains("receive offload"), "{doctor}");
}

/// Checks upstreams behind devices of a kind, then clients behind them.
fn check_both_sides(kind: &str, words: &str) {
    if !exists(kind, words) {
        return;
    }
    check(&Lab::with_links(|lab| {
        lab.client.link("eth0", &lab.relay, "eth0", true);
        connect(kind, words, [(&lab.relay, "up0"), (&lab.upstream, "eth0")]);
    }));
    let lab = Lab::with_links(|lab| {
        connect(kind, words, [(&lab.client, "eth0"), (&lab.relay, "eth0")]);
        lab.relay.link("up0", &lab.upstream, "eth0", false);
    });
    if kind == "gre" && kernel::version() < (5, 14) {
        lab.add_ipv6();
        lab.try_apply(&all_kinds(), "").says(&["no packet will match on the gre tunnel eth0"]);
        return;
    }
    check(&lab);
}

/// Defines a test for each kind of device. The words are arguments of `ip link add NAME`, with LOWER
/// for the underlying veth, LOCAL and REMOTE for its addresses.
macro_rules! kinds {
    ($($kind:ident: $words:literal,)*) => {
        $(#[test]
        fn $kind() {
            check_both_sides(stringify!($kind), $words);
        })*
    };
}

kinds! {
    vlan: "link LOWER type vlan id 5",
    bond: "type bond mode active-backup miimon 50",
    bridge: "type bridge",
    macvlan: "link LOWER type macvlan mode bridge",
    ipvlan: "link LOWER type ipvlan mode l2",
    vxlan: "type vxlan id 5 local LOCAL remote REMOTE dstport 4789",
    geneve: "type geneve id 5 remote REMOTE",
    gre: "type gre local LOCAL remote REMOTE",
    wireguard: "type wireguard",
}
