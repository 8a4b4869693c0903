"""Documents become sequences: which are held out, packed or padded. Reading them takes Ray: see tests/integration."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs

from cluster.corpus import prepare
from cluster.corpus.batches import LENGTHS_FILE, STARTS_FILE, TOKENS_FILE, Batches, CorpusFacts
from cluster.corpus.files import CorpusFiles
from cluster.corpus.prepare import prepare_corpus
from cluster.corpus.unusable import Unusable
from cluster.errors import UserError
from cluster.spec import CorpusSpec
from tests.tiny import write_tiny_tokenizer

LENGTH = 8
# The end token; it is also what padding has, and stands inside a document as well.
END = 2


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lays out documents that are given as tokens; those of equal tokens have equal texts. Returns the facts."""

    def run(
        documents: list[list[int]],
        folder: Path = tmp_path,
        pack: bool = True,
        begin: int | None = None,
        **fields: Any,
    ) -> CorpusFacts:
        hashes = np.array([hash(tuple(ids)) % 2**64 for ids in documents], dtype=np.uint64)
        found = prepare._Documents([np.array(ids, dtype=np.int32) for ids in documents], [hashes], blank=3, spelled=1)
        found.bos, found.begin = ("never", None) if begin is None else ("sequence", begin)
        monkeypatch.setattr(prepare, "select_files", lambda _: CorpusFiles(["x"], {".csv": 2}))
        monkeypatch.setattr(prepare, "_documents", lambda *_: found)
        monkeypatch.setattr(prepare, "_line_end_before", lambda _ids, at, _tokenizer: at)
        spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH, "held_out": 0.2} | fields)
        return prepare_corpus(spec, "tokenizer", folder, pack=pack)

    return run


