"""The one binary layout of a label block: the same in memory, on the network and at rest.

::

    header   136 bytes, little-endian, see ``_HEADER``
    mask     one bit per position: does it carry loss
    columns  those of the kind, one row per loss token, each starting at a multiple of 8 bytes

    topk     ids (bits that the vocabulary needs) | 16-bit log-probabilities | float32 log of the tail mass
    sampled  rising ids of the different draws (Elias-Fano) | one bit per draw: does it begin a new id | float32 entropy
    hidden   hidden states
    dense    logits

Decoding costs no copy of a column whose bits numpy can read as they lie: hidden states, logits, log-probabilities,
tails and entropies always, ids of ``topk`` at 8, 16 or 32 bits.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cluster.errors import LabelError
from cluster.labels.columns import FLOATS, Bytes, Reader, Shape, columns_of, read_columns
from cluster.labels.kinds import KINDS, Labels
from cluster.spec import LabelsSpec

MAGIC = b"SHLB"
VERSION = 1
# magic, version, kind, bytes of a float | checksum | sequences, positions, loss tokens, vocabulary, width |
# items, temperature, body bytes | teacher, tokenizer, labels, batch | reserved
_HEADER = struct.Struct("<4sHBBIIIIIIQdQ8s8s8s16s40x")
_CHECKSUM = slice(8, 12)
_BODY_BYTES = 7  # its place among the fields behind the checksum
_CODES = {name: code for code, name in enumerate(KINDS, start=1)}
_KIND_OF = {code: name for name, code in _CODES.items()}


@dataclass(frozen=True)
class Stamp:
    """Where a block comes from, as hex digits: what a reader holds against what it expects.

    Attributes:
        teacher, tokenizer: fingerprints, 16 digits, see :mod:`cluster.fingerprint`.
        labels: hash of the spec's labels section, 16 digits, see :func:`labels_hash`.
        batch: content address of the batch, 32 digits.
    """

    teacher: str
    tokenizer: str
    labels: str
    batch: str

    @staticmethod
    def of(teacher: str, tokenizer: str, spec: LabelsSpec, address: str) -> Stamp:
        """The stamp of a batch's labels."""
        return Stamp(teacher, tokenizer, labels_hash(spec), address)

    def require(self, expected: Stamp) -> None:
        """Refuse a block that was made from something else.

        Raises:
            LabelError: names what differs.
        """
        for field in fields(self):
            given, wanted = getattr(self, field.name), getattr(expected, field.name)
            if given != wanted:
                what = "labels section" if field.name == "labels" else field.name
                raise LabelError(f"label block of another {what}: it says {given}, this family's is {wanted}")


def labels_hash(spec: LabelsSpec) -> str:
    """16 hex digits over the kind and those of its settings that differ from its defaults.

    A new optional setting therefore leaves every existing address as it is. In return, the default of a setting must
    never change: give such a change a setting of another name.
    """
    settings = {**spec.model_dump(mode="json", exclude_defaults=True), "kind": spec.kind}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _padded(columns: list[Bytes]) -> list[Bytes]:
    """Columns with zeros between them, so that each starts at a multiple of 8 bytes."""
    out = []
    for column in columns:
        out.append(column)
        if short := -column.size % 8:
            out.append(np.zeros(short, dtype=np.uint8))
    return out


def _checksum(block: Bytes) -> int:
    """CRC-32 over all of a block but its first four bytes and the checksum itself."""
    return zlib.crc32(block[_CHECKSUM.stop :].data, zlib.crc32(block[len(MAGIC) : _CHECKSUM.start].data))


def encode(labels: Labels, stamp: Stamp) -> Bytes:
    """A block as bytes."""
    columns = columns_of(labels)
    shape = columns.shape
    mask = np.packbits(labels.loss_mask_BS, axis=None, bitorder="little")
    body = _padded([mask, *columns.parts])
    sequences, positions = labels.loss_mask_BS.shape
    kind = next(name for name, each in KINDS.items() if isinstance(labels, each))
    header = _HEADER.pack(
        *(MAGIC, VERSION, _CODES[kind], shape.floats, 0, sequences, positions, shape.tokens, shape.vocabulary),
        *(shape.width, shape.items, labels.temperature, sum(part.size for part in body)),
        *(bytes.fromhex(getattr(stamp, field.name)) for field in fields(stamp)),
    )
    block = np.concatenate([np.frombuffer(header, dtype=np.uint8), *body])
    block[_CHECKSUM] = np.frombuffer(struct.pack("<I", _checksum(block)), dtype=np.uint8)
    return block


def _header(block: Bytes) -> tuple[Any, ...]:
    """The fields of a block's header behind the checksum, once the block is found to be as it was written."""
    if block.size < _HEADER.size or block[: len(MAGIC)].tobytes() != MAGIC:
        raise LabelError(f"not a label block: {block.size} bytes that begin with {block[:8].tobytes()!r}")
    _, version, code, floats, checksum, *about = _HEADER.unpack(block[: _HEADER.size].tobytes())
    if version > VERSION:
        raise LabelError(f"label block of format version {version}; this Stillhouse reads up to {VERSION}: update it")
    if block.size != (whole := _HEADER.size + about[_BODY_BYTES]):
        what = "is cut short" if block.size < whole else "goes on behind its end"
        raise LabelError(f"label block {what}: {block.size} bytes, its header says {whole}")
    if _checksum(block) != checksum:
        raise LabelError("label block is damaged: its checksum does not match its bytes")
    return code, floats, *about


def check(block: Bytes, expected: Stamp) -> None:
    """Refuse a block that is not as it was written, or is another's, without the time that reading its columns takes.

    Raises:
        LabelError: not a label block, one of a later version, cut short, damaged, or made from something else.
    """
    Stamp(*(part.hex() for part in _header(block)[-4:])).require(expected)


def decode(block: Bytes) -> tuple[Labels, Stamp]:
    """Undo :func:`encode`; the columns are views of the block where their bits allow.

    Raises:
        LabelError: not a label block, one of a later version, cut short, or damaged.
    """
    code, floats, sequences, positions, tokens, vocabulary, width, items, temperature, _, *stamp = _header(block)
    if code not in _KIND_OF:
        raise LabelError(f"label block of an unknown kind {code}; known are {', '.join(KINDS)}")
    if floats not in FLOATS:
        raise LabelError(f"label block of unknown floats of {floats} bytes; known are 2 (bfloat16) and 4 (float32)")
    read = Reader(block[_HEADER.size :])
    mask = np.unpackbits(read.take((sequences * positions + 7) // 8), count=sequences * positions, bitorder="little")
    if int(mask.sum()) != tokens:
        raise LabelError(f"label block is damaged: its mask marks {int(mask.sum())} loss tokens, it has {tokens}")
    kind = KINDS[_KIND_OF[code]]
    columns = read_columns(kind, read, Shape(tokens, vocabulary, width, items, floats))
    if read.rest:
        raise LabelError(f"label block has {read.rest} bytes that belong to no column")
    mask_BS = mask.astype(np.bool_).reshape(sequences, positions)
    labels = kind(loss_mask_BS=mask_BS, vocabulary=vocabulary, temperature=temperature, **columns)
    return labels, Stamp(*(part.hex() for part in stamp))


def read_block(block: Bytes, expected: Stamp) -> Labels:
    """Decode a block and refuse it when it was made from something else than the reader expects.

    Raises:
        LabelError: see :func:`decode` and :meth:`Stamp.require`.
    """
    labels, stamp = decode(block)
    stamp.require(expected)
    return labels
