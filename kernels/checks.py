"""Argument checks shared by the ops of a round, and the choice between a Triton kernel and PyTorch.

Shapes and dtypes are always checked. Values are checked where reading them costs nothing, on a CPU;
on a device the kernels guard themselves and flag the row.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import torch

INDEX_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL_FLOAT_DTYPES = (*FLOAT_DTYPES, torch.float64)
MAX_NODES = 256
MAX_CANDIDATES = 2048


def triton_status(device: torch.device) -> tuple[bool, str]:
    """Whether Triton kernels can run on a device, and a sentence saying why or why not.

    ``TRITON_INTERPRET=1``, set before Triton is imported, lets them run on a CPU, slowly, for
    tests.
    """
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return True, "TRITON_INTERPRET=1 runs the kernels on the CPU"
        return False, "tensors are on the CPU and TRITON_INTERPRET=1 is not set"
    if device.type != "cuda":
        return False, f"no kernel for device type {device.type!r}"
    if torch.version.hip is not None:
        return False, "the kernels are written for NVIDIA GPUs and this torch is built for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return False, f"compute capability {major}.{minor} is below 8.0"
    return True, f"CUDA device of compute capability {major}.{minor}"


def kernel_path(
    device: torch.device, implementation: str, refusal: str | None = None
) -> tuple[str, str]:
    """The path an op takes on a device: ``("triton" or "torch", reason)``.

    "auto" takes the kernel on a CUDA device that can run it and PyTorch elsewhere; a CPU runs a
    kernel, in the interpreter, only where "triton" is asked for.

    Args:
        refusal: Why the kernel cannot take these arguments on any device; None where it can.

    Raises:
        ValueError: ``implementation`` is not "auto", "triton" or "torch".
        RuntimeError: "triton" where it cannot run; the message says why.
    """
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(
            f'implementation must be "auto", "triton" or "torch"; got {implementation!r}'
        )
    if implementation == "torch":
        return "torch", "asked for"
    if implementation == "auto" and device.type == "cpu":
        return "torch", "tensors are on the CPU"
    runs, reason = triton_status(device)
    if runs and refusal is not None:
        runs, reason = False, refusal
    if not runs and implementation == "triton":
        raise RuntimeError(f'implementation="triton" cannot run: {reason}')
    return "triton" if runs else "torch", reason


def runs_on_triton(device: torch.device, implementation: str) -> bool:
    """Whether an op takes its Triton kernel; the rule and errors of ``kernel_path``."""
    return kernel_path(device, implementation)[0] == "triton"


def check_tensor(
    name: str, tensor, dtypes: tuple, layout: str, sizes: tuple, device: torch.device | None = None
) -> None:
    """One tensor argument: its dtype, its shape (None in ``sizes`` matches any size) and, where
    given,
    its device.
    """
    if (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype in dtypes
        and tensor.dim() == len(sizes)
        and all(size is None or size == actual for size, actual in zip(sizes, tensor.shape))
        and (device is None or tensor.device == device)
    ):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    known = "" if None in sizes else f" = {list(sizes)}"
    where = "" if device is None else f" on {device}"
    got = type(tensor).__name__
    if isinstance(tensor, torch.Tensor):
        got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    raise ValueError(f"{name} must be {kinds} {layout}{known}{where}; got {got}")


def check_tree(
    parents, num_nodes, batch: int | None = None, capacity: int | None = None, device=None
) -> None:
    """Parents and node counts of one batch of trees: node 0 is the root, and every parent comes
    before
    its children.
    """
    check_tensor("parents", parents, INDEX_DTYPES, "[B, N]", (batch, capacity), device)
    batch, capacity = parents.shape
    check_tensor("num_nodes", num_nodes, INDEX_DTYPES, "[B]", (batch,), parents.device)
    if not 1 <= capacity <= MAX_NODES:
        raise ValueError(f"parents must hold 1 to {MAX_NODES} nodes (dimension 1); got {capacity}")
    if parents.device.type != "cpu":
        return
    counts = num_nodes.tolist()
    if counts and not 0 <= min(counts) <= max(counts) <= capacity:
        bad = next(count for count in counts if not 0 <= count <= capacity)
        raise ValueError(f"num_nodes must lie in 0..{capacity}, the capacity N; got {bad}")
    if capacity == 1:
        return
    inner = parents.numpy()[:, 1:]
    wrong = _present(counts, capacity) & ((inner < 0) | (inner > np.arange(capacity - 1)))
    if wrong.any():
        b, node = (int(x[0]) for x in wrong.nonzero())
        raise ValueError(
            "parents must name an earlier node for every node but the root; got "
            f"{int(inner[b, node])} for node {node + 1} "
            f"of row {b}"
        )


def check_tokens(tokens: torch.Tensor, num_nodes: torch.Tensor, vocab_size: int) -> None:
    """Tokens of the drafted nodes lie inside the vocabulary; read on a CPU only."""
    if tokens.device.type != "cpu" or tokens.shape[1] == 1:
        return
    drafted = tokens.numpy()[:, 1:]
    wrong = _present(num_nodes.tolist(), tokens.shape[1]) & (
        (drafted < 0) | (drafted >= vocab_size)
    )
    if wrong.any():
        b, node = (int(x[0]) for x in wrong.nonzero())
        raise ValueError(
            f"tokens must lie in 0..{vocab_size - 1}, the vocabulary of the "
            f"logits; got {int(drafted[b, node])} for node "
            f"{node + 1} of row {b}"
        )


def _present(counts: list[int], capacity: int) -> np.ndarray:
    """bool [B, N - 1]: which nodes after the root exist."""
    return np.arange(capacity - 1) < np.asarray(counts).reshape(-1, 1) - 1
