"""A student that starts from its champion: found in a real MLflow on SQLite, checked, and kept to over a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.errors import RunError, UserError
from cluster.family import run_family
from cluster.preflight import Checked, preflight
from cluster.registry import champion_of
from cluster.runs import last_run, open_run
from cluster.spec import FamilySpec, TeacherLayers
from cluster.specfile import training_hash
from cluster.students.initial import initial_student
from tests.tiny import tiny_family, write_tiny_model, write_tiny_tokenizer
from tests.tiny_types import write_own_code

MODEL = "tiny-small"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, mlflow.MlflowClient, list[Path]]:
    """An MLflow on SQLite that knows two versions of the tiny family's student, of one layer and of three."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    client.create_registered_model(MODEL)
    models = [write_tiny_model(folder / f"{layers}", layers=layers, seed=layers) for layers in (1, 3)]
    for model in models:
        client.create_model_version(MODEL, source=str(model))
    return uri, client, models


@pytest.fixture
def promote(registry: tuple[str, mlflow.MlflowClient, list[Path]]) -> Any:
    """Makes a version the champion, for one test."""
    _, client, _ = registry
    yield lambda version: client.set_registered_model_alias(MODEL, "champion", str(version))
    client.delete_registered_model_alias(MODEL, "champion")


@pytest.fixture
def check(registry: Any, tiny_teacher: Path, tiny_corpus: Path, stillhouse_home: Path) -> Callable[..., Checked]:
    """Preflight of the tiny family with a warm start, on that registry."""

    def run(init: dict[str, Any] | None = None, begun: dict[str, int | None] | None = None, **sections: Any) -> Checked:
        tree = tiny_family(tiny_teacher, tiny_corpus, **{"tracking": {"uri": registry[0]}, **sections})
        tree["students"]["small"] |= {"warm_start": True, **({"init": init} if init else {})}
        return preflight(FamilySpec.model_validate(tree), begun)

    return run


def test_a_student_starts_from_its_init_until_there_is_a_champion(check: Callable[..., Checked]) -> None:
    checked = check()
    assert (checked.student_dirs, checked.champions, checked.champion("small")) == ({}, {"small": None}, None)
    assert checked.warm_starts() == ["small starts from its init: tiny-small has no champion yet"]
    assert check(name="other").champions == {"small": None}


def test_a_registry_that_the_first_run_will_make_is_not_made_by_a_check(
    check: Callable[..., Checked], stillhouse_home: Path
) -> None:
    assert check(tracking={"uri": None}).champions == {"small": None}
    assert not (stillhouse_home / "mlflow.db").exists()


def test_a_student_starts_from_its_champion_whatever_its_init_says(
    check: Callable[..., Checked], promote: Callable[[int], None], registry: Any, tiny_teacher: Path
) -> None:
    promote(2)
    checked = check()
    assert checked.champions == {"small": 2}
    assert checked.warm_starts() == ["small starts from tiny-small v2"]
    assert checked.student_dirs == {"small": registry[2][1]}
    built = initial_student(
        TeacherLayers(source="teacher", layers=2),
        teacher_dir=str(tiny_teacher),
        student_dir=str(checked.student_dirs["small"]),
        dtype=torch.float32,
    )
    champion = AutoModelForCausalLM.from_pretrained(registry[2][1], dtype=torch.float32).state_dict()
    assert built.state_dict().keys() == champion.keys()
    assert all(tensor.equal(champion[name]) for name, tensor in built.state_dict().items())


def test_a_champion_with_python_of_its_own_is_loaded_where_the_family_trusts_its_teacher(
    check: Callable[..., Checked], promote: Callable[[int], None], registry: Any, tmp_path: Path, own_code_cache: Path
) -> None:
    own = tmp_path / "own"
    write_tiny_tokenizer(own)
    write_own_code(own, vocab_size=320, max_position_embeddings=512)
    _, client, _ = registry
    promote(int(client.create_model_version(MODEL, source=str(own)).version))
    teacher = {"model": str(own), "trust_remote_code": True}
    checked = check(teacher=teacher)
    assert checked.student_dirs == {"small": own}
    built = initial_student(
        TeacherLayers(source="teacher", layers=2),
        teacher_dir=own,
        student_dir=own,
        dtype=torch.float32,
        trust_remote_code=checked.spec.trusts_code("small"),
    )
    assert type(built).__name__ == "OwnForCausalLM"
    with pytest.raises(UserError, match=r"^students.small.warm_start: .* set teacher.trust_remote_code: true"):
        check()


