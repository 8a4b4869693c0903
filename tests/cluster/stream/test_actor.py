"""What a stream knows of its students, and what it says when it cannot begin; no cluster is needed for either."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from cluster.audit import AUDIT_FOLDER
from cluster.capacity import Need
from cluster.corpus.batches import CORPUS_FOLDER, STARTS_FILE, TOKENS_FILE, CorpusFacts
from cluster.errors import RunError
from cluster.models import TeacherModel
from cluster.spec import FamilySpec
from cluster.stream.actor import Stream
from cluster.stream.figures import Delivery, HeldError
from cluster.teacher.figures import PoolStats
from tests.tiny import VOCABULARY, tiny_family

STUDENT = {"init": {"source": "teacher", "layers": 2}}
LENGTH, SEQUENCES = 32, 400


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, again: bool = False) -> Stream:
    """A stream of two students over a small corpus, as it is first started or after a restart."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(was_current_actor_reconstructed=again))
    corpus = folder / CORPUS_FOLDER
    corpus.mkdir()
    tokens_NS = np.zeros((SEQUENCES, LENGTH), dtype=np.int32)
    np.save(corpus / TOKENS_FILE, tokens_NS)
    np.save(corpus / STARTS_FILE, np.zeros(tokens_NS.shape, dtype=np.bool_))
    CorpusFacts(1, tokens_NS.size, SEQUENCES, "0" * 32).write(corpus)
    spec = FamilySpec.model_validate(tiny_family(students={"a": {**STUDENT, "ranks": 2}, "b": STUDENT}))
    return Stream(spec, str(folder), TeacherModel(spec.teacher.model, VOCABULARY, "aa" * 8, "bb" * 8), None)


def asked(stream: Stream, student: str, rank: int, number: int) -> None:
    """What a rank's call leaves behind."""
    consumer = stream._consumers[student]
    consumer.attach(rank, number, again=True, held=False)


def needing(stream: Stream) -> list[str]:
    return [need.who.removeprefix("student ") for need in stream._student_needs()]


def test_a_student_that_measures_needs_its_place_until_its_task_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch)
    both = needing(stream)
    asyncio.run(stream.detach("a"))
    assert needing(stream) == both
    asyncio.run(stream.done(["a"]))
    assert needing(stream) == [name for name in both if name != "a"]


def test_after_a_restart_every_student_needs_its_place_until_it_is_said_to_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch, again=True)
    assert {"a", "b"} <= set(needing(stream))
    asyncio.run(stream.done(["a"]))
    assert "a" not in needing(stream)
    assert "b" in needing(stream)


def test_the_pool_is_told_what_other_families_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = begun(tmp_path, monkeypatch)
    demand, others = stream._demand(), [Need("the teacher", 2, 1.0, 0.0)]
    assert demand.others() == []
    asyncio.run(stream.beside(others))
    assert demand.others() == others


def test_nothing_is_fetched_before_every_rank_has_said_where_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch)
    asked(stream, "small", 0, 6)
    asked(stream, "b", 0, 3)
    asked(stream, "a", 0, 5)
    assert stream._next_to_fetch() is None
    asked(stream, "a", 1, 4)
    assert stream._next_to_fetch() == 3


def test_after_a_restart_a_rank_is_served_whose_peer_learns_together_with_it_what_it_has_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch, again=True)
    assert stream._next_to_fetch() is None
    asked(stream, "a", 0, 5)
    assert stream._next_to_fetch() == 5
    asked(stream, "b", 0, 3)
    assert stream._next_to_fetch() == 3


def test_a_held_pass_stops_all_ranks_of_a_student_at_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch)
    for rank, number in ((0, 5), (1, 4)):
        asked(stream, "a", rank, number)
    asked(stream, "b", 0, 2)
    for number in range(9):
        stream._window.ready[number] = [None] * stream._spec.blocks_per_batch  # type: ignore[list-item]

    async def learn() -> list[int | str]:
        got: list[int | str] = []
        monkeypatch.setattr(stream, "start", lambda: asyncio.sleep(0))
        await stream.hold()
        for student, rank, number in (("a", 1, 4), ("a", 1, 5), ("a", 0, 5), ("b", 0, 2)):
            try:
                got.append((await stream.next(student, rank, number)).batch.number)
            except HeldError:
                got.append("held")
        await stream.attach("b", 0, 1)
        with pytest.raises(HeldError):
            await stream.next("b", 0, 1)
        return got

    assert asyncio.run(learn()) == [4, "held", "held", "held"]


def restarted_and_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """A stream that was started again, has every batch ready, and is held before any rank has asked it."""
    stream = begun(folder, monkeypatch, again=True)
    monkeypatch.setattr(stream, "start", lambda: asyncio.sleep(0))
    monkeypatch.setattr(stream, "_forget", lambda: None)
    for number in range(stream._batches.count):
        stream._window.ready[number] = [None] * stream._spec.blocks_per_batch  # type: ignore[list-item]
    asyncio.run(stream.hold())
    return stream


async def outcome(call: Awaitable[Delivery]) -> int | str:
    try:
        return (await asyncio.wait_for(call, 5.0)).batch.number
    except HeldError:
        return "held"


def test_a_restarted_stream_that_is_held_stops_a_rank_only_when_it_knows_what_its_peers_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = restarted_and_held(tmp_path, monkeypatch)

    async def learn() -> list[int | str]:
        # Rank 0 has read batch 6 from the stream that died, rank 1 has not.
        behind = asyncio.ensure_future(stream.next("a", 1, 6))
        await asyncio.sleep(0.01)
        assert not behind.done()
        calls = (stream.next("a", 0, 7), behind, stream.next("a", 1, 7))
        return [await outcome(call) for call in calls]

    assert asyncio.run(learn()) == ["held", 6, "held"]


