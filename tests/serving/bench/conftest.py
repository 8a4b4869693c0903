"""An endpoint of known behaviour for each test."""

from collections.abc import Iterator

import pytest

from tests.serving.bench.endpoint import Endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    yield server
    server.stop()
