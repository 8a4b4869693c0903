"""Blocks as bytes: the same again to the bit, uncopied where it can be, and refused as soon as one byte is wrong."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cluster.errors import LabelError
from cluster.labels.bits import rising_size
from cluster.labels.kinds import Dense, Hidden, Labels, Sampled, TopK
from cluster.labels.wire import MAGIC, VERSION, Stamp, decode, encode, labels_hash, read_block
from cluster.spec import DenseLabels, HiddenLabels, LabelsSpec, SampledLabels, TopKLabels
from tests.cluster.labels.blocks import FORMS, columns, ragged_mask, random_labels, random_mask, same

Bytes = npt.NDArray[np.uint8]

HEADER = 136
STAMP = Stamp(teacher="0123456789abcdef", tokenizer="f" * 16, labels="0" * 16, batch="00ff" * 8)
EDGES = (2, 3, 128, 129, 255, 256, 257, 32_768, 49_152, 65_535, 65_536, 65_537, 128_256, 300_000)


@st.composite
def blocks(draw: st.DrawFn, forms: tuple[str, ...] = FORMS) -> Labels:
    """A block of any kind and shape, with no, some or only loss tokens."""
    form = draw(st.sampled_from(forms))
    seed = draw(st.integers(0, 2**32 - 1))
    shape = (draw(st.integers(0, 5)), draw(st.integers(0, 9)))
    mask_BS = random_mask(shape, draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), seed)
    greatest = 70 if form.startswith("dense") else 300_000
    edges = st.sampled_from([edge for edge in EDGES if edge <= greatest])
    vocabulary = draw(edges | st.integers(2, greatest))
    width = draw(st.integers(1, min(vocabulary, 20) if form == "topk" else 60))
    return random_labels(form, mask_BS, vocabulary=vocabulary, width=width, seed=seed)


def small(form: str, vocabulary: int = 300) -> Labels:
    """A block of a few hundred bytes."""
    return random_labels(form, random_mask((2, 3), 0.7), vocabulary=5 if form.startswith("dense") else vocabulary)


def sealed(block: Bytes) -> Bytes:
    """A block with the length and the checksum that its bytes now have."""
    block = block.copy()
    block[48:56] = np.frombuffer(struct.pack("<Q", block.size - HEADER), dtype=np.uint8)
    checksum = zlib.crc32(block[12:].tobytes(), zlib.crc32(block[4:8].tobytes()))
    block[8:12] = np.frombuffer(struct.pack("<I", checksum), dtype=np.uint8)
    return block


def whole_eights(size: int) -> int:
    return (size + 7) // 8 * 8


def as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, dtype=np.uint8)


@given(blocks())
def test_every_block_comes_back_to_the_bit(labels: Labels) -> None:
    block = encode(labels, STAMP)
    back, stamp = decode(block)
    assert same(back, labels)
    assert stamp == STAMP
    assert block.size % 8 == 0
    assert np.array_equal(encode(labels, STAMP), block)
    assert np.array_equal(encode(back, stamp), block)


@given(blocks(forms=("sampled",)))
def test_draws_come_back_as_draws(labels: Labels) -> None:
    back, _ = decode(encode(labels, STAMP))
    assert isinstance(back, Sampled)
    assert (back.counts_TN.sum(-1) == back.draws).all()
    for ids, counts in zip(back.ids_TN.astype(np.int64), back.counts_TN, strict=True):
        drawn = ids[: np.count_nonzero(counts)]
        assert (np.diff(drawn) > 0).all()
        assert counts[: drawn.size].all()
        assert not ids[drawn.size :].any()


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8), st.binary(min_size=16, max_size=16))
def test_a_stamp_comes_back_as_it_was(teacher: bytes, labels: bytes, batch: bytes) -> None:
    stamp = Stamp(teacher.hex(), teacher[::-1].hex(), labels.hex(), batch.hex())
    assert decode(encode(small("hidden uint16"), stamp))[1] == stamp


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_block_is_written_as_its_copy(form: str) -> None:
    part = random_labels(form, ragged_mask()).rows(1, 5)
    copied = {name: column.copy() for name, column in columns(part).items()}
    whole = replace(part, loss_mask_BS=part.loss_mask_BS.copy(), **copied)  # type: ignore[arg-type]
    assert np.array_equal(encode(part, STAMP), encode(whole, STAMP))
    assert same(decode(encode(part, STAMP))[0], part)


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_do_not_lie_in_order_are_written_as_if_they_did(form: str) -> None:
    labels = random_labels(form, ragged_mask())
    spread: dict[str, Any] = {name: np.asfortranarray(column) for name, column in columns(labels).items()}
    spread["loss_mask_BS"] = np.asfortranarray(labels.loss_mask_BS)
    assert np.array_equal(encode(replace(labels, **spread), STAMP), encode(labels, STAMP))


UNCOPIED = {
    "topk": {"codes_TK", "log_tail_T"},
    "sampled": {"entropy_T"},
    "hidden uint16": {"hidden_TD"},
    "hidden float32": {"hidden_TD"},
    "dense uint16": {"logits_TV"},
    "dense float32": {"logits_TV"},
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_that_lie_as_numpy_reads_them_are_not_copied(form: str) -> None:
    block = encode(random_labels(form, ragged_mask()), STAMP)
    decoded = columns(decode(block)[0])
    assert {name for name, column in decoded.items() if np.shares_memory(column, block)} == UNCOPIED[form]
    assert all(decoded[name].flags.aligned for name in UNCOPIED[form])


@pytest.mark.parametrize(
    ("vocabulary", "uncopied"), [(129, True), (256, True), (49_152, True), (65_536, True), (257, False)]
)
def test_ids_of_whole_bytes_are_not_copied(vocabulary: int, uncopied: bool) -> None:
    block = encode(small("topk", vocabulary), STAMP)
    labels, _ = decode(block)
    assert isinstance(labels, TopK)
    assert np.shares_memory(labels.ids_TK, block) is uncopied


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("vocabulary", [3, 256, 65_536, 128_256])
def test_a_block_that_cannot_be_written_to_is_read(form: str, vocabulary: int) -> None:
    """Ray's object store hands out such arrays."""
    labels = small(form, vocabulary)
    block = encode(labels, STAMP)
    block.flags.writeable = False
    back, _ = decode(block)
    assert same(back, labels)
    assert not any(getattr(back, name).flags.writeable for name in UNCOPIED[form])


