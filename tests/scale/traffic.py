"""Flows of numbered datagrams to the announced address, and who got them by which box."""

import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from lab import PORT, UPSTREAMS, VIP, Failed, enter

T = TypeVar("T")

HEADER = struct.Struct(">IId")
UDP_PAYLOAD = 14 + 20 + 8
# locally administered: the boxes' interfaces to the upstreams end in 60:NUMBER
BOX = bytes.fromhex("020000")


class Arrival(NamedTuple):
    flow: int
    sequence: int
    sent: float
    box: int
    upstream: int


@dataclass
class Report:
    flows: int = 0
    sent: int = 0
    lost: int = 0
    moved: int = 0
    """Flows that came by another box afterwards."""
    changed: int = 0
    """Flows that more than one upstream got."""
    twice: int = 0
    """Flows whose upstream changed more than once."""
    strangers: int = 0
    """Flows whose upstream changed, and was neither before nor after the one that the event concerns."""
    silence: float = 0.0
    """Longest time between two arrivals of a flow, in seconds."""

    def __str__(self) -> str:
        return (
            f"{self.flows} flows, {self.moved} by another box, upstream changed {self.changed}, "
            f"sent {self.sent}, lost {self.lost}, longest silence {self.silence * 1000:.0f} ms"
        )


def in_namespace(name: str, make: Callable[[], T]) -> T:
    """Calls a function on a thread in a namespace."""
    results: list[T] = []

    def inside() -> None:
        enter(name)
        results.append(make())

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if not results:
        raise Failed(f"no result in {name}")
    return results[0]


def sender(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("0.0.0.0", port))
    return sock


def sniffer() -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    sock.setsockopt(socket.SOL_SOCKET, 33, 32 << 20)  # SO_RCVBUFFORCE
    sock.bind(("e0", 0x0800))
    sock.settimeout(0.2)
    return sock


@dataclass
class Traffic:
    flows: int = 200
    rate: int = 4000
    arrivals: list[Arrival] = field(default_factory=list)
    sending: bool = True
    receiving: bool = True
    rounds: int = 0

    def start(self) -> "Traffic":
        clients = [f"client{1 + flow % 2}" for flow in range(self.flows)]
        self.senders = [in_namespace(name, lambda f=flow: sender(20000 + f)) for flow, name in enumerate(clients)]
        self.sniffers = [in_namespace(f"up{nth}", sniffer) for nth in range(1, len(UPSTREAMS) + 1)]
        self.threads = [threading.Thread(target=self.receive, args=pair) for pair in enumerate(self.sniffers, 1)]
        self.threads.append(threading.Thread(target=self.send))
        for thread in self.threads:
            thread.start()
        return self

    def send(self) -> None:
        begin, sent = time.monotonic(), 0
        while self.sending:
            for flow, sock in enumerate(self.senders):
                try:
                    sock.sendto(HEADER.pack(flow, self.rounds, time.monotonic()), (VIP, PORT))
                except OSError:
                    pass  # counted as lost
                sent += 1
                if sent % 20 == 0:
                    time.sleep(max(0.0, begin + sent / self.rate - time.monotonic()))
            self.rounds += 1

    def receive(self, upstream: int, sock: socket.socket) -> None:
        port = PORT.to_bytes(2, "big")
        while self.receiving:
            try:
                frame = sock.recv(2048)
            except TimeoutError:
                continue
            is_ours = frame[23] == 17 and frame[36:38] == port and frame[6:9] == BOX and frame[10] == 0x60
            if is_ours and len(frame) >= UDP_PAYLOAD + HEADER.size:
                flow, sequence, sent = HEADER.unpack_from(frame, UDP_PAYLOAD)
                self.arrivals.append(Arrival(flow, sequence, sent, frame[11], upstream))

    def stop(self) -> None:
        self.sending = False
        self.threads[-1].join()
        time.sleep(0.5)
        self.receiving = False
        for thread in self.threads:
            thread.join()
        for sock in self.senders + self.sniffers:
            sock.close()

    def report(self, first: int, acted: float, settled: float, concerned: int = 0) -> Report:
        """Counts from round `first` on; `concerned` is the upstream that the event is about."""
        last = self.rounds
        counted = [it for it in self.arrivals if first <= it.sequence < last]
        boxes_before, boxes_after = defaultdict(set), defaultdict(set)
        ways: dict[int, list[int]] = defaultdict(list)
        times: dict[int, list[float]] = defaultdict(list)
        for it in sorted(counted, key=lambda it: (it.flow, it.sequence)):
            if it.sent < acted:
                boxes_before[it.flow].add(it.box)
            if it.sent >= settled:
                boxes_after[it.flow].add(it.box)
            if not ways[it.flow] or ways[it.flow][-1] != it.upstream:
                ways[it.flow].append(it.upstream)
            times[it.flow].append(it.sent)
        period = self.flows / self.rate
        gaps = [later - sooner - period for it in times.values() for sooner, later in zip(it, it[1:])]
        changed = [way for way in ways.values() if len(way) > 1]
        return Report(
            flows=len(ways),
            sent=(last - first) * self.flows,
            lost=(last - first) * self.flows - len({(it.flow, it.sequence) for it in counted}),
            moved=sum(boxes_before[flow] != boxes_after[flow] for flow in ways),
            changed=len(changed),
            twice=sum(len(way) > 2 for way in changed),
            strangers=sum(concerned not in way for way in changed),
            silence=max([0.0, *gaps]),
        )


