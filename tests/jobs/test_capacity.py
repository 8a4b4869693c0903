"""Whether a family fits on the cluster that it is meant for, and what is shown where no cluster answers."""

from __future__ import annotations

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import RunError, UserError
from cluster.memory import GIB, Estimate, with_memory
from cluster.queue.held import Held
from cluster.spec import FamilySpec
from jobs import capacity
from jobs.client import held_on
from jobs.contexts import Context
from tests.tiny import tiny_family

SPEC = FamilySpec.model_validate(tiny_family(serving={"cpus_per_arm": 2.0}))
LARGE, SMALL = [{"CPU": 4.0}], [{"CPU": 3.0}]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def by_id(nodes: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {f"n{number}": node for number, node in enumerate(nodes)}


def size(context: str | None = None, address: str | None = None, spec: FamilySpec = SPEC) -> str | None:
    """What `check` says of a family's size."""
    return capacity.check_size(spec, {}, capacity.find_cluster(context, address))


def at(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], *held: Held) -> list[str]:
    """A job server on every address, whose cluster has these nodes; the addresses that were asked."""
    asked: list[str] = []

    def connected(context: Context) -> str:
        asked.append(context.address)
        return context.address

    monkeypatch.setattr(capacity, "connect", connected)
    monkeypatch.setattr(capacity, "alive_nodes_of", lambda _client: by_id(nodes))
    monkeypatch.setattr(capacity, "held_on", lambda _client: list(held))
    return asked


def test_a_family_that_does_not_fit_is_refused_also_where_only_the_comparison_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at(monkeypatch, LARGE)
    assert size(address="http://lab:8265") is None
    at(monkeypatch, SMALL)
    with pytest.raises(
        UserError, match=r"^the cluster is too small: serving needs 2 x \(2 CPU\).*there is 3 CPU, 0 GPU"
    ):
        size(address="http://lab:8265")


def test_the_cluster_that_is_given_comes_before_the_environment_and_that_before_the_context_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = at(monkeypatch, LARGE)
    contexts = {"lab": Context(address="http://lab:1"), "here": Context(address="http://here:2")}
    known = capacity.read_contexts().model_copy(update={"contexts": contexts, "current": "here"})
    monkeypatch.setattr("jobs.contexts.read_contexts", lambda: known)
    monkeypatch.setattr(capacity, "read_contexts", lambda: known)
    assert size() is None and capacity.find_cluster().named
    asked.pop()
    monkeypatch.setenv("RAY_ADDRESS", "http://head:3")
    assert size() is None
    assert size(context="lab") is None
    assert asked == ["http://here:2", "http://head:3", "http://lab:1"]

    def small(address: str) -> capacity.Cluster:
        asked.append(address)
        return capacity.Cluster(True, by_id(SMALL))

    monkeypatch.setattr(capacity, "_of_head", small)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(UserError, match="the cluster is too small"):
        size()
    assert asked[-1] == "head:6379"


def test_ray_is_not_imported_before_a_context_s_token_is_set() -> None:
    code = "import sys, cluster.dates, cluster.specfile, jobs.capacity, jobs.cli.main; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_a_cluster_the_notice_says_what_the_family_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = "the size of the cluster is not checked, the family needs 4 CPU at a time: "
    assert size() == f"{needs}neither RAY_ADDRESS nor a context names one"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    notice = size()
    assert notice is not None and notice.startswith(f"{needs}RAY_ADDRESS: no Ray cluster answers at 127.0.0.1:9")


def test_a_cluster_that_was_given_and_does_not_answer_is_an_error() -> None:
    with pytest.raises(RunError, match="no Ray job server answers there"):
        size(address="http://127.0.0.1:9")


def test_what_answers_and_is_no_head_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[0] == sys.executable and command[-1].startswith("127.0.0.1:")
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRpcError: not a head\n")

    monkeypatch.setattr(capacity.subprocess, "run", ended)
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_address[1]}")
        notice = size()
    finally:
        server.server_close()
    assert notice is not None and notice.endswith(": RpcError: not a head") and "\n" not in notice


def sized() -> FamilySpec:
    each = Estimate({}, 2 * GIB)
    return with_memory(SPEC, {"the teacher": each, "student small": each, "serving": each})


def test_a_cluster_without_the_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, [{"CPU": 4.0, "memory": 8.0 * GIB}])
    assert size(address="http://lab:8265", spec=sized()) is None
    for nodes in ([{"CPU": 4.0, "memory": 5.0 * GIB}], [{"CPU": 4.0}]):
        # Two processes of 2 GiB, and the family's own of 1.7 GiB.
        at(monkeypatch, nodes)
        with pytest.raises(UserError, match=r"the cluster is too small: .* GiB.*end what else runs there"):
            size(address="http://lab:8265", spec=sized())


def test_a_family_that_fits_only_without_what_runs_there_is_told_who_holds_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arm = Held("n0", "SERVE_REPLICA::team~small~1#arm#x1", "01000000", {"CPU": 0.0, "memory": 3.0 * GIB})
    at(monkeypatch, [{"CPU": 4.0, "memory": 8.0 * GIB}], arm)
    assert size(address="http://lab:8265", spec=sized()) == (
        "the family fits on the cluster, but not beside what runs there now: endpoint team (3.0 GiB); started now, it "
        "would wait in the queue, or be refused with limits.wait: false"
    )
    at(monkeypatch, [{"CPU": 4.0, "memory": 12.0 * GIB}], arm)
    assert size(address="http://lab:8265", spec=sized()) is None


def test_without_a_cluster_the_notice_names_the_memory_too() -> None:
    assert "needs 4 CPU and 6.5 GiB at a time" in str(size(spec=sized()))


def test_the_state_server_s_actors_and_groups_are_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.state

    actor = SimpleNamespace(node_id="n0", name="", job_id="01", required_resources={"CPU": 1.0, "node:head": 0.01})
    idle = SimpleNamespace(node_id=None, name=None, job_id=None, required_resources=None)
    bundle = {"node_id": "n1", "unit_resources": {"memory": 5.0}}
    group = SimpleNamespace(name="", creator_job_id="02", bundles=[bundle])
    monkeypatch.setattr(ray.util.state, "list_actors", lambda **_: [actor, idle])
    monkeypatch.setattr(ray.util.state, "list_placement_groups", lambda **_: [group])
    client = SimpleNamespace(get_address=lambda: "http://lab:8265")
    assert held_on(client) == [
        Held("n0", "", "01", {"CPU": 1.0}),
        Held("", "", "", {}),
        Held("n1", "", "02", {"memory": 5.0}),
    ]
