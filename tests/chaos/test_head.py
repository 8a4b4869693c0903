"""The head killed while a family runs and another waits; its successor finds in Redis what it has to know."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.limits import DRIVER
from jobs.schedules.ledger import Ledger
from jobs.schedules.plan import OPEN, SUCCEEDED
from tests.chaos.families import BATCHES, FAMILY, PAIR, STUDENTS, assert_finished_as, learnt
from tests.chaos.nodes import Nodes
from tests.chaos.redis import Redis
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, start, stillhouse
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
# The pair holds 0.8 of it, so that nobody else has a place beside it.
CPUS = 1
LONGEST_S = 400.0


class Cluster:
    """Somebody who types commands to a cluster.

    Args:
        home: whose commands, and the cluster's.
    """

    def __init__(self, nodes: Nodes, home: Path) -> None:
        self._nodes, self.env = nodes, environment(home, **nodes.client)

    def type(self, *arguments: str) -> str:
        done = stillhouse(*arguments, "--address", self._nodes.job_server, env=self.env, timeout=LONGEST_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def drivers(self, node: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The drivers of families on a node."""
        return [process for process, command in self._nodes.commands(node) if command[1:4] == ["-m", "jobs", "run"]]

    @contextlib.contextmanager
    def scheduler(self) -> Iterator[subprocess.Popen[str]]:
        """Starts nights, outside of Ray."""
        process = start("scheduler", "--address", self._nodes.job_server, env=self.env)
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_head_dies_and_another_comes(
    tiny: Path, tmp_path: Path, undisturbed_pair: Any, dice: random.Random, report: ChaosReport
) -> None:
    path, other = write_family(tmp_path, tiny, PAIR, **FAMILY), tmp_path / "other"
    other.mkdir()
    waiting = write_family(other, tiny, {"alone": STUDENTS["alone"]}, name="waiting", **FAMILY)
    with Redis() as redis, Nodes(tmp_path, 0, redis=redis) as nodes:
        cluster = Cluster(nodes, tmp_path)
        node = nodes.add(CPUS, **{DRIVER: 2})
        with cluster.scheduler() as scheduler:
            cluster.type("schedule", "add", str(path), "--cron", "0 0 1 1 *", "--snapshot")
            cluster.type("schedule", "run-now", "tiny")
            ledger = Ledger(f"sqlite:///{tmp_path / 'stillhouse' / 'schedules.db'}")
            wait_for(lambda: any(night.run for night in ledger.nights("tiny")))
            where = f"STILLHOUSE_HOME={other}"
            cluster.type("submit", str(waiting), "--no-follow", "--name", "waiting", "--env", where)
            wait_for(lambda: "queued: place 1 of 1" in cluster.type("jobs", "logs", "waiting"))
            when = dice.randrange(2, BATCHES)
            wait_for(lambda: learnt(tmp_path) >= when)
            drivers, (queue,) = cluster.drivers(node), nodes.processes(node, "FamilyQueue")
            assert len(drivers) == 2

            with report.surviving("the head killed, and another one in its place"):
                nodes.kill(nodes.head)
                before = learnt(tmp_path)
                assert before < len(PAIR) * BATCHES
                wait_for(lambda: learnt(tmp_path) > before)  # without a head
                nodes.restart_head()
                assert cluster.drivers(node) == drivers
                wait_for(lambda: not any(night.state in OPEN for night in ledger.nights("tiny")))
                (night,) = ledger.nights("tiny")
                assert (night.state, night.attempt) == (SUCCEEDED, 1), night
                audit = assert_finished_as(undisturbed_pair, tmp_path, report)
            assert audit.count("in 1 lives") == len(PAIR), audit
            # The other one has its turn, all of it under the new head.
            said = cluster.type("jobs", "logs", "waiting", "--follow")
            assert "queued: place 1 of 1" in said and "reading the corpus" in said
            assert nodes.processes(node, "FamilyQueue") == [queue]
            assert scheduler.poll() is None
        assert scheduler.returncode == 0