def test_a_rank_that_attaches_again_to_a_held_stream_does_not_take_back_what_its_peer_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = restarted_and_held(tmp_path, monkeypatch)

    async def learn() -> list[int | str]:
        await stream.attach("a", 0, 7, again=True)
        for _ in range(2):
            await stream.attach("a", 1, 6, again=True)
        held = [await outcome(stream.next("a", rank, number)) for rank, number in ((1, 6), (1, 7), (0, 7))]
        # The student is started again: its ranks stop where they start.
        for rank in range(2):
            await stream.attach("a", rank, 4)
        return [*held, *[await outcome(stream.next("a", rank, 4)) for rank in range(2)]]

    assert asyncio.run(learn()) == [6, "held", "held", "held", "held"]


def test_a_rank_gets_the_last_batch_of_a_held_stream_whose_peer_asks_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = restarted_and_held(tmp_path, monkeypatch)
    last = stream._batches.count - 1

    async def learn() -> list[int | str]:
        return [await outcome(stream.next("a", rank, last)) for rank in (1, 0)]

    assert asyncio.run(learn()) == [last, last]


def test_a_hold_while_a_student_starts_again_counts_the_ranks_of_its_new_life_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch)
    monkeypatch.setattr(stream, "start", lambda: asyncio.sleep(0))
    monkeypatch.setattr(stream, "_forget", lambda: None)
    for number in range(stream._batches.count):
        stream._window.ready[number] = [None] * stream._spec.blocks_per_batch  # type: ignore[list-item]

    async def learn() -> list[int | str]:
        for rank in range(2):
            await stream.attach("a", rank, 0)
            for number in range(6):
                await stream.next("a", rank, number)
        # Killed, and begun again at batch 3; rank 0 is the first to be back, and has read a batch before the hold.
        await stream.attach("a", 0, 3)
        await stream.next("a", 0, 3)
        await stream.hold()
        held = [await outcome(stream.next("a", 0, 4))]
        await stream.attach("a", 1, 3)
        return [*held, *[await outcome(stream.next("a", 1, number)) for number in (3, 4)]]

    assert asyncio.run(learn()) == ["held", 3, "held"]


def test_when_no_label_can_be_had_the_pass_is_held_and_every_rank_stops_at_the_same_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch)
    for rank, number in ((0, 5), (1, 4)):
        asked(stream, "a", rank, number)
    asked(stream, "b", 0, 2)
    for number in range(5):
        stream._window.ready[number] = [None] * stream._spec.blocks_per_batch  # type: ignore[list-item]

    class Lost:
        """A teacher that is lost, and no store."""

        async def labels(self, *_: object) -> None:
            raise RunError("the teacher is lost")

        hidden = head = labels

    async def learn() -> list[int | str]:
        got: list[int | str] = []
        monkeypatch.setattr(stream, "start", lambda: asyncio.sleep(0))
        stream._source = Lost()  # type: ignore[assignment]
        # One waits for what cannot be had, one has still to read what its peer has, one is far behind.
        waiting = asyncio.ensure_future(stream.next("a", 0, 5))
        await asyncio.sleep(0)
        await stream._fetch(5)
        for call in (waiting, stream.next("a", 1, 4), stream.next("a", 1, 5), stream.next("b", 0, 2)):
            try:
                got.append((await call).batch.number)
            except HeldError:
                got.append("held")
        # Those that measure do not fail either: they commit what they have learnt.
        for call in (stream.held_out("b", 0, 0), stream.teacher_head()):
            with pytest.raises(HeldError, match="the teacher is lost"):
                await call
        return got

    assert asyncio.run(learn()) == ["held", 4, "held", "held"]
    assert stream._error == "the teacher is lost"


def test_a_measurement_that_finds_the_teacher_lost_holds_the_pass_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = begun(tmp_path, monkeypatch)
    asked(stream, "b", 0, 2)
    monkeypatch.setattr(stream, "start", lambda: asyncio.sleep(0))

    async def lost(*_: object) -> None:
        raise RunError("the teacher is lost")

    async def measure() -> None:
        stream._source = SimpleNamespace(hidden=lost, head=lost)  # type: ignore[assignment]
        with pytest.raises(HeldError):
            await stream.held_out("a", 0, 0)
        with pytest.raises(HeldError):
            await stream.next("b", 0, 2)

    asyncio.run(measure())
    assert stream._error == "the teacher is lost"


@pytest.mark.parametrize(("learns", "error"), [(False, "gone"), (True, None)])
def test_a_pool_that_is_lost_ends_the_run_only_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learns: bool, error: str | None
) -> None:
    stream = begun(tmp_path, monkeypatch)
    monkeypatch.setattr(stream, "start", lambda: asyncio.sleep(0))
    log = SimpleNamespace(counts=dict)
    source = SimpleNamespace(error="gone", log=log, read={}, unsaved=0, replicas=1, stats=PoolStats())
    stream._source = source  # type: ignore[assignment]
    if learns:
        asked(stream, "b", 0, 2)
    assert asyncio.run(stream.stats()).error == error


def test_a_stream_that_cannot_keep_its_log_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = begun(tmp_path, monkeypatch)
    (tmp_path / AUDIT_FOLDER).write_text("in the way")

    async def end() -> str | None:
        stats = await stream.stats()
        await stream.finish()
        await stream.stop()
        return stats.error

    error = asyncio.run(end())
    assert error is not None
    assert str(tmp_path / AUDIT_FOLDER) in error
