"""Greedy and coupled verification in two launches (docs/kernels/verify_greedy.md,
verify_sampled.md).

The first finds the target's choice at every node, cut along the vocabulary; the second joins the
parts at the nodes it visits and walks each tree. Coupled sampling adds noise made in registers to
the first, and a launch before it where top-k, top-p or min-p cut the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import counters_of, first_tokens, gumbel_of, per_row, philox_words
from .round_tuning import choice_config, next_power_of_two, tree_warps
from .verdict import Verdict
from .warpers import Warpers


@triton.jit
def _fold(best, best_token, bad, row_ptr, tokens, word, temperature, threshold, vocab_size,
          SAMPLE: tl.constexpr, CUT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """One run of tokens folded into the running argmax of every lane."""
    score = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=-float("inf")).to(DTYPE)
    bad = bad | (score != score)
    if SAMPLE:
        score = tl.div_rn(score, temperature)
        if CUT:
            score = tl.where(score >= threshold, score, -float("inf"))
        score += gumbel_of(word)
    # A lane sees its tokens in ascending order, so a strict comparison keeps the lowest.
    better = score > best
    return tl.where(better, score, best), tl.where(better, tokens, best_token), bad


@triton.jit(do_not_specialize=["capacity"])
def choose_kernel(
    logits_ptr, num_nodes_ptr, positions_ptr, rows_ptr, seeds_ptr, temperature_ptr,
    threshold_ptr, value_ptr, token_ptr,
    capacity, vocab_size, counters_per_split,
    stride_lb, stride_ln,
    SAMPLE: tl.constexpr, CUT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best score of one part of one node's vocabulary and its token; token -1 where a logit is
    NaN.
    """
    # 1. Which node and which part; nodes a tree does not have are left out.
    pair, split = tl.program_id(0), tl.program_id(1)
    b = pair // capacity
    node = pair % capacity
    if node >= tl.load(num_nodes_ptr + b):
        return
    row_ptr = logits_ptr + b.to(tl.int64) * stride_lb + node.to(tl.int64) * stride_ln
    temperature, threshold = 1.0, 0.0
    if SAMPLE:
        temperature = tl.load(temperature_ptr + b)
        seed, row = tl.load(seeds_ptr + b), tl.load(rows_ptr + b).to(tl.int64)
        position = tl.load(positions_ptr + pair).to(tl.int64) + 1
        stream = row * 0
        if CUT:
            threshold = tl.load(threshold_ptr + pair)

    # 2. Argmax by lane.
    best = tl.full([BLOCK], -float("inf"), DTYPE)
    best_token = tl.zeros([BLOCK], tl.int32)
    bad = tl.zeros([BLOCK], tl.int1)
    first = split * counters_per_split
    for start in range(first, first + counters_per_split, BLOCK):
        counter = start + tl.arange(0, BLOCK)
        tokens = first_tokens(counter)
        w0, w1, w2, w3 = counter, counter, counter, counter
        if SAMPLE:
            w0, w1, w2, w3 = philox_words(seed, counter, position, row, stream)
        best, best_token, bad = _fold(
            best,
            best_token,
            bad,
            row_ptr,
            tokens,
            w0,
            temperature,
            threshold,
            vocab_size,
            SAMPLE,
            CUT,
            DTYPE,
        )
        best, best_token, bad = _fold(
            best,
            best_token,
            bad,
            row_ptr,
            tokens + 256,
            w1,
            temperature,
            threshold,
            vocab_size,
            SAMPLE,
            CUT,
            DTYPE,
        )
        best, best_token, bad = _fold(
            best,
            best_token,
            bad,
            row_ptr,
            tokens + 512,
            w2,
            temperature,
            threshold,
            vocab_size,
            SAMPLE,
            CUT,
            DTYPE,
        )
        best, best_token, bad = _fold(
            best,
            best_token,
            bad,
            row_ptr,
            tokens + 768,
            w3,
            temperature,
            threshold,
            vocab_size,
            SAMPLE,
            CUT,
            DTYPE,
        )

    # 3. The best of the lanes, the lowest token among equals; a NaN anywhere beats everything.
    value = tl.max(best, 0)
    token = tl.min(tl.where(best == value, best_token, 2147483647), 0)
    any_bad = tl.max(bad.to(tl.int32), 0) > 0
    place = pair.to(tl.int64) * tl.num_programs(1) + split
    tl.store(value_ptr + place, tl.where(any_bad, float("inf"), value))
    tl.store(token_ptr + place, tl.where(any_bad, -1, token))


