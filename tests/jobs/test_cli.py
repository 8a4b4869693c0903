"""Mistakes on the command line: one line on stderr, exit code 2, nothing started and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.errors import NoPlaceError, RunError, UserError
from tests.tiny import tiny_family, write_tiny_model


def other_tokenizer(tmp_path: Path) -> str:
    """A model whose tokenizer knows one token by another name."""
    model = write_tiny_model(tmp_path / "other")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    token = next(token for token, number in vocabulary.items() if number == 10)
    vocabulary["Q" * 9] = vocabulary.pop(token)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return f"students.small.init={{source: pretrained, model: {model}}}"


def chats(folder: Path) -> Path:
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return folder / "chats.jsonl"


MISTAKES: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "no such model": (lambda _: "teacher.model=/nowhere/teacher", ["teacher.model", "/nowhere/teacher is not there"]),
    "no such corpus": (lambda _: "corpus.paths=[/nowhere/a.jsonl]", ["corpus.paths", "/nowhere/a.jsonl is not there"]),
    "an empty corpus": (
        lambda folder: f"corpus.paths=[{shutil.copy('/dev/null', folder / 'empty.txt')}]",
        ["corpus.paths", "empty.txt is empty"],
    ),
    "a corpus of chats": (
        lambda folder: f"corpus.paths=[{chats(folder)}]",
        ["the rows have messages", "chats are not"],
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
    assert out.splitlines()[1:3] == [
        "the teacher: 189k parameters, 41k of them in embeddings",
        "student small: 115k parameters, 41k of them in embeddings; the teacher has 1.64 times as many",
    ]
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out)["title"] == "FamilySpec"


def test_a_new_family_file_is_good_as_it_is_written(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path
) -> None:
    path = str(tmp_path / "new.yaml")
    given = ("--teacher", str(tiny_teacher), "--corpus", str(tiny_corpus), "--student", "small=2")
    assert run("init", path, *given) == (0, f"wrote {path}; next: stillhouse check {path}\n", "")
    assert run("check", path)[0] == 0
    code, _, err = run("init", path)
    assert (code, err.count("\n")) == (2, 1) and "is not overwritten" in err


def test_a_field_is_explained_and_a_wrong_one_costs_one_line(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run("explain", "students.lr")
    assert (code, out) == (0, "students.lr: number > 0, default 0.0003\n\n  Highest learning rate.\n")
    code, out, err = run("explain", "students.lrr")
    assert (code, out, err.count("\n")) == (2, "", 1) and "nearest: students.lr" in err


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
    assert (code, out.splitlines()[3:4]) == (0, ["small starts from its init: tiny-small has no champion yet"])


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
    assert (code, "in all " in out, "this machine has" in out) == (0, True, False)


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


def test_a_deleted_experiment_of_the_registry_in_the_environment_costs_one_line(
    run: Callable[..., tuple[int, str, str]],
    spec: Path,
    empty_registry: Path,
    tmp_path: Path,
    stillhouse_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    uri = f"sqlite:///{shutil.copy(empty_registry, tmp_path / 'mlflow.db')}"
    client = mlflow.MlflowClient(uri)
    client.delete_experiment(client.create_experiment("tiny"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for command in ("check", "run"):
        code, out, err = run(command, str(spec))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: tracking.experiment: 'tiny' is deleted in MLflow {uri}; set another name")
    assert not stillhouse_home.exists()


def without_advice(out: str) -> list[str]:
    """The lines of an output but for what the tiny family is warned of: its student saves little."""
    return [line for line in out.splitlines() if "little is saved" not in line]


@pytest.mark.parametrize(
    ("address", "code", "says"),
    [
        (
            "127.0.0.1:9",
            1,
            "RAY_ADDRESS: no Ray cluster answers at 127.0.0.1:9 (Connection refused); check",
        ),
        ("http://127.0.0.1:8265", 2, "RAY_ADDRESS: got 'http://127.0.0.1:8265', a job server's URL; give HOST:PORT"),
        ("127.0.0.1:head", 2, "RAY_ADDRESS: got '127.0.0.1:head': "),
    ],
)
def test_a_cluster_that_does_not_answer_costs_one_line_and_leaves_nothing(
    address: str,
    code: int,
    says: str,
    run: Callable[..., tuple[int, str, str]],
    spec: Path,
    stillhouse_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    ended, out, err = run("run", str(spec))
    assert (ended, without_advice(out), err.count("\n")) == (code, [], 1)
    assert err.startswith(f"error: {says}")
    assert not list(stillhouse_home.glob("runs/*"))


@pytest.mark.parametrize("placed", [False, True])
def test_a_run_that_is_removed_has_not_been_named_or_is_named_as_removed(
    placed: bool,
    run: Callable[..., tuple[int, str, str]],
    spec: Path,
    stillhouse_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise UserError("corpus.paths: cannot be read")

    @contextlib.contextmanager
    def full(*_: object) -> Iterator[Callable[[], list[object]]]:
        if not placed:
            raise NoPlaceError("the cluster is full")
        yield list

    monkeypatch.setattr("cluster.session.ray_session", contextlib.nullcontext)
    monkeypatch.setattr("cluster.queue.place.place_for", full)
    monkeypatch.setattr("cluster.family.run_family", unreadable)
    code, out, err = run("run", str(spec))
    named = without_advice(out)
    assert not list(stillhouse_home.glob("runs/*"))
    if not placed:
        assert (code, named, err) == (1, [], "error: the cluster is full\n")
        return
    (begun, removed), name = named, named[0].split()[1].rstrip(",")
    assert (code, err) == (2, "error: corpus.paths: cannot be read\n")
    assert begun.startswith("run tiny-") and "run.log" in begun
    assert removed == f"run {name} and its log are removed: no student had started"


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
