"""What happens to a running endpoint's arms, for the terminal that serves them: killed processes and why, outages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError
from ray.serve.exceptions import RayServeException

from cluster.errors import StillhouseError, death_of, first_line
from serving.launch import LESS_MEMORY, arm_of

# Serve names the actor of a replica by its application, deployment and id.
_REPLICA = "SERVE_REPLICA::"


def dead_actors() -> dict[str, dict[str, Any]]:
    """The actors that have died on the cluster, by id; Ray forgets the oldest. No public function has their cause."""
    found: dict[str, dict[str, Any]] = ray._private.state.state.actor_table(None, actor_state_name="DEAD")
    return found


class ArmWatch:
    """Reports each change once. To be made before the endpoint is deployed: earlier deaths are not its own.

    Args:
        endpoint: its name.
        outages: the arms that get no split traffic now, with the reason.
        dead: see :func:`dead_actors`.
    """

    def __init__(
        self,
        endpoint: str,
        outages: Callable[[], Mapping[str, str]],
        dead: Callable[[], Mapping[str, Mapping[str, Any]]] = dead_actors,
    ) -> None:
        self._endpoint, self._outages, self._dead = endpoint, outages, dead
        # One of the same name may have run on the cluster before.
        self._seen = set(self._dead())
        self._deaths: Counter[str] = Counter()
        self._out: dict[str, str] = {}
        self._trouble = ""

    def look(self) -> Iterator[str]:
        """A line for each process of an arm that was killed or crashed, and for each arm that went or came back."""
        try:
            dead, out = self._dead(), dict(self._outages())
        except (RayError, RayServeException, StillhouseError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            reason = (
                "its control process does not answer, so this machine may be overloaded" if late else first_line(error)
            )
            trouble = f"the state of the arms is not known: {reason}"
            if trouble != self._trouble:
                yield trouble
            self._trouble = trouble
            return
        self._trouble = ""
        new = [key for key in dead if key not in self._seen]
        self._seen = set(dead)
        for key in new:
            if line := self._killed(dead[key]):
                yield line
        yield from (f"arm {arm} is out: {reason}" for arm, reason in out.items() if self._out.get(arm) != reason)
        yield from (f"arm {arm} answers again" for arm in self._out if arm not in out)
        self._out = out

    def _killed(self, actor: Mapping[str, Any]) -> str:
        """What befell a process of an arm; empty for another's, and for one that Serve has ended itself."""
        name = str(actor["Name"])
        which = arm_of(self._endpoint, name.removeprefix(_REPLICA).partition("#")[0])
        if not name.startswith(_REPLICA) or which is None:
            return ""
        cause = actor["DeathCause"]
        if cause.HasField("oom_context"):
            text = cause.oom_context.error_message
        elif cause.HasField("actor_died_error_context"):
            text = str(ActorDiedError(cause.actor_died_error_context))
        else:
            return ""
        if not (death := death_of(text, LESS_MEMORY)):
            return ""
        self._deaths[which[0]] += 1
        often = "" if (times := self._deaths[which[0]]) == 1 else f", {times} times so far"
        return f"arm {which[0]}: {death}; Serve starts it again{often}"
