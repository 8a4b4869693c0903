"""Room for a checkpoint: a full disk is waited for, and then named."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from cluster.errors import RunError

log = logging.getLogger(__name__)

# How long a student waits for somebody to make room.
PATIENCE_S = 600.0
LOOK_S = 2.0
# What a file system should keep free beside the checkpoint: logs and the registry grow meanwhile.
SPARE_BYTES = 8 << 20


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def wait_for_room(storage: Path, nbytes: int, patience_s: float = PATIENCE_S) -> None:
    """Wait until ``nbytes`` fit where a run keeps its checkpoints.

    Raises:
        RunError: they still do not; says how much there is, and how the run goes on.
    """
    deadline = time.monotonic() + patience_s
    while (free := shutil.disk_usage(storage).free) < nbytes + SPARE_BYTES:
        if time.monotonic() >= deadline:
            raise RunError(
                f"no room for a checkpoint: {storage} has {free >> 20} MiB free, it takes {nbytes >> 20} MiB; make "
                f"room, or lower checkpoints.keep, and go on with --resume"
            )
        log.warning("%s has %d MiB free, a checkpoint takes %d MiB; waiting", storage, free >> 20, nbytes >> 20)
        time.sleep(LOOK_S)
