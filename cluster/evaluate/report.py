"""The family report: one HTML page that needs nothing beside it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cluster.board import Point
from cluster.evaluate.gate import SAID
from cluster.evaluate.result import FamilyResult
from cluster.spec import FamilySpec


def write_report(
    spec: FamilySpec, result: FamilyResult, serving: Sequence[Mapping[str, Any]], environment: Mapping[str, str]
) -> Path:
    """Write the report into the run's folder.

    Args:
        serving: one row per arm as the load generator gives it; empty when nothing was served.
        environment: what the run ran on, names to values.

    Returns:
        The page's path.
    """
    loader = jinja2.PackageLoader("cluster.evaluate", ".")
    page = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    html = page.get_template("report.html.j2").render(
        spec=spec,
        result=result,
        said=SAID,
        students=[result.students[name] for name in spec.students if name in result.students],
        curves=_curves(result.points),
        fidelity=_fidelity_bars(result),
        serving=serving,
        environment=environment,
        resolved=spec.model_dump_json(indent=2),
    )
    path = result.run.report_path
    path.write_text(html, encoding="utf-8")
    return path


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # The object interface: no display, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _curves(points: list[Point]) -> str:
    """KL to the teacher on the training batches, by batch; an SVG, empty when nothing was learnt in this session."""
    if not points:
        return ""
    figure, axes = _figure(8, 3.2)
    for student in dict.fromkeys(point.student for point in points):
        own = [point for point in points if point.student == student]
        axes.plot([p.batch for p in own], [p.metrics["kl"] for p in own], label=student, linewidth=1.6)
    axes.set_xlabel("batches learnt")
    axes.set_ylabel("KL to the teacher, nats per token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _fidelity_bars(result: FamilyResult) -> str:
    """Held-out KL before and after, per student."""
    if not result.students:
        return ""
    figure, axes = _figure(5, 2.8)
    for offset, (when, colour) in enumerate((("before", "#c9c9c9"), ("after", "#3a6ea5"))):
        heights = [getattr(student, when).kl for student in result.students.values()]
        bars = axes.bar([i + 0.38 * offset for i in range(len(heights))], heights, 0.36, label=when, color=colour)
        axes.bar_label(bars, fmt="%.2f", padding=2)
    axes.set_xticks([i + 0.19 for i in range(len(result.students))], list(result.students))
    axes.set_ylabel("held-out KL, nats per token")
    axes.legend(frameon=False)
    return _svg(figure)
