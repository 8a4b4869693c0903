"""Rows of keys and values: what is put in is what is there, whoever comes and goes, and never more than allowed."""

import random

import pytest
import torch
from transformers import DynamicCache

from serving.engines.cache import Rows, rows_attention

LAYERS, HEADS, WIDTH = 2, 3, 4


def filled(length: int, mark: float) -> DynamicCache:
    """A prefilled request: layer l holds mark + l at each position, as key, and the negative as value."""
    cache = DynamicCache()
    for layer in range(LAYERS):
        keys = torch.full((1, HEADS, length, WIDTH), mark + layer)
        cache.update(keys, -keys, layer)
    return cache


def test_rows_come_and_go_and_keep_what_is_theirs() -> None:
    rng = random.Random(0)
    rows = Rows(limit=6, tokens=600, context=200)
    marks: list[float] = []
    for turn in range(200):
        grown = max(rows.length, default=0) + 1
        if rows.length and (rng.random() < 0.3 or not rows.fits(len(marks), grown)):
            row = rng.randrange(len(marks))
            rows.remove(row)
            marks[row] = marks[-1]
            marks.pop()
        length = rng.randrange(1, 60)
        if rows.fits(len(marks) + 1, max(length + 1, grown)):
            rows.add(filled(length, 10.0 * turn))
            marks.append(10.0 * turn)
        if not marks or not rows.fits(len(marks), max(rows.length) + 1):
            continue
        before = list(rows.length)
        step = rows.step()
        assert step.position_B.tolist() == before
        for layer in range(LAYERS):
            new = torch.tensor(marks)[:, None, None, None].expand(-1, HEADS, 1, WIDTH) + layer
            keys, values = step.update(new, -new, layer)
            assert keys.shape == (len(marks), HEADS, max(before) + 1, WIDTH)
            for row, (mark, n) in enumerate(zip(marks, before, strict=True)):
                assert (keys[row, :, : n + 1] == mark + layer).all()
                assert (values[row, :, : n + 1] == -mark - layer).all()
        assert rows.length == [n + 1 for n in before]
        height, width = rows._shape
        assert height * width <= 600 and len(rows._keys) == LAYERS
        assert rows._keys[0].shape == (height, HEADS, width, WIDTH)


def test_what_is_allowed_together() -> None:
    rows = Rows(limit=3, tokens=100, context=50)
    assert rows.fits(3, 33) and not rows.fits(3, 34) and not rows.fits(4, 1) and rows.fits(2, 50)


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_sees_itself_and_no_further_than_its_window(window: int | None) -> None:
    rows = Rows(limit=2, tokens=100, context=50)
    rows.add(filled(2, 0.0))
    rows.add(filled(5, 1.0))
    mask = rows.step().mask(window, torch.float32)
    assert mask.shape == (2, 1, 1, 6)
    seen = (mask[:, 0, 0] == 0).int().tolist()
    assert seen == ([[1, 1, 1, 0, 0, 0], [1] * 6] if window is None else [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])


def test_folded_attention_is_attention() -> None:
    """Against the sum written out, with six query heads on two key heads and rows of different lengths."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 3:] = torch.finfo(torch.float32).min
    out, _ = rows_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert out.shape == (2, 1, 6, 8)
    for row in range(2):
        for head in range(6):
            weights = torch.softmax(key[row, head // 3] @ query[row, head, 0] * 0.3 + mask[row, 0, 0], -1)
            torch.testing.assert_close(out[row, 0, head], weights @ value[row, head // 3])
