"""A real head with a token, and what KubeRay does with our objects: it puts the RayService's configuration to its API,
and submits the RayJob by the command that its pod would run. KubeRay itself is not here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from jobs.kubernetes import Place, manifests
from serving.keys import add_key
from tests.integration.heads import Head, stillhouse
from tests.integration.seaweed import free_port
from tests.jobs.configmap import mount
from tests.tiny import tiny_family

pytestmark = [pytest.mark.integration, pytest.mark.slow]
MANIFEST = Path(__file__).parents[2] / "infra/kubernetes/endpoint/endpoint.yaml"
ECHO = {"source": "models:/none/1", "engine": "echo", "cpus": 0.1}


class Operator:
    """Does what KubeRay does with a RayService's Serve configuration, and keeps a client's key."""

    def __init__(self, head: Head, folder: Path) -> None:
        self._api = httpx.Client(
            base_url=head.address,
            headers={"Authorization": f"Bearer {head.env['RAY_AUTH_TOKEN']}"},
            timeout=60,
            trust_env=False,
        )
        self.port, self.head = free_port(), head
        self.key = add_key(folder / "keys.yaml", "app")
        (service,) = (each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "RayService")
        self.config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
        self.spec: dict[str, Any] = self.config["applications"][0]["deployments"][0]["user_config"]["endpoint"]
        self.spec |= {
            "port": self.port,
            "keys": str(folder / "keys.yaml"),
            "state": str(folder / "state"),
            "arms": {"small": ECHO},
        }

    def put(self) -> None:
        self._api.put("/api/serve/applications/", json=self.config).raise_for_status()

    def applications(self) -> dict[str, Any]:
        found: dict[str, Any] = self._api.get("/api/serve/applications/").raise_for_status().json()["applications"]
        return found

    def until(self, status: str) -> dict[str, Any]:
        """The applications, once the declared one is in this state."""
        deadline = time.monotonic() + 300
        while (found := self.applications()).get("endpoint", {}).get("status") != status:
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
        return found

    def end(self) -> None:
        """End Serve itself; a head on which it runs takes half a minute to end."""
        self._api.delete("/api/serve/applications/").raise_for_status()

    def door(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)

    def ask(self, model: str = "students") -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": 5}
        with self.door() as door:
            return door.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {self.key}"})


@pytest.fixture(scope="module")
def operator(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    operator = Operator(head, tmp_path_factory.mktemp("endpoint"))
    yield operator
    operator.end()


def test_a_ray_job_s_files_arrive_with_it_on_the_cluster(operator: Operator, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"said": "hello"}\n')
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tiny_family(tiny / "teacher", "texts")))
    config, job = manifests(path, [], None, Place("stillhouse:0.1.0"), name="first").objects
    facts, pod = job["spec"], job["spec"]["submitterPodTemplate"]["spec"]
    folder = mount(config, pod["volumes"][0], tmp_path / "mounted")
    runtime_env = yaml.safe_load(facts["runtimeEnvYAML"])
    assert runtime_env.pop("working_dir") == pod["containers"][0]["volumeMounts"][0]["mountPath"]
    # Go's quoting of a string is JSON's here. The pod's shell reads both.
    options = {"runtime-env-json": {**runtime_env, "working_dir": str(folder)}, "metadata-json": facts["metadata"]}
    given = " ".join(f"--{name} {json.dumps(json.dumps(value))}" for name, value in options.items())
    submit = f"ray job submit --submission-id {facts['jobId']} {given} -- {facts['entrypoint']}"
    env = {**operator.head.env, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": operator.head.address}
    done = subprocess.run(["bash", "-ce", submit], env=env, capture_output=True, text=True, check=False)
    # The cluster has read the text that travelled, and says what is wrong with it.
    assert "corpus.text_field: 'text' is not there; the rows have said" in done.stdout, done.stdout + done.stderr
    shown = stillhouse("jobs", "ls", "--json", "--address", operator.head.address, env=operator.head.env)
    (row,) = (row for row in json.loads(shown.stdout) if row["job"] == "first")
    assert (row["family"], row["state"]) == ("tiny", "failed")


def process_of(applications: dict[str, Any], name: str, deployment: str) -> int:
    (replica,) = applications[name]["deployments"][deployment]["replicas"]
    pid: int = replica["pid"]
    return pid


def test_an_endpoint_comes_stays_changes_and_goes_as_it_is_declared(operator: Operator) -> None:
    operator.put()
    there = operator.until("RUNNING")
    # Running means: the door answers, and so will KubeRay's question for Serve's proxy.
    with operator.door() as door:
        asked = door.get("/-/healthz")
        assert (asked.status_code, asked.text) == (200, "success")
        assert door.get("/readyz").json() == {"ready": True}
        assert door.post("/v1/completions", json={"model": "students", "prompt": "hello"}).status_code == 401
    assert operator.ask().json()["choices"][0]["text"] == "hello"
    assert set(there) == {"endpoint", "students-control", "students-door", "students~small~1"}

    # Its process dies: the endpoint does not notice, and the next keeper takes it as it is.
    keeper = process_of(there, "endpoint", "keeper")
    os.kill(keeper, signal.SIGKILL)
    deadline = time.monotonic() + 300
    while process_of(now := operator.until("RUNNING"), "endpoint", "keeper") == keeper:
        assert operator.ask().status_code == 200 and time.monotonic() < deadline
        time.sleep(0.5)
    assert process_of(now, "students-door", "door") == process_of(there, "students-door", "door")

    # A spec that cannot be used is said so, and the endpoint goes on.
    operator.spec["host"] = "nowhere"
    operator.spec["arms"] = {}
    operator.put()
    failed = operator.until("DEPLOY_FAILED")
    assert "arms" in failed["endpoint"]["deployments"]["keeper"]["message"]
    assert operator.ask().status_code == 200

    # So is one whose model is not there, though all else about it is right.
    operator.spec["host"] = "0.0.0.0"
    operator.spec["arms"] = {"small": {"source": "/no/such/model", "cpus": 0.1}}
    operator.put()
    deadline = time.monotonic() + 90
    while "no directory" not in operator.applications()["endpoint"]["deployments"]["keeper"]["message"]:
        assert time.monotonic() < deadline, operator.applications()
        time.sleep(0.5)
    assert operator.ask().status_code == 200

    operator.spec["arms"] = {"small": ECHO, "large": ECHO}
    operator.put()
    operator.until("RUNNING")
    assert operator.ask("large").json()["choices"][0]["text"] == "hello"

    operator.config["applications"] = []
    operator.put()
    deadline = time.monotonic() + 300
    while operator.applications():
        assert time.monotonic() < deadline, operator.applications()
        time.sleep(0.5)
    with pytest.raises(httpx.ConnectError):
        operator.ask()
