"""MLflow away, refusing, or its actor killed: what is late, what is reported, and what is never done twice."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import requests
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, EndpointConnectionError
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2 as codes
from sqlalchemy.exc import OperationalError

from cluster.board import FAMILY, Point
from cluster.errors import UserError
from cluster.evaluate.figures import Fidelity, StudentResult
from cluster.records import Records, _figures_of, latency_figures
from cluster.registry import PATIENCE_S, AwayError, Calls, RefusedError, Registry, fetch_model, log_figures
from cluster.registry import calls as calls_module
from cluster.registry.calls import SILENT_S
from cluster.registry.client import is_away
from cluster.runs import Run
from cluster.spec import FamilySpec
from tests.tiny import tiny_family

FIDELITY = Fidelity(1.0, 0.5, 2.0, 2.0, 0.1, 0.1, 10)
STUDENTS = {"small": {}, "large": {}}


def answer(status: int) -> requests.Response:
    made = requests.Response()
    made.status_code = status
    return made


def refused(status: int) -> ClientError:
    return ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")  # type: ignore[typeddict-item]


def wrapped(cause: Exception) -> S3UploadFailedError:
    """As boto3 reports an upload that failed."""
    try:
        try:
            raise cause
        except ClientError as error:
            raise S3UploadFailedError("failed to upload") from error
    except S3UploadFailedError as error:
        return error


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (MlflowException("down"), True),
        (MlflowException("busy", codes.REQUEST_LIMIT_EXCEEDED), True),
        (MlflowException("no such run", codes.RESOURCE_DOES_NOT_EXIST), False),
        (MlflowException("not yours", codes.PERMISSION_DENIED), False),
        (requests.ConnectionError("refused"), True),
        (requests.HTTPError(response=answer(503)), True),
        (requests.HTTPError(response=answer(403)), False),
        (EndpointConnectionError(endpoint_url="http://s3"), True),
        (refused(503), True),
        (refused(403), False),
        (wrapped(refused(500)), True),
        (wrapped(refused(403)), False),
        (OperationalError("", None, Exception("connection failed")), True),
        (ValueError("no such format"), False),
    ],
    ids=str,
)
def test_what_may_pass_is_told_from_a_refusal(error: Exception, away: bool) -> None:
    assert is_away(error) is away


# -- the calls ---------------------------------------------------------------------------------------------------------


class NeverError(Exception):
    """In place of an answer that never comes."""


class Cluster:
    """Actor calls without a cluster: a reference is a new object, and its result is there at once or never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.results: dict[Any, Any] = {}
        self.now = 1000.0
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "wait", self.wait)
        clock = SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: self.now, sleep=self.sleep, strftime=lambda *_: "", localtime=int
        )
        monkeypatch.setattr(calls_module, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [ref for ref in refs if ref in self.results][:num_returns]
        if len(ready) < num_returns:
            self.sleep(timeout)
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, given: Any, timeout: float | None = None) -> Any:
        return [self.result(ref) for ref in given] if isinstance(given, list) else self.result(given)

    def result(self, ref: Any) -> Any:
        result = self.results[ref]
        if isinstance(result, Exception):
            raise ray.exceptions.RayTaskError("registry", "", result)
        return result

    def call(self, work: Any) -> Any:
        """A call's reference, with what the work returns or raises."""
        ref = object()
        try:
            self.results[ref] = work()
        except NeverError:
            pass
        except Exception as error:
            self.results[ref] = error
        return ref


