"""The dice of a chaos run, and the report after it."""

from __future__ import annotations

import random

import pytest

from tests.chaos.report import ChaosReport
from tests.conftest import CHAOS_SEED
from tests.integration.conftest import ray_cluster, s3, s3_environment, tiny  # noqa: F401

REPORT = pytest.StashKey[ChaosReport]()


@pytest.fixture(scope="session")
def dice() -> random.Random:
    """Random moments, from the seed that every run prints first."""
    return random.Random(CHAOS_SEED)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> ChaosReport:
    """Filled by the tests, printed after them."""
    return pytestconfig.stash.setdefault(REPORT, ChaosReport())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    made = config.stash.get(REPORT, None)
    if made is not None:
        terminalreporter.section("chaos report")
        for line in (f"seed {CHAOS_SEED}", *made.lines()):
            terminalreporter.line(line)
