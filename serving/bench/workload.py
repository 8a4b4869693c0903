"""What requests hold: prompts from a file, the default questions, or synthetic text of wanted lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import UserError
from serving.bench.arrivals import Arrival, json_line, read_lines
from serving.bench.settings import DEFAULT_MAX_TOKENS, Settings

PROMPTS_FORM = "one prompt per line, or JSONL with `prompt` (text) or `messages` (a chat) in each line"
# Short, common and without endings: most vocabularies have each as one token with its space.
_TEXT = (
    "time year day way man thing life hand part place case week point home water room area money story fact month "
    "right study book eye job word side kind head house friend father power hour game line end member law car city "
    "name team minute idea body back face level office door art war party result morning reason girl guy food moment "
    "air force boy age policy music market sense plan class field cost light table group school state world child"
)
_WORDS = _TEXT.split()

Messages = list[dict[str, Any]]
Prompt = str | Messages


@dataclass(frozen=True, slots=True)
class Job:
    """One request to send: ``at`` seconds after the run's start it is due (0 throughout a closed loop)."""

    model: str
    prompt: Prompt
    max_tokens: int
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class WordScale:
    """How many tokens a model's server counts for text of n words: ``base`` + ``per_word`` · n.

    The base is what the chat template adds.
    """

    base: float = 0.0
    per_word: float = 1.0

    @classmethod
    def through(cls, short: tuple[int, int], long: tuple[int, int]) -> WordScale:
        """The line through two measured (words, tokens); the default where they make no sense."""
        slope = (long[1] - short[1]) / (long[0] - short[0])
        return cls(short[1] - slope * short[0], slope) if slope > 0 else cls()

    def words(self, tokens: int) -> int:
        """Words for a prompt of so many tokens; at least one, however short it was meant to be."""
        return max(1, round((tokens - self.base) / self.per_word))


def synthetic(words: int, rng: np.random.Generator) -> str:
    """Text of so many words, another one each time, so that no server has its beginning in a cache."""
    return " ".join(_WORDS[i] for i in rng.integers(len(_WORDS), size=words))


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file in the form :data:`PROMPTS_FORM`.

    Raises:
        UserError: the file cannot be read, holds nothing, or a line of JSONL has no prompt.
    """
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path} has no prompts; write {PROMPTS_FORM}.")
    if path.suffix == ".jsonl" or lines[0][1].startswith("{"):
        return [_prompt(json_line(path, number, line), f"{path} line {number}") for number, line in lines]
    return [line for _, line in lines]


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    prompt, messages = row.get("prompt"), row.get("messages")
    if isinstance(prompt, str) and prompt and messages is None:
        return prompt
    if prompt is None and isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return messages
    raise UserError(
        f"{where} needs `prompt`, a text, or `messages`, a list of a chat's messages, and only one of them."
    )


def as_text(prompt: Prompt) -> str:
    """A prompt for the completions API, which knows no chats: the contents of its messages, line by line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(content for message in prompt if isinstance(content := message.get("content"), str))


def jobs(
    settings: Settings,
    arrivals: Iterable[Arrival],
    prompts: Sequence[Prompt],
    models: Sequence[str],
    scales: Mapping[str, WordScale],
) -> Iterator[Job]:
    """A request for each arrival.

    Every ``len(models)`` arrivals form a block, in which each model gets the same prompt and the same lengths, so that
    all are measured under the same conditions. In a closed loop they have their turn in the order given; in an open
    one the order is drawn anew for each block, or one model would always come in the wake of another.

    What the settings name goes before what the trace says.
    """
    rng = np.random.default_rng([settings.seed, 1])
    order, drawn_prompt, limit = list(models), None, 0
    for number, arrival in enumerate(arrivals):
        block, turn = divmod(number, len(models))
        if turn == 0:
            if settings.open_loop:
                order = [models[i] for i in rng.permutation(len(models))]
            drawn_prompt = settings.prompt_tokens.draw(rng) if settings.prompt_tokens else None
            limit = (settings.max_tokens or DEFAULT_MAX_TOKENS).draw(rng)
        model = order[turn]
        length = drawn_prompt
        if length is None and settings.prompts is None:
            length = arrival.prompt_tokens
        if length is None:
            prompt = prompts[block % len(prompts)]
        else:
            # Of the block's own seed: the same words for each model, as far as their scales allow.
            words = scales.get(model, WordScale()).words(length)
            prompt = synthetic(words, np.random.default_rng([settings.seed, 2, block]))
        wanted = limit if settings.max_tokens else arrival.max_tokens or limit
        yield Job(model, prompt, wanted, arrival.at)
