"""The figures by which a student is judged. No torch, so that a driver and a report can hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

# Sums over the loss tokens of one block: tokens, KL in nats, agreements, the student's cross-entropy in nats.
Block = tuple[float, float, float, float]


@dataclass(frozen=True)
class Fidelity:
    """Means over held-out loss tokens.

    Attributes:
        kl: KL(teacher || student) in nats, over the whole vocabulary at T = 1.
        agreement: share of tokens where both find the same token likeliest.
        student_perplexity, teacher_perplexity: exp of the mean cross-entropy with the text.
        calibration_error, teacher_calibration_error: expected gap between the likeliest token's probability and how
            often it is the next one, over 15 bins of equal width (Guo et al., 2017).
        tokens: loss tokens measured.
        blocks: sums per block of the held-out text (:mod:`cluster.corpus.blocks`), from which intervals are made; empty
            in a commit of a version without them.
    """

    kl: float
    agreement: float
    student_perplexity: float
    teacher_perplexity: float
    calibration_error: float
    teacher_calibration_error: float
    tokens: int
    blocks: tuple[Block, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        # A commit's JSON has lists.
        object.__setattr__(self, "blocks", tuple(tuple(block) for block in self.blocks))


@dataclass(frozen=True)
class StudentResult:
    """A finished student.

    Attributes:
        model_dir: the trained model with its tokenizer, in safetensors.
        parameters: number of weights, tied ones counted once.
        seconds: that its training steps took, before and after a resume, in the rank that wrote it.
    """

    name: str
    model_dir: str
    parameters: int
    before: Fidelity
    after: Fidelity
    batches: int
    seconds: float


@dataclass(frozen=True)
class Champion:
    """The present champion beside a new student.

    Attributes:
        version: of the same registered model.
        fidelity: on the new student's held-out batches; None where it could not be measured.
        why_not: then the reason, in a line.
    """

    version: int
    fidelity: Fidelity | None
    why_not: str = ""
