"""Counts the rows of a corpus that cannot be used, and refuses a corpus that has too many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from cluster.corpus.files import EMPTY, unusable_reasons
from cluster.corpus.read import CHAT_FIELDS, ENCODING_HINT, NO_CHATS, NO_JSON, NOT_UTF8, PLACE, UNUSABLE
from cluster.errors import UserError


@dataclass
class Unusable:
    """The rows that cannot be used, among all that were read.

    Attributes:
        rows: all rows; a .txt file is one.
        counts: those that cannot be used, by reason.
        first: where the first one of each reason is.
        empty_files: files without a row; no rows.
    """

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    empty_files: int = 0

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table of texts, see :data:`cluster.corpus.read.SCHEMA`."""
        self.rows += len(table)
        found = (table.column(name).drop_null().to_pylist() for name in (UNUSABLE, PLACE))
        for reason, place in zip(*found, strict=True):
            if reason == EMPTY:
                self.rows, self.empty_files = self.rows - 1, self.empty_files + 1
                continue
            self.counts[reason] += 1
            self.first.setdefault(reason, place)

    def merge(self, other: Unusable) -> None:
        """Add what was counted of other files, which come behind."""
        self.rows, self.empty_files = self.rows + other.rows, self.empty_files + other.empty_files
        self.counts.update(other.counts)
        self.first = other.first | self.first

    def refuse(self, max_share: float, text_field: str, parts: Sequence[tuple[Unusable, float]] = ()) -> None:
        """Refuse more unusable rows than a share.

        Args:
            parts: those among the counted files of which only a sample was read, each with the share of its rows that
                was. The corpus is refused only if their estimate is too large by three standard deviations (Poisson).

        Raises:
            UserError: there are more.
        """
        bad = self.counts.total()
        # Each sampled row stands for those of its own file that were not read.
        all_rows = self.rows + sum(part.rows * (1 / share - 1) for part, share in parts)
        all_bad = bad + sum(part.counts.total() * (1 / share - 1) for part, share in parts)
        deviation = sum(part.counts.total() / share**2 for part, share in parts) ** 0.5
        if all_bad - 3 * deviation <= max_share * all_rows:
            return
        most = self.counts.most_common(1)[0][0]
        todo = "repair or remove them, or raise corpus.max_bad_share"
        if most in (NO_JSON, "array instead of an object"):
            todo = "give a JSON object per line, or one array of them in a .json file"
        elif most == NOT_UTF8:
            todo = ENCODING_HINT
        elif most == "array instead of text" and text_field in CHAT_FIELDS:
            todo = NO_CHATS
        reasons = unusable_reasons(self.counts, self.first)
        rows = f"sampled rows, about {100 * all_bad / all_rows:.3g} % of all," if parts else "rows"
        raise UserError(
            f"corpus.paths: {bad:,} of {self.rows:,} {rows} cannot be used ({reasons}), "
            f"more than corpus.max_bad_share {max_share:g}; {todo}"
        )
