"""`stillhouse runs` as a person types it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from cluster.kept_runs import kept_runs
from jobs.cli.main import main
from jobs.schedules.ledger import Entry, Ledger
from jobs.schedules.plan import schedule_of
from jobs.schedules.scheduler import packed
from tests.cluster.test_kept_runs import begun, run_elsewhere

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stillhouse_home: Path) -> Typed:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", "runs", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), *capfd.readouterr()

    return call


def test_ls_names_the_folder_that_has_no_runs(typed: Typed, stillhouse_home: Path) -> None:
    code, out, err = typed("ls")
    assert (code, out.count("\n")) == (0, 1) and f"no runs in {stillhouse_home / 'runs'};" in err


def test_ls_shows_state_age_and_size(typed: Typed) -> None:
    old, new = begun(9.5, {"small": 3}), begun(0.1)
    header, *lines = [line.split("\t") for line in typed("ls")[1].splitlines()]
    assert header == ["run", "family", "state", "age", "size", "frees", "registered"]
    assert [line[:4] for line in lines] == [
        [old.name, "tiny", "finished", "9d"],
        [new.name, "tiny", "unfinished", "2h"],
    ]
    assert (lines[0][-1], lines[1][-1]) == ("small v3", "")
    first, _ = json.loads(typed("ls", "--json")[1])
    assert (first["name"], first["folder"], first["registered"]) == (old.name, str(old.folder), {"small": 3})
    assert first["size"] == first["frees"] > 1000


def test_rm_removes_what_does_not_run_or_nothing(typed: Typed) -> None:
    one, two, three = (begun(versions={"small": n}) for n in (1, 2, 3))
    with run_elsewhere(two):
        code, out, err = typed("rm", one.name, two.name)
        assert (code, out) == (2, "") and err == f"error: {two.name} cannot be removed: it is running\n"
    assert one.folder.exists()
    code, out, _ = typed("rm", one.name, str(two.folder))
    assert code == 0 and out.startswith(f"removed {one.name}, ")
    assert [run.folder.exists() for run in (one, two, three)] == [False, False, True]
    assert typed("rm", one.name)[0] == 2
    assert typed("rm", begun(versions={}).name)[1].endswith("stays; small was never registered and is gone\n")


def test_gc_removes_by_age_what_is_not_needed(typed: Typed) -> None:
    finished, only_copy, new = begun(40, {"small": 1}), begun(39, {}), begun(1, {"small": 2})
    last = begun(38)
    arguments = ("gc", "--older-than", "30d")
    would = typed(*arguments, "--dry-run")[1].splitlines()
    assert finished.folder.exists()
    out = typed(*arguments)[1].splitlines()
    assert [line.replace("would remove", "removed") for line in would] == out
    assert [line.partition(",")[0] for line in out[:-1]] == [
        f"removed {finished.name}",
        f"left {only_copy.name}",
        f"left {last.name}",
    ]
    assert out[1].endswith(": it has the only copy of small; --resume registers them")
    assert out[2].endswith(": its family can be resumed from it")
    assert out[-1].startswith("removed 1 of 4 runs; ")
    assert [run.folder.exists() for run in (finished, only_copy, last, new)] == [False, True, True, True]


def test_gc_removes_the_longest_unused_until_the_rest_fits(typed: Typed) -> None:
    oldest, middle, newest = begun(3, {"small": 1}), begun(2, {"small": 2}), begun(1, {"small": 3})
    size = json.loads(typed("ls", "--json")[1])[0]["frees"]
    assert typed("gc", "--max-size", str(4 * size))[1].startswith("removed 0 of 3 runs")
    assert typed("gc", "--max-size", str(2 * size + 10))[1].startswith(f"removed {oldest.name}, ")
    assert (middle.folder.exists(), newest.folder.exists()) == (True, True)


def test_gc_goes_on_when_a_run_begins_meanwhile(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed, other = begun(50, {"small": 1}), begun(40, {"small": 2})
    listed = kept_runs()
    monkeypatch.setattr("jobs.runs.kept_runs", lambda _: listed)
    with run_elsewhere(resumed):
        code, out, _ = typed("gc", "--older-than", "30d")
    assert code == 0 and f"left {resumed.name}, " in out and f"{resumed.name} is running" in out
    assert (resumed.folder.exists(), other.folder.exists()) == (True, False)


def test_what_only_a_schedule_needs_is_kept(typed: Typed, tmp_path: Path) -> None:
    teacher, retried, free = (begun(50, {"small": n}) for n in (1, 2, 3))
    package = tmp_path / "package"
    package.mkdir()
    spec = {"name": "student", "teacher": {"model": f"{teacher.folder}/students/small/checkpoint_7/model"}}
    (package / "family.yaml").write_text(yaml.safe_dump(spec))
    ledger, now = Ledger(), datetime.now(UTC)
    ledger.add(Entry(schedule_of(name="nightly", cron="0 2 * * *"), "student", packed(package), {}, "ada", True, now))
    ledger.update(ledger.run_now("nightly", now), run=retried.name)
    code, _, err = typed("rm", teacher.name)
    assert (code, err) == (2, f"error: {teacher.name} cannot be removed: it is needed by the schedule nightly\n")
    out = typed("gc", "--older-than", "30d")[1].splitlines()
    assert out[0].startswith(f"left {teacher.name}, ") and out[0].endswith(": it is needed by the schedule nightly")
    assert out[1].startswith(f"left {retried.name}, ") and out[1].endswith(" of nightly")
    assert out[2].startswith(f"removed {free.name}, ")
    ledger.remove("nightly")
    assert typed("gc", "--older-than", "30d")[1].count("removed tiny-") == 2


def test_gc_removes_nothing_when_the_schedules_cannot_be_read(typed: Typed, stillhouse_home: Path) -> None:
    run = begun(50, {"small": 1})
    (stillhouse_home / "schedules.db").write_text("no database at all, but long enough to be taken for one" * 20)
    code, out, err = typed("gc", "--older-than", "30d")
    assert (code, out, err.count("\n")) == (1, "", 1) and "the schedules' database cannot be opened" in err
    assert run.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gc"], "runs gc: give --older-than AGE, --max-size SIZE or both"),
        (["gc", "--older-than", "soon"], "--older-than soon: give a whole number"),
        (["rm", "tiny-1"], "tiny-1: neither a run's folder nor the name of a run under"),
    ],
)
def test_a_mistake_costs_one_line(typed: Typed, arguments: list[str], says: str) -> None:
    code, out, err = typed(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
