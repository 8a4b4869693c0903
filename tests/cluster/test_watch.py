"""What becomes a curve of the family's own run."""

from cluster.board import FAMILY
from cluster.stream.figures import StreamStats
from cluster.teacher.pool import PoolStats
from cluster.watch import StudentStatus, family_point

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
