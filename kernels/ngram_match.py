"""Lookup of the last tokens of a history in the history itself, in two launches
(docs/kernels/match_ngrams.md): every part of the history finds its best places, then the parts are
joined and what followed the places is copied out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .round_tuning import TARGET_PROGRAMS, next_power_of_two


@triton.jit
def scan_kernel(
    tokens_ptr, lens_ptr, ranks_ptr,
    max_ngram, num_matches, min_ngram,
    stride_tb,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The best places of one part: rank = match length * 2^32 + place + 1, and 0 for none."""
    # 1. How many tokens up to each place equal the last ones of the history.
    b, part = tl.program_id(0), tl.program_id(1)
    length = tl.load(lens_ptr + b).to(tl.int32)
    history_ptr = tokens_ptr + b.to(tl.int64) * stride_tb
    place = part * BLOCK + tl.arange(0, BLOCK)
    running = place < length - 1
    matched = tl.zeros([BLOCK], tl.int32)
    back = 0
    while (back < max_ngram) & (back < length):
        last = tl.load(history_ptr + length - 1 - back)
        running = running & (place >= back)
        running = running & (tl.load(history_ptr + place - back, mask=running, other=-1) == last)
        matched += running.to(tl.int32)
        back += 1

    # 2. The best of them, one after the other.
    ranks = tl.where(matched >= min_ngram, matched.to(tl.int64) * 4294967296 + place + 1, 0)
    slot = tl.arange(0, BLOCK_M)
    best = tl.zeros([BLOCK_M], tl.int64)
    for index in range(num_matches):
        rank = tl.max(ranks, 0)
        best = tl.where(slot == index, rank, best)
        ranks = tl.where(ranks == rank, 0, ranks)
    out = (b.to(tl.int64) * tl.num_programs(1) + part) * num_matches
    tl.store(ranks_ptr + out + slot, best, mask=slot < num_matches)


@triton.jit(do_not_specialize=["num_ranks", "num_matches", "length"])
def continue_kernel(
    tokens_ptr, lens_ptr, ranks_ptr, continuations_ptr, match_length_ptr,
    num_ranks, num_matches, length,
    stride_tb,
    LONGEST_ONLY: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Join the parts of one row and copy what followed its best places."""
    # 1. All ranks, the longest match first and then the latest place.
    b = tl.program_id(0)
    count = tl.load(lens_ptr + b).to(tl.int32)
    history_ptr = tokens_ptr + b.to(tl.int64) * stride_tb
    offset = tl.arange(0, BLOCK_R)
    ranks = tl.load(
        ranks_ptr + b.to(tl.int64) * num_ranks + offset, mask=offset < num_ranks, other=0
    )
    longest = tl.max(ranks, 0) // 4294967296
    tl.store(match_length_ptr + b, longest)
    if LONGEST_ONLY:
        ranks = tl.where(ranks // 4294967296 == longest, ranks, 0)

    # 2. One continuation after the other.
    step = tl.arange(0, BLOCK_L)
    for index in range(num_matches):
        rank = tl.max(ranks, 0)
        ranks = tl.where(ranks == rank, 0, ranks)
        # A rank carries place + 1, where the continuation begins.
        spot = (rank % 4294967296).to(tl.int32) + step
        inside = (spot < count) & (step < length) & (spot > step)
        tokens = tl.load(history_ptr + spot, mask=inside, other=-1).to(tl.int64)
        out = (b.to(tl.int64) * num_matches + index) * length
        tl.store(continuations_ptr + out + step, tokens, mask=step < length)


def launch_match_ngrams(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    max_ngram: int,
    num_matches: int,
    length: int,
    min_ngram: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches; arguments as in ``ops.match_ngrams``. Reads the history ``max_ngram`` times,
    from
    the L1 cache after the first.
    """
    batch, capacity = tokens.shape
    device = tokens.device
    continuations = torch.empty(batch, num_matches, length, dtype=torch.int64, device=device)
    match_length = torch.empty(batch, dtype=torch.int64, device=device)
    if batch == 0 or capacity == 0:
        return continuations.fill_(-1), match_length.zero_()
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    # Wide parts keep the join small: it holds every part's places at once.
    block = 256
    while triton.cdiv(capacity, block) * batch > TARGET_PROGRAMS and block < 4096:
        block *= 2
    parts = triton.cdiv(capacity, block)
    ranks = torch.empty(batch, parts, num_matches, dtype=torch.int64, device=device)
    scan_kernel[(batch, parts)](
        tokens, lens, ranks,
        max_ngram, num_matches, 1 if min_ngram is None else min_ngram,
        tokens.stride(0),
        BLOCK=block, BLOCK_M=next_power_of_two(num_matches),
        num_warps=4,
    )  # fmt: skip
    continue_kernel[(batch,)](
        tokens, lens, ranks, continuations, match_length,
        parts * num_matches, num_matches, length,
        tokens.stride(0),
        LONGEST_ONLY=min_ngram is None,
        BLOCK_R=next_power_of_two(parts * num_matches), BLOCK_L=next_power_of_two(length),
        num_warps=4,
    )  # fmt: skip
    return continuations, match_length
