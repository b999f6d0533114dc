"""Tree attention in PyTorch operations, for devices where Triton cannot run; see
docs/kernels/tree_attention.md.

The work is in two parts. ``tree_bias`` turns ancestor bits into an additive mask, and is the same
for every layer of a forward, so an engine builds it once a round. ``biased_attention`` is one
layer: keys and values are never repeated over the query heads of a group, and where it pays these
heads are laid beside each other as rows, so that keys and values are read once for all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# PyTorch's CPU attention works through 32 rows of queries and 512 slots at a time.
_CPU_BLOCK_ROWS = 32
_CPU_BLOCK_SLOTS = 512


def visible_bias(
    visible: torch.Tensor, prefix_lens: list[int], num_slots: int, dtype: torch.dtype
) -> torch.Tensor:
    """Additive bias of nodes that see a whole prefix and some of the rows behind it.

    Args:
        visible: bool ``[B, N, M]``, which of the M rows behind the prefix a node sees.
        prefix_lens: Committed rows of each sequence.
        num_slots: Cache rows the bias covers, at least ``prefix_lens[b] + M`` for every b.
        dtype: Result dtype.

    Returns:
        ``[B, 1, N, num_slots]``: 0 where a node looks, -inf elsewhere.
    """
    batch, num_nodes, num_rows = visible.shape
    bias = torch.zeros(batch, 1, num_nodes, num_slots, dtype=dtype, device=visible.device)
    # Only the columns past the prefix are written one by one.
    for hidden, prefix, rows in zip(~visible, prefix_lens, bias[:, 0]):
        end = prefix + num_rows
        rows[:, prefix:end].masked_fill_(hidden, float("-inf"))
        if end < num_slots:
            rows[:, end:] = float("-inf")
    return bias


def tree_bias(
    ancestor_bits: torch.Tensor,
    prefix_lens: torch.Tensor,
    num_slots: int,
    dtype: torch.dtype,
    *,
    sliding_window: int | None = None,
    depths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Additive attention bias of tree nodes over cache slots.

    Args:
        ancestor_bits: int32 ``[B, N, ceil(N/32)]``; bit j of row i set: node j is an ancestor of
            node i, or i itself.
        prefix_lens: int32 or int64 ``[B]``, committed rows of each sequence; node i lies in slot
            ``prefix_lens[b] + i``. Read on the host, except while a CUDA graph is captured.
        num_slots: Cache rows the bias covers, at least ``prefix_lens[b] + N`` for every b.
        dtype: Result dtype. float32 keeps ALiBi exact over long distances.
        sliding_window: Positions a node looks back over, itself included; needs ``depths``.
        depths: int32 or int64 ``[B, N]``; the position of node i is ``prefix_lens[b] + depths[b,
            i]``.
        alibi_slopes: ``[Hq]``; adds ``-slope * (query position - key position)``; needs ``depths``.

    Returns:
        ``[B, 1, N, num_slots]``, or ``[B, Hq, N, num_slots]`` with ``alibi_slopes``: -inf where a
        node must not look.
    """
    batch, num_nodes, _ = ancestor_bits.shape
    device = ancestor_bits.device
    shifts = torch.arange(32, device=device, dtype=torch.int32)
    ancestors = ((ancestor_bits.unsqueeze(-1) >> shifts) & 1).flatten(2)[..., :num_nodes].bool()
    if sliding_window is None and alibi_slopes is None and not _capturing(prefix_lens):
        return visible_bias(ancestors, prefix_lens.tolist(), num_slots, dtype)
    slots = torch.arange(num_slots, device=device)
    prefix = prefix_lens.to(device=device, dtype=torch.long).view(batch, 1)
    # The node of a slot: negative inside the prefix, N or more past the tree.
    nodes = slots - prefix
    index = nodes.clamp(0, num_nodes - 1)
    in_tree = (nodes >= 0) & (nodes < num_nodes)
    visible = ancestors.gather(
        2, index.unsqueeze(1).expand(batch, num_nodes, num_slots)
    ) & in_tree.unsqueeze(1)
    visible |= (nodes < 0).unsqueeze(1)
    if depths is not None:
        depths = depths.to(torch.long)
        key_positions = torch.where(nodes < 0, slots, prefix + depths.gather(1, index))
        distance = (prefix + depths).unsqueeze(2) - key_positions.unsqueeze(1)
    if sliding_window is not None:
        visible &= distance < sliding_window
    hidden = ~visible.unsqueeze(1)
    if alibi_slopes is None:
        return torch.zeros(hidden.shape, device=device, dtype=dtype).masked_fill_(
            hidden, float("-inf")
        )
    bias = -alibi_slopes.to(torch.promote_types(dtype, torch.float32)).view(
        1, -1, 1, 1
    ) * distance.unsqueeze(1)
    return bias.masked_fill(hidden, float("-inf")).to(dtype)


def _capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that no tensor's value can be read."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def packs_heads(q: torch.Tensor, kv_heads: int, num_slots: int) -> bool:
    """Whether a layer is faster with the query heads of a group laid beside each other as rows.

    On a CPU they fill blocks of rows that few nodes would leave half empty, which pays for the
    copies once the cache is longer than a block of slots; elsewhere packing always saves reading
    keys and values again.

    Args:
        q: ``[B, Hq, N, D]``.
        kv_heads: Number of key and value heads Hkv.
        num_slots: Cache rows in use.
    """
    if q.shape[1] == kv_heads:
        return False
    if q.device.type != "cpu":
        return True
    return 2 * q.shape[2] <= _CPU_BLOCK_ROWS and num_slots > _CPU_BLOCK_SLOTS


