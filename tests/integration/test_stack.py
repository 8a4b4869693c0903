"""`make up` and `make down` for real, in every run. Nightly, what happens between the two: a tiny family from a laptop,
its endpoint, every query of the boards and alerts, a move to a new version, and a restored backup."""

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
from datetime import date
from pathlib import Path
from typing import Any

import alembic.command
import httpx
import mlflow
import openai
import psutil
import psycopg2
import pytest
import yaml
from mlflow.store.db.utils import _get_alembic_config

from infra.local.parts import RULES, TAKEN, Stack
from infra.monitoring.boards import BOARDS
from tests.integration.heads import ROOT, read_until
from tests.integration.laptop import Laptop
from tests.tiny import tiny_family, write_serving_model, write_tiny_corpus

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="not installed: apt-get install prometheus"),
]
# The endpoint of the example serves the students that the example's family registers; so does the tiny one's.
ENDPOINT = ROOT / "examples/endpoint.yaml"
STUDENTS = {"demo-small", "demo-large"}


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
    # Every Ray listens for Ray clients on 10001, several beside each other, so that one may be another cluster's too.
    ports = {port for port, pid in listening() if pid in own}
    shared = {port for port, pid in listening() if pid not in own}
    assert {stack.ports[name] for name in TAKEN} <= ports - shared
    down = run("down", stack.folder.parent)
    assert down.returncode == 0, down.stdout + down.stderr
    assert "is killed" not in down.stderr, down.stderr
    assert [command_of(process) for process in before if process.is_running()] == []
    assert [command_of(process) for process in psutil.process_iter() if is_of(stack, process)] == []
    assert not (ports - shared) & {port for port, _ in listening()}
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
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo family in small. It learns for as long as Ray and Prometheus need to see it do so."""
    folder = tmp_path_factory.mktemp("demo")
    teacher = write_serving_model(folder / "teacher")
    tree = tiny_family(
        teacher,
        write_tiny_corpus(folder / "corpus.jsonl"),
        name="demo",
        teacher={"cpus_per_shard": 0.2},
        corpus={"held_out": 0.1, "max_batches": 1000, "epochs": 50},
        evaluation={"batches": 2},
        serving={"requests": 16, "max_tokens": 24, "cpus_per_arm": 0.2},
    )
    student = {**tree["students"]["small"], "cpus_per_rank": 0.2}
    tree["students"] = {
        name: {**student, "init": {"source": "teacher", "layers": layers}}
        for name, layers in (("small", 1), ("large", 2))
    }
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def family(stack: Stack, laptop: Laptop, spec: Path) -> str:
    """The family, submitted from another directory; what the command said."""
    # A CPU has no peak in the table.
    variables = {
        "STILLHOUSE_PEAK_FLOPS": "1e12",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{stack.mlflow_url}/v1/traces",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-mlflow-experiment-id=0",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.5",
    }
    given = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
    done = laptop.type("submit", str(spec), *given, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(stack: Stack, query: str) -> list[Any]:
    """What Prometheus had to say to a query within the last hour."""
    now = time.time()
    parameters = urllib.parse.urlencode({"query": query, "start": now - 3600, "end": now, "step": 5})
    url = f"http://127.0.0.1:{stack.ports['prometheus']}/api/v1/query_range?{parameters}"
    answer = json.loads(urllib.request.urlopen(url, timeout=30).read())
    return list(answer["data"]["result"])


def test_the_stack_comes_up_healthy_and_can_be_asked(stack: Stack) -> None:
    """Its `down`, which the fixture checks, leaves nothing."""
    shown = run("status", stack.folder.parent)
    assert (shown.returncode, shown.stdout.count("healthy")) == (0, 6), shown.stdout + shown.stderr
    assert mlflow.MlflowClient(stack.mlflow_url).get_experiment("0").name == "Default"
    assert {"labels", "models"} <= {each["Name"] for each in stack.s3_client().list_buckets()["Buckets"]}


@pytest.mark.nightly
def test_labels_models_and_runs_lie_where_they_should(stack: Stack, family: str) -> None:
    assert "succeeded" in family
    client = stack.s3_client()
    kept = {bucket: client.list_objects_v2(Bucket=bucket).get("KeyCount", 0) for bucket in ("labels", "models")}
    assert all(kept.values()), kept
    versions = mlflow.MlflowClient(stack.mlflow_url).search_model_versions("")
    assert {version.name for version in versions} == STUDENTS


@pytest.mark.nightly
def test_mlflow_shows_the_traces_of_batches(stack: Stack, family: str) -> None:
    found = mlflow.MlflowClient(stack.mlflow_url).search_traces(locations=["0"], max_results=500)
    traces = [{span.name for span in trace.data.spans} for trace in found]
    batches = [names for names in traces if "fetch" in names]  # the others are requests of the comparison
    assert batches
    assert all({"fetch", "score", "deliver", "wait", "step"} <= names for names in batches), batches


@contextlib.contextmanager
def serving(stack: Stack, *what: str) -> Iterator[str]:
    """`stillhouse serve` on the stack's cluster, where Prometheus looks for an endpoint."""
    port = stack.ports["endpoint"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    address = (stack.short / "ray/ray_current_cluster").read_text().strip()
    command = [sys.executable, "-u", "-m", "jobs", "serve", *what, "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--tracking-uri", stack.mlflow_url],
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


def ask_for(url: str, model: str, times: int = 1) -> None:
    """So many short completions, each of which must be answered."""
    body = {"model": model, "prompt": "The with statement", "max_tokens": 4}
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        for _ in range(times):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text


@pytest.fixture
def endpoint(stack: Stack, family: str) -> Iterator[str]:
    with serving(stack, str(ENDPOINT)) as url:
        yield url


@pytest.mark.nightly
def test_prometheus_has_an_answer_to_every_query(stack: Stack, endpoint: str) -> None:
    http = httpx.Client(trust_env=False, timeout=60)
    with openai.OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0, http_client=http) as client:
        question = {"role": "user", "content": "What does the with statement do?"}
        chat = client.chat.completions.create(model="demo", messages=[question], max_tokens=16)
    assert chat.choices[0].message.content
    experiment = {"name": "e", "control": "small", "candidates": ["large"], "min_requests": 20, "max_requests": 60}
    started = httpx.post(f"{endpoint}/admin/experiment", json=experiment, trust_env=False, timeout=60)
    assert started.status_code == 200, started.text
    ask_for(endpoint, "demo", times=100)
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
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    rules = [rule for group in groups for rule in group["rules"]]
    queries += [name for rule in rules for name in re.findall(r"\b(?:ray_)?stillhouse[a-z0-9_:]+", rule["expr"])]
    queries += [rule["record"] for rule in rules if "record" in rule]
    return [query for query in sorted(set(queries)) if not ask(stack, query)]


