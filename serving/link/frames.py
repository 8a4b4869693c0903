"""What goes over the wire: msgpack frames behind their length. Plain data, so no stranger's bytes are ever code."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack

from serving.asking import Ask, Item, Piece
from serving.engines.base import Accepted, Alternative, Delta, Refused, Sampling, TokenLogprob
from serving.records import Scored

# A prompt of a body's largest size in tokens, and what is around it, is far below this.
MOST_BYTES = 64 * 2**20
# Tokens whose log-probabilities go in one frame. With twenty alternatives each takes about half a kilobyte.
MOST_TOKENS = 256
_LENGTH = struct.Struct(">I")

END, BUSY, FAILED = "end", "busy", "failed"
"""What a frame may say instead of items: the answer is whole; the queue is full; the engine failed."""


class WireError(Exception):
    """The other side says what no side of ours says."""


def packed(content: Any) -> bytes:
    """A frame."""
    raw = msgpack.packb(content)
    return _LENGTH.pack(len(raw)) + raw


class Frames:
    """Cuts a stream of bytes into frames.

    Args:
        most: largest frame, in bytes; it may be changed on the way.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most = most
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The frames that are whole now.

        Raises:
            WireError: a frame is too large, or is none.
        """
        self._buffer += data
        found = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > self.most:
                raise WireError(f"a frame of {length} bytes; {self.most} are the most")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            raw = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                found.append(msgpack.unpackb(raw, strict_map_key=False))
            except (ValueError, msgpack.UnpackException) as error:
                raise WireError(f"a frame that is no msgpack: {error}") from error
        return found


def ask_out(ask: Ask) -> Any:
    """A request, as plain data."""
    prompt = ask.prompt if ask.prompt is None or isinstance(ask.prompt, str) else list(ask.prompt)
    sampling = ask.sampling
    return [
        # Not dataclasses.astuple, which copies all that is in it: it is as slow as the rest of a request's way out.
        (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop, sampling.seed, sampling.logprobs),
        prompt,
        [dict(each) for each in ask.messages],
        ask.choices,
        ask.streamed,
        ask.sampled,
        ask.trace,
    ]


def ask_in(content: Any) -> Ask:
    """Undo :func:`ask_out`.

    Raises:
        WireError: it is something else.
    """
    try:
        (limit, temperature, top_p, stop, seed, logprobs), prompt, messages, choices, streamed, sampled, trace = content
        sampling = Sampling(limit, temperature, top_p, tuple(stop), seed, logprobs)
        return Ask(sampling, prompt, tuple(messages), choices, streamed, sampled, trace)
    except (TypeError, ValueError) as error:
        raise WireError("a request that is none") from error


def items_out(items: list[Item]) -> Any:
    """Some of an answer, as plain data: a list of tuples whose first entry says what each is."""
    out: list[Any] = []
    for item in items:
        if isinstance(item, Piece):
            delta = item.delta
            out.append((2, item.choice, delta.text, delta.completion_tokens, delta.finish_reason, delta.logprobs))
        elif isinstance(item, Accepted):
            out.append((0, item.prompt_tokens))
        elif isinstance(item, Refused):
            out.append((1, item.message, item.param, item.code))
        else:
            out.append((3, item.prompt_ids, item.answer_ids))
    return out


def shares(items: list[Item]) -> Iterator[list[Item]]:
    """Some of an answer in shares that fit a frame, however many log-probabilities are in it."""
    share: list[Item] = []
    tokens = 0
    for item in items:
        size = len(item.delta.logprobs) if isinstance(item, Piece) else 0
        if share and tokens + size > MOST_TOKENS:
            yield share
            share, tokens = [], 0
        while isinstance(item, Piece) and len(item.delta.logprobs) > MOST_TOKENS:
            # One piece with them all, as behind a long text that was held back: its text and its end go last.
            delta = item.delta
            yield [Piece(item.choice, Delta("", delta.completion_tokens, None, delta.logprobs[:MOST_TOKENS]))]
            item = Piece(item.choice, replace(delta, logprobs=delta.logprobs[MOST_TOKENS:]))
            size -= MOST_TOKENS
        share.append(item)
        tokens += size
    yield share


def items_in(content: Any) -> list[Item]:
    """Undo :func:`items_out`."""
    return [_item(*each) for each in content]


def _item(kind: int, *fields: Any) -> Item:
    if kind == 2:
        choice, text, tokens, reason, logprobs = fields
        return Piece(choice, Delta(text, tokens, reason, tuple(_logprob(*each) for each in logprobs)))
    if kind == 0:
        return Accepted(*fields)
    if kind == 1:
        return Refused(*fields)
    prompt_ids, answer_ids = fields
    return Scored(tuple(prompt_ids), tuple(answer_ids))


def _logprob(token_id: int, token: str, raw: bytes, logprob: float, top: list[Any], offset: int) -> TokenLogprob:
    return TokenLogprob(token_id, token, raw, logprob, tuple(Alternative(*each) for each in top), offset)
