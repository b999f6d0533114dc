"""Tree-masked attention in Triton: split-KV, grouped query heads packed as rows, ancestor bits for
the tree tiles only.

Mathematics, memory traffic, split rule and limits: docs/kernels/tree_attention.md.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl

from .tuning import TreeAttentionConfig, split_head_dim, tree_attention_config

_LOG2_E = 1.4426950408889634
# Products of float32 inputs must be exact to float32: TF32 would change tokens.
PRECISION = "ieee"
LOG2_E = tl.constexpr(_LOG2_E)


@triton.jit
def _tile_range(
    prefix,
    num_nodes,
    window,
    num_splits,
    HAS_WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """First tile, end tile, tiles a split and splits in use of one sequence; both kernels must
    agree on them."""
    end = tl.cdiv(prefix + num_nodes, BLOCK_S)
    first = 0
    if HAS_WINDOW:
        # The root looks back least far in absolute terms, so no node sees a slot before the root's
        # window.
        first = tl.maximum(prefix - window + 1, 0) // BLOCK_S
    per_split = tl.maximum(tl.cdiv(end - first, num_splits), MIN_TILES)
    return first, end, per_split, tl.cdiv(end - first, per_split)


@triton.jit
def _attend_tile(
    q1, q2, acc1, acc2, row_max, row_sum,
    k_ptr, v_ptr, row_bits_ptr, depths_ptr, row_position, row_slope,
    tile, prefix, num_nodes, window, scale, softcap,
    stride_ks: tl.constexpr, stride_vs: tl.constexpr, MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    VALUE_DIM: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values folded into the running softmax.

    UPCAST takes products of float32 copies, for the interpreter, whose products of bfloat16 are
    wrong. MASK is "none" for tiles inside the prefix that every row sees, "window" for prefix tiles
    some rows no longer see, and "tree" for tiles that reach past the prefix.
    """
    # 1. Slots of the tile; only a tile past the prefix can end early.
    offs_s = tl.arange(0, BLOCK_S)
    slots = tile * BLOCK_S + offs_s
    k_tile_ptr = k_ptr + tl.cast(tile * BLOCK_S, tl.int64) * stride_ks
    v_tile_ptr = v_ptr + tl.cast(tile * BLOCK_S, tl.int64) * stride_vs
    # Inside a tile 32-bit offsets do, unless rows lie gigabytes apart; they take half the
    # registers.
    k_rows, v_rows = offs_s * stride_ks, offs_s * stride_vs
    if BLOCK_S * stride_ks >= 2**31:
        k_rows = offs_s.to(tl.int64) * stride_ks
    if BLOCK_S * stride_vs >= 2**31:
        v_rows = offs_s.to(tl.int64) * stride_vs
    stored = slots < prefix + num_nodes

    # 2. Scores.
    k1 = _load_columns(k_tile_ptr, k_rows, stored, 0, D1, HEAD_DIM, MASK == "tree")
    scores = _dot(q1, tl.trans(k1), None, PRECISION, UPCAST)
    if D2 > 0:
        k2 = _load_columns(k_tile_ptr, k_rows, stored, D1, D2, HEAD_DIM, MASK == "tree")
        scores = _dot(q2, tl.trans(k2), scores, PRECISION, UPCAST)

    # 3. Base-2 logits.
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)), exact at both infinities; scale and softcap carry the
        # factors.
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * scale)))
    elif HAS_ALIBI:
        scores = scores * scale
    if HAS_WINDOW or HAS_ALIBI:
        key_position = slots
        if MASK == "tree":
            key_depth = tl.load(
                depths_ptr + (slots - prefix), mask=(slots >= prefix) & stored, other=0
            ).to(tl.int32)
            key_position = tl.where(slots < prefix, slots, prefix + key_depth)
        distance = row_position[:, None] - key_position[None, :]
        if HAS_ALIBI:
            scores -= row_slope[:, None] * distance.to(tl.float32)

    # 4. Visibility.
    if MASK == "tree":
        nodes = slots - prefix
        visible = (nodes < 0)[None, :]
        # A tile meets at most WORDS + 1 words; adding WORDS first keeps the division's argument
        # positive.
        WORDS: tl.constexpr = (BLOCK_S + 31) // 32
        first_word = (tile * BLOCK_S - prefix + 32 * WORDS) // 32 - WORDS
        for i in tl.static_range(WORDS + 1):
            word_index = first_word + i
            held = (word_index >= 0) & (word_index * 32 < num_nodes)
            word = tl.load(row_bits_ptr + tl.where(held, word_index, 0))
            shift = nodes - word_index * 32
            in_word = (shift >= 0) & (shift < 32) & (nodes >= 0) & stored
            bit = (word[:, None] >> tl.where(in_word, shift, 0)[None, :]) & 1
            visible = visible | ((bit != 0) & in_word[None, :])
        if HAS_WINDOW:
            visible = visible & (distance < window)
        scores = tl.where(visible, scores, float("-inf"))
    elif MASK == "window":
        scores = tl.where(distance < window, scores, float("-inf"))

    # 5. Running softmax; a row that has seen nothing keeps -inf, and zero stands in for it in the
    # exponents. Without softcap and ALiBi the factor is applied in the exponent's own multiply-add.
    if HAS_SOFTCAP or HAS_ALIBI:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    if MASK == "none":
        peak = new_max
    else:
        peak = tl.where(new_max == float("-inf"), 0.0, new_max)
    if HAS_SOFTCAP or HAS_ALIBI:
        weights = tl.exp2(scores - peak[:, None])
    else:
        weights = tl.exp2(scores * scale - peak[:, None])
    decay = tl.exp2(row_max - peak)
    row_sum = row_sum * decay + tl.sum(weights, 1)

    # 6. Values.
    v1 = _load_columns(v_tile_ptr, v_rows, stored, 0, V1, VALUE_DIM, MASK == "tree")
    acc1 = _dot(weights.to(v1.dtype), v1, acc1 * decay[:, None], PRECISION, UPCAST)
    if V2 > 0:
        v2 = _load_columns(v_tile_ptr, v_rows, stored, V1, V2, VALUE_DIM, MASK == "tree")
        acc2 = _dot(weights.to(v2.dtype), v2, acc2 * decay[:, None], PRECISION, UPCAST)
    return acc1, acc2, new_max, row_sum


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _load_columns(
    ptr, row_offsets, stored,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of a tile of rows, zero past DIM and, with MASK_ROWS, where a
    row is not stored."""
    columns = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + (row_offsets[:, None] + columns[None, :])
    if MASK_ROWS and FIRST + WIDTH > DIM:
        return tl.load(ptrs, mask=stored[:, None] & (columns < DIM)[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=stored[:, None], other=0.0)
    elif FIRST + WIDTH > DIM:
        return tl.load(ptrs, mask=(columns < DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit(do_not_specialize=["num_nodes", "num_slots", "num_splits", "window"])
def tree_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, bits_ptr, prefix_lens_ptr, depths_ptr, sinks_ptr, slopes_ptr, out_ptr,
    workspace_ptr,
    num_nodes, num_slots, num_splits, window, scale, softcap,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_ks: tl.constexpr,
    stride_vb, stride_vh, stride_vs: tl.constexpr, stride_bb, stride_bn, stride_db,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, MIN_TILES: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of packed rows against one split of one head's cache.

    Program (row block, split, sequence x kv head): row blocks of one split are neighbours, so they
    share its tiles in L2. Writes the result itself when SPLIT is false, and a normalised partial
    with its base-2 log-sum otherwise.
    """
    row_block, split = tl.program_id(0), tl.program_id(1)
    sequence, head = tl.program_id(2) // KV_HEADS, tl.program_id(2) % KV_HEADS

    # 1. This split's tiles. A length outside the cache is clamped: wrong lengths may give wrong
    # numbers, never bad reads.
    prefix = tl.load(prefix_lens_ptr + sequence).to(tl.int32)
    prefix = tl.minimum(tl.maximum(prefix, 0), num_slots - num_nodes)
    first, end, per_split, used_splits = _tile_range(
        prefix, num_nodes, window, num_splits, HAS_WINDOW, BLOCK_S, MIN_TILES
    )
    if split >= used_splits:
        return
    start = first + split * per_split
    stop = tl.minimum(start + per_split, end)

    # 2. Rows: node x group member, padded rows sit on node 0 and are never stored.
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    num_rows = num_nodes * GROUP
    valid = rows < num_rows
    node = tl.where(valid, rows // GROUP, 0)
    q_head = head * GROUP + tl.where(valid, rows % GROUP, 0)
    batch = sequence.to(tl.int64)
    q_rows = batch * stride_qb + q_head.to(tl.int64) * stride_qh + node.to(tl.int64) * stride_qn
    q1 = _load_columns(q_ptr, q_rows, valid, 0, D1, HEAD_DIM, True)
    q2 = q1
    if D2 > 0:
        q2 = _load_columns(q_ptr, q_rows, valid, D1, D2, HEAD_DIM, True)
    k_ptr += batch * stride_kb + head.to(tl.int64) * stride_kh
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    row_bits_ptr = bits_ptr + batch * stride_bb + node.to(tl.int64) * stride_bn
    row_position = prefix + node * 0
    row_slope = 0.0
    if HAS_WINDOW or HAS_ALIBI:
        depths_ptr += batch * stride_db
        row_position = prefix + tl.load(depths_ptr + node).to(tl.int32)
    if HAS_ALIBI:
        row_slope = tl.load(slopes_ptr + q_head).to(tl.float32) * LOG2_E

    acc1 = tl.zeros([BLOCK_M, V1], dtype=tl.float32)
    acc2 = tl.zeros([BLOCK_M, V2 if V2 > 0 else 1], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    # 3. Prefix tiles that some row of the block no longer sees.
    whole_start = start
    if HAS_WINDOW:
        last_position = tl.max(tl.where(valid, row_position, 0), 0)
        whole_start = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_S)
        whole_start = tl.maximum(
            tl.minimum(whole_start, tl.minimum(stop, prefix // BLOCK_S)), start
        )
        for tile in tl.range(start, whole_start):
            acc1, acc2, row_max, row_sum = _attend_tile(
                q1, q2, acc1, acc2, row_max, row_sum,
                k_ptr, v_ptr, row_bits_ptr, depths_ptr, row_position, row_slope,
                tile, prefix, num_nodes, window, scale, softcap, stride_ks, stride_vs,
                "window", HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
                HEAD_DIM, D1, D2, VALUE_DIM, V1, V2, BLOCK_S, PRECISION, UPCAST,
            )  # fmt: skip

    # 4. Prefix tiles that every row sees: no mask of any kind.
    whole_stop = tl.maximum(tl.minimum(stop, prefix // BLOCK_S), whole_start)
    for tile in tl.range(whole_start, whole_stop):
        acc1, acc2, row_max, row_sum = _attend_tile(
            q1, q2, acc1, acc2, row_max, row_sum,
            k_ptr, v_ptr, row_bits_ptr, depths_ptr, row_position, row_slope,
            tile, prefix, num_nodes, window, scale, softcap, stride_ks, stride_vs,
            "none", False, HAS_SOFTCAP, HAS_ALIBI,
            HEAD_DIM, D1, D2, VALUE_DIM, V1, V2, BLOCK_S, PRECISION, UPCAST,
        )  # fmt: skip

    # 5. Tiles that hold the end of the prefix and the tree.
    for tile in tl.range(whole_stop, stop, num_stages=2):
        acc1, acc2, row_max, row_sum = _attend_tile(
            q1, q2, acc1, acc2, row_max, row_sum,
            k_ptr, v_ptr, row_bits_ptr, depths_ptr, row_position, row_slope,
            tile, prefix, num_nodes, window, scale, softcap, stride_ks, stride_vs,
            "tree", HAS_WINDOW, HAS_SOFTCAP, HAS_ALIBI,
            HEAD_DIM, D1, D2, VALUE_DIM, V1, V2, BLOCK_S, PRECISION, UPCAST,
        )  # fmt: skip

    # 6. Result, or partial and log-sum.
    if HAS_SINKS and not SPLIT:
        sink = tl.load(sinks_ptr + q_head).to(tl.float32) * LOG2_E
        peak = tl.maximum(row_max, sink)
        decay = tl.exp2(row_max - peak)
        acc1, acc2 = acc1 * decay[:, None], acc2 * decay[:, None]
        row_sum = row_sum * decay + tl.exp2(sink - peak)
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    acc1 = acc1 / divisor[:, None]
    acc2 = acc2 / divisor[:, None]
    if SPLIT:
        part = (tl.program_id(2).to(tl.int64) * num_splits + split) * num_rows + rows
        out_rows_ptr = workspace_ptr + part[:, None] * VALUE_DIM
        log_sums_ptr = (
            workspace_ptr + tl.num_programs(2).to(tl.int64) * num_splits * num_rows * VALUE_DIM
        )
        tl.store(
            log_sums_ptr + part,
            tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(divisor)),
            mask=valid,
        )
    else:
        out_row = (batch * num_nodes + node) * (KV_HEADS * GROUP) + q_head
        out_rows_ptr = out_ptr + out_row[:, None] * VALUE_DIM
    offs_v1 = tl.arange(0, V1)
    dtype = out_rows_ptr.dtype.element_ty
    tl.store(
        out_rows_ptr + offs_v1[None, :],
        acc1.to(dtype),
        mask=valid[:, None] & (offs_v1 < VALUE_DIM)[None, :],
    )
    if V2 > 0:
        offs_v2 = V1 + tl.arange(0, V2)
        tl.store(
            out_rows_ptr + offs_v2[None, :],
            acc2.to(dtype),
            mask=valid[:, None] & (offs_v2 < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["num_nodes", "num_slots", "num_splits", "window"])
def tree_attention_combine_kernel(
    workspace_ptr, prefix_lens_ptr, sinks_ptr, out_ptr,
    num_nodes, num_slots, num_splits, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_S: tl.constexpr, MIN_TILES: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of the result from its partials, always summed in the same order.

    Program (row, sequence x kv head).
    """
    row = tl.program_id(0)
    sequence, head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    num_rows = num_nodes * GROUP

    # 1. The splits in use: those the split kernel wrote, and no others.
    prefix = tl.load(prefix_lens_ptr + sequence).to(tl.int32)
    prefix = tl.minimum(tl.maximum(prefix, 0), num_slots - num_nodes)
    _, _, _, used_splits = _tile_range(
        prefix, num_nodes, window, num_splits, HAS_WINDOW, BLOCK_S, MIN_TILES
    )

    # 2. The common peak and the sum of all weights.
    base = tl.program_id(1).to(tl.int64) * num_splits
    log_sums_ptr = (
        workspace_ptr + tl.num_programs(1).to(tl.int64) * num_splits * num_rows * VALUE_DIM
    )
    splits = tl.arange(0, BLOCK_SPLITS)
    log_sums = tl.load(
        log_sums_ptr + (base + splits) * num_rows + row,
        mask=splits < used_splits,
        other=float("-inf"),
    )
    peak = tl.max(log_sums, 0)
    q_head = head * GROUP + row % GROUP
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + q_head).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(log_sums - peak), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)

    # 3. The weighted sum, a chunk of splits at a time.
    offs_v = tl.arange(0, BLOCK_V)
    result = tl.zeros([BLOCK_V], dtype=tl.float32)
    for chunk in tl.range(0, tl.cdiv(used_splits, CHUNK)):
        part_splits = chunk * CHUNK + tl.arange(0, CHUNK)
        used = part_splits < used_splits
        part = (base + part_splits) * num_rows + row
        weights = tl.exp2(tl.load(log_sums_ptr + part, mask=used, other=float("-inf")) - peak)
        partial = tl.load(
            workspace_ptr + part[:, None] * VALUE_DIM + offs_v[None, :],
            mask=used[:, None] & (offs_v < VALUE_DIM)[None, :],
            other=0.0,
        )
        result += tl.sum(weights[:, None] * partial, 0)
    result = result / tl.where(total == 0.0, 1.0, total)
    out_row = (sequence.to(tl.int64) * num_nodes + row // GROUP) * (KV_HEADS * GROUP) + q_head
    tl.store(
        out_ptr + out_row * VALUE_DIM + offs_v,
        result.to(out_ptr.dtype.element_ty),
        mask=offs_v < VALUE_DIM,
    )


@functools.cache
def _device_facts(index: int) -> tuple[int, int]:
    """Compute capability times ten, and multiprocessors, of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def choose_config(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, reshaped: bool
) -> TreeAttentionConfig:
    """The table's configuration for these tensors; on a CPU (interpreter) that of the table's
    Hopper chip."""
    capability, num_sms = _device_facts(q.device.index) if q.is_cuda else (90, None)
    return tree_attention_config(
        capability,
        batch=q.shape[0],
        q_heads=q.shape[1],
        kv_heads=k_cache.shape[1],
        num_nodes=q.shape[2],
        num_slots=k_cache.shape[2],
        head_dim=q.shape[3],
        value_dim=v_cache.shape[3],
        element_bytes=q.element_size(),
        reshaped=reshaped,
        num_sms=num_sms,
    )


def launch_tree_attention(
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
    out: torch.Tensor | None = None,
    config: TreeAttentionConfig | None = None,
) -> torch.Tensor:
    """Launch the split kernel, and the combine kernel where there is more than one split.

    Arguments as in ``ops.tree_attention``, already checked. Reads no tensor's values, so it can be
    captured in a graph.

    Args:
        out: Contiguous ``[B, N, Hq, Dv]`` to write to; allocated when None.
        config: Overrides the tuning table.
    """
    batch, q_heads, num_nodes, head_dim = q.shape
    kv_heads, num_slots, value_dim = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = q_heads // kv_heads
    if config is None:
        reshaped = sliding_window is not None or softcap is not None or alibi_slopes is not None
        config = choose_config(q, k_cache, v_cache, reshaped)
    out = q.new_empty(batch, num_nodes, q_heads, value_dim) if out is None else out
    ancestor_bits, prefix_lens = _dense_rows(ancestor_bits), _dense_rows(prefix_lens)
    depths, sinks, alibi_slopes = _dense_rows(depths), _dense_rows(sinks), _dense_rows(alibi_slopes)
    rows, programs = num_nodes * group, batch * kv_heads
    split = config.num_splits > 1
    workspace = None
    if split:
        workspace = q.new_empty(
            programs * config.num_splits * rows * (value_dim + 1), dtype=torch.float32
        )
    scale = head_dim**-0.5 if scale is None else scale
    window = sliding_window or 0
    d1, d2 = split_head_dim(head_dim, config.block_rows)
    v1, v2 = split_head_dim(value_dim, config.block_rows)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        grid = (triton.cdiv(rows, config.block_rows), config.num_splits, programs)
        tree_attention_split_kernel[grid](
            q, k_cache, v_cache, ancestor_bits, prefix_lens,
            depths if sliding_window or alibi_slopes is not None else None,
            None if split else sinks, alibi_slopes, out, workspace,
            num_nodes, num_slots, config.num_splits, window,
            scale * _LOG2_E if softcap is None else 2.0 * scale * _LOG2_E / softcap,
            0.0 if softcap is None else softcap * _LOG2_E,
            q.stride(0), q.stride(1), q.stride(2),
            k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
            v_cache.stride(0), v_cache.stride(1), v_cache.stride(2),
            ancestor_bits.stride(0), ancestor_bits.stride(1),
            0 if depths is None else depths.stride(0),
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, VALUE_DIM=value_dim,
            HAS_WINDOW=sliding_window is not None, HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None and not split, HAS_ALIBI=alibi_slopes is not None,
            D1=d1, D2=d2, V1=v1, V2=v2,
            BLOCK_M=config.block_rows, BLOCK_S=config.block_slots,
            MIN_TILES=config.min_tiles, SPLIT=split,
            PRECISION=PRECISION, UPCAST=not q.is_cuda and q.dtype == torch.bfloat16,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if split:
            tree_attention_combine_kernel[(rows, programs)](
                workspace, prefix_lens, sinks, out,
                num_nodes, num_slots, config.num_splits, window,
                KV_HEADS=kv_heads, GROUP=group, VALUE_DIM=value_dim,
                HAS_WINDOW=sliding_window is not None, HAS_SINKS=sinks is not None,
                BLOCK_S=config.block_slots, MIN_TILES=config.min_tiles,
                BLOCK_SPLITS=triton.next_power_of_2(config.num_splits),
                CHUNK=min(16, triton.next_power_of_2(config.num_splits)),
                BLOCK_V=triton.next_power_of_2(value_dim),
                num_warps=4,
            )  # fmt: skip
    return out


def _dense_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor itself when its last stride is 1, else a contiguous copy: small index tensors
    only."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
