"""What the stream itself costs: 64 students, a teacher that takes no time, small and large blocks.

Says how many deliveries a second the stream makes when all read as fast as they can, what a step waits for its batch at
a steady pace, and whether the stream's memory stays where it was over an hour's worth of batches (one a second): the
resident bytes, and of those what is allocated, for an allocator keeps pages that nobody holds. The students' readers
fetch a batch ahead, as they do in a run.
``python benchmarks/stream.py``.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import psutil
import ray
from common import ROOT, arguments, hardware, write

from cluster.audit import ScoringLog
from cluster.corpus.batches import CORPUS_FOLDER, STARTS_FILE, TOKENS_FILE, Batch, CorpusFacts
from cluster.models import TeacherModel
from cluster.session import ray_session
from cluster.spec import FamilySpec
from cluster.stream.actor import Stream
from cluster.stream.reader import Reader
from cluster.stream.source import Lost
from cluster.teacher.figures import PoolStats

LENGTH = 8
READERS = 2
PATIENCE_S = 60.0
SIZES = {"64 KB": 64 * 1024, "16 MB": 16 * 1024**2}


class NoTeacher:
    """Stands for the store and the teacher: blocks that are there at once."""

    replicas, unsaved, error = 4, 0, None

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.log, self.read, self.stats = ScoringLog(folder, PATIENCE_S), {}, PoolStats()
        self._block = np.zeros(nbytes, dtype=np.uint8)

    async def labels(self, batch: Batch, saved: Callable[[], None], lost: Lost) -> list[ray.ObjectRef]:
        """A new object for each batch, as a teacher's answer is."""
        self.log.add(batch.number, batch.address)
        return [ray.put(self._block)]

    async def close(self) -> None:
        """Nothing to end."""


class BareStream(Stream):
    """The stream without what it usually waits for."""

    def __init__(self, nbytes: int, *args: Any) -> None:
        super().__init__(*args)
        self._nbytes = nbytes

    async def _start(self) -> None:
        self._source = NoTeacher(self._folder, self._nbytes)  # type: ignore[assignment]
        self._spawn(self._dispatch())

    async def memory(self) -> tuple[int, int]:
        """Resident bytes of this process without what it shares, and bytes that are allocated."""
        info = psutil.Process().memory_info()
        return int(info.rss - info.shared), _allocated()


def _allocated() -> int:
    """Bytes that this process has allocated from the C library: ``uordblks`` and ``hblkhd`` of its ``mallinfo2(3)``."""

    class Heap(ctypes.Structure):  # in here, for it cannot be pickled with the actor
        _fields_: ClassVar = [
            ("before", ctypes.c_size_t * 4),
            ("mapped", ctypes.c_size_t),
            ("between", ctypes.c_size_t * 2),
            ("allocated", ctypes.c_size_t),
            ("after", ctypes.c_size_t * 2),
        ]

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Heap
    heap = mallinfo2()
    return int(heap.allocated + heap.mapped)


@ray.remote(num_cpus=0)
class Students:
    """Some of the students, a thread each: it asks for a batch and its block, and again when the next one's turn is."""

    def __init__(self, stream: Any, names: list[str], batches: int) -> None:
        self._readers = [Reader(stream, name, 0, batches) for name in names]
        self._threads = ThreadPoolExecutor(len(names))

    def attach(self) -> None:
        """Say that all begin at the first batch."""
        list(self._threads.map(lambda reader: reader.attach(0), self._readers))

    def read(self, first: int, last: int, pace_s: float, spread: bool = False) -> list[float]:
        """Milliseconds from asking for a batch to having its block, for every batch and student.

        Args:
            pace_s: a batch's turn comes so long after the one before it; 0 is as fast as they can.
            spread: the students ask one after the other, as those of several sizes do, and not all at one moment.
        """
        begin = time.perf_counter() + 0.5

        def one(place: int) -> list[float]:
            start, took = begin + spread * pace_s * place / len(self._readers), []
            for number in range(first, last):
                if pace_s:
                    time.sleep(max(0.0, start + (number - first) * pace_s - time.perf_counter()))
                started = time.perf_counter()
                self._readers[place].next(number)
                took.append(1000 * (time.perf_counter() - started))
            return took

        return [wait for each in self._threads.map(one, range(len(self._readers))) for wait in each]


