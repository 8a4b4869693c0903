"""The laptop's side of `stillhouse schedule`: a request goes to the cluster as a small job, its answer comes back.

Only the job server is open to a laptop, with its token; so schedules need no further port and no further secret.
"""

from __future__ import annotations

import getpass
import json
import secrets
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tenacity

from cluster.dates import OPENS
from cluster.errors import RunError, UserError
from cluster.spec import FamilySpec
from jobs.client import connect, job_of, log_of, state_of
from jobs.contexts import Context
from jobs.follow import ENDED
from jobs.lines import last_line
from jobs.schedules import ANSWER
from jobs.schedules.plan import Schedule
from jobs.submit import environment_of, pack, submit_patiently, uploaded

# A job starts in seconds; a cluster on which one does not has no process to spare.
ANSWER_S = 120.0
# How long a scheduler that was just started may take to say so.
BEGIN_S = 60.0
LOOK_S = 0.3


def ask(context: Context, request: str, folder: Path | None = None, **fields: Any) -> dict[str, Any]:
    """The cluster's answer to a request, see :mod:`jobs.schedules.desk`.

    Args:
        folder: files that go with it.

    Raises:
        UserError: the request was a mistake.
        RunError: the cluster cannot be reached, or did not answer.
    """
    client = connect(context)
    job = f"stillhouse-desk-{secrets.token_hex(6)}"
    asked = json.dumps({"request": request, **fields})
    submit_patiently(
        client,
        submission_id=job,
        entrypoint=f"python -m jobs.schedules.desk {shlex.quote(asked)}",
        runtime_env={} if folder is None else {"working_dir": str(folder)},
    )
    try:
        _wait_until_ended(client, job, context)
        said = log_of(client, job)
    finally:
        _forget(client, job)
    line = next((line for line in said.splitlines() if line.startswith(ANSWER)), None)
    if line is None:
        raise RunError(f"{context.address} did not answer: {last_line(said)}; is stillhouse[train] installed there?")
    answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
    if "error" in answer:
        raise (UserError if answer["exit_code"] == UserError.exit_code else RunError)(answer["error"])
    return answer


def _wait_until_ended(client: Any, job: str, context: Context) -> None:
    try:
        tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda state: state not in ENDED),
            wait=tenacity.wait_fixed(LOOK_S),
            stop=tenacity.stop_after_delay(ANSWER_S),
        )(lambda: state_of(job_of(client, job)))
    except tenacity.RetryError:
        client.stop_job(job)
        raise RunError(f"{context.address} has not answered for {ANSWER_S:g} s; see whether it is overloaded") from None


def _forget(client: Any, job: str) -> None:
    """The list of jobs is for families."""
    try:
        client.delete_job(job)
    except RuntimeError:  # it has not ended
        return


def add_schedule(
    schedule: Schedule,
    spec: FamilySpec,
    context: Context,
    env: Sequence[str],
    snapshot: bool = False,
) -> dict[str, Any]:
    """Ship a family with its small local files, to be run by a schedule from now on.

    Args:
        snapshot: whether every run may read the local files as they are now.

    Raises:
        UserError: the spec, a file it names or a variable cannot be used, or its text would never change.
        RunError: the cluster cannot be reached.
    """
    _check_text(spec, snapshot)
    variables = environment_of(env)
    with tempfile.TemporaryDirectory(prefix="stillhouse-schedule-") as folder:
        pack(spec, Path(folder), context)
        return ask(
            context,
            "add",
            Path(folder),
            definition=schedule.model_dump(),
            family=spec.name,
            user=getpass.getuser(),
            variables=variables,
        )


def _check_text(spec: FamilySpec, snapshot: bool) -> None:
    """Refuse local files that would be uploaded once and read by every run of a schedule."""
    allowed = "name s3:// paths, or set corpus.upload: false where the cluster has them under the same path"
    for path in uploaded(spec):
        if OPENS in path:
            raise UserError(
                f"corpus.paths: {path} has a date macro, but files of this machine are uploaded once, now; {allowed}"
            )
        if not snapshot:
            raise UserError(
                f"corpus.paths: {path} is on this machine and would be uploaded once, so every run would read the same "
                f"text; {allowed}, or accept the snapshot with --snapshot"
            )


def begin_scheduler(context: Context) -> str:
    """Start a scheduler on the cluster as a job, for one that has none; returns the job's id.

    Raises:
        RunError: the cluster cannot be reached, or the scheduler does not come up.
    """
    client = connect(context)
    job = f"stillhouse-scheduler-{time.strftime('%Y%m%d-%H%M%S')}"
    submit_patiently(client, submission_id=job, entrypoint="python -m jobs scheduler")
    deadline = time.monotonic() + BEGIN_S
    while "holds the schedules" not in log_of(client, job):
        if state_of(job_of(client, job)) in ENDED or time.monotonic() > deadline:
            why = last_line(log_of(client, job))
            raise RunError(f"the scheduler did not come up on {context.address}: {why}")
        time.sleep(LOOK_S)
    return job
