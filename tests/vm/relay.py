start_all()
relay.wait_for_unit("udplb.service", timeout=300)
for machine in (collector, exporter):
    machine.wait_for_unit("multi-user.target", timeout=300)
for port in (2055, 163, 514, 9999):
    relay.succeed(f"python3 /etc/udp.py listen {port} /tmp/{port}")
    collector.succeed(f"python3 /etc/udp.py listen {port} /tmp/{port}")
# Copies do not wait for a neighbour.
relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)


def arrived(machine, file):
    machine.wait_until_succeeds(f"test -s {file}", timeout=60)
    return machine.succeed(f"cat {file}")


with subtest("preserve: the collector sees the exporter, one hop further away"):
    exporter.succeed("python3 /etc/udp.py send 10.1.0.2 2055 --from 40000")
    assert arrived(collector, "/tmp/2055") == "10.1.0.1 40000 63 40000-0\n"

with subtest("pass: the relay gets what the exporter sent, through its firewall"):
    assert arrived(relay, "/tmp/2055") == "10.1.0.1 40000 64 40000-0\n"

with subtest("vip: the collector sees the relay, the relay still sees the exporter"):
    exporter.succeed("python3 /etc/udp.py send 10.1.0.2 163 --from 40001")
    assert arrived(collector, "/tmp/163") == "10.1.0.2 40001 63 40001-0\n"
    assert arrived(relay, "/tmp/163") == "10.1.0.1 40001 64 40001-0\n"

with subtest("block: only the collector gets it, and no firewall stands in the way"):
    exporter.succeed("python3 /etc/udp.py send 10.1.0.2 514 --from 40002")
    assert arrived(collector, "/tmp/514") == "10.1.0.2 40002 63 40002-0\n"
    relay.fail("test -s /tmp/514")

with subtest("the firewall is closed for everything else"):
    exporter.succeed("python3 /etc/udp.py send 10.1.0.2 9999 --from 40003")
    # Order on the wire: once the later datagram arrived, the earlier one was refused.
    exporter.succeed("python3 /etc/udp.py send 10.1.0.2 2055 --from 40004")
    relay.wait_until_succeeds("grep -q 40004 /tmp/2055", timeout=60)
    relay.fail("test -s /tmp/9999")
    collector.fail("test -s /tmp/9999")
