"""A log that is followed over connections that break: each line once, and the job's own end."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.errors import RunError
from jobs import follow as module
from jobs.follow import follow

LOG = ["one\n", "two\nthr", "ee\n", "four\n"]


class Cluster:
    """Answers as a job server whose connections break after some chunks, or stand still.

    Args:
        breaks: for each connection how many chunks it brings before it ends; the last one brings all.
        silent: whether a connection that ends early just says nothing any more.
    """

    def __init__(self, breaks: list[int], silent: bool = False, state: str = "SUCCEEDED") -> None:
        self._breaks, self._silent, self._state = breaks, silent, state
        self.connections = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        left = self._breaks.pop(0) if self._breaks else None
        for chunk in LOG[:left]:
            yield chunk
        if left is not None:
            if self._silent:
                await asyncio.sleep(60)
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status="RUNNING" if self._breaks else self._state, driver_exit_code=3)

    def get_address(self) -> str:
        return "http://lab:8265"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)


@pytest.mark.parametrize("silent", [False, True], ids=["breaks", "falls silent"])
def test_each_line_is_shown_once_over_dropped_connections(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.1)
    cluster = Cluster([1, 2, 3, 0], silent)
    assert follow(cluster, "job") == 0
    assert capsys.readouterr().out == "".join(LOG) + "job succeeded\n"
    assert cluster.connections == 5


def test_on_a_terminal_progress_takes_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["run a, log b\n", "[0:10] distilling | small 1/9\n[0:2", "0] distilling | small 5/9\nthe table\n"]
    monkeypatch.setattr("tests.jobs.test_follow.LOG", lines)
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(module, "plain_console", lambda: terminal)
    assert follow(Cluster([]), "job") == 0
    shown = out.getvalue()
    # Printed once each, for good; what is between them is drawn and taken away again.
    assert (shown.count("run a, log b\n"), shown.count("the table\n")) == (1, 1)
    assert "[0:20] distilling\n    small 5/9" in shown
    # The last thing that is done erases the progress.
    assert shown.rstrip("\n").rpartition("small 5/9")[2].count("\x1b[2K") >= 1


def test_a_failed_job_ends_with_its_own_exit_code() -> None:
    assert follow(Cluster([], state="FAILED"), "job") == 3


def test_a_cluster_that_is_gone_is_given_up_and_the_way_back_is_said() -> None:
    class Gone(Cluster):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            raise OSError("no route")
            yield ""

    with pytest.raises(RunError, match=r"has not answered for 1 s \(no route\).*stillhouse jobs logs job --follow"):
        follow(Gone([]), "job", patience_s=1.0)


def test_ctrl_c_leaves_the_job_running(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(Cluster):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            raise KeyboardInterrupt
            yield ""

    assert follow(Interrupted([]), "job") == 130
    assert "follow it again with: stillhouse jobs logs job --follow" in capsys.readouterr().out
