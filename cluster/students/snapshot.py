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
# What Ray Train calls the checkpoints in its list, and the numbers of the reports that brought them.
RESULTS, INDICES = "checkpoint_results", "checkpoint_report_indices"


def keep(folder: Path) -> None:
    """Keep the present list. Call after a checkpoint has been added to it.

    Args:
        folder: of the student's Ray Train run.
    """
    _write((folder / LIST_FILE).read_bytes(), folder / KEPT_FILE)


def mend(folder: Path) -> None:
    """Put the kept list in the place of one that cannot be read; where none was kept, the student begins anew."""
    listed, kept = folder / LIST_FILE, folder / KEPT_FILE
    if not listed.exists():
        return
    if _readable(listed):
        # The run may have been killed before it was kept; an older copy would name checkpoints that are no more.
        keep(folder)
        return
    log.warning("%s was left half written; going back to the list before", listed)
    state = (
        json.loads(kept.read_bytes()) if kept.exists() else {"checkpoint_results": [], "checkpoint_report_indices": []}
    )
    listing = zip(state["checkpoint_results"], state["checkpoint_report_indices"], strict=True)
    there = [(result, index) for result, index in listing if (folder / result["checkpoint_dir_name"]).is_dir()]
    if not there:
        listed.unlink()
        return
    results, indices = zip(*there, strict=True)
    more = {
        "checkpoint_results": results,
        "checkpoint_report_indices": indices,
        "latest_checkpoint_result": results[-1],
    }
    _write(json.dumps({**state, **more}).encode(), listed)


def keep_last_only(folder: Path) -> None:
    """Remove all checkpoints but the last one, from the list first. Call when the run has ended.

    A finished student needs no training state, which takes several times the room of its model.
    """
    state = json.loads((folder / LIST_FILE).read_bytes())
    last, listed = state["latest_checkpoint_result"], state["checkpoint_results"]
    index = state["checkpoint_report_indices"][listed.index(last)]
    _write(
        json.dumps({**state, "checkpoint_results": [last], "checkpoint_report_indices": [index]}).encode(),
        folder / LIST_FILE,
    )
    keep(folder)
    for result in listed:
        if result != last:
            # It is in no list any more, so what cannot be removed costs its room only.
            shutil.rmtree(folder / result["checkpoint_dir_name"], ignore_errors=True)


def _write(data: bytes, target: Path) -> None:
    aside = target.with_name(f".{target.name}.part")
    aside.write_bytes(data)
    aside.replace(target)


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True
