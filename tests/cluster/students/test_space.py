"""What is left of checkpoints that came to nothing goes; a full disk is waited for, and named when it stays full."""

import tempfile
import threading
import time
from pathlib import Path

import pytest

from cluster.errors import RunError
from cluster.students import space


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the file system says it has; a real one cannot be told to fill up."""
    facts = {"bytes": 0}
    monkeypatch.setattr(space, "LOOK_S", 0.01)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: type("Usage", (), {"free": facts["bytes"]}))
    return facts


def test_where_there_is_room_nothing_waits(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"x" * 1000)
    started = time.monotonic()
    assert space.size_of(tmp_path) == 1000
    space.wait_for_room(tmp_path, 1000)
    assert time.monotonic() - started < 1


def test_a_full_disk_is_waited_for(tmp_path: Path, free: dict[str, int]) -> None:
    threading.Timer(0.3, lambda: free.update(bytes=1 << 40)).start()
    started = time.monotonic()
    space.wait_for_room(tmp_path, 1 << 30, patience_s=30)
    assert 0.2 < time.monotonic() - started < 20


def test_a_disk_that_stays_full_is_named(tmp_path: Path, free: dict[str, int]) -> None:
    free["bytes"] = 5 << 20
    with pytest.raises(RunError, match=r"5 MiB free, it takes 1024 MiB; make room, .* --resume"):
        space.wait_for_room(tmp_path, 1 << 30, patience_s=0.05)


def test_a_folder_stays_for_whoever_takes_it_over_and_goes_when_the_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    staging = space.Staging("tiny-1", "small")
    with staging.folder() as kept:
        (kept / "weights").touch()
    assert (kept / "weights").exists()
    with pytest.raises(OSError, match="full"), staging.folder() as lost:
        (lost / "weights").touch()
        raise OSError("full")
    assert list(tmp_path.iterdir()) == [kept]


def test_a_new_life_takes_away_what_its_own_student_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    of = [("tiny-1", "small"), ("tiny-1", "small-2"), ("tiny-2", "small"), ("tiny-1", "smal")]
    left = []
    for run, student in of:
        with space.Staging(run, student).folder() as folder:
            left.append(folder)
    assert all(folder.is_dir() for folder in left)
    space.Staging("tiny-1", "small")
    assert [folder.is_dir() for folder in left] == [False, True, True, True]


def test_checkpoints_that_were_never_finished_are_removed(tmp_path: Path) -> None:
    for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (tmp_path / "checkpoint_list.json").touch()
    space.remove_torn(tmp_path, ["checkpoint_1", "checkpoint_3"])
    left = ["checkpoint_1", "checkpoint_3", "checkpoint_list.json", "other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    space.remove_torn(tmp_path / "nowhere", [])
