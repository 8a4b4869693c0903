"""The proof that each batch was scored once and learnt by each student once: a line per event, and the check of it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.corpus.batches import Batches
from cluster.space import when_there_is_room

AUDIT_FOLDER = "audit"
# Not a name that a student may have.
TEACHER = "teacher.scored"


class _Lines:
    """A file of JSON lines, each whole or not there, also when its writer is killed. Any thread may add to it.

    Args:
        patience_s: how long a full disk is waited for at a time.
    """

    def __init__(self, folder: Path, name: str, patience_s: float) -> None:
        self._path, self._patience_s = folder / AUDIT_FOLDER / f"{name}.jsonl", patience_s
        self._whole = threading.Lock()
        self._file = when_there_is_room(folder, self._open, patience_s)
        # The last writer may have been killed in the middle of a line.
        if (size := os.fstat(self._file).st_size) and os.pread(self._file, 1, size - 1) != b"\n":
            self._write(b"\n")

    def _open(self) -> int:
        self._path.parent.mkdir(exist_ok=True)
        return os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def _write(self, line: bytes) -> None:
        """Append bytes; a disk that is nearly full takes them in parts, and nobody else's between them."""
        with self._whole:
            while line:
                write = partial(os.write, self._file, line)
                line = line[when_there_is_room(self._path.parent, write, self._patience_s) :]

    def add(self, facts: dict[str, object]) -> None:
        """Append one line."""
        self._write((json.dumps(facts) + "\n").encode())


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        # What a killed writer left of a line is not an event, though it may be good JSON, such as a number.
        with contextlib.suppress(ValueError):
            if isinstance(facts := json.loads(line), dict):
                yield facts


class ScoringLog:
    """What the teacher scored in a run, over all its sessions.

    Args:
        folder: the run's.
        patience_s: how long a full disk is waited for.
    """

    def __init__(self, folder: Path, patience_s: float) -> None:
        self._lines = _Lines(folder, TEACHER, patience_s)
        self._counts = Counter(scorings_of(folder))

    def add(self, batch: int, address: str) -> None:
        """Say that a batch has been scored.

        Raises:
            NoRoomError: the disk stayed full.
        """
        self._lines.add({"batch": batch, "address": address, "at": time.time()})
        self._counts[batch] += 1

    def counts(self) -> dict[int, int]:
        """How often each batch was scored."""
        return dict(sorted(self._counts.items()))


def scorings_of(folder: Path) -> dict[int, int]:
    """How often each batch of a run was scored, from its folder."""
    counts = Counter(facts["batch"] for facts in _read(folder / AUDIT_FOLDER / f"{TEACHER}.jsonl"))
    return dict(sorted(counts.items()))


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        life: the batch at which this life of the student began; a later life takes back what the ones before it did
            from there on.
        batch: number of the batch.
        address: its content address.
        loss: of the batch, nats per loss token, exact to the bit as hex.
        at: when it was done, in seconds since the epoch.
    """

    life: int
    batch: int
    address: str
    loss: str
    at: float


class AuditLog:
    """Appends a student's steps to its file; rank 0 only.

    Args:
        storage: the run's folder.
        life: the batch that this life begins at.
        patience_s: how long a full disk is waited for.
    """

    def __init__(self, storage: str, student: str, life: int, patience_s: float) -> None:
        self._life, self._lines = life, _Lines(Path(storage), student, patience_s)
        self._lines.add({"life": life, "at": time.time()})

    def step(self, batch: int, address: str, loss: float) -> None:
        """Say that a step has been taken on a batch.

        Raises:
            NoRoomError: the disk stayed full.
        """
        self._lines.add(asdict(Step(self._life, batch, address, loss.hex(), time.time())))


def steps_of(folder: Path, student: str) -> tuple[list[Step], int]:
    """The steps that made the student what it is, and the number of its lives.

    A life that begins at batch b goes on from a commit before b: what earlier lives did from b on is gone.
    """
    kept: list[Step] = []
    lives = 0
    for facts in _read(folder / AUDIT_FOLDER / f"{student}.jsonl"):
        if "batch" not in facts:
            lives += 1
            kept = [step for step in kept if step.batch < facts["life"]]
        else:
            kept.append(Step(**facts))
    return kept, lives


def problems_of(folder: Path, student: str, batches: Batches) -> list[str]:
    """What is wrong with a finished student's audit log; empty when it learnt each batch once, in order."""
    steps, _ = steps_of(folder, student)
    found = []
    numbers = [step.batch for step in steps]
    if missing := sorted(set(range(batches.count)) - set(numbers)):
        found.append(f"never learnt: batches {_shown(missing)}")
    if doubled := sorted({number for number in numbers if numbers.count(number) > 1}):
        found.append(f"learnt more than once: batches {_shown(doubled)}")
    if numbers != sorted(numbers):
        found.append("batches were not learnt in order")
    if others := [step.batch for step in steps if step.address != batches.train(step.batch).address]:
        found.append(f"learnt from other text than the corpus holds: batches {_shown(others)}")
    return found


def _shown(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