@dataclass
class Answers:
    """Questions and their answers, which say what sender the upstream saw."""

    flows: int = 100
    rate: int = 1000
    asked: set[tuple[int, int]] = field(default_factory=set)
    answered: set[tuple[int, int]] = field(default_factory=set)
    seen: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    """By flow, the senders and upstreams in its answers."""
    strangers: int = 0
    """Answers from another address than the announced one."""

    def during(self, act: Callable[[], object], settle: float = 1.5) -> "Answers":
        clients = [f"client{1 + flow % 2}" for flow in range(self.flows)]
        senders = [in_namespace(name, lambda f=flow: sender(20000 + f)) for flow, name in enumerate(clients)]
        ends = threading.Event()
        thread = threading.Thread(target=self.ask, args=(senders, ends))
        thread.start()
        try:
            time.sleep(1)
            act()
            time.sleep(settle)
        finally:
            ends.set()
            thread.join()
            for sock in senders:
                sock.close()
        return self

    def ask(self, senders: list[socket.socket], ends: threading.Event) -> None:
        begin, sent, rounds = time.monotonic(), 0, 0
        while not ends.is_set():
            for flow, sock in enumerate(senders):
                sock.sendto(HEADER.pack(flow, rounds, 0.0), (VIP, PORT))
                self.asked.add((flow, rounds))
                sent += 1
                if sent % 20 == 0:
                    self.take(senders)
                    time.sleep(max(0.0, begin + sent / self.rate - time.monotonic()))
            rounds += 1
        time.sleep(0.5)
        self.take(senders)

    def take(self, senders: list[socket.socket]) -> None:
        for sock in senders:
            while True:
                try:
                    data, source = sock.recvfrom(2048, socket.MSG_DONTWAIT)
                except OSError:
                    break
                flow, sequence, _ = HEADER.unpack_from(data)
                self.answered.add((flow, sequence))
                self.seen[flow].add(data[HEADER.size :])
                self.strangers += source != (VIP, PORT)

    def __str__(self) -> str:
        return f"{self.flows} flows, asked {len(self.asked)}, unanswered {len(self.asked - self.answered)}"


def during(act: Callable[[], object], settle: float, flows: int, rate: int, concerned: int = 0) -> Report:
    """Sends before, during and after an event."""
    traffic = Traffic(flows, rate).start()
    time.sleep(0.5)
    first = traffic.rounds + 1
    time.sleep(0.7)
    acted = time.monotonic()
    try:
        act()
        time.sleep(settle)
        settled = time.monotonic()
        time.sleep(0.7)
    finally:
        traffic.stop()
    return traffic.report(first, acted, settled, concerned)
