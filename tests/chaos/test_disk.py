"""The disk of a run filled to the last byte, for a while or for good: a real file system with everything on it."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cluster.board import POINTS_FILE
from tests.chaos.families import BATCHES, FAMILY, PAIR, assert_finished_as, learnt, lives_of
from tests.chaos.faults import BOARD, VICTIMS
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, start, stillhouse
from tests.processes import kill_one
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
MIB = 1 << 20
PATIENCE_S = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own: run folder, checkpoints, label store, registry and log all lie on it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs to mount a file system, which is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that there is; returns the file that holds it."""
    hog = disk / "hog"
    with hog.open("wb", buffering=0) as file:
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    with pytest.raises(OSError) as full:
        (disk / "more").write_bytes(b"\0" * 4096)
    assert full.value.errno == errno.ENOSPC
    return hog


def tail_of_log(disk: Path) -> str:
    """The end of the run's log, which is gone with the disk."""
    return next((disk / "stillhouse" / "runs").glob("*/*/run.log")).read_text(errors="replace")[-20_000:]


def run_until_full(path: Path, disk: Path, dice: random.Random) -> tuple[subprocess.Popen[str], Path]:
    """Start a family, and fill its disk at a random moment while a checkpoint is being made."""
    process = start("run", str(path), env=environment(disk))
    moment = dice.randrange(1, BATCHES)
    while learnt(disk) < moment or not checkpoint_under_way(disk):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    return process, fill(disk)


def checkpoint_under_way(disk: Path) -> bool:
    """Whether a rank is putting a checkpoint together; it does so on the disk of Ray's temporary files."""
    (run,) = (disk / "stillhouse" / "runs" / "tiny").iterdir()
    return any(Path("/tmp").glob(f"still-*/tmp/stillhouse.{run.name}.*/*"))


def wait_until_noticed(process: subprocess.Popen[str], disk: Path) -> None:
    """Until some process of the run has said that it waits for room; its own log is on the disk that has none."""
    while True:
        logs = Path("/tmp").glob("still-*/session_*/logs/worker-*.err")
        if any(f"the disk of {disk}" in log.read_text(errors="replace") for log in logs):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.5)


def assert_posted_once(disk: Path) -> None:
    """The run's journal has every loss of a student's every life once, in order.

    A disk that fills up while a checkpoint is copied ends a life. The next one begins at the last commit, and posts
    again what it learns again.
    """
    (run,) = (disk / "stillhouse" / "runs" / "tiny").iterdir()
    points = [json.loads(line) for line in (run / POINTS_FILE).read_text().splitlines()]
    for name in PAIR:
        losses = [point["batch"] for point in points if point["student"] == name and "loss" in point["metrics"]]
        back = [(one, other) for one, other in pairwise([0, *losses]) if other != one + 1]
        assert len(back) < lives_of(run, [name])[name] and all(other <= one for one, other in back), (name, losses)
        assert losses[-1] == BATCHES, (name, losses)


def test_the_disk_is_full_for_a_while_and_the_board_dies_over_it(
    tiny: Path, tmp_path: Path, disk: Path, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    path = write_family(tmp_path, tiny, PAIR, store={"uri": str(disk / "labels")}, **FAMILY)
    process, hog = run_until_full(path, disk, dice)
    with report.surviving("a disk filled during a checkpoint", "the board killed over a full disk"):
        wait_until_noticed(process, disk)
        time.sleep(dice.uniform(2, 15))
        assert process.poll() is None, process.communicate()
        assert kill_one(VICTIMS[BOARD])
        time.sleep(dice.uniform(0, 5))
        hog.unlink()
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output + tail_of_log(disk)
        assert_finished_as(undisturbed_pair, disk, report)
        assert_posted_once(disk)


def test_the_disk_stays_full_and_the_run_stops_and_can_be_resumed(
    tiny: Path, tmp_path: Path, disk: Path, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    path = write_family(tmp_path, tiny, PAIR, store={"uri": str(disk / "labels")}, patience_s=PATIENCE_S, **FAMILY)
    process, hog = run_until_full(path, disk, dice)
    with report.surviving("a disk filled during a checkpoint that stayed so, then resumed"):
        reached = learnt(disk)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1, output + tail_of_log(disk)
        said = output.strip().splitlines()[-1]
        run = next((disk / "stillhouse" / "runs" / "tiny").iterdir())
        assert str(run) in said and f"patience_s {PATIENCE_S:g} s" in said and " bytes " in said and "--resume" in said
        assert learnt(disk) >= reached
        hog.unlink()
        resumed = stillhouse("run", str(path), "--resume", env=environment(disk), timeout=500)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert_finished_as(undisturbed_pair, disk, report)
