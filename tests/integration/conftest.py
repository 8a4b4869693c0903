"""One local Ray for all integration tests of a process, and families small enough to train in seconds."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.evaluate.result import FamilyResult
from cluster.family import run_family
from cluster.flops import PEAK
from cluster.preflight import Checked, preflight
from cluster.runs import open_run
from cluster.session import ray_session
from cluster.specfile import load_spec
from cluster.watch import Status
from tests.integration.otlp import Sink, otlp_sink
from tests.integration.seaweed import free_port, seaweed
from tests.tiny import tiny_family, write_tiny_corpus, write_tiny_model


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[int]:
    """Keys and the address of an S3 server that a test may start; set before Ray, whose processes inherit them."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", secrets.token_hex(8))
        patch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(16))
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield port


@pytest.fixture(scope="session")
def s3(s3_environment: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a real S3 server, where the environment says that it is; it is the same for all tests."""
    with seaweed(tmp_path_factory.mktemp("s3"), s3_environment) as client:
        yield client


@pytest.fixture(scope="session")
def traces() -> Iterator[Sink]:
    """Takes half of all traces; set before Ray, as the S3 server's address is. A CPU gets a peak to be held to, too."""
    with otlp_sink() as sink, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.url)
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        patch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
        patch.setenv(PEAK, "1e12")
        yield sink


@pytest.fixture(scope="session")
def ray_cluster(s3_environment: int, traces: Sink) -> Iterator[None]:
    """The cluster that ``stillhouse run`` starts on a laptop."""
    with ray_session():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny teacher and a tiny corpus."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "teacher")
    write_tiny_corpus(folder / "corpus.jsonl")
    return folder


def write_family(folder: Path, tiny: Path, students: dict[str, dict[str, Any]] | None = None, **sections: Any) -> Path:
    """A family over the tiny teacher as a YAML file; tenths of a CPU, so that several fit on a small machine.

    Args:
        students: instead of the tiny family's one.
        sections: fields that are added to the other sections.
    """
    labels = sections.pop("labels", None)
    # A store of its own, or one test would find what another has scored.
    sections.setdefault("store", {"uri": str(folder / "labels")})
    tree = tiny_family(tiny / "teacher", tiny / "corpus.jsonl", **sections)
    tree["labels"] = labels or tree["labels"]
    tree["students"] = students or tree["students"]
    tree["teacher"] = {"cpus_per_shard": 0.2, **tree["teacher"]}
    tree["students"] = {name: {"cpus_per_rank": 0.2, **student} for name, student in tree["students"].items()}
    path = folder / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run_here(path: Path, resume: bool = False) -> tuple[Checked, FamilyResult, list[Status]]:
    """Run a family on the cluster that is up, and keep every status that it reported."""
    checked = preflight(load_spec(path))
    seen: list[Status] = []
    return checked, run_family(checked, open_run(checked.spec, resume), seen.append), seen
