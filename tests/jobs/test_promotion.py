"""The end of a run decides once, whatever happens in between; promote and rollback as a person types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from cluster.corpus.batches import CorpusFacts
from cluster.evaluate.figures import Champion, Fidelity, StudentResult
from cluster.evaluate.gate import KEPT, PROMOTED, ROLLED_BACK, Verdict
from cluster.evaluate.result import FamilyResult
from cluster.limits import NO_LIMIT
from cluster.models import TeacherModel
from cluster.preflight import Checked
from cluster.registry import AwayError, Models
from cluster.registry import models as models_module
from cluster.runs import open_run
from cluster.spec import FamilySpec
from jobs.cli.main import main
from jobs.promotion import champion_arms, promotion_lines, rollback, settle
from tests.fidelities import fidelity
from tests.jobs.test_console import STATS
from tests.tiny import tiny_family

MODEL = "tiny-small"
FIDELITY, BETTER, WORSE = fidelity(1.41), fidelity(1.2), fidelity(1.62)
INITIAL = fidelity(6.7, 0.05, 9000.0)


class Nights:
    """A registry on SQLite, and families whose students are registered in it as if they had been trained."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client: Any = mlflow.MlflowClient(self.uri)
        self.client.create_registered_model(MODEL)
        self.experiment = self.client.create_experiment("tiny", str(folder / "artifacts"))
        self.models = Models(self.uri)

    def checked(self, **sections: Any) -> Checked:
        """A family of this registry that is to be promoted by the tightest margins, unless told otherwise."""
        spec = FamilySpec.model_validate(tiny_family(**{"promotion": {}, **sections}))
        return Checked(spec, TeacherModel("/teacher", 300, "0" * 16, "1" * 16), {}, self.uri, None, NO_LIMIT)

    def night(
        self, after: Fidelity, champion: Champion | None, checked: Checked | None = None, before: Fidelity = INITIAL
    ) -> tuple[Checked, FamilyResult]:
        """A family that is over but for the decision."""
        checked = checked or self.checked()
        run_id = self.client.create_run(self.experiment).info.run_id
        version = int(self.client.create_model_version(MODEL, "/nowhere/model", run_id).version)
        self.client.set_registered_model_alias(MODEL, "challenger", str(version))
        run = open_run(checked.spec, resume=False)
        run.versions = {"small": version}
        student = StudentResult("small", "/nowhere/model", 100, before, after, 8, 1.0)
        corpus = CorpusFacts(1, 1, 1, "0" * 16)
        result = FamilyResult(run, corpus, STATS, {"small": student}, {}, [], 1.0, dict(run.versions))
        result.champions = {"small": champion}
        return checked, result

    def resumed(self, checked: Checked, result: FamilyResult) -> FamilyResult:
        """The same run as its resumption finds it: only what was saved is known of the decision."""
        return replace(result, run=open_run(checked.spec, resume=True), champions={}, verdicts={})

    def champion(self) -> int | None:
        """Which version is champion."""
        standing = self.models.standing(MODEL)
        assert standing is not None
        return standing.champion


@pytest.fixture
def nights(empty_registry: Path, stillhouse_home: Path) -> Nights:
    stillhouse_home.mkdir()
    (stillhouse_home / "mlflow.db").write_bytes(empty_registry.read_bytes())
    return Nights(stillhouse_home)


def test_the_first_is_promoted_a_worse_one_stays_and_a_better_one_takes_its_place(nights: Nights) -> None:
    outcomes = []
    for after, champion in ((FIDELITY, None), (WORSE, Champion(1, FIDELITY)), (BETTER, Champion(1, FIDELITY))):
        checked, result = nights.night(after, champion)
        settle(checked, result, [])
        outcomes.append((result.verdicts["small"].outcome, nights.champion()))
        (line,) = promotion_lines(checked.spec, result)
        said = "is champion" if result.verdicts["small"].promoted else "stays challenger"
        assert line.startswith(f"promotion: tiny-small v{result.versions['small']} {said}: ")
        kept = json.loads((result.run.folder / "run.json").read_text())["promotions"]["small"]
        assert Verdict(**kept) == result.verdicts["small"]
    assert outcomes == [(PROMOTED, 1), (KEPT, 1), (PROMOTED, 3)]


