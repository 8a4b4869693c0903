"""`make up` for real: a family from a laptop, an endpoint, every query of the boards and alerts, `make down`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import mlflow
import psutil
import pytest
import yaml

from infra.local.parts import RULES, TAKEN, Stack
from infra.monitoring.boards import BOARDS
from tests.integration.conftest import write_family
from tests.integration.heads import ROOT, read_until
from tests.integration.laptop import Laptop

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="not installed: apt-get install prometheus"),
]
STUDENT = {"init": {"source": "teacher", "layers": 1}, "precision": "float32", "micro_batch": 2}


def run(what: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infra.local.stack", what, *options]
    env = {**os.environ, "STILLHOUSE_HOME": str(home)}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # Not pytest's folder: it is closed to everybody else, and PostgreSQL will not run as root.
    home = Path(tempfile.mkdtemp(prefix="stack-", dir="/tmp"))
    home.chmod(0o755)
    stack = Stack(home / "stack")
    try:
        up = run("up", home, "--free-ports")
        assert up.returncode == 0, up.stdout + up.stderr
        assert up.stdout.count("healthy") == 6, up.stdout
        yield stack
        take_down(stack)
    finally:
        run("down", home)
        shutil.rmtree(home)


def processes_of(stack: Stack) -> list[psutil.Process]:
    """All that the stack has started, also what has long left its parent."""
    (supervisor,) = (process for process in psutil.process_iter() if str(stack.conf) in command_of(process))
    known = {supervisor, *supervisor.children(recursive=True)}
    return [*known, *(process for process in psutil.process_iter() if process not in known and is_of(stack, process))]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def is_of(stack: Stack, process: psutil.Process) -> bool:
    try:
        given = [*process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or none of ours
        return False
    return any(str(folder) in each for folder in (stack.folder, stack.short) for each in given)


def listening() -> list[tuple[int, int | None]]:
    """Every TCP port that is listened on here, and by which process."""
    found = psutil.net_connections("tcp")
    return [(each.laddr.port, each.pid) for each in found if each.status == psutil.CONN_LISTEN]


def take_down(stack: Stack) -> None:
    """`make down`; nothing is left of it."""
    before = processes_of(stack)
    assert len(before) > len(stack.programs())
    own = {each.pid for each in before}
    ports = {port for port, pid in listening() if pid in own}
    assert {stack.ports[name] for name in TAKEN} <= ports
    down = run("down", stack.folder.parent)
    assert down.returncode == 0, down.stdout + down.stderr
    assert "is killed" not in down.stderr, down.stderr
    assert [command_of(process) for process in before if process.is_running()] == []
    assert [command_of(process) for process in psutil.process_iter() if is_of(stack, process)] == []
    assert not ports & {port for port, _ in listening()}
    assert not stack.short.exists()
    assert not [path for port in stack.ports.values() for path in Path("/tmp").glob(f"seaweedfs-*{port}.sock")]


@pytest.fixture(scope="module")
def laptop(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    laptop = Laptop(tmp_path_factory.mktemp("laptop"))
    said = run("up", stack.folder.parent).stdout  # a second time changes nothing
    for line in re.findall(r"^  stillhouse (.+)$", said, re.MULTILINE):
        done = laptop.type(*line.split())
        assert done.returncode == 0, done.stderr
    return laptop


@pytest.fixture(scope="module")
def family(stack: Stack, laptop: Laptop, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A family of two, submitted from another directory; what the command said."""
    folder = tmp_path_factory.mktemp("family")
    students = {"small": STUDENT, "large": {**STUDENT, "init": {"source": "teacher", "layers": 2}}}
    path = write_family(folder, tiny, students, corpus={"held_out": 0.2, "max_batches": 200, "epochs": 20})
    tree = yaml.safe_load(path.read_text())
    # The context names both.
    tree.pop("store"), tree.pop("tracking", None)
    path.write_text(yaml.safe_dump(tree))
    # A CPU has no peak in the table.
    variables = {
        "STILLHOUSE_PEAK_FLOPS": "1e12",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{stack.mlflow_url}/v1/traces",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-mlflow-experiment-id=0",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.05",
    }
    given = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    done = laptop.type("submit", str(path), *given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(stack: Stack, query: str) -> list[Any]:
    """What Prometheus had to say to a query within the last quarter of an hour."""
    now = time.time()
    parameters = urllib.parse.urlencode({"query": query, "start": now - 900, "end": now, "step": 5})
    url = f"http://127.0.0.1:{stack.ports['prometheus']}/api/v1/query_range?{parameters}"
    answer = json.loads(urllib.request.urlopen(url, timeout=30).read())
    return list(answer["data"]["result"])


def test_labels_models_and_runs_lie_where_they_should(stack: Stack, family: str) -> None:
    assert "succeeded" in family
    client = stack.s3_client()
    kept = {bucket: client.list_objects_v2(Bucket=bucket).get("KeyCount", 0) for bucket in ("labels", "models")}
    assert all(kept.values()), kept
    versions = mlflow.MlflowClient(stack.mlflow_url).search_model_versions("")
    assert {version.name for version in versions} == {"tiny-small", "tiny-large"}


def test_mlflow_shows_the_traces_of_batches(stack: Stack, family: str) -> None:
    found = mlflow.MlflowClient(stack.mlflow_url).search_traces(locations=["0"], max_results=5)
    assert found
    for trace in found:
        assert {"fetch", "score", "deliver", "wait", "step"} <= {span.name for span in trace.data.spans}


@contextlib.contextmanager
def serving(stack: Stack, *arms: str) -> Iterator[str]:
    """`stillhouse serve` on the stack's cluster, under the name "both"."""
    port = stack.ports["endpoint"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    address = (stack.short / "ray/ray_current_cluster").read_text().strip()
    command = [sys.executable, "-u", "-m", "jobs", "serve", "--name", "both", "--port", str(port)]
    command += ["--tracking-uri", stack.mlflow_url, *(part for arm in arms for part in ("--arm", arm))]
    process = subprocess.Popen(
        command,
        env={**kept, **stack.environment, "RAY_ADDRESS": address},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        read_until(process, "answers as")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=90)


@pytest.fixture
def endpoint(stack: Stack, family: str) -> Iterator[str]:
    with serving(stack, "models:/tiny-small@challenger", "models:/tiny-large@challenger") as url:
        yield url


def test_prometheus_has_an_answer_to_every_query(stack: Stack, endpoint: str, tmp_path: Path) -> None:
    experiment = {
        "name": "e",
        "control": "tiny-small",
        "candidates": ["tiny-large"],
        "min_requests": 20,
        "max_requests": 60,
    }
    started = httpx.post(f"{endpoint}/admin/experiment", json=experiment, trust_env=False, timeout=60)
    assert started.status_code == 200, started.text
    body = {"model": "both", "prompt": "a b c", "max_tokens": 4}
    with httpx.Client(base_url=endpoint, trust_env=False, timeout=60) as client:
        for _ in range(150):
            assert client.post("/v1/completions", json=body).status_code == 200
    deadline = time.monotonic() + 120
    while (silent := unanswered(stack)) and time.monotonic() < deadline:
        time.sleep(2)
    assert silent == []


def unanswered(stack: Stack) -> list[str]:
    queries = [
        query.replace("$family", ".*").replace("$arm", ".*")
        for board in BOARDS
        for panel in board.panels
        for query in panel.queries.values()
    ]
    # An alert is silent as long as all is well; what it looks at must be there.
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    queries += [name for rule in rules for name in re.findall(r"\b(?:ray_)?stillhouse[a-z0-9_:]+", rule["expr"])]
    queries += [rule["record"] for rule in rules if "record" in rule]
    return [query for query in sorted(set(queries)) if not ask(stack, query)]


@pytest.mark.nightly
def test_what_was_made_is_there_after_down_and_up(stack: Stack, family: str) -> None:
    home = stack.folder.parent
    take_down(stack)
    assert run("status", home).returncode == 1
    up = run("up", home)
    assert up.returncode == 0, up.stdout + up.stderr
    version = mlflow.MlflowClient(stack.mlflow_url).get_model_version_by_alias("tiny-small", "challenger")
    assert int(version.version) == 1
    assert stack.s3_client().list_objects_v2(Bucket="labels")["KeyCount"] > 0


@pytest.mark.nightly
def test_what_was_lost_is_there_after_a_restore(stack: Stack, family: str, tmp_path: Path) -> None:
    home, folder = stack.folder.parent, tmp_path / "backup"
    registry = mlflow.MlflowClient(stack.mlflow_url)
    registry.set_registered_model_alias("tiny-small", "champion", "1")
    made = run("backup", home, str(folder))
    assert made.returncode == 0, made.stdout + made.stderr
    assert run("backup", home, str(folder)).returncode == 2  # never over another

    registry.delete_registered_model("tiny-small")
    client = stack.s3_client()
    for bucket in ("labels", "models"):
        for each in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=each["Key"])
        client.delete_bucket(Bucket=bucket)
    with pytest.raises(mlflow.MlflowException):
        registry.get_model_version_by_alias("tiny-small", "champion")

    done = run("restore", home, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    with serving(stack, "models:/tiny-small@champion") as url:
        body = {"model": "both", "prompt": "a b c", "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/completions", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
