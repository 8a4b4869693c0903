"""What a webhook is told, how it can trust it, and that it never costs more than a line."""

from __future__ import annotations

import logging
import math
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import tenacity
import yaml

from cluster.corpus.batches import CorpusFacts
from cluster.errors import RunError, UserError
from cluster.evaluate.figures import Fidelity, StudentResult
from cluster.evaluate.result import FamilyResult
from cluster.preflight import Checked, preflight
from cluster.registry import shown
from cluster.runs import Run, open_run
from cluster.spec import FamilySpec, NotifySpec
from jobs import notify as notifying
from jobs import run as running
from jobs.notify import Facts, facts_of, notify
from tests.integration.seaweed import free_port
from tests.jobs.hooks import receiver
from tests.tiny import tiny_family

SECRET = "a-secret-that-nobody-sees"
FACTS = Facts("tiny", "tiny-20261124-020000", "2026-11-24", "succeeded", [], None, [], "http://mlflow:5000")


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    monkeypatch.setattr(notifying, "LONGEST_WAIT_S", 0.05)


def to(url: str, **fields: Any) -> NotifySpec:
    return NotifySpec.model_validate({"webhook": url, **fields})


def test_what_is_sent_is_signed_dated_and_numbered() -> None:
    with receiver() as hook:
        for event in ("succeeded", "promoted"):
            assert notify(to(hook.url, secret_env="HOOK_SECRET"), event, FACTS) is None
    assert [told["event"] for told in hook.told()] == ["succeeded", "promoted"]
    assert hook.signed_by(SECRET, 0) and hook.signed_by(SECRET, 1) and not hook.signed_by("another")
    first, second = hook.headers
    assert abs(int(first["X-Stillhouse-Timestamp"]) - time.time()) < 60
    assert first["X-Stillhouse-Delivery"] != second["X-Stillhouse-Delivery"]
    assert first["Content-Type"] == "application/json"
    assert not [value for value in first.values() if SECRET in value]
    assert SECRET.encode() not in hook.bodies[0]


def test_a_changed_body_or_time_does_not_verify() -> None:
    with receiver() as hook:
        notify(to(hook.url, secret_env="HOOK_SECRET"), "succeeded", FACTS)
    body = hook.bodies[0]
    hook.bodies[0] = body.replace(b"tiny", b"tidy")
    assert not hook.signed_by(SECRET)
    hook.bodies[0] = body
    hook.headers[0]["X-Stillhouse-Timestamp"] = str(int(hook.headers[0]["X-Stillhouse-Timestamp"]) + 1)
    assert not hook.signed_by(SECRET)


def test_without_a_secret_nothing_is_signed() -> None:
    with receiver() as hook:
        notify(to(hook.url), "succeeded", FACTS)
    assert "X-Stillhouse-Signature" not in hook.headers[0]


def test_only_the_events_that_are_wanted_are_sent() -> None:
    with receiver() as hook:
        for event in ("succeeded", "failed", "stopped", "promoted"):
            assert notify(to(hook.url, events=["failed", "stopped"]), event, FACTS) is None
            assert notify(None, event, FACTS) is None
        notify(to(hook.url), "stopped", FACTS)  # not among the default ones
    assert [told["event"] for told in hook.told()] == ["failed", "stopped"]


@pytest.mark.parametrize("busy", [503, 429, 500])
def test_a_busy_receiver_is_told_again_under_one_number(busy: int) -> None:
    with receiver(busy, busy, 200) as hook:
        assert notify(to(hook.url, secret_env="HOOK_SECRET"), "failed", FACTS) is None
    assert len(hook.bodies) == 3 and len(set(hook.bodies)) == 1
    assert len({headers["X-Stillhouse-Delivery"] for headers in hook.headers}) == 1
    assert hook.signed_by(SECRET, 2)


@pytest.mark.parametrize(("status", "says"), [(400, "answered 400"), (404, "answered 404"), (308, "redirects are not")])
def test_a_receiver_that_refuses_is_told_once(status: int, says: str) -> None:
    with receiver(status) as hook:
        line = notify(to(hook.url), "failed", FACTS)
    assert line is not None and says in line
    assert len(hook.bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_to_another_place(status: int) -> None:
    with receiver() as elsewhere, receiver(status, location=elsewhere.url) as hook:
        line = notify(to(hook.url), "failed", FACTS)
    assert line is not None and f"it answered {status}; redirects are not followed" in line
    assert elsewhere.bodies == []


def test_a_receiver_that_stays_busy_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notifying, "PATIENCE_S", notifying.CONNECT_S + notifying.READ_S + 0.5)
    started = time.monotonic()
    with receiver(503) as hook, caplog.at_level(logging.WARNING):
        line = notify(to(hook.url, secret_env="HOOK_SECRET"), "failed", FACTS)
    assert 0.3 < time.monotonic() - started < 5
    told = f"was not told of 'failed': it answered 503, after {len(hook.bodies)} tries"
    assert line == f"warning: the webhook at 127.0.0.1 {told}"
    assert len(hook.bodies) > 1
    assert line in caplog.text


