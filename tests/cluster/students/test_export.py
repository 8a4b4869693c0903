"""What a student writes is what its class saves: no buffer more, no weight less, for loaders of every kind."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from cluster.students.zero import gathered_state
from tests.tiny_types import tiny_config, tiny_model


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "gptj", "deepseek_v3", "mixtral", "bloom"])
def test_an_exported_student_has_the_names_that_save_pretrained_gives(kind: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(kind, tie_word_embeddings=tied))
    state = gathered_state(model, keep=True)
    assert state.keys() == model.state_dict().keys()
    model.save_pretrained(tmp_path / "ours", state_dict=state)
    model.save_pretrained(tmp_path / "theirs")
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_a_rank_that_does_not_write_gets_nothing() -> None:
    assert gathered_state(tiny_model(tiny_config("llama")), keep=False) == {}
