start_all()
balancer.wait_for_unit("udplb.service", timeout=300)
far.wait_for_unit("udplb.service", timeout=300)
for machine in (client, gateway, near):
    machine.wait_for_unit("multi-user.target", timeout=300)
for machine, name in ((near, "near"), (far, "far")):
    machine.succeed("ip address add 10.1.0.2/32 dev lo", f"python3 /etc/udp.py serve {name} 53 --address 10.1.0.2")
balancer.wait_until_succeeds("udplb status >/dev/null", timeout=120)
SENDERS = 40


def ask():
    """Asks from some ports; returns by port who has answered."""
    lines = client.succeed(f"python3 /etc/udp.py ask 10.1.0.2 53 --from 40000 --sources {SENDERS}").splitlines()
    answers = [line.split() for line in lines]
    # both see the client; one answers in its network, and one through the gateway
    assert {(ttl, name, address) for ttl, name, address, _ in answers} <= {
        ("64", "near", "10.1.0.1"),
        ("63", "far", "10.1.0.1"),
    }, lines
    return {port: name for _, name, _, port in answers}


def taken():
    return int(far.succeed("udplb status | sed -n 's/^decap gue from 10.2.0.2: \\([0-9]*\\) packets\\?$/\\1/p'"))


with subtest("both upstreams answer the client themselves"):
    before = ask()
    assert len(before) == SENDERS and set(before.values()) == {"near", "far"}, before
    assert taken() >= list(before.values()).count("far")

with subtest("an upstream is examined"):
    far.succeed("udplb doctor", "udplb doctor --upstream 10.1.0.2")
    assert "10.1.0.9 is no address of this host" in far.fail("udplb doctor --upstream 10.1.0.9")

with subtest("drain moves the flows, and enable brings them back"):
    balancer.succeed("udplb drain dns/near")
    assert set(ask().values()) == {"far"}
    balancer.succeed("udplb enable dns/near")
    assert ask() == before

with subtest("without its filter the upstream takes nothing"):
    far.succeed("systemctl stop udplb.service")
    balancer.succeed("udplb drain dns/near")
    client.fail("python3 /etc/udp.py ask 10.1.0.2 53 --from 41000")
    far.succeed("systemctl start udplb.service")
    assert set(ask().values()) == {"far"}
