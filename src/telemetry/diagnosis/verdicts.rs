//! Verdicts of packets that were not sent, explained. Pure.

/// Returns true for verdicts that mean loss, like `is_lost()` in the program.
pub fn is_loss(verdict: &str) -> bool {
    !["not-for-us", "fragment", "unresolved"].contains(&verdict)
}

/// Cause and fix of a verdict.
pub struct Explanation {
    pub why: &'static str,
    pub fix: &'static str,
}

/// Explains a verdict of packets that were not sent.
pub fn explain(verdict: &str) -> Explanation {
    let (why, fix) = match verdict {
        "no-route" => ("there is no route to the upstream", "ip route get UPSTREAM"),
        "no-neighbour" => ("the next hop does not answer ARP or NDP", "ip neigh show; start it"),
        "unresolved" => (
            "the kernel asks for the next hop, and drops what it does not answer for",
            "ip neigh show; udplb arpd keeps next hops resolved",
        ),
        "mtu" => (
            "the packets are larger than the way to the upstream takes",
            "raise the MTU on the way, or have the senders send less at once",
        ),
        "ttl" => ("the packets' TTL is spent", "have the senders send with a larger TTL"),
        "no-upstream" => ("all upstreams of the rule are drained", "udplb enable RULE/UPSTREAM"),
        "clone-failed" => (
            "there is no memory for copies, or the way out refuses them",
            "look at the drops of the interface that they leave by: ip -s link; tc -s qdisc",
        ),
        "malformed" => (
            "lengths or checksums in the packets are wrong",
            "find out who sends them: udplb trace --drops",
        ),
        "fragment-early" => (
            "a later fragment came before its first one",
            "have the senders send datagrams that need no fragments",
        ),
        "fragment-full" => (
            "more datagrams come in fragments than there is room for",
            "say `fragments: drop`, or have the senders send less at once",
        ),
        "loop" => (
            "the packets come from an upstream of the rule itself, or were here before",
            "have upstreams answer to another port, or name another one in the rule",
        ),
        "martian" => (
            "the sender's address is one that no router forwards, or a source route is unfinished",
            "find out who sends them: udplb trace --drops; or say `martians: allow`",
        ),
        "no-checksum" => (
            "UDP over IPv6 came without a checksum",
            "say `zero-checksum: allow`, if the upstream takes such datagrams",
        ),
        "no-flow" => (
            "there was no room or no port for another flow of `reply: nat`",
            "raise `flows.entries` or widen `flows.ports`",
        ),
        "local-socket" => (
            "a socket of this host asked for the packets, and gets them",
            "nothing is lost; leave the ephemeral ports out of the rule to spare the look-up",
        ),
        "fragment" => ("the rule says so of fragments", "change `fragments` of the rule"),
        "not-for-us" => (
            "the frames are for other hosts, and are left alone",
            "nothing is lost; a switch floods them, or the interface is promiscuous",
        ),
        _ => ("they were not sent", "udplb trace --drops"),
    };
    Explanation { why, fix }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verdict_is_explained() {
        for (verdict, name) in crate::bpf::VERDICTS {
            let is_other = explain(name).why == explain("something else").why;
            assert_eq!(is_other, crate::bpf::is_forwarded(verdict), "{name}");
        }
    }
}
