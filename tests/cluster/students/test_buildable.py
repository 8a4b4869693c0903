"""A student is what was asked for, for every type of model, or is refused before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Ernie4_5_MoeConfig, GPTNeoConfig, Llama4TextConfig, RecurrentGemmaConfig

from cluster.errors import UserError
from cluster.loading import load_model
from cluster.spec import Scratch, TeacherLayers
from cluster.students.buildable import check_cut, check_scratch
from cluster.students.configs import cut_config, scratch_config
from cluster.students.initial import initial_student, layer_stack
from tests.tiny_types import LAYERS, TYPES, VOCABULARY, tiny_config, tiny_model, write_tiny_type

# Types of which a layer is as wide as intermediate_size, and takes kv_heads.
GROUPED = sorted(kind for kind, fields in TYPES.items() if "num_key_value_heads" in fields and kind != "deepseek_v3")
UNGROUPED = sorted(set(TYPES) - {*GROUPED, "falcon", "phi"})


def scratch(**fields: Any) -> Scratch:
    sizes = {"layers": 2, "hidden_size": 48, "heads": 6, "intermediate_size": 40}
    return Scratch.model_validate({"source": "scratch", **sizes, **fields})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    return model(tokens, use_cache=False).logits


@pytest.fixture(scope="module", params=TYPES)
def teacher_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_type(tmp_path_factory.mktemp(request.param), request.param)


def cut(folder: Path, layers: int | list[int]) -> Any:
    init = TeacherLayers(source="teacher", layers=layers)
    return initial_student(init, teacher_dir=folder, student_dir=None, dtype=torch.float32).eval()


def test_a_student_of_all_layers_is_the_teacher(teacher_dir: Path) -> None:
    teacher = load_model(teacher_dir, dtype=torch.float32)
    check_cut("init", teacher.config, range(LAYERS))
    assert torch.equal(logits(cut(teacher_dir, LAYERS)), logits(teacher))


@pytest.mark.parametrize("layers", [[0, 3], [1, 2, 3]], ids=str)
def test_a_student_of_some_layers_has_their_weights_and_all_the_rest(teacher_dir: Path, layers: list[int]) -> None:
    teacher = load_model(teacher_dir, dtype=torch.float32)
    stack = layer_stack(teacher, LAYERS)
    check_cut("init", teacher.config, layers)
    student = cut(teacher_dir, layers)
    expected = {n: t for n, t in teacher.state_dict().items() if not n.startswith(f"{stack}.")}
    for new, old in enumerate(layers):
        theirs = teacher.get_submodule(f"{stack}.{old}").state_dict()
        expected.update({f"{stack}.{new}.{name}": tensor for name, tensor in theirs.items()})
    state = student.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert logits(student).isfinite().all()


def test_layer_numbers_rules_and_kinds_are_those_of_the_kept_layers() -> None:
    qwen = cut_config(tiny_config("qwen3_moe"), [0, 3])
    assert (qwen.mlp_only_layers, qwen.decoder_sparse_step) == ([1], 1)
    every_second = tiny_config("qwen3_moe", mlp_only_layers=[], decoder_sparse_step=2)  # experts in 1 and 3
    assert cut_config(every_second, [0, 1, 2]).mlp_only_layers == [0, 2]
    assert cut_config(tiny_config("deepseek_v3"), [1, 2, 3]).first_k_dense_replace == 1
    assert cut_config(tiny_config("gemma3_text"), [0, 3]).layer_types == ["sliding_attention", "full_attention"]
    assert cut_config(tiny_config("qwen2"), [1, 3]).layer_types == ["full_attention", "sliding_attention"]
    jamba = cut_config(tiny_config("jamba"), [0, 2, 3])  # attention in 1 and 3, experts in 3
    assert (jamba.layers_block_type, jamba.layers_num_experts) == (["mamba", "mamba", "attention"], [1, 1, 2])
    neo = GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]])
    assert cut_config(neo, [0, 2, 3]).attention_layers == ["global", "global", "local"]
    ernie = Ernie4_5_MoeConfig(num_hidden_layers=6, moe_layer_start_index=2, moe_layer_interval=2)  # experts in 3 and 5
    cut_ernie = cut_config(ernie, [0, 3, 5])
    assert (cut_ernie.moe_layer_start_index, cut_ernie.moe_layer_end_index, cut_ernie.moe_layer_interval) == (1, 2, 1)


def test_numbers_of_layers_are_translated_even_where_they_are_as_many_as_layers() -> None:
    config = Llama4TextConfig(num_hidden_layers=4, moe_layers=[0, 1, 2, 3])
    assert cut_config(config, [0, 3]).moe_layers == [0, 1]


def test_a_rule_that_the_kept_layers_do_not_follow_is_refused() -> None:
    with pytest.raises(UserError, match=r"init\.layers: a jamba model cannot be cut to layers \[0, 1, 3\]"):
        check_cut("init", tiny_config("jamba"), [0, 1, 3])  # attention in the last two of three: no period has that


def test_a_setting_that_depends_on_the_layer_s_number_is_refused_by_name() -> None:
    config = tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True)
    check_cut("init", config, [0, 1])
    with pytest.raises(UserError, match=r"as layer 1 of the student, the teacher's layer 3 would differ in attn\.scal"):
        check_cut("init", config, [0, 3])


@pytest.mark.parametrize("kind", GROUPED)
def test_a_scratch_student_has_every_size_that_was_asked_for(kind: str) -> None:
    init, config = scratch(kv_heads=2), tiny_config(kind)
    check_scratch("init", config, init)
    student = tiny_model(scratch_config(config, init))
    layers = student.get_submodule(layer_stack(student, 2))
    assert student.get_input_embeddings().weight.shape == (VOCABULARY, 48)
    shapes = {name: tuple(tensor.shape) for name, tensor in layers.state_dict().items()}
    inner = {s for name, shape in shapes.items() if "mlp" in name or "expert" in name or "feed" in name for s in shape}
    assert 40 in inner or 80 in inner
    assert {shape[0] for name, shape in shapes.items() if name.endswith("k_proj.weight")} == {16}
    assert logits(student).isfinite().all()


@pytest.mark.parametrize("kind", UNGROUPED)
def test_a_type_without_key_value_heads_refuses_them(kind: str) -> None:
    with pytest.raises(
        UserError, match=r"init\.kv_heads: got 2; a \w+ model of this size would have 6; give kv_heads: 6"
    ):
        check_scratch("init", tiny_config(kind), scratch(kv_heads=2))


@pytest.mark.parametrize(
    ("kind", "name", "shape"),
    [
        ("gpt2", "h.1.mlp.c_fc.weight", (48, 40)),
        ("gptj", "h.1.mlp.fc_in.weight", (40, 48)),
        ("opt", "layers.1.fc1.weight", (40, 48)),
        ("falcon", "h.1.mlp.dense_h_to_4h.weight", (40, 48)),
        ("phi", "layers.1.mlp.fc1.weight", (40, 48)),
        ("gpt_neox", "layers.1.mlp.dense_h_to_4h.weight", (40, 48)),
    ],
)
def test_the_width_of_the_feed_forward_layers_goes_by_each_type_s_own_name(
    kind: str, name: str, shape: tuple[int, int]
) -> None:
    init = scratch(kv_heads=1) if kind == "falcon" else scratch()
    check_scratch("init", tiny_config(kind), init)
    state = tiny_model(scratch_config(tiny_config(kind), init)).state_dict()
    assert [tuple(t.shape) for n, t in state.items() if n.endswith(name)] == [shape]


def test_bloom_s_feed_forward_layers_are_four_times_as_wide_as_its_stream_or_refused() -> None:
    with pytest.raises(UserError) as caught:
        check_scratch("students.s.init", tiny_config("bloom"), scratch())
    assert str(caught.value) == (
        "students.s.init.intermediate_size: got 40; a bloom model has no such setting: its feed-forward layers are 192 "
        "wide where hidden_size is 48; give intermediate_size: 192"
    )
    check_scratch("students.s.init", tiny_config("bloom"), scratch(intermediate_size=192))


def test_a_multi_query_type_refuses_more_key_value_heads() -> None:
    with pytest.raises(
        UserError, match=r"init\.kv_heads: got 6; a falcon model of this size would have 1; give kv_heads: 1"
    ):
        check_scratch("init", tiny_config("falcon"), scratch())


def test_a_width_that_a_type_makes_something_else_of_is_refused_with_what_it_makes() -> None:
    config = RecurrentGemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, lru_width=32
    )
    with pytest.raises(UserError, match=r"init\.intermediate_size: got 40; layer 0 of a recurrent_gemma model .* 20"):
        check_scratch("init", config, scratch(layers=3, hidden_size=32, heads=4, kv_heads=1))


def test_sizes_that_do_not_fit_together_are_refused_before_a_start() -> None:
    config = tiny_config("phi", partial_rotary_factor=0.4)  # 3.2 of the 8 values of a head
    with pytest.raises(
        UserError, match=r"init: a phi model of this size cannot run: .* dimension of length 4"
    ) as caught:
        check_scratch("init", config, scratch())
    assert "\n" not in str(caught.value)


def test_kinds_of_layers_go_on_in_the_teacher_s_order_in_a_deeper_student() -> None:
    config = scratch_config(tiny_config("gemma3_text"), scratch(layers=6))
    assert config.layer_types == ["sliding_attention", "full_attention"] * 3
    assert scratch_config(tiny_config("qwen3_moe"), scratch(layers=3)).mlp_only_layers == [1]
