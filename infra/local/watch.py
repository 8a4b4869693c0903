"""Whether the parts of the stack are healthy, and the supervisor that watches them."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psycopg2
from supervisor.xmlrpc import SupervisorTransport

from infra.local.parts import BUCKETS, Stack, StackError

UP_S = 180.0
# Of the supervisor's states those in which a part runs, or will.
_UP = ("RUNNING", "STARTING", "BACKOFF")


def illnesses(stack: Stack) -> dict[str, str]:
    """The parts that do not answer as they should, and why."""
    supervisor = supervisor_of(stack)
    if supervisor is None:
        return dict.fromkeys(CHECKS, "it does not run")
    states = _states(supervisor)
    ill = {}
    for name in states:
        try:
            if states[name] != "RUNNING":
                raise StackError(f"it is {states[name].lower()}")
            CHECKS[name](stack)
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
    get(f"http://127.0.0.1:{stack.ports['ray']}/api/version", stack.secret("ray"))


def _scheduler(stack: Stack) -> None:
    """That it runs is all there is to see; it needs Ray, which is asked for itself."""


def _prometheus(stack: Stack) -> None:
    answer = json.loads(get(f"http://127.0.0.1:{stack.ports['prometheus']}/api/v1/targets?state=active"))
    targets = [target for target in answer["data"]["activeTargets"] if target["labels"]["job"] == "ray"]
    for target in targets:
        if target["health"] == "down":
            raise StackError(f"it could not scrape Ray: {target['lastError']}")
    # A target that was found just now is "unknown" until it is scraped for the first time.
    if not any(target["health"] == "up" for target in targets):
        raise StackError("it has not scraped Ray yet")


CHECKS: dict[str, Callable[[Stack], None]] = {
    "postgres": _postgres,
    "s3": _s3,
    "mlflow": lambda stack: _discard(get(f"{stack.mlflow_url}/health")),
    "ray": _ray,
    "scheduler": _scheduler,
    "prometheus": _prometheus,
}


def _discard(_: bytes) -> None:
    pass


def get(url: str, token: str | None = None) -> bytes:
    """What a part answers.

    Raises:
        StackError: it does not.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    # A proxy from the environment has no way to this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return bytes(answer.read())
    except urllib.error.URLError as error:
        raise StackError(f"{url} does not answer ({error.reason})") from error


def supervisor_of(stack: Stack) -> Any:
    """The supervisor that runs, by its socket; None where none does.

    Raises:
        StackError: the socket may be somebody else's, or the stack is being taken down.
    """
    stack.check_short()
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


@contextlib.contextmanager
def resting(stack: Stack, *names: str) -> Iterator[None]:
    """Parts that the supervisor stops for as long as this lasts; they answer again when it is over.

    One that somebody has stopped stays so, and a stack without a supervisor has nobody who would start them meanwhile.

    Raises:
        StackError: one of them does not come up again.
    """
    supervisor = supervisor_of(stack)
    states = {} if supervisor is None else _states(supervisor)
    # One that has given up is started too: what comes of this may mend it.
    ours = [name for name in names if states.get(name, "STOPPED") != "STOPPED"]
    try:
        for name in ours:
            if states[name] in _UP:
                supervisor.supervisor.stopProcess(name)
        yield
    except BaseException:
        # What went wrong is what is told, not what comes of it.
        with contextlib.suppress(Fault, OSError):
            _start(supervisor, ours)
        raise
    _start(supervisor, ours)
    deadline = time.monotonic() + UP_S
    while ill := {name: why for name, why in illnesses(stack).items() if name in ours}:
        if time.monotonic() > deadline:
            raise StackError("; ".join(f"{name}: {why}" for name, why in ill.items()) + f"; see {stack.logs}")
        time.sleep(0.5)


def _states(supervisor: Any) -> dict[str, str]:
    return {each["name"]: each["statename"] for each in supervisor.supervisor.getAllProcessInfo()}


def _start(supervisor: Any, names: list[str]) -> None:
    for name in names:
        if _states(supervisor)[name] not in _UP:
            supervisor.supervisor.startProcess(name, False)
