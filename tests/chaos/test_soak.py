"""Families with random faults, one after the other, until the time is over; only with SOAK set, such as SOAK=30m."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.evaluate.result import FamilyResult
from cluster.family import run_family
from cluster.preflight import preflight
from cluster.runs import open_run
from cluster.session import ray_session
from cluster.specfile import load_spec
from tests.chaos.families import BATCHES, FAMILY, STUDENTS, assert_finished_as, assert_survived, weights
from tests.chaos.faults import DAMAGED, VICTIMS, Fault, Faults, kills
from tests.chaos.report import ChaosReport, student_recoveries
from tests.chaos.test_driver import DRIVER, kill_driver_and_resume
from tests.integration.s3_proxy import S3Proxy, now_and_then
from tests.tiny import run_here, write_family

UNITS = {"s": 1, "m": 60, "h": 3600}
SOAK = os.environ.get("SOAK", "")
SECONDS = int(SOAK[:-1]) * UNITS[SOAK[-1]] if SOAK else 0
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.skipif(not SOAK, reason="set SOAK, such as make chaos SOAK=30m"),
    pytest.mark.timeout(SECONDS + 1200),
]
BUCKET = "soak"
# Of all requests to S3.
SHARE = 0.03
MOST_FAULTS = 8
# Every so many families it is the driver that is killed.
DRIVERS_EVERY = 4
# The latest moment of a kill, in batches that all students together have learnt.
LAST = BATCHES * len(STUDENTS) - 10


@pytest.fixture
def proxy(s3: Any) -> Iterator[S3Proxy]:
    """An S3 server on a bad day, and a Ray cluster that knows no other."""
    s3.create_bucket(Bucket=BUCKET)
    with S3Proxy(s3.meta.endpoint_url, stall_s=40.0) as bad, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", bad.url)
        with ray_session():
            yield bad


def damage_one(s3: Any, prefix: str, dice: random.Random) -> bool:
    """Turn a byte in a random block; False where there is none yet, or it has gone meanwhile."""
    keys = [found["Key"] for found in s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/labels/").get("Contents", [])]
    if not keys:
        return False
    key = dice.choice(keys)
    try:
        data = bytearray(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    except s3.exceptions.NoSuchKey:
        return False
    data[dice.randrange(len(data))] ^= 0xFF
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    return True


def test_families_survive_whatever_comes(
    tiny: Path, tmp_path: Path, s3: Any, proxy: S3Proxy, dice: random.Random, report: ChaosReport
) -> None:
    until = time.monotonic() + SECONDS
    (tmp_path / "undisturbed").mkdir()
    _, undisturbed, _ = run_here(write_family(tmp_path / "undisturbed", tiny, STUDENTS, **FAMILY))
    proxy.choose = now_and_then(SHARE, dice.randrange(10**6))
    number = 0
    while time.monotonic() < until:
        # Some find the store warm from the one before them, and have no teacher that could be killed.
        prefix = f"store-{number - dice.randrange(2) if number else 0}"
        folder = tmp_path / f"{number}"
        folder.mkdir()
        path = write_family(folder, tiny, STUDENTS, store={"uri": f"s3://{BUCKET}/{prefix}"}, **FAMILY)
        if number % DRIVERS_EVERY == DRIVERS_EVERY - 1:
            with report.surviving(DRIVER):
                kill_driver_and_resume(path, folder, dice.randrange(1, LAST), AWS_ENDPOINT_URL=proxy.url)
                assert_finished_as({name: weights(undisturbed, name) for name in STUDENTS}, folder, report)
        else:
            faults = kills(dice.choices(list(VICTIMS), k=dice.randrange(1, MOST_FAULTS)), LAST, dice)
            faults.planned.append(Fault(DAMAGED, dice.randrange(2, LAST), lambda at=prefix: damage_one(s3, at, dice)))
            disturbed_family(path, faults, undisturbed, report)
        number += 1
    spoiled = [f"a request to S3 spoiled: {fault.value}" for _, fault in proxy.seen if fault is not None]
    with report.surviving(*spoiled):
        # Something must have been killed, or nothing was survived.
        assert sum(report.injected[name] for name in (*VICTIMS, DRIVER)) >= number


def disturbed_family(path: Path, faults: Faults, undisturbed: FamilyResult, report: ChaosReport) -> None:
    """One family with random faults, from beginning to end."""
    checked = preflight(load_spec(path))
    run = open_run(checked.spec, False)
    with report.disturbing(run.folder, STUDENTS, BATCHES, faults):
        result = run_family(checked, run, faults)
        assert_survived(result, checked.spec, undisturbed)
    for seconds in student_recoveries(run.folder, STUDENTS, faults.kills_of_students):
        report.took("a student killed to its next step", seconds)
