"""`stillhouse submit`: a family as a Ray job on a running cluster."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from http import HTTPStatus
from pathlib import Path
from typing import Any

import typer
import yaml

from cluster.corpus.files import S3, error_reason, select_each, skipped_line
from cluster.dates import date_of, has_macros, rendered
from cluster.errors import RunError, UserError
from cluster.limits import DRIVER, DRIVER_SHARE, MAX_CPUS, MAX_GPUS
from cluster.queue.user import VARIABLE
from cluster.spec import FamilySpec
from cluster.specfile import load_spec
from jobs.client import JobServerError, connect, has_forgotten, has_nodes_for_drivers
from jobs.contexts import Context
from jobs.follow import follow, say

SPEC_FILE = "family.yaml"
CORPUS_FOLDER = "corpus"
SHIPPED_LIMIT = 50 * 1024**2
# Files named when there are too many bytes.
NAMED_FILES = 5
AGENT_WAIT_S = 30.0
# What a job says of itself.
FAMILY, USER, DS = "stillhouse.family", "stillhouse.user", "stillhouse.ds"
# A job that is told to end puts away what it has; Ray of itself kills it after three seconds.
STOP_S = 120.0


def submit(
    path: Path,
    overrides: Sequence[str],
    context: Context,
    name: str | None = None,
    env: Sequence[str] = (),
    resume: bool = False,
    on: bool = True,
    ds: date | None = None,
) -> int:
    """Validate a spec here, ship it with its small local corpus files, and start it as a job.

    Args:
        name: the job's id; none makes one from the family's name and the time.
        env: ``NAME=VALUE``, or ``NAME`` for the value that it has here; of the job's environment.
        resume: go on with the family's last run on the cluster.
        on: show its log until it ends.
        ds: the date that ``corpus.paths`` is rendered for; none means today's here, or that of the run that is resumed.

    Returns:
        The exit code: 0 when the job succeeded or is not followed, else the job's own.

    Raises:
        UserError: the spec, a file it names, a name or a variable cannot be used.
        RunError: the cluster cannot be reached, or refuses the token or the job.
    """
    spec = load_spec(path, overrides)
    job = job_id(name, spec.name)
    variables = environment_of(env)
    if resume and ds is None and has_macros(spec):
        ds = _last_ds(connect(context), spec.name)
    elif not resume:
        ds = ds or date.today()
    if ds is not None:
        spec = rendered(spec, ds)
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        size = pack(spec, Path(folder), context)
        client = connect(context)
        start_job(
            client,
            job=job,
            command=command(resume, ds),
            folder=folder,
            family=spec.name,
            user=getpass.getuser(),
            variables=variables,
            metadata=begun(resume, ds),
        )
    say(f"submitted {job} ({size / 1024:.0f} KiB shipped)")
    for line in corpus_lines(spec):
        say(line)
    say(f"dashboard {context.address}/#/jobs/{job}")
    tracking = spec.tracking.uri or context.tracking_uri
    if tracking and tracking.startswith("http"):
        say(f"MLflow {tracking}, experiment {spec.tracking.experiment or spec.name}")
    if not on:
        say(f"follow it with: stillhouse jobs logs {job} --follow")
        return 0
    return follow(client, job)


def command(resume: bool, ds: date | None) -> str:
    """What a job runs, behind `stillhouse`."""
    # The date goes along, for the run to remember: its paths have no macros any more.
    return f"run {SPEC_FILE}{' --resume' if resume else ''}{f' --ds {ds}' if ds else ''}"


def begun(resume: bool, ds: date | None) -> dict[str, str]:
    """The date of the run that a job begins, as part of what it says of itself."""
    # A job that goes on with a run may have been given a wrong date, and its run keeps its own.
    return {DS: ds.isoformat()} if ds and not resume else {}


def _last_ds(client: Any, family: str) -> date:
    """The date of the family's last run on a cluster, by the job that began it.

    Raises:
        UserError: the cluster remembers no such job.
    """
    found = [job for job in client.list_jobs() if (job.metadata or {}).get(FAMILY) == family and DS in job.metadata]
    if not found:
        raise UserError(
            f"--resume: the cluster remembers no job of family {family!r} with a date; give its date by --ds"
        )
    return date_of(max(found, key=lambda job: job.start_time or 0).metadata[DS])


def job_id(name: str | None, family: str) -> str:
    """A job's id.

    Raises:
        UserError: the name cannot be one.
    """
    if name is None:
        return f"{family}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise UserError(f"--name: got {name!r}; allowed are letters, digits, dots, dashes and underscores, at most 80")
    return name


def environment_of(given: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` and ``NAME`` as a mapping; a value never stands in a message.

    Raises:
        UserError: no name, a variable that is not set here, or one that is not the submitter's to set.
    """
    found = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError("--env: give NAME=VALUE, or NAME for the value that it has here")
        if name in (MAX_CPUS, MAX_GPUS, VARIABLE):
            raise UserError(f"--env: {name} is not yours to set; the cluster and `submit` do so")
        if not sign and name not in os.environ:
            raise UserError(f"--env: {name} is not set here; give {name}=VALUE")
        found[name] = value if sign else os.environ[name]
    return found


