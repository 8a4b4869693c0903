"""What travels with a submitted job."""

from __future__ import annotations

import zipfile
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray._private import ray_constants
from ray._private.runtime_env import packaging

from cluster.corpus.files import select_files
from cluster.dates import rendered
from cluster.errors import UserError
from cluster.specfile import load_spec
from jobs import submit
from jobs.contexts import Context
from tests.tiny import tiny_family, write_tiny_corpus

HERE = Context(address="http://127.0.0.1:8265")


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    write_tiny_corpus(tmp_path / "corpus.jsonl")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("a text")
    tree = tiny_family("teacher", "corpus.jsonl")
    tree["corpus"]["paths"] = ["corpus.jsonl", "texts", "s3://bucket/b.jsonl"]
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_small_local_text_travels_and_is_found_on_the_other_side(spec_path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    spec = load_spec(spec_path, ["students.small.lr=3e-4"])
    size = submit.pack(spec, packed, HERE)
    there = load_spec(packed / submit.SPEC_FILE)
    *local, bucket = there.corpus.paths
    assert [Path(path).exists() for path in local] == [True, True]
    assert all(Path(path).is_relative_to(packed) for path in local)
    assert bucket == "s3://bucket/b.jsonl"
    assert [Path(name).read_text() for name in select_files(local[1:]).files] == ["a text"]
    assert there.students == spec.students
    assert there.teacher == spec.teacher
    assert size == sum(file.stat().st_size for file in packed.rglob("*") if file.is_file())


def test_text_on_the_cluster_does_not_travel_and_need_not_be_here(spec_path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    there = ["corpus.upload=false", "corpus.paths=['/shared/dt={{ ds }}/', '/shared/*/', 's3://bucket/b.jsonl']"]
    spec = load_spec(spec_path, there)
    submit.pack(spec, packed, HERE)
    assert [file.name for file in packed.rglob("*")] == [submit.SPEC_FILE]
    paths = ["/shared/dt={{ ds }}", "/shared/*/", "s3://bucket/b.jsonl"]
    assert load_spec(packed / submit.SPEC_FILE).corpus.paths == spec.corpus.paths == paths
    assert submit.corpus_lines(spec) == [f"corpus: read on the cluster when a run starts: {', '.join(paths)}"]
    local, texts, bucket = (spec := load_spec(spec_path)).corpus.paths
    assert submit.corpus_lines(spec) == [
        f"corpus: uploaded as it is now: {local}, {texts}",
        f"corpus: read on the cluster when a run starts: {bucket}",
    ]


def test_what_travels_is_the_corpus_of_one_date(spec_path: Path, tmp_path: Path) -> None:
    write_tiny_corpus(tmp_path / "dt=2026-11-23" / "a.jsonl")
    packed = tmp_path / "packed"
    packed.mkdir()
    paths = "corpus.paths=['dt={{ ds_add(ds, -1) }}', 's3://bucket/dt={{ ds }}/']"
    submit.pack(rendered(load_spec(spec_path, [paths]), date(2026, 11, 24)), packed, HERE)
    local, bucket = load_spec(packed / submit.SPEC_FILE).corpus.paths
    (shipped,) = select_files([local]).files
    assert Path(shipped).read_text() == (tmp_path / "dt=2026-11-23" / "a.jsonl").read_text()
    assert bucket == "s3://bucket/dt=2026-11-24/"


def test_the_job_is_told_the_date_and_a_resumed_one_goes_on_with_that_of_its_run() -> None:
    assert submit.command(False, date(2026, 11, 24)) == "run family.yaml --ds 2026-11-24"
    assert submit.command(True, None) == "run family.yaml --resume"
    begun = [
        ("tiny", date(2026, 11, 23), False),
        ("tiny", date(2026, 11, 24), False),
        ("tiny", date(2026, 11, 25), True),  # a wrong --ds, with which nothing could go on
        ("other", date(2026, 11, 26), False),
    ]
    jobs = [
        SimpleNamespace(metadata={submit.FAMILY: family, **submit.begun(resume, ds)}, start_time=number)
        for number, (family, ds, resume) in enumerate(begun)
    ]
    client = SimpleNamespace(list_jobs=lambda: [SimpleNamespace(metadata=None, start_time=None), *reversed(jobs)])
    assert submit._last_ds(client, "tiny") == date(2026, 11, 24)
    with pytest.raises(UserError, match="no job of family 'large' with a date; give its date by --ds"):
        submit._last_ds(client, "large")


def test_what_travels_is_what_a_run_would_read_here(
    spec_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "texts"
    for name in ("b.jsonl.gz", ".hidden/c.txt", "._a.txt", "notes.csv", "more/b.jsonl.gz", "more/z.txt"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(name)
    packed = tmp_path / "packed"
    packed.mkdir()
    paths = ["texts/**/*.gz", "texts", "texts/b.jsonl.gz", "texts/.hidden/*"]
    spec = load_spec(spec_path, [f"corpus.paths={paths}"])
    submit.pack(spec, packed, HERE)
    there = load_spec(packed / submit.SPEC_FILE)
    contents = [[Path(name).read_text() for name in select_files(each.corpus.paths).files] for each in (spec, there)]
    assert contents[0] == contents[1] == ["b.jsonl.gz", "more/b.jsonl.gz", "a text", "more/z.txt", ".hidden/c.txt"]
    assert select_files(there.corpus.paths).skipped == {}
    assert "skipped: 6 files (.csv: 1, hidden: 2, named twice: 3)" in capsys.readouterr().err


def test_nothing_travels_but_the_files_that_are_read_and_ray_uploads_all_of_them(
    spec_path: Path, tmp_path: Path
) -> None:
    here = tmp_path / "texts"
    secrets = (".env", ".git/config", ".git/a.txt", "sub/.ssh/id.txt", "key.pem", "deep/.netrc", "Makefile")
    # Ray leaves out folders of these names, also those that hold text.
    kept = ("venv/b.txt", "sub/__pycache__/c.jsonl", "z.txt")
    for name in (*secrets, *kept):
        (here / name).parent.mkdir(exist_ok=True, parents=True)
        (here / name).write_text(name)
    packed = tmp_path / "packed"
    packed.mkdir()
    spec = load_spec(spec_path, ["corpus.paths=[texts]"])
    submit.pack(spec, packed, HERE)
    archive = tmp_path / "upload.zip"
    left_out = ray_constants.get_runtime_env_default_excludes()
    packaging.create_package(str(packed), archive, include_gitignore=True, excludes=left_out)
    with zipfile.ZipFile(archive) as uploaded:
        texts = {uploaded.read(name).decode() for name in uploaded.namelist() if not name.endswith("family.yaml")}
    assert texts == {"a text", *kept}
    order = [
        [Path(name).read_text() for name in select_files(each.corpus.paths).files]
        for each in (spec, load_spec(packed / submit.SPEC_FILE))
    ]
    assert order[0] == order[1] == ["a text", "sub/__pycache__/c.jsonl", "venv/b.txt", "z.txt"]


def test_a_path_given_twice_and_one_that_looks_like_a_glob_travel(spec_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("odd")
    packed = tmp_path / "packed"
    packed.mkdir()
    submit.pack(load_spec(spec_path, ["corpus.paths=['a[1].txt', texts, 'a[1].txt', texts]"]), packed, HERE)
    there = select_files(load_spec(packed / submit.SPEC_FILE).corpus.paths).files
    assert [Path(name).read_text() for name in there] == ["odd", "a text"]


def test_a_file_of_an_unknown_kind_does_not_travel(spec_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"a\.csv is of an unknown kind"):
        submit.pack(load_spec(spec_path, ["corpus.paths=[a.csv]"]), tmp_path, HERE)


def test_a_file_that_cannot_be_copied_is_refused_by_name(spec_path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    # Its number in front makes the name too long for a file system.
    name = "a" * 250 + ".txt"
    (tmp_path / name).write_text("a")
    with pytest.raises(UserError, match=r"corpus\.paths: cannot copy .*/a{250}\.txt: File name too long"):
        submit.pack(load_spec(spec_path, [f"corpus.paths=[{name}]"]), packed, HERE)


def test_too_much_text_is_refused_with_what_to_do(
    spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "SHIPPED_LIMIT", 100)
    with pytest.raises(UserError, match=r"the largest .*corpus.jsonl \(.* MiB\).*s3://"):
        submit.pack(load_spec(spec_path), tmp_path / "packed", HERE)
    assert not (tmp_path / "packed").exists()


def test_a_context_says_where_runs_and_labels_are_kept_unless_the_spec_does(spec_path: Path, tmp_path: Path) -> None:
    context = Context(address=HERE.address, tracking_uri="http://mlflow:5000", store="s3://labels/all")
    for number, (overrides, tracking, store) in enumerate(
        [
            ([], "http://mlflow:5000", "s3://labels/all"),
            (["tracking.uri=http://own:1", "store.uri=s3://own/labels"], "http://own:1", "s3://own/labels"),
            (["store.enabled=false"], "http://mlflow:5000", None),
        ]
    ):
        packed = tmp_path / f"{number}"
        packed.mkdir()
        submit.pack(load_spec(spec_path, overrides), packed, context)
        there = load_spec(packed / submit.SPEC_FILE)
        assert (there.tracking.uri, there.store.uri) == (tracking, store)


def test_variables_are_given_or_taken_from_here_and_no_value_stands_in_a_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEY", "secret")
    monkeypatch.delenv("ABSENT", raising=False)
    assert submit.environment_of(["KEY", "OTHER=a=b", "EMPTY="]) == {"KEY": "secret", "OTHER": "a=b", "EMPTY": ""}
    with pytest.raises(UserError, match="ABSENT is not set here"):
        submit.environment_of(["ABSENT"])
    for name in ("STILLHOUSE_MAX_CPUS", "STILLHOUSE_MAX_GPUS", "STILLHOUSE_USER"):
        with pytest.raises(UserError, match=f"--env: {name} is not yours to set"):
            submit.environment_of([f"{name}=9"])
    with pytest.raises(UserError) as refused:
        submit.environment_of(["NO NAME=secret"])
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "x" * 81])
def test_a_name_that_cannot_be_an_id_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        submit.job_id(name, "tiny")
