"""What is started, by a scheduler that may die between any two steps, on a real database and a clock of the test's own.

The cluster is a fake: it must lose jobs, hang and forget at moments that a real one cannot be told to. The real one is
in tests/integration/test_schedule.py.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jobs.client import JobServerError
from jobs.schedules.ledger import Entry, Ledger, Night
from jobs.schedules.plan import schedule_of
from jobs.schedules.scheduler import LEASE_S, Scheduler, packed

START = datetime(2026, 5, 1, 1, 59, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def to(self, hour: int, minute: int = 0, day: int = 1, second: int = 0) -> None:
        self.now = START.replace(day=day, hour=hour, minute=minute, second=second)


class Dies(BaseException):
    """The scheduler's process is killed."""


class Cluster:
    """A job server whose jobs end when a test says so.

    Attributes:
        started: every job that was submitted, in order.
        dies: called at every submission, to kill whoever submits before or after it counts.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.started: list[str] = []
        self.dies_before = self.dies_after = False

    def submit_job(self, *, submission_id: str, entrypoint: str, **_: Any) -> None:
        if self.dies_before:
            self.dies_before = False
            raise Dies
        if submission_id in self.jobs:
            raise JobServerError(500, f"Job with submission_id {submission_id} already exists")
        self.jobs[submission_id] = {"status": "RUNNING", "log": "", "code": None, "entrypoint": entrypoint}
        self.started.append(submission_id)
        if self.dies_after:
            self.dies_after = False
            raise Dies

    def get_job_info(self, job: str) -> Any:
        if job not in self.jobs:
            raise JobServerError(404, f"Job {job} does not exist")
        return SimpleNamespace(status=self.jobs[job]["status"], driver_exit_code=self.jobs[job]["code"])

    def get_job_logs(self, job: str) -> str:
        return str(self.jobs[job]["log"])

    def stop_job(self, job: str) -> None:
        self.jobs[job]["status"] = "STOPPING"

    def end(self, job: str, status: str = "SUCCEEDED", code: int | None = 0, log: str = "") -> None:
        self.jobs[job].update(status=status, code=code, log=log)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr("jobs.submit.has_nodes_for_drivers", lambda _client: False)
    return Cluster()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'schedules.db'}")


@pytest.fixture
def in_memory() -> Ledger:
    """One that waits for no disk, for thousands of looks."""
    return Ledger("sqlite://")


@pytest.fixture
def begin(ledger: Ledger, cluster: Cluster, clock: Clock, tmp_path: Path) -> Callable[..., Scheduler]:
    """Add the schedule ``demo``, every hour, and give a scheduler; called again, another scheduler."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "family.yaml").write_text("name: demo")

    def scheduler(**fields: Any) -> Scheduler:
        if fields or not ledger.entries():
            schedule = schedule_of(**{"name": "demo", "cron": "0 * * * *", **fields})
            ledger.add(Entry(schedule, "demo", packed(tmp_path / "package"), {}, "ada", False, clock.now))
        return Scheduler(ledger, cluster, clock)

    return scheduler


def states(ledger: Ledger) -> list[str]:
    return [night.state for night in reversed(ledger.nights("demo"))]


def last(ledger: Ledger) -> Night:
    return ledger.nights("demo", most=1)[0]


