#!/usr/bin/env python3
"""Boxes that announce one address: what becomes of flows when boxes come, go, fall sick and die.

usage: scale.py UDPLB ROUTING [short|EVENT…]; events: those of EVENTS below
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lab import ANYCAST, PORT, UPSTREAMS, VIP, Failed, Lab, until
from traffic import Answers, Report, during

ALL = [1, 2, 3, 4]
MAX_SILENCE = 0.4  # BFD: 3 × 100 ms, and the routers' reaction


class Run:
    def __init__(self, udplb: Path, routing: Path, short: bool) -> None:
        self.udplb, self.routing, self.short = udplb, routing, short
        self.flows, self.rate = (60, 1200) if short else (200, 4000)
        self.passed = self.failed = 0

    def lab(self, boxes: int = 4) -> Lab:
        return Lab(self.udplb, self.routing, boxes)

    def check(self, what: str, wrong: str = "") -> None:
        self.passed, self.failed = self.passed + (not wrong), self.failed + bool(wrong)
        print(f"{'FAILED' if wrong else 'ok':6} {what}{wrong and ': ' + wrong}", flush=True)

    def watch(self, what: str, act: Callable[[], object], settle: float = 1.5, concerned: int = 0) -> Report:
        """Sends during an event. No flow may change its upstream, but for those of the concerned one."""
        report = during(act, settle, self.flows, self.rate, concerned)
        wrong = "flows changed their upstream" if report.strangers or report.twice else ""
        self.check(f"{what}: {report}", wrong)
        return report

    def graceful(self, what: str, act: Callable[[], object], settle: float = 1.5, concerned: int = 0) -> Report:
        report = self.watch(what, act, settle, concerned)
        if report.lost:
            self.check(what, f"{report.lost} packets are lost")
        return report

    def dies(self, what: str, act: Callable[[], object]) -> None:
        """A death without a word. Its time is only measured on a machine that does nothing else."""
        report = self.watch(what, act, 2)
        if report.silence > MAX_SILENCE and not self.short:
            self.check(what, f"silent for {report.silence * 1000:.0f} ms")


def events(run: Run) -> None:
    """The events of four boxes with BIRD."""
    with run.lab() as lab:
        lab.announce()
        same(run, lab)
        run.graceful("a box withdraws, and forwards on", lambda: leave(lab, 4))
        run.graceful("it announces again", lambda: come(lab, 4))
        run.graceful("the service of a box stops: udplb detach", lambda: (lab.udplb(4, "detach"), gone(lab, 4)))
        run.graceful("it starts: udplb apply", lambda: (lab.apply(4), lab.await_hops(ALL)))
        sick(run, lab)
        run.graceful("arpd of a box is killed, and nothing is withdrawn", lambda: lab.kill("arpd3"))
        run.check("the box without arpd stays", "" if lab.next_hops() == ALL else str(lab.next_hops()))
        lab.arpd(3)
        run.dies("a box dies, BFD 100 ms × 3", lambda: (lab.die(4), gone(lab, 4)))
        # as after a reboot, it does not take itself for well
        until("the box notices", lambda: lab.udplb(4, "ready", check=False).startswith("not ready"))
        run.graceful("it comes back", lambda: (lab.live(4), lab.await_hops(ALL)))
        if run.short:
            return
        run.graceful("BIRD of a box is killed, its udplb forwards on", lambda: (lab.kill("bird-box4"), gone(lab, 4)))
        lab.announce_by_bird(4)
        lab.await_hops(ALL)
        rolling(run, lab)


def gone(lab: Lab, number: int) -> None:
    lab.await_hops([other for other in ALL if other != number])


def leave(lab: Lab, number: int) -> None:
    lab.udplb(number, "withdraw")
    gone(lab, number)


def come(lab: Lab, number: int) -> None:
    lab.udplb(number, "announce", "--all")
    lab.await_hops(ALL)


def same(run: Run, lab: Lab) -> None:
    digests = {lab.udplb(number, "list", "--digest") for number in ALL}
    run.check("all boxes have one digest", "" if len(digests) == 1 else str(digests))
    picks = 0
    for _ in range(5 if run.short else 25):
        source = f"10.1.0.{random.randrange(1, 250)}:{random.randrange(1024, 65536)}"
        output = [lab.udplb(number, "get", source, f"{VIP}:{PORT}").splitlines() for number in ALL]
        picks += len({line for lines in output for line in lines if line.startswith("upstream")}) == 1
    run.check("udplb get names one upstream on all boxes", "" if picks == (5 if run.short else 25) else str(picks))


def sick(run: Run, lab: Lab) -> None:
    """A sick box forwards as well as before, but others are preferred; where all are sick, all serve."""

    def fall_ill(number: int, wanted: list[int]) -> None:
        lab.udplb(number, "drain", f"canary/{UPSTREAMS[0]}")
        lab.await_hops(wanted)

    run.graceful("1 of 4 falls sick", lambda: fall_ill(1, [2, 3, 4]))
    run.graceful("2 of 4 are sick", lambda: fall_ill(2, [3, 4]))
    run.graceful("3 of 4 are sick", lambda: fall_ill(3, [4]))
    run.graceful("4 of 4 are sick, and all serve", lambda: fall_ill(4, ALL))
    run.graceful("all get well, and wait for the hold-down time", lambda: get_well(lab), 7)
    lab.await_hops(ALL)


def get_well(lab: Lab) -> None:
    for number in ALL:
        lab.udplb(number, "enable", "--all")


def rolling(run: Run, lab: Lab) -> None:
    """A file that lacks an upstream, and the old one, reach one box after the other."""
    for what, upstreams in (("lacks upstream 3", UPSTREAMS[:2]), ("has it again", UPSTREAMS)):

        def roll(upstreams: list[str] = upstreams) -> None:
            for number in ALL:
                lab.apply(number, upstreams)
                time.sleep(0.3)

        run.graceful(f"a file that {what}, box by box", roll, concerned=3)


def frr(run: Run) -> None:
    """One box has FRR in place of BIRD."""
    with run.lab() as lab:
        lab.route()
        for number in ALL:
            lab.arpd(number)
            lab.announce_by_frr(number) if number == 2 else lab.announce_by_bird(number)
        lab.await_hops(ALL)
        run.check("BIRD's and FRR's boxes are one group")
        run.graceful("the box with FRR withdraws, and forwards on", lambda: leave(lab, 2))
        run.graceful("it announces again", lambda: come(lab, 2))
        lab.udplb(2, "drain", f"canary/{UPSTREAMS[0]}")
        gone(lab, 2)
        run.check("the box with FRR is sick, and the others are preferred")
        lab.udplb(2, "enable", "--all")
        lab.await_hops(ALL)
        run.dies("the box with FRR dies, BFD 100 ms × 3", lambda: (lab.die(2), gone(lab, 2)))


ECHO = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
sock.bind((sys.argv[2], int(sys.argv[3])))
while True:
    data, source = sock.recvfrom(2048)
    sock.sendto(data + repr((source, sys.argv[1])).encode(), source)
"""


