"""What may import what: light where a laptop runs it, one way from the corpus to serving, MLflow in one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODELS = {"torch", "deepspeed", "transformers", "mlflow"}
# What reads a spec needs pydantic and YAML only.
ANYTHING_LARGE = MODELS | {"ray", "numpy", "pyarrow"}


def sources(*packages: str) -> list[Path]:
    """The files of packages; a package that does not exist, or was renamed, is an error."""
    found = {package: sorted((ROOT / package).rglob("*.py")) for package in packages}
    assert all(found.values()), [package for package, files in found.items() if not files]
    return [path for files in found.values() for path in files]


@cache
def nodes_of(source: Path) -> tuple[ast.AST, ...]:
    """Its imports and attributes. Kept, for most tests of this file read every source."""
    nodes = ast.walk(ast.parse(source.read_text(), str(source)))
    return tuple(node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom | ast.Attribute))


def imported_by(source: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, at its top or inside a function."""
    for node in nodes_of(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(files: list[Path], package: str, allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imported_by(file)
        if name.split(".")[0] == package and not name.startswith(allowed)
    ]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [("cluster.spec, cluster.specfile", ANYTHING_LARGE), ("cluster.family, jobs, jobs.cli.main", MODELS)],
)
def test_a_module_does_not_load_what_a_laptop_lacks(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("downstream", ["serving", "jobs", "tests"])
def test_the_cluster_imports_nothing_downstream(downstream: str) -> None:
    assert len(sources("cluster")) > 20
    assert offenders(sources("cluster"), downstream) == []


def test_serving_takes_little_from_the_cluster() -> None:
    """Errors, the loader, memory estimates, the spec, YAML, traces, the registry; in one file the pool, for scores."""
    judge = ROOT / "serving/control/judge.py"
    others = [file for file in sources("serving") if file != judge]
    assert len(others) > 30
    rooms = ("devices", "errors", "loading", "memory", "registry", "spec", "tracing", "yaml_file")
    assert [room for room in rooms if not list((ROOT / "cluster").glob(f"{room}*"))] == []
    allowed = tuple(f"cluster.{room}" + "." * (room != "tracing") for room in rooms)
    assert offenders(others, "cluster", allowed) + offenders(sources("serving"), "jobs") == []
    assert offenders([judge], "cluster", (*allowed, "cluster.corpus.", "cluster.labels.", "cluster.models.")) == [
        "serving/control/judge.py imports cluster.teacher.pool.TeacherPool"
    ]


def test_only_the_registry_knows_mlflow() -> None:
    registry = sources("cluster/registry")
    others = [file for file in sources("cluster", "jobs", "serving") if file not in registry]
    assert offenders(others, "mlflow") == []
    assert offenders(registry, "mlflow")


def test_only_one_function_loads_weights() -> None:
    """``from_pretrained`` of a model class fills what a checkpoint lacks with random numbers; ours raises."""
    without_weights = {"AutoConfig", "AutoTokenizer", "GenerationConfig"}
    callers = [
        str(source.relative_to(ROOT))
        for source in sources("cluster", "jobs", "serving", "infra", "benchmarks")
        for node in nodes_of(source)
        if isinstance(node, ast.Attribute)
        and node.attr == "from_pretrained"
        and not (isinstance(node.value, ast.Name) and node.value.id in without_weights)
    ]
    # The benchmark compares versions of Stillhouse, so it uses none of it.
    assert sorted(set(callers)) == ["benchmarks/frozen_text.py", "cluster/loading.py"]
