"""A router with ECMP, boxes with udplb, clients and upstreams, each a network namespace.

    client 10.1.0.1, .2 ── 10.1.0.254  router  10.0.0.1 ── 10.0.0.11 …  box  10.2.0.101 … ── 10.2.0.11 …  upstream

The links are bridges in a namespace of their own, so that the carrier of a box that "dies" stays.
"""

import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VIP, PORT = "10.99.0.1", 4739
ROUTER, ROUTER_AS = "10.0.0.1", 64999
UPSTREAMS = ["10.2.0.11", "10.2.0.12", "10.2.0.13"]
ANYCAST = ["anycast0", "anycast1"]
CLONE_NEWNET = 0x40000000
PREFIX = f"scale{os.getpid()}-"


class Failed(Exception):
    pass


def sh(*command: str | Path, check: bool = True, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, text=True, capture_output=True, env=env)
    if check and done.returncode:
        raise Failed(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def ip(words: str, check: bool = True) -> str:
    return sh("ip", *words.split(), check=check)


def until(what: str, holds: Callable[[], bool], seconds: float = 60) -> float:
    """Waits until a condition holds; returns how long that took."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > seconds:
            raise Failed(f"not within {seconds} s: {what}")
        time.sleep(0.003)
    return time.monotonic() - begin


def netns(name: str) -> str:
    return f"/run/netns/{PREFIX}{name}"


def enter(name: str) -> None:
    """Moves this thread into a namespace."""
    with open(netns(name)) as file:
        # os.setns is Python 3.12's
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise Failed(f"setns: {os.strerror(ctypes.get_errno())}")


class Lab:
    def __init__(self, udplb: Path, routing: Path, boxes: int = 4) -> None:
        self.program, self.routing, self.count = udplb, routing, boxes
        libraries = [*routing.glob("**/lib/*-linux-gnu"), *routing.glob("**/lib/*-linux-gnu/frr")]
        self.env = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
        self.directory = Path(tempfile.mkdtemp(prefix="udplb-scale-"))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.names: list[str] = []

    def __enter__(self) -> "Lab":
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for name in self.names:
            ip(f"netns del {PREFIX}{name}", check=False)
        sh("umount", self.directory / "bpf", check=False)
        sh("rm", "-rf", self.directory, check=False)

    def build(self) -> None:
        (self.directory / "bpf").mkdir()
        sh("mount", "-t", "bpf", "-o", "mode=0700", "bpf", self.directory / "bpf")
        self.namespace("switch")
        for bridge in ("front", "customers", "back"):
            self.ip("switch", f"link add {bridge} type bridge mcast_snooping 0")
            self.ip("switch", f"link set {bridge} up")
        self.namespace("router")
        self.link("front", "router", "f0", f"{ROUTER}/24")
        self.link("customers", "router", "c0", "10.1.0.254/24")
        self.sysctl("router", "net.ipv4.fib_multipath_hash_policy", 1)
        for number in (1, 2):
            self.namespace(f"client{number}")
            self.link("customers", f"client{number}", "e0", f"10.1.0.{number}/24")
            self.ip(f"client{number}", "route add default via 10.1.0.254")
        for number, address in enumerate(UPSTREAMS, 1):
            self.namespace(f"up{number}")
            self.link("back", f"up{number}", "e0", f"{address}/24")
        for number in range(1, self.count + 1):
            self.add_box(number)

    def namespace(self, name: str) -> None:
        ip(f"netns add {PREFIX}{name}")
        self.names.append(name)
        self.ip(name, "link set lo up")
        for which in ("all", "default"):
            self.sysctl(name, f"net.ipv4.conf.{which}.rp_filter", 0)
        self.sysctl(name, "net.ipv4.ip_forward", 1)

    def ip(self, name: str, words: str, check: bool = True) -> str:
        return ip(f"-n {PREFIX}{name} {words}", check)

    def inside(self, name: str, *command: str | Path, check: bool = True) -> str:
        return sh("nsenter", f"--net={netns(name)}", *command, check=check, env=self.env)

    def sysctl(self, name: str, key: str, value: int) -> None:
        self.inside(name, "sh", "-c", f"echo {value} >/proc/sys/{key.replace('.', '/')}")

    def link(self, bridge: str, name: str, device: str, address: str, mac: str = "") -> None:
        port = f"{device}-{name}"
        self.ip("switch", f"link add {port} type veth peer name {device} netns {PREFIX}{name}")
        self.ip("switch", f"link set {port} master {bridge} up")
        if mac:
            self.ip(name, f"link set {device} address {mac}")
        self.ip(name, f"link set {device} up")
        self.ip(name, f"addr add {address} dev {device}")

    def add_box(self, number: int) -> None:
        name = f"box{number}"
        self.namespace(name)
        self.link("front", name, "f0", f"10.0.0.{10 + number}/24", f"02:00:00:00:f0:{number:02x}")
        self.link("back", name, "g0", f"10.2.0.{100 + number}/24", f"02:00:00:00:60:{number:02x}")
        self.ip(name, f"route add default via {ROUTER}")
        for interface in ANYCAST:
            # not every kernel has dummies
            if self.ip(name, f"link add {interface} type dummy", check=False) or not self.has(name, interface):
                self.ip(name, f"link add {interface} type veth peer name {interface}p")
                self.ip(name, f"link set {interface}p up")
            self.ip(name, f"link set {interface} up")
        self.apply(number)

    def has(self, name: str, interface: str) -> bool:
        return interface in self.ip(name, f"link show {interface}", check=False)

    def file(self, upstreams: list[str], announce: bool = True, reply: str = "") -> Path:
        rule: dict[str, Any] = {
            "name": "service",
            "key": {"address": VIP, "port": PORT},
            "options": {"tc_action": "block", "source": "preserve"},
            "upstream": [{"address": address} for address in upstreams],
        }
        # without an upstream this rule makes a box sick that forwards well
        canary = {**rule, "name": "canary", "key": {"address": VIP, "port": 1}, "upstream": [{"address": UPSTREAMS[0]}]}
        document: dict[str, Any] = {"version": 1, "interfaces": ["f0"], "rules": [rule, canary]}
        if reply:
            document["interfaces"] = ["f0", "g0"]
            rule["options"] = {"tc_action": "block", "reply": reply, **({"via": "link"} if reply == "direct" else {})}
        if announce:
            document["announce"] = {
                "interface": ANYCAST[0],
                "last_resort": ANYCAST[1],
                # longer than it takes until all upstreams of a box that was cut off are up again
                "hold_down": "5s",
                "settle": "500ms",
            }
        path = self.directory / "udplb.yaml"
        path.write_text(json.dumps(document))
        return path

    def udplb(self, number: int, *words: str | Path, check: bool = True) -> str:
        pins = self.directory / "bpf" / f"box{number}"
        return self.inside(f"box{number}", self.program, "--pin-dir", pins, *words, check=check)

    def apply(self, number: int, upstreams: list[str] = UPSTREAMS, announce: bool = True, reply: str = "") -> None:
        self.udplb(number, "apply", self.file(upstreams, announce, reply))

    def answer_directly(self) -> None:
        """Gives the upstreams the announced address, and a link to the clients."""
        for nth in range(1, len(UPSTREAMS) + 1):
            self.sysctl(f"up{nth}", "net.ipv4.conf.all.arp_ignore", 1)
            self.sysctl(f"up{nth}", "net.ipv4.conf.all.arp_announce", 2)
            self.ip(f"up{nth}", f"addr add {VIP}/32 dev lo")
            self.link("customers", f"up{nth}", "e1", f"10.1.0.{200 + nth}/24")

    def answer_by(self, boxes: list[int]) -> None:
        """Has the upstreams send their answers through these boxes."""
        hops = " ".join(f"nexthop via 10.2.0.{100 + number}" for number in boxes)
        for nth in range(1, len(UPSTREAMS) + 1):
            self.sysctl(f"up{nth}", "net.ipv4.fib_multipath_hash_policy", 1)
            self.ip(f"up{nth}", f"route replace default {hops}")

    def start(self, name: str, process: str, *command: str | Path) -> None:
        """Starts a program in a namespace; its output goes to a file."""
        log = (self.directory / f"{process}.log").open("w")
        command = ("nsenter", f"--net={netns(name)}", *command)
        self.processes[process] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def kill(self, process: str) -> None:
        ended = self.processes.pop(process)
        ended.kill()
        ended.wait()

    def arpd(self, number: int) -> None:
        pins = self.directory / "bpf" / f"box{number}"
        self.start(f"box{number}", f"arpd{number}", self.program, "--pin-dir", pins, "arpd", "--lease", "5")

    def find(self, program: str) -> Path:
        found = list(self.routing.glob(f"**/{program}"))
        if not found:
            raise Failed(f"no {program} below {self.routing}")
        return found[0]

    def bird(self, name: str, text: str) -> None:
        file = self.directory / f"bird-{name}.conf"
        file.write_text(text)
        control, pid = self.directory / f"{name}.ctl", self.directory / f"{name}.pid"
        self.start(name, f"bird-{name}", self.find("sbin/bird"), "-f", "-c", file, "-s", control, "-P", pid)
        until(f"BIRD of {name} runs", control.exists)

    def route(self) -> None:
        """Starts BIRD on the router."""
        peers = "".join(
            f"protocol bgp b{number} {{ local {ROUTER} as {ROUTER_AS}; neighbor 10.0.0.{10 + number} as {65000 + number};"
            " hold time 9; connect retry time 1; connect delay time 1; error wait time 1, 2; bfd on;"
            " ipv4 { import all; export none; }; }\n"
            for number in range(1, self.count + 1)
        )
        bfd = "interface \"*\" { min rx interval 100 ms; min tx interval 100 ms; multiplier 3; };"
        self.bird(
            "router",
            f"log stderr all; router id {ROUTER}; protocol device {{ scan time 60; }}\n"
            "protocol kernel { merge paths on limit 16; ipv4 { import none; export all; }; }\n"
            f"protocol bfd {{ {bfd} }}\n{peers}",
        )

    def part(self, number: int, engine: str) -> str:
        """Returns what udplb prints for a routing daemon."""
        return self.udplb(number, "announce", engine, "--as", str(65000 + number), "--neighbor", f"{ROUTER}={ROUTER_AS}")

    def announce_by_bird(self, number: int) -> None:
        head = f"log stderr all; router id 10.0.0.{10 + number}; protocol device {{ scan time 60; }}\n"
        self.bird(f"box{number}", head + self.part(number, "--bird"))

    def announce_by_frr(self, number: int) -> None:
        directory = self.directory / f"frr{number}"
        directory.mkdir()
        conf = directory / "frr.conf"
        conf.write_text(f"hostname box{number}\nlog stdout\n{self.part(number, '--frr')}")
        # FRR asks for its group even where it runs as root
        script = (
            f"(cat /etc/group; echo frrvty:x:9997:root) >{directory}/group;"
            f" mount --bind {directory}/group /etc/group; exec \"$0\" \"$@\""
        )
        for daemon in ("zebra", "bfdd", "bgpd"):
            extra = ["--bfdctl", directory / "bfdd.sock"] if daemon == "bfdd" else []
            socket = directory / f"{daemon}.vty"
            self.start(
                f"box{number}", f"{daemon}{number}", "unshare", "--mount", "sh", "-c", script,
                self.find(f"lib/frr/{daemon}"), "-u", "root", "-g", "root", "-f", conf, "-i", directory / f"{daemon}.pid",
                "-z", directory / "zserv", "--vty_socket", directory, *extra,
            )  # fmt: skip
            until(f"{daemon} of box {number} runs", socket.exists)

    def next_hops(self) -> list[int]:
        """Returns the boxes that the router sends to."""
        lines = self.ip("router", f"-j route show {VIP}", check=False)
        routes = json.loads(lines or "[]")
        hops = [hop for route in routes for hop in route.get("nexthops", [route])]
        return sorted(int(hop["gateway"].rsplit(".", 1)[1]) - 10 for hop in hops if "gateway" in hop)

    def await_hops(self, wanted: list[int]) -> float:
        try:
            return until(f"next hops {wanted}", lambda: self.next_hops() == wanted)
        except Failed as failure:
            logs = "".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in self.directory.glob("*.log"))
            raise Failed(f"{failure}; they are {self.next_hops()}\n{logs}") from None

    def die(self, number: int) -> None:
        """Cuts a box off; nobody's carrier changes."""
        for device in ("f0", "g0"):
            self.ip("switch", f"link set {device}-box{number} nomaster")

    def live(self, number: int) -> None:
        for device, bridge in (("f0", "front"), ("g0", "back")):
            self.ip("switch", f"link set {device}-box{number} master {bridge}")

    def announce(self) -> None:
        """Starts router, arpd and routing daemons of all boxes, and waits until all are next hops."""
        self.route()
        for number in range(1, self.count + 1):
            self.arpd(number)
            self.announce_by_bird(number)
        self.await_hops(list(range(1, self.count + 1)))
