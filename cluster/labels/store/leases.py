"""Leases: what a run that is under way still needs, so that nothing removes it under the run's hands."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.labels.store.buckets import Bucket
from cluster.labels.store.objects import LEASES, json_key

log = logging.getLogger(__name__)

LIVE_S = 900.0
"""Seconds for which a lease counts after it was last renewed. Renew it three times as often."""


class LeaseFile(BaseModel):
    """What a lease says.

    Attributes:
        renewed: when, by the holder's clock, in seconds since 1970.
        prefixes: beginnings of the keys that it protects.
    """

    model_config = ConfigDict(frozen=True)

    holder: str
    renewed: float
    prefixes: tuple[str, ...]


class Lease:
    """A hold on all keys with some prefixes; it counts for :data:`LIVE_S` from now and from each renewal.

    Args:
        holder: who holds it, such as a run's name. A second lease of one holder takes the first one's place.
    """

    def __init__(self, bucket: Bucket, holder: str, prefixes: Sequence[str]) -> None:
        self._bucket, self._holder, self._prefixes = bucket, holder, tuple(prefixes)
        self._key = json_key(LEASES, holder)
        self.renew()

    def renew(self) -> None:
        """Hold on for another :data:`LIVE_S`."""
        file = LeaseFile(holder=self._holder, renewed=time.time(), prefixes=self._prefixes)
        self._bucket.replace(self._key, file.model_dump_json().encode())

    def release(self) -> None:
        """Let go now."""
        self._bucket.delete(self._key)


def live_prefixes(bucket: Bucket, now: float) -> tuple[str, ...]:
    """What live leases protect.

    A lease is live when either clock says so, the bucket's at its last write or its holder's in the file: a holder
    whose clock is wrong loses nothing, and one that is dead cannot say that it will live for ever.

    Args:
        now: the bucket's clock.
    """
    live: list[str] = []
    for entry in bucket.list(LEASES):
        data = bucket.get(entry.key)
        if data is None:
            continue  # released since it was listed
        try:
            file = LeaseFile.model_validate_json(data)
        except ValidationError:
            # Who wrote it may need anything.
            log.warning("lease %s cannot be read; it counts for everything until it is old", entry.key)
            file = LeaseFile(holder=entry.key, renewed=entry.modified, prefixes=("",))
        if min(abs(now - entry.modified), abs(now - file.renewed)) < LIVE_S:
            live += file.prefixes
    return tuple(live)
