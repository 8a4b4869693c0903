"""What a person sees: libraries are silenced at the level of descriptors, and the display suits what it is shown on."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.stream.figures import StreamStats
from cluster.teacher.figures import PoolStats
from cluster.watch import Status, StudentStatus
from jobs.console import Display, quiet
from jobs.tables import plain_console

STATS = StreamStats(
    total=10,
    scored={0: 1, 1: 1, 2: 1},
    read={},
    delivered={"small": 2},
    waiting=["small"],
    waited_s={"small": 1.5},
    blocked_by=None,
    behind={"small": 0},
    window_used=1,
    unsaved=0,
    pool=PoolStats(ready=2),
    error=None,
)
METRICS = {"loss": 1.25, "kl": 1.5, "tokens_per_second": 321.0}
RUNNING = Status("distilling", {"small": StudentStatus("training", 2, METRICS, 1.5)}, STATS)


def test_what_libraries_and_children_print_goes_into_the_log(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys; from pathlib import Path; from jobs.console import quiet\n"
        f"with quiet(Path({str(tmp_path / 'log')!r})) as console:\n"
        "    print('from python', flush=True); os.write(2, b'from C\\n'); subprocess.run(['echo', 'from a child'])\n"
        "    console.print('for the person')\n"
        "print('afterwards')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "for the person\nafterwards\n"
    assert done.stderr == ""
    log = (tmp_path / "log").read_text()
    assert all(text in log for text in ("from python", "from C", "from a child"))


def test_descriptors_are_put_back_after_an_error(tmp_path: Path) -> None:
    before = os.fstat(1), os.fstat(2)
    with pytest.raises(RuntimeError), quiet(tmp_path / "log"):
        raise RuntimeError
    assert (os.fstat(1), os.fstat(2)) == before


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_log_without_room_ends_nothing_and_spills_nothing(unbuffered: list[str]) -> None:
    script = (
        "import logging, os, sys; from pathlib import Path; from jobs.console import quiet\n"
        "logging.basicConfig()\n"
        "with quiet(Path('/dev/full')) as console:\n"
        "    print('from python'); print('an error', file=sys.stderr)\n"
        "    logging.warning('a warning'); console.print('for the person')\n"
        "print('afterwards')\n"
    )
    done = subprocess.run([sys.executable, *unbuffered, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("for the person\nafterwards\n", "", 0)


def test_an_elastic_pool_shows_that_it_grows_and_shrinks() -> None:
    pool = PoolStats(elastic=True, ready=2, growing=True, grown=3, shrunk=1, lost=1)
    shown = "2 replicas ready, one more starting (3 added, 1 let go, 1 lost)"
    for terminal in (False, True):
        out = io.StringIO()
        with Display(plain_console(file=out, width=200, force_terminal=terminal)) as display:
            display.show(replace(RUNNING, stats=replace(STATS, pool=pool)))
        assert shown in out.getvalue()


def test_a_pipe_gets_plain_lines_and_not_one_per_look() -> None:
    out = io.StringIO()
    with Display(plain_console(file=out, width=200)) as display:
        display.show(Status("reading the corpus"))
        for _ in range(5):
            display.show(RUNNING)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("reading the corpus")
    assert "labels 3/10 | small training 2/10 loss 1.25, KL 1.50, 321 tok/s | small waits for the teacher" in lines[1]
    assert "\x1b" not in out.getvalue()


def test_what_changes_within_a_phase_is_shown_with_it_and_is_no_new_line() -> None:
    out = io.StringIO()
    with Display(plain_console(file=out, width=200)) as display:
        for seconds in range(3):
            display.show(Status("queued: place 2 of 3", more=f"for 0:0{seconds}; needs 2 CPU"))
        display.show(Status("queued: place 1 of 2", more="for 0:03; needs 2 CPU"))
    assert out.getvalue().splitlines() == [
        "[0:00] queued: place 2 of 3, for 0:00; needs 2 CPU",
        "[0:00] queued: place 1 of 2, for 0:03; needs 2 CPU",
    ]
    live = io.StringIO()
    with Display(plain_console(file=live, width=200, force_terminal=True)) as display:
        display.show(Status("queued: place 2 of 3", more="for 0:00; needs 2 CPU"))
    assert "queued: place 2 of 3, for 0:00; needs 2 CPU" in live.getvalue()


def test_what_came_from_the_store_is_said() -> None:
    out = io.StringIO()
    with Display(plain_console(file=out, width=200)) as display:
        display.show(replace(RUNNING, stats=replace(STATS, read={3: 1, 4: 2}, unsaved=9)))
    assert "labels 5/10 (2 from the store) |" in out.getvalue()
    assert "9 batches wait for the label store to take them" in out.getvalue()


def test_a_pass_that_came_whole_from_the_store_looks_finished() -> None:
    out = io.StringIO()
    with Display(plain_console(file=out, width=200)) as display:
        display.show(replace(RUNNING, stats=replace(STATS, scored={}, read=dict.fromkeys(range(10), 1))))
    assert "labels 10/10 (10 from the store) |" in out.getvalue()


def test_an_error_that_looks_like_markup_is_shown_as_it_is() -> None:
    error = "waits to start again: [/__w/gloo/transport/tcp/pair.cc:553] Connection closed by peer [bold] :warning:"
    stats = replace(STATS, pool=PoolStats(restarts=1, last_error=error))
    status = Status("distilling", {"small": StudentStatus(error, 2, METRICS, 0.0)}, stats)
    for terminal in (False, True):
        out = io.StringIO()
        with Display(plain_console(file=out, width=400, force_terminal=terminal)) as display:
            display.show(status)
        assert out.getvalue().count(error) >= 2


@pytest.mark.parametrize("room", ["cluster", "jobs", "serving"])
def test_every_console_prints_text_as_it_is(room: str) -> None:
    made = [
        (path.name, call)
        for path in (Path(__file__).parents[2] / room).rglob("*.py")
        for call in re.findall(r"\bConsole\(.*", path.read_text())
    ]
    assert [each for each in made if "markup=False, emoji=False" not in each[1]] == []


def test_a_terminal_gets_one_live_table() -> None:
    out = io.StringIO()
    with Display(plain_console(file=out, width=120, force_terminal=True)) as display:
        display.show(RUNNING)
    shown = out.getvalue()
    assert all(part in shown for part in ("teacher", "small", "3/10", "2/10", "1.25", "321", "2 replicas ready"))


@pytest.mark.parametrize(
    ("blocked_by", "waiting", "words"),
    [
        ("small", [], "the teacher waits for small"),
        (None, ["a", "b"], "a, b wait for the teacher"),
        (None, ["a"], "a waits for the teacher"),
        (None, [], ""),
    ],
)
def test_who_waits_for_whom_is_said_in_words(blocked_by: str | None, waiting: list[str], words: str) -> None:
    stats = StreamStats(**{**vars(STATS), "blocked_by": blocked_by, "waiting": waiting})
    assert Status("distilling", {}, stats).waits == words
