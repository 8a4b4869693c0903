"""From YAML and --set to a frozen spec, or to one line that says what is wrong and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from cluster.spec import FamilySpec
from cluster.specfile import home, load_spec, training_hash
from jobs.explain import explain
from tests.tiny import tiny_family

YAML = """\
name: tiny
teacher: {model: teacher}
corpus: {paths: [corpus.jsonl]}
students:
  small:
    init: {source: teacher, layers: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "family.yaml"
    path.write_text(YAML)
    return path


def refusal(path: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_spec(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_the_section_that_a_refusal_points_to_can_be_explained(file: Path) -> None:
    said = refusal(file, "students.small.depth=2")
    assert "students.small.depth: no such field; see `stillhouse explain students`" in said
    assert explain("students").startswith("students: ")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("colour=red", "colour"),
        ("teacher.shard=2", "teacher.shard"),
        ("students.small.optimizer.beta=0.9", "students.small.optimizer.beta"),
        ("students.small.init.depth=2", "students.small.init.depth"),
    ],
)
def test_an_unknown_field_is_named_by_its_path(file: Path, override: str, path: str) -> None:
    section = path.rpartition(".")[0]
    assert f" {path}: no such field; see `stillhouse explain{section and ' '}{section}`" in refusal(file, override)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("students.small.zero_stage=4", ["students.small.zero_stage: got 4", "1, 2 or 3"]),
        ("students.small.lr=fast", ["students.small.lr: got 'fast'", "number"]),
        ("labels.k=0", ["labels.k: got 0", "greater than 0"]),
        ("teacher.dtype=float16", ["teacher.dtype: got 'float16'", "'float32' or 'bfloat16'"]),
        ("students.small.init.source=air", ["students.small.init", "'air'", "'teacher', 'pretrained', 'scratch'"]),
        ("students.small.init.layers=[2, 1]", ["students.small.init.layers: got [2, 1]", "rising order"]),
        ("labels.kind=logits", ["labels.kind: got 'logits'; allowed are 'topk', 'sampled', 'hidden', 'dense'"]),
        ("labels.kind=null", ["labels.kind: got None; allowed are 'topk'"]),
        ("labels=hidden", ["labels: got 'hidden'"]),
        ("labels={kind: sampled, draws: 0}", ["labels.draws: got 0", "greater than or equal to 1"]),
        ("labels.draws=3", ["labels.draws: no such field of topk labels; see `stillhouse explain labels`"]),
        ("labels={kind: hidden, k: 3}", ["labels.k: no such field of hidden labels"]),
        ("students.small.loss.soft=-1", ["students.small.loss.soft: got -1", "greater than or equal to 0"]),
        ("students.small.loss.soft={start: 1}", ["students.small.loss.soft.end: is required"]),
        ("students.small.loss.soft={start: 1, end: 2, over: 0}", ["students.small.loss.soft.over: got 0"]),
        ("students.small.loss.soft={start: 1, end: 2, x: 0}", ["students.small.loss.soft.x: no such field;"]),
        ("students.small.loss.temperature=0", ["students.small.loss.temperature: got 0", "greater than 0"]),
        ("students.small.loss.temperature=3", ["students.small.loss: temperature 3", "Set labels.temperature"]),
        ("students.small.loss.divergence=adaptive_kl", ["students.small.loss: divergence adaptive_kl"]),
        ("students.small.loss.mix=0.5", ["students.small.loss: mix has no effect on forward_kl"]),
        ("limits.cpus=0", ["limits.cpus: got 0", "greater than 0"]),
        ("students.small.ranks=3", ["students.small: ranks 3", "does not divide corpus.batch_sequences 8"]),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(file: Path, override: str, parts: list[str]) -> None:
    message = refusal(file, override)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("override", ["students.small.init.layers=0", "students.small.init.layers=[-1]"])
def test_a_wrong_value_is_complained_about_once(file: Path, override: str) -> None:
    assert refusal(file, override).count("got ") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{min: 3, max: 2}", "teacher.replicas: min 3 is more than max 2"),
        ("{min: 0, max: 2}", "teacher.replicas.min: got 0; input should be greater than 0"),
        ("{min: 1}", "teacher.replicas.max: is required"),
        ("{min: 1, max: 2, most: 3}", "teacher.replicas.most: no such field"),
        ("0", "teacher.replicas: got 0; input should be greater than 0"),
        ("[1, 2]", "teacher.replicas: got [1, 2]; input should be a valid integer"),
    ],
)
def test_a_range_of_replicas_that_is_none_is_refused_by_name(file: Path, given: str, said: str) -> None:
    message = refusal(file, f"teacher.replicas={given}")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{webhook: http://hooks.example.org/x}", "notify: webhook must be an https:// URL; http:// is allowed"),
        ("{webhook: http://127.example.org/x}", "must be an https://"),
        ("{webhook: ftp://127.0.0.1/x}", "must be an https://"),
        ("{webhook: hooks.example.org}", "must be an https://"),
        ("{webhook: 'https:///x'}", "must be an https://"),
        ("{webhook: 'https://[::1/x'}", "webhook is no URL"),
        ("{webhook: 'https://a:b/x'}", "webhook is no URL"),
        ("{webhook: https://me:hunter2@a.org/x}", "must not hold a user or a password"),
        ("{webhook: https://a.org, secret_env: hunter2!}", "secret_env must be the name of an environment variable"),
        ("{webhook: https://a.org, events: []}", "notify.events: got []; "),
        ("{webhook: https://a.org, events: [began]}", "notify.events.0: got 'began'; input should be 'succeeded', "),
        ("{webhook: https://a.org, events: [failed, failed]}", "each at most once"),
        ("{events: [failed]}", "notify.webhook: is required"),
    ],
)
def test_a_webhook_that_cannot_be_trusted_is_refused_without_its_password(file: Path, given: str, says: str) -> None:
    message = refusal(file, f"notify={given}")
    assert says in message
    assert "hunter2" not in message