def family(students: int, batches: int) -> FamilySpec:
    """A spec with as many students as are asked for; nothing in it is ever loaded."""
    student = {"init": {"source": "teacher", "layers": 1}}
    return FamilySpec.model_validate(
        {
            "name": "bench",
            "teacher": {"model": "none"},
            "corpus": {"paths": ["none"], "sequence_length": LENGTH, "batch_sequences": 1, "max_batches": batches},
            "students": {f"s{i}": student for i in range(students)},
            "evaluation": {"batches": 1},
        }
    )


def write_corpus(folder: Path, sequences: int) -> None:
    """Packed sequences of nothing in particular."""
    (folder / CORPUS_FOLDER).mkdir()
    tokens_NS = np.arange(sequences * LENGTH, dtype=np.int32).reshape(sequences, LENGTH)
    np.save(folder / CORPUS_FOLDER / TOKENS_FILE, tokens_NS)
    np.save(folder / CORPUS_FOLDER / STARTS_FILE, np.zeros(tokens_NS.shape, dtype=np.bool_))
    CorpusFacts(1, tokens_NS.size, sequences, "0" * 32).write(folder / CORPUS_FOLDER)


def measure(nbytes: int, students: int, fast: int, paced: int, pace_s: float) -> dict[str, Any]:
    """Deliveries a second, milliseconds that are added, and memory, for blocks of a size."""
    with tempfile.TemporaryDirectory() as name:
        folder, batches = Path(name), fast + 2 * paced
        write_corpus(folder, 2 * batches)
        spec, teacher = family(students, batches), TeacherModel("none", 300, "0" * 16, "0" * 16)
        options = {"num_cpus": 0, "max_concurrency": 1000}
        stream = ray.remote(BareStream).options(**options).remote(nbytes, spec, str(folder), teacher, None)
        names = list(spec.students)
        readers = [Students.remote(stream, names[i::READERS], batches) for i in range(READERS)]
        ray.get([reader.attach.remote() for reader in readers])
        at_once = ray.get([reader.read.remote(0, paced, pace_s) for reader in readers])
        spread = ray.get([reader.read.remote(paced, 2 * paced, pace_s, True) for reader in readers])
        memory = [ray.get(stream.memory.remote())]
        started = time.perf_counter()
        for part in range(10):
            span = 2 * paced + part * fast // 10, 2 * paced + (part + 1) * fast // 10
            ray.get([reader.read.remote(*span, 0.0) for reader in readers])
            memory.append(ray.get(stream.memory.remote()))
        took = time.perf_counter() - started
        used = ray.get(stream.stats.remote()).window_used
        ray.kill(stream)
    return {
        "deliveries_per_s": fast * students / took,
        "batches_per_s": fast / took,
        **_added("spread", spread),
        **_added("at_once", at_once),
        "resident_mb": [round(resident / 1e6, 1) for resident, _ in memory],
        "allocated_mb": [round(allocated / 1e6, 1) for _, allocated in memory],
        "window_used": used,
    }


def _added(name: str, waits: list[list[float]]) -> dict[str, float]:
    added = sorted(wait for each in waits for wait in each)
    return {f"{name}_ms_p50": statistics.median(added), f"{name}_ms_p99": added[int(0.99 * len(added))]}


def main() -> None:
    """Measure both sizes, print one table."""
    parser = arguments(__doc__.splitlines()[0], threads=False)
    parser.add_argument("--students", type=int, default=64)
    parser.add_argument("--batches", type=int, default=3600, help="small batches that are read as fast as can be")
    parser.add_argument("--pace", type=float, default=1.0, help="seconds between two batches of a steady pass")
    given = parser.parse_args()
    figures = {}
    os.environ["PYTHONPATH"] = str(ROOT)  # for the actors
    with ray_session():
        for name, nbytes in SIZES.items():
            fast = given.batches if nbytes < 2**20 else max(10, given.batches // 18)
            found = figures[name] = measure(nbytes, given.students, fast, 20, given.pace)
            print(
                f"{name}: {found['batches_per_s']:.1f} batches/s to {given.students} students, adds "
                f"{found['spread_ms_p50']:.2f} ms (p99 {found['spread_ms_p99']:.2f}), where all ask at one moment "
                f"{found['at_once_ms_p50']:.2f} ms (p99 {found['at_once_ms_p99']:.2f}); window {found['window_used']}; "
                f"memory after each tenth of {fast} batches, MB: resident {found['resident_mb']}, "
                f"allocated {found['allocated_mb']}"
            )
    print(hardware())
    write(given.out, "stream", {"students": given.students, **figures})


if __name__ == "__main__":
    main()
