"""Scheduled runs of one family on real parts: only a better student becomes champion, and it can be put back."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import ray

from cluster.board import Board
from cluster.evaluate.figures import Fidelity
from cluster.evaluate.notices import at_the_end
from cluster.evaluate.report import write_report
from cluster.evaluate.result import FamilyResult
from cluster.preflight import Checked
from cluster.registry import PROMOTION, REASON, Calls, Models
from cluster.registry.calls import wait_for
from cluster.spec import FamilySpec
from cluster.students.champions import Champions
from cluster.students.job import StudentJob
from jobs.promotion import promotion_lines, rollback, settle
from jobs.run import compare
from tests.tiny import run_here, tiny_family, write_family, write_tiny_corpus

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly, pytest.mark.usefixtures("ray_cluster")]
MODEL = "tiny-small"
STUDENT: dict[str, Any] = {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "lr": 3e-3}
# So much too high that it unlearns everything.
FAR_TOO_HIGH = 3.0
# What a random teacher teaches is a little noisy, in all but the KL that is learnt.
PROMOTION_SECTION = {"perplexity": 0.5, "agreement": 0.05}
# Some forty held-out documents: with the four batches of the default there would be a handful, and no bound.
HELD_OUT_BATCHES = 18


def write_garbage(path: Path) -> Path:
    """Words whose letters are shuffled."""
    dice = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [{"text": " ".join("".join(dice.choices(letters, k=6)) for _ in range(15))} for _ in range(192)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def night(
    folder: Path,
    tiny: Path,
    batches: int,
    corpus: Path,
    sections: dict[str, Any] | None = None,
    **student: Any,
) -> Path:
    """The spec of one night."""
    fields: dict[str, Any] = {"max_batches": batches, "held_out": 0.2, "paths": [str(corpus)]}
    rest = {"promotion": PROMOTION_SECTION, "evaluation": {"batches": HELD_OUT_BATCHES}, **(sections or {})}
    return write_family(folder, tiny, {"small": {**STUDENT, **student}}, corpus=fields, **rest)


def decided(path: Path) -> tuple[Checked, FamilyResult]:
    """Run a night to its end as `stillhouse run` does."""
    checked, result, _ = run_here(path)
    settle(checked, result, compare(checked, result) if checked.spec.serving else [])
    return checked, result


def model_id(client: Any, version: int) -> str:
    """MLflow's folder of a version's files."""
    return str(client.get_model_version(MODEL, str(version)).source).rpartition("/")[2]


def aliases(client: Any) -> dict[str, int]:
    found = {}
    for alias in ("champion", "challenger"):
        try:
            found[alias] = int(client.get_model_version_by_alias(MODEL, alias).version)
        except mlflow.exceptions.MlflowException:
            continue
    return found


def figures(fidelity: Fidelity) -> dict[str, float]:
    """All but the blocks."""
    return {name: value for name, value in asdict(fidelity).items() if name != "blocks"}


@pytest.mark.timeout(1800)  # five families one after the other
def test_only_a_better_student_takes_the_champion_s_place(
    tiny: Path, tmp_path: Path, stillhouse_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_tiny_corpus(tmp_path / "text.jsonl", documents=200, words=24)
    # Night 1: there is no champion.
    checked, first = decided(night(tmp_path, tiny, 16, text))
    client = mlflow.MlflowClient(checked.tracking_uri)
    assert first.champions == {"small": None}
    assert aliases(client) == {"champion": 1}
    (line,) = promotion_lines(checked.spec, first)
    assert line.startswith("promotion: tiny-small v1 is champion: there was no champion; KL ")
    assert " of its initial weights, 95 % bound " in line
    small = first.students["small"]
    assert len(small.after.blocks) == len(small.before.blocks) > 20
    assert sum(block[1] for block in small.after.blocks) / small.after.tokens == pytest.approx(small.after.kl)

    # Night 2: garbage, learnt far too fast, on two ranks. Both are measured on that night's held-out text.
    garbage = write_garbage(tmp_path / "garbage.jsonl")
    path = night(tmp_path, tiny, 8, garbage, lr=FAR_TOO_HIGH, ranks=2, micro_batch=2)
    checked, second = decided(path)
    champion = second.champions["small"]
    assert champion is not None and champion.version == 1 and champion.fidelity is not None
    # The two ranks' sums are of the same blocks as those of the one process that measures the champion.
    tokens = [[block[0] for block in each.blocks] for each in (champion.fidelity, second.students["small"].after)]
    assert tokens[0] == tokens[1] and sum(tokens[0]) == second.students["small"].after.tokens
    assert champion.fidelity.teacher_perplexity == pytest.approx(second.students["small"].after.teacher_perplexity)
    assert second.students["small"].after.kl > 1.1 * champion.fidelity.kl
    assert aliases(client) == {"champion": 1, "challenger": 2}
    reason = f"KL {second.students['small'].after.kl:.3g} against {champion.fidelity.kl:.3g} of champion v1"
    found = client.get_model_version(MODEL, "2")
    for tags in (found.tags, client.get_run(found.run_id).data.tags):
        assert tags[PROMOTION] == "kept"
        assert tags[REASON].startswith(reason)
    (line,) = promotion_lines(checked.spec, second)
    assert line.startswith(f"promotion: tiny-small v2 stays challenger: {reason}")
    state = json.loads((second.run.folder / "run.json").read_text())
    assert state["promotions"] == {"small": asdict(second.verdicts["small"])}
    assert reason in write_report(checked.spec, second, [], {}).read_text()

    # Night 3: the first night's text, for longer. The champion is measured as it was when it was new, and both are
    # served side by side.
    gate = {**PROMOTION_SECTION, "latency": 100.0}
    serving = {"requests": 2, "max_tokens": 4, "include_teacher": False, "cpus_per_arm": 0.2}
    checked, third = decided(night(tmp_path, tiny, 64, text, sections={"promotion": gate, "serving": serving}))
    champion = third.champions["small"]
    assert champion is not None and champion.fidelity is not None
    assert figures(champion.fidelity) == pytest.approx(figures(small.after), rel=1e-5)
    assert np.array(champion.fidelity.blocks) == pytest.approx(np.array(small.after.blocks), rel=1e-4)
    assert third.students["small"].after.kl < champion.fidelity.kl
    assert third.verdicts["small"].promoted and third.verdicts["small"].against == 1
    assert re.search(r"answer p50 [\d.]+ ms against [\d.]+ ms of champion v1", third.verdicts["small"].reason)
    assert aliases(client) == {"champion": 3}

    capsys.readouterr()
    rollback(MODEL, checked.tracking_uri)
    assert capsys.readouterr().out == "tiny-small v1 is champion again; v3 was it before\n"
    assert aliases(client) == {"champion": 1}
    assert client.get_model_version(MODEL, "3").tags[PROMOTION] == "rolled back"

    # Night 4: the champion's files are gone. The family ends well all the same.
    shutil.rmtree(stillhouse_home / "artifacts" / "tiny" / "models" / model_id(client, 1))
    _, fourth = decided(night(tmp_path, tiny, 2, text))
    assert fourth.failed == {}
    assert "champion v1 cannot be measured: " in fourth.verdicts["small"].reason
    assert aliases(client) == {"champion": 1, "challenger": 4}

    # Another family without a champion, whose student unlearns: it is registered, and nothing is promoted.
    checked, fifth = decided(night(tmp_path, tiny, 8, text, sections={"name": "other"}, lr=FAR_TOO_HIGH))
    assert (fifth.champions, fifth.versions) == ({"small": None}, {"small": 1})
    verdict = fifth.verdicts["small"]
    assert not verdict.promoted and "of its initial weights, must be better" in verdict.reason
    (warning,) = at_the_end(checked.spec, fifth)
    assert warning.startswith("warning: student small ended worse than it began: KL ")
    standing = Models(checked.tracking_uri).standing("other-small")
    assert standing is not None and (standing.champion, standing.challenger) == (None, 1)


@ray.remote(num_cpus=0)
class OneChampion:
    """A registry in which every model has the same champion."""

    def champion(self, name: str) -> int:
        """Version 4."""
        return 4


def settled(champions: Champions, calls: Calls, seconds: float) -> None:
    """Process what comes, as a family does, until nothing is waited for."""
    deadline = time.monotonic() + seconds
    while champions.busy:
        assert time.monotonic() < deadline
        for ref in wait_for([*champions.refs, *calls.refs], 0.1):
            assert calls.take(ref) or champions.take(ref)
        champions.look({"small": "finished"})


def champions_of(folder: Path, cpus: float, versions: dict[str, int]) -> tuple[Champions, Calls]:
    """Of one student, whose ranks each need so many CPUs, and whose run has waited for a place for long enough."""
    spec = FamilySpec.model_validate(tiny_family(patience_s=0.5))
    student = spec.students["small"].model_copy(update={"cpus_per_rank": cpus})
    spec = spec.model_copy(update={"students": {"small": student}})
    board, nobody, calls = ray.remote(Board).options(num_cpus=0).remote(str(folder)), None, Calls()
    job = StudentJob("small", spec, nobody, None, 1, nobody, board, "")  # type: ignore[arg-type]
    return Champions(OneChampion.remote(), "sqlite:////nowhere/mlflow.db", {"small": job}, versions, calls), calls


def test_a_champion_that_finds_no_place_is_given_up_and_holds_nobody_up(tmp_path: Path) -> None:
    champions, calls = champions_of(tmp_path, cpus=512.0, versions={})
    champions.ask("small")
    assert set(champions.busy) == {"small"}
    settled(champions, calls, 60)
    found = champions.found["small"]
    assert found is not None and (found.version, found.fidelity) == (4, None)
    assert found.why_not == ("champion v4 cannot be measured: it has had no place on the cluster for patience_s 0.5 s")
    assert not champions.busy


def test_a_version_that_is_champion_already_is_not_measured_against_itself(tmp_path: Path) -> None:
    champions, calls = champions_of(tmp_path, cpus=512.0, versions={"small": 4})
    champions.ask("small")
    settled(champions, calls, 60)
    found = champions.found["small"]
    assert found is not None and (found.version, found.why_not) == (4, "it was made champion by hand")


def test_nobody_is_asked_for_a_student_that_nothing_is_to_be_decided_of(tmp_path: Path) -> None:
    champions, calls = champions_of(tmp_path, cpus=512.0, versions={})
    champions.ask("large")
    assert (champions.refs, calls.refs, champions.found) == ([], [], {})
