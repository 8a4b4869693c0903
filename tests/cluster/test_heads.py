"""Heads that are more than a matrix, from the teacher's labels to the student's gradient; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cluster.corpus.batches import Batch, content_address
from cluster.errors import UserError
from cluster.evaluate.fidelity import fidelity_of, fidelity_sums
from cluster.heads import OutputHead, head_of, probe_config, probe_head
from cluster.labels.kinds import Hidden, Labels
from cluster.labels.make import as_tensor
from cluster.labels.store.objects import pack_head, unpack_head
from cluster.labels.wire import decode
from cluster.models import TeacherModel, load_config
from cluster.spec import (
    DenseLabels,
    HiddenLabels,
    LabelsSpec,
    SampledLabels,
    Scratch,
    StudentSpec,
    TeacherLayers,
    TeacherSpec,
    TopKLabels,
)
from cluster.students.initial import initial_student
from cluster.students.losses.from_labels import targets_of
from cluster.students.losses.fused import distillation_loss
from cluster.students.losses.objective import Objective
from cluster.students.losses.targets import HiddenTargets
from cluster.students.module import Student, inputs_of
from cluster.students.zero import adamw
from cluster.teacher.shard import Shard
from tests.headed import HEADED, headed_model, write_headed_model
from tests.tiny import VOCABULARY

CPU = torch.device("cpu")
KINDS: dict[str, LabelsSpec] = {
    "topk": TopKLabels(k=8),
    "sampled": SampledLabels(kind="sampled", draws=1024),
    "hidden": HiddenLabels(kind="hidden"),
    "dense": DenseLabels(kind="dense"),
}
every_model = pytest.mark.parametrize("model", HEADED)
SOFT = Objective(0.0, 1.0)
ALL_LAYERS = TeacherLayers(source="teacher", layers=4)


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens_BS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 24)).astype(np.int32)
    mask_BS = np.ones_like(tokens_BS, dtype=np.bool_)
    mask_BS[:, -1] = False
    positions_BS = np.tile(np.arange(24, dtype=np.int32), (4, 1))
    return Batch(0, tokens_BS, mask_BS, positions_BS, content_address(tokens_BS, mask_BS, positions_BS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_headed_model(tmp_path_factory.mktemp("headed") / kind, kind) for kind in HEADED}


def shard_of(folder: Path, spec: LabelsSpec, monkeypatch: pytest.MonkeyPatch, dtype: str = "float32") -> Shard:
    """The one shard of a teacher, in this process."""
    monkeypatch.setattr("cluster.teacher.shard.keep_memory", lambda: None)
    teacher = TeacherModel(str(folder), VOCABULARY, "0" * 16, "0" * 16)
    shard = Shard(TeacherSpec(model=str(folder), dtype=dtype), spec, teacher, 1, 0)
    shard.join("", 0)
    return shard


def labels_of(answer: Any) -> Labels:
    return decode(answer[1])[0]


def teacher_head(shard: Shard) -> OutputHead[Tensor]:
    """As a student gets it: out of the store."""
    head = shard.head()
    assert head is not None
    return unpack_head(pack_head(head)).map(as_tensor)


def copy_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A student of all layers of its teacher."""
    return initial_student(ALL_LAYERS, teacher_dir=folder, student_dir=None, dtype=dtype).eval()


def soft_loss(student: Student, batch: Batch, labels: Labels, head: OutputHead[Tensor]) -> tuple[Tensor, Tensor]:
    inputs = inputs_of(batch, CPU)
    target = targets_of(labels, inputs.next_T, head)
    return student(inputs, partial(distillation_loss, target=target, objective=SOFT, vocabulary=VOCABULARY))


@every_model
def test_a_head_s_logits_are_the_model_s_own(model: str) -> None:
    whole, tokens = headed_model(model), torch.arange(24)[None] * 7 % VOCABULARY
    head = head_of(whole)
    with torch.no_grad():
        own, computed = whole(tokens).logits, head.logits(whole.base_model(tokens).last_hidden_state)
    torch.testing.assert_close(computed, own, rtol=1e-5, atol=1e-5)
    assert (head.bias_V is not None) is (model in ("phi", "gptj"))
    assert head.is_linear is (model in ("phi", "gptj"))


