"""Peak memory of a row: measured in a fresh process that runs nothing else.

    python -m treespec.bench.memory < settings.json

On a GPU it is the most that torch allocated, on a CPU the peak resident set, libraries included.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

LOADED_ONLY = "models loaded"


class MemoryRunFailed(RuntimeError):
    """The process of a row ended with an error; the message holds its last line."""


def peak_mib(settings: dict[str, Any], method: str) -> float:
    """Peak memory of a row in MiB.

    Args:
        settings: of a reference run.
        method: its name, or `LOADED_ONLY` for a process that loads the models and ends.

    Raises:
        MemoryRunFailed: if the process failed.
    """
    command = [sys.executable, "-m", "treespec.bench.memory"]
    asked = json.dumps({"settings": settings, "method": method})
    done = subprocess.run(command, input=asked, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MemoryRunFailed(lines[-1])
    return float(done.stdout.split()[-1])


def _measure(settings: dict[str, Any], name: str) -> float:
    import torch

    from treespec.bench.command import build_reference
    from treespec.bench.methods import tuning_file
    from treespec.bench.models import load_pair

    torch.set_num_threads(settings["threads"])
    device = torch.device(settings["device"])
    pair = load_pair(settings, device)
    if name != LOADED_ONLY:
        group = build_reference(pair, settings)
        (method,) = (method for method in group.methods if method.name == name)
        with tuning_file(settings["tuned"]):
            method.run(group.tasks[0])
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Reads settings and a method from stdin, prints MiB."""
    asked = json.load(sys.stdin)
    print(_measure(asked["settings"], asked["method"]))


if __name__ == "__main__":
    main()