@pytest.mark.parametrize("form", FORMS)
def test_a_block_cut_short_anywhere_is_refused(form: str) -> None:
    block = encode(small(form), STAMP)
    for size in range(block.size):
        with pytest.raises(LabelError, match="cut short" if size >= HEADER else "not a label block"):
            decode(block[:size])


@pytest.mark.parametrize("form", FORMS)
def test_a_block_with_any_byte_changed_is_refused(form: str) -> None:
    block = encode(small(form), STAMP)
    for at in range(block.size):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            block[at] ^= flip
            with pytest.raises(LabelError):
                decode(block)
            block[at] ^= flip
    decode(block)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("behind", [b"\0", b"\0" * 8, b"SHLB" * 40])
def test_bytes_behind_a_block_are_refused(form: str, behind: bytes) -> None:
    longer = np.concatenate([encode(small(form), STAMP), as_bytes(behind)])
    with pytest.raises(LabelError):
        decode(longer)
    with pytest.raises(LabelError, match="belong to no column"):
        decode(sealed(longer))


@pytest.mark.parametrize("form", FORMS)
def test_a_block_whose_columns_lost_their_end_is_refused(form: str) -> None:
    """As a writer with a defect would leave it: the length and the checksum are right."""
    block = encode(small(form), STAMP)
    for size in range(HEADER, block.size):
        with pytest.raises(LabelError):
            decode(sealed(block[:size]))


@pytest.mark.parametrize("version", [VERSION + 1, VERSION + 2, 999, 65_535])
def test_a_later_version_is_refused_by_its_number(version: int) -> None:
    block = encode(small("topk"), STAMP)
    block[4:6] = as_bytes(struct.pack("<H", version))
    for later in (block, sealed(block)):
        with pytest.raises(LabelError, match=rf"version {version};.* up to {VERSION}\b"):
            decode(later)


def test_an_unknown_kind_is_refused_by_its_code() -> None:
    block = encode(small("topk"), STAMP)
    block[6] = 77
    with pytest.raises(LabelError, match="unknown kind 77; known are topk, sampled, hidden, dense"):
        decode(sealed(block))


