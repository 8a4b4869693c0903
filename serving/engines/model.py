"""A causal language model and its three kinds of forward pass: a prompt's next chunk, one token per row, a score."""

import inspect
import os
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from cluster.errors import UserError
from cluster.loading import load_model
from serving.engines.cache import ATTENTION, Rows
from serving.engines.tokens import end_tokens

_GIB = 2**30
# Of the memory that is free when the model is loaded: on a CPU others want some too.
_KV_SHARE, _KV_MOST = {"cpu": 0.25, "cuda": 0.8}, {"cpu": 4 * _GIB, "cuda": 1024 * _GIB}
# Tokens of a prompt per forward pass: as few as fill the device, as those who are generating wait for them.
_CHUNK = {"cpu": 128, "cuda": 1024}
# A score's logits are [tokens, vocabulary] in float32: more tokens at once would only cost memory.
_SCORE_CHUNK = 128
_ALIKE = 0.9


class CausalModel:
    """Loads a Hugging Face directory; only safetensors are read and no code from the directory is run."""

    def __init__(self, model_dir: Path | str, dtype: str, end: int | None) -> None:
        """``end`` is the tokenizer's end-of-sequence token, for models that name none.

        Raises:
            UserError: the weight files do not hold exactly the model's weights, or it has layers that this engine
                does not know how to batch.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(model_dir, dtype=dtype)
        self.network: torch.nn.Module = model.to(self.device)
        config = model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        takes = inspect.signature(model.forward).parameters
        context = getattr(config, "max_position_embeddings", None)
        if "position_ids" not in takes or context is None:
            raise UserError(
                f"the transformers engine cannot batch {model_dir}: a {config.model_type} model is not told at which "
                "positions its tokens stand; use the vllm engine."
            )
        self.context: int = context
        self.ends = end_tokens(model.generation_config.eos_token_id, end)
        self.chunk = _CHUNK[self.device.type]
        self._dtype: torch.dtype = model.dtype
        self._windows = _windows(config, model_dir)
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        if config._attn_implementation == "sdpa":
            model.set_attn_implementation(ATTENTION)

    def prefill(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Read the next tokens of one text behind what is in the cache; logits [V] of the place behind them."""
        return self._forward(token_ids, cache, self._keep)[-1]

    def step(self, tokens: Sequence[int], rows: Rows) -> torch.Tensor:
        """One token for each row; logits [row, V] of the places behind them."""
        cache = rows.step()
        masks = {kind: cache.mask(window, self._dtype) for kind, window in self._windows.items()}
        logits: torch.Tensor = self.network(
            input_ids=torch.tensor(tokens, device=self.device)[:, None],
            position_ids=cache.position_B[:, None],
            # Models with layers of several kinds take a mask for each by its name.
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits[:, -1]

    def score(self, token_ids: Sequence[int], ids_TK: np.ndarray) -> Generator[None, None, np.ndarray]:
        """See :meth:`serving.engines.base.Engine.score`; gives way to others between chunks of the text."""
        cache = DynamicCache()
        ids = torch.from_numpy(ids_TK.astype(np.int64)).to(self.device)
        out_TK = np.empty(ids_TK.shape, dtype=np.float32)
        for at in range(0, len(token_ids), _SCORE_CHUNK):
            if at:
                yield
            part = slice(at, at + _SCORE_CHUNK)
            logits_CV = self._forward(token_ids[part], cache, {}).float()
            out_TK[part] = torch.log_softmax(logits_CV, -1).gather(1, ids[part]).cpu().numpy()
        return out_TK

    def room(self) -> int:
        """How many tokens' keys and values the free memory has room for; a text is read to learn what one takes."""
        cache = DynamicCache()
        self.prefill([0, 0], cache)
        each = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) / 2
        kind = self.device.type
        return int(min(_free_memory(self.device) * _KV_SHARE[kind], _KV_MOST[kind]) / each)

    def prove(self, token_ids: Sequence[int]) -> None:
        """Two texts of different lengths side by side must come out as each does alone, without any cache.

        What tells models apart (positions, masks, kinds of layers) is many; this finds the one that does not fit.
        It also is the warm-up.

        Raises:
            UserError: this model cannot be batched.
        """
        texts = [(list(token_ids) * 12)[:length] for length in (12, 5)]
        rows = Rows(len(texts), sum(map(len, texts)) * len(texts), max(map(len, texts)))
        try:
            for text in texts:
                cache = DynamicCache()
                self.prefill(text[:2], cache)
                self.prefill(text[2:-1], cache)
                rows.add(cache)
            together = self.step([text[-1] for text in texts], rows).float()
            alone = torch.stack([self._forward(text, None, self._keep)[-1] for text in texts]).float()
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"the transformers engine cannot batch this model ({error}); use the vllm engine."
            ) from error
        alike = torch.cosine_similarity(together - together.mean(-1, True), alone - alone.mean(-1, True), dim=-1)
        if not bool((alike > _ALIKE).all()):
            raise UserError(
                f"the transformers engine cannot batch this model: two texts side by side give other logits than each "
                f"alone (similarity {alike.min():.2f}, at least {_ALIKE} is needed); use the vllm engine."
            )

    def _forward(self, token_ids: Sequence[int], cache: DynamicCache | None, keep: dict[str, int]) -> torch.Tensor:
        """Logits [token, V] of one text's next tokens, or of the last only."""
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + len(token_ids), device=self.device)[None]
        logits: torch.Tensor = self.network(
            input_ids=torch.tensor([list(token_ids)], device=self.device),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **keep,
        ).logits
        return logits[0]


def _windows(config: object, model_dir: Path | str) -> dict[str, int | None]:
    """How far each kind of the model's layers looks back; None: to the beginning."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention" if window is None else "sliding_attention"]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(
            f"{model_dir} has layers of kind {unknown[0]}; the transformers engine batches full_attention and "
            "sliding_attention: use the vllm engine."
        )
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
