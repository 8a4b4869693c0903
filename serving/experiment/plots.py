"""The plots of an experiment's report, each from the snapshot to an SVG or to the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.experiment.drawing import (
    INK,
    Clock,
    Plot,
    Snapshot,
    Style,
    Styles,
    figure,
    interval,
    look,
    mark_events,
    number,
    percent_axis,
    to_svg,
)
from serving.experiment.words import STATISTICS, between, declared, milliseconds, percent, short

# More bars than this show the noise of single seconds and hide the split.
_BARS = 75

# Latency, quality, and the intervals of both.
Point = tuple[float, float, tuple[float, float], tuple[float, float]]


def gains(snapshot: Snapshot, styles: Styles) -> Plot:
    """Each candidate's gain with its interval, as it stands, against the gain that was asked for."""
    spec = snapshot["spec"]
    found = {}
    for arm in spec["candidates"]:
        compared = (snapshot["comparisons"].get(arm) or {}).get(spec["statistic"]) or {}
        if not math.isnan(number(compared.get("gain"))):
            found[arm] = (number(compared["gain"]), interval(compared.get("interval")))
    if not found:
        return Plot("gains", missing="Too few answers to compare the arms.")
    ends = [spec["gain"], 0.0, *(gain for gain, _ in found.values())]
    ends += [end for _, (low, high) in found.values() for end in (max(low, -1.0), min(high, 1.0))]
    pad = 0.08 * (max(ends) - min(ends))
    left, right = min(ends) - pad, max(ends) + pad
    with look():
        made, (axes,) = figure(9, 0.85 + 0.42 * len(found))
        axes.axvspan(spec["gain"], right, color=INK, alpha=0.05, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.axvline(spec["gain"], color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.annotate(
            f"asked for: {declared(spec['gain'])}",
            (spec["gain"], 1),
            (3, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=8,
        )
        for row, (arm, (gain, (low, high))) in enumerate(found.items()):
            style = styles[arm]
            axes.plot([max(low, left), min(high, right)], [row, row], color=style.colour, linewidth=3)
            for end, edge, arrow in ((low, left, "<"), (high, right, ">")):
                inside = left <= end <= right
                axes.plot(
                    [end if inside else edge],
                    [row],
                    "|" if inside else arrow,
                    color=style.colour,
                    markersize=9,
                    markeredgewidth=2,
                    clip_on=False,
                )
            axes.plot([gain], [row], style.marker, color=style.colour, markersize=9, markeredgecolor="white")
        axes.set_yticks(range(len(found)), [short(arm) for arm in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(left, right)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        percent_axis(axes.xaxis)
        axes.set_xlabel(f"how much lower than the control's {STATISTICS[spec['statistic']]} (left of 0: higher)")
        told = "; ".join(
            f"{arm}: {percent(gain)}, interval {between(*ends, percent)}" for arm, (gain, ends) in found.items()
        )
        svg = to_svg(made, "gains", "Gain of each candidate with its interval", told)
    return Plot("gains", svg, arms=tuple(found), labelled=True)


def gain_over_time(snapshot: Snapshot, styles: Styles) -> Plot:
    """Each candidate's gain and its interval at each look, against the gain that was asked for."""
    spec = snapshot["spec"]
    clock, wanted = Clock.of(snapshot), float(spec["gain"])
    with look():
        made, (axes,) = figure(9, 3.3)
        arms, ends, told = [], [0.0, wanted], []
        for arm in spec["candidates"]:
            looks = [(entry["at"], entry["comparisons"].get(arm) or {}) for entry in snapshot["timeline"]]
            known = [(at, look) for at, look in looks if not math.isnan(number(look.get("gain")))]
            if not known:
                continue
            style, times = styles[arm], [clock(at) for at, _ in known]
            gain = [number(look["gain"]) for _, look in known]
            lows, highs = zip(*(interval(look.get("interval")) for _, look in known), strict=True)
            axes.fill_between(
                times,
                np.maximum(lows, -1e6),
                np.minimum(highs, 1e6),
                step="post",
                color=style.colour,
                alpha=0.16,
                linewidth=0,
            )
            axes.plot(times, gain, color=style.colour, linestyle=style.linestyle, linewidth=1.7, drawstyle="steps-post")
            axes.plot(times[-1:], gain[-1:], style.marker, color=style.colour, markersize=7, clip_on=False)
            arms.append(arm)
            ends += [*gain[len(gain) // 4 :], *(end for end in (lows[-1], highs[-1]) if math.isfinite(end))]
            told.append(f"{arm} ends at {percent(gain[-1])}, interval {between(lows[-1], highs[-1], percent)}")
        if not arms:
            return Plot("gain-over-time", missing="Too few answers to compare the arms.")
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.axhline(wanted, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.annotate(
            f"asked for: {declared(wanted)}",
            (1, wanted),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
        )
        pad = 0.35 * (max(ends) - min(ends))
        axes.set_ylim(max(min(ends) - pad, -1.5), min(max(ends) + pad, 1.02))
        axes.set_xlim(0, clock.end)
        percent_axis(axes.yaxis)
        axes.set_ylabel(f"gain in the {STATISTICS[spec['statistic']]}")
        axes.set_xlabel(clock.label)
        mark_events(axes, snapshot["events"], clock)
        svg = to_svg(made, "gain-over-time", "Gain over time with its interval", "; ".join(told))
    return Plot("gain-over-time", svg, arms=tuple(arms))


def quality_and_latency(snapshot: Snapshot, styles: Styles) -> Plot:
    """Distance to the teacher against the median latency, an arm a point, with both intervals."""
    measure, points = _points(snapshot, styles)
    if not points:
        return Plot("quality", missing="No quality was measured: the teacher scored none of the answers.")
    limit = number((snapshot["spec"].get("guards") or {}).get(measure))
    with look():
        made, (axes,) = figure(9, 3.7)
        xs = [end for x, _, ends, _ in points.values() for end in (x, *ends) if math.isfinite(end)]
        ys = [end for _, y, _, ends in points.values() for end in (y, *ends) if math.isfinite(end)]
        ys += [limit] if math.isfinite(limit) else []
        for arm, point in points.items():
            _draw_point(axes, arm, point, styles[arm])
        if math.isfinite(limit):
            axes.axhline(limit, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            what = "most" if measure == "kl" else "least"
            axes.annotate(
                f"at {what} {limit:.3g} allowed",
                (1, limit),
                (-2, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8,
            )
        _spread(axes.set_xlim, xs)
        _spread(axes.set_ylim, ys)
        axes.set_xlabel("median time to the whole answer (p50), ms")
        axes.set_ylabel("KL to the teacher, nats per token" if measure == "kl" else "agreement with the teacher")
        corner = (0.01, 0.03) if measure == "kl" else (0.01, 0.97)
        axes.text(
            *corner,
            "better: faster and closer to the teacher",
            transform=axes.transAxes,
            fontsize=8,
            alpha=0.75,
            va="bottom" if measure == "kl" else "top",
            style="italic",
        )
        told = "; ".join(f"{arm}: {milliseconds(x)} ms, {measure} {y:.3g}" for arm, (x, y, *_) in points.items())
        svg = to_svg(made, "quality", "Quality against latency", told)
    return Plot("quality", svg, arms=tuple(points), labelled=True, note=_undominated(points, measure))


def _draw_point(axes: Any, arm: str, point: Point, style: Style) -> None:
    x, y, across, along = point
    # An unbounded end runs to the edge.
    xerr, yerr = (
        [[min(middle - low, 1e9)], [min(high - middle, 1e9)]] for middle, (low, high) in ((x, across), (y, along))
    )
    axes.errorbar(
        [x],
        [y],
        xerr=xerr,
        yerr=yerr,
        color=style.colour,
        fmt=style.marker,
        markersize=9,
        markeredgecolor="white",
        elinewidth=1.6,
        capsize=3,
    )
    axes.annotate(short(arm), (x, y), (7, 6), textcoords="offset points", fontsize=8.5)


def traffic(snapshot: Snapshot, styles: Styles) -> Plot:
    """Requests per second over time, the arms stacked."""
    buckets = snapshot["traffic"]
    clock = Clock.of(snapshot)
    at = np.array([number(bucket["at"]) for bucket in buckets])
    if not sum(number(count) for bucket in buckets for count in bucket["requests"].values()):
        return Plot("traffic", missing="No request has come in yet.")
    width = float(np.diff(at).min()) if len(at) > 1 else 10.0
    width *= max(1, math.ceil((at[-1] - at[0] + width) / width / _BARS))
    # A bucket without a request may be absent.
    index = np.floor((at - at[0]) / width + 1e-6).astype(int)
    edges = [clock(at[0] + width * i) for i in range(index[-1] + 2)]
    with look():
        made, (axes,) = figure(9, 3.0)
        below, totals = np.zeros(index[-1] + 1), {}
        for arm, style in styles.items():
            counts = np.zeros_like(below)
            np.add.at(counts, index, [bucket["requests"].get(arm, 0) for bucket in buckets])
            totals[arm] = int(counts.sum())
            if not totals[arm]:
                continue
            above = below + counts / width
            axes.stairs(
                above,
                edges,
                baseline=below,
                fill=True,
                facecolor=style.colour,
                edgecolor="white",
                hatch=style.hatch,
                linewidth=0,
            )
            below = above
        axes.set_xlim(0, max(clock.end, edges[-1]))
        axes.set_ylim(0, 1.08 * below.max())
        axes.set_ylabel("requests per second")
        axes.set_xlabel(clock.label)
        mark_events(axes, snapshot["events"], clock)
        told = ", ".join(f"{arm} {count:,} requests" for arm, count in totals.items())
        told += f"; at most {below.max():.3g} per second in all"
        svg = to_svg(made, "traffic", "Traffic over time per arm", told)
    return Plot("traffic", svg, arms=tuple(arm for arm, count in totals.items() if count))


def _points(snapshot: Snapshot, styles: Styles) -> tuple[str, dict[str, Point]]:
    """KL where it was measured, else agreement; and the arms that have it and a latency."""
    scored = {arm: found["quality"] for arm, found in snapshot["arms"].items() if found.get("quality")}
    known = {name for quality in scored.values() for name in quality if not math.isnan(number(quality[name]))}
    measure = "kl" if "kl" in known else "agreement"
    points = {}
    for arm in styles:
        metric = (snapshot["arms"].get(arm, {}).get("metrics") or {}).get("latency_ms") or {}
        x, y = number(metric.get("p50")), number(scored.get(arm, {}).get(measure))
        if not (math.isnan(x) or math.isnan(y)):
            across = interval((metric.get("intervals") or {}).get("p50"))
            points[arm] = (x, y, across, interval(scored[arm].get(f"{measure}_interval")))
    return measure, points


def _undominated(points: Mapping[str, Point], measure: str) -> str:
    """Which arms no other arm beats in both, by the estimates."""
    sign = 1 if measure == "kl" else -1
    best = [
        arm
        for arm, (x, y, *_) in points.items()
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b, *_ in points.values())
    ]
    return f"By the estimates, no arm beats {' or '.join(best)} in both."


def _spread(limits: Any, ends: list[float]) -> None:
    pad = 0.12 * (max(ends) - min(ends)) or 0.2 * abs(ends[0]) or 1.0
    limits(max(min(ends) - pad, 0.0), max(ends) + 1.6 * pad)
