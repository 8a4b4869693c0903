"""A bucket in a folder: whole or not at all, one winner for a key, and nothing left of writers that died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import RunError, UserError
from cluster.labels.store.buckets import Entry, FolderBucket
from cluster.labels.store.uri import open_bucket

ROOT = Path(__file__).resolve().parents[4]
NAME = st.text("abc", min_size=1, max_size=2)
KEY = st.lists(NAME, min_size=1, max_size=3).map("/".join)
STEP = st.tuples(st.sampled_from(["put_new", "replace", "delete"]), KEY, st.binary(max_size=20))

# A writer that stands still at one of its steps until it is killed.
WRITER = """
import os, sys, time
from pathlib import Path
from cluster.labels.store.buckets import FolderBucket

def stand_still(*_, **__):
    print("here", flush=True)
    time.sleep(600)

root, write, step = sys.argv[1:]
setattr(*{"sync": (os, "fsync"), "publish": (os, "link") if write == "put_new" else (Path, "replace"),
          "tidy": (Path, "unlink")}[step], stand_still)
getattr(FolderBucket(Path(root)), write)("a/key", b"x" * 1_000_000)
"""

RACER = """
import sys, time
from pathlib import Path
from cluster.labels.store.buckets import FolderBucket

root, mine, start = sys.argv[1:]
bucket = FolderBucket(Path(root))
time.sleep(max(0.0, float(start) - time.time()))
print(*(int(bucket.put_new(f"k/{n}", mine.encode() * 10_000)) for n in range(40)))
"""


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@settings(max_examples=settings().max_examples // 4)
@given(
    st.lists(st.tuples(st.sampled_from(["put_new", "replace", "delete"]), KEY, st.binary(max_size=20)), max_size=12),
    st.data(),
)
def test_it_holds_what_a_dictionary_would(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, bytes]], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("bucket")
    bucket, model = FolderBucket(root), dict[str, bytes]()
    # No key is the folder of another, which a label store's never are.
    for what, name, value in steps:
        key = f"{name}.object"
        if what == "put_new":
            assert bucket.put_new(key, value) == (key not in model)
            model.setdefault(key, value)
        elif what == "replace":
            bucket.replace(key, value)
            model[key] = value
        else:
            bucket.delete(key)
            model.pop(key, None)
        assert bucket.get(key) == model.get(key)
    prefix = data.draw(st.just("") | KEY | KEY.map(lambda key: key + "/"))
    found = {entry.key: entry.size for entry in bucket.list(prefix)}
    assert found == {key: len(value) for key, value in model.items() if key.startswith(prefix)}
    assert len(files(root)) == len(model)


@pytest.mark.parametrize("write", ["put_new", "replace"])
@pytest.mark.parametrize(("step", "published"), [("sync", False), ("publish", False), ("tidy", True)])
def test_a_writer_that_is_killed_leaves_nothing_half_visible(
    tmp_path: Path, write: str, step: str, published: bool
) -> None:
    bucket = FolderBucket(tmp_path)
    with run(WRITER, str(tmp_path), write, step) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "here\n"
        writer.send_signal(signal.SIGKILL)
    whole = [Entry("a/key", 1_000_000, bucket.now())] if published else []
    assert [(e.key, e.size) for e in bucket.list()] == [(e.key, e.size) for e in whole]
    assert bucket.get("a/key") == (b"x" * 1_000_000 if published else None)
    # A leftover is no hindrance, and goes once no living writer can be at it.
    assert bucket.put_new("a/key", b"y") != published
    assert bucket.sweep(before=bucket.now() - 3600, dry_run=False) == ()
    left = bucket.sweep(before=bucket.now() + 1, dry_run=True)
    assert len(left) == (0 if published and write == "replace" else 1)
    assert bucket.sweep(before=bucket.now() + 1, dry_run=False) == left
    assert files(tmp_path) == [tmp_path / "a" / "key"]


def test_two_processes_that_race_for_a_key_have_one_winner(tmp_path: Path) -> None:
    start = str(time.time() + 1.5)
    racers = {name: run(RACER, str(tmp_path), name, start) for name in "ab"}
    won = {name: [int(flag) for flag in racer.communicate(timeout=60)[0].split()] for name, racer in racers.items()}
    assert [a + b for a, b in zip(won["a"], won["b"], strict=True)] == [1] * 40
    for n, first in enumerate(won["a"]):
        assert FolderBucket(tmp_path).get(f"k/{n}") == (b"a" if first else b"b") * 10_000


def test_threads_that_race_for_a_key_have_one_winner(tmp_path: Path) -> None:
    bucket, won, gate = FolderBucket(tmp_path), list[int](), threading.Barrier(8)

    def write(number: int) -> None:
        gate.wait()
        if bucket.put_new("key", bytes([number]) * 1000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bucket.get("key") == bytes(won) * 1000


def test_a_reader_sees_the_old_or_the_new_object_and_nothing_between(tmp_path: Path) -> None:
    bucket, done = FolderBucket(tmp_path), threading.Event()
    bucket.replace("key", b"0" * 200_000)

    def write() -> None:
        for n in range(50):
            bucket.replace("key", str(n % 10).encode() * 200_000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen = bucket.get("key")
        assert seen is not None and len(seen) == 200_000 and len(set(seen)) == 1
    writer.join()


def test_an_object_that_goes_while_it_is_listed_is_left_out(tmp_path: Path) -> None:
    bucket = FolderBucket(tmp_path)
    for n in range(3):
        bucket.put_new(f"k/{n}", b"")
    listing = bucket.list("k/")
    assert next(listing).key == "k/0"
    bucket.delete("k/1")
    assert [entry.key for entry in listing] == ["k/2"]


def test_a_link_that_nfs_repeated_is_the_writer_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert FolderBucket(tmp_path).put_new("key", b"data")


def test_a_full_disk_and_a_filesystem_without_links_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        def link(source: Path, target: Path) -> None:
            raise OSError(number, os.strerror(number), str(source), None, str(target))

        monkeypatch.setattr(os, "link", link)

    refuse(28)
    with pytest.raises(RunError, match="cannot write key: No space left on device; see to"):
        FolderBucket(tmp_path).put_new("key", b"data")
    refuse(1)
    with pytest.raises(UserError, match="its filesystem has no hard links"):
        FolderBucket(tmp_path).put_new("key", b"data")
    assert files(tmp_path) == []


@pytest.mark.parametrize("uri", ["", "s3://", "s3:///prefix", "gs://bucket/prefix", "file:///tmp/x"])
def test_what_is_neither_a_folder_nor_s3_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"give a folder or s3://bucket/prefix$"):
        open_bucket(uri)


def test_a_file_is_no_store_and_a_folder_is_made_by_the_first_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        open_bucket(str(tmp_path / "file"))
    bucket = open_bucket(str(tmp_path / "new"))
    assert bucket.get("key") is None
    assert list(bucket.list()) == []
    bucket.delete("key")
    assert not (tmp_path / "new").exists()
    assert bucket.put_new("key", b"")
