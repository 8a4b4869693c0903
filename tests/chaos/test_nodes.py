"""A node of a cluster killed at a random moment, with a replica of the teacher and ranks of students on it."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.families import BATCHES, FAMILY, PAIR, assert_finished_as, learnt
from tests.chaos.nodes import Nodes
from tests.chaos.report import ChaosReport
from tests.integration.conftest import write_family
from tests.integration.test_command_line import environment, start, stillhouse

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
# Two replicas, one rank of one student and two of the other want a CPU each. The head has room for one of the five, so
# at least a replica, and ranks of the student that has two, lie on the other node, wherever Ray puts them.
HEAD_CPUS, NODE_CPUS = 1, 4
STUDENTS = {name: {**student, "cpus_per_rank": 1.0} for name, student in PAIR.items()}
TEACHER = {**FAMILY["teacher"], "replicas": 2, "cpus_per_shard": 1.0}
# The replicas take turns, so one of two held-out batches is made, and lies, on the node that dies.
EVALUATION = {**FAMILY["evaluation"], "batches": 2}


def write(folder: Path, tiny: Path, **sections: Any) -> Path:
    return write_family(folder, tiny, STUDENTS, **{**FAMILY, "teacher": TEACHER, "evaluation": EVALUATION, **sections})


def wait_until_learnt(process: subprocess.Popen[str], home: Path, steps: int) -> None:
    while learnt(home) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.mark.parametrize("stored", [True, False], ids=["with a store", "without a store"])
def test_a_worker_node_dies_and_another_comes(
    tiny: Path, tmp_path: Path, undisturbed_pair: Any, dice: random.Random, stored: bool, report: ChaosReport
) -> None:
    path = write(tmp_path, tiny, **({} if stored else {"store": {"enabled": False}}))
    with Nodes(tmp_path, HEAD_CPUS) as nodes:
        node = nodes.add(NODE_CPUS)
        process = start("run", str(path), env=environment(tmp_path, **nodes.client))
        wait_until_learnt(process, tmp_path, dice.randrange(2, BATCHES))
        assert nodes.processes(node, "Shard") and nodes.processes(node, "RayTrainWorker")
        nodes.kill(node)
        time.sleep(dice.uniform(0, 10))
        nodes.add(NODE_CPUS)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
    with report.surviving("a worker node killed"):
        audit = assert_finished_as(undisturbed_pair, tmp_path, report)
    # A student that lost ranks began again; the one that may have had its only rank on the head did not.
    assert audit.count("in 1 lives") <= 1, audit


def test_no_node_comes_back_and_the_run_stops_and_can_be_resumed(
    tiny: Path, tmp_path: Path, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    path = write(tmp_path, tiny, patience_s=20.0)
    with Nodes(tmp_path, HEAD_CPUS) as nodes:
        node = nodes.add(NODE_CPUS)
        env = environment(tmp_path, **nodes.client)
        process = start("run", str(path), env=env)
        wait_until_learnt(process, tmp_path, dice.randrange(2, BATCHES))
        nodes.kill(node)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 1, output
        said = output.strip().splitlines()[-1]
        assert "has had no place for patience_s 20 s; there is 1 CPU, 0 GPU" in said
        assert "--resume" in said
        nodes.add(NODE_CPUS)
        resumed = stillhouse("run", str(path), "--resume", "--set", "patience_s=600", env=env, timeout=400)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    with report.surviving("a worker node killed for good, then resumed"):
        assert_finished_as(undisturbed_pair, tmp_path, report)
