"""The control's deployment: hands out the plan, takes records, and carries out what people and experiments decide."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cluster.errors import StillhouseError, UserError
from serving.arms import check_weights
from serving.control.breaker import Breaker
from serving.control.metrics import Metrics
from serving.control.restored import kept_of, plan_from, plan_with, ramp_from, trial_from
from serving.control.state import State
from serving.control.traffic import Traffic
from serving.control.trials import Trials
from serving.control.turn import Turn, UnderWayError
from serving.control.works import Works
from serving.plan import Plan, Ramp
from serving.records import Record
from serving.spec import EndpointSpec

_TICK_S = 0.5
# Seconds until what could not be kept is tried again.
_KEEP_S = 10.0

logger = logging.getLogger("ray.serve")
Answer = tuple[int, Any]


class Control:
    """One process per endpoint.

    Args:
        routes: of every arm the Serve application that answers for it.
        works: starts and ends what a decision needs: arms, aliases, the judge.
    """

    def __init__(self, spec: EndpointSpec, routes: Mapping[str, str], works: Works) -> None:
        self._spec, self._works = spec, works
        self._state = State(spec.state)
        self._breaker = Breaker(spec.breaker, {name for name, arm in spec.arms.items() if arm.replicas.max == 1})
        self._metrics = Metrics()
        self._loops: list[asyncio.Task[Any]] = []
        self._probed: dict[str, asyncio.Task[None]] = {}
        self._kept, self._kept_at = True, 0.0
        # Of what changes the models behind arms: rolls, and the start of an experiment over them.
        self._changing = Turn()
        before = self._state.traffic()
        plan = plan_from(before, spec, routes, works)
        trial = trial_from(before, spec, plan, self._state)
        plan = plan_with(trial, plan, spec)
        self._traffic = Traffic(plan, ramp_from(before, spec, plan), self._keep)
        self._trials = Trials(self._traffic, works, self._state, self._metrics, self._changing)
        if trial is not None:
            self._trials.restore(trial)
        # Applications that are to go: nobody is sent there any more.
        self._strays = works.strays(plan.routes)
        self._keep()

    async def reconfigure(self, _config: Any) -> None:
        """Serve calls this once the control is made."""
        if not self._loops:
            steps = (
                *(self._go_by_ramps, self._take_out_dead, self._drop_silent, self._probe_those_out),
                *(self._end_strays, self._keep_again),
            )
            # Experiments have a clock of their own: a registry that does not answer must not hold up the breaker.
            self._loops = [asyncio.create_task(self._clock(steps)), asyncio.create_task(self._clock((self._look,)))]

    async def check_health(self) -> None:
        """Serve asks this now and then and replaces a control that raises."""
        for loop in self._loops:
            if loop.done():
                raise RuntimeError("the control's clock has stopped") from loop.exception()

    def __del__(self) -> None:
        """Serve calls this when it ends a replica: what came in since the last time is kept too."""
        trials = getattr(self, "_trials", None)  # `__init__` may have failed
        if trials is not None and (trial := trials.live) is not None:
            trials.keep(trial)

    async def spec(self) -> EndpointSpec:
        """The endpoint as it was started, with models by their versions."""
        return self._spec

    # ---- for the doors ----

    async def plan_after(self, door: str, version: int) -> Plan:
        """The plan, as soon as it is another than ``version``; the same one after a while without a change."""
        return await self._traffic.plan_after(door, version)

    async def announce(self, route: str, address: str) -> None:
        """A process of an arm says where it listens."""
        self._traffic.hear(route, address)

    async def lost(self, address: str) -> None:
        """A door has found nobody there."""
        self._traffic.lose(address)

    async def report(self, records: Sequence[Record]) -> None:
        """Take in what a door has answered."""
        self._metrics.count(records)
        for arm, reason in self._breaker.failing(records).items():
            self._take_out(arm, reason)
        self._trials.observe(records)

    async def do(self, action: str, body: Any) -> Answer:
        """Do what an administrator asks: an HTTP status, and a body or, for an error, a sentence."""
        actions: dict[str, Callable[[Any], Awaitable[Answer]]] = {
            "traffic": self._tell_traffic,
            "set_traffic": self._set_traffic,
            "ramp": self._start_ramp,
            "roll": self._roll,
            "metrics": self._tell_metrics,
            "ab_start": self._start_trial,
            "ab_status": self._tell_trial,
            "ab_stop": self._stop_trial,
            "ab_report": self._report_trial,
        }
        try:
            return await actions[action](body)
        except UnderWayError as error:
            return 409, str(error)
        except UserError as error:
            return 400, str(error)
        except StillhouseError as error:
            logger.error("%s: %s", action, error)
            return 500, str(error)

    # ---- the traffic ----

    async def _tell_traffic(self, _body: Any) -> Answer:
        plan = self._traffic.plan
        facts = {"weights": plan.weights, "shadow": plan.shadow, "out": plan.out, "routes": plan.routes}
        processes = {arm: len(plan.addresses.get(route, ())) for arm, route in plan.routes.items()}
        shown = {name: dict(each) for name, each in facts.items()}
        return 200, {**shown, "processes": processes, "experiment": plan.experiment}

    async def _set_traffic(self, body: Mapping[str, Any]) -> Answer:
        plan = self._traffic.plan
        weights = self._named(body.get("weights", {}), "weights", plan.weights)
        shadow = self._named(body.get("shadow", {}), "shadow", plan.shadow)
        if unknown := sorted(set(body) - {"weights", "shadow"}):
            raise UserError(f"{unknown[0]!r} is not known; allowed: weights, shadow.")
        if weights != plan.weights:
            self._trials.check_free()
        check_weights(weights)
        if any(not 0 <= share <= 1 for share in shadow.values()):
            raise UserError("a shadow's share is out of range; allowed: 0 to 1.")
        if body.get("weights"):
            self._traffic.ramp = None
        await self._traffic.in_force(weights=weights, shadow={arm: share for arm, share in shadow.items() if share})
        return await self._tell_traffic(None)

    def _named(self, given: Any, what: str, now: Mapping[str, float]) -> dict[str, float]:
        """What is given over what holds; every name must be an arm's."""
        if not isinstance(given, dict) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in given.values()
        ):
            raise UserError(f"{what} must be a mapping of arms to numbers.")
        for arm in sorted(given):
            self._check_arm(arm)
        try:
            return {**now, **{arm: float(value) for arm, value in given.items()}}
        except OverflowError:
            raise UserError(f"{what} has a number that is too large.") from None

    async def _start_ramp(self, body: Mapping[str, Any]) -> Answer:
        self._trials.check_free()
        steps = body.get("steps")
        if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) and "weights" in s for s in steps):
            raise UserError("steps must be a list of {after_s, weights}.")
        read = []
        for step in steps:
            after_s = step.get("after_s", 0)
            if isinstance(after_s, bool) or not isinstance(after_s, int | float) or not 0 <= after_s < 1e9:
                raise UserError(f"after_s is {after_s!r}; allowed: seconds, 0 or more.")
            weights = self._named(step["weights"], "weights", self._traffic.plan.weights)
            check_weights(weights)
            read.append((float(after_s), weights))
        self._traffic.ramp = Ramp(time.time(), tuple(sorted(read, key=lambda step: step[0])))
        self._keep()
        await self._go_by_ramps()
        return await self._tell_traffic(None)

    async def _roll(self, body: Mapping[str, Any]) -> Answer:
        arm, source = str(body.get("arm")), body.get("source")
        self._check_arm(arm)
        self._trials.check_free(arm)
        if not isinstance(source, str) or not source:
            raise UserError("source must be models:/NAME@ALIAS, models:/NAME/VERSION or a directory.")
        async with self._changing.take(f"arm {arm!r} is being rolled to {source}"):
            # Once more: what had the turn before may have been the start of an experiment.
            self._trials.check_free(arm)
            old = self._traffic.plan.routes[arm]
            new, pinned = await self._works.start_arm(arm, source)
            try:
                await self._traffic.until_heard(new)
            except BaseException:
                await self._end_arm(new)
                raise
            # From here on every door sends to the new one; the old one goes when it has nothing left to do.
            await self._traffic.move(arm, new, pinned)
            self._breaker.forgive(arm)
            await self._end_arm(old)
            self._trials.note("rolled", f"{arm} is {pinned} now")
        return await self._tell_traffic(None)

    def _check_arm(self, arm: str) -> None:
        routes = self._traffic.plan.routes
        if arm not in routes:
            raise UserError(f"no arm is named {arm!r}; there are: {', '.join(routes)}.")

    async def _end_arm(self, route: str) -> None:
        """End an application. Where that fails, the clock does it."""
        try:
            await self._works.end_arm(route)
        except Exception:
            logger.exception("%s was not ended; it is tried again", route)
            self._strays.append(route)

    async def _tell_metrics(self, _body: Any) -> Answer:
        return 200, self._metrics.text(self._traffic.plan)

    # ---- experiments ----

    async def _start_trial(self, body: Mapping[str, Any]) -> Answer:
        await self._trials.start(body)
        return await self._tell_trial(None)

    async def _tell_trial(self, _body: Any) -> Answer:
        return 200, self._trials.latest().snapshot()

    async def _report_trial(self, _body: Any) -> Answer:
        snapshot = self._trials.latest().snapshot(values=True)
        # Here, and not above: plots take a second to import.
        from serving.experiment.report import render

        return 200, await asyncio.to_thread(render, snapshot)

    async def _stop_trial(self, _body: Any) -> Answer:
        await self._trials.stop()
        return await self._tell_trial(None)

    # ---- the clock ----

    async def _clock(self, steps: Sequence[Callable[[], Awaitable[None]]]) -> None:
        """What happens by itself. A step that fails is tried again at the next turn, and costs no other its turn."""
        while True:
            await asyncio.sleep(_TICK_S)
            for step in steps:
                try:
                    await step()
                except Exception:
                    logger.exception("a turn of the control's clock failed")

    async def _look(self) -> None:
        await self._trials.look()

    async def _take_out_dead(self) -> None:
        for arm, reason in (await self._works.dead_arms(self._traffic.plan.routes)).items():
            self._take_out(arm, reason)

    async def _drop_silent(self) -> None:
        self._traffic.drop_silent()

    async def _end_strays(self) -> None:
        while self._strays:
            logger.warning("%s is ended: nobody is sent there", self._strays[0])
            await self._works.end_arm(self._strays[0])
            del self._strays[0]

    async def _keep_again(self) -> None:
        if not self._kept and time.monotonic() - self._kept_at > _KEEP_S:
            self._keep()

    async def _go_by_ramps(self) -> None:
        now, plan = time.time(), self._traffic.plan
        if (trial := self._trials.under_way) is not None:
            step = trial.ramp.at(now) if trial.ramp is not None and not trial.is_over else None
            if step is not None:
                await self._ramp_to({**plan.weights, **trial.without_lost(step)})
        elif (ramp := self._traffic.ramp) is not None:
            if (step := ramp.at(now)) is not None:
                await self._ramp_to(step)
            if ramp.is_over(now) and self._traffic.ramp is ramp:
                self._traffic.ramp = None
                self._keep()

    async def _ramp_to(self, weights: Mapping[str, float]) -> None:
        if dict(weights) != dict(self._traffic.plan.weights):
            await self._traffic.in_force(weights=dict(weights))
            self._trials.note("weights", ", ".join(f"{arm} {weight:g}" for arm, weight in weights.items()))

    def _take_out(self, arm: str, reason: str) -> None:
        plan = self._traffic.plan
        if arm in plan.routes and arm not in plan.out:
            logger.warning("arm %s is taken out: %s", arm, reason)
            self._traffic.set(out={**plan.out, arm: reason})
            self._trials.note("arm_out", f"{arm}: {reason}")

    async def _probe_those_out(self) -> None:
        plan = self._traffic.plan
        for arm in plan.out:
            if arm not in self._probed or self._probed[arm].done():
                self._probed[arm] = asyncio.create_task(self._probe(arm, plan.routes[arm]))

    async def _probe(self, arm: str, route: str) -> None:
        """Let an arm back in when it answers again."""
        await asyncio.sleep(self._spec.breaker.probe_s)
        if await self._works.answers(route) and self._traffic.plan.routes.get(arm) == route:
            self._breaker.forgive(arm)
            self._traffic.set(out=self._traffic.plan.out_without(arm))
            self._trials.note("arm_in", f"{arm} answers again")

    # ---- what is kept ----

    def _keep(self) -> None:
        """Put the traffic down. It goes on without: what doors go by must not hang on a full disk."""
        trial = self._trials.under_way
        experiment = trial.spec.name if trial is not None else ""
        kept = kept_of(self._spec, self._traffic.plan, self._traffic.ramp, self._works.deployment, experiment)
        self._kept_at = time.monotonic()
        try:
            self._state.keep_traffic(kept)
            self._kept = True
        except StillhouseError:
            self._kept = False
            logger.exception("the traffic was not kept; it is tried again")
