"""The public operations: signatures, checks, documentation, and the choice between a Triton kernel
and PyTorch.

Tensors in, tensors out. Importing this module costs no more than importing torch: Triton is
imported when a kernel is first launched. The mathematics of each operation is on its page under
docs/kernels/, its truth in ``reference``.
"""

from __future__ import annotations

import torch

from .acceptance_ops import gumbel_noise as gumbel_noise
from .acceptance_ops import verify_greedy as verify_greedy
from .acceptance_ops import verify_sampled as verify_sampled
from .checks import (
    ALL_FLOAT_DTYPES,
    FLOAT_DTYPES,
    INDEX_DTYPES,
    MAX_NODES,
    check_tensor,
    kernel_path,
)
from .checks import triton_status as triton_status
from .drafting_ops import draft_children as draft_children
from .tree_ops import ancestor_bits as ancestor_bits
from .tree_ops import append_rotary as append_rotary
from .tree_ops import compact_kv as compact_kv
from .tree_ops import match_ngrams as match_ngrams
from .tree_ops import merge_continuations as merge_continuations
from .tree_ops import node_depths as node_depths
from .tree_ops import select_best_nodes as select_best_nodes
from .verdict import NodeSelection as NodeSelection
from .verdict import Verdict as Verdict

MAX_HEAD_DIM = 256


def tree_attention_path(
    q: torch.Tensor, value_dim: int, implementation: str = "auto"
) -> tuple[str, str]:
    """The path ``tree_attention`` takes for a query tensor: ``("triton" or "torch", reason)``.

    Raises:
        ValueError: ``implementation`` is not one of "auto", "triton", "torch".
        RuntimeError: ``implementation="triton"`` where the kernel cannot run; the message says why.
    """
    refusal = None
    if q.dtype not in FLOAT_DTYPES:
        dtype = str(q.dtype).removeprefix("torch.")
        refusal = f"the kernel takes float16, bfloat16 and float32, not {dtype}"
    elif max(q.shape[-1], value_dim) > MAX_HEAD_DIM:
        refusal = f"head dimension {max(q.shape[-1], value_dim)} is above {MAX_HEAD_DIM}"
    return kernel_path(q.device, implementation, refusal)


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    ancestor_bits: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    depths: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    implementation: str = "auto",
    check_lengths: bool = True,
) -> torch.Tensor:
    """Attention of tree nodes over the committed prefix and each node's own ancestors.

    Rows ``[0, prefix_lens[b])`` of a cache are committed and seen by every node; row
    ``prefix_lens[b] + i`` is node i, seen by the nodes that have bit i set. Rows past
    ``prefix_lens[b] + N`` are never read. There is no backward pass through the kernel. Softmax and
    sums are float32, and results do not depend on timing.

    Args:
        q: float16, bfloat16 or float32 ``[B, Hq, N, D]``, N from 1 to 256; any strides with unit
            last stride.
        k_cache: ``[B, Hkv, S, D]``, dtype and device of ``q``; Hkv divides Hq, and query head h
            reads h // (Hq/Hkv).
        v_cache: ``[B, Hkv, S, Dv]``, likewise; Dv may differ from D.
        ancestor_bits: int32 ``[B, N, ceil(N/32)]``; bit j % 32 of word j // 32 of row i set: node j
            is an ancestor of node i, or node i itself.
        prefix_lens: int32 or int64 ``[B]``, from 0 to S - N.
        scale: Positive factor on the scores; ``D ** -0.5`` when None.
        sliding_window: Positions a node looks back over, itself included; needs ``depths``.
        depths: int32 or int64 ``[B, N]``; node i has position ``prefix_lens[b] + depths[b, i]``.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118,
            section 2).
        sinks: float ``[Hq]``, one further logit a head in the denominator only (gpt-oss).
        alibi_slopes: float ``[Hq]``; adds ``-slope * (query position - key position)`` after the
            softcap (ALiBi, arXiv 2108.12409, section 3); needs ``depths``.
        implementation: "triton", "torch", or "auto" for Triton on a CUDA device that can run it
            (see ``tree_attention_path``).
        check_lengths: Read ``prefix_lens`` to check it. On a GPU this waits for the device, so a
            loop that knows its lengths passes False; under graph capture lengths are never read.
            The kernel clamps them either way.

    Returns:
        ``[B, N, Hq, Dv]`` in the dtype of ``q``. A node with no bit set and no prefix gets zeros.

    Raises:
        ValueError: An argument has a wrong rank, shape, dtype, device, stride or value; the message
            names it.
        RuntimeError: ``implementation="triton"`` where the kernel cannot run.
    """
    _check_tree_attention(
        q,
        k_cache,
        v_cache,
        ancestor_bits,
        prefix_lens,
        scale,
        sliding_window,
        depths,
        softcap,
        sinks,
        alibi_slopes,
    )
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    if check_lengths and not capturing:
        _check_prefix_lens(prefix_lens, q.shape[2], k_cache.shape[2])
    path, _ = tree_attention_path(q, v_cache.shape[-1], implementation)
    if path == "triton":
        from .tree_attention import launch_tree_attention as run
    else:
        from .torch_attention import tree_attention as run
    return run(
        q,
        k_cache,
        v_cache,
        ancestor_bits,
        prefix_lens,
        scale=scale,
        sliding_window=sliding_window,
        depths=depths,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )


