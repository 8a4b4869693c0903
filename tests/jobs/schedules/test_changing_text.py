"""What scheduled runs read: the text of their own day where it lies on the cluster, a snapshot only on request."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cluster.corpus.files import filesystems_of, select_files
from cluster.corpus.read import TextReader
from cluster.dates import rendered
from cluster.errors import UserError
from cluster.specfile import load_spec
from jobs.contexts import Context
from jobs.schedules import desk, remote
from jobs.schedules.ledger import Ledger
from jobs.schedules.plan import schedule_of
from jobs.schedules.scheduler import Scheduler
from jobs.submit import SPEC_FILE
from tests.tiny import tiny_family

CONTEXT = Context(address="http://head:8265")
ADDED = datetime(2026, 5, 1, 1, tzinfo=UTC)


class Cluster:
    """A job server that runs only the first step of each job: it reads the text that the job's spec names."""

    def __init__(self) -> None:
        self.read: list[list[str]] = []
        self.jobs: dict[str, Any] = {}

    def submit_job(self, *, submission_id: str, entrypoint: str, runtime_env: dict[str, Any], **_: Any) -> None:
        day = re.fullmatch(rf"python -m jobs run {SPEC_FILE} --ds (\S+)", entrypoint)
        assert day is not None, entrypoint
        spec = load_spec(Path(runtime_env["working_dir"]) / SPEC_FILE)
        corpus = rendered(spec, date.fromisoformat(day[1])).corpus
        files = select_files(corpus.paths).files
        tables = [t for f in files for t in TextReader(f, filesystems_of([f])[False], corpus.text_field)]
        self.read.append([text for table in tables for text in table.column("text").to_pylist()])
        self.jobs[submission_id] = SimpleNamespace(status="SUCCEEDED", driver_exit_code=0)

    def get_job_info(self, job: str) -> Any:
        return self.jobs[job]

    def get_job_logs(self, job: str) -> str:
        return ""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder whose text changes between two runs, with another folder for each day in it."""
    for day in ("01", "02"):
        (tmp_path / "text" / f"dt=2026-05-{day}").mkdir(parents=True)
        (tmp_path / "text" / f"dt=2026-05-{day}" / "a.txt").write_text(f"of the {day}")
    (tmp_path / "text" / "live").mkdir()
    (tmp_path / "text" / "live" / "a.txt").write_text("before")
    return tmp_path / "text"


@pytest.fixture
def add(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ledger]:
    """Add a daily schedule as `stillhouse schedule add` does; the request reaches the ledger without a job."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'schedules.db'}")

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return ADDED

    def ask(_context: Context, request: str, folder: Path, **fields: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            return desk.REQUESTS[request](ledger, **fields)

    monkeypatch.setattr(desk, "datetime", Clock)
    monkeypatch.setattr(remote, "ask", ask)
    monkeypatch.setattr("jobs.submit.has_nodes_for_drivers", lambda _client: False)

    def added(path: str, upload: bool, **options: Any) -> Ledger:
        tree = tiny_family("/models/teacher", path, corpus={"upload": upload})
        (tmp_path / "family.yaml").write_text(yaml.safe_dump(tree))
        schedule = schedule_of(name="daily", cron="0 2 * * *")
        remote.add_schedule(schedule, load_spec(tmp_path / "family.yaml"), CONTEXT, [], **options)
        return ledger

    return added


def two_runs(ledger: Ledger, between: Callable[[], Any]) -> list[list[str]]:
    """The texts that the runs of two days read."""
    cluster, now = Cluster(), [ADDED]
    scheduler = Scheduler(ledger, cluster, lambda: now[0])
    for day in (1, 2):
        now[0] = ADDED.replace(day=day, hour=2)
        scheduler.look()
        between()
        scheduler.look()
    assert [night.state for night in ledger.nights("daily")] == ["succeeded"] * 2
    return cluster.read


@pytest.mark.parametrize(
    ("path", "second"),
    [
        ("text/live", ["after", "new"]),
        ("text/live/*.txt", ["after", "new"]),
        ("text/live/a.txt", ["after"]),
        ("text/dt={{ ds }}", ["of the 02"]),
    ],
)
def test_two_runs_over_a_changing_folder_read_the_changed_text(
    path: str, second: list[str], add: Callable[..., Ledger], text: Path
) -> None:
    ledger = add(path, upload=False)

    def change() -> None:
        (text / "live" / "a.txt").write_text("after")
        (text / "live" / "b.txt").write_text("new")

    first = "of the 01" if "ds" in path else "before"
    assert two_runs(ledger, change) == [[first], second]


def test_a_snapshot_is_read_by_every_run_and_only_where_it_was_accepted(add: Callable[..., Ledger], text: Path) -> None:
    with pytest.raises(UserError, match=r"corpus\.upload: false where .*, or accept the snapshot with --snapshot$"):
        add("text/live", upload=True)
    ledger = add("text/live", upload=True, snapshot=True)
    assert two_runs(ledger, lambda: (text / "live" / "a.txt").write_text("after")) == [["before"], ["before"]]


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_date_macro_in_an_uploaded_path_is_refused(snapshot: bool, add: Callable[..., Ledger]) -> None:
    with pytest.raises(UserError, match=r"dt=\{\{ ds \}\} has a date macro, but files of this machine are uploaded"):
        add("text/dt={{ ds }}", upload=True, snapshot=snapshot)


def test_text_in_a_bucket_needs_no_consent(add: Callable[..., Ledger]) -> None:
    assert [entry.family for entry in add("s3://bucket/dt={{ ds }}/", upload=True).entries()] == ["tiny"]
