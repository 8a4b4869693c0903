"""A full disk is waited for, and named when nobody makes room."""

import errno
import threading
import time
from pathlib import Path

import pytest

from cluster import space


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
    space.wait_for_room(tmp_path, 1000, patience_s=30)
    assert time.monotonic() - started < 1


def test_a_full_disk_is_waited_for(tmp_path: Path, free: dict[str, int]) -> None:
    threading.Timer(0.3, lambda: free.update(bytes=1 << 40)).start()
    started = time.monotonic()
    space.wait_for_room(tmp_path, 1 << 30, patience_s=30)
    assert 0.2 < time.monotonic() - started < 20


def test_a_disk_that_stays_full_is_named(tmp_path: Path, free: dict[str, int]) -> None:
    free["bytes"] = 5 << 20
    missing = (1 << 30) + space.SPARE_BYTES - free["bytes"]
    says = rf"{tmp_path} has had {missing} bytes too few .*; make room.* --resume"
    with pytest.raises(space.NoRoomError, match=says):
        space.wait_for_room(tmp_path, 1 << 30, patience_s=0.05)


def test_a_write_is_tried_again_until_the_disk_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(space, "LOOK_S", 0.01)
    refusals = [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota")]

    def write() -> str:
        if refusals:
            raise refusals.pop()
        return "written"

    assert space.when_there_is_room(tmp_path, write, patience_s=30) == "written"


@pytest.mark.parametrize(("number", "raised"), [(errno.ENOSPC, space.NoRoomError), (errno.EACCES, PermissionError)])
def test_only_a_full_disk_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, raised: type[Exception]
) -> None:
    monkeypatch.setattr(space, "LOOK_S", 0.01)
    tries = []

    def write() -> None:
        tries.append(number)
        raise OSError(number, "no")

    with pytest.raises(raised):
        space.when_there_is_room(tmp_path, write, patience_s=0.1)
    assert (len(tries) > 1) == (number == errno.ENOSPC)
