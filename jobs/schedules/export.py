"""A schedule as Kubernetes manifests: a CronJob that submits the family, and a ConfigMap with its spec."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from cluster.errors import UserError
from cluster.specfile import load_spec
from jobs.contexts import Context
from jobs.kubernetes import FOLDER, LARGEST, SUBMITTER_ROLE, Place, head_address, submitter
from jobs.schedules.plan import LATE_S, Schedule, schedule_of
from jobs.submit import SPEC_FILE, pack, uploaded

# A day: one missed night is caught up, an older one is not.
CATCH_UP_S = 86_400
# Kubernetes puts the name of the night's job on its pods.
JOB_NAME_LABEL = "metadata.labels['batch.kubernetes.io/job-name']"


def manifests(
    spec_path: Path,
    overrides: Sequence[str],
    context: Context,
    options: Mapping[str, Any],
    *,
    image: str,
    namespace: str,
    token_secret: str = Place.token_secret,
) -> str:
    """The manifests as YAML, to be given to ``kubectl apply -f -``.

    Args:
        options: of :func:`~jobs.schedules.plan.schedule_of`.
        token_secret: a Secret whose key ``auth_token`` holds the cluster's token.

    Raises:
        UserError: an option that a CronJob cannot keep, or local files that do not fit into a ConfigMap.
    """
    spec = load_spec(spec_path, overrides)
    schedule = schedule_of(**{**options, "name": options.get("name") or spec.name})
    if schedule.overlap != "skip":
        # It has no queue, and one that replaces a pod would leave the job that the pod follows running.
        raise UserError(f"--overlap: got {schedule.overlap!r}; a Kubernetes CronJob can only skip")
    if local := uploaded(spec):
        raise UserError(
            f"corpus.paths: {local[0]} is local; a CronJob's family reads its corpus from s3://, or from a path on the "
            f"cluster with corpus.upload: false"
        )
    with tempfile.TemporaryDirectory(prefix="stillhouse-export-") as folder:
        pack(spec, Path(folder), context)
        text = (Path(folder) / SPEC_FILE).read_text()
    if len(text) > LARGEST:
        raise UserError(f"{spec_path}: {len(text)} bytes; a ConfigMap holds at most {LARGEST}")
    labels = {"app.kubernetes.io/name": "stillhouse", "stillhouse/family": spec.name}
    name = f"stillhouse-{schedule.name}"
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {SPEC_FILE: text}}
    night = _night(schedule, context, image, token_secret, name)
    pod = {"metadata": {"labels": {**labels, **SUBMITTER_ROLE}}, "spec": night}
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata,
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.timezone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": CATCH_UP_S if schedule.missed == "once" else int(LATE_S),
            "successfulJobsHistoryLimit": 7,
            "failedJobsHistoryLimit": 7,
            # The night's job has one name, and a pod that is lost leaves it running.
            "jobTemplate": {"spec": {"backoffLimit": 0, "template": pod}},
        },
    }
    return yaml.safe_dump_all([config, cron], sort_keys=False)


def _night(schedule: Schedule, context: Context, image: str, token_secret: str, config: str) -> dict[str, Any]:
    """The pod that submits a night and follows it.

    Args:
        config: the ConfigMap's name.
    """
    # Not the pod's own date: it has another clock than the schedule, and may start long after its night was due. The
    # pod cannot see when that was, for Kubernetes notes it on the Job alone.
    due_by = f"{schedule.cron} {schedule.timezone}"
    command = ["stillhouse", "submit", f"{FOLDER}/{SPEC_FILE}", "--address", _address(context)]
    command += ["--name", "$(NIGHT)", "--due-by", due_by]
    env = [{"name": "NIGHT", "valueFrom": {"fieldRef": {"fieldPath": JOB_NAME_LABEL}}}]
    return submitter(image, token_secret, {"name": config}, command=command, env=env)


def _address(context: Context) -> str:
    """The job server, as a pod reaches it: what is on loopback here, such as a forwarded port, is not so there."""
    here = urlsplit(context.address).hostname in ("127.0.0.1", "localhost", "::1")
    return head_address(Place.cluster) if here else context.address