def answers(run: Run) -> None:
    """Upstreams answer through any box or directly, with no state that a box takes along."""
    for reply in ("route", "direct"):
        answered(run, reply)


def answered(run: Run, reply: str) -> None:
    with run.lab() as lab:
        for number in ALL:
            lab.apply(number, reply=reply)
        if reply == "route":
            lab.answer_by(ALL)
        else:
            lab.answer_directly()
        address = VIP if reply == "direct" else "0.0.0.0"
        for nth in range(1, len(UPSTREAMS) + 1):
            lab.start(f"up{nth}", f"echo{nth}", sys.executable, "-c", ECHO, f"u{nth}", address, str(PORT))
        lab.announce()

        def die() -> None:
            lab.die(4)
            if reply == "route":
                # as BFD between upstreams and boxes would
                time.sleep(0.3)
                lab.answer_by([1, 2, 3])
            gone(lab, 4)

        for what, act, is_graceful in (
            ("a box withdraws, and forwards on", lambda: leave(lab, 4), True),
            ("it announces again", lambda: come(lab, 4), True),
            ("a box dies", die, False),
        ):
            report = Answers().during(act)
            changed = sum(len(seen) != 1 for seen in report.seen.values())
            wrong = f"upstreams saw other senders, or flows changed upstreams: {changed}" if changed else ""
            wrong = wrong or (f"answers from another address: {report.strangers}" if report.strangers else "")
            wrong = wrong or ("unanswered" if is_graceful and report.asked != report.answered else "")
            wrong = wrong or ("flows without an answer" if len(report.seen) != report.flows else "")
            run.check(f"reply: {reply}, {what}: {report}", wrong)


