"""The label store: what a teacher said of a batch, under the batch's content address, so that it is said once."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import LabelError, RunError
from cluster.labels.columns import Bytes
from cluster.labels.store.buckets import PATIENCE_S, Bucket
from cluster.labels.store.leases import Lease
from cluster.labels.store.objects import (
    MANIFESTS,
    TEACHERS,
    Head,
    checked,
    head_key,
    is_later,
    json_key,
    label_key,
    labels_prefix,
    pack,
    pack_head,
    unpack,
    unpack_head,
)
from cluster.labels.store.uri import open_bucket
from cluster.labels.wire import Stamp

log = logging.getLogger(__name__)

T = TypeVar("T")

# Up to so many batches are looked up one by one; above it, listing all of a teacher's labels takes fewer requests.
_FEW = 32


class Manifest(BaseModel):
    """A pass whose batches were all in the store when it was published.

    Attributes:
        published: seconds since 1970 by the publisher's clock.
        teacher, tokenizer, labels: as in :class:`~cluster.labels.wire.Stamp`, the same for all batches.
        batches: content addresses in the order of the pass.
        facts: what the publisher wants known of it.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    published: float
    teacher: str
    tokenizer: str
    labels: str
    batches: tuple[str, ...]
    facts: dict[str, Any]

    def stamps(self) -> list[Stamp]:
        """The stamps of its batches, in the order of the pass."""
        return [Stamp(self.teacher, self.tokenizer, self.labels, batch) for batch in self.batches]


class LabelStore:
    """Label blocks, heads, manifests and leases in a bucket; see :mod:`cluster.labels.store.objects` for the layout.

    Every method may be called from several threads and processes at once, and raises
    :class:`~cluster.errors.RunError` or :class:`~cluster.errors.UserError` as :class:`Bucket` says.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    @classmethod
    def open(cls, uri: str, patience_s: float = PATIENCE_S) -> Self:
        """The store in a folder or at ``s3://bucket/prefix``; see :func:`open_bucket`."""
        return cls(open_bucket(uri, patience_s))

    def get(self, stamp: Stamp) -> Bytes | None:
        """The block of a batch as :func:`cluster.labels.wire.encode` gave it, read-only; None when it is not there.

        A damaged object is removed and logged by its name, and None is returned, so that it is scored again.

        Raises:
            LabelError: a later Stillhouse wrote it.
        """
        return self._good(label_key(stamp), lambda data: checked(data, stamp))

    def put(self, block: Bytes, stamp: Stamp) -> bool:
        """Keep a block, which must bear the stamp. False when the batch is there already: one writer gets True."""
        return self.bucket.put_new(label_key(stamp), pack(block))

    def missing(self, stamps: Sequence[Stamp]) -> list[Stamp]:
        """Those whose labels are not in the store, in the order given; nothing is read to see whether it is good."""
        groups: dict[str, set[str]] = defaultdict(set)
        for stamp in stamps:
            groups[labels_prefix(stamp)].add(label_key(stamp))
        there: set[str] = set()
        for prefix, keys in groups.items():
            for start in keys if len(keys) <= _FEW else (prefix,):
                there.update(entry.key for entry in self.bucket.list(start))
        return [stamp for stamp in stamps if label_key(stamp) not in there]

    def name_teacher(self, teacher: str, model: str) -> None:
        """Keep what a spec calls a teacher, so that a person can tell whose labels and head these are.

        Args:
            teacher: its fingerprint. The first name that it is given stays.
        """
        self.bucket.put_new(json_key(TEACHERS, teacher), json.dumps(model).encode())

    def put_head(self, teacher: str, head: Head) -> bool:
        """Keep a teacher's head. False when it is there already.

        Args:
            teacher: its fingerprint, 16 hex digits.
            head: cut to the vocabulary; bfloat16 bits as uint16, or float32.
        """
        return self.bucket.put_new(head_key(teacher), pack_head(head))

    def get_head(self, teacher: str) -> Head | None:
        """A teacher's head, read-only; None when it is not there. A damaged one is removed as by :meth:`get`."""
        return self._good(head_key(teacher), unpack_head)

    def publish(self, name: str, stamps: Sequence[Stamp], facts: Mapping[str, Any]) -> None:
        """Write the manifest of a complete pass, in place of an earlier one of this name.

        Args:
            stamps: of all its batches, in its order; of one teacher, tokenizer and labels section.
            facts: anything that JSON can say.

        Raises:
            RunError: some of the batches are not in the store.
            ValueError: no stamps, or stamps of different passes.
        """
        if len({labels_prefix(stamp) for stamp in stamps}) != 1:
            raise ValueError("a manifest lists the batches of one pass")
        if gone := self.missing(stamps):
            raise RunError(
                f"label store {self.bucket.uri}: {name} is not complete, {len(gone)} of {len(stamps)} batches are not "
                f"there, such as {label_key(gone[0])}; score them, then publish"
            )
        manifest = Manifest(
            name=name,
            published=time.time(),
            teacher=stamps[0].teacher,
            tokenizer=stamps[0].tokenizer,
            labels=stamps[0].labels,
            batches=tuple(stamp.batch for stamp in stamps),
            facts=dict(facts),
        )
        self.bucket.replace(json_key(MANIFESTS, name), manifest.model_dump_json().encode())

    def manifest(self, name: str) -> Manifest | None:
        """The manifest of this name, None when there is none. A damaged one is removed as by :meth:`get`."""
        return self._good(json_key(MANIFESTS, name), read_manifest)

    def lease(self, holder: str, *prefixes: str) -> Lease:
        """Protect all keys that begin with a prefix from being removed; see :class:`Lease` and :func:`labels_prefix`.

        Labels that are protected protect their teacher's head with them.
        """
        return Lease(self.bucket, holder, prefixes)

    def _good(self, key: str, read: Callable[[bytes], T]) -> T | None:
        """What ``read`` makes of an object; None when there is none, or when it was damaged and has been removed."""
        data = self.bucket.get(key)
        if data is None:
            return None
        try:
            return read(data)
        except LabelError as error:
            if later(data):
                raise
            log.warning("removed %s from label store %s: %s", key, self.bucket.uri, error)
            self.bucket.delete(key)
            return None


def read_manifest(data: bytes) -> Manifest:
    """A manifest from its bytes.

    Raises:
        LabelError: it is damaged.
    """
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise LabelError(f"manifest is damaged: {error.error_count()} fields cannot be read") from None


def later(data: bytes) -> bool:
    """Whether an object holds a block that a later Stillhouse wrote, which must not be taken for damaged."""
    try:
        return is_later(unpack(data))
    except LabelError:
        return False
