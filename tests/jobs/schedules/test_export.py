"""A schedule as a Kubernetes CronJob."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import UserError
from cluster.spec import FamilySpec
from jobs.contexts import Context
from jobs.schedules.export import manifests
from tests.tiny import tiny_family

CONTEXT = Context(address="https://ray.lab:8265", tracking_uri="http://mlflow:5000")
NIGHTLY = {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    tree = tiny_family("/models/teacher", "s3://bucket/dt={{ ds }}/")
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def export(spec: Path, **options: str) -> str:
    where = {"image": "stillhouse:0.1.0", "namespace": "ml", "token_secret": "ray-token"}
    return manifests(spec, [], CONTEXT, {**NIGHTLY, **options}, **where)


def test_the_cron_job_submits_the_family_it_carries_and_never_two_at_once(spec: Path) -> None:
    config, cron = yaml.safe_load_all(export(spec))
    family = FamilySpec.model_validate(yaml.safe_load(config["data"]["family.yaml"]))
    assert (family.tracking.uri, family.corpus.paths) == ("http://mlflow:5000", ["s3://bucket/dt={{ ds }}/"])
    facts = cron["spec"]
    assert (facts["schedule"], facts["timeZone"]) == ("0 2 * * *", "Europe/Berlin")
    assert (facts["concurrencyPolicy"], facts["jobTemplate"]["spec"]["backoffLimit"]) == ("Forbid", 0)
    pod = facts["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:3] == ["stillhouse", "submit", "/family/family.yaml"]
    assert container["command"][3:5] == ["--address", "https://ray.lab:8265"]
    assert pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"] == "stillhouse-tiny"
    assert pod["securityContext"]["runAsNonRoot"]
    token = next(each for each in container["env"] if each["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "ray-token", "key": "auth_token"}


def test_a_missed_night_may_start_late_only_where_it_is_to_be_caught_up(spec: Path) -> None:
    late = [
        list(yaml.safe_load_all(export(spec, missed=m)))[1]["spec"]["startingDeadlineSeconds"] for m in ("once", "skip")
    ]
    assert late == [86_400, 120]


def test_what_a_cron_job_cannot_keep_is_refused(spec: Path, tmp_path: Path) -> None:
    for overlap in ("queue", "replace"):
        with pytest.raises(UserError, match=f"--overlap: got '{overlap}'; a Kubernetes CronJob can only skip"):
            export(spec, overlap=overlap)
    tree = yaml.safe_load(spec.read_text())
    (tmp_path / "a.jsonl").write_text("{}")
    tree["corpus"]["paths"] = ["a.jsonl"]
    spec.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"a.jsonl is local; .* s3://"):
        export(spec)
