import json

SWITCH = "/run/booted-system/{}bin/switch-to-configuration test >&2"
FILE = """
version: 1
interfaces: [eth1]
defaults: { tc_action: block }
rules:
  - key: { address: 10.1.0.2, port: 514 }
    upstream: [{ address: 10.1.0.4 }]
"""

start_all()
relay.wait_for_unit("udplb.service", timeout=300)
for machine in (client, up1, up2):
    machine.wait_for_unit("multi-user.target", timeout=300)
for upstream in (up1, up2):
    upstream.succeed("python3 /etc/udp.py listen 514 /tmp/got")
# The upstreams may have started after the first apply.
relay.succeed("systemctl reload udplb.service")


def switch(name=""):
    relay.succeed(SWITCH.format(f"specialisation/{name}/" if name else ""))


def generation():
    return json.loads(relay.succeed("udplb status -o json || true"))["generation"]


def sent_to(upstream, source):
    client.succeed(f"python3 /etc/udp.py send 10.1.0.2 514 --from {source}")
    upstream.wait_until_succeeds(f"grep -q '{source}-0' /tmp/got", timeout=60)


def not_relayed(source):
    client.succeed(f"python3 /etc/udp.py send 10.1.0.2 514 --from {source}")
    # Sent directly to the upstreams: relayed datagrams would have been sent before.
    for number, upstream in ((3, up1), (4, up2)):
        client.succeed(f"python3 /etc/udp.py send 10.1.0.{number} 514 --from {source + 1}")
        upstream.wait_until_succeeds(f"grep -q '{source + 1}-0' /tmp/got", timeout=60)
        upstream.fail(f"grep -q '{source}-0' /tmp/got")


with subtest("a rebuild under traffic moves a rule and loses nothing"):
    sent_to(up1, 40000)
    traffic = "python3 /etc/udp.py send 10.1.0.2 514 --from 50000 --interval 0.002 --until /tmp/end"
    client.succeed(f"{traffic} > /tmp/sent 2>/dev/null &")
    for _ in range(3):
        switch("moved")
        sent_to(up2, 40001)
        switch()
        sent_to(up1, 40002)
    client.succeed("touch /tmp/end")
    client.wait_until_succeeds("test -s /tmp/sent", timeout=60)
    sent = int(client.succeed("cat /tmp/sent"))

    def arrived():
        return [upstream.succeed("grep -o '50000-[0-9]*$' /tmp/got").split() for upstream in (up1, up2)]

    retry(lambda _: sum(map(len, arrived())) >= sent, 60)
    got = arrived()
    assert all(got), "both were in use"
    assert len(got[0] + got[1]) == len(set(got[0] + got[1])) == sent, (sent, list(map(len, got)))

with subtest("a rebuild that changes nothing does not touch the service"):
    before = generation()
    switch()
    assert generation() == before

with subtest("a bad file fails the reload and leaves the old rules serving"):
    relay.succeed(f"mkdir -p /var/lib; echo '{FILE}' > /var/lib/udplb.yaml")
    switch("file")
    sent_to(up2, 40010)
    relay.succeed("sed -i 's/port: 514/port: 0/' /var/lib/udplb.yaml")
    relay.fail("systemctl reload udplb.service")
    relay.require_unit_state("udplb.service", "active")
    sent_to(up2, 40011)
    relay.succeed("sed -i 's/port: 0/port: 514/' /var/lib/udplb.yaml")
    switch()
    sent_to(up1, 40012)

with subtest("a file that is not there fails the service for good, and a rebuild that mends it succeeds"):
    switch("file")
    relay.succeed("rm /var/lib/udplb.yaml")
    relay.fail("systemctl restart udplb.service")
    relay.require_unit_state("udplb.service", "failed")
    switch()
    relay.require_unit_state("udplb.service", "active")
    sent_to(up1, 40014)

with subtest("a late interface keeps nothing else out, fails no rebuild, and is attached when it appears"):
    switch("late")
    sent_to(up1, 40020)
    relay.succeed("systemctl restart udplb.service")
    sent_to(up1, 40021)
    relay.fail("udplb status")
    relay.succeed("ip link add late0 type veth peer name late1", "ip link set late0 up", "ip link set late1 up")
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=60)
    relay.succeed("ip link delete late0")
    # this fixes it: the missing interface is no longer configured
    switch()
    relay.wait_until_succeeds("udplb status >&2", timeout=60)
    sent_to(up1, 40022)

with subtest("a stop detaches, a start attaches"):
    relay.succeed("systemctl stop udplb.service")
    not_relayed(40030)
    relay.succeed("systemctl start udplb.service")
    sent_to(up1, 40032)

with subtest("enable = false detaches"):
    switch("off")
    not_relayed(40040)
    switch()
    sent_to(up1, 40042)

with subtest("repairInterval: what somebody removed comes back, but not after a stop"):
    switch("repaired")
    relay.succeed("rm /sys/fs/bpf/udplb/links/* || tc filter delete dev eth1 ingress")
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=60)
    sent_to(up1, 40044)
    relay.succeed("systemctl stop udplb.service", "sleep 5")
    not_relayed(40045)
    # a repair that has just begun does not outlive the stop
    for _ in range(5):
        relay.succeed("systemctl start udplb.service")
        relay.succeed("systemctl start --no-block udplb-repair.service", "systemctl stop udplb.service")
        relay.wait_until_succeeds("systemctl show -P ActiveState udplb-repair.service | grep -qx inactive", timeout=60)
        not_relayed(40047)
    relay.succeed("systemctl start udplb.service")
    relay.require_unit_state("udplb-repair.timer", "active")
    switch()

with subtest("keepOnStop: a stop leaves the rules"):
    switch("kept")
    relay.succeed("systemctl stop udplb.service")
    sent_to(up1, 40050)

with subtest("a reboot restores what the system says"):
    relay.shutdown()
    relay.start()
    relay.wait_for_unit("udplb.service", timeout=300)
    sent_to(up1, 40060)
