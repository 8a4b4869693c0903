"""Upkeep of a label store: what it holds, whether it is good, and what may go."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
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
    TEACHERS,
    checked,
    head_key,
    label_key,
    labels_prefix,
    stamp_of,
    teacher_of,
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
    """All labels of one teacher, tokenizer and labels section, or a teacher's head.

    Attributes:
        model: what a spec calls the teacher; ``?`` where nobody has named it.
        tokenizer, labels: empty for a head.
        kind: one of :data:`~cluster.labels.kinds.KINDS`, ``?`` when the newest block cannot be read; ``head``.
        size: bytes as stored.
        oldest, newest: when the first and the last were written, seconds since 1970.
    """

    teacher: str
    model: str
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
        entries: labels, manifests, heads and the names of teachers that have nothing left.
        leftovers: what writers that died left half written.
        leased: labels that would have gone, but for a live lease.
        left: bytes of labels and heads that stay.
        models: what specs call the teachers, by fingerprint.
    """

    entries: tuple[Entry, ...]
    leftovers: tuple[Entry, ...]
    leased: int
    left: int
    models: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of all that was removed."""
        return sum(entry.size for entry in (*self.entries, *self.leftovers))

    @property
    def heads(self) -> list[Entry]:
        """The heads among ``entries``."""
        return [entry for entry in self.entries if entry.key.startswith(HEADS)]


def stat(store: LabelStore) -> list[Holding]:
    """What the store holds, by teacher and labels, then the heads; one block of each is read to see its kind."""
    models = teacher_models(store.bucket)
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry, stamp in _labels(store.bucket):
        groups[labels_prefix(stamp)].append(entry)
    holdings = []
    for prefix, entries in sorted(groups.items()):
        teacher, tokenizer, labels = prefix.split("/")[1:4]
        newest = max(entries, key=lambda entry: entry.modified)
        size, oldest = sum(entry.size for entry in entries), min(entry.modified for entry in entries)
        kind = _kind(store.bucket, newest)
        about = (teacher, models.get(teacher, "?"), tokenizer, labels, kind)
        holdings.append(Holding(*about, len(entries), size, oldest, newest.modified))
    for head, teacher in sorted(_of_teachers(store.bucket, HEADS).items(), key=lambda each: each[1]):
        about = (teacher, models.get(teacher, "?"), "", "", "head")
        holdings.append(Holding(*about, 1, head.size, head.modified, head.modified))
    return holdings


def teacher_models(bucket: Bucket) -> dict[str, str]:
    """What specs call the teachers, by fingerprint: as runs have noted it, or as the manifest of a pass has it."""
    models = {each.teacher: str(each.facts["teacher"]) for _, each in _manifests(bucket) if "teacher" in each.facts}
    for entry, teacher in _of_teachers(bucket, TEACHERS).items():
        try:
            models[teacher] = str(json.loads(bucket.get(entry.key) or b""))
        except ValueError:
            log.warning("%s cannot be read", entry.key)
    return models


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

    Heads without labels go first. So does a head that alone is larger than ``at_most_bytes``; its labels are still
    good, and the next run reads the head from the teacher again. Any other head goes with its teacher's last labels.

    Nothing under a live lease goes. A manifest goes as soon as one of its batches does, for it no longer says the
    truth, and before them.

    Args:
        older_than: seconds since it was written, from which on an object goes.
        at_most_bytes: what labels and heads may take in all; labels go until they fit.
        dry_run: remove nothing, only say what would go.
    """
    bucket = store.bucket
    labels, heads, manifests = list(_labels(bucket)), list(_of_teachers(bucket, HEADS)), list(_manifests(bucket))
    models, names = teacher_models(bucket), list(_of_teachers(bucket, TEACHERS))
    # Last, so that a lease that was taken while the rest was listed counts too.
    now = bucket.now()
    leased = live_prefixes(bucket, now)
    removable = [head for head in heads if not _is_leased(_teacher_of(head), leased)]
    teachers = {stamp.teacher for _, stamp in labels}
    # One without labels that was only just written waits for its first; it is no reason to remove those of others.
    counted = [head for head in heads if _teacher_of(head) in teachers]
    heads_going = [head for head in removable if head not in counted and _settled(head, now)]
    if at_most_bytes is not None:
        heads_going += [head for head in removable if head in counted and head.size > at_most_bytes]
    counted = [head for head in counted if head not in heads_going]
    before = now - older_than if older_than is not None else None
    old, spared = _old(labels, counted, removable, leased, before, at_most_bytes)
    going = {entry.key for entry in old}
    kept = {entry.key for entry, _ in labels} - going
    untrue = [entry for entry, manifest in manifests if _is_untrue(entry, manifest, going, kept, now)]
    teachers = {stamp.teacher for entry, stamp in labels if entry.key in kept}
    heads_going += [head for head in counted if head in removable and _teacher_of(head) not in teachers]
    heads_left = [head for head in heads if head not in heads_going]
    teachers |= {_teacher_of(head) for head in heads_left}
    unused_names = [entry for entry in names if _is_unused(entry, teachers, leased, now)]
    if not dry_run:
        for group in (untrue, old, heads_going, unused_names):
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(bucket.delete, (entry.key for entry in group)))
    left = sum(entry.size for entry, _ in labels if entry.key in kept) + sum(head.size for head in heads_left)
    entries = (*untrue, *old, *heads_going, *unused_names)
    return Removed(entries, bucket.sweep(now - SETTLED_S, dry_run), spared, left, models)