class Service:
    """The registry actor's methods there. MLflow is ``away``, ``hangs``, refuses what is in ``refuses``, or works."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.away, self.hangs, self.refuses = cluster, False, False, set[str]()
        self.logged: dict[str, list[Point]] = {}
        self.versions: list[str] = []
        self.finished: list[list[str]] = []
        self.closed: list[tuple[Any, ...]] = []
        self.started: list[str] = []
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self.cluster.call(lambda: self._do(name, *given)))

    def _do(self, name: str, subject: Any, *given: Any) -> Any:
        self.asked += 1
        if self.hangs:
            raise NeverError
        if self.away:
            raise AwayError("MLflow x does not answer: refused")
        if subject in self.refuses if isinstance(subject, str) else False:
            raise RefusedError(f"MLflow x refuses: no such run {subject}")
        if name == "log":
            self.logged.setdefault(subject, []).extend(given[0])
        elif name == "register":
            self.versions.append(given[0])
            return len(self.versions)
        elif name == "finish":
            self.finished.append(given[0])
            self.closed.append((sorted(subject), *given))
        elif name == "start":
            self.started.append(given[-1])
            return {student: f"run-{student}" for student in (FAMILY, *given[0])}
        return None


def records_of(folder: Path, service: Any) -> tuple[Records, Run]:
    run = Run(folder, "tiny-1", "", mlflow={FAMILY: "run", "small": "run-small", "large": "run-large"})
    return Records(service, run, FamilySpec.model_validate(tiny_family())), run


def student(name: str) -> StudentResult:
    return StudentResult(name, f"/models/{name}", 100, FIDELITY, FIDELITY, 8, 1.0)


def final(*names: str) -> dict[str, float]:
    """What the family's run gets of finished students."""
    return {f"{name}.{figure}": value for name in names for figure, value in _figures_of(student(name)).items()}


def without_final(service: Service) -> dict[str, list[Point]]:
    """What was logged of curves."""
    return {run: logged for run, logged in service.logged.items() if run != "run"}


def points(count: int) -> dict[str, list[Point]]:
    of = {name: [Point(name, b, {"loss": 1.0}, float(b)) for b in range(1, count + 1)] for name in ("small", "large")}
    return {FAMILY: [], **of}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(Cluster(monkeypatch))


def test_a_refused_student_is_reported_and_the_others_are_registered(tmp_path: Path, service: Service) -> None:
    records, run = records_of(tmp_path, service)
    service.refuses = {"run-small"}
    for name in ("small", "large"):
        records.register(student(name), {})
    records.log(points(3))
    records.close(points(3), [], lambda _: None)
    assert run.versions == {"large": 1}
    assert records.unregistered.keys() == {"small"}
    line = records.unregistered["small"]
    assert "refuses: no such run run-small" in line and "/models/small" in line and "--resume" in line
    # Its curve is refused too, which is shown, and the other one's is there.
    assert without_final(service) == {"run-large": points(3)["large"]}
    # The family's run has the final figures of both.
    logged = [point.metrics for point in service.logged["run"]]
    assert {**logged[0], **logged[1]} == final("small", "large")
    assert final("small")["small.kl_after"] == FIDELITY.kl
    (warning,) = records.warnings
    assert "metrics of student small are not in MLflow" in warning and str(tmp_path / "points.jsonl") in warning
    assert service.finished == [["small"]]


def test_a_family_s_run_that_is_gone_is_said_once(tmp_path: Path, service: Service) -> None:
    records, _ = records_of(tmp_path, service)
    service.refuses = {"run"}
    for name in ("small", "large"):
        records.register(student(name), {})
    of_family = {FAMILY: [Point(FAMILY, 1, {"replicas": 1.0}, 1.0)]}
    records.log(of_family)
    records.close(of_family, [], lambda _: None)
    (warning,) = records.warnings
    assert "metrics of the family are not in MLflow: " in warning
    assert records.unregistered == {}


def test_mlflow_is_waited_for_as_long_as_anything_else_goes_on(tmp_path: Path, service: Service) -> None:
    records, run = records_of(tmp_path, service)
    service.away = True
    records.register(student("small"), {})
    # Ten hours, in which other students learn.
    for count in range(1, 201):
        records.log(points(count))
        for ref in records.calls.refs:
            records.calls.take(ref)
        service.cluster.sleep(180.0)
        records.calls.look(idle=False)
    assert "waiting for MLflow since" in records.calls.trouble
    # With longer and longer pauses, not without end.
    assert service.asked < 810
    service.away = False
    records.close(points(200), [], lambda _: None)
    assert (run.versions, records.unregistered, records.warnings) == ({"small": 1}, {}, [])
    assert without_final(service) == {f"run-{name}": points(200)[name] for name in ("small", "large")}
    assert [point.metrics for point in service.logged["run"]] == [final("small")]
    assert run.logged == {"small": 200, "large": 200}
    assert records.calls.trouble == ""


