"""The single pass with a real teacher and plain readers in place of students."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.actor import ActorHandle

from cluster.corpus.batches import CORPUS_FOLDER
from cluster.corpus.prepare import prepare_corpus
from cluster.labels.wire import decode
from cluster.models import TeacherModel
from cluster.session import give_back_places
from cluster.specfile import load_spec
from cluster.stream.actor import Stream
from cluster.stream.figures import Delivery, StreamStats
from cluster.stream.reader import Reader
from cluster.stream.window import READ_AHEAD
from tests.processes import own_processes
from tests.tiny import VOCABULARY, write_family

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]
RANKS = {"a": 1, "b": 2, "c": 2}
WINDOW = 3
BATCHES = 12


@pytest.fixture(scope="module")
def corpus(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    student = {"init": {"source": "teacher", "layers": 2}}
    path = write_family(
        tmp_path_factory.mktemp("stream"),
        tiny,
        corpus={"max_batches": BATCHES},
        stream={"window": WINDOW},
        students={name: {**student, "ranks": ranks} for name, ranks in RANKS.items()},
    )
    spec = load_spec(path)
    folder = tmp_path_factory.mktemp("run")
    prepare_corpus(spec.corpus, spec.teacher.model, folder / CORPUS_FOLDER)
    return spec, folder


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Where labels are kept, for the tests that ask for it."""
    return str(tmp_path / "labels") if getattr(request, "param", False) else None


with_store = pytest.mark.parametrize("store", [True], indirect=True)


@contextmanager
def running_stream(corpus: Any, folder: Path, store: str | None) -> Iterator[ActorHandle]:
    """A stream over a run's folder of its own."""
    spec, run = corpus
    (folder / CORPUS_FOLDER).symlink_to(run / CORPUS_FOLDER)
    teacher = TeacherModel(spec.teacher.model, VOCABULARY, "aa" * 8, "bb" * 8, packing="exact")
    options = {"num_cpus": 0, "max_concurrency": 100, "max_restarts": 3}
    actor = ray.remote(Stream).options(**options).remote(spec, str(folder), teacher, store)
    ray.get(actor.start.remote())
    yield actor
    ray.get(actor.stop.remote())
    ray.kill(actor)
    give_back_places()  # of one that a test has killed; Ray keeps them for as long as this process lives


@pytest.fixture
def stream(corpus: Any, tmp_path: Path, store: str | None) -> Iterator[ActorHandle]:
    """A test's own; without a store unless a test asks for one."""
    with running_stream(corpus, tmp_path, store) as stream:
        yield stream


@ray.remote(num_cpus=0)
def read(stream: ActorHandle, student: str, rank: int, first: int, last: int, pause: float = 0.0) -> list[Any]:
    """Read batches as a rank does; returns (number, tokens, ids) of each."""
    ray.get(stream.attach.remote(student, rank, first))
    seen = []
    for number in range(first, last):
        delivery: Delivery = ray.get(stream.next.remote(student, rank, number))
        blocks = ray.get(delivery.labels)
        ids = np.concatenate([decode(block)[0].ids_TK for block in blocks])
        seen.append((delivery.batch.number, delivery.batch.tokens_BS, ids))
        time.sleep(pause)
    return seen


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def everyone(stream: ActorHandle, pause: dict[str, float] | None = None) -> dict[tuple[str, int], list[Any]]:
    tasks = {
        (student, rank): read.remote(stream, student, rank, 0, BATCHES, (pause or {}).get(student, 0.0))
        for student, ranks in RANKS.items()
        for rank in range(ranks)
    }
    return {key: ray.get(task) for key, task in tasks.items()}


@dataclass(frozen=True)
class WholePass:
    """A stream that everyone has read to its end, and what was seen of it before, during and after."""

    stream: ActorHandle
    before: StreamStats
    """Once the teacher was ready, and one of the students had not attached yet."""
    seen: dict[tuple[str, int], list[Any]]
    after: StreamStats


