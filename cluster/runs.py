"""A run's folder: what it was asked to do, how far it came, and what it leaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, Any

from cluster.corpus.batches import CORPUS_FOLDER, FACTS_FILE
from cluster.errors import RunError, UserError
from cluster.spec import FamilySpec
from cluster.specfile import home, training_hash, training_part

log = logging.getLogger(__name__)

STATE_FILE = "run.json"
SPEC_FILE = "spec.json"
# Locked by the process that runs it, for as long as it lives.
LOCK_FILE = "run.lock"
# Locks that this process holds. They are POSIX record locks: they work over NFS, no child inherits them, and closing
# any other handle of the file in this process would release them.
_held: dict[Path, IO[bytes]] = {}
# What such a lock raises where another process has it.
_TAKEN = (errno.EACCES, errno.EAGAIN)

RUNNING, FINISHED, UNFINISHED, UNKNOWN = "running", "finished", "unfinished", "unknown"
# A folder without a state that is younger may belong to a run that is only just starting.
SETTLED_S = 3600.0


@dataclass
class Run:
    """One run of a family and its folder. What must survive a crash is written by :meth:`save`.

    Attributes:
        name: ``<family>-<time>``; also the MLflow run's name.
        spec_hash: of all that decides the students' weights, as a tag of the models.
        mlflow: run ids in MLflow, under ``""`` the family's, else by student; empty until they are opened.
        start: marks the MLflow runs of this run. It is saved before they are opened, so that a driver that dies in
            between finds them again.
        versions: registered model versions of students that are finished.
        text_is_kept: it keeps the text that it has read before.
        warm_start: per student with a warm start the champion's version that it began with, none where there was no
            champion then; empty until the runs in MLflow are opened.
        ds: the date that its corpus was rendered for, YYYY-MM-DD; "" in a run from before there were dates.
        teacher: fingerprints of the teacher and its tokenizer; "" in a run from before they were kept.
        promotions: what was decided of them, by student: the fields of a :class:`~cluster.evaluate.gate.Verdict`.
        logged: how many of each student's points MLflow has, and under ``""`` of the family's. Logging some again does
            no harm.
    """

    folder: Path
    name: str
    spec_hash: str
    mlflow: dict[str, str] = field(default_factory=dict)
    start: str = ""
    versions: dict[str, int] = field(default_factory=dict)
    warm_start: dict[str, int | None] = field(default_factory=dict)
    ds: str = ""
    teacher: str = ""
    promotions: dict[str, dict[str, Any]] = field(default_factory=dict)
    logged: dict[str, int] = field(default_factory=dict)
    resumed: bool = False
    text_is_kept: bool = False

    def save(self) -> None:
        """Write the state aside and then put it in place, so that it is never half there."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("folder", "resumed", "text_is_kept")}
        aside = self.folder / f".{STATE_FILE}.part"
        aside.write_text(json.dumps(kept, indent=1))
        aside.replace(self.folder / STATE_FILE)

    @property
    def log_path(self) -> Path:
        """Everything that the libraries say."""
        return self.folder / "run.log"

    @property
    def report_path(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"


def _runs_folder() -> Path:
    return home() / "runs"


def last_run(family: str) -> Run:
    """The run that ``--resume`` continues, as it was saved.

    Raises:
        UserError: the family has none.
    """
    states = sorted((_runs_folder() / family).glob(f"*/{STATE_FILE}"))
    if not states:
        raise UserError(f"--resume: family {family!r} has no run under {_runs_folder()}; start one without --resume")
    return _saved(states[-1].parent)


def run_of(name: str) -> Run:
    """A run by its name or its folder, to be resumed on the text that it has read.

    Raises:
        UserError: there is none.
    """
    folder = find_run(name)
    # One that was ended before it had read all of its text has to read it again.
    return _saved(folder, text_is_kept=(folder / CORPUS_FOLDER / FACTS_FILE).exists())


def _saved(folder: Path, text_is_kept: bool = False) -> Run:
    state = json.loads((folder / STATE_FILE).read_text())
    return Run(folder=folder, resumed=True, text_is_kept=text_is_kept, **state)


def open_run(
    spec: FamilySpec, resume: bool, ds: date | None = None, begun: Run | None = None, teacher: str = ""
) -> Run:
    """A new run's folder, or with ``resume`` one that was begun.

    Args:
        ds: the date that ``corpus.paths`` was rendered for; none means today's. A resumed run keeps its own.
        begun: the run to resume; none means the family's last one.
        teacher: fingerprints of the teacher and its tokenizer; "" skips the check that a resumed run has the same.

    Raises:
        UserError: nothing to resume, or it was started from a spec or a teacher that would train other weights.
        RunError: it is running.
    """
    if not resume:
        name = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = _unused(_runs_folder() / spec.name, name)
        _hold(folder)
        run = Run(folder, folder.name, training_hash(spec), ds=(ds or date.today()).isoformat(), teacher=teacher)
        (folder / SPEC_FILE).write_text(spec.model_dump_json(indent=1))
        run.save()
        return run
    run = begun or last_run(spec.name)
    _hold(run.folder)
    before = FamilySpec.model_validate_json((run.folder / SPEC_FILE).read_text())
    if changed := _differences(training_part(before), training_part(spec)):
        raise UserError(
            f"--resume: {run.name} was started from another spec; differs in {', '.join(changed)}. Put these back or "
            f"start a new run without --resume"
        )
    if teacher and run.teacher not in ("", teacher):
        raise UserError(
            f"--resume: {run.name} was started with another teacher: the fingerprint of {spec.teacher.model} was "
            f"{run.teacher} and is {teacher}; put its files and this version of Stillhouse back, or start a new run "
            f"without --resume"
        )
    if before != spec:
        # MLflow keeps a run's parameters as they are: another number of ranks needs other runs, if none is in use yet.
        run.start = ""
    (run.folder / SPEC_FILE).write_text(spec.model_dump_json(indent=1))
    return run


def find_run(run: str) -> Path:
    """The folder of a run that is given by its name or by its folder.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(run), *_runs_folder().glob(f"*/{run}")):
        if (folder / STATE_FILE).is_file():
            return folder
    raise UserError(f"{run}: neither a run's folder nor the name of a run under {_runs_folder()}")


# -- what is kept ------------------------------------------------------------------------------------------------------


def _hold(folder: Path) -> None:
    """Lock a run's folder until this process ends, however it ends.

    Raises:
        RunError: another process runs it. No mistake, so that a scheduled run is tried again.
    """
    if folder in _held:
        return
    file = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in _TAKEN:
            raise RunError(f"{folder.name} is running; wait for its end, or stop it first") from None
        log.warning("%s: no lock on its file system, so `stillhouse runs` cannot tell that it runs: %s", folder, error)
        return
    _held[folder] = file


def _release(folder: Path) -> None:
    if (file := _held.pop(folder, None)) is not None:
        file.close()


def _lock_state(folder: Path) -> str | None:
    """Whether a process runs it; None where none does, or where it is of before there were locks."""
    lock = folder / LOCK_FILE
    if folder in _held or not lock.exists():
        return RUNNING if folder in _held else None
    with lock.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return RUNNING if error.errno in _TAKEN else UNKNOWN
    return None


@dataclass(frozen=True)
class KeptRun:
    """A run's folder and what it takes on the disk.

    Attributes:
        state: ``running``, ``finished``, ``unfinished`` (``--resume`` would go on with it), or ``unknown`` where its
            file system has no locks.
        used: when it was last written to, seconds since 1970.
        size: bytes of its files; ``frees`` are those that are nowhere else, such as in MLflow's artifacts.
        registered: versions of its students.
        last: whether it is the last run of its family, which ``--resume`` goes on with.
        only_copies: finished students whose model is nowhere else.
        named_by: unfinished runs whose spec names a file or a model in its folder.
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
    named_by: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def in_use(self) -> str:
        """Why it must not be removed; empty where it may."""
        if self.state in (RUNNING, UNKNOWN):
            return "it is running" if self.state == RUNNING else "its file system has no locks, so it may be running"
        return f"unfinished runs use it: {', '.join(self.named_by)}" if self.named_by else ""

    @property
    def needed(self) -> str:
        """Why a clean-up must leave it alone; empty where it need not."""
        if self.in_use:
            return self.in_use
        if self.only_copies:
            return f"it has the only copy of {', '.join(self.only_copies)}; --resume registers them"
        return "its family can be resumed from it" if self.last and self.state == UNFINISHED else ""


def kept_runs() -> list[KeptRun]:
    """All runs under the Stillhouse home, the longest unused first."""
    folders = sorted(path.parent for path in _runs_folder().glob(f"*/*/{STATE_FILE}"))
    specs = {folder: (folder / SPEC_FILE).read_text() for folder in folders}
    last = {folder.parent: folder for folder in folders}
    states = {folder: _saved(folder) for folder in folders}
    unfinished = {folder: _unfinished(json.loads(specs[folder]), states[folder]) for folder in folders}
    found = []
    for folder in folders:
        infos = list(_infos(folder))
        models = {path.parents[1].name for path in folder.glob("students/*/checkpoint_*/model")}
        others = (other for other in folders if unfinished[other] and other != folder)
        found.append(
            KeptRun(
                folder=folder,
                family=folder.parent.name,
                state=_lock_state(folder) or (UNFINISHED if unfinished[folder] else FINISHED),
                used=max((info.st_mtime for info in infos), default=0.0),
                size=sum(info.st_size for info in infos),
                frees=sum(info.st_size for info in infos if info.st_nlink == 1),
                registered=states[folder].versions,
                last=last[folder.parent] == folder,
                only_copies=tuple(sorted(models - states[folder].versions.keys())),
                named_by=tuple(other.name for other in others if f'"{folder}/' in specs[other]),
            )
        )
    return sorted(found, key=lambda run: run.used)


def _unfinished(spec: dict[str, Any], run: Run) -> bool:
    """Whether a resumed run has a student to train or to register, or a promotion to decide."""
    decided = run.versions.keys() & run.promotions.keys() if spec.get("promotion") else run.versions.keys()
    return not spec["students"].keys() <= decided


def _infos(folder: Path) -> Iterator[os.stat_result]:
    """Of all files in a folder; those that a running process removes meanwhile are left out."""
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield Path(root, name).lstat()


def remove_run(folder: Path) -> None:
    """Remove a run's folder. Its registered models and its runs in MLflow stay.

    Raises:
        RunError: it is running.
    """
    _hold(folder)
    try:
        # First, so that what a kill leaves behind is not taken for a run.
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    finally:
        _release(folder)
    with contextlib.suppress(OSError):  # it has other runs
        folder.parent.rmdir()


def leftovers() -> Iterator[Path]:
    """Folders that a killed removal, or a run that never started, has left; none that was written to within an hour."""
    for folder in _runs_folder().glob("*/*"):
        settled = time.time() - folder.stat().st_mtime > SETTLED_S
        if folder.is_dir() and not (folder / STATE_FILE).exists() and settled:
            yield folder


def _unused(parent: Path, name: str) -> Path:
    """A folder that was not there before, also when two runs start in one second."""
    attempt = 0
    while True:
        folder = parent / (f"{name}-{attempt}" if attempt else name)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            attempt += 1


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two specs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [path]
