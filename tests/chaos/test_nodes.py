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
from tests.integration.heads import environment, start, stillhouse
from tests.integration.test_command_line import final_weights
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
# Two replicas, one rank of one student and two of the other want a CPU each. The head has room for one of the five, so
# at least a replica, and ranks of the student that has two, lie on the other node, wherever Ray puts them.
HEAD_CPUS, NODE_CPUS = 1, 4
STUDENTS = {name: {**student, "cpus_per_rank": 1.0} for name, student in PAIR.items()}
TEACHER = {**FAMILY["teacher"], "replicas": 2, "cpus_per_shard": 1.0}
# The replicas take turns, so one of two held-out batches is made, and lies, on the node that dies.
EVALUATION = {**FAMILY["evaluation"], "batches": 2}
# A teacher that is slower than its student, because it takes one token at a time, and is at it for minutes; the student
# does not stand still for its commits either.
SLOW_BATCHES, ROOM_FOR_ONE = 1500, 2
SLOW: dict[str, Any] = {
    **FAMILY,
    "corpus": {
        "max_batches": SLOW_BATCHES,
        "epochs": 300,
        "sequence_length": 128,
        "batch_sequences": 8,
        "held_out": 0.2,
    },
    "teacher": {"max_restarts": 100, "tokens_per_chunk": 1, "cpus_per_shard": 1.5},
    "checkpoints": {"every": 100},
}
FAST_STUDENT = {"alone": {"init": {"source": "teacher", "layers": 1}, "precision": "float32", "micro_batch": 8}}


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
        with report.surviving("a worker node killed"):
            time.sleep(dice.uniform(0, 10))
            nodes.add(NODE_CPUS)
            output, _ = process.communicate(timeout=400)
            assert process.returncode == 0, output
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
        with report.surviving("a worker node killed for good, then resumed"):
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 1, output
            said = output.strip().splitlines()[-1]
            assert "has had no place for patience_s 20 s; there is 1 CPU, 0 GPU" in said
            assert "--resume" in said
            nodes.add(NODE_CPUS)
            resumed = stillhouse("run", str(path), "--resume", "--set", "patience_s=600", env=env, timeout=400)
            assert resumed.returncode == 0, resumed.stdout + resumed.stderr
            assert_finished_as(undisturbed_pair, tmp_path, report)


def wait_until_it_scores(process: subprocess.Popen[str], nodes: Nodes, node: subprocess.Popen[bytes]) -> None:
    while not nodes.processes(node, "Shard.score"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_an_elastic_pool_uses_nodes_that_come_and_go(
    tiny: Path, tmp_path: Path, dice: random.Random, report: ChaosReport
) -> None:
    homes = {"undisturbed": 1, "disturbed": {"min": 1, "max": 2}}
    paths = {}
    for name, replicas in homes.items():
        (tmp_path / name).mkdir()
        sections = {**SLOW, "teacher": {**SLOW["teacher"], "replicas": replicas}}
        paths[name] = write_family(tmp_path / name, tiny, FAST_STUDENT, **sections)
    whole = stillhouse("run", str(paths["undisturbed"]), env=environment(tmp_path / "undisturbed"), timeout=600)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    home = tmp_path / "disturbed"
    # Beside one replica and the student the head has no room for another one.
    with Nodes(tmp_path, ROOM_FOR_ONE) as nodes, report.surviving("a node taken from an elastic pool"):
        process = start("run", str(paths["disturbed"]), env=environment(home, **nodes.client))
        wait_until_learnt(process, home, 2)
        node = nodes.add(ROOM_FOR_ONE)
        wait_until_it_scores(process, nodes, node)
        time.sleep(dice.uniform(0, 5))
        nodes.kill(node)
        wait_until_it_scores(process, nodes, nodes.add(ROOM_FOR_ONE))
        # Minutes on an idle machine; the test's own limit is for one with too much to do.
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output
        audit = assert_finished_as(final_weights(tmp_path / "undisturbed"), home, report, SLOW_BATCHES)
    # The student, which lay on the head, did not notice.
    assert "in 1 lives" in audit, audit
