"""What a control that is started again goes on with, of what was kept: as much as still fits what runs now."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from serving.control.state import State
from serving.control.trial import Trial
from serving.control.works import Works
from serving.plan import Plan, Ramp
from serving.spec import EndpointSpec

logger = logging.getLogger("ray.serve")
Kept = Mapping[str, Any]


def kept_of(spec: EndpointSpec, plan: Plan, ramp: Ramp | None, deployment: str, experiment: str) -> dict[str, Any]:
    """What is kept of the traffic; the others here read it.

    Args:
        deployment: which start of the endpoint the routes belong to: another has the same names for its own.
        experiment: the one whose decisions are not all carried out; "" for none.
    """
    return {
        "declared": spec.weights,
        "weights": dict(plan.weights),
        "shadow": dict(plan.shadow),
        "experiment": experiment,
        "deployment": deployment,
        "routes": dict(plan.routes),
        "sources": dict(plan.sources),
        "ramp": None if ramp is None else {"started": ramp.started, "steps": [list(step) for step in ramp.steps]},
    }


def plan_from(before: Kept, spec: EndpointSpec, routes: Mapping[str, str], works: Works) -> Plan:
    """The plan to begin with. A roll may have moved an arm since the endpoint was started."""
    mine = before if before.get("deployment") == works.deployment else {}
    kept = mine.get("routes", {})
    routes = {**routes, **{arm: route for arm, route in works.routes(kept).items() if arm in routes}}
    sources = {arm: spec.arms[arm].source for arm in routes}
    sources |= {arm: mine["sources"][arm] for arm, route in routes.items() if kept.get(arm) == route}
    # Above every version that an earlier control has given.
    plan = Plan(time.time_ns() // 1000, dict(spec.weights), routes, sources=sources, shadow=dict(spec.shadow))
    if _is_as_declared(before, spec):
        plan = replace(plan, weights=before["weights"], shadow=before["shadow"])
    return plan


def ramp_from(before: Kept, spec: EndpointSpec, plan: Plan) -> Ramp | None:
    """The ramp that was under way, as long as it leads to the models that it was made for."""
    ramp = before.get("ramp")
    if not ramp or not _is_as_declared(before, spec):
        return None
    if before["sources"] != plan.sources:
        logger.warning("the ramp does not go on: the arms have other models now")
        return None
    return Ramp(ramp["started"], tuple((after_s, weights) for after_s, weights in ramp["steps"]))


def trial_from(before: Kept, spec: EndpointSpec, plan: Plan, state: State) -> Trial | None:
    """The experiment that was under way. Where it cannot go on, it comes back as stopped, and says why.

    A record that is missing or cannot be read counts as none: an endpoint that does not start is worse.
    """
    name = before.get("experiment")
    if not name:
        return None
    record = state.experiment(name)
    if not record:
        logger.error("experiment %s was under way, and there is no record of it; it does not go on", name)
        return None
    try:
        trial = Trial.restored(record)
    except (KeyError, TypeError, ValueError):
        logger.exception("experiment %s was under way, and its record cannot be used; it does not go on", name)
        return None
    if not trial.is_under_way:
        return None
    if reason := _why_not(trial, before, spec, plan):
        logger.warning("experiment %s does not go on: %s", name, reason)
        trial.give_up(time.time(), reason)
    return trial


def plan_with(trial: Trial | None, plan: Plan, spec: EndpointSpec) -> Plan:
    """The plan as the experiment leaves it: one that was given up has no say in the weights any more."""
    if trial is None:
        return plan
    if not trial.is_over:
        return replace(plan, experiment=trial.spec.name, sample=trial.spec.sample)
    return plan if trial.is_under_way else replace(plan, weights=dict(spec.weights))


def _is_as_declared(before: Kept, spec: EndpointSpec) -> bool:
    """Weights that have been declared anew win over those that were kept."""
    return bool(before.get("declared") == spec.weights)


def _why_not(trial: Trial, before: Kept, spec: EndpointSpec, plan: Plan) -> str:
    """Why an experiment cannot go on; "" where it can."""
    if not _is_as_declared(before, spec):
        return "the endpoint was started again with other weights"
    kept = before.get("sources", {})
    for arm in trial.spec.arms:
        if kept.get(arm) != plan.sources.get(arm):
            return f"arm {arm} is {plan.sources.get(arm)} now; it was {kept.get(arm, 'not written down')} before"
    return ""
