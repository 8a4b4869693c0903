"""What a rank does with a batch, on a real DeepSpeed engine in this process; the family around it is not there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.board import Point
from cluster.corpus.batches import Batch, content_address, positions_of
from cluster.errors import RunError
from cluster.evaluate.figures import Fidelity
from cluster.fingerprint import tokenizer_fingerprint
from cluster.labels.make import make_labels
from cluster.labels.wire import Stamp, encode
from cluster.models import TeacherModel, load_tokenizer
from cluster.spec import FamilySpec
from cluster.stream.figures import Delivery
from cluster.students import commits, loop
from cluster.students.elastic import ZERO_FOLDER
from cluster.students.job import StudentJob
from cluster.students.zero import rate
from tests.tiny import VOCABULARY, tiny_family, write_tiny_tokenizer

BATCHES, STOPPED_AFTER, SEQUENCES, LENGTH, WIDTH = 6, 3, 4, 12, 16
# DeepSpeed's four optimisers, of which the others take long to start.
SLOW = (pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly)
EVERY_ENGINE = pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, "float32"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [(1, "bfloat16"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]
        ),
    ],
)
BEFORE = Fidelity(1.0, 0.5, 2.0, 2.0, 0.1, 0.1, 100)


@pytest.fixture(scope="module")
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, as Ray Train makes one of a student's ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        loop.use_plain_gloo()
        rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
        torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with dropout everywhere, and the tiny tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    path = write_tiny_tokenizer(tmp_path_factory.mktemp("gpt2"))
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.3,
        embd_pdrop=0.3,
        attn_pdrop=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(path)
    return path


def batch_of(number: int) -> Batch:
    tokens_BS = np.random.default_rng(number).integers(1, VOCABULARY, (SEQUENCES, LENGTH), dtype=np.int32)
    loss_mask_BS = np.ones(tokens_BS.shape, dtype=np.bool_)
    loss_mask_BS[:, -1] = False
    positions_BS = positions_of(np.zeros(tokens_BS.shape, dtype=np.bool_))
    return Batch(number, tokens_BS, loss_mask_BS, positions_BS, content_address(tokens_BS, loss_mask_BS, positions_BS))


class Pass:
    """Stands in for the stream's reader: some batches, labelled by random logits."""

    def __init__(self, job: StudentJob) -> None:
        self._job = job

    def next(self, number: int) -> tuple[Delivery, list[np.ndarray]]:
        job, batch = self._job, batch_of(number)
        hidden_BSD = torch.randn(*batch.tokens_BS.shape, WIDTH, generator=torch.Generator().manual_seed(number))
        head_VD = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(99))
        labels = make_labels(
            job.family.labels,
            hidden_BSD,
            batch.loss_mask_BS,
            lambda hidden_TD: hidden_TD @ head_VD.T,
            vocabulary=VOCABULARY,
            address=batch.address,
            chunk=64,
        )
        assert labels is not None
        stamp = Stamp.of(job.teacher.fingerprint, job.teacher.tokenizer, job.family.labels, batch.address)
        return Delivery(batch, [], batch.loss_tokens), [encode(labels, stamp)]


