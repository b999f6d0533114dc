"""All that a CUDA machine can show, in nine minutes: kernels checked, then timed, then whole
generations; results kept.

    make gpu-suite                 # writes to benchmarks/results/, or to $OUT where that is set

Timing is skipped when a check fails: a speed is never reported on a red gate. Every step has its
own limit; a step that runs out of time is reported as such and the next one starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

CAPTURED = ("tests/kernels/test_captured_forwards.py", "tests/kernels/test_steps.py")
# The other kernel tests are the interpreter's, on a machine without a GPU.
ON_GPU = ["-m", "pytest", "-q", "-m", "gpu", "-n", "8"]
KERNEL_TESTS = [*ON_GPU, "tests/kernels", *(f"--ignore={path}" for path in CAPTURED)]
# Where these fail, whole generations are timed without graphs.
GRAPH_CHECKS = (
    ("graph tests", [*ON_GPU, *CAPTURED], 60),
    ("graphs lossless", ["benchmarks/lossless_on_gpu.py", "--ways", "graphs"], 70),
)
# The ablation's steps beside the others' rows: all of it takes longer than this suite has.
REFERENCE_ROWS = "assisted,prompt lookup,flashspec,plain,K=6 (draft),pruned (draft),auto"
KERNELS = ["-m", "pytest", "benchmarks", "-q", "--benchmark-json={out}/kernels.json"]
BENCH = ["-m", "treespec", "bench"]
ON_CUDA = ["--device", "cuda", "--dtype", "float16"]
SHORT = ["--new-tokens", "120", "--warm-ups", "1", "--record-ahead"]
REFERENCE = [*BENCH, "reference", *ON_CUDA, "--rows", REFERENCE_ROWS, *SHORT]
SUITE_ROWS = "assisted (no,plain,auto"
SUITE = [*BENCH, "suite", *ON_CUDA, "--rows", SUITE_ROWS, "--temperature", "0", "1", *SHORT]
# The sizes of the reference experiment; weights are random and acceptance replayed.
SIZES = ["benchmarks/sizes/pythia-2.8b", "benchmarks/sizes/pythia-70m"]
SIZED_ROWS = "plain,K=4,K=6,best-first"
SIZED = [*BENCH, "reference", "--sized", *SIZES, *ON_CUDA, "--rows", SIZED_ROWS]
SIZED += ["--new-tokens", "128", "--samples", "2", "--warm-ups", "1"]
GENERATIONS = (
    ("reference-float16", REFERENCE, "1.2", 110),
    ("suite-float16", SUITE, "0.8", 75),
    ("sized-pythia-2.8b-float16", SIZED, "0.6", 65),
)


def run(name: str, arguments: list[str], limit_s: int, out: Path) -> dict:
    """One step; its output goes to a log beside the results."""
    command = [sys.executable, *(argument.format(out=out) for argument in arguments)]
    # processes side by side would each start a thread a core
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if "-n" in arguments else {})
    started = time.perf_counter()
    log = out / f"{name.replace(' ', '-')}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=file, timeout=limit_s, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    outcome = {None: "out of time", 0: "ok"}.get(code, f"failed with exit code {code}")
    seconds = time.perf_counter() - started
    print(f"{name}: {outcome}, {seconds:.0f} s; log {log}", flush=True)
    return {"step": name, "outcome": outcome, "seconds": seconds}


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no CUDA device; this suite needs one", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = Path(os.environ.get("OUT") or "benchmarks/results") / gpu
    out.mkdir(parents=True, exist_ok=True)
    steps = [run("kernel tests", KERNEL_TESTS, 80, out)]
    if steps[0]["outcome"] == "ok":
        steps += [run(*check, out) for check in GRAPH_CHECKS]
        passed = all(step["outcome"] == "ok" for step in steps)
        steps.append(run("benchmarks", KERNELS, 75, out))
        graphs = "--cuda-graphs" if passed else "--no-cuda-graphs"
        for name, arguments, minutes, limit_s in GENERATIONS:
            more = [graphs, "--minutes", minutes, "--output", f"{{out}}/{name}.json"]
            steps.append(run(name, [*arguments, *more], limit_s, out))
    else:
        print("a check failed: nothing is timed")
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "steps": steps}
    (out / "suite.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(step["outcome"] == "ok" for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