@pytest.fixture(scope="module")
def whole_pass(corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholePass]:
    """Shared by the tests that need no more of a stream than this; a student may read again what has been read."""
    with running_stream(corpus, tmp_path_factory.mktemp("whole"), None) as stream:
        ray.get(stream.attach.remote("a", 0, 0))
        until(lambda: ray.get(stream.stats.remote()).pool.ready == 1)
        time.sleep(1)
        before = ray.get(stream.stats.remote())
        seen = everyone(stream)
        yield WholePass(stream, before, seen, ray.get(stream.stats.remote()))


def test_nothing_is_scored_before_all_students_have_said_where_they_start(whole_pass: WholePass) -> None:
    assert whole_pass.before.scored == {}


def test_every_student_sees_every_batch_once_in_order_and_the_teacher_scores_it_once(whole_pass: WholePass) -> None:
    seen = whole_pass.seen
    for batches in seen.values():
        assert [number for number, *_ in batches] == list(range(BATCHES))
    for number in range(BATCHES):
        _, whole_tokens, whole_ids = seen["a", 0][number]
        for student in ("b", "c"):
            tokens = np.concatenate([seen[student, rank][number][1] for rank in range(2)])
            ids = np.concatenate([seen[student, rank][number][2] for rank in range(2)])
            np.testing.assert_array_equal(tokens, whole_tokens)
            np.testing.assert_array_equal(ids, whole_ids)
    assert whole_pass.after.scored == dict.fromkeys(range(BATCHES), 1)
    assert whole_pass.after.delivered == dict.fromkeys(RANKS, BATCHES)


def test_a_restarted_student_gets_its_batches_again_and_they_are_the_same(whole_pass: WholePass) -> None:
    again = ray.get(read.remote(whole_pass.stream, "a", 0, 4, 8))
    assert [number for number, *_ in again] == [4, 5, 6, 7]
    for (_, tokens, ids), (_, old_tokens, old_ids) in zip(again, whole_pass.seen["a", 0][4:8], strict=True):
        np.testing.assert_array_equal(tokens, old_tokens)
        np.testing.assert_array_equal(ids, old_ids)
    scored = ray.get(whole_pass.stream.stats.remote()).scored
    # Student a reads on at 8, so the teacher may have begun with the batches after.
    assert {n: c for n, c in scored.items() if c != 1 and n < 8} == {4: 2, 5: 2, 6: 2, 7: 2}


def test_a_batch_out_of_turn_is_refused(whole_pass: WholePass) -> None:
    ray.get(whole_pass.stream.attach.remote("b", 0, 0))
    with pytest.raises(ray.exceptions.RayTaskError, match="asked for batch 5, its next is 0"):
        ray.get(whole_pass.stream.next.remote("b", 0, 5))


def test_held_out_batches_are_scored_once_for_all_students(whole_pass: WholePass) -> None:
    stream = whole_pass.stream
    first = ray.get(stream.held_out.remote("a", 0, 0))
    halves = [ray.get(stream.held_out.remote("b", rank, 0)) for rank in range(2)]
    assert first.labels == [ref for half in halves for ref in half.labels]
    np.testing.assert_array_equal(np.concatenate([h.batch.tokens_BS for h in halves]), first.batch.tokens_BS)


def test_the_window_bounds_how_far_the_teacher_runs_ahead_of_the_slowest(stream: ActorHandle) -> None:
    for student, ranks in RANKS.items():
        for rank in range(ranks):
            ray.get(stream.attach.remote(student, rank, 0))
    until(lambda: ray.get(stream.stats.remote()).window_used == WINDOW)
    fast = [read.remote(stream, s, r, 0, WINDOW) for s in ("a", "b") for r in range(RANKS[s])]
    ray.get(fast)
    time.sleep(1)
    stats = ray.get(stream.stats.remote())
    assert sorted(stats.scored) == list(range(WINDOW))  # c has read nothing, so no batch beyond its window was scored
    assert stats.blocked_by == "c"
    ray.get(stream.detach.remote("c"))
    ray.get([read.remote(stream, s, r, WINDOW, BATCHES) for s in ("a", "b") for r in range(RANKS[s])])
    assert sorted(ray.get(stream.stats.remote()).scored) == list(range(BATCHES))


