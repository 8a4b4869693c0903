"""A run's folder: always a new one, never half written, resumed only from a spec that trains the same weights."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RunError, UserError
from cluster.runs import last_run, open_run
from cluster.spec import FamilySpec
from tests.tiny import tiny_family


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


@pytest.mark.parametrize("state", ['{"na', '{"name": "x", "spec_hash": "", "of_a_later_version": 1}', "[]"])
def test_a_state_that_cannot_be_read_is_said_in_one_line(stillhouse_home: Path, state: str) -> None:
    run = open_run(spec(), resume=False)
    (run.folder / "run.json").write_text(state)
    with pytest.raises(
        RunError, match=f"{run.folder}/run.json is damaged, or a later version of Stillhouse wrote it: "
    ):
        last_run("tiny")
