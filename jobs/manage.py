"""`stillhouse jobs`: the families that were submitted to a cluster."""

from __future__ import annotations

import getpass
import json
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import tenacity
import typer

from cluster.errors import RunError, UserError
from cluster.queue.user import VARIABLE
from jobs.client import connect, job_of, log_of, state_of
from jobs.contexts import Context
from jobs.follow import ENDED, follow, say
from jobs.lines import last_line, progress_in, run_in
from jobs.submit import FAMILY, STOP_S, USER, job_id, start_job
from jobs.tables import show_table

# Of those that have ended, only so many are asked how far they came.
ASKED = 20


def list_jobs(context: Context, as_json: bool) -> None:
    """Print the families that were submitted to a cluster, the latest first."""
    client = connect(context)
    found = [info for info in client.list_jobs() if FAMILY in (info.metadata or {})]
    found.sort(key=lambda info: info.start_time or 0, reverse=True)
    asked = [info for info in found if state_of(info) not in ENDED]
    asked += [info for info in found if state_of(info) in ENDED][:ASKED]
    progress = {info.submission_id: progress_in(log_of(client, info.submission_id)) for info in asked}
    if as_json:
        typer.echo(json.dumps([{**_facts(info), "progress": progress.get(info.submission_id)} for info in found]))
        return
    rows = [
        (
            info.submission_id,
            info.metadata[FAMILY],
            info.metadata.get(USER, ""),
            state_of(info),
            _when(info.start_time),
            _took(info),
            progress.get(info.submission_id) or "",
        )
        for info in found
    ]
    show_table(("job", "family", "user", "state", "started", "took", "progress"), rows, right=("took",))


def show_job(context: Context, job: str) -> None:
    """Print what is known of one job, and how far it has come."""
    client = connect(context)
    info = job_of(client, job)
    rows = [(name, str(value)) for name, value in _facts(info).items() if value not in (None, "")]
    said = log_of(client, job)
    if run := run_in(said):
        rows.append(("run", run))
    if progress := progress_in(said):
        rows.append(("progress", progress))
    if said and state_of(info) in ENDED:
        rows.append(("last line", last_line(said)))
    show_table(("", ""), rows)


def show_logs(context: Context, job: str, on: bool) -> int:
    """Print a job's log, and with ``on`` follow it until it ends. Returns the exit code, see :func:`follow`."""
    client = connect(context)
    job_of(client, job)
    if on:
        return follow(client, job)
    try:
        typer.echo(client.get_job_logs(job), nl=False)
    except RuntimeError as error:
        raise RunError(f"the log of {job} cannot be had: {str(error).splitlines()[0]}") from None
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
    say(f"{job} {state_of(job_of(client, job))}; resume it with: stillhouse jobs resume {job}")


def resume_job(context: Context, job: str, overrides: Sequence[str], name: str | None, on: bool) -> int:
    """Resume the run of a job that has ended, as a new job, from its students' last checkpoints.

    The run keeps its spec and the text that it has read, so nothing is shipped.

    Args:
        overrides: of fields that a resumed run may change, such as ``students.small.ranks=1``.
        name: the new job's id.
        on: show its log until it ends.

    Returns:
        The exit code, see :func:`~jobs.follow.follow`.

    Raises:
        UserError: it has not ended, or never began a run.
        RunError: the cluster refuses it.
    """
    client = connect(context)
    info = job_of(client, job)
    if (state := state_of(info)) not in ENDED:
        raise UserError(f"{job} is {state}; there is nothing to resume before it has ended")
    run = run_in(log_of(client, job))
    family = (info.metadata or {}).get(FAMILY)
    if run is None or family is None:
        raise UserError(f"{job} began no run that could be resumed; see `stillhouse jobs logs {job}`")
    new = job_id(name, family)
    start_job(
        client,
        job=new,
        command=" ".join(["run", run, "--resume", *(f"--set {shlex.quote(each)}" for each in overrides)]),
        folder=None,
        family=family,
        user=getpass.getuser(),
        # It is in the queue under the name of whoever resumes it.
        variables={
            key: value for key, value in (info.runtime_env or {}).get("env_vars", {}).items() if key != VARIABLE
        },
    )
    say(f"submitted {new}: resumes {run}")
    if not on:
        say(f"follow it with: stillhouse jobs logs {new} --follow")
        return 0
    return follow(client, new)


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
