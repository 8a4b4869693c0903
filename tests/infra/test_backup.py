"""`make backup` and `make restore` on a real PostgreSQL, S3 server and MLflow: nothing is lost that was not to go."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import psycopg2
import pytest

from infra.local import backup as module
from infra.local.backup import backup, restore
from infra.local.database import Beside, dump, look_at
from infra.local.parts import ROOT, Stack, StackError, postgres_bin
from infra.local.watch import supervisor_of
from jobs.schedules.ledger import Entry, Ledger
from jobs.schedules.plan import Schedule
from tests.infra.small_stack import small_stack

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="not installed: apt-get install prometheus"),
]


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    with small_stack("postgres", "s3", "mlflow") as stack:
        # It has made its tables; to start it anew takes half a minute, so only one test does.
        supervisor_of(stack).supervisor.stopProcess("mlflow")
        yield stack


@pytest.fixture
def stack(running: Stack) -> Stack:
    """With one object in each bucket and one experiment, no schedule and no endpoint."""
    client = running.s3_client()
    for bucket in ("labels", "models"):
        for key in objects(running, bucket):
            client.delete_object(Bucket=bucket, Key=key)
        client.put_object(Bucket=bucket, Key=f"some/{bucket}", Body=bucket.encode())
    with talk(running) as cursor:
        cursor.execute("DROP TABLE IF EXISTS newer")
        cursor.execute("DELETE FROM experiments WHERE experiment_id > 0")
    name_experiment(running, "kept")
    shutil.rmtree(running.home)
    running.home.mkdir()
    return running


@contextlib.contextmanager
def talk(stack: Stack, database: str = "mlflow") -> Iterator[Any]:
    url = stack.database.replace("/mlflow", f"/{database}")
    with contextlib.closing(psycopg2.connect(url, passfile=stack.environment["PGPASSFILE"])) as connection:
        connection.autocommit = True
        yield connection.cursor()


def name_experiment(stack: Stack, name: str) -> None:
    with talk(stack) as cursor:
        cursor.execute("INSERT INTO experiments (name, lifecycle_stage) VALUES (%s, 'active')", [name])


def experiments(stack: Stack) -> list[str]:
    with talk(stack) as cursor:
        cursor.execute("SELECT name FROM experiments WHERE experiment_id > 0 ORDER BY name")
        return [name for (name,) in cursor.fetchall()]


def databases(stack: Stack) -> set[str]:
    with talk(stack, "postgres") as cursor:
        cursor.execute("SELECT datname FROM pg_database WHERE NOT datistemplate")
        return {name for (name,) in cursor.fetchall()}


def objects(stack: Stack, bucket: str) -> dict[str, bytes]:
    client = stack.s3_client()
    found = client.list_objects_v2(Bucket=bucket).get("Contents", [])
    return {each["Key"]: client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read() for each in found}


def holds(stack: Stack) -> tuple[Any, ...]:
    return experiments(stack), objects(stack, "labels"), objects(stack, "models"), databases(stack)


def add_schedule(stack: Stack, name: str) -> Ledger:
    ledger = Ledger(f"sqlite:///{stack.home / 'schedules.db'}")
    ledger.add(Entry(Schedule(name=name, cron="0 2 * * *"), "f", b"zip", {}, "me", False, datetime.now(UTC)))
    return ledger


def schedules(path: Path) -> list[str]:
    return [entry.schedule.name for entry in Ledger(f"sqlite:///{path}").entries()]


def test_all_is_as_it_was_and_what_came_since_is_gone(stack: Stack, tmp_path: Path) -> None:
    before = holds(stack)
    backup(stack, tmp_path / "b")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700
    client = stack.s3_client()
    client.delete_object(Bucket="models", Key="some/models")
    client.put_object(Bucket="models", Key="new", Body=b"")
    name_experiment(stack, "new")
    restore(stack, tmp_path / "b")
    assert holds(stack) == before


def test_tables_of_a_newer_mlflow_go_and_mlflow_finds_its_own(stack: Stack, tmp_path: Path) -> None:
    supervisor = supervisor_of(stack).supervisor
    supervisor.startProcess("mlflow")
    before = supervisor.getProcessInfo("mlflow")["pid"]
    backup(stack, tmp_path / "b")
    make_newer(stack)
    restore(stack, tmp_path / "b")
    assert not is_newer(stack)
    # It was started anew, over the database that is there now, and answers.
    assert supervisor.getProcessInfo("mlflow")["pid"] != before
    assert mlflow.MlflowClient(stack.mlflow_url).get_experiment("0").name == "Default"
    supervisor.stopProcess("mlflow")


def make_newer(stack: Stack) -> None:
    with talk(stack) as cursor:
        cursor.execute("CREATE TABLE newer (id SERIAL, experiment INTEGER REFERENCES experiments (experiment_id))")
        cursor.execute("INSERT INTO newer (experiment) SELECT experiment_id FROM experiments")


def is_newer(stack: Stack) -> bool:
    with talk(stack) as cursor:
        cursor.execute("SELECT to_regclass('newer')")
        return cursor.fetchone() != (None,)


def test_the_documented_way_by_hand_leaves_no_table_of_a_newer_mlflow(stack: Stack, tmp_path: Path) -> None:
    (commands,) = re.findall(r"^```\n(createdb.+?)^```", (ROOT / "infra/README.md").read_text(), re.M | re.S)
    dump(stack, tmp_path / "mlflow.dump")
    make_newer(stack)
    own = {"PGHOST": "127.0.0.1", "PGPORT": str(stack.ports["postgres"]), "PGUSER": "stillhouse"}
    env = {**os.environ, **stack.environment, **own, "PATH": f"{postgres_bin()}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", commands], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not is_newer(stack) and experiments(stack) == ["kept"]
    with talk(stack, "postgres") as cursor:
        cursor.execute("DROP DATABASE mlflow_before")


def spoil(folder: Path, how: str) -> None:
    dump_file = folder / "mlflow.dump"
    whole = dump_file.read_bytes()
    if how in ("labels", "models"):
        shutil.rmtree(folder / how)
    elif how == "no dump at all":
        dump_file.unlink()
    elif how == "no dump":
        dump_file.write_bytes(b"<html>not found</html>")
    elif how == "a dump cut short":
        dump_file.write_bytes(whole[:-5000])
    elif how == "a dump without its last rows":  # its list of contents is there
        dump_file.write_bytes(whole[:-200])
        look_at(dump_file)
    else:
        (folder / "schedules.db").write_bytes(b"nothing of SQLite's" * 1000)


SPOILT = [
    "labels",
    "models",
    "no dump at all",
    "no dump",
    "a dump cut short",
    "a dump without its last rows",
    "schedules",
]


@pytest.mark.parametrize("how", SPOILT)
def test_a_backup_that_is_not_whole_changes_nothing(stack: Stack, tmp_path: Path, how: str) -> None:
    backup(stack, tmp_path / "b")
    spoil(tmp_path / "b", how)
    name_experiment(stack, "new")
    stack.s3_client().put_object(Bucket="labels", Key="new", Body=b"")
    before = holds(stack)
    with pytest.raises(StackError) as refused:
        restore(stack, tmp_path / "b")
    assert len(str(refused.value).splitlines()) == 1
    assert "TO=" not in str(refused.value)
    assert holds(stack) == before


def test_what_breaks_off_at_the_last_step_has_taken_nothing_away(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(stack, tmp_path / "b")
    name_experiment(stack, "new")
    stack.s3_client().put_object(Bucket="labels", Key="new", Body=b"")
    before = holds(stack)

    def break_off(self: Beside) -> None:
        raise StackError("the power went out")

    with monkeypatch.context() as patch, pytest.raises(StackError, match="power"):
        patch.setattr(Beside, "take_the_place", break_off)
        restore(stack, tmp_path / "b")
    assert holds(stack) == before
    restore(stack, tmp_path / "b")
    assert experiments(stack) == ["kept"] and set(objects(stack, "labels")) == {"some/labels"}


def test_what_a_killed_restore_left_is_in_nobody_s_way(stack: Stack, tmp_path: Path) -> None:
    before = holds(stack)
    backup(stack, tmp_path / "b")
    with talk(stack, "postgres") as cursor:
        cursor.execute("CREATE DATABASE mlflow_restored")
        cursor.execute("CREATE DATABASE mlflow_before")
    restore(stack, tmp_path / "b")
    assert holds(stack) == before


def test_without_a_database_of_before_there_is_one_afterwards(stack: Stack, tmp_path: Path) -> None:
    before = holds(stack)
    backup(stack, tmp_path / "b")
    with talk(stack, "postgres") as cursor:
        cursor.execute("DROP DATABASE mlflow WITH (FORCE)")
    restore(stack, tmp_path / "b")
    assert holds(stack) == before


@pytest.mark.parametrize("what", [backup, restore])
def test_without_a_stack_nothing_is_made(what: Callable[[Stack, Path], str], tmp_path: Path) -> None:
    with pytest.raises(StackError, match="there is no stack"):
        what(Stack(tmp_path / "stack"), tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_empty_buckets_are_a_backup_too(stack: Stack, tmp_path: Path) -> None:
    client = stack.s3_client()
    for bucket in ("labels", "models"):
        client.delete_object(Bucket=bucket, Key=f"some/{bucket}")
    backup(stack, tmp_path / "b")
    client.put_object(Bucket="labels", Key="new", Body=b"")
    restore(stack, tmp_path / "b")
    assert not objects(stack, "labels") and not objects(stack, "models")


def test_what_goes_while_it_is_copied_stops_nothing(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = module._keys
    monkeypatch.setattr(module, "_keys", lambda client, bucket: ["gone/since", *keys(client, bucket)])
    assert "2 objects" in backup(stack, tmp_path / "b")
    assert (tmp_path / "b/labels/some/labels").read_bytes() == b"labels"


def test_leases_are_of_those_who_run_now(stack: Stack, tmp_path: Path) -> None:
    client = stack.s3_client()
    client.put_object(Bucket="labels", Key="leases/yesterday.json", Body=b"{}")
    client.put_object(Bucket="models", Key="leases/no.lease", Body=b"")
    backup(stack, tmp_path / "b")
    assert not (tmp_path / "b/labels/leases").exists() and (tmp_path / "b/models/leases").exists()
    client.delete_object(Bucket="labels", Key="leases/yesterday.json")
    client.put_object(Bucket="labels", Key="leases/today.json", Body=b"{}")
    restore(stack, tmp_path / "b")
    assert set(objects(stack, "labels")) == {"leases/today.json", "some/labels"}


def test_what_the_s3_server_refuses_is_one_line_and_leaves_nothing(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup(stack, tmp_path / "b")
    before = holds(stack)
    with monkeypatch.context() as patch:
        patch.setitem(stack.environment, "AWS_SECRET_ACCESS_KEY", "wrong")
        for what, folder in ((backup, tmp_path / "c"), (restore, tmp_path / "b")):
            with pytest.raises(StackError, match=r"^the S3 server: .*SignatureDoesNotMatch.*\Z"):
                what(stack, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert holds(stack) == before


def test_a_place_where_nothing_can_be_written_is_one_line(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StackError, match=r"\A.+\Z"):
            backup(stack, folder)


def test_schedules_and_endpoints_come_back_on_a_new_machine(stack: Stack, tmp_path: Path) -> None:
    home = stack.home
    ledger = add_schedule(stack, "nightly")
    # A scheduler that is writing just then.
    ledger.hold("me", datetime.now(UTC), datetime.now(UTC))
    (home / "endpoints/demo").mkdir(parents=True)
    (home / "endpoints/demo/traffic.json").write_text("{}")
    (home / "endpoints/demo/.traffic.json.part").write_text("{")
    backup(stack, tmp_path / "b")
    shutil.rmtree(home)
    home.mkdir()
    assert restore(stack, tmp_path / "b").endswith(" objects are as they were")  # and nothing was put aside
    assert schedules(home / "schedules.db") == ["nightly"]
    assert [path.name for path in (home / "endpoints/demo").iterdir()] == ["traffic.json"]
    assert {path.name for path in home.iterdir()} == {"schedules.db", "endpoints"}


def test_newer_schedules_and_state_are_put_aside(stack: Stack, tmp_path: Path) -> None:
    home = stack.home
    ledger = add_schedule(stack, "nightly")
    traffic = home / "endpoints/demo/traffic.json"
    traffic.parent.mkdir(parents=True)
    traffic.write_text("old")
    backup(stack, tmp_path / "b")

    add_schedule(stack, "newer")
    traffic.write_text("new")
    (traffic.parent / "experiment-e.json").write_text("{}")
    (home / "endpoints/other").mkdir()
    said = restore(stack, tmp_path / "b")
    # Who has the database open sees it too.
    assert [entry.schedule.name for entry in ledger.entries()] == ["nightly"]
    assert traffic.read_text() == "old"
    assert [path.name for path in traffic.parent.iterdir()] == ["traffic.json"]
    assert (home / "endpoints/other").is_dir()
    (aside,) = home.glob("before-restore-*")
    assert str(aside) in said
    assert schedules(aside / "schedules.db") == ["newer", "nightly"]
    assert (aside / "endpoints/demo/traffic.json").read_text() == "new"
    assert (aside / "endpoints/demo/experiment-e.json").exists()


def test_a_backup_without_schedules_leaves_those_that_are_there(stack: Stack, tmp_path: Path) -> None:
    backup(stack, tmp_path / "b")
    add_schedule(stack, "newer")
    restore(stack, tmp_path / "b")
    assert schedules(stack.home / "schedules.db") == ["newer"]
    assert not list(stack.home.glob("before-restore-*"))


def test_a_key_that_would_lie_outside_of_the_backup_is_refused(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("../../outside", str(tmp_path / "outside")):
        monkeypatch.setattr(module, "_keys", lambda client, bucket, key=key: [key])
        with pytest.raises(StackError, match="outside of the backup"):
            backup(stack, tmp_path / "b")
    assert not list(tmp_path.iterdir())
