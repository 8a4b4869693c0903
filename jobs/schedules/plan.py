"""A schedule, and what is due by it at a moment: a pure function of the clock and of what was run before.

A *night* is one firing of a schedule, whatever hour it falls on. It is named by the moment at which it was due.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import takewhile
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationError, field_validator

from cluster.errors import UserError
from cluster.spec.base import Name, Section

# The states of a night. The first two are still to end.
WAITING, RUNNING = "waiting", "running"
SUCCEEDED, FAILED, SKIPPED, MISSED, REPLACED, STOPPED = (
    "succeeded",
    "failed",
    "skipped",
    "missed",
    "replaced",
    "stopped",
)
OPEN = (WAITING, RUNNING)
# A night that is found this long after it was due was missed: nobody was there to start it.
LATE_S = 120.0
# Of a schedule that was asleep for long, so many missed nights are written down.
MOST_MISSED = 1000
# How far back the last night is looked for: a day is soon searched by the minute, and no cron waits for fifty years.
LOOK_BACK_DAYS = (1, 32, 366, 50 * 366)


class Schedule(Section):
    """When a family runs, and what happens when a night meets another or goes wrong."""

    name: Name
    """Names the schedule; its family has a name of its own."""
    cron: str
    """Five fields: minute, hour, day of month, month, day of week."""
    timezone: str = "UTC"
    """Of the IANA database, such as Europe/Berlin; `cron` is read on the clock of that place."""
    overlap: Literal["skip", "queue", "replace"] = "skip"
    """What a night does that finds the one before still running: it is left out, waits for its end, or ends it."""
    missed: Literal["once", "skip"] = "once"
    """Nights that nobody was there to start: the last of them is caught up, or none."""
    retries: NonNegativeInt = 2
    """Times that a night which failed is tried again, going on where it broke off."""
    retry_s: PositiveFloat = 60.0
    """Seconds before the first of them; each further one waits twice as long, up to an hour."""
    longest_s: Annotated[float, Field(gt=0)] | None = None
    """A night that runs longer than this is stopped and has failed; none lets it run."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, timezone: str) -> str:
        try:
            ZoneInfo(timezone)
        except (KeyError, ValueError, OSError):  # no such zone, or a name that can be none
            raise ValueError(
                f"got {timezone!r}; give a name of the IANA time zone database, such as Europe/Berlin"
            ) from None
        return timezone

    @field_validator("cron")
    @classmethod
    def _known_cron(cls, cron: str) -> str:
        from cronsim import CronSim, CronSimError

        try:
            next(CronSim(cron, datetime.now(UTC)))
        except CronSimError as error:
            raise ValueError(
                f"got {cron!r}: {str(error).lower()}; give minute, hour, day of month, month and day of week, such as "
                f"'0 2 * * *' for two o'clock every night"
            ) from None
        except StopIteration:
            raise ValueError(f"got {cron!r}, which never comes about") from None
        return cron

    def fires(self, after: datetime) -> Iterator[datetime]:
        """The moments at which it is due after a given one, in its own time zone, without end.

        An hour that a clock change leaves out or repeats does so as for cron: a night at a fixed time that is left out
        comes at the next minute there is, one whose time comes twice is run once.
        """
        from cronsim import CronSim

        yield from CronSim(self.cron, after.astimezone(ZoneInfo(self.timezone)))

    def last_due(self, now: datetime) -> datetime | None:
        """The latest moment up to ``now`` at which it was due; none where there never was one."""
        now = now.astimezone(UTC)
        for days in LOOK_BACK_DAYS:
            # Forward: backward, an hour that a clock change repeats would hide what was due in its first half.
            if due := list(takewhile(lambda moment: moment <= now, self.fires(now - timedelta(days=days)))):
                return due[-1]
        return None

    def date_of(self, due: datetime) -> date:
        """The date of a night where the schedule's clock hangs; what ``{{ ds }}`` stands for."""
        return due.astimezone(ZoneInfo(self.timezone)).date()


def schedule_of(**fields: object) -> Schedule:
    """A schedule from the options of a command.

    Raises:
        UserError: one of them is not what it should be.
    """
    try:
        return Schedule.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        option = str(detail["loc"][0]).replace("_", "-")
        said = detail["msg"].removeprefix("Value error, ")
        given = "" if said.startswith("got ") else f"got {detail['input']!r}; "
        raise UserError(f"--{option}: {given}{said}") from None


def due_date(given: str, now: datetime | None = None) -> date:
    """The date of the night that was last due; for a process that starts some time after it, and knows only the rule.

    Args:
        given: a cron expression and then a time zone, as in ``0 22 * * * America/New_York``.
        now: none means now.

    Raises:
        UserError: it is none, or it was never due.
    """
    *cron, zone = given.split() or [""]
    try:
        schedule = schedule_of(name="night", cron=" ".join(cron), timezone=zone)
    except UserError as error:
        why = str(error).partition(": ")[2]
        raise UserError(f"--due-by: {why}; it takes CRON and then a time zone: '0 2 * * * Europe/Berlin'") from None
    due = schedule.last_due(now or datetime.now(UTC))
    if due is None:
        raise UserError(f"--due-by: got {given!r}, which was never due")
    return schedule.date_of(due)


def due_nights(schedule: Schedule, after: datetime, now: datetime) -> list[tuple[datetime, str]]:
    """The nights that have come due after a moment up to ``now``, each with the state that it begins in.

    The last one is to be run, unless it was missed and missed ones are not caught up; all before it were missed.
    """
    due: list[datetime] = []
    for moment in schedule.fires(after):
        if moment > now:
            break
        due.append(moment)
        del due[:-MOST_MISSED]
    if not due:
        return []
    late = (now - due[-1]).total_seconds() > LATE_S
    last = MISSED if late and schedule.missed == "skip" else WAITING
    return [*((moment, MISSED) for moment in due[:-1]), (due[-1], last)]


def retry_after_s(schedule: Schedule, attempt: int) -> float | None:
    """Seconds until a night is tried again whose ``attempt``-th try failed; none when it is not."""
    if attempt > schedule.retries:
        return None
    return float(min(3600.0, schedule.retry_s * 2.0 ** (attempt - 1)))
