"""A student's first weights: the teacher's own layers, or random ones that a seed decides."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from cluster.errors import UserError
from cluster.spec import Pretrained, Scratch, TeacherLayers
from cluster.students.initial import chosen_layers, cut_config, evenly_spaced, initial_student
from tests.tiny import write_tiny_model

SMALL = Scratch(source="scratch", layers=2, hidden_size=32, heads=4, kv_heads=2, intermediate_size=48, seed=5)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def teacher_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("teacher"), tied=request.param)


def student(init: TeacherLayers | Scratch | Pretrained, teacher_dir: Path) -> PreTrainedModel:
    own = init.model if isinstance(init, Pretrained) else None
    return initial_student(init, teacher_dir=str(teacher_dir), student_dir=own, dtype=torch.float32).eval()


def teacher(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    return model(tokens, use_cache=False).logits


@given(st.integers(1, 200).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_evenly_spaced_layers_are_distinct_rising_and_reach_from_first_to_last(sizes: tuple[int, int]) -> None:
    keep, total = sizes
    layers = evenly_spaced(keep, total)
    assert len(layers) == keep
    assert layers == sorted(set(layers))
    assert layers[0] == 0
    assert keep == 1 or layers[-1] == total - 1
    gaps = [b - a for a, b in itertools.pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("layers", [4, [0, 1, 2, 3]])
def test_a_student_of_all_layers_is_the_teacher(teacher_dir: Path, layers: int | list[int]) -> None:
    assert torch.equal(
        logits(student(TeacherLayers(source="teacher", layers=layers), teacher_dir)), logits(teacher(teacher_dir))
    )


def test_a_student_of_some_layers_has_their_weights_and_all_the_rest(teacher_dir: Path) -> None:
    cut, whole = student(TeacherLayers(source="teacher", layers=[0, 3]), teacher_dir), teacher(teacher_dir)
    assert cut.config.num_hidden_layers == len(cut.model.layers) == 2
    for new, old in ((0, 0), (1, 3)):
        theirs = whole.model.layers[old].state_dict()
        assert all(torch.equal(t, theirs[name]) for name, t in cut.model.layers[new].state_dict().items())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(cut.state_dict()[name], whole.state_dict()[name])
    assert [layer.self_attn.layer_idx for layer in cut.model.layers] == [0, 1]


def test_a_cut_student_says_what_a_teacher_that_was_cut_by_hand_says(teacher_dir: Path) -> None:
    by_hand = teacher(teacher_dir)
    by_hand.model.layers = torch.nn.ModuleList([by_hand.model.layers[0], by_hand.model.layers[3]])
    by_hand.config.num_hidden_layers = 2
    assert torch.equal(logits(student(TeacherLayers(source="teacher", layers=2), teacher_dir)), logits(by_hand))


@pytest.mark.parametrize("init", [TeacherLayers(source="teacher", layers=2), SMALL], ids=["cut", "scratch"])
def test_a_head_is_tied_where_the_teacher_s_is(teacher_dir: Path, init: TeacherLayers | Scratch) -> None:
    model = student(init, teacher_dir)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is teacher(teacher_dir).config.tie_word_embeddings


@pytest.mark.parametrize("layers", [5, [0, 4]])
def test_more_layers_than_the_teacher_has_are_refused(layers: int | list[int]) -> None:
    with pytest.raises(UserError, match=r"teacher's 4 layers \(0 to 3\)"):
        chosen_layers(TeacherLayers(source="teacher", layers=layers), 4)


def test_only_lists_of_one_entry_per_layer_are_cut_in_a_configuration() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    config = LlamaConfig(num_hidden_layers=4, eos_token_id=[2, 7, 8, 9], layer_types=kinds)
    cut = cut_config(config, [0, 3])
    assert cut.num_hidden_layers == 2
    assert cut.layer_types == ["full_attention", "sliding_attention"]
    assert cut.eos_token_id == [2, 7, 8, 9]


def test_a_scratch_student_is_a_function_of_its_seed_alone(tiny_teacher: Path) -> None:
    first, again = student(SMALL, tiny_teacher), student(SMALL, tiny_teacher)
    other = student(SMALL.model_copy(update={"seed": 6}), tiny_teacher)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))


def test_a_scratch_student_leaves_the_global_random_numbers_alone(tiny_teacher: Path) -> None:
    before = torch.random.get_rng_state()
    student(SMALL, tiny_teacher)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_scratch_student_has_the_size_that_was_asked_for(tiny_teacher: Path) -> None:
    model = student(SMALL, tiny_teacher)
    attention = model.model.layers[0].self_attn
    assert len(model.model.layers) == 2
    assert model.get_input_embeddings().weight.shape == (320, 32)
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 16)
    assert model.model.layers[1].mlp.up_proj.out_features == 48


def test_a_pretrained_student_is_what_lies_in_its_folder(tiny_teacher: Path, tmp_path: Path) -> None:
    own = write_tiny_model(tmp_path / "own", layers=1, seed=9)
    init = Pretrained(source="pretrained", model=str(own))
    assert torch.equal(logits(student(init, tiny_teacher)), logits(teacher(own)))


def test_pickled_weights_are_never_loaded(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(teacher(tiny_teacher).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        student(Pretrained(source="pretrained", model=str(folder)), tiny_teacher)
