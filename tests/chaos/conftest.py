"""The dice of a chaos run, and the report after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.chaos.families import FAMILY, PAIR
from tests.chaos.report import ChaosReport
from tests.conftest import CHAOS_SEED
from tests.integration.heads import end_started, environment, stillhouse
from tests.integration.test_command_line import final_weights
from tests.tiny import write_family

REPORT = pytest.StashKey[ChaosReport]()
# A family whose parts are killed over and over is started again as often; a busy machine takes its time over that.
LONGEST_S = 1800


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Random moments, from the seed that every run prints first: a test's own, whichever others run before it."""
    return random.Random(f"{CHAOS_SEED} {request.node.nodeid}")


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> ChaosReport:
    """Filled by the tests, printed after them."""
    return pytestconfig.stash.setdefault(REPORT, ChaosReport())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("chaos") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONGEST_S))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    made = config.stash.get(REPORT, None)
    if made is not None:
        terminalreporter.section("chaos report")
        for line in (f"seed {CHAOS_SEED}", *made.lines()):
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def undisturbed_pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What the two students of :data:`PAIR` become when nothing happens."""
    home = tmp_path_factory.mktemp("undisturbed-pair")
    whole = stillhouse("run", str(write_family(home, tiny, PAIR, **FAMILY)), env=environment(home), timeout=500)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    return final_weights(home)
