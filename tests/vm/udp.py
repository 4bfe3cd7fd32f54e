#!/usr/bin/env python3
"""UDP end points of the scenarios.

listen PORT FILE                returns when the socket is bound; FILE gets a line per datagram:
                                address port TTL payload
send ADDRESS PORT [--from PORT] [--sources N] [--count N | --until FILE] [--interval SECONDS]
                                payloads are FROM-0, FROM-1, …; prints how many, when FILE is there;
                                from so many ports, from FROM on
"""

import argparse
import ipaddress
import os
import socket
import sys
import time

BUFFER = 8 << 20
# Linux socket options that Python's socket module does not define.
SO_RCVBUFFORCE = 33
IP_RECVTTL = 12
# maximum ancillary data: an int for each family
ANCILLARY = 128


def listen(port: int, file: str) -> None:
    # receives IPv4 too
    receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    receiver.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    receiver.bind(("::", port))
    with open(file, "w", buffering=1) as lines:
        if os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        while True:
            payload, ancillary, _, sender = receiver.recvmsg(65536, ANCILLARY)
            ttl = int.from_bytes(ancillary[0][2], sys.byteorder)
            address = ipaddress.IPv6Address(sender[0])
            print(address.ipv4_mapped or address, sender[1], ttl, payload.decode(), file=lines)


def send(address: str, port: int, source: int, count: int, until: str, interval: float) -> None:
    sender = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind(("", source))
    source = sender.getsockname()[1]
    start = time.monotonic()
    number = 0
    while not os.path.exists(until) if until else number < count:
        sender.sendto(f"{source}-{number}".encode(), (address, port))
        number += 1
        time.sleep(max(0.0, start + interval * number - time.monotonic()))
    print(number)


parser = argparse.ArgumentParser()
verbs = parser.add_subparsers(dest="verb", required=True)
verb = verbs.add_parser("listen")
verb.add_argument("port", type=int)
verb.add_argument("file")
verb = verbs.add_parser("send")
verb.add_argument("address")
verb.add_argument("port", type=int)
verb.add_argument("--from", dest="source", type=int, default=0)
verb.add_argument("--sources", type=int, default=1)
verb.add_argument("--count", type=int, default=1)
verb.add_argument("--until", default="")
verb.add_argument("--interval", type=float, default=0.0)
args = parser.parse_args()
if args.verb == "listen":
    listen(args.port, args.file)
else:
    for source in range(args.source, args.source + args.sources):
        send(args.address, args.port, source, args.count, args.until, args.interval)
