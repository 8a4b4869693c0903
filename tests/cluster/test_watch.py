"""What becomes a curve of the family's own run, and what is said of a stream that is gone."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError

from cluster import watch
from cluster.board import FAMILY, News
from cluster.errors import RunError
from cluster.stream.figures import StreamStats
from cluster.teacher.figures import PoolStats
from cluster.watch import StudentStatus, Watch, family_point

STATS = StreamStats(
    total=10,
    scored={0: 1},
    read={},
    delivered={"fast": 7, "slow": 3},
    waiting=["fast"],
    waited_s={"fast": 1.5, "slow": 0.0},
    blocked_by=None,
    behind={"fast": 0, "slow": 4},
    window_used=3,
    unsaved=2,
    pool=PoolStats(ready=2),
    error=None,
)


def test_the_family_s_point_shows_the_pool_the_stream_and_every_student() -> None:
    students = {name: StudentStatus("training", batch, {}, 0.0) for name, batch in (("fast", 7), ("slow", 3))}
    point = family_point(students, STATS)
    assert (point.student, point.batch) == (FAMILY, 7)
    assert point.metrics == {
        "teacher/replicas_ready": 2,
        "stream/window_used": 3,
        "stream/unsaved": 2,
        "stream/behind/fast": 0,
        "stream/behind/slow": 4,
        "stream/waited_s/fast": 1.5,
        "stream/waited_s/slow": 0.0,
    }


class Answers:
    """Two actors of which one answers: the board always, the stream with what it is told to."""

    stream: StreamStats | Exception = STATS

    def get(self, ref: str, timeout: float | None = None) -> Any:
        if ref == "board":
            return News([], "process", {}, "")
        if isinstance(self.stream, Exception):
            raise self.stream
        return self.stream


@pytest.mark.parametrize("error", [ActorDiedError(), OutOfMemoryError("killed"), GetTimeoutError("no answer")])
def test_a_stream_that_stays_away_ends_the_run_and_one_that_comes_back_does_not(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    now = [0.0]
    answers = Answers()
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray, "get", answers.get)
    stream: Any = SimpleNamespace(stats=SimpleNamespace(remote=lambda: "stream"))
    board: Any = SimpleNamespace(
        since=SimpleNamespace(remote=lambda _: "board"), post=SimpleNamespace(remote=lambda _: None)
    )
    looking = Watch(stream, board, ["fast", "slow"], patience_s=100.0)
    for away_s in (0.0, 500.0, 699.0):
        answers.stream = STATS
        assert looking.look("distilling").stats == STATS
        answers.stream = error
        now[0] += away_s
        # What it said last is still shown.
        assert looking.look("distilling").stats == STATS
    now[0] += 2.0
    with pytest.raises(RunError, match=r"the stream has not answered for 701 s: .*--resume"):
        looking.look("distilling")
