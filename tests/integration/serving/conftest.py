"""One endpoint of two endless arms for all files of this folder: it takes ten seconds of two processors to come up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.arms import Arm
from serving.deploy import Endpoint, deploy, endpoint_of
from tests.tiny import write_endless_model

SLOTS = 2
QUEUE = 2


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_endless_model(root / name, seed) for seed, name in enumerate(["small", "large"])}


@pytest.fixture(scope="package")
def endpoint(ray_cluster: None, models: dict[str, Path]) -> Iterator[Endpoint]:
    """Open to everyone. A test leaves it as it found it; the last ones of test_serving.py shut it down."""
    arms = [Arm(name, str(path)) for name, path in models.items()]
    with deploy(endpoint_of(arms, port=0, dtype="float32", slots=SLOTS, queue=QUEUE)) as running:
        yield running
