"""An experiment's snapshot in words: what was compared, what came of it, how sure that is, whether quality held."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from serving.experiment.drawing import interval, number

METRICS = {
    "latency_ms": "time to the whole answer",
    "first_token_ms": "time to the first token",
    "per_token_ms": "time per output token",
}
STATISTICS = {"mean": "mean", "p50": "median (p50)", "p95": "p95", "p99": "p99"}
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Said:
    """One finding. ``tone`` is good, bad, open or none: what the page's colour and sign follow."""

    tone: str
    word: str
    note: str = ""


@dataclass(frozen=True)
class CandidateRow:
    """How one candidate stands against the control, in words."""

    arm: str
    state: str
    gain: str
    interval: str
    standing: Said
    quality: Said
    errors: Said


def short(text: str, most: int = 28) -> str:
    """A name that fits into a plot."""
    return text if len(text) <= most else text[: most - 1] + "…"


def percent(share: Any) -> str:
    """A measured share in percent, to a tenth."""
    value = number(share)
    return NOTHING if math.isnan(value) else f"{100 * value:.{1 if abs(value) < 0.9995 else 0}f}\N{NO-BREAK SPACE}%"


def declared(share: Any) -> str:
    """A share that somebody set, in percent and as exact as it was set."""
    return f"{100 * number(share):.6g}\N{NO-BREAK SPACE}%"


def milliseconds(value: Any) -> str:
    """Milliseconds to three digits or to whole ones, without the unit."""
    found = number(value)
    if math.isnan(found):
        return NOTHING
    return f"{found:,.{2 if abs(found) < 10 else 1 if abs(found) < 100 else 0}f}"


def plain(value: Any) -> str:
    """A figure to three digits."""
    found = number(value)
    return NOTHING if math.isnan(found) else f"{found:.3g}" if abs(found) < 1000 else f"{found:,.0f}"


def count(value: Any) -> str:
    """A whole number with thousands marked."""
    found = number(value)
    return NOTHING if math.isnan(found) else f"{found:,.0f}"


def between(low: float, high: float, say: Callable[[Any], str]) -> str:
    """An interval in words; an end at infinity is no end."""
    if math.isinf(low) and math.isinf(high):
        return "unknown"
    if math.isinf(high):
        return f"{say(low)} or more"
    if math.isinf(low):
        return f"{say(high)} or less"
    return f"{say(low)} to {say(high)}"


def around(found: Mapping[str, Any], estimate: str, ends: str, say: Callable[[Any], str]) -> str:
    """The interval that goes with an estimate, in words; empty where there is no estimate or no interval."""
    low, high = interval(found.get(ends))
    if math.isnan(number(found.get(estimate))) or (math.isinf(low) and math.isinf(high)):
        return ""
    return between(low, high, say)


def moment(at: Any) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    seconds = number(at)
    return NOTHING if math.isnan(seconds) else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def lasted(seconds: float) -> str:
    """A duration in its two largest units."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (amount, _) in enumerate(parts) if amount), 3)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2] if amount) or "0 s"


def gain_of(snapshot: Mapping[str, Any], arm: str) -> tuple[float, tuple[float, float]]:
    """A candidate's gain in the deciding statistic, and its interval."""
    compared = (snapshot["comparisons"].get(arm) or {}).get(snapshot["spec"]["statistic"]) or {}
    return number(compared.get("gain")), interval(compared.get("interval"))


def standing(ends: tuple[float, float], asked: float) -> Said:
    """What an interval of the gain allows to say, and no more."""
    low, high = ends
    if low >= asked:
        return Said("good", f"surely faster by {declared(asked)} or more")
    if high < 0:
        return Said("bad", "surely slower than the control")
    if high < asked:
        return Said("bad", f"surely not faster by {declared(asked)}")
    if low > 0:
        return Said("open", f"surely faster; by {declared(asked)} is not certain")
    return Said("open", "not certain yet")


