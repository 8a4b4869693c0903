"""The most that a family may hold of a cluster at a time: by its own spec, and by whoever runs the cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.capacity import Need, gib, needs_of, serving_needs_of, totals
from cluster.errors import UserError
from cluster.spec import FamilySpec

# Of the cluster, for every family on it; read where the driver runs.
MAX_CPUS, MAX_GPUS = "STILLHOUSE_MAX_CPUS", "STILLHOUSE_MAX_GPUS"
# What a node for the drivers of families offers, one for each; of one of them the queue takes what a driver leaves.
DRIVER = "driver"
DRIVER_SHARE, QUEUE_SHARE = 0.999, 0.001


@dataclass(frozen=True)
class Most:
    """CPUs, GPUs and bytes of host memory that a family may hold at a time."""

    cpus: float = math.inf
    gpus: float = math.inf
    memory: float = math.inf

    def allows(self, needs: Iterable[Need]) -> bool:
        """Whether all these may be held together."""
        cpus, gpus, memory = totals(needs)
        # A little slack, for tenths do not add up exactly in binary.
        return cpus <= self.cpus + 1e-6 and gpus <= self.gpus + 1e-6 and memory <= self.memory


NO_LIMIT = Most()


def most_allowed(spec: FamilySpec) -> Most:
    """What a family may hold, by its ``limits`` and by the cluster's.

    Raises:
        UserError: it needs more from the start, or at its end to compare the endpoints; or a limit of the cluster's is
            not a number above 0.
    """
    own = {"CPU": spec.limits.cpus, "GPU": spec.limits.gpus}
    cluster = {"CPU": _cap(MAX_CPUS), "GPU": _cap(MAX_GPUS)}
    memory = spec.limits.memory or math.inf
    for needs in (needs_of(spec), serving_needs_of(spec)):
        _check(needs, own, cluster)
        if (needed := totals(needs)[2]) > memory:
            raise UserError(
                f"limits.memory: got {gib(memory)}, and the family needs at least {gib(needed)} at a time "
                f"({'; '.join(map(str, needs))}); raise the limit, or lower micro_batch, ranks, shards or replicas"
            )
    cpus, gpus = (min(own[name] or math.inf, cluster[name] or math.inf) for name in ("CPU", "GPU"))
    return Most(cpus, gpus, memory)


def _check(needs: list[Need], own: dict[str, float | None], cluster: dict[str, float | None]) -> None:
    lower = "lower cpus_per_shard, _rank or _arm (or gpus_per_...), ranks, shards or replicas"
    for name, needed in zip(("CPU", "GPU"), totals(needs)[:2], strict=True):
        field = f"{name.lower()}s"
        all_of_it = f"the family needs at least {needed:g} {name} at a time ({'; '.join(map(str, needs))})"
        if (limit := own[name]) is not None and needed > limit + 1e-6:
            raise UserError(f"limits.{field}: got {limit:g}, and {all_of_it}; raise the limit, or {lower}")
        if (limit := cluster[name]) is not None and needed > limit + 1e-6:
            variable = f"STILLHOUSE_MAX_{field.upper()}"
            raise UserError(
                f"the cluster allows a family {limit:g} {name} ({variable}), and {all_of_it}; {lower}, or ask whoever "
                f"runs the cluster"
            )


def _cap(variable: str) -> float | None:
    """The value of a variable of the cluster's; none where it is not set."""
    if not (given := os.environ.get(variable)):
        return None
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{variable}: got {given!r}; whoever runs the cluster gives a number above 0, or leaves it out")
    return value
