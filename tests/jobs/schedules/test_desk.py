"""A request in, an answer out, as a cluster's job gives it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.contexts import Context
from jobs.schedules import desk
from jobs.schedules.ledger import Ledger
from jobs.schedules.scheduler import unpack
from jobs.schedules.shown import say_scheduler


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job that came with a family."""
    folder = tmp_path / "job"
    (folder / "corpus").mkdir(parents=True)
    (folder / "family.yaml").write_text("name: demo")
    (folder / "corpus" / "0-a.txt").write_text("a text")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STILLHOUSE_DATABASE", f"sqlite:///{tmp_path / 'schedules.db'}")
    return folder


def ask(request: str, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(desk.answer(json.dumps({"request": request, **fields})))
    return answer


def add(**definition: Any) -> dict[str, Any]:
    whole = {"name": "demo", "cron": "0 2 * * *", "timezone": "Europe/Berlin", **definition}
    return ask("add", definition=whole, family="demo", user="ada", variables={"KEY": "value"})


def test_a_schedule_is_kept_with_its_family_and_replaced_by_one_of_its_name(tmp_path: Path) -> None:
    assert add() == {"replaced": False, "scheduler": None}
    assert add(cron="0 3 * * *")["replaced"]
    entry = Ledger().entry("demo")
    assert (entry.schedule.cron, entry.user, entry.variables) == ("0 3 * * *", "ada", {"KEY": "value"})
    unpack(entry.package, tmp_path / "again")
    assert (tmp_path / "again" / "corpus" / "0-a.txt").read_text() == "a text"
    (row,) = ask("ls")["schedules"]
    assert (row["name"], row["family"], row["last"], row["paused"]) == ("demo", "demo", None, False)
    assert row["next"].endswith(("03:00:00+01:00", "03:00:00+02:00"))
    # A secret in a variable is for the nights, not for whoever looks.
    assert "value" not in json.dumps([ask("ls"), ask("show", name="demo")])


def test_it_rests_goes_on_and_is_forgotten_but_for_its_history() -> None:
    add()
    ask("pause", name="demo", paused=True)
    assert ask("ls")["schedules"][0]["next"] is None
    ask("pause", name="demo", paused=False)
    assert len(ask("show", name="demo")["upcoming"]) == desk.NEXT_SHOWN
    ask("run_now", name="demo")
    assert ask("rm", name="demo")["running"] == []
    assert ask("ls")["schedules"] == []
    (night,) = ask("history", name="demo", most=5)["nights"]
    assert (night["state"], night["detail"]) == ("skipped", "the schedule was removed")


@pytest.mark.parametrize("request_name", ["show", "rm", "run_now"])
def test_one_that_is_not_there_is_a_mistake_that_names_those_that_are(request_name: str) -> None:
    assert "none yet; see `stillhouse schedule add`" in ask(request_name, name="other")["error"]
    add()
    answer = ask(request_name, name="other")
    assert (answer["error"], answer["exit_code"]) == ("there is no schedule 'other'; there are: demo", 2)


def test_a_database_that_cannot_be_opened_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_DATABASE", "sqlite:////nowhere/at/all/x.db")
    answer = ask("ls")
    assert "the schedules' database cannot be opened" in answer["error"]
    assert answer["exit_code"] == 1


def test_a_scheduler_is_started_only_where_none_has_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Context] = []
    monkeypatch.setattr("jobs.schedules.remote.begin_scheduler", lambda where: begun.append(where) or "job")
    where, ledger, now = Context(address="http://head:8265"), Ledger(), datetime.now(UTC)
    ledger.hold("deployment", now, now + timedelta(minutes=5))
    say_scheduler(add(), where, begin=True)
    assert not begun
    # One that was started all the same waits.
    assert not ledger.hold("job", now, now + timedelta(minutes=5))
    ledger.release("deployment")
    say_scheduler(add(), where, begin=True)
    assert begun == [where]
    assert ledger.hold("job", now, now + timedelta(minutes=5))
