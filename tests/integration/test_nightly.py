"""A family that is run every night: the text of that date, the last champion's weights, a webhook that hears of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.integration.heads import environment, stillhouse
from tests.jobs.hooks import receiver
from tests.tiny import write_family, write_tiny_corpus

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]
STUDENTS: dict[str, dict[str, Any]] = {
    "small": {
        "init": {"source": "teacher", "layers": 1},
        "precision": "float32",
        "lr": 3e-3,
        "micro_batch": 4,
        "warm_start": True,
    }
}
SECRET = "a-secret-that-nobody-sees"


def test_the_second_night_goes_on_where_the_first_ended(tiny: Path, tmp_path: Path) -> None:
    text = write_tiny_corpus(tmp_path / "dt=2028-02-29" / "a.jsonl")
    (tmp_path / "dt=2028-03-01").mkdir()
    shutil.copy(text, tmp_path / "dt=2028-03-01")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    env = environment(tmp_path, HOOK_SECRET=SECRET)
    with receiver() as hook:
        path = write_family(
            tmp_path,
            tiny,
            STUDENTS,
            name="night",
            corpus={"paths": [f"{tmp_path}/dt={{{{ ds }}}}/"], "held_out": 0.2, "max_batches": 8},
            tracking={"uri": uri},
            notify={"webhook": hook.url, "secret_env": "HOOK_SECRET"},
        )
        first = stillhouse("run", str(path), "--ds", "2028-02-29", env=env)
        assert first.returncode == 0, first.stdout + first.stderr
        assert "small starts from its init: night-small has no champion yet" in first.stdout
        client = mlflow.MlflowClient(uri)
        client.set_registered_model_alias("night-small", "champion", "1")
        second = stillhouse("run", str(path), "--ds", "2028-03-01", env=env)
        assert second.returncode == 0, second.stdout + second.stderr

    assert re.search(r"run night-\S+ of 2028-03-01, log", second.stdout)
    assert "small starts from night-small v1" in second.stdout
    assert "the teacher scored 8 batches" in first.stdout
    assert "the teacher scored 0 batches in 0 scorings, 8 came from the label store" in second.stdout
    assert [told["ds"] for told in hook.told()] == ["2028-02-29", "2028-03-01"]
    assert [told["event"] for told in hook.told()] == ["succeeded", "succeeded"]
    assert hook.signed_by(SECRET, 0) and hook.signed_by(SECRET, 1)
    ((one,), (two,)) = (told["students"] for told in hook.told())
    assert (one["version"], two["version"]) == (1, 2)
    assert one["kl"] < one["kl_before"]
    # The same weights on the same held-out text.
    assert two["kl_before"] == pytest.approx(one["kl"], rel=1e-6)
    assert two["kl"] < two["kl_before"]

    tags = client.get_model_version("night-small", "2").tags
    assert tags["stillhouse.warm_start"] == "night-small v1"
    assert "stillhouse.warm_start" not in client.get_model_version("night-small", "1").tags
    child = client.get_run(client.get_model_version("night-small", "2").run_id)
    assert child.data.tags["stillhouse.warm_start"] == "night-small v1"
    states = [json.loads(p.read_text()) for p in sorted((tmp_path / "stillhouse").glob("runs/night/*/run.json"))]
    assert [(state["ds"], state["warm_start"]) for state in states] == [
        ("2028-02-29", {"small": None}),
        ("2028-03-01", {"small": 1}),
    ]
    said = first.stdout + first.stderr + second.stdout + second.stderr
    assert SECRET not in said + "".join(p.read_text() for p in (tmp_path / "stillhouse").glob("runs/night/*/run.log"))
