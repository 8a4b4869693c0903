"""The result for a terminal, in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from serving.bench.result import ArmResult, BenchResult
from serving.bench.summary import QUANTILES, Summary

_TIMES = {"first_token_ms": "first token", "per_token_ms": "per token", "gaps_ms": "between", "latency_ms": "latency"}

_IN_SECONDS_MS = 10_000.0


def render(result: BenchResult) -> Group:
    """Title, a table of counts, one of times with their 95 % intervals below them, and what one must know."""
    settings = result.settings
    title = Text(f"{settings.url} · {settings.load} · {result.seconds:.1f} s", style="bold")
    parts: list[RenderableType] = [title, _counts(result), _times(result.arms), Text(_pace(result))]
    parts += [Text(f"{count} times {what}", style="red") for what, count in result.errors.items()]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in result.warnings]
    return Group(*parts)


def _counts(result: BenchResult) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    heads = ("answers", "errors", "answers/s", "tokens/s\nin all", "tokens/s\nof one", "tokens in/out\nmean")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for arm in result.arms:
        means = [_mean(arm.prompt_tokens), _mean(arm.completion_tokens)]
        rates = [arm.requests_per_s, arm.total_tokens_per_s, arm.tokens_per_s]
        shown = [f"{rate:.1f}" for rate in rates] if arm.count else ["-"] * 3
        table.add_row(Text(arm.arm), str(arm.count), str(arm.errors), *shown, "/".join(means))
    return table


def _mean(summary: Summary) -> str:
    return f"{summary['mean']:.0f}" if summary else "-"


def _times(arms: list[ArmResult]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold")
    for head in ("mean", *QUANTILES):
        table.add_column(head, justify="right", no_wrap=True)
    for arm in arms:
        table.add_row(Text(arm.arm, style="bold"))
        for metric, label in _TIMES.items():
            summary: Mapping[str, Any] = getattr(arm, metric)
            if summary:
                unit, factor = ("s", 1e-3) if summary["p99"] >= _IN_SECONDS_MS else ("ms", 1.0)
                cells = [_cell(summary, figure, factor) for figure in ("mean", *QUANTILES)]
                table.add_row(f"  {label}, {unit}", *cells)
    return table


def _cell(summary: Mapping[str, Any], figure: str, factor: float) -> Text:
    low, high = summary["intervals"][figure]
    interval = f"{_short(low * factor)}-{'?' if high is None else _short(high * factor)}"
    return Text.assemble(_short(summary[figure] * factor), "\n", (interval, "dim"))


def _short(value: float) -> str:
    """Three digits, but all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _pace(result: BenchResult) -> str:
    pace = result.pace
    asked = "" if pace.asked_per_s is None else f" of {pace.asked_per_s:.3g} asked for"
    late = (
        f"sent late by {_short(pace.late_ms['p50'])} (p50), {_short(pace.late_ms['p99'])} ms (p99); "
        if pace.late_ms
        else ""
    )
    lag = f"event loop late by {_short(pace.loop_lag_ms['p99'])} ms (p99)" if pace.loop_lag_ms else ""
    return f"{pace.answered_per_s:.3g} answers/s{asked}; {late}{lag}".rstrip("; ")