def test_an_id_that_the_vocabulary_does_not_have_is_refused() -> None:
    labels = small("topk", vocabulary=257)
    assert isinstance(labels, TopK)
    ids_TK = labels.ids_TK.copy()
    ids_TK[0, 0] = 300
    with pytest.raises(LabelError, match="token id 300; the vocabulary has 257"):
        decode(encode(replace(labels, ids_TK=ids_TK), STAMP))


@pytest.mark.parametrize("ids", [[[3, 300], [5, 7]], [[7, 3], [5, 7]], [[3, 3], [5, 7]]])
def test_drawn_ids_that_do_not_rise_within_the_vocabulary_are_refused(ids: list[list[int]]) -> None:
    counts_TN = np.ones((2, 2), np.uint16)
    about_all = (np.ones((1, 2), np.bool_), 257, 1.0)
    labels = Sampled(*about_all, np.array(ids, np.uint16), counts_TN, np.zeros(2, np.float32), draws=2)
    with pytest.raises(LabelError, match="draws and its ids do not belong together"):
        decode(encode(labels, STAMP))


@pytest.mark.parametrize("counts", [[[2, 2, 0], [2, 0, 0]], [[2, 0, 0], [2, 2, 0]]])
def test_draws_that_are_not_as_many_for_each_token_are_refused(counts: list[list[int]]) -> None:
    ids_TN, counts_TN = np.array([[1, 2, 0], [3, 4, 0]], np.uint16), np.array(counts, np.uint16)
    labels = Sampled(np.ones((1, 2), np.bool_), 300, 1.0, ids_TN, counts_TN, np.zeros(2, np.float32), draws=3)
    with pytest.raises(LabelError, match="draws and its ids do not belong together"):
        decode(encode(labels, STAMP))


def refused_or_read(block: Bytes) -> None:
    """Decode what may be anything: nothing but a LabelError comes of it, or labels whose columns fit."""
    try:
        labels, _ = decode(block)
    except LabelError:
        return
    assert all(len(column) == labels.tokens for column in columns(labels).values())


@given(st.binary(max_size=400), st.sampled_from([b"", MAGIC, MAGIC + struct.pack("<H", VERSION)]))
def test_random_bytes_are_refused(data: bytes, begin: bytes) -> None:
    with pytest.raises(LabelError):
        decode(as_bytes(begin + data))


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_that_was_wrong_before_the_checksum_was_made_breaks_nothing(form: str) -> None:
    block = encode(small(form), STAMP)
    for at in range(block.size):
        for value in (0, 1, 2, 255):
            wrong = block.copy()
            wrong[at] = value
            refused_or_read(sealed(wrong))


SIZE = st.integers(0, 8) | st.sampled_from([255, 256, 65_536])


@given(st.integers(0, 5), st.sampled_from([2, 4, 0, 3]), st.tuples(*[SIZE] * 5), st.binary(max_size=12), st.data())
def test_a_header_that_does_not_fit_its_columns_breaks_nothing(
    kind: int, floats: int, sizes: tuple[int, ...], mask: bytes, data: st.DataObject
) -> None:
    sequences, positions, vocabulary, width, items = sizes
    # The mask mostly fits, or no column would ever be looked at.
    marked = np.unpackbits(as_bytes(mask), bitorder="little")[: sequences * positions]
    tokens = data.draw(st.just(int(marked.sum())) | SIZE)
    body = mask.ljust(whole_eights(len(mask)), b"\0") + data.draw(st.binary(max_size=12)) * 8
    counts = (sequences, positions, tokens, vocabulary, width, items)
    header = struct.pack("<4sHBBIIIIIIQd88x", MAGIC, VERSION, kind, floats, 0, *counts, 1.0)
    refused_or_read(sealed(as_bytes(header + body)))


@pytest.mark.parametrize("what", ["teacher", "tokenizer", "labels", "batch"])
def test_a_block_made_from_something_else_is_refused_by_name(what: str) -> None:
    labels, other = small("topk"), replace(STAMP, **{what: "a" * len(getattr(STAMP, what))})
    named = {"labels": "labels section"}.get(what, what)
    with pytest.raises(LabelError, match=f"another {named}: it says {getattr(other, what)}, .* {getattr(STAMP, what)}"):
        other.require(STAMP)
    with pytest.raises(LabelError, match=f"another {named}"):
        read_block(encode(labels, other), STAMP)


