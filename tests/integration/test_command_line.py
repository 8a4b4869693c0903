"""The `stillhouse` command as a person types it: mistakes, Ctrl-C, going on, a job on another cluster."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from cluster.audit import AUDIT_FOLDER, steps_of
from cluster.errors import UserError
from tests.integration.heads import Head, environment, read_until, start, stillhouse
from tests.tiny import run_here, write_family

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1200)]
STUDENTS: dict[str, dict[str, Any]] = {
    "small": {"init": {"source": "teacher", "layers": 1}, "precision": "float32", "lr": 1e-3, "zero_stage": 1},
    "large": {"init": {"source": "teacher", "layers": 3}, "precision": "float32", "lr": 1e-3, "zero_stage": 3},
}
SMALL = {"small": STUDENTS["small"]}
LONG = 240  # batches


def copied(registry: Path, folder: Path) -> dict[str, str]:
    """The tracking section of a family whose registry is there already: MLflow takes seconds to make one."""
    return {"uri": f"sqlite:///{shutil.copyfile(registry, folder / 'mlflow.db')}"}


def own_environment(home: Path) -> dict[str, str]:
    """Of a command whose temporary files can be told from those of the machine's other processes."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    return environment(home, TMPDIR=str(temporary))


def left_files(home: Path) -> set[str]:
    """Shared memory, temporary files of commands in this home, and folders of Ray clusters whose maker is no more."""
    shared = (path for path in Path("/dev/shm").iterdir() if path.is_file())
    clusters = {path: re.match(r"still-(\d+)-", path.name) for path in Path("/tmp").glob("still-*")}
    ended = [path for path, made in clusters.items() if made and not psutil.pid_exists(int(made[1]))]
    return {str(path) for path in (*shared, *ended, *(home / "tmp").iterdir())}


def left_behind(family: list[psutil.Process], home: Path, before: set[str]) -> list[str]:
    """Processes and files that are still there, after a moment to end."""
    _, alive = psutil.wait_procs(family, timeout=20)
    return [str(p) for p in alive] + sorted(left_files(home) - before)


def final_weights(home: Path) -> dict[str, dict[str, Any]]:
    models = sorted((home / "stillhouse" / "runs").glob("*/*/students/*/checkpoint_*/model/model.safetensors"))
    return {path.parents[2].name: load_file(path) for path in models}


def write_long(folder: Path, tiny: Path) -> Path:
    """A family that is still training when its students' first checkpoints have been noticed."""
    corpus, checkpoints = {"held_out": 0.2, "max_batches": LONG, "epochs": 20}, {"every": 10}
    return write_family(folder, tiny, STUDENTS, corpus=corpus, checkpoints=checkpoints)


def states(home: Path) -> list[str]:
    """Of all runs, as `stillhouse runs ls` shows them."""
    listed = stillhouse("runs", "ls", "--json", env=own_environment(home))
    return [run["state"] for run in json.loads(listed.stdout)]


def run_until_ctrl_c(path: Path, home: Path, students: Collection[str], look: Callable[[], None] | None = None) -> None:
    """Start a family and press Ctrl-C once every student has a checkpoint; nothing of it is left.

    Args:
        look: called before Ctrl-C is pressed.
    """
    env = own_environment(home)
    before = left_files(home)
    process = start("run", str(path), env=env)
    read_until(process, r"run tiny-")
    assert wait_for_checkpoints(home, process, students)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in p.name() for p in family)
    if look is not None:
        look()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "--resume" in output
    assert "Traceback" not in output
    assert left_behind(family, home, before) == []


def test_ctrl_c_leaves_nothing(tiny: Path, tmp_path: Path, empty_registry: Path) -> None:
    # One student of enough batches that it is still training once it has its first checkpoint.
    path = write_family(
        tmp_path,
        tiny,
        SMALL,
        corpus={"held_out": 0.2, "max_batches": 400, "epochs": 40},
        checkpoints={"every": 2},
        tracking=copied(empty_registry, tmp_path),
    )
    home = tmp_path / "home"

    def look() -> None:
        assert states(home) == ["running"]
        (run,) = (home / "stillhouse/runs/tiny").iterdir()
        refused = stillhouse("runs", "rm", run.name, env=own_environment(home))
        assert (refused.returncode, refused.stderr) == (2, f"error: {run.name} cannot be removed: it is running\n")

    run_until_ctrl_c(path, home, SMALL, look)
    assert states(home) == ["unfinished"]


@pytest.mark.nightly
def test_resume_after_ctrl_c_ends_where_an_undisturbed_run_ends(tiny: Path, tmp_path: Path) -> None:
    # Its students have its dropout.
    config = Path(shutil.copytree(tiny, tmp_path / "tiny")) / "teacher" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.2}))
    path = write_long(tmp_path, tmp_path / "tiny")
    homes = [tmp_path / "disturbed", tmp_path / "undisturbed"]
    homes[1].mkdir()
    run_until_ctrl_c(path, homes[0], STUDENTS)
    (run,) = (homes[0] / "stillhouse" / "runs" / "tiny").iterdir()
    learnt = {name: len(steps_of(run, name)[0]) for name in STUDENTS}

    resumed = stillhouse("run", str(path), "--resume", env=environment(homes[0]))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert states(homes[0]) == ["finished"]
    whole = stillhouse("run", str(path), env=environment(homes[1]))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    # Each went on where it was, for it had committed that before it stopped.
    begun = {name: [e["life"] for e in events_of(run, name) if "batch" not in e] for name in STUDENTS}
    assert begun == {name: [0, number] if number < LONG else [0] for name, number in learnt.items()}
    disturbed, undisturbed = (final_weights(home) for home in homes)
    assert set(disturbed) == set(undisturbed) == set(STUDENTS)
    for name, weights in undisturbed.items():
        assert all(weights[key].equal(disturbed[name][key]) for key in weights), name


