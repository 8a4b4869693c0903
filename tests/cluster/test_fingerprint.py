"""The fingerprint of a teacher sees every byte that decides its labels, and reads each file once."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from cluster import fingerprint
from cluster.errors import UserError
from cluster.fingerprint import file_digest, model_fingerprint, teacher_fingerprint, tokenizer_fingerprint
from cluster.models import load_tokenizer
from cluster.spec import TeacherSpec
from tests.tiny import VOCABULARY

MIB = 1 << 20
LONG_AGO = 10**18  # ns since 1970: the file is settled, so its digest is kept

_watchers: list[list[str]] = []


@functools.cache
def _watch_opens() -> None:
    """An audit hook sees every way to open a file. It cannot be removed, so it is added once, by who needs it."""

    def hook(event: str, arguments: Any) -> None:
        if event == "open":
            for seen in _watchers:
                seen.append(str(arguments[0]))

    sys.addaudithook(hook)


def opened(work: Callable[[], Any], folder: Path) -> list[str]:
    """Names of the files of a folder that ``work`` opens, once per open."""
    _watch_opens()
    seen: list[str] = []
    _watchers.append(seen)
    try:
        work()
    finally:
        _watchers.remove(seen)
    return sorted(Path(each).name for each in seen if each.startswith(f"{folder}/"))


def settle(folder: Path) -> Path:
    for file in folder.iterdir():
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def model(tiny_teacher: Path, tmp_path: Path, stillhouse_home: Path) -> Path:
    """A copy of the tiny teacher that a test may spoil, and a cache of its own."""
    return settle(Path(shutil.copytree(tiny_teacher, tmp_path / "model")))


@pytest.fixture
def large(tmp_path: Path, stillhouse_home: Path) -> Path:
    """A model in two files of 5 MiB each and an index."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    numbers = np.random.default_rng(0).standard_normal((2, 5 * MIB // 4), dtype=np.float32)
    for shard in (1, 2):
        save_file({f"layer.{shard}": numbers[shard - 1]}, folder / f"model-0000{shard}-of-00002.safetensors")
    named = {f"layer.{shard}": f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
    return settle(folder)


def flip(file: Path, place: int) -> None:
    """Change one bit in place: same inode, same size."""
    with file.open("r+b") as content:
        content.seek(place)
        (byte,) = content.read(1)
        content.seek(place)
        content.write(bytes([byte ^ 1]))


# -- what a model is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [100, 2 * MIB + 12_345, 5 * MIB], ids=["first MiB", "middle", "last MiB"])
@pytest.mark.parametrize("shard", [1, 2])
def test_one_bit_anywhere_in_the_weights_makes_another_model(large: Path, shard: int, place: int) -> None:
    known = model_fingerprint(large)
    file = large / f"model-0000{shard}-of-00002.safetensors"
    before = load_file(file)[f"layer.{shard}"]
    flip(file, place)
    assert (load_file(file)[f"layer.{shard}"] != before).sum() == 1
    assert model_fingerprint(large) != known
    flip(file, place)
    assert model_fingerprint(large) == known


def test_a_copy_under_another_path_is_the_same_model(large: Path, tmp_path: Path) -> None:
    assert model_fingerprint(Path(shutil.copytree(large, tmp_path / "copy"))) == model_fingerprint(large)


def test_a_model_changes_with_its_configuration_its_index_and_files_that_no_index_names(large: Path) -> None:
    def stray() -> None:
        shutil.copy(large / "model-00001-of-00002.safetensors", large / "consolidated.safetensors")

    def swapped() -> None:
        (large / "model-00001-of-00002.safetensors").rename(large / "aside")
        (large / "model-00002-of-00002.safetensors").rename(large / "model-00001-of-00002.safetensors")
        (large / "aside").rename(large / "model-00002-of-00002.safetensors")

    def index() -> None:
        file = large / "model.safetensors.index.json"
        file.write_text(file.read_text().replace("layer.1", "layer.3"))

    def configuration() -> None:
        (large / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5}))

    found = [model_fingerprint(large)]
    for change in (stray, swapped, index, configuration):
        change()
        found.append(model_fingerprint(large))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("by", ["index", "configuration"])
def test_a_file_that_is_named_in_a_subfolder_counts(large: Path, by: str) -> None:
    (large / "parts").mkdir()
    (large / "model-00002-of-00002.safetensors").rename(large / "parts" / "w.safetensors")
    if by == "index":
        file = large / "model.safetensors.index.json"
        file.write_text(file.read_text().replace("model-00002-of-00002", "parts/w"))
    else:
        config = {"model_type": "llama", "transformers_weights": "parts/w.safetensors"}
        (large / "config.json").write_text(json.dumps(config))
    known = model_fingerprint(large)
    flip(large / "parts" / "w.safetensors", 2 * MIB)
    assert model_fingerprint(large) != known


def test_what_decides_no_label_leaves_the_model_as_it_is(large: Path) -> None:
    known = model_fingerprint(large)
    (large / "README.md").write_text("a model")
    (large / "generation_config.json").write_text("{}")
    (large / "checkpoint-1").mkdir()
    shutil.copy(large / "model-00001-of-00002.safetensors", large / "checkpoint-1" / "model.safetensors")
    assert model_fingerprint(large) == known


def test_an_index_that_cannot_be_read_is_refused(large: Path) -> None:
    (large / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match=r"teacher.model: .*index.json is not an index of safetensors files"):
        model_fingerprint(large)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_each_weight_file_is_read_once_and_then_only_when_it_changes(large: Path) -> None:
    weights = [f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)]

    def read() -> list[str]:
        return [name for name in opened(lambda: model_fingerprint(large), large) if name in weights]

    assert (read(), read()) == (weights, [])
    flip(large / weights[1], 2 * MIB)
    os.utime(large / weights[1], ns=(LONG_AGO + 1, LONG_AGO + 1))
    assert (read(), read()) == (weights[1:], [])


