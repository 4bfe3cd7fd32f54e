#!/usr/bin/env python3
"""Runs the script of a NixOS VM test without virtual machines.

Each machine is a set of namespaces (network, mount, PID, UTS, IPC, cgroup) with the host's root under
an overlay, a bpffs of its own and the host's systemd as PID 1, which sees only the units of the test.
Each VLAN is a bridge. The kernel is the host's, and shared. Namespaces have no names: they go away with
their processes, however those end.

Of the NixOS test driver's interface this has the documented part that the scenarios use.
"""

import argparse
import ctypes
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
HYBRID = Path("/sys/fs/cgroup/unified")
CGROUP = HYBRID if HYBRID.is_dir() else Path("/sys/fs/cgroup")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PR_SET_PDEATHSIG = 1
REASON_LENGTH = 400
# Seconds that a start, or an end, may take on a machine with other work to do.
START_TIMEOUT = 120

# Units that systemd needs besides the units of the test.
PASSIVE = "sysinit network network-pre network-online sockets timers paths slices umount final".split()
BASE_UNITS = {f"{name}.target": f"[Unit]\nDescription={name}\n" for name in PASSIVE} | {
    "default.target": "[Unit]\nRequires=multi-user.target\nAfter=multi-user.target\nAllowIsolate=yes\n",
    "multi-user.target": "[Unit]\nRequires=basic.target\nWants=timers.target\nAfter=basic.target\nAllowIsolate=yes\n",
    "basic.target": "[Unit]\nRequires=sysinit.target\nAfter=sysinit.target\n",
    "shutdown.target": "[Unit]\nDefaultDependencies=no\n",
    "poweroff.target": "[Unit]\nDefaultDependencies=no\nRequires=end.service\nAfter=end.service\nAllowIsolate=yes\n",
    "end.service": "[Unit]\nDefaultDependencies=no\nRequires=shutdown.target\nAfter=shutdown.target\n"
    "SuccessAction=poweroff-force\n[Service]\nType=oneshot\nExecStart=/bin/true\n",
}

# systemd's setting on NixOS, Debian 13 and Ubuntu: packets from unroutable senders are dropped
SYSCTL = {f"net.ipv4.conf.{which}.rp_filter": 2 for which in ("all", "default")}

numbers = itertools.count()


# NixOS' own services, which the machine's configuration describes.
NETWORKD = """[Unit]
Wants=network.target
Before=network.target
[Service]
Type=notify
ExecStart=/lib/systemd/systemd-networkd
# without udev: with a writable /sys it would wait for it
ReadOnlyPaths=/sys
User=systemd-network
AmbientCapabilities=CAP_NET_ADMIN CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_RAW
RuntimeDirectory=systemd/netif
RuntimeDirectoryPreserve=yes
[Install]
WantedBy=multi-user.target
"""
NFTABLES = """[Unit]
Before=network-pre.target
[Service]
X-ReloadIfChanged=true
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/nft -f /etc/nftables.nft
ExecReload=/usr/sbin/nft -f /etc/nftables.nft
[Install]
WantedBy=multi-user.target
"""


