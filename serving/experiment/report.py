"""The report of an experiment: one HTML page that needs nothing beside it, neither the tool nor a network.

A snapshot holds names that other people chose. The template escapes all of them, the plots carry them as text only,
and the page's own policy forbids scripts and every request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from serving.experiment import latency_plots, plots, words
from serving.experiment.drawing import Clock, Plot, Style, interval, number, styles

# Control characters have no place in a page; those that turn the direction of text would let a name disguise itself.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_MARKS = {
    "o": '<circle cx="14" cy="6" r="4"/>',
    "s": '<rect x="10.5" y="2.5" width="7" height="7"/>',
    "^": '<path d="M14 1.5 18.5 10h-9z"/>',
    "D": '<path d="M14 1 19 6 14 11 9 6z"/>',
    "v": '<path d="M14 10.5 18.5 2h-9z"/>',
    "P": '<path d="M12 1h4v3h3v4h-3v3h-4V8H9V4h3z"/>',
}


@dataclass(frozen=True)
class Cell:
    """One figure of the table, with the interval around it where it has one."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """One measure of all arms; ``group`` is what it measures. ``decides`` marks what the experiment compares."""

    name: str
    cells: list[Cell]
    group: str = ""
    decides: bool = False


def render(snapshot: Mapping[str, Any]) -> str:
    """The report's HTML.

    Args:
        snapshot: an experiment's snapshot, best with all single times (``values=True``); without them the page has no
            distributions.
    """
    snapshot = _cleaned(snapshot)
    spec = snapshot["spec"]
    looks = styles(spec["control"], spec["candidates"])
    focus = words.in_focus(snapshot)
    gain, ends = words.gain_of(snapshot, focus)
    started, ended = number(snapshot["started"]), snapshot.get("ended")
    loader = jinja2.PackageLoader("serving.experiment", ".")
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {"svg": lambda plot: Markup(plot.svg), "declared": words.declared}
    return page.get_template("report.html.j2").render(
        spec=spec,
        snapshot=snapshot,
        verdict=words.verdict(snapshot),
        focus=focus,
        gain=gain,
        gain_text=f"{words.percent(abs(gain))} {'lower' if gain >= 0 else 'higher'}"
        if gain == gain
        else "Not known yet",
        gain_interval=words.between(*ends, words.percent),
        standing=words.standing(ends, spec["gain"]),
        quality=words.quality_of(snapshot, focus),
        error_rates=words.error_rates(snapshot, focus),
        candidates=words.candidate_rows(snapshot),
        metric=words.METRICS[spec["metric"]],
        statistic=words.STATISTICS[spec["statistic"]],
        requests=words.count(sum(number(arm.get("requests")) for arm in snapshot["arms"].values())),
        started=words.moment(started),
        ended=words.moment(ended) if ended else "",
        lasted=words.lasted(Clock.of(snapshot).last - started),
        keys={arm: _key(style) for arm, style in looks.items()},
        plots={plot.name: plot for plot in _plots(snapshot, looks)},
        arms=[arm for arm in looks if arm in snapshot["arms"]],
        rows=_table(snapshot, [arm for arm in looks if arm in snapshot["arms"]]),
        events=[_event(event, started) for event in snapshot["events"]],
        resolved=json.dumps(spec, indent=2, ensure_ascii=False),
    )


def _plots(snapshot: Mapping[str, Any], looks: Mapping[str, Style]) -> list[Plot]:
    metric = snapshot["spec"]["metric"]
    others = [other for other in words.METRICS if other != metric]
    return [
        plots.gains(snapshot, looks),
        latency_plots.distribution(snapshot, looks, [metric], "distribution"),
        latency_plots.distribution(snapshot, looks, others, "distribution-others"),
        latency_plots.estimates_over_time(snapshot, looks),
        plots.gain_over_time(snapshot, looks),
        plots.quality_and_latency(snapshot, looks),
        plots.traffic(snapshot, looks),
    ]


def _key(style: Style) -> Markup:
    """An arm's line and marker, to stand before its name."""
    line = Markup('<line x1="0" y1="6" x2="28" y2="6" stroke="{}" stroke-width="2" stroke-dasharray="{}"/>')
    mark = Markup(_MARKS[style.marker].replace("/>", f' fill="{style.colour}"/>'))
    return Markup('<svg class="key" viewBox="0 0 28 12" aria-hidden="true">{}{}</svg>').format(
        line.format(style.colour, style.dash or "none"), mark
    )


