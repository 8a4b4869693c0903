"""A label store on S3 that has a bad day: errors, slow-downs, lost answers, stalls, bodies cut short, bits turned."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cluster.audit import scorings_of
from tests.chaos.families import FAMILY, STUDENTS, assert_finished_as
from tests.chaos.report import ChaosReport
from tests.integration.heads import environment, stillhouse
from tests.integration.s3_proxy import Fault, S3Proxy, now_and_then
from tests.integration.test_command_line import final_weights
from tests.tiny import write_family

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
BUCKET = "chaos"
ONE = {"alone": STUDENTS["alone"]}
SHARE = 0.2


def test_families_get_through_it_and_the_store_keeps_all_of_their_labels(
    tiny: Path, tmp_path: Path, s3: Any, dice: random.Random, report: ChaosReport
) -> None:
    s3.create_bucket(Bucket=BUCKET)
    uri = f"s3://{BUCKET}/labels"
    # The first writes what the third reads; nobody spoils what has no store.
    homes = {"cold": {"uri": uri}, "undisturbed": {"enabled": False}, "warm": {"uri": uri}}
    with S3Proxy(s3.meta.endpoint_url, stall_s=40.0) as proxy:
        proxy.choose = now_and_then(SHARE, dice.randrange(10**6))
        for name, store in homes.items():
            (tmp_path / name).mkdir()
            path = write_family(tmp_path / name, tiny, ONE, store=store, **FAMILY)
            env = environment(tmp_path / name, AWS_ENDPOINT_URL=proxy.url)
            ran = stillhouse("run", str(path), env=env, timeout=500)
            assert ran.returncode == 0, ran.stdout + ran.stderr
    spoiled = [fault for _, fault in proxy.seen if fault is not None]
    assert set(spoiled) == set(Fault)
    undisturbed = final_weights(tmp_path / "undisturbed")
    with report.surviving(*[f"a request to S3 spoiled: {fault.value}" for fault in spoiled]):
        assert_finished_as(undisturbed, tmp_path / "cold", report)
        assert_finished_as(undisturbed, tmp_path / "warm", report)
    (run,) = (tmp_path / "warm" / "stillhouse" / "runs" / "tiny").iterdir()
    assert scorings_of(run) == {}
    verified = stillhouse("labels", "verify", "--store", uri, env=environment(tmp_path / "cold"))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    listed = stillhouse("labels", "ls", "--store", uri, env=environment(tmp_path / "cold"))
    # A pass is listed only when all of its batches are there.
    assert "tiny" in listed.stdout
