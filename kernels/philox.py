"""Philox4x32-10 and Gumbel noise in registers (docs/kernels/philox.md; the definition is in
``noise``).

A tile of counters gives four tiles of noise: counter c serves the tokens ``(c // 256) * 1024 + c %
256 + 256 * k`` for k = 0..3, so each word covers runs of 256 neighbouring tokens and loads stay
wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .round_tuning import noise_config


@triton.jit
def philox_words(seed, counter, position, row, stream):
    """The four words of a tile of counters. Scalars are int64 bit patterns; "
    "``counter`` is int32."""
    zero = counter * 0
    return tl.philox(
        seed,
        counter,
        zero + position.to(tl.int32),
        zero + row.to(tl.int32),
        zero + stream.to(tl.int32),
    )


@triton.jit
def uniform_of(word):
    """float32 in (0, 1): ``word * 2^-32 + 2^-33``, at most ``1 - 2^-24``."""
    return tl.minimum(
        word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994
    )


@triton.jit
def gumbel_of(word):
    """``-log(-log1p(-v))``, log1p by Kahan's correction of log; exact division, as on the host."""
    v = uniform_of(word)
    w = 1.0 - v
    exponential = tl.where(w == 1.0, v, tl.div_rn(-tl.log(w) * v, 1.0 - w))
    return -tl.log(exponential)


@triton.jit
def first_tokens(counter):
    """The token of word 0 of each counter; word k serves the token 256 * k further on."""
    return (counter // 256) * 1024 + counter % 256


@triton.jit
def _gumbel_kernel(
    seeds_ptr, rows_ptr, positions_ptr, streams_ptr, out_ptr,
    num_positions, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # 1. Whose noise.
    pair = tl.program_id(0)
    b = pair // num_positions
    position = tl.load(positions_ptr + pair).to(tl.int64)
    seed, row, stream = (
        tl.load(seeds_ptr + b),
        tl.load(rows_ptr + b).to(tl.int64),
        tl.load(streams_ptr + b),
    )
    # 2. Its words.
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox_words(seed, counter, position, row, stream)
    # 3. Four runs of tokens.
    tokens = first_tokens(counter)
    out_row_ptr = out_ptr + pair.to(tl.int64) * vocab_size
    tl.store(out_row_ptr + tokens, gumbel_of(w0), mask=tokens < vocab_size)
    tl.store(out_row_ptr + tokens + 256, gumbel_of(w1), mask=tokens + 256 < vocab_size)
    tl.store(out_row_ptr + tokens + 512, gumbel_of(w2), mask=tokens + 512 < vocab_size)
    tl.store(out_row_ptr + tokens + 768, gumbel_of(w3), mask=tokens + 768 < vocab_size)


def counters_of(vocab_size: int) -> int:
    """How many counters cover a vocabulary."""
    return triton.cdiv(vocab_size, 1024) * 256


def per_row(value, batch: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number or a tensor [B] as a tensor [B]; an int of 2^63 or more becomes its int64 bit
    pattern.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device=device, dtype=dtype).contiguous()
    if isinstance(value, int) and value >= 2**63:
        value -= 2**64
    return torch.full((batch,), value, dtype=dtype, device=device)


def launch_gumbel_noise(seed, rows, positions, vocab_size: int, stream) -> torch.Tensor:
    """One launch; arguments as in ``ops.gumbel_noise``. Writes 4 bytes a token "
    "and reads nothing."""
    batch, num_positions = positions.shape
    device = positions.device
    out = torch.empty(batch, num_positions, vocab_size, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    config = noise_config(vocab_size)
    seeds = per_row(seed, batch, torch.int64, device)
    streams = per_row(stream, batch, torch.int64, device)
    grid = (batch * num_positions, triton.cdiv(counters_of(vocab_size), config.block))
    _gumbel_kernel[grid](
        seeds, rows.contiguous(), positions.contiguous(), streams, out,
        num_positions, vocab_size,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out
