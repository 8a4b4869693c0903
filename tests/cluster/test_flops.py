from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import UserError
from cluster.flops import FORWARD, PEAK, TRAINING, Work, parameters_of, peak_flops

H100 = "NVIDIA H100 80GB HBM3"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PEAK, raising=False)


def test_a_70b_teacher_on_eight_devices() -> None:
    work = Work(70_000_000_000, FORWARD, 989e12, 8)
    assert work.mfu(tokens=28_257, seconds=1.0) == pytest.approx(0.5, rel=1e-3)
    assert Work(70_000_000_000, TRAINING, 989e12, 8).mfu(28_257, 3.0) == pytest.approx(work.mfu(28_257, 1.0))


def test_what_is_not_known_is_not_made_up() -> None:
    assert Work(1000, FORWARD, None, 1).mfu(10, 1.0) is None
    assert Work(None, FORWARD, 1e12, 1).mfu(10, 1.0) is None
    assert peak_flops(CPU) is None


@pytest.mark.parametrize(("name", "peak"), [(H100, 989e12), (f"{H100} MIG 1g.10gb", None), ("NVIDIA T4", None)])
def test_the_peak_goes_by_the_whole_name_of_a_gpu(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA) == peak


def test_the_environment_says_it_for_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PEAK, "2e11")
    assert peak_flops(CPU) == 2e11


@pytest.mark.parametrize("given", ["fast", "0", "-1", "nan", "inf"])
def test_what_is_no_rate_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PEAK, given)
    with pytest.raises(UserError, match=f"{PEAK}: got '{given}'; give the FLOP/s"):
        peak_flops(CPU)


def test_a_model_s_parameters_are_counted_once_and_those_of_experts_not_at_all() -> None:
    model: Any = torch.nn.ModuleList([torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)])
    model[1].weight = model[0].weight  # tied
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=4))
    assert parameters_of(model) == 32
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_local_experts=8))
    assert parameters_of(model) is None
