"""The doctor's screenful: what is there, and what is missing for which command."""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from jobs import doctor
from jobs.cli.main import main


def test_a_machine_with_everything_is_called_good(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What this machine has left on its disks is its own affair.
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * doctor.GIB))
    assert doctor.doctor(None) == 0
    shown = capfd.readouterr().out
    assert version("ray") in shown
    assert all(part in shown for part in ("torch device", "deepspeed ops", "shared memory", "port 8265", "token"))


def test_what_is_missing_is_named_with_the_commands_and_the_extra(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NEEDS", {"run": ("no-such-package",), "bench": ()})
    monkeypatch.setattr(doctor, "_machine", lambda: [doctor._package("no-such-package")])
    monkeypatch.setenv("COLUMNS", "150")
    assert doctor.doctor(None) == 1
    assert "for run: pip install 'stillhouse[train]'" in capfd.readouterr().out


def test_a_library_that_is_not_there_costs_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    for name in [name for name in sys.modules if name.startswith("serving.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["stillhouse", "bench", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert err == "error: aiohttp is not installed; pip install 'stillhouse[train,serve]'\n"
