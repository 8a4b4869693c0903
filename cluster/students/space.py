"""Room for a checkpoint: where it is put together, and a full disk that is waited for and then named."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.errors import RunError

log = logging.getLogger(__name__)

# How long a student waits for somebody to make room.
PATIENCE_S = 600.0
LOOK_S = 2.0
# What a file system should keep free beside the checkpoint: logs and the registry grow meanwhile.
SPARE_BYTES = 8 << 20


class Staging:
    """Where a rank writes a checkpoint before it is stored: a folder for each on this node's own disk.

    A rank that is killed leaves its last one behind; the student's next life on this node takes it away.
    """

    def __init__(self, run: str, student: str) -> None:
        # No name has a dot in it, so that no student takes another's away.
        self._prefix = f"stillhouse.{run}.{student}."
        # No rank of this life has one yet: the first is written after a collective that all of them take part in.
        for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder. It goes when the block fails, else with whoever has taken it over."""
        path = Path(tempfile.mkdtemp(prefix=self._prefix))
        try:
            yield path
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


def remove_torn(storage: Path, whole: Iterable[str]) -> None:
    """Remove the checkpoints in a student's folder that were never finished: nobody else ever would.

    Args:
        whole: names of the others.
    """
    names = set(whole)
    for folder in storage.glob("checkpoint_*"):
        # Ray Train's own list of them is a file with such a name.
        if folder.is_dir() and folder.name not in names:
            log.warning("removing %s, which was not finished", folder)
            shutil.rmtree(folder)


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
