"""A run's folder: always a new one, never half written, resumed only from a spec that trains the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from cluster import runs
from cluster.errors import RunError, UserError
from cluster.runs import KeptRun, Run, kept_runs, last_run, leftovers, open_run, remove_run
from cluster.spec import FamilySpec
from tests.tiny import tiny_family

DAY = 86_400.0
# Runs a run's lock as another process does, without what it takes to import ours.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


def spec(**fields: Any) -> FamilySpec:
    """The tiny family with other sections, or other fields of its student."""
    sections = {name: value for name, value in fields.items() if name in FamilySpec.model_fields}
    tree = tiny_family(**sections)
    tree["students"]["small"] |= {name: value for name, value in fields.items() if name not in sections}
    return FamilySpec.model_validate(tree)


def test_two_runs_in_one_second_have_two_folders(stillhouse_home: Path) -> None:
    runs = [open_run(spec(), resume=False) for _ in range(5)]
    assert len({run.name for run in runs}) == len({run.folder for run in runs}) == 5
    assert all(run.folder.parent == stillhouse_home / "runs" / "tiny" for run in runs)


def test_resuming_nothing_says_so(stillhouse_home: Path) -> None:
    with pytest.raises(UserError, match=rf"'tiny' has no run under {stillhouse_home}.*without --resume"):
        open_run(spec(), resume=True)


def test_a_resumed_run_is_the_last_one_with_what_it_had_saved(stillhouse_home: Path) -> None:
    first, last = open_run(spec(), resume=False), open_run(spec(), resume=False)
    last.mlflow, last.versions = {"": "a1", "small": "b2"}, {"small": 3}
    last.save()
    found = open_run(spec(), resume=True)
    assert (found.folder, found.name, found.mlflow, found.versions) == (
        last.folder,
        last.name,
        last.mlflow,
        last.versions,
    )
    assert (first.resumed, found.resumed) == (False, True)


def test_a_run_remembers_the_date_of_its_corpus_and_keeps_it(stillhouse_home: Path) -> None:
    open_run(spec(), resume=False, ds=date(2028, 2, 29))
    assert last_run("tiny").ds == "2028-02-29"
    assert open_run(spec(), resume=True, ds=date(2028, 3, 1)).ds == last_run("tiny").ds == "2028-02-29"


def test_a_run_from_before_there_were_dates_has_none(stillhouse_home: Path) -> None:
    run = open_run(spec(), resume=False)
    kept = json.loads((run.folder / "run.json").read_text())
    assert kept.pop("ds") == date.today().isoformat()
    (run.folder / "run.json").write_text(json.dumps(kept))
    assert last_run("tiny").ds == ""


def test_a_run_of_another_family_is_not_resumed(stillhouse_home: Path) -> None:
    open_run(FamilySpec.model_validate({**tiny_family(), "name": "other"}), resume=False)
    with pytest.raises(UserError, match="'tiny' has no run"):
        open_run(spec(), resume=True)


def test_resuming_with_another_learning_rate_names_it_and_only_it(stillhouse_home: Path) -> None:
    open_run(spec(), resume=False)
    with pytest.raises(UserError) as caught:
        open_run(spec(lr=1e-4, serving={"requests": 3}), resume=True)
    assert "differs in students.small.lr. Put" in str(caught.value)


def test_a_run_is_resumed_with_the_teacher_that_it_began_with(stillhouse_home: Path) -> None:
    run = open_run(spec(), resume=False, teacher="aa/bb")
    assert open_run(spec(), resume=True, teacher="aa/bb").teacher == run.teacher == "aa/bb"
    changed = "another teacher: the fingerprint of teacher was aa/bb and is cc/bb; put its files"
    with pytest.raises(UserError, match=changed):
        open_run(spec(), resume=True, teacher="cc/bb")
    assert last_run("tiny").teacher == "aa/bb"


def test_a_run_from_before_fingerprints_were_kept_is_resumed(stillhouse_home: Path) -> None:
    open_run(spec(), resume=False)
    assert open_run(spec(), resume=True, teacher="aa/bb").resumed


@pytest.mark.parametrize("section", [{"serving": {"requests": 3}}, {"tracking": {"uri": "http://elsewhere:5000"}}])
def test_resuming_with_other_serving_or_tracking_is_accepted(stillhouse_home: Path, section: dict[str, Any]) -> None:
    run = open_run(spec(), resume=False)
    assert open_run(spec(**section), resume=True).folder == run.folder


@pytest.mark.parametrize(
    "fields", [{"ranks": 2}, {"micro_batch": 2}, {"cpus_per_rank": 0.5}, {"gpus_per_rank": 1.0}, {"max_failures": 9}]
)
def test_a_student_may_be_resumed_on_other_ranks(stillhouse_home: Path, fields: dict[str, Any]) -> None:
    run = open_run(spec(), resume=False)
    assert open_run(spec(**fields), resume=True).folder == run.folder


@pytest.mark.parametrize("fields", [{"zero_stage": 2}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}])
def test_what_else_makes_a_student_is_refused_by_name(stillhouse_home: Path, fields: dict[str, Any]) -> None:
    open_run(spec(), resume=False)
    with pytest.raises(UserError, match=rf"differs in students\.small\.{next(iter(fields))}\. Put"):
        open_run(spec(ranks=2, **fields), resume=True)


def test_saving_leaves_the_whole_state_and_nothing_beside_it(stillhouse_home: Path) -> None:
    run = open_run(spec(), resume=False)
    before = (run.folder / "run.json").stat().st_ino
    run.versions = {"small": 1}
    run.save()
    assert {path.name for path in run.folder.iterdir()} == {"run.json", "run.lock", "spec.json"}
    # Another file in its place, not the old one written over: a crash in between leaves the old one whole.
    assert (run.folder / "run.json").stat().st_ino != before
    assert json.loads((run.folder / "spec.json").read_text()) == spec().model_dump(mode="json")


# -- what is kept ------------------------------------------------------------------------------------------------------


@contextmanager
def run_elsewhere(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs a run; it is killed at the end, if not before."""
    lock = str(run.folder / "run.lock")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], **pipes) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def begun(age_days: float = 0.0, versions: dict[str, int] | None = None, **fields: Any) -> Run:
    """A run that no process runs any more, with a model of 1,000 bytes where it has come so far."""
    run = open_run(spec(**fields), resume=False)
    runs._release(run.folder)
    if versions is not None:
        model = run.folder / "students/small/checkpoint_7/model/model.safetensors"
        model.parent.mkdir(parents=True)
        model.write_bytes(b"w" * 1000)
        run.versions = versions
        run.save()
    then = time.time() - age_days * DAY
    for path in run.folder.rglob("*"):
        os.utime(path, (then, then))
    return run


