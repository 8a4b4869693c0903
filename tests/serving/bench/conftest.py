"""An endpoint of known behaviour for each test."""

import gc
from collections.abc import Iterator

import pytest

from tests.serving.bench.endpoint import Endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _frozen_again() -> Iterator[None]:
    """A measurement unfreezes all that it finds frozen; the next one would collect what imports have made."""
    yield
    gc.freeze()