@pytest.mark.parametrize("champion", [None, Champion(1, fidelity(6.0))], ids=["first", "later"])
def test_a_student_that_is_worse_than_its_initial_weights_is_registered_and_not_promoted(
    nights: Nights, champion: Champion | None
) -> None:
    checked, result = nights.night(fidelity(0.95), champion, nights.checked(promotion={"kl": 9.0}), fidelity(0.82))
    settle(checked, result, [])
    verdict = nights.models.verdict(MODEL, 1)
    assert verdict is not None and (verdict.outcome, nights.champion()) == (KEPT, None)
    assert verdict.reason == "KL 0.950 against 0.820 of its initial weights, must be better"
    assert nights.models.known(MODEL).challenger == 1


def test_a_verdict_that_was_unclear_is_so_in_the_resumed_run(nights: Nights) -> None:
    checked, result = nights.night(fidelity(1.4, spread=0.5), Champion(9, FIDELITY))
    settle(checked, result, [])
    assert result.verdicts["small"].unclear
    settle(checked, again := nights.resumed(checked, result), [])
    assert again.verdicts == result.verdicts


def test_without_a_promotion_section_nothing_is_decided(nights: Nights) -> None:
    checked, result = nights.night(FIDELITY, None, nights.checked(promotion=None))
    settle(checked, result, [])
    assert (result.verdicts, promotion_lines(checked.spec, result), nights.champion()) == ({}, [], None)


def test_a_champion_that_could_not_be_measured_keeps_its_place_with_the_reason(nights: Nights) -> None:
    checked, result = nights.night(BETTER, Champion(9, None, "champion v9 cannot be measured: its files are gone"))
    settle(checked, result, [])
    assert result.verdicts["small"] == Verdict(KEPT, "champion v9 cannot be measured: its files are gone", 9)


def test_a_champion_that_has_changed_since_the_comparison_keeps_its_place(nights: Nights) -> None:
    nights.night(FIDELITY, None)
    nights.night(FIDELITY, None)
    nights.models.promote(MODEL, 2, "by hand", None)
    checked, result = nights.night(BETTER, Champion(1, FIDELITY))
    settle(checked, result, [])
    verdict = result.verdicts["small"]
    assert (verdict.outcome, nights.champion()) == (KEPT, 2)
    assert verdict.reason.startswith("the champion is v2 now, not v1 as when v3 was compared")
    found = nights.models.verdict(MODEL, 3)
    assert found is not None and found.reason == verdict.reason
    settle(checked, again := nights.resumed(checked, result), [])
    assert again.verdicts["small"].outcome == KEPT


def test_a_run_that_is_resumed_says_the_same_again_and_changes_nothing(nights: Nights) -> None:
    checked, result = nights.night(FIDELITY, None)
    settle(checked, result, [])
    again = nights.resumed(checked, result)
    settle(checked, again, [])
    assert promotion_lines(checked.spec, again) == promotion_lines(checked.spec, result)
    standing = nights.models.standing(MODEL)
    assert standing is not None and standing.line == (1,)


def test_a_run_that_broke_off_between_decision_and_promotion_carries_out_what_it_had_decided(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, result = nights.night(FIDELITY, None)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Models, "promote", fail)
        with pytest.raises(KeyboardInterrupt):
            settle(checked, result, [])
    assert nights.champion() is None
    settle(checked, again := nights.resumed(checked, result), [])
    assert again.verdicts["small"].promoted
    assert nights.champion() == 1


def test_what_a_person_did_since_is_left_alone_by_a_resumed_run(nights: Nights) -> None:
    for after, champion in ((FIDELITY, None), (BETTER, Champion(1, FIDELITY))):
        checked, result = nights.night(after, champion)
        settle(checked, result, [])
    rollback(MODEL, nights.uri)
    settle(checked, again := nights.resumed(checked, result), [])
    assert (again.verdicts["small"].outcome, nights.champion()) == (ROLLED_BACK, 1)
    assert promotion_lines(checked.spec, again)[0].startswith("promotion: tiny-small v2 was rolled back: ")


def test_one_that_was_made_champion_by_hand_before_the_decision_is_left_there(nights: Nights) -> None:
    checked, result = nights.night(WORSE, Champion(1, None, "it was made champion by hand"))
    nights.client.set_registered_model_alias(MODEL, "champion", "1")
    settle(checked, result, [])
    assert result.verdicts["small"].promoted
    assert (nights.champion(), nights.models.known(MODEL).challenger) == (1, None)


