#!/usr/bin/python3
"""Draws a terminal: what a command has shown on it, from standard input, as SVG.

usage: tests/pictures/terminal.py COMMAND COLUMNS
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

command, columns = sys.argv[1:]
console = Console(record=True, width=int(columns), file=io.StringIO())
console.print(Text(f"# {command}", style="bold"), Text.from_ansi(sys.stdin.read().rstrip()), sep="\n")
picture = console.export_svg(title=command, unique_id="udplb")
# a picture asks nobody for a font: any monospaced one does
picture = re.sub(r"<!--.*?-->|@font-face \{.*?\}", "", picture, flags=re.DOTALL)
# not every reader of SVG keeps the blanks that a line begins with
print(picture.replace("<svg ", '<svg xml:space="preserve" ', 1))
