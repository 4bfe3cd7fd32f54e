#!/usr/bin/env python3
"""Runs the console blocks of one document in the lab of ./dev demo, and reports the result of each.

usage: tests/demo DIRECTORY-OF-THE-BUILD tests/docs/lab.py DOCUMENT

The relay's interfaces are called ens3 (client), ens4 (a) and ens5 (b), as in the documents. A line of
JSON for each block goes to standard output: its place, and the failure or null.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from blocks import Block, Failed, blocks, compare, steps

INTERFACES = {"to-client": "ens3", "to-a": "ens4", "to-b": "ens5"}
SENDER = """
while :; do
	datagram send 192.0.2.2:40112 192.0.2.1:2055 'flow 7'
	datagram send 192.0.2.2:40113 192.0.2.1:8125 'hits:1|c'
	datagram send 192.0.2.2:40114 192.0.2.1:514 'disk full'
	sleep 0.1
done
"""


def call(*command: str) -> None:
    subprocess.run(command, check=True)


def prepare() -> None:
    for old, new in INTERFACES.items():
        call("ip", "link", "set", old, "down")
        call("ip", "link", "set", old, "name", new)
        call("ip", "link", "set", new, "up")
    # files that a document writes into the system are removed with the lab
    for folder in ("etc", "var", "usr/local"):
        upper = Path("/run/overlay") / folder
        for name in ("upper", "work"):
            (upper / name).mkdir(parents=True)
        options = f"lowerdir=/{folder},upperdir={upper}/upper,workdir={upper}/work"
        call("mount", "-t", "overlay", "overlay", "-o", options, f"/{folder}")
    # the installed path of udplb
    udplb = Path("/usr/local/bin/udplb")
    udplb.unlink(missing_ok=True)
    udplb.symlink_to(os.popen("command -v udplb").read().strip())
    os.chdir("/root" if os.access("/root", os.W_OK) else "/run")


def run(host: str, command: str) -> str:
    inside = ["ip", "netns", "exec", host] if host else []
    done = subprocess.run(
        [*inside, "bash", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    if done.returncode:
        raise Failed(f"`{command}` ended with {done.returncode}: {done.stdout}")
    return done.stdout


def play(block: Block) -> None:
    sender = None
    if "traffic" in block.words:
        sender = subprocess.Popen(["ip", "netns", "exec", "client", "sh", "-c", SENDER], stdout=subprocess.DEVNULL)
        time.sleep(1.5)
    try:
        for host, command, shown in steps(block.text):
            compare(shown, run(host, command))
    finally:
        if sender:
            sender.kill()
            sender.wait()


def write(block: Block, name: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)


prepare()
for block in blocks(Path(sys.argv[1])):
    failure = None
    try:
        name = block.value("file")
        if name:
            write(block, name)
        elif block.language == "console" and block.is_run and "systemd" not in block.words:
            play(block)
        else:
            continue
    except (Failed, subprocess.TimeoutExpired) as error:
        failure = str(error)
    print(json.dumps({"place": block.place, "failure": failure}), flush=True)
