"""Every small kernel compiles for every chip, spills nothing, fits its shared memory and moves wide
words."""

from __future__ import annotations

import pytest
from compile_tools import CAPABILITIES, SHARED_LIMITS, run_jobs

pytest.importorskip("triton")

# Builder arguments, and the least number of 16-byte loads its PTX must have.
VARIANTS = {
    "greedy_bf16": ("choose", {}, 4),
    "greedy_fp32": ("choose", {"dtype": "fp32"}, 4),
    "coupled_bf16": ("choose", {"sample": True}, 4),
    "coupled_cut": ("choose", {"sample": True, "cut": True}, 4),
    "walk_64": ("walk", {"nodes": 64}, 0),
    "walk_256": ("walk", {}, 0),
    "gumbel": ("gumbel", {}, 0),
    "cut": ("cut", {"draft": False}, 4),
    "normaliser": ("cut", {"filters": False}, 4),
    "traversal": ("rejection", {}, 4),
    "without_replacement": ("rejection", {"traversal": False, "filters": False}, 4),
    "ancestor_bits": ("ancestry", {}, 0),
    "node_depths": ("ancestry", {"bits": False}, 0),
    "select_2048": ("select", {}, 0),
    "merge_4": ("merge", {}, 0),
    "merge_64": ("merge", {"num": 64}, 0),
    "children_top": ("children", {}, 4),
    "children_coupled_64": ("children", {"drafting": "coupled", "kids": 64}, 4),
    "children_coupled_fp32": ("children", {"drafting": "coupled", "dtype": "fp32"}, 4),
    "children_sampled_cut": ("children", {"drafting": "sampled", "filters": True}, 4),
    "children_join": ("children_join", {}, 0),
    "children_join_largest": ("children_join", {"sampled": True, "parts": 64, "kids": 64}, 0),
    "scan": ("scan", {}, 0),
    "continue": ("continuation", {}, 0),
    "compact_128": ("compact", {"columns": 64}, 1),
    "compact_80": ("compact", {"columns": 64, "word": 16}, 1),
    "compact_bytes": ("compact", {"word": 1}, 0),
    "rotary_128": ("rotary", {}, 0),
    "rotary_80_interleaved": ("rotary", {"head_dim": 80, "interleaved": True}, 0),
}
# Hopper, and one variant of each kernel on the other chips: a build takes about a second.
EVERYWHERE = (
    "greedy_bf16",
    "coupled_cut",
    "walk_64",
    "cut",
    "traversal",
    "select_2048",
    "merge_4",
    "children_sampled_cut",
    "children_join",
    "compact_128",
    "rotary_128",
)


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], dict]:
    pairs = [(name, 90) for name in VARIANTS]
    pairs += [
        (name, capability) for name in EVERYWHERE for capability in CAPABILITIES if capability != 90
    ]
    jobs = [
        {
            "builder": f"small_kernel_builders:{VARIANTS[name][0]}",
            "arguments": {"capability": chip, **VARIANTS[name][1]},
        }
        for name, chip in pairs
    ]
    return dict(zip(pairs, run_jobs(jobs)))


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
