"""`make up`, `make down`, `make status`: everything that Stillhouse runs on, on this machine, without containers.

    python -m infra.local.stack up [--free-ports] | down | status | backup FOLDER | restore FOLDER

A Ray head with token authentication, the scheduler of nightly families, MLflow on PostgreSQL with its artifacts in an
S3 server, and Prometheus. All listens on loopback but Ray's own processes, which take no orders without the token. The
processes are watched, and started again, by a supervisor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from infra.local.backup import backup, restore
from infra.local.parts import ROOT, Stack, StackError
from infra.local.watch import CHECKS, UP_S, illnesses, supervisor_of

DOWN_S = 120.0


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
        stack.check_short()
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
    if supervisor_of(stack) is None:
        stack.folder.mkdir(parents=True, exist_ok=True)
        stack.choose_ports(free_ports)
        stack.prepare()
        command = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(stack.conf)]
        if subprocess.run(command, env={**_clean(), **stack.environment}, check=False, cwd=stack.folder).returncode:
            raise StackError(f"the supervisor did not start; see above, and {stack.logs}")
    deadline = time.monotonic() + UP_S
    while (ill := illnesses(stack)) and time.monotonic() < deadline:
        time.sleep(0.5)
    _print(stack, ill)
    if ill:
        print(f"not healthy after {UP_S:.0f} s; the logs are in {stack.logs}", file=sys.stderr)
        return 1
    print(
        "\nuse it from anywhere:\n"
        f"  stillhouse context add local --address http://127.0.0.1:{stack.ports['ray']} --tracking-uri "
        f"{stack.mlflow_url} --store s3://labels --token-file {stack.folder / 'secrets/ray'}\n"
        "  stillhouse context use local\n"
        "and, in a shell that is to read its label store and its runs:\n"
        f"  . {stack.s3_keys}\n"
        f"  STILLHOUSE_HOME={stack.home} stillhouse runs ls"
    )
    return 0


def down(stack: Stack) -> int:
    """End what `up` started, and nothing else; returns when all of it has ended."""
    supervisor = supervisor_of(stack)
    if supervisor is not None:
        process = psutil.Process(supervisor.supervisor.getPID())
        ours = [process, *process.children(recursive=True)]
        supervisor.supervisor.shutdown()
    elif not (ours := _left(stack)):
        print("nothing runs")
        return 0
    else:
        print("the supervisor has died; what it left is ended", file=sys.stderr)
        for each in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.terminate()
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


def _left(stack: Stack) -> list[psutil.Process]:
    """What a supervisor of this stack that was killed has left behind; or itself, while it does not answer."""
    found = []
    for process in psutil.process_iter():
        try:
            given = process.environ()
            is_part = "SUPERVISOR_PROCESS_NAME" in given and given.get("STILLHOUSE_HOME") == str(stack.home)
            if is_part or str(stack.conf) in process.cmdline():
                found.append(process)
        except psutil.Error:  # gone, or somebody else's
            continue
    return found


def status(stack: Stack) -> int:
    """Say of every part where it is and whether it answers."""
    if supervisor_of(stack) is None:
        print("nothing runs; `make up` starts it")
        return 1
    ill = illnesses(stack)
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
    for name in CHECKS:
        print(f"{name:<11} {urls.get(name, ''):<52} {ill.get(name, 'healthy')}")


def _clean() -> dict[str, str]:
    """The environment without what belongs to another cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


if __name__ == "__main__":
    sys.exit(main())
