"""The rules and boards by themselves: valid, tested, and each alert with a page that says what to do."""

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from infra.monitoring.boards import BOARDS, FOLDER, text

MONITORING = FOLDER.parent
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]


@pytest.mark.parametrize("command", [["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]])
def test_promtool_is_content(command: list[str]) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((MONITORING / "rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in ALERTS}


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
