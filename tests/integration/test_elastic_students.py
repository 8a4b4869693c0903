"""Students that are stopped and go on with another number of ranks, and what their checkpoints leave on disk."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train.v2._internal.constants import VALIDATE_STORAGE_MARKER_FILENAME
from safetensors.torch import load_file

from cluster.audit import problems_of, steps_of
from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.errors import RunError
from cluster.evaluate.result import FamilyResult
from cluster.family import run_family
from cluster.preflight import Checked, preflight
from cluster.runs import Run, open_run
from cluster.session import ray_session
from cluster.specfile import load_spec
from cluster.students.commits import RESHARDED
from cluster.students.job import COMMIT_FILE, MODEL_FOLDER, STUDENTS_FOLDER
from cluster.watch import Status
from tests.tiny import run_here, write_family

# Three runs are set up before the first test begins.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("ray_cluster"),
]
BATCHES, EVERY, KEEP = 40, 5, 2
SAME: dict[str, Any] = {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "lr": 3e-3}
Changed = tuple[Checked, FamilyResult, dict[str, dict[str, Any]]]
# Stage, and ranks before and after. Both ways for every stage: test_universal_checkpoints.
CHANGES = {"shrunk": (2, 2, 1), "grown": (3, 1, 2)}
FAMILY: dict[str, Any] = {
    "corpus": {"max_batches": BATCHES, "held_out": 0.2},
    "checkpoints": {"every": EVERY, "keep": KEEP},
    "evaluation": {"batches": 1, "angle_every": None},
}


def students(after: bool) -> dict[str, dict[str, Any]]:
    """The students before or after the change; each of two ranks has one micro-batch, one rank has two."""
    return {
        name: {**SAME, "zero_stage": stage, "ranks": there if after else here, "micro_batch": 2}
        for name, (stage, here, there) in CHANGES.items()
    }


def checkpoints(run: Run, name: str) -> list[Path]:
    """A student's checkpoints that have their commit, oldest first."""
    return [path.parent for path in sorted((run.folder / STUDENTS_FOLDER / name).glob(f"checkpoint_*/{COMMIT_FILE}"))]


def commit_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    facts: dict[str, Any] = json.loads((checkpoint / COMMIT_FILE).read_text())
    return facts


