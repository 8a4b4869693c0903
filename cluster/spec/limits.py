"""The spec of what a family may take from a cluster that it shares with others."""

from __future__ import annotations

from pydantic import PositiveFloat

from cluster.spec.base import Bytes, Section


class LimitsSpec(Section):
    """How much of a shared cluster the family may hold, and how it waits for its place."""

    cpus: PositiveFloat | None = None
    """CPUs that teacher and students may hold together; none means all. A teacher with a range of replicas does not
    grow past it, and a family that needs more from the start is refused. One CPU may always read the corpus."""
    gpus: PositiveFloat | None = None
    """GPUs that they may hold together; none means all."""
    memory: Bytes | None = None
    """Host memory that they may hold together, by their estimates, such as 24GiB; none means all. A family that needs
    more from the start is refused."""
    priority: int = 0
    """Of the families that wait for a place, those with a higher one go first."""
    wait: bool = True
    """Wait in the cluster's queue while other families hold what this one needs; false refuses it at once."""
