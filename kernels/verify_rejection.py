"""The two rejection rules in Triton: one launch for the normalisers, one that decides every tree
(docs/kernels/verify_sampled.md).

A program owns a row. No residual distribution is stored: after some children of a node were
rejected, p and q at a token are recomputed from the logits by replaying those rejections, each of
which is four numbers. A rejection costs one pass over the vocabulary, and so does the bonus token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .noise import ACCEPT_STREAM, RESIDUAL_STREAM
from .philox import counters_of, first_tokens, gumbel_of, per_row, philox_words, uniform_of
from .round_tuning import next_power_of_two, row_config
from .verdict import Verdict
from .vocabulary_cut import launch_cut
from .warpers import Warpers

ACCEPT = tl.constexpr(ACCEPT_STREAM)
RESIDUAL = tl.constexpr(RESIDUAL_STREAM)


@triton.jit
def _distributions(
    row_ptr, draft_row_ptr, tokens, inside, temperature, threshold, logsumexp,
    first_ptr, next_ptr, record_ptr, tokens_row_ptr, node, drafted,
    CUT: tl.constexpr,
):  # fmt: skip
    """p and q of a node at some tokens, after the rejections recorded for it; q is read where
    ``drafted`` is 1.
    """
    scores = tl.div_rn(
        tl.load(row_ptr + tokens, mask=inside, other=-float("inf")).to(tl.float32), temperature
    )
    p = tl.where(inside, tl.exp(scores - logsumexp), 0.0)
    if CUT:
        p = tl.where(scores >= threshold, p, 0.0)
    q = tl.load(draft_row_ptr + tokens, mask=tl.where(inside, drafted, 0) > 0, other=0.0).to(
        tl.float32
    )
    child = tl.load(first_ptr + node)
    while child >= 0:
        rate = tl.load(record_ptr + 3 * child)
        mass = tl.load(record_ptr + 3 * child + 1)
        rest = tl.load(record_ptr + 3 * child + 2)
        x = tl.load(tokens_row_ptr + child).to(tl.int32)
        left = tl.maximum(rate * p - q, 0.0)
        p = tl.where(mass > 0, tl.div_rn(left, tl.where(mass > 0, mass, 1.0)), p)
        q = tl.where(tokens == x, 0.0, q)
        q = tl.where(rest > 0, tl.div_rn(q, tl.where(rest > 0, rest, 1.0)), q)
        child = tl.load(next_ptr + child)
    return p, q


@triton.jit
def _coin(seed, row, node, stream):
    """The uniform number of a node."""
    zero = node * 0
    word, _, _, _ = philox_words(seed, zero, node, row, stream)
    return uniform_of(word)


@triton.jit(do_not_specialize=["capacity"])
def rejection_kernel(
    logits_ptr, draft_ptr, tokens_ptr, parents_ptr, num_nodes_ptr, positions_ptr, rows_ptr,
    seeds_ptr,
    temperature_ptr, threshold_ptr, logsumexp_ptr,
    links_ptr, record_ptr, path_ptr, accept_ptr, bonus_ptr,
    capacity, vocab_size, num_counters,
    stride_lb, stride_ln, stride_db, stride_dn,
    TRAVERSAL: tl.constexpr, CUT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # 1. The tree, one node a lane, and this row's own scratch.
    b = tl.program_id(0)
    index = tl.arange(0, BLOCK_N)
    count = tl.minimum(tl.load(num_nodes_ptr + b).to(tl.int32), capacity)
    exists = index < count
    parents = tl.load(parents_ptr + b * capacity + index, mask=exists, other=-1).to(tl.int32)
    tokens_row_ptr = tokens_ptr + b * capacity
    row_logits_ptr = logits_ptr + b.to(tl.int64) * stride_lb
    row_draft_ptr = draft_ptr + b.to(tl.int64) * stride_db
    first_ptr, next_ptr = links_ptr + b * 3 * capacity, links_ptr + (b * 3 + 1) * capacity
    last_ptr = links_ptr + (b * 3 + 2) * capacity
    row_record_ptr = record_ptr + b * 3 * capacity
    for offset in tl.static_range(3):
        tl.store(
            links_ptr + (b * 3 + offset) * capacity + index, index * 0 - 1, mask=index < capacity
        )
    tl.debug_barrier()
    temperature = tl.load(temperature_ptr + b)
    seed, row = tl.load(seeds_ptr + b), tl.load(rows_ptr + b).to(tl.int64)
    stream = 4 * tl.load(positions_ptr + b * capacity).to(tl.int64)
    accept_stream, residual_stream = stream + ACCEPT, stream + RESIDUAL

    # 2. The decisions. ``after`` is the last child dealt with of the node the row is at.
    rates = tl.full([BLOCK_N], 1.0, tl.float32)
    node, after = count * 0, count * 0
    logsumexp = tl.load(logsumexp_ptr + b * capacity, mask=count > 0, other=float("nan"))
    going = (count > 0) & (logsumexp == logsumexp)
    while going:
        hits = (parents == node) & (index > after) & exists
        child = tl.min(tl.where(hits, index, BLOCK_N), 0)
        has_child = child < BLOCK_N
        loser = node * 0 - 1
        if has_child:
            # 2a. Look at the next child.
            x = tl.load(tokens_row_ptr + child).to(tl.int32)
            valid = (x >= 0) & (x < vocab_size)
            threshold = logsumexp * 0
            if CUT:
                threshold = tl.load(threshold_ptr + b * capacity + node)
            p_x, q_x = _distributions(
                row_logits_ptr + node.to(tl.int64) * stride_ln,
                row_draft_ptr + node.to(tl.int64) * stride_dn,
                x, valid, temperature, threshold, logsumexp,
                first_ptr, next_ptr, row_record_ptr, tokens_row_ptr, node, 1, CUT)  # fmt: skip
            after = child
            # A token the draft cannot have drawn tells nothing: its child is passed over.
            if valid & (q_x > 0):
                enters = True
                if TRAVERSAL:
                    rate = tl.sum(tl.where(index == node, rates, 0.0), 0)
                    child_rate = tl.minimum(1.0, tl.div_rn(rate * p_x, q_x))
                    rates = tl.where(index == child, child_rate, rates)
                else:
                    enters = _coin(seed, row, child, accept_stream) * q_x < p_x
                if enters:
                    node = child
                    logsumexp = tl.load(logsumexp_ptr + b * capacity + node)
                    going = logsumexp == logsumexp
                else:
                    loser = child
        else:
            # 2b. Nothing is left below: stop here, or delete this leaf.
            going = count < 0
            if TRAVERSAL:
                rate = tl.sum(tl.where(index == node, rates, 0.0), 0)
                if (node > 0) & (_coin(seed, row, node, accept_stream) >= rate):
                    loser = node
                    after = node
                    node = tl.sum(tl.where(index == node, parents, 0), 0)
                    logsumexp = tl.load(logsumexp_ptr + b * capacity + node)
                    going = count > 0
        if loser >= 0:
            # 2c. Child ``loser`` of ``node`` is rejected: the masses of both residuals in one pass.
            rate = tl.sum(tl.where(index == node, rates, 0.0), 0)
            x = tl.load(tokens_row_ptr + loser).to(tl.int32)
            threshold = logsumexp * 0
            if CUT:
                threshold = tl.load(threshold_ptr + b * capacity + node)
            left = tl.zeros([BLOCK], tl.float32)
            rest = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                tokens = start + tl.arange(0, BLOCK)
                p, q = _distributions(
                    row_logits_ptr + node.to(tl.int64) * stride_ln,
                    row_draft_ptr + node.to(tl.int64) * stride_dn,
                    tokens, tokens < vocab_size, temperature, threshold, logsumexp,
                    first_ptr, next_ptr, row_record_ptr, tokens_row_ptr, node, 1, CUT)  # fmt: skip
                left += tl.maximum(rate * p - q, 0.0)
                rest += tl.where(tokens == x, 0.0, q)
            mass = tl.sum(left, 0)
            tl.debug_barrier()
            tl.store(row_record_ptr + 3 * loser, rate)
            tl.store(row_record_ptr + 3 * loser + 1, mass)
            tl.store(row_record_ptr + 3 * loser + 2, tl.sum(rest, 0))
            previous = tl.load(last_ptr + node)
            tl.debug_barrier()
            if previous < 0:
                tl.store(first_ptr + node, loser)
            else:
                tl.store(next_ptr + previous, loser)
            tl.store(last_ptr + node, loser)
            tl.debug_barrier()
            if TRAVERSAL:
                kept = tl.where(mass > 0, tl.div_rn(mass, mass + 1.0 - rate), 0.0)
                rates = tl.where((index == node) & (index > 0), kept, rates)

    # 3. The path: the node and its ancestors, in the order of their indices.
    on_path = (index == node) & exists
    step = node
    while step > 0:
        step = tl.sum(tl.where(index == step, parents, 0), 0)
        on_path = on_path | (index == step)
    place = tl.cumsum(on_path.to(tl.int32), 0) - 1
    length = tl.sum(on_path.to(tl.int32), 0)
    path_row_ptr = path_ptr + b * capacity
    tl.store(path_row_ptr + place, index.to(tl.int64), mask=on_path)
    tl.store(
        path_row_ptr + index,
        (index * 0 - 1).to(tl.int64),
        mask=(index >= length) & (index < capacity),
    )
    tl.store(accept_ptr + b, tl.maximum(length - 1, 0).to(tl.int64))

    # 4. The bonus token: argmax of log p plus noise of its own.
    bonus = node * 0 - 1
    if logsumexp == logsumexp:
        threshold = logsumexp * 0
        if CUT:
            threshold = tl.load(threshold_ptr + b * capacity + node)
        # Without a rejection q has no part in p, and a leaf has none.
        rejected = tl.where(tl.load(last_ptr + node) >= 0, 1, 0)
        best = tl.full([BLOCK_C], -float("inf"), tl.float32)
        best_token = tl.zeros([BLOCK_C], tl.int32)
        for start in range(0, num_counters, BLOCK_C):
            counter = start + tl.arange(0, BLOCK_C)
            w0, w1, w2, w3 = philox_words(seed, counter, node.to(tl.int64), row, residual_stream)
            for run in tl.static_range(4):
                tokens = first_tokens(counter) + 256 * run
                p, _ = _distributions(
                    row_logits_ptr + node.to(tl.int64) * stride_ln,
                    row_draft_ptr + node.to(tl.int64) * stride_dn,
                    tokens, tokens < vocab_size, temperature, threshold, logsumexp,
                    first_ptr, next_ptr, row_record_ptr, tokens_row_ptr, node, rejected,
                    CUT)  # fmt: skip
                word = w0
                if run == 1:
                    word = w1
                if run == 2:
                    word = w2
                if run == 3:
                    word = w3
                score = tl.where(p > 0, tl.log(p) + gumbel_of(word), -float("inf"))
                better = score > best
                best, best_token = (
                    tl.where(better, score, best),
                    tl.where(better, tokens, best_token),
                )
        value = tl.max(best, 0)
        bonus = tl.min(tl.where(best == value, best_token, 2147483647), 0)
    tl.store(bonus_ptr + b, bonus.to(tl.int64))


def launch_rejection(
    logits,
    tokens,
    parents,
    num_nodes,
    positions,
    draft_probs,
    rule: str,
    warpers: Warpers,
    seed,
    rows,
) -> Verdict:
    """Two launches; arguments as in ``ops.verify_sampled``. Reads B * N * V logits a few times and
    the
    draft probabilities of nodes with children; scratch is six numbers a node.
    """
    batch, capacity, vocab_size = logits.shape
    device = logits.device
    verdict = Verdict(
        torch.empty(batch, capacity, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int64, device=device),
    )
    if batch == 0:
        return verdict
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    draft_probs = draft_probs if draft_probs.stride(2) == 1 else draft_probs.contiguous()
    threshold, logsumexp = launch_cut(logits, parents, num_nodes, warpers, draft_probs)
    links = torch.empty(batch, 3, capacity, dtype=torch.int32, device=device)
    record = torch.empty(batch, capacity, 3, dtype=torch.float32, device=device)
    config = row_config(vocab_size)
    rejection_kernel[(batch,)](
        logits, draft_probs, tokens.contiguous(), parents.contiguous(), num_nodes,
        positions.contiguous(),
        rows.contiguous(), per_row(seed, batch, torch.int64, device),
        per_row(warpers.temperature, batch, torch.float32, device), threshold, logsumexp,
        links, record, *verdict,
        capacity, vocab_size, counters_of(vocab_size),
        logits.stride(0), logits.stride(1), draft_probs.stride(0), draft_probs.stride(1),
        TRAVERSAL=rule == "traversal", CUT=threshold is not None,
        BLOCK=config.block, BLOCK_C=min(1024, max(256, config.block // 4)),
        BLOCK_N=next_power_of_two(capacity),
        num_warps=8,
    )  # fmt: skip
    return verdict


def launch_verify_sampled(
    logits,
    tokens,
    parents,
    num_nodes,
    positions,
    draft_probs,
    rule: str,
    warpers: Warpers,
    seed,
    rows,
) -> Verdict:
    """The launcher of every rule; arguments as in ``ops.verify_sampled``."""
    from .verify import launch_coupled

    if rule in ("coupled", "target_only"):
        return launch_coupled(logits, tokens, parents, num_nodes, positions, warpers, seed, rows)
    return launch_rejection(
        logits, tokens, parents, num_nodes, positions, draft_probs, rule, warpers, seed, rows
    )
