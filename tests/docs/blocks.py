"""Code blocks, links and pictures of the documents, and the checks that need no lab.

The first word after a fence is the language, and decides what happens to the block:

  yaml, toml    a configuration: `udplb check --no-resolve`; with `file=PATH` the lab gets it too
  console       commands with a prompt and their output, run in the lab of ./dev demo (lab.py);
                with `traffic` while the client sends, with `systemd` on a machine with the units
  sh            ./dev commands, each of which must exist
  json, nix     parsed
  crontab, playbook   played by `run`
  text          a drawing

`not-run` after the language marks what cannot be run here: another program's file, a download.
"""

import json
import re
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ROOT / "contrib/pictures"
LANGUAGES = "yaml toml console sh json nix crontab playbook text ini c rust".split()


class Failed(Exception):
    pass


@dataclass
class Block:
    file: Path
    line: int
    language: str
    words: list[str]
    text: str

    @property
    def place(self) -> str:
        known = self.file.is_relative_to(ROOT)
        return f"{self.file.relative_to(ROOT) if known else self.file.name}:{self.line}"

    def value(self, name: str) -> str | None:
        """Returns the text behind NAME= after the language."""
        return next((word.partition("=")[2] for word in self.words if word.startswith(f"{name}=")), None)

    @property
    def is_run(self) -> bool:
        return "not-run" not in self.words and self.language != "text"


def manual(udplb: Path, folder: Path) -> Path:
    """Returns the examples of udplb(1) as a document, whose output is not compared."""
    subprocess.run([udplb, "man", folder], check=True)
    text = (folder / "udplb.1").read_text().replace("\\-", "-")
    document = ""
    for example in re.findall(r"(?ms)^\.EX\n(.*?)^\.EE$", text):
        if example.startswith("#"):
            document += "```console traffic\n" + example.replace("\n", "\n...\n") + "```\n"
        else:
            document += f"```yaml file=/etc/udplb.yaml\n{example}```\n"
    file = folder / "udplb.1.md"
    file.write_text(document)
    return file


def documents() -> list[Path]:
    return sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md"))


def blocks(file: Path) -> list[Block]:
    """Returns all fenced blocks of a document."""
    found: list[Block] = []
    fence, start = "", 0
    lines: list[str] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not fence and line.lstrip().startswith("```"):
            fence, start, lines = line.strip().removeprefix("```") or "?", number, []
        elif fence and line.strip() == "```":
            language, *words = fence.split()
            found.append(Block(file, start, language, words, "\n".join(lines) + "\n"))
            fence = ""
        elif fence:
            lines.append(line)
        elif line.startswith("    ") and not re.match(r" +([-*|]|\d+\.|\w)", line):
            raise Failed(f"{file.name}:{number}: a block without a fence")
    if fence:
        raise Failed(f"{file.name}:{start}: a fence without an end")
    return found


def judge(block: Block, udplb: Path) -> None:
    """Returns the mistakes in a block that are found without running it."""
    if block.language not in LANGUAGES:
        raise Failed(f"`{block.language}` is no language of tests/docs/blocks.py")
    if not block.is_run:
        return
    if block.language in ("yaml", "toml"):
        check_configuration(block, udplb)
    elif block.language == "sh":
        check_dev(block.text)
    elif block.language == "json":
        for line in [block.text] if block.text.startswith("{\n") else block.text.splitlines():
            json.loads(line)
    elif block.language == "nix":
        check_nix(block.text, udplb.parent.parent / "tools/bin/nixfmt")
    elif block.language in ("c", "rust", "ini"):
        raise Failed(f"`{block.language}` is not run: say so with not-run")


def check_configuration(block: Block, udplb: Path) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=f".{block.language}") as file:
        file.write(block.text)
        file.flush()
        done = subprocess.run([udplb, "check", "--no-resolve", file.name], capture_output=True, text=True)
    if done.returncode:
        raise Failed(done.stderr)


