import json

start_all()
lb.wait_for_unit("udplb.service", timeout=300)
for machine in (client, up1, up2):
    machine.wait_for_unit("multi-user.target", timeout=300)
for upstream in (up1, up2):
    upstream.succeed("python3 /etc/udp.py listen 6000 /tmp/by-port", "python3 /etc/udp.py listen 5001 /tmp/by-address")


def arrived(machine, file, lines, timeout=60):
    machine.wait_until_succeeds(f"test $(wc -l < {file}) -ge {lines}", timeout=timeout)
    got = machine.succeed(f"cat {file}").splitlines()
    assert len(got) == lines, got
    return got


with subtest("src-port: the first port picks the first upstream, the second the second"):
    client.succeed("python3 /etc/udp.py send 10.1.0.2 5000 --from 5666")
    client.succeed("python3 /etc/udp.py send 10.1.0.2 5000 --from 60256")
    assert arrived(up1, "/tmp/by-port", 1)[0].endswith(" 5666-0")
    assert arrived(up2, "/tmp/by-port", 1)[0].endswith(" 60256-0")

with subtest("upstreams see the service address and the sender's port"):
    assert arrived(up1, "/tmp/by-port", 1)[0].startswith("10.1.0.2 5666 ")

with subtest("src-port: a sender stays with its upstream, many senders use both"):
    client.succeed("python3 /etc/udp.py send 10.1.0.2 5000 --from 5666 --count 50")
    arrived(up1, "/tmp/by-port", 51)
    arrived(up2, "/tmp/by-port", 1)
    for port in range(20000, 20064):
        client.succeed(f"python3 /etc/udp.py send 10.1.0.2 5000 --from {port}")
    both = "test $(($(wc -l < /tmp/by-port) + {})) -eq 116"
    second = int(up2.succeed("wc -l < /tmp/by-port"))
    up1.wait_until_succeeds(both.format(second), timeout=60)
    assert 11 <= second <= 55, second

with subtest("src-ip: every port of a sender goes to one upstream"):
    for port in range(30000, 30010):
        client.succeed(f"python3 /etc/udp.py send 10.1.0.2 5001 --from {port}")
    files = [upstream.succeed("cat /tmp/by-address").splitlines() for upstream in (up1, up2)]
    assert sorted(map(len, files)) == [0, 10], files

with subtest("block: nothing was delivered here, everything was counted"):
    status = json.loads(lb.succeed("udplb status -o json"))
    lb.log(json.dumps(status))
