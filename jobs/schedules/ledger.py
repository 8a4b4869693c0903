"""What is scheduled and what was run, in a database: nothing of it is lost when a head or the scheduler dies.

SQLite under the Stillhouse home, or whatever ``STILLHOUSE_DATABASE`` names, such as PostgreSQL. Moments are whole
seconds since 1970, UTC.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from cluster.errors import RunError, UserError
from cluster.specfile import home
from jobs.schedules.plan import OPEN, SKIPPED, WAITING, Schedule

_tables = sql.MetaData()
_schedules = sql.Table(
    "stillhouse_schedules",
    _tables,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("family", sql.String(40), nullable=False),
    sql.Column("definition", sql.Text, nullable=False),
    # The spec and the small local files that it names, as one archive.
    sql.Column("package", sql.LargeBinary, nullable=False),
    sql.Column("variables", sql.JSON, nullable=False),
    sql.Column("user", sql.String(200), nullable=False),
    sql.Column("paused", sql.Boolean, nullable=False),
    # All that was due up to then has been written down as nights.
    sql.Column("looked_at", sql.BigInteger, nullable=False),
)
_nights = sql.Table(
    "stillhouse_nights",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("schedule", sql.String(40), nullable=False),
    sql.Column("due", sql.BigInteger, nullable=False),
    sql.Column("state", sql.String(20), nullable=False),
    sql.Column("attempt", sql.Integer, nullable=False, default=0),
    sql.Column("not_before", sql.BigInteger, nullable=False, default=0),
    sql.Column("job", sql.String(200)),
    sql.Column("run", sql.String(200)),
    sql.Column("started", sql.BigInteger),
    sql.Column("ended", sql.BigInteger),
    sql.Column("detail", sql.Text, nullable=False, default=""),
    # No night twice, whoever writes.
    sql.UniqueConstraint("schedule", "due"),
)
_scheduler = sql.Table(
    "stillhouse_scheduler",
    _tables,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("holder", sql.String(200), nullable=False),
    sql.Column("until", sql.BigInteger, nullable=False),
)


@dataclass(frozen=True)
class Entry:
    """A schedule with what it needs to run.

    Attributes:
        package: a zip archive of the family's spec and its small local files.
        variables: of the job's environment.
        looked_at: the moment up to which everything due was written down.
    """

    schedule: Schedule
    family: str
    package: bytes
    variables: dict[str, str]
    user: str
    paused: bool
    looked_at: datetime


@dataclass(frozen=True)
class Night:
    """One firing of a schedule.

    Attributes:
        attempt: tries that were begun.
        not_before: the moment before which it is not tried.
        job: of the last try; ``run`` is the run that it made, once it has said so.
        detail: why it ended as it did, and what was promoted.
    """

    id: int
    schedule: str
    due: datetime
    state: str
    attempt: int
    not_before: datetime
    job: str | None
    run: str | None
    started: datetime | None
    ended: datetime | None
    detail: str


def database_url() -> str:
    """``$STILLHOUSE_DATABASE``, else SQLite under the Stillhouse home."""
    return os.environ.get("STILLHOUSE_DATABASE") or f"sqlite:///{home() / 'schedules.db'}"


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


class Ledger:
    """Reads and writes the database.

    Raises:
        RunError: it cannot be opened.
    """

    def __init__(self, url: str | None = None) -> None:
        url = url or database_url()
        try:
            if url.startswith("sqlite:///"):
                home().mkdir(parents=True, exist_ok=True)
            self._engine = sql.create_engine(url, pool_pre_ping=True)
            _tables.create_all(self._engine, checkfirst=True)
        except (SQLAlchemyError, OSError) as error:
            shown = sql.make_url(url).render_as_string(hide_password=True) if "://" in url else "STILLHOUSE_DATABASE"
            raise RunError(f"{shown}: the schedules' database cannot be opened: {str(error).splitlines()[0]}") from None

    def _begin(self) -> AbstractContextManager[sql.Connection]:
        return self._engine.begin()

    # -- schedules -------------------------------------------------------------------------------------------------

    def add(self, entry: Entry) -> bool:
        """Keep a schedule, in the place of one of the same name; whether there was one."""
        row = {
            "name": entry.schedule.name,
            "family": entry.family,
            "definition": entry.schedule.model_dump_json(),
            "package": entry.package,
            "variables": entry.variables,
            "user": entry.user,
            "paused": entry.paused,
            "looked_at": _seconds(entry.looked_at),
        }
        with self._begin() as connection:
            gone = connection.execute(_schedules.delete().where(_schedules.c.name == entry.schedule.name)).rowcount
            connection.execute(_schedules.insert().values(**row))
        return bool(gone)

    def entries(self) -> list[Entry]:
        """All schedules by name."""
        with self._begin() as connection:
            rows = connection.execute(sql.select(_schedules).order_by(_schedules.c.name)).mappings().all()
        return [_entry(row) for row in rows]

    def entry(self, name: str) -> Entry:
        """One schedule.

        Raises:
            UserError: there is none of this name.
        """
        found = {entry.schedule.name: entry for entry in self.entries()}
        if name not in found:
            there = ", ".join(found) or "none yet; see `stillhouse schedule add`"
            raise UserError(f"there is no schedule {name!r}; there are: {there}")
        return found[name]

    def remove(self, name: str) -> None:
        """Forget a schedule and what it had still to run; its history stays."""
        self.entry(name)
        with self._begin() as connection:
            connection.execute(_schedules.delete().where(_schedules.c.name == name))
            waiting = (_nights.c.schedule == name) & (_nights.c.state == WAITING)
            connection.execute(_nights.update().where(waiting).values(state=SKIPPED, detail="the schedule was removed"))

    def pause(self, name: str, paused: bool, now: datetime) -> None:
        """Have a schedule rest, or go on from now: what was due while it rested is not missed."""
        self.entry(name)
        values: dict[str, Any] = {"paused": paused}
        if not paused:
            values["looked_at"] = _seconds(now)
        with self._begin() as connection:
            connection.execute(_schedules.update().where(_schedules.c.name == name).values(**values))

    # -- nights ----------------------------------------------------------------------------------------------------

    def note_due(self, name: str, looked_at: datetime, nights: Iterable[tuple[datetime, str]], detail: str) -> None:
        """Write down what has come due, and up to when was looked, both or neither.

        Args:
            detail: of those that are not to be run.
        """
        with self._begin() as connection:
            for due, state in nights:
                row = {"schedule": name, "due": _seconds(due), "state": state, "attempt": 0, "not_before": 0}
                known = sql.select(_nights.c.id).where(_nights.c.schedule == name, _nights.c.due == row["due"])
                if connection.execute(known).first() is None:
                    said = "" if state in OPEN else detail
                    connection.execute(_nights.insert().values(**row, detail=said))
            connection.execute(
                _schedules.update().where(_schedules.c.name == name).values(looked_at=_seconds(looked_at))
            )

    def run_now(self, name: str, now: datetime) -> Night:
        """One more night, due at this moment.

        Raises:
            UserError: there is no such schedule, or it has a night due this very second.
        """
        self.entry(name)
        row = {"schedule": name, "due": _seconds(now), "state": WAITING, "attempt": 0, "not_before": 0, "detail": ""}
        try:
            with self._begin() as connection:
                connection.execute(_nights.insert().values(**row))
        except IntegrityError:
            raise UserError(f"{name} has a night due this very second; see `stillhouse schedule history`") from None
        return self.nights(name, most=1)[0]

    def nights(self, name: str | None = None, states: Iterable[str] = (), most: int | None = None) -> list[Night]:
        """Nights, the latest first."""
        query = sql.select(_nights).order_by(_nights.c.due.desc(), _nights.c.id.desc())
        if name is not None:
            query = query.where(_nights.c.schedule == name)
        if chosen := list(states):
            query = query.where(_nights.c.state.in_(chosen))
        with self._begin() as connection:
            rows = connection.execute(query.limit(most) if most else query).mappings().all()
        return [_night(row) for row in rows]

    def update(self, night: Night, **values: Any) -> None:
        """Change fields of a night; moments as datetimes."""
        row = {key: _seconds(value) if isinstance(value, datetime) else value for key, value in values.items()}
        with self._begin() as connection:
            connection.execute(_nights.update().where(_nights.c.id == night.id).values(**row))

    # -- one scheduler at a time -----------------------------------------------------------------------------------

    def hold(self, holder: str, now: datetime, until: datetime) -> bool:
        """Be the scheduler until a moment; whether nobody else is."""
        mine = {"holder": holder, "until": _seconds(until)}
        free = (_scheduler.c.holder == holder) | (_scheduler.c.until < _seconds(now))
        with self._begin() as connection:
            if connection.execute(_scheduler.update().where(_scheduler.c.id == 1, free).values(**mine)).rowcount:
                return True
            if connection.execute(sql.select(_scheduler.c.id)).first() is not None:
                return False
        try:
            with self._begin() as connection:
                connection.execute(_scheduler.insert().values(id=1, **mine))
        except IntegrityError:  # another was first
            return False
        return True

    def release(self, holder: str) -> None:
        """Be the scheduler no longer."""
        with self._begin() as connection:
            connection.execute(_scheduler.update().where(_scheduler.c.holder == holder).values(until=0))

    def holder(self, now: datetime) -> str | None:
        """Who is the scheduler, if anybody is."""
        with self._begin() as connection:
            row = connection.execute(sql.select(_scheduler.c.holder, _scheduler.c.until)).first()
        return None if row is None or row.until < _seconds(now) else str(row.holder)


def _entry(row: Any) -> Entry:
    looked_at = _moment(row["looked_at"])
    assert looked_at is not None
    return Entry(
        schedule=Schedule.model_validate_json(row["definition"]),
        family=row["family"],
        package=row["package"],
        variables=dict(row["variables"]),
        user=row["user"],
        paused=row["paused"],
        looked_at=looked_at,
    )


def _night(row: Any) -> Night:
    moments: dict[str, Any] = {key: _moment(row[key]) for key in ("due", "not_before", "started", "ended")}
    rest: dict[str, Any] = {key: row[key] for key in ("id", "schedule", "state", "attempt", "job", "run", "detail")}
    return Night(**moments, **rest)
