"""Several drivers on one cluster that is too small for all of them: who waits, who is refused, who goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cluster.corpus.batches import CORPUS_FOLDER, FACTS_FILE
from tests.chaos.nodes import Nodes
from tests.integration.heads import ROOT, environment, read_until, start, stillhouse
from tests.integration.test_command_line import STUDENTS
from tests.tiny import write_family

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]
ENOUGH_S = 240
SMALL = {"small": {**STUDENTS["small"], "cpus_per_rank": 0.3}}
# One family holds 0.6 of the only CPU. What begins with all of it free reads the corpus at once.
FAMILY: dict[str, Any] = {
    "teacher": {"cpus_per_shard": 0.3},
    "corpus": {"max_batches": 4, "held_out": 0.2},
    "evaluation": {"batches": 1, "angle_every": None},
}
# A driver that has its place and does nothing with it.
HOLDS = """
import sys, time
from pathlib import Path
from cluster.queue.place import place_for
from cluster.session import ray_session
from cluster.specfile import load_spec
with ray_session(), place_for(load_spec(Path(sys.argv[1])), print):
    print("it has its place", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def one_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(tmp_path_factory.mktemp("nodes"), head_cpus=1) as nodes:
        yield nodes


def of(home: Path, nodes: Nodes) -> dict[str, str]:
    """The environment of somebody's command on the cluster."""
    return environment(home, PYTHONPATH=str(ROOT), **nodes.client)


def runs(home: Path) -> list[Path]:
    return list((home / "stillhouse" / "runs").glob("*/*"))


def end(process: subprocess.Popen[str]) -> str:
    """What a family that finishes has still to say."""
    rest, _ = process.communicate(timeout=ENOUGH_S)
    assert process.returncode == 0, rest
    return rest


def queue_process(nodes: Nodes) -> psutil.Process:
    """Where the queue lives, which may be starting again."""
    deadline = time.monotonic() + 60
    while not (found := nodes.processes(nodes._nodes[0], "FamilyQueue")):
        assert time.monotonic() < deadline, "there is no queue"
        time.sleep(0.2)
    return found[0]


def test_families_wait_for_each_other_and_a_killed_one_gives_its_place_back(
    one_cpu: Nodes, tiny: Path, tmp_path: Path
) -> None:
    names = ("first", "second", "left", "refused")
    homes = {name: tmp_path / name for name in names}
    for home in homes.values():
        home.mkdir()
    paths = {name: write_family(homes[name], tiny, SMALL, name=name, **FAMILY) for name in names}
    env = {name: of(homes[name], one_cpu) for name in names}
    large = stillhouse("check", str(paths["left"]), "--set", "teacher.cpus_per_shard=4", env=env["left"])
    assert (large.returncode, large.stdout) == (2, ""), large.stderr
    assert re.search(r"the cluster is too small: the teacher needs 1 x \(4 CPU and \d\.\d GiB\)", large.stderr)
    good = stillhouse("check", str(paths["left"]), env=env["left"])
    assert good.returncode == 0 and "is not checked" not in good.stdout, good.stdout + good.stderr
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(paths["first"])],
        env=env["first"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    read_until(holder, "it has its place")
    first = start("run", str(paths["first"]), env=env["first"])
    said = read_until(first, r"queued: ")
    assert re.search(
        r"^\[\d+:\d\d\] queued: place 1 of 1, for 0:\d\d; needs 0.6 CPU and \d\.\d GiB, beside 1 family running$",
        said,
        re.M,
    )
    second = start("run", str(paths["second"]), env=env["second"])
    # These come and go, and change nothing for those who wait.
    left = start("run", str(paths["left"]), "--set", "limits.priority=-1", env=env["left"])
    refused = stillhouse("run", str(paths["refused"]), "--set", "limits.wait=false", env=env["refused"])
    assert refused.returncode == 1, refused.stdout + refused.stderr
    full = r"the cluster is full: needs 0.6 CPU and \d\.\d GiB, beside 1 family running, and limits.wait is false"
    assert re.search(full, refused.stderr)
    assert len(refused.stderr.strip().splitlines()) == 1
    read_until(second, r"queued: place 2 of ")
    read_until(left, r"queued: place 3 of 3")
    left.send_signal(signal.SIGINT)
    last_words, _ = left.communicate(timeout=60)
    assert left.returncode == 130
    assert "nothing of it is left running." in last_words and "--resume" not in last_words
    assert runs(homes["left"]) == runs(homes["refused"]) == []

    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate(timeout=30)
    assert "queued" not in read_until(first, "reading the corpus").splitlines()[-1]
    # The queue dies and comes back; whoever has a place keeps it, and the other one waits on.
    before = queue_process(one_cpu)
    before.kill()
    before.wait(timeout=30)
    end(first)
    assert "reading the corpus" in read_until(second, "reading the corpus")
    end(second)
    assert queue_process(one_cpu).pid != before.pid
    (done,), (begun,) = runs(homes["first"]), runs(homes["second"])
    assert (done / "report.html").stat().st_mtime <= (begun / CORPUS_FOLDER / FACTS_FILE).stat().st_mtime


def test_a_family_leaves_an_endpoint_on_its_cluster_alone(tiny: Path, tmp_path: Path) -> None:
    for name in ("large", "little"):
        (tmp_path / name).mkdir()
    paths = {name: write_family(tmp_path / name, tiny, SMALL, name=name, **FAMILY) for name in ("large", "little")}
    little = [f"--set={field}=0.1" for field in ("teacher.cpus_per_shard", "students.small.cpus_per_rank")]
    with Nodes(tmp_path, head_cpus=1, inlined=True) as nodes:
        env = of(tmp_path, nodes)
        arm = ["--arm", f"one={tiny / 'teacher'}", "--cpus-per-arm", "0.6", "--name", "front", "--port", "0"]
        endpoint = start("serve", *arm, env=env)
        url = read_until(endpoint, r"^http://").splitlines()[-1].split()[0]
        with asked_all_the_time(url) as statuses:
            check = stillhouse("check", str(paths["large"]), env=env)
            assert check.returncode == 0, check.stderr
            assert "not beside what runs there now: endpoint front (0.6 CPU and " in check.stdout
            refused = stillhouse("run", str(paths["large"]), "--set", "limits.wait=false", env=env)
            assert refused.returncode == 1, refused.stdout + refused.stderr
            assert "no room beside endpoint front (0.6 CPU and " in refused.stderr
            large = start("run", str(paths["large"]), env=env)
            read_until(large, r"queued: .* no room beside endpoint front \(0.6 CPU and .*: end that, or add nodes")
            beside = stillhouse("run", str(paths["little"]), *little, env=env, timeout=ENOUGH_S)
            assert beside.returncode == 0, beside.stdout + beside.stderr
            assert large.poll() is None
        assert len(statuses) > 20 and set(statuses) == {200}
        endpoint.send_signal(signal.SIGINT)
        last_words, _ = endpoint.communicate(timeout=60)
        assert endpoint.returncode == 0 and "arm one" not in last_words, last_words
        end(large)


@contextlib.contextmanager
def asked_all_the_time(url: str) -> Iterator[list[int]]:
    """An endpoint is asked a few times a second; yields the statuses of its answers."""
    statuses: list[int] = []
    ended = threading.Event()

    def ask() -> None:
        question = {"model": "front", "prompt": "a", "max_tokens": 4}
        while not ended.wait(0.2):
            try:
                statuses.append(httpx.post(f"{url}/completions", json=question, timeout=60.0).status_code)
            except httpx.HTTPError:
                statuses.append(0)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield statuses
    finally:
        ended.set()
        asker.join()
