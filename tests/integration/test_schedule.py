"""Nights on a real cluster and in real minutes, while the scheduler and the whole head are killed between them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.corpus.batches import CORPUS_FOLDER, CorpusFacts
from jobs.schedules.ledger import Ledger, Night
from jobs.schedules.plan import OPEN, RUNNING, SUCCEEDED, WAITING
from tests.integration.heads import Head, running_head, stillhouse
from tests.integration.test_command_line import STUDENTS
from tests.tiny import write_family, write_tiny_corpus

pytestmark = [pytest.mark.integration, pytest.mark.slow]
LONGEST_S = 420.0


class Desk:
    """Types `stillhouse schedule` as somebody with the cluster's token."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def type(self, *arguments: str) -> str:
        typed = ["schedule", *arguments, "--address", self._head.address]
        done = stillhouse(*typed, env=self._head.env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def history(self) -> list[dict[str, Any]]:
        """All nights, the oldest first."""
        found: list[dict[str, Any]] = json.loads(self.type("history", "every-minute", "--json"))
        return found[::-1]

    def wait_for(self, condition: Callable[[list[Night]], bool]) -> None:
        """Until the ledger's nights are so, the oldest first. Read here, for each question to a cluster is a job."""
        ledger = Ledger(f"sqlite:///{self._head.home / 'stillhouse' / 'schedules.db'}")
        deadline = time.monotonic() + LONGEST_S
        while not condition(nights := ledger.nights("every-minute")[::-1]):
            assert time.monotonic() < deadline, nights
            time.sleep(0.5)


def kill_the_scheduler(head: Head) -> None:
    found = [p for p in head.family() if "scheduler" in p.cmdline()]
    assert len(found) == 1, [p.cmdline() for p in head.family()]
    os.kill(found[0].pid, signal.SIGKILL)


def ended(nights: list[Night]) -> int:
    return sum(night.state == SUCCEEDED for night in nights)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_three_nights_outlive_the_scheduler_and_the_head(tiny: Path, tmp_path: Path) -> None:
    home, text = tmp_path / "home", tmp_path / "text"
    home.mkdir()
    write_tiny_corpus(text / "a.jsonl")
    path = write_family(
        tmp_path,
        tiny,
        {"small": STUDENTS["small"]},
        corpus={"paths": [f"{text}/*.jsonl"], "upload": False, "held_out": 0.2, "max_batches": 8},
        teacher={"cpus_per_shard": 0.2},
    )
    with running_head(home) as head:
        desk = Desk(head)
        options = ["--cron", "* * * * *", "--timezone", "Europe/Berlin", "--overlap", "queue", "--retry-s", "1"]
        added = desk.type("add", str(path), "--name", "every-minute", *options)
        assert "schedule every-minute added: * * * * * Europe/Berlin" in added
        assert f"corpus: read on the cluster when a run starts: {text}/*.jsonl" in added
        desk.wait_for(lambda nights: any(night.state == RUNNING for night in nights))
        kill_the_scheduler(head)
        desk.wait_for(lambda nights: len(nights) >= 3)
        # No further ones; those that wait are still run.
        desk.type("pause", "every-minute")
        desk.wait_for(lambda nights: ended(nights) >= 1)
        # Aside and then in place: the second run may be reading the folder.
        write_tiny_corpus(tmp_path / "b.jsonl", seed=1).rename(text / "b.jsonl")
        desk.wait_for(lambda nights: sum(night.state != WAITING for night in nights) >= 2)
        # With it goes the night that runs, and the cluster's whole memory of it.
        head.stop()
        head.start()
        desk.wait_for(lambda nights: ended(nights) >= 2)
        kill_the_scheduler(head)
        desk.wait_for(lambda nights: not any(night.state in OPEN for night in nights))
        nights = desk.history()
        (row,) = json.loads(desk.type("ls", "--json"))
        assert (row["name"], row["family"], row["paused"], row["next"]) == ("every-minute", "tiny", True, None)

    assert len(nights) >= 3
    due = [datetime.fromisoformat(night["due"]) for night in nights]
    # No minute twice, none left out, each of them run once, one after the other.
    assert due == [due[0] + n * timedelta(minutes=1) for n in range(len(due))]
    assert [night["state"] for night in nights] == ["succeeded"] * len(nights)
    spans = [(datetime.fromisoformat(night["started"]), datetime.fromisoformat(night["ended"])) for night in nights]
    assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(spans))
    runs = list((home / "stillhouse" / "runs" / "tiny").iterdir())
    assert {night["run"] for night in nights} <= {run.name for run in runs}
    assert len({night["run"] for night in nights}) == len(nights)
    # The last run read what was added to the folder after the first.
    read = [CorpusFacts.read(run / CORPUS_FOLDER).documents for run in sorted(runs)]
    assert (read[0], read[-1]) == (64, 128)


def test_mistakes_cost_one_line_and_leave_nothing(tiny: Path, tmp_path: Path) -> None:
    path = write_family(tmp_path, tiny, {"small": STUDENTS["small"]})
    home = tmp_path / "home"
    home.mkdir()
    head = Head(home)  # not started: each of these is found before a cluster is asked
    snapshot = ["--cron", "* * * * *", "--snapshot"]
    for options, says, code in [
        (["--cron", "61 * * * *"], "--cron: got '61 * * * *'", 2),
        (["--cron", "* * * * *", "--timezone", "Mars/Olympus"], "--timezone: got 'Mars/Olympus'", 2),
        (["--cron", "* * * * *", "--overlap", "both"], "--overlap: got 'both'", 2),
        (["--cron", "* * * * *"], "or accept the snapshot with --snapshot", 2),
        ([*snapshot, "--set", "corpus.paths=['dt={{ ds }}']"], "has a date macro, but files of this machine", 2),
        ([*snapshot, "--set", "corpus.paths=[absent.jsonl]"], "absent.jsonl is not there", 2),
        ([*snapshot, "--address", "http://127.0.0.1:9"], "no Ray job server answers there", 1),
    ]:
        done = stillhouse("schedule", "add", str(path), *options, env=head.env)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (code, 1), done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert not (home / "stillhouse").exists()
