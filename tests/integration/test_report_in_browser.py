"""The experiment's report in a real browser: its plots are not empty, and it asks nothing of anyone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serving.experiment.drawing import Style, styles
from serving.experiment.report import render
from tests.serving.experiment.snapshots import snapshot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

PLOTS = ("gains", "gain-over-time", "distribution", "distribution-others", "estimates", "quality", "traffic")
OWNED = "<script>document.documentElement.dataset.owned='by a name'</script>"
CANDIDATES = ("student-s", f"student-m {OWNED}", "student-l")
WIDTH = 1100
# Columns and rows of pixels that an arm's colour must reach; the markers without their curve reach fewer.
ENOUGH = 110
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Runs after the page is laid out and leaves what it measured in the document.
MEASURE = """<script>
const boxes = {};
for (const plot of document.querySelectorAll("figure.plot")) {
  const box = plot.querySelector("svg.drawing").getBoundingClientRect();
  boxes[plot.id.slice(5)] = [box.left + scrollX, box.top + scrollY, box.right + scrollX, box.bottom + scrollY];
}
const found = {boxes, height: document.documentElement.scrollHeight, wide: document.documentElement.scrollWidth};
const note = document.body.appendChild(document.createElement("pre"));
note.id = "measured";
note.textContent = JSON.stringify(found);
</script>"""


@dataclass(frozen=True)
class Browser:
    """Chromium without a window, with a profile of its own and no name that it could resolve."""

    home: Path

    def __call__(self, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
        assert CHROMIUM
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={self.home}", "--enable-logging=stderr"]
        command += ["--force-device-scale-factor=1", *options, page.as_uri()]
        environment = os.environ | {"HOME": str(self.home), "LANGUAGE": "en"}
        return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=True)

    def measure(self, page: Path) -> dict[str, Any]:
        """Where the plots lie, and the document with what scripts have made of it; the page's policy is taken off."""
        copy = page.with_name(f"measured-{page.name}")
        text, removed = POLICY.subn("", page.read_text("utf-8"))
        assert removed == 1
        copy.write_text(text.replace("</body>", MEASURE + "</body>"), "utf-8")
        document = self(copy, f"--window-size={WIDTH},1000", "--dump-dom").stdout
        found = re.search(r'<pre id="measured">(.*?)</pre>', document)
        assert found, document[-2000:]
        return {**json.loads(found[1]), "document": document}

    def see(self, page: Path, height: int) -> tuple[np.ndarray, list[str], list[str]]:
        """The page as it is: its pixels, what the console said, and the addresses that were asked for."""
        picture, log = page.with_suffix(".png"), page.with_suffix(".net.json")
        size = f"--window-size={WIDTH},{height}"
        done = self(page, size, f"--screenshot={picture}", f"--log-net-log={log}")
        return np.asarray(Image.open(picture).convert("RGB")).astype(int), consoled(done.stderr), asked_for(log)


def consoled(log: str) -> list[str]:
    return [line for line in log.splitlines() if ":CONSOLE" in line]


def asked_for(log: Path) -> list[str]:
    """The addresses that the page wanted from the network; what the browser wants for itself has no origin."""
    requests = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    urls = {request["url"] for request in requests if request.get("initiator", "not an origin") != "not an origin"}
    return sorted(url for url in urls if re.match(r"(https?|wss?|ftp):", url))


def empty_plots(pixels: np.ndarray, boxes: Mapping[str, list[float]], looks: Mapping[str, Style]) -> set[str]:
    """The plots in which an arm that must be there has drawn nothing."""
    empty = set()
    for name in PLOTS:
        left, top, right, bottom = (round(edge) for edge in boxes.get(name, (0, 0, 0, 0)))
        inside = pixels[top:bottom, left:right]
        for arm, style in looks.items():
            if "gain" in name and arm == "champion":
                continue
            colour = np.array([int(style.colour[i : i + 2], 16) for i in (1, 3, 5)])
            drawn = np.abs(inside - colour).max(axis=-1, initial=0) < 16
            if drawn.any(axis=0).sum() + drawn.any(axis=1).sum() < ENOUGH:
                empty.add(name)
    return empty


def without_its_data(svg: str, looks: Mapping[str, Style]) -> str:
    """A plot with its axes and without anything in an arm's colour."""
    for style in looks.values():
        svg = svg.replace(style.colour, "none")
    return svg


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("chromium"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(snapshot(CANDIDATES)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def looks() -> dict[str, Style]:
    return styles("champion", CANDIDATES)


@pytest.fixture(scope="module")
def measured(browser: Browser, page: Path) -> dict[str, Any]:
    return browser.measure(page)


def test_every_plot_shows_every_arm_in_silence(
    browser: Browser, page: Path, measured: dict[str, Any], looks: dict[str, Style]
) -> None:
    pixels, console, asked = browser.see(page, measured["height"])
    assert set(measured["boxes"]) == set(PLOTS)
    assert all(box[2] - box[0] > 700 and box[3] - box[1] > 60 for box in measured["boxes"].values())
    assert empty_plots(pixels, measured["boxes"], looks) == set()
    assert console == []
    assert asked == []
    # It fits the window, and no name in it has become a script, even without the page's policy.
    assert measured["wide"] <= WIDTH
    assert "data-owned" not in measured["document"].split(">")[1]
    assert measured["document"].count("<script>") == 1


@pytest.mark.parametrize("half", [0, 1])
def test_a_blank_plot_is_noticed(
    browser: Browser, page: Path, measured: dict[str, Any], looks: dict[str, Style], half: int
) -> None:
    """Every second plot loses its data and keeps its axes, and exactly these are found."""
    text, blanked = page.read_text("utf-8"), set(PLOTS[half::2])
    for name in blanked:
        start = text.index('<figure class="plot" id="plot-' + name)
        end = text.index("<figcaption>", start)
        text = text[:start] + without_its_data(text[start:end], looks) + text[end:]
    copy = page.with_name(f"blank-{half}.html")
    copy.write_text(text, "utf-8")
    pixels, _, _ = browser.see(copy, measured["height"])
    assert empty_plots(pixels, measured["boxes"], looks) == blanked


def test_a_script_an_error_and_a_request_would_be_noticed(browser: Browser, page: Path) -> None:
    """The page's own policy stops what gets into it; without the policy this test sees all of it."""
    image = '<img src="http://stillhouse.invalid/seen.png">'
    guest = f"{image}{OWNED}<script>console.error('heard')</script></body>"
    guarded, open_ = page.with_name("guarded.html"), page.with_name("open.html")
    guarded.write_text(page.read_text("utf-8").replace("</body>", guest), "utf-8")
    open_.write_text(POLICY.sub("", guarded.read_text("utf-8")), "utf-8")
    _, console, asked = browser.see(guarded, 1000)
    assert len([line for line in console if "Content Security Policy" in line]) == 3
    assert not any("heard" in line for line in console)
    assert asked == []
    _, console, asked = browser.see(open_, 1000)
    assert any("heard" in line for line in console)
    assert asked == ["http://stillhouse.invalid/seen.png"]
