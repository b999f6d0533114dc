"""What recorded forwards gain by `treespec.fusing`: the same ones with and without it, in turns.

    python benchmarks/fused_forwards.py --output benchmarks/results/NAME.json

The bundled pair behind 200 rows, median milliseconds by nodes. Logits are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch

from treespec import environment, load_demo_pair
from treespec.model import TreeModel

PREFIX, SIZES = 200, (1, 3, 8, 16)
TURNS, CALLS = 60, 8


def ready(model) -> TreeModel:
    made = TreeModel(model, "target")
    made.begin()
    made.allocate(1, 512)
    made.ingest(torch.arange(PREFIX)[None] % made.vocab_size, [PREFIX])
    return made


def seconds(call) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS


@torch.inference_mode()
def measure(model, size: int) -> dict[str, float]:
    tokens = torch.arange(size)[None] * 7
    positions = PREFIX + torch.arange(size)[None]
    visible = torch.ones(1, size, size, dtype=torch.bool).tril()
    with mock.patch("treespec.model.fuse", lambda steps: steps):
        apart = ready(model)
        for _ in range(4):
            expected = apart.forward(tokens, positions, visible)
    fused = ready(model)
    for _ in range(4):
        found = fused.forward(tokens, positions, visible)
    error = float((found - expected).float().abs().max() / expected.float().std())
    assert error < (1e-4 if model.dtype == torch.float32 else 0.1), error
    calls = [lambda one=one: one.forward(tokens, positions, visible) for one in (apart, fused)]
    times = zip(*([seconds(call) for call in calls] for _ in range(TURNS)))
    before, after = (1e3 * statistics.median(taken) for taken in times)
    return {"apart_ms": before, "fused_ms": after, "ratio": before / after, "error": error}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        target, draft, _ = load_demo_pair(dtype=dtype)
        for role, model in (("target", target), ("draft", draft)):
            for size in SIZES:
                row = {"dtype": str(dtype).removeprefix("torch."), "model": role, "nodes": size}
                rows.append(row | measure(model, size))
                print(rows[-1], flush=True)
    if arguments.output:
        about = {"environment": environment.describe()}
        about["environment"].pop("executable")
        arguments.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
