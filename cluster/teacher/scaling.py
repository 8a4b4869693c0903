"""When a pool of replicas grows and when it shrinks: what was seen goes in, a decision comes out, no Ray.

The rule. Over the last ``grow_s`` seconds, every replica was busy while a student waited for more than ``grow_share``
of the time: one more. At no moment of the last ``idle_s`` seconds were all replicas busy at once, so one fewer would
have done the same work: one less. Each change begins both spans anew, so a pool never turns around faster than they
allow. A replica that took long to start is kept idle for as long as it took, for to have it back would cost as much.

Students come first. When a node is gone or another family has come, and for ``grow_s`` seconds the students and what
other families need have not all fitted on the cluster beside the pool, it gives up a replica, whatever that one does: a
student that has no place cannot learn at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.capacity import Need
from cluster.limits import NO_LIMIT, Most


@dataclass(frozen=True)
class Pace:
    """Time constants of an elastic pool, in seconds (Ray waits for whole ones to place) but for ``grow_share``.

    Attributes:
        look_s: between two looks at the pool.
        grow_s: span over which waiting is measured.
        grow_share: share of it above which the pool grows.
        idle_s: span without need of all replicas after which the pool shrinks.
        place_s: that a new replica's processes may take to be placed; after that there is no room for it now.
        retry_s: before another try after a new replica that did not come up, doubled each time up to ``retry_most_s``.
    """

    look_s: float = 1.0
    grow_s: float = 20.0
    grow_share: float = 0.5
    idle_s: float = 60.0
    place_s: int = 10
    retry_s: float = 10.0
    retry_most_s: float = 300.0


PACE = Pace()


@dataclass(frozen=True)
class Demand:
    """What a pool knows of those it works for.

    Attributes:
        waits: whether a student waits that one more replica could serve.
        students: resources that the students need, also while one of them is being started again.
        resized: called after the pool has become larger or smaller.
        others: resources that other families on the cluster need; the pool never stands in their place.
        most: what pool and students may hold together.
    """

    waits: Callable[[], bool]
    students: Callable[[], list[Need]]
    resized: Callable[[], None]
    others: Callable[[], list[Need]] = list
    most: Most = NO_LIMIT


@dataclass(frozen=True)
class Look:
    """What is seen of a pool at one moment.

    Attributes:
        at: seconds on a clock that only goes forward.
        size: replicas that there should be now; ``ready`` of them can serve.
        contended: all ready replicas are busy and a student waits.
        all_busy_at: the last moment at which all replicas were busy at once.
        start_s: seconds that the slowest replica took to start.
        crowded: the students, or the other families, do not all fit on the cluster beside the pool.
    """

    at: float
    size: int
    ready: int
    contended: bool
    all_busy_at: float
    start_s: float
    crowded: bool


class Scaling:
    """Decides for one pool between ``least`` and ``most`` replicas.

    Args:
        now: the moment from which what is seen counts.
    """

    def __init__(self, least: int, most: int, pace: Pace, now: float) -> None:
        self._least, self._most, self._pace = least, most, pace
        self._looks: deque[tuple[float, bool]] = deque()
        self._since = self._not_before = now
        self._failures, self._failed_at, self._fine_since = 0, float("-inf"), now
        self._crowded_since: float | None = None

    def decide(self, look: Look) -> int:
        """1 to add a replica, -1 to take one away, 0 to leave the pool as it is. What comes of it is to be told."""
        self._looks.append((look.at, look.contended))
        while self._looks[0][0] <= look.at - self._pace.grow_s:
            self._looks.popleft()
        if look.ready < look.size:
            # One is being started again. What is seen now says nothing about the pool at its size.
            self._begin(look.at)
            return 0
        if look.crowded and look.size > self._least:
            self._crowded_since = look.at if self._crowded_since is None else self._crowded_since
            return -1 if look.at - self._crowded_since >= self._pace.grow_s else 0
        self._crowded_since = None
        if look.size < self._most and look.at >= self._not_before and self._waited(look.at):
            return 1
        idle_since = max(look.all_busy_at, self._since)
        patience = max(self._pace.idle_s, look.start_s)
        return -1 if look.size > self._least and not look.contended and look.at - idle_since > patience else 0

    def _waited(self, now: float) -> bool:
        if now - self._since < self._pace.grow_s:
            return False
        return sum(contended for _, contended in self._looks) > self._pace.grow_share * len(self._looks)

    def _begin(self, now: float) -> None:
        self._looks.clear()
        self._since, self._crowded_since = now, None

    def resized(self, now: float) -> None:
        """The pool has become larger, or smaller by one that was not needed."""
        self._begin(now)
        self._fine_since = now

    def no_room(self, now: float) -> None:
        """The cluster had no room for a replica. To ask costs nothing, so it is asked again after the usual span."""
        self._begin(now)

    def failed(self, now: float) -> None:
        """A replica was placed and did not come up, was not like the others, or has died since."""
        self._begin(now)
        # What went wrong before a long time in which all went well says nothing about the nodes that there are now.
        well_s = now - self._fine_since if self._fine_since > self._failed_at else 0.0
        self._failures = 1 if well_s > 2 * self._pace.retry_most_s else self._failures + 1
        self._failed_at = now
        self._not_before = now + min(self._pace.retry_most_s, self._pace.retry_s * 2 ** (self._failures - 1))
