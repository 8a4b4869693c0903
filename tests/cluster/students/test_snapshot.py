"""A list of checkpoints that was left half written is put back as it was before."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointConfig
from ray.train._internal.session import _TrainingResult
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from cluster.students.snapshot import LIST_FILE, keep, keep_last_only, mend


def write_list(folder: Path, names: str) -> str:
    """A list as Ray Train writes it; returns its text."""
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {"batch": 4}} for name in names]
    indices = [ord(name) - ord("a") for name in names]
    more = {"latest_checkpoint_result": results[-1], "current_report_index": 9}
    text = json.dumps({"checkpoint_results": results, "checkpoint_report_indices": indices, **more})
    (folder / LIST_FILE).write_text(text)
    return text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("left", ["", '{"checkpoint_re', "\0" * 40], ids=["empty", "cut short", "zeros"])
def test_half_a_list_gives_way_to_the_one_before(run: Path, left: str) -> None:
    before = write_list(run, "ab")
    keep(run)
    (run / LIST_FILE).write_text(left)
    mend(run)
    assert json.loads((run / LIST_FILE).read_text()) == json.loads(before)


def test_a_whole_list_stays_and_is_the_one_to_go_back_to(run: Path) -> None:
    write_list(run, "ab")
    keep(run)
    after = write_list(run, "bc")
    mend(run)
    assert (run / LIST_FILE).read_text() == after
    (run / LIST_FILE).write_text("")
    mend(run)
    assert json.loads((run / LIST_FILE).read_text()) == json.loads(after)


def test_what_is_gone_is_not_listed_again(run: Path) -> None:
    write_list(run, "abc")
    keep(run)
    (run / LIST_FILE).write_text("")
    for name in "ac":
        (run / name).rmdir()
    mend(run)
    found = json.loads((run / LIST_FILE).read_text())
    assert [result["checkpoint_dir_name"] for result in found["checkpoint_results"]] == ["b"]
    assert found["checkpoint_report_indices"] == [1]
    assert found["latest_checkpoint_result"] == found["checkpoint_results"][0]


def test_without_a_kept_list_or_a_checkpoint_the_student_begins_anew(tmp_path: Path) -> None:
    mend(tmp_path)
    (tmp_path / LIST_FILE).write_text("")
    mend(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write_list(tmp_path, "a")
    keep(tmp_path)
    (tmp_path / LIST_FILE).write_text("")
    mend(tmp_path)
    assert not (tmp_path / LIST_FILE).exists()


def test_ray_train_takes_up_the_list_of_a_finished_student(tmp_path: Path) -> None:
    def manager() -> Any:
        return CheckpointManager(CheckpointConfig(num_to_keep=2), StorageContext(tmp_path, "small"))

    run, writer = tmp_path / "small", manager()
    for index in (3, 4):
        folder = run / f"checkpoint_{index}"
        folder.mkdir(parents=True)
        result = _TrainingResult(Checkpoint(str(folder), LocalFileSystem()), {"batch": 10 * index})
        writer._checkpoint_results.append(result)
        writer._checkpoint_to_report_index[result.checkpoint] = index
        writer._latest_checkpoint_result = result
    writer._write_state_to_storage()
    for _ in range(2):  # a finished student that is resumed finishes again
        keep_last_only(run)
        assert [path.name for path in run.iterdir() if path.is_dir()] == ["checkpoint_4"]
        reader = manager()
        assert reader.latest_checkpoint_result.metrics == {"batch": 40}
        assert Path(reader.latest_checkpoint_result.checkpoint.path) == run / "checkpoint_4"
    # Nor does the copy name a checkpoint that is gone.
    (run / LIST_FILE).write_text("")
    mend(run)
    assert manager().latest_checkpoint_result.metrics == {"batch": 40}
