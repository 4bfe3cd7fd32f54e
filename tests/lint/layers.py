#!/usr/bin/env python3
"""Checks which parts of src/ import which: `tests/lint/layers.py [SRC]`.

A part is a folder or a file of src/. Each line of the table is a part and the parts that it may import; these stand
below it, so that there is no circle. Without SRC a small tree is checked first in which everything is wrong.
"""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ALLOWED = {
    "main": "cli commands desired error heap journal",
    "commands": "arpd cli telemetry reconcile datapath desired net config bpf error time",
    "arpd": "telemetry reconcile datapath desired net config bpf error heap time",
    "cli": "datapath config error",
    "telemetry": "reconcile datapath desired net config bpf error time",
    "reconcile": "datapath desired net config bpf error time",
    "datapath": "desired net config bpf error time",
    "desired": "net config bpf maglev",
    "net": "config",
    "bpf": "",
    "error": "config journal",
    "config": "maglev",
    "heap": "",
    "journal": "",
    "maglev": "",
    "time": "",
}
MAY_NAME_CLAP = {"main", "commands", "cli"}
PATH = re.compile(r"\b(?:crate|udplb)::(?:(\w+)|\{([^{}]*)\}|(\{))")


def part_of(src: Path, path: Path) -> str:
    return path.relative_to(src).parts[0].removesuffix(".rs")


def imports(text: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the part of each path that begins at the crate's root; `{` for groups within groups."""
    text = re.sub(r"//.*", "", text)
    for match in PATH.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        word, group, nested = match.groups()
        for path in (word or group or nested).split(","):
            yield line, path.strip().split("::")[0]


def violations(src: Path) -> Iterator[str]:
    order = list(ALLOWED)
    for part, below in ALLOWED.items():
        for name in below.split():
            if order.index(name) <= order.index(part):
                yield f"the table: {part} may not import {name}, which stands above it"
    for path in sorted(src.rglob("*.rs")):
        part, text = part_of(src, path), path.read_text()
        if part == "lib":
            continue
        if part not in ALLOWED:
            yield f"{path}:1: {part} is in no line of the table"
            continue
        for line, name in imports(text):
            if name == "{":
                yield f"{path}:{line}: write a `use` for each part"
            elif name != part and name in ALLOWED and name not in ALLOWED[part].split():
                yield f"{path}:{line}: {part} may not import {name}"
        if part not in MAY_NAME_CLAP:
            for number, code in enumerate(text.splitlines(), 1):
                if re.search(r"\bclap\b", code):
                    yield f"{path}:{number}: {part} may not name clap"


def check_the_check() -> None:
    """Checks that all violations in a small tree with one of each kind are found."""
    with tempfile.TemporaryDirectory() as directory:
        src = Path(directory)
        (src / "net").mkdir()
        (src / "net/mod.rs").write_text("use crate::desired::{Rule, tables};\nuse clap::Args;\nuse crate::{bpf, cli};\nuse crate::{a::{b}};\n")
        (src / "time.rs").write_text("use std::time;\nfn now() { crate::error::say(1) } // crate::cli\n")
        (src / "new.rs").write_text("")
        found = [text.removeprefix(f"{src}/") for text in violations(src)]
        wanted = [
            "net/mod.rs:1: net may not import desired",
            "net/mod.rs:3: net may not import bpf",
            "net/mod.rs:3: net may not import cli",
            "net/mod.rs:4: write a `use` for each part",
            "net/mod.rs:2: net may not name clap",
            "new.rs:1: new is in no line of the table",
            "time.rs:2: time may not import error",
        ]
        assert found == wanted, f"the check of a wrong tree finds: {found}"


def main() -> bool:
    if len(sys.argv) == 1:
        check_the_check()
    found = list(violations(Path(sys.argv[1] if len(sys.argv) > 1 else "src")))
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