def test_the_digest_is_that_of_the_bytes_from_the_cache_or_not(large: Path) -> None:
    file = large / "model-00001-of-00002.safetensors"
    assert [file_digest(file), file_digest(file)] == [hashlib.sha256(file.read_bytes()).hexdigest()] * 2


def test_another_file_of_the_same_size_and_time_is_read(large: Path, tmp_path: Path) -> None:
    file, other = large / "model-00001-of-00002.safetensors", tmp_path / "other"
    known = file_digest(file)
    shutil.copy(file, other)
    flip(other, 2 * MIB)
    os.utime(other, ns=(LONG_AGO, LONG_AGO))
    other.replace(file)
    assert file.stat().st_mtime_ns == LONG_AGO
    assert file_digest(file) != known


def test_a_file_that_was_edited_in_place_and_given_its_old_time_back_is_read(large: Path) -> None:
    file = large / "model-00001-of-00002.safetensors"
    known, before = file_digest(file), file.stat()
    flip(file, 2 * MIB)
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    after = file.stat()
    same = ("st_ino", "st_size", "st_mtime_ns")
    assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]
    assert file_digest(file) != known


def test_a_file_that_was_just_written_is_read_again(large: Path) -> None:
    file = large / "config.json"
    file.touch()
    assert [opened(lambda: file_digest(file), large) for _ in range(2)] == [["config.json"]] * 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"sha256": 3}', b'{"sha256": "ab"}', b"\xff"])
def test_a_damaged_cache_is_replaced_and_logged(
    large: Path, stillhouse_home: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    file = large / "model-00001-of-00002.safetensors"
    known = file_digest(file)
    (place,) = (stillhouse_home / "fingerprints").iterdir()
    place.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert file_digest(file) == known
    assert f"{place} cannot be used, so {file} is hashed again" in caplog.text
    assert opened(lambda: file_digest(file), large) == []


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    large: Path, stillhouse_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = model_fingerprint(large)
    shutil.rmtree(stillhouse_home)
    stillhouse_home.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert model_fingerprint(large) == known
    assert "cannot keep the digest of" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, whole = large / "model-00001-of-00002.safetensors", fingerprint.hashlib.file_digest

    def meanwhile(content: Any, algorithm: str) -> Any:
        flip(file, 2 * MIB)
        return whole(content, algorithm)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", meanwhile)
    with pytest.raises(UserError, match=f"teacher.model: {file} changed while it was read"):
        file_digest(file)


# -- what a teacher is ------------------------------------------------------------------------------------------------


def taught(folder: Path, vocabulary: int = VOCABULARY, **fields: Any) -> str:
    return teacher_fingerprint(folder, TeacherSpec(model=str(folder), **fields), vocabulary)


def test_precision_and_vocabulary_make_another_teacher(model: Path) -> None:
    teachers = [taught(model, dtype=dtype, vocabulary=size) for dtype in ("float32", "bfloat16") for size in (300, 299)]
    assert len(set(teachers)) == 4
    assert {len(bytes.fromhex(each)) for each in teachers} == {8}


@pytest.mark.parametrize(
    "fields",
    [
        {"shards": 2},
        {"replicas": 3},
        {"replicas": {"min": 1, "max": 4}},
        {"cpus_per_shard": 2.0},
        {"gpus_per_shard": 1.0},
        {"memory_per_shard": 2**30},
        {"tokens_per_chunk": 7},
        {"max_restarts": 0},
        {"start_timeout_s": 9.0},
        {"trust_remote_code": True},  # of a model that has no code
    ],
    ids=repr,
)
def test_where_and_in_how_many_parts_a_teacher_runs_makes_no_other(model: Path, fields: dict[str, Any]) -> None:
    assert taught(model, **fields) == taught(model)


def test_every_field_of_the_spec_is_known_to_decide_labels_or_not(model: Path) -> None:
    """A new field of the teacher's section must be added to the fingerprint, or here."""
    decides = {"model", "revision", "dtype", "trust_remote_code"}
    rounds = {"shards", "replicas", "cpus_per_shard", "gpus_per_shard", "tokens_per_chunk"}
    neither = {"max_restarts", "start_timeout_s", "memory_per_shard"}
    assert set(TeacherSpec.model_fields) == decides | rounds | neither


def test_a_model_s_own_code_counts_where_it_runs(model: Path) -> None:
    (model / "modeling.py").write_text("SCALE = 1\n")
    (model / "parts").mkdir()
    (model / "parts" / "norm.py").write_text("EPS = 1\n")
    found = [taught(model), taught(model, trust_remote_code=True)]
    (model / "modeling.py").write_text("SCALE = 2\n")
    assert taught(model) == found[0]
    found.append(taught(model, trust_remote_code=True))
    (model / "parts" / "norm.py").write_text("EPS = 2\n")
    found.append(taught(model, trust_remote_code=True))
    assert len(set(found)) == 4


def test_a_precision_that_is_not_resolved_is_refused(model: Path) -> None:
    spec = TeacherSpec(model=str(model)).model_copy(update={"dtype": "auto"})
    with pytest.raises(ValueError, match="'auto' must be resolved"):
        teacher_fingerprint(model, spec, VOCABULARY)


def test_an_address_is_the_same_in_every_version(tmp_path: Path) -> None:
    """A change of these digits orphans every label store; it needs a line in the CHANGELOG."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert (model_fingerprint(tmp_path), taught(tmp_path)) == ("ec47a0718a374fde", "7a72c130a9dc8c0f")


# -- what a tokenizer is ----------------------------------------------------------------------------------------------


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
