"""What the audit log keeps of a student that died and went on, and what it says of one that learnt wrongly."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cluster.audit import AUDIT_FOLDER, AuditLog, ScoringLog, problems_of, steps_of
from cluster.corpus.batches import STARTS_FILE, TOKENS_FILE, Batches, CorpusFacts
from cluster.spec import CorpusSpec

COUNT = 6
PATIENCE_S = 1.0


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    folder = tmp_path / "corpus"
    folder.mkdir()
    tokens_NS = np.arange(8 * 10, dtype=np.int32).reshape(10, 8)
    np.save(folder / TOKENS_FILE, tokens_NS)
    np.save(folder / STARTS_FILE, np.zeros(tokens_NS.shape, dtype=np.bool_))
    CorpusFacts(1, tokens_NS.size, 10, "0" * 32).write(folder)
    spec = CorpusSpec(paths=["x"], sequence_length=8, batch_sequences=1, held_out=0.2, max_batches=COUNT)
    return Batches(folder, spec, 1)


def live(folder: Path, batches: Batches, first: int, last: int) -> None:
    """A life of a student from one batch to before another."""
    log = AuditLog(str(folder), "s", first, PATIENCE_S)
    for number in range(first, last):
        log.step(number, batches.train(number).address, 0.1 * number)


def test_a_student_that_never_died_learnt_each_batch_once(tmp_path: Path, batches: Batches) -> None:
    live(tmp_path, batches, 0, COUNT)
    steps, lives = steps_of(tmp_path, "s")
    assert [step.batch for step in steps] == list(range(COUNT))
    assert lives == 1
    assert float.fromhex(steps[3].loss) == 0.1 * 3
    assert problems_of(tmp_path, "s", batches) == []


def test_what_a_dead_life_did_after_its_last_commit_does_not_count(tmp_path: Path, batches: Batches) -> None:
    for first, last in ((0, 4), (2, 5), (2, COUNT)):
        live(tmp_path, batches, first, last)
    steps, lives = steps_of(tmp_path, "s")
    assert [(step.life, step.batch) for step in steps] == [(0, 0), (0, 1), (2, 2), (2, 3), (2, 4), (2, 5)]
    assert lives == 3
    assert problems_of(tmp_path, "s", batches) == []


def test_a_line_that_a_killed_writer_left_half_is_no_step(tmp_path: Path, batches: Batches) -> None:
    live(tmp_path, batches, 0, 3)
    with (tmp_path / AUDIT_FOLDER / "s.jsonl").open("a") as file:
        file.write('{"life": 0, "batch": 3, "addr')
    live(tmp_path, batches, 2, COUNT)
    assert problems_of(tmp_path, "s", batches) == []


def test_a_line_that_is_no_event_is_no_step(tmp_path: Path, batches: Batches) -> None:
    live(tmp_path, batches, 0, COUNT)
    with (tmp_path / AUDIT_FOLDER / "s.jsonl").open("a") as file:
        file.write('0\n"batch"\n["life"]\nnull\n')
    assert problems_of(tmp_path, "s", batches) == []


@pytest.mark.parametrize(
    ("lives", "problem"),
    [
        ([(0, 3)], "never learnt: batches 3, 4, 5"),
        ([(0, 3), (4, COUNT)], "never learnt: batches 3"),
        ([(2, COUNT)], "never learnt: batches 0, 1"),
    ],
)
def test_batches_that_were_left_out_are_named(
    tmp_path: Path, batches: Batches, lives: list[tuple[int, int]], problem: str
) -> None:
    for first, last in lives:
        live(tmp_path, batches, first, last)
    assert problems_of(tmp_path, "s", batches) == [problem]


def test_a_batch_that_was_learnt_twice_is_named(tmp_path: Path, batches: Batches) -> None:
    live(tmp_path, batches, 0, COUNT)
    log = AuditLog(str(tmp_path), "s", COUNT, PATIENCE_S)
    log.step(1, batches.train(1).address, 0.0)
    found = problems_of(tmp_path, "s", batches)
    assert found == ["learnt more than once: batches 1", "batches were not learnt in order"]


def test_text_that_the_corpus_does_not_hold_is_named(tmp_path: Path, batches: Batches) -> None:
    live(tmp_path, batches, 0, COUNT - 1)
    AuditLog(str(tmp_path), "s", COUNT - 1, PATIENCE_S).step(COUNT - 1, "f" * 32, 0.0)
    assert problems_of(tmp_path, "s", batches) == ["learnt from other text than the corpus holds: batches 5"]


def test_a_scoring_log_counts_over_all_sessions_of_a_run(tmp_path: Path) -> None:
    for numbers in ((0, 1), (1, 2)):
        log = ScoringLog(tmp_path, PATIENCE_S)
        for number in numbers:
            log.add(number, "0" * 32)
    assert ScoringLog(tmp_path, PATIENCE_S).counts() == {0: 1, 1: 2, 2: 1}


def test_lines_of_several_threads_stay_whole_on_a_disk_that_takes_them_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write = ScoringLog(tmp_path, PATIENCE_S), os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:7]))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: log.add(number, "0" * 32), range(200)))
    assert ScoringLog(tmp_path, PATIENCE_S).counts() == dict.fromkeys(range(200), 1)
