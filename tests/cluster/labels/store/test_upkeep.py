"""Upkeep: the oldest go first, nothing that is in use goes, and no wrong clock changes that."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.heads import OutputHead
from cluster.labels.store.leases import LIVE_S, live_prefixes
from cluster.labels.store.objects import head_key, label_key, labels_prefix, pack
from cluster.labels.store.store import LabelStore
from cluster.labels.store.upkeep import Removed, gc, passes, stat, verify
from cluster.labels.wire import Stamp
from tests.cluster.labels.store.fill import (
    DAY,
    OTHER,
    TEACHER,
    age,
    age_labels,
    block,
    fill,
    repetitive_block,
    stamp_of_batch,
)

HEAD = OutputHead(np.zeros((4, 8), np.float32))
STAMP = stamp_of_batch(0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def store(root: Path) -> LabelStore:
    return LabelStore.open(str(root))


def size_of(stamp: Stamp) -> int:
    return len(pack(block(stamp)))


def keys(removed: Removed) -> list[str]:
    return [entry.key for entry in removed.entries]


def test_stat_tells_teachers_and_kinds_apart(store: LabelStore, root: Path) -> None:
    mine = fill(store, 3)
    age_labels(root, mine, [5, 9, 1])
    hidden = stamp_of_batch(0, OTHER)
    store.put(repetitive_block(hidden), hidden)
    first, second = stat(store)
    assert (first.teacher, first.tokenizer, first.labels, first.kind) == (TEACHER, "f" * 16, "0" * 16, "topk")
    assert (first.objects, first.size) == (3, sum(size_of(stamp) for stamp in mine))
    assert time.time() - first.oldest == pytest.approx(9 * DAY, abs=60)
    assert time.time() - first.newest == pytest.approx(1 * DAY, abs=60)
    assert (second.teacher, second.kind, second.objects) == (OTHER, "hidden", 1)
    store.bucket.replace(label_key(hidden), b"nothing")
    assert stat(store)[1].kind == "?"


def test_passes_come_latest_first(store: LabelStore) -> None:
    stamps = fill(store, 2)
    for name in ("first", "second"):
        store.publish(name, stamps, {})
    store.bucket.replace("manifests/torn.json", b"{")
    assert [manifest.name for manifest in passes(store)] == ["second", "first"]


@pytest.mark.parametrize("remove", [False, True])
def test_verify_names_what_is_damaged_and_removes_it_when_told(store: LabelStore, remove: bool) -> None:
    good, torn, later = fill(store, 3)
    store.put_head(TEACHER, HEAD)
    store.put_head(OTHER, HEAD)
    store.publish("night", [good], {})
    damaged = [label_key(torn), head_key(OTHER), "manifests/torn.json"]
    for key in damaged:
        store.bucket.replace(key, b"torn")
    newer = block(later).copy()
    newer[4] = 2
    store.bucket.replace(label_key(later), newer.tobytes())
    store.bucket.replace("labels/README", b"somebody's")
    found = {entry.key: wrong for entry, wrong in verify(store, remove)}
    assert len(found) == 8
    said = {key: wrong for key, wrong in found.items() if wrong is not None}
    assert set(said) == {*damaged, label_key(later), "labels/README"}
    assert "not a label block" in said[label_key(torn)]
    assert "update it" in said[label_key(later)]
    left = {entry.key for entry in store.bucket.list()}
    assert set(found) - left == (set(damaged) if remove else set())


def test_gc_leaves_what_somebody_else_put_among_heads_and_names(store: LabelStore, root: Path) -> None:
    foreign = {"heads/README", "heads/0123456789abcdef.bak", "teachers/README.json", "labels/README"}
    for key in (*foreign, head_key(OTHER), f"teachers/{OTHER}.json"):
        store.bucket.replace(key, b"somebody's")
        age(root, key, DAY)
    assert [holding.teacher for holding in stat(store)] == [OTHER]
    wrong = {entry.key: reason for entry, reason in verify(store)}
    assert wrong["heads/README"] == wrong["labels/README"] == "not an object of a label store"
    assert sorted(keys(gc(store, older_than=0, at_most_bytes=0))) == [head_key(OTHER), f"teachers/{OTHER}.json"]
    assert {entry.key for entry in store.bucket.list()} == foreign


def test_gc_removes_what_is_older_and_nothing_else(store: LabelStore, root: Path) -> None:
    stamps = fill(store, 4)
    age_labels(root, stamps, [31, 1, 40, 29])
    store.put_head(TEACHER, HEAD)
    would = gc(store, older_than=30 * DAY, at_most_bytes=None, dry_run=True)
    assert store.missing(stamps) == []
    removed = gc(store, older_than=30 * DAY, at_most_bytes=None)
    assert keys(removed) == keys(would) == [label_key(stamps[2]), label_key(stamps[0])]
    assert removed.size == size_of(stamps[2]) + size_of(stamps[0])
    assert store.missing(stamps) == [stamps[0], stamps[2]]
    assert store.get_head(TEACHER) is not None


def test_gc_removes_the_oldest_until_the_rest_fits(store: LabelStore, root: Path) -> None:
    stamps = fill(store, 4)
    store.put_head(TEACHER, HEAD)
    age_labels(root, stamps, [1, 4, 2, 3])
    total = sum(entry.size for entry in store.bucket.list())
    two = size_of(stamps[1]) + size_of(stamps[3])
    assert keys(gc(store, None, total)) == []
    assert keys(gc(store, None, total - 1)) == [label_key(stamps[1])]
    assert keys(gc(store, None, total - two - 1)) == [label_key(stamps[3]), label_key(stamps[2])]
    assert store.missing(stamps) == stamps[1:]


def test_gc_counts_the_head_that_goes_with_the_last_labels(store: LabelStore, root: Path) -> None:
    old, new = fill(store, 1), fill(store, 1, OTHER)
    store.put_head(TEACHER, OutputHead(np.zeros((100, 100), np.float32)))
    age(root, head_key(TEACHER), DAY)
    age_labels(root, old, [2])
    at_most = sum(entry.size for entry in store.bucket.list("labels/")) - 1
    assert keys(gc(store, None, at_most)) == [label_key(old[0]), head_key(TEACHER)]
    assert store.missing([*old, *new]) == old


def test_a_head_larger_than_the_limit_goes_and_the_labels_stay(store: LabelStore) -> None:
    stamps = fill(store, 3)
    store.put_head(TEACHER, OutputHead(np.zeros((100, 100), np.float32)))  # just written, as after a first run
    small = sum(entry.size for entry in store.bucket.list("labels/"))
    removed = gc(store, None, small + 1000)
    assert (keys(removed), removed.left) == ([head_key(TEACHER)], small)
    assert store.missing(stamps) == []


def test_heads_without_labels_go_first_and_push_no_labels_out(store: LabelStore, root: Path) -> None:
    stamps = fill(store, 3)
    sizes = sum(entry.size for entry in store.bucket.list("labels/"))
    for teacher in (OTHER, "b" * 16):
        store.put_head(teacher, HEAD)
    age(root, head_key(OTHER), DAY)
    removed = gc(store, None, sizes)
    # The other was written within the hour, and may get its labels yet.
    head_size = next(entry.size for entry in store.bucket.list("heads/"))
    assert (keys(removed), removed.left) == ([head_key(OTHER)], sizes + head_size)
    assert store.missing(stamps) == []


def test_a_head_goes_with_its_last_labels_however_young_it_is(store: LabelStore, root: Path) -> None:
    old, new = fill(store, 2), fill(store, 1, OTHER)
    age_labels(root, old, [2, 3])
    store.put_head(TEACHER, HEAD)
    removed = gc(store, DAY, None)
    assert set(keys(removed)) == {*map(label_key, old), head_key(TEACHER)}
    assert removed.left == size_of(new[0])
    assert store.get_head(TEACHER) is None


def test_stat_lists_heads_and_calls_teachers_by_name(store: LabelStore) -> None:
    stamps = fill(store, 1)
    store.publish("night", stamps, {"teacher": "/models/from-a-pass"})
    for teacher in (TEACHER, OTHER, "b" * 16):
        store.put_head(teacher, HEAD)
    store.name_teacher(OTHER, "hf://org/noted")
    store.name_teacher(OTHER, "a later name")
    labels, *heads = stat(store)
    assert (labels.kind, labels.model) == ("topk", "/models/from-a-pass")
    named = [(TEACHER, "/models/from-a-pass"), (OTHER, "hf://org/noted"), ("b" * 16, "?")]
    assert [(each.teacher, each.model) for each in heads] == named
    assert {(each.kind, each.tokenizer, each.labels, each.objects) for each in heads} == {("head", "", "", 1)}
    assert heads[0].size == next(entry.size for entry in store.bucket.list(head_key(TEACHER)))


def test_the_name_of_a_teacher_goes_when_nothing_else_is_left_of_it(store: LabelStore, root: Path) -> None:
    stamps = fill(store, 1)
    store.put_head(TEACHER, HEAD)
    store.name_teacher(TEACHER, "/models/teacher")
    name = f"teachers/{TEACHER}.json"
    age(root, name, DAY)
    assert gc(store, None, None).entries == ()
    assert keys(gc(store, None, 0)) == [label_key(stamps[0]), head_key(TEACHER), name]
    assert list(store.bucket.list()) == []


def test_gc_takes_manifests_and_heads_with_their_labels(store: LabelStore, root: Path) -> None:
    mine, others = fill(store, 3), fill(store, 1, OTHER)
    age_labels(root, mine, [40, 40, 1])
    for teacher in (TEACHER, OTHER):
        store.put_head(teacher, HEAD)
        age(root, head_key(teacher), 50 * DAY)
    store.publish("old", mine, {})
    store.publish("new", mine[2:], {})
    store.publish("other", others, {})
    removed = keys(gc(store, 30 * DAY, None))
    assert removed[0] == "manifests/old.json"  # before its labels: it never says what is not so
    assert set(removed[1:]) == {label_key(stamp) for stamp in mine[:2]}
    store.bucket.delete(label_key(others[0]))
    age(root, "manifests/other.json", DAY)
    assert keys(gc(store, None, None)) == ["manifests/other.json", head_key(OTHER)]
    assert {entry.key.split("/")[0] for entry in store.bucket.list()} == {"labels", "heads", "manifests"}
    assert store.manifest("new") is not None and store.get_head(TEACHER) is not None


def test_gc_leaves_what_is_only_just_begun(store: LabelStore) -> None:
    store.put_head(TEACHER, HEAD)
    assert keys(gc(store, 0.0, 0)) == []
    assert store.get_head(TEACHER) is not None


@pytest.mark.parametrize("lease_on", ["labels", "everything", "another teacher", "a longer name"])
def test_gc_leaves_what_is_under_a_live_lease(store: LabelStore, root: Path, lease_on: str) -> None:
    stamps = fill(store, 3)
    age_labels(root, stamps, [40, 40, 40])
    store.put_head(TEACHER, HEAD)
    age(root, head_key(TEACHER), 50 * DAY)
    prefix = labels_prefix(STAMP)
    wanted = {"labels": prefix, "everything": "", "another teacher": prefix.replace(TEACHER, OTHER)}
    lease = store.lease("run-1", wanted.get(lease_on, prefix[:-1] + "0/"))
    removed = gc(store, 30 * DAY, 0)
    if lease_on in ("labels", "everything"):
        assert (keys(removed), removed.leased) == ([], 3)
        lease.release()
        removed = gc(store, 30 * DAY, 0)
    assert (len(removed.entries), removed.leased) == (4 if lease_on != "a longer name" else 3, 0)


def test_a_head_whose_labels_are_about_to_be_written_is_under_their_lease(store: LabelStore, root: Path) -> None:
    store.put_head(TEACHER, HEAD)
    age(root, head_key(TEACHER), 50 * DAY)
    lease = store.lease("run", labels_prefix(STAMP))
    assert keys(gc(store, 0.0, 0)) == []
    lease.release()
    assert keys(gc(store, 0.0, 0)) == [head_key(TEACHER)]


@pytest.mark.parametrize("holder_clock", [0.0, -30 * DAY, 30 * DAY])
@pytest.mark.parametrize(("age_s", "live"), [(0, True), (LIVE_S - 60, True), (LIVE_S + 60, False), (DAY, False)])
def test_a_lease_lives_by_the_bucket_s_clock_however_wrong_the_holder_s_is(
    store: LabelStore, root: Path, monkeypatch: pytest.MonkeyPatch, holder_clock: float, age_s: float, live: bool
) -> None:
    written = time.time() - age_s + holder_clock
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: written)
        store.lease("run", "labels/")
    age(root, "leases/run.json", age_s)
    assert live_prefixes(store.bucket, store.bucket.now()) == (("labels/",) if live else ())


def test_a_lease_whose_file_looks_old_lives_by_its_holder_s_clock(store: LabelStore, root: Path) -> None:
    store.lease("run", "labels/")
    age(root, "leases/run.json", DAY)
    assert live_prefixes(store.bucket, store.bucket.now()) == ("labels/",)


def test_a_renewed_lease_lives_on_and_a_released_one_does_not(store: LabelStore, root: Path) -> None:
    lease, other = store.lease("a run", "labels/a"), store.lease("b/../b", "labels/b", "heads/b")
    assert set(live_prefixes(store.bucket, time.time())) == {"labels/a", "labels/b", "heads/b"}
    later = time.time() + LIVE_S + 60
    assert live_prefixes(store.bucket, later) == ()
    os.utime(root / "leases" / "a%20run.json", (later, later))
    lease.renew()
    assert "labels/a" in live_prefixes(store.bucket, time.time() + LIVE_S - 60)
    lease.release()
    assert set(live_prefixes(store.bucket, time.time())) == {"labels/b", "heads/b"}
    other.release()
    other.release()
    assert list(store.bucket.list("leases/")) == []


def test_a_lease_that_cannot_be_read_protects_everything_while_it_is_young(store: LabelStore, root: Path) -> None:
    store.bucket.replace("leases/run.json", b"{")
    assert live_prefixes(store.bucket, time.time()) == ("",)
    age(root, "leases/run.json", LIVE_S + 60)
    assert live_prefixes(store.bucket, time.time()) == ()


def test_gc_clears_away_what_dead_writers_left(store: LabelStore, root: Path) -> None:
    fill(store, 1)
    for name in ("dead", "living"):
        (root / ".aside" / name).write_bytes(b"half")
    age(root, ".aside/dead", 2 * 3600)
    assert [entry.key for entry in gc(store, None, None, dry_run=True).leftovers] == [".aside/dead"]
    removed = gc(store, None, None)
    assert ([entry.key for entry in removed.leftovers], removed.size) == ([".aside/dead"], 4)
    assert [path.name for path in (root / ".aside").iterdir()] == ["living"]


def test_what_somebody_else_put_there_is_left_alone(store: LabelStore, root: Path) -> None:
    store.bucket.replace("labels/README", b"mine")
    age(root, "labels/README", 400 * DAY)
    assert keys(gc(store, 0.0, 0)) == []
    assert stat(store) == []