def _old(
    labels: list[tuple[Entry, Stamp]],
    heads: list[Entry],
    removable: Collection[Entry],
    leased: tuple[str, ...],
    before: float | None,
    at_most_bytes: int | None,
) -> tuple[list[Entry], int]:
    """The labels that go, oldest first, and how many a lease spares.

    Args:
        heads: those that count; the ``removable`` ones go with their teacher's last labels.
    """
    head_sizes = {_teacher_of(head): head.size for head in heads if head in removable}
    left = Counter(stamp.teacher for _, stamp in labels)
    total = sum(head.size for head in heads) + sum(entry.size for entry, _ in labels)
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
            total -= head_sizes.get(stamp.teacher, 0)
    return going, spared


def _is_untrue(entry: Entry, manifest: Manifest, going: Collection[str], kept: Collection[str], now: float) -> bool:
    """Whether a manifest lists a batch that goes, or one that is not there though it is no new manifest."""
    keys = [label_key(stamp) for stamp in manifest.stamps()]
    return any(key in going for key in keys) or (_settled(entry, now) and not all(key in kept for key in keys))


def _is_leased(teacher: str, leased: tuple[str, ...]) -> bool:
    """Whether somebody uses a teacher's head or labels, or is about to write some."""
    labels = f"{LABELS}{teacher}/"
    used = any(prefix.startswith(labels) or labels.startswith(prefix) for prefix in leased)
    return used or head_key(teacher).startswith(leased)


def _is_unused(name: Entry, teachers: Collection[str], leased: tuple[str, ...], now: float) -> bool:
    """Whether a name is of a teacher that has nothing in the store and is not about to."""
    teacher = _teacher_of(name)
    return teacher not in teachers and _settled(name, now) and not _is_leased(teacher, leased)


def _teacher_of(entry: Entry) -> str:
    """The teacher whose head or name an object is."""
    teacher = teacher_of(entry.key)
    assert teacher is not None
    return teacher


def _of_teachers(bucket: Bucket, folder: str) -> dict[Entry, str]:
    """The heads or names with their teachers; foreign objects among them are left alone."""
    return {entry: teacher for entry in bucket.list(folder) if (teacher := teacher_of(entry.key)) is not None}


def _settled(entry: Entry, now: float) -> bool:
    return now - entry.modified > SETTLED_S


def _labels(bucket: Bucket) -> Iterator[tuple[Entry, Stamp]]:
    """The label objects; foreign objects among them are left alone."""
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
    if (key.startswith(LABELS) and stamp is None) or (key.startswith(HEADS) and teacher_of(key) is None):
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