class Kept:
    """Stands in for Ray Train's checkpoints: the last one lies in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.resharded = folder, False
        facts = folder / "facts.json"
        self.last = json.loads(facts.read_text()) if facts.exists() else None

    def due(self, batch: int) -> bool:
        return batch == 2

    def make(self, facts: dict[str, Any], fill: Callable[[Path], None], parameters: int, wait: bool) -> None:
        fill(self.folder)
        (self.folder / "facts.json").write_text(json.dumps(facts))

    def take_up(self, engine: Any) -> None:
        engine.load_checkpoint(str(self.folder), tag=ZERO_FOLDER)


Start = Callable[..., tuple[Any, list[Point]]]


@pytest.fixture
def start(_one_process: None, dropping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts the only rank of a student: from its last commit in ``kept``, if there is one."""

    def start(kept: str = "kept", **fields: Any) -> tuple[Any, list[Point]]:
        (tmp_path / kept).mkdir(exist_ok=True)
        tree = tiny_family(dropping, corpus={"sequence_length": LENGTH, "batch_sequences": SEQUENCES})
        tree["students"]["small"] |= {"init": {"source": "pretrained", "model": str(dropping)}, "micro_batch": 2}
        tree["students"]["small"] |= fields
        points: list[Point] = []
        remote = SimpleNamespace(remote=points.append)
        board: Any = SimpleNamespace(post=remote, phase=SimpleNamespace(remote=lambda *_: None))
        nobody: Any = None
        job = StudentJob(
            name="small",
            family=FamilySpec.model_validate({**tree, "evaluation": {"angle_every": None}}),
            teacher=TeacherModel(
                str(dropping), VOCABULARY, "0" * 16, tokenizer_fingerprint(load_tokenizer(dropping, "teacher"))
            ),
            student_dir=str(dropping),
            batches=BATCHES,
            stream=nobody,
            board=board,
            storage=str(tmp_path),
        )
        # The board above takes a point at once.
        monkeypatch.setattr(loop.ray, "wait", lambda posted, **_: (posted, []))
        monkeypatch.setattr(loop.ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
        monkeypatch.setattr(loop, "Reader", lambda stream, name, rank, batches: Pass(job))
        monkeypatch.setattr(loop, "Commits", lambda job, rank: Kept(tmp_path / kept))
        rank = loop._Rank(job)
        rank.before = BEFORE
        return rank, points

    return start


def learn(rank: Any, first: int, stop: int) -> None:
    for number in range(first, stop):
        rank.learn(number)


def weights(rank: Any) -> dict[str, Tensor]:
    return loop.gathered_state(rank.model, keep=True)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@EVERY_ENGINE
def test_a_resumed_student_with_dropout_ends_with_identical_weights(start: Start, stage: int, precision: str) -> None:
    fields = {"zero_stage": stage, "precision": precision, "lr": 1e-2}
    whole, whole_points = start("whole", **fields)
    learn(whole, 0, BATCHES)
    stopped, stopped_points = start(**fields)
    learn(stopped, 0, STOPPED_AFTER)
    stopped.commit(STOPPED_AFTER)
    # What it does after its commit, and what anybody else draws, is of no matter.
    learn(stopped, STOPPED_AFTER, STOPPED_AFTER + 1)
    torch.rand(7)
    resumed, resumed_points = start(**fields)
    assert resumed.restore() == STOPPED_AFTER
    learn(resumed, STOPPED_AFTER, BATCHES)
    assert same(weights(resumed), weights(whole))
    timeless = ("loss", "kl", "gradient_norm", "lr")
    curve = [[point.metrics[name] for name in timeless] for point in whole_points]
    assert [[p.metrics[name] for name in timeless] for p in stopped_points[:STOPPED_AFTER] + resumed_points] == curve


def test_a_resume_in_other_micro_batches_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    rank, _ = start()
    learn(rank, 0, 1)
    rank.commit(1)
    with caplog.at_level(logging.WARNING, logger=loop.__name__):
        start()[0].restore()
        assert caplog.text == ""
        start(micro_batch=1)[0].restore()
    assert "student small resumes after batch 0 with {'ranks': 1, 'micro_batch': 1}" in caplog.text
    assert "dropout draws other masks from here on" in caplog.text


def test_dropout_is_on_and_each_micro_batch_draws_its_own(start: Start) -> None:
    rank, points = start(lr=1e-12)
    assert rank.engine.module.training
    sames = []
    for row in (0, 0, 2):
        loop.seed_micro_batch(0, "small", 0, row)
        sames.append(torch.rand(8))
    assert torch.equal(sames[0], sames[1]) and not torch.equal(sames[0], sames[2])
    learn(rank, 0, 1)
    rank.engine.module.eval()
    learn(rank, 0, 1)
    with_dropout, without = (point.metrics["loss"] for point in points)
    assert with_dropout != pytest.approx(without, rel=1e-5)


@pytest.mark.parametrize("differs", ["seed", "student", "batch", "row"])
def test_draws_differ_by_seed_student_batch_and_row(differs: str) -> None:
    at: dict[str, Any] = {"seed": 0, "student": "small", "batch": 5, "row": 2}
    draws = []
    for there in (at, {**at, differs: "large" if differs == "student" else at[differs] + 1}):
        loop.seed_micro_batch(**there)
        draws.append((torch.rand(1).item(), np.random.random()))
    assert draws[0][0] != draws[1][0] and draws[0][1] != draws[1][1]


def test_a_batch_tells_all_ranks_whether_to_commit_after_it(start: Start) -> None:
    rank, _ = start()
    due = []
    for number in range(3):
        rank.learn(number)
        due.append(rank.commit_is_due)
    assert due == [False, True, False]


def test_checkpoints_are_due_by_the_clock_unless_by_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(commits.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(commits, "_last_commit", lambda: None)
    found = {}
    for name, fields in {"default": {}, "batches": {"every": 3}}.items():
        family = FamilySpec.model_validate(tiny_family(checkpoints=fields))
        job: Any = SimpleNamespace(family=family, storage="/runs/tiny", name="small")
        kept = commits.Commits(job, rank=1)
        now[0] += 599.0
        early = [kept.due(batch) for batch in (2, 3, 4)]
        now[0] += 1.0
        found[name] = early + [kept.due(batch) for batch in (5, 6)]
    assert found == {"default": [False] * 3 + [True] * 2, "batches": [False, True, False, False, True]}


def test_gradient_checkpointing_draws_the_same_dropout_again(start: Start) -> None:
    states = []
    for recompute in (False, True):
        rank, _ = start(gradient_checkpointing=recompute, lr=1e-2)
        learn(rank, 0, 2)
        states.append(weights(rank))
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_that_is_logged_is_the_batch_s_own(start: Start) -> None:
    rank, points = start(lr=1e-3)
    learn(rank, 0, 3)
    expected = [1e-3 * rate(rank.spec.schedule, batch, BATCHES) for batch in range(3)]
    assert [point.metrics["lr"] for point in points] == pytest.approx(expected)


def _overflowing(hidden_TD: Tensor, weight_VD: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """A loss of 0 whose gradient is infinite: the root's slope there."""
    hidden = hidden_TD.float()
    return (hidden - hidden.detach()).square().sum().sqrt(), torch.zeros(3, dtype=torch.float64)


@EVERY_ENGINE
def test_a_gradient_that_is_not_finite_ends_the_student(
    start: Start, stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, points = start(zero_stage=stage, precision=precision)
    learn(rank, 0, 2)
    monkeypatch.setattr(loop, "distillation_loss", _overflowing)
    with pytest.raises(RunError, match=r"student small, batch 2: loss 0, gradient norm inf.*Lower lr"):
        rank.learn(2)
    assert len(points) == 2
    assert all(0 < point.metrics["gradient_norm"] < 1e4 for point in points)


def test_a_learning_rate_far_too_high_ends_the_student(start: Start) -> None:
    rank, _ = start(lr=1e25, schedule={"warmup": 0.0})
    with pytest.raises(RunError, match=r"both must be finite, and nothing of this batch was committed"):
        learn(rank, 0, BATCHES)
