"""Which arm a request goes to: by weight, and for one caller always the same, with nothing stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping

_POINTS = 2**64


def point(*parts: str) -> float:
    """A number in (0, 1) that depends on nothing but the parts; over many of them it is uniform."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / _POINTS


def choose(weights: Mapping[str, float], unit: str, out: Collection[str] = ()) -> str | None:
    """The arm of a ``unit`` (a user, a session, a key, or a request drawn by itself).

    Weighted rendezvous hashing (Thaler & Ravishankar 1998; weights by Schindelhauer & Schomaker 2005): each arm draws
    an exponential clock of rate ``weight`` from the unit's hash, and the first to ring takes it. So each arm's share
    of the units is its share of the weights; every door comes to the same arm; and when one arm's weight changes, or
    it goes, units move only to or from that arm.

    Args:
        weights: of every arm, finite and 0 or more; an arm of weight 0 is never chosen.
        out: arms that are not to be chosen now.

    Returns:
        The arm, or None where none is left.
    """
    clocks = {
        arm: -math.log(point(unit, arm)) / weight for arm, weight in weights.items() if weight > 0 and arm not in out
    }
    return min(clocks, key=clocks.__getitem__, default=None)
