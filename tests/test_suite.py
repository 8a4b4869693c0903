"""What the suite checks of itself before any test runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
SKIPPED = """
import pytest

@pytest.fixture
def there(): ...

@pytest.mark.{mark}
@pytest.mark.skip(reason="needs what is not here")
def test_something({fixture}, there, request): ...
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder whose tests are collected by the rules of this one."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    pytester.syspathinsert(ROOT)
    pytester.makeconftest("from tests.conftest import pytest_collection_modifyitems")
    return pytester


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
@pytest.mark.parametrize("mark", ["chaos", "nightly", "unit"])
@pytest.mark.parametrize(
    ("fixture", "ends"), [("absent", pytest.ExitCode.USAGE_ERROR), ("tmp_path", pytest.ExitCode.OK)]
)
def test_a_missing_fixture_ends_the_run_though_its_test_is_skipped_or_deselected(
    suite: pytest.Pytester, mark: str, fixture: str, ends: pytest.ExitCode
) -> None:
    suite.makepyfile(test_first=SKIPPED.format(mark=mark, fixture=fixture), test_second="def test_it(): ...")
    done = suite.inline_run("-m", "unit", "-p", "no:cacheprovider", "-p", "no:schemathesis")
    assert done.ret == ends
    if ends == pytest.ExitCode.OK:  # and a test with another mark is no unit test
        done.assertoutcome(passed=1, skipped=int(mark == "unit"))
