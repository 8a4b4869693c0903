"""Which files a corpus is made of, what is skipped, and how those are refused that cannot be read."""

import contextlib
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from cluster.corpus import files
from cluster.corpus.files import format_of, select_files, skipped_line
from cluster.corpus.sample import check_files
from cluster.errors import UserError
from cluster.spec import CorpusSpec


def write(path: Path, text: str = "x") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        check_files(CorpusSpec(paths=[str(path)]))
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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder as people have them."""
    names = [
        *("a.jsonl", "b.jsonl.gz", "b.txt", "c.parquet", "sub/c.json", "sub/deep/d.jsonl.gz", "sub/E.TXT"),
        *("notes.csv", "sub/more.csv", "README", "old.parquet.gz"),
        *("._a.jsonl", ".ipynb_checkpoints/a.jsonl", "sub/.hidden/x/y.txt"),
    ]
    for name in names:
        write(tmp_path / "data" / name)
    write(tmp_path / "data" / "empty.jsonl", "")
    (tmp_path / "data" / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    return tmp_path / "data"


SKIPPED = {".csv": 2, "no suffix": 1, ".gz": 1, "hidden": 3, "empty": 1, "broken link": 1}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tree: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder above as a path, on disk and as if it were in a bucket."""
    if request.param == "local":
        return str(tree)
    bucket = fs.SubTreeFileSystem(str(tree.parent), fs.LocalFileSystem())
    monkeypatch.setattr(files, "_bucket_filesystem", lambda: bucket)
    return "s3://data"


def below(place: str, *paths: str) -> list[str]:
    return [name.removeprefix(f"{place}/") for name in select_files([f"{place}{path}" for path in paths]).files]


def test_a_folder_gives_its_files_in_order_and_counts_what_it_skips(place: str) -> None:
    found = select_files([place])
    assert [name.removeprefix(f"{place}/") for name in found.files] == [
        *("a.jsonl", "b.jsonl.gz", "b.txt", "c.parquet", "sub/E.TXT", "sub/c.json", "sub/deep/d.jsonl.gz")
    ]
    # A bucket has no links: this one's stand-in does not list one that leads nowhere.
    expected = SKIPPED if not place.startswith("s3://") else {k: v for k, v in SKIPPED.items() if k != "broken link"}
    assert found.skipped == expected
    assert select_files([f"{place}/"]) == found


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        ("/*.jsonl", ["a.jsonl"]),
        ("/*.jsonl*", ["a.jsonl", "b.jsonl.gz"]),
        ("/**/*.jsonl.gz", ["b.jsonl.gz", "sub/deep/d.jsonl.gz"]),
        ("/**/deep/*", ["sub/deep/d.jsonl.gz"]),
        ("/s*/c.json", ["sub/c.json"]),
        ("/[ab].jsonl", ["a.jsonl"]),
        ("/?.txt", ["b.txt"]),
        ("/s*/", ["sub/E.TXT", "sub/c.json", "sub/deep/d.jsonl.gz"]),
        ("/sub/**", ["sub/E.TXT", "sub/c.json", "sub/deep/d.jsonl.gz"]),
        ("/._*.jsonl", ["._a.jsonl"]),
    ],
)
def test_a_glob_gives_the_files_that_match(place: str, glob: str, wanted: list[str]) -> None:
    assert below(place, glob) == wanted


def test_a_glob_counts_what_matches_and_is_skipped(place: str) -> None:
    assert select_files([f"{place}/*.jsonl"]).skipped == {"hidden": 1, "empty": 1}
    assert select_files([f"{place}/**/[a-z]*"]).skipped[".csv"] == 2


def test_a_glob_that_matches_nothing_names_what_is_there(place: str) -> None:
    with pytest.raises(UserError, match=r"sub/\*\.jsonl matches no file that ends in \.jsonl, .*sub holds \.csv: 1"):
        select_files([f"{place}/sub/*.jsonl"])
    with pytest.raises(UserError, match=r"matches nothing: \S+/none is no folder"):
        select_files([f"{place}/none/*.jsonl"])
    with pytest.raises(UserError, match=r"\*\.csv matches no file that ends in .* holds .*\.csv: 1"):
        select_files([f"{place}/*.csv"])


