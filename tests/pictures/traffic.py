#!/usr/bin/python3
"""Sends traffic to each of the demo's rules while pictures are recorded, until it is killed."""

import math
import random
import time
from collections.abc import Iterator
from itertools import cycle
from socket import AF_INET, IP_TTL, IPPROTO_IP, SOCK_DGRAM, socket

TICK = 0.02


def client(port: int, ttl: int = 64) -> socket:
    sender = socket(AF_INET, SOCK_DGRAM)
    sender.setsockopt(IPPROTO_IP, IP_TTL, ttl)
    sender.bind(("192.0.2.2", port))
    return sender


def datagrams(port: int, senders: list[socket], lengths: list[int]) -> Iterator[int]:
    """Sends one datagram at each step, from the senders in turn."""
    for sender, length in zip(cycle(senders), cycle(lengths)):
        yield sender.sendto(bytes(length), ("192.0.2.1", port))


def now(mean: float, period: float) -> float:
    """Returns the datagrams a second, a rate that rises and falls and differs each second."""
    seconds = time.monotonic()
    noise = random.Random(f"{period} {seconds:.0f}").uniform(0.5, 1.5)
    return mean * noise * (1 + 0.3 * math.sin(2 * math.pi * seconds / period))


# some messages exceed the MTU of the copies' path, and one exporter's TTL is too low for a router
syslog = datagrams(514, [client(5000)], [90, 140, 260, 1380, 110, 180])
netflow = datagrams(2055, [client(5001, 1)] + [client(5002 + i) for i in range(6)], [1300, 900, 1350, 600])
statsd = datagrams(8125, [client(6010 + i) for i in range(32)], [12, 25, 40])

due = {syslog: 0.0, netflow: 0.0, statsd: 0.0}
while True:
    for rule, rate in ((syslog, now(60, 41)), (netflow, now(150, 67)), (statsd, now(300, 103))):
        due[rule] += rate * TICK
        while due[rule] >= 1:
            due[rule] -= 1
            next(rule)
    time.sleep(TICK)
