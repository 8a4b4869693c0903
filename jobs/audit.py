"""`stillhouse audit`: holds a run's logs against its corpus."""

from __future__ import annotations

import typer

from cluster.audit import AUDIT_FOLDER, problems_of, scorings_of, steps_of
from cluster.corpus.batches import CORPUS_FOLDER, Batches
from cluster.errors import RunError, UserError
from cluster.runs import find_run
from cluster.spec import FamilySpec


def audit(run: str) -> None:
    """Print what each student learnt from, and what the teacher scored.

    Args:
        run: a run's name or its folder.

    Raises:
        UserError: there is no such run.
        RunError: a student did not learn from each batch exactly once.
    """
    folder = find_run(run)
    spec = FamilySpec.model_validate_json((folder / "spec.json").read_text())
    if not (folder / AUDIT_FOLDER).is_dir() or not (folder / CORPUS_FOLDER).is_dir():
        raise UserError(f"{folder} has no audit log: no student of it ever started")
    batches = Batches(folder / CORPUS_FOLDER, spec.corpus, spec.evaluation.batches)
    wrong = []
    for name in spec.students:
        steps, lives = steps_of(folder, name)
        found = problems_of(folder, name, batches)
        wrong += [f"{name}: {problem}" for problem in found]
        verdict = "; ".join(found) or "each batch once, in order"
        typer.echo(f"{name}: {len(steps)} of {batches.count} batches in {lives} lives; {verdict}")
    counts = scorings_of(folder)
    again = sum(count - 1 for count in counts.values())
    typer.echo(f"teacher: scored {len(counts)} of {batches.count} batches, {again} of them again")
    if wrong:
        raise RunError("; ".join(wrong))