def of_lengths(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens show which one they are from."""
    return [[10 + number] * length for number, length in enumerate(lengths)]


LENGTHS = [3, 9, 1, 20, 8, 4, 5, 30, 2, 2, 7, 11, 40, 6]


@pytest.mark.parametrize("lengths", [LENGTHS, [8, 8, 16], [40], [1] * 17])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_start_is_kept_exactly_where_the_document_changes(
    prepared: Any, tmp_path: Path, lengths: list[int], seed: int
) -> None:
    facts = prepared(of_lengths(lengths), seed=seed)
    tokens_NS, starts_NS = np.load(tmp_path / TOKENS_FILE), np.load(tmp_path / STARTS_FILE)
    assert tokens_NS.shape == starts_NS.shape == (facts.sequences, LENGTH)
    assert (tokens_NS.dtype, starts_NS.dtype) == (np.int32, np.bool_)
    train = facts.sequences - facts.held_out
    for side in (slice(0, train), slice(train, None)):
        flat = tokens_NS[side].reshape(-1)
        expected = [True, *(flat[1:] != flat[:-1])] if flat.size else []
        assert starts_NS[side].reshape(-1).tolist() == expected
    assert (facts.documents, facts.tokens) == (len(lengths), tokens_NS.size)
    assert facts.tokens + facts.dropped_tokens == sum(lengths)
    assert CorpusFacts.read(tmp_path) == facts


def test_no_document_is_on_both_sides_and_the_share_is_held_out(prepared: Any, tmp_path: Path) -> None:
    facts = prepared(of_lengths([7] * 200))
    tokens_NS = np.load(tmp_path / TOKENS_FILE)
    train, held_out = tokens_NS[: -facts.held_out], tokens_NS[-facts.held_out :]
    assert not set(train.reshape(-1)) & set(held_out.reshape(-1))
    assert facts.held_out == 35 == round(0.2 * (7 * 200 // LENGTH))
    assert (facts.held_out_documents, facts.cut_documents) == (40, 0)
    assert facts.ngrams_known == facts.held_out_seen == 0


@pytest.mark.parametrize("pack", [True, False])
def test_copies_of_a_held_out_text_are_not_trained_on(prepared: Any, tmp_path: Path, pack: bool) -> None:
    texts = [[*range(100 * text, 100 * text + 23), END] for text in range(1, 21)]
    facts = prepared(texts * 20, pack=pack)
    tokens_NS = np.load(tmp_path / TOKENS_FILE)
    train, held_out = tokens_NS[: -facts.held_out], tokens_NS[-facts.held_out :]
    assert set(train.reshape(-1)) & set(held_out.reshape(-1)) == {END}
    assert facts.repeats == 380
    assert not facts.repeats_dropped
    assert facts.documents == 400
    assert facts.held_out_seen == 0


def test_repeats_are_dropped_where_the_spec_wants_it(prepared: Any, tmp_path: Path) -> None:
    facts = prepared(of_lengths([24] * 20) * 20, deduplicate="exact")
    tokens, counts = np.unique(np.load(tmp_path / TOKENS_FILE), return_counts=True)
    assert (facts.documents, facts.repeats, facts.repeats_dropped) == (20, 380, True)
    assert len(tokens) == 20
    assert counts.max() == 24
    assert "380 repeats, dropped" in facts.lines()[0]


def test_one_document_is_cut_into_a_part_to_train_on_and_a_part_to_hold_out(prepared: Any, tmp_path: Path) -> None:
    facts = prepared([list(range(1000))])
    tokens_NS = np.load(tmp_path / TOKENS_FILE)
    assert facts.held_out == 25
    assert facts.cut_documents == 1
    assert tokens_NS[-25:].reshape(-1).tolist() == list(range(800, 1000))
    assert tokens_NS[:-25].reshape(-1).tolist() == list(range(800))
    assert "25 sequences of 1 document (1 cut)" in facts.lines()[1]


def test_a_cut_is_after_a_blank_line_or_at_least_after_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join({0: "\n", 1: ".\n\n"}.get(token, "x") for token in ids)

    monkeypatch.setattr(prepare, "_tokenizer", lambda _: Letters())
    ids = np.full(3000, 9, dtype=np.int32)
    ids[[100, 101, 300, 400, 1000]] = [0, 0, 1, 0, 0]
    assert prepare._line_end_before(ids, 450, "t") == 301  # two lines end there, at 401 one
    assert prepare._line_end_before(ids, 301, "t") == 301
    assert prepare._line_end_before(ids, 300, "t") == 102
    assert prepare._line_end_before(ids, 1100, "t") == 1001
    assert prepare._line_end_before(ids, 1001, "t") == 1001
    assert prepare._line_end_before(ids, 2500, "t") == 2500
    assert prepare._line_end_before(ids[:404], 402, "t") == 402  # behind it lie two tokens
    assert prepare._line_end_before(ids, 40, "t") == 40
    assert prepare._line_end_before(ids, 1, "t") == 1


def test_padded_each_sequence_is_a_document_or_a_piece_and_nothing_is_scored_on_padding(
    prepared: Any, tmp_path: Path
) -> None:
    # The end token inside a document, and a document of nothing else, are no padding.
    documents = [[*ids[:-1], END] for ids in of_lengths(LENGTHS)] + [[END] * 6, [50, END, END, 51, END]]
    facts = prepared(documents, pack=False, held_out=0.4)
    tokens_NS, lengths_N = np.load(tmp_path / TOKENS_FILE), np.load(tmp_path / LENGTHS_FILE)
    pieces = [tuple(ids[at : at + LENGTH]) for ids in documents for at in range(0, len(ids), LENGTH)]
    found = [tuple(row[:length].tolist()) for row, length in zip(tokens_NS, lengths_N, strict=True)]
    assert facts.cut_documents == 0
    assert sorted(found) == sorted(piece for piece in pieces if len(piece) > 1)
    assert all((row[length:] == END).all() for row, length in zip(tokens_NS, lengths_N, strict=True))
    assert not (tmp_path / STARTS_FILE).exists()
    assert not facts.packed
    assert facts.tokens == lengths_N.sum()
    assert facts.pad_tokens == tokens_NS.size - lengths_N.sum()
    assert facts.dropped_tokens == sum(len(piece) == 1 for piece in pieces)
    assert f"not packed: {facts.pad_tokens} tokens of padding" in " ".join(facts.lines())

    spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH, "batch_sequences": 2})
    batches = Batches(tmp_path, spec, 1)
    length_of = {tuple(row.tolist()): length for row, length in zip(tokens_NS, lengths_N, strict=True)}
    every = [*map(batches.train, range(batches.count)), batches.held_out(0)]
    for batch in every:
        assert not batch.packed
        assert batch.positions_BS.tolist() == [list(range(LENGTH))] * 2
        assert batch.loss_mask_BS.sum(axis=1).tolist() == [
            length_of[tuple(row.tolist())] - 1 for row in batch.tokens_BS
        ]
        assert all(mask.tolist() == sorted(mask, reverse=True) for mask in batch.loss_mask_BS)
        assert batch.loss_tokens > 0


def test_padded_the_length_shows_in_the_address_where_the_tokens_do_not(
    prepared: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH, "batch_sequences": 4})
    found = []
    for length in (4, 5):  # of end tokens, which padding has, too
        folder = tmp_path_factory.mktemp("corpus")
        facts = prepared([[END] * length] * 8, folder=folder, pack=False)
        found.append((facts.address, np.load(folder / TOKENS_FILE), Batches(folder, spec, 0).train(0).address))
    assert np.array_equal(found[0][1][0], found[1][1][0])
    assert found[0][0] != found[1][0]
    assert found[0][2] != found[1][2]


BEGIN = 1


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 14], [70], [1] * 17])
def test_packed_each_sequence_begins_with_the_begin_token_and_starts_are_kept(
    prepared: Any, tmp_path: Path, lengths: list[int]
) -> None:
    facts = prepared(of_lengths(lengths), begin=BEGIN, seed=1)
    tokens_NS, starts_NS = np.load(tmp_path / TOKENS_FILE), np.load(tmp_path / STARTS_FILE)
    assert tokens_NS.shape == starts_NS.shape == (facts.sequences, LENGTH)
    assert (tokens_NS[:, 0] == BEGIN).all()
    assert not (tokens_NS[:, 1:] == BEGIN).any()
    assert facts.tokens == tokens_NS.size
    assert facts.tokens - facts.sequences + facts.dropped_tokens == sum(lengths)
    train = facts.sequences - facts.held_out
    for side in (slice(0, train), slice(train, None)):
        body, starts_NB = tokens_NS[side, 1:].reshape(-1), starts_NS[side, 1:].copy()
        # A document that starts with a sequence starts with its begin token.
        assert not starts_NB[:, 0].any()
        starts_NB[:, 0] = starts_NS[side, 0]
        assert starts_NB.reshape(-1).tolist() == ([True, *(body[1:] != body[:-1])] if body.size else [])
    spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH, "batch_sequences": 1})
    if train:
        batch = Batches(tmp_path, spec, 0).train(0)
        # The document's first token follows the begin token: it is scored there, and counts its place from it.
        assert batch.loss_mask_BS[:, 0].all()
        assert batch.positions_BS[:, :2].tolist() == [[0, 1]]
    assert "a begin token (BOS) in front of each sequence" in facts.lines()


def test_padded_each_piece_begins_with_the_begin_token_and_none_is_too_short(prepared: Any, tmp_path: Path) -> None:
    documents = of_lengths(LENGTHS)
    facts = prepared(documents, pack=False, begin=BEGIN, held_out=0.4)
    tokens_NS, lengths_N = np.load(tmp_path / TOKENS_FILE), np.load(tmp_path / LENGTHS_FILE)
    pieces = [(BEGIN, *ids[at : at + LENGTH - 1]) for ids in documents for at in range(0, len(ids), LENGTH - 1)]
    found = [tuple(row[:length].tolist()) for row, length in zip(tokens_NS, lengths_N, strict=True)]
    assert sorted(found) == sorted(pieces)
    assert facts.dropped_tokens == 0
    assert facts.tokens == sum(LENGTHS) + facts.sequences


def test_without_a_begin_token_the_addresses_are_those_of_before_there_was_one(prepared: Any, tmp_path: Path) -> None:
    facts = prepared(of_lengths(LENGTHS))
    spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH, "batch_sequences": 2})
    # Written down from the code that knew no begin token.
    assert facts.address == "5f75eb82b546412d8c1b45770e55fa70"
    assert Batches(tmp_path, spec, 0).train(0).address == "a8ab1d35830249bd42be80cb0c601622"
    assert (
        prepared(of_lengths(LENGTHS), folder=tmp_path / "padded", pack=False).address
        == "9f43cf5534ce791c7f1a408804d4df5a"
    )
    assert CorpusFacts.read(tmp_path).bos == "never"


def test_rows_become_documents_and_all_others_are_counted(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n{"text": "<|user|>two"}\n{"text": "x\\ud83d"}\n{"text": " "}\n{"t'
    )
    (tmp_path / "b.txt").write_text("three")
    (tmp_path / "c.jsonl").write_text("")
    user, end = 1, 0
    plain: list[list[int]] = []
    for control, begin in ((False, None), (False, user), (True, user)):
        found = prepare._Documents()
        paths = pa.table({"path": [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl")]})
        for table in prepare._read(paths, {False: fs.LocalFileSystem()}, "text"):
            found.add(prepare._tokenize(table, str(tmp_path / "tokenizer"), control, begin))
        ids = [document.tolist() for document in found.ids]
        plain = plain or ids
        assert [document[-1] for document in ids] == [end] * 3
        if begin is not None:
            # A text that begins with the token already does not get it twice.
            assert [document.count(user) for document in ids] == [1, 1, 1]
            assert [document[0] for document in ids] == [user] * 3
            assert [ids[0][1:], ids[2][1:]] == [plain[0], plain[2]]
        assert (found.blank, found.spelled) == (1, 1)
        assert found.unusable == Unusable(
            rows=6,
            counts=Counter({"lone surrogate": 1, "line cut short": 1}),
            first={"lone surrogate": f"{tmp_path}/a.jsonl:3", "line cut short": f"{tmp_path}/a.jsonl:5"},
            empty_files=1,
        )


def test_a_file_that_is_refused_travels_as_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    *_, last = prepare._read(pa.table({"path": [str(tmp_path / "a.jsonl")]}), {False: fs.LocalFileSystem()}, "text")
    (reason,) = prepare._tokenize(last, "none", False, None).column("refused").to_pylist()
    assert "'text' is not there; the rows have messages" in reason


def test_no_file_is_left_half_written(prepared: Any, tmp_path: Path) -> None:
    prepared(of_lengths([20, 20]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.json", STARTS_FILE, TOKENS_FILE]


def test_the_corpus_address_sees_the_tokens_the_order_the_starts_and_the_cut(
    prepared: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def address(lengths: list[int], **fields: Any) -> str:
        return str(prepared(of_lengths(lengths), folder=tmp_path_factory.mktemp("corpus"), **fields).address)

    plain = address(LENGTHS)
    assert address(LENGTHS) == plain
    assert address(LENGTHS[::-1]) != plain
    assert len({address(LENGTHS, seed=seed) for seed in range(5)}) > 1
    assert address(LENGTHS, pack=False) != plain
    assert address(LENGTHS, held_out=0.4) != plain


def test_all_that_is_not_read_or_dropped_is_told(prepared: Any) -> None:
    text = "\n".join(prepared(of_lengths(LENGTHS)).lines())
    for part in ("14 documents", "3 without text", "1 with the text of special tokens", "skipped: 2 files (.csv: 2)"):
        assert part in text


def test_a_resumed_run_refuses_another_text_and_another_layout(prepared: Any, tmp_path: Path) -> None:
    facts = prepared(of_lengths(LENGTHS))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert prepared(of_lengths(LENGTHS)) == facts
    with pytest.raises(UserError, match=r"started with: 14 documents .* packed.* then, 15 documents .* --resume"):
        prepared(of_lengths([*LENGTHS, 9]))
    with pytest.raises(UserError, match=r"packed, .* then, .* padded, "):
        prepared(of_lengths(LENGTHS), pack=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_of_before_documents_were_split_keeps_its_text(prepared: Any, tmp_path: Path) -> None:
    tokens_NS = np.arange(50 * LENGTH, dtype=np.int32).reshape(50, LENGTH)
    np.save(tmp_path / TOKENS_FILE, tokens_NS)
    np.save(tmp_path / STARTS_FILE, np.zeros(tokens_NS.shape, dtype=np.bool_))
    (tmp_path / "corpus.json").write_text('{"documents": 7, "tokens": 400, "sequences": 50, "address": "a"}')
    facts = prepared(of_lengths(LENGTHS))
    assert (facts.documents, facts.address, facts.held_out) == (7, "a", None)
    assert np.array_equal(np.load(tmp_path / TOKENS_FILE), tokens_NS)
    with pytest.raises(UserError, match=r"--resume: .* packed text; the teacher leaks; .* without --resume"):
        facts.require_padded("the teacher leaks")
    assert facts.lines() == ["7 documents, 400 tokens in 50 sequences"]
    spec = CorpusSpec.model_validate({"paths": ["x"], "sequence_length": LENGTH, "batch_sequences": 2, "held_out": 0.2})
    assert Batches(tmp_path, spec, 1).held_out(0).tokens_BS[0, 0] == 40 * LENGTH


@pytest.mark.parametrize("pack", [True, False])
def test_too_little_text_for_one_sequence_is_refused(prepared: Any, pack: bool) -> None:
    lengths = [3, 4] if pack else [1]
    with pytest.raises(UserError, match=r"\d documents in x give \d tokens, too few for one sequence of 8"):
        prepared(of_lengths(lengths), pack=pack)
