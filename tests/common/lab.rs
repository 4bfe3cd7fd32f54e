//! Senders, a relay and its upstreams, and udplb on the relay:
//!
//! ```text
//! client  10.1.0.20, .21 ── 10.1.0.1  relay  10.2.0.1 ── 10.2.0.20, .21  upstream
//!                    eth0   eth0              up0        eth0
//! ```
//!
//! With [`Lab::add_ipv6`] each IPv4 address has an IPv6 counterpart: `2001:db8:2::20` for `10.2.0.20`.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libbpf_rs::{Program, ProgramHandle};
use serde_json::{Value, json};
use udplb::bpf::tcx;

use super::{Bpffs, Namespace, run, udplb, unique};

pub const CLIENTS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 1, 0, 20), Ipv4Addr::new(10, 1, 0, 21)];
pub const RELAY: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
pub const UPSTREAMS: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 2, 0, 20), Ipv4Addr::new(10, 2, 0, 21)];

/// The lab's addresses in one family.
#[derive(Clone, Copy)]
pub struct Net {
    pub key: IpAddr,
    pub clients: [IpAddr; 2],
    pub upstreams: [IpAddr; 2],
    /// The relay's address on the upstreams' network.
    pub egress: IpAddr,
}

const fn v4(net: u8, host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, net, 0, host))
}

const fn v6(net: u16, host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, host))
}

pub const V4: Net = Net {
    key: v4(1, 1),
    clients: [v4(1, 20), v4(1, 21)],
    upstreams: [v4(2, 20), v4(2, 21)],
    egress: v4(2, 1),
};
pub const V6: Net = Net {
    key: v6(1, 1),
    clients: [v6(1, 0x20), v6(1, 0x21)],
    upstreams: [v6(2, 0x20), v6(2, 0x21)],
    egress: v6(2, 1),
};

impl Net {
    pub fn is_ipv6(&self) -> bool {
        self.key.is_ipv6()
    }

    /// Returns a rule for the relay's address.
    pub fn rule(&self, name: &str, port: u16, options: Value, upstreams: &[Value]) -> Value {
        let mut rule = rule(name, port, options, upstreams);
        rule["key"]["address"] = json!(self.key);
        rule
    }

    /// Returns the source address that a receiver sees.
    pub fn seen(&self, source: &str, sender: SocketAddr) -> SocketAddr {
        match source {
            "vip" => SocketAddr::new(self.key, sender.port()),
            "egress" => SocketAddr::new(self.egress, sender.port()),
            _ => sender,
        }
    }
}

/// Returns an upstream given by address.
pub fn upstream(address: impl Into<IpAddr>, port: u16) -> Value {
    let address = address.into();
    json!({ "name": address, "address": address, "port": port })
}

/// Senders, a relay and its upstreams, with udplb on the relay.
pub struct Lab {
    /// To udplb the kernel seems to have no tcx.
    hides_tcx: bool,
    pub client: Namespace,
    pub relay: Namespace,
    pub upstream: Namespace,
    pub bpffs: Bpffs,
    pub directory: Directory,
}

impl Lab {
    /// Creates a lab with checksum offload, veth's default.
    pub fn new() -> Lab {
        Lab::with_offload(true, true)
    }

    /// Creates one lab after the other: where udplb attaches by a tcx link, if the kernel has tcx, and by a
    /// tc filter.
    pub fn for_each_attachment() -> impl Iterator<Item = Lab> {
        let has_tcx = tcx::query(1).is_ok_and(|programs| programs.is_some());
        let hides = if has_tcx { &[false, true][..] } else { &[true] };
        hides.iter().map(|hides_tcx| Lab { hides_tcx: *hides_tcx, ..Lab::new() })
    }

    /// Hides tcx from udplb, or no longer.
    pub fn hide_tcx(&mut self, hides: bool) {
        self.hides_tcx = hides;
    }

    /// Returns true if udplb attaches by tcx links.
    pub fn has_links(&self) -> bool {
        !self.hides_tcx && tcx::query(1).is_ok_and(|programs| programs.is_some())
    }

    /// Has a command see of tcx what the lab's udplb sees.
    pub fn seeing(&self, mut command: Command) -> Command {
        if self.hides_tcx {
            // SAFETY: the closure makes one system call, with arguments that outlive it.
            unsafe { command.pre_exec(super::hide_tcx) };
        }
        command
    }

