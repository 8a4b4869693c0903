"""Where the keys and values of the requests in a batch lie: one row each, side by side, in memory that is bounded."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "stillhouse_rows"
"""Name of :func:`rows_attention` among transformers' attention implementations."""

# Rows grow in width by at least this many tokens, or by a quarter, so that copying stays rare.
_WIDEN = 256


class Rows:
    """Keys and values of up to ``limit`` requests, as one rectangle per layer: [row, head, position, D].

    Row r holds positions 0 to ``length[r] - 1`` of one request; what lies behind is never read. The rows that are in
    use are the first ones, so that a step of all requests works on a view and copies nothing. The rectangle grows
    and shrinks with what is in it and never holds more than ``tokens`` positions.
    """

    def __init__(self, limit: int, tokens: int, context: int) -> None:
        """``tokens`` bounds rows times width and is at least ``context``: one request always fits."""
        self._limit = limit
        self._tokens = tokens
        self._context = context
        self._keys: list[torch.Tensor] = []  # per layer [rows, head, width, D]
        self._values: list[torch.Tensor] = []
        self._shape = (0, 0)
        self.length: list[int] = []

    def fits(self, rows: int, width: int) -> bool:
        """Whether that many requests of at most that many tokens have room together."""
        return rows <= self._limit and rows * width <= self._tokens

    def add(self, prefilled: DynamicCache) -> None:
        """Take over the keys and values of a prefilled request as the last row; the caller has asked :meth:`fits`."""
        length = prefilled.get_seq_length()
        self._reserve(len(self.length) + 1, max([length + 1, *(n + 1 for n in self.length)]), prefilled)
        row = len(self.length)
        for keys, values, layer in zip(self._keys, self._values, prefilled.layers, strict=True):
            keys[row, :, :length] = layer.keys[0]
            values[row, :, :length] = layer.values[0]
        self.length.append(length)

    def remove(self, row: int) -> None:
        """Forget a row; the last row moves into its place."""
        last = len(self.length) - 1
        for tensor in (*self._keys, *self._values):
            if row != last:
                tensor[row] = tensor[last]
            # What lies behind a row's end has weight 0 in its sums, but 0 times a NaN left there is NaN.
            tensor[last].zero_()
        self.length[row] = self.length[last]
        self.length.pop()

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._keys, self._values, self._shape, self.length = [], [], (0, 0), []

    def step(self) -> "Step":
        """The cache for a forward pass of one new token per row; afterwards every row is one token longer."""
        width = max(self.length) + 1
        self._reserve(len(self.length), width)
        step = Step(self._keys, self._values, self.length, width)
        self.length = [n + 1 for n in self.length]
        return step

    def _reserve(self, rows: int, width: int, like: DynamicCache | None = None) -> None:
        have_rows, have_width = self._shape
        if rows <= have_rows and width <= have_width:
            return
        if width > have_width:
            wide = min(max(width + _WIDEN, width * 5 // 4), self._context)
            new_width = wide if rows * wide <= self._tokens else width
        else:
            new_width = have_width if rows * have_width <= self._tokens else width
        new_rows = max(rows, have_rows)
        if new_rows * new_width > self._tokens:
            new_rows = rows
        used = len(self.length)
        kept = min(have_width, new_width)
        sources = self._layers(like)
        self._keys, self._values, self._shape = [], [], (new_rows, new_width)
        while sources:  # layer by layer: only one of them exists twice at a time
            for source, target in zip(sources.pop(0), (self._keys, self._values), strict=True):
                grown = source.new_zeros(new_rows, source.shape[1], new_width, source.shape[3])
                if have_width:
                    grown[:used, :, :kept] = source[:used, :, :kept]
                target.append(grown)

    def _layers(self, like: DynamicCache | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self._keys or like is None:
            return list(zip(self._keys, self._values, strict=True))
        return [(layer.keys, layer.values) for layer in like.layers]


class Step(Cache):
    """transformers' view of :class:`Rows` in a forward pass of one token per row."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], lengths: list[int], width: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)  # it has no layers of its own; see update
        self._keys, self._values = keys, values
        self._rows, self._width = len(lengths), width
        device = keys[0].device
        self._row_B = torch.arange(len(lengths), device=device)
        self.position_B = torch.tensor(lengths, device=device)
        """Where each row's new token stands."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one position per row, [row, head, 1, D], behind what is there; returns all of it."""
        both = []
        for store, new in ((self._keys[layer_idx], key_states), (self._values[layer_idx], value_states)):
            store[self._row_B, :, self.position_B] = new[:, :, 0]
            both.append(store[: self._rows, :, : self._width])
        return both[0], both[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the new one in the longest row."""
        return self._width - 1

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[row, 1, 1, width], added to the attention scores: a row sees itself up to its new token.

        ``window`` is how many positions back a layer with sliding attention looks, its own included.
        """
        position_1S = torch.arange(self._width, device=self.position_B.device)[None]
        last_B1 = self.position_B[:, None]
        seen = position_1S <= last_B1
        if window is not None:
            seen &= position_1S > last_B1 - window
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]


def rows_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token per row that leaves keys and values where they are; else transformers' own.

    Grouped-query models share a key head among several query heads. With a mask, transformers' own copies all keys
    and values once per query head; here the query heads of a key head stand side by side as if they were positions,
    which is the same sum. Shapes: query [B, heads, S, D], key and value [B, key heads, S', D].
    """
    if query.shape[2] != 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, _, width = query.shape
    folded = query.view(batch, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


AttentionInterface.register(ATTENTION, rows_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
