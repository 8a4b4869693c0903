"""The label store on a real S3 server, and what becomes of it when the server or the way to it has a bad day."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import RunError, UserError
from cluster.heads import OutputHead
from cluster.labels.store import s3 as s3_module
from cluster.labels.store.objects import label_key, labels_prefix
from cluster.labels.store.s3 import S3Bucket
from cluster.labels.store.store import LabelStore
from cluster.labels.store.upkeep import SETTLED_S, gc, stat, verify
from cluster.labels.store.uri import open_bucket
from cluster.labels.wire import Stamp
from tests.cluster.labels.blocks import FORMS
from tests.cluster.labels.store.fill import OTHER, TEACHER, block, fill, repetitive_block, stamp_of_batch
from tests.integration.s3_proxy import Fault, S3Proxy, in_turn, now_and_then
from tests.integration.seaweed import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
NAME = "labels"
READ_TIMEOUT_S = 1.0
STAMP = stamp_of_batch(1)


@pytest.fixture(scope="module")
def server(s3: Any) -> Any:
    """A client of an S3 server that has a bucket for labels."""
    s3.create_bucket(Bucket=NAME)
    return s3


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A place in the bucket for one test."""
    return hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


@pytest.fixture
def bucket(server: Any, prefix: str) -> S3Bucket:
    return S3Bucket(NAME, prefix)


@pytest.fixture(scope="module")
def proxied(server: Any) -> Iterator[S3Proxy]:
    with S3Proxy(server.meta.endpoint_url, stall_s=3 * READ_TIMEOUT_S) as proxy:
        yield proxy


@pytest.fixture
def proxy(proxied: S3Proxy) -> Iterator[S3Proxy]:
    """The proxy, with nothing going wrong yet."""
    proxied.seen.clear()
    yield proxied
    proxied.choose = lambda _: None


