"""A checkpoint must give every weight of its model and nothing else: found on loading, and before without loading."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.errors import UserError
from cluster.loading import check_weights, load_model, read_config
from tests.tiny_types import TYPES, tiny_config, tiny_model, write_tiny_type

State = dict[str, Tensor]


def check(folder: Path) -> None:
    check_weights(folder, read_config(folder), "teacher.model")


def spoilt(folder: Path, change: Callable[[State], None]) -> Path:
    """Change the weights on disk."""
    state = load_file(folder / "model.safetensors")
    change(state)
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def refusals(folder: Path) -> tuple[str, str]:
    """What the check and what the loader reports, one line each."""
    with pytest.raises(UserError) as checked:
        check(folder)
    with pytest.raises(UserError) as loaded:
        load_model(folder, dtype=torch.float32)
    assert "\n" not in str(checked.value) + str(loaded.value)
    assert str(checked.value).startswith("teacher.model: ")
    return str(checked.value), str(loaded.value)


@pytest.mark.parametrize(
    ("kind", "tied"),
    [*((kind, False) for kind in TYPES), *((kind, True) for kind in ("gpt2", "llama", "mixtral", "opt", "qwen3_moe"))],
)
def test_what_save_pretrained_writes_is_whole(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(kind, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    check(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert not loaded.training
    assert loaded.config.tie_word_embeddings is tied
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "gptj", "llama", "mixtral", "opt", "phi", "qwen3_moe"])
def test_a_layer_that_is_missing_is_named(kind: str, tmp_path: Path) -> None:
    lost: list[str] = []

    def drop(state: State) -> None:
        lost.extend(name for name in state if ".2." in name and "expert" not in name)
        for name in lost:
            del state[name]

    for refusal in refusals(spoilt(write_tiny_type(tmp_path, kind), drop)):
        assert "missing: " in refusal
        assert ".2." in refusal
        assert ("and " + str(len(lost) - 3) + " more" in refusal) == (len(lost) > 3)


def test_a_weight_that_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    extra = {"model.layers.4.mlp.up_proj.weight": torch.zeros(48, 32)}
    for refusal in refusals(spoilt(write_tiny_type(tmp_path, "llama"), lambda state: state.update(extra))):
        assert "not part of the model: model.layers.4.mlp.up_proj.weight" in refusal


def test_a_weight_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    wrong = {"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 32)}
    for refusal in refusals(spoilt(write_tiny_type(tmp_path, "llama"), lambda state: state.update(wrong))):
        assert "of another shape: model.layers.1.mlp.up_proj.weight (40, 32) instead of (48, 32)" in refusal


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_one_expert_s_weight_is_named_though_experts_are_stacked_at_loading(kind: str, tmp_path: Path) -> None:
    names: list[str] = []

    def narrow(state: State) -> None:
        names.append(next(name for name in state if "experts.1." in name))
        state[names[0]] = torch.zeros(3, 5)

    for refusal in refusals(spoilt(write_tiny_type(tmp_path / "narrow", kind), narrow)):
        assert f"{names[0]} (3, 5) instead of" in refusal
    for refusal in refusals(spoilt(write_tiny_type(tmp_path / "lost", kind), lambda state: state.pop(names[0]))):
        assert "experts" in refusal


@pytest.mark.parametrize(
    ("kind", "constants"),
    [
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()}),
        ("gptj", {"transformer.h.3.attn.bias": (1, 1, 64, 64), "transformer.h.3.attn.masked_bias": ()}),
        (
            "gpt_neox",
            {"gpt_neox.layers.1.attention.bias": (1, 1, 64, 64), "gpt_neox.layers.1.attention.masked_bias": ()},
        ),
        ("llama", {"model.layers.2.self_attn.rotary_emb.inv_freq": (4,)}),
    ],
)
def test_constants_that_old_versions_saved_do_no_harm(
    kind: str, constants: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    old = {name: torch.ones(shape) for name, shape in constants.items()}
    folder = spoilt(write_tiny_type(tmp_path, kind), lambda state: state.update(old))
    check(folder)
    load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "llama"])
def test_a_checkpoint_without_the_base_model_s_prefix_is_whole(kind: str, tmp_path: Path) -> None:
    """As OpenAI's GPT-2 and BLOOM are published."""
    folder = write_tiny_type(tmp_path, kind, tie_word_embeddings=True)
    known = load_model(folder, dtype=torch.float32).state_dict()

    def strip(state: State) -> None:
        for name in list(state):
            state[name.split(".", 1)[1]] = state.pop(name)

    check(spoilt(folder, strip))
    loaded = load_model(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, known[name]) for name, tensor in loaded.items())


def test_a_head_beside_a_tied_embedding_stays_what_it_is(tmp_path: Path) -> None:
    head = torch.randn(64, 32)
    folder = spoilt(
        write_tiny_type(tmp_path, "llama", tie_word_embeddings=True),
        lambda state: state.update({"lm_head.weight": head}),
    )
    check(folder)
    model = load_model(folder, dtype=torch.float32)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert model.config.tie_word_embeddings is False  # a student's configuration is made of this one


def shards(folder: Path) -> Path:
    """A tiny model in several files."""
    tiny_model(tiny_config("llama")).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_model_in_several_files_is_whole(tmp_path: Path) -> None:
    check(shards(tmp_path))
    load_model(tmp_path, dtype=torch.float32)


def test_files_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    first = sorted(shards(tmp_path).glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(UserError, match=f"names files that are not there: {first.name}"):
        check(tmp_path)


def test_an_index_that_leaves_a_file_out_leaves_its_weights_missing(tmp_path: Path) -> None:
    index = shards(tmp_path) / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    first = min(tree["weight_map"].values())
    tree["weight_map"] = {name: file for name, file in tree["weight_map"].items() if file != first}
    index.write_text(json.dumps(tree))
    for refusal in refusals(tmp_path):
        assert "missing: " in refusal


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (shards(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="is not an index of safetensors files"):
        check(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_was_not_copied_whole_is_refused_with_its_size(keep: int, tmp_path: Path) -> None:
    file = write_tiny_type(tmp_path, "llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file} \({file.stat().st_size} bytes\) is damaged or was not copied whole"):
        check(tmp_path)


def test_a_pointer_of_git_lfs_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = write_tiny_type(tmp_path, "llama") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 60772936\n")
    with pytest.raises(UserError, match=r"is a Git LFS pointer, not the file itself; run `git lfs pull`"):
        check(tmp_path)


@pytest.mark.parametrize(("kind", "pad"), [("llama", 64), ("opt", 1000), ("phi", -100), ("gpt2", 64)])
def test_a_padding_token_outside_the_embedding_is_dropped(kind: str, pad: int, tmp_path: Path) -> None:
    folder = write_tiny_type(tmp_path, kind)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "pad_token_id": pad}))
    check(folder)
    model = load_model(folder, dtype=torch.float32)
    assert model.config.pad_token_id is None
    assert model(torch.arange(8)[None]).logits.isfinite().all()
