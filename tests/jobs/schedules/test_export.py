"""A schedule as a Kubernetes CronJob."""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.spec import FamilySpec
from jobs import submit
from jobs.cli.main import app
from jobs.contexts import Context
from jobs.schedules import plan
from jobs.schedules.export import manifests
from tests.tiny import tiny_family

BASE = Path(__file__).parents[3] / "infra/kubernetes/base"
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


def pod_of(cron: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = cron["spec"]["jobTemplate"]["spec"]["template"]
    return pod


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


def test_the_head_of_the_base_lets_its_pod_in_and_knows_its_token(spec: Path) -> None:
    """By the manifests of infra/kubernetes/base themselves."""
    local = Context(address="http://127.0.0.1:8265")
    _, cron = yaml.safe_load_all(manifests(spec, [], local, NIGHTLY, image="stillhouse:0.1.0", namespace="stillhouse"))
    policies = list(yaml.safe_load_all((BASE / "network.yaml").read_text()))
    (head,) = (policy["spec"] for policy in policies if policy["metadata"]["name"] == "head")
    allowed = [peer["podSelector"]["matchLabels"] for peer in head["ingress"][0]["from"] if "podSelector" in peer]
    assert any(labels.items() <= pod_of(cron)["metadata"]["labels"].items() for labels in allowed)
    theirs = pod_of(yaml.safe_load((BASE / "nightly.yaml").read_text()))["spec"]["containers"][0]
    (ours,) = pod_of(cron)["spec"]["containers"]
    tokens = [next(each for each in of["env"] if each["name"] == "RAY_AUTH_TOKEN") for of in (ours, theirs)]
    assert tokens[0] == tokens[1]
    # What is on loopback here is the head's Service there.
    addresses = [of["command"][of["command"].index("--address") + 1] for of in (ours, theirs)]
    assert addresses[0] == addresses[1] == "http://stillhouse-head-svc:8265"


@pytest.mark.parametrize(
    ("cron", "zone", "starts", "night"),
    [
        ("0 22 * * *", "America/New_York", datetime(2026, 11, 24, 3, 0, 9, tzinfo=UTC), "2026-11-23"),
        ("0 22 * * *", "America/New_York", datetime(2026, 11, 24, 15, 0, 9, tzinfo=UTC), "2026-11-23"),
        ("30 0 * * *", "Europe/Berlin", datetime(2026, 11, 23, 23, 30, 9, tzinfo=UTC), "2026-11-24"),
    ],
)
def test_the_pod_reads_the_day_of_the_schedule_and_not_its_own(
    spec: Path, monkeypatch: pytest.MonkeyPatch, cron: str, zone: str, starts: datetime, night: str
) -> None:
    """Its own command line, typed at the moment at which it starts."""
    _, made = yaml.safe_load_all(export(spec, cron=cron, timezone=zone))
    (container,) = pod_of(made)["spec"]["containers"]
    _, *words = (str(spec) if word == "/family/family.yaml" else word for word in container["command"])

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(starts.timestamp(), tz)

    asked: list[Any] = []
    monkeypatch.setattr(plan, "datetime", Clock)
    monkeypatch.setattr(submit, "submit", lambda *given: asked.append(given[-1]) or 0)
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert [day.isoformat() for day in asked] == [night]


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
