start_all()
for machine in (client, near, far, gateway):
    machine.wait_for_unit("multi-user.target", timeout=300)
relay.wait_for_unit("udplb.service", timeout=300)
far.succeed("python3 /etc/udp.py listen 514 /tmp/got")
near.succeed("python3 /etc/udp.py listen 1515 /tmp/got")
# The gateway must have resolved its own neighbour: packets lost there are not the relay's.
gateway.wait_until_succeeds("ping -c1 -W1 10.3.0.3 || ip neigh show 10.3.0.3 | grep -q REACHABLE", timeout=60)


def arrived(machine, lines):
    machine.wait_until_succeeds(f"test $(wc -l < /tmp/got) -ge {lines}", timeout=60)
    got = machine.succeed("cat /tmp/got").splitlines()
    assert len(got) == lines, got
    return got


def send(port, source, count=1):
    client.succeed(f"python3 /etc/udp.py send 10.1.0.2 {port} --from {source} --count {count}")


with subtest("a gateway's hop, and the relay's own"):
    send(514, 40000)
    assert arrived(far, 1) == ["10.1.0.2 40000 62 40000-0"]

with subtest("another port at the upstream, the sender's own address"):
    send(515, 40001)
    assert arrived(near, 1) == ["10.1.0.1 40001 63 40001-0"]

with subtest("cold neighbours: the first datagrams wait and none is lost"):
    relay.succeed("systemctl stop udplb-arpd.service || true", "ip neigh flush all")
    send(514, 40002, 20)
    send(515, 40003, 20)
    # Datagrams that the kernel holds back may be overtaken by one on another CPU.
    for machine, source in ((far, 40002), (near, 40003)):
        assert {line.split()[3] for line in arrived(machine, 21)[1:]} == {f"{source}-{n}" for n in range(20)}

with subtest("nothing else is forwarded: the relay is no router"):
    client.succeed("ip route add 10.2.0.0/24 via 10.1.0.2", "python3 /etc/udp.py send 10.2.0.3 1515 --from 40004")
    send(515, 40005)
    assert "40005" in arrived(near, 22)[-1]
