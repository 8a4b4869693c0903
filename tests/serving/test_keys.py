"""API keys: hashed at rest, found by hash, counted by the minute, and gone when they are removed."""

import os
import stat
import time
from pathlib import Path

import pytest

from cluster.errors import UserError
from serving.keys import KeyRing, add_key, hashed, read_keys, remove_key


def test_only_the_hash_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = add_key(file, "app", requests_per_minute=5, arms=["small"], admin=True)
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (key,) = read_keys(file)
    assert (key.name, key.sha256, key.requests_per_minute, key.arms, key.admin) == (
        "app",
        hashed(secret),
        5,
        ("small",),
        True,
    )
    assert key.may_ask("small") and not key.may_ask("large")


def test_two_keys_differ_and_names_are_unique(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    assert add_key(file, "a") != add_key(file, "b")
    with pytest.raises(UserError, match="has a key named 'a'"):
        add_key(file, "a")
    remove_key(file, "a")
    assert [key.name for key in read_keys(file)] == ["b"]
    with pytest.raises(UserError, match="no key named 'a'; there are: b"):
        remove_key(file, "a")


SOMETHING_ELSE = [
    b"keys: 3",
    b"- a",
    b"keys: [{name: a}]",
    b"{",
    b"keys: [{name: a, sha256: b, x: secret}]",
    # Damaged so that other errors than YAML's come of it.
    b"keys: [{name: secret \xff}]",
    b"keys: 2001-99-99",
    b"keys: !!int secret",
    b"keys: !!bool secret",
    b"keys: !!timestamp secret",
    b"? {a: secret}\n: b",
    b"[" * 5000,
]


@pytest.mark.parametrize("content", SOMETHING_ELSE, ids=range(len(SOMETHING_ELSE)))
def test_a_file_of_something_else_is_refused_without_its_text(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match="is no file of API keys") as caught:
        read_keys(file)
    assert "secret" not in str(caught.value)


def test_a_ring_finds_its_keys_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = add_key(file, "app")
    ring = KeyRing(file)
    assert not ring.is_open
    found = ring.find(secret)
    assert found is not None and found.name == "app"
    for wrong in ("", secret[:-1], secret + "x", hashed(secret), secret.upper()):
        assert ring.find(wrong) is None
    assert KeyRing(None).is_open


def test_a_removed_key_is_refused_at_the_next_look_and_a_broken_file_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    first, second = add_key(file, "first"), add_key(file, "second")
    ring = KeyRing(file)
    remove_key(file, "first")
    ring.refresh()
    assert ring.find(first) is None and ring.find(second) is not None
    whole = file.read_bytes()
    for damaged in (b"broken: {", b"\xff", b"keys: 2001-99-99"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="none is valid"):
            ring.refresh()
        assert ring.find(second) is None
        file.write_bytes(whole)
        ring.refresh()
        assert ring.find(second) is not None
    file.unlink()
    with pytest.raises(UserError, match="none is valid"):
        ring.refresh()
    third = add_key(file, "third")
    ring.refresh()
    assert ring.find(third) is not None


def test_the_minute_s_requests_are_counted_per_key_and_shared_by_the_doors(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    slow, free = add_key(file, "slow", requests_per_minute=6), add_key(file, "free")
    for doors, allowed in ((1, 6), (2, 3), (10, 1)):
        ring = KeyRing(file, doors)
        key = ring.find(slow)
        assert key is not None
        waits = [ring.wait_s(key) for _ in range(allowed + 2)]
        assert waits[:allowed] == [0.0] * allowed
        assert all(1 <= wait <= 60 for wait in waits[allowed:])
        other = ring.find(free)
        assert other is not None and [ring.wait_s(other) for _ in range(50)] == [0.0] * 50


def test_the_wait_is_until_the_oldest_request_is_a_minute_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.yaml"
    secret = add_key(file, "slow", requests_per_minute=1)
    ring = KeyRing(file)
    key = ring.find(secret)
    assert key is not None
    real, ahead = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    assert ring.wait_s(key) == 0.0
    ahead = 50.0
    assert 5 < ring.wait_s(key) <= 11
    ahead = 61.0
    assert ring.wait_s(key) == 0.0


def test_a_key_s_successor_of_the_same_length_and_time_takes_its_place(tmp_path: Path) -> None:
    file, other = tmp_path / "keys.yaml", tmp_path / "other.yaml"
    old, new = add_key(file, "app"), add_key(other, "app")
    os.utime(file, ns=(1, 1))
    os.utime(other, ns=(1, 1))
    ring = KeyRing(file)
    assert other.stat().st_size == file.stat().st_size
    other.replace(file)
    ring.refresh()
    assert ring.find(old) is None and ring.find(new) is not None
