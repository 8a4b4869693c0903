"""A rank's side of the stream: asks for batches, one ahead of what is learnt, and goes on when the stream has died."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import ray
import tenacity
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError

from cluster.heads import OutputHead
from cluster.session import ACTOR_LOST
from cluster.stream.figures import Delivery

log = logging.getLogger(__name__)

R = TypeVar("R")
Read = tuple[Delivery, list[np.ndarray]]

# A stream that was killed is back in seconds; one that takes longer than this has no node to run on.
PATIENCE_S = 600.0


class Reader:
    """Reads one rank's part of a family's stream.

    While a batch is learnt the next one is fetched, so that what the stream and the network take costs the rank
    nothing, as long as it takes less than a step.

    Args:
        batches: how many the pass has.
        patience_s: seconds between the tries of one call after which it is given up. What a try itself takes does not
            count: a rank may have waited for its labels for longer when the stream dies.
    """

    def __init__(
        self, stream: ActorHandle, student: str, rank: int, batches: int, patience_s: float = PATIENCE_S
    ) -> None:
        self._stream, self._student, self._rank = stream, student, rank
        self._batches, self._patience_s = batches, patience_s
        self._coming: Future[Read] | None = None
        # The batch that the rank needs now; what is asked for beyond it is asked ahead.
        self._needed = 0

    def _through(self, work: Callable[[], R], again: Callable[[], None]) -> R:
        """Do some work; each time that an actor or an object it needs has died, ``again`` and then once more."""
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((*ACTOR_LOST, ObjectLostError)),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=10.0),
            stop=lambda state: state.idle_for >= self._patience_s,
            reraise=True,
        ):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    log.warning("%s rank %d asks the stream again", self._student, self._rank)
                    again()
                return work()
        raise AssertionError("tenacity returns or raises")

    def attach(self, number: int) -> None:
        """Say which batch this rank asks for first."""
        self._coming = None
        self._through(lambda: ray.get(self._stream.attach.remote(self._student, self._rank, number)), _nothing)

    def next(self, number: int) -> Read:
        """Batch ``number`` and its label blocks, waiting until they are there; the batch after it is asked for.

        Raises:
            RunError: the teacher is lost for good.
            HeldError: the pass is held before this batch, for every rank of the student.
            RayError: the stream did not come back.
        """
        coming, self._coming, self._needed = self._coming, None, number
        if coming is None:
            found = self._read(number)
        else:
            if not coming.done():
                self._stream.waits.remote(self._student, self._rank, number)
            found = coming.result()
        if number + 1 < self._batches:
            self._coming = Future()
            # A thread that nobody waits for, unlike an executor's: a rank that fails must be able to end.
            threading.Thread(target=self._read_ahead, args=(self._coming, number + 1), daemon=True).start()
        return found

    def _read_ahead(self, coming: Future[Read], number: int) -> None:
        try:
            coming.set_result(self._read(number))
        except BaseException as error:
            coming.set_exception(error)

    def _read(self, number: int) -> Read:
        def read() -> Read:
            ahead = number > self._needed
            delivery = ray.get(self._stream.next.remote(self._student, self._rank, number, ahead))
            return delivery, self._blocks(delivery, held_out=False)

        def again() -> None:
            # A stream that was restarted knows nobody.
            ray.get(self._stream.attach.remote(self._student, self._rank, number, again=True))

        return self._through(read, again)

    def _blocks(self, delivery: Delivery, held_out: bool) -> list[np.ndarray]:
        try:
            blocks: list[np.ndarray] = ray.get(delivery.labels)
        except ObjectLostError:
            ray.get(self._stream.lost.remote(delivery.batch.number, delivery.labels, held_out))
            raise
        return blocks

    def held_out(self, number: int) -> Read:
        """Held-out batch ``number`` with the teacher's hidden states."""

        def read() -> Read:
            delivery = ray.get(self._stream.held_out.remote(self._student, self._rank, number))
            return delivery, self._blocks(delivery, held_out=True)

        return self._through(read, _nothing)

    def teacher_head(self) -> OutputHead[np.ndarray]:
        """The teacher's head, cut to the vocabulary; its arrays are read-only."""
        return self._through(lambda: ray.get(self._stream.teacher_head.remote()), _nothing)

    def detach(self) -> None:
        """This student needs nothing more."""
        self._through(lambda: ray.get(self._stream.detach.remote(self._student)), _nothing)


def _nothing() -> None:
    pass
