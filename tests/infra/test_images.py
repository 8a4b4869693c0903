"""The images' recipes: what hadolint says of them, and what they must not hold."""

import subprocess
import sys
from pathlib import Path

import pytest

IMAGES = sorted((Path(__file__).parents[2] / "infra/images").glob("*.Dockerfile"))
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
