"""Whole numbers packed to as many bits as their range needs, or as few as their order leaves them.

A number's low bytes lie in a plane of ``uint8``, ``uint16`` or ``uint32``, which is read as it lies, and what is left
of its bits in a second, densely packed plane behind it. So 8, 16 and 32 bits are unpacked without a copy, and 17 bits
(a vocabulary of 128,256) cost one extra bit each, not a byte.

Numbers that rise are kept by Elias-Fano coding (Elias, 1974; Fano, 1971): their low bits as above, and their high parts
as a bitmap with one zero per step up and one one per number. Some 2 bits more than ``log2(universe / count)`` each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_PLANES: dict[int, type[np.unsignedinteger]] = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def bits_for(count: int) -> int:
    """Bits that tell ``count`` different numbers apart; at least 1."""
    return max(1, (count - 1).bit_length())


def smallest_uint(bits: int) -> type[np.unsignedinteger]:
    """The smallest unsigned type that holds so many bits, at most 32."""
    return next(dtype for size, dtype in _PLANES.items() if bits <= size)


def _low_bits(bits: int) -> int:
    """Bits of the plane that is not packed: 0, 8, 16 or 32."""
    return max((size for size in _PLANES if size <= bits), default=0)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` numbers of so many bits take."""
    low = _low_bits(bits)
    return count * low // 8 + (count * (bits - low) + 7) // 8


def pack(values: npt.NDArray[np.unsignedinteger], bits: int) -> npt.NDArray[np.uint8]:
    """Pack a flat array of numbers below ``2**bits`` (at most 32 bits) into bytes."""
    low = _low_bits(bits)
    planes = []
    if low:
        planes.append(np.ascontiguousarray(values.astype(_PLANES[low])).view(np.uint8))
    if bits > low:
        rest = values.astype(np.uint32) >> np.uint32(low)
        shifts = np.arange(bits - low, dtype=np.uint32)
        planes.append(np.packbits((rest[:, None] >> shifts).astype(np.uint8) & 1, axis=None, bitorder="little"))
    return np.concatenate(planes) if planes else np.empty(0, dtype=np.uint8)


def unpack(buffer: npt.NDArray[np.uint8], count: int, bits: int) -> npt.NDArray[np.unsignedinteger]:
    """Undo :func:`pack`; the smallest unsigned type that holds the bits. A view of the buffer where one plane does."""
    low = _low_bits(bits)
    size = count * low // 8
    base = buffer[:size].view(_PLANES[low]) if low else np.zeros(count, dtype=np.uint8)
    if bits == low:
        return base
    width = bits - low
    flat = np.unpackbits(buffer[size : packed_size(count, bits)], count=count * width, bitorder="little")
    out = base.astype(smallest_uint(bits))
    for bit, column in enumerate(flat.reshape(count, width).T):
        out |= column.astype(out.dtype) << out.dtype.type(low + bit)
    return out


def _split(count: int, universe: int) -> int:
    """The number of low bits that Elias-Fano coding keeps as they are."""
    return min(32, max(0, (universe // max(1, count)).bit_length() - 1))


def rising_size(count: int, universe: int) -> int:
    """Bytes that ``count`` rising numbers below ``universe`` take."""
    low = _split(count, universe)
    return packed_size(count, low) + (count + (universe >> low) + 7) // 8


def pack_rising(values: npt.NDArray[np.int64], universe: int) -> npt.NDArray[np.uint8]:
    """Pack a flat array of rising numbers below ``universe``, which may be large, into bytes."""
    low = _split(values.size, universe)
    steps = np.zeros(values.size + (universe >> low), dtype=np.uint8)
    steps[(values >> low) + np.arange(values.size)] = 1
    rest = (values & ((1 << low) - 1)).astype(np.uint32)
    return np.concatenate([pack(rest, low), np.packbits(steps, bitorder="little")])


def unpack_rising(buffer: npt.NDArray[np.uint8], count: int, universe: int) -> npt.NDArray[np.int64]:
    """Undo :func:`pack_rising`. Of bytes that it did not write come other than ``count`` numbers, or falling ones."""
    low = _split(count, universe)
    size = packed_size(count, low)
    steps = np.unpackbits(buffer[size:], count=count + (universe >> low), bitorder="little")
    high = np.flatnonzero(steps)
    if high.size != count:
        return high
    return ((high - np.arange(count)) << low) | unpack(buffer, count, low)
