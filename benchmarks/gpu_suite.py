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
# Side by side; where these fail, whole generations are timed without graphs.
GRAPH_CHECKS = (
    ("graph tests", [*ON_GPU, *CAPTURED], 95),
    ("graphs lossless", ["benchmarks/lossless_on_gpu.py", "--ways", "graphs"], 95),
)
# The ablation's steps beside the others' rows: all of it takes longer than this suite has.
REFERENCE_ROWS = (
    "assisted,prompt lookup,flashspec,plain,K=6 (draft),D=4 pruned (draft),D=4 unpruned (draft),"
    "D=7 pruned (draft),D=7 unpruned (draft),best-first 12/4/3,best-first 32/8/8 (lookup),auto"
)
KERNELS = ["-m", "pytest", "benchmarks", "-q", "--benchmark-json={out}/kernels.json"]
BENCH = ["-m", "treespec", "bench"]
ON_CUDA = ["--device", "cuda", "--dtype", "float16"]
SHORT = ["--new-tokens", "120", "--warm-ups", "1", "--record-ahead"]
REFERENCE = [*BENCH, "reference", *ON_CUDA, "--rows", REFERENCE_ROWS, *SHORT]
SUITE_ROWS = "prompt lookup,plain,best-first 12/4/3,best-first 24/10/8,auto"
SUITE = [*BENCH, "suite", *ON_CUDA, "--rows", SUITE_ROWS, "--temperature", "0", "1", *SHORT]
# The sizes of the reference experiment; weights are random and acceptance replayed.
SIZES = ["benchmarks/sizes/pythia-2.8b", "benchmarks/sizes/pythia-70m"]
SIZED_ROWS = "plain,K=4,K=6,best-first"
SIZED = [*BENCH, "reference", "--sized", *SIZES, *ON_CUDA, "--rows", SIZED_ROWS]
SIZED += ["--new-tokens", "128", "--samples", "2", "--warm-ups", "1"]
GENERATIONS = (
    ("reference-float16", REFERENCE, "2.0", 145),
    ("suite-float16", SUITE, "1.1", 85),
    ("sized-pythia-2.8b-float16", SIZED, "0.6", 65),
)


class Step:
    """A process under way; its output goes to a log beside the results."""

    def __init__(self, name: str, arguments: list[str], limit_s: int, out: Path) -> None:
        self.name, self._log = name, out / f"{name.replace(' ', '-')}.log"
        command = [sys.executable, *(argument.format(out=out) for argument in arguments)]
        # processes side by side would each start a thread a core
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if "-n" in arguments else {})
        self._started, self._limit_s = time.perf_counter(), limit_s
        with self._log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def outcome(self) -> dict:
        """Waits for its end, or ends it when its time is over."""
        left_s = self._limit_s - (time.perf_counter() - self._started)
        try:
            code = self._process.wait(max(left_s, 0.1))
            told = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            told = "out of time"
        seconds = time.perf_counter() - self._started
        print(f"{self.name}: {told}, {seconds:.0f} s; log {self._log}", flush=True)
        return {"step": self.name, "outcome": told, "seconds": seconds}


def main() -> int:
    if not torch.cuda.is_available():
        print("error: no CUDA device; this suite needs one", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = Path(os.environ.get("OUT") or "benchmarks/results") / gpu
    out.mkdir(parents=True, exist_ok=True)
    steps = [Step("kernel tests", KERNEL_TESTS, 75, out).outcome()]
    if steps[0]["outcome"] == "ok":
        started = [Step(*check, out) for check in GRAPH_CHECKS]
        steps += [step.outcome() for step in started]
        passed = all(step["outcome"] == "ok" for step in steps)
        steps.append(Step("benchmarks", KERNELS, 70, out).outcome())
        graphs = "--cuda-graphs" if passed else "--no-cuda-graphs"
        for name, arguments, minutes, limit_s in GENERATIONS:
            more = [graphs, "--minutes", minutes, "--output", f"{{out}}/{name}.json"]
            steps.append(Step(name, [*arguments, *more], limit_s, out).outcome())
    else:
        print("a check failed: nothing is timed")
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "steps": steps}
    (out / "suite.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(step["outcome"] == "ok" for step in steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
