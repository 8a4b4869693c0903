"""When a schedule is due: clock changes in three zones, nights that nobody was there to start, retries."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from jobs.schedules.plan import LATE_S, MISSED, WAITING, Schedule, due_date, due_nights, retry_after_s, schedule_of


def nightly(cron: str = "30 2 * * *", timezone: str = "Europe/Berlin", **more: object) -> Schedule:
    return schedule_of(name="demo", cron=cron, timezone=timezone, **more)


def first(schedule: Schedule, after: datetime, count: int) -> list[str]:
    return [due.isoformat() for due in itertools.islice(schedule.fires(after), count)]


@pytest.mark.parametrize(
    ("timezone", "cron", "day", "expected"),
    [
        # Berlin, 29 March 2026: the clock goes from 02:00 to 03:00, so there is no half past two.
        ("Europe/Berlin", "30 2 * * *", (2026, 3, 28), "03-28T02:30+01:00 03-29T03:00+02:00 03-30T02:30+02:00"),
        # 25 October 2026: half past two comes twice.
        ("Europe/Berlin", "30 2 * * *", (2026, 10, 24), "10-24T02:30+02:00 10-25T02:30+02:00 10-26T02:30+01:00"),
        # New York, 8 March and 1 November 2026.
        ("America/New_York", "15 2 * * *", (2026, 3, 7), "03-07T02:15-05:00 03-08T03:00-04:00 03-09T02:15-04:00"),
        ("America/New_York", "30 1 * * *", (2026, 10, 31), "10-31T01:30-04:00 11-01T01:30-04:00 11-02T01:30-05:00"),
        # Lord Howe Island changes by half an hour: 4 October 2026 from 02:00 to 02:30, 5 April from 02:00 to 01:30.
        ("Australia/Lord_Howe", "15 2 * * *", (2026, 10, 3), "10-03T02:15+10:30 10-04T02:30+11:00 10-05T02:15+11:00"),
        ("Australia/Lord_Howe", "45 1 * * *", (2026, 4, 4), "04-04T01:45+11:00 04-05T01:45+11:00 04-06T01:45+10:30"),
    ],
)
def test_a_night_comes_once_on_the_days_that_the_clock_changes(
    timezone: str, cron: str, day: tuple[int, int, int], expected: str
) -> None:
    schedule = nightly(cron, timezone)
    found = first(schedule, datetime(*day, tzinfo=ZoneInfo(timezone)), 3)
    assert [moment[5:16] + moment[19:] for moment in found] == expected.split()


@pytest.mark.parametrize("timezone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
def test_a_year_has_as_many_nights_as_days_and_each_has_its_date(timezone: str) -> None:
    schedule = nightly("30 2 * * *", timezone)
    start = datetime(2026, 1, 1, tzinfo=ZoneInfo(timezone))
    dates = [schedule.date_of(due.astimezone(UTC)) for due in itertools.islice(schedule.fires(start), 365)]
    assert dates == [date(2026, 1, 1) + timedelta(days=n) for n in range(365)]


@pytest.mark.parametrize(
    ("rule", "now", "expected"),
    [
        # In UTC it is the next day already, or still the one before.
        ("0 22 * * * America/New_York", "2026-11-24T03:00:05", "2026-11-23"),
        ("30 0 * * * Europe/Berlin", "2026-11-23T23:30:05", "2026-11-24"),
        # To the second; a moment before, the last night is yesterday's.
        ("30 0 * * * Europe/Berlin", "2026-11-23T23:30:00", "2026-11-24"),
        ("30 0 * * * Europe/Berlin", "2026-11-23T23:29:59", "2026-11-23"),
        # Caught up hours later, behind midnight of both clocks.
        ("0 22 * * * America/New_York", "2026-11-24T21:00:00", "2026-11-23"),
        ("30 23 * * * UTC", "2026-11-24T08:00:00", "2026-11-23"),
        # The clock goes forward: no half past two in Berlin, and a day of 23 hours in New York.
        ("30 2 * * * Europe/Berlin", "2026-03-29T01:00:05", "2026-03-29"),
        ("30 2 * * * Europe/Berlin", "2026-03-29T00:59:59", "2026-03-28"),
        ("30 23 * * * America/New_York", "2026-03-09T03:30:05", "2026-03-08"),
        # It goes back: half past two comes twice, and a late start may fall before the second.
        ("30 2 * * * Europe/Berlin", "2026-10-25T00:30:05", "2026-10-25"),
        ("30 2 * * * Europe/Berlin", "2026-10-25T01:05:00", "2026-10-25"),
        ("30 2 * * * Europe/Berlin", "2026-10-25T01:30:05", "2026-10-25"),
        ("30 23 * * * America/New_York", "2026-11-02T04:30:05", "2026-11-01"),
        # Seldom, and often.
        ("0 2 * * mon Europe/Berlin", "2026-11-29T12:00:00", "2026-11-23"),
        ("0 0 29 2 * UTC", "2026-11-24T00:00:00", "2024-02-29"),
        ("*/5 * * * * America/New_York", "2026-11-24T04:59:59", "2026-11-23"),
    ],
)
def test_a_process_that_starts_late_knows_the_date_that_its_night_was_due(rule: str, now: str, expected: str) -> None:
    assert due_date(rule, datetime.fromisoformat(now).replace(tzinfo=UTC)).isoformat() == expected


@given(
    start=st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 30)),
    late_s=st.integers(0, 82_000),
    rule=st.sampled_from(["30 2 * * * Europe/Berlin", "0 22 * * * America/New_York", "15 0 * * * Australia/Lord_Howe"]),
)
def test_the_date_is_the_one_of_the_built_in_scheduler_however_late(start: datetime, late_s: int, rule: str) -> None:
    cron, _, timezone = rule.rpartition(" ")
    schedule = nightly(cron, timezone)
    due = next(schedule.fires(start.replace(tzinfo=UTC))).astimezone(UTC)
    assert due_date(rule, due + timedelta(seconds=late_s)) == schedule.date_of(due)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("", "got ''"),
        ("0 2 * * *", "got '0 2 * *': wrong number of fields"),
        ("0 2 * * * Mars", "got 'Mars'; give a name of the IANA time zone database"),
        ("0 2 * * Europe/Berlin", "got '0 2 * *': wrong number of fields"),
        ("0 61 * * * UTC", "got '0 61 * * *': bad hour"),
    ],
)
def test_a_rule_that_says_no_date_is_refused_in_one_line(rule: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        due_date(rule)
    assert str(refused.value).startswith("--due-by: ") and says in str(refused.value)
    assert "'0 2 * * * Europe/Berlin'" in str(refused.value) and "\n" not in str(refused.value)


@given(
    start=st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 30)),
    minutes=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    cron=st.sampled_from(["30 2 * * *", "*/7 * * * *", "0 1,2,3 * * *", "0 12 1 * *"]),
)
def test_however_often_is_looked_each_night_is_due_once(start: datetime, minutes: list[int], cron: str) -> None:
    schedule, begin = nightly(cron), start.replace(tzinfo=UTC)
    seen, looked = [], begin
    for step in minutes:
        now = looked + timedelta(minutes=step)
        seen += [due for due, _ in due_nights(schedule, looked, now)]
        looked = now
    assert seen == list(itertools.takewhile(lambda due: due <= looked, schedule.fires(begin)))


@pytest.mark.parametrize(
    ("missed", "late_s", "last"), [("once", 3600, WAITING), ("skip", 3600, MISSED), ("skip", 5, WAITING)]
)
def test_of_nights_that_were_missed_the_last_is_caught_up_or_none(missed: str, late_s: float, last: str) -> None:
    schedule = nightly("0 2 * * *", "UTC", missed=missed)
    looked, last_due = datetime(2026, 5, 1, 12, tzinfo=UTC), datetime(2026, 5, 4, 2, tzinfo=UTC)
    nights = due_nights(schedule, looked, last_due + timedelta(seconds=late_s))
    assert [due.day for due, _ in nights] == [2, 3, 4]
    assert [state for _, state in nights] == [MISSED, MISSED, last]
    assert 5 < LATE_S < 3600


def test_a_retry_waits_twice_as_long_each_time_up_to_an_hour() -> None:
    schedule = nightly(retries=9, retry_s=60)
    assert [retry_after_s(schedule, attempt) for attempt in range(1, 11)] == [
        *(60.0 * 2**n for n in range(6)),
        3600.0,
        3600.0,
        3600.0,
        None,
    ]
    assert retry_after_s(nightly(retries=0), 1) is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cron": "61 2 * * *"}, ["--cron", "got '61 2 * * *'", "bad minute"]),
        ({"cron": "every night"}, ["--cron", "wrong number of fields", "'0 2 * * *'"]),
        ({"cron": "0 0 31 2 *"}, ["--cron", "0 0 31 2 *"]),
        ({"timezone": "Europe/Berlin2"}, ["--timezone", "got 'Europe/Berlin2'", "IANA"]),
        ({"timezone": "../../etc/passwd"}, ["--timezone", "IANA"]),
        ({"overlap": "both"}, ["--overlap", "got 'both'", "'skip', 'queue' or 'replace'"]),
        ({"missed": "all"}, ["--missed", "got 'all'"]),
        ({"retries": -1}, ["--retries", "got -1"]),
        ({"retry_s": 0}, ["--retry-s", "got 0"]),
        ({"name": "No Name"}, ["--name", "got 'No Name'"]),
    ],
)
def test_a_mistake_names_the_option_and_what_was_given(fields: dict[str, object], says: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        schedule_of(**{"name": "demo", "cron": "0 2 * * *", **fields})
    assert [part for part in says if part not in str(refused.value)] == []
    assert "\n" not in str(refused.value)