def test_when_mlflow_stays_away_the_run_ends_and_tells_what_is_kept_where(tmp_path: Path, service: Service) -> None:
    records, run = records_of(tmp_path, service)
    service.away = True
    shown: list[str] = []
    records.register(student("small"), {})
    begun = service.cluster.now
    records.close(points(3), [], shown.append)
    assert 3600 < service.cluster.now - begun < 3700
    assert any("waiting for MLflow since" in line and "refused" in line for line in shown)
    assert run.versions == {} and "/models/small" in records.unregistered["small"]
    assert len(records.warnings) == 4  # both curves, the family's final figures, and that the run is not closed
    # The resumed run logs and registers what is missing, and nothing else.
    service.away = False
    again, _ = records_of(tmp_path, service)
    again._run = run
    again.register(student("small"), {})
    again.close(points(3), [], shown.append)
    assert (run.versions, again.unregistered, again.warnings) == ({"small": 1}, {}, [])
    assert without_final(service) == {f"run-{name}": points(3)[name] for name in ("small", "large")}
    assert [point.metrics for point in service.logged["run"]] == [final("small")]
    again.register(student("small"), {})
    assert service.versions == ["tiny-small"]


def test_an_actor_that_is_gone_for_good_fails_its_calls_and_not_the_run(tmp_path: Path, service: Service) -> None:
    records, _ = records_of(tmp_path, service)

    def gone(_: Any) -> Any:
        raise ray.exceptions.ActorDiedError()

    service.cluster.get = gone  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", gone)
        records.register(student("small"), {})
        records.close(points(1), [], lambda _: None)
    assert "ActorDiedError" in records.unregistered["small"]


def test_answers_that_have_come_are_processed_without_a_wait(service: Service) -> None:
    calls, answers = Calls(), list[Any]()
    never: Any = object()
    calls.ask(lambda: never, answers.append, answers.append)
    calls.take_ready()
    for work in (lambda: 1, lambda: 2):
        calls.ask(partial(service.cluster.call, work), answers.append, answers.append)
    begun = service.cluster.now
    calls.take_ready()
    assert (answers, calls.refs, service.cluster.now) == ([1, 2], [never], begun)


def test_a_call_that_never_returns_counts_as_mlflow_being_away(tmp_path: Path, service: Service) -> None:
    records, _ = records_of(tmp_path, service)
    shown: list[str] = []
    service.hangs = True
    begun = service.cluster.now
    records.register(student("small"), {})
    # A large upload takes minutes; that is no reason for a message.
    service.cluster.sleep(SILENT_S)
    records.calls.look(idle=False)
    assert records.calls.trouble == ""
    service.cluster.sleep(1.0)
    records.calls.look(idle=False)
    assert records.calls.trouble == "waiting for MLflow since : MLflow does not answer"
    records.close(points(3), [], shown.append)
    # From the end of the last student on, and not once more for each call that is still to be made.
    assert PATIENCE_S < service.cluster.now - begun - SILENT_S < PATIENCE_S + 60
    assert "does not answer; it has been away" in records.unregistered["small"]
    assert len(records.warnings) == 4


def test_a_refusal_is_an_answer(service: Service) -> None:
    calls, refusals, shown = Calls(), list[str](), list[str]()
    service.away = True
    calls.ask(lambda: service.log.remote("away", []), shown.append, shown.append)
    calls.take(calls.refs[0])
    assert calls.trouble
    service.away, service.refuses = False, {"run"}
    calls.ask(lambda: service.log.remote("run", []), refusals.append, refusals.append)
    calls.take(calls.refs[0])
    assert (refusals, calls.pending, calls.trouble) == (["MLflow x refuses: no such run run"], True, "")


def test_one_call_can_be_waited_for(service: Service) -> None:
    service.away = True
    shown: list[str] = []

    def back(trouble: str) -> None:
        shown.append(trouble)
        service.away = len(shown) < 3

    assert Calls().wait(lambda: service.log.remote("run", []), back) == (None, "")
    service.refuses = {"run"}
    assert Calls().wait(lambda: service.log.remote("run", []), back) == (None, "MLflow x refuses: no such run run")


