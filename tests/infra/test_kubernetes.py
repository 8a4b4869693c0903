"""Every overlay, rendered: valid by the schemas of Kubernetes and KubeRay, and by the rules that the guide promises."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.specfile import load_spec

KUBERNETES = Path(__file__).parents[2] / "infra/kubernetes"
CRDS = Path(__file__).parents[3] / "shared/assets/kuberay-crds"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
Object = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> tuple[Object, ...]:
    kubectl = Path(sys.executable).parent / "kubectl"
    command = [str(kubectl), "kustomize", str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def pods(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Every pod's spec, by where it stands."""
    for each in objects:
        name, spec = f"{each['kind']} {each['metadata']['name']}", each.get("spec", {})
        if each["kind"] == "RayCluster":
            yield f"{name} head", spec["headGroupSpec"]["template"]["spec"]
            for group in spec["workerGroupSpecs"]:
                yield f"{name} {group['groupName']}", group["template"]["spec"]
        elif each["kind"] == "CronJob":
            yield name, spec["jobTemplate"]["spec"]["template"]["spec"]
        elif "template" in spec:
            yield name, spec["template"]["spec"]


@functools.cache
def crd(kind: str) -> Object:
    """KubeRay's schema of a kind; a field that it does not know is refused."""
    if not CRDS.exists():
        pytest.skip("KubeRay's CRDs are not here")
    for path in CRDS.glob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        if tree["spec"]["names"]["kind"] == kind:
            (version,) = (each for each in tree["spec"]["versions"] if each["name"] == "v1")
            return closed(version["schema"]["openAPIV3Schema"])
    raise AssertionError(f"KubeRay has no {kind}")


def closed(schema: Object) -> Object:
    """A schema whose objects have no fields but those that it names."""
    schema = copy.deepcopy(schema)

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            if node.pop("x-kubernetes-int-or-string", False):
                node.pop("type", None)
            for inner in node.values():
                close(inner)
        elif isinstance(node, list):
            for inner in node:
                close(inner)

    close(schema)
    # Both are Kubernetes' own, and described elsewhere.
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_of_kubernetes_are_valid(overlay: str) -> None:
    for each in rendered(overlay):
        if not each["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(each, "1.37", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_of_kuberay_are_valid(overlay: str) -> None:
    found = [each for each in rendered(overlay) if each["apiVersion"] == "ray.io/v1"]
    assert found
    for each in found:
        jsonschema.validate(each, crd(each["kind"]))


def test_a_field_that_kuberay_does_not_know_is_refused() -> None:
    (cluster,) = (copy.deepcopy(each) for each in rendered("one-gpu") if each["kind"] == "RayCluster")
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(cluster, crd("RayCluster"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_contained_and_ask_for_what_they_need(overlay: str) -> None:
    seen = dict(pods(rendered(overlay)))
    assert len(seen) >= 5
    for where, pod in seen.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in pod["containers"]:
            _, _, tag = container["image"].partition(":")
            assert tag and tag != "latest", f"{where}: {container['image']}"
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"], where
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_written_down(overlay: str) -> None:
    objects = rendered(overlay)
    assert not [each for each in objects if each["kind"] == "Secret"]
    for where, pod in pods(objects):
        for container in pod["containers"]:
            for variable in container.get("env", []):
                if any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "SECRET", "DATABASE", "STORE_URI")):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), f"{where}: {variable['name']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_asks_for_a_token_survives_its_head_and_grows(overlay: str) -> None:
    (cluster,) = (each["spec"] for each in rendered(overlay) if each["kind"] == "RayCluster")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] < group["maxReplicas"] for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_listens_is_behind_a_policy(overlay: str) -> None:
    policies = [each["spec"] for each in rendered(overlay) if each["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
    assert all(rule.get("from") for policy in policies for rule in policy.get("ingress", []))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_night_s_family_is_one_that_can_be_read_and_fits(overlay: str, tmp_path: Path) -> None:
    objects = rendered(overlay)
    (families,) = (each for each in objects if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "families")
    path = tmp_path / "nightly.yaml"
    path.write_text(families["data"]["nightly.yaml"])
    spec = load_spec(path)
    (cluster,) = (each["spec"] for each in objects if each["kind"] == "RayCluster")
    gpus = sum(
        group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster["workerGroupSpecs"]
        if group["groupName"] != "serving"
    )
    wanted = spec.teacher.max_replicas * spec.teacher.shards * spec.teacher.gpus_per_shard
    wanted += sum(student.ranks * student.gpus_per_rank for student in spec.students.values())
    assert 0 < wanted <= gpus


def test_two_nights_never_overlap() -> None:
    (night,) = (each["spec"] for each in rendered("one-gpu") if each["kind"] == "CronJob")
    assert night["concurrencyPolicy"] == "Forbid"
    assert night["jobTemplate"]["spec"]["backoffLimit"] == 0
