"""The rules and boards by themselves: valid, tested, and each alert with a page that says what to do."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.local.parts import RULES as LOADED
from infra.monitoring.boards import BOARDS, FOLDER, text

MONITORING = FOLDER.parent
TESTS = sorted(MONITORING.glob("*_test.yaml"))
RULES = [path.with_name(path.name.replace("_test", "")) for path in TESTS]


def alerts_of(rules: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


ALERTS = [alert for rules in RULES for alert in alerts_of(rules)]


def test_every_file_of_rules_has_tests() -> None:
    assert set(MONITORING.glob("*.yaml")) == {*TESTS, *RULES}


@pytest.mark.parametrize("rules", RULES, ids=lambda path: str(path.stem))
def test_promtool_is_content(rules: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    for command in (["check", "rules", rules.name], ["test", "rules", f"{rules.stem}_test.yaml"]):
        done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("rules", "tests"), list(zip(RULES, TESTS, strict=True)), ids=lambda path: str(path.stem))
def test_every_alert_is_seen_to_fire_and_to_be_silent(rules: Path, tests: Path) -> None:
    cases = [case for test in yaml.safe_load(tests.read_text())["tests"] for case in test["alert_rule_test"]]
    for fires in (True, False):
        seen = {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires}
        assert seen == {alert["alert"] for alert in alerts_of(rules)}


def test_an_endpoint_of_this_machine_may_be_ended_by_hand_and_one_of_a_platform_may_not() -> None:
    by_hand, permanent = (MONITORING / f"endpoint_{kind}.yaml" for kind in ("by_hand", "permanent"))
    assert [MONITORING / "rules.yaml", by_hand] == LOADED
    # They stand in each other's place: both at once would page twice.
    assert [alert["alert"] for alert in alerts_of(by_hand)] == [alert["alert"] for alert in alerts_of(permanent)]
    assert "EndpointDown" not in {alert["alert"] for alert in alerts_of(MONITORING / "rules.yaml")}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_every_alert_has_a_page_that_says_what_to_do(alert: dict[str, Any]) -> None:
    file, anchor = alert["annotations"]["runbook_url"].split("#")
    sections = re.findall(r"^## (.+)$", (MONITORING.parents[1] / file).read_text(), re.MULTILINE)
    assert anchor == alert["alert"].lower()
    assert alert["alert"] in sections
    assert alert["labels"]["severity"] in ("page", "ticket")


def test_the_boards_are_those_that_are_written_down() -> None:
    files = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert files == {f"{board.uid.removeprefix('stillhouse-')}.json": text(board) for board in BOARDS}


def test_no_two_panels_of_a_board_lie_on_each_other() -> None:
    for path in FOLDER.glob("*.json"):
        places = [panel["gridPos"] for panel in json.loads(path.read_text())["panels"]]
        assert len({(place["x"], place["y"]) for place in places}) == len(places)
        assert all(place["x"] + place["w"] <= 24 for place in places)
