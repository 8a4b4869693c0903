"""What every test shares: a home of its own, and the rule that an unmarked test is a unit test."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["tests.fixtures"]
# Decides when and what the chaos tests kill.
CHAOS_SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
# How many examples a property is tried on: few on each change, many with `--hypothesis-profile nightly`. They are not
# timed: on a busy machine a fast one may take long, and nothing is proved by it.
hypothesis.settings.register_profile("change", deadline=None, max_examples=40)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("change")
# `make unit` does not read these folders.
UNIT_FREE = {Path(__file__).parent / name for name in ("integration", "chaos")}
# A collection of as many takes a tenth of a second.
MANY_OBJECTS = 100_000
KINDS = ("unit", "integration", "chaos", "nightly", "slow", "gpu")


def pytest_configure() -> None:
    # A shell ignores SIGINT for what it runs in the background, and every process that a test starts would, too.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"chaos seed: CHAOS_SEED={CHAOS_SEED} repeats this run's"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _require_fixtures(items)
    for item in items:
        if not any(item.get_closest_marker(kind) for kind in KINDS):
            if not UNIT_FREE.isdisjoint(item.path.parents):
                raise pytest.UsageError(f"{item.nodeid} has no mark, and unit tests are not looked for in its folder")
            item.add_marker(pytest.mark.unit)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and (reason := _why_no_gpu()):
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    _freeze()


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """Collections stay quick in the modules after one that has imported much, or filled a library's caches."""
    yield
    if len(gc.get_objects()) > MANY_OBJECTS:
        _freeze()


def _freeze() -> None:
    """Leave out of every later garbage collection what lives now: each one takes half a second less.

    Ends of commands, doors and load generators collect before they are measured or print.
    """
    gc.collect()
    gc.freeze()


def _require_fixtures(items: list[pytest.Item]) -> None:
    """End the run if any collected test needs a fixture that does not exist, selected, skipped or not.

    pytest itself notices only when it sets the test up: never where the test is skipped or deselected.
    """
    missing = sorted(
        f"{item.nodeid}: fixture {name!r} not found"
        for item in items
        if isinstance(item, pytest.Function)
        for name in set(item._fixtureinfo.names_closure) - set(item._fixtureinfo.name2fixturedefs) - {"request"}
    )
    if missing:
        raise pytest.UsageError("\n".join(missing))


def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else f"needs a CUDA device; torch {torch.__version__} finds none"


@pytest.fixture(scope="session", autouse=True)
def _away_from_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the home directory of the person who runs it, or asks a model hub."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("STILLHOUSE_HOME", str(home / "stillhouse"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True)
def _no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test uses the MLflow of the person who runs it, or of a test before it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def stillhouse_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Stillhouse home for one test."""
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "stillhouse"))
    return tmp_path / "stillhouse"
