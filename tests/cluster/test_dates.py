"""Macros in corpus.paths: another folder every day, and nothing but a date can be made with them."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from cluster.dates import date_of, has_macros, rendered
from cluster.errors import UserError
from cluster.spec import FamilySpec
from cluster.specfile import load_spec, training_hash
from tests.tiny import tiny_family


def family(*paths: str) -> FamilySpec:
    return FamilySpec.model_validate(tiny_family(corpus={"paths": list(paths)}))


def path_on(day: date, path: str) -> str:
    (found,) = rendered(family(path), day).corpus.paths
    return found


@pytest.mark.parametrize(
    ("path", "day", "becomes"),
    [
        ("s3://bucket/dt={{ ds }}/", date(2026, 11, 24), "s3://bucket/dt=2026-11-24/"),
        ("/data/{{ds_nodash}}.jsonl", date(2026, 11, 24), "/data/20261124.jsonl"),
        ("/data/{{ ds_nodash }}.jsonl", date(800, 1, 2), "/data/08000102.jsonl"),
        ("/data/{{ ds_add(ds, -1) }}", date(2028, 3, 1), "/data/2028-02-29"),
        ("/data/{{ ds_add(ds, -1) }}", date(2027, 3, 1), "/data/2027-02-28"),
        ("/data/{{ ds_add(ds, 1) }}", date(2028, 2, 29), "/data/2028-03-01"),
        ("/data/{{ ds_add(ds, 366) }}", date(2027, 12, 31), "/data/2028-12-31"),
        ("{{ ds }}/{{ ds_add(ds, -7) }}", date(2026, 1, 3), "2026-01-03/2025-12-27"),
        ("/data/{{ ds_add(ds, -1) | replace('-', '/') }}", date(2026, 11, 24), "/data/2026/11/23"),
        ("/data/{ ds }/100%/$HOME", date(2026, 11, 24), "/data/{ ds }/100%/$HOME"),
    ],
)
def test_a_macro_becomes_the_date(path: str, day: date, becomes: str) -> None:
    assert path_on(day, path) == becomes


def test_only_the_paths_are_rendered_and_the_spec_keeps_its_template() -> None:
    spec = family("a/{{ ds }}", "b")
    tonight = rendered(spec, date(2026, 11, 24))
    assert (spec.corpus.paths, tonight.corpus.paths) == (["a/{{ ds }}", "b"], ["a/2026-11-24", "b"])
    assert tonight.model_dump(exclude={"corpus": {"paths"}}) == spec.model_dump(exclude={"corpus": {"paths"}})
    assert training_hash(tonight) == training_hash(spec)
    # A submitted spec holds what was set.
    assert tonight.model_dump(exclude_unset=True)["corpus"]["paths"] == ["a/2026-11-24", "b"]
    assert (has_macros(spec), has_macros(tonight)) == (True, False)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{{ dss }}", "'dss' is undefined"),
        ("{{ macros.ds_add(ds, 1) }}", "'macros' is undefined"),
        ("{{ range(3) }}", "'range' is undefined"),
        ("{{ ds.year }}", "has no attribute 'year'"),
        ("{{ ds", "unexpected end of template"),
        ("{{ ds }", "unexpected '}'"),
        ("{{ ds_add(ds) }}", "missing 1 required positional argument"),
        ("{{ ds_add('yesterday', 1) }}", "Invalid isoformat string"),
        ("{{ ds_add(ds, 'one') }}", "unsupported type"),
        ("{{ ds_add(ds, 99999999) }}", "date value out of range"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in [1, 2] %}{{ ds }}{% endfor %}", "no statements"),
        ("a\n{{ dss }}", "'dss' is undefined"),
    ],
)
def test_a_macro_that_does_not_exist_costs_one_line(path: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        path_on(date(2026, 11, 24), path)
    message = str(caught.value)
    assert message.startswith(f"corpus.paths: {' '.join(path.split())}: ")
    assert says in message
    assert message.endswith("the macros are {{ ds }}, {{ ds_nodash }} and {{ ds_add(ds, DAYS) }}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "path",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ds | attr('__class__') }}",
        "{{ ds_add.__globals__['re'] }}",
        "{{ '{0.__class__}'.format(ds) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(path: str) -> None:
    with pytest.raises(UserError, match=r"is unsafe|is undefined"):
        path_on(date(2026, 11, 24), path)


def test_a_relative_path_with_macros_is_relative_to_the_spec_s_folder(tmp_path: Path) -> None:
    tree = tiny_family(corpus={"paths": ["data/./dt={{ ds }}/a.jsonl", "../{{ ds_add(ds, -1) }}", "s3://b/{{ ds }}/"]})
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tree))
    spec = load_spec(path)
    assert spec.corpus.paths[0] == f"{tmp_path}/data/dt={{{{ ds }}}}/a.jsonl"
    assert rendered(spec, date(2026, 3, 1)).corpus.paths == [
        f"{tmp_path}/data/dt=2026-03-01/a.jsonl",
        f"{tmp_path.parent}/2026-02-28",
        "s3://b/2026-03-01/",
    ]


def test_a_date_is_read() -> None:
    assert date_of("2028-02-29") == date(2028, 2, 29)


@pytest.mark.parametrize(
    "text", ["", "today", "20261124", "2026-W48-2", "2026-11-24T00:00", "2027-02-29", "\uff12\uff10\uff12\uff16-11-24"]
)
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=rf"--ds: got {text!r}; .*YYYY-MM-DD"):
        date_of(text)
