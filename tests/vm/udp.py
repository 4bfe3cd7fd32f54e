#!/usr/bin/env python3
"""UDP end points of the scenarios.

serve NAME PORT [--address A]   returns when the socket is bound; answers with NAME, the sender's address and its payload
ask ADDRESS PORT [--from PORT] [--sources N]
                                asks from connected sockets; prints a line per answer: TTL answer; fails without one
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


def go_on_in_background() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def serve(name: str, port: int, address: str) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, port))
    go_on_in_background()
    while True:
        payload, sender = server.recvfrom(65536)
        server.sendto(f"{name} {sender[0]} {payload.decode()}".encode(), sender)


def ask(address: str, port: int, source: int) -> None:
    # an answer may be lost while next hops are resolved
    tries, patience = 5, 3.0
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    client.bind(("", source))
    client.connect((address, port))
    client.settimeout(patience)
    for _ in range(tries):
        client.send(str(source).encode())
        try:
            payload, ancillary, _, _ = client.recvmsg(65536, ANCILLARY)
        except TimeoutError:
            continue
        print(int.from_bytes(ancillary[0][2], sys.byteorder), payload.decode())
        return
    sys.exit(f"{address} does not answer port {source}")


def listen(port: int, file: str) -> None:
    # receives IPv4 too
    receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    receiver.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    receiver.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    receiver.bind(("::", port))
    with open(file, "w", buffering=1) as lines:
        go_on_in_background()
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
verb = verbs.add_parser("serve")
verb.add_argument("name")
verb.add_argument("port", type=int)
verb.add_argument("--address", default="")
verb = verbs.add_parser("ask")
verb.add_argument("address")
verb.add_argument("port", type=int)
verb.add_argument("--from", dest="source", type=int, default=0)
verb.add_argument("--sources", type=int, default=1)
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
elif args.verb == "serve":
    serve(args.name, args.port, args.address)
elif args.verb == "ask":
    for source in range(args.source, args.source + args.sources):
        ask(args.address, args.port, source)
else:
    for source in range(args.source, args.source + args.sources):
        send(args.address, args.port, source, args.count, args.until, args.interval)
