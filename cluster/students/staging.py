"""Where a checkpoint is put together, and what is left of those that came to nothing."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)


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
