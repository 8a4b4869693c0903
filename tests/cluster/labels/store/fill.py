"""What the tests of the store keep in it: small blocks under stamps of their own, and folders of a chosen age."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from cluster.labels.columns import Bytes
from cluster.labels.kinds import Hidden
from cluster.labels.store.objects import label_key
from cluster.labels.store.store import LabelStore
from cluster.labels.wire import Stamp, encode
from tests.cluster.labels.blocks import ragged_mask, random_labels

TEACHER, OTHER = "0123456789abcdef", "a" * 16
DAY = 86_400.0


def stamp_of_batch(number: int, teacher: str = TEACHER) -> Stamp:
    """The stamp of one of many batches; their first digits differ."""
    return Stamp(teacher, "f" * 16, "0" * 16, f"{number * 7919 % 2**16:04x}{number:028x}")


def block(stamp: Stamp, form: str = "topk") -> Bytes:
    """A block of a few hundred bytes that bears the stamp."""
    return encode(random_labels(form, ragged_mask(), seed=int(stamp.batch, 16) % 2**32), stamp)


def repetitive_block(stamp: Stamp) -> Bytes:
    """A block that zstd makes much smaller."""
    mask_BS = np.ones((4, 32), np.bool_)
    return encode(Hidden(mask_BS, 300, 1.0, hidden_TD=np.ones((mask_BS.size, 64), np.uint16)), stamp)


def fill(store: LabelStore, count: int, teacher: str = TEACHER) -> list[Stamp]:
    """Put ``count`` batches into a store."""
    stamps = [stamp_of_batch(number, teacher) for number in range(count)]
    for stamp in stamps:
        assert store.put(block(stamp), stamp)
    return stamps


def age(root: Path, key: str, seconds: float) -> None:
    """Make an object look as if it had been written so long ago by the folder's clock."""
    then = time.time() - seconds
    os.utime(root / key, (then, then))


def age_labels(root: Path, stamps: list[Stamp], days: list[float]) -> None:
    for stamp, each in zip(stamps, days, strict=True):
        age(root, label_key(stamp), each * DAY)
