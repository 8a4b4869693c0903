"""What the packing and head probes find of every causal model type in transformers, each built small and random.

Writes ``benchmarks/model_types.md``. About five minutes on two CPU cores. ``python benchmarks/model_types.py``.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers

from tests.model_types import Row, names, probe_apart

TABLE = Path(__file__).parent / "model_types.md"


def table(rows: list[Row]) -> str:
    """The markdown page."""
    counts = ", ".join(f"{count} {packing}" for packing, count in Counter(row.packing for row in rows).most_common())
    lines = [
        f"# Causal model types of transformers {transformers.__version__}: {counts}",
        "",
        "*exact*: positions alone keep packed documents apart. *masked*: an explicit block mask does. *unpacked*:",
        "neither does, so each sequence holds one document. *refused*: not causal. *not built*: no small random model",
        "of the type's default configuration could be built and run; its documents would not be packed. The outcome is",
        "that of the default configuration; a run probes the one that its model has. Written by",
        "`python benchmarks/model_types.py`, compared with a fresh run by `tests/integration/test_model_types.py`.",
        "",
        "| type | packing | head | detail |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row.name} | {row.packing} | {row.head} | {row.detail.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Probe all types and write the table."""
    rows = []
    for name in names():
        rows.append(probe_apart(name))
        print(f"{name}: {rows[-1].packing} {rows[-1].detail}", flush=True)
    TABLE.write_text(table(rows))


if __name__ == "__main__":
    main()
