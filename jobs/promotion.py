"""The promotion gate at the end of a run, and `stillhouse promote` and `rollback` by hand."""

from __future__ import annotations

import getpass
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from cluster.errors import RunError, UserError, first_line
from cluster.evaluate.checks import KL, Metric
from cluster.evaluate.figures import Champion, StudentResult
from cluster.evaluate.gate import KEPT, PROMOTED, Measured, Verdict, decide, learnt
from cluster.evaluate.result import FamilyResult
from cluster.preflight import Checked
from cluster.registry import AwayError, ChampionMovedError, Models, default_tracking_uri
from cluster.space import when_there_is_room
from cluster.spec import FamilySpec, PromotionSpec
from jobs.contexts import context_for

log = logging.getLogger(__name__)

SQLITE = "sqlite:///"
# A person waits for the answer.
_PATIENCE_S = 20.0


def champion_arm(model: str) -> str:
    """The name under which a model's champion is served beside its new version. No student's name has a dot."""
    return f"{model}.champion"


def champion_arms(spec: FamilySpec, result: FamilyResult) -> dict[str, str]:
    """The champions that must be served so that latency can decide: names of arms to their ``models:/`` URIs."""
    if spec.promotion is None or spec.promotion.latency is None:
        return {}
    measured = {name: each.version for name, each in result.champions.items() if each is not None and each.fidelity}
    models = {spec.model_name(name): version for name, version in measured.items()}
    return {champion_arm(model): f"models:/{model}/{version}" for model, version in models.items()}


def settle(checked: Checked, result: FamilyResult, serving: Sequence[Mapping[str, Any]]) -> None:
    """Decide of every finished student whether it takes its champion's place, and see to it in the registry.

    What is decided is written into the run's state before anything is done, and done in steps that may be done again:
    a run that is resumed carries out what it had decided, and leaves alone what a person has decided since. When the
    registry stays away, it is waited for once, not for each student.

    Args:
        result: its ``verdicts`` are filled, or ``undecided`` with the reason; stays without any where the spec has no
            ``promotion``. A student that is not registered is passed over.
        serving: the comparison's rows; empty where nothing was served.
    """
    if checked.spec.promotion is None:
        return
    models, away = None, ""
    # The median of those requests alone that were answered may be any.
    latencies = {row["arm"]: None if row["errors"] else row["latency_ms"].get("p50") for row in serving}
    for name in result.students:
        if name not in result.versions or name in result.undecided:
            continue
        if away:
            result.undecided[name] = away
            continue
        try:
            models = models or Models(checked.tracking_uri)
            _settle_one(checked, result, models, name, latencies)
        except Exception as error:  # of MLflow, or of a full disk: the others are decided all the same
            log.exception("the promotion of %s is not decided", name)
            result.undecided[name] = f"{first_line(error)}; resume with --resume"
            away = result.undecided[name] if isinstance(error, AwayError) else ""


def _settle_one(
    checked: Checked, result: FamilyResult, models: Models, name: str, latencies: Mapping[str, float | None]
) -> None:
    margins, run = checked.spec.promotion, result.run
    assert margins is not None
    model, version = checked.spec.model_name(name), result.versions[name]
    verdict = models.verdict(model, version)
    decided = Verdict(**run.promotions[name]) if name in run.promotions else None
    if verdict is None:
        if decided is not None:
            verdict = decided
        else:
            champion = result.champions[name]
            # A champion that could not be measured keeps its place whatever the latency is.
            if margins.latency is not None and not latencies and (champion is None or champion.fidelity is not None):
                raise RunError("the endpoints could not be compared, and latency decides")
            both = latencies.get(model), latencies.get(champion_arm(model))
            metric = learnt(checked.spec.students[name].loss)
            verdict = judge(margins, result.students[name], version, champion, *both, metric)
            _remember(checked, result, name, verdict)
        verdict = _carry_out(models, model, version, verdict)
    elif decided is not None and (decided.outcome, decided.reason) == (verdict.outcome, verdict.reason):
        verdict = decided  # the registry keeps less of it
    _remember(checked, result, name, verdict)


def judge(
    margins: PromotionSpec,
    student: StudentResult,
    version: int,
    champion: Champion | None,
    latency_ms: float | None,
    champion_latency_ms: float | None,
    metric: Metric = KL,
) -> Verdict:
    """The verdict on one new version, whatever is known of its champion. Latencies are medians of whole answers.

    Args:
        metric: the figure in which it must be better than its initial weights.
    """
    new = Measured(student.after, latency_ms)
    if champion is None:
        return decide(margins, new, student.before, None, None, metric)
    if champion.fidelity is None:
        outcome = PROMOTED if champion.version == version else KEPT
        return Verdict(outcome, champion.why_not, champion.version)
    known = Measured(champion.fidelity, champion_latency_ms)
    return decide(margins, new, student.before, known, champion.version, metric)


def _remember(checked: Checked, result: FamilyResult, student: str, verdict: Verdict) -> None:
    """In the run's state and in its result."""
    run = result.run
    run.promotions[student] = asdict(verdict)
    when_there_is_room(run.folder, run.save, checked.spec.patience_s)
    result.verdicts[student] = verdict


def _carry_out(models: Models, model: str, version: int, verdict: Verdict) -> Verdict:
    """Do what was decided; what stands in the end."""
    if verdict.promoted:
        try:
            models.promote(model, version, verdict.reason, verdict.against)
            return verdict
        except ChampionMovedError as error:
            verdict = replace(verdict, outcome=KEPT, reason=str(error))
    models.keep(model, version, verdict.reason)
    return verdict


def promotion_lines(spec: FamilySpec, result: FamilyResult) -> list[str]:
    """A line for each student that was decided on, as the terminal says it."""
    return [verdict.line(spec.model_name(n), result.versions[n]) for n, verdict in result.verdicts.items()]


def promote(model: str, version: int | None, tracking_uri: str | None) -> None:
    """Make a version the champion by hand.

    Args:
        version: none means the challenger.
        tracking_uri: none means the one of the context in use, else the default one.

    Raises:
        UserError: no such registry, model or version, or there is no challenger.
        RunError: MLflow does not answer, or somebody else has promoted another version at this moment.
    """
    models = _models(tracking_uri)
    now = models.known(model)
    if (chosen := version if version is not None else now.challenger) is None:
        there = "has no champion either" if now.champion is None else f"its champion is v{now.champion}"
        raise UserError(f"{model} has no challenger, {there}; name a version with --version N")
    models.promote(model, chosen, f"promoted by hand by {getpass.getuser()}", now.champion)
    before = "" if now.champion in (None, chosen) else f"; v{now.champion} was it before"
    typer.echo(f"{model} v{chosen} is champion{before}")


def rollback(model: str, tracking_uri: str | None) -> None:
    """Make the version champion that was it before the present one.

    Args:
        tracking_uri: as for :func:`promote`.

    Raises:
        UserError: no such registry or model, or nothing to roll back to.
        RunError: MLflow does not answer.
    """
    left, back = _models(tracking_uri).rollback(model)
    typer.echo(f"{model} v{back} is champion again; v{left} was it before")


def _models(tracking_uri: str | None) -> Models:
    """The registry that a command means.

    Raises:
        UserError: it is a file that is not there, which MLflow would make.
    """
    uri = tracking_uri or context_for(None, None).tracking_uri or default_tracking_uri()
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        raise UserError(f"there is no registry {uri} yet; run a family first, or name another with --tracking-uri")
    return Models(uri, _PATIENCE_S)
