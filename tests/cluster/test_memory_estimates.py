"""Estimates of peak memory against what autograd keeps and against the published sums; what they refuse."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from cluster.capacity import Need, check_capacity, student_needs, teacher_needs
from cluster.errors import UserError
from cluster.footprint import check_devices, memory_report, stages_of
from cluster.memory import (
    GIB,
    ITEM,
    Estimate,
    Shape,
    buckets,
    family_estimates,
    served_estimate,
    shape_of,
    states,
    student_estimate,
    teacher_estimate,
    with_memory,
)
from cluster.models import TeacherModel
from cluster.spec import CorpusSpec, DenseLabels, FamilySpec, StudentSpec, TeacherSpec, TopKLabels
from cluster.students.job import StudentJob
from cluster.students.module import Inputs, Student
from cluster.students.trainer import StoppedError, _fit
from cluster.teacher.replica import Replica, ReplicaLostError
from tests.tiny import tiny_family

SEQUENCES, LENGTH = 2, 128
CORPUS = CorpusSpec(paths=["-"], sequence_length=LENGTH)
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=344, pad_token_id=None),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=4, intermediate_size=512, pad_token_id=None),
    "gpt2": GPT2Config(vocab_size=64, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0),
}
# Qwen2.5-Coder 1.5B, its 8-layer cut and the 0.5B, as a newcomer had them on a machine with 24 GiB.
TEACHER = Shape(1_777_000_000, 151_936, 1536, 28, 12, 1536, 256, 8960)
CUT = Shape(842_000_000, 151_936, 1536, 8, 12, 1536, 256, 8960)
SMALL = Shape(630_000_000, 151_936, 896, 24, 14, 896, 128, 4864)


def student(**fields: Any) -> StudentSpec:
    return StudentSpec.model_validate({"init": {"source": "teacher", "layers": 1}, **fields})


def kept_by_autograd(config: Any, dtype: torch.dtype, packed: bool) -> int:
    """Bytes of all tensors that a student's forward pass keeps for its backward pass, but for parameters."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens_BS = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
    positions_BS = (torch.arange(LENGTH) % (LENGTH // 2)).expand(SEQUENCES, -1) if packed else None
    inputs = Inputs(tokens_BS, positions_BS, torch.ones_like(tokens_BS, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The loss is left out: the head only sums up what it is given.
        Student(model, "masked")(inputs, lambda hidden_TD, head: hidden_TD.float().sum())
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(size for key, size in kept.items() if key not in parameters)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "least", "most"), [("llama", 0.9, 1.1), ("qwen2", 0.9, 1.1), ("gpt2", 0.7, 1.4)])
def test_a_layer_s_activations_are_what_autograd_keeps(
    kind: str, least: float, most: float, precision: str, packed: bool
) -> None:
    config = CONFIGS[kind]
    if kind == "gpt2":
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    shape = shape_of(config, "model")
    per_token = shape.layer_bytes(ITEM[precision], LENGTH if packed else 0)
    estimated = SEQUENCES * LENGTH * shape.layers * per_token
    measured = kept_by_autograd(config, getattr(torch, precision), packed)
    assert least < estimated / measured < most, (estimated, measured)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shape_counts_tied_parameters_once(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    shape = shape_of(CONFIGS[kind], "model")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.vocabulary, shape.hidden, shape.layers, shape.heads) == (64, 128, 4, 4)


@pytest.mark.parametrize("ranks", [1, 4])
def test_states_are_shared_out_as_zero_does(ranks: int) -> None:
    psi = 10**6
    found = {
        stage: sum(states(psi, student(zero_stage=stage, ranks=ranks, precision="bfloat16")).values()) / psi
        for stage in (1, 2, 3)
    }
    gathered = 2 if ranks > 1 else 0
    # Weights 2 bytes, gradients 4, master weights and moments 12; stage 1 keeps the last gradients in bfloat16 too.
    assert found == pytest.approx(
        {1: 2 + 4 + 2 + 12 / ranks, 2: 2 + (4 + 12) / ranks, 3: (2 + 4 + 12) / ranks + gathered}
    )
    assert states(psi, student(zero_stage=3, precision="float32"))["optimizer"] == 8 * psi


def test_checkpointing_and_smaller_micro_batches_need_less_and_a_gpu_has_no_heap() -> None:
    whole, again = (student_estimate(SMALL, student(gradient_checkpointing=on), CORPUS).total for on in (False, True))
    one, two = (student_estimate(SMALL, student(micro_batch=n), CORPUS).total for n in (1, 2))
    assert again < whole == one < two
    on_gpu = student_estimate(SMALL, student(gpus_per_rank=1), CORPUS)
    assert "heap" not in on_gpu.parts
    assert (on_gpu.device, on_gpu.device > on_gpu.host) == (on_gpu.total, True)


def test_a_cut_s_loading_counts_the_teacher() -> None:
    tiny = Shape(10**6, 1000, 64, 2, 2, 64, 64, 128)
    assert student_estimate(tiny, student(), CORPUS, TEACHER).total > 2 * TEACHER.parameters


def test_one_rank_reduces_nothing_in_stage_1() -> None:
    assert buckets(10**6, student()) == 0
    assert buckets(10**6, student(ranks=2)) == 4 * 10**6


def test_shards_share_the_teacher_s_layers() -> None:
    whole, half = (
        teacher_estimate(TEACHER, TeacherSpec(model="m", shards=shards), CORPUS).parts["weights"] for shards in (1, 2)
    )
    assert whole == 2 * TEACHER.parameters
    assert whole / 2 < half < 0.7 * whole


@pytest.mark.parametrize("gpus", [0.0, 1.0])
def test_dense_labels_of_a_whole_batch_count_in_host_memory(gpus: float) -> None:
    spec = TeacherSpec(model="m", gpus_per_shard=gpus)
    few, many = (
        teacher_estimate(TEACHER, spec, CORPUS, labels) for labels in (TopKLabels(), DenseLabels(kind="dense"))
    )
    tokens = CORPUS.batch_sequences * LENGTH
    # Every logit in bfloat16, as columns and as blocks.
    assert many.host - few.host == 2 * 2 * tokens * TEACHER.vocabulary
    assert many.device == few.device


def newcomer(**sections: Any) -> tuple[FamilySpec, dict[str, Estimate]]:
    """The newcomer's family with the memory that it asks for, and its estimates."""
    small = {"init": {"source": "pretrained", "model": "0.5b"}, "precision": "bfloat16"}
    tree = tiny_family(students={"small": small, "cut": {"init": {"source": "teacher", "layers": 8}}}, **sections)
    spec = FamilySpec.model_validate(tree)
    estimates = family_estimates(spec, TEACHER, {"small": SMALL, "cut": CUT}, packed=True)
    return with_memory(spec, estimates), estimates


def test_the_newcomer_s_family_is_refused_on_24_gib_and_not_on_64() -> None:
    spec, estimates = newcomer()
    here = {"CPU": 8.0, "GPU": 0.0, "memory": 24.0 * GIB}
    with pytest.raises(
        UserError, match=r"^this machine is too small .*RAY_ADDRESS\): .*18 bytes per parameter.*micro_batch"
    ) as refused:
        memory_report(spec, estimates, here, elsewhere=False)
    assert "\n" not in str(refused.value)
    lines = memory_report(spec, estimates, {**here, "memory": 64.0 * GIB}, elsewhere=False)
    assert [line.split(":")[0].strip() for line in lines[1:5]] == [
        "the teacher",
        "student small",
        "student cut",
        "the family's own processes",
    ]
    assert "optimizer 9.4" in lines[3]  # 12 bytes for each of 842 million parameters, in GiB


def test_too_little_memory_is_refused_also_where_cpus_are_too_few() -> None:
    spec, estimates = newcomer()
    here = {"CPU": 2.0, "GPU": 0.0, "memory": 24.0 * GIB}
    with pytest.raises(UserError, match=r"^this machine is too small.*2 CPU.*24.0 GiB\. Lower cpus_.*\. For memory, "):
        memory_report(spec, estimates, here, elsewhere=False)


@pytest.mark.parametrize("lacks", ["CPU", "GPU"])
def test_a_family_that_asks_for_more_cpus_or_for_gpus_may_be_for_a_cluster(lacks: str) -> None:
    spec, estimates = newcomer(teacher={"gpus_per_shard": 1.0} if lacks == "GPU" else {})
    here = {"CPU": 8.0, "GPU": 0.0, "memory": 2.0 * GIB}
    if lacks == "CPU":
        here |= {"CPU": 1.0, "memory": 64.0 * GIB}
    needed = "3 CPU at a time" if lacks == "CPU" else "3 CPU and 1 GPU at a time"
    (warning,) = [line for line in memory_report(spec, estimates, here, elsewhere=False) if "warning" in line]
    assert "`run` would refuse this family on this machine" in warning and needed in warning
    assert not any("warning" in line for line in memory_report(spec, estimates, here, elsewhere=True))


def test_what_the_user_gives_counts_instead_of_the_estimate() -> None:
    spec, _ = newcomer(teacher={"memory_per_shard": "6GiB"}, serving={"memory_per_arm": "2GiB"})
    assert teacher_needs(spec.teacher).memory == 6 * GIB
    (_, serving) = stages_of(spec)
    assert serving[0].memory == 2 * GIB
    assert student_needs("small", spec.students["small"]).memory > 10 * GIB


def test_memory_is_placed_like_cpus_and_a_node_that_names_none_has_no_limit() -> None:
    needs = [Need("a", 2, 1, 0, 3.0 * GIB), Need("b", 1, 0, 0, 1.0 * GIB)]
    check_capacity(needs, [{"CPU": 2.0}])
    check_capacity(needs, [{"CPU": 1.0, "memory": 3.0 * GIB}, {"CPU": 1.0, "memory": 4.0 * GIB}])
    with pytest.raises(UserError, match=r"a needs 2 x \(1 CPU and 3.0 GiB\) and does not fit.*4.0 GiB\. For memory, "):
        check_capacity(needs, [{"CPU": 8.0, "memory": 4.0 * GIB}])
    with pytest.raises(UserError, match=r"Lower cpus_per_shard"):
        check_capacity(needs, [{"CPU": 1.0, "memory": 64.0 * GIB}])


@pytest.mark.parametrize(
    ("node", "refused"),
    [
        ({"GPU": 1.0, "accelerator_type:T4": 1.0}, True),
        ({"GPU": 1.0, "accelerator_type:H100": 1.0}, False),
        ({"GPU": 1.0, "gpu_memory": 8.0 * GIB}, True),
        ({"GPU": 1.0, "accelerator_type:G": 1.0}, False),
    ],
    ids=["too small", "large enough", "of this machine", "of a type that is not known"],
)
def test_what_lies_on_a_gpu_is_held_against_its_memory(node: dict[str, float], refused: bool) -> None:
    spec = FamilySpec.model_validate(tiny_family())
    spec = spec.model_copy(update={"students": {"cut": student(gpus_per_rank=1.0)}})
    estimates = {"student cut": student_estimate(CUT, spec.students["cut"], CORPUS)}
    if not refused:
        check_devices(spec, estimates, [node])
        return
    with pytest.raises(UserError, match=r"student cut needs 1\d\.\d GiB of GPU memory in each process"):
        check_devices(spec, estimates, [node])


def test_processes_that_share_a_gpu_are_held_against_all_of_it_together() -> None:
    spec = FamilySpec.model_validate(tiny_family(teacher={"gpus_per_shard": 0.5}))
    spec = spec.model_copy(update={"students": {"cut": student(gpus_per_rank=0.5)}})
    estimates = {
        "the teacher": teacher_estimate(TEACHER, spec.teacher, CORPUS),
        "student cut": student_estimate(CUT, spec.students["cut"], CORPUS),
    }
    both = sum(estimate.device for estimate in estimates.values())
    check_devices(spec, estimates, [{"GPU": 1.0, "gpu_memory": both + 1.0}])
    with pytest.raises(UserError, match=r"of GPU memory are needed \(the teacher 1 x .*; student cut 1 x"):
        check_devices(spec, estimates, [{"GPU": 1.0, "gpu_memory": both - 1.0}])


def test_a_replica_asks_ray_for_its_memory() -> None:
    spec = TeacherSpec.model_validate({"model": "teacher", "memory_per_shard": "3GiB"})
    model = TeacherModel("teacher", 300, "aa" * 8, "bb" * 8)
    assert Replica(0, spec, TopKLabels(), model, 1).bundle == {"CPU": 1.0, "memory": 3 * GIB}
    without = TeacherSpec(model="teacher")
    assert Replica(0, without, TopKLabels(), model, 1).bundle == {"CPU": 1.0}


def test_a_replica_without_a_place_names_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TeacherSpec.model_validate(
        {"model": "teacher", "shards": 2, "replicas": 3, "memory_per_shard": "3GiB", "start_timeout_s": 0.01}
    )
    never: Any = SimpleNamespace(ready=lambda: asyncio.sleep(60))
    monkeypatch.setattr("cluster.teacher.replica.placement_group", lambda *_, **__: never)
    replica = Replica(0, spec, TopKLabels(), TeacherModel("teacher", 300, "aa" * 8, "bb" * 8), 1)
    with pytest.raises(
        ReplicaLostError, match=r"no place within .* 0.01 s: the teacher needs 2 x \(1 CPU and 3.0 GiB\)"
    ):
        asyncio.run(replica.start())


def test_a_rank_asks_ray_for_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, float]] = []

    def trainer(*_: Any, scaling_config: Any, **__: Any) -> Any:
        asked.append(scaling_config.resources_per_worker)
        return SimpleNamespace(fit=lambda: SimpleNamespace(checkpoint=None))

    monkeypatch.setattr("ray.train.torch.TorchTrainer", trainer)
    spec = FamilySpec.model_validate(tiny_family())
    estimates = {"the teacher": Estimate({}, 5), "student small": Estimate({}, 7 * GIB)}
    nobody: Any = None
    for family in (spec, with_memory(spec, estimates)):
        model = TeacherModel("teacher", 300, "aa" * 8, "bb" * 8)
        job = StudentJob("small", family, model, None, 1, nobody, nobody, str(tmp_path))
        with pytest.raises(StoppedError):
            _fit(job)
    assert asked == [{"CPU": 1.0}, {"CPU": 1.0, "memory": 7 * GIB}]


def test_an_arm_is_estimated_from_its_files(tiny_model: Path) -> None:
    stored = sum(file.stat().st_size for file in tiny_model.glob("*.safetensors"))
    config = json.loads((tiny_model / "config.json").read_text())
    auto, half = (served_estimate(tiny_model, dtype, 4, False, "transformers").parts for dtype in ("auto", "bfloat16"))
    assert (auto["weights"], half["weights"]) == (stored, stored // 2)
    # Two layers, keys and values of 2 heads of 16, float32, for 4 slots at full context.
    assert auto["keys and values"] == 4 * config["max_position_embeddings"] * 2 * 2 * 2 * 16 * 4