def test_a_bucket_s_name_has_no_wildcard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_bucket_filesystem", fs.LocalFileSystem)
    for path in ("s3://*/a.jsonl", "s3://b*/a.jsonl"):
        with pytest.raises(UserError, match="wildcard in its bucket's name"):
            select_files([path])


def test_a_file_of_that_very_name_is_no_glob(tmp_path: Path) -> None:
    odd = write(tmp_path / "a[1].txt")
    write(tmp_path / "a1.txt")
    assert select_files([odd]).files == [odd]


def test_paths_keep_their_order_and_no_file_is_read_twice(place: str) -> None:
    found = select_files([f"{place}/b.txt", f"{place}/*.jsonl", f"{place}/a.jsonl", f"{place}/?.txt"])
    assert [name.removeprefix(f"{place}/") for name in found.files] == ["b.txt", "a.jsonl"]
    assert found.skipped == {"hidden": 1, "empty": 1, "named twice": 2}


def test_what_was_skipped_is_one_line() -> None:
    assert skipped_line({".csv": 2, "hidden": 1}) == "skipped: 3 files (.csv: 2, hidden: 1)"
    assert skipped_line({"empty": 1}) == "skipped: 1 file (empty: 1)"
    assert skipped_line({}) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", (".jsonl", None)),
        ("a.b.JSON.GZ", (".json", "gzip")),
        ("a.txt.zst", (".txt", "zstd")),
        ("a.parquet", (".parquet", None)),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.csv", None),
        ("jsonl", None),
        (".gz", None),
    ],
)
def test_a_name_gives_the_format_and_the_codec(name: str, expected: tuple[str, str | None] | None) -> None:
    assert format_of(name) == expected


def test_a_link_that_leads_back_into_its_folder_is_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.txt")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "other").symlink_to(tmp_path / "e")
    other = write(tmp_path / "e" / "b.txt")
    assert select_files([str(tmp_path / "d")]).files == [
        str(tmp_path / "d" / "a.txt"),
        str(tmp_path / "d" / "other" / Path(other).name),
    ]


def test_a_link_to_itself_is_a_broken_one(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "b.txt")
    found = select_files([str(tmp_path)])
    assert (found.files, found.skipped) == ([text], {"broken link": 1})


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    write(tmp_path / os.fsdecode(b"caf\xe9.txt"))
    message = refusal(tmp_path)
    assert r"the name of " in message
    assert r"caf\xe9.txt is not UTF-8; rename it" in message
    message.encode()


def test_a_glob_that_matches_a_folder_says_how_to_name_its_files(tmp_path: Path) -> None:
    write(tmp_path / "dt=1" / "a.txt")
    assert "holds no files; a glob of folders ends in a slash" in refusal(tmp_path / "dt=*")


def test_a_path_that_is_not_there_is_named_with_what_is_allowed(tmp_path: Path) -> None:
    message = refusal(tmp_path / "no.txt")
    assert f"{tmp_path}/no.txt is not there; give files, folders or globs of .jsonl, .json, .txt" in message


def test_a_link_to_nowhere_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    assert "a.txt is not there" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.parquet.gz"])
def test_a_named_file_of_an_unknown_kind_is_refused(tmp_path: Path, name: str) -> None:
    assert f"{name} is of an unknown kind; give files that end in .jsonl" in refusal(write(tmp_path / name))


def test_a_folder_without_a_known_file_is_refused_with_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "b.md")
    write(tmp_path / "folder" / ".a.txt")
    assert "holds no file that ends in .jsonl" in refusal(tmp_path / "folder")
    assert "there are .md: 1, hidden: 1" in refusal(tmp_path / "folder")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "there are no files" in refusal(tmp_path)


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


def test_an_error_of_the_bucket_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def get_file_info(self, _: Any) -> Any:
            raise OSError("AWS Error ACCESS_DENIED during HeadObject\nand more")

    monkeypatch.setattr(files, "_bucket_filesystem", Refusing)
    assert "cannot read s3://b/a.jsonl: AWS Error ACCESS_DENIED during HeadObject" in refusal("s3://b/a.jsonl")
