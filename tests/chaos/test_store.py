"""The label store damaged between two runs: what is damaged is scored again, and nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_survived
from tests.chaos.faults import DAMAGED
from tests.chaos.report import ChaosReport
from tests.tiny import run_here, write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ONE = {"alone": STUDENTS["alone"]}


def test_damaged_blocks_are_scored_again(tiny: Path, tmp_path: Path, dice: random.Random, report: ChaosReport) -> None:
    store = {"uri": str(tmp_path / "labels")}
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        checked, result, _ = run_here(write_family(tmp_path / name, tiny, ONE, store=store, **FAMILY))
        runs.append(result)
        if name == "first":
            assert result.stats.scored == dict.fromkeys(range(BATCHES), 1)
            # Of the kind that is trained on; the exact ones of the held-out batch are another.
            objects = sorted(path for path in (tmp_path / "labels" / "labels").rglob("*") if path.is_file())
            kinds = {path.parents[1] for path in objects}
            trained = max(kinds, key=lambda folder: sum(folder in path.parents for path in objects))
            for path in dice.sample([path for path in objects if trained in path.parents], 3):
                data = bytearray(path.read_bytes())
                data[dice.randrange(len(data))] ^= 0xFF
                path.write_bytes(data)
    first, second = runs
    with report.surviving(*[DAMAGED] * 3):
        assert len(second.stats.scored) == 3
        report.learnt(second.run.folder, ONE, BATCHES)
        assert_survived(second, checked.spec, first)