def _table(snapshot: Mapping[str, Any], names: Sequence[str]) -> list[Row]:
    """All measures, a row each, an arm a column."""
    spec, arms = snapshot["spec"], [snapshot["arms"][name] for name in names]
    rows = [
        Row("requests", [Cell(words.count(arm.get("requests"))) for arm in arms], "traffic"),
        Row("errors", [_errors(arm) for arm in arms], "traffic"),
    ]
    for metric, said in (*words.METRICS.items(), ("completion_tokens", "output length, tokens")):
        group = said if metric == "completion_tokens" else f"{said}, ms"
        for statistic in ("p50", "p95", "p99", "mean"):
            found = [(arm.get("metrics") or {}).get(metric) or {} for arm in arms]
            decides = (metric, statistic) == (spec["metric"], spec["statistic"])
            rows.append(Row(words.STATISTICS[statistic], [_measured(f, statistic) for f in found], group, decides))
    return rows + _work_and_quality(arms)


def _work_and_quality(arms: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows, group = [], "work and cost"
    rows.append(Row("tokens per second", [Cell(words.plain(arm.get("tokens_per_s"))) for arm in arms], group))
    rows.append(Row("output tokens", [Cell(words.count(arm.get("completion_tokens"))) for arm in arms], group))
    if any(arm.get("cost") is not None for arm in arms):
        rows.append(Row("cost", [Cell(words.plain(arm.get("cost"))) for arm in arms], group))
        rows.append(Row("cost per million output tokens", [Cell(_per_million(arm)) for arm in arms], group))
    if any(arm.get("quality") for arm in arms):
        group = "quality, as the teacher sees it"
        qualities = [arm.get("quality") or {} for arm in arms]
        rows.append(Row("answers scored", [Cell(words.count(q.get("answers"))) for q in qualities], group))
        for name, said, say in (
            ("kl", "KL, nats per token", words.plain),
            ("agreement", "agreement", words.percent),
        ):
            cells = [Cell(say(q.get(name)), words.around(q, name, f"{name}_interval", say)) for q in qualities]
            rows.append(Row(said, cells, group))
    return rows


def _measured(metric: Mapping[str, Any], statistic: str) -> Cell:
    found = {"estimate": metric.get(statistic), "ends": (metric.get("intervals") or {}).get(statistic)}
    return Cell(words.milliseconds(found["estimate"]), words.around(found, "estimate", "ends", words.milliseconds))


def _errors(arm: Mapping[str, Any]) -> Cell:
    rate = arm.get("error_rate") or {}
    said = words.count(arm.get("errors"))
    if rate.get("estimate") is not None:
        said += f" ({words.percent(rate['estimate'])})"
    return Cell(said, words.around(rate, "estimate", "interval", words.percent))


def _per_million(arm: Mapping[str, Any]) -> str:
    tokens = number(arm.get("completion_tokens"))
    return words.plain(1e6 * number(arm.get("cost")) / tokens if tokens > 0 else None)


def _event(event: Mapping[str, Any], started: float) -> dict[str, Any]:
    after = number(event.get("at")) - started
    return {
        "when": f"after {words.lasted(after)}" if after >= 1 else "at the start",
        "at": words.moment(event.get("at")),
        "what": str(event.get("what", "")).replace("_", " "),
        "text": str(event.get("text", "")),
        "evidence": [(name, _told(value)) for name, value in _flat("", event.get("evidence") or {})],
        "decision": event.get("what") == "decision",
    }


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Nested evidence as lines of dotted names and values."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [line for key, inner in value.items() for line in _flat(f"{name}.{key}" if name else str(key), inner)]


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float | None) for v in value):
        low, high = interval(value)
        return words.between(low, high, lambda end: f"{end:.4g}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cleaned(value: Any) -> Any:
    """The same without characters that are not seen, in names as in values."""
    if isinstance(value, str):
        return _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {_cleaned(key): _cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        # The single times are many, and numbers are clean.
        return [_cleaned(inner) if isinstance(inner, str | Mapping | list | tuple) else inner for inner in value]
    return value
