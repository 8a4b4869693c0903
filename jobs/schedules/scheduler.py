"""The process that starts nights: it looks at the clock, the ledger and the cluster's jobs, and holds nothing itself.

It may be killed at any moment and started again anywhere. A night's job has an id that is made of the schedule, the
moment it was due and the try, so one that was submitted just before a death is found and not submitted twice.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from sqlalchemy.exc import SQLAlchemyError

from cluster.errors import RunError, StillhouseError, UserError
from jobs.client import has_forgotten, log_of, state_of
from jobs.follow import ENDED
from jobs.lines import last_line, promotions_in, run_in
from jobs.schedules.ledger import Entry, Ledger, Night
from jobs.schedules.plan import (
    FAILED,
    OPEN,
    REPLACED,
    RUNNING,
    SKIPPED,
    STOPPED,
    SUCCEEDED,
    WAITING,
    Schedule,
    due_nights,
    retry_after_s,
)
from jobs.submit import DS, SPEC_FILE, start_job

log = logging.getLogger(__name__)

LOOK_S = 2.0
# How long a scheduler that is not heard of any more keeps others from taking its place.
LEASE_S = 20.0
# What a job says of itself beside what every submitted one does.
SCHEDULE = "stillhouse.schedule"
# Why a job was told to end, kept with its night until it has, and what becomes of the night then.
OVERTAKEN, OVERTIME = "a later night took its place", "it ran for longer than it may"
TOLD = {OVERTAKEN: REPLACED, OVERTIME: FAILED}
# A mistake in the spec or in what it names: another try would end the same way.
MISTAKE = 2


class Scheduler:
    """One look after another at what is due and at what runs.

    Args:
        client: of the cluster's job server.
        now: the clock.
    """

    def __init__(self, ledger: Ledger, client: Any, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._ledger, self._client, self._now = ledger, client, now
        self._is_held = False
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{time.monotonic_ns()}"

    def serve(self, stop: threading.Event) -> None:
        """Look every few seconds until told to stop. Another scheduler that holds the place is waited for."""
        try:
            while not stop.is_set():
                try:
                    self.look()
                except (StillhouseError, SQLAlchemyError, OSError, RuntimeError) as error:
                    # The job server or the database is away; what is due then is due afterwards too.
                    log.warning("nothing is started for now: %s", str(error).splitlines()[0] if str(error) else error)
                stop.wait(LOOK_S)
        finally:
            self._ledger.release(self.holder)

    def look(self) -> bool:
        """One look; whether this is the scheduler, and not another one."""
        now = self._now()
        held, before = self._ledger.hold(self.holder, now, now + timedelta(seconds=LEASE_S)), self._is_held
        self._is_held = held
        if held != before:
            log.info("%s %s the schedules", self.holder, "holds" if held else "has lost")
        if not held:
            return False
        entries = {entry.schedule.name: entry for entry in self._ledger.entries()}
        for night in reversed(self._ledger.nights(states=[RUNNING])):
            self._watch(night, entries.get(night.schedule), now)
        for entry in entries.values():
            if not entry.paused:
                self._note_due(entry, now)
            self._advance(entry, now)
        return True

    def _note_due(self, entry: Entry, now: datetime) -> None:
        nights = due_nights(entry.schedule, entry.looked_at, now)
        if nights:
            self._ledger.note_due(entry.schedule.name, now, nights, "no scheduler was there to start it")
            for due, state in nights:
                log.info("%s: the night of %s is %s", entry.schedule.name, due.isoformat(), state)

    # -- nights that run -------------------------------------------------------------------------------------------

    def _watch(self, night: Night, entry: Entry | None, now: datetime) -> None:
        """See how the job of a running night stands, and write down how it ended."""
        assert night.job is not None
        try:
            info = self._client.get_job_info(night.job)
        except RuntimeError as error:
            if not has_forgotten(error):
                raise
            # Never submitted, for we died over it, or lost with the head: either is no fault of the night.
            self._ledger.update(night, state=WAITING, attempt=night.attempt - 1, not_before=now)
            return
        state = state_of(info)
        said = log_of(self._client, night.job) if night.run is None or state in ENDED else ""
        if night.run is None and (run := run_in(said)):
            self._ledger.update(night, run=run)
        if state == SUCCEEDED:
            self._ledger.update(night, state=SUCCEEDED, ended=now, detail="; ".join(promotions_in(said)))
        elif state in ENDED and night.detail in TOLD:
            self._ledger.update(night, state=TOLD[night.detail], ended=now)
        elif state == FAILED:
            self._failed(night, entry, now, last_line(said), mistake=info.driver_exit_code == MISTAKE)
        elif state == STOPPED:
            self._ledger.update(night, state=STOPPED, ended=now, detail="its job was stopped by hand")
        elif not night.detail and _is_overtime(night, entry, now):
            self._end(night, OVERTIME)

    def _end(self, night: Night, why: str) -> None:
        """Tell a night's job to end. It puts away what it has, so it is over only when its job says so."""
        self._ledger.update(night, detail=why)
        self._client.stop_job(night.job)

    def _failed(self, night: Night, entry: Entry | None, now: datetime, why: str, mistake: bool) -> None:
        attempt = night.attempt
        wait_s = None if entry is None or mistake else retry_after_s(entry.schedule, attempt)
        if entry is None or wait_s is None:
            self._ledger.update(night, state=FAILED, ended=now, detail=why)
            log.warning("%s: the night of %s failed: %s", night.schedule, night.due.isoformat(), why)
            return
        detail = f"try {attempt} of {entry.schedule.retries + 1} failed: {why}"
        self._ledger.update(night, state=WAITING, not_before=now + timedelta(seconds=wait_s), detail=detail)
        log.warning("%s: the night of %s is tried again in %g s; %s", night.schedule, night.due, wait_s, detail)

    # -- nights that wait ------------------------------------------------------------------------------------------

    def _advance(self, entry: Entry, now: datetime) -> None:
        """Start the night that has waited longest, if none runs; those that come due while it does, meet it."""
        nights = self._open(entry)
        # One that is to be tried again is not over either.
        current = next((night for night in nights if night.state == RUNNING or night.attempt), None)
        later = [night for night in nights if night is not current]
        if current is not None and later and entry.schedule.overlap != "queue":
            self._meet(entry.schedule, current, later, now)
            nights = self._open(entry)
        if nights and all(night.state == WAITING for night in nights) and nights[0].not_before <= now:
            self._start(entry, nights[0], now)

    def _open(self, entry: Entry) -> list[Night]:
        return self._ledger.nights(entry.schedule.name, OPEN)[::-1]

    def _meet(self, schedule: Schedule, current: Night, later: list[Night], now: datetime) -> None:
        """Nights have come due while one is not over."""
        if schedule.overlap == "skip":
            for night in later:
                why = f"the night of {current.due.isoformat()} was not over"
                self._ledger.update(night, state=SKIPPED, ended=now, detail=why)
            return
        for night in later[:-1]:
            self._ledger.update(night, state=REPLACED, ended=now, detail=OVERTAKEN)
        if current.state == WAITING:
            self._ledger.update(current, state=REPLACED, ended=now, detail=OVERTAKEN)
        elif not current.detail:
            self._end(current, OVERTAKEN)

    def _start(self, entry: Entry, night: Night, now: datetime) -> None:
        attempt = night.attempt + 1
        job = f"{entry.schedule.name}-{night.due.strftime('%Y%m%dT%H%M%SZ')}-{attempt}"
        # Written first: a scheduler that dies between the two finds a job that it does not know, and tries again.
        self._ledger.update(night, state=RUNNING, attempt=attempt, job=job, started=now, detail="")
        ds = entry.schedule.date_of(night.due)
        again = f"{night.run} --resume" if night.run else f"{SPEC_FILE} --ds {ds}"
        with tempfile.TemporaryDirectory(prefix="stillhouse-night-") as folder:
            unpack(entry.package, Path(folder))
            try:
                start_job(
                    self._client,
                    job=job,
                    command=f"run {again}",
                    folder=folder,
                    family=entry.family,
                    user=entry.user,
                    variables=entry.variables,
                    metadata={SCHEDULE: entry.schedule.name, DS: ds.isoformat()},
                )
            except UserError:
                log.info("%s was submitted before", job)
            except RunError as error:
                self._failed(replace(night, attempt=attempt), entry, now, str(error), mistake=False)
                return
        log.info("%s: the night of %s runs as %s", night.schedule, night.due.isoformat(), job)


def _is_overtime(night: Night, entry: Entry | None, now: datetime) -> bool:
    longest_s = entry.schedule.longest_s if entry else None
    return longest_s is not None and night.started is not None and (now - night.started).total_seconds() > longest_s


def packed(folder: Path) -> bytes:
    """All files below a folder as one archive."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return buffer.getvalue()


def unpack(package: bytes, folder: Path) -> None:
    """The files of an archive that :func:`packed` made."""
    with zipfile.ZipFile(BytesIO(package)) as archive:
        archive.extractall(folder)


def spec_in(package: bytes) -> Any:
    """The family's spec in such an archive, as it was shipped."""
    with zipfile.ZipFile(BytesIO(package)) as archive:
        return yaml.safe_load(archive.read(SPEC_FILE))
