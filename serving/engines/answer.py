"""One answer while it is written: from its tokens to the pieces that a client gets. The same for every engine."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

from serving.engines.base import Alternative, Delta, FinishReason, Sampling, TokenLogprob
from serving.text import Detokenizer, StopScanner

# Tokens of the prompt the detokeniser looks back on: enough to settle a leading space or a split character.
_LOOK_BACK = 5


class Chances(NamedTuple):
    """What a model thought at one place: the chosen token's log-probability and the most likely ids with theirs."""

    logprob: float
    top: Sequence[tuple[int, float]]


class Vocabulary(Protocol):
    """What an answer needs of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def raw(self, token: int) -> bytes:
        """The bytes of one token."""


class Answer:
    """Turns the tokens of one answer into deltas and says when it is over."""

    def __init__(
        self, vocabulary: Vocabulary, ends: Collection[int], prompt_ids: Sequence[int], sampling: Sampling
    ) -> None:
        """``ends`` are the end-of-sequence tokens; ``sampling.max_tokens`` is set."""
        assert sampling.max_tokens is not None
        self._vocabulary = vocabulary
        self._ends = ends
        self._limit = sampling.max_tokens
        self._text = Detokenizer(vocabulary.decode, prompt_ids[-_LOOK_BACK:])
        self._stops = StopScanner(sampling.stop)
        self._count = 0
        self._decoded = 0  # characters of the answer that the tokens so far make
        self._given = 0  # characters that went out
        self._pending: list[TokenLogprob] = []

    def feed(self, token: int, chances: Chances | None = None) -> Delta | None:
        """The delta that became certain with this token; None when there is nothing to give out yet.

        After a delta with a ``finish_reason`` the answer is over.
        """
        self._count += 1
        if token in self._ends:
            return self._finish("", "stop")
        offset = self._decoded
        new = self._text.feed(token)
        self._decoded += len(new)
        if chances is not None:
            self._pending.append(self._logprob(token, chances, offset))
        piece, stopped = self._stops.feed(new)
        if stopped:
            return self._last(piece, "stop", cut=True)
        if self._count >= self._limit:
            return self._finish(piece, "length")
        if not piece:
            return None
        self._given += len(piece)
        return Delta(piece, self._count, None, self._release(self._given))

    def _finish(self, piece: str, reason: FinishReason) -> Delta:
        """The answer ends here; what was held back is text after all, unless it completes a stop string."""
        rest, stopped = self._stops.feed(self._text.flush())
        if stopped:
            return self._last(piece + rest, "stop", cut=True)
        return self._last(piece + rest + self._stops.flush(), reason, cut=False)

    def _last(self, piece: str, reason: FinishReason, cut: bool) -> Delta:
        self._given += len(piece)
        return Delta(piece, self._count, reason, self._release(self._given if cut else None))

    def _release(self, before: int | None) -> tuple[TokenLogprob, ...]:
        """The pending tokens whose text begins before a character of the answer; None: all."""
        out = [token for token in self._pending if before is None or token.text_offset < before]
        self._pending = self._pending[len(out) :]
        return tuple(out)

    def _logprob(self, token: int, chances: Chances, offset: int) -> TokenLogprob:
        alternatives = tuple(_alternative(self._vocabulary.raw, *one) for one in chances.top)
        return TokenLogprob(*_alternative(self._vocabulary.raw, token, chances.logprob), alternatives, offset)


def _alternative(raw: Callable[[int], bytes], token: int, logprob: float) -> Alternative:
    content = raw(token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
    return Alternative(token, text, content, logprob)