def test_a_block_made_from_what_was_expected_is_read() -> None:
    STAMP.require(replace(STAMP))
    assert same(read_block(encode(small("topk"), STAMP), STAMP), small("topk"))


def test_the_hash_of_a_labels_section_tells_every_setting_apart() -> None:
    sections = (TopKLabels(), TopKLabels(k=8), TopKLabels(temperature=2.0), SampledLabels(kind="sampled"))
    sections += (SampledLabels(kind="sampled", draws=8), HiddenLabels(kind="hidden"), DenseLabels(kind="dense"))
    hashes = [labels_hash(section) for section in sections]
    assert len(set(hashes)) == len(sections)
    assert {len(bytes.fromhex(digits)) for digits in hashes} == {8}
    assert labels_hash(TopKLabels(k=64)) == hashes[0]


class NextTopKLabels(TopKLabels):
    """The section as a later version may declare it."""

    cover: float | None = None
    k: int = 64
    order: str = "falling"


def test_a_new_optional_setting_leaves_every_address_as_it_is() -> None:
    for fields in ({}, {"k": 8}, {"k": 8, "temperature": 2.0}):
        assert labels_hash(NextTopKLabels(**fields)) == labels_hash(TopKLabels(**fields))
        assert labels_hash(NextTopKLabels(**fields, cover=0.9)) != labels_hash(TopKLabels(**fields))


def test_a_setting_that_is_given_its_default_is_the_same_labels() -> None:
    given = TypeAdapter(LabelsSpec).validate_python({"kind": "topk", "k": 64, "temperature": 1})
    assert labels_hash(given) == labels_hash(TypeAdapter(LabelsSpec).validate_python({}))


def test_defaults_and_hashes_are_the_same_in_every_version() -> None:
    """A hash leaves defaults out, so a default that changed would give old labels to a new setting."""
    every = (TopKLabels(), SampledLabels(kind="sampled"), HiddenLabels(kind="hidden"), DenseLabels(kind="dense"))
    assert [section.model_dump() for section in every] == [
        {"kind": "topk", "k": 64, "temperature": 1.0},
        {"kind": "sampled", "draws": 50, "temperature": 1.0},
        {"kind": "hidden"},
        {"kind": "dense"},
    ]
    assert [labels_hash(section) for section in every] == [
        "556f7b0e46f38f41",
        "3b43ed14f1755557",
        "2581730069bc02fc",
        "7ae560d3b3fdeea9",
    ]


ALL_LOSS = np.ones((4, 256), dtype=np.bool_)


@pytest.mark.parametrize(("vocabulary", "most"), [(49_152, 280), (128_256, 330)])
def test_topk_takes_no_more_bytes_per_token_than_the_design_allows(vocabulary: int, most: int) -> None:
    labels = random_labels("topk", ALL_LOSS, vocabulary=vocabulary, width=64)
    assert encode(labels, STAMP).size / labels.tokens <= most


@pytest.mark.parametrize("vocabulary", [300, 49_152, 128_256])
@pytest.mark.parametrize("draws", [1, 7, 50])
@pytest.mark.parametrize("mask_BS", [ALL_LOSS, ragged_mask()], ids=["all", "some"])
def test_sampled_takes_its_ids_a_bit_per_draw_and_an_entropy(
    mask_BS: npt.NDArray[np.bool_], draws: int, vocabulary: int
) -> None:
    labels = random_labels("sampled", mask_BS, vocabulary=vocabulary, width=draws)
    assert isinstance(labels, Sampled)
    ids = rising_size(int(np.count_nonzero(labels.counts_TN)), labels.tokens * vocabulary)
    begins = (labels.tokens * draws + 7) // 8
    body = [(mask_BS.size + 7) // 8, ids, begins, 4 * labels.tokens]
    assert encode(labels, STAMP).size == HEADER + sum(whole_eights(size) for size in body)


@pytest.mark.parametrize("form", FORMS[2:])
def test_exact_labels_take_their_floats_and_no_more(form: str) -> None:
    labels = random_labels(form, ALL_LOSS, vocabulary=300, width=64)
    floats = labels.hidden_TD if isinstance(labels, Hidden) else labels.logits_TV if isinstance(labels, Dense) else None
    assert floats is not None
    assert encode(labels, STAMP).size == HEADER + ALL_LOSS.size // 8 + floats.nbytes
