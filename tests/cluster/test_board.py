"""The board's points and phases outlive its process, and its reader notices when one was lost."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.board import FAMILY, POINTS_FILE, STARTING, Board, Point
from cluster.errors import RunError
from cluster.watch import Watch
from tests.jobs.test_console import STATS

POINTS = [Point("small", batch, {"loss": 1.0 / batch}, float(batch)) for batch in range(1, 9)]


def board_of(folder: Path, points: list[Point], again: bool = False) -> Board:
    board = Board(str(folder), again)
    for point in points:
        board.post(point)
    return board


def test_a_board_that_was_killed_continues_with_its_points_phases_and_reason_to_stop(tmp_path: Path) -> None:
    first = board_of(tmp_path, POINTS[:3])
    first.phase("small", "training")
    first.stop("the disk is full")
    news = board_of(tmp_path, POINTS[3:], again=True).since(2)
    assert news.points == POINTS[2:]
    assert (news.phases, news.stop) == ({"small": "training"}, "the disk is full")


def test_a_resumed_run_has_the_points_of_before_and_no_phase_and_no_reason_to_stop(tmp_path: Path) -> None:
    first = board_of(tmp_path, POINTS)
    first.phase("small", "training")
    first.stop("the disk is full")
    news = board_of(tmp_path, []).since(0)
    assert (news.points, news.phases, news.stop) == (POINTS, {}, "")
    assert board_of(tmp_path, [], again=True).since(0).stop == ""


def test_a_point_that_is_posted_again_counts_once(tmp_path: Path) -> None:
    board_of(tmp_path, POINTS)
    assert board_of(tmp_path, POINTS, again=True).since(0).points == POINTS


def test_a_line_that_a_death_cut_short_costs_that_point_only(tmp_path: Path) -> None:
    board_of(tmp_path, POINTS)
    journal = tmp_path / POINTS_FILE
    journal.write_bytes(journal.read_bytes()[:-20])
    assert board_of(tmp_path, POINTS[4:], again=True).since(0).points == POINTS
    assert board_of(tmp_path, [], again=True).since(0).points == POINTS


def test_points_of_a_full_disk_are_kept_and_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(tmp_path, POINTS[:1])

    class Full:
        """A file whose disk takes some bytes of the first write and none of the others."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 7

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            taken, self.room = data[: self.room], 0
            if not taken:
                raise OSError(errno.ENOSPC, "no space")
            return int(self.file.write(taken))

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode, **how: Full(opened(path, *mode, **how)))
        for point in POINTS[1:4]:
            board.post(point)
    assert board.since(0).points == POINTS[:4]
    board.post(POINTS[4])
    assert [json.loads(line) for line in (tmp_path / POINTS_FILE).read_text().splitlines()] == [
        json.loads(json.dumps(asdict(point))) for point in POINTS[:5]
    ]


class Actor:
    """An object whose methods are called as those of an actor; ``ray.get`` has to be the identity."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: getattr(self.target, name)(*arguments))


def watch_of(board: Actor, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(ray, "get", lambda ref, timeout=None: ref)
    stream: Any = Actor(SimpleNamespace(stats=lambda: STATS))
    return Watch(stream, board, ["small"], 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("posted", [5, 6, 8])
def test_what_a_board_lost_with_its_process_comes_back_from_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, posted: int
) -> None:
    board = Actor(board_of(tmp_path, POINTS[:4]))
    watch = watch_of(board, monkeypatch)
    watch.look("distilling")
    # Killed while its disk was full: the last two were not written. Then the student posts more before the next look:
    # fewer than were lost, as many, or so many that the restarted board has more points than its reader.
    journal = tmp_path / POINTS_FILE
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))
    board.target = board_of(tmp_path, POINTS[4:posted], again=True)
    for _ in range(2):
        watch.look("distilling", ask_stream=False)
    assert watch.points["small"] == POINTS[:posted] == watch.curves
    # The order of the file is that of the reader: a resumed run counts what MLflow has by it.
    assert [p for p in board_of(tmp_path, [], again=True).since(0).points if p.student] == POINTS[:posted]


def test_a_board_that_gets_its_points_back_on_a_full_disk_writes_them_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(tmp_path, POINTS[4:5])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        board.put_back(POINTS[:4])
    assert board.since(0).points == POINTS[:5]
    board.post(POINTS[5])
    assert board_of(tmp_path, [], again=True).since(0).points == POINTS[:6]


def test_the_curves_hold_the_last_point_of_each_batch_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Point("small", 2, {"loss": 7.0}, 9.0)
    watch = watch_of(Actor(board_of(tmp_path, [POINTS[0], POINTS[2], POINTS[1], again])), monkeypatch)
    status = watch.look("distilling")
    assert watch.curves == [POINTS[0], again, POINTS[2]]
    assert status.students["small"].phase == STARTING
    assert watch.look("distilling", unplaced=["small"]).students["small"].phase == "waiting for resources"
    watch.look("distilling")
    assert [point.student for point in watch.points[FAMILY]] == [FAMILY]


def test_a_reason_to_stop_ends_the_run_after_its_points_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = board_of(tmp_path, POINTS)
    board.stop("the disk is full")
    watch = watch_of(Actor(board), monkeypatch)
    with pytest.raises(RunError, match="the disk is full"):
        watch.look("distilling")
    assert watch.points["small"] == POINTS
