"""What the store's objects are called and what they hold: label blocks and heads, and how damage in them shows.

::

    labels/<teacher>/<tokenizer>/<labels>/<first 2 digits of batch>/<batch>   a label block, plain or as one zstd frame
    heads/<teacher>                                                          a teacher's head
    teachers/<teacher>.json                                                  what a spec calls the teacher
    manifests/<name>.json                                                    a complete pass
    leases/<holder>.json                                                     what is in use
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import zstandard

from cluster.errors import LabelError
from cluster.heads import OutputHead
from cluster.labels.columns import FLOATS, Bytes
from cluster.labels.wire import MAGIC, VERSION, Stamp, check

LABELS, HEADS, MANIFESTS, LEASES, TEACHERS = "labels/", "heads/", "manifests/", "leases/", "teachers/"

Head = OutputHead[npt.NDArray[Any]]

_HEX16 = "([0-9a-f]{16})"
_TEACHER_KEY = re.compile(rf"(?:{HEADS}{_HEX16}|{TEACHERS}{_HEX16}\.json)")
_LABEL_KEY = re.compile(rf"{LABELS}{_HEX16}/{_HEX16}/{_HEX16}/([0-9a-f]{{2}})/(\4[0-9a-f]{{30}})")
# Labels are mostly bits of chance, which a compressor only copies; it must pay for the time it takes to read.
_LEVEL, _WORTH = 1, 0.95
# Version 1 held the weight alone, whatever else the head had.
_HEAD_MAGIC, _HEAD_VERSION = b"SHHD", 2
# magic, version, bytes of a float | rows, columns, rows of the bias (0: none) | scale, soft-cap (0: none) | checksum of
# all before it, of the weight and of the bias
_HEAD = struct.Struct("<4sHHIIIddI")
_HEAD_CHECKED = _HEAD.size - 4


def labels_prefix(stamp: Stamp) -> str:
    """What the keys begin with of all batches that one teacher labelled in one way: what a lease is taken on."""
    return f"{LABELS}{stamp.teacher}/{stamp.tokenizer}/{stamp.labels}/"


def label_key(stamp: Stamp) -> str:
    """The key of a batch's labels."""
    return f"{labels_prefix(stamp)}{stamp.batch[:2]}/{stamp.batch}"


def stamp_of(key: str) -> Stamp | None:
    """Undo :func:`label_key`; None for a key that it does not give."""
    match = _LABEL_KEY.fullmatch(key)
    return Stamp(match[1], match[2], match[3], match[5]) if match else None


def teacher_of(key: str) -> str | None:
    """The teacher whose head or name has this key; None for any other key."""
    match = _TEACHER_KEY.fullmatch(key)
    return (match[1] or match[2]) if match else None


def head_key(teacher: str) -> str:
    """The key of a teacher's head."""
    return f"{HEADS}{teacher}"


def json_key(folder: str, name: str) -> str:
    """The key of a manifest or a lease; any name is good."""
    return f"{folder}{quote(name, safe='')}.json"


def pack(block: Bytes) -> bytes | memoryview:
    """A label block as it is stored: compressed only when that saves at least 5 % of its bytes."""
    plain = np.ascontiguousarray(block).data
    # One compressor for each call: they may not be shared between threads.
    small = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(plain)
    return small if len(small) <= _WORTH * plain.nbytes else plain


def unpack(data: bytes) -> Bytes:
    """Undo :func:`pack`; a plain block is not copied.

    Raises:
        LabelError: a zstd frame that is damaged or cut short.
    """
    if not data.startswith(zstandard.FRAME_HEADER):
        return np.frombuffer(data, dtype=np.uint8)
    # Piece by piece: a damaged frame may promise any size, and memory for it must not be asked for.
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        block = frame.decompress(data)
    except zstandard.ZstdError as error:
        raise LabelError(f"label object is damaged: {error}") from None
    if not frame.eof or frame.unused_data:
        raise LabelError("label object is damaged: its zstd frame does not end with it")
    return np.frombuffer(block, dtype=np.uint8)


def is_later(block: Bytes) -> bool:
    """Whether a block says that a later Stillhouse wrote it: it cannot be read, and is not damaged for that."""
    return block[:4].tobytes() == MAGIC and int.from_bytes(block[4:6].tobytes(), "little") > VERSION


def checked(data: bytes, stamp: Stamp) -> Bytes:
    """The label block in an object, once all of it has been found good and the stamp's own.

    Raises:
        LabelError: it is damaged, or another batch's; or a later Stillhouse wrote it, see :func:`is_later`.
    """
    block = unpack(data)
    check(block, stamp)
    return block


def pack_head(head: Head) -> bytes:
    """A head as it is stored: its weight, its bias and how it scales and caps.

    Args:
        head: bfloat16 bits as uint16, or float32; weight and bias alike.

    Raises:
        ValueError: another dtype or another number of axes.
    """
    weight = np.ascontiguousarray(head.weight_VD)
    bias = np.ascontiguousarray(weight.reshape(-1)[:0] if head.bias_V is None else head.bias_V)
    if weight.ndim != 2 or weight.dtype not in FLOATS.values():
        raise ValueError(f"a head is a 2-D array of uint16 or float32, not {weight.ndim}-D of {weight.dtype}")
    if bias.dtype != weight.dtype or bias.shape not in ((0,), weight.shape[:1]):
        raise ValueError(f"the bias of {weight.shape} of {weight.dtype} is not {bias.shape} of {bias.dtype}")
    sizes = (weight.itemsize, *weight.shape, len(bias), head.scale, head.softcap or 0.0)
    about = _HEAD.pack(_HEAD_MAGIC, _HEAD_VERSION, *sizes, 0)[:_HEAD_CHECKED]
    checksum = zlib.crc32(bias.data, zlib.crc32(weight.data, zlib.crc32(about)))
    return b"".join((_HEAD.pack(_HEAD_MAGIC, _HEAD_VERSION, *sizes, checksum), weight.data, bias.data))


def unpack_head(data: bytes) -> Head:
    """Undo :func:`pack_head`; the arrays are read-only views of the data.

    Raises:
        LabelError: no head, or a damaged one.
    """
    if len(data) < _HEAD.size:
        raise LabelError(f"head is cut short: {len(data)} bytes")
    magic, version, floats, rows, columns, biases, scale, softcap, checksum = _HEAD.unpack_from(data)
    if magic != _HEAD_MAGIC or version != _HEAD_VERSION or floats not in FLOATS:
        raise LabelError(f"not a head of format version {_HEAD_VERSION}: begins with {data[:8]!r}")
    body = memoryview(data)[_HEAD.size :]
    if (
        body.nbytes != (rows * columns + biases) * floats
        or zlib.crc32(body, zlib.crc32(data[:_HEAD_CHECKED])) != checksum
    ):
        raise LabelError("head is damaged: its checksum does not match its bytes")
    weight, bias = np.split(np.frombuffer(body, dtype=FLOATS[floats]), [rows * columns])
    return OutputHead(weight.reshape(rows, columns), bias if biases else None, scale, softcap or None)