def quality_of(snapshot: Mapping[str, Any], arm: str) -> Said:
    """Whether an arm's answers stay within the declared distance to the teacher."""
    found = (snapshot["arms"].get(arm) or {}).get("quality")
    if not found:
        return Said("none", "Not measured", "the teacher scored none of its answers")
    guards = snapshot["spec"].get("guards") or {}
    tones, notes = [], []
    for name, said, sign in (("kl", "KL", 1), ("agreement", "agreement", -1)):
        limit, (low, high) = number(guards.get(name)), interval(found.get(f"{name}_interval"))
        say, limited = (plain, plain) if name == "kl" else (percent, declared)
        if not math.isnan(number(found.get(name))):
            notes.append(f"{said} {say(found[name])} ({between(low, high, say)})")
        if math.isnan(limit):
            continue
        notes[-1:] = [f"{notes[-1] if notes else said}, at {'most' if sign > 0 else 'least'} {limited(limit)} allowed"]
        best, worst = (low, high) if sign > 0 else (-high, -low)
        tones.append("bad" if best > sign * limit else "good" if worst <= sign * limit else "open")
    if not tones:
        return Said("none", "Measured, no limit set", "; ".join(notes))
    tone = next(tone for tone in ("bad", "open", "good") if tone in tones)
    word = {"bad": "Limit broken", "open": "Not certain yet", "good": "Held"}[tone]
    return Said(tone, word, "; ".join(notes))


def error_rates(snapshot: Mapping[str, Any], arm: str) -> str:
    """A candidate's share of errors beside the control's."""
    control = snapshot["spec"]["control"]
    own, other = ((snapshot["arms"].get(name) or {}).get("error_rate") or {} for name in (arm, control))
    return f"{percent(own.get('estimate'))}, {control}'s {percent(other.get('estimate'))}"


def candidate_rows(snapshot: Mapping[str, Any]) -> list[CandidateRow]:
    """All candidates, in the spec's order."""
    spec, rows = snapshot["spec"], []
    states = {"winner": "promoted", "rolled_back": "rolled back"}
    for arm in spec["candidates"]:
        gain, ends = gain_of(snapshot, arm)
        of_arm = snapshot["arms"].get(arm) or {}
        state = states.get(of_arm.get("state", ""), "not promoted" if snapshot.get("ended") else "running")
        errors = of_arm.get("error_rate") or {}
        rows.append(
            CandidateRow(
                arm,
                state,
                percent(gain),
                between(*ends, percent),
                Said("open", "too few answers to say") if math.isnan(gain) else standing(ends, spec["gain"]),
                quality_of(snapshot, arm),
                Said("none", percent(errors.get("estimate")), around(errors, "estimate", "interval", percent)),
            )
        )
    return rows


def in_focus(snapshot: Mapping[str, Any]) -> str:
    """The candidate that the page's first lines are about: the winner, or else the one with the greatest gain."""
    candidates = snapshot["spec"]["candidates"]
    states = {arm: (snapshot["arms"].get(arm) or {}).get("state") for arm in candidates}
    if winner := next((arm for arm in candidates if states[arm] == "winner"), None):
        return str(winner)
    left = [arm for arm in candidates if states[arm] != "rolled_back"] or candidates

    def rank(arm: str) -> float:
        gain = gain_of(snapshot, arm)[0]
        return -math.inf if math.isnan(gain) else gain

    return str(max(left, key=rank))


def verdict(snapshot: Mapping[str, Any]) -> Said:
    """The page's headline: which arm won, or why nothing was decided."""
    spec = snapshot["spec"]
    arms, candidates = snapshot["arms"], spec["candidates"]
    states = {arm: (arms.get(arm) or {}).get("state") for arm in candidates}
    gone = [arm for arm in candidates if states[arm] == "rolled_back"]
    reason = last_decision(snapshot)
    if winner := next((arm for arm in candidates if states[arm] == "winner"), None):
        return Said("good", f"{winner} won", reason)
    if len(gone) == len(candidates):
        were = f"{gone[0]} was" if len(gone) == 1 else "All candidates were"
        return Said("bad", f"{were} rolled back; {spec['control']} stays", reason)
    left = f"{' and '.join(gone)} {'was' if len(gone) == 1 else 'were'} taken out before. " if gone else ""
    if snapshot.get("ended"):
        reason = reason or "The experiment ended without a decision."
        return Said("none", f"No winner; {spec['control']} stays", f"{left}{reason}")
    if not sum(number(arm.get("requests")) for arm in arms.values()):
        return Said("open", "Running; no request has come in yet")
    reason = f"{left}The rules of the experiment do not yet allow a decision. The figures below are as they stand."
    return Said("open", "Running; nothing is decided yet", reason)


def last_decision(snapshot: Mapping[str, Any]) -> str:
    """The reason of the last decision, as it was recorded."""
    texts = [str(event.get("text", "")) for event in snapshot["events"] if event.get("what") == "decision"]
    return texts[-1] if texts else ""
