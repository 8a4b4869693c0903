"""The only replica of the teacher killed again and again: within its restarts, beyond them, and in the resumed run."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.audit import steps_of
from tests.chaos.families import FAMILY, PAIR, assert_finished_as
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, start
from tests.integration.test_command_line import events_of
from tests.processes import kill_one
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
RESTARTS = 2
# The teacher scores faster than the students learn, and must not be through before it has died often enough.
APART = 6


def scored(home: Path) -> int:
    """Batches that the teacher has scored in a home, counted as often as it did."""
    logs = (home / "stillhouse" / "runs").glob("*/*/audit/teacher.scored.jsonl")
    return sum(log.read_text().count("\n") for log in logs)


def kill_after(process: subprocess.Popen[str], home: Path, more: int) -> None:
    """Kill the replica once it has scored some more batches."""
    wanted = scored(home) + more
    while scored(home) < wanted or not kill_one("Shard"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def test_the_last_replica_dies_more_often_than_it_may(
    tiny: Path, tmp_path: Path, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    path = write_family(tmp_path, tiny, PAIR, **{**FAMILY, "teacher": {"max_restarts": RESTARTS}})
    env = environment(tmp_path)
    process = start("run", str(path), env=env)
    with report.surviving(*["the last replica killed"] * (2 * RESTARTS + 1)):
        for _ in range(RESTARTS + 1):
            kill_after(process, tmp_path, dice.randint(1, APART))
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output
        said = output.strip().splitlines()[-1]
        assert (
            f"teacher replica 0 died {RESTARTS + 1} times, which is more than teacher.max_restarts {RESTARTS}" in said
        )
        assert "--resume" in said
        state = json.loads(next((tmp_path / "stillhouse" / "runs").glob("*/*/run.json")).read_text())
        assert state["versions"] == {}
        (run,) = (tmp_path / "stillhouse" / "runs" / "tiny").iterdir()
        reached = {name: len(steps_of(run, name)[0]) for name in PAIR}

        kept = scored(tmp_path)
        resumed = start("run", str(path), "--resume", env=env)
        for _ in range(RESTARTS):
            kill_after(resumed, tmp_path, dice.randint(1, APART))
        output, _ = resumed.communicate(timeout=500)
        assert resumed.returncode == 0, output
        assert scored(tmp_path) > kept
        # All that was learnt had been committed before the run ended: nothing is learnt again.
        for name, number in reached.items():
            begun = [event["life"] for event in events_of(run, name) if "batch" not in event]
            assert begun == ([0, number] if number else [0] * len(begun)), (name, number, begun)
        assert_finished_as(undisturbed_pair, tmp_path, report)
