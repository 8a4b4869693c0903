"""`stillhouse runs`: what the folders of runs take on the disk, and what of it may go."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

import typer

from cluster.errors import UserError
from cluster.runs import KeptRun, find_run, kept_runs, leftovers, remove_run
from cluster.space import size_of
from jobs.labels import parse_age, parse_size, show_size
from jobs.tables import show_table


def list_runs(as_json: bool) -> None:
    """Print the runs under the Stillhouse home, the longest unused first."""
    found = kept_runs()
    if as_json:
        typer.echo(json.dumps([{**asdict(run), "folder": str(run.folder), "name": run.name} for run in found]))
        return
    rows = [
        (
            *(run.name, run.family, run.state, _age(run), show_size(run.size), show_size(run.frees)),
            ", ".join(f"{name} v{version}" for name, version in run.registered.items()),
        )
        for run in found
    ]
    columns = ("run", "family", "state", "age", "size", "frees", "registered")
    show_table(columns, rows, right=("age", "size", "frees"))


def remove_runs(names: Sequence[str]) -> None:
    """Remove runs by name or folder; none of them where one must stay.

    Raises:
        UserError: one is not there, is running, or is named by the spec of an unfinished run.
    """
    wanted = {find_run(name).resolve() for name in names}
    going = [run for run in kept_runs() if run.folder.resolve() in wanted]
    if len(going) < len(wanted):
        raise UserError(f"{', '.join(names)}: give runs under the Stillhouse home, see `stillhouse runs ls`")
    for run in going:
        if run.in_use:
            raise UserError(f"{run.name} cannot be removed: {run.in_use}")
    for run in going:
        remove_run(run.folder)
        lost = f"; {', '.join(run.only_copies)} was never registered and is gone" if run.only_copies else ""
        typer.echo(f"removed {run.name}, {show_size(run.frees)}; what it has in MLflow stays{lost}")


def collect(older_than: str | None, max_size: str | None, dry_run: bool) -> None:
    """Remove runs that are old or too much, the longest unused first, and print what went and what had to stay.

    Raises:
        UserError: neither limit, or one that cannot be read.
    """
    if older_than is None and max_size is None:
        raise UserError("runs gc: give --older-than AGE, --max-size SIZE or both")
    age_s = parse_age(older_than).total_seconds() if older_than is not None else None
    at_most = parse_size(max_size) if max_size is not None else None
    runs, removed = kept_runs(), 0
    total = sum(run.frees for run in runs)
    did = "would remove" if dry_run else "removed"
    for run in runs:
        too_old = age_s is not None and time.time() - run.used > age_s
        if not too_old and (at_most is None or total <= at_most):
            continue
        if run.needed:
            typer.echo(f"left {run.name}, {show_size(run.frees)}: {run.needed}")
            continue
        if not dry_run:
            remove_run(run.folder)
        total, removed = total - run.frees, removed + 1
        typer.echo(f"{did} {run.name}, {show_size(run.frees)}")
    for folder in leftovers():
        typer.echo(f"{did} {folder}, {show_size(size_of(folder))}, which is no run")
        if not dry_run:
            remove_run(folder)
    typer.echo(f"{did} {removed} of {len(runs)} runs; {show_size(total)} left")


def _age(run: KeptRun) -> str:
    """How long it has not been written to, in days, hours or minutes."""
    seconds = max(0.0, time.time() - run.used)
    for unit, length in (("d", timedelta(days=1)), ("h", timedelta(hours=1))):
        if seconds >= length.total_seconds():
            return f"{seconds // length.total_seconds():.0f}{unit}"
    return f"{seconds // 60:.0f}m"
