"""Packing: documents end to end, and where each of them starts. Reading them takes Ray: see tests/integration."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.corpus import prepare
from cluster.corpus.batches import STARTS_FILE, TOKENS_FILE, CorpusFacts
from cluster.corpus.prepare import prepare_corpus
from cluster.errors import UserError
from cluster.spec import CorpusSpec

LENGTH = 8


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Packs documents of given lengths whose tokens say which document they are from; returns the facts."""

    def run(lengths: list[int], same_tokens: bool = False, folder: Path = tmp_path, **fields: Any) -> CorpusFacts:
        documents = [np.full(length, 7 if same_tokens else i, dtype=np.int32) for i, length in enumerate(lengths)]
        monkeypatch.setattr(prepare, "_documents", lambda *_: iter(documents))
        spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH} | fields)
        return prepare_corpus(spec, "tokenizer", folder)

    return run


def columns(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / TOKENS_FILE), np.load(folder / STARTS_FILE)


@pytest.mark.parametrize("lengths", [[3, 9, 1, 20, 8, 4, 5], [8, 8, 16], [40], [1] * 17])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_start_is_kept_exactly_where_the_document_changes(
    packed: Any, tmp_path: Path, lengths: list[int], seed: int
) -> None:
    facts = packed(lengths, seed=seed)
    tokens_NS, starts_NS = columns(tmp_path)
    assert tokens_NS.shape == starts_NS.shape == (sum(lengths) // LENGTH, LENGTH)
    assert (tokens_NS.dtype, starts_NS.dtype) == (np.int32, np.bool_)
    flat = tokens_NS.reshape(-1)
    assert starts_NS.reshape(-1).tolist() == [True, *(flat[1:] != flat[:-1])]
    assert (facts.documents, facts.tokens, facts.sequences) == (len(lengths), flat.size, len(tokens_NS))
    assert CorpusFacts.read(tmp_path) == facts


def test_no_file_is_left_half_written(packed: Any, tmp_path: Path) -> None:
    packed([20, 20])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.json", STARTS_FILE, TOKENS_FILE]


def test_the_corpus_address_sees_the_tokens_the_order_and_the_starts(
    packed: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def address(lengths: list[int], **fields: Any) -> str:
        return str(packed(lengths, folder=tmp_path_factory.mktemp("corpus"), **fields).address)

    plain = address([3, 9, 20])
    assert address([3, 9, 20]) == plain
    assert address([9, 3, 20]) != plain
    seeds = {address([3, 9, 20, 5, 6], seed=seed) for seed in range(5)}
    assert len(seeds) > 1
    assert address([3, 13], same_tokens=True) != address([4, 12], same_tokens=True)


def test_too_little_text_for_one_sequence_is_refused(packed: Any) -> None:
    with pytest.raises(UserError, match="2 documents in x give 7 tokens, too few for one sequence of 8"):
        packed([3, 4])
