"""A model directory is looked at before it is used: what is refused, and what makes two of them the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from cluster.errors import UserError
from cluster.models import load_config, load_tokenizer, local_model, model_fingerprint, tokenizer_fingerprint


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


@pytest.mark.parametrize("spoil", ["delete", "{", "{}"])
def test_a_broken_tokenizer_is_refused(model: Path, spoil: str) -> None:
    if spoil == "delete":
        (model / "tokenizer.json").unlink()
    else:
        (model / "tokenizer.json").write_text(spoil)
    with pytest.raises(UserError, match=f"teacher.model: {model} has no usable tokenizer") as caught:
        load_tokenizer(model, "teacher.model")
    assert "\n" not in str(caught.value)


def edited(model: Path, change: str) -> Path:
    """Change the tokenizer on disk."""
    file = model / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    if change == "padding":
        backend.enable_padding(length=64, pad_id=3)
    elif change == "truncation":
        backend.enable_truncation(max_length=7)
    elif change == "template":
        (model / "chat_template.jinja").write_text("{{ messages }}")
    elif change == "added token":
        backend.add_tokens(["<|more|>"])
    backend.save(str(file))
    rules = json.loads(file.read_text())
    if change == "one token":
        vocabulary = rules["model"]["vocab"]
        vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    if change == "one merge":
        rules["model"]["merges"].pop()
    file.write_text(json.dumps(rules))
    return model


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("nothing", True),
        ("padding", True),
        ("truncation", True),
        ("template", True),
        ("one token", False),
        ("one merge", False),
        ("added token", False),
    ],
)
def test_a_tokenizer_s_fingerprint_sees_what_changes_ids_and_nothing_else(
    tiny_teacher: Path, model: Path, change: str, same: bool
) -> None:
    known = tokenizer_fingerprint(load_tokenizer(tiny_teacher, "x"))
    assert (tokenizer_fingerprint(load_tokenizer(edited(model, change), "x")) == known) is same


def test_using_a_tokenizer_and_saving_it_again_leaves_its_fingerprint(tiny_teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_teacher, "x")
    known = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "the still house"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == known
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path, "x")) == known


@pytest.mark.parametrize("place", [0, -1, 400_000])
def test_a_model_s_fingerprint_changes_with_one_byte_of_its_weights(
    tiny_teacher: Path, model: Path, place: int
) -> None:
    assert model_fingerprint(model) == model_fingerprint(tiny_teacher)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[place] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert model_fingerprint(model) != model_fingerprint(tiny_teacher)


def test_a_model_s_fingerprint_changes_with_its_configuration_and_its_files(tiny_teacher: Path, model: Path) -> None:
    (model / "more.safetensors").write_bytes(b"")
    with_file = model_fingerprint(model)
    configured(model, rms_norm_eps=1e-5)
    assert len({model_fingerprint(tiny_teacher), with_file, model_fingerprint(model)}) == 3
