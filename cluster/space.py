"""Room on the disk of a run: a full disk is waited for, and then named."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cluster.errors import RunError

log = logging.getLogger(__name__)

R = TypeVar("R")

LOOK_S = 2.0
# What a file system should keep free beside a checkpoint: logs and the registry grow meanwhile.
SPARE_BYTES = 8 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(RunError):
    """A disk stayed full. No other try would end otherwise before somebody makes room."""


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def wait_for_room(folder: Path, nbytes: int, patience_s: float) -> None:
    """Wait until ``nbytes`` for a checkpoint fit on a folder's file system, and some more beside them.

    Raises:
        NoRoomError: they still do not after ``patience_s``; says how much is missing, and how to resume the run.
    """
    deadline = time.monotonic() + patience_s
    while (missing := nbytes + SPARE_BYTES - shutil.disk_usage(folder).free) > 0:
        if time.monotonic() >= deadline:
            raise NoRoomError(
                f"no room for a checkpoint: the disk of {folder} has had {missing} bytes too few "
                f"for patience_s {patience_s:g} s; make room or lower checkpoints.keep, then resume with --resume"
            )
        log.warning("the disk of %s has %d bytes too few for a checkpoint; waiting", folder, missing)
        time.sleep(LOOK_S)


def when_there_is_room(folder: Path, work: Callable[[], R], patience_s: float) -> R:
    """Do some work that writes a little to a folder, again and again while its disk is full.

    Raises:
        NoRoomError: it still is after ``patience_s``.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if time.monotonic() >= deadline:
                raise NoRoomError(
                    f"the disk of {folder} has been full for patience_s {patience_s:g} s, it has "
                    f"{shutil.disk_usage(folder).free} bytes left; make room, then resume with --resume"
                ) from error
            log.warning("the disk of %s is full; waiting", folder)
            time.sleep(LOOK_S)