def test_a_night_is_started_when_it_is_due_and_its_end_is_written_down(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin()
    assert scheduler.look() and cluster.started == []
    clock.to(2)
    scheduler.look()
    (job,) = cluster.started
    assert job == "demo-20260501T020000Z-1"
    assert cluster.jobs[job]["entrypoint"] == "python -m jobs run family.yaml --ds 2026-05-01"
    scheduler.look()
    said = "promotion: demo-small v2 is champion: KL 1 against 2"
    cluster.end(job, log=f"run demo-1, log /x\n[0:01] distilling\n{said}\n")
    clock.to(2, 10)
    scheduler.look()
    night = last(ledger)
    assert (night.state, night.run, night.ended) == ("succeeded", "demo-1", clock.now)
    assert night.detail == said
    assert len(cluster.started) == 1


@pytest.mark.parametrize(
    ("overlap", "at_three", "after_the_end"),
    [
        ("skip", ["running", "skipped"], ["succeeded", "skipped"]),
        ("queue", ["running", "waiting"], ["succeeded", "running"]),
        ("replace", ["running", "waiting"], ["replaced", "running"]),
    ],
)
def test_a_night_never_runs_beside_the_one_before(
    overlap: str,
    at_three: list[str],
    after_the_end: list[str],
    begin: Callable[..., Scheduler],
    ledger: Ledger,
    cluster: Cluster,
    clock: Clock,
) -> None:
    scheduler = begin(overlap=overlap)
    for hour in (2, 3):
        clock.to(hour)
        scheduler.look()
    scheduler.look()
    assert states(ledger) == at_three
    assert len(cluster.started) == 1
    first = cluster.started[0]
    # One that is told to end takes its time, and nothing runs beside it until it has.
    assert cluster.jobs[first]["status"] == ("STOPPING" if overlap == "replace" else "RUNNING")
    cluster.end(first, "STOPPED" if overlap == "replace" else "SUCCEEDED")
    scheduler.look()
    assert states(ledger) == after_the_end


@pytest.mark.parametrize("missed", ["once", "skip"])
def test_nights_without_a_scheduler_are_caught_up_once_or_not_at_all(
    missed: str, begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    begin(missed=missed)
    clock.to(5, 30)
    begin().look()
    once = missed == "once"
    assert states(ledger) == ["missed", "missed", "missed", "running" if once else "missed"]
    assert cluster.started == (["demo-20260501T050000Z-1"] if once else [])
    assert ledger.nights("demo")[-1].detail == "no scheduler was there to start it"


def test_one_that_failed_is_tried_again_later_and_goes_on_where_it_broke_off(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin(retries=1, retry_s=60)
    clock.to(2)
    scheduler.look()
    cluster.end(cluster.started[0], "FAILED", 1, "run demo-7, log /x\nerror: the teacher is gone\n")
    scheduler.look()
    assert (last(ledger).state, len(cluster.started)) == ("waiting", 1)
    assert last(ledger).detail == "try 1 of 2 failed: error: the teacher is gone"
    clock.to(2, 0, second=59)
    scheduler.look()
    assert len(cluster.started) == 1
    clock.to(2, 1)
    scheduler.look()
    assert cluster.started[1] == "demo-20260501T020000Z-2"
    assert cluster.jobs[cluster.started[1]]["entrypoint"] == "python -m jobs run demo-7 --resume"
    cluster.end(cluster.started[1], "FAILED", 1, "error: again\n")
    scheduler.look()
    assert (last(ledger).state, last(ledger).detail) == ("failed", "error: again")


def test_a_mistake_in_the_family_is_not_tried_again(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin()
    clock.to(2)
    scheduler.look()
    cluster.end(cluster.started[0], "FAILED", 2, "error: teacher.model: /gone is not there\n")
    scheduler.look()
    assert (last(ledger).state, last(ledger).detail) == ("failed", "error: teacher.model: /gone is not there")


@pytest.mark.parametrize("ends_as", ["STOPPED", "FAILED"])
def test_one_that_runs_too_long_is_stopped_and_has_failed_when_it_has_ended(
    ends_as: str, begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin(longest_s=600)
    clock.to(2)
    scheduler.look()
    clock.to(2, 11)
    scheduler.look()
    assert (states(ledger), cluster.jobs[cluster.started[0]]["status"]) == (["running"], "STOPPING")
    cluster.end(cluster.started[0], ends_as, None)
    scheduler.look()
    assert (last(ledger).state, last(ledger).detail) == ("failed", "it ran for longer than it may")


def test_one_that_somebody_stops_is_not_tried_again(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin()
    clock.to(2)
    scheduler.look()
    cluster.end(cluster.started[0], "STOPPED", None)
    scheduler.look()
    assert states(ledger) == ["stopped"]


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_scheduler_that_dies_over_a_submission_neither_loses_nor_doubles_the_night(
    dies: str, begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin(retries=0)
    setattr(cluster, f"dies_{dies}", True)
    clock.to(2)
    with pytest.raises(Dies):
        scheduler.look()
    clock.now += timedelta(seconds=LEASE_S + 2)
    again = begin()
    again.look()
    again.look()
    assert cluster.started == ["demo-20260501T020000Z-1"]
    assert (last(ledger).state, last(ledger).attempt) == ("running", 1)


def test_a_head_that_was_started_anew_has_forgotten_the_night_and_gets_it_again(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin(retries=0)
    clock.to(2)
    scheduler.look()
    cluster.jobs[cluster.started[0]]["log"] = "run demo-9, log /x\n"
    scheduler.look()
    cluster.jobs.clear()
    scheduler.look()
    assert states(ledger) == ["running"]
    assert cluster.jobs["demo-20260501T020000Z-1"]["entrypoint"] == "python -m jobs run demo-9 --resume"


def test_only_one_of_two_schedulers_works_until_it_is_not_heard_of(
    begin: Callable[..., Scheduler], cluster: Cluster, clock: Clock
) -> None:
    one, two = begin(), begin()
    assert one.look() and not two.look()
    clock.to(2)
    assert two.look() and not one.look()
    assert len(cluster.started) == 1


@pytest.mark.parametrize(
    "away", [RuntimeError("502 Bad Gateway"), OperationalError("select", {}, OSError("no server"))]
)
def test_a_job_server_or_a_database_that_is_away_is_waited_for(
    away: Exception,
    begin: Callable[..., Scheduler],
    ledger: Ledger,
    cluster: Cluster,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler, looks, stop = begin(), iter([away, None]), threading.Event()
    look = scheduler.look

    def now_and_then() -> bool:
        if (error := next(looks)) is not None:
            raise error
        stop.set()
        return look()

    clock.to(2)
    monkeypatch.setattr("jobs.schedules.scheduler.LOOK_S", 0.0)
    monkeypatch.setattr(scheduler, "look", now_and_then)
    scheduler.serve(stop)
    assert states(ledger) == ["running"]
    assert ledger.holder(clock.now) is None


def test_what_came_due_while_a_schedule_rested_is_not_missed(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin()
    ledger.pause("demo", True, clock.now)
    clock.to(4, 30)
    scheduler.look()
    ledger.pause("demo", False, clock.now)
    scheduler.look()
    assert (states(ledger), cluster.started) == ([], [])
    clock.to(5)
    scheduler.look()
    assert states(ledger) == ["running"]


def test_a_night_by_hand_keeps_the_schedule_s_rules(
    begin: Callable[..., Scheduler], ledger: Ledger, cluster: Cluster, clock: Clock
) -> None:
    scheduler = begin()
    ledger.run_now("demo", clock.now)
    scheduler.look()
    assert cluster.started == ["demo-20260501T015900Z-1"]
    clock.to(2)
    scheduler.look()
    assert states(ledger) == ["running", "skipped"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(1, 8))])
@pytest.mark.parametrize("overlap", ["skip", "queue", "replace"])
def test_over_many_nights_with_deaths_none_is_lost_doubled_or_beside_another(
    seed: int, overlap: str, in_memory: Ledger, cluster: Cluster, clock: Clock
) -> None:
    dice, ledger = random.Random(seed), in_memory
    schedule = schedule_of(name="demo", cron="0 * * * *", overlap=overlap, retries=2, retry_s=300)
    ledger.add(Entry(schedule, "demo", packed(Path(__file__).parent / "none"), {}, "ada", False, clock.now))
    scheduler = Scheduler(ledger, cluster, clock)
    for minute in range(1, 60 * 10):
        clock.now = START + timedelta(minutes=minute)
        cluster.dies_before, cluster.dies_after = dice.random() < 0.2, dice.random() < 0.2
        for job, facts in cluster.jobs.items():
            if facts["status"] == "STOPPING" and dice.random() < 0.5:
                cluster.end(job, "STOPPED", None)
            elif facts["status"] == "RUNNING" and dice.random() < 0.02:
                cluster.end(job, *dice.choice([("SUCCEEDED", 0), ("SUCCEEDED", 0), ("FAILED", 1)]))
        try:
            scheduler.look()
        except Dies:
            scheduler = Scheduler(ledger, cluster, clock)
        assert sum(facts["status"] in ("RUNNING", "STOPPING") for facts in cluster.jobs.values()) <= 1
    due = [night.due for night in reversed(ledger.nights("demo"))]
    assert due == [START.replace(hour=2, minute=0) + timedelta(hours=n) for n in range(len(due))]
    assert len(due) >= 9
    assert len(cluster.started) == len(set(cluster.started))
    ran = {job.rsplit("-", 1)[0] for job in cluster.started}
    for night in ledger.nights("demo"):
        began = f"demo-{night.due:%Y%m%dT%H%M%SZ}" in ran
        # A night that is over had its try, or its reason.
        assert began or night.state == "waiting" or night.detail, night
