"""What the report says, and that no snapshot breaks its page."""

import html
import json
import re
from functools import cache
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from serving.experiment.drawing import SVG, Clock, styles
from serving.experiment.latency_plots import estimates_over_time
from serving.experiment.plots import gains
from serving.experiment.report import render
from serving.experiment.words import NOTHING, between, lasted, milliseconds, percent, quality_of, standing, verdict
from tests.serving.experiment.snapshots import STARTED, snapshot

PLOTS = ("gains", "gain-over-time", "distribution", "distribution-others", "estimates", "quality", "traffic")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x_1$"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, ids and text of a page; fails where an element is left open or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@cache
def page_of(*candidates: str) -> str:
    """The report of an experiment that promoted its first candidate."""
    return render(snapshot(candidates or ("student-s",)))


def drawings(page: str) -> dict[str, ElementTree.Element]:
    """The plots by name."""
    found = re.findall(
        r'<figure class="plot" id="plot-([a-z-]+)">.*?(<svg [^>]*class="drawing".*?</svg>)\s*<figcap', page, re.S
    )
    return {name: ElementTree.fromstring(svg) for name, svg in found}


def test_the_first_lines_say_what_won_by_how_much_and_how_surely() -> None:
    given = snapshot()
    text = Page(page_of()).text
    top = text[: text.index("Each candidate against")]
    gain = given["comparisons"]["student-s"]["p50"]
    low, high = gain["interval"]
    for said in (
        "student-s won",
        "Promoted: the median is at least 5 % lower",
        "student-s against champion",
        f"{100 * gain['gain']:.1f} % lower",
        f"interval of the gain: {100 * low:.1f} % to {100 * high:.1f} %; asked for: 5 %",
        "Confidence 95 %",
        "Held KL 0.14 (0.11 to 0.175), at most 0.25 allowed",
        "errors: 0.1 %, champion's 0.1 %",
    ):
        assert said in top


@pytest.mark.parametrize(
    ("outcome", "headline", "reason"),
    [
        ("promote", "student-s won", "Promoted"),
        ("rollback", "student-s was rolled back; champion stays", "Rolled back"),
        ("no_winner", "No winner; champion stays", "Stopped without a winner after 20000"),
        ("stopped", "No winner; champion stays", "Stopped by hand."),
        (None, "Running; nothing is decided yet", "do not yet allow a decision"),
    ],
)
def test_every_outcome_has_its_headline_and_its_reason(outcome: str | None, headline: str, reason: str) -> None:
    found = verdict(snapshot(outcome=outcome))
    assert found.word == headline
    assert reason in found.note


def test_all_plots_are_there_named_described_and_show_their_arms() -> None:
    page = page_of("student-s", "student-m", "student-l")
    looks = styles("champion", ["student-s", "student-m", "student-l"])
    found = drawings(page)
    assert tuple(name for name in PLOTS if name in found) == PLOTS
    for name, svg in found.items():
        title, description = svg.find(f"{{{SVG}}}title"), svg.find(f"{{{SVG}}}desc")
        assert title is not None and title.text
        assert description is not None and description.text and "student-m" in description.text
        assert svg.get("role") == "img"
        assert svg.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        drawn = ElementTree.tostring(svg, encoding="unicode")
        for arm in ("student-s", "student-m", "student-l") if "gain" in name else looks:
            assert looks[arm].colour in drawn, f"{name} lacks {arm}"


def test_ids_are_unique_and_every_reference_has_its_id() -> None:
    page = page_of("student-s", "student-m")
    ids = [attributes["id"] for _, attributes in Page(page).tags if "id" in attributes]
    assert len(ids) > 100
    assert len(set(ids)) == len(ids)
    referred = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert referred
    assert set(referred) <= set(ids)


def test_the_page_asks_nothing_of_anyone() -> None:
    page = page_of()
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= {SVG}
    tags = Page(page).tags
    assert not {tag for tag, _ in tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "image",
        "foreignobject",
    }
    assert "@import" not in page and "@font-face" not in page
    assert all(
        str(value).startswith("#") for _, a in tags for key, value in a.items() if key in ("href", "src", "xlink:href")
    )
    policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def hostile() -> dict[str, Any]:
    """A snapshot in which every text is hostile."""
    given = snapshot([HOSTILE, "_hidden"], control=f"control {HOSTILE}", silent=["_hidden"])
    given["spec"]["name"] = given["spec"]["teacher"] = HOSTILE
    given["environment"] = {HOSTILE: HOSTILE}
    given["events"][-1] |= {"what": HOSTILE, "text": HOSTILE, "evidence": {HOSTILE: {HOSTILE: HOSTILE}}}
    given["events"].append({"at": STARTED + 700, "what": "decision", "text": HOSTILE, "evidence": {"list": [HOSTILE]}})
    return given


