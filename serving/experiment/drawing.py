"""What the report's plots share: an arm's looks, a figure's frame, the way from matplotlib to an inline SVG."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

SVG = "http://www.w3.org/2000/svg"
# Everything that is not an arm's: drawn in this, then turned into the text's colour, which the page chooses.
INK = "#222831"
# Okabe and Ito's colours, which readers of every colour vision tell apart; the control is the neutral one.
CONTROL_COLOUR = "#6b7480"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Colour is never the only sign: each arm also has its dash, its marker and its hatch.
DASHES = ("5 2", "", "7 2 1.5 2", "1.5 2", "9 3", "4 1.5 1.5 1.5 1.5 1.5")
MARKERS = ("s", "o", "^", "D", "v", "P")
HATCHES = ("", "//", "..", "\\\\", "xx", "++")

Floats = npt.NDArray[np.float64]
Snapshot = Mapping[str, Any]


@dataclass(frozen=True)
class Style:
    """How an arm looks in every plot. ``dash`` is an SVG dash array, empty for a solid line."""

    colour: str
    dash: str
    marker: str
    hatch: str

    @property
    def linestyle(self) -> Any:
        """The dash as matplotlib takes it."""
        return (0, tuple(float(part) for part in self.dash.split())) if self.dash else "-"


Styles = Mapping[str, Style]


@dataclass(frozen=True)
class Plot:
    """One plot of the page.

    ``svg`` is safe to put into HTML as it is; where it is empty, ``missing`` says why there is no plot. ``arms`` are
    those that the plot shows. ``labelled`` says that it names them itself and needs no key, and ``note`` is a sentence
    on what is to be seen.
    """

    name: str
    svg: str = ""
    missing: str = ""
    arms: tuple[str, ...] = ()
    labelled: bool = False
    note: str = ""


def styles(control: str, candidates: Sequence[str]) -> dict[str, Style]:
    """Looks per arm; the control comes first. Colours repeat after the sixth candidate, with other dashes."""
    looks = {control: Style(CONTROL_COLOUR, DASHES[0], MARKERS[0], HATCHES[0])}
    for i, arm in enumerate(candidates):
        step = i + 1 + i // len(COLOURS)
        looks[arm] = Style(
            COLOURS[i % len(COLOURS)], DASHES[step % len(DASHES)], MARKERS[step % len(MARKERS)], HATCHES[step % 6]
        )
    return looks


def number(value: Any) -> float:
    """A JSON value as a float; NaN for what is null or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def interval(value: Any) -> tuple[float, float]:
    """An interval's ends; infinite where it is unbounded or was not given at all."""
    low, high = value if isinstance(value, Sequence) and len(value) == 2 else (None, None)
    low, high = number(low), number(high)
    return (-math.inf if math.isnan(low) else low), (math.inf if math.isnan(high) else high)


@contextmanager
def look() -> Iterator[None]:
    """Matplotlib's settings while a figure is made and written. They are the process's, so one thread at a time."""
    import matplotlib

    settings = {
        "svg.fonttype": "none",  # text stays text: it can be read, searched and copied
        "svg.hashsalt": "stillhouse",  # the same data gives the same bytes
        "text.parse_math": False,  # an arm may be called $x$
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "hatch.linewidth": 0.5,
    }
    settings |= {f"{part}.color": INK for part in ("text", "xtick", "ytick")}
    settings |= {"axes.edgecolor": INK, "axes.labelcolor": INK, "axes.titlecolor": INK}
    with matplotlib.rc_context(settings):
        yield


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row. Sizes in inches; the page scales them to its width."""
    # The object interface: no display, no global state.
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_visible(False)
    grid = made.subplots(rows, columns, squeeze=False, **options)
    for axes in grid.flat:
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.15, color=INK, linewidth=0.6)
        axes.set_axisbelow(True)
    return made, list(grid.flat)


def to_svg(made: Any, name: str, title: str, description: str) -> str:
    """A figure as an ``<svg>`` element that can stand beside others in one page.

    Args:
        name: prefix of all its ids; unique in the page.
        title: its name for a screen reader.
        description: what a reader who cannot see it should know.
    """
    buffer = io.BytesIO()
    made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # A style sheet inside would hold for the whole page.
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name)
    for part, text in (("desc", description), ("title", title)):
        child = ElementTree.Element(f"{{{SVG}}}{part}", {"id": f"{name}-{part}"})
        child.text = text
        root.insert(0, child)
    del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc", "class": "drawing"}
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element, name: str) -> None:
    """Make ids and the references to them the plot's own, and leave ink and fonts to the page."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.attrib[key] = f"{name}-{value}"
        elif key.endswith("}href"):
            del element.attrib[key]
            element.attrib["href"] = value.replace("#", f"#{name}-", 1)
        elif "url(#" in value:
            element.attrib[key] = value.replace("url(#", f"url(#{name}-")
    if style := element.attrib.get("style"):
        element.attrib["style"] = style.replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, sans-serif")


def logarithmic(axes: Any) -> None:
    """Make the x axis logarithmic, with ticks at 1, 2 and 5 that say plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def percent_axis(axis: Any) -> None:
    """Say shares in percent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}\N{NO-BREAK SPACE}%"))


@dataclass(frozen=True)
class Clock:
    """Seconds since 1970 as time since the start, in a unit that fits the whole."""

    started: float
    last: float
    unit: str
    seconds: float

    @classmethod
    def over(cls, started: float, last: float) -> Clock:
        """The clock of what lasted so long."""
        span = last - started
        for unit, seconds, most in (("seconds", 1, 180), ("minutes", 60, 3 * 3600), ("hours", 3600, 3 * 86400)):
            if span <= most:
                return cls(started, last, unit, seconds)
        return cls(started, last, "days", 86400)

    @classmethod
    def of(cls, snapshot: Snapshot) -> Clock:
        """The clock of an experiment, to its end or to the last thing that is known of it."""
        started, ended = number(snapshot["started"]), number(snapshot.get("ended"))
        parts = (snapshot["timeline"], snapshot["traffic"], snapshot["events"])
        known = [number(entry["at"]) for part in parts for entry in part] if math.isnan(ended) else [ended]
        return cls.over(started, max([started, *(at for at in known if not math.isnan(at))]))

    def __call__(self, at: Any) -> float:
        return (number(at) - self.started) / self.seconds

    @property
    def end(self) -> float:
        """Where the time axis ends."""
        return self(self.last) or 1.0

    @property
    def label(self) -> str:
        """What the time axis is called."""
        return f"{self.unit} since the start"


def mark_events(axes: Any, events: Sequence[Mapping[str, Any]], clock: Clock) -> None:
    """A thin line at each event, with the number that it has in the page's list. Call it when the limits are set."""
    low, high = axes.get_xlim()
    nearest = -math.inf
    for count, event in enumerate(events, start=1):
        at = clock(event.get("at"))
        if event.get("what") == "started" or not low <= at <= high:
            continue
        axes.axvline(at, color=INK, linewidth=0.7, linestyle=(0, (1, 2)), alpha=0.7)
        # Numbers on top of each other help nobody.
        if at - nearest > 0.025 * (high - low):
            axes.annotate(
                str(count),
                (at, 1),
                (0, 2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
            nearest = at
