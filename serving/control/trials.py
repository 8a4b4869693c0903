"""The experiments of an endpoint, one after the other: started, looked at, carried out, and kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import StillhouseError, UserError
from serving.control.metrics import Metrics
from serving.control.state import State
from serving.control.traffic import Traffic
from serving.control.trial import Trial
from serving.control.turn import Turn, UnderWayError
from serving.control.works import Works
from serving.experiment import Decision, ExperimentSpec
from serving.experiment.spec import parse_experiment
from serving.records import Record

_KEEP_S = 10.0
# Seconds until a teacher that did not start is tried again.
_JUDGE_AGAIN_S = 60.0

logger = logging.getLogger("ray.serve")


class Trials:
    """Has at most one experiment under way: until its last decision is carried out there is no other.

    Args:
        changing: the turn of what changes the models behind arms; an experiment is not started meanwhile.
    """

    def __init__(self, traffic: Traffic, works: Works, state: State, metrics: Metrics, changing: Turn) -> None:
        self._traffic, self._works, self._state, self._metrics = traffic, works, state, metrics
        self._changing = changing
        # Not the same turn: a rollback must not wait for the roll of an arm that has no part in the experiment.
        self._deciding = Turn()
        self.trial: Trial | None = None
        """The latest one."""
        self._kept_at = 0.0
        self._judge: asyncio.Task[None] | None = None
        self._judge_at = 0.0

    @property
    def under_way(self) -> Trial | None:
        """The experiment of which something is still to be decided or carried out."""
        return self.trial if self.trial is not None and self.trial.is_under_way else None

    @property
    def live(self) -> Trial | None:
        """The experiment that has not been decided."""
        return self.trial if self.trial is not None and not self.trial.is_over else None

    def check_free(self, arm: str | None = None) -> None:
        """See that no experiment has the weights or, where one is given, the arm.

        Raises:
            UserError: one does; says what to do.
        """
        trial = self.under_way
        if trial is None or (arm is not None and arm not in trial.spec.arms):
            return
        name = trial.spec.name
        if trial.is_over:
            raise UnderWayError(f"experiment {name!r} has been decided, which is being carried out; ask again soon.")
        if arm is not None:
            raise UserError(f"experiment {name!r} compares {arm} as it is; stop it first.")
        raise UserError(f"experiment {name!r} has the weights; stop it first.")

    def observe(self, records: Sequence[Record]) -> None:
        """Take in what a door has answered."""
        if (trial := self.live) is not None:
            trial.observe(records)
            self._works.judge([each for each in records if each.sampled is not None and trial.has(each)])

    def note(self, what: str, text: str) -> None:
        """Put an event into the record of the experiment that goes on."""
        if (trial := self.live) is not None:
            trial.experiment.note(time.time(), what, text)

    # ---- what is asked for ----

    async def start(self, body: Mapping[str, Any]) -> None:
        """Begin an experiment; returns when every door sends by it.

        Raises:
            UserError: it cannot be used, or another is under way. Nothing has changed.
            RunError: the teacher does not start, or there can be no record. Nothing has changed.
        """
        spec = parse_experiment(body)
        what = f"experiment {spec.name!r} is being started"
        async with self._changing.take(what), self._deciding.take(what):
            self._check_startable(spec)
            if spec.sample:
                await self._start_judge(spec)
            try:
                trial = Trial.begin(spec, self._works.environment(self._traffic.plan.sources))
                # The record first: what is kept of the traffic names it.
                self._state.keep_experiment(spec.name, trial.record())
            except BaseException:
                self._works.end_judge()
                raise
            self.trial = trial
            self._metrics.begun(spec.name)
            self._traffic.ramp = None
            weights = {**self._traffic.plan.weights, **spec.weights()}
            await self._traffic.in_force(weights=weights, experiment=spec.name, sample=spec.sample)

    def _check_startable(self, spec: ExperimentSpec) -> None:
        if (trial := self.under_way) is not None:
            raise UserError(f"experiment {trial.spec.name!r} is under way; stop it first.")
        routes = self._traffic.plan.routes
        if unknown := sorted(set(spec.arms) - set(routes)):
            raise UserError(f"no arm is named {unknown[0]!r}; there are: {', '.join(routes)}.")
        if self._state.experiment(spec.name):
            raise UserError(f"there has been an experiment {spec.name!r} here; give this one another name.")

    async def stop(self) -> None:
        """End the experiment without a winner; returns when control has its traffic.

        Raises:
            UserError: there is none.
        """
        if self.trial is not None and self.trial.is_over:
            raise UserError("no experiment is under way.")
        async with self._deciding.take("the experiment is being stopped"):
            if (trial := self.live) is None:
                raise UserError("no experiment is under way.")
            trial.experiment.stop(time.time())
            await self._carry_out(trial)

    def latest(self) -> Trial:
        """The experiment that is under way, or was last.

        Raises:
            UserError: there has been none.
        """
        if self.trial is None:
            raise UserError("there is no experiment here; `stillhouse ab start` begins one.")
        return self.trial

    # ---- what happens by itself ----

    async def look(self) -> None:
        """Decide if it is time to, and carry out what has been decided."""
        if self.under_way is None:
            return
        async with self._deciding.take("a decision of the experiment is being carried out", waits=True):
            if (trial := self.under_way) is None:
                return
            if not trial.is_over:
                self._have_judge(trial)
                trial.score(await self._works.scored())
                trial.look(time.time())
            await self._carry_out(trial)
            if time.monotonic() - self._kept_at > _KEEP_S:
                self.keep(trial)

    async def _carry_out(self, trial: Trial) -> None:
        """Do what the experiment has decided; a control that is started again in between does it once more."""
        while decision := trial.pending:
            logger.warning("experiment %s: %s", trial.spec.name, decision.reason)
            self._metrics.decided(trial.spec.name, decision.outcome)
            self.keep(trial)
            await self._do(trial, decision)
            trial.carried_out()
            if not trial.is_under_way:
                self._end_judge()
            self.keep(trial)
            self._traffic.keep()

    async def _do(self, trial: Trial, decision: Decision) -> None:
        changes: dict[str, Any] = {"weights": trial.weights_after(decision, self._traffic.plan.weights)}
        if trial.is_over:
            changes |= {"experiment": "", "sample": 0.0}
        await self._traffic.in_force(**changes)
        if decision.outcome == "promote" and decision.arm is not None:
            source = self._traffic.plan.sources[decision.arm]
            text = await self._works.promote(decision.arm, source, trial.spec.promote_alias, decision.reason)
            trial.experiment.note(time.time(), "alias", text)

    def keep(self, trial: Trial) -> None:
        """Put an experiment's record down. It goes on without: a candidate must go even where the disk is full."""
        self._kept_at = time.monotonic()
        try:
            self._state.keep_experiment(trial.spec.name, trial.record())
        except StillhouseError:
            logger.exception("the record of experiment %s was not kept", trial.spec.name)

    def restore(self, trial: Trial) -> None:
        """Go on with an experiment of the control before this one."""
        self.trial = trial
        self._metrics.begun(trial.spec.name)
        self.keep(trial)

    # ---- the teacher ----

    async def _start_judge(self, spec: ExperimentSpec) -> None:
        assert spec.teacher is not None
        routes = self._traffic.plan.routes
        await self._works.start_judge(spec.teacher, {arm: routes[arm] for arm in spec.arms})

    def _have_judge(self, trial: Trial) -> None:
        """Start the teacher where the experiment has none, as after a restart of the control. Nobody waits for it."""
        starts = self._judge is not None and not self._judge.done()
        if not trial.spec.sample or self._works.has_judge or starts or time.monotonic() < self._judge_at:
            return
        self._judge_at = time.monotonic() + _JUDGE_AGAIN_S
        self._judge = asyncio.create_task(self._start_judge_again(trial))

    async def _start_judge_again(self, trial: Trial) -> None:
        try:
            await self._start_judge(trial.spec)
        except Exception as error:
            logger.exception("experiment %s has no teacher; it is tried again", trial.spec.name)
            text = f"answers are not scored: {error}"
            if trial.experiment.events[-1]["text"] != text:
                self.note("teacher", text)
        else:
            self.note("teacher", "answers are scored again")

    def _end_judge(self) -> None:
        if self._judge is not None:
            self._judge.cancel()
            self._judge = None
        self._works.end_judge()