def test_hostile_text_is_shown_and_nothing_else() -> None:
    page = render(hostile())
    read = Page(page)
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in Page(render(snapshot(["a", "b"], silent=["b"]))).tags}
    assert not [key for _, attributes in read.tags for key in attributes if key.startswith("on")]
    assert HOSTILE in html.unescape(read.text)
    assert "<script" not in page and "<img" not in page
    # Names in a plot are its text, not formulas and not hidden ones.
    looks = styles("champion", ["$x_1$"])
    labels = ElementTree.fromstring(gains(snapshot(["$x_1$"]), looks).svg).iter(f"{{{SVG}}}text")
    assert "$x_1$" in {"".join(label.itertext()) for label in labels}


def test_characters_that_are_not_seen_do_not_reach_the_page() -> None:
    page = render(snapshot(["a\x00\x1b\u202eb\ud800"])).encode("utf-8").decode("utf-8")
    assert "a\ufffd\ufffd\ufffdb\ufffd" in page
    assert not re.search("[\x00\x1b\u202e]", page)


@pytest.mark.parametrize("metric", ["latency_ms", "first_token_ms", "per_token_ms"])
def test_any_metric_may_decide(metric: str) -> None:
    given = snapshot()
    page = (
        page_of() if given["spec"]["metric"] == metric else render(given | {"spec": given["spec"] | {"metric": metric}})
    )
    assert set(drawings(page)) == set(PLOTS)
    assert page.count('<tr class="decides"><th scope="row">median (p50)') == 1


@pytest.mark.parametrize("statistic", ["mean", "p50", "p95", "p99"])
def test_the_deciding_statistic_is_marked(statistic: str) -> None:
    looks = styles("champion", ["student-s"])
    estimates = ElementTree.fromstring(estimates_over_time(snapshot(statistic=statistic), looks).svg)
    titles = {text for text in estimates.itertext() if "(decides)" in text}
    assert [title.split()[0] for title in titles] == [{"p50": "median"}.get(statistic, statistic)]


def test_an_experiment_that_has_seen_nothing() -> None:
    page = render(snapshot(requests=0, outcome=None, quality=False, cost=False))
    text = Page(page).text
    assert drawings(page) == {}
    for said in (
        "Running; no request has come in yet",
        "Not known yet",
        "Not measured",
        "Too few answers to compare the arms.",
        "No answer has been measured yet.",
        "No quality was measured",
        "No request has come in yet.",
    ):
        assert said in text
    assert not re.search(r"\b(inf|nan|None)\b", text)


def test_a_bare_snapshot_is_enough() -> None:
    given = snapshot(requests=0, outcome=None, quality=False)
    given |= {"arms": {"champion": {}, "student-s": {}}, "comparisons": {}, "events": [], "environment": {}}
    text = Page(render(given)).text
    assert "Nothing was recorded." in text
    assert "No environment was recorded." in text


def test_an_arm_without_an_answer_is_in_the_table_and_not_in_the_curves() -> None:
    page = render(snapshot(["student-s", "student-m"], silent=["student-m"]))
    colour = styles("champion", ["student-s", "student-m"])["student-m"].colour
    found = drawings(page)
    assert colour not in ElementTree.tostring(found["distribution"], encoding="unicode")
    assert colour in ElementTree.tostring(found["traffic"], encoding="unicode")
    text = Page(page).text
    assert "40 (100 %)" in text
    assert "too few answers to say" in text
    # The other one's gain is what the first lines are about.
    assert "Gain of student-s" in text


def test_a_control_without_an_answer_leaves_nothing_to_compare() -> None:
    page = render(snapshot(silent=["champion"], outcome=None))
    assert "Too few answers to compare the arms." in page
    assert {"distribution", "estimates", "quality", "traffic"} <= set(drawings(page))


def test_unbounded_intervals_are_said_and_drawn() -> None:
    given = snapshot(outcome=None)
    given["comparisons"]["student-s"]["p50"]["interval"] = [None, 0.4]
    for entry in given["timeline"]:
        entry["comparisons"]["student-s"]["interval"] = [None, None]
        for arm in entry["arms"].values():
            arm["p99"] = [arm["p99"][0], None, None]
    for arm in given["arms"].values():
        arm["metrics"]["latency_ms"]["intervals"]["p50"] = [None, None]
        arm["metrics"]["latency_ms"]["intervals"]["p99"] = [100.0, None]
        arm["quality"]["kl_interval"] = [0.01, None]
    page = render(given)
    text = Page(page).text
    assert set(drawings(page)) == set(PLOTS)
    assert "interval of the gain: 40.0 % or less" in text
    assert "100 or more" in text
    assert not re.search(r"\b(inf|nan)\b", text, re.I)


