"""What a run says and others read from its job's log: each is found in what the run itself prints."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from cluster.evaluate.gate import KEPT, PROMOTED, Verdict
from jobs.lines import last_line, progress_in, promotions_in, run_in, run_line


@pytest.mark.parametrize("ds", [None, date(2026, 11, 24)])
def test_a_run_is_found_by_the_line_it_begins_with(ds: date | None) -> None:
    line = run_line("demo-20261124-060840-1", Path("/home/ada/run.log"), ds)
    assert run_in(f"a warning\n{line}\n[0:02] reading the corpus\nrun elsewhere, log off\n") == "demo-20261124-060840-1"
    assert run_in("error: teacher.model: /gone is not there\nnight run demo, log\n") is None


def test_the_last_line_of_progress_is_the_state_of_it() -> None:
    assert progress_in("run a, log b\n[0:02] reading\n[0:12] distilling | scored 1/9\npromotion: x\n") == (
        "[0:12] distilling | scored 1/9"
    )
    assert progress_in("error: no\n") is None


def test_verdicts_are_found_as_they_are_printed() -> None:
    lines = [
        Verdict(PROMOTED, "there was no champion").line("demo-small", 1),
        Verdict(KEPT, "KL 2 against 1").line("demo-large", 4),
    ]
    assert promotions_in("\n".join(["[0:01] registering", *lines, "MLflow sqlite:///x"])) == lines


def test_of_a_job_that_said_nothing_that_is_said() -> None:
    assert last_line("one\n  two \n\n") == "two"
    assert last_line(" \n") == "it said nothing"
