"""One pass of a backbone: whole documents, packed ones, and a model that cannot keep packed ones apart."""

import pytest
import torch
from transformers import BloomConfig, BloomModel, GPT2Config, GPT2Model, Llama4ForCausalLM, Llama4TextConfig

from cluster.errors import RunError
from cluster.prefill import backbone_of, last_hidden

TOKENS_BS = torch.arange(8)[None]
TWO_DOCUMENTS_BS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


def bloom() -> BloomModel:
    """Its positions are slopes in the attention, so it takes none."""
    return BloomModel(BloomConfig(vocab_size=16, hidden_size=16, n_layer=1, n_head=2)).eval()


def test_a_model_without_positions_reads_whole_documents() -> None:
    assert last_hidden(bloom(), TOKENS_BS, None).shape == (1, 8, 16)


def test_packed_documents_need_a_decision() -> None:
    with pytest.raises(RunError, match=r"BloomModel cannot keep the documents apart .* without --resume"):
        last_hidden(bloom(), TOKENS_BS, TWO_DOCUMENTS_BS)


@torch.no_grad()
def test_a_model_with_learnt_positions_keeps_packed_documents_apart() -> None:
    model = GPT2Model(GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=2, n_head=2)).eval()
    packed_BSD = last_hidden(model, TOKENS_BS, TWO_DOCUMENTS_BS, "exact")
    alone_BSD = torch.cat([last_hidden(model, part_BS, None) for part_BS in TOKENS_BS.split(4, 1)], 1)
    torch.testing.assert_close(packed_BSD, alone_BSD)


@torch.no_grad()
def test_a_class_whose_base_model_is_itself_has_a_backbone() -> None:
    config = Llama4TextConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        pad_token_id=0,
    )
    model = Llama4ForCausalLM(config).eval()
    assert last_hidden(backbone_of(model), TOKENS_BS, None).shape == (1, 8, 16)
