import json

start_all()
lb.wait_for_unit("udplb.service", timeout=300)
for machine in (client, up1, up2):
    machine.wait_for_unit("multi-user.target", timeout=300)
upstreams = (up1, up2)
for upstream in upstreams:
    upstream.succeed("python3 /etc/udp.py listen 6000 /tmp/by-port", "python3 /etc/udp.py listen 5001 /tmp/by-address")
# The upstreams may have started after the first apply.
lb.succeed("systemctl reload udplb.service")


def arrived(file, count):
    """Returns the datagrams of each upstream once their sum is `count`."""

    def both():
        return [upstream.succeed(f"cat {file}").splitlines() for upstream in upstreams]

    retry(lambda _: sum(map(len, both())) >= count, 60)
    got = both()
    assert sum(map(len, got)) == count, got
    return got


def send(port, sources, count=1):
    client.succeed(
        f"for source in {' '.join(map(str, sources))}; do"
        f" python3 /etc/udp.py send 10.1.0.2 {port} --from $source --count {count}; done"
    )


with subtest("src-port: one port picks the first upstream, another the second"):
    send(5000, [5666, 60256])
    first, second = arrived("/tmp/by-port", 2)
    assert first == ["10.1.0.2 5666 63 5666-0"], first
    assert second == ["10.1.0.2 60256 63 60256-0"], second

with subtest("src-port: a sender stays with its upstream"):
    send(5000, [5666], 50)
    first, second = arrived("/tmp/by-port", 52)
    assert (len(first), len(second)) == (51, 1)

with subtest("src-port: many senders use both upstreams, each the one that its port says"):
    ports = range(10000, 28000, 300)
    send(5000, ports)
    for number, got in enumerate(arrived("/tmp/by-port", 52 + len(ports))):
        # the port's bytes in wire order, read as a little-endian number, modulo 2
        mine = {str(port) for port in ports if (port >> 8) % 2 == number}
        assert mine and mine <= {line.split()[1] for line in got}, (mine, got)

with subtest("src-ip: all ports of a sender go to one upstream"):
    send(5001, range(30000, 30010))
    assert sorted(map(len, arrived("/tmp/by-address", 10))) == [0, 10]

with subtest("everything that came was counted, where it went"):
    status = json.loads(lb.succeed("udplb status -o json"))
    files = {"by-port": "/tmp/by-port", "by-address": "/tmp/by-address"}
    for rule in status["rules"]:
        counted = [upstream["counters"]["forwarded"]["packets"] for upstream in rule["upstreams"]]
        got = [int(upstream.succeed(f"wc -l < {files[rule['rule']]}")) for upstream in upstreams]
        assert counted == got and rule["counters"]["matched"]["packets"] == sum(got), (rule, got)
