"""Fixtures that tests of several folders share: tiny models, an S3 server, a trace sink, a Ray cluster.

``tests/conftest.py`` registers this module as a plugin, so every test sees them without importing them. Each fixture
imports the heavy modules it needs itself, so that unit tests do not pay for them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.tiny import write_serving_model, write_tiny_corpus, write_tiny_model

if TYPE_CHECKING:
    from tests.integration.heads import Head
    from tests.integration.otlp import Sink


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a 4-layer Llama with random weights and a 300-token tokenizer. Not to be written to."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def own_code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where transformers copies the Python of models that a test trusts."""
    import transformers.dynamic_module_utils

    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a 2-layer Llama for an engine, with a token per byte. Not to be written to."""
    return write_serving_model(tmp_path_factory.mktemp("models") / "serving")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 64 short documents. Not to be written to."""
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "documents.jsonl")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ``teacher`` and a tiny ``corpus.jsonl``. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "teacher")
    write_tiny_corpus(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's SQLite file without a model in it. To be copied, for MLflow takes seconds to make one."""
    from cluster.registry import Models

    path = tmp_path_factory.mktemp("registry") / "mlflow.db"
    assert Models(f"sqlite:///{path}").standing("anything") is None
    return path


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[int]:
    """Keys and the address of an S3 server that a test may start; set before Ray, whose processes inherit them."""
    from tests.integration.seaweed import free_port

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", secrets.token_hex(8))
        patch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(16))
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield port


@pytest.fixture(scope="session")
def s3(s3_environment: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a real S3 server, at the address in the environment; all tests share the server."""
    from tests.integration.seaweed import seaweed

    with seaweed(tmp_path_factory.mktemp("s3"), s3_environment) as client:
        yield client


@pytest.fixture(scope="session")
def traces() -> Iterator[Sink]:
    """Takes half of all traces; set before Ray, as the S3 server's address is. A CPU gets a peak to be held to, too."""
    from cluster.flops import PEAK
    from tests.integration.otlp import otlp_sink

    with otlp_sink() as sink, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.url)
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        patch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
        patch.setenv(PEAK, "1e12")
        yield sink


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: int, traces: Sink) -> Iterator[None]:
    """The cluster that ``stillhouse run`` starts on a laptop."""
    from cluster.session import ray_session

    with ray_session():
        yield


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray cluster of another process, with token authentication. All modules share it: leave nothing running on it.

    Its job list keeps what earlier tests submitted, so look a job up by its name.
    """
    from tests.integration.heads import running_head

    with running_head(tmp_path_factory.mktemp("head")) as head:
        yield head