def events_of(run: Path, student: str) -> list[dict[str, Any]]:
    """The lines of a student's audit log."""
    return [json.loads(line) for line in (run / AUDIT_FOLDER / f"{student}.jsonl").read_text().splitlines()]


def wait_for_checkpoints(home: Path, process: subprocess.Popen[str], students: Collection[str]) -> bool:
    """Wait until every student has a whole one; returns whether that happened before the process ended."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        commits = list((home / "stillhouse" / "runs").glob("*/*/students/*/checkpoint_*/commit.json"))
        if {c.parents[1].name for c in commits} == set(students):
            return True
        time.sleep(0.2)
    return False


def test_what_only_a_started_cluster_can_tell_ends_in_one_line(tiny: Path, tmp_path: Path) -> None:
    path = write_family(tmp_path, tiny, STUDENTS, teacher={"cpus_per_shard": 512})
    env = own_environment(tmp_path)
    before = left_files(tmp_path)
    done = stillhouse("run", str(path), env=env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "there is" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "stillhouse" / "runs").glob("*/*/run.json"))
    assert left_files(tmp_path) - before == set()


def test_a_submitted_family_runs_as_a_job_and_its_outcome_is_the_exit_code(
    head: Head, tiny: Path, tmp_path: Path, empty_registry: Path
) -> None:
    address, env = head.address, head.env
    path = write_family(
        tmp_path,
        tiny,
        SMALL,
        corpus={"held_out": 0.2, "max_batches": 4},
        evaluation={"batches": 1, "angle_every": None},
        tracking=copied(empty_registry, tmp_path),
    )
    done = stillhouse("submit", str(path), "--address", address, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "read by small 4" in done.stdout
    assert "succeeded" in done.stdout
    wrong = stillhouse("submit", str(path), "--address", address, "--set", "labels.k=300000", env=env)
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    assert "labels.k: got 300000" in wrong.stdout


def test_a_cluster_that_cannot_be_used_is_named_in_one_line(head: Head, tiny: Path, tmp_path: Path) -> None:
    address, env = head.address, head.env
    path = write_family(tmp_path, tiny, STUDENTS)
    wrong = stillhouse("submit", str(path), "--address", address, env={**env, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    assert (wrong.returncode, len(wrong.stderr.strip().splitlines())) == (1, 1), wrong.stderr
    assert "RAY_AUTH_TOKEN" in wrong.stderr
    nobody = stillhouse("submit", str(path), "--address", "http://127.0.0.1:9", env=env)
    assert (nobody.returncode, len(nobody.stderr.strip().splitlines())) == (1, 1), nobody.stderr
    assert "no Ray job server" in nobody.stderr
    large = stillhouse("check", str(path), "--address", address, "--set", "teacher.cpus_per_shard=512", env=env)
    assert (large.returncode, large.stdout, len(large.stderr.strip().splitlines())) == (2, "", 1), large.stderr
    assert "the cluster is too small: the teacher needs 1 x (512 CPU and " in large.stderr
    good = stillhouse("check", str(path), "--address", address, env=env)
    assert good.returncode == 0 and "is not checked" not in good.stdout, good.stdout + good.stderr


def test_serve_answers_until_ctrl_c_and_bench_reads_it_per_arm(tmp_path: Path) -> None:
    env = own_environment(tmp_path)
    before = left_files(tmp_path)
    arms = ["--arm", "a=models:/none/1:50", "--arm", "b=models:/none/2:50", "--engine", "echo"]
    process = start("serve", *arms, "--port", "0", "--cpus-per-arm", "0.2", env=env)
    output = read_until(process, r"answers as")
    url = re.search(r"http://127\.0\.0\.1:\d+", output)
    assert url is not None
    bench = stillhouse("bench", url[0], "--requests", "12", "--max-tokens", "4", "--json", env=env)
    assert bench.returncode == 0, bench.stderr
    rows = {row["arm"]: row for row in json.loads(bench.stdout)["arms"]}
    assert sum(row["count"] for row in rows.values()) == 12
    for row in rows.values():
        assert 0 < row["first_token_ms"]["p50"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p99"]
    family = psutil.Process(process.pid).children(recursive=True)
    (arm,) = [each for each in family if "ServeReplica:stillhouse~a~" in " ".join(each.cmdline())]
    arm.kill()
    assert f"arm a: process {arm.pid} on node" in read_until(process, r"Serve starts it again$")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert left_behind(family, tmp_path, before) == []


@pytest.mark.usefixtures("ray_cluster", "stillhouse_home")
def test_what_only_the_text_can_tell_ends_the_run_with_a_user_error(
    tiny: Path, tmp_path: Path, empty_registry: Path
) -> None:
    corpus = {"sequence_length": 500}
    path = write_family(tmp_path, tiny, STUDENTS, tracking=copied(empty_registry, tmp_path), corpus=corpus)
    with pytest.raises(UserError, match="give more text") as raised:
        run_here(path)
    assert "\n" not in str(raised.value).strip()
    # No student has begun, so the command forgets the run, as it does above.
    (state,) = (tmp_path / "stillhouse" / "runs").glob("*/*/run.json")
    assert json.loads(state.read_text())["mlflow"] == {}
