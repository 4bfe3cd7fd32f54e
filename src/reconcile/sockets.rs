//! UDP sockets and multicast groups of this network namespace, from /proc.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::{fs, io};

fn read(name: &str) -> io::Result<String> {
    fs::read_to_string(format!("/proc/thread-self/net/{name}"))
}

/// A bound UDP socket; the unspecified address means all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: IpAddr,
    pub port: u16,
}

impl Listener {
    /// Counts an IPv6 socket for all addresses as open for IPv4: /proc does not show `IPV6_V6ONLY`.
    pub fn hears(&self, address: IpAddr) -> bool {
        match self.address {
            IpAddr::V4(all) if all.is_unspecified() => address.is_ipv4(),
            IpAddr::V6(all) if all.is_unspecified() => true,
            one => one == address,
        }
    }
}

/// Returns the bound UDP sockets of this network namespace.
pub fn listeners() -> Vec<Listener> {
    udp_sockets().iter().filter_map(|line| listener(line)).collect()
}

/// Returns the lines of /proc/net/udp and udp6, one for each UDP socket of this network namespace.
pub fn udp_sockets() -> Vec<String> {
    let tables = ["udp", "udp6"].map(|name| read(name).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().skip(1)).map(String::from).collect()
}

/// Parses a line of /proc/net/udp or udp6; `None` for a connected socket, which receives from its peer only.
fn listener(line: &str) -> Option<Listener> {
    let mut words = line.split_whitespace().skip(1);
    let (address, port) = endpoint(words.next()?)?;
    let (_, peer_port) = words.next()?.rsplit_once(':')?;
    (u16::from_str_radix(peer_port, 16) == Ok(0)).then_some(Listener { address, port })
}

/// Parses an address and a port of /proc/net/udp or udp6: hexadecimal words in the byte order of memory.
pub fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let address = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let octets: [u8; 16] = words.concat().try_into().ok()?;
            // A mapped IPv4 address, of a socket for both families.
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

/// Returns the groups that this host has joined, by interface; `None` if /proc lacks them.
pub fn memberships() -> Option<BTreeSet<(String, IpAddr)>> {
    // Without IPv6 there is no igmp6.
    let (table, table6) = (read("igmp").ok()?, read("igmp6").unwrap_or_default());
    Some(members(&table).into_iter().chain(table6.lines().filter_map(member6)).collect())
}

/// Parses /proc/net/igmp: a line for each interface, then indented ones for its groups.
fn members(table: &str) -> Vec<(String, IpAddr)> {
    let mut members = Vec::new();
    let mut interface = "";
    for line in table.lines().skip(1) {
        let mut words = line.split_whitespace();
        if line.starts_with(char::is_whitespace) {
            let group = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
            // A word in the byte order of memory.
            let group = group.map(|group| Ipv4Addr::from(group.to_ne_bytes()));
            members.extend(group.map(|group| (interface.into(), group.into())));
        } else {
            interface = words.nth(1).unwrap_or_default();
        }
    }
    members
}

/// Parses a line of /proc/net/igmp6.
fn member6(line: &str) -> Option<(String, IpAddr)> {
    let mut words = line.split_whitespace();
    let (name, group) = (words.nth(1)?, words.next()?);
    Some((name.into(), Ipv6Addr::from(u128::from_str_radix(group, 16).ok()?).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_net_igmp() {
        let table = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                     1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
                     2\teth0      :     2      V3\n\t\t\t\t010101EF     1 0:00000000\t\t0\n\
                     \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        if cfg!(target_endian = "little") {
            let wanted = [("lo", "224.0.0.1"), ("eth0", "239.1.1.1"), ("eth0", "224.0.0.1")];
            let wanted = wanted.map(|(name, group)| (name.into(), group.parse().unwrap()));
            assert_eq!(members(table), wanted);
        }
        let line = "2    eth0            ff050000000000000000000000000005     1 00000004 0";
        assert_eq!(member6(line), Some(("eth0".into(), "ff05::5".parse().unwrap())));
        assert_eq!(member6("2 eth0"), None);
    }

    #[test]
    fn lines_of_proc_net_udp() {
        let line = "  12: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000";
        if cfg!(target_endian = "little") {
            let address = "127.0.0.1".parse().unwrap();
            assert_eq!(listener(line), Some(Listener { address, port: 53 }));
        }
        let of = |address: &str| listener(&format!("   5: {address}:1FBD 0:0 07"));
        let at = |address: &str| Some(Listener { address: address.parse().unwrap(), port: 8125 });
        assert_eq!(of("00000000000000000000000000000000"), at("::"));
        if cfg!(target_endian = "little") {
            assert_eq!(of("B80D0120000000000000000005000000"), at("2001:db8::5"));
            assert_eq!(of("0000000000000000FFFF00000500000A"), at("10.0.0.5"));
        }
        assert_eq!(of("0000000000"), None);
        let connected = "  12: 0100007F:0035 0100007F:1FBD 01 00000000:00000000";
        assert_eq!(listener(connected), None);
        assert_eq!(listener(""), None);
        assert_eq!(listener("1: x:y"), None);
    }

    #[test]
    fn whom_a_socket_hears() {
        let hears = |socket: &str, address: &str| {
            let listener = Listener { address: socket.parse().unwrap(), port: 1 };
            listener.hears(address.parse().unwrap())
        };
        assert!(hears("0.0.0.0", "10.0.0.5") && !hears("0.0.0.0", "2001:db8::5"));
        assert!(hears("::", "10.0.0.5") && hears("::", "2001:db8::5"));
        assert!(hears("2001:db8::5", "2001:db8::5") && !hears("2001:db8::6", "2001:db8::5"));
    }
}
