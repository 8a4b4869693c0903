"""A whole family on real parts: three students on ZeRO-1, 2 and 3 from one pass, into a real registry and back.

The teacher is a Phi, whose head has a bias: what a student must learn, gather, keep and be measured with.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.evaluate.report import write_report
from cluster.evaluate.result import FamilyResult
from cluster.preflight import Checked, preflight
from cluster.registry import fetch_model
from cluster.specfile import load_spec
from cluster.students.module import inputs_of
from cluster.watch import Status
from tests.headed import write_headed_model
from tests.integration.otlp import Sink, Span
from tests.tiny import run_here, write_family

# The first test waits for the whole family.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("ray_cluster"),
]
BATCHES = 40
# The same student three times over, so that how it is trained is all that differs.
SAME: dict[str, Any] = {"init": {"source": "teacher", "layers": 2}, "precision": "float32", "lr": 3e-3}
STUDENTS = {
    "one": {**SAME, "zero_stage": 1, "ranks": 1, "micro_batch": 4},
    "two": {**SAME, "zero_stage": 2, "ranks": 2, "micro_batch": 1},
    "three": {**SAME, "zero_stage": 3, "ranks": 2, "micro_batch": 2, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def family(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checked, FamilyResult, list[Status]]:
    folder = tmp_path_factory.mktemp("family")
    teacher = {"model": str(write_headed_model(folder / "phi", "phi"))}
    corpus = {"max_batches": BATCHES, "held_out": 0.2}
    sections: dict[str, Any] = {"corpus": corpus, "serving": {}, "checkpoints": {"every": BATCHES // 4}}
    path = write_family(folder, tiny, STUDENTS, teacher=teacher, **sections)
    return run_here(path)


def test_one_pass_fed_all_three(family: tuple[Checked, FamilyResult, list[Status]]) -> None:
    _, result, _ = family
    assert result.failed == {}
    assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)
    assert result.stats.delivered == dict.fromkeys(STUDENTS, BATCHES)


def test_a_batch_can_be_followed_from_the_teacher_to_every_student(
    family: tuple[Checked, FamilyResult, list[Status]], traces: Sink
) -> None:
    _, result, _ = family
    found = traces.traces(lambda span: span.facts.get("run") == result.run.name)
    # Half of them are taken; none is taken in part, and none twice, though one that fell behind reads from the store.
    assert 0 < len(found) < BATCHES
    ranks = [(name, rank) for name, student in STUDENTS.items() for rank in range(student["ranks"])]
    for spans in found.values():
        fetches = {span.id: span for span in spans if span.name == "fetch"}
        assert {span.parent for span in fetches.values()} == {""}
        assert len({span.facts["batch"] for span in fetches.values()}) == 1
        seen = Counter(span.name for span in spans)
        assert (seen["score"], seen["store.put"], seen["store.get"]) == (1, 1, len(fetches))
        for rank in ranks:
            assert_in_order(fetches, [s for s in spans if (s.facts.get("student"), s.facts.get("rank")) == rank])
        score, put = (next(span for span in spans if span.name == name) for name in ("score", "store.put"))
        asked = fetches[score.parent]
        assert asked.began < score.began < score.ended <= asked.ended <= put.ended


def assert_in_order(fetches: dict[str, Span], of_rank: list[Span]) -> None:
    by_name = {span.name: span for span in of_rank}
    deliver, wait, step = (by_name[name] for name in ("deliver", "wait", "step"))
    assert len(of_rank) == 3
    assert deliver.parent == wait.parent == step.parent
    assert fetches[step.parent].ended <= deliver.ended <= wait.ended <= step.began < step.ended


def test_mfu_is_told_of_teacher_and_students(
    family: tuple[Checked, FamilyResult, list[Status]],
) -> None:
    _, result, _ = family
    assert result.stats.pool.mfu is not None
    assert 0 < result.stats.pool.mfu < 1
    for point in result.points:
        # By the peak that the environment gives.
        flops = 6 * result.students[point.student].parameters * point.metrics["tokens_per_second"]
        share = point.metrics["mfu"] * 1e12 * STUDENTS[point.student]["ranks"] / flops
        # It counts all tokens; a few of them carry no loss, and that speed is of those that do.
        assert 1 < share < 1.2


def test_every_student_came_closer_to_the_teacher(family: tuple[Checked, FamilyResult, list[Status]]) -> None:
    _, result, _ = family
    for student in result.students.values():
        assert student.after.kl < 0.9 * student.before.kl
        assert student.after.teacher_perplexity == pytest.approx(student.before.teacher_perplexity)


def test_ranks_stages_and_micro_batches_do_not_change_what_is_learnt(
    family: tuple[Checked, FamilyResult, list[Status]],
) -> None:
    _, result, _ = family
    curves = {name: [point.metrics["loss"] for point in result.points if point.student == name] for name in STUDENTS}
    assert len(curves["one"]) == BATCHES
    for name in ("two", "three"):
        assert curves[name] == pytest.approx(curves["one"], rel=1e-3)
        assert result.students[name].after.kl == pytest.approx(result.students["one"].after.kl, rel=1e-3)
        assert result.students[name].parameters == result.students["one"].parameters


def test_each_student_is_registered_with_its_lineage(family: tuple[Checked, FamilyResult, list[Status]]) -> None:
    checked, result, _ = family
    client = mlflow.MlflowClient(checked.tracking_uri)
    for name in STUDENTS:
        version = client.get_model_version_by_alias(f"tiny-{name}", "challenger")
        assert int(version.version) == result.versions[name]
        tags = client.get_model_version(f"tiny-{name}", version.version).tags
        assert tags["stillhouse.teacher"] == checked.spec.teacher.model
        assert tags["stillhouse.corpus"] == result.corpus.address
        assert tags["stillhouse.labels"] == "kind=topk k=8 temperature=1.0"
        assert tags["stillhouse.code"]


def test_runs_hold_curves_and_the_resolved_spec(
    family: tuple[Checked, FamilyResult, list[Status]], tmp_path: Path
) -> None:
    checked, result, _ = family
    client = mlflow.MlflowClient(checked.tracking_uri)
    parent = client.get_run(result.run.mlflow[""])
    assert parent.info.status == "FINISHED"
    for name in STUDENTS:
        run = client.get_run(result.run.mlflow[name])
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        history = client.get_metric_history(run.info.run_id, "kl")
        assert [metric.step for metric in history] == list(range(1, BATCHES + 1))
        assert run.data.metrics["kl_after"] == pytest.approx(result.students[name].after.kl)
        assert parent.data.metrics[f"{name}.kl_after"] == run.data.metrics["kl_after"]
        # Stored once: its run's folder and MLflow's artifacts share the weights.
        assert (Path(result.students[name].model_dir) / "model.safetensors").stat().st_nlink == 2
        assert run.data.params["zero_stage"] == str(STUDENTS[name]["zero_stage"])
        downloaded = client.download_artifacts(run.info.run_id, "spec.json", dst_path=str(tmp_path))
        resolved = json.loads(Path(downloaded).read_text())
        assert resolved == checked.spec.model_dump(mode="json")


def test_a_registered_student_loads_back_through_mlflow_and_speaks(
    family: tuple[Checked, FamilyResult, list[Status]],
) -> None:
    checked, _, _ = family
    mlflow.set_tracking_uri(checked.tracking_uri)
    pipeline = mlflow.transformers.load_model("models:/tiny-three@challenger")
    assert pipeline("the still", max_new_tokens=4)[0]["generated_text"].startswith("the still")


def test_of_a_finished_student_only_its_model_is_kept(family: tuple[Checked, FamilyResult, list[Status]]) -> None:
    _, result, _ = family
    for name, student in result.students.items():
        (kept,) = (result.run.folder / "students" / name).glob("checkpoint_*/")
        assert Path(student.model_dir).parent == kept and not list(kept.rglob("*optim_states*"))


def test_the_model_that_left_zero_3_is_the_one_that_was_measured(
    family: tuple[Checked, FamilyResult, list[Status]],
) -> None:
    checked, _, _ = family
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            fetch_model(f"models:/tiny-{name}@challenger", checked.tracking_uri), dtype=torch.float32
        )
        for name in STUDENTS
    }
    tokens = torch.arange(24)[None]
    logits = {name: model(tokens).logits for name, model in models.items()}
    torch.testing.assert_close(logits["three"], logits["one"], rtol=1e-2, atol=1e-2)
    start = AutoModelForCausalLM.from_pretrained(checked.teacher.folder, dtype=torch.float32)(tokens).logits
    assert (logits["three"] - start).abs().max() > 0.1


def test_what_is_reported_is_what_the_models_themselves_compute(
    family: tuple[Checked, FamilyResult, list[Status]],
) -> None:
    """The divergence on the held-out text from both models' own logits, as anybody who loads them gets it."""
    checked, result, _ = family
    teacher = AutoModelForCausalLM.from_pretrained(checked.teacher.folder, dtype=torch.float32).eval()
    held_out = Batches(result.run.folder / CORPUS_FOLDER, checked.spec.corpus, checked.spec.evaluation.batches)
    for name in STUDENTS:
        folder = fetch_model(f"models:/tiny-{name}@challenger", checked.tracking_uri)
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert not torch.equal(student.lm_head.bias, teacher.lm_head.bias)  # it has been learnt too
        kl, tokens = 0.0, 0
        for number in range(held_out.held_out_count):
            inputs = inputs_of(held_out.held_out(number), torch.device("cpu"))
            with torch.no_grad():
                log_p_TV, log_q_TV = (
                    model(inputs.tokens_BS, position_ids=inputs.positions_BS, use_cache=False)
                    .logits[inputs.loss_mask_BS][:, : checked.teacher.vocabulary]
                    .log_softmax(-1)
                    for model in (teacher, student)
                )
            kl += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum())
            tokens += len(log_p_TV)
        assert kl / tokens == pytest.approx(result.students[name].after.kl, rel=1e-4)


