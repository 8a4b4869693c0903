"""A run's folder: what it was asked to do, how far it came, and what it leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, Any

from cluster.corpus.batches import CORPUS_FOLDER, FACTS_FILE
from cluster.errors import RunError, UserError, first_line
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

RUNNING, UNKNOWN = "running", "unknown"


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


def runs_folder() -> Path:
    """Below it each family has a folder with its runs' folders."""
    return home() / "runs"


def last_run(family: str) -> Run:
    """The run that ``--resume`` continues, as it was saved.

    Raises:
        UserError: the family has none.
    """
    states = sorted((runs_folder() / family).glob(f"*/{STATE_FILE}"))
    if not states:
        raise UserError(f"--resume: family {family!r} has no run under {runs_folder()}; start one without --resume")
    return saved(states[-1].parent)


def run_of(name: str) -> Run:
    """A run by its name or its folder, to be resumed on the text that it has read.

    Raises:
        UserError: there is none.
    """
    folder = find_run(name)
    # One that was ended before it had read all of its text has to read it again.
    return saved(folder, text_is_kept=(folder / CORPUS_FOLDER / FACTS_FILE).exists())


def saved(folder: Path, text_is_kept: bool = False) -> Run:
    """A run as it was saved.

    Raises:
        RunError: its state cannot be read.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        return Run(folder=folder, resumed=True, text_is_kept=text_is_kept, **state)
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{folder / STATE_FILE} is damaged, or a later version of Stillhouse wrote it: {first_line(error)}; use "
            f"that version, or start a new run without --resume"
        ) from None


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
        folder = _unused(runs_folder() / spec.name, name)
        hold(folder)
        run = Run(folder, folder.name, training_hash(spec), ds=(ds or date.today()).isoformat(), teacher=teacher)
        (folder / SPEC_FILE).write_text(spec.model_dump_json(indent=1))
        run.save()
        return run
    run = begun or last_run(spec.name)
    hold(run.folder)
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
    for folder in (Path(run), *runs_folder().glob(f"*/{run}")):
        if (folder / STATE_FILE).is_file():
            return folder
    raise UserError(f"{run}: neither a run's folder nor the name of a run under {runs_folder()}")


# -- locks -------------------------------------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    """Lock a run's folder until this process ends, however it ends.

    Raises:
        RunError: another process runs it, which is no mistake, so that a scheduled run is tried again; or another one
            has removed it.
    """
    if folder in _held:
        return
    try:
        file = (folder / LOCK_FILE).open("ab")
    except FileNotFoundError:
        raise RunError(f"{folder.name} has just been removed") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in _TAKEN:
            raise RunError(f"{folder.name} is running; wait for its end, or stop it first") from None
        log.warning("%s: no lock on its file system, so `stillhouse runs` cannot tell that it runs: %s", folder, error)
        return
    if not (folder / LOCK_FILE).exists():
        file.close()
        raise RunError(f"{folder.name} has just been removed")
    _held[folder] = file


def release(folder: Path) -> None:
    """Give back the lock that :func:`hold` took."""
    if (file := _held.pop(folder, None)) is not None:
        file.close()


def lock_state(folder: Path) -> str | None:
    """Whether a process runs it; None where none does, or where it is of before there were locks."""
    if folder in _held:
        return RUNNING
    try:
        file = (folder / LOCK_FILE).open("rb")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return RUNNING if error.errno in _TAKEN else UNKNOWN
    return None


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
