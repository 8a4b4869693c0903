"""Reading arms from the command line, and drawing one by weight."""

from pathlib import Path

import pytest

from cluster.errors import UserError
from serving.arms import Arm, check_weights, locate, parse_arm, parse_arms, pick


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("models:/demo-small@champion", Arm("demo-small", "models:/demo-small@champion", 1)),
        ("models:/demo-small@champion:50", Arm("demo-small", "models:/demo-small@champion", 50)),
        ("models:/demo-small/3", Arm("demo-small", "models:/demo-small/3", 1)),
        ("models:/demo-small/3:0.5", Arm("demo-small", "models:/demo-small/3", 0.5)),
        ("big=models:/demo-large@challenger:0", Arm("big", "models:/demo-large@challenger", 0)),
        ("./out/teacher", Arm("teacher", "./out/teacher", 1)),
        ("/out/teacher/:7", Arm("teacher", "/out/teacher/", 7)),
        ("t=/out/teacher:7", Arm("t", "/out/teacher", 7)),
        ("/sweep/lr=3/model", Arm("model", "/sweep/lr=3/model", 1)),
        ("2026", Arm("2026", "2026", 1)),
        ("x=run:50:2", Arm("x", "run:50", 2)),
    ],
)
def test_an_arm_is_read(text: str, arm: Arm) -> None:
    assert parse_arm(text) == arm


def test_the_directory_s_name_is_taken_also_of_a_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    monkeypatch.chdir(tmp_path / "student")
    assert parse_arm(".").name == "student"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no source"),
        ("a=", "has no source"),
        (":5", "has no source"),
        ("models:/demo-small", "not a model version"),
        ("models:/demo-small@", "not a model version"),
        ("models:/demo-small/latest", "not a model version"),
        ("models:/demo-small@champion:lots", "not a model version"),
        ("models:/demo-small@champion:-1", "has weight -1"),
        ("models:/demo-small@champion:nan", "has weight nan"),
        ("models:/demo-small@champion:inf", "has weight inf"),
        ("models:/mein modell@champion", "would be named 'mein modell'"),
        ("a b=models:/x@champion", "would be named 'a b'"),
        ("=models:/x@champion", "would be named ''"),
        ("/", "would be named ''"),
        ("run:50:2", "would be named 'run:50'"),
    ],
)
def test_what_is_no_arm_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse_arm(text)
    assert "\n" not in str(caught.value)
    assert "allowed" in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "no arm given"),
        (["models:/m@champion", "models:/m@challenger"], "2 arms are named 'm'"),
        (["a=models:/m@champion:0", "b=models:/m@challenger:0"], "all weights are 0"),
    ],
)
def test_arms_that_cannot_stand_together(texts: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_arms(texts)


def test_arms_keep_their_order() -> None:
    assert [arm.name for arm in parse_arms(["z=a:0", "y=b", "x=c:2"])] == ["z", "y", "x"]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_mean_nothing(weight: float) -> None:
    with pytest.raises(UserError, match="finite number, 0 or more"):
        check_weights({"a": 1, "b": weight})


def test_a_draw_follows_the_weights_exactly() -> None:
    """Over equally spaced points each arm gets its share to the point, and one of weight 0 nothing."""
    weights = {"none": 0.0, "one": 1.0, "three": 3.0, "never": 0}
    drawn = [pick(weights, (i + 0.5) / 400) for i in range(400)]
    assert {name: drawn.count(name) for name in weights} == {"none": 0, "one": 100, "three": 300, "never": 0}


def test_a_draw_at_the_edges() -> None:
    assert pick({"zero": 0, "a": 1, "b": 1}, 0.0) == "a"
    assert pick({"a": 0.1, "b": 0.2, "c": 0.3, "zero": 0}, 1 - 2**-53) == "c"


def test_a_registered_arm_needs_a_registry() -> None:
    with pytest.raises(UserError, match="give its tracking URI"):
        locate(Arm("a", "models:/a@champion"))


def test_a_directory_is_looked_into(tmp_path: Path) -> None:
    arm = Arm("a", str(tmp_path / "model"))
    with pytest.raises(UserError, match="there is no directory"):
        locate(arm)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"no config.json and no \*.safetensors and no tokenizer"):
        locate(arm)
    for name in ("config.json", "model.bin", "tokenizer.json"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(UserError, match=r"has no \*.safetensors;"):
        locate(arm)
    (tmp_path / "model" / "model-00001-of-00002.safetensors").touch()
    assert locate(arm) == tmp_path / "model"