@pytest.fixture
def behind(proxy: S3Proxy, prefix: str, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A bucket that is reached through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return S3Bucket(NAME, prefix, patience_s=60.0, read_timeout_s=READ_TIMEOUT_S)


def small_parts(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Make 10 MiB a large object, and give one back of three parts; S3 takes no parts below 5 MiB but the last."""
    monkeypatch.setattr(s3_module, "MULTIPART_BYTES", 10 * 2**20)
    return np.random.default_rng(0).bytes(11 * 2**20)


def test_a_bucket_does_what_a_folder_does(bucket: S3Bucket) -> None:
    assert bucket.get("a/key") is None
    assert bucket.put_new("a/key", b"one")
    assert not bucket.put_new("a/key", memoryview(b"two"))
    assert bucket.get("a/key") == b"one"
    bucket.replace("a/key", b"three")
    bucket.replace("a/other", b"")
    assert bucket.get("a/key") == b"three"
    assert bucket.get("a/other") == b""
    assert {entry.key: entry.size for entry in bucket.list("a/k")} == {"a/key": 5}
    assert {entry.key for entry in bucket.list()} == {"a/key", "a/other"}
    assert all(abs(entry.modified - bucket.now()) < 60 for entry in bucket.list())
    bucket.delete("a/key")
    bucket.delete("a/key")
    assert bucket.get("a/key") is None


def test_a_listing_goes_on_behind_its_first_page(bucket: S3Bucket) -> None:
    names = {f"k/{n:04d}" for n in range(1030)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: bucket.put_new(name, b""), names))
    listed = [entry.key for entry in bucket.list("k/")]
    assert len(listed) == 1030 and set(listed) == names


def test_threads_that_race_for_a_key_have_one_winner(bucket: S3Bucket) -> None:
    gate = threading.Barrier(8)

    def write(number: int) -> bool:
        gate.wait()
        return bucket.put_new("key", bytes([number]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert bucket.get("key") == bytes([won.index(True)]) * 1000


def test_a_large_object_goes_in_parts_and_one_writer_wins(
    bucket: S3Bucket, server: Any, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_parts(monkeypatch)
    monkeypatch.setattr(bucket, "_writer_of", lambda key: None)  # both begin before either has finished
    assert bucket.put_new("large", data)
    monkeypatch.undo()
    small_parts(monkeypatch)
    assert bucket.get("large") == data
    assert server.head_object(Bucket=NAME, Key=f"{prefix}/large")["ETag"].strip('"').endswith("-3")
    assert not bucket.put_new("large", data)
    monkeypatch.setattr(bucket, "_writer_of", lambda key: None)
    assert not bucket.put_new("large", data[:-1] + b"x")
    assert bucket.get("large") == data
    assert bucket.sweep(before=bucket.now() + 60, dry_run=True) == ()  # the loser has ended its upload


@pytest.mark.parametrize("form", FORMS)
def test_a_store_on_s3_keeps_every_kind(server: Any, prefix: str, form: str) -> None:
    store = LabelStore.open(f"s3://{NAME}/{prefix}")
    stamps = [stamp_of_batch(number) for number in range(3)]
    for stamp in stamps[1:]:
        assert store.put(block(stamp, form), stamp)
    assert not store.put(block(stamps[1], form), stamps[1])
    read = store.get(stamps[1])
    assert read is not None and np.array_equal(read, block(stamps[1], form))
    assert store.missing(stamps) == stamps[:1]
    head = np.arange(12, dtype=np.float32).reshape(3, 4)
    store.put_head(TEACHER, OutputHead(head, head[:, 0], 0.25, 30.0))
    kept = store.get_head(TEACHER)
    assert kept is not None and kept.bias_V is not None and (kept.scale, kept.softcap) == (0.25, 30.0)
    assert np.array_equal(kept.weight_VD, head) and np.array_equal(kept.bias_V, head[:, 0])
    store.publish("night", stamps[1:], {"kind": form})
    manifest = store.manifest("night")
    assert manifest is not None and manifest.stamps() == stamps[1:]


def test_upkeep_works_on_s3(bucket: S3Bucket) -> None:
    store = LabelStore(bucket)
    stamps = fill(store, 3)
    other = fill(store, 1, OTHER)
    assert [(holding.teacher, holding.objects) for holding in stat(store)] == [(TEACHER, 3), (OTHER, 1)]
    bucket.replace(label_key(stamps[0]), b"torn")
    assert [entry.key for entry, wrong in verify(store, remove=True) if wrong] == [label_key(stamps[0])]
    lease = store.lease("run", labels_prefix(other[0]))
    assert len(gc(store, older_than=None, at_most_bytes=0).entries) == 2
    assert store.missing([*stamps, *other]) == stamps
    lease.release()
    assert len(gc(store, older_than=None, at_most_bytes=0).entries) == 1


def test_bytes_that_the_server_has_damaged_are_found_removed_and_named(
    bucket: S3Bucket, server: Any, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, key = LabelStore(bucket), label_key(STAMP)
    store.put(block(STAMP), STAMP)
    about = server.head_object(Bucket=NAME, Key=f"{prefix}/{key}")["Metadata"]
    wrong = bytearray(block(STAMP).tobytes())
    wrong[200] ^= 1
    server.put_object(Bucket=NAME, Key=f"{prefix}/{key}", Body=bytes(wrong), Metadata=about)
    assert store.get(STAMP) is None
    assert f"removed {key}" in caplog.text
    assert store.missing([STAMP]) == [STAMP]


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN, Fault.STALL, Fault.CUT, Fault.FLIP])
def test_a_read_survives_a_bad_answer(behind: S3Bucket, proxy: S3Proxy, fault: Fault) -> None:
    data = block(STAMP).tobytes()
    behind.put_new("key", data)
    proxy.choose = in_turn("GET", [fault, fault])
    assert behind.get("key") == data
    assert [each for _, each in proxy.seen].count(fault) == 2


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN, Fault.STALL, Fault.LOST, Fault.FLIP_SENT])
def test_a_write_survives_a_bad_answer_and_knows_that_it_won(behind: S3Bucket, proxy: S3Proxy, fault: Fault) -> None:
    proxy.choose = in_turn("PUT", [fault, fault])
    assert behind.put_new("key", b"the data")
    assert [each for _, each in proxy.seen].count(fault) == 2
    assert behind.get("key") == b"the data"
    assert not behind.put_new("key", b"other data")


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.STALL, Fault.LOST])
@pytest.mark.parametrize(("method", "query"), [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId")])
def test_an_upload_in_parts_survives_a_bad_answer(
    behind: S3Bucket, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, method: str, query: str, fault: Fault
) -> None:
    data = small_parts(monkeypatch)
    proxy.choose = in_turn(method, [fault], query)
    assert behind.put_new("large", data)
    assert [each for _, each in proxy.seen].count(fault) == 1
    assert behind.get("large") == data


def test_a_server_that_stays_away_ends_it_after_its_patience(
    proxy: S3Proxy, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    bucket = S3Bucket(NAME, prefix, patience_s=3.0, read_timeout_s=READ_TIMEOUT_S)
    proxy.choose = lambda _: Fault.SLOW_DOWN
    began = time.monotonic()
    with pytest.raises(RunError, match=r"gave up to get key after \d+ attempts in \d+ s: SlowDown; see to") as ended:
        bucket.get("key")
    assert 2.5 < time.monotonic() - began < 30
    assert "\n" not in str(ended.value)


def test_a_server_that_is_down_is_waited_for(prefix: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    down = S3Bucket(NAME, prefix, patience_s=60.0, read_timeout_s=READ_TIMEOUT_S)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(down.put_new, "key", b"the data")
        time.sleep(3.0)  # nobody listens: each connection is refused
        assert not writing.done()
        with S3Proxy(server.meta.endpoint_url, 3 * READ_TIMEOUT_S, port):
            assert writing.result(timeout=60)
            assert down.get("key") == b"the data"


def test_a_server_that_never_comes_up_ends_it_with_the_reason(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(RunError, match=r"gave up to get key after \d+ attempts .*Could not connect.*AWS_ENDPOINT_URL"):
        S3Bucket(NAME, prefix, patience_s=1.0, read_timeout_s=READ_TIMEOUT_S).get("key")


def test_an_upload_that_cannot_be_finished_is_ended(
    behind: S3Bucket, bucket: S3Bucket, proxy: S3Proxy, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_parts(monkeypatch)
    hopeless = S3Bucket(NAME, prefix, patience_s=0.5, read_timeout_s=READ_TIMEOUT_S)
    proxy.choose = lambda request: Fault.ERROR if "partNumber=3" in request.query_string else None
    with pytest.raises(RunError, match="gave up to upload part large"):
        hopeless.put_new("large", data)
    assert bucket.get("large") is None
    assert bucket.sweep(before=bucket.now() + 60, dry_run=True) == ()


def test_a_writer_that_is_killed_leaves_an_upload_that_gc_ends(
    bucket: S3Bucket, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import time; from cluster.labels.store import s3\n"
        "s3.MULTIPART_BYTES = 10 * 2**20\n"
        f"bucket = s3.S3Bucket({NAME!r}, {prefix!r})\n"
        "bucket._complete = lambda *_: (print('here', flush=True), time.sleep(600))\n"
        "bucket.put_new('large', bytes(11 * 2**20))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "here\n"
        writer.kill()
    assert bucket.get("large") is None
    assert list(bucket.list()) == []
    assert gc(LabelStore(bucket), None, None).leftovers == ()
    later = bucket.now() + SETTLED_S + 60
    monkeypatch.setattr(bucket, "now", lambda: later)
    assert [entry.key for entry in gc(LabelStore(bucket), None, None, dry_run=True).leftovers] == ["large"]
    assert [entry.key for entry in gc(LabelStore(bucket), None, None).leftovers] == ["large"]
    assert gc(LabelStore(bucket), None, None).leftovers == ()


@pytest.mark.parametrize("seed", range(3))
def test_a_store_behind_a_bad_network_loses_nothing_and_makes_nothing_up(
    behind: S3Bucket, proxy: S3Proxy, seed: int
) -> None:
    store = LabelStore(behind)
    stamps = [stamp_of_batch(number) for number in range(24)]
    proxy.choose = now_and_then(0.4, seed)

    def work(stamp: Stamp) -> bool:
        written = repetitive_block(stamp) if int(stamp.batch, 16) % 2 else block(stamp)
        won = store.put(written, stamp)
        read = store.get(stamp)
        return won and read is not None and np.array_equal(read, written)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, stamps))
    assert store.missing([*stamps, stamp_of_batch(99)]) == [stamp_of_batch(99)]
    assert sum(fault is not None for _, fault in proxy.seen) >= 10


@pytest.mark.parametrize(
    ("uri", "environment", "says"),
    [
        ("s3://nobucket/a", {}, "there is no bucket 'nobucket'"),
        (f"s3://{NAME}", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch; see to AWS_ACCESS_KEY_ID"),
        (f"s3://{NAME}", {"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId; see to AWS_ACCESS_KEY_ID"),
        ("s3://No_Bucket!/a", {}, 'Invalid bucket name "No_Bucket!"'),
        (f"s3://{NAME}", {"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense"),
        (f"s3://{NAME}", {"AWS_PROFILE": "absent"}, "absent"),
    ],
)
def test_what_the_user_got_wrong_is_said_at_once(
    server: Any, monkeypatch: pytest.MonkeyPatch, uri: str, environment: dict[str, str], says: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        open_bucket(uri)
    assert time.monotonic() - began < 60  # a store is waited for five minutes
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_credentials_are_said_at_once(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match="Unable to locate credentials"):
        open_bucket(f"s3://{NAME}")


def test_what_is_logged_of_a_bad_day_holds_no_credentials(
    behind: S3Bucket, proxy: S3Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.choose = in_turn("GET", [Fault.CUT, Fault.FLIP, Fault.ERROR, Fault.ERROR, Fault.ERROR, Fault.ERROR])
    behind.put_new("key", b"data")
    with caplog.at_level(logging.INFO):
        assert behind.get("key") == b"data"
    assert "cannot get key, tries again" in caplog.text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in caplog.text
    assert os.environ["AWS_ACCESS_KEY_ID"] not in caplog.text