def start_job(
    client: Any,
    *,
    job: str,
    command: str,
    folder: str | None,
    family: str,
    user: str,
    variables: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Start a `stillhouse` command as a job of its own.

    Its driver goes to one of the cluster's nodes for drivers, where there are any, and outlives the head there. Else it
    goes to the head, as Ray has it.

    Args:
        job: its id.
        folder: what travels with it; it is the job's working directory.
        variables: of its environment.
        metadata: what it says of itself beside its family and its user.

    Raises:
        UserError: there is a job of this name.
        RunError: the cluster refuses the job.
        ConnectionError: nobody answers.
    """
    submit_patiently(
        client,
        submission_id=job,
        entrypoint_resources={DRIVER: DRIVER_SHARE} if has_nodes_for_drivers(client) else None,
        entrypoint=f"python -m jobs {command}",
        runtime_env={
            **({} if folder is None else {"working_dir": folder}),
            # The queue is fair between users by name.
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_S:g}", VARIABLE: user, **variables},
        },
        metadata={FAMILY: family, USER: user, **(metadata or {})},
    )


def submit_patiently(client: Any, **job: Any) -> None:
    """Submit a job; a head that has only just started fails for a few seconds, until its job agent is up.

    Args:
        job: as Ray's client takes it.

    Raises:
        UserError: there is a job of this name.
        RunError: the cluster refuses the job.
    """
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            client.submit_job(**job)
            return
        except JobServerError as error:
            # Ray reports a name that is taken by no status of its own.
            if _is_known(client, job["submission_id"]):
                raise UserError(f"--name: there is a job {job['submission_id']!r} already; give another name") from None
            if error.status < HTTPStatus.INTERNAL_SERVER_ERROR or time.monotonic() > deadline:
                raise RunError(f"the cluster refuses the job: {str(error).splitlines()[0]}") from error
        except RuntimeError as error:
            raise RunError(f"the cluster refuses the job: {str(error).splitlines()[0]}") from error
        time.sleep(1.0)


def _is_known(client: Any, job: str) -> bool:
    try:
        client.get_job_info(job)
    except JobServerError as error:
        if not has_forgotten(error):
            raise RunError(f"the cluster refuses the job: {str(error).splitlines()[0]}") from error
        return False
    return True


def uploaded(spec: FamilySpec) -> list[str]:
    """Those of ``corpus.paths`` whose files travel with a job. Runs read the others on the cluster."""
    return [path for path in spec.corpus.paths if spec.corpus.upload and not path.startswith(S3)]


def corpus_lines(spec: FamilySpec) -> list[str]:
    """Which of ``corpus.paths`` travel with a job and which are read on the cluster, one line each."""
    travels = uploaded(spec)
    there = [path for path in spec.corpus.paths if path not in travels]
    lines = {"corpus: uploaded as it is now: ": travels, "corpus: read on the cluster when a run starts: ": there}
    return [start + ", ".join(paths) for start, paths in lines.items() if paths]


def pack(spec: FamilySpec, folder: Path, context: Context) -> int:
    """Write the resolved spec and copy the corpus files that travel into ``folder``; returns the bytes.

    The files are those that a run would read here; what is skipped is shown, for the cluster never sees it.

    Model directories are not shipped: the cluster must see them at the same path.

    Args:
        context: says where the cluster keeps runs and labels, unless the spec does.

    Raises:
        UserError: a file is not there, of an unknown kind or cannot be copied, or more corpus than may travel with a
            job.
    """
    # Each path once: of one that is given again all files are known by then.
    travels = set(uploaded(spec))
    local = dict(select_each(path for path in dict.fromkeys(spec.corpus.paths) if path in travels))
    files = [Path(name) for found in local.values() for name in found.files]
    skipped = sum((Counter(found.skipped) for found in local.values()), Counter[str]())
    if line := skipped_line(skipped):
        # Not to stdout, where a manifest may go.
        typer.echo(f"corpus: {line}", err=True)
    sizes = {file: file.stat().st_size for file in files}
    size = sum(sizes.values())
    if size > SHIPPED_LIMIT:
        largest = sorted(sizes, key=lambda file: sizes[file], reverse=True)[:NAMED_FILES]
        named = ", ".join(f"{file} ({sizes[file] / 1024**2:.1f} MiB)" for file in largest)
        raise UserError(
            f"corpus.paths: {size / 1024**2:.1f} MiB of local files, the largest {named}; at most "
            f"{SHIPPED_LIMIT / 1024**2:g} MiB travel with a job; put them into a bucket and name them s3://..., or set "
            f"corpus.upload: false where the cluster has them under the same path"
        )
    tree = spec.model_dump(mode="json", exclude_unset=True)
    shipped = []
    for number, source in enumerate(spec.corpus.paths):
        if source not in travels:
            shipped.append(source)
        elif source in local and (found := local.pop(source).files):
            name = Path(source).name if Path(source).exists() else "files"
            target = folder / CORPUS_FOLDER / f"{number}-{name}"
            for file, place in zip(found, _places(source, found, target), strict=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    shutil.copyfile(file, place)
                except OSError as error:
                    raise UserError(f"corpus.paths: cannot copy {file}: {error_reason(error)}") from None
            shipped.append(str(target.relative_to(folder)))
    tree["corpus"]["paths"] = shipped
    if context.tracking_uri is not None:
        tree["tracking"] = {"uri": context.tracking_uri, **tree.get("tracking", {})}
    if context.store is not None and spec.store.enabled:
        tree["store"] = {"uri": context.store, **tree.get("store", {})}
    (folder / SPEC_FILE).write_text(yaml.safe_dump(tree, sort_keys=False))
    return size + (folder / SPEC_FILE).stat().st_size


def _places(source: str, files: Sequence[str], target: Path) -> list[Path]:
    """Where the files behind one of ``corpus.paths`` go, so that ``target`` is read as the path is here."""
    if Path(source).is_file():
        return [target]
    # Numbered, for the order, and without their folders: Ray leaves out those named venv, .venv, .git and __pycache__
    # when it uploads, and a hidden file that a glob asks for would be skipped.
    return [target / f"{number:06d}-{Path(file).name}" for number, file in enumerate(files)]
