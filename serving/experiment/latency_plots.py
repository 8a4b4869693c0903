"""The report's plots of how long answers took: how the times spread, and how the estimates came about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.experiment.drawing import (
    Clock,
    Floats,
    Plot,
    Snapshot,
    Styles,
    figure,
    interval,
    logarithmic,
    look,
    mark_events,
    number,
    percent_axis,
    to_svg,
)
from serving.experiment.words import METRICS, STATISTICS, milliseconds

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
# A curve of more points looks the same and makes the page large.
_CURVE_POINTS = 300
# Where the slowest answer takes more than this many times the median's time, a linear axis hides one of the two.
_LONG_TAIL = 4.0
NO_REQUESTS = "No answer has been measured yet."


def distribution(snapshot: Snapshot, styles: Styles, metrics: Sequence[str], name: str) -> Plot:
    """The share of answers that took no longer than a time, per arm; with marks at p50, p95 and p99."""
    columns = {metric: _values(snapshot, metric) for metric in metrics}
    arms = tuple(arm for arm in styles if any(arm in column for column in columns.values()))
    if not arms:
        kept = any(arm.get("values") for arm in snapshot["arms"].values())
        return Plot(name, missing=NO_REQUESTS if kept else "The single times were not kept in this snapshot.")
    with look():
        made, grid = figure(9, 3.6 if len(metrics) == 1 else 3.1, 1, len(metrics))
        for axes, metric in zip(grid, metrics, strict=True):
            tails = []
            for arm, values in columns[metric].items():
                style = styles[arm]
                rank = np.unique(np.linspace(0, len(values) - 1, _CURVE_POINTS).round().astype(int))
                axes.step(
                    values[rank],
                    (rank + 1) / len(values),
                    where="post",
                    color=style.colour,
                    linestyle=style.linestyle,
                    linewidth=1.7,
                )
                marks = [float(np.quantile(values, share)) for share in QUANTILES.values()]
                axes.plot(
                    marks,
                    list(QUANTILES.values()),
                    style.marker,
                    color=style.colour,
                    markersize=6,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    linestyle="",
                )
                tails.append(float(values[-1]) / marks[0] if marks[0] > 0 else 1.0)
            if max(tails, default=1.0) > _LONG_TAIL and min(v[0] for v in columns[metric].values()) > 0:
                logarithmic(axes)
            axes.set_ylim(0, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95])
            percent_axis(axes.yaxis)
            axes.set_xlabel(f"{METRICS[metric]}, ms")
        grid[0].set_ylabel("share of answers")
        svg = to_svg(
            made,
            name,
            f"Distribution of the {' and of the '.join(METRICS[m] for m in metrics)} per arm",
            _told_quantiles(snapshot, metrics, arms),
        )
    return Plot(name, svg, arms=arms)


def estimates_over_time(snapshot: Snapshot, styles: Styles) -> Plot:
    """The deciding statistic and the quantiles as they were seen, with their intervals, at each look."""
    spec, timeline = snapshot["spec"], snapshot["timeline"]
    shown = list(dict.fromkeys((spec["statistic"], *QUANTILES)))
    if not any(_estimates(timeline, arm, name)[1].size for arm in styles for name in shown):
        return Plot("estimates", missing=NO_REQUESTS)
    clock, rows = Clock.of(snapshot), math.ceil(len(shown) / 3)
    with look():
        made, grid = figure(9, 3.1 * rows, rows, math.ceil(len(shown) / rows), sharex=True)
        seen: list[str] = []
        for axes, name in zip(grid, shown, strict=False):
            tops, bottoms = [], []
            for arm, style in styles.items():
                at, estimate, low, high = _estimates(timeline, arm, name)
                if not at.size:
                    continue
                seen.append(arm)
                times = np.array([clock(moment) for moment in at])
                late = slice(len(at) // 4, None)
                tops += [*estimate[late], *high[-1:]]
                bottoms += [*estimate[late], *low[-1:]]
                # An end at infinity is drawn beyond the axis.
                ends = np.nan_to_num(low, neginf=-1e12), np.nan_to_num(high, posinf=1e12)
                axes.fill_between(times, *ends, step="post", color=style.colour, alpha=0.16, linewidth=0)
                axes.plot(
                    times,
                    estimate,
                    color=style.colour,
                    linestyle=style.linestyle,
                    linewidth=1.6,
                    drawstyle="steps-post",
                )
                axes.plot(times[-1:], estimate[-1:], style.marker, color=style.colour, markersize=6, clip_on=False)
            _limits(axes, bottoms, tops)
            axes.set_title(STATISTICS[name] + (" (decides)" if name == spec["statistic"] else ""), fontsize=9.5, pad=12)
            axes.set_xlim(0, clock.end)
            mark_events(axes, snapshot["events"], clock)
        grid[0].set_ylabel(f"{METRICS[spec['metric']]}, ms")
        made.supxlabel(clock.label, fontsize=9)
        arms = tuple(arm for arm in styles if arm in seen)
        svg = to_svg(
            made,
            "estimates",
            f"Estimates of the {METRICS[spec['metric']]} over time, with their intervals",
            _told_quantiles(snapshot, [spec["metric"]], arms),
        )
    return Plot("estimates", svg, arms=arms)


def _values(snapshot: Snapshot, metric: str) -> dict[str, Floats]:
    """Sorted times per arm that has any."""
    columns = {}
    for arm, found in snapshot["arms"].items():
        values = np.array([number(value) for value in (found.get("values") or {}).get(metric) or ()])
        if (values := np.sort(values[np.isfinite(values)])).size:
            columns[arm] = values
    return columns


def _estimates(timeline: Sequence[Mapping[str, Any]], arm: str, name: str) -> tuple[Floats, Floats, Floats, Floats]:
    """Times, estimates and interval ends of one statistic of an arm, at the looks that had an estimate."""
    rows = []
    for entry in timeline:
        triple = (entry["arms"].get(arm) or {}).get(name) or (None, None, None)
        if not math.isnan(number(triple[0])):
            rows.append((number(entry["at"]), number(triple[0]), *interval(triple[1:])))
    at, estimate, low, high = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return at, estimate, low, high


def _limits(axes: Any, bottoms: list[float], tops: list[float]) -> None:
    """Let a y axis show the estimates, and the intervals as they end; the first ones, much wider, run out of it."""
    low, high = min(filter(math.isfinite, bottoms), default=0.0), max(filter(math.isfinite, tops), default=1.0)
    pad = 0.25 * (high - low) or 0.1 * high or 1.0
    axes.set_ylim(max(low - pad, 0.0), high + pad)


def _told_quantiles(snapshot: Snapshot, metrics: Sequence[str], arms: Sequence[str]) -> str:
    """The quantiles in words, for those who cannot see the curves."""
    sentences = []
    for metric in metrics:
        for arm in arms:
            found = (snapshot["arms"].get(arm, {}).get("metrics") or {}).get(metric) or {}
            known = ", ".join(f"{name} {milliseconds(found.get(name))} ms" for name in QUANTILES)
            sentences.append(f"{arm}, {METRICS[metric]}: {known}")
    return "; ".join(sentences)
