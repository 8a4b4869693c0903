"""Which files a corpus is made of, and what is said of those that cannot be."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.corpus.files import find_files
from cluster.errors import UserError


def write(path: Path, text: str = "x") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        find_files([str(path)])
    assert str(caught.value).startswith("corpus.paths: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Root, who may read every file, takes the rights of a user who may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_s_files_are_sorted_and_the_paths_keep_their_order(tmp_path: Path) -> None:
    names = ["d/2.txt", "d/10.txt", "d/sub/1.txt", "d/a.jsonl", "d/notes.md"]
    two, ten, sub, rows, _ = (write(tmp_path / name) for name in names)
    first = write(tmp_path / "z.txt")
    assert find_files([first, str(tmp_path / "d")]) == {".txt": [first, ten, two, sub], ".jsonl": [rows]}


def test_a_path_that_is_not_there_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    assert f"{tmp_path}/no.txt is not there; give files or folders of .jsonl, .parquet, .txt" in refusal(
        tmp_path / "no.txt"
    )


def test_a_link_to_nowhere_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    assert "a.txt is not there" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.csv", "a", "folder/b.md"])
def test_a_file_or_folder_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    path = Path(write(tmp_path / name))
    named = path if path.parent == tmp_path else path.parent
    assert f"{named} holds no file that ends in .jsonl, .parquet, .txt" in refusal(named)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no file" in refusal(tmp_path)


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(write(tmp_path / "a.txt"))
    path.chmod(0)
    monkeypatch.chdir(tmp_path)  # another user may not come through the folders above
    with nobody():
        assert "cannot read a.txt: Permission denied" in refusal("a.txt")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_a_file_whose_bytes_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    # Opens for anybody, root too, and then fails to read: page 0 is never mapped.
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    assert f"cannot read {tmp_path}/a.txt: Input/output error" in refusal(tmp_path / "a.txt")


def test_a_path_inside_a_file_is_refused(tmp_path: Path) -> None:
    inside = write(tmp_path / "a.txt") + "/b.txt"
    assert inside in refusal(inside)
