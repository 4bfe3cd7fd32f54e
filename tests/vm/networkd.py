start_all()
relay.wait_for_unit("udplb.service", timeout=300)
relay.wait_for_unit("udplb-arpd.service", timeout=300)
for machine in (client, guest, up):
    machine.wait_for_unit("multi-user.target", timeout=300)
for port in (514, 515, 516):
    for machine in (relay, up):
        machine.succeed(f"python3 /etc/udp.py listen {port} /tmp/{port}")
# arpd follows networkd: addresses and next hops may have appeared after the first apply.
relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)


def sent(machine, address, port, source):
    machine.succeed(f"python3 /etc/udp.py send {address} {port} --from {source}")
    up.wait_until_succeeds(f"grep -q '{source}-0' /tmp/{port}", timeout=60)


def relayed(machine, address, source):
    """Sends until a datagram arrives: networkd configures interfaces after its start has succeeded."""
    send = f"python3 /etc/udp.py send {address} 514 --from {source} --interval 0.1 --until /tmp/{source}"
    machine.succeed(f"timeout 60 {send} >/dev/null 2>&1 &")
    up.wait_until_succeeds(f"grep -q ' {source}-' /tmp/514", timeout=60)
    machine.succeed(f"touch /tmp/{source}")


with subtest("nftables: what is sent on has not met it, the copy for this host has"):
    sent(client, "10.1.0.2", 514, 40000)
    sent(client, "10.1.0.2", 515, 40001)
    sent(client, "10.1.0.2", 516, 40002)
    relay.wait_until_succeeds("grep -q 40002-0 /tmp/516", timeout=60)
    relay.fail("grep -q 40001-0 /tmp/515")

with subtest("a restart of networkd and a reload of nftables lose no packet"):
    traffic = "python3 /etc/udp.py send 10.1.0.2 514 --from 50000 --interval 0.002 --until /tmp/end"
    client.succeed(f"{traffic} > /tmp/sent 2>/dev/null &")
    relay.succeed("systemctl restart systemd-networkd.service", "systemctl reload nftables.service")
    sent(client, "10.1.0.2", 514, 40003)
    client.succeed("touch /tmp/end")
    client.wait_until_succeeds("test -s /tmp/sent", timeout=60)
    count = int(client.succeed("cat /tmp/sent"))
    up.wait_until_succeeds(f"test $(grep -c ' 50000-' /tmp/514) -eq {count}", timeout=60)

with subtest("one rebuild makes a bridge and relays what comes in on it"):
    relay.succeed("/run/booted-system/specialisation/bridged/bin/switch-to-configuration test >&2")
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)
    relayed(guest, "10.2.0.2", 40010)
    relayed(client, "10.1.0.2", 40011)

with subtest("the bridge is made anew: arpd attaches again"):
    relay.succeed("ip link delete br0", "systemctl restart systemd-networkd.service")
    relay.wait_until_succeeds("udplb status >/dev/null", timeout=120)
    relayed(guest, "10.2.0.2", 40012)