@pytest.mark.nightly
def test_a_new_version_goes_on_with_all_that_there_was(
    stack: Stack, laptop: Laptop, spec: Path, family: str, tmp_path: Path
) -> None:
    """As infra/README.md has it under "Moving to a new version"."""
    home = stack.folder.parent
    far = f"0 2 1 {(date.today().month + 5) % 12 + 1} *"
    typed(laptop, "schedule", "add", str(spec), "--name", "far", "--cron", far, "--snapshot")
    tree = {"name": "moving", "control": "small", "candidates": ["large"], "traffic": {"small": 3, "large": 1}}
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(tree))
    with serving(stack, str(ENDPOINT)) as url:
        typed(laptop, "ab", "start", url, str(experiment))
        ask_for(url, "demo", times=20)
        before = standing(laptop, url)
    assert before["weights"] == {"small": 3, "large": 1} and sum(before["requests"].values()) == 20

    backup = run("backup", home, str(tmp_path / "backup"))
    assert backup.returncode == 0, backup.stdout + backup.stderr
    newest = age_database(stack)
    take_down(stack)
    assert run("status", home).returncode == 1
    up = run("up", home)
    assert up.returncode == 0, up.stdout + up.stderr

    assert schema(stack) == newest
    (schedule,) = json.loads(typed(laptop, "schedule", "ls", "--json"))
    assert (schedule["name"], schedule["cron"], schedule["paused"]) == ("far", far, False)
    registry = mlflow.MlflowClient(stack.mlflow_url)
    assert [int(registry.get_model_version_by_alias(name, "challenger").version) for name in STUDENTS] == [1, 1]
    assert stack.s3_client().list_objects_v2(Bucket="labels")["KeyCount"] > 0
    with serving(stack, str(ENDPOINT)) as url:
        assert standing(laptop, url) == before
        # It is under way, not only shown.
        ask_for(url, "demo")
        assert sum(standing(laptop, url)["requests"].values()) == 21
        typed(laptop, "ab", "stop", url)
        assert standing(laptop, url)["weights"] == {"small": 4, "large": 0}


