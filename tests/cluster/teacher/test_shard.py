"""One rank of a teacher by itself: what it refuses to load and to read."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cluster.corpus.batches import Batch
from cluster.errors import LabelError, UserError
from cluster.models import TeacherModel
from cluster.spec import TeacherSpec, TopKLabels
from cluster.teacher.shard import Shard
from tests.tiny import VOCABULARY


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.teacher.shard.see_no_gpu", lambda: None)
    monkeypatch.setattr("cluster.teacher.shard.keep_memory", lambda: None)

    def started(folder: Path) -> Shard:
        model = TeacherModel(str(folder), VOCABULARY, "0" * 16, "1" * 16)
        shard = Shard(TeacherSpec(model=str(folder), dtype="float32"), TopKLabels(k=4), model, 1, 0)
        shard.join("127.0.0.1", 0)
        return shard

    return started


def test_a_shard_does_not_start_with_weights_that_are_missing(join, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "broken"))
    state = load_file(folder / "model.safetensors")
    del state["model.layers.3.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing: model\.layers\.3\.mlp\.up_proj\.weight$"):
        join(folder)


def test_a_token_that_the_embedding_does_not_have_is_refused_by_its_number(join, tiny_teacher: Path) -> None:
    shard = join(tiny_teacher)
    tokens_BS = np.full((1, 8), VOCABULARY - 1, np.int32)
    positions_BS = np.arange(8, dtype=np.int32)[None]
    batch = Batch(5, tokens_BS, np.ones((1, 8), np.bool_), positions_BS, "0" * 32)
    assert len(shard.score(batch)) == 2  # a receipt and one block
    beyond = dataclasses.replace(batch, tokens_BS=np.full((1, 8), VOCABULARY, np.int32))
    with pytest.raises(LabelError, match=r"batch 5 holds token 300; the teacher's vocabulary ends at 299"):
        shard.score(beyond)