def check_dev(text: str) -> None:
    script = (ROOT / "dev").read_text()
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words == [".ci/run"]:
            continue
        if words[0] != "./dev" or f"\ndo_{words[1]}() {{" not in script:
            raise Failed(f"`{line}` is no command of ./dev")


def check_nix(text: str, nixfmt: Path) -> None:
    if not nixfmt.exists():
        raise Failed(f"{nixfmt} is missing: ./dev deb installs it")
    with tempfile.NamedTemporaryFile("w", suffix=".nix") as file:
        file.write(text)
        file.flush()
        done = subprocess.run([nixfmt, file.name], capture_output=True, text=True)
    if done.returncode:
        raise Failed(done.stdout + done.stderr)


def anchors(file: Path) -> set[str]:
    """Returns GitHub's names of the headings."""
    text = re.sub(r"(?ms)^```.*?^```$", "", file.read_text())
    headings = re.findall(r"(?m)^#+ +(.*?)\s*$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(file: Path) -> list[str]:
    """Returns the links of a document to files or headings that are missing."""
    dead = []
    text = re.sub(r"(?ms)^```.*?^```$", "", file.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (heading and target.suffix == ".md" and heading not in anchors(target)):
            dead.append(link)
    return dead


def check_pictures() -> None:
    """Checks that each picture is shown somewhere, is small, and loads nothing."""
    shown = set()
    for file in documents():
        shown |= set(re.findall(r"[\w/.]*contrib/pictures/([\w.-]+)", file.read_text()))
    there = {file.name for file in PICTURES.iterdir()}
    if shown != there:
        raise Failed(f"the documents show {sorted(shown)}, and there are {sorted(there)}")
    for name in there:
        text = (PICTURES / name).read_text()
        if ElementTree.fromstring(text).tag != "{http://www.w3.org/2000/svg}svg":
            raise Failed(f"{name} is no SVG")
        if len(text) >= 100_000:
            raise Failed(f"{name} has {len(text)} bytes")
        elsewhere = re.findall(r"\S*(?:https?:)?//\S+", re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text))
        if elsewhere:
            raise Failed(f"{name} refers to {elsewhere}")


PROMPT = re.compile(r"^(?:(?P<host>client|a|b)\$|[#$]) (?P<command>.*)$")


def steps(text: str) -> list[tuple[str, str, list[str]]]:
    """Returns the commands of a console block: host (empty: the relay), command, output that is shown."""
    found: list[tuple[str, str, list[str]]] = []
    continued = False
    for line in text.splitlines():
        prompt = PROMPT.match(line)
        if continued:
            host, command, shown = found[-1]
            found[-1] = (host, f"{command}\n{line}", shown)
        elif prompt:
            found.append((prompt["host"] or "", prompt["command"], []))
        elif not found:
            raise Failed(f"`{line}` comes before any command")
        else:
            found[-1][2].append(line)
        continued = line.endswith("\\") and (continued or prompt is not None)
    return found


def masked(line: str) -> str:
    """Returns the line without numbers, MAC addresses, states of neighbours, bars and widths, which differ."""
    line = re.sub(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b", "MAC", line)
    line = re.sub(r"\b(REACHABLE|STALE|DELAY|PROBE)\b", "NUD", line)
    line = re.sub(r"\d+ms\b|\d+[smhd]\b", "AGE", line)
    line = re.sub(r"-?\d[\d.,:TZ-]*", "0", line)
    line = re.sub(r"[▁▂▃▄▅▆▇█]+", "", line)
    return " ".join(line.split())


def compare(shown: list[str], said: str) -> None:
    """Fails unless the output equals that in the document; `...` stands for any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(masked(line)) + r"\n" for line in shown
    )
    lines = "".join(masked(line) + "\n" for line in said.splitlines())
    if not re.fullmatch(pattern, lines):
        raise Failed("the document shows\n" + "\n".join(shown) + f"\nand this came:\n{said}")
