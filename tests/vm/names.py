SWITCH = "/run/booted-system/{}bin/switch-to-configuration test >&2"
receivers = (first, second, third)

start_all()
for machine in (client, *receivers):
    machine.wait_for_unit("multi-user.target", timeout=300)
for receiver in receivers:
    receiver.succeed("python3 /etc/udp.py listen 514 /tmp/got")


def switch(name=""):
    relay.succeed(SWITCH.format(f"specialisation/{name}/" if name else ""))


def sent(source, *to):
    """Checks that datagrams from this port arrive at these receivers only."""
    # Copies do not wait for a neighbour.
    for number in (number for number, receiver in enumerate(receivers, 3) if receiver in to):
        relay.wait_until_succeeds(f"ip neighbour show 10.1.0.{number} | grep -q lladdr", timeout=60)
    client.succeed(f"python3 /etc/udp.py send 10.1.0.2 514 --from {source}")
    for number, receiver in enumerate(receivers, 3):
        # Sent directly to the receiver: relayed datagrams were sent before.
        client.succeed(f"python3 /etc/udp.py send 10.1.0.{number} 514 --from {source + 1}")
        receiver.wait_until_succeeds(f"grep -q '{source + 1}-0' /tmp/got", timeout=60)
        if receiver in to:
            receiver.wait_until_succeeds(f"grep -q '{source}-0' /tmp/got", timeout=60)
        else:
            receiver.fail(f"grep -q '{source}-0' /tmp/got")


with subtest("an unknown name leaves out one receiver; the service is active, and status tells"):
    relay.wait_for_unit("udplb.service", timeout=300)
    # The receivers may have started after the first apply.
    relay.succeed("systemctl reload udplb.service")
    relay.wait_until_succeeds("(udplb status || true) | grep -q later.test", timeout=60)
    sent(40000, first, second)

with subtest("a stop while something is missing detaches"):
    relay.succeed("systemctl stop udplb.service")
    sent(40010)
    relay.succeed("systemctl start udplb.service")
    sent(40020, first, second)

with subtest("enable = false while something is missing detaches"):
    switch("off")
    sent(40030)
    switch()
    sent(40040, first, second)

with subtest("the name resolves: arpd adds the receiver"):
    # on NixOS the file is a link into the store
    relay.succeed("cp -L /etc/hosts /tmp/hosts; echo '10.1.0.5 later.test' >> /tmp/hosts; rm /etc/hosts; cp /tmp/hosts /etc/hosts")
    relay.succeed("systemctl reload udplb-arpd.service")
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)
    sent(40060, first, second, third)

with subtest("a name moves: arpd follows"):
    relay.succeed("sed -i 's/^10.1.0.3 first$/10.1.0.5 first/; s/^10.1.0.5 later/10.1.0.3 later/' /etc/hosts")
    relay.succeed("systemctl reload udplb-arpd.service")
    relay.wait_until_succeeds("(udplb status -o json || true) | grep -A3 '\"first\"' | grep -q 10.1.0.5", timeout=60)
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)
    sent(40070, first, second, third)
