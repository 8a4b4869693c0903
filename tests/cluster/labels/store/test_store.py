"""The label store in a folder: what goes in comes out to the bit, and nothing else ever does."""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import LabelError, RunError
from cluster.heads import OutputHead
from cluster.labels.columns import Bytes
from cluster.labels.store.objects import Head, checked, head_key, label_key, labels_prefix, pack, stamp_of, unpack
from cluster.labels.store.store import LabelStore
from cluster.labels.wire import Stamp, decode
from tests.cluster.labels.blocks import FORMS
from tests.cluster.labels.store.fill import OTHER, TEACHER, block, fill, repetitive_block, stamp_of_batch

STAMP = stamp_of_batch(1)


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore.open(str(tmp_path))


def stored(store: LabelStore, stamp: Stamp = STAMP) -> bytes:
    data = store.bucket.get(label_key(stamp))
    assert data is not None
    return data


@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_every_kind_comes_back_to_the_bit(store: LabelStore, form: str) -> None:
    written = block(STAMP, form)
    assert store.get(STAMP) is None
    assert store.put(written, STAMP)
    assert not store.put(written, STAMP)
    read = store.get(STAMP)
    assert read is not None and np.array_equal(read, written)
    assert decode(read)[1] == STAMP


def test_blocks_are_compressed_where_that_pays_and_only_there(store: LabelStore) -> None:
    plain, small = stamp_of_batch(1), stamp_of_batch(2)
    store.put(block(plain, "dense uint16"), plain)
    store.put(repetitive_block(small), small)
    assert stored(store, plain).startswith(b"SHLB")
    assert stored(store, small).startswith(zstandard.FRAME_HEADER)
    assert len(stored(store, small)) < repetitive_block(small).size / 10
    for stamp, written in ((plain, block(plain, "dense uint16")), (small, repetitive_block(small))):
        read = store.get(stamp)
        assert read is not None and np.array_equal(read, written)


