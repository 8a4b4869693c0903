"""Server-sent events from the pieces that a network delivers."""

from collections.abc import AsyncIterable, AsyncIterator
from time import perf_counter


async def sse(pieces: AsyncIterable[bytes]) -> AsyncIterator[tuple[float, str]]:
    """(``perf_counter()`` when its last byte had come, data) of each event that has data.

    Cut at the bytes CR, LF or both, never at what text calls a line's end: U+2028 is legal in JSON, and a piece may end
    within a character. An event that the stream's end cuts off counts as whole when its line is.

    Raises:
        UnicodeDecodeError: data that is not UTF-8.
    """
    buffer, data = b"", []
    now = perf_counter()
    async for piece in pieces:
        now = perf_counter()
        buffer += piece
        # A CR at the end may be half of a CR LF.
        held, buffer = (buffer[-1:], buffer[:-1]) if buffer.endswith(b"\r") else (b"", buffer)
        *lines, rest = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        buffer = rest + held
        for line in lines:
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield now, b"\n".join(data).decode()
                data = []
    if data:
        yield now, b"\n".join(data).decode()
