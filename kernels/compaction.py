"""The rows of the accepted path move to their places, in every layer's caches by one launch
(docs/kernels/compact_kv.md).

A table on the device holds the address, heads and strides of each cache, so layers may differ. Rows
are moved in words of 16 bytes wherever addresses allow, whatever the dtype.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .round_tuning import next_power_of_two

_FIELDS = 6
# Generous, as a captured graph relies on its table; one takes a few KiB.
_MAX_TABLES = 1024
_tables: OrderedDict[tuple, tuple[torch.Tensor, int, int, int]] = OrderedDict()


@triton.jit(do_not_specialize=["capacity"])
def compact_kernel(
    table_ptr, path_ptr, accept_ptr, prefix_ptr,
    capacity,
    FIELDS: tl.constexpr, WORD: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head of one cache of one sequence. Sizes and strides of the table count words of WORD
    bytes.
    """
    # 1. Nothing to do when the path is a prefix of the node order already.
    cache, b, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BLOCK_N)
    accepted = tl.load(accept_ptr + b).to(tl.int32)
    nodes = tl.load(path_ptr + b * capacity + lane, mask=lane < capacity, other=-1).to(tl.int32)
    moving = (lane <= accepted) & (nodes >= 0) & (nodes != lane)
    last = tl.max(tl.where(moving, lane, -1), 0)
    first = tl.min(tl.where(moving, lane, BLOCK_N), 0)
    entry_ptr = table_ptr + cache * FIELDS
    heads = tl.load(entry_ptr + 1)
    if (last < 0) | (head >= heads):
        return

    # 2. Where the rows lie.
    width = tl.load(entry_ptr + 2).to(tl.int32)
    stride_b, stride_h, stride_s = (
        tl.load(entry_ptr + 3),
        tl.load(entry_ptr + 4),
        tl.load(entry_ptr + 5),
    )
    if ALIGNED:
        stride_b, stride_h, stride_s = stride_b * 4, stride_h * 4, stride_s * 4
        width = width * 4
    address = tl.load(entry_ptr)
    if WORD == 4:
        base_ptr = address.to(tl.pointer_type(tl.int32))
    elif WORD == 2:
        base_ptr = address.to(tl.pointer_type(tl.int16))
    else:
        base_ptr = address.to(tl.pointer_type(tl.int8))
    if ALIGNED:
        base_ptr = tl.multiple_of(base_ptr, 16)
    base_ptr += b * stride_b + head * stride_h + tl.load(prefix_ptr + b).to(tl.int64) * stride_s

    # 3. Rows in ascending order: a row is never read after it was written, as path[i] >= i.
    column = tl.arange(0, BLOCK_D)
    for start in range(first, last + 1, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        node = tl.load(path_ptr + b * capacity + place, mask=place <= last, other=-1).to(tl.int64)
        keep = ((place <= last) & (node >= 0))[:, None] & (column < width)[None, :]
        rows = tl.load(base_ptr + node[:, None] * stride_s + column[None, :], mask=keep, other=0)
        # All rows of the block are in registers before any thread overwrites one.
        tl.debug_barrier()
        tl.store(
            base_ptr + place.to(tl.int64)[:, None] * stride_s + column[None, :], rows, mask=keep
        )


def launch_compact_kv(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    path: torch.Tensor,
    accept_length: torch.Tensor,
    prefix_lens: torch.Tensor,
) -> None:
    """One launch; arguments as in ``ops.compact_kv``. Reads and writes only "
    "rows that change place."""
    caches = [cache for pair in layers for cache in pair]
    batch, capacity = path.shape
    if not caches or batch == 0:
        return
    if any(cache.stride(3) != 1 and cache.shape[3] > 1 for cache in caches):
        from .torch_trees import compact_kv

        return compact_kv(layers, path, accept_length, prefix_lens)
    table, word, max_heads, max_width = _table(caches)
    columns = max_width * (4 if word == 16 else 1)
    block_d = next_power_of_two(columns)
    compact_kernel[(len(caches), batch, max_heads)](
        table, path.contiguous(), accept_length, prefix_lens,
        capacity,
        FIELDS=_FIELDS, WORD=min(word, 4), ALIGNED=word == 16,
        BLOCK_R=max(1, min(16, 4096 // block_d)), BLOCK_D=block_d,
        BLOCK_N=next_power_of_two(capacity),
        num_warps=4,
    )  # fmt: skip


def _table(caches: list[torch.Tensor]) -> tuple[torch.Tensor, int, int, int]:
    """The device table, bytes of a word, most heads, most words of a row; kept, so that a graph's
    replay finds it.
    """
    key = tuple((cache.data_ptr(), cache.shape, cache.stride(), cache.dtype) for cache in caches)
    if key in _tables:
        _tables.move_to_end(key)
        return _tables[key]
    word = 16
    for cache in caches:
        size = cache.element_size()
        numbers = [
            cache.data_ptr(),
            cache.shape[3] * size,
            *(step * size for step in cache.stride()[:3]),
        ]
        while any(number % word for number in numbers):
            word = {16: 4, 4: 2, 2: 1}[word]
    fields = []
    for cache in caches:
        size = cache.element_size()
        strides = [step * size // word for step in cache.stride()[:3]]
        fields.append([cache.data_ptr(), cache.shape[1], cache.shape[3] * size // word, *strides])
    table = torch.tensor(fields, dtype=torch.int64).to(caches[0].device)
    _tables[key] = table, word, max(f[1] for f in fields), max(f[2] for f in fields)
    if len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    return _tables[key]
