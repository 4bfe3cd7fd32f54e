#!/usr/bin/python3
"""Draws a dashboard of Grafana with data from a Prometheus, as SVG.

usage: tests/pictures/dashboard.py DASHBOARD.json URL SCRAPE-INTERVAL BEGIN END   in seconds, since 1970
"""

import io
import json
import re
import sys
import time
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import dates, pyplot  # noqa: E402
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator  # noqa: E402

# Grafana's dark theme, and its colours by name and in order of use
PAGE, CARD, LINE, FAINT, TEXT = "#111217", "#181b1f", "#2c3235", "#9a9ba5", "#d8d9e0"
COLOURS = {"green": "#56a64b", "orange": "#ff780a", "red": "#e02f44", "none": CARD}
TURN = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9"]
# in inches: a 24th of the width, a unit of height, and the gap between cards
WIDTH, HEIGHT, GAP = 0.5, 0.34, 0.08


@dataclass
class Series:
    name: str
    times: list[datetime]
    values: list[float]


class Prometheus:
    def __init__(self, url: str, scrape: int, begin: int, end: int):
        self.url, self.step, self.begin, self.end = url, scrape, begin, end
        # Grafana's value of $__rate_interval
        self.rate_interval = f"{4 * scrape}s"

    def ask(self, target: dict[str, Any]) -> list[Series]:
        """Returns the series of a panel's query, with all variables set to everything."""
        query = target["expr"].replace("$__rate_interval", self.rate_interval)
        query = re.sub(r"\$(instance|rule)\b", ".*", query)
        asked = {"query": query, "start": self.begin, "end": self.end, "step": self.step}
        # no proxy: the lab is unreachable through one
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}") as answer:
            found = json.load(answer)["data"]["result"]
        return [self.series(target["legendFormat"], one) for one in found]

    @staticmethod
    def series(legend: str, found: dict[str, Any]) -> Series:
        name = re.sub(r"\{\{(\w+)\}\}", lambda label: str(found["metric"].get(label[1], "")), legend)
        times = [datetime.fromtimestamp(at, timezone.utc) for at, _ in found["values"]]
        return Series(name, times, [float(value) for _, value in found["values"]])


def scaled(unit: str) -> Callable[..., str]:
    formatter = EngFormatter(unit, sep=" ")
    return lambda value, _=None: str(formatter(float(f"{value:.3g}")))


# formatters of a value, with the position on an axis as second argument
UNITS: dict[str, Callable[..., str]] = {
    "": lambda value, _=None: f"{value:.4g}",
    "pps": scaled("p/s"),
    "bps": scaled("b/s"),
    "s": lambda value, _=None: f"{value:.0f} s",
    "percentunit": lambda value, _=None: f"{100 * value:.2g} %",
    "dateTimeFromNow": lambda value, _=None: f"{(time.time() - value / 1000) / 60:.0f} minutes ago",
}


def shown(value: float, settings: dict[str, Any]) -> tuple[str, str]:
    """Returns text and colour of a value."""
    for mapping in settings.get("mappings", []):
        if option := mapping["options"].get(f"{value:.0f}"):
            return option["text"], COLOURS[option["color"]]
    colour = "none"
    for step in settings.get("thresholds", {}).get("steps", []):
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return UNITS[settings.get("unit", "")](value), COLOURS[colour]


@dataclass
class Panel:
    figure: Any
    settings: dict[str, Any]
    series: list[Series]
    times: tuple[datetime, datetime]

    def axes(self, left: float = 0, below: float = 0, right: float = 0, above: float = 0) -> Any:
        """Adds axes to the card, with margins in inches."""
        grid, (width, height) = self.settings["gridPos"], self.figure.get_size_inches()
        x, y = grid["x"] * WIDTH + GAP / 2 + left, height - (grid["y"] + grid["h"]) * HEIGHT + GAP / 2 + below
        w, h = grid["w"] * WIDTH - GAP - left - right, grid["h"] * HEIGHT - GAP - below - above
        return self.figure.add_axes((x / width, y / height, w / width, h / height))

    def card(self, colour: str = CARD) -> Any:
        axes = self.axes()
        axes.set(facecolor=colour, xticks=[], yticks=[])
        axes.annotate(self.settings["title"], (0, 1), (8, -8), "axes fraction", "offset points", va="top", size=9)
        return axes

    def options(self) -> dict[str, Any]:
        defaults: dict[str, Any] = self.settings["fieldConfig"]["defaults"]
        return defaults

    def over_time(self, left: float) -> Any:
        axes = self.axes(left, 0.62, 0.2, 0.4)
        axes.set_xlim(*self.times)
        axes.xaxis.set_major_locator(dates.AutoDateLocator(maxticks=7))
        axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S"))
        return axes


