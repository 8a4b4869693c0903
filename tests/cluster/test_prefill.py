"""Which models can keep packed documents apart, and what is said of those that cannot."""

import pytest
import torch
from transformers import BloomConfig, BloomModel, GPT2Config, GPT2Model

from cluster.errors import RunError
from cluster.prefill import last_hidden

TOKENS_BS = torch.arange(8)[None]
TWO_DOCUMENTS_BS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


def bloom() -> BloomModel:
    """Its positions are slopes in the attention, so it takes none."""
    return BloomModel(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)).eval()


def test_a_model_without_positions_reads_whole_documents() -> None:
    assert last_hidden(bloom(), TOKENS_BS, None).shape == (1, 8, 16)


def test_a_model_without_positions_is_refused_packed_documents() -> None:
    with pytest.raises(RunError, match=r"BloomModel takes no position_ids.* see each other"):
        last_hidden(bloom(), TOKENS_BS, TWO_DOCUMENTS_BS)


@torch.no_grad()
def test_a_model_with_learnt_positions_keeps_packed_documents_apart() -> None:
    model = GPT2Model(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2)).eval()
    packed_BSD = last_hidden(model, TOKENS_BS, TWO_DOCUMENTS_BS)
    alone_BSD = torch.cat([last_hidden(model, part_BS, None) for part_BS in TOKENS_BS.split(4, 1)], 1)
    torch.testing.assert_close(packed_BSD, alone_BSD)
