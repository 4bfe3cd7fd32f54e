#!/usr/bin/env python3
"""Draws the topology of README.md, for a light or a dark page.

usage: tests/pictures/topology.py light|dark >topology.svg
"""

import sys

COLOURS = {
    "light": {"line": "#57606a", "text": "#1f2328", "dim": "#57606a", "box": "#f6f8fa", "main": "#0969da", "copy": "#1a7f37", "here": "#9a6700"},
    "dark": {"line": "#8b949e", "text": "#e6edf3", "dim": "#9198a1", "box": "#161b22", "main": "#4493f8", "copy": "#3fb950", "here": "#d29922"},
}
FONT = "font-family='-apple-system,Segoe UI,Helvetica,Arial,sans-serif'"
MONO = "font-family='ui-monospace,SFMono-Regular,Menlo,Consolas,monospace'"


def escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class Drawing:
    def __init__(self, theme: str):
        self.colour = COLOURS[theme]
        self.parts: list[str] = []

    def text(self, x: int, y: int, text: str, colour: str = "text", size: int = 14, anchor: str = "middle", mono: bool = False) -> None:
        font = MONO if mono else FONT
        style = f"{font} font-size='{size}' text-anchor='{anchor}' fill='{self.colour[colour]}'"
        self.parts.append(f"<text x='{x}' y='{y}' {style}>{escaped(text)}</text>")

    def box(self, x: int, y: int, width: int, height: int, title: str, address: str, stroke: str = "line") -> None:
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{self.colour['box']}' "
            f"stroke='{self.colour[stroke]}' stroke-width='1.5'/>"
        )
        self.text(x + width // 2, y + height // 2 - 4, title)
        self.text(x + width // 2, y + height // 2 + 15, address, "dim", 12, mono=True)

    def arrow(self, path: str, colour: str, dashed: bool = False) -> None:
        dash = " stroke-dasharray='6 4'" if dashed else ""
        stroke = f"fill='none' stroke='{self.colour[colour]}' stroke-width='2'{dash}"
        self.parts.append(f"<path d='{path}' {stroke} marker-end='url(#{colour})'/>")

    def svg(self, width: int, height: int, title: str) -> str:
        markers = "".join(
            f"<marker id='{name}' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto-start-reverse'>"
            f"<path d='M0 0L10 5L0 10z' fill='{self.colour[name]}'/></marker>"
            for name in ("main", "copy", "here")
        )
        body = "\n".join(self.parts)
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'>\n"
            f"<title>{escaped(title)}</title>\n<defs>{markers}</defs>\n{body}\n</svg>\n"
        )


def main(theme: str) -> None:
    drawing = Drawing(theme)
    colour = drawing.colour
    for row in range(3):
        drawing.box(10, 35 + 75 * row, 130, 54, ("router", "switch", "server")[row], "UDP to 192.0.2.1")
        drawing.arrow(f"M140 {62 + 75 * row} C200 {62 + 75 * row} 190 137 248 137", "main")
    # the relay with the hook and the stack above it
    drawing.parts.append(f"<rect x='230' y='20' width='270' height='255' rx='8' fill='none' stroke='{colour['line']}' stroke-width='1.5'/>")
    drawing.text(365, 264, "relay 192.0.2.1", "dim", 12)
    drawing.box(250, 105, 120, 64, "udplb", "tc ingress", "main")
    drawing.box(250, 35, 120, 46, "socket here", "pass", "line")
    drawing.arrow("M310 105 L310 84", "here", True)
    drawing.text(322, 99, "the original", "here", 11, "start")
    drawing.text(310, 190, "key 192.0.2.1:2055", "dim", 11, mono=True)
    drawing.text(310, 206, "rule, upstream, verdict", "dim", 11)
    drawing.text(310, 232, "before netfilter", "dim", 11)
    for row, (title, address) in enumerate((("upstream", "198.51.100.11"), ("upstream", "203.0.113.12"), ("mirror", "203.0.113.13"))):
        drawing.box(650, 35 + 75 * row, 140, 54, title, address)
    drawing.arrow("M370 132 C520 132 540 62 648 62", "copy")
    drawing.arrow("M370 137 L648 137", "copy")
    drawing.arrow("M370 142 C520 142 540 212 648 212", "copy", True)
    drawing.text(570, 47, "balance: one of them", "copy", 12)
    drawing.text(575, 128, "replicate: each", "copy", 12)
    drawing.text(570, 232, "a copy of each", "copy", 12)
    title = "Senders reach udplb at tc ingress of a relay, which sends datagrams or copies to upstreams and mirrors"
    print(drawing.svg(800, 290, title).replace("'", '"'), end="")


if len(sys.argv) != 2 or sys.argv[1] not in COLOURS:
    sys.exit(__doc__)
main(sys.argv[1])