def test_the_status_said_what_was_going_on(family: tuple[Checked, FamilyResult, list[Status]]) -> None:
    _, _, seen = family
    phases = list(dict.fromkeys(status.phase for status in seen))
    assert phases[:2] == ["reading the corpus", "distilling"]
    last = seen[-1]
    assert {name: student.phase for name, student in last.students.items()} == dict.fromkeys(STUDENTS, "finished")


def test_the_report_is_one_page_with_all_students(family: tuple[Checked, FamilyResult, list[Status]]) -> None:
    checked, result, _ = family
    quantiles = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    arm = {"arm": "tiny-one", "count": 3, "errors": 0, "first_token_ms": quantiles, "latency_ms": quantiles}
    result = replace(result, notices=["documents are not packed: student small"])
    page = write_report(checked.spec, result, [{**arm, "tokens_per_s": 4.0}], {"machine": "here"}).read_text()
    for name in STUDENTS:
        assert f"tiny-{name} v{result.versions[name]}" in page
    assert page.count("<svg") == 2
    assert "documents are not packed: student small" in page
    assert not re.search(r"<script|<link|(src|href)=\"(?!#)|url\((?!#)", page)  # nothing is fetched from elsewhere


def test_a_student_that_fails_harms_no_other(tiny: Path, tmp_path: Path) -> None:
    import shutil

    # Passes every check before the start, which reads no weights, and fails at its own: they are not numbers.
    shutil.copytree(tiny / "teacher", tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    torn = {"init": {"source": "pretrained", "model": str(tmp_path / "torn")}, "max_failures": 0}
    whole = {**SAME, "init": {"source": "teacher", "layers": 4}, "max_failures": 0, "micro_batch": 1}
    # MLflow refuses this one's name, which a prompt has taken; it ends before the other, which has more to do.
    students = {"small": whole, "torn": torn, "refused": {**SAME}}
    teacher = {"model": str(write_headed_model(tmp_path / "phi", "phi"))}
    path = write_family(tmp_path, tiny, students, teacher=teacher, corpus={"max_batches": 4, "held_out": 0.2})
    client = mlflow.MlflowClient(preflight(load_spec(path)).tracking_uri)
    client.register_prompt("tiny-refused", "a prompt")
    _, result, _ = run_here(path)
    assert set(result.students) == {"small", "refused"}
    assert result.students["small"].batches == 4
    assert abs(result.students["small"].before.kl) < 1e-6  # it began as an exact copy of its teacher
    assert "torn" in result.failed
    assert "rank 0" in result.failed["torn"] and "not finite" in result.failed["torn"]
    # One that cannot be registered keeps its model, and harms no other either.
    assert result.versions.keys() == {"small"} and result.unregistered.keys() == {"refused"}
    assert "refuses" in result.unregistered["refused"] and "--resume" in result.unregistered["refused"]
    assert Path(result.students["refused"].model_dir, "model.safetensors").is_file()
    assert [line.partition(" ")[2].partition(" ")[0] for line in result.trouble] == ["torn", "refused"]
    status = {name: client.get_run(run_id).info.status for name, run_id in result.run.mlflow.items()}
    assert status == {"": "FAILED", "small": "FINISHED", "torn": "FAILED", "refused": "FAILED"}

    client.delete_prompt("tiny-refused")
    _, again, _ = run_here(path, resume=True)
    assert again.unregistered == {} and again.versions == {"small": result.versions["small"], "refused": 1}


@pytest.mark.nightly
def test_one_student_that_carries_documents_over_lays_the_family_s_text_out_unpacked(
    tiny: Path, tmp_path: Path
) -> None:
    """A Mamba-2 has no mask that keeps packed documents apart, and the teacher scores what it reads."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    from tests.tiny import write_tiny_tokenizer

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    mamba = write_tiny_tokenizer(tmp_path / "mamba")
    Mamba2ForCausalLM(Mamba2Config(vocab_size=320, chunk_size=16, **sizes, **ids)).save_pretrained(mamba)
    students = {"llama": SAME, "mamba": {**SAME, "init": {"source": "pretrained", "model": str(mamba)}}}
    path = write_family(tmp_path, tiny, students, corpus={"max_batches": 20})
    checked, result, _ = run_here(path)
    assert result.failed == {}
    assert not result.corpus.packed
    assert result.notices == checked.packing_notices()
    assert "student mamba: mamba2 models carry one document into the next" in result.notices[0]
    batches = Batches(result.run.folder / CORPUS_FOLDER, checked.spec.corpus, checked.spec.evaluation.batches)
    assert not any(batches.train(number).packed for number in range(batches.count))
    for name, student in result.students.items():
        assert student.after.kl < student.before.kl, name
