"""Upkeep of a label store: what it holds, whether it is good, and what may go."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from cluster.errors import LabelError
from cluster.labels.kinds import KINDS
from cluster.labels.store.buckets import Bucket, Entry
from cluster.labels.store.leases import live_prefixes
from cluster.labels.store.objects import (
    HEADS,
    LABELS,
    MANIFESTS,
    checked,
    head_key,
    label_key,
    labels_prefix,
    stamp_of,
    unpack,
    unpack_head,
)
from cluster.labels.store.store import LabelStore, Manifest, later, read_manifest
from cluster.labels.wire import Stamp, decode

log = logging.getLogger(__name__)

SETTLED_S = 3600.0
"""What was written within so many seconds may belong to something that is still under way."""

# Enough to hide a server's answering time, few enough that as many blocks fit into memory.
_THREADS = 8


@dataclass(frozen=True)
class Holding:
    """All labels of one teacher, tokenizer and labels section.

    Attributes:
        kind: one of :data:`~cluster.labels.kinds.KINDS`, ``?`` when the newest block cannot be read.
        size: bytes as stored.
        oldest, newest: when the first and the last were written, seconds since 1970.
    """

    teacher: str
    tokenizer: str
    labels: str
    kind: str
    objects: int
    size: int
    oldest: float
    newest: float


@dataclass(frozen=True)
class Removed:
    """What :func:`gc` removed, or would remove.

    Attributes:
        entries: labels, manifests and heads.
        leftovers: what writers that died left half written.
        leased: objects that would have gone, but for a live lease.
    """

    entries: tuple[Entry, ...]
    leftovers: tuple[Entry, ...]
    leased: int

    @property
    def size(self) -> int:
        """Bytes of all that was removed."""
        return sum(entry.size for entry in (*self.entries, *self.leftovers))


def stat(store: LabelStore) -> list[Holding]:
    """What the store holds, by teacher and labels; one block of each is read to see its kind."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry, stamp in _labels(store.bucket):
        groups[labels_prefix(stamp)].append(entry)
    holdings = []
    for prefix, entries in sorted(groups.items()):
        teacher, tokenizer, labels = prefix.split("/")[1:4]
        newest = max(entries, key=lambda entry: entry.modified)
        size, oldest = sum(entry.size for entry in entries), min(entry.modified for entry in entries)
        kind = _kind(store.bucket, newest)
        holdings.append(Holding(teacher, tokenizer, labels, kind, len(entries), size, oldest, newest.modified))
    return holdings


def passes(store: LabelStore) -> list[Manifest]:
    """The manifests of the store, the latest first; one that is damaged is left out and logged."""
    found = [manifest for _, manifest in _manifests(store.bucket)]
    return sorted(found, key=lambda manifest: manifest.published, reverse=True)


def verify(store: LabelStore, remove: bool = False) -> Iterator[tuple[Entry, str | None]]:
    """Read every label object, head and manifest; yields each with what is wrong with it, None when it is good.

    What a later Stillhouse wrote, or what somebody else put there, is named and never removed.

    Args:
        remove: remove what is damaged.
    """
    entries = [entry for folder in (LABELS, HEADS, MANIFESTS) for entry in store.bucket.list(folder)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(partial(_damage, store.bucket, remove=remove), (entry.key for entry in entries))
        yield from zip(entries, found, strict=True)


def gc(store: LabelStore, older_than: float | None, at_most_bytes: int | None, dry_run: bool = False) -> Removed:
    """Remove labels, the oldest first, then the manifests and heads that have lost theirs, and dead writers' leftovers.

    Nothing under a live lease goes. A manifest goes as soon as one of its batches does, for it no longer says the
    truth, and before them; a head goes when its teacher has no labels left.

    Args:
        older_than: seconds since it was written, from which on an object goes.
        at_most_bytes: what labels and heads may take in all; labels go until they fit.
        dry_run: remove nothing, only say what would go.
    """
    bucket = store.bucket
    labels, heads, manifests = list(_labels(bucket)), list(bucket.list(HEADS)), list(_manifests(bucket))
    # Last, so that a lease that was taken while the rest was listed counts too.
    now = bucket.now()
    leased = live_prefixes(bucket, now)
    old, spared = _old(labels, heads, leased, now - older_than if older_than is not None else None, at_most_bytes)
    going = {entry.key for entry in old}
    kept = {entry.key for entry, _ in labels} - going
    untrue = [entry for entry, manifest in manifests if _is_untrue(entry, manifest, going, kept, now)]
    teachers = {stamp.teacher for entry, stamp in labels if entry.key in kept}
    headless = [entry for entry in heads if _is_needless(entry, teachers, leased, now)]
    if not dry_run:
        for entries in (untrue, old, headless):
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(bucket.delete, (entry.key for entry in entries)))
    return Removed((*untrue, *old, *headless), bucket.sweep(now - SETTLED_S, dry_run), spared)


