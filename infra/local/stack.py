"""`make up`, `make down`, `make status`: everything that Stillhouse runs on, on this machine, without containers.

    python -m infra.local.stack up [--free-ports] | down | status | backup FOLDER | restore FOLDER

A Ray head with token authentication, the scheduler of nightly families, MLflow on PostgreSQL with its artifacts in an
S3 server, and Prometheus. All listens on loopback but Ray's own processes, which take no orders without the token. The
processes are watched, and started again, by a supervisor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
import psycopg2
from supervisor.xmlrpc import SupervisorTransport

from infra.local.backup import backup, restore
from infra.local.parts import BUCKETS, ROOT, Stack, StackError

UP_S, DOWN_S = 180.0, 120.0


def main() -> int:
    """Do what the command line says; 2 for a mistake of the caller's, 1 where something is not healthy."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["up", "down", "status", "backup", "restore"])
    parser.add_argument("folder", nargs="?", type=Path, help="where the backup goes, or comes from")
    parser.add_argument("--free-ports", action="store_true", help="at the first start, take any ports that are free")
    options = parser.parse_args()
    home = Path(os.environ.get("STILLHOUSE_HOME") or ROOT / ".stillhouse").resolve()
    stack = Stack(home / "stack")
    try:
        if options.what == "up":
            return up(stack, options.free_ports)
        if options.what in ("backup", "restore"):
            if options.folder is None:
                raise StackError(f"{options.what}: give a folder, as in make {options.what} FOLDER=/somewhere")
            print((backup if options.what == "backup" else restore)(stack, options.folder))
            return 0
        return down(stack) if options.what == "down" else status(stack)
    except StackError as error:
        print(error, file=sys.stderr)
        return 2


def up(stack: Stack, free_ports: bool) -> int:
    """Start what does not run yet, and return when all of it is healthy."""
    if _supervisor(stack) is None:
        stack.folder.mkdir(parents=True, exist_ok=True)
        stack.choose_ports(free_ports)
        stack.prepare()
        command = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(stack.conf)]
        subprocess.run(command, env={**_clean(), **stack.environment}, check=True, cwd=stack.folder)
    deadline = time.monotonic() + UP_S
    while (ill := _ill(stack)) and time.monotonic() < deadline:
        time.sleep(0.5)
    _print(stack, ill)
    if ill:
        print(f"not healthy after {UP_S:.0f} s; the logs are in {stack.logs}", file=sys.stderr)
        return 1
    print(
        "\nuse it from anywhere:\n"
        f"  stillhouse context add local --address http://127.0.0.1:{stack.ports['ray']} --tracking-uri "
        f"{stack.mlflow_url} --store s3://labels --token-file {stack.folder / 'secrets/ray'}\n"
        "  stillhouse context use local"
    )
    return 0


def down(stack: Stack) -> int:
    """End what `up` started, and nothing else; returns when all of it has ended."""
    supervisor = _supervisor(stack)
    if supervisor is None:
        print("nothing runs")
        return 0
    process = psutil.Process(supervisor.supervisor.getPID())
    ours = [process, *process.children(recursive=True)]
    supervisor.supervisor.shutdown()
    _, left = psutil.wait_procs(ours, timeout=DOWN_S)
    for each in left:
        print(f"{each.pid} ({each.name()}) did not end in {DOWN_S:.0f} s and is killed", file=sys.stderr)
        each.kill()
    shutil.rmtree(stack.short, ignore_errors=True)
    for name in ("weed_master", "weed_volume", "weed_filer", "s3"):
        for port in (stack.ports[name], stack.ports[name] + 10_000):
            for file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                file.unlink()
    print(f"all ended; the data is kept in {stack.folder}")
    return 0


def status(stack: Stack) -> int:
    """Say of every part where it is and whether it answers."""
    if _supervisor(stack) is None:
        print("nothing runs; `make up` starts it")
        return 1
    ill = _ill(stack)
    _print(stack, ill)
    return 1 if ill else 0


