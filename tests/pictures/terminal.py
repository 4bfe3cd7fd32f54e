#!/usr/bin/python3
"""Draws a terminal with the output of a command, which comes from standard input, as SVG.

usage: tests/pictures/terminal.py COMMAND COLUMNS

Of a command that draws the whole screen again and again the last screen is shown.
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

command, columns = sys.argv[1:]
# a screen begins with the cursor at home; output after the last screen only restores the terminal
*_, said = re.split(r"\x1b\[H", re.sub(r"\x1b\[\?\w+|\x1b\[[JK]", "", sys.stdin.read()))
lines = []
for line in Text.from_ansi(said.rstrip()).split(allow_blank=True):
    # a terminal breaks lines at its edge
    lines += line.divide(range(int(columns), len(line), int(columns))) if len(line) else [line]
console = Console(record=True, width=int(columns), file=io.StringIO())
console.print(Text(f"# {command}", style="bold"), *lines, sep="\n")
picture = console.export_svg(title=command, unique_id="udplb")
# Any monospaced font is suitable: the picture loads none.
picture = re.sub(r"<!--.*?-->|@font-face \{.*?\}", "", picture, flags=re.DOTALL)
# Some SVG viewers drop leading spaces.
print(picture.replace("<svg ", '<svg xml:space="preserve" ', 1))
