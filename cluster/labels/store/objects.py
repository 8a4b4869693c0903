"""What the store's objects are called and what they hold: label blocks and heads, and how damage in them shows.

::

    labels/<teacher>/<tokenizer>/<labels>/<first 2 digits of batch>/<batch>   a label block, plain or as one zstd frame
    heads/<teacher>                                                          a teacher's head weight
    manifests/<name>.json                                                    a complete pass
    leases/<holder>.json                                                     what is in use
"""

from __future__ import annotations

import re
import struct
import zlib
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import zstandard

from cluster.errors import LabelError
from cluster.labels.columns import FLOATS, Bytes
from cluster.labels.wire import MAGIC, VERSION, Stamp, check

LABELS, HEADS, MANIFESTS, LEASES = "labels/", "heads/", "manifests/", "leases/"

Head = npt.NDArray[np.uint16] | npt.NDArray[np.float32]

_HEX16 = "([0-9a-f]{16})"
_LABEL_KEY = re.compile(rf"{LABELS}{_HEX16}/{_HEX16}/{_HEX16}/([0-9a-f]{{2}})/(\4[0-9a-f]{{30}})")
# Labels are mostly bits of chance, which a compressor only copies; it must pay for the time it takes to read.
_LEVEL, _WORTH = 1, 0.95
_HEAD_MAGIC, _HEAD_VERSION = b"SHHD", 1
# magic, version, bytes of a float | rows, columns | checksum of all before it and of the weights
_HEAD = struct.Struct("<4sHHIII4x")
_HEAD_CHECKED = 16


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
    """A head's weight as it is stored.

    Args:
        head: [vocabulary, width], bfloat16 bits as uint16, or float32.

    Raises:
        ValueError: another dtype or another number of axes.
    """
    if head.ndim != 2 or head.dtype not in FLOATS.values():
        raise ValueError(f"a head is a 2-D array of uint16 or float32, not {head.ndim}-D of {head.dtype}")
    weights = np.ascontiguousarray(head)
    about = _HEAD.pack(_HEAD_MAGIC, _HEAD_VERSION, head.itemsize, *head.shape, 0)[:_HEAD_CHECKED]
    checksum = zlib.crc32(weights.data, zlib.crc32(about))
    return b"".join((_HEAD.pack(_HEAD_MAGIC, _HEAD_VERSION, head.itemsize, *head.shape, checksum), weights.data))


def unpack_head(data: bytes) -> Head:
    """Undo :func:`pack_head`; the array is a read-only view of the data.

    Raises:
        LabelError: no head, or a damaged one.
    """
    if len(data) < _HEAD.size:
        raise LabelError(f"head is cut short: {len(data)} bytes")
    magic, version, floats, rows, columns, checksum = _HEAD.unpack_from(data)
    if magic != _HEAD_MAGIC or version != _HEAD_VERSION or floats not in FLOATS:
        raise LabelError(f"not a head of format version {_HEAD_VERSION}: begins with {data[:8]!r}")
    body = memoryview(data)[_HEAD.size :]
    if body.nbytes != rows * columns * floats or zlib.crc32(body, zlib.crc32(data[:_HEAD_CHECKED])) != checksum:
        raise LabelError("head is damaged: its checksum does not match its bytes")
    return np.frombuffer(body, dtype=FLOATS[floats]).reshape(rows, columns)
