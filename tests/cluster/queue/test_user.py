"""Whose family it is, in a job and on a machine of one's own."""

import getpass
import os

import pytest

from cluster.queue.user import VARIABLE, user


def test_a_job_s_user_is_who_submitted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "ann")
    assert user() == "ann"


def test_without_a_job_it_is_who_is_logged_in_also_where_that_one_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("LOGNAME", "bob")
    assert user() == "bob"

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert user() == f"user {os.getuid()}"
