"""The folders of runs under the Stillhouse home: what they take on the disk, who needs them, and their removal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cluster.errors import RunError
from cluster.runs import RUNNING, SPEC_FILE, STATE_FILE, UNKNOWN, Run, hold, lock_state, release, runs_folder, saved

FINISHED, UNFINISHED, DAMAGED = "finished", "unfinished", "damaged"
# A folder without a state that is younger may belong to a run that is only just starting.
SETTLED_S = 3600.0
# Behind the family's name in that of a run, see :func:`~cluster.runs.open_run`.
_STARTED = re.compile(r"-\d{8}-\d{6}(-\d+)?")


@dataclass(frozen=True)
class KeptRun:
    """A run's folder and what it takes on the disk.

    Attributes:
        state: ``running``, ``finished``, ``unfinished`` (``--resume`` would continue it), ``damaged`` where its state
            or its spec cannot be read, or ``unknown`` where its file system has no locks.
        used: when it was last written to, seconds since 1970.
        size: bytes of its files; ``frees`` are those that are nowhere else, such as in MLflow's artifacts.
        registered: versions of its students.
        last: whether it is the last run of its family, which ``--resume`` continues.
        only_copies: finished students whose model is nowhere else.
        needed_by: unfinished runs whose spec names a file or a model in its folder, and what else the caller knows of.
    """

    folder: Path
    family: str
    state: str
    used: float
    size: int
    frees: int
    registered: dict[str, int]
    last: bool
    only_copies: tuple[str, ...]
    needed_by: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def in_use(self) -> str:
        """Why it must not be removed; empty where it may."""
        if self.state in (RUNNING, UNKNOWN):
            return "it is running" if self.state == RUNNING else "its file system has no locks, so it may be running"
        if self.folder.is_symlink():
            return f"its folder is a symbolic link to {self.folder.resolve()}, which has to be removed by hand"
        return f"it is needed by {', '.join(self.needed_by)}" if self.needed_by else ""

    @property
    def needed(self) -> str:
        """Why a clean-up must leave it alone; empty where it need not."""
        if self.in_use:
            return self.in_use
        if self.state == DAMAGED:
            return (
                f"its {STATE_FILE} or {SPEC_FILE} cannot be read, so it may be needed; `stillhouse runs rm` removes it"
            )
        if self.only_copies:
            return f"it has the only copy of {', '.join(self.only_copies)}; --resume registers them"
        return "its family can be resumed from it" if self.last and self.state == UNFINISHED else ""


def kept_runs(others: Mapping[str, Collection[str]] | None = None) -> list[KeptRun]:
    """All runs under the Stillhouse home, the longest unused first.

    Args:
        others: who else needs files, such as a schedule, and their paths.
    """
    known: dict[Path, tuple[Run, dict[str, Any]] | None] = {}
    for path in sorted(runs_folder().glob(f"*/*/{STATE_FILE}")):
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            known[path.parent] = _read(path.parent)
    last = {folder.parent: folder for folder in known}
    unfinished = {folder for folder, read in known.items() if read is not None and _is_unfinished(*read)}
    specs = {folder: read[1] for folder, read in known.items() if read is not None and folder in unfinished}
    users = {f"the unfinished run {folder.name}": strings_in(spec) for folder, spec in specs.items()}
    named = {who: _places(texts) for who, texts in {**users, **(others or {})}.items()}
    found = []
    for folder, read in known.items():
        infos = list(_infos(folder))
        models = {path.parents[1].name for path in folder.glob("students/*/checkpoint_*/model")}
        registered = {} if read is None else read[0].versions
        state = DAMAGED if read is None else UNFINISHED if folder in unfinished else FINISHED
        own = f"the unfinished run {folder.name}"
        found.append(
            KeptRun(
                folder=folder,
                family=folder.parent.name,
                state=lock_state(folder) or state,
                used=max((info.st_mtime for info in infos), default=0.0),
                size=sum(info.st_size for info in infos),
                frees=sum(info.st_size for info in infos if info.st_nlink == 1),
                registered=registered,
                last=last[folder.parent] == folder,
                only_copies=tuple(sorted(models - registered.keys())),
                needed_by=tuple(who for who, places in named.items() if who != own and _is_named(folder, places)),
            )
        )
    return sorted(found, key=lambda run: run.used)


def _read(folder: Path) -> tuple[Run, dict[str, Any]] | None:
    """A run's state and its spec; None where one of them is damaged or missing.

    Raises:
        FileNotFoundError: there is no such run any more.
    """
    try:
        run = saved(folder)
        spec = json.loads((folder / SPEC_FILE).read_text())
        return run, {**spec, "students": dict(spec["students"])}
    except (RunError, ValueError, TypeError, KeyError):
        return None
    except FileNotFoundError:
        if (folder / STATE_FILE).exists():
            return None
        raise


def _is_unfinished(run: Run, spec: Mapping[str, Any]) -> bool:
    """Whether a resumed run has a student to train or to register, or a promotion to decide."""
    decided = run.versions.keys() & run.promotions.keys() if spec.get("promotion") else run.versions.keys()
    return not spec["students"].keys() <= decided


def strings_in(tree: Any) -> list[str]:
    """All strings in a spec, of which some are paths."""
    if isinstance(tree, str):
        return [tree]
    below = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ()
    return [text for each in below for text in strings_in(each)]


def _places(texts: Collection[str]) -> list[tuple[str, ...]]:
    """The parts of those texts that are absolute paths, with symbolic links followed."""
    paths = (text.removeprefix("file://") for text in texts)
    return [Path(os.path.realpath(path)).parts for path in paths if path.startswith("/") and "\0" not in path]


def _is_named(folder: Path, places: Collection[tuple[str, ...]]) -> bool:
    """Whether a path, which may be a pattern, is a folder or lies in it."""
    own = folder.resolve().parts
    return any(
        len(parts) >= len(own)
        and all(name == part or fnmatchcase(name, part) for name, part in zip(own, parts, strict=False))
        for parts in places
    )


def _infos(folder: Path) -> Iterator[os.stat_result]:
    """Of all files in a folder; those that a running process removes during the walk are left out."""
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield Path(root, name).lstat()


def remove_run(folder: Path) -> None:
    """Remove a run's folder. Its registered models and its runs in MLflow stay.

    Raises:
        RunError: it is running, another process has removed it, or it is a symbolic link.
    """
    if folder.is_symlink():
        raise RunError(f"{folder} is a symbolic link; remove it and what it names by hand")
    hold(folder)
    try:
        # First, so that what a kill leaves behind is not taken for a run.
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    finally:
        release(folder)
    with contextlib.suppress(OSError):  # it has other runs
        folder.parent.rmdir()


def leftovers() -> Iterator[tuple[Path, int]]:
    """Folders that a killed removal, or a run that never started, has left, with their bytes.

    None that was written to within an hour, is a symbolic link, or has another name than a run.
    """
    for folder in runs_folder().glob("*/*"):
        family = folder.parent
        if family.is_symlink() or folder.is_symlink() or not folder.is_dir() or (folder / STATE_FILE).exists():
            continue
        if not (folder.name.startswith(family.name) and _STARTED.fullmatch(folder.name.removeprefix(family.name))):
            continue
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            if time.time() - folder.stat().st_mtime > SETTLED_S:
                yield folder, sum(info.st_size for info in _infos(folder))
