import json

SWITCH = "/run/booted-system/{}bin/switch-to-configuration test >&2"

start_all()
relay.wait_for_unit("udplb.service", timeout=300)
relay.wait_for_unit("udplb-arpd.service", timeout=300)
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


with subtest("an upgrade of the package under traffic loses nothing, and neither does the way back"):
    sent_to(up1, 40000)
    before = generation()
    traffic = "python3 /etc/udp.py send 10.1.0.2 514 --from 50000 --interval 0.002 --until /tmp/end"
    client.succeed(f"{traffic} > /tmp/sent 2>/dev/null &")
    since = relay.get_unit_property("udplb.service", "ActiveEnterTimestampMonotonic")
    switch("next")
    assert generation() == before + 1, "the new program's object is in the kernel"
    relay.wait_for_unit("udplb-arpd.service", timeout=60)
    switch()
    assert generation() == before + 2, "the old program's object is in the kernel"
    assert relay.get_unit_property("udplb.service", "ActiveEnterTimestampMonotonic") == since, "never stopped"
    client.succeed("touch /tmp/end")
    client.wait_until_succeeds("test -s /tmp/sent", timeout=60)
    sent = int(client.succeed("cat /tmp/sent"))
    up1.wait_until_succeeds(f"test $(grep -c ' 50000-' /tmp/got) -eq {sent}", timeout=60)

with subtest("a rollback holds what it left: a reload does not bring it back"):
    switch("moved")
    sent_to(up2, 40001)
    relay.succeed("udplb rollback >&2")
    sent_to(up1, 40002)
    relay.fail("systemctl reload udplb.service")
    relay.require_unit_state("udplb.service", "active")
    sent_to(up1, 40003)

with subtest("a rebuild that goes back has nothing to do; what is held wants --force"):
    switch()
    sent_to(up1, 40004)
    relay.fail(SWITCH.format("specialisation/moved/"))
    sent_to(up1, 40005)
    relay.succeed("udplb apply --force /etc/udplb.yaml >&2")
    sent_to(up2, 40006)

with subtest("confirm: a rebuild that nobody confirms is rolled back, and one that is confirmed stays"):
    switch()
    switch("confirmed")
    relay.succeed("udplb confirm >&2")
    sent_to(up2, 40010)
    switch()
    sent_to(up1, 40011)
    switch("doubted")
    relay.wait_until_succeeds("udplb list | grep -q service", timeout=60)
    sent_to(up1, 40012)
    relay.fail("udplb confirm")
    relay.fail("systemctl reload udplb.service")
    sent_to(up1, 40013)
    switch()

with subtest("a reboot: the kernel is empty, and what the booted system says is applied"):
    relay.succeed("udplb rollback >&2")
    relay.shutdown()
    relay.start()
    relay.wait_for_unit("udplb.service", timeout=300)
    sent_to(up1, 40007)
