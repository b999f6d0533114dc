"""Rotary embedding and the write of node rows into the cache in one launch
(docs/kernels/append_rotary.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .round_tuning import next_power_of_two


@triton.jit
def _rotated(row_ptr, stride_d, column, cos, sin, rotary_dim, width, INTERLEAVED: tl.constexpr):
    """One head's vector after rotation, in float32; columns past ``rotary_dim`` stay."""
    inside = column < width
    x = tl.load(row_ptr + column * stride_d, mask=inside, other=0.0).to(tl.float32)
    half = rotary_dim // 2
    turns = column < rotary_dim
    if INTERLEAVED:
        partner = tl.where(column % 2 == 0, column + 1, column - 1)
        sign = tl.where(column % 2 == 0, -1.0, 1.0)
    else:
        partner = tl.where(column < half, column + half, column - half)
        sign = tl.where(column < half, -1.0, 1.0)
    other = tl.load(row_ptr + partner * stride_d, mask=inside & turns, other=0.0).to(tl.float32)
    return tl.where(turns, x * cos + sign * other * sin, x)


@triton.jit(do_not_specialize=["num_nodes"])
def append_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, prefix_ptr, out_ptr,
    num_nodes, slots, q_heads, kv_heads, rotary_dim,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_cb, stride_cn, stride_sb, stride_sn,
    stride_kcb, stride_kch, stride_kcs, stride_vcb, stride_vch, stride_vcs,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # 1. One node of one sequence, one head of q or of k and v.
    b, node, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    column = tl.arange(0, BLOCK_D)
    turns = column < rotary_dim
    cos = tl.load(cos_ptr + b * stride_cb + node * stride_cn + column, mask=turns, other=1.0).to(
        tl.float32
    )
    sin = tl.load(sin_ptr + b * stride_sb + node * stride_sn + column, mask=turns, other=0.0).to(
        tl.float32
    )
    if head < q_heads:
        # 2. A query head is rotated into the output [B, Hq, N, D].
        row_ptr = q_ptr + b * stride_qb + head * stride_qh + node * stride_qn
        rotated = _rotated(row_ptr, stride_qd, column, cos, sin, rotary_dim, HEAD_DIM, INTERLEAVED)
        place = ((b * q_heads + head) * num_nodes + node) * HEAD_DIM + column
        tl.store(out_ptr + place, rotated.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)
    else:
        # 3. A key head is rotated, and its value head copied, into the row of the node; never past
        # the cache.
        kv_head = head - q_heads
        slot = tl.load(prefix_ptr + b).to(tl.int64) + node
        fits = (slot >= 0) & (slot < slots)
        row_ptr = k_ptr + b * stride_kb + kv_head * stride_kh + node * stride_kn
        rotated = _rotated(row_ptr, stride_kd, column, cos, sin, rotary_dim, HEAD_DIM, INTERLEAVED)
        slot = tl.where(fits, slot, 0)
        key_ptr = k_cache_ptr + b * stride_kcb + kv_head * stride_kch + slot * stride_kcs
        keep = tl.where(fits, HEAD_DIM, 0)
        tl.store(key_ptr + column, rotated.to(k_cache_ptr.dtype.element_ty), mask=column < keep)
        value_column = tl.arange(0, BLOCK_V)
        keep = tl.where(fits, VALUE_DIM, 0)
        row_ptr = v_ptr + b * stride_vb + kv_head * stride_vh + node * stride_vn
        values = tl.load(
            row_ptr + value_column * stride_vd, mask=value_column < VALUE_DIM, other=0.0
        )
        value_ptr = v_cache_ptr + b * stride_vcb + kv_head * stride_vch + slot * stride_vcs
        tl.store(value_ptr + value_column, values, mask=value_column < keep)


def launch_append_rotary(
    q, k, v, cos, sin, k_cache, v_cache, prefix_lens, interleaved: bool
) -> torch.Tensor:
    """One launch; arguments as in ``ops.append_rotary``. Reads q, k, v, cos and sin once and writes
    q,
    k and v.
    """
    batch, q_heads, num_nodes, head_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    out = torch.empty(batch, q_heads, num_nodes, head_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    cos, sin = (x if x.stride(2) == 1 else x.contiguous() for x in (cos, sin))
    append_kernel[(batch, num_nodes, q_heads + kv_heads)](
        q, k, v, cos, sin, k_cache, v_cache, prefix_lens, out,
        num_nodes, k_cache.shape[2], q_heads, kv_heads, cos.shape[2],
        *q.stride(), *k.stride(), *v.stride(), *cos.stride()[:2], *sin.stride()[:2],
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        HEAD_DIM=head_dim, VALUE_DIM=value_dim, INTERLEAVED=interleaved,
        BLOCK_D=next_power_of_two(head_dim), BLOCK_V=next_power_of_two(value_dim),
        num_warps=1,
    )  # fmt: skip
    return out
