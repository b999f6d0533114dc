"""Every small kernel compiles for every chip, spills nothing, fits its shared memory and moves wide
words."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from compile_tools import CAPABILITIES, SHARED_LIMITS, run_jobs
from small_kernel_builders import EVERYWHERE, VARIANTS, job_of

pytest.importorskip("triton")

@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], dict]:
    pairs = [(name, 90) for name in VARIANTS]
    pairs += [
        (name, capability) for name in EVERYWHERE for capability in CAPABILITIES if capability != 90
    ]
    return dict(zip(pairs, run_jobs([job_of(*pair) for pair in pairs])))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(built, variant):
    for (name, capability), result in built.items():
        if name != variant:
            continue
        assert "error" not in result, f"sm_{capability}: {result}"
        assert result["spill_bytes"] == 0, f"sm_{capability}"
        assert result["shared_bytes"] <= SHARED_LIMITS[capability]
        assert result["blocks_per_sm"] >= 1
        assert result["wide_loads"] >= VARIANTS[name][2], f"sm_{capability}: no 16-byte loads"


def test_the_committed_sheet_is_up_to_date(built):
    """`python benchmarks/kernel_sheet.py` writes it."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "sheets"
    sheet = json.loads((folder / "small_kernels.json").read_text())
    if sheet["triton"] != version("triton"):
        pytest.skip(f"the sheet is for Triton {sheet['triton']}")
    rows = {(row.pop("kernel"), row.pop("capability")): row for row in sheet["rows"]}
    assert {name for name, _ in rows} == set(VARIANTS)
    assert {chip for _, chip in rows} == set(CAPABILITIES)
    assert {pair: rows[pair] for pair in built} == built


@pytest.mark.parametrize("variant", ["compact_128", "compact_80"])
def test_compaction_moves_16_bytes_at_a_time(built, variant):
    """Cache rows travel in 16-byte words; only the path and the table are read in smaller ones."""
    result = built[variant, 90]
    assert result["wide_loads"] >= 1 and result["byte_accesses"] == 0


def test_the_count_sees_narrow_moves(built):
    """Caches whose rows are not multiples of 16 bytes are moved in smaller words, and the count
    says
    so.
    """
    assert (
        built["compact_bytes", 90]["byte_accesses"] > 0
        and built["compact_bytes", 90]["wide_loads"] == 0
    )