def test_a_student_without_a_warm_start_does_not_ask(check: Callable[..., Checked], promote: Any) -> None:
    promote(2)
    tree = check().spec.model_dump()
    tree["students"]["small"]["warm_start"] = False
    plain = preflight(FamilySpec.model_validate(tree))
    assert (plain.champions, plain.student_dirs, plain.warm_starts()) == ({}, {}, [])


def test_a_pretrained_init_must_be_there_for_the_first_night_and_gives_way_to_a_champion(
    check: Callable[..., Checked], promote: Callable[[int], None], registry: Any, tmp_path: Path
) -> None:
    own = write_tiny_model(tmp_path / "own", layers=2)
    assert check({"source": "pretrained", "model": str(own)}).student_dirs == {"small": own}
    promote(1)
    assert check({"source": "pretrained", "model": str(own)}).student_dirs == {"small": registry[2][0]}
    with pytest.raises(UserError, match=r"students.small.init.model: /no/where is not there"):
        check({"source": "pretrained", "model": "/no/where"})


def test_a_champion_that_does_not_fit_is_refused_by_name(
    check: Callable[..., Checked], registry: Any, tmp_path: Path
) -> None:
    _, client, _ = registry
    other = write_tiny_model(tmp_path / "other", layers=1)
    tree = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    (other / "tokenizer.json").write_text(json.dumps(tree))
    short = write_tiny_model(tmp_path / "short", layers=1)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    refusals = {
        "unlike": (other, r"students.small.warm_start: the champion unlike-small v1 has another tokenizer"),
        "short": (short, r"corpus.sequence_length: got 32; students.small.warm_start reads at most 16 tokens"),
    }
    for family, (model, says) in refusals.items():
        client.create_registered_model(f"{family}-small")
        client.create_model_version(f"{family}-small", source=str(model))
        client.set_registered_model_alias(f"{family}-small", "champion", "1")
        with pytest.raises(UserError, match=says):
            check(name=family)


def test_a_resumed_run_keeps_to_what_it_began_with(
    check: Callable[..., Checked], promote: Callable[[int], None], registry: Any
) -> None:
    promote(2)
    assert check(begun={"small": 1}).student_dirs == {"small": registry[2][0]}
    # There was no champion when it began.
    assert check(begun={"small": None}).student_dirs == {}
    # It had not begun.
    assert check(begun={}).champions == {"small": 2}


def test_the_version_is_kept_with_the_run_and_another_one_is_never_taken(
    check: Callable[..., Checked], promote: Callable[[int], None]
) -> None:
    promote(1)
    checked = check()
    run = open_run(checked.spec, resume=False)
    run.warm_start = checked.champions
    run.save()
    promote(2)
    kept = last_run("tiny").warm_start
    assert kept == check(begun=kept).champions == {"small": 1}
    with pytest.raises(ValueError, match=r"began with champions {'small': 1}, and {'small': 2} were checked"):
        run_family(check(), open_run(checked.spec, resume=True), print)


def test_a_registry_that_cannot_be_reached_is_an_error_without_its_password(
    check: Callable[..., Checked], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RunError, match=r"the registry http://127.0.0.1:9 does not say .* tiny-small") as away:
        check(tracking={"uri": "http://me:secret@127.0.0.1:9"})
    assert "secret" not in str(away.value) and "\n" not in str(away.value)
    (tmp_path / "torn.db").write_text("no database" * 100)
    with pytest.raises(RunError, match=r"torn.db does not say"):
        champion_of(MODEL, f"sqlite:///{tmp_path}/torn.db")


def test_a_warm_start_decides_the_weights(check: Callable[..., Checked]) -> None:
    spec = check().spec
    tree = spec.model_dump()
    tree["students"]["small"]["warm_start"] = False
    assert training_hash(FamilySpec.model_validate(tree)) != training_hash(spec)
