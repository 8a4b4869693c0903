"""Mistakes on the command line: one line on stderr, exit code 2, nothing started and nothing left behind."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.errors import RunError
from jobs.cli.main import main
from tests.tiny import tiny_family, write_tiny_model


@pytest.fixture
def spec(tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path) -> Path:
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tiny_family(tiny_teacher, tiny_corpus)))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def typed(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stillhouse", *arguments])
        gc.collect()  # what other tests have left says so now
        capfd.readouterr()  # what making the mistake has printed
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return typed


def other_tokenizer(tmp_path: Path) -> str:
    """A model whose tokenizer knows one token by another name."""
    model = write_tiny_model(tmp_path / "other")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = next(token for token, number in vocabulary.items() if number == 10)
    vocabulary["Q" * 9] = vocabulary.pop(token)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return f"students.small.init={{source: pretrained, model: {model}}}"


MISTAKES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "no such model": (lambda _: "teacher.model=/nowhere/teacher", ["teacher.model", "/nowhere/teacher is not there"]),
    "no such corpus": (lambda _: "corpus.paths=[/nowhere/a.jsonl]", ["corpus.paths", "/nowhere/a.jsonl is not there"]),
    "an empty corpus": (
        lambda folder: f"corpus.paths=[{shutil.copy('/dev/null', folder / 'empty.txt')}]",
        ["corpus.paths", "empty.txt is empty"],
    ),
    "more than its own limit": (lambda _: "limits.cpus=1.5", ["limits.cpus", "got 1.5", "needs at least 2 CPU"]),
    "more memory than its own limit": (
        lambda _: "limits.memory=512MiB",
        ["limits.memory", "got 0.5 GiB", "needs at least", "the teacher needs 1 x (1 CPU and 0."],
    ),
    "k above the vocabulary": (lambda _: "labels.k=301", ["labels.k", "got 301", "300 tokens"]),
    "another tokenizer": (other_tokenizer, ["students.small.init.model", "has another tokenizer"]),
    "a wrong ZeRO stage": (lambda _: "students.small.zero_stage=4", ["students.small.zero_stage: got 4", "1, 2 or 3"]),
    "an unknown field": (lambda _: "students.small.learning_rate=1", ["students.small.learning_rate: no such field"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_mistake_in_the_family_costs_one_line_and_starts_nothing(
    command: str, mistake: str, run: Callable[..., tuple[int, str, str]], spec: Path, stillhouse_home: Path
) -> None:
    make, says = MISTAKES[mistake]
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    code, out, err = run(command, str(spec), "--set", make(spec.parent))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert [part for part in says if part not in err] == []
    assert not stillhouse_home.exists()
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "not valid YAML at line"),
        ("students:\n  a: {}\n  a: {}\n", "'a' is given twice, on lines 2 and 3"),
        ("- a\n", "is a YAML mapping"),
        ("name: x\n", "teacher: is required"),
    ],
)
def test_a_file_that_is_no_family_costs_one_line(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, text: str, says: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    code, out, err = run("run", str(tmp_path / "bad.yaml"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_a_good_family_is_called_good_and_its_schema_is_printed(
    run: Callable[..., tuple[int, str, str]], spec: Path
) -> None:
    code, out, _ = run("check", str(spec))
    assert code == 0
    assert "good" in out
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out)["title"] == "FamilySpec"


def test_a_family_is_checked_with_the_corpus_of_one_date(
    run: Callable[..., tuple[int, str, str]], spec: Path, tiny_corpus: Path
) -> None:
    shutil.copy(tiny_corpus, spec.parent / "2028-02-29.jsonl")
    paths = ["--set", "corpus.paths=['{{ ds_add(ds, -1) }}.jsonl']"]
    assert run("check", str(spec), *paths, "--ds", "2028-03-01")[0] == 0
    code, _, err = run("check", str(spec), *paths, "--ds", "2028-03-02")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{spec.parent}/2028-03-01.jsonl is not there" in err


def test_a_check_says_what_a_student_starts_from(
    run: Callable[..., tuple[int, str, str]], spec: Path, stillhouse_home: Path
) -> None:
    code, out, _ = run("check", str(spec), "--set", "students.small.warm_start=true")
    assert (code, out.splitlines()[1]) == (0, "small starts from its init: tiny-small has no champion yet")


def test_a_check_prints_the_memory_of_each_role_and_refuses_what_this_machine_cannot_hold(
    run: Callable[..., tuple[int, str, str]], spec: Path, stillhouse_home: Path
) -> None:
    code, out, _ = run("check", str(spec))
    lines = out[out.index("memory at the peak") :].splitlines()
    assert (code, [line.split(":")[0].strip() for line in lines[1:4]]) == (
        0,
        ["the teacher", "student small", "the family's own processes"],
    )
    assert "in all " in lines[4] and "this machine has " in lines[4]
    code, out, err = run("check", str(spec), "--set", "teacher.memory_per_shard=10TiB")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "this machine is too small " in err and "the teacher needs 1 x (1 CPU and 10240.0 GiB)" in err


def test_a_check_for_a_cluster_refuses_nothing_for_this_machine_s_memory(
    run: Callable[..., tuple[int, str, str]], spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, out, _ = run("check", str(spec), "--set", "teacher.memory_per_shard=10TiB")
    assert (code, "on which the family is not to run" in out) == (0, True)


@pytest.mark.parametrize("command", ["run", "check", "submit"])
def test_what_is_no_date_costs_one_line(command: str, run: Callable[..., tuple[int, str, str]], spec: Path) -> None:
    code, _, err = run(command, str(spec), "--ds", "2027-02-29")
    assert (code, err.count("\n")) == (2, 1)
    assert "--ds: got '2027-02-29'" in err and "YYYY-MM-DD" in err


def test_a_rule_for_the_date_stands_alone_and_costs_one_line_where_it_is_none(
    run: Callable[..., tuple[int, str, str]], spec: Path
) -> None:
    for more, says in (
        (["0 2 * * *"], "--due-by: got '0 2 * *'"),
        (["0 2 * * * UTC", "--ds", "2026-11-24"], "--ds and --due-by name a date each"),
    ):
        code, _, err = run("submit", str(spec), "--due-by", *more)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err


def test_resume_without_a_run_says_so(
    run: Callable[..., tuple[int, str, str]], spec: Path, stillhouse_home: Path
) -> None:
    code, _, err = run("run", str(spec), "--resume")
    assert code == 2
    assert "no run" in err


@pytest.mark.parametrize("arguments", [["serve"], ["serve", "--arm", "/nowhere"], ["submit", "x", "--address", "y"]])
def test_wrong_arguments_of_other_commands_end_with_2(
    run: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_a_run_is_not_resumed_with_a_teacher_whose_weights_have_changed(
    run: Callable[..., tuple[int, str, str]],
    tiny_teacher: Path,
    tiny_corpus: Path,
    tmp_path: Path,
    stillhouse_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object) -> None:
        raise RunError("stopped")

    monkeypatch.setattr("jobs.run._run", stopped)
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    spec = tmp_path / "family.yaml"
    spec.write_text(yaml.safe_dump(tiny_family(teacher, tiny_corpus)))
    assert [run("run", str(spec))[2], run("run", str(spec), "--resume")[2]] == ["error: stopped\n"] * 2
    weights = bytearray((teacher / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (teacher / "model.safetensors").write_bytes(weights)
    code, _, err = run("run", str(spec), "--resume")
    assert code == 2
    assert f"was started with another teacher: the fingerprint of {teacher} was " in err
