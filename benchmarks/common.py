"""What the benchmarks share: where the demo teacher lies, its text, and one JSON with what was measured on what."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
DEMO = ROOT / ".stillhouse" / "demo"
TEACHER, CORPUS = DEMO / "smollm2-135m-instruct", DEMO / "python-topics.jsonl"


def arguments(description: str, threads: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; the threads only where torch runs in this process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="write what was measured to this JSON file")
    if threads:
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads on a CPU")
    return parser


def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def hardware() -> dict[str, str]:
    """What a figure must be read with."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = str(torch.get_num_threads())
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"date": date.today().isoformat(), "device": name, "threads": threads, **versions}


def packed_text(sequences: int, length: int, skip: int = 0) -> torch.Tensor:
    """Sequences of the demo corpus in the demo teacher's tokens, [sequences, length], from the end backwards.

    Args:
        skip: sequences that are left out at the end, for another use.
    """
    from transformers import AutoTokenizer

    if not TEACHER.is_dir():
        raise SystemExit(f"{TEACHER} is not there; python infra/local/fetch_demo.py {DEMO} fetches it")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    stop = len(whole) - skip
    return whole[stop - sequences : stop]


def turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each call in each of some rounds in which all have their turn.

    In turn, so that a machine that slows down for a while slows all of them; one round before does not count.
    """
    took: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                took[name].append(time.perf_counter() - started)
    return took


def seconds_in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each call, see :func:`turns`."""
    return {name: min(seconds) for name, seconds in turns(works, rounds).items()}


def write(out: Path | None, name: str, figures: Any) -> None:
    """Put the figures and the hardware into one JSON file."""
    if out is not None:
        out.write_text(json.dumps({"benchmark": name, **hardware(), "figures": figures}, indent=2) + "\n")
        print(f"written: {out}")
