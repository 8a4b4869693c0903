"""What a store that refuses a run in the middle of it does to the run's labels: it delays what is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.audit import ScoringLog
from cluster.errors import UserError
from cluster.heads import OutputHead
from cluster.labels.store.buckets import FolderBucket
from cluster.labels.store.store import LabelStore
from cluster.labels.wire import Stamp, encode
from cluster.models import TeacherModel
from cluster.spec import FamilySpec
from cluster.stream import source
from cluster.stream.source import LabelSource
from tests.cluster.labels.blocks import ragged_mask, random_labels
from tests.tiny import VOCABULARY, tiny_family

REFUSALS = 2


class Refusing(FolderBucket):
    """A folder that takes nothing at first, as an S3 server whose keys are being exchanged."""

    refused = 0

    def _refuse(self) -> None:
        self.refused += 1
        if self.refused <= REFUSALS:
            raise UserError("the server lets us not put object: AccessDenied")

    def put_new(self, key: str, data: bytes) -> bool:
        self._refuse()
        return super().put_new(key, data)

    def replace(self, key: str, data: bytes) -> None:
        self._refuse()
        super().replace(key, data)


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(Refusing(tmp_path / "labels"))


def reading(store: LabelStore, tmp_path: Path) -> LabelSource:
    spec = FamilySpec.model_validate(tiny_family())
    teacher = TeacherModel(spec.teacher.model, VOCABULARY, "aa" * 8, "bb" * 8)
    return LabelSource(spec, teacher, store, ScoringLog(tmp_path, 1.0), "run")


def test_a_batch_that_the_store_refuses_is_kept_once_it_does_not(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "SAVE_AGAIN_S", 0.01)
    monkeypatch.setattr(source, "_whole", lambda blocks: blocks[0])
    mask_BS = ragged_mask()
    stamp = Stamp("aa" * 8, "bb" * 8, "cc" * 8, "dd" * 16)
    block = encode(random_labels("topk", mask_BS), stamp)
    saved: list[bool] = []

    def lost(_: list[Any]) -> None:
        raise AssertionError("nothing is lost")

    async def save() -> None:
        given: Any = [block]
        await reading(store, tmp_path)._save_until_kept(store, stamp, given, lambda: saved.append(True), lost)

    asyncio.run(save())
    assert saved == [True]
    kept = store.get(stamp)
    assert kept is not None
    assert bytes(kept) == bytes(block)


@pytest.mark.parametrize(("train", "started"), [({}, False), ({0: "ee" * 16}, True)])
def test_a_teacher_is_started_where_labels_are_missing_and_the_figures_say_so(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[int, str], started: bool
) -> None:
    monkeypatch.setattr(source.TeacherPool, "start", lambda self: None)
    bucket = store.bucket
    assert isinstance(bucket, Refusing)
    bucket.refused = REFUSALS
    store.put_head("aa" * 8, OutputHead(np.zeros((VOCABULARY, 8), np.float32)))

    async def look() -> bool:
        labels = reading(store, tmp_path)
        await labels.open(train, [])
        is_started = labels.stats.started
        await labels.close()
        return is_started

    assert asyncio.run(look()) is started


def test_a_lease_is_renewed_again_after_the_store_has_refused_it(
    store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "RENEW_S", 0.01)
    bucket = store.bucket
    assert isinstance(bucket, Refusing)
    bucket.refused = REFUSALS
    lease = store.lease("run", "labels")
    bucket.refused = 0

    async def renew() -> bool:
        keeper = asyncio.ensure_future(reading(store, tmp_path)._renew(lease))
        async with asyncio.timeout(30.0):
            while bucket.refused <= REFUSALS and not keeper.done():
                await asyncio.sleep(0.01)
        alive = not keeper.done()
        keeper.cancel()
        return alive

    assert asyncio.run(renew())
