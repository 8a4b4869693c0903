"""A family's place on a cluster: its driver waits for it in the queue, and holds it until the family has ended."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from cluster.capacity import Need, check_capacity, gib, totals
from cluster.errors import NoPlaceError, RunError, first_line
from cluster.footprint import check_devices, stages_of
from cluster.memory import Estimate
from cluster.queue.actor import queue_actor
from cluster.queue.held import in_words
from cluster.queue.order import Entry, Place
from cluster.queue.user import user
from cluster.session import alive_nodes, job_id
from cluster.spec import FamilySpec
from cluster.watch import Status

log = logging.getLogger(__name__)

# Between two calls of a driver that waits, and of one that has its place: well below what the queue takes for silence.
POLL_S, RENEW_S = 0.5, 3.0
# How long the queue may take for one answer, and be away altogether before a driver that waits gives up.
ANSWER_S, AWAY_S = 10.0, 120.0


@contextlib.contextmanager
def place_for(
    spec: FamilySpec, report: Callable[[Status], None], estimates: Mapping[str, Estimate] | None = None
) -> Iterator[Callable[[], list[Need]]]:
    """Wait until the cluster has room for a family beside those that run; it has its place for the ``with`` block.

    Args:
        spec: with its memory filled in, see :func:`cluster.memory.with_memory`.
        estimates: what of each role lies on a GPU.

    Yields:
        A function that says what the other families need that have a place.

    Raises:
        UserError: the family does not fit on the cluster at all.
        NoPlaceError: the cluster is full, and ``limits.wait`` is false.
        RunError: the cluster's queue cannot be reached.
    """
    stages = stages_of(spec)
    for needs in stages:
        check_capacity(needs, alive_nodes())
    check_devices(spec, estimates or {}, alive_nodes())
    entry = Entry(uuid.uuid4().hex, user(), tuple(map(tuple, stages)), spec.limits.priority, job=job_id())
    holder = _Holder(entry)
    try:
        _wait(holder, spec.limits.wait, report)
        holder.start()
        yield lambda: holder.others
    finally:
        holder.leave()


def _wait(holder: _Holder, patient: bool, report: Callable[[Status], None]) -> None:
    """Come back when the family has been admitted."""
    begun = heard = time.monotonic()
    while True:
        place = holder.renew()
        now = time.monotonic()
        if place is None:
            if now - heard > AWAY_S:
                raise RunError(f"the cluster's queue has not answered for {AWAY_S:g} s: {holder.trouble}; try again")
        else:
            heard = now
            if place.entry.admitted:
                return
            if place.settled and not patient:
                raise NoPlaceError(
                    f"the cluster is full: {_needed(place)}, and limits.wait is false; wait for the others to end, "
                    f"or set limits.wait to true"
                )
            report(Status(f"queued: place {place.number} of {place.waiting}", more=_waited(place, now - begun)))
        time.sleep(POLL_S)


def _waited(place: Place, seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"for {minutes:d}:{rest:02d}; {_needed(place)}"


def _needed(place: Place) -> str:
    cpus, gpus, memory = totals(place.entry.needs)
    needed = f"needs {cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "") + (f" and {gib(memory)}" if memory else "")
    if not place.fits and place.held:
        return f"{needed}, for which there is no room beside {in_words(place.held)}: end that, or add nodes"
    if not place.fits:
        return f"{needed}, for which the cluster has too few nodes now"
    others = f", and {in_words(place.held)}" if place.held else ""
    return f"{needed}, beside {place.running} famil{'y' if place.running == 1 else 'ies'} running{others}"


class _Holder:
    """Speaks with the queue; once started, from a thread of its own, for a driver may be busy for long."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._queue: ActorHandle | None = None
        # Whether the queue has answered before: one that has to be started anew then knows that it has forgotten.
        self._again = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="place in the queue", daemon=True)
        self.others: list[Need] = []
        self.trouble = ""

    def renew(self) -> Place | None:
        """Say that the driver is there; none when the queue does not answer now."""
        try:
            if self._queue is None:
                self._queue = queue_actor(self._again)
            place: Place = ray.get(self._queue.renew.remote(self._entry), timeout=ANSWER_S)
        except (RayError, GetTimeoutError) as error:
            self.trouble, self._queue = first_line(error), None
            log.warning("the cluster's queue does not answer: %s", self.trouble)
            return None
        self._entry, self.others, self._again = place.entry, place.others, True
        return place

    def start(self) -> None:
        """Say so again and again from now on."""
        self._thread.start()

    def _keep(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                self.renew()
            except Exception:
                # The queue would take a thread that ends for a driver that is gone, and give the place to another.
                log.exception("the family's place in the queue was not renewed; it is tried again")

    def leave(self) -> None:
        """Give the place back. When the queue cannot be told, it finds out by itself."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(2 * ANSWER_S)
        if self._queue is None:
            return
        try:
            ray.get(self._queue.leave.remote(self._entry.key), timeout=ANSWER_S)
        except (RayError, GetTimeoutError) as error:
            log.warning("the cluster's queue does not know that the family has ended: %s", first_line(error))
