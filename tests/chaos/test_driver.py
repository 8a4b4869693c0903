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
from tests.integration.conftest import write_family
from tests.integration.test_command_line import environment, final_weights, read_until, start, stillhouse

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def test_the_driver_is_killed(tiny: Path, tmp_path: Path, dice: random.Random, report: ChaosReport) -> None:
    path = write_family(tmp_path, tiny, STUDENTS, **FAMILY)
    homes = [tmp_path / "disturbed", tmp_path / "undisturbed"]
    for home in homes:
        home.mkdir()
    moment = dice.randrange(1, BATCHES * len(STUDENTS) - 10)
    process = start("run", str(path), env=environment(homes[0]))
    read_until(process, "run tiny-")
    while learnt(homes[0]) < moment:
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    # What it started ends with it, without anybody's help; Ray's agents look for their head for a minute first.
    _, alive = psutil.wait_procs(family, timeout=150)
    assert alive == []

    resumed = stillhouse("run", str(path), "--resume", env=environment(homes[0]))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    whole = stillhouse("run", str(path), env=environment(homes[1]))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    with report.surviving("the driver killed"):
        assert_finished_as(final_weights(homes[1]), homes[0], report)
