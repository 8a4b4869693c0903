"""The family's driver killed at a random moment: ``--resume`` goes on, and ends where nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_finished_as, learnt
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, read_until, start, stillhouse
from tests.integration.test_command_line import final_weights
from tests.tiny import write_family

DRIVER = "the driver killed"
pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def kill_driver_and_resume(path: Path, home: Path, moment: int, **more: str) -> None:
    """Start a family, kill its driver once the students have taken ``moment`` steps, and finish it with ``--resume``.

    Args:
        more: of the commands' environment.
    """
    env = environment(home, **more)
    process = start("run", str(path), env=env)
    read_until(process, "run tiny-")
    while learnt(home) < moment:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    # What it started ends with it, without anybody's help; Ray's agents look for their head for a minute first.
    _, alive = psutil.wait_procs(family, timeout=150)
    assert alive == []
    resumed = stillhouse("run", str(path), "--resume", env=env, timeout=900)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr


def test_the_driver_is_killed(tiny: Path, tmp_path: Path, dice: random.Random, report: ChaosReport) -> None:
    path = write_family(tmp_path, tiny, STUDENTS, **FAMILY)
    homes = [tmp_path / "disturbed", tmp_path / "undisturbed"]
    for home in homes:
        home.mkdir()
    with report.surviving(DRIVER):
        kill_driver_and_resume(path, homes[0], dice.randrange(1, BATCHES * len(STUDENTS) - 10))
        whole = stillhouse("run", str(path), env=environment(homes[1]))
        assert whole.returncode == 0, whole.stdout + whole.stderr
        assert_finished_as(final_weights(homes[1]), homes[0], report)