def _old(
    labels: list[tuple[Entry, Stamp]],
    heads: list[Entry],
    leased: tuple[str, ...],
    before: float | None,
    at_most_bytes: int | None,
) -> tuple[list[Entry], int]:
    """The labels that go, oldest first, and how many a lease spares."""
    head_sizes = {entry.key: entry.size for entry in heads}
    left = Counter(stamp.teacher for _, stamp in labels)
    total = sum(head_sizes.values()) + sum(entry.size for entry, _ in labels)
    going, spared = [], 0
    for entry, stamp in sorted(labels, key=lambda each: each[0].modified):
        too_old = before is not None and entry.modified < before
        too_much = at_most_bytes is not None and total > at_most_bytes
        if not (too_old or too_much):
            break
        if entry.key.startswith(leased):
            spared += 1
            continue
        going.append(entry)
        total -= entry.size
        left[stamp.teacher] -= 1
        if not left[stamp.teacher]:
            total -= head_sizes.get(head_key(stamp.teacher), 0)
    return going, spared


def _is_untrue(entry: Entry, manifest: Manifest, going: Collection[str], kept: Collection[str], now: float) -> bool:
    """Whether a manifest lists a batch that goes, or one that is not there though it is no new manifest."""
    keys = [label_key(stamp) for stamp in manifest.stamps()]
    return any(key in going for key in keys) or (_settled(entry, now) and not all(key in kept for key in keys))


def _is_needless(head: Entry, teachers: Collection[str], leased: tuple[str, ...], now: float) -> bool:
    """Whether a head has no labels, and nobody who is about to write some."""
    teacher = head.key.removeprefix(HEADS)
    labels = f"{LABELS}{teacher}/"
    used = any(prefix.startswith(labels) or labels.startswith(prefix) for prefix in leased)
    return teacher not in teachers and _settled(head, now) and not (used or head.key.startswith(leased))


def _settled(entry: Entry, now: float) -> bool:
    return now - entry.modified > SETTLED_S


def _labels(bucket: Bucket) -> Iterator[tuple[Entry, Stamp]]:
    """The label objects; what somebody else put among them is left alone."""
    for entry in bucket.list(LABELS):
        if (stamp := stamp_of(entry.key)) is not None:
            yield entry, stamp


def _manifests(bucket: Bucket) -> Iterator[tuple[Entry, Manifest]]:
    for entry in bucket.list(MANIFESTS):
        data = bucket.get(entry.key)
        if data is None:
            continue  # removed since it was listed
        try:
            yield entry, read_manifest(data)
        except LabelError as error:
            log.warning("%s: %s", entry.key, error)


def _kind(bucket: Bucket, entry: Entry) -> str:
    data = bucket.get(entry.key)
    try:
        labels, _ = decode(unpack(data or b""))
    except LabelError as error:
        log.warning("%s: %s", entry.key, error)
        return "?"
    return next(name for name, kind in KINDS.items() if isinstance(labels, kind))


def _damage(bucket: Bucket, key: str, remove: bool) -> str | None:
    """What is wrong with an object, which is removed when it is damaged and ``remove`` says so."""
    data = bucket.get(key)
    if data is None:
        return None  # removed since it was listed
    stamp = stamp_of(key)
    if key.startswith(LABELS) and stamp is None:
        return "not an object of a label store"
    try:
        if stamp is not None:
            checked(data, stamp)
        elif key.startswith(HEADS):
            unpack_head(data)
        else:
            read_manifest(data)
    except LabelError as error:
        if remove and not later(data):
            bucket.delete(key)
        return str(error)
    return None
