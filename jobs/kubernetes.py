"""`stillhouse submit --kubernetes`: a family as KubeRay's RayJob, on a Ray cluster that runs on Kubernetes.

Two objects: a ConfigMap with the spec and its small local corpus files, and a RayJob whose submitter has them as its
folder and sends them along, as `stillhouse submit` would from here.
"""

from __future__ import annotations

import base64
import getpass
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import typer
import yaml

from cluster.dates import has_macros, rendered
from cluster.errors import RunError, UserError
from cluster.limits import DRIVER, DRIVER_SHARE
from cluster.queue.user import VARIABLE
from cluster.spec import FamilySpec
from cluster.specfile import load_spec
from jobs.contexts import Context
from jobs.follow import say
from jobs.submit import FAMILY, STOP_S, USER, begun, command, corpus_lines, pack

FOLDER = "/family"
# What a ConfigMap may hold.
LARGEST = 1024**2
# KubeRay makes other objects' names from a job's, all of them labels of DNS.
LONGEST_NAME = 47
NAME = rf"[a-z](?:[-a-z0-9]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?"
KUBECTL_S = 60.0
# The cluster's head lets pods of this role in, and no others.
SUBMITTER_ROLE = {"stillhouse/role": "submitter"}


@dataclass(frozen=True)
class Place:
    """Where a RayJob goes.

    Args:
        image: has Stillhouse and the cluster's version of Ray; its pod submits the job and follows it.
        namespace: of the cluster, and of all that is made here.
        cluster: the RayCluster's name.
        token_secret: a Secret whose key ``auth_token`` holds the cluster's token.
    """

    image: str
    namespace: str = "stillhouse"
    cluster: str = "stillhouse"
    token_secret: str = "stillhouse"


def place_of(
    wanted: bool, refused: Mapping[str, Any], *, dry_run: bool | None = None, **given: str | None
) -> Place | None:
    """The place that the options of the command line name; None for a submission without Kubernetes.

    Args:
        wanted: whether ``--kubernetes`` was given.
        refused: options that it cannot keep, by name; None or empty where they were not given.
        dry_run: None where it was not given.
        given: fields of :class:`Place`.

    Raises:
        UserError: an option that has no effect beside the others, or no image.
    """
    useless = refused if wanted else {**given, "dry_run": dry_run}
    for name, value in useless.items():
        if value is not None and value != []:
            option = name.replace("_", "-")
            why = "KubeRay starts the job, and sees to it" if wanted else "it is for --kubernetes"
            raise UserError(f"--{option} has no effect {'with' if wanted else 'without'} --kubernetes: {why}")
    if not wanted:
        return None
    fields = {name: value for name, value in given.items() if value is not None}
    if "image" not in fields:
        raise UserError("--kubernetes needs --image, a container image that has Stillhouse, such as the cluster's own")
    fields.setdefault("token_secret", fields.get("cluster", Place.cluster))
    return Place(**fields)


class Manifests(NamedTuple):
    """A RayJob's name, the objects that it takes, the bytes of files that they carry, and where its text comes from."""

    name: str
    objects: list[dict[str, Any]]
    size: int
    corpus: list[str]


def submit(made: Manifests, place: Place, *, dry_run: bool = False) -> None:
    """Create a family's RayJob by ``kubectl``, or only print it as YAML.

    Raises:
        UserError: there is no ``kubectl``, or a job of that name already.
        RunError: ``kubectl`` or the cluster refuses; nothing was created.
    """
    text = yaml.safe_dump_all(made.objects, sort_keys=False)
    if dry_run:
        typer.echo(text, nl=False)
        return
    # First asked, then done: a ConfigMap without its job would be left over.
    _create(text, place.namespace, made.name, "--dry-run=server")
    _create(text, place.namespace, made.name)
    say(f"submitted {made.name} ({made.size / 1024:.0f} KiB in a ConfigMap)")
    for line in made.corpus:
        say(line)
    say(f"follow it with: kubectl -n {place.namespace} logs -f job/{made.name}")
    say(
        f"stop it, or remove what is left of it, with: kubectl -n {place.namespace} delete rayjob,configmap {made.name}"
    )