def pack_bias(bias: torch.Tensor, q_heads: int, kv_heads: int) -> torch.Tensor:
    """Repeat a bias over the query heads of a group, as ``biased_attention`` lays its rows.

    Args:
        bias: ``[B, 1 or Hq, N, S]`` from ``tree_bias``.
        q_heads: Number of query heads Hq.
        kv_heads: Number of key and value heads Hkv; divides Hq.

    Returns:
        ``[B, 1 or Hkv, (Hq/Hkv) * N, S]``, rows ordered group member first; ``bias`` itself when Hq
        equals Hkv.
    """
    group = q_heads // kv_heads
    if group == 1:
        return bias
    batch, heads, num_nodes, num_slots = bias.shape
    if heads == 1:
        return bias.expand(batch, group, num_nodes, num_slots).reshape(
            batch, 1, group * num_nodes, num_slots
        )
    return bias.reshape(batch, kv_heads, group * num_nodes, num_slots)


def biased_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One layer of attention under an additive bias; keys and values are not repeated over groups.

    Args:
        q: ``[B, Hq, N, D]``.
        k: ``[B, Hkv, S, D]``, cut to the slots of ``bias``. Rows hidden from every node must hold
            finite numbers.
        v: ``[B, Hkv, S, Dv]``, likewise.
        bias: ``[B, 1 or Hq, N, S]`` from ``tree_bias``, or the result of ``pack_bias`` on it, which
            saves a copy a layer where ``packs_heads`` or a softcap or sinks ask for one.
        scale: Factor on the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before the bias.
        sinks: ``[Hq]``, one further logit a head that takes probability and gives no value.

    Returns:
        ``[B, N, Hq, Dv]`` in the dtype of ``q``. A node that sees nothing gets zeros.
    """
    batch, q_heads, num_nodes, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    # on a GPU, PyTorch's attention gave zeros for a float32 bias beside 16-bit queries
    plain = softcap is None and sinks is None and (bias.dtype == q.dtype or not q.is_cuda)
    if bias.shape[2] != group * num_nodes:
        if plain and not packs_heads(q, kv_heads, k.shape[2]):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
            ).transpose(1, 2)
        bias = pack_bias(bias, q_heads, kv_heads)
    rows = q.reshape(batch, kv_heads, group * num_nodes, head_dim)
    if plain:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias, scale=scale)
    else:
        out = _explicit_attention(rows, k, v, bias, scale, softcap, sinks)
    return out.reshape(batch, q_heads, num_nodes, v.shape[-1]).transpose(1, 2)


def _explicit_attention(rows, k, v, bias, scale, softcap, sinks):
    """Attention spelled out in float32 (float64 stays), for what SDPA cannot express."""
    batch, kv_heads, num_rows, _ = rows.shape
    work = torch.promote_types(rows.dtype, torch.float32)
    scores = torch.matmul(rows.to(work), k.to(work).transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.add_(bias)
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        per_head = sinks.to(work).view(1, kv_heads, -1, 1, 1)
        num_nodes = num_rows // per_head.shape[2]
        sink = per_head.expand(batch, -1, -1, num_nodes, 1).reshape(batch, kv_heads, num_rows, 1)
        peak = torch.maximum(peak, sink)
    # A row that sees nothing has a peak of -inf; subtracting zero instead keeps its weights at zero
    # rather than NaN.
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    out = torch.matmul(weights, v.to(work))
    return (out / total.clamp_min(torch.finfo(work).tiny)).to(rows.dtype)


def tree_attention(
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
) -> torch.Tensor:
    """``ops.tree_attention`` in PyTorch operations; arguments and result as there.

    Sequences of equal length run as one batch. Ragged ones run one by one, so rows past a
    sequence's nodes are never read; while a CUDA graph is captured lengths cannot be read, so the
    whole cache is, and must hold finite numbers.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_nodes = q.shape[2]
    # A bias with finite values must not be rounded to 16 bits: ALiBi at a distance of 300 would be
    # off by whole units.
    dtype = q.dtype if alibi_slopes is None else torch.promote_types(q.dtype, torch.float32)

    def run(rows: slice, num_slots: int) -> torch.Tensor:
        bias = tree_bias(
            ancestor_bits[rows],
            prefix_lens[rows],
            num_slots,
            dtype,
            sliding_window=sliding_window,
            depths=None if depths is None else depths[rows],
            alibi_slopes=alibi_slopes,
        )
        keys, values = k_cache[rows, :, :num_slots], v_cache[rows, :, :num_slots]
        return biased_attention(
            q[rows], keys, values, bias, scale=scale, softcap=softcap, sinks=sinks
        )

    if _capturing(q):
        return run(slice(None), k_cache.shape[2])
    lens = prefix_lens.tolist()
    if len(set(lens)) <= 1:
        return run(slice(None), (lens[0] if lens else 0) + num_nodes)
    return torch.cat([run(slice(b, b + 1), length + num_nodes) for b, length in enumerate(lens)])