    /// Runs a closure on a thread in the relay's namespace, which sees of tcx what udplb sees.
    pub fn enter_relay<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        self.relay.enter(|| {
            if self.hides_tcx {
                super::hide_tcx().expect("a seccomp filter");
            }
            inside()
        })
    }

    /// Creates a lab with or without checksum offload between client and relay, and between relay and
    /// upstream.
    pub fn with_offload(client: bool, upstream: bool) -> Lab {
        Lab::with_links(|lab| {
            lab.client.link("eth0", &lab.relay, "eth0", client);
            lab.relay.link("up0", &lab.upstream, "eth0", upstream);
        })
    }

    /// Creates a lab with IPv4 addresses on the interfaces that `link` creates.
    pub fn with_links(link: impl FnOnce(&Lab)) -> Lab {
        let lab = Lab {
            hides_tcx: false,
            client: Namespace::new(),
            relay: Namespace::new(),
            upstream: Namespace::new(),
            bpffs: Bpffs::new(),
            directory: Directory::new(),
        };
        link(&lab);
        lab.relay.ip("addr add 10.1.0.1/24 dev eth0");
        lab.relay.ip("addr add 10.2.0.1/24 dev up0");
        for address in CLIENTS {
            lab.client.ip(&format!("addr add {address}/24 dev eth0"));
        }
        for address in UPSTREAMS {
            lab.upstream.ip(&format!("addr add {address}/24 dev eth0"));
        }
        lab.upstream.ip("route add default via 10.2.0.1");
        lab.relay.sysctl("net.ipv4.ip_forward", "1");
        lab
    }

    /// Adds an IPv6 address for each IPv4 address, and link-local addresses with the same suffix.
    pub fn add_ipv6(&self) {
        for (namespace, interface, net, hosts) in [
            (&self.client, "eth0", 1, &["20", "21"][..]),
            (&self.relay, "eth0", 1, &["1"]),
            (&self.relay, "up0", 2, &["1"]),
            (&self.upstream, "eth0", 2, &["20", "21"]),
        ] {
            for host in hosts {
                namespace.ip(&format!("addr add 2001:db8:{net}::{host}/64 dev {interface} nodad"));
            }
            namespace.ip(&format!("addr add fe80::{}/64 dev {interface} nodad", hosts[0]));
        }
        self.upstream.ip("-6 route add default via 2001:db8:2::1");
        self.relay.sysctl("net.ipv6.conf.all.forwarding", "1");
    }

    /// Creates a lab with addresses of both families.
    pub fn dual(client_offload: bool, upstream_offload: bool) -> Lab {
        let lab = Lab::with_offload(client_offload, upstream_offload);
        lab.add_ipv6();
        lab
    }

    /// Returns a udplb command on the relay; `words` are its arguments, separated by spaces.
    pub fn udplb(&self, words: &str) -> Command {
        let mut command = self.seeing(udplb(&self.relay, &self.bpffs));
        command.args(words.split_whitespace());
        command
    }

    /// Returns the directory of the maps that outlive generations.
    pub fn state(&self) -> PathBuf {
        let entries = fs::read_dir(self.bpffs.pins()).expect("pins");
        let mut paths = entries.map(|entry| entry.expect("an entry").path());
        let is_state = |path: &PathBuf| path.to_string_lossy().contains("/state");
        paths.find(is_state).expect("something is applied")
    }

    /// Runs udplb on the relay.
    pub fn run(&self, words: &str) -> Outcome {
        Outcome::of(&mut self.udplb(words))
    }

    /// Writes the configuration file that [`Lab::apply`] applies.
    pub fn write(&self, config: &Value) -> PathBuf {
        self.directory.write("udplb.yaml", &config.to_string())
    }

    /// Applies a configuration and returns the report.
    pub fn apply(&self, config: &Value) -> Value {
        let outcome = self.try_apply(config, "");
        outcome.expect(0).json()
    }

    /// Applies a configuration with these command-line options.
    pub fn try_apply(&self, config: &Value, options: &str) -> Outcome {
        let file = self.write(config);
        self.run(&format!("apply {} -o json {options}", file.display()))
    }

    /// Returns the output of `status`, and ignores its exit code.
    pub fn status(&self) -> Value {
        self.run("status -o json").json()
    }

    /// Returns the packets with a verdict of a rule's upstream.
    pub fn packets(&self, rule: &str, upstream: &str, verdict: &str) -> u64 {
        let status = self.status();
        let by = |list: &Value, field: &str, name: &str| {
            let found = list.as_array().and_then(|list| list.iter().find(|it| it[field] == name));
            found.unwrap_or_else(|| panic!("no {name} in {status:#}")).clone()
        };
        let rule = by(&status["rules"], "rule", rule);
        packets(&by(&rule["upstreams"], "upstream", upstream)["counters"], verdict)
    }

    /// Returns the ingress filters and tcx programs of an interface of the relay. Identical text means that
    /// nothing was written.
    pub fn filters(&self, interface: &str) -> String {
        let filters = self.relay.tc(&format!("filter show dev {interface} ingress"));
        let links = self.links(interface).into_iter();
        filters + &links.map(|it| format!("tcx {it}\n")).collect::<String>()
    }

    /// Returns the tcx programs of an interface of the relay, in their order: name, id and link.
    pub fn links(&self, interface: &str) -> Vec<String> {
        let index = self.relay.index(interface);
        let programs = self.relay.enter(|| tcx::query(index)).expect("an answer");
        let text = |it: tcx::Attached| {
            let program = ProgramHandle::from_prog_id(it.program).expect("a program");
            format!("{} id {} link {}", program.name().to_string_lossy(), it.program, it.link)
        };
        programs.unwrap_or_default().into_iter().map(text).collect()
    }

    /// Has udplb's filter or link on an interface of the relay run a pinned program.
    pub fn replace_program(&self, interface: &str, program: &Path) {
        if !self.has_links() {
            let place = format!("{interface} ingress pref 100 handle 0x7564 protocol all");
            let program = program.display();
            self.relay.tc(&format!("filter replace dev {place} bpf da object-pinned {program}"));
            return;
        }
        let link = self.bpffs.pins().join(format!("links/{}", self.relay.index(interface)));
        let link = tcx::open(&link).expect("a link");
        let program = Program::fd_from_pinned_path(program).expect("a program");
        tcx::replace(link.as_fd(), program.as_fd(), None).expect("replaced");
    }

    /// Removes udplb's filter or link from an interface of the relay, as somebody else might.
    pub fn take_off(&self, interface: &str) {
        let links = self.links(interface);
        let ours = links.iter().find(|link| link.starts_with("udplb"));
        match ours.and_then(|link| link.rsplit(' ').next()) {
            Some(id) => {
                let link = tcx::open_id(id.parse().expect("an id")).expect("a link");
                tcx::detach(link.as_fd()).expect("detached");
            }
            None => _ = self.relay.tc(&format!("filter del dev {interface} ingress pref 100")),
        }
    }
}