def legend(axes: Any, entries: int, **handles: Any) -> None:
    """Draws the legend below the axes, in as many columns as fit."""
    columns = 3 if entries < 4 else 2
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), borderpad=0.3, ncol=columns, handlelength=1, **handles)


def stat(panel: Panel) -> None:
    (one,) = panel.series
    text, colour = shown(one.values[-1], panel.options())
    axes = panel.card(colour if panel.settings["options"]["colorMode"] == "background" else CARD)
    centred = {"ha": "center", "va": "center", "color": "white"}
    axes.text(0.5, 0.48, text, size=17 if len(text) < 11 else 13, weight="bold", **centred)
    if panel.settings["options"].get("textMode") == "value_and_name":
        axes.text(0.5, 0.16, one.name, size=9, **centred)


def time_series(panel: Panel) -> None:
    panel.card()
    axes = panel.over_time(0.75)
    for one, colour in zip(panel.series, cycle(TURN)):
        axes.plot(one.times, one.values, color=colour, label=one.name, linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(UNITS[panel.options().get("unit", "")]))
    axes.grid(color=LINE, linewidth=0.7)
    legend(axes, len(panel.series))


def spans(series: Series, end: datetime) -> Iterator[tuple[float, datetime, datetime]]:
    """Yields each value with its begin and end."""
    changes = [next(run) for _, run in groupby(zip(series.values, series.times), lambda sample: sample[0])]
    for (value, begin), (_, until) in zip(changes, [*changes[1:], (0, end)]):
        yield value, begin, until


def state_timeline(panel: Panel) -> None:
    panel.card()
    axes = panel.over_time(1.55)
    for row, one in enumerate(panel.series):
        for value, begin, end in spans(one, panel.times[1]):
            axes.barh(row, end - begin, 0.75, begin, color=shown(value, panel.options())[1])
    axes.set_yticks(range(len(panel.series)), [one.name for one in panel.series])
    axes.invert_yaxis()
    known = panel.options()["mappings"][0]["options"].values()
    boxes = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[one["color"]], label=one["text"]) for one in known]
    legend(axes, len(boxes), handles=boxes)


def bar_gauge(panel: Panel) -> None:
    panel.card()
    axes = panel.axes(1.3, 0.3, 0.9, 0.5)
    for row, one in enumerate(panel.series):
        text, colour = shown(one.values[-1], panel.options())
        axes.barh(row, panel.options()["max"], 0.6, color=LINE)
        axes.barh(row, one.values[-1], 0.6, color=colour)
        axes.annotate(text, (1, row), (6, 0), ("axes fraction", "data"), "offset points", va="center", color=colour)
    axes.set(xlim=(panel.options()["min"], panel.options()["max"]), xticks=[])
    axes.set_yticks(range(len(panel.series)), [one.name for one in panel.series])
    axes.invert_yaxis()


KINDS = {"stat": stat, "timeseries": time_series, "state-timeline": state_timeline, "bargauge": bar_gauge}


def draw(panels: list[dict[str, Any]], prometheus: Prometheus) -> str:
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(24 * WIDTH, height * HEIGHT))
    times = [datetime.fromtimestamp(at, timezone.utc) for at in (prometheus.begin, prometheus.end)]
    for panel in panels:
        series = [one for target in panel["targets"] for one in prometheus.ask(target)]
        if not series:
            sys.exit(f"{panel['title']}: there are no data")
        KINDS[panel["type"]](Panel(figure, panel, series, (times[0], times[1])))
    picture = io.StringIO()
    figure.savefig(picture, metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    return picture.getvalue()


def main() -> None:
    file, url, *times = sys.argv[1:]
    pyplot.rcParams.update(
        {
            "axes.facecolor": CARD,
            **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
            "figure.facecolor": PAGE,
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 8,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "udplb",
            "text.color": TEXT,
            "xtick.bottom": False,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "ytick.left": False,
        }
    )
    panels = json.loads(Path(file).read_text())["panels"]
    picture = draw(panels, Prometheus(url, *map(int, times)))
    # serialized anew, without the document type, whose address a viewer might load
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    print(ElementTree.tostring(ElementTree.fromstring(picture), encoding="unicode"))


main()