def test_a_receiver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifying, "READ_S", 0.3)
    started = time.monotonic()
    with receiver() as hook:
        hook.hold.clear()
        line = notify(to(hook.url), "failed", FACTS)
    assert time.monotonic() - started < 5
    assert line is not None and "no answer within 0.3 s" in line
    # It may have been told all the same.
    assert len(hook.bodies) == 1


def test_nobody_there_is_tried_again_until_somebody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifying, "PATIENCE_S", notifying.CONNECT_S + notifying.READ_S + 0.3)
    line = notify(to(f"http://127.0.0.1:{free_port()}/hooks/path-token"), "failed", FACTS)
    assert line is not None
    assert re.search(r"not told of 'failed': no connection, after \d+ tries$", line)


def test_all_tries_together_take_about_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tenacity.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(notifying, "LONGEST_WAIT_S", 10.0)
    starts: list[float] = []

    def busy(*_: Any) -> None:
        starts.append(now[0])
        now[0] += 14.0
        raise notifying._NotToldError("it answered 503", may_pass=True)

    monkeypatch.setattr(notifying, "_post", busy)
    for event, most in (("failed", 60.0), ("stopped", 20.0)):
        starts.clear()
        now[0] = 0.0
        assert notify(to("http://127.0.0.1:1", events=[event]), event, FACTS) is not None  # type: ignore[arg-type]
        assert len(starts) > (event == "failed") and starts[-1] + notifying.CONNECT_S + notifying.READ_S <= most


def test_no_secret_and_no_path_is_ever_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notifying, "PATIENCE_S", notifying.CONNECT_S + notifying.READ_S + 0.2)
    lines = []
    with receiver(503) as busy, receiver(400) as refusing, caplog.at_level(logging.INFO):
        gone = f"http://127.0.0.1:{free_port()}/hooks/path-token"
        for url in (busy.url, refusing.url, gone, "https://127.0.0.1:1/hooks/path-token", "https://a..b/path-token"):
            lines.append(notify(to(url, secret_env="HOOK_SECRET"), "failed", FACTS))
    assert all(lines)
    shown_anywhere = "\n".join([*map(str, lines), caplog.text, *capfd.readouterr()])
    assert SECRET not in shown_anywhere and "path-token" not in shown_anywhere


def test_a_receiver_without_tls_is_told_nothing_over_https() -> None:
    with receiver() as hook:
        line = notify(to(hook.url.replace("http://", "https://")), "failed", FACTS)
    assert line is not None and line.endswith("no TLS connection that can be trusted")
    assert hook.bodies == []


def test_a_bundle_of_certificates_that_is_missing_costs_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/where.pem")
    line = notify(to("https://hooks.invalid/x"), "failed", FACTS)
    assert line is not None and "hooks.invalid was not told of 'failed': OSError" in line


@pytest.fixture
def checked(tiny_teacher: Path, tiny_corpus: Path, stillhouse_home: Path) -> Checked:
    tree = tiny_family(tiny_teacher, tiny_corpus, tracking={"uri": "http://me:pass@mlflow:5000"})
    tree["students"]["large"] = {"init": {"source": "teacher", "layers": 3}}
    return preflight(FamilySpec.model_validate(tree))


def result_of(run: Run, kl: float) -> FamilyResult:
    before, after = (Fidelity(each, 0.5, 9.0, 8.0, 0.1, 0.1, 100) for each in (2.0, kl))
    small = StudentResult("small", "/model", 1000, before, after, 10, 1.0)
    return FamilyResult(run, CorpusFacts(1, 1, 1, "0"), None, {"small": small}, {}, [], 1.0)  # type: ignore[arg-type]


def test_the_facts_of_a_run_are_what_its_figures_say_and_hold_no_credentials(checked: Checked) -> None:
    run = open_run(checked.spec, resume=False)
    run.versions = {"small": 3}
    with receiver() as hook:
        facts = facts_of(checked, run, "succeeded", result_of(run, 0.25), verdicts=["small: promoted, KL 0.25 < 0.3"])
        assert notify(to(hook.url), "promoted", facts) is None
    (told,) = hook.told()
    assert datetime.fromisoformat(told.pop("time")).utcoffset() == datetime.now(UTC).utcoffset()
    figures = {"kl_before": 2.0, "kl": 0.25, "agreement": 0.5, "perplexity": 9.0}
    assert told == {
        "event": "promoted",
        "family": "tiny",
        "run": run.name,
        "ds": run.ds,
        "status": "succeeded",
        "students": [{"name": "small", "model": "tiny-small", "version": 3, **figures}],
        "error": None,
        "verdicts": ["small: promoted, KL 0.25 < 0.3"],
        "mlflow": "http://mlflow:5000",
    }