@pytest.mark.parametrize("url", ["https://a.org/x", "http://127.0.0.1:80/x", "http://localhost/x", "http://[::1]:9/x"])
def test_a_webhook_is_https_or_on_this_machine(file: Path, url: str) -> None:
    notify = load_spec(file, [f"notify.webhook={url}"]).notify
    assert notify is not None
    assert (notify.webhook, notify.events) == (url, ("succeeded", "failed", "promoted"))


@pytest.mark.parametrize("name", ["int", "teacher", "init", "scratch", "soft", "number", "ramp", "topk"])
def test_a_student_s_name_is_never_left_out_of_a_path(file: Path, name: str) -> None:
    message = refusal(file, f"students.{name}={{init: {{source: teacher, layers: 2, depth: 1}}, lr: 0}}")
    assert f"students.{name}.lr: got 0" in message
    assert f"students.{name}.init.depth: no such field" in message


def test_all_that_is_wrong_is_said_at_once(file: Path) -> None:
    message = refusal(file, "labels.k=0", "colour=red", "corpus.held_out=2")
    assert [path for path in ("labels.k:", "colour:", "corpus.held_out:") if path not in message] == []


def test_a_missing_field_is_named(file: Path) -> None:
    text = YAML.replace("model: teacher", "dtype: float32")
    assert " teacher.model: is required and was not given" in refusal(file, text=text)


def test_two_students_with_one_name_are_refused_with_both_lines(file: Path) -> None:
    message = refusal(file, text=YAML + "  small:\n    init: {source: teacher, layers: 3}\n")
    assert "'small' is given twice, on lines 5 and 7" in message
    assert str(file) in message


def test_malformed_yaml_is_refused_with_line_and_column(file: Path) -> None:
    assert "not valid YAML at line 3, column 10" in refusal(file, text="name: x\nteacher:\n  model: }\n")


@pytest.mark.parametrize("text", ["", "- name: tiny\n", "tiny\n"])
def test_yaml_that_is_no_mapping_is_refused(file: Path, text: str) -> None:
    assert "YAML mapping with name, teacher, corpus and students" in refusal(file, text=text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: größe".encode("latin-1"))
    for path, reason in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "directory"), (latin, "utf-8")):
        assert f"{path}: cannot be read" in refusal(path)
        assert reason in refusal(path)


def test_an_override_replaces_a_value_and_creates_what_is_not_there(file: Path) -> None:
    spec = load_spec(file, ["students.small.init.layers=[0, 3]", "serving.requests=5", "labels.k=7", "labels.k=9"])
    assert spec.students["small"].init.layers == [0, 3]  # type: ignore[union-attr]
    assert spec.serving is not None
    assert (spec.serving.requests, spec.labels.k) == (5, 9)


@pytest.mark.parametrize("override", ["labels.k", "=3", "labels..k=3", ".k=3", "labels.=3"])
def test_an_override_without_a_path_or_a_value_is_refused(file: Path, override: str) -> None:
    assert f"--set {override}: give a dotted path and a value" in refusal(file, override)


