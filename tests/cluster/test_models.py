"""A model directory is looked at before it is used: what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import UserError
from cluster.models import load_config, load_tokenizer, local_model


@pytest.fixture
def model(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher that a test may spoil."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


def find(path: Path) -> Path:
    return local_model(str(path), revision=None, tracking_uri="sqlite://", field="teacher.model")


def configured(model: Path, **fields: Any) -> Path:
    known = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**known, **fields}))
    return model


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, "teacher.model")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("teacher.model: ")
    return str(caught.value)


def test_a_whole_model_is_found_where_it_is(tiny_teacher: Path) -> None:
    assert find(tiny_teacher) == tiny_teacher
    assert load_config(tiny_teacher, "teacher.model").num_hidden_layers == 4


def test_a_missing_path_a_file_and_an_empty_folder_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, what in (("no", "is not there"), ("empty", "holds no config.json"), ("file", "holds no config.json")):
        with pytest.raises(
            UserError, match=f"teacher.model: {tmp_path}/{name} {what}; .* models:/name@alias, or hf://"
        ):
            find(tmp_path / name)


def test_weights_in_a_pickle_alone_are_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        find(model)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_configuration_that_cannot_be_read_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert "config.json" in refusal(model)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "wide"}, {"num_attention_heads": 5}, {"vocab_size": None}], ids=repr
)
def test_a_configuration_with_a_wrong_value_is_refused(model: Path, fields: dict[str, Any]) -> None:
    assert next(iter(fields)).removeprefix("num_attention_") in refusal(configured(model, **fields))


@pytest.mark.parametrize("kind", ["t5", "vit", "clip"])
def test_a_model_that_is_no_causal_language_model_is_refused(model: Path, kind: str) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    assert f"a {kind} model, not a causal language model" in refusal(model)


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [("delete", "has no usable tokenizer"), ("{", "tokenizer.json as JSON"), ("{}", "has no usable tokenizer")],
)
def test_a_broken_tokenizer_is_refused(model: Path, spoil: str, wrong: str) -> None:
    if spoil == "delete":
        (model / "tokenizer.json").unlink()
    else:
        (model / "tokenizer.json").write_text(spoil)
    with pytest.raises(UserError, match=rf"teacher.model: .*{model}.*{wrong}") as caught:
        load_tokenizer(model, "teacher.model")
    assert "\n" not in str(caught.value)


def test_an_adapter_without_its_base_model_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere/else"}))
    assert "holds an adapter (adapter_config.json); merge it" in refusal(model)


def test_trusted_code_of_another_repository_is_refused(model: Path) -> None:
    # Not run here: the configuration is of a known type, only the model's class would come from elsewhere.
    configured(model, auto_map={"AutoModelForCausalLM": "org/code--modeling.Model"})
    assert load_config(model, "teacher.model")
    with pytest.raises(UserError, match=r"teacher.model: .* code of another repository \(org/code--modeling.Model\)"):
        load_config(model, "teacher.model", trust_remote_code=True)
