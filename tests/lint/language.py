#!/usr/bin/env python3
"""Checks that comments and docstrings begin with a verb or a noun: `tests/lint/language.py [PATH...]`.

"Returns the key's length." is read once, "How long a key is." twice. At most 2 % of these lines may begin with
such a word; above that, each is printed. Without PATH a small tree is checked first.
"""

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PARTS = ["src", "bpf", "tests", "benches", "dev"]
SUFFIXES = {"", ".rs", ".c", ".h", ".sh", ".py"}
MAX_SHARE = 0.02
COMMENT = re.compile(r'\s*(?:(?://[/!]|/?\*\*?|//|#:?) +|""")(\w+)')
OPENINGS = set("What Whether Of How Those Whose Whom Where Who Whoever Whatever That".split())


def comments(paths: Iterable[str | Path]) -> Iterator[tuple[Path, int, str, str]]:
    """Yields the file, the line's number, the first word and the text of each line that is a comment."""
    for root in map(Path, paths):
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.is_file() and path.suffix in SUFFIXES:
                for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                    if match := COMMENT.match(line):
                        yield path, number, match[1], line.strip()


def violations(paths: Iterable[str | Path]) -> list[str]:
    """Returns the lines to rewrite; none if they are few."""
    lines = list(comments(paths))
    found = [f"{path}:{number}: {text}" for path, number, word, text in lines if word in OPENINGS]
    if len(found) <= MAX_SHARE * len(lines):
        return []
    return found + [f"{len(found)} of {len(lines)} comment lines begin with a relative clause; rewrite them"]


def check_the_check() -> None:
    """Checks that all bad lines of a small tree are found, and that in a large file none counts."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        (tree / "a.rs").write_text('//! What it is.\n/// Returns it.\nlet x = "// Who";\n    /// Whether so.\n// How.\n/// Office.\n')
        (tree / "b.h").write_text("/* Of it. */\n/*\n * Those of it.\n */\nreturn 1;\n")
        (tree / "run").write_text("# Whom it runs.\n")
        (tree / "t.py").write_text('"""Who runs it."""\nx = """Where"""\n')
        found = [text.removeprefix(f"{tree}/").split(": ")[0] for text in violations([tree])]
        wanted = ["a.rs:1", "a.rs:4", "a.rs:5", "b.h:1", "b.h:3", "run:1", "t.py:1", "7 of 9 comment lines begin with a relative clause; rewrite them"]
        assert found == wanted, f"the check of a wrong tree finds: {found}"
        (tree / "c.rs").write_text("/// Returns it.\n" * 400)
        assert not violations([tree]), "7 of 409 lines are few"


def main() -> bool:
    if len(sys.argv) == 1:
        check_the_check()
    found = violations(sys.argv[1:] or PARTS)
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