def test_without_quality_or_cost_the_page_says_so() -> None:
    page = render(snapshot(quality=False, cost=False))
    text = Page(page).text
    assert "quality" not in drawings(page)
    assert "No quality was measured: the teacher scored none of the answers." in text
    assert "cost per million" not in text
    assert "cost per million" in Page(page_of()).text


def test_a_snapshot_without_single_times_has_no_distribution() -> None:
    given = snapshot()
    for arm in given["arms"].values():
        del arm["values"]
    page = render(given)
    assert set(drawings(page)) == set(PLOTS) - {"distribution", "distribution-others"}
    assert "The single times were not kept in this snapshot." in page


def test_a_snapshot_from_disk_gives_the_same_page() -> None:
    given = snapshot(["student-s", "student-m"])
    assert render(json.loads(json.dumps(given))) == page_of("student-s", "student-m")


def test_the_environment_and_the_whole_spec_are_there() -> None:
    text = Page(page_of()).text
    assert "engine transformers 5.17.0" in text
    assert json.loads(text[text.index("Spec {") + 5 :]) == snapshot()["spec"]


def test_the_evidence_of_a_decision_is_listed() -> None:
    text = Page(page_of()).text
    assert "outcome: promote" in text
    assert re.search(r"p50\.interval: 0\.\d+ to 0\.\d+", text)
    assert "weights.student-s: 1.5" in text


@pytest.mark.parametrize(
    ("ends", "tone", "word"),
    [
        ((0.06, 0.1), "good", "surely faster by 5"),
        ((0.05, 0.1), "good", "surely faster by 5"),
        ((0.01, 0.1), "open", "surely faster; by 5"),
        ((-0.01, 0.1), "open", "not certain yet"),
        ((-0.2, 0.04), "bad", "surely not faster by 5"),
        ((-0.2, -0.01), "bad", "surely slower than the control"),
        ((float("-inf"), float("inf")), "open", "not certain yet"),
    ],
)
def test_an_interval_is_not_read_for_more_than_it_says(ends: tuple[float, float], tone: str, word: str) -> None:
    found = standing(ends, 0.05)
    assert (found.tone, found.word[: len(word)]) == (tone, word)


@pytest.mark.parametrize(
    ("guards", "tone"),
    [
        ({"kl": 0.2}, "good"),
        ({"kl": 0.15}, "open"),
        ({"kl": 0.1}, "bad"),
        ({"agreement": 0.7}, "good"),
        ({"agreement": 0.8}, "open"),
        ({"agreement": 0.9}, "bad"),
        ({"kl": 0.2, "agreement": 0.9}, "bad"),
        ({}, "none"),
    ],
)
def test_quality_is_held_against_its_limits_with_its_interval(guards: dict[str, float], tone: str) -> None:
    given = snapshot()  # KL 0.11 to 0.175, agreement 0.76 to 0.81
    given["spec"]["guards"] = guards
    assert quality_of(given, "student-s").tone == tone


def test_figures_in_words() -> None:
    assert [percent(share).replace("\xa0", " ") for share in (0.1234, -0.05, 1.0, None)] == [
        "12.3 %",
        "-5.0 %",
        "100 %",
        NOTHING,
    ]
    assert [milliseconds(ms) for ms in (4.956, 45.67, 1234.5, None)] == ["4.96", "45.7", "1,234", NOTHING]
    assert [lasted(seconds) for seconds in (0, 59, 60, 3700, 90000)] == ["0 s", "59 s", "1 min", "1 h 1 min", "1 d 1 h"]
    assert between(float("-inf"), float("inf"), percent) == "unknown"
    assert [Clock.over(0, span).unit for span in (60, 600, 1e5, 1e6)] == ["seconds", "minutes", "hours", "days"]


def test_many_arms_still_look_different() -> None:
    looks = styles("control", [f"arm-{i}" for i in range(12)])
    assert len({(look.colour, look.dash, look.marker) for look in looks.values()}) == 13
    neighbours = list(looks.values())[:6]
    for part in ("colour", "dash", "marker", "hatch"):
        assert len({getattr(look, part) for look in neighbours}) == 6


def test_traffic_in_bars_keeps_every_request() -> None:
    given = snapshot()
    # 150 buckets of 10 s; two make a bar.
    sums = [sum(bucket["requests"].values()) for bucket in given["traffic"]]
    most = max(a + b for a, b in zip(sums[::2], sums[1::2], strict=True)) / 20
    total = sum(bucket["requests"]["student-s"] for bucket in given["traffic"])
    description = drawings(page_of())["traffic"].find(f"{{{SVG}}}desc")
    assert description is not None and f"student-s {total:,} requests" in str(description.text)
    assert str(description.text).endswith(f"at most {most:.3g} per second in all")