def manifests(
    path: Path,
    overrides: Sequence[str],
    context: Context | None,
    place: Place,
    *,
    name: str | None = None,
    resume: bool = False,
    ds: date | None = None,
) -> Manifests:
    """Validate a spec here and write its objects.

    Args:
        context: says where runs and labels are kept, unless the spec does; its address is not used.
        name: of the RayJob, its ConfigMap and the Ray job; none makes one from the family's name and the time.
        resume: go on with the family's last run on the cluster.
        ds: as for :func:`jobs.submit.submit`.

    Raises:
        UserError: the spec, a file it names or the name cannot be used.
    """
    spec = load_spec(path, overrides)
    name = _checked_name(name, spec.name)
    if resume and ds is None and has_macros(spec):
        raise UserError("--resume: give the date of the run by --ds; with --kubernetes the cluster is not asked for it")
    if not resume:
        ds = ds or date.today()
    if ds is not None:
        spec = rendered(spec, ds)
    files = _files(spec, context or Context(address=head_address(place.cluster)))
    labels = {"app.kubernetes.io/name": "stillhouse", "stillhouse/family": spec.name}
    metadata = {"name": name, "namespace": place.namespace, "labels": labels}
    # Kubernetes allows no slash in a key, so files go by number and get their paths where they are mounted.
    keys = {file: f"file-{number}" for number, file in enumerate(files)}
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        **_content({keys[file]: content for file, content in files.items()}),
    }
    mounted = {"name": name, "items": [{"key": key, "path": file} for file, key in keys.items()]}
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_S:g}", VARIABLE: _user()}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "clusterSelector": {"ray.io/cluster": place.cluster},
            "submissionMode": "K8sJobMode",
            "jobId": name,
            "entrypoint": f"python -m jobs {command(resume, ds)}",
            # The cluster of `infra/kubernetes` has nodes that offer it.
            "entrypointResources": json.dumps({DRIVER: DRIVER_SHARE}),
            "metadata": {FAMILY: spec.name, USER: _user(), **begun(resume, ds)},
            "runtimeEnvYAML": yaml.safe_dump({"working_dir": FOLDER, "env_vars": variables}),
            "submitterPodTemplate": {
                "metadata": {"labels": {**labels, **SUBMITTER_ROLE}},
                "spec": submitter(place.image, place.token_secret, mounted),
            },
        },
    }
    return Manifests(name, [config, job], sum(map(len, files.values())), corpus_lines(spec))


def head_address(cluster: str) -> str:
    """Where pods in the namespace of a RayCluster find its job server."""
    return f"http://{cluster}-head-svc:8265"


def _files(spec: FamilySpec, context: Context) -> dict[str, bytes]:
    """What travels with a family, by relative path.

    Raises:
        UserError: a file cannot be read, or all are more than a ConfigMap holds.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as folder:
        pack(spec, Path(folder), context)
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
    if (size := sum(map(len, files.values()))) > LARGEST:
        raise UserError(
            f"corpus.paths: {size / 1024**2:.1f} MiB with the spec; a ConfigMap holds {LARGEST / 1024**2:g} MiB; "
            "put the files into a bucket and name them s3://..., or submit without --kubernetes"
        )
    return files


def submitter(image: str, token_secret: str, config: Mapping[str, Any], **container: Any) -> dict[str, Any]:
    """The spec of a pod that has a family's files in :data:`FOLDER` and the cluster's token in its environment.

    Args:
        config: the ConfigMap with the files, as a volume names it.
        container: further fields of its container; ``env`` is added to what it has.
    """
    token = {"secretKeyRef": {"name": token_secret, "key": "auth_token"}}
    own = [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "submit",
                "image": image,
                **container,
                "env": [*container.get("env", ()), *own],
                "volumeMounts": [
                    {"name": "family", "mountPath": FOLDER, "readOnly": True},
                    {"name": "tmp", "mountPath": "/tmp"},
                ],
                "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [{"name": "family", "configMap": dict(config)}, {"name": "tmp", "emptyDir": {}}],
    }


def _checked_name(name: str | None, family: str) -> str:
    if name is None:
        name = f"{family[: LONGEST_NAME - 16].rstrip('-')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"--name: got {name!r}; with --kubernetes allowed are lower-case letters, digits and dashes, at most "
            f"{LONGEST_NAME}, a letter first"
        )
    return name


def _user() -> str:
    # KubeRay puts it into a shell's command line.
    return re.sub(r"[^\w.@+-]", "_", getpass.getuser(), flags=re.ASCII)


def _content(files: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Files as a ConfigMap's fields: text to be read, all else in base64."""
    data, binary = {}, {}
    for key, content in files.items():
        try:
            data[key] = content.decode()
        except UnicodeDecodeError:
            binary[key] = base64.b64encode(content).decode()
    return {"data": data, **({"binaryData": binary} if binary else {})}


def _create(text: str, namespace: str, name: str, *options: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UserError("--kubernetes: kubectl is not here; install it, or print the objects by --dry-run")
    # Not `apply`, which would keep a second copy of the files in an annotation, where only 256 KiB are allowed.
    wanted = [kubectl, "--namespace", namespace, "create", "--filename", "-", *options]
    try:
        done = subprocess.run(wanted, input=text, capture_output=True, text=True, timeout=KUBECTL_S, check=False)
    except subprocess.TimeoutExpired:
        raise RunError(f"kubectl: no answer within {KUBECTL_S:g} s; see `kubectl cluster-info`") from None
    if done.returncode:
        # kubectl has one exit status for all failures; the server's reason is in parentheses.
        if "(AlreadyExists)" in done.stderr:
            raise UserError(f"--name: there is a {name!r} in {namespace} already; give another name")
        if 'no matches for kind "RayJob"' in done.stderr:
            raise RunError("the cluster that kubectl points to knows no RayJob; install the KubeRay operator there")
        raise RunError(f"kubectl: {' '.join(done.stderr.split()) or 'it failed and said nothing'}")