def test_a_figure_that_is_no_number_is_null(checked: Checked) -> None:
    run = open_run(checked.spec, resume=False)
    with receiver() as hook:
        assert notify(to(hook.url), "succeeded", facts_of(checked, run, "succeeded", result_of(run, math.nan))) is None
    assert b"NaN" not in hook.bodies[0]
    assert hook.told()[0]["students"][0]["kl"] is None


def test_a_run_that_broke_off_names_those_it_had_registered_and_why_in_one_line(checked: Checked) -> None:
    run = replace(open_run(checked.spec, resume=False), versions={"large": 2})
    facts = facts_of(checked, run, "failed", error="API request to http://me:pass@mlflow:5000/api\nfailed")
    assert facts.error == "API request to http://mlflow:5000/api failed"
    (large,) = facts.students
    assert (large["model"], large["version"], large["kl"]) == ("tiny-large", 2, None)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("https://me:p/w@mlflow", "https://mlflow"),
        ("postgresql://host/db?user=me&password=pw", "postgresql://host/db"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
    ],
)
def test_a_tracking_uri_is_shown_without_a_password(uri: str, said: str) -> None:
    assert shown(uri) == said


@pytest.fixture
def family(tmp_path: Path, tiny_teacher: Path, tiny_corpus: Path, stillhouse_home: Path) -> Iterator[Path]:
    """A family's file, whose webhook is still to be given; the handler of signals is put back."""
    path = tmp_path / "family.yaml"
    path.write_text(yaml.safe_dump(tiny_family(tiny_teacher, tiny_corpus)))
    before = signal.getsignal(signal.SIGTERM)
    yield path
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("end", "started", "raised", "told"),
    [
        (RunError("the teacher is lost"), True, RunError, ("failed", "the teacher is lost")),
        (ZeroDivisionError("by zero"), True, RunError, ("failed", "the run broke off: ZeroDivisionError: by zero")),
        (UserError("too little text"), False, UserError, None),
        (KeyboardInterrupt(), True, KeyboardInterrupt, ("stopped", None)),
        (KeyboardInterrupt(), False, KeyboardInterrupt, None),
    ],
    ids=repr,
)
def test_how_a_run_ended_is_told_unless_nothing_had_started(
    family: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: BaseException,
    started: bool,
    raised: type[BaseException],
    told: tuple[str, str | None] | None,
) -> None:
    def run(checked: Checked, run: Run, console: Any, named: Any) -> Any:
        run.mlflow = {"": "a1"} if started else {}
        raise end

    monkeypatch.setattr(running, "_run", run)
    with receiver() as hook, pytest.raises(raised):
        events = "notify.events=[succeeded, failed, stopped, promoted]"
        running.run(family, [f"notify.webhook={hook.url}", events], resume=False)
    found = [(each["event"], each["error"]) for each in hook.told()]
    if told is None:
        assert found == []
    else:
        ((event, error),) = found
        assert event == told[0]
        assert error is None if told[1] is None else error.startswith(told[1])


def test_a_webhook_that_fails_leaves_the_run_s_own_end(
    family: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stillhouse_home: Path
) -> None:
    def run(*_: Any) -> Any:
        raise RunError("the teacher is lost")

    monkeypatch.setattr(running, "_run", run)
    with receiver(404) as hook, pytest.raises(RunError, match="the teacher is lost"):
        running.run(family, [f"notify.webhook={hook.url}", "notify.secret_env=HOOK_SECRET"], resume=False)
    assert "warning: the webhook at 127.0.0.1 was not told of 'failed': it answered 404" in capfd.readouterr().out
    kept = "".join(path.read_text() for path in stillhouse_home.rglob("*") if path.is_file())
    assert "HOOK_SECRET" in kept and SECRET not in kept


def test_a_secret_that_is_not_set_is_a_mistake_before_anything_starts(
    family: Path, monkeypatch: pytest.MonkeyPatch, stillhouse_home: Path
) -> None:
    hook = "notify={webhook: https://hooks.example.org/x, secret_env: HOOK_SECRET}"
    for value in (None, ""):
        monkeypatch.delenv("HOOK_SECRET", raising=False)
        if value is not None:
            monkeypatch.setenv("HOOK_SECRET", value)
        with pytest.raises(UserError, match=r"notify.secret_env: HOOK_SECRET is not set here; .*--env HOOK_SECRET"):
            running.run(family, [hook], resume=False)
    assert not stillhouse_home.exists()