def _check_tree_attention(
    q,
    k_cache,
    v_cache,
    ancestor_bits,
    prefix_lens,
    scale,
    sliding_window,
    depths,
    softcap,
    sinks,
    alibi_slopes,
) -> None:
    """Everything that can be checked without reading a tensor's values."""
    device = q.device if isinstance(q, torch.Tensor) else torch.device("cpu")
    check_tensor("q", q, ALL_FLOAT_DTYPES, "[B, Hq, N, D]", (None,) * 4, device)
    batch, q_heads, num_nodes, head_dim = q.shape
    if min(batch, q_heads, head_dim) < 1:
        raise ValueError(f"q must have no empty dimension; got {list(q.shape)}")
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"q must hold 1 to {MAX_NODES} nodes (dimension 2); got {num_nodes}")
    same = (q.dtype,)
    check_tensor(
        "k_cache",
        k_cache,
        same,
        f"[{batch}, Hkv, S, {head_dim}]",
        (batch, None, None, head_dim),
        device,
    )
    kv_heads, num_slots = k_cache.shape[1], k_cache.shape[2]
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(
            f"k_cache must have a number of heads that divides the {q_heads} of q; got {kv_heads}"
        )
    if num_slots < num_nodes:
        raise ValueError(
            f"k_cache must have at least {num_nodes} rows, one a node (dimension 2); "
            f"got {num_slots}"
        )
    layout = f"[{batch}, {kv_heads}, {num_slots}, Dv]"
    check_tensor("v_cache", v_cache, same, layout, (batch, kv_heads, num_slots, None), device)
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must have a last stride of 1; got strides {list(tensor.stride())}"
            )
    words = (num_nodes + 31) // 32
    shape = (batch, num_nodes, words)
    check_tensor(
        "ancestor_bits", ancestor_bits, (torch.int32,), "[B, N, ceil(N/32)]", shape, device
    )
    check_tensor("prefix_lens", prefix_lens, INDEX_DTYPES, "[B]", (batch,), device)
    if depths is not None:
        check_tensor("depths", depths, INDEX_DTYPES, "[B, N]", (batch, num_nodes), device)
    for name, tensor in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if tensor is not None:
            check_tensor(name, tensor, ALL_FLOAT_DTYPES, "[Hq]", (q_heads,), device)
    for name, value in (("sliding_window", sliding_window), ("alibi_slopes", alibi_slopes)):
        if value is not None and depths is None:
            raise ValueError(f"depths must be given with {name}; got None")
    if sliding_window is not None and (not isinstance(sliding_window, int) or sliding_window < 1):
        raise ValueError(f"sliding_window must be an int of 1 or more; got {sliding_window!r}")
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite; got {softcap!r}")
    if scale is not None and not 0.0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite; got {scale!r}")


def _check_prefix_lens(prefix_lens: torch.Tensor, num_nodes: int, num_slots: int) -> None:
    for length in prefix_lens.tolist():
        if length < 0 or length + num_nodes > num_slots:
            raise ValueError(
                f"prefix_lens must lie in 0..{num_slots - num_nodes}, so that prefix and "
                f"{num_nodes} nodes fit the {num_slots} rows of k_cache; got {length}"
            )
