"""Tree attention compiled ahead of time for every chip: no spills, shared memory that fits, the
right instructions.

Needs no GPU. One child process compiles everything, since this one may hold interpreted kernels.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import compile_tools
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kernel_sheet
import tree_attention_cases

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
]

JOBS = tree_attention_cases.compile_jobs(compile_tools.CAPABILITIES)
SPLIT_KERNELS = [key for key in JOBS if key[0] != "combine"]
LARGE = {
    "llama-3-8b, 64 nodes",
    "pythia-2.8b, 64 nodes",
    "gemma-2-9b, 64 nodes",
    "gpt-oss, 32 nodes",
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], dict]:
    return dict(zip(JOBS, compile_tools.run_jobs(list(JOBS.values()))))


@pytest.mark.parametrize("name, capability", JOBS)
def test_compiles_within_the_chip(compiled, name, capability):
    result = compiled[name, capability]
    assert "error" not in result, result
    assert result["spill_bytes"] == 0
    assert result["shared_bytes"] <= compile_tools.SHARED_LIMITS[capability]
    assert result["blocks_per_sm"] >= 1
    assert result["byte_accesses"] == 0


@pytest.mark.parametrize("name, capability", SPLIT_KERNELS)
def test_cache_is_read_in_16_byte_pieces(compiled, name, capability):
    # The loop over the prefix reads nothing but keys and values: a narrower copy would be counted
    # twice.
    loop = compiled[name, capability]["loop"]
    variant = tree_attention_cases.VARIANTS[name]
    assert loop["async_copy"] == tree_attention_cases.copies_of_a_tile(capability, variant)
    assert loop.get("global_load", 0) == loop.get("local", 0) == 0
    # And of the whole kernel, queries and tree tiles included, at least two such tiles are wide.
    assert compiled[name, capability]["wide_loads"] >= 2 * loop["async_copy"] > 0


@pytest.mark.parametrize("name, capability", SPLIT_KERNELS)
def test_products_run_on_the_right_units(compiled, name, capability):
    result = compiled[name, capability]
    large = name in LARGE
    if name.startswith("float32"):
        assert not (result["wgmma"] or result["mma"] or result["tcgen05"])
        return
    assert result["wgmma"] == (capability == 90 and large)
    assert result["tcgen05"] == (capability == 100 and large)
    assert result["mma"] == (capability not in (90, 100) or not large)
    assert result["loop"]["tensor"] > 0


def test_committed_sheet_is_of_these_kernels(compiled):
    rows = kernel_sheet.build_rows(list(compiled.values()))
    assert kernel_sheet.faults(rows) == []
    committed = json.loads(kernel_sheet.SHEET.read_text())
    if committed["triton"] != kernel_sheet.triton_version():
        pytest.skip("the committed sheet is of another Triton version")
    assert kernel_sheet.differences(committed["rows"], rows) == []
    for row in rows:
        assert row.get("modelled_us", 1.0) >= row.get("floor_us", 0.0)


def test_the_sheet_tells_what_changed_and_what_is_too_much():
    row = {"kernel": "k", "capability": 90, "spill_bytes": 0, "shared_bytes": 0, "byte_accesses": 0}
    assert kernel_sheet.faults([row]) == [] == kernel_sheet.differences([row], [row])
    worse = {**row, "spill_bytes": 8, "shared_bytes": 1 << 20, "byte_accesses": 2}
    assert [line.split(" on ")[1] for line in kernel_sheet.faults([worse])] == [
        "sm_90 spills 8 bytes",
        "sm_90 needs 1048576 bytes of shared memory",
        "sm_90 has 2 byte accesses",
    ]
    assert "spill_bytes was 0, is 8" in " ".join(kernel_sheet.differences([row], [worse]))
    assert kernel_sheet.differences([], [row]) == ["('k', 90) is not in the committed sheet"]
    assert kernel_sheet.faults([{**row, "error": "boom"}]) == ["k on sm_90 does not compile: boom"]


def test_an_outdated_sheet_or_page_is_told(tmp_path, capsys):
    row = {"kernel": "k", "capability": 90, "spill_bytes": 8}
    sheet = tmp_path / "sheet.json"

    def render(version, rows):
        return f"{version}: {rows[0]['spill_bytes']}"

    kernel_sheet.write(sheet, "9", [row], "9: 8")
    assert kernel_sheet.outdated(sheet, "9", [row], render) == []
    worse = {**row, "spill_bytes": 9}
    assert kernel_sheet.outdated(sheet, "9", [worse], render) == [
        "k on sm_90: spill_bytes was 8, is 9"
    ]
    assert kernel_sheet.outdated(sheet, "10", [worse], render) == []
    assert "sheet.json is for Triton 9" in capsys.readouterr().out
    sheet.with_suffix(".md").write_text("stale")
    found = kernel_sheet.outdated(sheet, "9", [row], render)
    assert found == ["sheet.md is not the page of sheet.json"]


def test_pages_are_of_the_committed_sheets():
    for sheet, render in (
        (kernel_sheet.SHEET, kernel_sheet.markdown),
        (kernel_sheet.ALTERNATIVES, kernel_sheet.alternatives_markdown),
    ):
        committed = json.loads(sheet.read_text())
        page = sheet.with_suffix(".md").read_text()
        assert page == render(committed["triton"], committed["rows"])
    names = {row["kernel"] for row in committed["rows"]}
    assert names == set(tree_attention_cases.ALTERNATIVES)


def test_a_spill_and_a_narrow_load_would_be_seen():
    arguments = {"capability": 90, **tree_attention_cases.VARIANTS["llama-3-8b, 64 nodes"]}
    spilling = {"block_rows": 128, "block_slots": 128, "num_warps": 4, "num_stages": 2}
    jobs = [
        {
            "builder": "tree_attention_cases:split_kernel",
            "arguments": {**arguments, "config": spilling},
        },
        {
            "builder": "tree_attention_cases:split_kernel",
            "arguments": {**arguments, "aligned": False},
        },
    ]
    spilled, unaligned = compile_tools.run_jobs(jobs)
    assert spilled["spill_bytes"] > 0 and spilled["loop"]["local"] > 0
    assert unaligned["wide_loads"] == 0 and unaligned["narrow_loads"] > 0
    copies = tree_attention_cases.copies_of_a_tile(
        90, tree_attention_cases.VARIANTS["llama-3-8b, 64 nodes"]
    )
    assert unaligned["loop"].get("async_copy", 0) != copies


def test_resources_decide_how_many_blocks_fit():
    fit = compile_tools.blocks_per_sm
    assert fit(90, registers=128, shared_bytes=0, num_warps=4) == 4
    assert fit(90, registers=32, shared_bytes=112 * 1024, num_warps=4) == 2
    assert fit(86, registers=16, shared_bytes=1024, num_warps=8) == 6
    assert fit(120, registers=16, shared_bytes=0, num_warps=1) == 24
    assert fit(90, registers=255, shared_bytes=228 * 1024, num_warps=8) == 0


def test_only_the_innermost_loop_is_counted():
    sass = """
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/                   FADD R2, R2, R3 ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/              @P0 BRA 0x0010 ;
        /*0060*/                   STL [R1], R5 ;
        /*0070*/              @P1 BRA 0x0000 ;
    """
    assert compile_tools.hottest_loop(sass) == {
        "async_copy": 1, "barrier": 1, "float": 1, "other": 1, "tensor": 1,
    }  # fmt: skip
