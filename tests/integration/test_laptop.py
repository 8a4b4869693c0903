"""A laptop with the base install only, against a cluster of another process: nothing heavy is needed to submit."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.heads import Head, read_until
from tests.integration.laptop import Laptop
from tests.integration.test_command_line import STUDENTS
from tests.tiny import write_family

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]
HEAVY = ("torch", "deepspeed", "transformers", "mlflow", "sqlalchemy", "pyarrow")


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(tmp_path_factory.mktemp("laptop"))


def test_the_base_install_brings_nothing_heavy(laptop: Laptop) -> None:
    code = f"import importlib.util, jobs; print([name for name in {HEAVY!r} if importlib.util.find_spec(name)])"
    found = subprocess.run(
        [str(laptop.python), "-c", code], capture_output=True, text=True, cwd=laptop.home, check=True
    )
    assert found.stdout.strip() == "[]"
    assert laptop.type("--help").returncode == 0
    # What needs more says so, in one line.
    done = laptop.type("promote", "demo-small", "--tracking-uri", "http://127.0.0.1:9")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'stillhouse[" in done.stderr


def test_a_missing_or_wrong_token_is_refused_with_what_to_do(
    laptop: Laptop, head: Head, tiny: Path, tmp_path: Path
) -> None:
    path = write_family(tmp_path, tiny, {"small": STUDENTS["small"]})
    for environment in ({}, {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        refused = laptop.type("submit", str(path), "--address", head.address, **environment)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert "put the cluster's token into RAY_AUTH_TOKEN or ~/.ray/auth_token" in refused.stderr
        assert not any(value in refused.stderr + refused.stdout for value in environment.values())


def test_a_family_is_submitted_left_found_again_and_scheduled(
    laptop: Laptop, head: Head, tiny: Path, tmp_path: Path
) -> None:
    path = write_family(
        tmp_path, tiny, {"small": STUDENTS["small"]}, corpus={"held_out": 0.2, "max_batches": 40, "epochs": 4}
    )
    token = laptop.home / "token"
    token.write_text(head.env["RAY_AUTH_TOKEN"])
    added = laptop.type("context", "add", "lab", "--address", head.address, "--token-file", str(token))
    assert added.returncode == 0, added.stderr
    following = laptop.start("submit", str(path), "--name", "from-a-laptop")
    said = read_until(following, "run tiny-")
    assert re.search(r"submitted from-a-laptop \(\d+ KiB shipped\)", said)
    assert f"dashboard {head.address}/#/jobs/from-a-laptop" in said
    os.kill(following.pid, signal.SIGKILL)
    following.communicate(timeout=30)
    followed = laptop.type("jobs", "logs", "from-a-laptop", "--follow")
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "read by small 40" in followed.stdout
    assert followed.stdout.rstrip().endswith("from-a-laptop succeeded")

    nightly = ["schedule", "add", str(path), "--cron", "0 2 * * *", "--timezone", "Europe/Berlin"]
    refused = laptop.type(*nightly)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "every run would read the same text" in refused.stderr
    scheduled = laptop.type(*nightly, "--snapshot")
    assert scheduled.returncode == 0, scheduled.stderr
    assert "schedule tiny added: 0 2 * * * Europe/Berlin" in scheduled.stdout
    assert f"corpus: uploaded as it is now: {tiny / 'corpus.jsonl'}" in scheduled.stdout
    assert "tiny" in laptop.type("schedule", "ls").stdout
    gone = laptop.type("schedule", "rm", "tiny")
    assert gone.stdout.strip() == "schedule tiny is forgotten"
    left = [p.name for p in laptop.home.iterdir()]
    assert sorted(left) == [".config", "token"], left