@pytest.mark.parametrize(("override", "value"), [("name.first=x", "name"), ("corpus.paths.0=x", "corpus.paths")])
def test_an_override_through_a_value_is_refused(file: Path, override: str, value: str) -> None:
    assert f"{value} is a value and has no fields" in refusal(file, override)


def test_an_override_that_is_no_yaml_is_refused(file: Path) -> None:
    assert "--set labels.k: not valid YAML" in refusal(file, "labels.k=[1")


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003"])
def test_a_number_with_an_exponent_is_a_number(file: Path, text: str) -> None:
    assert load_spec(file, [f"students.small.lr={text}"]).students["small"].lr == 3e-4


def test_a_local_path_is_relative_to_the_spec_s_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir("/")
    init = "students.small.init={source: pretrained, model: ../m}"
    spec = load_spec(file, [init, "corpus.paths=[c.txt, $WHERE/c.txt, ~/c.txt, ./a/../c.txt, /c.txt]"])
    folder = file.parent
    assert spec.teacher.model == str(folder / "teacher")
    assert spec.students["small"].init.model == str(folder.parent / "m")  # type: ignore[union-attr]
    assert spec.corpus.paths == [
        str(folder / "c.txt"),
        "/data/c.txt",
        "/home/me/c.txt",
        str(folder / "c.txt"),
        "/c.txt",
    ]


@pytest.mark.parametrize("uri", ["s3://bucket/x", "hf://org/name", "models:/name@champion"])
def test_a_remote_path_stays_as_it_is(file: Path, uri: str) -> None:
    spec = load_spec(file, [f"teacher.model={uri}", f"corpus.paths=['{uri}']"])
    assert (spec.teacher.model, spec.corpus.paths) == (uri, [uri])


@pytest.mark.parametrize(
    ("section", "fields", "same"),
    [
        ("tracking", {"uri": "http://elsewhere:5000"}, True),
        ("serving", {"requests": 3}, True),
        ("notify", {"webhook": "https://hooks.example.org/x"}, True),
        ("promotion", {"kl": 0.1}, True),
        ("stream", {"window": 2}, True),
        ("evaluation", {"batches": 1}, False),
        ("checkpoints", {"every": 5}, True),
        ("limits", {"cpus": 5, "priority": 1, "wait": False}, True),
        ("corpus", {"seed": 1}, False),
        ("corpus", {"paths": ["/elsewhere/corpus.jsonl"]}, True),
        ("evaluation", {"angle_every": None}, True),
        ("labels", {"k": 9}, False),
        ("labels", {"temperature": 2.0}, False),
        ("teacher", {"dtype": "bfloat16"}, False),
    ],
)
def test_the_training_hash_covers_what_decides_the_weights(section: str, fields: dict[str, Any], same: bool) -> None:
    plain, other = (FamilySpec.model_validate(tiny_family(**more)) for more in ({}, {section: fields}))
    assert (training_hash(plain) == training_hash(other)) is same


def test_the_training_hash_sees_the_kind_of_labels_and_the_loss(file: Path) -> None:
    overrides = ["labels.k=64", "labels.kind=sampled", "labels.kind=hidden", "labels.kind=dense"]
    overrides += [f"students.small.loss.soft={{start: 0, end: 1, shape: {shape}}}" for shape in ("linear", "cosine")]
    hashes = [training_hash(load_spec(file, [override])) for override in overrides]
    assert len(set(hashes)) == len(overrides)
    assert hashes[0] == training_hash(load_spec(file))


def test_the_training_hash_sees_the_learning_rate_and_not_the_yaml_s_order(file: Path) -> None:
    tree = yaml.safe_load(YAML)
    tree["students"]["large"] = {"init": {"source": "teacher", "layers": 3}}
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    plain = training_hash(load_spec(file))
    assert training_hash(load_spec(file, ["students.small.lr=1e-5"])) != plain
    tree["students"] = dict(reversed(tree["students"].items()))
    file.write_text(yaml.safe_dump(dict(reversed(tree.items())), sort_keys=False))
    assert training_hash(load_spec(file)) == plain


def test_the_home_is_where_the_environment_says_else_under_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_HOME", "/some/../where")
    assert home() == Path("/where")
    monkeypatch.setenv("STILLHOUSE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert home() == Path("/home/me/.stillhouse")


def test_a_path_that_begins_like_the_home_of_nobody_is_the_name_of_a_file(file: Path) -> None:
    assert load_spec(file, ["corpus.paths=[~nobody.txt]"]).corpus.paths == [str(file.parent / "~nobody.txt")]