def _print(stack: Stack, ill: dict[str, str]) -> None:
    urls = {
        "ray": f"http://127.0.0.1:{stack.ports['ray']}",
        "mlflow": stack.mlflow_url,
        "postgres": stack.database,
        "s3": stack.s3_url,
        "prometheus": f"http://127.0.0.1:{stack.ports['prometheus']}",
    }
    for name in _CHECKS:
        print(f"{name:<11} {urls.get(name, ''):<52} {ill.get(name, 'healthy')}")


# ---- health ----


def _ill(stack: Stack) -> dict[str, str]:
    """The parts that do not answer as they should, and why."""
    supervisor = _supervisor(stack)
    if supervisor is None:
        return dict.fromkeys(_CHECKS, "it does not run")
    states = {each["name"]: each["statename"] for each in supervisor.supervisor.getAllProcessInfo()}
    ill = {}
    for name in states:
        try:
            if states[name] != "RUNNING":
                raise StackError(f"it is {states[name].lower()}")
            _CHECKS[name](stack)
        except Exception as error:
            ill[name] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ill


def _postgres(stack: Stack) -> None:
    server = stack.database.replace("/mlflow", "/postgres")
    talk = psycopg2.connect(server, passfile=stack.environment["PGPASSFILE"], connect_timeout=3)
    try:
        talk.autocommit = True
        cursor = talk.cursor()
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
        if cursor.fetchone() is None:
            cursor.execute("CREATE DATABASE mlflow")
    finally:
        talk.close()


def _s3(stack: Stack) -> None:
    client = stack.s3_client()
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in set(BUCKETS) - there:
        client.create_bucket(Bucket=bucket)
        # It answers before its volumes can be written.
        client.put_object(Bucket=bucket, Key="probe", Body=b"")
        client.delete_object(Bucket=bucket, Key="probe")


def _ray(stack: Stack) -> None:
    _get(f"http://127.0.0.1:{stack.ports['ray']}/api/version", stack.secret("ray"))


def _scheduler(stack: Stack) -> None:
    """That it runs is all there is to see; it needs Ray, which is asked for itself."""


def _prometheus(stack: Stack) -> None:
    answer = json.loads(_get(f"http://127.0.0.1:{stack.ports['prometheus']}/api/v1/targets?state=active"))
    targets = [target for target in answer["data"]["activeTargets"] if target["labels"]["job"] == "ray"]
    for target in targets:
        if target["health"] == "down":
            raise StackError(f"it could not scrape Ray: {target['lastError']}")
    # A target that was found just now is "unknown" until it is scraped for the first time.
    if not any(target["health"] == "up" for target in targets):
        raise StackError("it has not scraped Ray yet")


_CHECKS: dict[str, Callable[[Stack], None]] = {
    "postgres": _postgres,
    "s3": _s3,
    "mlflow": lambda stack: _discard(_get(f"{stack.mlflow_url}/health")),
    "ray": _ray,
    "scheduler": _scheduler,
    "prometheus": _prometheus,
}


def _discard(_: bytes) -> None:
    pass


def _get(url: str, token: str | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    # A proxy from the environment has no way to this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return bytes(answer.read())
    except urllib.error.URLError as error:
        raise StackError(f"{url} does not answer ({error.reason})") from error


def _supervisor(stack: Stack) -> Any:
    """The supervisor that runs, by its socket; None where none does."""
    path = stack.short / "supervisor.sock"
    if not path.exists():
        return None
    proxy = ServerProxy("http://stack", transport=SupervisorTransport(None, None, f"unix://{path}"))
    try:
        proxy.supervisor.getState()
    except OSError:
        return None
    except Fault as error:
        raise StackError("the stack is being taken down by somebody else; wait until it is") from error
    return proxy


def _clean() -> dict[str, str]:
    """The environment without what belongs to another cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


if __name__ == "__main__":
    sys.exit(main())
