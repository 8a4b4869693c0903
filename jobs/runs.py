"""`stillhouse runs`: what the folders of runs take on the disk, and what of it may go."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import typer

from cluster.errors import RunError, UserError
from cluster.kept_runs import KeptRun, kept_runs, leftovers, remove_run, strings_in
from cluster.runs import find_run, runs_folder
from cluster.specfile import home
from jobs.labels import parse_age, parse_size, show_size
from jobs.tables import show_table


def list_runs(as_json: bool) -> None:
    """Print the runs under the Stillhouse home, the longest unused first."""
    found = kept_runs(_needed_by_schedules())
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
    if not rows:
        typer.echo(
            f"no runs in {runs_folder()}; those of a cluster's jobs lie under the Stillhouse home of its head "
            f"(`make up`: $STILLHOUSE_HOME/stack/home): set STILLHOUSE_HOME to it there",
            err=True,
        )


def remove_runs(names: Sequence[str]) -> None:
    """Remove runs by name or folder; none of them where one must stay.

    Raises:
        UserError: one is not there, is running, or is needed by an unfinished run or a schedule.
    """
    wanted = {find_run(name).resolve() for name in names}
    going = [run for run in kept_runs(_needed_by_schedules()) if run.folder.resolve() in wanted]
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
    runs, removed = kept_runs(_needed_by_schedules()), 0
    total = sum(run.frees for run in runs)
    did = "would remove" if dry_run else "removed"
    for run in runs:
        too_old = age_s is not None and time.time() - run.used > age_s
        if not too_old and (at_most is None or total <= at_most):
            continue
        if reason := run.needed or ("" if dry_run else _not_removed(run.folder)):
            typer.echo(f"left {run.name}, {show_size(run.frees)}: {reason}")
            continue
        total, removed = total - run.frees, removed + 1
        typer.echo(f"{did} {run.name}, {show_size(run.frees)}")
    for folder, size in leftovers():
        if reason := "" if dry_run else _not_removed(folder):
            typer.echo(f"left {folder}, {show_size(size)}: {reason}")
        else:
            typer.echo(f"{did} {folder}, {show_size(size)}, which is no run")
    typer.echo(f"{did} {removed} of {len(runs)} runs; {show_size(total)} left")


def _not_removed(folder: Path) -> str:
    """Remove a folder; why that could not be done, such as a run that has just been resumed."""
    try:
        remove_run(folder)
    except RunError as error:
        return str(error)
    except OSError as error:
        return f"it could not be removed: {error}"
    return ""


def _needed_by_schedules() -> dict[str, list[str]]:
    """What the schedules of this home need: the strings of their specs, and the runs that their nights continue.

    Raises:
        RunError: their database cannot be read.
    """
    if not os.environ.get("STILLHOUSE_DATABASE") and not (home() / "schedules.db").exists():
        return {}
    from jobs.schedules.ledger import Ledger
    from jobs.schedules.plan import OPEN
    from jobs.schedules.scheduler import spec_in

    ledger = Ledger()
    needed = {f"the schedule {each.schedule.name}": strings_in(spec_in(each.package)) for each in ledger.entries()}
    for night in ledger.nights(states=OPEN):
        if night.run is not None:
            with contextlib.suppress(UserError):  # it is gone, or on another machine
                needed[f"the night of {night.due.isoformat()} of {night.schedule}"] = [
                    str(find_run(night.run).resolve())
                ]
    return needed


def _age(run: KeptRun) -> str:
    """How long it has not been written to, in days, hours or minutes."""
    seconds = max(0.0, time.time() - run.used)
    for unit, length in (("d", timedelta(days=1)), ("h", timedelta(hours=1))):
        if seconds >= length.total_seconds():
            return f"{seconds // length.total_seconds():.0f}{unit}"
    return f"{seconds // 60:.0f}m"