# -- the registry itself, on a real MLflow -----------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path, empty_registry: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Registry, Any]:
    import mlflow

    shutil.copy(empty_registry, tmp_path / "mlflow.db")
    monkeypatch.setattr(os, "nice", lambda _: 0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    return Registry(uri, "tiny", str(tmp_path / "artifacts")), mlflow.MlflowClient(uri)


@pytest.fixture
def model(tiny_teacher: Path, tmp_path: Path) -> Path:
    """A finished student's model where its run keeps it."""
    place = tmp_path / "stillhouse/runs/tiny/tiny-1/students/small/checkpoint_0/model"
    return Path(shutil.copytree(tiny_teacher, place))


def start(registry: Registry, key: str = "key") -> dict[str, str]:
    return registry.start("tiny-1", STUDENTS, {"students": {name: {"lr": 1.0} for name in STUDENTS}}, {}, {}, key)


def test_a_start_that_is_made_again_finds_the_runs_of_the_first_try(registry: tuple[Registry, Any]) -> None:
    own, client = registry
    broken = {"small": {"lr": 1.0}}  # the first try ends here, after the parent and one child were made
    with pytest.raises(KeyError):
        own.start("tiny-1", STUDENTS, {"students": broken}, {}, {}, "key")
    runs = start(own)
    assert runs.keys() == {FAMILY, *STUDENTS} and start(own) == runs
    experiment = client.get_experiment_by_name("tiny").experiment_id
    assert len(client.search_runs([experiment])) == 3
    assert set(start(own, "another").values()).isdisjoint(runs.values())


def test_a_registration_that_is_made_again_makes_no_second_version_and_no_second_row(
    registry: tuple[Registry, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, client = registry
    run_id = start(own)["small"]
    given = (run_id, "tiny-small", str(model), {"stillhouse.family": "tiny"}, {"kl_after": 0.5}, 1.0)
    with monkeypatch.context() as patch:  # it dies after the version was made, before it has its tags
        patch.setattr(type(client), "set_model_version_tag", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own.register(*given)
    assert own.register(*given) == own.register(*given) == 1
    (version,) = client.search_model_versions("name='tiny-small'")
    assert version.tags["stillhouse.family"] == "tiny"
    (alias,) = client.get_registered_model("tiny-small").aliases.items()
    assert (alias[0], int(alias[1])) == ("challenger", 1)
    assert len(client.get_metric_history(run_id, "kl_after")) == 1
    for _ in range(2):
        own.log(run_id, points(3)["small"])
    assert [metric.step for metric in client.get_metric_history(run_id, "loss")] == [1, 2, 3]


def test_a_registration_that_is_made_again_late_does_not_move_the_challenger_back(
    registry: tuple[Registry, Any], model: Path
) -> None:
    own, client = registry

    def register(key: str) -> int:
        return own.register(start(own, key)["small"], "tiny-small", str(model), {}, {"kl_after": 0.5}, 1.0)

    def aliases() -> dict[str, int]:
        return {name: int(number) for name, number in client.get_registered_model("tiny-small").aliases.items()}

    assert (register("first"), register("second")) == (1, 2)
    # The first run's driver died before it had saved its version, and is resumed now.
    assert register("first") == 1
    assert aliases() == {"challenger": 2}
    # Nor does a champion become a challenger.
    client.set_registered_model_alias("tiny-small", "champion", "2")
    client.delete_registered_model_alias("tiny-small", "challenger")
    assert register("second") == 2
    assert aliases() == {"champion": 2}


def test_a_name_that_mlflow_refuses_is_refused_at_once_and_one_line(
    registry: tuple[Registry, Any], model: Path
) -> None:
    own, client = registry
    client.register_prompt("tiny-small", "a prompt has taken this name")
    with pytest.raises(RefusedError, match=r"^MLflow sqlite:.* refuses: .*prompt") as caught:
        own.register(start(own)["small"], "tiny-small", str(model), {}, {"kl_after": 0.5}, 1.0)
    assert "\n" not in str(caught.value)


def stored(*folders: Path) -> int:
    """Bytes on the disk; a file with several names counts once."""
    files = {(info.st_dev, info.st_ino): info.st_size for f in folders for p in f.rglob("*") if (info := p.stat())}
    return sum(files.values())


def test_a_registered_model_is_stored_once_on_one_file_system(
    registry: tuple[Registry, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, client = registry
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "stillhouse"))
    weights = (model / "model.safetensors").read_bytes()
    tags = {"stillhouse.family": "tiny", "stillhouse.run": "tiny-1"}
    given = (start(own)["small"], "tiny-small", str(model), tags, {}, 1.0)
    assert own.register(*given) == own.register(*given) == 1
    artifacts = Path(client.get_model_version_download_uri("tiny-small", "1")) / "model"
    assert (model / "model.safetensors").samefile(artifacts / "model.safetensors")
    assert stored(model, artifacts) < 1.2 * len(weights)
    # A third copy, for arms and warm starts, where MLflow keeps its artifacts elsewhere.
    monkeypatch.setattr(type(client), "get_model_version_download_uri", lambda *_: "mlflow-artifacts:/elsewhere")
    fetched = fetch_model("models:/tiny-small/1", own._uri)
    assert fetched.is_relative_to(tmp_path / "stillhouse/models")
    assert stored(model, artifacts, fetched) < 1.2 * len(weights)
    # Any of them may go.
    shutil.rmtree(model)
    shutil.rmtree(artifacts)
    assert (fetched / "model.safetensors").read_bytes() == weights


def test_a_model_whose_file_system_allows_no_link_is_registered_all_the_same(
    registry: tuple[Registry, Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    own, _ = registry
    monkeypatch.setattr(os, "link", refuse)
    assert own.register(start(own)["small"], "tiny-small", str(model), {}, {}, 1.0) == 1
    assert (model / "model.safetensors").stat().st_nlink == 1


def test_a_run_folder_with_other_weights_than_were_registered_is_not_fetched(
    registry: tuple[Registry, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, client = registry
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "stillhouse"))
    tags = {"stillhouse.family": "tiny", "stillhouse.run": "tiny-1"}
    own.register(start(own)["small"], "tiny-small", str(model), tags, {}, 1.0)
    changed = (model / "model.safetensors").read_bytes()[:-1] + b"x"
    (model / "model.safetensors").unlink()  # MLflow's own stays what it is
    (model / "model.safetensors").write_bytes(changed)
    monkeypatch.setattr(type(client), "get_model_version_download_uri", lambda *_: "mlflow-artifacts:/elsewhere")
    with pytest.raises(UserError, match="mlflow-artifacts URI"):  # it goes to the server, which is none here
        fetch_model("models:/tiny-small/1", own._uri)


def row(arm: str, p50: float) -> dict[str, Any]:
    """A row of the comparison of endpoints."""
    return {"arm": arm, "count": 4, "errors": 0, "tokens_per_s": 9.0, "first_token_ms": {}, "latency_ms": {"p50": p50}}


def test_the_family_s_run_has_its_students_figures_and_latencies(registry: tuple[Registry, Any]) -> None:
    own, client = registry
    runs = start(own)
    own.log(runs[FAMILY], [Point(FAMILY, 8, final("small", "large"))])
    spec = FamilySpec.model_validate(tiny_family())
    rows = [row("tiny-small", 12.5), row("tiny-small.champion", 14.0), row("teacher", 80.0)]
    log_figures(own._uri, latency_figures(spec, runs, rows))
    assert client.get_run(runs[FAMILY]).data.metrics["teacher.latency_p50_ms"] == 80.0
    assert client.get_run(runs[FAMILY]).data.metrics["small.champion.latency_p50_ms"] == 14.0
    of_family = client.get_run(runs[FAMILY]).data.metrics
    assert (of_family["small.kl_after"], of_family["large.parameters"]) == (FIDELITY.kl, 100.0)
    assert of_family["small.latency_p50_ms"] == client.get_run(runs["small"]).data.metrics["latency_p50_ms"] == 12.5
    client.delete_run(runs["small"])
    with pytest.raises(RefusedError, match="refuses"):
        log_figures(own._uri, {runs["small"]: {"latency_p50_ms": 12.5}})


def test_metrics_of_a_deleted_run_are_refused(registry: tuple[Registry, Any]) -> None:
    own, client = registry
    runs = start(own)
    client.delete_run(runs["small"])
    with pytest.raises(RefusedError, match="refuses"):
        own.log(runs["small"], points(1)["small"])
    own.log(runs["large"], points(1)["large"])
