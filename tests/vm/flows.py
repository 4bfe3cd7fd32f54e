start_all()
lb.wait_for_unit("udplb.service", timeout=300)
lb.wait_for_unit("udplb-arpd.service", timeout=300)
for machine in (client, heavy, light):
    machine.wait_for_unit("multi-user.target", timeout=300)
for upstream in (heavy, light):
    upstream.succeed("python3 /etc/udp.py listen 8125 /tmp/got")
lb.wait_until_succeeds("udplb status >/dev/null", timeout=120)
SENDERS = 80


def lines(upstream):
    return upstream.succeed("cat /tmp/got").splitlines()


def send():
    """Sends a datagram from each port; returns the ports whose datagrams each upstream got."""
    seen = [len(lines(upstream)) for upstream in (heavy, light)]

    def arrived():
        return [lines(upstream)[n:] for upstream, n in zip((heavy, light), seen)]

    client.succeed(f"python3 /etc/udp.py send 10.1.0.2 8125 --from 20000 --sources {SENDERS}")
    retry(lambda _: sum(map(len, arrived())) >= SENDERS, 60)
    ports = [{line.split()[1] for line in new} for new in arrived()]
    assert len(ports[0] | ports[1]) == SENDERS and not ports[0] & ports[1], ports
    return ports


with subtest("maglev: weights share the flows, and each flow stays"):
    before = send()
    # three quarters of 80, with a margin for chance
    assert 48 <= len(before[0]) <= 72, before
    assert send() == before

with subtest("drain: the others take over, and get back what is theirs alone"):
    lb.succeed("udplb drain metrics/heavy")
    assert send()[0] == set()
    lb.succeed("udplb enable metrics/heavy")
    assert send() == before

with subtest("an override outlives a rebuild that changes nothing, not what the file says"):
    lb.succeed("udplb drain metrics/light", "systemctl reload udplb.service")
    assert send()[1] == set()
    lb.succeed("udplb enable --all")
    assert send() == before

with subtest("health: an upstream that is gone loses its flows, the others keep theirs"):
    light.block()
    lb.wait_until_succeeds("(udplb status || true) | grep -q down", timeout=120)
    assert send()[1] == set()
    light.unblock()
    lb.wait_until_succeeds("udplb status >/dev/null", timeout=120)
    assert send() == before

with subtest("metrics: what a Prometheus would scrape is what was sent"):
    scrape = "python3 -c 'import urllib.request as r; print(r.urlopen(\"http://127.0.0.1:9477/metrics\", timeout=3).read().decode())'"
    metrics = dict(line.rsplit(" ", 1) for line in lb.succeed(scrape).splitlines() if line and line[0] != "#")
    for name, upstream in (("heavy", heavy), ("light", light)):
        sent = metrics[f'udplb_upstream_packets_total{{rule="metrics",upstream="{name}"}}']
        assert int(sent) == len(lines(upstream)), (name, metrics)
    assert metrics['udplb_interface_attached{interface="eth1"}'] == "1"
    # the firewall blocks other hosts
    client.fail(scrape.replace("127.0.0.1", "10.1.0.2"))
