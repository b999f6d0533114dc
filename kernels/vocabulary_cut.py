"""What top-k, top-p and min-p leave of each node's vocabulary, as one threshold, and its log-sum-
exp
(docs/kernels/verify_sampled.md).

The k-th largest score and the top-p boundary are found bit by bit on order-preserving integer keys,
so nothing is sorted and no distribution is stored: each of the 32 steps is one pass over a row that
the first pass has brought into the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import per_row
from .round_tuning import next_power_of_two, row_config
from .warpers import Warpers


@triton.jit
def _scores(row_ptr, start, temperature, vocab_size, BLOCK: tl.constexpr):
    tokens = start + tl.arange(0, BLOCK)
    inside = tokens < vocab_size
    logits = tl.load(row_ptr + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.div_rn(logits, temperature), inside


@triton.jit
def _keys(scores):
    """uint32 keys in the order of the scores."""
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _score_of(key):
    """The score a key stands for."""
    bits = tl.where(key >> 31 == 1, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _count_and_mass(row_ptr, key, floor, greatest, temperature, vocab_size, BLOCK: tl.constexpr):
    """How many scores have at least ``key``, and the mass of those above it "
    "that reach ``floor``."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        scores, inside = _scores(row_ptr, start, temperature, vocab_size, BLOCK)
        keys = _keys(scores)
        count += (inside & (keys >= key)).to(tl.int32)
        mass += tl.where(inside & (keys > key) & (scores >= floor), tl.exp(scores - greatest), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit(do_not_specialize=["capacity"])
def cut_kernel(
    logits_ptr, draft_ptr, parents_ptr, num_nodes_ptr, temperature_ptr, top_k_ptr, top_p_ptr,
    min_p_ptr,
    threshold_ptr, logsumexp_ptr,
    capacity, vocab_size,
    stride_lb, stride_ln, stride_db, stride_dn, stride_pb,
    CUT: tl.constexpr, DRAFT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # 1. Which node.
    pair = tl.program_id(0)
    b = pair // capacity
    node = pair % capacity
    if node >= tl.load(num_nodes_ptr + b):
        return
    row_ptr = logits_ptr + b.to(tl.int64) * stride_lb + node.to(tl.int64) * stride_ln
    temperature = tl.load(temperature_ptr + b)

    # 2. The greatest score; a NaN makes it NaN.
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int1)
    for start in range(0, vocab_size, BLOCK):
        scores, inside = _scores(row_ptr, start, temperature, vocab_size, BLOCK)
        bad = bad | (scores != scores)
        highest = tl.maximum(highest, tl.where(inside, scores, -float("inf")))
    greatest = tl.max(highest, 0)
    undecidable = (tl.max(bad.to(tl.int32), 0) > 0) | (greatest == -float("inf"))

    # 3. The threshold of each filter, the greatest of them counts.
    threshold = greatest * 0 - float("inf")
    if CUT:
        top_k = tl.load(top_k_ptr + b).to(tl.int32)
        top_p, min_p = tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
        if (top_k > 0) & (top_k < vocab_size):
            key = tl.zeros([], tl.uint32)
            bit = tl.full([], 0x80000000, tl.uint32)
            for _ in range(32):
                trial = key | bit
                bit = bit >> 1
                count, _ = _count_and_mass(
                    row_ptr, trial, -float("inf"), greatest, temperature, vocab_size, BLOCK
                )
                key = tl.where(count >= top_k, trial, key)
            threshold = _score_of(key)
        if top_p < 1.0:
            # The greatest key with a mass of top_p or more strictly above it; the next one is kept.
            key = tl.zeros([], tl.uint32)
            _, total = _count_and_mass(
                row_ptr, key, threshold, greatest, temperature, vocab_size, BLOCK
            )
            wanted = top_p * total
            bit = tl.full([], 0x80000000, tl.uint32)
            for _ in range(32):
                trial = key | bit
                bit = bit >> 1
                _, mass = _count_and_mass(
                    row_ptr, trial, threshold, greatest, temperature, vocab_size, BLOCK
                )
                key = tl.where(mass >= wanted, trial, key)
            if key > 0:
                threshold = tl.maximum(threshold, _score_of(key + 1))
        if min_p > 0.0:
            threshold = tl.maximum(threshold, greatest + tl.log(min_p))
        tl.store(threshold_ptr + pair, threshold)

    # 4. The normaliser of what stays; NaN where the node decides nothing.
    if DRAFT:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            scores, inside = _scores(row_ptr, start, temperature, vocab_size, BLOCK)
            total += tl.where(inside & (scores >= threshold), tl.exp(scores - greatest), 0.0)
        logsumexp = greatest + tl.log(tl.sum(total, 0))
        index = tl.arange(0, BLOCK_N)
        count = tl.minimum(tl.load(num_nodes_ptr + b).to(tl.int32), capacity)
        parents = tl.load(parents_ptr + b * stride_pb + index, mask=index < count, other=-1).to(
            tl.int32
        )
        if tl.max(((parents == node) & (index > node)).to(tl.int32), 0) > 0:
            drafted = tl.zeros([BLOCK], tl.float32)
            draft_row_ptr = draft_ptr + b.to(tl.int64) * stride_db + node.to(tl.int64) * stride_dn
            for start in range(0, vocab_size, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                drafted += tl.load(draft_row_ptr + tokens, mask=tokens < vocab_size, other=0.0).to(
                    tl.float32
                )
            drafted_total = tl.sum(drafted, 0)
            undecidable = (
                undecidable | (drafted_total != drafted_total) | (drafted_total == float("inf"))
            )
        tl.store(logsumexp_ptr + pair, tl.where(undecidable, float("nan"), logsumexp))


def launch_cut(
    logits: torch.Tensor,
    parents: torch.Tensor,
    num_nodes: torch.Tensor,
    warpers: Warpers,
    draft_probs: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One launch, a program a node.

    Returns:
        The least score that stays, float32 [B, N] (None where nothing is cut), and with
        ``draft_probs`` the log-sum-exp of what stays, float32 [B, N], NaN for a node whose logits,
        or whose draft probabilities where it has children, are not numbers. Both are undefined past
        ``num_nodes``.
    """
    batch, capacity, vocab_size = logits.shape
    device = logits.device
    cuts = any(warpers.active(name) for name in ("top_k", "top_p", "min_p"))
    threshold = torch.empty(batch, capacity, dtype=torch.float32, device=device) if cuts else None
    logsumexp = None
    if draft_probs is not None:
        logsumexp = torch.empty(batch, capacity, dtype=torch.float32, device=device)
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    parents = parents.contiguous()
    config = row_config(vocab_size)
    cut_kernel[(batch * capacity,)](
        logits, draft_probs, parents, num_nodes,
        per_row(warpers.temperature, batch, torch.float32, device),
        per_row(warpers.top_k, batch, torch.int32, device) if cuts else None,
        per_row(warpers.top_p, batch, torch.float32, device) if cuts else None,
        per_row(warpers.min_p, batch, torch.float32, device) if cuts else None,
        threshold, logsumexp,
        capacity, vocab_size,
        logits.stride(0), logits.stride(1),
        0 if draft_probs is None else draft_probs.stride(0),
        0 if draft_probs is None else draft_probs.stride(1),
        parents.stride(0),
        CUT=cuts, DRAFT=draft_probs is not None,
        BLOCK=config.block, BLOCK_N=next_power_of_two(capacity),
        num_warps=config.num_warps,
    )  # fmt: skip
    return threshold, logsumexp