@triton.jit(do_not_specialize=["capacity", "num_splits"])
def walk_kernel(
    value_ptr, token_ptr, tokens_ptr, parents_ptr, num_nodes_ptr, path_ptr, accept_ptr, bonus_ptr,
    capacity, num_splits,
    stride_tb, stride_pb,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Join the parts at each visited node and descend while a child carries the choice."""
    # 1. The tree, one node a lane.
    b = tl.program_id(0)
    index = tl.arange(0, BLOCK_N)
    part = tl.arange(0, BLOCK_S)
    count = tl.minimum(tl.load(num_nodes_ptr + b).to(tl.int32), capacity)
    exists = index < count
    tokens = tl.load(tokens_ptr + b * stride_tb + index, mask=exists, other=-1).to(tl.int32)
    parents = tl.load(parents_ptr + b * stride_pb + index, mask=exists, other=-1).to(tl.int32)

    # 2. The walk: a child has a higher index than its parent, so it ends.
    path = tl.full([BLOCK_N], -1, tl.int32)
    node, depth, bonus = count * 0, count * 0, count * 0 - 1
    going = count > 0
    while going:
        path = tl.where(index == depth, node, path)
        place = (b * capacity + node).to(tl.int64) * num_splits + part
        values = tl.load(value_ptr + place, mask=part < num_splits, other=-float("inf"))
        choices = tl.load(token_ptr + place, mask=part < num_splits, other=2147483647)
        best = tl.max(values, 0)
        choice = tl.min(tl.where(values == best, choices, 2147483647), 0)
        bonus = tl.where((best > -float("inf")) & (choice >= 0), choice, -1)
        hits = (parents == node) & (tokens == bonus) & (index > node) & exists
        child = tl.min(tl.where(hits, index, BLOCK_N), 0)
        going = (child < BLOCK_N) & (bonus >= 0)
        node = tl.where(going, child, node)
        depth = tl.where(going, depth + 1, depth)

    # 3. The verdict.
    tl.store(path_ptr + b * capacity + index, path.to(tl.int64), mask=index < capacity)
    tl.store(accept_ptr + b, depth.to(tl.int64))
    tl.store(bonus_ptr + b, bonus.to(tl.int64))


def launch_verify_greedy(logits, tokens, parents, num_nodes) -> Verdict:
    """Two launches; reads B * N * V logits once, writes a few bytes a node. Arguments as in
    ``ops.verify_greedy``.
    """
    return _launch(logits, tokens, parents, num_nodes)


def launch_coupled(
    logits, tokens, parents, num_nodes, positions, warpers: Warpers, seed, rows
) -> Verdict:
    """``argmax(warped logits + noise)`` at every node: two launches, three where the vocabulary is
    cut.
    """
    batch, device = tokens.shape[0], logits.device
    threshold = None
    if any(warpers.active(name) for name in ("top_k", "top_p", "min_p")):
        from .vocabulary_cut import launch_cut

        threshold, _ = launch_cut(logits, parents, num_nodes, warpers, None)
    noise = (
        positions.contiguous(),
        rows.contiguous(),
        per_row(seed, batch, torch.int64, device),
        per_row(warpers.temperature, batch, torch.float32, device),
        threshold,
    )
    return _launch(logits, tokens, parents, num_nodes, noise)


def _launch(logits, tokens, parents, num_nodes, noise=(None,) * 5) -> Verdict:
    batch, capacity, vocab_size = logits.shape
    device = logits.device
    verdict = Verdict(
        torch.empty(batch, capacity, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )
    if batch == 0:
        return verdict
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    positions, rows, seeds, temperature, threshold = noise
    sample = seeds is not None
    double = logits.dtype == torch.float64 and not sample
    config = choice_config(batch * capacity, vocab_size)
    tiles = triton.cdiv(counters_of(vocab_size), config.block)
    per_split = triton.cdiv(tiles, config.num_splits)
    num_splits = triton.cdiv(tiles, per_split)
    values = torch.empty(
        batch * capacity,
        num_splits,
        dtype=torch.float64 if double else torch.float32,
        device=device,
    )
    choices = torch.empty(batch * capacity, num_splits, dtype=torch.int32, device=device)
    choose_kernel[(batch * capacity, num_splits)](
        logits, num_nodes, positions, rows, seeds, temperature, threshold, values, choices,
        capacity, vocab_size, per_split * config.block,
        logits.stride(0), logits.stride(1),
        SAMPLE=sample, CUT=threshold is not None, DTYPE=tl.float64 if double else tl.float32,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )  # fmt: skip
    tokens, parents = tokens.contiguous(), parents.contiguous()
    walk_kernel[(batch,)](
        values, choices, tokens, parents, num_nodes, *verdict,
        capacity, num_splits,
        tokens.stride(0), parents.stride(0),
        BLOCK_N=next_power_of_two(capacity), BLOCK_S=next_power_of_two(num_splits),
        num_warps=tree_warps(capacity),
    )  # fmt: skip
    return verdict
