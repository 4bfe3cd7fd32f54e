"""Machines to try packages on: a client, a relay and an upstream, with systemd."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "vm/driver"))

from nsdriver import Driver, Failed, play, plain_machines  # noqa: E402

__all__ = ["UDP", "Driver", "Failed", "Lab", "try_on"]

RULES = """
version: 1
interfaces: [eth1]
rules:
  - key: { address: 10.1.0.2, port: 514 }
    options: { tc_action: block }
    upstream: [{ address: 10.1.0.3 }]
"""
UDP = "python3 /tmp/shared/udp.py"


class Lab:
    def __init__(self, driver: Driver):
        self.client, self.relay, self.up = driver.machines
        shutil.copy(HERE.parent / "vm/udp.py", driver.shared)
        driver.start_all()
        self.up.succeed(f"{UDP} listen 514 /tmp/got")

    def serve(self, units: str) -> None:
        """Starts the installed services with a rule; `units` is the folder of their unit files."""
        # The machine's systemd reads units only from /run/units.
        self.relay.succeed(f"ln -sf {units}/udplb*.service /run/units/", "systemctl daemon-reload")
        self.relay.succeed(f"echo '{RULES}' > /etc/udplb.yaml", "systemctl start udplb.service udplb-arpd.service")

    def relayed(self, source: int) -> None:
        self.client.succeed(f"{UDP} send 10.1.0.2 514 --from {source}")
        self.up.wait_until_succeeds(f"grep -q '{source}-0' /tmp/got", timeout=10)

    def not_relayed(self, source: int) -> None:
        send = f"{UDP} send {{}} 514 --from {{}}"
        self.client.succeed(send.format("10.1.0.2", source), send.format("10.1.0.3", source + 1))
        self.up.wait_until_succeeds(f"grep -q '{source + 1}-0' /tmp/got", timeout=10)
        self.up.fail(f"grep -q '{source}-0' /tmp/got")


def try_on(name: str, script: Callable[[Driver], None], usage: str | None) -> int:
    """Runs the script on the machines for the package of the command line; returns the exit status."""
    if len(sys.argv) != 2:
        sys.exit(usage)
    addresses = {"client": "10.1.0.1", "relay": "10.1.0.2", "up": "10.1.0.3"}
    return play(plain_machines(name, addresses), None, script)
