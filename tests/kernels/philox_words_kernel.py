"""A kernel that shows the Philox words the noise is made of. Import it inside a test only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from treespec.kernels.philox import gumbel_of, philox_words


@triton.jit
def store_words(counter_ptr, seed_ptr, out_ptr):
    lane = tl.arange(0, 4)
    count = tl.load(counter_ptr + lane * 0).to(tl.int32)
    position, row, stream = (
        tl.load(counter_ptr + 1),
        tl.load(counter_ptr + 2),
        tl.load(counter_ptr + 3),
    )
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr), count, position, row, stream)
    words = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(out_ptr + lane, words.to(tl.int64))


def kernel_words(counter: tuple[int, ...], seed: int, device: torch.device) -> tuple[int, ...]:
    """The four words of one counter, as the kernels make them."""
    out = torch.zeros(4, dtype=torch.int64, device=device)
    signed = seed - 2**64 if seed >= 2**63 else seed
    seeds = torch.tensor([signed], device=device)
    store_words[(1,)](torch.tensor(counter, device=device), seeds, out)
    return tuple(out.tolist())


@triton.jit
def store_gumbel(words_ptr, out_ptr, count, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + lane, mask=lane < count, other=0).to(tl.uint32)
    tl.store(out_ptr + lane, gumbel_of(words), mask=lane < count)


def kernel_gumbel(words: list[int], device: torch.device) -> torch.Tensor:
    """The noise of given words, as the kernels make it."""
    out = torch.zeros(len(words), device=device)
    store_gumbel[(1,)](torch.tensor(words, device=device), out, len(words), BLOCK=64)
    return out.cpu()