KEEPALIVED = """global_defs {{
	script_user root
	enable_script_security
	vrrp_version 3
	vrrp_garp_master_refresh 1
}}
vrrp_script ready {{
	script "{script}"
	interval 1
	timeout 5
	fall 1
	rise 2
	weight -50
}}
vrrp_instance udplb {{
	interface f0
	state BACKUP
	virtual_router_id 53
	priority {priority}
	advert_int 0.2
	virtual_ipaddress {{
		{vip}/32 dev f0
	}}
	track_script {{
		ready
	}}
}}
"""


def vrrp(run: Run) -> None:
    """Two boxes of a small site without routers that speak BGP: keepalived moves the address."""
    with run.lab(2) as lab:
        lab.ip("router", f"route add {VIP} dev f0")
        for number in (1, 2):
            lab.apply(number, announce=False)
            lab.arpd(number)
            script = lab.directory / f"ready{number}"
            pins = lab.directory / "bpf" / f"box{number}"
            script.write_text(f"#!/bin/sh\nexec {lab.program} --pin-dir {pins} ready -q\n")
            script.chmod(0o755)
            conf = lab.directory / f"keepalived{number}.conf"
            conf.write_text(KEEPALIVED.format(script=script, priority=100 - 10 * number, vip=VIP))
            pid = ["-p", lab.directory / f"k{number}.pid", "-r", lab.directory / f"v{number}.pid"]
            keepalived = [lab.find("sbin/keepalived"), "-n", "-l", "-P", "-f", conf, *pid]
            lab.start(f"box{number}", f"keepalived{number}", *keepalived)
        until("box 1 is master", lambda: masters(lab) == [1])
        for number in (1, 2):
            wrong = lab.udplb(number, "ready", check=False)
            run.check(f"box {number} is ready, master or not", "" if wrong == "ready\n" else wrong)
        run.watch("udplb withdraw: ready says no, and box 2 takes over", lambda: (lab.udplb(1, "withdraw"), master(lab, 2)))
        run.watch("udplb announce: box 1 takes over again", lambda: (lab.udplb(1, "announce", "--all"), master(lab, 1)), 2)
        run.watch("box 1 dies", lambda: (lab.die(1), master(lab, 2, 1)), 2)


def masters(lab: Lab) -> list[int]:
    return [number for number in (1, 2) if VIP in lab.ip(f"box{number}", "addr show dev f0")]


def master(lab: Lab, number: int, dead: int = 0) -> None:
    until(f"box {number} is master", lambda: [it for it in masters(lab) if it != dead] == [number])


EVENTS = {"events": events, "answers": answers, "frr": frr, "vrrp": vrrp}


def main() -> int:
    udplb, routing, *names = sys.argv[1:]
    short = names == ["short"]
    if unknown := [name for name in names if name not in EVENTS and not short]:
        print(f"no event {unknown[0]}; there are {', '.join(EVENTS)}, and short", file=sys.stderr)
        return 64
    run = Run(Path(udplb).resolve(), Path(routing).resolve(), short)
    for name in ["events"] if short else names or list(EVENTS):
        try:
            EVENTS[name](run)
        except Failed as failure:
            run.check(name, str(failure))
    print(f"{run.passed} passed, {run.failed} failed")
    return int(run.failed > 0)


if __name__ == "__main__":
    # so that the lab is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    assert os.geteuid() == 0 and len(ANYCAST) == 2
    sys.exit(main())
