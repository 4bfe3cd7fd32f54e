import itertools

start_all()
relay.wait_for_unit("udplb.service", timeout=300)
relay.wait_for_unit("udplb-arpd.service", timeout=300)
for machine in (client, up):
    machine.wait_for_unit("multi-user.target", timeout=300)
relay.succeed("python3 /etc/udp.py listen 2055 /tmp/got")
up.succeed("python3 /etc/udp.py listen 2055 /tmp/got")
ports = itertools.count(40000)


def copied():
    """Sends until a copy arrives: copies do not wait for a neighbour."""
    port = next(ports)
    send = f"python3 /etc/udp.py send 10.1.0.2 2055 --from {port} --interval 0.1 --until /tmp/{port}"
    client.succeed(f"timeout 60 {send} >/dev/null 2>&1 &")
    up.wait_until_succeeds(f"grep -q ' {port}-' /tmp/got", timeout=60)
    client.succeed(f"touch /tmp/{port}")
    relay.wait_until_succeeds(f"grep -q ' {port}-' /tmp/got", timeout=60)


def all_copied(port):
    client.succeed(f"python3 /etc/udp.py send 10.1.0.2 2055 --from {port} --count 20")
    up.wait_until_succeeds(f"test $(grep -c ' {port}-' /tmp/got) -eq 20", timeout=60)


with subtest("the next hop is known without traffic of ours"):
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=60)
    all_copied(50000)

with subtest("the upstream changes its address and says so"):
    up.succeed("sysctl -qw net.ipv4.conf.eth1.arp_notify=1")
    up.succeed("ip link set eth1 down", "ip link set eth1 address 02:00:00:00:00:31", "ip link set eth1 up")
    copied()
    relay.wait_until_succeeds("udplb status -o json | grep -q 02:00:00:00:00:31", timeout=60)

with subtest("the upstream changes its address in silence"):
    up.succeed("sysctl -qw net.ipv4.conf.eth1.arp_notify=0", "ip link set eth1 address 02:00:00:00:00:32")
    copied()
    relay.wait_until_succeeds("udplb status -o json | grep -q 02:00:00:00:00:32", timeout=60)

with subtest("the upstream goes away: seen, and local delivery goes on"):
    up.block()
    relay.wait_until_succeeds("status=0; udplb status >/dev/null || status=$?; test $status -eq 3", timeout=120)
    client.succeed("python3 /etc/udp.py send 10.1.0.2 2055 --from 50001")
    relay.wait_until_succeeds("grep -q 50001- /tmp/got", timeout=60)

with subtest("the upstream comes back"):
    up.unblock()
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)
    copied()

with subtest("neighbours flushed by hand are known again"):
    relay.succeed("ip neigh flush all")
    copied()
    # A copy may have gone by what arpd knew before.
    relay.wait_until_succeeds("ip neighbour show 10.1.0.3 | grep -q lladdr && udplb status >/dev/null", timeout=60)

with subtest("a restart of arpd leaves copies warm"):
    relay.succeed("systemctl restart udplb-arpd.service")
    all_copied(50002)

with subtest("arpd is started again when it is killed"):
    relay.succeed("systemctl kill --signal=KILL udplb-arpd.service")
    all_copied(50003)
    relay.wait_for_unit("udplb-arpd.service", timeout=60)
