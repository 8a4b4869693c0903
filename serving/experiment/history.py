"""What an experiment remembers of its course: as long as it may run, the record stays small."""

from typing import Any

ENTRIES = 500
BUCKET_S = 10.0


def add_thinned(timeline: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    """Append an entry with a time ``at``; past ENTRIES, drop the one that its neighbours in time can best do without.

    The first and the newest always stay. What is left depends on nothing but the entries.
    """
    timeline.append(entry)
    if len(timeline) > ENTRIES:
        times = [each["at"] for each in timeline]
        del timeline[min(range(1, len(times) - 1), key=lambda i: times[i + 1] - times[i - 1])]


class Traffic:
    """Requests per arm in equal spans of time: 10 s at first, doubled whenever there would be more than ENTRIES."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._width = BUCKET_S
        self._buckets: dict[int, dict[str, int]] = {}

    def count(self, arm: str, at: float, requests: int = 1) -> None:
        """Count requests that arrived at a time; one from before the start counts as of the start."""
        while (at - self._started) / self._width >= ENTRIES:
            self._width *= 2
            before, self._buckets = self._buckets, {}
            for index, counts in before.items():
                for name, number in counts.items():
                    self._add(index // 2, name, number)
        self._add(max(0, int((at - self._started) / self._width)), arm, requests)

    def _add(self, index: int, arm: str, requests: int) -> None:
        bucket = self._buckets.setdefault(index, {})
        bucket[arm] = bucket.get(arm, 0) + requests

    def as_list(self) -> list[dict[str, Any]]:
        """Buckets with requests in them, in order; ``at`` is a bucket's beginning."""
        return [
            {"at": self._started + index * self._width, "requests": dict(counts)}
            for index, counts in sorted(self._buckets.items())
        ]

    def span_s(self) -> float:
        """Seconds that one bucket covers."""
        return self._width

    @classmethod
    def restored(cls, started: float, width: float, entries: list[dict[str, Any]]) -> "Traffic":
        """From :meth:`as_list` and :meth:`span_s`."""
        traffic = cls(started)
        traffic._width = width
        for entry in entries:
            index = round((entry["at"] - started) / width)
            traffic._buckets[index] = dict(entry["requests"])
        return traffic
