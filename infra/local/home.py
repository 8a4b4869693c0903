"""What of the stack's home is in a backup: the schedules' database and the endpoints' state."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from infra.local.parts import Stack, StackError

_SCHEDULES, _ENDPOINTS = "schedules.db", "endpoints"
# A file that is only half written; see serving/control/state.py.
_PARTS = shutil.ignore_patterns(".*.part")


def keep_home(stack: Stack, folder: Path) -> None:
    """Copy all of it that there is; the scheduler and the endpoints may go on meanwhile.

    Raises:
        StackError: the schedules' database cannot be read.
    """
    home = stack.home
    if (home / _SCHEDULES).exists():
        _copy_database(home / _SCHEDULES, folder / _SCHEDULES)
    if (home / _ENDPOINTS).exists():
        shutil.copytree(home / _ENDPOINTS, folder / _ENDPOINTS, ignore=_PARTS)


def check_home(folder: Path) -> None:
    """See that a backup's database of schedules can be read, if it has one.

    Raises:
        StackError: it cannot.
    """
    path = folder / _SCHEDULES
    if not path.exists():
        return
    try:
        # Not to be written to, nor is anything to be made beside it.
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        said = str(error)
    if said != "ok":
        raise StackError(f"{path} is damaged ({said}), and nothing was changed")


def put_back_home(stack: Stack, folder: Path) -> Path | None:
    """Make it what it was. What is in its place goes to a folder aside first, which is returned; None if nothing was.

    An endpoint that the backup does not know stays, and so do schedules where it has none.
    """
    home = stack.home
    kept = sorted(path.name for path in _folders(folder / _ENDPOINTS))
    replaced = [name for name in kept if (home / _ENDPOINTS / name).exists()]
    put_aside = None
    if replaced or ((folder / _SCHEDULES).exists() and (home / _SCHEDULES).exists()):
        put_aside = home / f"before-restore-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        put_aside.mkdir(mode=0o700)
        keep_home(stack, put_aside)
    if (folder / _SCHEDULES).exists():
        home.mkdir(parents=True, exist_ok=True)
        _copy_database(folder / _SCHEDULES, home / _SCHEDULES)
    for name in kept:
        place = home / _ENDPOINTS / name
        if name in replaced:
            shutil.rmtree(place)
        shutil.copytree(folder / _ENDPOINTS / name, place)
    return put_aside


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _copy_database(source: Path, target: Path) -> None:
    """A copy of one moment, in one transaction of the target's: either may be in use."""
    try:
        with (
            contextlib.closing(sqlite3.connect(f"file:{quote(str(source))}?mode=rw", uri=True, timeout=30)) as old,
            contextlib.closing(sqlite3.connect(target, timeout=30)) as new,
        ):
            old.backup(new)
    except sqlite3.Error as error:
        raise StackError(f"{source} cannot be copied to {target}: {error}") from error
