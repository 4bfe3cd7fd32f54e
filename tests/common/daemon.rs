//! Services of the distribution in a namespace of the lab, ended when the value is dropped.

use std::fs;
use std::io::Write as _;
use std::process::{Child, Command, Stdio};

use super::Namespace;
use super::lab::Lab;

/// A running service.
pub struct Daemon {
    child: Child,
}

/// A service of the distribution that answers at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Dnsmasq,
    Chrony,
    Snmpd,
    Freeradius,
    Nginx,
    Rsyslog,
}

/// Returns true if a program is installed; says so loudly if it is not. CI installs all: there it is an error.
pub fn is_there(program: &str) -> bool {
    let is_there = fs::exists(program).is_ok_and(|is| is);
    if !is_there {
        assert!(std::env::var_os("CI").is_none(), "{program} is missing");
        // past the harness, which hides what a test that passes prints
        let _ = writeln!(std::io::stderr(), "SKIPPED: {program} is missing");
    }
    is_there
}

impl Kind {
    pub const ALL: [Kind; 6] =
        [Kind::Dnsmasq, Kind::Chrony, Kind::Snmpd, Kind::Freeradius, Kind::Nginx, Kind::Rsyslog];

    fn program(self) -> &'static str {
        match self {
            Kind::Dnsmasq => "/usr/sbin/dnsmasq",
            Kind::Chrony => "/usr/sbin/chronyd",
            Kind::Snmpd => "/usr/sbin/snmpd",
            Kind::Freeradius => "/usr/sbin/freeradius",
            Kind::Nginx => "/usr/sbin/nginx",
            Kind::Rsyslog => "/usr/sbin/rsyslogd",
        }
    }

    /// Returns true if it is installed.
    pub fn is_installed(self) -> bool {
        is_there(self.program())
    }

    pub fn port(self) -> u16 {
        match self {
            Kind::Dnsmasq => 53,
            Kind::Chrony => 123,
            Kind::Snmpd => 161,
            Kind::Freeradius => 1812,
            Kind::Nginx => 8080,
            Kind::Rsyslog => 514,
        }
    }

    /// Starts it at an address of a namespace.
    pub fn start(self, lab: &Lab, namespace: &Namespace, address: &str) -> Daemon {
        let directory = lab.directory.path().join(super::unique("daemon-"));
        fs::create_dir(&directory).expect("a directory");
        let dir = directory.display().to_string();
        let port = self.port();
        let (text, words) = match self {
            Kind::Dnsmasq => (
                format!(
                    "port={port}\nlisten-address={address}\nbind-interfaces\nno-resolv\nno-hosts\n\
                     user=root\npid-file\naddress=/example.test/10.9.9.9\n"
                ),
                format!("--keep-in-foreground --conf-file={dir}/conf"),
            ),
            Kind::Chrony => (
                format!(
                    "local stratum 10\nallow all\nport {port}\nbindaddress {address}\ncmdport 0\n\
                     bindcmdaddress /\npidfile {dir}/pid\n"
                ),
                format!("-d -x -u root -f {dir}/conf"),
            ),
            Kind::Snmpd => (
                "rocommunity public\n".into(),
                format!("-f -Lf {dir}/log -C -c {dir}/conf -p {dir}/pid udp:{address}:{port}"),
            ),
            Kind::Freeradius => (
                format!(
                    "logdir = {dir}\nrun_dir = {dir}\nlibdir = /usr/lib/freeradius\n\
                     security {{ status_server = yes }}\n\
                     thread pool {{ start_servers = 1\nmax_servers = 1\nmin_spare_servers = 1\n\
                     max_spare_servers = 1 }}\n\
                     client relay {{ ipaddr = 0.0.0.0/0\nsecret = testing123 }}\nmodules {{ }}\n\
                     server default {{ listen {{ type = auth\nipaddr = {address}\nport = {port} }}\n\
                     authorize {{ }}\nauthenticate {{ }} }}\n"
                ),
                format!("-f -l {dir}/log -d {dir} -n conf"),
            ),
            Kind::Nginx => (
                format!(
                    "daemon off; master_process off; pid {dir}/pid; error_log {dir}/log;\n\
                     events {{ }}\nhttp {{ access_log off; client_body_temp_path {dir}/b;\n\
                     proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;\n\
                     scgi_temp_path {dir}/s;\nserver {{ listen {address}:{port};\n\
                     location /healthz {{ return 204; }} location / {{ return 503; }} }} }}\n"
                ),
                format!("-c {dir}/conf -e {dir}/log"),
            ),
            Kind::Rsyslog => (
                format!(
                    "module(load=\"imtcp\")\ninput(type=\"imtcp\" port=\"{port}\" address=\"{address}\")\n\
                     *.* {dir}/messages\n"
                ),
                format!("-n -f {dir}/conf -i {dir}/pid"),
            ),
        };
        let name = if self == Kind::Freeradius { "conf.conf" } else { "conf" };
        fs::write(directory.join(name), text).expect("a file");
        let dictionary = "$INCLUDE /usr/share/freeradius/dictionary\n";
        fs::write(directory.join("dictionary"), dictionary).expect("a file");
        let mut command = namespace.command(self.program());
        command.args(words.split_whitespace()).env("SNMP_PERSISTENT_DIR", &dir);
        Daemon::spawn(command)
    }
}

impl Daemon {
    /// Starts a service by its command.
    pub fn spawn(mut command: Command) -> Daemon {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Daemon { child: command.spawn().expect("the service starts") }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the process is a child that was not waited for.
        let sent = unsafe { libc::kill(self.child.id() as i32, signal) };
        assert_eq!(sent, 0, "kill: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