@every_model
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_copy_of_the_teacher_has_nothing_to_learn(
    model: str, kind: str, batch: Batch, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(folders[model], KINDS[kind], monkeypatch)
    labels, head = labels_of(shard.score(batch)), teacher_head(shard)
    student = Student(copy_of(folders[model]))
    loss, _ = soft_loss(student, batch, labels, head)
    per_token = float(loss.detach()) / batch.loss_tokens
    assert abs(per_token) < (0.05 if kind == "sampled" else 1e-5)  # draws are exact only in the mean
    # A copy that lacks what its head adds to the product has something to learn.
    with torch.no_grad():
        if student.head.bias is not None:
            student.head.bias.zero_()
    student.head.scale, student.head.softcap = 1.0, None
    assert float(soft_loss(student, batch, labels, head)[0].detach()) / batch.loss_tokens > per_token + 0.05


@every_model
def test_an_exact_copy_of_the_teacher_is_measured_as_one(
    model: str, batch: Batch, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, inputs = shard_of(folders[model], KINDS["topk"], monkeypatch), inputs_of(batch, CPU)
    exact = targets_of(labels_of(shard.hidden(batch)), inputs.next_T, teacher_head(shard))
    assert isinstance(exact, HiddenTargets)
    whole = copy_of(folders[model])
    use = partial(fidelity_sums, teacher_logits=exact.logits, next_T=inputs.next_T, vocabulary=VOCABULARY)
    with torch.no_grad():
        found = fidelity_of(Student(whole)(inputs, use))
        own = whole(inputs.tokens_BS).logits[inputs.loss_mask_BS][:, :VOCABULARY]
    assert abs(found.kl) < 1e-5 and found.agreement == 1.0
    assert found.student_perplexity == pytest.approx(
        float(torch.nn.functional.cross_entropy(own, inputs.next_T).exp()), rel=1e-4
    )


@pytest.mark.parametrize("model", ["phi", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_bfloat16_has_next_to_nothing_to_learn(
    model: str, kind: str, batch: Batch, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(folders[model], KINDS[kind], monkeypatch, "bfloat16")
    labels, head = labels_of(shard.score(batch)), teacher_head(shard)
    student = Student(copy_of(folders[model], torch.bfloat16))
    loss = float(soft_loss(student, batch, labels, head)[0].detach()) / batch.loss_tokens
    assert abs(loss) < (0.05 if kind == "sampled" else 1e-4)


@every_model
def test_a_teacher_changed_at_one_loss_unit_moves_that_row_s_gradient_alone(
    model: str, batch: Batch, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of(folders[model], KINDS["hidden"], monkeypatch)
    labels, head, row = labels_of(shard.score(batch)), teacher_head(shard), 30
    assert isinstance(labels, Hidden)
    other_TD = labels.hidden_TD.copy()
    other_TD[row] = other_TD[row + 5]
    inputs, student = inputs_of(batch, CPU), Student(copy_of(folders[model]))
    hidden_TD = student(inputs, lambda hidden_TD, head: hidden_TD).detach().requires_grad_()
    grads = []
    for each in (labels, replace(labels, hidden_TD=other_TD)):
        target = targets_of(each, inputs.next_T, head)
        use = partial(distillation_loss, target=target, objective=SOFT, vocabulary=VOCABULARY)
        grads.append(torch.autograd.grad(student.head(hidden_TD, use)[0], hidden_TD)[0])
    moved_T = (grads[1] - grads[0]).norm(dim=-1)
    assert moved_T.argmax() == row
    assert float(moved_T[row]) > 1e-2 > 1e-4 > float(moved_T.sum() - moved_T[row])


def test_a_bias_is_learnt_and_not_decayed(folders: dict[str, Path]) -> None:
    model = copy_of(folders["phi"])
    student = Student(model)
    assert student.head.bias is model.lm_head.bias
    spec = StudentSpec(init=ALL_LAYERS)
    decayed, spared = (group["params"] for group in adamw(student, spec).param_groups)
    assert any(p is model.lm_head.bias for p in spared) and any(p is model.lm_head.weight for p in decayed)


@pytest.mark.parametrize("model", ["phi", "gemma2", "granite", "cohere"])
def test_a_scratch_student_has_its_teacher_s_head(model: str, folders: dict[str, Path]) -> None:
    init = Scratch(source="scratch", layers=2, hidden_size=32, heads=4, kv_heads=4, intermediate_size=48, seed=5)
    small = initial_student(init, teacher_dir=folders[model], student_dir=None, dtype=torch.float32)
    probe_head(small, "students.small")
    mine, theirs = head_of(small), head_of(headed_model(model))
    assert (mine.scale, mine.softcap, mine.bias_V is None) == (theirs.scale, theirs.softcap, theirs.bias_V is None)
    assert mine.weight_VD.shape == (320, 32)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(check: Callable[[], None]) -> str:
    with pytest.raises(UserError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_model
def test_a_known_head_passes_in_every_precision_and_keeps_its_mode(model: str, dtype: torch.dtype) -> None:
    whole = headed_model(model).to(dtype).train()
    probe_head(whole, "teacher.model")
    assert whole.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", ["bias", "logit_scale", "final_logit_softcapping"])
def test_a_head_that_does_what_its_configuration_does_not_name_is_refused(setting: str, dtype: torch.dtype) -> None:
    model = headed_model({"bias": "phi", "logit_scale": "cohere"}.get(setting, "gemma2")).to(dtype)
    hidden = head_of(model)
    if setting == "bias":
        bias_V, model.lm_head.bias = model.lm_head.bias, None
        model.lm_head.register_forward_hook(lambda module, given, out: out + bias_V)
    elif setting == "logit_scale":
        model.config.logit_scale = 1.0
    else:
        model.config.final_logit_softcapping = None
        model.lm_head.register_forward_hook(lambda module, given, out: hidden.finish(out))
    said = refusal(lambda: probe_head(model, "teacher.model: here"))
    assert said.startswith(f"teacher.model: here: {type(model).__name__} computes other logits than")
    assert "they differ by" in said


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    model = llama()
    model.model.norm.register_forward_hook(lambda module, given, out: out + out.mean(1, keepdim=True))
    assert "LlamaForCausalLM is not causal" in refusal(lambda: probe_head(model, "teacher.model"))


def test_a_model_with_broken_weights_is_refused() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    assert "logits that are not finite" in refusal(lambda: probe_head(model, "teacher.model"))


def test_what_the_padded_rows_hold_does_not_matter() -> None:
    model = headed_model("phi")
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] = torch.nan
        model.lm_head.bias[VOCABULARY:] = torch.inf
    probe_head(model, "teacher.model", VOCABULARY)


@pytest.mark.parametrize("fields", [{}, {"is_decoder": True}], ids=["an encoder", "a decoder with a transform"])
def test_bert_is_no_causal_language_model(fields: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.for_model("bert", architectures=["BertLMHeadModel"], **fields)
    config.save_pretrained(tmp_path)
    said = refusal(lambda: probe_config(load_config(tmp_path, "teacher.model"), "teacher.model"))
    assert said.startswith("teacher.model: BertLMHeadModel")


def test_a_teacher_that_is_refused_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", vocab_size=320, is_decoder=True, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    said = refusal(lambda: shard_of(tmp_path, KINDS["topk"], monkeypatch))
    assert said.startswith(f"teacher.model: {tmp_path}: BertLMHeadModel computes other logits")


def test_a_configuration_that_cannot_be_made_tiny_is_left_to_the_start(caplog: pytest.LogCaptureFixture) -> None:
    probe_config(AutoConfig.for_model("reformer"), "teacher.model")
    assert "teacher.model is probed when it starts, not before: no tiny reformer" in caplog.text


def test_a_configuration_is_left_as_it_was() -> None:
    config = AutoConfig.for_model("gemma2")
    before = config.to_dict()
    probe_config(config, "teacher.model")
    assert config.to_dict() == before
