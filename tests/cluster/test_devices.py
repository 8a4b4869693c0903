"""Who has asked for no GPU sees none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import serving.arm_server
from serving.arm_server import ArmServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("gpu", "visible"), [(False, ""), (True, "0")])
def test_an_arm_that_asked_for_no_gpu_sees_none(gpu: bool, visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen = []
    # Its engine, which takes a GPU where it sees one.
    monkeypatch.setattr(serving.arm_server, "open_engine", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    ArmServer("transformers", None, dtype="auto", threads=1, slots=1, gpu=gpu)
    assert seen == [visible]


@pytest.mark.gpu
def test_torch_finds_no_gpu_where_all_are_hidden() -> None:
    code = "import torch; from cluster.devices import see_no_gpu; see_no_gpu(); print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
