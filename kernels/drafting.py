"""Children of a frontier in two launches (docs/kernels/drafting.md).

The first finds the best tokens of every part of every parent's vocabulary, with noise made in
registers, and the part's share of the normaliser; the second joins the parts. A launch before them
finds the cut where top-k, top-p or min-p are on.

A token and its score are one int64: the score's bits in the order of the scores above, 2^31 - 1
minus the token below. The greatest is the best score and among equals the lowest token, and no two
are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .drafting_rules import LEAST_LOGPROB
from .noise import DRAFT_STREAM
from .philox import counters_of, first_tokens, gumbel_of, per_row, philox_words
from .round_tuning import children_config, next_power_of_two
from .warpers import Warpers

NONE = tl.constexpr(-(2**63) + 1)
LEAST = tl.constexpr(LEAST_LOGPROB)


@triton.jit
def _rank(score, token):
    """One number for a score and its token."""
    # Adding 0 makes -0.0 the same as 0.0.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.int64) * 4294967296 + (2147483647 - token)


@triton.jit
def _score_of(rank):
    """The score of a number made by ``_rank``."""
    ordered = (rank >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _score(row_ptr, token, word, vocab_size, temperature, threshold, sharpness,
           COUPLED: tl.constexpr, CUT: tl.constexpr):  # fmt: skip
    """The scores whose softmax is the draft's distribution."""
    logits = tl.load(row_ptr + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
    score = tl.div_rn(logits, temperature)
    if CUT:
        score = tl.where(score < threshold, -float("inf"), score)
    if COUPLED:
        score += gumbel_of(word)
    return score * sharpness


@triton.jit
def _rank_of(score, token, word, vocab_size, SAMPLED: tl.constexpr):
    """What orders the children; noise of their own for drawn ones."""
    if SAMPLED:
        score += gumbel_of(word)
    return tl.where(token < vocab_size, _rank(score, token), NONE)


@triton.jit(do_not_specialize=["frontier", "num_children"])
def part_kernel(
    logits_ptr, cum_ptr, threshold_ptr, temperature_ptr, sharpness_ptr, seeds_ptr, rows_ptr,
    places_ptr, roots_ptr,
    ranks_ptr, peak_ptr, mass_ptr,
    frontier, vocab_size, num_children, min_logprob,
    stride_lb, stride_lf,
    COUPLED: tl.constexpr, SAMPLED: tl.constexpr, CUT: tl.constexpr,
    STREAM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best tokens of one part of one parent's vocabulary, its greatest score and the sum of
    exponentials over that; a greatest score that is NaN marks a NaN among the logits.
    """
    # 1. Which parent and which part; one that is pruned or absent is left out.
    pair, part = tl.program_id(0), tl.program_id(1)
    above = tl.load(cum_ptr + pair).to(tl.float32)
    if not ((above > -float("inf")) & (above >= min_logprob)):
        return
    b = pair // frontier
    row_ptr = logits_ptr + b.to(tl.int64) * stride_lb + (pair % frontier).to(tl.int64) * stride_lf
    temperature, sharpness = tl.load(temperature_ptr + b), tl.load(sharpness_ptr + b)
    threshold = temperature * 0
    if CUT:
        threshold = tl.load(threshold_ptr + pair)

    # 2. The scores, four runs of tokens a counter.
    counter = part * BLOCK + tl.arange(0, BLOCK)
    token = first_tokens(counter)
    w0, w1, w2, w3 = counter, counter, counter, counter
    if COUPLED or SAMPLED:
        seed, row = tl.load(seeds_ptr + b), tl.load(rows_ptr + b).to(tl.int64)
        stream = row * 0
        if SAMPLED:
            stream = 4 * tl.load(roots_ptr + b).to(tl.int64) + STREAM
        place = tl.load(places_ptr + pair).to(tl.int64)
        w0, w1, w2, w3 = philox_words(seed, counter, place, row, stream)
    s0 = _score(row_ptr, token, w0, vocab_size, temperature, threshold, sharpness, COUPLED, CUT)
    s1 = _score(
        row_ptr, token + 256, w1, vocab_size, temperature, threshold, sharpness, COUPLED, CUT
    )
    s2 = _score(
        row_ptr, token + 512, w2, vocab_size, temperature, threshold, sharpness, COUPLED, CUT
    )
    s3 = _score(
        row_ptr, token + 768, w3, vocab_size, temperature, threshold, sharpness, COUPLED, CUT
    )

    # 3. Its share of the normaliser.
    bad = (s0 != s0) | (s1 != s1) | (s2 != s2) | (s3 != s3)
    peak = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0)
    base = tl.where(peak > -float("inf"), peak, 0.0)
    mass = tl.exp(s0 - base) + tl.exp(s1 - base) + tl.exp(s2 - base) + tl.exp(s3 - base)
    peak = tl.where(tl.max(bad.to(tl.int32), 0) > 0, float("nan"), peak)
    out = pair.to(tl.int64) * tl.num_programs(1) + part
    tl.store(peak_ptr + out, peak)
    tl.store(mass_ptr + out, tl.sum(mass, 0))

    # 4. Its best, one after the other.
    r0 = _rank_of(s0, token, w0, vocab_size, SAMPLED)
    r1 = _rank_of(s1, token + 256, w1, vocab_size, SAMPLED)
    r2 = _rank_of(s2, token + 512, w2, vocab_size, SAMPLED)
    r3 = _rank_of(s3, token + 768, w3, vocab_size, SAMPLED)
    slot = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_K], NONE, tl.int64)
    for index in range(num_children):
        rank = tl.max(tl.maximum(tl.maximum(r0, r1), tl.maximum(r2, r3)), 0)
        best = tl.where(slot == index, rank, best)
        r0 = tl.where(r0 == rank, NONE, r0)
        r1 = tl.where(r1 == rank, NONE, r1)
        r2 = tl.where(r2 == rank, NONE, r2)
        r3 = tl.where(r3 == rank, NONE, r3)
    tl.store(ranks_ptr + out * num_children + slot, best, mask=slot < num_children)


@triton.jit(do_not_specialize=["frontier", "num_parts", "num_children"])
def join_kernel(
    logits_ptr, cum_ptr, breadth_ptr, temperature_ptr, sharpness_ptr, ranks_ptr, peak_ptr, mass_ptr,
    tokens_ptr, logprobs_ptr,
    frontier, num_parts, num_children, min_logprob,
    stride_lb, stride_lf,
    SAMPLED: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The best of the parts of one parent, and their cumulative log-probabilities."""
    # 1. The normaliser.
    pair = tl.program_id(0)
    slot = tl.arange(0, BLOCK_K)
    above = tl.load(cum_ptr + pair).to(tl.float32)
    best = tl.full([BLOCK_K], NONE, tl.int64)
    logsumexp = above * 0
    if (above > -float("inf")) & (above >= min_logprob):
        part = tl.arange(0, BLOCK_P)
        place = pair.to(tl.int64) * num_parts + part
        peaks = tl.load(peak_ptr + place, mask=part < num_parts, other=-float("inf"))
        masses = tl.load(mass_ptr + place, mask=part < num_parts, other=0.0)
        peak = tl.max(peaks, 0)
        bad = (tl.max((peaks != peaks).to(tl.int32), 0) > 0) | (peak == -float("inf"))
        peak = tl.where(bad, 0.0, peak)
        # A part with nothing above -inf has mass 0.
        mass = tl.sum(masses * tl.exp(tl.where(masses > 0, peaks - peak, 0.0)), 0)
        logsumexp = tl.where(bad, float("nan"), peak + tl.log(mass))

        # 2. The best, one after the other.
        index = tl.arange(0, BLOCK_R)
        count = num_parts * num_children
        ranks = tl.load(
            ranks_ptr + pair.to(tl.int64) * count + index, mask=index < count, other=NONE
        )
        for child in range(num_children):
            rank = tl.max(ranks, 0)
            best = tl.where(slot == child, rank, best)
            ranks = tl.where(ranks == rank, NONE, ranks)

    # 3. The children: what is NaN compares as false and is absent.
    token = 2147483647 - (best & 0xFFFFFFFF).to(tl.int32)
    score = _score_of(best)
    present = (best > NONE) & (slot < num_children)
    if SAMPLED:
        # Ranks hold the noise too.
        b = pair // frontier
        row_ptr = (
            logits_ptr + b.to(tl.int64) * stride_lb + (pair % frontier).to(tl.int64) * stride_lf
        )
        present = present & (score > -float("inf"))
        logits = tl.load(row_ptr + token, mask=present, other=-float("inf")).to(tl.float32)
        score = tl.div_rn(logits, tl.load(temperature_ptr + b)) * tl.load(sharpness_ptr + b)
    if LIMITED:
        present = present & (slot < tl.load(breadth_ptr + pair).to(tl.int32))
    logprob = score - logsumexp
    present = present & (logprob >= LEAST)
    out = pair.to(tl.int64) * num_children + slot
    tl.store(tokens_ptr + out, tl.where(present, token, -1).to(tl.int64), mask=slot < num_children)
    tl.store(
        logprobs_ptr + out, tl.where(present, above + logprob, -float("inf")),
        mask=slot < num_children,
    )  # fmt: skip


def launch_draft_children(
    logits: torch.Tensor,
    cum_logprobs: torch.Tensor,
    num_children: int,
    drafting: str,
    warpers: Warpers,
    sharpness: float | torch.Tensor,
    breadth: torch.Tensor | None,
    min_logprob: float,
    seed: int | torch.Tensor | None,
    rows: torch.Tensor | None,
    places: torch.Tensor | None,
    root_positions: torch.Tensor | None,
    noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches, three where the vocabulary is cut; reads the logits of the parents that get
    children once. Arguments as in ``ops.draft_children``, ``places`` being positions or nodes;
    ``noise`` is made in registers instead.
    """
    batch, frontier, vocab_size = logits.shape
    device = logits.device
    shape = (batch, frontier, num_children)
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    logprobs = torch.empty(shape, dtype=torch.float32, device=device)
    if tokens.numel() == 0:
        return tokens, logprobs
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    cum_logprobs = cum_logprobs.contiguous()
    temperature = per_row(warpers.temperature, batch, torch.float32, device)
    sharpness = per_row(sharpness, batch, torch.float32, device)
    threshold = None
    if any(warpers.active(name) for name in ("top_k", "top_p", "min_p")):
        from .vocabulary_cut import launch_cut

        every = torch.full((batch,), frontier, dtype=torch.int32, device=device)
        threshold, _ = launch_cut(logits, every, every, warpers, None)
    noisy = drafting != "top"
    sampled = drafting == "sampled"
    config = children_config(vocab_size)
    parts = triton.cdiv(counters_of(vocab_size), config.block)
    pairs = batch * frontier
    ranks = torch.empty(pairs, parts, num_children, dtype=torch.int64, device=device)
    peaks, masses = torch.empty(2, pairs, parts, dtype=torch.float32, device=device)
    block_k = next_power_of_two(num_children)
    part_kernel[(pairs, parts)](
        logits, cum_logprobs, threshold, temperature, sharpness,
        per_row(seed, batch, torch.int64, device) if noisy else None,
        rows.contiguous() if noisy else None, places.contiguous() if noisy else None,
        root_positions.contiguous() if sampled else None,
        ranks, peaks, masses,
        frontier, vocab_size, num_children, min_logprob,
        logits.stride(0), logits.stride(1),
        COUPLED=drafting == "coupled", SAMPLED=sampled, CUT=threshold is not None,
        STREAM=DRAFT_STREAM, BLOCK=config.block, BLOCK_K=block_k,
        num_warps=config.num_warps,
    )  # fmt: skip
    block_r = next_power_of_two(parts * num_children)
    join_kernel[(pairs,)](
        logits, cum_logprobs, None if breadth is None else breadth.contiguous(), temperature,
        sharpness,
        ranks, peaks, masses, tokens, logprobs,
        frontier, parts, num_children, min_logprob,
        logits.stride(0), logits.stride(1),
        SAMPLED=sampled, LIMITED=breadth is not None,
        BLOCK_P=next_power_of_two(parts), BLOCK_R=block_r, BLOCK_K=block_k,
        num_warps=4 if block_r <= 1024 else 8,
    )  # fmt: skip
    return tokens, logprobs
