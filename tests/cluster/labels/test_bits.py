"""Numbers packed to the bits they need: the same again, in the bytes that were announced, uncopied where it can be."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.labels.bits import (
    bits_for,
    pack,
    pack_rising,
    packed_size,
    rising_size,
    smallest_uint,
    unpack,
    unpack_rising,
)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """A number of bits and up to 300 numbers that fit in them, the least and the greatest among them."""
    bits, count = draw(st.integers(1, 32)), draw(st.integers(0, 300))
    values = np.random.default_rng(draw(st.integers(0, 2**16))).integers(0, 2**bits, count, dtype=np.uint32)
    if count:
        values[draw(st.integers(0, count - 1))] = 2**bits - 1
        values[draw(st.integers(0, count - 1))] = 0
    return bits, values


@given(numbers())
def test_numbers_come_back_as_they_were(given: tuple[int, np.ndarray]) -> None:
    bits, values = given
    back = unpack(pack(values, bits), values.size, bits)
    assert back.dtype == smallest_uint(bits)
    assert np.array_equal(back, values)


@given(numbers())
def test_what_they_take_is_what_was_announced_and_no_byte_more(given: tuple[int, np.ndarray]) -> None:
    bits, values = given
    packed = pack(values, bits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(values.size, bits) == (values.size * bits + 7) // 8


@given(numbers(), st.binary(min_size=1, max_size=9))
def test_bytes_behind_the_numbers_are_not_read(given: tuple[int, np.ndarray], behind: bytes) -> None:
    bits, values = given
    buffer = np.concatenate([pack(values, bits), np.frombuffer(behind, dtype=np.uint8)])
    assert np.array_equal(unpack(buffer, values.size, bits), values)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_whole_types_come_back_as_views(bits: int) -> None:
    packed = pack(np.arange(100, dtype=np.uint32), bits)
    assert np.shares_memory(unpack(packed, 100, bits), packed)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_type_the_numbers_come_in_makes_no_difference(dtype: type[np.unsignedinteger]) -> None:
    values = np.arange(100)
    for bits in (7, 8, 9, 16, 17, 32):
        assert np.array_equal(pack(values.astype(dtype), bits), pack(values.astype(np.uint32), bits))


def test_a_view_with_gaps_is_packed_as_its_copy() -> None:
    values = np.arange(200, dtype=np.uint32)[::2]
    for bits in (8, 9, 16, 17, 32):
        assert np.array_equal(pack(values, bits), pack(values.copy(), bits))


BITS = {1: 1, 2: 1, 3: 2, 256: 8, 257: 9, 49_152: 16, 65_536: 16, 65_537: 17, 128_256: 17, 300_000: 19}


@pytest.mark.parametrize(("count", "bits"), BITS.items())
def test_bits_are_those_that_the_vocabulary_needs(count: int, bits: int) -> None:
    assert bits_for(count) == bits
    assert count - 1 <= np.iinfo(smallest_uint(bits)).max


TYPES = {1: np.uint8, 8: np.uint8, 9: np.uint16, 16: np.uint16, 17: np.uint32, 32: np.uint32}


@pytest.mark.parametrize(("bits", "dtype"), TYPES.items())
def test_the_type_is_the_smallest_that_holds_the_bits(bits: int, dtype: type[np.unsignedinteger]) -> None:
    assert smallest_uint(bits) is dtype


@st.composite
def rising(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Up to 300 different numbers in rising order below a bound of up to 2**45, crowded or far apart."""
    universe = draw(st.integers(1, 2000) | st.integers(1, 2**45))
    count = draw(st.integers(0, min(300, universe)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = np.unique(rng.integers(0, universe, count))
    edges = draw(st.sampled_from([[], [0], [universe - 1], [0, universe - 1]]))
    return np.union1d(values, np.array(edges, dtype=np.int64)), universe


@given(rising())
def test_rising_numbers_come_back_as_they_were_in_the_bytes_announced(given: tuple[np.ndarray, int]) -> None:
    values, universe = given
    packed = pack_rising(values, universe)
    assert packed.size == rising_size(values.size, universe)
    assert np.array_equal(unpack_rising(packed, values.size, universe), values)


@pytest.mark.parametrize(("count", "universe"), [(1000, 2**20), (17_000, 49_152_000), (17_000, 128_256_000)])
def test_rising_numbers_take_two_bits_more_than_their_mean_gap(count: int, universe: int) -> None:
    assert 8 * rising_size(count, universe) / count <= math.log2(universe / count) + 2 + 0.1


@given(rising())
def test_bytes_that_say_no_rising_numbers_give_none(given: tuple[np.ndarray, int]) -> None:
    values, universe = given
    nothing = np.zeros(rising_size(values.size, universe), dtype=np.uint8)
    assert unpack_rising(nothing, values.size, universe).size == 0
