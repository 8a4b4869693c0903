"""What is known of the runs that are kept, and that a removal takes what it may and nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import runs
from cluster.errors import RunError
from cluster.kept_runs import KeptRun, kept_runs, leftovers, remove_run
from cluster.runs import Run, last_run, open_run
from tests.cluster.test_runs import spec

DAY = 86_400.0
# Runs a run's lock as another process does, without what it takes to import ours.
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""


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
    runs.release(run.folder)
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
        assert kept(finished).in_use == (f"it is needed by the unfinished run {user.name}" if named else "")
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
    assert [folder for folder, _ in leftovers()] == [second.folder]
    remove_run(second.folder)
    assert list((stillhouse_home / "runs").iterdir()) == []


def test_a_path_is_found_however_a_spec_writes_it(stillhouse_home: Path) -> None:
    run = begun(versions={"small": 1})
    link = stillhouse_home / "link"
    link.symlink_to(run.folder)
    folder = run.folder
    for path in (folder, f"{folder}/../{run.name}/students", f"file://{folder}/students", f"{link}/students"):
        user = begun(versions={}, teacher={"model": str(path)})
        assert kept(run).needed_by == (f"the unfinished run {user.name}",), path
        remove_run(user.folder)
    user = begun(versions={}, corpus={"paths": [f"{folder.parent}/*/texts/*.txt"], "text_field": "text"})
    assert kept(run).needed_by == (f"the unfinished run {user.name}",)
    assert kept(user).needed_by == ()  # a run may be removed although it names itself
    others = {"the schedule nightly": [f"{folder}/students/small"], "another": [f"{folder}-other/model", "tickets/"]}
    assert [run.needed_by[-1] for run in kept_runs(others) if run.folder == folder] == ["the schedule nightly"]


@pytest.mark.parametrize(
    ("file", "text"),
    [*((file, text) for file in ("run.json", "spec.json") for text in ('{"na', "[]", "{}")), ("spec.json", None)],
)
def test_a_damaged_run_hides_no_other_and_a_clean_up_leaves_it(
    stillhouse_home: Path, file: str, text: str | None
) -> None:
    good, bad = begun(versions={"small": 1}), begun(versions={"small": 2})
    (bad.folder / file).unlink()
    if text is not None:
        (bad.folder / file).write_text(text)
    assert (kept(good).state, kept(bad).state, kept(bad).in_use) == ("finished", "damaged", "")
    assert kept(bad).needed.startswith("its run.json or spec.json cannot be read")
    remove_run(bad.folder)
    assert not bad.folder.exists()


def test_a_run_that_is_removed_while_they_are_listed_is_left_out(
    stillhouse_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, there = begun(), begun()
    whole = Path.glob

    def late(self: Path, pattern: str) -> list[Path]:
        found = list(whole(self, pattern))
        shutil.rmtree(gone.folder, ignore_errors=True)
        return found

    monkeypatch.setattr(Path, "glob", late)
    assert [run.name for run in kept_runs()] == [there.name]


def test_no_symbolic_link_is_followed(stillhouse_home: Path) -> None:
    elsewhere = stillhouse_home / "elsewhere"
    moved, run = begun(versions={"small": 1}), begun(versions={"small": 2})
    shutil.move(moved.folder, elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    moved.folder.symlink_to(elsewhere)
    (run.folder / "inside").symlink_to(elsewhere)
    assert kept(moved).in_use.startswith(f"its folder is a symbolic link to {elsewhere}")
    with pytest.raises(RunError, match="is a symbolic link; remove it and what it names by hand"):
        remove_run(moved.folder)
    remove_run(run.folder)
    assert not run.folder.exists() and moved.folder.is_symlink()
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_a_clean_up_takes_no_folder_that_no_run_has_left(stillhouse_home: Path) -> None:
    run = begun(versions={"small": 1})
    other = stillhouse_home / "other"
    (other / "other-20260101-000000").mkdir(parents=True)
    family = run.folder.parent
    for name in ("notes", "tiny-notes", "other-20260101-000000"):
        (family / name).mkdir()
    (family / "tiny-20260101-000000").symlink_to(other)
    (family / "tiny-20260101-000001").symlink_to("/nowhere")
    (family.parent / "other").symlink_to(other)
    left = family / "tiny-20260101-000002-1"
    left.mkdir()
    for path in (*family.iterdir(), *other.iterdir()):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert list(leftovers()) == [(left, 0)]


def test_who_resumes_a_run_that_is_removed_meanwhile_is_told_so(
    stillhouse_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun()
    begun_run = last_run("tiny")
    remove_run(run.folder)
    with pytest.raises(RunError, match=f"{run.name} has just been removed"):
        open_run(spec(), resume=True, begun=begun_run)
    # The other one removes it between the opening of the lock's file and the lock.
    run = begun()
    lock = runs.fcntl.lockf

    def late(file: Any, how: int) -> None:
        shutil.rmtree(run.folder)
        lock(file, how)

    monkeypatch.setattr(runs.fcntl, "lockf", late)
    with pytest.raises(RunError, match=f"{run.name} has just been removed"):
        open_run(spec(), resume=True, begun=run)
