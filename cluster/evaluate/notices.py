"""Notices on the held-out figures: before a start what they cannot tell, at the end what went wrong."""

from __future__ import annotations

import math
from statistics import NormalDist

from cluster.evaluate.gate import learnt
from cluster.evaluate.interval import POWER
from cluster.evaluate.result import FamilyResult
from cluster.spec import FamilySpec

# Per margin: the standard deviation per token, correlation within documents included, of the difference between two
# students of about the same quality (of the KL as a share of it, of the perplexity's logarithm, of the agreement); and
# the difference that stands for a margin of 0, for no text is enough to tell a student from its equal. The first are
# rounded means of what 15M-parameter students showed on stories, school mathematics and documentation: 1.3 to 1.7, 0.9
# to 3.3, 0.4 to 0.7.
EVIDENCE = (
    ("kl", 1.4, 0.02, "a KL 2 % lower"),
    ("perplexity", 2.0, 0.02, "a perplexity 2 % lower"),
    ("agreement", 0.55, 0.01, "an agreement 1 % higher"),
)


def before_start(spec: FamilySpec) -> list[str]:
    """A line where the held-out text is probably too small for the margins of the promotion."""
    if spec.promotion is None or spec.promotion.confidence == 0.5:
        return []
    batch = spec.corpus.batch_sequences * (spec.corpus.sequence_length - 1)
    have = spec.evaluation.batches * batch
    quantiles = NormalDist().inv_cdf(spec.promotion.confidence) + NormalDist().inv_cdf(POWER)
    missed = {}
    for name, spread, least, difference in EVIDENCE:
        margin = getattr(spec.promotion, name)
        needed = (quantiles * spread / (margin or least)) ** 2
        if needed > have:
            missed[f"promotion.{name} {margin:g}" if margin else difference] = needed
    if not missed:
        return []
    shown = ", ".join(f"{what} takes about {float(f'{needed:.2g}'):,.0f}" for what, needed in missed.items())
    batches = math.ceil(max(missed.values()) / batch)
    # Not "promotion: ", which is how a verdict begins that is read out of a job's log.
    return [
        f"evaluation: at most {have:,} held-out tokens are measured, too few to tell from noise: {shown}; a student "
        f"that is too close to call stays challenger. Raise evaluation.batches to {batches:,} and corpus.held_out with "
        f"it, or allow wider margins"
    ]


def at_the_end(spec: FamilySpec, result: FamilyResult) -> list[str]:
    """Warnings, a line each: students that ended no better than they began, and promotions that could not be told."""
    lines = []
    for name, student in result.students.items():
        metric = learnt(spec.students[name].loss)
        before, after = metric.of(student.before), metric.of(student.after)
        if not after < before:
            ended = "worse than it began" if after > before else "no better than it began"
            lines.append(
                f"warning: student {name} ended {ended}: {metric.name} {metric.number(after)} after training, "
                f"{metric.number(before)} before, on {student.after.tokens:,} held-out tokens; lower its lr, lengthen "
                f"schedule.warmup, or give it more text"
            )
    for name, verdict in result.verdicts.items():
        if verdict.unclear:
            lines.append(
                f"warning: the held-out text is too small to decide on the promotion of student {name}; raise "
                f"evaluation.batches and corpus.held_out, or allow wider margins"
            )
    return lines
