"""A Ray cluster of several nodes on this machine, each a set of processes of its own that can be killed as one."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.hosts import Hosts
from tests.chaos.redis import Redis
from tests.integration.heads import ROOT, environment
from tests.integration.seaweed import free_port

# Ray sees that a node is dead after a minute by default. One that is killed refuses at once; one that is only slow, on
# a machine with too much to do, must not be taken for dead.
HEALTH = {"initial_delay_ms": "1000", "period_ms": "1000", "timeout_ms": "15000", "failure_threshold": "4"}
# No label is small enough to travel inside a message: all of them lie where they were made, and die there.
NOT_INLINED = {"RAY_max_direct_call_object_size": "1", "RAY_task_rpc_inlined_bytes_limit": "1"}
# What runs behind it sees no process but its own. Ray has a driver join the head wherever it sees the head's processes.
POD = ["unshare", "--pid", "--fork", "--mount-proc"]
JOINED = """
import ray, sys, time
ray.init()
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.2)
"""


class Nodes:
    """A head node and what is added to it. Use in a ``with`` block.

    Args:
        home: of the processes.
        head_cpus: what the head node offers.
        hosts: where the nodes are: the head on the first, all others on the second. None means on this one.
        health: how soon Ray sees that a node is dead; None leaves it to Ray.
        inlined: small objects travel in messages, as they do everywhere else. Serve's processes die otherwise.
        redis: where the head keeps what :meth:`restart_head` needs. Then there is a job server too, and each other node
            is a pod: what runs on it sees no process of the head. That takes root.

    Attributes:
        head: as :meth:`kill` takes it.
        job_server: its address, where there is one.
    """

    def __init__(
        self,
        home: Path,
        head_cpus: int,
        hosts: Hosts | None = None,
        health: dict[str, str] | None = HEALTH,
        inlined: bool = False,
        redis: Redis | None = None,
    ) -> None:
        if redis is not None and subprocess.run([*POD, "true"], capture_output=True, check=False).returncode:
            pytest.skip("pods take root and `unshare`, and where neither is forbidden")
        self._hosts, self._redis, self._head_cpus = hosts, redis, head_cpus
        self._folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        more = {f"RAY_health_check_{name}": value for name, value in (health or {}).items()} | (
            {} if inlined else NOT_INLINED
        )
        more |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self._env = environment(home, PYTHONPATH=str(ROOT), **more)
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._port_file, self.job_server = self._folder / "ray_current_cluster", ""
        if redis is None:
            self._head_options = ["--include-dashboard=false"]
        else:
            self._env |= {"PATH": f"{Path(sys.executable).parent}:{self._env['PATH']}"}  # a job runs `python`
            port = free_port()
            self.job_server = f"http://127.0.0.1:{port}"
            self._head_options = [f"--dashboard-port={port}", redis.option]
        self._start_head(0)
        self.address = self._port_file.read_text().strip()
        self.client = {"RAY_ADDRESS": self.address, **{k: self._env[k] for k in self._env if k.startswith("RAY_")}}

    def _start_head(self, port: int) -> None:
        options = ["--head", f"--port={port}", f"--temp-dir={self._folder}", *self._head_options]
        self.head = self._start(*options, cpus=self._head_cpus)
        # Ray makes the file first and writes the address into it then.
        self._wait(lambda: self._port_file.exists() and bool(self._port_file.read_text().strip()))

    def restart_head(self) -> None:
        """Start a head in the place of the one that was killed."""
        # Ray would take it for a cluster that runs.
        self._port_file.unlink()
        self._start_head(int(self.address.rpartition(":")[2]))

    def _start(self, *options: str, cpus: int) -> subprocess.Popen[bytes]:
        which = int("--head" not in options)
        address = self._hosts.addresses[which] if self._hosts else "127.0.0.1"
        command = self._hosts.on(which) if self._hosts else []
        env = {**self._env, **(self._redis.env if self._redis and not which else {})}
        if self._redis and which:
            command += POD
            # Of two nodes with one folder each would remove working directories that are in use on the other.
            options = (*options, f"--temp-dir={self._folder / str(len(self._nodes))}")
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options, f"--num-cpus={cpus}"]
        command += [f"--node-ip-address={address}", "--object-store-memory=200000000", "--disable-usage-stats"]
        # Two nodes on one machine must not share the ports that each would take.
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        with (self._folder / "start.log").open("ab") as log:
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
        self._nodes.append(process)
        return process

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (self._folder / "start.log").read_text()[-2000:]
            time.sleep(0.2)

    def add(self, cpus: int, **resources: int) -> subprocess.Popen[bytes]:
        """Add a node and wait until it has joined.

        Args:
            resources: what it offers beside CPUs.
        """
        node = self._start(f"--address={self.address}", f"--resources={json.dumps(resources)}", cpus=cpus)
        command = self._hosts.on(0) if self._hosts else []
        command += [sys.executable, "-c", JOINED, str(len(self._nodes))]
        subprocess.run(command, env={**self._env, **self.client}, check=True, capture_output=True, timeout=90)
        return node

    def processes(self, node: subprocess.Popen[bytes], title: str = "") -> list[psutil.Process]:
        """The processes of a node that run what Ray titles so."""
        return [process for process, command in self.commands(node) if f"ray::{title}" in " ".join(command[:1])]

    def commands(self, node: subprocess.Popen[bytes]) -> Iterator[tuple[psutil.Process, list[str]]]:
        """All processes of a node, and what each was started as."""
        for process in psutil.Process(node.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
                yield process, process.cmdline()

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """``SIGKILL`` everything that belongs to a node."""
        processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        # First all of them stop, so that none sees another one die and says goodbye.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        node.wait()
        psutil.wait_procs(processes, timeout=30)
        self._nodes.remove(node)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(reversed(self._nodes)):
            self.kill(node)
        shutil.rmtree(self._folder, ignore_errors=True)
