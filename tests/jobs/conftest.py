"""The command line in this process, over a tiny family."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.cli.main import main
from tests.tiny import tiny_family


@pytest.fixture
def spec(tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path) -> Path:
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tiny_family(tiny_teacher, tiny_corpus)))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command; returns its exit code, its output and its errors."""

    def typed(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", *arguments])
        gc.collect()  # what other tests have left says so now
        capfd.readouterr()  # what making the mistake has printed
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return typed
