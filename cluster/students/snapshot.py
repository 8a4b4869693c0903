"""Ray Train's list of a student's checkpoints, kept twice.

It is written in place: a run that is killed over it, or whose disk is full, leaves half a list, and Ray Train then
refuses to begin at all. The checkpoints of the list before are removed only after the new one is written, so going back
to that one is safe.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

LIST_FILE, KEPT_FILE = "checkpoint_manager_snapshot.json", "checkpoints.kept.json"


def keep(folder: Path) -> None:
    """Keep the present list. Call after a checkpoint has been added to it.

    Args:
        folder: of the student's Ray Train run.
    """
    _put(folder / LIST_FILE, folder / KEPT_FILE)


def mend(folder: Path) -> None:
    """Put the kept list in the place of one that cannot be read; where none was kept, the student begins anew."""
    listed, kept = folder / LIST_FILE, folder / KEPT_FILE
    if not listed.exists() or _readable(listed):
        return
    log.warning("%s was left half written; going back to the list before", listed)
    if kept.exists():
        _put(kept, listed)
    else:
        listed.unlink()


def _put(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, aside)
    aside.replace(target)


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
