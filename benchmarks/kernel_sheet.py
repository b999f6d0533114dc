"""The sheet of compiled kernels: registers, shared memory, inner loop and the time these imply,
without a GPU.

    python benchmarks/kernel_sheet.py
        write benchmarks/sheets/tree_attention.{json,md}, the choices that were not taken to
        tree_attention_alternatives.{json,md}, and the kernels of a round to small_kernels.{json,md}
    python benchmarks/kernel_sheet.py --check
        compile again and compare with what is committed
    python benchmarks/kernel_sheet.py --check-compiles
        only compile, with any Triton version, and check the limits

Every time in it is *modelled, not measured*: the greatest of four lower bounds, for memory,
instruction issue, tensor cores and exponentials, from the compiled loop and data-sheet rates. It
ignores latency, so it ranks changes to a kernel and shows which unit binds; it promises nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "benchmarks", ROOT / "tests" / "kernels", ROOT):
    sys.path.insert(0, str(folder))

import compile_tools  # noqa: E402
import small_kernel_builders  # noqa: E402
import tree_attention_cases  # noqa: E402
from treespec.kernels import tuning  # noqa: E402

SHEET = ROOT / "benchmarks" / "sheets" / "tree_attention.json"
ALTERNATIVES = SHEET.with_name("tree_attention_alternatives.json")
SMALL = SHEET.with_name("small_kernels.json")
PREFIX_LEN = 8192 - 64
LABEL = "modelled, not measured"


def triton_version() -> str:
    from importlib.metadata import version

    return version("triton")


def modelled_times(arguments: dict, compiled: dict) -> dict[str, float]:
    """Microseconds of one call at a prefix of ``PREFIX_LEN``, batch 1, beside the floor; all
    modelled.

    Args:
        arguments: Of ``tree_attention_cases.split_kernel``.
        compiled: Of ``compile_tools``.
    """
    chip = tuning.CHIPS[arguments["capability"]]
    head_dim, num_nodes = arguments["head_dim"], arguments["num_nodes"]
    shape = {
        "batch": 1,
        "q_heads": arguments["q_heads"],
        "kv_heads": arguments["kv_heads"],
        "num_nodes": num_nodes,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "element_bytes": 4 if arguments.get("dtype") == "fp32" else 2,
    }
    config = tree_attention_cases.chosen_config(
        arguments["capability"],
        reshaped=bool(arguments.get("window") or arguments.get("softcap")),
        dtype=arguments.get("dtype", "bf16"),
        **{name: arguments[name] for name in ("q_heads", "kv_heads", "head_dim", "num_nodes")},
    )
    cost = tuning.tree_attention_cost(prefix_len=PREFIX_LEN, **shape)
    rows = num_nodes * shape["q_heads"] // shape["kv_heads"]
    row_blocks = -(-rows // config.block_rows)
    tiles = -(-(PREFIX_LEN + num_nodes) // config.block_slots)
    per_split = max(-(-tiles // config.num_splits), config.min_tiles)
    splits = -(-tiles // per_split)
    programs = row_blocks * shape["kv_heads"] * splits
    # The busiest multiprocessor decides.
    programs_there = -(-programs // chip.num_sms)
    tiles_there = programs_there * per_split
    partials = 2 * splits * shape["kv_heads"] * rows * (head_dim + 1) * 4 if splits > 1 else 0
    issue_slots = sum(compiled["loop"].values()) * compiled["num_warps"]
    padded = sum(tuning.split_head_dim(head_dim, config.block_rows))
    tile_flops = 4 * max(config.block_rows, 16) * config.block_slots * padded
    flops_per_us = chip.tensor_tflops * 1e6 / chip.num_sms
    if shape["element_bytes"] == 4:
        # 128 multiply-adds a clock outside the tensor cores.
        flops_per_us = 256 * chip.clock_ghz * 1e3
    # 16 exponentials a clock; a warp instruction is 32 of them.
    exponentials = compiled["loop"].get("exponential", 0) * compiled["num_warps"] * 2
    clocks_per_us = chip.clock_ghz * 1e3
    times = {
        "memory_us": (cost.bytes + partials) / chip.bandwidth_gbs / 1e3,
        "issue_us": tiles_there * issue_slots / 4 / clocks_per_us,
        "product_us": tiles_there * tile_flops / flops_per_us,
        "exponential_us": tiles_there * exponentials / clocks_per_us,
    }
    times = {"floor_us": cost.floor_us(chip), "modelled_us": max(times.values()), **times}
    return {name: round(value, 2) for name, value in times.items()}


def build_rows(results: list[dict] | None = None) -> list[dict]:
    """Every kernel of the sheet for every chip, compiled here unless the results are given."""
    jobs = tree_attention_cases.compile_jobs(compile_tools.CAPABILITIES)
    results = compile_tools.run_jobs(list(jobs.values())) if results is None else results
    rows = []
    for (name, capability), job, compiled in zip(jobs, jobs.values(), results):
        row = {
            "kernel": name,
            "capability": capability,
            "chip": tuning.CHIPS[capability].name,
            **compiled,
        }
        if name != "combine" and "error" not in compiled:
            row["label"] = LABEL
            row |= modelled_times(job["arguments"], compiled)
        rows.append(row)
    return rows


def alternative_rows() -> list[dict]:
    """The kernels of choices that were not taken, compiled; they may spill."""
    jobs = tree_attention_cases.alternative_jobs()
    results = compile_tools.run_jobs(list(jobs.values()))
    return [
        {"kernel": name, "capability": capability, **compiled}
        for (name, capability), compiled in zip(jobs, results)
    ]


def small_rows() -> list[dict]:
    """The kernels of a round, compiled for every chip."""
    pairs = [
        (name, capability)
        for name in small_kernel_builders.VARIANTS
        for capability in compile_tools.CAPABILITIES
    ]
    results = compile_tools.run_jobs([small_kernel_builders.job_of(*pair) for pair in pairs])
    return [
        {"kernel": name, "capability": capability, **compiled}
        for (name, capability), compiled in zip(pairs, results)
    ]


def faults(rows: list[dict]) -> list[str]:
    """What breaks a hard limit, whatever the Triton version."""
    found = []
    for row in rows:
        name = f"{row['kernel']} on sm_{row['capability']}"
        if "error" in row:
            found.append(f"{name} does not compile: {row['error']}")
            continue
        if row["spill_bytes"]:
            found.append(f"{name} spills {row['spill_bytes']} bytes")
        if row["shared_bytes"] > compile_tools.SHARED_LIMITS[row["capability"]]:
            found.append(f"{name} needs {row['shared_bytes']} bytes of shared memory")
        if row["byte_accesses"]:
            found.append(f"{name} has {row['byte_accesses']} byte accesses")
    return found


def differences(committed: list[dict], rows: list[dict]) -> list[str]:
    """Where the compiled kernels are no longer those of the committed sheet."""
    before = {(row["kernel"], row["capability"]): row for row in committed}
    now = {(row["kernel"], row["capability"]): row for row in rows}
    found = [f"{key} is not in the committed sheet" for key in now.keys() - before.keys()]
    found += [f"{key} is only in the committed sheet" for key in before.keys() - now.keys()]
    for key in sorted(before.keys() & now.keys()):
        for field in sorted(before[key].keys() | now[key].keys()):
            old, new = before[key].get(field), now[key].get(field)
            if old != new:
                found.append(f"{key[0]} on sm_{key[1]}: {field} was {old}, is {new}")
    return found


def markdown(version: str, rows: list[dict]) -> str:
    """The sheet as a page."""
    lines = [
        "# Tree attention, compiled",
        "",
        f"Written by `python benchmarks/kernel_sheet.py` with Triton {version}; do not edit.",
        f"Batch 1, prefix {PREFIX_LEN}, bfloat16 but for Pythia (float16) and the float32 rows.",
        f"Times are of the split kernel in µs and are **{LABEL}**: the greatest of the memory,",
        "issue, product and exponential bounds from the loop below and data-sheet rates, with the",
        "partial results of the splits counted as memory traffic though they fit an L2 cache. The",
        "floor is memory or tensor cores at full rate, whichever is slower.",
        "",
        "| kernel | chip | registers | spills | shared KiB | warps | blocks/SM | products "
        "| floor µs | modelled µs | bound by | instructions of a loop iteration |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['kernel']} | sm_{row['capability']} | {row['error'][:80]} |" + " |" * 9
            )
            continue
        products = next((unit for unit in ("wgmma", "tcgen05", "mma") if row[unit]), "none")
        times = ["", "", ""]
        if "floor_us" in row:
            bounds = {
                name[:-3]: row[name]
                for name in ("memory_us", "issue_us", "product_us", "exponential_us")
            }
            times = [
                f"{row['floor_us']:.1f}",
                f"{row['modelled_us']:.1f}",
                max(bounds, key=bounds.get),
            ]
        mix = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in row["loop"].items())
        cells = [
            row["kernel"],
            f"sm_{row['capability']} ({row['chip']})",
            row["registers"],
            row["spill_bytes"],
            f"{row['shared_bytes'] / 1024:.0f}",
            row["num_warps"],
            row["blocks_per_sm"],
            products,
            *times,
            mix,
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def alternatives_markdown(version: str, rows: list[dict]) -> str:
    """The choices not taken as a page."""
    lines = [
        "# Tree attention: choices not taken, compiled",
        "",
        f"Written by `python benchmarks/kernel_sheet.py` with Triton {version}; do not edit.",
        "What each was weighed against is in docs/design/004-tree-attention.md.",
        "",
        "| kernel | chip | registers | spills | shared KiB | warps | tensor instructions "
        "| instructions of a loop iteration |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["kernel"],
            f"sm_{row['capability']}",
            row["registers"],
            row["spill_bytes"],
            f"{row['shared_bytes'] / 1024:.0f}",
            row["num_warps"],
            row["loop"].get("tensor", 0),
            sum(row["loop"].values()),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def small_markdown(version: str, rows: list[dict]) -> str:
    """The kernels of a round as a page."""
    lines = [
        "# The small kernels of a round, compiled",
        "",
        f"Written by `python benchmarks/kernel_sheet.py` with Triton {version}; do not edit.",
        "`wide loads` are 16-byte global loads and asynchronous copies in the PTX; the loop is the",
        "one with most instructions of interest, per warp and iteration.",
        "",
        "| kernel | chip | registers | spills | shared KiB | warps | blocks/SM | wide loads "
        "| byte accesses | instructions of a loop iteration |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mix = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in row["loop"].items())
        cells = [
            row["kernel"],
            f"sm_{row['capability']}",
            row["registers"],
            row["spill_bytes"],
            f"{row['shared_bytes'] / 1024:.1f}",
            row["num_warps"],
            row["blocks_per_sm"],
            row["wide_loads"],
            row["byte_accesses"],
            mix,
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(path: Path, version: str, rows: list[dict], page: str, **more: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"triton": version, **more, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)


def outdated(path: Path, version: str, rows: list[dict], render) -> list[str]:
    """Where a committed sheet and its page are not those of the kernels just compiled."""
    committed = json.loads(path.read_text())
    if committed["triton"] != version:
        print(f"{path.name} is for Triton {committed['triton']}: only limits are checked")
        return []
    found = differences(committed["rows"], rows)
    page = path.with_suffix(".md")
    if not page.is_file() or page.read_text() != render(version, committed["rows"]):
        found.append(f"{page.name} is not the page of {path.name}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the committed sheet")
    mode.add_argument("--check-compiles", action="store_true", help="compile and check limits only")
    options = parser.parse_args(argv)
    version, rows = triton_version(), build_rows()
    found = faults(rows)
    if not options.check_compiles:
        alternatives, small = alternative_rows(), small_rows()
        found += [line for line in faults(small) if "byte accesses" not in line]
    if options.check:
        found += outdated(SMALL, version, small, small_markdown)
        found += outdated(SHEET, version, rows, markdown)
        found += outdated(ALTERNATIVES, version, alternatives, alternatives_markdown)
    elif not options.check_compiles:
        write(SHEET, version, rows, markdown(version, rows), label=LABEL)
        page = alternatives_markdown(version, alternatives)
        write(ALTERNATIVES, version, alternatives, page)
        write(SMALL, version, small, small_markdown(version, small))
    print(f"Triton {version}: {len(rows)} kernels compiled, {len(found)} faults")
    for line in found:
        print(f"  {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
