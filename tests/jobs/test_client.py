"""A job server that answers and cannot be used: of another version, or refusing the token."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.util.state
from ray.util.state.exception import ServerUnavailable

from cluster.errors import RunError, UserError
from jobs.client import JobServerError, connect, has_nodes_for_drivers, job_of
from jobs.contexts import Context
from jobs.submit import submit_patiently


@contextmanager
def answering(
    status: int, ray_version: str, jobs: tuple[int, str] | None = None
) -> Iterator[tuple[str, list[str | None]]]:
    """A server that returns about itself what a head returns; its address, and the tokens that it was sent.

    Args:
        jobs: status and text of its answer to whatever is asked about jobs.
    """
    tokens: list[str | None] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers.get("Authorization"))
            about = json.dumps({"version": "4", "ray_version": ray_version, "ray_commit": "0" * 40})
            code, text = jobs if jobs and "/api/jobs/" in self.path else (status, about)
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", tokens
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
        # What connect sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    # A command's process is its own, and quiet from then on; this one is not.
    logging.disable(logging.NOTSET)


def test_a_cluster_with_another_ray_is_named_with_what_to_install() -> None:
    with answering(200, "2.48.0") as (address, _), pytest.raises(RunError) as refused:
        connect(Context(address=address))
    said = str(refused.value)
    assert f"runs Ray 2.48.0, here is Ray {version('ray')}" in said
    assert "install ray==2.48.0" in said
    assert "\n" not in said


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_says_where_to_put_the_right_one(status: int) -> None:
    with answering(status, version("ray")) as (address, _), pytest.raises(RunError) as refused:
        connect(Context(address=address))
    assert "refuses the token; put the cluster's token into RAY_AUTH_TOKEN or ~/.ray/auth_token" in str(refused.value)


def test_nobody_there_says_so() -> None:
    with pytest.raises(RunError, match="no Ray job server answers there"):
        connect(Context(address="http://127.0.0.1:9"))


def test_digits_of_an_address_are_no_refused_token() -> None:
    with pytest.raises(RunError, match="no Ray job server answers there"):
        connect(Context(address="http://127.0.0.1:9/401-403-authentication"))


def test_a_job_is_unknown_by_the_status_of_the_answer_and_not_by_its_text() -> None:
    with answering(200, version("ray"), jobs=(404, "")) as (address, _), pytest.raises(UserError, match="no job 'a'"):
        job_of(connect(Context(address=address)), "a")
    text = "Traceback: port 40404, a file does not exist"
    with answering(200, version("ray"), jobs=(500, text)) as (address, _), pytest.raises(RunError, match="HTTP 500: T"):
        job_of(connect(Context(address=address)), "a")


@pytest.mark.parametrize(("status", "refused"), [(400, RunError), (200, UserError)])
def test_a_job_whose_name_is_taken_is_looked_up(status: int, refused: type[Exception]) -> None:
    """Ray answers a taken name with a traceback, so text alone would take other mistakes for one."""
    known = {"type": "SUBMISSION", "submission_id": "a", "status": "RUNNING", "entrypoint": ""}
    with answering(200, version("ray"), jobs=(status, json.dumps(known))) as (address, _):
        client = connect(Context(address=address))

        def refuse(**_: Any) -> None:
            raise JobServerError(400, "a folder already exists")

        client.submit_job = refuse
        with pytest.raises(refused):
            submit_patiently(client, submission_id="a", entrypoint="")


def test_a_token_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"token file .* is not there"):
        connect(Context(address="http://127.0.0.1:9", token_file=str(tmp_path / "absent")))


def test_a_request_that_fails_never_shows_the_token(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret-token")
    with answering(401, version("ray")) as (address, _), pytest.raises(RunError) as refused:
        connect(Context(address=address, token_file=str(token)))
    out, err = capfd.readouterr()
    assert "s3cret-token" not in str(refused.value) + out + err


def test_nodes_for_drivers_are_those_that_offer_the_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SimpleNamespace(get_address=lambda: "http://127.0.0.1:8265")
    nodes = [SimpleNamespace(node_id="a", resources_total={"CPU": 4.0})]
    monkeypatch.setattr(ray.util.state, "list_nodes", lambda **_: nodes)
    assert not has_nodes_for_drivers(client)
    nodes.append(SimpleNamespace(node_id="b", resources_total={"driver": 8.0}))
    assert has_nodes_for_drivers(client)

    def away(**_: Any) -> None:
        raise ServerUnavailable("nobody answers\nfor this reason")

    monkeypatch.setattr(ray.util.state, "list_nodes", away)
    with pytest.raises(ConnectionError, match=r"^http://127.0.0.1:8265: nobody answers$"):
        has_nodes_for_drivers(client)
