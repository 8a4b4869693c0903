"""What is left of checkpoints that came to nothing goes, and nothing else does."""

import tempfile
from pathlib import Path

import pytest

from cluster.students.staging import Staging, remove_torn


def test_a_folder_stays_for_whoever_takes_it_over_and_goes_when_the_block_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    staging = Staging("tiny-1", "small")
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
        with Staging(run, student).folder() as folder:
            left.append(folder)
    assert all(folder.is_dir() for folder in left)
    Staging("tiny-1", "small")
    assert [folder.is_dir() for folder in left] == [False, True, True, True]


def test_checkpoints_that_were_never_finished_are_removed(tmp_path: Path) -> None:
    for name in ("checkpoint_1", "checkpoint_2", "checkpoint_3", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (tmp_path / "checkpoint_list.json").touch()
    remove_torn(tmp_path, ["checkpoint_1", "checkpoint_3"])
    left = ["checkpoint_1", "checkpoint_3", "checkpoint_list.json", "other"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    remove_torn(tmp_path / "nowhere", [])