class Failed(Exception):
    pass


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def call(*command: str | Path) -> str:
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def wait(fn: Callable[[], bool], timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not fn():
        if time.monotonic() > end:
            raise Failed(f"timed out after {timeout} s: {what}")
        time.sleep(0.1)


def retry(fn: Callable[[bool], bool], timeout_seconds: int = 900) -> None:
    wait(lambda: fn(False), timeout_seconds, "retry")


def ruleset(firewall: dict[str, Any]) -> str:
    """Returns the input chain of NixOS' firewall for UDP, and the tables beside it, for nft."""

    def ports(spec: int | dict[str, int]) -> str:
        return f"{spec['from']}-{spec['to']}" if isinstance(spec, dict) else str(spec)

    accept = [
        (f'iifname "{interface}" ' if interface else "") + f"udp dport {{ {', '.join(map(ports, specs))} }} accept"
        for interface, specs in firewall["open"].items()
        if specs
    ]
    rules = [
        "type filter hook input priority 0; policy drop;",
        'iifname "lo" accept',
        "ct state established,related accept",
        "meta l4proto { icmp, ipv6-icmp } accept",
        *accept,
    ]
    firewalls = ["table inet nixos-fw {\nchain input {\n" + "\n".join(rules) + "\n}\n}\n"] if firewall["enable"] else []
    tables = firewalls + firewall["tables"]
    # each table is replaced atomically
    heads = [table.partition("{")[0] for table in tables]
    return "".join(f"{head}\ndelete {head}\n" for head in heads) + "".join(tables)


class Machine:
    def __init__(self, driver: "Driver", name: str, node: dict[str, Any]):
        self.driver, self.name, self.node = driver, name, node
        self.pid = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.console = ""
        self.cables: list[str] = []
        self.cgroup = CGROUP / f"udplb-vm-{os.getpid()}-{name}"
        self.dir = driver.dir / name
        (self.dir / "root").mkdir(parents=True)
        booted = self.dir / "booted-system"
        self.write_system(booted, node)
        self.packages: dict[str, str] = {}
        for specialisation, system in node["specialisations"].items():
            self.write_system(booted / "specialisation" / specialisation, system)
            self.packages |= system["packages"]
        (booted / "etc/hosts").write_text(driver.hosts)
        (booted / "etc/hostname").write_text(f"{name}\n")
        (booted / "etc/machine-id").write_text("")
        (self.dir / "stub/udplb/bin").mkdir(parents=True)
        if driver.udplb:
            shutil.copy(driver.udplb, self.dir / "stub/udplb/bin/udplb")

    def write_system(self, folder: Path, system: dict[str, Any]) -> None:
        (folder / "bin").mkdir(parents=True)
        # There is no journal: output of services goes to the console.
        (folder / "units/service.d").mkdir(parents=True)
        (folder / "units/service.d/console.conf").write_text("[Service]\nStandardOutput=tty\nStandardError=tty\n")
        shutil.copy(HERE / "switch-to-configuration", folder / "bin")
        units = BASE_UNITS | {name: "\n".join(lines) + "\n" for name, lines in system["units"].items()}
        files = {f"systemd/network/{name}": text for name, text in system["networkd"].items()}
        if files:
            # the unit changes when its files change
            units["systemd-networkd.service"] = f"# {sorted(files.items())}\n{NETWORKD}"
        if system["firewall"]["nftables"]:
            files["nftables.nft"] = ruleset(system["firewall"])
            units["nftables.service"] = f"# {files['nftables.nft']!r}\n{NFTABLES}"
        for name, text in units.items():
            (folder / "units" / name).write_text(text)
            for targets in re.findall(r"(?m)^WantedBy=(.*)$", text):
                for target in targets.split():
                    wants = folder / "units" / f"{target}.wants"
                    wants.mkdir(exist_ok=True)
                    (wants / name).symlink_to(f"../{name}")
        (folder / "etc").mkdir()
        for name, text in files.items():
            (folder / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "etc" / name).write_text(text)
        for name, file in system["etc"].items():
            text = file["text"] or (ROOT / file["path"]).read_text()
            (folder / "etc" / name).write_text(text)
            if file["target"].startswith("/stub/"):
                stub = self.dir / file["target"].lstrip("/")
                stub.parent.mkdir(exist_ok=True)
                stub.write_text(text)

    def inside(self, *command: str | Path) -> list[str | Path]:
        """Returns the command to run in this machine's network, with the host's files."""
        return ["nsenter", "-t", str(self.pid), "-n", *command]

    # life

    def start(self, allow_reboot: bool = False) -> None:
        if self.process:
            return
        master, slave = pty.openpty()
        self.cgroup.mkdir()
        enter = f'echo $$ >{self.cgroup}/cgroup.procs; exec "$@"'
        unshare = ["unshare", "-n", "-m", "-u", "-i", "-p", "-C", "-f", "--kill-child=SIGKILL"]
        init = map(str, (HERE / "init.sh", self.name, self.dir, self.driver.shared))
        self.process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *unshare, *init],
            env={**os.environ, "CONSOLE": os.ttyname(slave), "PATH": PATH},
            stdin=subprocess.PIPE,
            stdout=slave,
            stderr=slave,
            preexec_fn=die_with_parent,
        )
        threading.Thread(target=self.read_console, args=(master, slave), daemon=True).start()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        wait(lambda: self.find_init(children), START_TIMEOUT, f"{self.name} starts")
        self.connect()
        assert self.process.stdin
        self.process.stdin.close()
        wait(lambda: self.run("test -S /run/systemd/private", 5)[0] == 0, START_TIMEOUT, f"{self.name} boots")
        for out, script in self.packages.items():
            self.succeed(f"mkdir -p {out}; out={out}; {script}")

    def find_init(self, children: Path) -> bool:
        assert self.process
        if self.process.poll() is not None:
            raise Failed(f"{self.name} did not start: {self.console}")
        # `sh` became `unshare`, whose only child is the machine's PID 1
        if Path(f"/proc/{self.process.pid}/comm").read_text() == "unshare\n":
            self.pid = int(children.read_text().strip() or 0)
        return self.pid != 0

    def connect(self) -> None:
        ip = self.inside("ip")
        call(*ip, "link", "set", "lo", "up")
        for key, value in (SYSCTL | self.node["sysctl"]).items():
            call(*self.inside("sysctl", "-q", "-w", f"{key}={int(value)}"))
        firewall = self.node["firewall"]
        if firewall["enable"] and not firewall["nftables"]:
            nft = subprocess.run(
                self.inside("nft", "-f", "-"), input=ruleset(firewall), text=True, capture_output=True
            )
            if nft.returncode:
                raise Failed(f"nft: {nft.stderr}")
        self.cables = []
        for interface, link in self.node["links"].items():
            cable = f"cable{next(numbers)}"
            switch = self.driver.switch("ip")
            peer = f"peer name {interface} address {self.mac(interface)} netns {self.pid}"
            call(*switch, *f"link add {cable} type veth {peer}".split())
            call(*switch, *f"link set {cable} master vlan{link['vlan']} up".split())
            self.cables.append(cable)
            if self.node["networkd"]:
                continue
            call(*ip, "link", "set", interface, "up")
            for address in link["addresses"]:
                call(*ip, "address", "add", address, "dev", interface, *(["nodad"] if ":" in address else []))
        for interface, link in self.node["links"].items():
            for route in link["routes"]:
                call(*ip, "route", "add", *route.split(), "dev", interface)

    def mac(self, interface: str) -> str:
        """Returns an interface's MAC address, the same after a reboot: others would send to the old one for a while."""
        number = zlib.crc32(f"{self.name} {interface}".encode())
        return "52:54:" + ":".join(f"{byte:02x}" for byte in number.to_bytes(4, "big"))

    def read_console(self, master: int, slave: int) -> None:
        while True:
            try:
                said = os.read(master, 65536)
            except OSError:
                return
            self.console += said.decode(errors="replace").replace("\r", "")

    def crash(self) -> None:
        if not self.process:
            return
        self.process.kill()
        self.process.wait()
        self.process, self.pid = None, 0
        # The kernel removes a namespace some time after its last process, and until then its bridge sends there.
        for cable in self.cables:
            subprocess.run(self.driver.switch("ip", "link", "delete", cable), capture_output=True)
        self.cables = []
        wait(self.remove_cgroup, START_TIMEOUT, f"{self.name}: processes end")

    def remove_cgroup(self) -> bool:
        for folder, _, _ in sorted(os.walk(self.cgroup), reverse=True):
            try:
                os.rmdir(folder)
            except OSError:
                return False
        return True

    def shutdown(self) -> None:
        if self.process:
            self.run("systemctl --no-block start poweroff.target", 10)
            self.wait_for_shutdown()

    def wait_for_shutdown(self) -> None:
        if self.process:
            self.process.wait(START_TIMEOUT)
            self.crash()

    def block(self) -> None:
        for cable in self.cables:
            call(*self.driver.switch("ip"), "link", "set", cable, "down")

    def unblock(self) -> None:
        for cable in self.cables:
            call(*self.driver.switch("ip"), "link", "set", cable, "up")

    # commands

    def run(self, command: str, timeout: int | None) -> tuple[int, str]:
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"]
        limit = ["timeout", str(timeout)] if timeout else []
        done = subprocess.run(
            [*enter, "env", "-i", "HOME=/root", f"PATH={PATH}", *limit, "bash", "-c", f"set -euo pipefail; {command}"],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    def execute(
        self, command: str, check_return: bool = True, check_output: bool = True, timeout: int | None = 900
    ) -> tuple[int, str]:
        self.start()
        return self.run(command, timeout)

    def succeed(self, *commands: str, timeout: int | None = None) -> str:
        return "".join(self.expect(True, command, timeout) for command in commands)

    def fail(self, *commands: str, timeout: int | None = None) -> str:
        return "".join(self.expect(False, command, timeout) for command in commands)

    def expect(self, success: bool, command: str, timeout: int | None) -> str:
        status, output = self.execute(command, timeout=timeout)
        if (status == 0) != success:
            raise Failed(f"{self.name}: `{command}` ended with {status}: {output}")
        return output

    def wait_until_succeeds(self, command: str, timeout: int = 900) -> str:
        return self.repeat(True, command, timeout)

    def wait_until_fails(self, command: str, timeout: int = 900) -> str:
        return self.repeat(False, command, timeout)

    def repeat(self, success: bool, command: str, timeout: int) -> str:
        output = ""

        def done() -> bool:
            nonlocal output
            status, output = self.execute(command, timeout=timeout)
            return (status == 0) == success

        wait(done, timeout, f"{self.name}: `{command}`")
        return output

    def wait_for_file(self, filename: str, timeout: int = 900) -> None:
        self.wait_until_succeeds(f"test -e {filename}", timeout)

    def sleep(self, secs: int) -> None:
        time.sleep(secs)

    def log(self, msg: str) -> None:
        self.driver.log(f"{self.name}: {msg}")

    # units

    def systemctl(self, q: str, user: str | None = None) -> tuple[int, str]:
        return self.execute(f"systemctl {q}")

    def get_unit_info(self, unit: str, user: str | None = None) -> dict[str, str]:
        status, output = self.systemctl(f'--no-pager show "{unit}"')
        if status:
            raise Failed(f"{self.name}: nothing known of {unit}")
        return dict(line.split("=", 1) for line in output.splitlines() if "=" in line)

    def get_unit_property(self, unit: str, property: str, user: str | None = None) -> str:
        return self.get_unit_info(unit)[property]

    def require_unit_state(self, unit: str, require_state: str = "active") -> None:
        state = self.get_unit_property(unit, "ActiveState")
        if state != require_state:
            raise Failed(f"{self.name}: {unit} is {state}, not {require_state}")

    def wait_for_unit(self, unit: str, user: str | None = None, timeout: int = 900) -> None:
        def active() -> bool:
            state = self.get_unit_property(unit, "ActiveState")
            if state == "failed":
                raise Failed(f"{self.name}: {unit} failed")
            if state == "inactive" and "No jobs" in self.systemctl("list-jobs --full 2>&1")[1]:
                if self.get_unit_property(unit, "ActiveState") == state:
                    raise Failed(f"{self.name}: {unit} is inactive and nothing starts it")
            return state == "active"

        wait(active, timeout, f"{self.name}: {unit} is active")


def plain_machines(name: str, addresses: dict[str, str]) -> dict[str, Any]:
    """Describes a test whose machines have one address each on one VLAN."""
    firewall = {"enable": False, "nftables": False, "tables": [], "open": {}}
    empty = {"etc": {}, "units": {}, "firewall": firewall, "networkd": {}, "packages": {}}
    empty |= {"sysctl": {}, "specialisations": {}}
    nodes = {
        machine: empty | {"links": {"eth1": {"vlan": 1, "addresses": [f"{address}/24"], "routes": []}}}
        for machine, address in addresses.items()
    }
    return {"name": name, "globalTimeout": 600, "nodes": nodes}


class Driver:
    def __init__(self, test: dict[str, Any], udplb: Path | None):
        self.udplb = udplb
        self.dir = Path(tempfile.mkdtemp(prefix="udplb-vm-"))
        self.shared = self.dir / "shared"
        self.shared.mkdir()
        self.machines: list[Machine] = []
        self.failed: str | None = None
        nodes = test["nodes"]
        self.hosts = "127.0.0.1 localhost\n::1 localhost\n" + "".join(
            f"{address.split('/')[0]} {name}\n"
            for name, node in nodes.items()
            for link in node["links"].values()
            for address in link["addresses"]
        )
        self.switch_process = subprocess.Popen(
            ["unshare", "-n", "sleep", "infinity"], preexec_fn=die_with_parent, stdin=subprocess.DEVNULL
        )
        host = os.stat("/proc/self/ns/net").st_ino
        switch = f"/proc/{self.switch_process.pid}/ns/net"
        wait(lambda: os.stat(switch).st_ino != host, START_TIMEOUT, "a network namespace for the VLANs")
        for vlan in sorted({link["vlan"] for node in nodes.values() for link in node["links"].values()}):
            call(*self.switch("ip"), *f"link add vlan{vlan} up type bridge mcast_snooping 0".split())
        self.machines = [Machine(self, name, node) for name, node in nodes.items()]

    def switch(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.switch_process.pid), "-n", *command]

    def log(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        for machine in self.machines:
            machine.crash()
        self.switch_process.kill()
        self.switch_process.wait()
        shutil.rmtree(self.dir)

    def start_all(self) -> None:
        # Not in threads: a child process dies with the thread that started it.
        for machine in self.machines:
            machine.start()

    @contextmanager
    def subtest(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except BaseException:
            self.failed = name
            self.log(f"FAIL  {name}")
            raise
        self.log(f"ok    {name} ({time.monotonic() - start:.1f} s)")

    def reason(self, error: Exception) -> str:
        """Returns the subtest, the error and the place in the scenario, in one line."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if len(text) > REASON_LENGTH:
            text = f"{text[:REASON_LENGTH]}…"
        here = str(HERE)
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(here)]
        place = f"{Path(places[-1].filename).name}:{places[-1].lineno}: {places[-1].line}" if places else "driver"
        return f"{self.failed or 'before the first subtest'}: {place}: {text}"


def play(test: dict[str, Any], udplb: Path | None, script: Callable[[Driver], None]) -> int:
    """Runs the script on the machines of the test; returns the exit status."""

    def end(number: int, _frame: object) -> None:
        raise Failed(f"ended by {signal.Signals(number).name}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, end)
    signal.alarm(test["globalTimeout"])
    start = time.monotonic()
    driver = Driver(test, udplb)
    try:
        script(driver)
    except Exception as error:
        for machine in driver.machines:
            driver.log(f"--- console of {machine.name}\n{machine.console}")
        traceback.print_exc()
        print(f"FAIL  {test['name']} ({time.monotonic() - start:.1f} s): {driver.reason(error)}", flush=True)
        return 1
    finally:
        signal.alarm(0)
        driver.close()
    print(f"ok    {test['name']} ({time.monotonic() - start:.1f} s)", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fixture", type=Path, help="the machines: addresses, units, files")
    parser.add_argument("script", type=Path, help="the scenario's testScript")
    parser.add_argument("udplb", type=Path, help="the program under test")
    args = parser.parse_args()

    def script(driver: Driver) -> None:
        symbols: dict[str, Any] = {machine.name: machine for machine in driver.machines}
        symbols |= {"driver": driver, "machines": driver.machines}
        symbols |= {"start_all": driver.start_all, "subtest": driver.subtest, "retry": retry}
        exec(compile(args.script.read_text(), str(args.script), "exec"), symbols)

    return play(json.loads(args.fixture.read_text()), args.udplb, script)


if __name__ == "__main__":
    sys.exit(main())
