"""A list of checkpoints that was left half written is put back as it was before."""

from pathlib import Path

import pytest

from cluster.students.snapshot import LIST_FILE, keep, mend

BEFORE, AFTER = '{"checkpoints": ["a"]}', '{"checkpoints": ["a", "b"]}'


@pytest.mark.parametrize("left", ["", AFTER[:12], "\0" * len(AFTER)], ids=["empty", "cut short", "zeros"])
def test_half_a_list_gives_way_to_the_one_before(tmp_path: Path, left: str) -> None:
    listed = tmp_path / LIST_FILE
    listed.write_text(BEFORE)
    keep(tmp_path)
    listed.write_text(left)
    mend(tmp_path)
    assert listed.read_text() == BEFORE


def test_a_whole_list_stays(tmp_path: Path) -> None:
    listed = tmp_path / LIST_FILE
    listed.write_text(BEFORE)
    keep(tmp_path)
    listed.write_text(AFTER)
    mend(tmp_path)
    assert listed.read_text() == AFTER


def test_without_a_kept_list_the_student_begins_anew(tmp_path: Path) -> None:
    mend(tmp_path)
    (tmp_path / LIST_FILE).write_text("")
    mend(tmp_path)
    assert list(tmp_path.iterdir()) == []
