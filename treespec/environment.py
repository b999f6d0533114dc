"""Where this runs: versions, devices, and which paths work here and why not. For `treespec info`
and for benchmark records.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "numpy",
    "rich",
    "flashspec",
    "economize",
)


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and what it works with; None where something is not
    installed.
    """
    import treespec

    found: dict[str, str | None] = {
        "treespec": treespec.__version__,
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[dict]:
    """The CPU, then each CUDA device with its compute capability and memory."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    cpu = {
        "device": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    found: list[dict] = [{**cpu, "capability": capability}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def paths() -> list[dict]:
    """Each way of computing: whether it works on the best device here, and a sentence saying why or
    why not.
    """
    import torch

    from treespec.kernels import ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    triton_runs, triton_reason = ops.triton_status(device)
    return [
        {"path": 'attention="torch"', "works": True, "reason": "plain PyTorch, on every device"},
        {"path": 'attention="triton"', "works": triton_runs, "reason": triton_reason},
        {
            "path": "cuda_graphs=True",
            "works": triton_runs and device.type == "cuda",
            "reason": "on CUDA devices, with the Triton kernels",
        },
    ]


def describe() -> dict:
    """Everything above, with the platform, as plain data ready for JSON."""
    return {
        "platform": platform.platform(),
        "executable": sys.executable,
        "versions": versions(),
        "devices": devices(),
        "paths": paths(),
    }