def test_latency_is_taken_of_the_arms_of_both_and_the_champion_is_served_for_it(nights: Nights) -> None:
    checked = nights.checked(promotion={"latency": 0.1}, serving={})
    nights.night(FIDELITY, None)
    nights.models.promote(MODEL, 1, "by hand", None)
    reasons = []
    for new_ms, outcome in ((111.0, KEPT), (109.0, PROMOTED)):
        _, result = nights.night(BETTER, Champion(1, FIDELITY), checked)
        assert champion_arms(checked.spec, result) == {"tiny-small.champion": "models:/tiny-small/1"}
        rows = [
            {"arm": "tiny-small", "errors": 0, "latency_ms": {"p50": new_ms}},
            {"arm": "tiny-small.champion", "errors": 0, "latency_ms": {"p50": 100.0}},
            {"arm": "teacher", "errors": 24, "latency_ms": {}},
        ]
        settle(checked, result, rows)
        assert result.verdicts["small"].outcome == outcome
        reasons.append(result.verdicts["small"].reason)
    assert reasons[0] == "answer p50 111 ms against 100 ms of champion v1, allowed 110"
    assert "; answer p50 109 ms against 100 ms of champion v1, allowed 110; " in reasons[1]


@pytest.mark.parametrize(
    ("failed", "says"), [("tiny-small", "answer p50 was not measured"), ("tiny-small.champion", " of champion v3")]
)
def test_a_median_of_some_of_the_requests_decides_nothing(nights: Nights, failed: str, says: str) -> None:
    checked = nights.checked(promotion={"latency": 0.1}, serving={})
    _, result = nights.night(BETTER, Champion(3, FIDELITY), checked)
    arms = {"tiny-small": 5.0, "tiny-small.champion": 100.0}
    settle(
        checked, result, [{"arm": a, "errors": int(a == failed), "latency_ms": {"p50": ms}} for a, ms in arms.items()]
    )
    verdict = result.verdicts["small"]
    assert (verdict.outcome, says in verdict.reason) == (KEPT, True)
    assert verdict.reason.endswith(": not every request was answered")


@pytest.mark.parametrize(
    ("champion", "outcome"),
    [(None, None), (Champion(7, None, "gone"), KEPT), (Champion(7, FIDELITY), None)],
    ids=repr,
)
def test_without_a_comparison_of_endpoints_only_what_latency_decides_stays_undecided(
    nights: Nights, champion: Champion | None, outcome: str | None
) -> None:
    checked, result = nights.night(BETTER, champion, nights.checked(promotion={"latency": 0.1}, serving={}))
    settle(checked, result, [])
    if outcome is not None:
        assert result.verdicts["small"].outcome == outcome and not result.undecided
        return
    reason = "the endpoints could not be compared, and latency decides; resume with --resume"
    assert (result.undecided, result.verdicts, result.run.promotions) == ({"small": reason}, {}, {})
    assert nights.models.verdict(MODEL, 1) is None and nights.models.known(MODEL).challenger == 1


def test_a_verdict_from_an_earlier_session_needs_no_comparison(nights: Nights) -> None:
    checked, result = nights.night(
        BETTER, Champion(7, FIDELITY), nights.checked(promotion={"latency": 0.1}, serving={})
    )
    nights.models.keep(MODEL, 1, "a person decided so")
    settle(checked, result, [])
    assert (result.verdicts["small"].reason, result.undecided) == ("a person decided so", {})


def three(checked: Checked, result: FamilyResult) -> tuple[Checked, FamilyResult]:
    """The same family with three students that wait for their promotion."""
    names = ("small", "medium", "large")
    students = {name: replace(result.students["small"], name=name) for name in names}
    result = replace(result, students=students, versions=dict.fromkeys(names, 1), champions=dict.fromkeys(names))
    specs = dict.fromkeys(names, checked.spec.students["small"])
    return replace(checked, spec=checked.spec.model_copy(update={"students": specs})), result


