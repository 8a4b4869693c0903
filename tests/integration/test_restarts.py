"""A student whose processes die before they train: Ray Train itself would start them again for ever."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.torch import TorchTrainer

from cluster.board import Board, has_no_rank
from cluster.students.steering import Restarts, rank_failure

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly, pytest.mark.usefixtures("ray_cluster")]
# Read by every process of Python that finds it: ends those that are about to become a rank.
DIES_AS_A_RANK = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "ray.train.v2._internal.execution.worker_group.worker":
            print("this node has no luck today", file=sys.stderr, flush=True)
            os._exit(3)

sys.meta_path.insert(0, Finder())
"""


def test_ranks_that_die_at_their_start_fail_the_student_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(DIES_AS_A_RANK)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    board = ray.remote(Board).options(num_cpus=0).remote(str(tmp_path))
    job: Any = SimpleNamespace(name="small", board=board, spec=SimpleNamespace(max_failures=1))
    trainer = TorchTrainer(
        lambda _: None,
        train_loop_config={},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.2}),
        run_config=ray.train.RunConfig(
            name="small",
            storage_path=str(tmp_path / "runs"),
            callbacks=[Restarts(job)],
            worker_runtime_env={"env_vars": {"PYTHONPATH": path}},
        ),
    )
    with pytest.raises(ray.train.TrainingFailedError) as failed:
        trainer.fit()
    reason = rank_failure(failed.value)
    assert reason.startswith("its ranks failed 2 times, max_failures is 1; the last time: process ")
    assert "ended without a Python error" in reason and "lower the student's micro_batch" in reason
    assert "GB are in use there now" in reason
    assert reason.endswith("; it last wrote: this node has no luck today")
    phases = ray.get(board.since.remote(0)).phases
    assert phases["small"].startswith("starting again (1 of 1): process ")
    assert has_no_rank(phases["small"])
