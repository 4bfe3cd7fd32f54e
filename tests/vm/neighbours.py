import itertools

start_all()
relay.wait_for_unit("udplb.service", timeout=300)
relay.wait_for_unit("udplb-arpd.service", timeout=300)
for machine in (client, up):
    machine.wait_for_unit("multi-user.target", timeout=300)
relay.succeed("python3 /etc/udp.py listen 2055 /tmp/got")
up.succeed("python3 /etc/udp.py listen 2055 /tmp/got")
ports = itertools.count(40000)


def copied(timeout):
    # Copies do not wait for a neighbour: new ones are sent until one arrives.
    port = next(ports)
    send = f"python3 /etc/udp.py send 10.1.0.2 2055 --from {port} --interval 0.1 --until /tmp/{port}"
    client.succeed(f"timeout {timeout} {send} >/dev/null 2>&1 &")
    up.wait_until_succeeds(f"grep -q ' {port}-' /tmp/got", timeout=timeout)
    client.succeed(f"touch /tmp/{port}")
    return port


def delivered(port):
    relay.wait_until_succeeds(f"grep -q ' {port}-' /tmp/got", timeout=60)


with subtest("the next hop is known without traffic of ours"):
    relay.wait_until_succeeds("udplb status", timeout=60)
    copied(60)

with subtest("the upstream changes its address and says so"):
    up.succeed("ip link set eth1 down", "ip link set eth1 address 02:00:00:00:00:31", "ip link set eth1 up")
    up.succeed("sysctl -qw net.ipv4.conf.eth1.arp_notify=1")
    delivered(copied(60))
    relay.wait_until_succeeds("udplb status -o json | grep -qi 02:00:00:00:00:31", timeout=60)

with subtest("the upstream goes away: seen, and local delivery goes on"):
    up.block()
    relay.wait_until_succeeds("status=0; udplb status >&2 || status=$?; test $status -eq 3", timeout=120)
    client.succeed("python3 /etc/udp.py send 10.1.0.2 2055 --from 50000")
    delivered(50000)

with subtest("the upstream comes back"):
    up.unblock()
    relay.wait_until_succeeds("udplb status >&2", timeout=120)
    delivered(copied(60))

with subtest("neighbours flushed by hand are known again"):
    relay.succeed("ip neigh flush all")
    copied(60)

with subtest("a restart of arpd leaves copies warm"):
    relay.succeed("systemctl restart udplb-arpd.service")
    up.succeed("true > /tmp/got")
    client.succeed("python3 /etc/udp.py send 10.1.0.2 2055 --from 50001 --count 20")
    up.wait_until_succeeds("test $(grep -c ' 50001-' /tmp/got) -eq 20", timeout=60)
