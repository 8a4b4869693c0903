"""`stillhouse labels` as a person types it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import UserError
from cluster.heads import OutputHead
from cluster.labels.store.objects import head_key, label_key, labels_prefix
from cluster.labels.store.store import LabelStore
from jobs.cli.main import main
from jobs.contexts import add_context
from jobs.labels import parse_age, parse_size, show_size
from tests.cluster.labels.store.fill import OTHER, TEACHER, age_labels, fill, stamp_of_batch

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def typed(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", "labels", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), *capfd.readouterr()

    return typed


@pytest.fixture
def store(stillhouse_home: Path) -> LabelStore:
    """The home's own store: three batches of one teacher, 1, 20 and 40 days old, and one of another."""
    store = LabelStore.open(str(stillhouse_home / "labels"))
    stamps = fill(store, 3)
    age_labels(stillhouse_home / "labels", stamps, [40, 20, 1])
    store.publish("night-1", stamps, {"tokens": 5})
    fill(store, 1, OTHER)
    return store


def test_ls_and_stat_give_lines_in_a_pipe(run: Run, store: LabelStore) -> None:
    code, out, err = run("ls")
    assert (code, err) == (0, "")
    header, line = out.splitlines()
    assert header.split("\t") == ["pass", "teacher", "tokenizer", "labels", "batches", "published"]
    assert line.split("\t")[:5] == ["night-1", TEACHER, "f" * 16, "0" * 16, "3"]
    _, out, _ = run("stat")
    names, *lines = [line.split("\t") for line in out.splitlines()]
    assert (names[0], names[4], names[-1]) == ("teacher", "kind", "newest")
    assert [(cells[0], cells[4], cells[5]) for cells in lines] == [(TEACHER, "topk", "3"), (OTHER, "topk", "1")]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lines[0][-1])


def test_the_store_of_the_context_in_use_is_read_and_never_emptied_unnamed(
    run: Run, store: LabelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_CONFIG", str(tmp_path / "config.yaml"))
    shared = tmp_path / "shared"
    fill(LabelStore.open(str(shared)), 2, OTHER)
    add_context("lab", address="http://127.0.0.1:8265", store=str(shared))
    assert [line.split("\t")[0] for line in run("stat")[1].splitlines()[1:]] == [OTHER]
    for removal in (["gc", "--max-size", "0"], ["verify", "--remove"]):
        code, _, err = run(*removal)
        assert code == 2 and f"--store {shared} (of the context in use) or --store " in err
    assert run("gc", "--max-size", "0", "--dry-run")[0] == 0
    assert run("gc", "--max-size", "0", "--store", str(shared))[0] == 0


def test_ls_and_stat_give_json(run: Run, store: LabelStore) -> None:
    (one,) = json.loads(run("ls", "--json")[1])
    assert (one["name"], one["teacher"], one["batches"], one["facts"]) == ("night-1", TEACHER, 3, {"tokens": 5})
    first, second = json.loads(run("stat", "--json")[1])
    assert (first["teacher"], first["kind"], first["objects"], second["objects"]) == (TEACHER, "topk", 3, 1)
    assert first["size"] > 0


def test_a_terminal_gets_a_table(run: Run, store: LabelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("stat")
    assert "teacher" in out.splitlines()[0] and TEACHER in out


def test_verify_ends_with_1_when_something_is_wrong(run: Run, store: LabelStore) -> None:
    assert run("verify") == (0, "read 5 objects, 0 of them wrong\n", "")
    store.bucket.replace("manifests/night-1.json", b"{")
    code, out, _ = run("verify", "--remove")
    assert code == 1
    assert out.splitlines()[0].startswith("manifests/night-1.json: manifest is damaged")
    assert run("verify")[:2] == (0, "read 4 objects, 0 of them wrong\n")


def test_gc_says_what_goes_and_what_a_run_still_needs(run: Run, store: LabelStore) -> None:
    oldest = stamp_of_batch(0)
    code, out, _ = run("gc", "--older-than", "30d", "--dry-run")
    assert code == 0
    assert out.splitlines()[:2] == ["manifests/night-1.json", label_key(oldest)]
    assert out.splitlines()[2].startswith("would remove 2 objects, ")
    lease = store.lease("run", labels_prefix(oldest))
    left = show_size(sum(entry.size for entry in store.bucket.list("labels/")))
    assert run("gc", "--older-than", "30d")[1] == f"removed 0 objects, 0B; 1 more are under a live lease; {left} left\n"
    lease.release()
    assert "removed 3 objects" in run("gc", "--older-than", "2w", "--max-size", "1GB")[1]
    assert "removed 2 objects" in run("gc", "--max-size", "0")[1]
    assert list(store.bucket.list()) == []


def test_heads_are_listed_and_removed_by_the_teacher_s_name(run: Run, store: LabelStore) -> None:
    store.put_head(TEACHER, OutputHead(np.zeros((1000, 100), np.float32)))
    store.name_teacher(TEACHER, "hf://org/teacher")
    heads = [line for line in run("stat")[1].splitlines() if "\thead\t" in line]
    assert [line.split("\t")[:2] for line in heads] == [[TEACHER, "hf://org/teacher"]]
    _, out, _ = run("gc", "--max-size", "100kB")
    assert out.splitlines()[0] == f"{head_key(TEACHER)} (head of hf://org/teacher, 400.0KB)"
    assert out.splitlines()[1].startswith("removed 1 objects, 400.0KB, 400.0KB of it in heads; ")
    assert store.missing([stamp_of_batch(number) for number in range(3)]) == []


def test_gc_reports_what_it_may_not_remove(run: Run, store: LabelStore) -> None:
    with_lease = store.lease("run", "")
    out = run("gc", "--max-size", "1B")[1]
    assert "warning: more than --max-size 1B is left; a run holds a lease on it" in out
    with_lease.release()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gc", "--older-than", "soon"], "--older-than soon: give a whole number and s, m, h, d or w, such as 30d"),
        (["gc", "--max-size", "much"], "--max-size much: give bytes or a unit such as MB, GB, TB or GiB"),
        (["ls", "--store", "gs://b/c"], "give a folder or s3://bucket/prefix"),
        (["stat", "--store", "/nowhere/labels"], "/nowhere/labels is not there; name one with --store"),
        (["verify"], "is not there"),
    ],
)
def test_a_mistake_costs_one_line(run: Run, stillhouse_home: Path, arguments: list[str], says: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not stillhouse_home.exists()


def test_ages_and_sizes() -> None:
    ages = {"30d": timedelta(30), "12h": timedelta(hours=12), "2w": timedelta(14), "5m": timedelta(minutes=5)}
    assert {text: parse_age(text) for text in ages} == ages
    assert parse_age("0s") == timedelta(0)
    sizes = {"200GB": 200 * 10**9, "1.5TiB": 3 * 2**39, "12": 12, "10 mb": 10**7}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "d", "30", "-3d", "30y", "1.5d", "30D", "999999999999999w"):
        with pytest.raises(UserError, match="such as 30d"):
            parse_age(text)
    for text in ("", "-3GB", "3 apples"):
        with pytest.raises(UserError, match="such as 200GB"):
            parse_size(text)
