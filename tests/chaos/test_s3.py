"""A label store on S3 that has a bad day: errors, slow-downs, lost answers, stalls, bodies cut short, bits turned."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.families import FAMILY, STUDENTS, assert_finished_as
from tests.chaos.report import ChaosReport
from tests.integration.conftest import write_family
from tests.integration.s3_proxy import S3Proxy, now_and_then
from tests.integration.test_command_line import environment, final_weights, stillhouse

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
BUCKET = "chaos"
ONE = {"alone": STUDENTS["alone"]}
SHARE = 0.2


def test_a_family_gets_through_it_and_the_store_holds_all_of_its_labels(
    tiny: Path, tmp_path: Path, s3: Any, dice: random.Random, report: ChaosReport
) -> None:
    s3.create_bucket(Bucket=BUCKET)
    uri = f"s3://{BUCKET}/labels"
    homes = {"spoiled": {"uri": uri}, "undisturbed": {"enabled": False}}
    with S3Proxy(s3.meta.endpoint_url, stall_s=40.0) as proxy:
        for name, store in homes.items():
            home = tmp_path / name
            home.mkdir()
            path = write_family(home, tiny, ONE, store=store, **FAMILY)
            proxy.choose = now_and_then(SHARE, dice.randrange(10**6))
            ran = stillhouse("run", str(path), env=environment(home, AWS_ENDPOINT_URL=proxy.url), timeout=500)
            assert ran.returncode == 0, ran.stdout + ran.stderr
        spoiled = sum(fault is not None for *_, fault in proxy.seen)
    assert spoiled > 5
    with report.surviving(*["a request to S3 spoiled"] * spoiled):
        assert_finished_as(final_weights(tmp_path / "undisturbed"), tmp_path / "spoiled", report)
    verified = stillhouse("labels", "verify", "--store", uri, env=environment(tmp_path / "spoiled"))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    listed = stillhouse("labels", "ls", "--store", uri, env=environment(tmp_path / "spoiled"))
    # A pass is listed only when all of its batches are there.
    assert "tiny" in listed.stdout
