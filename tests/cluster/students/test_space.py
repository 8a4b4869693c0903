"""A full disk is waited for, and named when nobody makes room."""

import threading
import time
from pathlib import Path

import pytest

from cluster.errors import RunError
from cluster.students import space


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the file system says it has; a real one cannot be told to fill up."""
    facts = {"bytes": 0}
    monkeypatch.setattr(space, "LOOK_S", 0.01)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: type("Usage", (), {"free": facts["bytes"]}))
    return facts


def test_where_there_is_room_nothing_waits(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"x" * 1000)
    started = time.monotonic()
    assert space.size_of(tmp_path) == 1000
    space.wait_for_room(tmp_path, 1000)
    assert time.monotonic() - started < 1


def test_a_full_disk_is_waited_for(tmp_path: Path, free: dict[str, int]) -> None:
    threading.Timer(0.3, lambda: free.update(bytes=1 << 40)).start()
    started = time.monotonic()
    space.wait_for_room(tmp_path, 1 << 30, patience_s=30)
    assert 0.2 < time.monotonic() - started < 20


def test_a_disk_that_stays_full_is_named(tmp_path: Path, free: dict[str, int]) -> None:
    free["bytes"] = 5 << 20
    with pytest.raises(RunError, match=r"5 MiB free, it takes 1024 MiB; make room, .* --resume"):
        space.wait_for_room(tmp_path, 1 << 30, patience_s=0.05)