@pytest.mark.parametrize("make", [block, repetitive_block], ids=["plain", "compressed"])
@pytest.mark.parametrize("cut", [0, 1, 3, 50, -1])
def test_a_damaged_object_is_named_and_removed_and_can_be_written_again(
    store: LabelStore, make: Callable[[Stamp], Bytes], cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(make(STAMP), STAMP)
    store.bucket.replace(label_key(STAMP), stored(store)[:cut])
    with caplog.at_level(logging.WARNING):
        assert store.get(STAMP) is None
    assert label_key(STAMP) in caplog.text
    assert store.missing([STAMP]) == [STAMP]
    assert store.put(make(STAMP), STAMP)
    assert store.get(STAMP) is not None


@given(st.sampled_from([block, repetitive_block]), st.data())
def test_no_flipped_bit_is_ever_read(make: Callable[[Stamp], Bytes], data: st.DataObject) -> None:
    written = make(STAMP)
    wrong = bytearray(pack(written))
    wrong[data.draw(st.integers(0, len(wrong) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        # What a decompressor does not need, such as a reserved bit, may be anything.
        assert np.array_equal(checked(bytes(wrong), STAMP), written)
    except LabelError:
        return


def test_a_frame_that_promises_any_size_takes_no_memory_for_it() -> None:
    honest = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(bytes(2**20))
    parameters = zstandard.get_frame_parameters(honest)
    assert parameters.content_size == 2**20
    at = honest.index(struct.pack("<I", 2**20))
    with pytest.raises(LabelError, match="damaged"):
        unpack(honest[:at] + struct.pack("<I", 2**32 - 1) + honest[at + 4 :])


def test_bytes_behind_a_frame_are_refused() -> None:
    with pytest.raises(LabelError, match="does not end with it"):
        unpack(zstandard.ZstdCompressor().compress(b"labels" * 10) + b"x")


def test_another_batch_s_block_is_not_given_out(store: LabelStore, caplog: pytest.LogCaptureFixture) -> None:
    store.put(block(stamp_of_batch(2)), STAMP)
    assert store.get(STAMP) is None
    assert "label block of another batch" in caplog.text
    assert store.missing([STAMP]) == [STAMP]


def test_what_a_later_stillhouse_wrote_is_left_alone(store: LabelStore) -> None:
    later = block(STAMP).copy()
    later[4] = 2
    store.put(later, STAMP)
    with pytest.raises(LabelError, match="update it"):
        store.get(STAMP)
    assert store.missing([STAMP]) == []


@pytest.mark.parametrize("asked", [3, 32, 33, 200])
def test_missing_says_which_are_not_there_in_their_order(store: LabelStore, asked: int) -> None:
    stamps = [stamp_of_batch(number) for number in range(asked)] + [stamp_of_batch(0, OTHER)]
    for stamp in stamps[1::2]:
        store.put(block(stamp), stamp)
    assert store.missing(stamps) == stamps[::2]
    assert store.missing(stamps[1::2]) == []
    assert store.missing([]) == []


@given(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8), st.binary(min_size=16, max_size=16))
def test_a_key_says_its_stamp(teacher: bytes, labels: bytes, batch: bytes) -> None:
    stamp = Stamp(teacher.hex(), teacher[::-1].hex(), labels.hex(), batch.hex())
    key = label_key(stamp)
    assert stamp_of(key) == stamp
    assert key.startswith(labels_prefix(stamp))
    assert stamp_of(key + "0") is stamp_of(key.replace("labels/", "heads/")) is stamp_of("") is None


WEIGHT_VD = np.arange(12, dtype=np.uint16).reshape(3, 4)
HEADS = {
    "bfloat16": OutputHead(WEIGHT_VD),
    "float32": OutputHead(np.full((5, 2), np.nan, np.float32)),
    "empty": OutputHead(np.zeros((0, 4), np.uint16)),
    "a bias, a scale and a cap": OutputHead(WEIGHT_VD, WEIGHT_VD[:, 1], 1 / 3, 30.0),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_a_head_comes_back_to_the_bit(store: LabelStore, head: Head) -> None:
    assert store.get_head(TEACHER) is None
    assert store.put_head(TEACHER, head)
    assert not store.put_head(TEACHER, head)
    read = store.get_head(TEACHER)
    assert read is not None
    assert (read.scale, read.softcap) == (head.scale, head.softcap)
    for mine, kept in ((read.weight_VD, head.weight_VD), (read.bias_V, head.bias_V)):
        assert (mine is None) == (kept is None)
        if mine is not None and kept is not None:
            assert (mine.dtype, mine.shape, mine.tobytes()) == (kept.dtype, kept.shape, kept.tobytes())


def test_a_head_of_the_first_format_is_not_trusted_for_it_left_out_the_bias(store: LabelStore) -> None:
    about = struct.pack("<4sHHII", b"SHHD", 1, 2, *WEIGHT_VD.shape)
    checksum = zlib.crc32(WEIGHT_VD.data, zlib.crc32(about))
    store.bucket.put_new(head_key(TEACHER), about + struct.pack("<I4x", checksum) + WEIGHT_VD.tobytes())
    assert store.get_head(TEACHER) is None
    assert store.put_head(TEACHER, HEADS["bfloat16"])


def test_a_head_that_lies_in_columns_is_written_in_rows(store: LabelStore) -> None:
    head_VD = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    store.put_head(TEACHER, OutputHead(head_VD))
    read = store.get_head(TEACHER)
    assert read is not None and np.array_equal(read.weight_VD, head_VD)


@pytest.mark.parametrize("head", [HEADS["bfloat16"], HEADS["a bias, a scale and a cap"]], ids=["plain", "all"])
def test_a_damaged_head_is_removed_whichever_byte_it_is(store: LabelStore, head: Head) -> None:
    store.put_head(TEACHER, head)
    whole = store.bucket.get(head_key(TEACHER))
    assert whole is not None
    for at in range(len(whole)):
        store.bucket.replace(head_key(TEACHER), whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert store.get_head(TEACHER) is None
        assert store.bucket.get(head_key(TEACHER)) is None
    for cut in (0, 10, 24, len(whole) - 1):
        store.bucket.replace(head_key(TEACHER), whole[:cut])
        assert store.get_head(TEACHER) is None


@pytest.mark.parametrize("weight", [np.zeros(3, np.float32), np.zeros((2, 2), np.float64)])
def test_what_is_no_head_is_not_kept(store: LabelStore, weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"2-D array of uint16 or float32"):
        store.put_head(TEACHER, OutputHead(weight))


@pytest.mark.parametrize("bias", [np.zeros(2, np.uint16), np.zeros(3, np.float32), np.zeros((3, 1), np.uint16)])
def test_a_bias_of_another_size_or_precision_is_not_kept(store: LabelStore, bias: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the bias of"):
        store.put_head(TEACHER, OutputHead(WEIGHT_VD, bias))


def test_a_manifest_lists_a_complete_pass_in_its_order(store: LabelStore) -> None:
    stamps = fill(store, 5)
    order = [*stamps[::-1], stamps[0]]  # a second epoch reads a batch again
    assert store.manifest("night/1") is None
    store.publish("night/1", order, {"tokens": 12, "kind": "topk"})
    manifest = store.manifest("night/1")
    assert manifest is not None
    assert manifest.stamps() == order
    assert manifest.facts == {"tokens": 12, "kind": "topk"}
    store.publish("night/1", stamps[:2], {})
    again = store.manifest("night/1")
    assert again is not None and again.stamps() == stamps[:2] and again.published >= manifest.published


def test_a_pass_that_is_not_complete_is_not_published(store: LabelStore) -> None:
    stamps = [*fill(store, 3), stamp_of_batch(9)]
    with pytest.raises(RunError, match=f"1 of 4 batches are not there, such as {label_key(stamps[-1])}"):
        store.publish("night", stamps, {})
    for mixed in ([], [stamps[0], replace(stamps[0], labels="1" * 16)]):
        with pytest.raises(ValueError, match="one pass"):
            store.publish("night", mixed, {})
    assert store.manifest("night") is None


def test_a_damaged_manifest_is_removed(store: LabelStore) -> None:
    store.publish("night", fill(store, 1), {})
    store.bucket.replace("manifests/night.json", b'{"name": "night"')
    assert store.manifest("night") is None
    assert list(store.bucket.list("manifests/")) == []


def test_many_threads_share_a_store(store: LabelStore) -> None:
    stamps = [stamp_of_batch(number) for number in range(40)]

    def work(stamp: Stamp) -> bool:
        written = repetitive_block(stamp) if int(stamp.batch, 16) % 2 else block(stamp)
        first = store.put(written, stamp)
        read = store.get(stamp)
        return first and read is not None and np.array_equal(read, written)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(work, [stamp for stamp in stamps for _ in range(3)]))
    assert sum(won) == len(stamps)


def test_the_store_loads_without_torch_ray_and_for_a_folder_without_boto3() -> None:
    code = (
        "import sys; from cluster.labels.store import store, upkeep; store.LabelStore.open('/nowhere/labels'); "
        "print(*sorted({'torch', 'ray', 'transformers', 'boto3', 'pyarrow'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[4]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
