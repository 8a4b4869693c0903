"""Whether packed documents are kept apart: what the probe finds, and what preflight and loaded models do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    Mamba2Config,
)

from cluster.errors import RunError, UserError
from cluster.fingerprint import teacher_fingerprint
from cluster.models import TeacherModel
from cluster.packing import architecture_packing, probe_packing, verify_packing
from cluster.prefill import backbone_of, last_hidden
from cluster.preflight import preflight
from cluster.shrink import shrunk, small_model
from cluster.spec import FamilySpec, TeacherSpec, TopKLabels
from cluster.students.champion import packing_beside
from cluster.teacher.shard import Shard
from tests.tiny import tiny_family, write_tiny_tokenizer

FALCON = FalconConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
MAMBA = Mamba2Config(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=16,
    n_groups=1,
    state_size=8,
    chunk_size=16,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
BERT = BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
DOCUMENTS = (1, 5, 17, 20)


def small(config: Any, attention: str | None = None) -> Any:
    model = small_model(shrunk(config))
    if attention:
        model.set_attn_implementation(attention)
    return model


def packed(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, S] of several documents in one sequence, and their positions."""
    tokens_BS = (torch.arange(sum(DOCUMENTS)) * 31 % 97 + 64)[None]
    return tokens_BS, torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LlamaConfig(), "exact"),
        (Gemma3TextConfig(), "exact"),
        (GptOssConfig(), "masked"),
        (FalconConfig(), "masked"),
        (MAMBA, "unpacked"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_probe_finds_what_a_model_does(config: Any, found: str) -> None:
    assert architecture_packing(config, "it")[0] == found


def test_a_model_that_is_not_causal_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher.model: a bert model .* is not causal: .* earlier states by 0\.\d+"):
        architecture_packing(BERT, "teacher.model")


def test_an_architecture_that_cannot_be_tried_is_not_packed() -> None:
    config = LlamaConfig(hidden_act="no such activation")
    packing, reason = architecture_packing(config, "it")
    assert packing == "unpacked"
    assert "llama models could not be tried in small" in reason


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [LlamaConfig(), Gemma3TextConfig()], ids=lambda config: config.model_type)
@torch.no_grad()
def test_a_block_mask_is_right_with_every_attention(config: Any, attention: str) -> None:
    """Documents are longer than Gemma's window, which a mask of blocks alone would widen."""
    model = backbone_of(small(config, attention))
    tokens_BS, positions_BS = packed(model)
    got_SD = last_hidden(model, tokens_BS, positions_BS, "masked")[0]
    alone_SD = torch.cat([last_hidden(model, part_BS, None)[0] for part_BS in tokens_BS.split(DOCUMENTS, 1)])
    torch.testing.assert_close(got_SD, alone_SD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [GptOssConfig(), FalconConfig()], ids=lambda config: config.model_type)
@torch.no_grad()
def test_models_that_leak_are_exact_with_a_mask(config: Any) -> None:
    model = backbone_of(small(config))
    tokens_BS, positions_BS = packed(model)
    alone_SD = torch.cat([last_hidden(model, part_BS, None)[0] for part_BS in tokens_BS.split(DOCUMENTS, 1)])
    torch.testing.assert_close(last_hidden(model, tokens_BS, positions_BS, "masked")[0], alone_SD, rtol=1e-4, atol=1e-4)
    leaked_SD = last_hidden(model, tokens_BS, positions_BS, "exact")[0]
    assert float((leaked_SD - alone_SD)[1:].norm() / alone_SD[1:].norm()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_to_do_what_its_architecture_promised(dtype: torch.dtype) -> None:
    falcon = small(FalconConfig()).to(dtype).train()
    verify_packing(falcon, "masked", "it")
    verify_packing(falcon, "unpacked", "it")
    assert falcon.training
    with pytest.raises(UserError, match=r"student big \(FalconForCausalLM\) does not keep packed documents apart"):
        verify_packing(falcon, "exact", "student big")
    mamba = small(MAMBA).to(dtype)
    with pytest.raises(UserError, match=r"it \(Mamba2ForCausalLM\) does not keep packed documents apart"):
        verify_packing(mamba, "exact", "it")
    verify_packing(mamba, "unpacked", "it")
    with pytest.raises(UserError, match=r"it \(Bert.*\) is not causal"):
        verify_packing(small(BERT).to(dtype), "unpacked", "it")


def test_what_a_model_that_takes_no_mask_raises_names_it() -> None:
    with pytest.raises(RunError, match=r"it \(Mamba2ForCausalLM\) cannot read packed documents \(masked\): "):
        verify_packing(small(MAMBA), "masked", "it")


def test_rounding_in_16_bits_is_no_leak() -> None:
    assert probe_packing(backbone_of(small(LlamaConfig()).to(torch.bfloat16))) == "exact"


def test_a_champion_that_would_leak_is_not_compared_on_packed_text() -> None:
    assert packing_beside(small(FALCON), "exact") == ("masked", None)
    assert packing_beside(small(MAMBA), "unpacked") == ("unpacked", None)
    assert packing_beside(small(MAMBA), "exact") == ("unpacked", "it does not keep packed documents apart")
    assert "not causal" in str(packing_beside(small(BERT), "unpacked")[1])


def write_model(path: Path, config: Any) -> Path:
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return write_tiny_tokenizer(path)


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("falcon"), FALCON)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mamba"), MAMBA)


