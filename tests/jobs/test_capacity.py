"""Whether a family fits on the cluster that it is meant for, and what is shown where no cluster answers."""

from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cluster.errors import RunError, UserError
from cluster.spec import FamilySpec
from jobs import capacity
from jobs.contexts import Context
from tests.tiny import tiny_family

SPEC = FamilySpec.model_validate(tiny_family(serving={"cpus_per_arm": 2.0}))
LARGE, SMALL = [{"CPU": 4.0}], [{"CPU": 3.0}]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def at(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]]) -> list[str]:
    """A job server on every address, whose cluster has these nodes; the addresses that were asked."""
    asked: list[str] = []

    def connected(context: Context) -> str:
        asked.append(context.address)
        return context.address

    monkeypatch.setattr(capacity, "connect", connected)
    monkeypatch.setattr(capacity, "alive_nodes_of", lambda _client: nodes)
    return asked


def test_a_family_that_does_not_fit_is_refused_also_where_only_the_comparison_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at(monkeypatch, LARGE)
    assert capacity.check_size(SPEC, address="http://lab:8265") is None
    at(monkeypatch, SMALL)
    with pytest.raises(
        UserError, match=r"^the cluster is too small: serving needs 2 x \(2 CPU\).*there is 3 CPU, 0 GPU"
    ):
        capacity.check_size(SPEC, address="http://lab:8265")


def test_the_cluster_that_is_given_comes_before_the_environment_and_that_before_the_context_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = at(monkeypatch, LARGE)
    contexts = {"lab": Context(address="http://lab:1"), "here": Context(address="http://here:2")}
    known = capacity.read_contexts().model_copy(update={"contexts": contexts, "current": "here"})
    monkeypatch.setattr("jobs.contexts.read_contexts", lambda: known)
    monkeypatch.setattr(capacity, "read_contexts", lambda: known)
    assert capacity.check_size(SPEC) is None
    monkeypatch.setenv("RAY_ADDRESS", "http://head:3")
    assert capacity.check_size(SPEC) is None
    assert capacity.check_size(SPEC, context="lab") is None
    assert asked == ["http://here:2", "http://head:3", "http://lab:1"]

    def small(address: str) -> list[dict[str, float]]:
        asked.append(address)
        return SMALL

    monkeypatch.setattr(capacity, "_nodes_of_head", small)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(UserError, match="the cluster is too small"):
        capacity.check_size(SPEC)
    assert asked[-1] == "head:6379"


def test_ray_is_not_imported_before_a_context_s_token_is_set() -> None:
    code = "import sys, cluster.dates, cluster.specfile, jobs.capacity, jobs.cli.main; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_a_cluster_the_notice_says_what_the_family_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = "the size of the cluster is not checked, the family needs 4 CPU at a time: "
    assert capacity.check_size(SPEC) == f"{needs}neither RAY_ADDRESS nor a context names one"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    notice = capacity.check_size(SPEC)
    assert notice is not None and notice.startswith(f"{needs}RAY_ADDRESS: no Ray cluster answers at 127.0.0.1:9")


def test_a_cluster_that_was_given_and_does_not_answer_is_an_error() -> None:
    with pytest.raises(RunError, match="no Ray job server answers there"):
        capacity.check_size(SPEC, address="http://127.0.0.1:9")


def test_what_answers_and_is_no_head_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and command[-1].startswith("127.0.0.1:")
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRpcError: not a head\n")

    monkeypatch.setattr(capacity.subprocess, "run", ended)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_address[1]}")
        notice = capacity.check_size(SPEC)
    finally:
        server.server_close()
    assert notice is not None and notice.endswith(": RpcError: not a head") and "\n" not in notice
