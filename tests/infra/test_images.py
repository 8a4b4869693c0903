"""The images' recipes: what hadolint says of them, and what they must not hold."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
IMAGES = sorted((ROOT / "infra/images").glob("*.Dockerfile"))
PYTHON = ROOT / "infra/images/python-version"
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(image: Path) -> None:
    said = subprocess.run([HADOLINT, "--no-color", image], capture_output=True, text=True)
    assert (said.returncode, said.stdout + said.stderr) == (0, "")


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_an_image_is_pinned_runs_as_nobody_s_root_and_says_whether_it_is_healthy(image: Path) -> None:
    lines = image.read_text().splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert ":" in base and not base.endswith(":latest")
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1000"]
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    # What is copied is named, so that no `.git`, `.env` or token file comes along.
    copied = [line.split()[-2] for line in lines if line.startswith("COPY ")]
    assert copied and "." not in copied


def instructions(image: Path) -> list[str]:
    """One line each, without comments."""
    text = image.read_text().replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line and not line.startswith("#")]


def test_there_is_an_image_for_the_head_and_one_for_gpus() -> None:
    assert [image.name for image in IMAGES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


def test_the_interpreter_is_one_exact_version_that_the_package_supports() -> None:
    version = PYTHON.read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", version)
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert version.strip() in SpecifierSet(supported)


def test_all_images_install_that_interpreter_and_no_other() -> None:
    """Ray refuses a node whose Python differs from the head's in any digit."""
    made = []
    for image in IMAGES:
        steps = instructions(image)
        # Whatever of the interpreter a Dockerfile names: uv, the version's file, python3, python-dev, ...
        about = [step for step in steps if re.search(r"python|/uv\b|\buv ", step)]
        made.append(about)
        assert not any("apt-get" in step for step in about), f"{image.name} takes a Python of the distribution"
        (makes,) = (step for step in about if step.startswith("RUN "))
        assert '--managed-python --python "$(cat /opt/python-version)" /opt/venv ' in makes
        assert f"COPY {PYTHON.relative_to(ROOT)} /opt/python-version" in about
        assert next(step for step in steps if step.startswith("ENV PATH=")).startswith("ENV PATH=/opt/venv/bin:")
    assert made[0] == made[1] and len(made[0]) == 3


def test_all_machines_take_the_interpreter_from_one_version_of_uv() -> None:
    cloud = yaml.safe_load((ROOT / "infra/cloud/cluster.yaml").read_text())["setup_commands"]
    named = re.findall(r"\buv(?::|==)(\S+)", "\n".join([*(image.read_text() for image in IMAGES), *cloud]))
    assert len(named) == 3 and len(set(named)) == 1
    assert re.fullmatch(r"\d+\.\d+\.\d+", named[0])


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_docker_is_given_every_file_that_is_copied(image: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [step.split()[1:-1] for step in instructions(image) if step.startswith("COPY ") and "--from=" not in step]
    sources = {each for words in copied for each in words if not each.startswith("--")}
    assert PYTHON.relative_to(ROOT).as_posix() in sources
    assert sources <= allowed
    assert all((ROOT / each).exists() for each in sources)
