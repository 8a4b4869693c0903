"""Every overlay, the endpoint, and what `submit --kubernetes` makes: valid by the schemas of Kubernetes and KubeRay,
and by the rules that the guide promises."""

from __future__ import annotations

import copy
import functools
import json
import operator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from cluster.limits import DRIVER
from cluster.specfile import load_spec
from serving.declared import Declared
from serving.spec import checked
from tests.infra.rendered import ALL, OVERLAYS, SUBMITTED, Object, crd, of_kind, pods, rendered


@functools.cache
def validator(kind: str) -> jsonschema.protocols.Validator:
    """Checks objects of a kind by KubeRay's schema; a field that it does not know is refused."""
    (version,) = (each for each in crd(kind)["spec"]["versions"] if each["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


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


@pytest.mark.parametrize("what", ALL)
def test_objects_of_kubernetes_are_valid(what: str) -> None:
    found = [each for each in rendered(what) if not each["apiVersion"].startswith("ray.io/")]
    assert found
    for each in found:
        kubernetes_validate.validate(each, "1.37", strict=True)


@pytest.mark.parametrize("what", ALL)
def test_objects_of_kuberay_are_valid(what: str) -> None:
    found = [each for each in rendered(what) if each["apiVersion"] == "ray.io/v1"]
    assert found
    for each in found:
        validator(each["kind"]).validate(each)


@pytest.mark.parametrize(
    ("what", "kind", "path"),
    [
        ("one-gpu", "RayCluster", ["spec", "workerGroupSpecs", 0]),
        ("endpoint", "RayService", ["spec", "rayClusterConfig", "headGroupSpec"]),
        (SUBMITTED, "RayJob", ["spec", "submitterPodTemplate", "spec"]),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_refused(what: str, kind: str, path: list[Any]) -> None:
    (wanted,) = (copy.deepcopy(each) for each in rendered(what) if each["kind"] == kind)
    validator(kind).validate(wanted)
    functools.reduce(operator.getitem, path, wanted)["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        validator(kind).validate(wanted)


@pytest.mark.parametrize("what", ALL)
def test_pods_are_contained_and_ask_for_what_they_need(what: str) -> None:
    seen = dict(pods(rendered(what)))
    assert len(seen) >= (5 if what in OVERLAYS else 1)
    for where, pod in seen.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, where
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in pod["containers"]:
            _, _, tag = container["image"].rpartition(":")
            assert tag and tag != "latest", f"{where}: {container['image']}"
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]), where
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"], where
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where


@pytest.mark.parametrize("what", ALL)
def test_no_secret_is_written_down(what: str) -> None:
    objects = rendered(what)
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
    # Families' drivers outlive the head where they are put: there is always a node, and nothing else runs on it.
    (drivers,) = (group for group in cluster["workerGroupSpecs"] if group["groupName"] == "drivers")
    assert drivers["minReplicas"] >= 1
    assert drivers["rayStartParams"]["num-cpus"] == "0"
    assert json.loads(json.loads(drivers["rayStartParams"]["resources"]))[DRIVER] >= 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_listens_is_behind_a_policy(overlay: str) -> None:
    policies = [each["spec"] for each in rendered(overlay) if each["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    assert rules and all(rule.get("from") for rule in rules)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_night_s_family_is_one_that_can_be_read_and_fits(overlay: str, tmp_path: Path) -> None:
    objects = rendered(overlay)
    (families,) = (each for each in objects if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "families")
    path = tmp_path / "nightly.yaml"
    path.write_text(families["data"]["nightly.yaml"])
    spec = load_spec(path)
    # Without it runs and models would go into a file on the head.
    assert spec.tracking.uri == "http://mlflow:5000"
    (cluster,) = (each["spec"] for each in objects if each["kind"] == "RayCluster")
    gpus = sum(
        group["maxReplicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in cluster["workerGroupSpecs"]
        if group["groupName"] not in ("serving", "drivers")
    )
    wanted = spec.teacher.max_replicas * spec.teacher.shards * spec.teacher.gpus_per_shard
    wanted += sum(student.ranks * student.gpus_per_rank for student in spec.students.values())
    assert 0 < wanted <= gpus


def test_two_nights_never_overlap() -> None:
    (night,) = (each["spec"] for each in rendered("one-gpu") if each["kind"] == "CronJob")
    assert night["concurrencyPolicy"] == "Forbid"
    assert night["jobTemplate"]["spec"]["backoffLimit"] == 0


def test_the_endpoint_is_open_to_others_only_with_keys_and_where_kuberay_looks() -> None:
    service = of_kind("endpoint", "RayService")["spec"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    # The door has the port, so Serve's proxy must not.
    assert config.proxy_location == "Disabled"
    (application,) = config.applications
    assert import_attr(application.import_path)
    (keeper,) = application.deployments
    assert isinstance(keeper.user_config, dict)
    declared = Declared.model_validate(keeper.user_config)
    spec = checked(**declared.endpoint)
    assert (spec.host, declared.tracking_uri) == ("0.0.0.0", "http://mlflow:5000")
    head = service["rayClusterConfig"]["headGroupSpec"]["template"]
    (container,) = head["spec"]["containers"]
    assert {"name": "serve", "containerPort": spec.port} in container["ports"]
    volumes = {each["name"]: each for each in head["spec"]["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
    assert spec.keys is not None and "secret" in mounts[str(spec.keys.parent)]
    assert spec.state is not None and any(spec.state.is_relative_to(path) for path in mounts)
    # Nobody listens on an arm's node, so it is no part of the service, and ready without Serve's proxy.
    clients = of_kind("endpoint", "Service")["spec"]
    assert clients["selector"] == {
        "stillhouse/role": head["metadata"]["labels"]["stillhouse/role"],
        "ray.io/serve": "true",
    }
    assert clients["ports"][0]["port"] == spec.port
    for group in service["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["template"]["metadata"]["labels"]["stillhouse/role"] != clients["selector"]["stillhouse/role"]
        assert group["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/api/healthz"


def test_the_endpoint_lets_in_who_may_ask_and_the_operator() -> None:
    policies = {
        each["metadata"]["name"]: each["spec"] for each in rendered("endpoint") if each["kind"] == "NetworkPolicy"
    }
    assert all(rule.get("from") for policy in policies.values() for rule in policy["ingress"])
    clients, kuberay, _ = policies["endpoint-door"]["ingress"]
    assert clients["ports"] == [{"port": 8000}] and {"port": 8000} in kuberay["ports"]
    labels = of_kind("endpoint", "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"][
        "labels"
    ]
    for name in ("endpoint-door", "endpoint-nodes"):
        assert policies[name]["podSelector"]["matchLabels"].items() <= labels.items()


def test_a_submitter_is_let_in_by_the_head_and_finds_its_cluster() -> None:
    job = of_kind(SUBMITTED, "RayJob")["spec"]
    (head,) = (
        each["spec"] for each in rendered("one-gpu") if each["metadata"]["name"] == "head" and "ingress" in each["spec"]
    )
    labels = job["submitterPodTemplate"]["metadata"]["labels"]
    allowed = [each["podSelector"]["matchLabels"] for each in head["ingress"][0]["from"] if "podSelector" in each]
    assert any(wanted.items() <= labels.items() for wanted in allowed)
    assert job["clusterSelector"] == {"ray.io/cluster": of_kind("one-gpu", "RayCluster")["metadata"]["name"]}
