"""How many parameters a family's models have, and what a person should know about their proportions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.loading import meta_model
from cluster.spec import FamilySpec
from cluster.spec.loss import Ramp

TEACHER = "the teacher"
# A teacher's parameters over a student's. A teacher that is far too large for its student teaches it worse than a
# smaller one; the best is about 2.5 times the student (Zhang et al., ACL 2025, arXiv:2311.07052).
LARGEST, SMALLEST, USUAL = 10.0, 2.0, 2.5
# Least weight of the ground truth, as a share of a loss' weights.
LEAST_HARD = 0.01


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model learns.

    Attributes:
        total: all of them; tied ones count once.
        embeddings: those of the input embedding and of the output head, which every cut of the layers keeps.
    """

    total: int
    embeddings: int

    def __str__(self) -> str:
        return f"{_short(self.total)} parameters, {_short(self.embeddings)} of them in embeddings"


def student_key(name: str) -> str:
    """What a student goes by beside ``TEACHER``."""
    return f"student {name}"


def count_parameters(config: Any, field: str, trust_remote_code: bool = False) -> Parameters:
    """Parameters of a model by its configuration; no weight is made. Of a quantized model as it is before.

    Raises:
        UserError: the model cannot be built.
    """
    model = meta_model(config, field, trust_remote_code)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(each.weight): each.weight for each in ends if getattr(each, "weight", None) is not None}
    return Parameters(
        sum(parameter.numel() for parameter in model.parameters()), sum(table.numel() for table in tables.values())
    )


def size_lines(parameters: Mapping[str, Parameters]) -> list[str]:
    """The parameters of the teacher and of every student, a line each."""
    teacher = parameters[TEACHER].total
    return [
        f"{who}: {own}" + ("" if who == TEACHER else f"; the teacher has {teacher / own.total:.3g} times as many")
        for who, own in parameters.items()
    ]


def advice(spec: FamilySpec, parameters: Mapping[str, Parameters]) -> list[str]:
    """Warnings about settings that are allowed and seldom meant, a line each."""
    lines, teacher = [], parameters[TEACHER].total
    for name, student in spec.students.items():
        who = student_key(name)
        own = parameters[who].total
        given = f"{who} has {_short(own)} parameters, its teacher {_short(teacher)}"
        usual = f"{SMALLEST:g} to {LARGEST:g} times fewer are usual, {USUAL:g} is a good start"
        if own >= teacher:
            lines.append(f"warning: {given}: a student that is no smaller saves nothing; {usual}")
        elif teacher > LARGEST * own:
            lines.append(f"warning: {given}, {teacher / own:.3g} times as many: few students follow so far; {usual}")
        elif teacher < SMALLEST * own:
            lines.append(f"warning: {given}, {teacher / own:.3g} times as many: little is saved; {usual}")
        loss = student.loss
        soft = max(loss.soft.start, loss.soft.end) if isinstance(loss.soft, Ramp) else loss.soft
        if loss.hard < LEAST_HARD * (loss.hard + soft):
            lines.append(
                f"warning: students.{name}.loss.hard is {loss.hard:g}: without the corpus' own next tokens a student "
                f"also learns its teacher's errors; {type(loss).model_fields['hard'].default:g} is the default"
            )
    return lines


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 100 * size else f"{count / size:.0f}{unit}"
    return str(count)
