start_all()
balancer.wait_for_unit("udplb.service", timeout=300)
balancer.wait_for_unit("udplb-arpd.service", timeout=300)
for machine in (client, one, two):
    machine.wait_for_unit("multi-user.target", timeout=300)
one.succeed("python3 /etc/udp.py serve one 5353")
two.succeed("python3 /etc/udp.py serve two 5353")
balancer.wait_until_succeeds("udplb status >/dev/null", timeout=120)
SENDERS = 40


def ask(source):
    """Asks from ports from this one on; returns by port who has answered."""
    lines = client.succeed(f"python3 /etc/udp.py ask 10.1.0.2 53 --from {source} --sources {SENDERS}").splitlines()
    answers = [line.split() for line in lines]
    assert {address for _, _, address, _ in answers} == {"10.2.0.2"}, lines
    # through the balancer
    assert {ttl for ttl, _, _, _ in answers} == {"63"}, lines
    return {port: name for _, name, _, port in answers}


with subtest("clients get answers from what they have asked, from both upstreams"):
    before = ask(40000)
    assert len(before) == SENDERS and set(before.values()) == {"one", "two"}, before
    for upstream in (one, two):
        upstream.fail("ip route get 10.1.0.1")

with subtest("flows stay where they are over a reload"):
    balancer.succeed("systemctl reload udplb.service")
    assert ask(40000) == before

with subtest("a drained upstream keeps its flows, and gets no new ones"):
    balancer.succeed("udplb drain dns/one")
    assert ask(40000) == before
    assert set(ask(50000).values()) == {"two"}
    balancer.succeed("udplb flows dns/one | grep 10.1.0.1:40")
    balancer.succeed("udplb forget dns/one")
    assert set(ask(40000).values()) == {"two"}
