"""The control's deployment: hands out the plan, takes records, and carries out what people and experiments decide."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import RunError, StillhouseError, UserError
from serving.arms import check_weights
from serving.control.addresses import SILENT_S, Addresses
from serving.control.breaker import Breaker
from serving.control.metrics import Metrics
from serving.control.state import State
from serving.control.trial import Trial
from serving.control.works import Works
from serving.experiment import Decision, Experiment
from serving.experiment.spec import parse_experiment
from serving.plan import Plan, Ramp
from serving.records import Record
from serving.spec import EndpointSpec

_TICK_S = 0.5
# How long a door may wait for a new plan before it is told that there is none, and how long after its last question a
# door counts as gone.
_PATIENCE_S = 10.0
_DOOR_GONE_S = 15.0
_KEEP_S = 10.0
# Seconds after its start in which a control waits for arms to say where they are; they do so each second.
_SETTLE_S = 4.0

logger = logging.getLogger("ray.serve")
Answer = tuple[int, Any]


@dataclass
class _Seen:
    """What is known of a door: the plan it goes by, and when it last said so."""

    version: int
    at: float


class Control:
    """One process per endpoint.

    Args:
        routes: of every arm the Serve application that answers for it.
        works: starts and ends what a decision needs: arms, aliases, the judge.
    """

    # Of the class, for `__del__` is also called where `__init__` has failed.
    _trial: Trial | None = None

    def __init__(self, spec: EndpointSpec, routes: Mapping[str, str], works: Works) -> None:
        self._spec, self._works = spec, works
        self._state = State(spec.state)
        self._breaker = Breaker(spec.breaker, {name for name, arm in spec.arms.items() if arm.replicas.max == 1})
        self._metrics = Metrics()
        self._doors: dict[str, _Seen] = {}
        self._addresses = Addresses()
        self._changed = asyncio.Event()
        self._ramp: Ramp | None = None
        self._loops: list[asyncio.Task[Any]] = []
        self._probed: dict[str, asyncio.Task[None]] = {}
        self._kept_at = 0.0
        self._begun = time.monotonic()
        # A roll may have moved an arm since the doors were told of the first routes.
        routes = {**routes, **{arm: route for arm, route in works.routes().items() if arm in routes}}
        # Above every version that an earlier control has given.
        self._plan = Plan(time.time_ns() // 1000, dict(spec.weights), routes, shadow=dict(spec.shadow))
        self._restore()

    async def reconfigure(self, _config: Any) -> None:
        """Serve calls this once the control is made."""
        if not self._loops:
            self._loops = [asyncio.create_task(self._tick())]

    async def check_health(self) -> None:
        """Serve asks this now and then and replaces a control that raises."""
        for loop in self._loops:
            if loop.done():
                raise RuntimeError("the control's clock has stopped") from loop.exception()

    def __del__(self) -> None:
        """Serve calls this when it ends a replica: what came in since the last time is kept too."""
        if self._trial is not None and not self._trial.is_over:
            self._keep_trial()

    async def spec(self) -> EndpointSpec:
        """The endpoint as it was started, with models by their versions."""
        return self._spec

    # ---- for the doors ----

    async def plan_after(self, door: str, version: int) -> Plan:
        """The plan, as soon as it is another than ``version``; the same one after a while without a change."""
        self._doors[door] = _Seen(version, time.monotonic())
        await self._settled()
        deadline = time.monotonic() + _PATIENCE_S
        while self._plan.version == version and (left := deadline - time.monotonic()) > 0:
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                break
        return self._plan

    async def _settled(self) -> None:
        """Wait until the arms have been heard of, for a moment: a door's old plan is better than one without them."""
        while not self._addresses.know_all(self._plan.routes.values()) and time.monotonic() < self._begun + _SETTLE_S:
            await asyncio.sleep(0.05)

    async def announce(self, route: str, address: str) -> None:
        """A process of an arm says where it listens."""
        self._addresses.hear(route, address)
        self._set_addresses()

    async def lost(self, address: str) -> None:
        """A door has found nobody there."""
        self._addresses.lose(address)
        self._set_addresses()

    async def report(self, records: Sequence[Record]) -> None:
        """Take in what a door has answered."""
        self._metrics.count(records)
        for arm, reason in self._breaker.failing(records).items():
            self._take_out(arm, reason)
        if self._trial is not None:
            self._trial.observe(records)
            self._works.judge([record for record in records if record.sampled is not None])

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
        except UserError as error:
            return 400, str(error)
        except StillhouseError as error:
            logger.error("%s: %s", action, error)
            return 500, str(error)

    # ---- the traffic ----

    async def _tell_traffic(self, _body: Any) -> Answer:
        plan = self._plan
        facts = {"weights": plan.weights, "shadow": plan.shadow, "out": plan.out, "routes": plan.routes}
        processes = {arm: len(plan.addresses.get(route, ())) for arm, route in plan.routes.items()}
        shown = {name: dict(each) for name, each in facts.items()}
        return 200, {**shown, "processes": processes, "experiment": plan.experiment}

    async def _set_traffic(self, body: Mapping[str, Any]) -> Answer:
        weights = self._named(body.get("weights", {}), "weights", self._plan.weights)
        shadow = self._named(body.get("shadow", {}), "shadow", self._plan.shadow)
        if unknown := sorted(set(body) - {"weights", "shadow"}):
            raise UserError(f"{unknown[0]!r} is not known; allowed: weights, shadow.")
        if weights != self._plan.weights and self._trial is not None and not self._trial.is_over:
            raise UserError(f"experiment {self._trial.spec.name!r} has the weights; stop it first.")
        check_weights(weights)
        if any(not 0 <= share <= 1 for share in shadow.values()):
            raise UserError("a shadow's share is out of range; allowed: 0 to 1.")
        self._ramp = None if body.get("weights") else self._ramp
        await self._in_force(weights=weights, shadow={arm: share for arm, share in shadow.items() if share})
        return await self._tell_traffic(None)

    def _named(self, given: Any, what: str, now: Mapping[str, float]) -> dict[str, float]:
        """What is given over what holds; every name must be an arm's."""
        if not isinstance(given, dict) or not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in given.values()
        ):
            raise UserError(f"{what} must be a mapping of arms to numbers.")
        if unknown := sorted(set(given) - set(self._plan.routes)):
            raise UserError(f"no arm is named {unknown[0]!r}; there are: {', '.join(self._plan.routes)}.")
        return {**now, **{arm: float(value) for arm, value in given.items()}}

    async def _start_ramp(self, body: Mapping[str, Any]) -> Answer:
        if self._trial is not None and not self._trial.is_over:
            raise UserError(f"experiment {self._trial.spec.name!r} has the weights; stop it first.")
        steps = body.get("steps")
        if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) and "weights" in s for s in steps):
            raise UserError("steps must be a list of {after_s, weights}.")
        read = []
        for step in steps:
            after_s = step.get("after_s", 0)
            if isinstance(after_s, bool) or not isinstance(after_s, int | float) or not 0 <= after_s < 1e9:
                raise UserError(f"after_s is {after_s!r}; allowed: seconds, 0 or more.")
            weights = self._named(step["weights"], "weights", self._plan.weights)
            check_weights(weights)
            read.append((float(after_s), weights))
        self._ramp = Ramp(time.time(), tuple(sorted(read, key=lambda step: step[0])))
        await self._go_by_ramps()
        return await self._tell_traffic(None)

    async def _roll(self, body: Mapping[str, Any]) -> Answer:
        arm, source = str(body.get("arm")), body.get("source")
        if arm not in self._plan.routes:
            raise UserError(f"no arm is named {arm!r}; there are: {', '.join(self._plan.routes)}.")
        if self._trial is not None and not self._trial.is_over and arm in self._trial.spec.arms:
            raise UserError(f"experiment {self._trial.spec.name!r} compares {arm} as it is; stop it first.")
        if not isinstance(source, str) or not source:
            raise UserError("source must be models:/NAME@ALIAS, models:/NAME/VERSION or a directory.")
        old = self._plan.routes[arm]
        new = await self._works.start_arm(arm, source)
        await self._until_heard(new)
        # From here on every door sends to the new one; the old one goes when it has nothing left to do.
        routes = {**self._plan.routes, arm: new}
        addresses = self._addresses.of(routes.values())
        await self._in_force(routes=routes, addresses=addresses, out=self._plan.out_without(arm))
        self._breaker.forgive(arm)
        await self._works.end_arm(old)
        self._note("rolled", f"{arm} is {source} now")
        return await self._tell_traffic(None)

    async def _tell_metrics(self, _body: Any) -> Answer:
        return 200, self._metrics.text(self._plan)

    # ---- experiments ----

    async def _start_trial(self, body: Mapping[str, Any]) -> Answer:
        if self._trial is not None and not self._trial.is_over:
            raise UserError(f"experiment {self._trial.spec.name!r} is under way; stop it first.")
        spec = parse_experiment(body)
        if unknown := sorted(set(spec.arms) - set(self._plan.routes)):
            raise UserError(f"no arm is named {unknown[0]!r}; there are: {', '.join(self._plan.routes)}.")
        if self._state.experiment(spec.name):
            raise UserError(f"there has been an experiment {spec.name!r} here; give this one another name.")
        if spec.sample:
            assert spec.teacher is not None
            await self._works.start_judge(spec.teacher, {arm: self._plan.routes[arm] for arm in spec.arms})
        self._ramp = None
        self._trial = Trial.begin(spec, self._works.environment())
        self._metrics.begun(spec.name)
        weights = {**self._plan.weights, **spec.weights()}
        await self._in_force(weights=weights, experiment=spec.name, sample=spec.sample)
        self._keep_trial()
        return await self._tell_trial(None)

    async def _tell_trial(self, _body: Any) -> Answer:
        if self._trial is None:
            raise UserError("there is no experiment here; `stillhouse ab start` begins one.")
        return 200, self._trial.snapshot()

    async def _report_trial(self, _body: Any) -> Answer:
        if self._trial is None:
            raise UserError("there is no experiment here; `stillhouse ab start` begins one.")
        # Here, and not above: plots take a second to import.
        from serving.experiment.report import render

        snapshot = self._trial.snapshot(values=True)
        return 200, await asyncio.to_thread(render, snapshot)

    async def _stop_trial(self, _body: Any) -> Answer:
        if self._trial is None or self._trial.is_over:
            raise UserError("no experiment is under way.")
        await self._carry_out(self._trial, self._trial.experiment.stop(time.time()))
        return await self._tell_trial(None)

    async def _carry_out(self, trial: Trial, decision: Decision) -> None:
        logger.warning("experiment %s: %s", trial.spec.name, decision.reason)
        self._metrics.decided(trial.spec.name, decision.outcome)
        changes: dict[str, Any] = {"weights": trial.weights_after(decision, self._plan.weights)}
        if trial.is_over:
            changes |= {"experiment": "", "sample": 0.0}
        await self._in_force(**changes)
        if decision.outcome == "promote" and decision.arm is not None:
            text = await self._works.promote(decision.arm, trial.spec.promote_alias, decision.reason)
            trial.experiment.note(time.time(), "alias", text)
        if trial.is_over:
            self._works.end_judge()
        self._keep_trial()

    # ---- the clock ----

    async def _tick(self) -> None:
        """Everything that happens by itself."""
        while True:
            await asyncio.sleep(_TICK_S)
            await self._go_by_ramps()
            for arm, reason in (await self._works.dead_arms(self._plan.routes)).items():
                self._take_out(arm, reason)
            if gone := self._addresses.drop_silent():
                self._set_addresses(gone)
            self._probe_those_out()
            if self._trial is not None and not self._trial.is_over:
                self._trial.score(await self._works.scored())
                for decision in self._trial.decisions(time.time()):
                    await self._carry_out(self._trial, decision)
                if time.monotonic() - self._kept_at > _KEEP_S:
                    self._keep_trial()

    async def _go_by_ramps(self) -> None:
        now = time.time()
        trial = self._trial
        if trial is not None and not trial.is_over and trial.ramp is not None:
            if (step := trial.ramp.at(now)) is not None:
                await self._ramp_to({**self._plan.weights, **trial.without_lost(step)})
        elif self._ramp is not None:
            if (step := self._ramp.at(now)) is not None:
                await self._ramp_to(step)
            if self._ramp.is_over(now):
                self._ramp = None

    async def _ramp_to(self, weights: Mapping[str, float]) -> None:
        if dict(weights) != dict(self._plan.weights):
            await self._in_force(weights=dict(weights))
            self._note("weights", ", ".join(f"{arm} {weight:g}" for arm, weight in weights.items()))

    def _take_out(self, arm: str, reason: str) -> None:
        if arm in self._plan.routes and arm not in self._plan.out:
            logger.warning("arm %s is taken out: %s", arm, reason)
            self._set(out={**self._plan.out, arm: reason})
            self._note("arm_out", f"{arm}: {reason}")

    def _probe_those_out(self) -> None:
        for arm in self._plan.out:
            if arm not in self._probed or self._probed[arm].done():
                self._probed[arm] = asyncio.create_task(self._probe(arm, self._plan.routes[arm]))

    async def _probe(self, arm: str, route: str) -> None:
        """Let an arm back in when it answers again."""
        await asyncio.sleep(self._spec.breaker.probe_s)
        if await self._works.answers(route) and self._plan.routes.get(arm) == route:
            self._breaker.forgive(arm)
            self._set(out=self._plan.out_without(arm))
            self._note("arm_in", f"{arm} answers again")

    # ---- the plan ----

    def _set(self, **changes: Any) -> None:
        self._plan = self._plan.next(**changes)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        plan = self._plan
        self._state.keep_traffic(
            {
                "declared": self._spec.weights,
                "weights": dict(plan.weights),
                "shadow": dict(plan.shadow),
                "experiment": plan.experiment,
            }
        )

    async def _in_force(self, **changes: Any) -> None:
        """Change the plan, and wait until every door goes by it."""
        self._set(**changes)
        version, deadline = self._plan.version, time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            now = time.monotonic()
            here = [door for door in self._doors.values() if now - door.at < _DOOR_GONE_S]
            if all(door.version >= version for door in here):
                return
            await asyncio.sleep(0.005)

    def _set_addresses(self, gone: frozenset[str] = frozenset()) -> None:
        addresses = self._addresses.of(self._plan.routes.values())
        if addresses != self._plan.addresses or gone:
            self._set(addresses=addresses, gone=gone or self._plan.gone)

    async def _until_heard(self, route: str) -> None:
        deadline = time.monotonic() + SILENT_S
        while not self._addresses.know_all([route]):
            if time.monotonic() > deadline:
                raise RunError(f"{route} runs, and has not said where it listens")
            await asyncio.sleep(0.05)

    def _note(self, what: str, text: str) -> None:
        if self._trial is not None and not self._trial.is_over:
            self._trial.experiment.note(time.time(), what, text)

    def _keep_trial(self) -> None:
        if self._trial is not None:
            self._kept_at = time.monotonic()
            self._state.keep_experiment(self._trial.spec.name, self._trial.snapshot(values=True))

    def _restore(self) -> None:
        """Go on as before this process was started again; weights that have been declared anew win."""
        before = self._state.traffic()
        if not before or before["declared"] != self._spec.weights:
            return
        self._plan = self._plan.next(weights=before["weights"], shadow=before["shadow"])
        if name := before["experiment"]:
            trial = Trial(Experiment.restore(self._state.experiment(name)))
            if not trial.is_over:
                self._trial = trial
                self._metrics.begun(name)
                self._plan = self._plan.next(experiment=name, sample=trial.spec.sample)
