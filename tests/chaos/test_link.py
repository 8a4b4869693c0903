"""The teacher on one host, the students on the other; the wire between them is cut for half a minute and mended."""

from __future__ import annotations

import json
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.families import BATCHES, FAMILY, PAIR, assert_finished_as, learnt
from tests.chaos.hosts import Hosts
from tests.chaos.nodes import Nodes
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, start
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
# The teacher fits on the second host only, and leaves no room there.
HEAD_CPUS, TEACHER_CPUS = 2, 3
STUDENTS = {name: {**student, "cpus_per_rank": 0.6} for name, student in PAIR.items()}
TEACHER = {**FAMILY["teacher"], "cpus_per_shard": float(TEACHER_CPUS)}
CUT_S = 30.0


def test_the_wire_is_cut_and_mended(
    tiny: Path, tmp_path: Path, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    # Without a store, so that every label has to cross the wire.
    path = write_family(tmp_path, tiny, STUDENTS, **{**FAMILY, "teacher": TEACHER, "store": {"enabled": False}})
    with Hosts() as hosts, Nodes(tmp_path, HEAD_CPUS, hosts, health=None) as nodes:
        node = nodes.add(TEACHER_CPUS)
        before = hosts.sent(1)
        process = start("run", str(path), env=environment(tmp_path, **nodes.client), on=hosts.on(0))
        when = dice.randrange(2, BATCHES - 8)
        while learnt(tmp_path) < when:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        assert nodes.processes(node, "Shard") and not nodes.processes(node, "RayTrainWorker")
        assert hosts.sent(1) > before
        with report.surviving("the wire between two hosts cut for 30 s"):
            with hosts.cut():
                time.sleep(CUT_S)
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
            audit = assert_finished_as(undisturbed_pair, tmp_path, report)
    # Nobody was taken for dead: all went on where they were.
    assert audit.count("in 1 lives") == len(PAIR), audit
    report.took("the longest rest of a student, of it a cut of 30 s", longest_rest(tmp_path))


def longest_rest(home: Path) -> float:
    """Seconds between two steps of a student, at most."""
    logs = (home / "stillhouse" / "runs" / "tiny").glob("*/audit/*.jsonl")
    students = [log for log in logs if log.stem in PAIR]
    return max(
        later - earlier
        for log in students
        for earlier, later in pairwise(json.loads(line)["at"] for line in log.read_text().splitlines())
    )
