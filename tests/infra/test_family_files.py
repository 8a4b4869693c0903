"""Every family file and YAML example in the repository: it loads, and its corpus paths find files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import fs

from cluster import preflight
from cluster.corpus import files
from cluster.corpus.files import S3, select_files
from cluster.corpus.sample import check_files
from cluster.dates import rendered
from cluster.spec import FamilySpec
from cluster.specfile import load_spec
from tests.tiny import write_tiny_tokenizer
from tests.tiny_types import write_tiny_type

ROOT = Path(__file__).parents[2]
DAY = date(2026, 11, 24)
# What README's excerpts leave out.
REST: dict[str, Any] = {
    "name": "excerpt",
    "teacher": {"model": "/models/teacher"},
    "corpus": {"paths": ["data/"]},
    "students": {"small": {"init": {"source": "teacher", "layers": 8}}},
}


def is_family(tree: Any) -> bool:
    """Whether YAML is a family or a part of one."""
    return isinstance(tree, dict) and bool({"students", "corpus"} & tree.keys())


def family_files() -> Iterator[Any]:
    for path in sorted([*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("infra/**/*.yaml")]):
        documents = [tree for tree in _documents(path.read_text()) if is_family(tree)]
        if documents:
            yield pytest.param(path.read_text(), path.parent, id=str(path.relative_to(ROOT)))
    for page in sorted(ROOT.glob("*.md")):
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
            if is_family(tree := yaml.safe_load(block)):
                yield pytest.param(yaml.safe_dump(completed(tree)), ROOT, id=f"{page.name}-{number}")


def completed(excerpt: dict[str, Any]) -> dict[str, Any]:
    """A family of what README shows of one."""
    init = REST["students"]["small"]["init"]
    students = excerpt.get("students", REST["students"])
    return {**REST, **excerpt, "students": {name: {"init": init, **fields} for name, fields in students.items()}}


def _documents(text: str) -> list[Any]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.YAMLError:  # a template
        return []


FAMILIES = list(family_files())


def test_the_known_families_are_among_them() -> None:
    names = {str(family.id) for family in FAMILIES}
    assert {"examples/demo.yaml", "README.md-0"} <= names
    assert sum(name.startswith("infra/kubernetes/overlays/") for name in names) == len(
        list(ROOT.glob("infra/kubernetes/overlays/*/family.yaml"))
    )


def sample(path: str) -> str:
    """A file that a corpus path is meant to find: wildcards filled in, and one in a folder."""
    filled = path.replace("**", "a").replace("*", "part-0").replace("?", "0")
    return filled if files.format_of(filled) else f"{filled.rstrip('/')}/part-0.jsonl"


@pytest.mark.parametrize(("text", "folder"), FAMILIES)
def test_a_family_file_loads_and_its_corpus_is_found(
    text: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under a root of its own, for its paths are relative to it; as deep as it lies in the repository.
    place = tmp_path / "root" / folder.relative_to(ROOT)
    place.mkdir(parents=True)
    (place / "family.yaml").write_text(text)
    spec: FamilySpec = rendered(load_spec(place / "family.yaml"), DAY)
    bucket = fs.SubTreeFileSystem(str(tmp_path / "s3"), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_bucket_filesystem", lambda: bucket)
    expected = [sample(path) for path in spec.corpus.paths]
    for name in expected:
        file = tmp_path / "s3" / name.removeprefix(S3) if name.startswith(S3) else Path(name)
        assert file.is_relative_to(tmp_path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "a"}')
    found = select_files(spec.corpus.paths)
    assert found.files == expected
    assert found.skipped == {}
    assert check_files(spec.corpus) == (found, [])


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in place of every one that a family names, with all the layers, heads and positions they ask for."""
    folder = tmp_path_factory.mktemp("stand-in")
    write_tiny_tokenizer(folder)
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    return write_tiny_type(folder, "llama", vocab_size=320, max_position_embeddings=8192, **sizes)


@pytest.mark.parametrize(("text", "folder"), FAMILIES)
def test_a_family_file_passes_the_check(
    text: str, folder: Path, tmp_path: Path, stand_in: Path, tiny_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "family.yaml").write_text(text)
    spec = rendered(load_spec(tmp_path / "family.yaml", [f"corpus.paths=[{tiny_corpus}]"]), DAY)
    # What the check asks of the network and of the machine; the rest is its own.
    monkeypatch.setattr(preflight, "local_model", lambda name, **_: stand_in)
    monkeypatch.setattr(preflight, "champion_of", lambda name, uri: None)
    monkeypatch.setattr(preflight, "store_of", lambda spec: None)
    monkeypatch.setenv((spec.notify and spec.notify.secret_env) or "UNUSED", "secret")
    checked = preflight.preflight(spec)
    assert len(checked.sizes()) == 1 + len(spec.students)
