"""What the guide has people do before and around `kubectl apply -k`, against the objects: secrets, labels, images,
names, drains, the scheduler."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header

from jobs.schedules.ledger import Ledger
from tests.infra.rendered import KUBERNETES, OVERLAYS, Object, crd, kustomized, of_kind, place_of, pods, rendered

GUIDE = (KUBERNETES.parent / "README.md").read_text()
APPLIED = [*OVERLAYS, "endpoint"]
RUNS = "/home/stillhouse/.stillhouse"


def named(what: str, kind: str, name: str) -> Object:
    (found,) = (each for each in rendered(what) if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def ray_pods(what: str) -> dict[str, Object]:
    return {where: pod for where, pod in pods(rendered(what)) if where.startswith("Ray")}


@pytest.mark.parametrize("what", APPLIED)
def test_every_pod_of_ray_has_the_shared_volume_with_the_models(what: str) -> None:
    settings = named("one-gpu", "ConfigMap", "stillhouse")["data"]
    assert settings["HF_HOME"].startswith(f"{RUNS}/")
    for where, pod in ray_pods(what).items():
        (container,) = pod["containers"]
        claims = {
            each["name"]: each["persistentVolumeClaim"]["claimName"]
            for each in pod["volumes"]
            if "persistentVolumeClaim" in each
        }
        mounts = {each["mountPath"]: claims.get(each["name"]) for each in container["volumeMounts"]}
        assert mounts[RUNS] == "runs", where
        assert {"configMapRef": {"name": "stillhouse"}} in container["envFrom"], where
        # Any of them may be asked to fetch a gated model, and none needs one.
        assert {"secretRef": {"name": "hf", "optional": True}} in container["envFrom"], where


@pytest.mark.parametrize("what", APPLIED)
def test_a_registry_put_in_one_place_is_every_image_s(what: str, tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    images = copy / "images/kustomization.yaml"
    tree = yaml.safe_load(images.read_text())
    for number, each in enumerate(tree["images"]):
        each |= {"newName": f"mine.example/{number}", "newTag": "9.9.9"}
    images.write_text(yaml.safe_dump(tree))
    made = pods(kustomized(copy / place_of(what)))
    found = {container["image"] for _, pod in made for container in pod["containers"]}
    assert found and all(re.fullmatch(r"mine\.example/\d:9\.9\.9", image) for image in found)


def test_who_is_let_in_is_said_by_labels_that_the_guide_puts_on_namespaces() -> None:
    labels = set()
    for what in APPLIED:
        for policy in (each["spec"] for each in rendered(what) if each["kind"] == "NetworkPolicy"):
            for peer in (peer for rule in policy.get("ingress", []) for peer in rule["from"]):
                labels |= peer.get("namespaceSelector", {}).get("matchLabels", {}).items()
    # Where an operator is installed is not ours to know.
    assert labels == {(f"stillhouse/{who}", "true") for who in ("operator", "monitoring", "may-submit", "may-ask")}
    assert all(f"{key}={value}" in GUIDE for key, value in labels)


def test_the_namespace_comes_first_and_every_secret_is_made() -> None:
    assert 0 < GUIDE.index("apply -f infra/kubernetes/base/namespace.yaml") < GUIDE.index("create secret")
    made = dict(re.findall(r"create secret generic ([\w-]+)((?:[^\n]*\\\n)*[^\n]*)", GUIDE))
    for what in APPLIED:
        for where, pod in pods(rendered(what)):
            for container in pod["containers"]:
                for source in (each.get("secretRef") for each in container.get("envFrom", [])):
                    assert source is None or source["name"] in made, where
                for each in container.get("env", []):
                    if key := each.get("valueFrom", {}).get("secretKeyRef"):
                        assert f"--from-literal={key['key']}=" in made[key["name"]], f"{where}: {key}"
            for volume in pod.get("volumes", []):
                assert volume.get("secret", {}).get("secretName", "s3") in made, where


@pytest.mark.parametrize("within", ["", ".stillhouse", ".stillhouse.svc", ".stillhouse.svc.cluster.local"])
def test_mlflow_answers_under_each_name_of_its_service(within: str) -> None:
    (container,) = named("one-gpu", "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    (hosts,) = (each.partition("=")[2] for each in container["args"] if each.startswith("--allowed-hosts="))
    assert is_allowed_host_header(hosts.split(","), f"mlflow{within}:5000")
    assert not is_allowed_host_header(hosts.split(","), "elsewhere.example:5000")


def test_addresses_for_other_namespaces_name_ours() -> None:
    assert "http://stillhouse-head-svc:8265" not in GUIDE
    assert "http://stillhouse-head-svc.stillhouse:8265" in GUIDE


def test_a_ray_cluster_cannot_be_asked_how_many_pods_it_wants() -> None:
    """Why its budgets are plain numbers. Should it have a scale one day, they can be what they would be elsewhere."""
    versions = crd("RayCluster")["spec"]["versions"]
    assert versions and not [each for each in versions if "scale" in each["subresources"]]


@pytest.mark.parametrize("what", APPLIED)
def test_budgets_of_ray_s_pods_are_numbers_and_leave_teachers_students_and_serving_alone(what: str) -> None:
    budgets = {
        each["spec"]["selector"]["matchLabels"]["stillhouse/role"]: each["spec"]
        for each in rendered(what)
        if each["kind"] == "PodDisruptionBudget"
    }
    assert budgets.keys() == ({"door", "arms"} if what == "endpoint" else {"head", "driver", "mlflow"})
    for budget in budgets.values():
        assert "maxUnavailable" not in budget and isinstance(budget["minAvailable"], int)
    if what == "endpoint":
        return
    (drivers,) = (
        group["maxReplicas"]
        for group in of_kind(what, "RayCluster")["spec"]["workerGroupSpecs"]
        if group["groupName"] == "drivers"
    )
    # Not one driver may be evicted, however many nodes there are for them.
    assert budgets["driver"]["minAvailable"] >= drivers


def test_the_scheduler_is_let_in_and_works_on_the_schedules_of_the_head() -> None:
    deployment = named("one-gpu", "Deployment", "scheduler")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    peers = named("one-gpu", "NetworkPolicy", "head")["spec"]["ingress"][0]["from"]
    assert any(each["podSelector"]["matchLabels"].items() <= labels.items() for each in peers if "podSelector" in each)
    # The night's own pods are submitters too, and not this Deployment's.
    night = named("one-gpu", "CronJob", "nightly")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert not deployment["selector"]["matchLabels"].items() <= night.items()
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["command"][:2] == ["stillhouse", "scheduler"]
    (head,) = ray_pods("one-gpu")["RayCluster stillhouse head"]["containers"]
    (ours, theirs) = (
        [each for each in pod["env"] if each["name"] == "STILLHOUSE_DATABASE"] for pod in (container, head)
    )
    assert ours and ours == theirs


def test_a_scheduler_that_has_lost_its_lease_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = named("one-gpu", "Deployment", "scheduler")["spec"]["template"]["spec"]["containers"]
    program, *arguments = container["livenessProbe"]["exec"]["command"]
    assert program == "python"
    url = f"sqlite:///{tmp_path / 'schedules.db'}"
    monkeypatch.setenv("STILLHOUSE_DATABASE", url)
    ledger, now = Ledger(url), datetime.now(UTC)

    def alive() -> bool:
        return subprocess.run([sys.executable, *arguments], capture_output=True).returncode == 0

    assert not alive()
    ledger.hold("one", now, now + timedelta(minutes=5))
    assert alive()
    ledger.hold("one", now, now - timedelta(minutes=1))
    assert not alive()
