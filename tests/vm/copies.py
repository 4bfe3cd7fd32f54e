start_all()
relay.wait_for_unit("udplb.service", timeout=300)
for machine in (exporter, first, second):
    machine.wait_for_unit("multi-user.target", timeout=300)
for machine in machines:
    machine.wait_until_succeeds("test -z \"$(ip -6 address show tentative)\"", timeout=60)
for machine in (relay, first, second):
    for port in (2055, 4739, 9995):
        machine.succeed(f"python3 /etc/udp.py listen {port} /tmp/{port}")
# The receivers may have started after the first apply.
relay.succeed("systemctl reload udplb.service")
relay.wait_until_succeeds("udplb status >/dev/null", timeout=60)


def send(port, source, count):
    exporter.succeed(f"python3 /etc/udp.py send fd00:1::2 {port} --from {source} --count {count}")


def arrived(machine, port, source, count):
    machine.wait_until_succeeds(f"test $(grep -c ' {source} ' /tmp/{port}) -ge {count}", timeout=60)
    lines = machine.succeed(f"grep ' {source} ' /tmp/{port}").splitlines()
    assert len(lines) == count, lines
    return lines[0]


with subtest("replicate: every receiver and this host get every datagram"):
    send(2055, 40000, 20)
    assert arrived(first, 2055, 40000, 20) == "fd00:1::1 40000 63 40000-0"
    assert arrived(second, 9995, 40000, 20) == "fd00:1::1 40000 63 40000-0"
    assert arrived(relay, 2055, 40000, 20) == "fd00:1::1 40000 64 40000-0"

with subtest("a mirror gets copies besides, with the sender that it asks for"):
    send(4739, 40001, 20)
    assert arrived(first, 4739, 40001, 20) == "fd00:1::1 40001 63 40001-0"
    assert arrived(second, 4739, 40001, 20) == "fd00:1::2 40001 63 40001-0"
    relay.fail("grep -q . /tmp/4739")

with subtest("one receiver gone takes nothing from the others"):
    second.block()
    send(2055, 40002, 20)
    arrived(first, 2055, 40002, 20)
    arrived(relay, 2055, 40002, 20)
    relay.wait_until_succeeds("status=0; udplb status >/dev/null || status=$?; test $status -eq 3", timeout=120)
    send(4739, 40003, 20)
    arrived(first, 4739, 40003, 20)
    second.unblock()
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)
