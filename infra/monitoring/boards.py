"""Writes the Grafana boards: `python -m infra.monitoring.boards` after a change here, and commit what it writes.

Grafana's JSON repeats for every panel what is the same in all of them; here a panel is its title, its unit and its
queries. A test runs every query against a real Prometheus and compares the files with what this writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "boards"
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3


@dataclass(frozen=True)
class Panel:
    """A plot over time. ``queries`` are PromQL by the legend that each gets; ``unit`` is one of Grafana's."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""


@dataclass(frozen=True)
class Board:
    """``variable`` is the label that the board is about, and ``values`` the metric that has all of its values."""

    uid: str
    title: str
    variable: str
    values: str
    panels: list[Panel]


_OF = '{family=~"$family"}'


def _counted(counter: str) -> str:
    """A counter of Ray's, which is not there before it has counted something, and 0 until then."""
    return f"{counter}{_OF} or on (family, run) 0 * ray_stillhouse_family_batches{_OF}"


BOARDS = [
    Board(
        "stillhouse-family",
        "Stillhouse: family",
        "family",
        "ray_stillhouse_family_batches",
        [
            Panel(
                "KL to the teacher", "none", {"{{student}}": f"ray_stillhouse_student_kl_nats{_OF}"}, "nats per token"
            ),
            Panel("Loss", "none", {"{{student}}": f"ray_stillhouse_student_loss_nats{_OF}"}, "nats per token"),
            Panel(
                "Progress",
                "percentunit",
                {
                    "{{student}}": f"ray_stillhouse_student_batches{_OF} / on (family, run) group_left "
                    f"ray_stillhouse_family_batches{_OF}"
                },
            ),
            Panel("Tokens per second", "none", {"{{student}}": f"stillhouse:student_tokens:rate1m{_OF}"}),
            Panel(
                "MFU",
                "percentunit",
                {"{{student}}": f"ray_stillhouse_student_mfu{_OF}"},
                "share of the GPUs' bfloat16 peak within a step",
            ),
            Panel(
                "Students that wait for labels",
                "percentunit",
                {"{{student}}": f"stillhouse:student_waiting:ratio1m{_OF}"},
                "share of the time; all near 1: the teacher is too slow",
            ),
            Panel("The teacher waits for", "none", {"{{student}}": f"ray_stillhouse_student_blocks{_OF}"}),
            Panel(
                "Behind the fastest", "none", {"{{student}}": f"ray_stillhouse_student_behind_batches{_OF}"}, "batches"
            ),
            Panel(
                "Window",
                "none",
                {
                    "may be ready ahead": f"ray_stillhouse_window_batches{_OF}",
                    "held": f"ray_stillhouse_window_used_batches{_OF}",
                    "not yet in the store": f"ray_stillhouse_unsaved_batches{_OF}",
                },
                "batches",
            ),
            Panel("Labels that the store had", "percentunit", {"{{family}}": f"stillhouse:store_hits:ratio5m{_OF}"}),
        ],
    ),
    Board(
        "stillhouse-pool",
        "Stillhouse: teacher pool",
        "family",
        "ray_stillhouse_family_batches",
        [
            Panel("Replicas that serve", "none", {"{{family}}": f"ray_stillhouse_replicas_ready{_OF}"}),
            Panel("Tokens per second", "none", {"{{family}}": f"stillhouse:teacher_tokens:rate1m{_OF}"}),
            Panel(
                "Replicas at work",
                "none",
                {"{{family}}": f"rate(ray_stillhouse_replica_busy_seconds_total{_OF}[1m])"},
                "replicas that score at the same time, on average",
            ),
            Panel(
                "MFU",
                "percentunit",
                {"{{family}}": f"ray_stillhouse_teacher_mfu{_OF}"},
                "share of the GPUs' bfloat16 peak while a replica scores",
            ),
            Panel("Label bytes per second", "Bps", {"{{family}}": f"rate(ray_stillhouse_label_bytes_total{_OF}[1m])"}),
            Panel("Restarts", "none", {"{{family}}": _counted("ray_stillhouse_replica_restarts_total")}),
            Panel("Batches scored again", "none", {"{{family}}": _counted("ray_stillhouse_batches_rescored_total")}),
        ],
    ),
    Board(
        "stillhouse-experiment",
        "Stillhouse: endpoint and experiment",
        "arm",
        "stillhouse_arm_weight",
        [
            Panel("Requests per second", "reqps", {"{{arm}}": 'stillhouse:requests:rate1m{arm=~"$arm"}'}),
            Panel("Share of the split", "none", {"{{arm}}": 'stillhouse_arm_weight{arm=~"$arm"}'}, "weights"),
            Panel("Errors", "percentunit", {"{{arm}}": 'stillhouse:errors:ratio5m{arm=~"$arm"}'}),
            Panel(
                "Time to the first token, p95", "s", {"{{arm}}": 'stillhouse:first_token_seconds:p95_5m{arm=~"$arm"}'}
            ),
            Panel(
                "Whole answers",
                "s",
                {
                    "{{arm}} p50": 'stillhouse:latency_seconds:p50_5m{arm=~"$arm"}',
                    "{{arm}} p95": 'stillhouse:latency_seconds:p95_5m{arm=~"$arm"}',
                },
            ),
            Panel(
                "Tokens per second",
                "none",
                {"{{arm}} {{side}}": 'sum by (arm, side) (rate(stillhouse_tokens_total{arm=~"$arm"}[1m]))'},
            ),
            Panel("Arms that have failed", "none", {"{{arm}}": 'stillhouse_arm_out{arm=~"$arm"}'}),
            Panel("Experiment under way", "none", {"{{experiment}}": "stillhouse_experiment_running"}),
            Panel(
                "Decisions",
                "none",
                {"{{experiment}}: {{outcome}}": "stillhouse_experiment_decisions_total"},
                "what they rest on is in the report: stillhouse ab report URL",
            ),
        ],
    ),
]


def as_json(board: Board) -> dict[str, Any]:
    """The board as Grafana imports it."""
    source = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    chosen = {
        "name": board.variable,
        "type": "query",
        "datasource": _SOURCE,
        "query": f"label_values({board.values}, {board.variable})",
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }
    return {
        "uid": board.uid,
        "title": board.title,
        "tags": ["stillhouse"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, chosen]},
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def text(board: Board) -> str:
    """What its file holds."""
    return json.dumps(as_json(board), indent=2) + "\n"


if __name__ == "__main__":
    for each in BOARDS:
        (FOLDER / f"{each.uid.removeprefix('stillhouse-')}.json").write_text(text(each))
