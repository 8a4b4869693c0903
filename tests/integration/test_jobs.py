"""Families on a cluster of another process, looked after from here: submitted, left, found again, stopped, resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from cluster.audit import steps_of
from tests.integration.heads import Head, read_until, start, stillhouse
from tests.integration.test_command_line import STUDENTS
from tests.tiny import write_family

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]
SMALL = {"small": STUDENTS["small"]}
CORPUS = {"held_out": 0.2, "max_batches": 40, "epochs": 4}


@pytest.fixture(scope="module")
def lab(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client that has the cluster as a context, and its token in a file."""
    folder = tmp_path_factory.mktemp("client")
    token = folder / "token"
    token.write_text(head.env["RAY_AUTH_TOKEN"])
    client = {name: value for name, value in head.env.items() if name != "RAY_AUTH_TOKEN"}
    client["STILLHOUSE_CONFIG"] = str(folder / "config.yaml")
    added = stillhouse("context", "add", "lab", "--address", head.address, "--token-file", str(token), env=client)
    assert added.returncode == 0, added.stderr
    yield client


def wait_until_shown(job: str, text: str, env: dict[str, str]) -> None:
    deadline = time.monotonic() + 240
    while text not in (said := stillhouse("jobs", "show", job, env=env)).stdout:
        assert said.returncode == 0 and time.monotonic() < deadline, said.stdout + said.stderr
        time.sleep(1.0)


def test_a_client_that_is_killed_finds_its_job_again(lab: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    path = write_family(tmp_path, tiny, SMALL, corpus=CORPUS)
    following = start("submit", str(path), "--name", "left-alone", env=lab)
    read_until(following, "run tiny-")
    os.kill(following.pid, signal.SIGKILL)
    following.communicate(timeout=30)

    rows = json.loads(stillhouse("jobs", "ls", "--json", env=lab).stdout)
    (row,) = (row for row in rows if row["job"] == "left-alone")
    assert (row["family"], row["state"]) == ("tiny", "running")
    again = stillhouse("submit", str(path), "--name", "left-alone", env=lab)
    assert (again.returncode, len(again.stderr.strip().splitlines())) == (2, 1), again.stderr
    assert "give another name" in again.stderr

    followed = stillhouse("jobs", "logs", "left-alone", "--follow", env=lab)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    # From its beginning to its end, each line once.
    assert followed.stdout.count("run tiny-") == 1
    assert "read by small 40" in followed.stdout
    assert followed.stdout.rstrip().endswith("left-alone succeeded")
    assert "succeeded" in stillhouse("jobs", "ls", env=lab).stdout


def test_a_job_that_is_stopped_says_so_in_mlflow_and_has_committed_what_it_learnt(
    lab: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    long = {**CORPUS, "max_batches": 2000, "epochs": 200}
    path = write_family(tmp_path, tiny, SMALL, corpus=long, tracking={"uri": uri}, checkpoints={"every": 4})
    submitted = stillhouse("submit", str(path), "--name", "stopped", "--no-follow", env=lab)
    assert submitted.returncode == 0, submitted.stderr
    assert "stillhouse jobs logs stopped --follow" in submitted.stdout
    wait_until_shown("stopped", "small training", lab)
    stopped = stillhouse("jobs", "stop", "stopped", env=lab)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped stopped" in stopped.stdout
    (experiment,) = mlflow.MlflowClient(uri).search_experiments(filter_string="name = 'tiny'")
    runs = mlflow.MlflowClient(uri).search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"}
    run = max((Path(lab["STILLHOUSE_HOME"]) / "runs" / "tiny").iterdir())
    commits = [json.loads(path.read_text())["batch"] for path in run.glob("students/small/checkpoint_*/commit.json")]
    # All that it had learnt by then.
    assert max(commits) == len(steps_of(run, "small")[0]) > 0
    assert "nothing of it is left running" in stillhouse("jobs", "logs", "stopped", env=lab).stdout


def test_a_job_that_was_stopped_goes_on_by_its_name_alone(lab: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    path = write_family(tmp_path, tiny, SMALL, corpus={**CORPUS, "max_batches": 400, "epochs": 40})
    assert stillhouse("submit", str(path), "--name", "begun", "--no-follow", env=lab).returncode == 0
    wait_until_shown("begun", "small training", lab)
    too_early = stillhouse("jobs", "resume", "begun", env=lab)
    assert (too_early.returncode, "there is nothing to resume before it has ended" in too_early.stderr) == (2, True)
    assert stillhouse("jobs", "stop", "begun", env=lab).returncode == 0
    run = max((Path(lab["STILLHOUSE_HOME"]) / "runs" / "tiny").iterdir())
    learnt = len(steps_of(run, "small")[0])
    assert 0 < learnt < 400
    # Neither its spec nor its text is needed any more.
    path.unlink()
    resumed = stillhouse("jobs", "resume", "begun", "--name", "gone-on", env=lab)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumes {run.name}" in resumed.stdout
    assert f"read by small {400 - learnt}" in resumed.stdout
    assert [step.batch for step in steps_of(run, "small")[0]] == list(range(400))
    rows = {row["job"]: row for row in json.loads(stillhouse("jobs", "ls", "--json", env=lab).stdout)}
    assert rows["gone-on"]["state"] == "succeeded"
    assert "small finished 400/400 loss" in rows["gone-on"]["progress"]


def test_a_job_that_is_not_there_costs_one_line(lab: dict[str, str]) -> None:
    for command in (["show"], ["logs"], ["stop"]):
        missing = stillhouse("jobs", *command, "nobody", env=lab)
        assert (missing.returncode, len(missing.stderr.strip().splitlines())) == (2, 1), missing.stderr
        assert "there is no job 'nobody'" in missing.stderr


def test_a_token_file_that_is_not_there_costs_one_line(lab: dict[str, str], tmp_path: Path) -> None:
    env = {**lab, "STILLHOUSE_CONFIG": str(tmp_path / "config.yaml")}
    options = ["--address", "http://127.0.0.1:9", "--token-file", str(tmp_path / "absent")]
    assert stillhouse("context", "add", "lab", *options, env=env).returncode == 0
    missing = stillhouse("jobs", "ls", env=env)
    assert (missing.returncode, len(missing.stderr.strip().splitlines())) == (2, 1), missing.stderr
    assert "token file" in missing.stderr