def kept(run: Run) -> KeptRun:
    return next(each for each in kept_runs() if each.folder == run.folder)


def test_a_run_is_running_as_long_as_its_process_lives(stillhouse_home: Path) -> None:
    run = begun(versions={})
    assert kept(run).state == "unfinished"
    with run_elsewhere(run) as process:
        assert (kept(run).state, kept(run).in_use) == ("running", "it is running")
        for refused in (lambda: remove_run(run.folder), lambda: open_run(spec(), resume=True)):
            with pytest.raises(RunError, match=f"{run.name} is running; wait for its end, or stop it first"):
                refused()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kept(run).state == "unfinished"
    assert open_run(spec(), resume=True).name == run.name
    assert kept(run).state == "running"  # by us


def test_a_run_is_finished_when_a_resumed_one_would_have_nothing_to_do(stillhouse_home: Path) -> None:
    assert kept(begun(versions={"small": 3})).state == "finished"
    undecided = begun(versions={"small": 4}, promotion={})
    assert kept(undecided).state == "unfinished"
    undecided.promotions = {"small": {"outcome": "kept"}}
    undecided.save()
    assert kept(undecided).state == "finished"


def test_what_is_linked_elsewhere_takes_room_and_frees_none(stillhouse_home: Path) -> None:
    run = begun(versions={"small": 1})
    before = kept(run)
    assert before.size == before.frees > 1000
    os.link(run.folder / "students/small/checkpoint_7/model/model.safetensors", stillhouse_home / "artifact")
    after = kept(run)
    assert (after.size, before.frees - after.frees) == (before.size, 1000)


def test_a_clean_up_leaves_what_is_needed(stillhouse_home: Path) -> None:
    trained = begun(versions={})
    old, last = begun(), begun()
    assert kept(trained).needed == "it has the only copy of small; --resume registers them"
    assert (kept(old).needed, kept(last).needed) == ("", "its family can be resumed from it")
    finished = begun(versions={"small": 1})
    assert (kept(last).needed, kept(finished).needed) == ("", "")
    # An unfinished run needs what its spec names, whoever made it; a finished one does not any more.
    for versions, named in (({}, True), ({"small": 1}, False)):
        teacher = {"model": f"{finished.folder}/students/small/checkpoint_7/model"}
        user = begun(versions=versions, teacher=teacher)
        assert kept(finished).in_use == (f"unfinished runs use it: {user.name}" if named else "")
        remove_run(user.folder)


def test_a_removed_run_leaves_nothing_and_a_killed_removal_is_no_run(
    stillhouse_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = begun(versions={"small": 1}), begun()
    remove_run(first.folder)
    assert not first.folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove_run(second.folder)
    assert kept_runs() == [] and list(leftovers()) == []
    os.utime(second.folder, (time.time() - DAY,) * 2)
    assert list(leftovers()) == [second.folder]
    remove_run(second.folder)
    assert list((stillhouse_home / "runs").iterdir()) == []
