"""What the teacher that scores answers asks of the cluster."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig

from cluster.memory import SHARD_BYTES
from cluster.spec import TeacherSpec
from serving.control.judge import _shard_bytes


def test_a_shard_of_the_judge_asks_for_its_own_part_of_the_teacher(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    weights = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    whole, half = (
        _shard_bytes(TeacherSpec(model=str(tmp_path), dtype="float32", shards=shards), tmp_path) for shards in (1, 2)
    )
    assert whole > SHARD_BYTES + weights
    assert whole - half > 0.4 * weights
