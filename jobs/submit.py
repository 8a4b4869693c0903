"""`stillhouse submit`: a family as a Ray job on a running cluster."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import RunError, UserError
from cluster.spec import FamilySpec
from cluster.specfile import load_spec

SPEC_FILE = "family.yaml"
CORPUS_FOLDER = "corpus"
SHIPPED_LIMIT = 50 * 1024**2
AGENT_WAIT_S = 30.0


def submit(path: Path, overrides: Sequence[str], address: str, follow: bool) -> int:
    """Validate a spec here, ship it with its small local corpus files, and start it as a job.

    Returns:
        The exit code: 0 when the job succeeded or is not followed, else the job's own.

    Raises:
        UserError: the spec or a file it names cannot be used.
        RunError: the cluster cannot be reached, or refuses the token.
    """
    spec = load_spec(path, overrides)
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        size = pack(spec, Path(folder))
        job = _start(
            client,
            entrypoint=f"python -m jobs run {SPEC_FILE}",
            runtime_env={"working_dir": folder},
            metadata={"stillhouse.family": spec.name},
        )
    _say(f"submitted {job} ({size / 1024:.0f} KiB shipped)")
    if not follow:
        _say(f"follow it with: ray job logs {job} --follow --address {address}")
        return 0
    return _follow(client, job, address)


def _start(client: Any, **job: Any) -> str:
    """Submit a job; a head that has only just started refuses for a few seconds, until its job agent is up.

    Raises:
        RunError: the cluster refuses the job.
    """
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(client.submit_job(**job))
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RunError(f"the cluster refuses the job: {str(error).splitlines()[0]}") from error
        time.sleep(1.0)


def connect(address: str) -> Any:
    """A client of the cluster's job server; uses the token where one is to be found.

    Raises:
        RunError: nothing answers there, or the token is missing or wrong.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or token.is_file():
        # Ray sends no token to an address by itself. It reads the mode when it is imported, so this comes before.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address: got {address!r}; give the job server's URL, such as http://127.0.0.1:8265")
    try:
        client = JobSubmissionClient(address)
        client.get_version()
        return client
    except Exception as error:  # Ray raises RuntimeError, ConnectionError and its own kinds for the same things
        reason = str(error)
        if any(word in reason for word in ("401", "403", "Unauthorized", "uthentication")):
            raise RunError(
                f"{address} refuses the token; put the cluster's token into RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from None
        raise RunError(
            f"{address}: no Ray job server answers there; check the address and that the cluster is up"
        ) from None


def pack(spec: FamilySpec, folder: Path) -> int:
    """Write the resolved spec and copy its local corpus files into ``folder``; returns the bytes.

    Model directories are not shipped: the cluster must see them at the same path.

    Raises:
        UserError: more corpus than may travel with a job.
    """
    local = [Path(p) for p in spec.corpus.paths if not p.startswith("s3://")]
    missing = [p for p in local if not p.exists()]
    if missing:
        raise UserError(f"corpus.paths: {missing[0]} is not there")
    size = sum(f.stat().st_size for p in local for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
    if size > SHIPPED_LIMIT:
        raise UserError(
            f"corpus.paths: {size / 1024**2:.0f} MiB of local files; at most {SHIPPED_LIMIT // 1024**2} MiB travel "
            f"with a job; put them into a bucket and name them s3://..."
        )
    tree = spec.model_dump(mode="json", exclude_unset=True)
    shipped = []
    for number, source in enumerate(spec.corpus.paths):
        if source.startswith("s3://"):
            shipped.append(source)
            continue
        target = folder / CORPUS_FOLDER / f"{number}-{Path(source).name}"
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, target)
        shipped.append(str(target.relative_to(folder)))
    tree["corpus"]["paths"] = shipped
    import yaml

    (folder / SPEC_FILE).write_text(yaml.safe_dump(tree, sort_keys=False))
    return size + (folder / SPEC_FILE).stat().st_size


def _follow(client: Any, job: str, address: str) -> int:
    """Print the job's log until it ends. Ctrl-C leaves the job running."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        _say(f"\nthe job goes on; come back with: ray job logs {job} --follow --address {address}")
        return 130
    info = client.get_job_info(job)
    status = str(getattr(info.status, "value", info.status)).lower()
    _say(f"{job} {status}")
    if status == "succeeded":
        return 0
    return info.driver_exit_code or 1


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