def run_partway(path: Path) -> None:
    """Run a family on a cluster of its own, and break it off when each student has stored a checkpoint."""
    checked = preflight(load_spec(path))
    run = open_run(checked.spec, resume=False)

    def report(_: Status) -> None:
        # A second one is begun when the first is whole.
        if all(len(checkpoints(run, name)) >= 2 for name in CHANGES):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), ray_session():
        run_family(checked, run, report)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The label store that the undisturbed run fills."""
    return str(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def whole(tiny: Path, labels: str, tmp_path_factory: pytest.TempPathFactory) -> FamilyResult:
    """The same student on one rank, undisturbed."""
    student = {"whole": {**SAME, "micro_batch": 2}}
    path = write_family(tmp_path_factory.mktemp("whole"), tiny, student, store={"uri": labels}, **FAMILY)
    _, result, _ = run_here(path)
    assert result.failed == {}
    return result


@pytest.fixture(scope="module")
def changed(tiny: Path, labels: str, whole: FamilyResult, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """A family whose students all go on with another number of ranks, and where each of them had been stopped."""
    folder = tmp_path_factory.mktemp("changed")
    # Without a store none can be far ahead of another when they are stopped.
    path = write_family(folder, tiny, students(False), store={"enabled": False}, **FAMILY)
    # In a process of its own, with which all that it has started ends.
    stopping = multiprocessing.get_context("spawn").Process(target=run_partway, args=(path,))
    stopping.start()
    stopping.join()
    assert stopping.exitcode == 0
    run = open_run(load_spec(path), resume=True)
    stopped = {name: commit_of(checkpoints(run, name)[0]) for name in CHANGES}
    # Its labels are there, cut for one rank.
    path = write_family(folder, tiny, students(True), store={"uri": labels}, **FAMILY)
    checked, result, _ = run_here(path, resume=True)
    assert result.run.folder == run.folder
    return checked, result, stopped


def test_every_student_went_on_with_its_new_number_of_ranks(changed: Changed) -> None:
    _, result, stopped = changed
    assert result.failed == {}
    for name, (_, before, after) in CHANGES.items():
        assert stopped[name]["ranks"] == before
        assert 0 < stopped[name]["batch"] < BATCHES
        last = commit_of(checkpoints(result.run, name)[-1])
        assert (last["ranks"], last["batch"]) == (after, BATCHES)


def test_the_final_weights_are_those_of_an_undisturbed_student(changed: Changed, whole: FamilyResult) -> None:
    _, result, _ = changed
    expected = load_file(Path(whole.students["whole"].model_dir) / "model.safetensors")
    for name in CHANGES:
        weights = load_file(Path(result.students[name].model_dir) / "model.safetensors")
        assert weights.keys() == expected.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-5)


def test_the_loss_curve_goes_on(changed: Changed, whole: FamilyResult) -> None:
    _, result, _ = changed
    curve = [float.fromhex(step.loss) for step in steps_of(whole.run.folder, "whole")[0]]
    for name in CHANGES:
        steps, lives = steps_of(result.run.folder, name)
        assert lives == 2
        assert [float.fromhex(step.loss) for step in steps] == pytest.approx(curve, rel=1e-4)
        # Of both sessions; what was learnt after the last whole checkpoint was learnt again.
        assert [point.batch for point in result.points if point.student == name] == list(range(1, BATCHES + 1))


def test_each_batch_was_learnt_once_and_no_label_was_made_again(changed: Changed) -> None:
    checked, result, _ = changed
    batches = Batches(result.run.folder / CORPUS_FOLDER, checked.spec.corpus, checked.spec.evaluation.batches)
    for name in CHANGES:
        assert problems_of(result.run.folder, name, batches) == []
    # What was scored before they were stopped, and not even that again; all else was there.
    assert set(result.stats.scored.values()) == {1}
    assert len(result.stats.scored) < BATCHES


def test_a_finished_student_keeps_its_model_and_no_training_state(changed: Changed, whole: FamilyResult) -> None:
    _, result, _ = changed
    for run, names in ((result.run, list(CHANGES)), (whole.run, ["whole"])):
        for name in names:
            folders = [path for path in (run.folder / STUDENTS_FOLDER / name).iterdir() if path.is_dir()]
            assert folders == checkpoints(run, name)
            assert [path.name for path in folders[0].iterdir() if path.is_dir()] == [MODEL_FOLDER]
    assert not any((result.run.folder / RESHARDED).iterdir())


def test_a_checkpoint_that_cannot_be_stored_stops_the_student_and_it_goes_on_when_it_can(
    tiny: Path, tmp_path: Path, labels: str, whole: FamilyResult
) -> None:
    student = {"whole": {**SAME, "micro_batch": 2, "max_failures": 0}}
    path = write_family(tmp_path, tiny, student, store={"uri": labels}, **FAMILY)
    checked = preflight(load_spec(path))
    run = open_run(checked.spec, resume=False)
    there = run.folder / STUDENTS_FOLDER / "whole"

    kept: list[int] = []

    def report(_: Status) -> None:
        kept.append(len(checkpoints(run, "whole")))
        if kept[-1] >= 2:
            # Ray Train looks for this mark before every upload: without it the storage has gone.
            (there / VALIDATE_STORAGE_MARKER_FILENAME).unlink(missing_ok=True)

    # It is stored while the student learns on; that it was not must be heard all the same.
    with pytest.raises(RunError, match="every student failed; whole: rank 0: "):
        run_family(checked, run, report)
    assert 0 < commit_of(checkpoints(run, "whole")[-1])["batch"] < BATCHES
    # One more may be on its way.
    assert max(kept) <= KEEP + 1
    _, result, _ = run_here(path, resume=True)
    weights, expected = (load_file(Path(r.students["whole"].model_dir) / "model.safetensors") for r in (result, whole))
    assert all(weights[key].equal(expected[key]) for key in expected)
    assert problems_of(run.folder, "whole", Batches(run.folder / CORPUS_FOLDER, checked.spec.corpus, 1)) == []
    assert len([path for path in there.iterdir() if path.is_dir()]) == 1
