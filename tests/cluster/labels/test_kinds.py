"""Labels as plain columns: cut into blocks and joined again without a loss."""

import pickle

import numpy as np
import pytest

from cluster.labels.kinds import Hidden, TopK, id_dtype, joined


def labels(sequences: int = 6) -> TopK:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (sequences, 5, 3)).astype(np.uint16)
    return TopK(
        ids,
        rng.normal(size=(sequences, 5, 3)).astype(np.float32),
        rng.normal(size=(sequences, 5)).astype(np.float32),
    )


def same(one: TopK, other: TopK) -> bool:
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("ids_BSK", "logprobs_BSK", "log_tail_BS"))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_blocks_joined_again_are_the_whole(size: int) -> None:
    whole = labels()
    blocks = [whole.rows(first, first + size) for first in range(0, 6, size)]
    assert [block.sequences for block in blocks] == [size] * (6 // size)
    assert same(joined(blocks), whole)


def test_rows_and_a_single_block_are_not_copied() -> None:
    whole = labels()
    assert np.shares_memory(whole.rows(2, 4).ids_BSK, whole.ids_BSK)
    assert joined([whole]) is whole


def test_bytes_are_those_of_the_columns_and_within_what_the_design_allows() -> None:
    ids, floats = 6 * 5 * 3, 6 * 5 * (3 + 1)
    assert labels().nbytes == 2 * ids + 4 * floats
    assert labels().rows(0, 2).nbytes == labels().nbytes // 3


def test_labels_survive_pickling() -> None:
    assert same(pickle.loads(pickle.dumps(labels())), labels())


def test_hidden_blocks_join_along_the_sequences() -> None:
    hidden = Hidden(np.arange(24, dtype=np.int16).reshape(4, 3, 2))
    assert np.array_equal(joined([hidden.rows(0, 1), hidden.rows(1, 4)]).hidden_BSD, hidden.hidden_BSD)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(300, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_the_id_type_holds_the_last_token(vocabulary: int, dtype: type[np.integer]) -> None:
    assert id_dtype(vocabulary) is dtype
    assert vocabulary - 1 <= np.iinfo(dtype).max
