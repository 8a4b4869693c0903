"""From a stream of tokens to a stream of text: whole characters only, and nothing past a stop string."""

from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are no character (yet).
_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so at most the last 3 replacement characters can still become one.
_UNDECIDED = 3


class Detokenizer:
    """Turns tokens into text one by one; the pieces joined are the decoding of all of them.

    A token may hold part of a character (byte-level vocabularies) or get its leading space only behind another
    (SentencePiece), so each is decoded behind a window of earlier ones and only the new text is given out. The
    window slides at character boundaries: the cost per token does not grow with the answer.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """``decode`` gives the text of token ids; ``context`` are the last few tokens before the first one fed."""
        self._decode = decode
        self._window = list(context)
        self._seen = len(self._window)  # tokens of the window whose text was given out before the current piece
        self._given = self._decided(decode(self._window)) if context else 0  # characters of the window's text

    def feed(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        certain = self._decided(text)
        new = text[self._given : certain]
        self._given = max(self._given, certain)
        if new and certain == len(text):
            self._window = self._window[self._seen :]
            self._seen = len(self._window)
            self._given = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """What was held back: the replacement character(s) of a character that never became whole."""
        text = self._decode(self._window)
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    @staticmethod
    def _decided(text: str) -> int:
        trailing = len(text) - len(text.rstrip(_REPLACEMENT))
        return len(text) - min(trailing, _UNDECIDED)


class StopScanner:
    """Cuts a stream of text at the first stop string, also where one spans several pieces.

    Text that could be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be given out, and whether a stop string was met (then the text ends before it)."""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            out, self._held = self._held[: min(hits)], ""
            return out, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """What was held back; the stream is over, so it began no stop string."""
        out, self._held = self._held, ""
        return out

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