def test_preflight_decides_for_each_model(falcon: Path, tiny_corpus: Path, stillhouse_home: Path) -> None:
    checked = preflight(FamilySpec.model_validate(tiny_family(falcon, tiny_corpus)))
    assert (checked.teacher.packing, checked.packing, checked.packed) == ("masked", {"small": "masked"}, True)
    assert checked.packing_notices() == []


def test_one_student_that_leaks_lays_the_family_s_corpus_out_unpacked(
    tiny_teacher: Path, mamba: Path, tiny_corpus: Path, stillhouse_home: Path
) -> None:
    tree = tiny_family(tiny_teacher, tiny_corpus)
    tree["students"]["other"] = {"init": {"source": "pretrained", "model": str(mamba)}}
    checked = preflight(FamilySpec.model_validate(tree))
    assert not checked.packed
    assert checked.teacher.packing == "unpacked"
    assert checked.packing == {"small": "unpacked", "other": "unpacked"}
    (notice,) = checked.packing_notices()
    assert "documents are not packed" in notice
    assert "student other: mamba2 models carry one document into the next" in notice


def test_preflight_names_a_teacher_that_leaks(mamba: Path, tiny_corpus: Path, stillhouse_home: Path) -> None:
    checked = preflight(FamilySpec.model_validate(tiny_family(mamba, tiny_corpus)))
    assert list(checked.unpacked_because) == ["the teacher", "student small"]


def test_preflight_refuses_a_teacher_that_is_not_causal(
    tmp_path: Path, tiny_corpus: Path, stillhouse_home: Path
) -> None:
    bert = write_model(tmp_path / "bert", BERT)
    with pytest.raises(UserError, match=r"teacher.model: .*bert.* not causal"):
        preflight(FamilySpec.model_validate(tiny_family(bert, tiny_corpus)))


def test_a_teacher_s_shard_does_not_serve_a_model_that_leaks(falcon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.teacher.shard.see_no_gpu", lambda: None)
    spec = TeacherSpec(model=str(falcon), dtype="float32")
    for packing in ("masked", "unpacked"):
        Shard(spec, TopKLabels(k=8), TeacherModel(str(falcon), 300, "", "", packing), 1, 0).join("", 0)
    shard = Shard(spec, TopKLabels(k=8), TeacherModel(str(falcon), 300, "", "", "exact"), 1, 0)
    with pytest.raises(UserError, match=f"the teacher {falcon} .FalconForCausalLM. does not keep packed documents"):
        shard.join("", 0)


def test_a_mask_is_part_of_the_address_of_labels(falcon: Path, stillhouse_home: Path) -> None:
    spec = TeacherSpec(model=str(falcon), dtype="float32")
    masked, exact, unpacked = (
        teacher_fingerprint(falcon, spec, 300, packing) for packing in ("masked", "exact", "unpacked")
    )
    assert masked != exact == unpacked


@pytest.mark.parametrize(
    ("heads", "kv_heads", "share", "factors"), [(32, 32, 1.0, 48), (24, 8, 0.75, 48)], ids=["Phi-3.5", "Phi-4-mini"]
)
def test_a_long_context_configuration_is_tried_in_small(heads: int, kv_heads: int, share: float, factors: int) -> None:
    """Sizes as published; the rotary factors are one per pair of a head's rotated dimensions."""
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=3072,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=32,
        partial_rotary_factor=share,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * factors, "long_factor": [1.0] * factors},
    )
    assert architecture_packing(config, "teacher.model")[0] == "exact"