def test_a_registry_that_is_away_is_waited_for_once_and_not_for_each_student(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, result = three(*nights.night(FIDELITY, None))
    asked: list[tuple[object, ...]] = []

    def away(*given: object) -> None:
        asked.append(given)
        raise AwayError("MLflow x does not answer: refused")

    monkeypatch.setattr(Models, "verdict", away)
    settle(checked, result, [])
    assert len(asked) == 1
    reason = "MLflow x does not answer: refused; resume with --resume"
    assert result.undecided == dict.fromkeys(("small", "medium", "large"), reason)
    assert len(result.trouble) == 3 and result.run.promotions == {}


def test_a_database_that_is_down_leaves_the_promotions_to_the_resumed_run(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, result = three(*nights.night(FIDELITY, None))
    tries: list[str] = []

    def down(uri: str) -> None:
        tries.append(uri)
        raise OperationalError("", None, Exception("connection failed"))

    with monkeypatch.context() as patch:
        patch.setattr(models_module, "client_of", down)
        patch.setattr(models_module, "patiently", lambda work, _: work())
        settle(checked, result, [])
    assert tries == [nights.uri]
    assert result.undecided.keys() == {"small", "medium", "large"}
    assert result.undecided["small"].startswith(f"MLflow {nights.uri} does not answer: ")
    assert result.undecided["small"].endswith("connection failed; resume with --resume")


@pytest.mark.parametrize(
    ("promotion", "champion"),
    [({"kl": 0.1}, Champion(7, FIDELITY)), ({"latency": 0.1}, None), ({"latency": 0.1}, Champion(7, None, "gone"))],
    ids=repr,
)
def test_no_champion_is_served_where_nothing_comes_of_it(
    nights: Nights, promotion: dict[str, float], champion: Champion | None
) -> None:
    checked, result = nights.night(BETTER, champion, nights.checked(promotion=promotion, serving={}))
    assert champion_arms(checked.spec, result) == {}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command; its exit code, and what it printed on stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", *arguments])
        monkeypatch.setenv("STILLHOUSE_CONFIG", "/nowhere/config.yaml")
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def test_promote_takes_the_challenger_or_a_version_and_rollback_the_one_before(
    nights: Nights, typed: Callable[..., tuple[int, str, str]]
) -> None:
    for _ in range(3):
        nights.night(FIDELITY, None)
    # The embedded registry is the default.
    assert typed("promote", MODEL) == (0, "tiny-small v3 is champion\n", "")
    assert typed("promote", MODEL, "--version", "1", "--tracking-uri", nights.uri) == (
        0,
        "tiny-small v1 is champion; v3 was it before\n",
        "",
    )
    assert typed("rollback", MODEL) == (0, "tiny-small v3 is champion again; v1 was it before\n", "")
    assert nights.champion() == 3
    verdict = nights.models.verdict(MODEL, 3)
    assert verdict is not None and verdict.reason.startswith("promoted by hand by ")


def test_the_registry_of_the_environment_comes_before_the_embedded_one(
    nights: Nights, tmp_path: Path, typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.night(FIDELITY, None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/lab.db")
    code, _, err = typed("promote", MODEL)
    assert code == 2 and f"there is no registry sqlite:///{tmp_path}/lab.db yet" in err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", nights.uri)
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "elsewhere"))
    assert typed("promote", MODEL)[0] == 0
    assert nights.champion() == 1


def test_mistakes_cost_one_line_and_2(nights: Nights, typed: Callable[..., tuple[int, str, str]]) -> None:
    nights.night(FIDELITY, None)
    mistakes = {
        ("promote", "other"): "no registered model 'other'",
        ("promote", MODEL, "--version", "7"): "tiny-small has no version 7",
        ("rollback", MODEL): "has no champion",
        ("rollback", "other"): "no registered model 'other'",
        ("promote", MODEL, "--tracking-uri", "sqlite:////nowhere/mlflow.db"): "there is no registry",
    }
    for arguments, says in mistakes.items():
        code, out, err = typed(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert err.startswith("error: ") and says in err
    assert typed("promote", MODEL)[0] == 0
    code, _, err = typed("promote", MODEL)
    assert (code, err) == (
        2,
        "error: tiny-small has no challenger, its champion is v1; name a version with --version N\n",
    )
    code, _, err = typed("rollback", MODEL)
    assert (code, err) == (2, "error: tiny-small had no champion before v1, so there is nothing to roll back to\n")
    assert not Path("/nowhere").exists()


def test_the_registry_of_the_context_in_use_comes_before_the_embedded_one(
    nights: Nights, tmp_path: Path, typed: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import jobs.promotion
    from jobs.contexts import Context

    there = Context(address="http://lab:8265", tracking_uri=f"sqlite:///{tmp_path}/lab.db")
    monkeypatch.setattr(jobs.promotion, "context_for", lambda *_: there)
    code, _, err = typed("rollback", MODEL)
    assert code == 2 and f"there is no registry sqlite:///{tmp_path}/lab.db yet" in err
