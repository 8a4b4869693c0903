"""What happens after the students are registered: a failure there is reported and does not make the family fail."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

import cluster.family
import cluster.queue.place
import cluster.session
from cluster.evaluate.figures import Champion
from cluster.evaluate.gate import KEPT
from cluster.evaluate.result import FamilyResult
from jobs import run as module
from jobs.lines import promotions_in
from jobs.promotion import settle
from jobs.submit import FAMILY
from tests.fidelities import fidelity
from tests.jobs.test_promotion import BETTER, FIDELITY, Nights
from tests.jobs.test_promotion import nights as nights


def ended(
    monkeypatch: pytest.MonkeyPatch, nights: Nights, **sections: Any
) -> tuple[FamilyResult, Callable[[], tuple[str, str]]]:
    """A family that has registered its student, and a function that does the rest: the error and what is printed."""
    checked, result = nights.night(FIDELITY, None, nights.checked(**sections))
    run_id = nights.client.create_run(nights.experiment).info.run_id
    result.run.mlflow = {"": run_id}

    def everything(*_: object, **__: object) -> FamilyResult:
        return result

    nothing: Any = contextlib.nullcontext
    monkeypatch.setattr(cluster.family, "run_family", everything)
    monkeypatch.setattr(cluster.queue.place, "place_for", lambda *_: nothing(list))
    monkeypatch.setattr(cluster.session, "ray_session", nothing)

    def rest() -> tuple[str, str]:
        out = io.StringIO()
        console = Console(file=out, soft_wrap=True, width=300)
        _, serving = module._run(checked, result.run, console, "run tiny-1, log run.log")
        module._print_result(console, checked, result, serving)
        return "; ".join(result.trouble), out.getvalue()

    return result, rest


def test_an_interrupted_job_is_resumed_as_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._job_name() == ""
    for metadata, name in (({FAMILY: "tiny"}, "tiny-1"), ({}, "")):  # a program of somebody's own may call a run too
        job = {"runtime_env": {}, "metadata": {**metadata, "job_submission_id": "tiny-1"}}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
        assert module._job_name() == name


def test_a_report_that_mlflow_refuses_is_missing_there_and_the_family_succeeded(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, rest = ended(monkeypatch, nights)
    result.run.mlflow[""] = "0" * 32
    trouble, printed = rest()
    assert trouble == "" and result.run.report_path.is_file()
    (line,) = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert f"the report is in {result.run.report_path} and not in MLflow; make it with: stillhouse run " in line
    assert f"{result.run.name} --resume" in line and "refuses" in line


def test_a_report_that_cannot_be_written_is_named_and_the_family_succeeded(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, rest = ended(monkeypatch, nights)
    result.run.report_path.mkdir()
    trouble, printed = rest()
    assert trouble == ""
    assert f"warning: the report {result.run.report_path} could not be written; make it with: " in printed
    assert nights.champion() == 1


def test_a_report_is_attached(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    result, rest = ended(monkeypatch, nights)
    assert rest()[0] == "" and result.warnings == []
    assert [each.path for each in nights.client.list_artifacts(result.run.mlflow[""])] == ["report.html"]


@pytest.mark.parametrize("latency", [None, 1.1])
def test_endpoints_that_cannot_be_compared_cost_the_comparison_and_what_latency_decides(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, latency: float | None
) -> None:
    result, rest = ended(monkeypatch, nights, serving={}, promotion={"latency": latency})
    result.champions["small"] = Champion(9, FIDELITY)

    def broken(*_: object) -> list[dict[str, Any]]:
        raise ConnectionError("no endpoint answers")

    monkeypatch.setattr(module, "compare", broken)
    trouble, printed = rest()
    assert "warning: the endpoints could not be compared: ConnectionError: no endpoint answers" in printed
    assert result.run.report_path.is_file()
    if latency is None:
        assert trouble == "" and result.verdicts["small"].outcome == KEPT
    else:
        assert trouble == (
            "the promotion of student small is not decided: the endpoints could not be compared, and latency decides; "
            "resume with --resume"
        )
        assert result.verdicts == {} and result.run.promotions == {}


def test_a_student_without_a_version_is_shown_as_such_everywhere(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, rest = ended(monkeypatch, nights, serving={})
    result.versions.clear()
    result.unregistered["small"] = "MLflow refuses; its model is kept in /models/small, and --resume registers it"
    monkeypatch.setattr(module, "compare", lambda *_: 1 / 0)  # there is nothing to serve
    trouble, printed = rest()
    assert trouble.startswith("student small is not registered: MLflow refuses; its model is kept in /models/small")
    assert "not registered" in printed and result.verdicts == {} and result.warnings == []
    page = result.run.report_path.read_text()
    assert "Student small is not registered: MLflow refuses" in page and "<td>not registered</td>" in page


def test_a_student_that_ended_worse_than_it_began_is_warned_of_everywhere(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, rest = ended(monkeypatch, nights)
    result.students["small"] = replace(result.students["small"], before=fidelity(0.82), after=fidelity(0.95))
    trouble, printed = rest()
    page = result.run.report_path.read_text()
    told = "student small ended worse than it began: KL 0.950 after training, 0.820 before, on 500 held-out tokens"
    assert trouble == "" and f"warning: {told}" in printed and told in page and '<td class="failed">0.95</td>' in page
    assert "v1 stays challenger: KL 0.950 against 0.820 of its initial weights" in printed
    assert (nights.champion(), result.versions) == (None, {"small": 1})


def test_a_held_out_text_that_is_too_small_is_told_before_and_after(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, rest = ended(monkeypatch, nights, promotion={"kl": 0.02, "agreement": 0.3, "perplexity": 2.0})
    result.students["small"] = replace(result.students["small"], after=fidelity(1.4, spread=0.4))
    result.champions["small"] = Champion(9, FIDELITY)
    _, printed = rest()
    page = result.run.report_path.read_text()
    warning = "the held-out text is too small to decide on the promotion of student small"
    # 4 batches of 4 sequences of 32 tokens, of which the last one of each carries no loss.
    notice = (
        "at most 496 held-out tokens are measured, too few to tell from noise: promotion.kl 0.02 takes about 30,000"
    )
    for text in (printed, page):
        assert warning in text and notice in text and "too close to call on 500 held-out tokens" in text
    assert len(promotions_in(printed)) == 1


def test_a_promotion_that_fails_harms_no_other(nights: Nights) -> None:
    checked, result = nights.night(FIDELITY, None)
    two = {"gone": replace(result.students["small"], name="gone"), **result.students}
    result = replace(result, students=two, versions={"gone": 7, **result.versions})
    result.champions = {"gone": None, "small": None}
    students = dict.fromkeys(two, checked.spec.students["small"])
    settle(replace(checked, spec=checked.spec.model_copy(update={"students": students})), result, [])
    assert nights.champion() == 1 and result.verdicts["small"].promoted
    assert result.undecided.keys() == {"gone"} and "--resume" in result.undecided["gone"]
    assert result.trouble == [f"the promotion of student gone is not decided: {result.undecided['gone']}"]


def test_a_champion_that_mlflow_did_not_name_leaves_the_promotion_to_the_resumed_run(nights: Nights) -> None:
    checked, result = nights.night(BETTER, None)
    result.champions, result.undecided = {}, {"small": "MLflow does not answer"}
    settle(checked, result, [])
    assert nights.champion() is None and result.run.promotions == {}
    again = nights.resumed(checked, result)
    again.champions, again.undecided = {"small": None}, {}
    settle(checked, again, [])
    assert nights.champion() == 1 and again.trouble == []


def test_the_comparison_takes_no_name_that_a_running_endpoint_of_the_family_may_have(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    import serving.deploy
    from cluster.queue.held import COMPARED

    class DeployedError(Exception):
        pass

    def deploy(spec: Any, *_: object) -> Any:
        raise DeployedError(spec.name)

    checked, result = nights.night(FIDELITY, None, nights.checked(serving={}))
    result.run.name = f"{'a' * 40}-20261124-093000-1"
    monkeypatch.setattr(serving.deploy, "deploy", deploy)
    with pytest.raises(DeployedError, match=f"^{COMPARED}{result.run.name}$"):
        module.compare(checked, result)


def test_an_arm_that_never_answered_is_shown_as_such(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    _, rest = ended(monkeypatch, nights, serving={})
    none: dict[str, float] = {}
    times = {"p50": 20.0, "p95": 30.0, "p99": 40.0}
    rows = [
        {"arm": "tiny-small", "count": 0, "errors": 3, "tokens_per_s": 0.0, "first_token_ms": none, "latency_ms": none},
        {"arm": "teacher", "count": 3, "errors": 0, "tokens_per_s": 9.0, "first_token_ms": times, "latency_ms": times},
    ]
    monkeypatch.setattr(module, "compare", lambda *_: rows)
    _, printed = rest()
    assert "no answer" in printed and "20/30" in printed
