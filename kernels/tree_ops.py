"""Public ops that build trees and move cache rows: signatures, checks and documentation
(re-exported by ``ops``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import torch_trees
from .checks import (
    ALL_FLOAT_DTYPES,
    INDEX_DTYPES,
    MAX_CANDIDATES,
    MAX_NODES,
    check_tensor,
    check_tree,
    runs_on_triton,
)
from .verdict import NodeSelection

MAX_CONTINUATIONS = 64


def ancestor_bits(
    parents: torch.Tensor, num_nodes: torch.Tensor, *, implementation: str = "auto"
) -> torch.Tensor:
    """The ancestors of every node, itself included, as bits.

    Args:
        parents: int32 or int64 [B, N], N up to 256; node 0 is the root, and a parent has a lower
            index than its children.
        num_nodes: int32 or int64 [B], 0 to N.
        implementation: "auto", "triton" or "torch".

    Returns:
        int32 [B, N, ceil(N/32)]; bit j % 32 of word j // 32 is set when node j is an ancestor of
        the node or the node itself. Rows past ``num_nodes`` are 0.

    Raises:
        ValueError: a shape or dtype is wrong; or, on a CPU, a parent is out of order or
            ``num_nodes`` exceeds N.
    """
    check_tree(parents, num_nodes)
    if runs_on_triton(parents.device, implementation):
        from .tree_building import launch_ancestor_bits

        return launch_ancestor_bits(parents, num_nodes)
    return torch_trees.ancestor_bits(parents, num_nodes)


def node_depths(
    parents: torch.Tensor, num_nodes: torch.Tensor, *, implementation: str = "auto"
) -> torch.Tensor:
    """The depth of every node: 0 for the root, and 0 past ``num_nodes``. The position of a node is
    prefix length + depth.

    Args:
        parents: int32 or int64 [B, N], N up to 256; node 0 is the root, and a parent has a lower
            index than its children.
        num_nodes: int32 or int64 [B], 0 to N.
        implementation: "auto", "triton" or "torch".

    Returns:
        int64 [B, N].

    Raises:
        ValueError: a shape or dtype is wrong; or, on a CPU, a parent is out of order or
            ``num_nodes`` exceeds N.
    """
    check_tree(parents, num_nodes)
    if runs_on_triton(parents.device, implementation):
        from .tree_building import launch_node_depths

        return launch_node_depths(parents, num_nodes)
    return torch_trees.node_depths(parents, num_nodes)


def select_best_nodes(
    cum_logprobs: torch.Tensor,
    parents: torch.Tensor,
    max_nodes: int,
    *,
    implementation: str = "auto",
) -> NodeSelection:
    """The ``max_nodes`` best candidates, closed under ancestors: the tree a best-first search would
    grow (OPT-Tree, Wang et al. 2024, section 3.2; EAGLE-2, Li et al. 2024, section 4.2).

    A candidate is worth its cumulative log-probability, but never more than its ancestors are; ties
    go to the lower index. Since a parent has a lower index and is worth no less, the best N contain
    the ancestors of each of them.

    Args:
        cum_logprobs: float [B, C], C up to 2048; -inf or NaN marks a candidate that does not exist,
            whose descendants do not exist either. A tree with a root holds it as candidate 0 with
            value 0.
        parents: int32 or int64 [B, C]; the parent has a lower index, -1 means none.
        max_nodes: 1 to 256.
        implementation: "auto", "triton" or "torch".

    Returns:
        NodeSelection(nodes[B, max_nodes], parents[B, max_nodes], num_nodes[B]): candidate indices
        in ascending order, the place of each one's parent in that list, and how many there are;
        padded with -1.

    Raises:
        ValueError: a shape or dtype is wrong, ``max_nodes`` is out of range; or, on a CPU, a parent
            is out of order.
    """
    check_tensor("cum_logprobs", cum_logprobs, ALL_FLOAT_DTYPES, "[B, C]", (None, None))
    batch, candidates = cum_logprobs.shape
    check_tensor(
        "parents", parents, INDEX_DTYPES, "[B, C]", (batch, candidates), cum_logprobs.device
    )
    if not 1 <= candidates <= MAX_CANDIDATES:
        raise ValueError(
            f"cum_logprobs must hold 1 to {MAX_CANDIDATES} candidates (dimension "
            f"1); got {candidates}"
        )
    if not isinstance(max_nodes, int) or not 1 <= max_nodes <= MAX_NODES:
        raise ValueError(f"max_nodes must be an int in 1..{MAX_NODES}; got {max_nodes!r}")
    if parents.device.type == "cpu":
        above = parents.numpy()
        wrong = (above >= np.arange(candidates)) | (above < -1)
        if wrong.any():
            b, node = (int(x[0]) for x in wrong.nonzero())
            raise ValueError(
                "parents must be -1 or name an earlier candidate; got "
                f"{int(above[b, node])} for candidate {node} of row {b}"
            )
    if runs_on_triton(parents.device, implementation):
        from .tree_building import launch_select_best_nodes

        return launch_select_best_nodes(cum_logprobs, parents, max_nodes)
    return torch_trees.select_best_nodes(cum_logprobs, parents, max_nodes)


def match_ngrams(
    tokens: torch.Tensor,
    lens: torch.Tensor,
    *,
    max_ngram: int,
    num_matches: int,
    length: int,
    min_ngram: int | None = None,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Earlier places where the last tokens of a history occurred, and what followed them (prompt
    lookup decoding).

    The match of a place is the number of tokens up to and including it that equal the last tokens
    of the history, at most ``max_ngram``. Places are ranked by that number, then the most recent
    first.

    Args:
        tokens: int32 or int64 [B, S], the history of each row.
        lens: int32 or int64 [B], tokens of each history, 0 to S.
        max_ngram: the longest match to tell apart, 1 or more.
        num_matches: M, the most places to return.
        length: the most tokens to return after each.
        min_ngram: the shortest match worth a place. None takes places of the longest match only.
        implementation: "auto", "triton" or "torch".

    Returns:
        ``(continuations, match_length)``: int64 [B, M, length], the tokens after each place as far
        as the history goes, padded with -1; and int64 [B], the longest match of the row, 0 without
        any.

    Raises:
        ValueError: a shape, dtype or count is wrong; or, on a CPU, ``lens`` lies outside 0..S.
    """
    check_tensor("tokens", tokens, INDEX_DTYPES, "[B, S]", (None, None))
    check_tensor("lens", lens, INDEX_DTYPES, "[B]", (tokens.shape[0],), tokens.device)
    for name, value in (("max_ngram", max_ngram), ("num_matches", num_matches), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int; got {value!r}")
    if min_ngram is not None and not 1 <= min_ngram <= max_ngram:
        raise ValueError(
            f"min_ngram must be None or lie in 1..max_ngram ({max_ngram}); got {min_ngram!r}"
        )
    if lens.device.type == "cpu":
        for count in lens.tolist():
            if not 0 <= count <= tokens.shape[1]:
                raise ValueError(
                    f"lens must lie in 0..{tokens.shape[1]}, the columns of tokens; got {count}"
                )
    if runs_on_triton(tokens.device, implementation):
        from .ngram_match import launch_match_ngrams

        return launch_match_ngrams(tokens, lens, max_ngram, num_matches, length, min_ngram)
    return torch_trees.match_ngrams(tokens, lens, max_ngram, num_matches, length, min_ngram)


def merge_continuations(
    continuations: torch.Tensor, *, implementation: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Continuations of one text as a trie: common beginnings become the same nodes.

    Place ``m * L + l`` is token l of continuation m. A beginning belongs to the first continuation
    that has it; the places of the others repeat it and hold no node. A continuation ends before its
    first negative token. A continuation counts among several by its rank, 0.4, 0.25, 0.2, 0.15,
    0.15 ..., the likelier first, as ``match_ngrams`` orders them.

    Args:
        continuations: int32 or int64 [B, M, L], M up to 64, -1 padded.
        implementation: "auto", "triton" or "torch".

    Returns:
        ``(parents, fresh, share)``, all [B, M, L]: int64, the place of a node's parent, -1 where
        the parent is the root or the place holds no node; bool, whether the place holds a node; and
        float32, the weighted share of the row's continuations that go through the place, 0 past the
        end of one.

    Raises:
        ValueError: the shape or dtype is wrong, or M lies outside 1..64.
    """
    check_tensor("continuations", continuations, INDEX_DTYPES, "[B, M, L]", (None, None, None))
    if not 1 <= continuations.shape[1] <= MAX_CONTINUATIONS:
        raise ValueError(
            f"continuations must hold 1 to {MAX_CONTINUATIONS} of a row (dimension 1); "
            f"got {continuations.shape[1]}"
        )
    if runs_on_triton(continuations.device, implementation):
        from .tree_building import launch_merge_continuations

        return launch_merge_continuations(continuations)
    return torch_trees.merge_continuations(continuations)


def compact_kv(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    path: torch.Tensor,
    accept_length: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    implementation: str = "auto",
) -> None:
    """Keep the cache rows of the accepted path: row ``prefix_lens[b] + path[b, i]`` moves to row
    ``prefix_lens[b] + i``.

    In place, i from 0 (the root) to ``accept_length[b]``. Every row is read before any is written,
    so overlaps are safe. Rows past ``prefix_lens[b] + accept_length[b]`` keep what they held.

    Args:
        layers: pairs (k_cache [B, Hkv, S, D], v_cache [B, Hkv, S, Dv]) of any dtype; heads and head
            sizes may differ between layers, and between keys and values.
        path: int32 or int64 [B, P], node indices from the root, padded with -1.
        accept_length: int32 or int64 [B].
        prefix_lens: int32 or int64 [B], committed rows of each sequence.
        implementation: "auto", "triton" or "torch".

    Raises:
        ValueError: a shape or dtype is wrong; or, on a CPU, a node of the path does not fit the
            cache.
    """
    check_tensor("path", path, INDEX_DTYPES, "[B, P]", (None, None))
    batch, capacity = path.shape
    check_tensor("accept_length", accept_length, INDEX_DTYPES, "[B]", (batch,), path.device)
    check_tensor("prefix_lens", prefix_lens, INDEX_DTYPES, "[B]", (batch,), path.device)
    slots = None
    for index, pair in enumerate(layers):
        for name, cache in zip(("k_cache", "v_cache"), pair):
            if cache.dim() != 4 or cache.shape[0] != batch:
                raise ValueError(
                    f"{name} of layer {index} must be [B, Hkv, S, D] with B = "
                    f"{batch}; got {list(cache.shape)}"
                )
            slots = cache.shape[2] if slots is None else min(slots, cache.shape[2])
    if slots is None:
        return
    if path.device.type == "cpu":
        for accepted, start, nodes in zip(
            accept_length.tolist(), prefix_lens.tolist(), path.tolist()
        ):
            if not 0 <= accepted < max(capacity, 1):
                raise ValueError(
                    f"accept_length must lie in 0..{capacity - 1}, as path has "
                    f"{capacity} columns; got {accepted}"
                )
            if start < 0 or start + max(nodes[: accepted + 1]) >= slots:
                raise ValueError(
                    f"path must stay inside the {slots} cache rows; got prefix "
                    f"{start} and path {nodes[: accepted + 1]}"
                )
    if runs_on_triton(path.device, implementation):
        from .compaction import launch_compact_kv

        return launch_compact_kv(layers, path, accept_length, prefix_lens)
    return torch_trees.compact_kv(layers, path, accept_length, prefix_lens)


def append_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix_lens: torch.Tensor,
    *,
    interleaved: bool = False,
    implementation: str = "auto",
) -> torch.Tensor:
    """Rotary embedding of queries and keys (RoFormer, Su et al. 2021, equation 34), and the write
    of
    the nodes' keys and values into cache rows ``prefix_lens[b] + i``, in place.

    Rotation is computed in float32 and rounded once. Any scaling of the embedding is in ``cos`` and
    ``sin`` already.

    Args:
        q: float [B, Hq, N, D].
        k: [B, Hkv, N, D], dtype of ``q``.
        v: [B, Hkv, N, Dv], likewise.
        cos: float [B, N, R], R even and at most D: columns from R on are not rotated. Both columns
            of a pair carry their factor, as transformers' rotary modules give it.
        sin: as ``cos``.
        k_cache: [B, Hkv, S, D], dtype of ``q``, unit last stride.
        v_cache: [B, Hkv, S, Dv], likewise.
        prefix_lens: int32 or int64 [B], 0 to S - N.
        interleaved: pairs are neighbouring columns (2i, 2i + 1); otherwise (i, i + R/2).
        implementation: "auto", "triton" or "torch".

    Returns:
        The rotated queries, [B, Hq, N, D].

    Raises:
        ValueError: a shape, dtype or stride is wrong; or, on a CPU, nodes do not fit the cache.
    """
    check_tensor("q", q, ALL_FLOAT_DTYPES, "[B, Hq, N, D]", (None,) * 4)
    batch, _, num_nodes, head_dim = q.shape
    same, device = (q.dtype,), q.device
    check_tensor("k", k, same, "[B, Hkv, N, D]", (batch, None, num_nodes, head_dim), device)
    kv_heads = k.shape[1]
    check_tensor("v", v, same, "[B, Hkv, N, Dv]", (batch, kv_heads, num_nodes, None), device)
    check_tensor("cos", cos, ALL_FLOAT_DTYPES, "[B, N, R]", (batch, num_nodes, None), device)
    check_tensor("sin", sin, ALL_FLOAT_DTYPES, "[B, N, R]", tuple(cos.shape), device)
    check_tensor(
        "k_cache", k_cache, same, "[B, Hkv, S, D]", (batch, kv_heads, None, head_dim), device
    )
    sizes = (batch, kv_heads, k_cache.shape[2], v.shape[3])
    check_tensor("v_cache", v_cache, same, "[B, Hkv, S, Dv]", sizes, device)
    check_tensor("prefix_lens", prefix_lens, INDEX_DTYPES, "[B]", (batch,), device)
    if cos.shape[2] % 2 or cos.shape[2] > head_dim:
        raise ValueError(
            f"cos must have an even last size of at most {head_dim}; got {cos.shape[2]}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1 and cache.shape[3] > 1:
            raise ValueError(
                f"{name} must have a last stride of 1; got strides {list(cache.stride())}"
            )
    if device.type == "cpu":
        for length in prefix_lens.tolist():
            if not 0 <= length <= k_cache.shape[2] - num_nodes:
                most = k_cache.shape[2] - num_nodes
                raise ValueError(
                    f"prefix_lens must lie in 0..{most}, so that the nodes fit; got {length}"
                )
    if runs_on_triton(device, implementation):
        from .rotary import launch_append_rotary as run
    else:
        run = torch_trees.append_rotary
    return run(q, k, v, cos, sin, k_cache, v_cache, prefix_lens, interleaved)
