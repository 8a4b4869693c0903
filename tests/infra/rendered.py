"""The objects that a directory of infra/kubernetes renders to, for the tests beside this."""

from __future__ import annotations

import functools
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.kubernetes import Place, manifests
from tests.tiny import tiny_family

KUBERNETES = Path(__file__).parents[2] / "infra/kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
SUBMITTED = "submitted"
ALL = [*OVERLAYS, "endpoint", SUBMITTED]
Object = dict[str, Any]


@functools.cache
def crd(kind: str) -> Object:
    """KubeRay's own definition of a kind, as `crds/README.md` describes it."""
    path = Path(__file__).parent / "crds" / f"{kind.lower()}s.json.gz"
    tree: Object = json.loads(gzip.decompress(path.read_bytes()))
    assert tree["spec"]["names"]["kind"] == kind
    return tree


@functools.cache
def rendered(what: str) -> tuple[Object, ...]:
    """The objects of an overlay, of the endpoint, or of a submission."""
    if what == SUBMITTED:
        return submitted()
    return kustomized(KUBERNETES / place_of(what))


def place_of(what: str) -> Path:
    """Where an overlay, or the endpoint, lies below infra/kubernetes."""
    return Path("overlays" if what in OVERLAYS else "") / what


def kustomized(folder: Path) -> tuple[Object, ...]:
    """What `kubectl apply -k` would make."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def submitted() -> tuple[Object, ...]:
    """What `stillhouse submit --kubernetes` makes of a small family."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text('{"text": "one"}\n')
        path = Path(folder) / "family.yaml"
        path.write_text(yaml.safe_dump(tiny_family("hf://org/teacher", corpus)))
        objects = manifests(path, [], None, Place("registry.example.com/stillhouse/cpu:0.1.0"), name="tiny").objects
    return tuple(objects)


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Every pod's spec, by where it stands."""
    for each in objects:
        name, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        if each["kind"] in ("RayCluster", "RayService"):
            cluster = spec.get("rayClusterConfig", spec)
            yield f"{name} head", cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name} {group['groupName']}", group["template"]["spec"]
        elif each["kind"] == "RayJob":
            yield name, spec["submitterPodTemplate"]["spec"]
        elif each["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]["spec"]
        elif "template" in spec:
            yield name, spec["template"]["spec"]


def of_kind(what: str, kind: str) -> Object:
    """The only object of a kind."""
    (found,) = (each for each in rendered(what) if each["kind"] == kind)
    return found
