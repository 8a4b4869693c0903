"""A driver that waits: what it shows, when it refuses, and a queue that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity import Need
from cluster.errors import NoPlaceError, RunError
from cluster.queue import place as module
from cluster.queue.order import Entry, Place
from cluster.watch import Status

ENTRY = Entry("a", "ann", ((Need("the teacher", 2, 1.5, 1.0), Need("student small", 1, 1.0, 0.0)),))


def told(
    number: int,
    admitted: bool = False,
    settled: bool = True,
    fits: bool = True,
    running: int = 1,
    held: tuple[Need, ...] = (),
) -> Place:
    entry = Entry(ENTRY.key, ENTRY.user, ENTRY.stages, admitted=admitted)
    return Place(entry, number, 3, running, [], settled, fits, list(held))


def wait(monkeypatch: pytest.MonkeyPatch, answers: Iterable[Place | None], patient: bool = True) -> list[Status]:
    """What a driver shows that is told this, once in 10 s."""
    now, left = [0.0], iter(answers)
    seen: list[Status] = []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: now.__setitem__(0, now[0] + 10.0))
    monkeypatch.setattr(module, "time", clock)
    holder: Any = SimpleNamespace(renew=lambda: next(left), trouble="ActorDiedError: it is gone")
    module._wait(holder, patient, seen.append)
    return seen


def test_one_that_finds_room_at_once_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wait(monkeypatch, [told(0, admitted=True)]) == []


def test_one_that_waits_shows_its_place_for_how_long_and_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = wait(monkeypatch, [*[told(2)] * 7, told(1, fits=False), told(1, running=2), told(0, admitted=True)])
    assert (seen[0].phase, seen[0].more) == (
        "queued: place 2 of 3",
        "for 0:00; needs 4 CPU and 2 GPU, beside 1 family running",
    )
    assert seen[6].more.startswith("for 1:00; ")
    assert seen[7].more.endswith("needs 4 CPU and 2 GPU, for which the cluster has too few nodes now")
    assert seen[8].more.endswith("beside 2 families running")


ENDPOINT = Need("endpoint team", 1, 1.5, 0.0, 3 * 2**30)


def test_who_else_holds_the_cluster_is_named_to_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [told(1, fits=False, held=(ENDPOINT,)), told(1, held=(ENDPOINT,)), told(0, admitted=True)]
    beside, too = wait(monkeypatch, answers)
    assert beside.more.endswith(
        "needs 4 CPU and 2 GPU, for which there is no room beside endpoint team (1.5 CPU and 3.0 GiB): end that, or "
        "add nodes"
    )
    assert too.more.endswith("beside 1 family running, and endpoint team (1.5 CPU and 3.0 GiB)")
    with pytest.raises(NoPlaceError, match=r"no room beside endpoint team .*limits\.wait is false"):
        wait(monkeypatch, answers, patient=False)


def test_one_that_would_not_wait_is_refused_and_not_before_the_queue_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([told(1, settled=False), told(1, settled=False), told(1)])
    with pytest.raises(NoPlaceError, match=r"needs 4 CPU and 2 GPU, beside 1 family .*limits.wait is false") as refused:
        wait(monkeypatch, answers, patient=False)
    assert refused.value.exit_code == 1
    assert list(answers) == []
    assert wait(monkeypatch, [told(1, settled=False), told(0, admitted=True)], patient=False)


def test_a_queue_that_does_not_answer_is_given_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    away = int(module.AWAY_S / 10)
    assert len(wait(monkeypatch, [*[None] * away, told(1), *[None] * away, told(0, admitted=True)])) == 1
    with pytest.raises(RunError, match=r"has not answered for 120 s: ActorDiedError: it is gone"):
        wait(monkeypatch, [None] * (away + 2))


def test_an_error_of_the_thread_that_renews_does_not_cost_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.0)
    holder, renewed = module._Holder(ENTRY), threading.Event()
    tries: list[int] = []

    def renew() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise RuntimeError("the table of nodes cannot be read")
        renewed.set()

    monkeypatch.setattr(holder, "renew", renew)
    holder.start()
    try:
        assert renewed.wait(60.0)
    finally:
        holder.leave()