def typed(laptop: Laptop, *words: str) -> str:
    done = laptop.type(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def standing(laptop: Laptop, url: str) -> dict[str, Any]:
    """What an endpoint goes by, and how far its experiment is."""
    traffic = json.loads(typed(laptop, "traffic", url, "--json"))
    experiment = json.loads(typed(laptop, "ab", "status", url, "--json"))
    return {
        "weights": traffic["weights"],
        "experiment": traffic["experiment"],
        "started": experiment["started"],
        "requests": {arm: facts["requests"] for arm, facts in experiment["arms"].items()},
    }


def age_database(stack: Stack) -> str:
    """Take MLflow's database a step back, to where an older MLflow leaves it; the schema that it had."""
    driver = stack.database.replace("postgresql://", "postgresql+psycopg2://")
    config = _get_alembic_config(f"{driver}?passfile={stack.environment['PGPASSFILE']}")
    before = schema(stack)
    alembic.command.downgrade(config, "-1")
    assert schema(stack) != before
    return before


def schema(stack: Stack) -> str:
    """The version that MLflow's database says it is of."""
    with contextlib.closing(psycopg2.connect(stack.database, passfile=stack.environment["PGPASSFILE"])) as talk:
        cursor = talk.cursor()
        cursor.execute("SELECT version_num FROM alembic_version")
        ((version,),) = cursor.fetchall()
    return str(version)


@pytest.mark.nightly
def test_what_was_lost_is_there_after_a_restore(
    stack: Stack, laptop: Laptop, spec: Path, family: str, tmp_path: Path
) -> None:
    home, folder = stack.folder.parent, tmp_path / "backup"
    far = f"0 2 1 {(date.today().month + 5) % 12 + 1} *"
    typed(laptop, "schedule", "add", str(spec), "--name", "lost", "--cron", far, "--snapshot")
    registry = mlflow.MlflowClient(stack.mlflow_url)
    registry.set_registered_model_alias("demo-small", "champion", "1")
    made = run("backup", home, str(folder))
    assert made.returncode == 0, made.stdout + made.stderr
    assert run("backup", home, str(folder)).returncode == 2  # never over another

    typed(laptop, "schedule", "rm", "lost")
    registry.delete_registered_model("demo-small")
    client = stack.s3_client()
    for bucket in ("labels", "models"):
        for each in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=each["Key"])
        client.delete_bucket(Bucket=bucket)
    with pytest.raises(mlflow.MlflowException):
        registry.get_model_version_by_alias("demo-small", "champion")

    done = run("restore", home, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert run("status", home).returncode == 0
    assert "lost" in [each["name"] for each in json.loads(typed(laptop, "schedule", "ls", "--json"))]
    with serving(stack, "--arm", "models:/demo-small@champion", "--name", "restored") as url:
        ask_for(url, "restored")