/// Returns the packets of a verdict from the counters of `status`; 0 if there is no such counter.
pub fn packets(counters: &Value, verdict: &str) -> u64 {
    let of = |count: &Value| count["packets"].as_u64().unwrap_or(0);
    match verdict {
        // "forwarded" includes the packets sent with other verdicts
        "forwarded" => of(&counters[verdict]) - of(&counters["stale-neighbour"]),
        "matched" | "stale-neighbour" => of(&counters[verdict]),
        _ => of(&counters["not_forwarded"][verdict]),
    }
}

/// Returns a rule with the given upstreams; `options` are merged into its options.
pub fn rule(name: &str, port: u16, options: Value, upstreams: &[Value]) -> Value {
    json!({
        "name": name,
        "key": { "address": RELAY, "port": port },
        "options": options,
        "upstream": upstreams,
    })
}

/// Returns a configuration for the relay's eth0 with the strategy and hash of the first version.
pub fn config(rules: &[Value]) -> Value {
    json!({
        "version": 1,
        "interfaces": ["eth0"],
        "defaults": { "strategy": "src-port", "hash": "modulo" },
        "rules": rules,
    })
}

/// Returns a configuration with one `block` rule from port 5000 to `port` of the first upstream.
pub fn to_port(port: u16) -> Value {
    let upstream = json!({ "name": "one", "address": UPSTREAMS[0], "port": port });
    config(&[rule("only", 5000, json!({ "tc_action": "block" }), &[upstream])])
}

/// Output and exit code of a command.
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    command: String,
}

impl Outcome {
    pub fn new(code: Option<i32>, stdout: String, stderr: String, command: &str) -> Outcome {
        Outcome { code, stdout, stderr, command: command.into() }
    }

    pub fn of(command: &mut Command) -> Outcome {
        let (code, stdout, stderr) = super::outcome(command);
        Outcome { code, stdout, stderr, command: format!("{command:?}") }
    }

    /// Runs a command with this standard input.
    pub fn with_input(command: &mut Command, input: &str) -> Outcome {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program runs");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(input.as_bytes()).expect("the program reads its input");
        drop(stdin);
        let output = child.wait_with_output().expect("the program ends");
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            command: format!("{command:?}"),
        }
    }

    /// # Panics
    /// If the exit code differs or the program panicked.
    #[track_caller]
    pub fn expect(self, code: i32) -> Outcome {
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    /// # Panics
    /// If standard error lacks one of these texts.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Outcome {
        for text in texts {
            assert!(self.stderr.contains(text), "no `{text}`: {self:?}");
        }
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome { code, stdout, stderr, command } = self;
        write!(f, "{command} -> {code:?}\n{stdout}\n{stderr}")
    }
}

/// A temporary directory that every user can read.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Directory {
        let path = std::env::temp_dir().join(unique("udplb-files-"));
        fs::create_dir(&path).expect("a directory for files");
        run("chmod", ["0755".as_ref(), path.as_os_str()]);
        Directory(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Copies udplb to where every user may run it: the build may be in a private home directory.
    pub fn program(&self) -> PathBuf {
        let copy = self.0.join("udplb");
        // `cp` writes the copy: an executable cannot be run while a child forked by another test has it
        // open for writing
        run("cp", [env!("CARGO_BIN_EXE_udplb").as_ref(), copy.as_os_str()]);
        copy
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("a file in the directory");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