def test_a_call_from_a_rank_that_has_died_does_not_move_its_successor(stream: ActorHandle) -> None:
    for student, ranks in RANKS.items():
        for rank in range(ranks):
            ray.get(stream.attach.remote(student, rank, 0))
    for number in range(WINDOW):
        ray.get(stream.next.remote("a", 0, number))
    ghost = stream.next.remote("a", 0, WINDOW)  # b and c have read nothing, so this one has to wait
    time.sleep(0.5)
    ray.get(stream.attach.remote("a", 0, 1))
    with pytest.raises(ray.exceptions.RayTaskError, match="has been started again"):
        ray.get(ghost)
    assert ray.get(stream.next.remote("a", 0, 1)).batch.number == 1


def test_the_next_batch_is_fetched_while_one_is_learnt_and_only_who_has_none_waits(stream: ActorHandle) -> None:
    readers = [Reader(stream, s, r, BATCHES) for s, ranks in RANKS.items() for r in range(ranks)]
    for reader in readers:
        reader.attach(0)
    a = readers[0]
    a.next(0)
    until(lambda: ray.get(stream.stats.remote()).delivered["a"] == 2)
    a.next(1)
    a.next(2)
    # b and c have read nothing, so the one after the window cannot come. It has been asked for, and is not needed yet.
    time.sleep(1)
    stats = ray.get(stream.stats.remote())
    assert (stats.delivered["a"], stats.waiting) == (WINDOW, [])
    with ThreadPoolExecutor(1) as threads:
        needed = threads.submit(a.next, WINDOW)
        until(lambda: ray.get(stream.stats.remote()).waiting == ["a"])
        for student in ("b", "c"):
            ray.get(stream.detach.remote(student))
        assert needed.result()[0].batch.number == WINDOW
    stats = ray.get(stream.stats.remote())
    assert stats.waiting == []
    assert stats.waited_s["a"] > 0


@with_store
def test_with_a_store_a_laggard_holds_nobody_back_and_reads_what_was_kept(stream: ActorHandle) -> None:
    for rank in range(RANKS["c"]):
        ray.get(stream.attach.remote("c", rank, 0))
    fast = {(s, r): read.remote(stream, s, r, 0, BATCHES) for s in ("a", "b") for r in range(RANKS[s])}
    first = ray.get(fast["a", 0])
    ray.get(list(fast.values()))
    stats = ray.get(stream.stats.remote())
    assert stats.scored == dict.fromkeys(range(BATCHES), 1)
    assert stats.behind == {"a": 0, "b": 0, "c": BATCHES}
    assert stats.blocked_by is None
    assert stats.window_used <= WINDOW + 3 * (READ_AHEAD + 1)
    late = ray.get([read.remote(stream, "c", rank, 0, BATCHES) for rank in range(2)])
    for number in range(BATCHES):
        ids = np.concatenate([late[rank][number][2] for rank in range(2)])
        np.testing.assert_array_equal(ids, first[number][2])
    stats = ray.get(stream.stats.remote())
    assert stats.scored == dict.fromkeys(range(BATCHES), 1)
    assert stats.read


@with_store
def test_a_killed_stream_comes_back_and_its_readers_do_not_notice(stream: ActorHandle, corpus: Any) -> None:
    reader = Reader(stream, "a", 0, BATCHES)
    reader.attach(0)
    for student, ranks in RANKS.items():
        for rank in range(ranks):
            Reader(stream, student, rank, BATCHES).attach(0)
    before = [reader.next(number)[1][0] for number in range(2)]
    # A batch is handed on before the store has taken it; one that it has not would rightly be scored again.
    deadline = time.monotonic() + 20
    while ray.get(stream.stats.remote()).unsaved:
        assert time.monotonic() < deadline, "the store takes nothing"
        time.sleep(0.02)
    # The youngest is this test's own; the one of the whole pass may be alive too.
    max(own_processes("Stream"), key=lambda process: process.create_time()).kill()
    after = [reader.next(number)[1][0] for number in range(2, 5)]
    again = Reader(stream, "a", 0, BATCHES)
    again.attach(0)
    for number, block in enumerate((*before, *after)):
        np.testing.assert_array_equal(block, again.next(number)[1][0])
    # What was scored before is in the store and in the log.
    scored = ray.get(stream.stats.remote()).scored
    assert (scored[0], scored[1]) == (1, 1)
