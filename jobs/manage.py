"""`stillhouse jobs`: the families that were submitted to a cluster."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import tenacity
import typer

from cluster.errors import RunError
from jobs.client import connect, job_of, state_of
from jobs.contexts import Context
from jobs.follow import ENDED, follow, say
from jobs.submit import FAMILY, STOP_S, USER
from jobs.tables import show_table

# How a line of progress begins, such as ``[3:20] distilling | ...``.
PROGRESS = "["


def list_jobs(context: Context, as_json: bool) -> None:
    """Print the families that were submitted to a cluster, the latest first."""
    client = connect(context)
    found = [info for info in client.list_jobs() if FAMILY in (info.metadata or {})]
    found.sort(key=lambda info: info.start_time or 0, reverse=True)
    if as_json:
        typer.echo(json.dumps([_facts(info) for info in found]))
        return
    rows = [
        (info.submission_id, info.metadata[FAMILY], info.metadata.get(USER, ""), state_of(info), _took(info))
        for info in found
    ]
    show_table(("job", "family", "user", "state", "took"), rows, right=("took",))


def show_job(context: Context, job: str) -> None:
    """Print what is known of one job, and how far it has come."""
    client = connect(context)
    info = job_of(client, job)
    rows = [(name, str(value)) for name, value in _facts(info).items() if value not in (None, "")]
    lines = [line for line in client.get_job_logs(job).splitlines() if line.strip()]
    if progress := [line for line in lines if line.startswith(PROGRESS)]:
        rows.append(("progress", progress[-1]))
    if lines and state_of(info) in ENDED:
        rows.append(("last line", lines[-1]))
    show_table(("", ""), rows)


def show_logs(context: Context, job: str, on: bool) -> int:
    """Print a job's log, and with ``on`` go on until it ends. Returns the exit code, see :func:`follow`."""
    client = connect(context)
    job_of(client, job)
    if on:
        return follow(client, job)
    typer.echo(client.get_job_logs(job), nl=False)
    return 0


def stop_job(context: Context, job: str) -> None:
    """Tell a job to end and wait until it has.

    Raises:
        RunError: it has not ended in time.
    """
    client = connect(context)
    if (state := state_of(job_of(client, job))) in ENDED:
        say(f"{job} has ended before: {state}")
        return
    client.stop_job(job)
    try:
        tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda now: now not in ENDED),
            wait=tenacity.wait_fixed(1.0),
            stop=tenacity.stop_after_delay(STOP_S + 30),
        )(lambda: state_of(job_of(client, job)))
    except tenacity.RetryError:
        raise RunError(f"{job} has not ended {STOP_S + 30:g} s after it was told to; try again") from None
    say(f"{job} {state_of(job_of(client, job))}; go on with: stillhouse submit FAMILY.yaml --resume")


def _facts(info: Any) -> dict[str, Any]:
    facts = {"job": info.submission_id, "state": state_of(info), "took": _took(info), "message": info.message}
    times = {"started": _when(info.start_time), "ended": _when(info.end_time)}
    named = {name.removeprefix("stillhouse."): value for name, value in (info.metadata or {}).items()}
    return {**named, **facts, **times, "exit code": info.driver_exit_code}


def _when(milliseconds: int | None) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if milliseconds else ""


def _took(info: Any) -> str:
    if not info.start_time:
        return ""
    end = info.end_time or datetime.now(UTC).timestamp() * 1000
    return str(timedelta(seconds=max(0, round((end - info.start_time) / 1000))))
