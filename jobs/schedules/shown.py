"""How schedules and nights are shown to a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import typer

from jobs.contexts import Context
from jobs.tables import show_table


def _when(moment: str | None) -> str:
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M %Z") if moment else ""


def show_schedules(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each schedule."""
    shown = [
        (
            row["name"],
            row["family"],
            row["user"],
            row["cron"],
            row["timezone"],
            "paused" if row["paused"] else _when(row["next"]),
            f"{row['last']['state']} {_when(row['last']['due'])}" if row["last"] else "",
        )
        for row in rows
    ]
    show_table(("schedule", "family", "user", "cron", "time zone", "next", "last night"), shown)


def show_facts(answer: Mapping[str, Any]) -> None:
    """All of one schedule, a line for each fact."""
    facts = {key: value for key, value in answer.items() if key not in ("last", "next", "scheduler", "upcoming")}
    rows = [(key, str(value)) for key, value in facts.items() if value is not None]
    rows += [("due", _when(moment)) for moment in answer["upcoming"] if not answer["paused"]]
    if last := answer["last"]:
        rows.append(("last night", f"{last['state']} {_when(last['due'])} {last['detail']}".strip()))
    show_table(("", ""), rows)


def show_nights(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each night."""
    shown = [
        (
            _when(row["due"]),
            row["schedule"],
            row["state"],
            str(row["attempt"]),
            row["took"] or "",
            row["job"] or "",
            row["detail"],
        )
        for row in rows
    ]
    show_table(("due", "schedule", "state", "tries", "took", "job", "what of it"), shown, right=("tries", "took"))


def say_scheduler(answer: Mapping[str, Any], context: Context, begin: bool = False) -> None:
    """Say where a cluster has no scheduler, without which nothing is started; with ``begin`` start one as a job."""
    if answer["scheduler"]:
        return
    if not begin:
        typer.echo("no scheduler runs there: nothing is started until one does; `stillhouse scheduler` beside its head")
        return
    from jobs.schedules.remote import begin_scheduler

    typer.echo(f"there was no scheduler; started one as job {begin_scheduler(context)}")
