"""Every causal model type of transformers, built small: a fresh run of the probes against the committed table."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model_types import Row, names, probe_apart

pytestmark = [pytest.mark.nightly, pytest.mark.slow]

TABLE = Path(__file__).parents[2] / "benchmarks/model_types.md"
# Types that cannot be built small here. One that is new on this list has to be looked at, not added.
NOT_BUILT: dict[str, str] = {}
# Found on 2026-11-30 by other means than the probe, see FIELD_NOTES.md.
KNOWN_EXACT = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gemma",
    "gemma3_text",
    "gemma4_text",
    "deepseek_v3",
    "phi",
    "phi3",
    "gpt2",
    "gptj",
    "gpt_neox",
    "olmo2",
    "stablelm",
    "starcoder2",
    "granite",
    "glm4_moe",
    "smollm3",
    "cohere2",
    "ernie4_5",
    "seed_oss",
    "hunyuan_v1_dense",
]
KNOWN_LEAKS = [
    "gpt_oss",
    "falcon",
    "opt",
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "jamba",
    "afmoe",
    "bloom",
    "mamba",
]


def committed() -> dict[str, Row]:
    """The rows of the table."""
    cells = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in TABLE.read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| type ")
    ]
    return {name: Row(name, packing, head, detail) for name, packing, head, detail in cells}


def test_the_table_has_every_type_of_the_installed_transformers() -> None:
    assert list(committed()) == names()


def test_no_more_types_than_the_named_ones_are_not_built() -> None:
    assert {name for name, row in committed().items() if row.packing == "not built"} == set(NOT_BUILT)


def test_the_table_agrees_with_what_was_found_before() -> None:
    rows = committed()
    assert {name: rows[name].packing for name in KNOWN_EXACT} == dict.fromkeys(KNOWN_EXACT, "exact")
    assert {name for name in KNOWN_LEAKS if rows[name].packing in ("masked", "unpacked")} == set(KNOWN_LEAKS)


@pytest.mark.parametrize("name", names())
def test_a_fresh_probe_finds_what_the_table_states(name: str) -> None:
    fresh, stated = probe_apart(name), committed()[name]
    assert (fresh.packing, fresh.head) == (stated.packing, stated.head), fresh.detail
